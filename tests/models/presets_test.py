"""Presets: they can be built, are as large as they say, and keep to the table that they cite."""

from __future__ import annotations

import pytest

from gptoughts.models.flops import count_parameters
from gptoughts.models.registry import FAMILIES

HOUSE = ("debug", "small", "medium", "large", "xl")
EVERY = [variant for family in FAMILIES.values() for variant in (family, *family.variants)]
CASES = [(family, size) for family in EVERY for size in HOUSE]
PUBLISHED = [(family, size) for family in FAMILIES.values() for size in family.presets if size not in HOUSE]
NOMINAL = {"debug": 7e6, "small": 125e6, "medium": 350e6, "large": 760e6, "xl": 1.5e9}
GPT3 = {  # arXiv:2005.14165, table 2.1: layers, width, heads, head size, learning rate
    "small": (12, 768, 12, 64, 6e-4),
    "medium": (24, 1024, 16, 64, 3e-4),
    "large": (24, 1536, 16, 96, 2.5e-4),
    "xl": (24, 2048, 24, 128, 2e-4),
}


@pytest.mark.parametrize(("family", "size"), CASES, ids=lambda v: getattr(v, "name", v))
def test_a_preset_is_sound(family, size: str) -> None:
    preset = family.presets[size]
    assert isinstance(preset.model, family.config_class)
    assert preset.model.problems() == []
    assert preset.model.filled().problems() == []
    assert preset.model.filled().filled() == preset.model.filled()
    assert preset.source
    count = count_parameters(FAMILIES[family.name], preset.model)
    assert count.total == pytest.approx(preset.num_parameters, rel=0.01)
    if preset.num_active_parameters is not None:
        assert count.active == pytest.approx(preset.num_active_parameters, rel=0.01)
    if size not in NOMINAL:
        return  # a published shape: its count is the source's
    # A model with experts is named by what a token passes.
    has_experts = count.active < count.total - count.embedding
    nominal = count.active + count.embedding if has_experts else count.total
    assert nominal == pytest.approx(NOMINAL[size], rel=0.1)
    assert preset.model.padded_vocab_size == (8192 if size == "debug" else 32768)
    assert preset.model.vocab_size == preset.model.padded_vocab_size - len(preset.model.special_tokens())
    for tensor in (1, 2, 4):
        assert all(count % tensor == 0 for count in preset.model.tensor_parallel_divisors().values())


@pytest.mark.parametrize(("family", "size"), CASES, ids=lambda v: getattr(v, "name", v))
def test_a_preset_keeps_to_its_table(family, size: str) -> None:
    if size not in NOMINAL:
        assert "huggingface.co" in family.presets[size].source
        return
    if size == "debug":
        assert family.presets[size].model.seq_length == 512
        return
    if size not in GPT3:
        return
    layers, width, heads, head_size, lr = GPT3[size]
    preset = family.presets[size]
    model = preset.model.filled()
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, preset.lr) == (layers, width, heads, lr)
    assert getattr(model, "kv_channels" if hasattr(model, "kv_channels") else "v_head_dim") == head_size
    # As many parameters as a feed-forward layer of width 4 h without a gate; SwiGLU's 8/3 h is rounded up to 256s.
    assert 1.0 <= model.feed_forward_parameters() / (8 * width**2) < 1.04


@pytest.mark.parametrize(("family", "size"), PUBLISHED, ids=lambda v: getattr(v, "name", v))
def test_a_published_shape_has_the_published_number_of_parameters(family, size: str) -> None:
    preset = family.presets[size]
    assert isinstance(preset.model, family.config_class)
    assert preset.model.problems() == []
    assert preset.source.startswith("https://")
    assert count_parameters(family, preset.model).total == pytest.approx(preset.num_parameters, rel=0.01)


def test_llama_3_8b_is_the_published_shape() -> None:
    model = FAMILIES["gpt"].presets["llama-3-8b"].model
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads) == (
        32,
        4096,
        14336,
        32,
    )
    assert (model.num_query_groups, model.vocab_size, model.seq_length, model.rotary_base) == (8, 128256, 8192, 500000)
    assert model.untie_embeddings_and_output_weights
