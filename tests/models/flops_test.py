"""Counts against arithmetic done by hand and against published models."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptoughts.models.flops import count_parameters, flops_per_token
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.registry import FAMILIES

GPT, MLA = FAMILIES["gpt"], FAMILIES["mla"]


def test_llama_2_7b() -> None:
    """6,738,415,616 parameters (huggingface.co/meta-llama/Llama-2-7b, safetensors metadata)."""
    model = GPTConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, vocab_size=32000)
    assert count_parameters(GPT, model).total == 6_738_415_616


def test_llama_3_8b_has_grouped_queries() -> None:
    """8,030,261,248 parameters (huggingface.co/meta-llama/Meta-Llama-3-8B, safetensors metadata)."""
    model = GPTConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32,
                      num_query_groups=8, vocab_size=128256)  # fmt: skip
    assert count_parameters(GPT, model).total == 8_030_261_248


def test_deepseek_v3_attention() -> None:
    """One layer's attention with the matrices of DeepSeek-V3's published shape (arXiv:2412.19437, section 4.2)."""
    model = MLAConfig(hidden_size=7168, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_head_dim=128,
                      qk_pos_emb_head_dim=64, v_head_dim=128)  # fmt: skip
    matrices = 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 512 * 32768 + 16384 * 7168
    assert model.attention_parameters() == matrices + 1536 + 512
    assert model.attention_width() == 128 * (192 + 128)


def test_optional_parts_are_counted() -> None:
    model = GPTConfig(num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2)
    total = count_parameters(GPT, model).total
    assert count_parameters(GPT, replace(model, add_qkv_bias=True)).total - total == 2 * (64 + 2 * 32)
    assert count_parameters(GPT, replace(model, qk_layernorm=True)).total - total == 2 * 2 * 16
    tied = count_parameters(GPT, replace(model, untie_embeddings_and_output_weights=False))
    assert total - tied.total == tied.embedding
    assert tied.active == count_parameters(GPT, model).active  # the output layer is a product in both
    padded = replace(model, vocab_size=8193)
    assert count_parameters(GPT, padded).embedding == 8320 * 64


def test_flops_of_multi_head_attention_are_the_known_formula() -> None:
    model = GPTConfig(num_layers=6, hidden_size=384, ffn_hidden_size=1024, num_attention_heads=6)
    active = count_parameters(GPT, model).active
    bidirectional = replace(GPT, is_causal=False)
    assert flops_per_token(bidirectional, model, 512) == 6 * active + 12 * 6 * 384 * 512
    assert flops_per_token(GPT, model, 512) == 6 * active + 6 * 6 * 384 * 512


def test_attention_grows_with_the_sequence_and_mla_uses_its_own_head_sizes() -> None:
    model = MLA.presets["debug"].model
    per_token = flops_per_token(MLA, model, 1024) - flops_per_token(MLA, model, 512)
    assert per_token == 3 * 4 * 512 * 4 * (64 + 32 + 64)


def test_a_shape_of_another_family_is_refused() -> None:
    with pytest.raises(AssertionError):
        count_parameters(GPT, MLA.presets["debug"].model)
