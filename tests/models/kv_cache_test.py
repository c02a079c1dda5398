"""Forwards that look at kept keys and values, beside forwards of everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.config.model import ModelConfig
from gptoughts.models.deepseek.config import DeepSeekConfig
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.kv_cache import CacheWindow, KVCache, attention_layers, cached_states
from gptoughts.models.llada.config import LLaDAConfig, LLaDALatentConfig
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups
from tests.distributed import run_distributed

LENGTHS = (11, 23, 17)
PLACES = 40
TOLERANCE = 1e-5
_COMMON: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100,
    "seq_length": PLACES,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 24, "q_lora_rank": 20, "qk_head_dim": 12, "qk_pos_emb_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
SHAPES: dict[str, ModelConfig] = {
    "gpt": GPTConfig(**_COMMON, num_query_groups=2, qk_layernorm=True),
    "mla": MLAConfig(**_COMMON, **_LATENT),
    "deepseek": DeepSeekConfig(
        **_COMMON, **_LATENT | {"q_lora_rank": None}, num_moe_experts=6, moe_router_topk=2, moe_ffn_hidden_size=24,
        rotary_scaling_factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.9,
    ),
    "llada": LLaDAConfig(**_COMMON, num_query_groups=2),
    "llada-mla": LLaDALatentConfig(**_COMMON, **_LATENT),
    # Of widths that our C++ takes.
    "gpt-wide": GPTConfig(**_COMMON | {"hidden_size": 64}, num_query_groups=2, qk_layernorm=True),
    "llada-wide": LLaDAConfig(**_COMMON | {"hidden_size": 64}, num_query_groups=2),
}  # fmt: skip


def build(name: str, tensor: int = 1, **changes: Any) -> Any:
    """A toy in evaluation mode; weights are large, so that attention is not nearly even."""
    parallel = ParallelConfig(tensor=tensor)
    groups.initialize(parallel, seed=3)
    shape = replace(SHAPES[name], init_method_std=0.3, **changes).filled()
    family = name.split("-")[0]
    config = ExperimentConfig(model_type=family, model=shape, parallel=parallel, seed=3)
    return FAMILIES[family].load_model_builder()(config, params_dtype=torch.float32).eval()


def rows() -> torch.Tensor:
    return torch.randint(0, 100, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def prefill_then_decode(name: str, tensor: int, chunk: int) -> float:
    """Largest error of logits: ragged rows in chunks, then token by token, each row by itself for comparison."""
    model = build(name, tensor)
    tokens = rows()
    cache = KVCache.of_model(model, rows=len(LENGTHS) + 1, places=PLACES)
    for layer in cache.kept:
        for kept in layer:
            kept[0].fill_(torch.nan)  # another row's content must not be read
    prefix = min(LENGTHS) - 3
    found = []
    for start in range(0, prefix, chunk):
        count = min(chunk, prefix - start)
        window = CacheWindow.looking_back(cache, [start] * len(LENGTHS), count, first_row=1)
        found.append(model.logits(cached_states(model, tokens[:, start : start + count], window)).transpose(0, 1))
    # From here on the rows are at different positions: the longer ones go ahead by themselves.
    starts = [length - 3 for length in LENGTHS]
    for row, start in enumerate(starts):
        if start > prefix:
            window = CacheWindow.looking_back(cache, [prefix], start - prefix, first_row=row + 1)
            cached_states(model, tokens[row : row + 1, prefix:start], window)
    for step, count in ((0, 2), (2, 1)):
        window = CacheWindow.looking_back(cache, [start + step for start in starts], count, first_row=1)
        parts = [tokens[row, start + step : start + step + count] for row, start in enumerate(starts)]
        found.append(model.logits(cached_states(model, torch.stack(parts), window)).transpose(0, 1))
    together = torch.cat(found, dim=1)
    errors = []
    for row, length in enumerate(LENGTHS):
        expected = model(tokens[row : row + 1, :length])[0]
        places = [*range(prefix), *range(length - 3, length)]
        errors.append(error(together[row], expected[places]))
    return max(errors)


@pytest.mark.parametrize(
    ("name", "tensor", "chunk"),
    [("gpt", 1, 5), ("gpt", 1, 99), ("mla", 1, 3), ("mla", 1, 99), ("deepseek", 1, 5), ("gpt", 2, 4), ("mla", 2, 4)],
)
def test_a_cache_changes_no_logits(name: str, tensor: int, chunk: int) -> None:
    assert max(run_distributed(prefill_then_decode, tensor, name, tensor, chunk)) < TOLERANCE


@torch.inference_mode()
def block_with_kept_surroundings(name: str) -> tuple[float, float, float]:
    """Errors of (a full forward of ragged rows, an unchanged block, a changed block in a model of one layer)."""
    model = build(name)
    tokens = rows()
    cache = KVCache.of_model(model, rows=len(LENGTHS), places=PLACES)
    whole = CacheWindow.looking_around(cache, torch.arange(max(LENGTHS)).expand(len(LENGTHS), -1), LENGTHS)
    full = model.logits(cached_states(model, tokens, whole)).transpose(0, 1)
    expected = [model(tokens[row : row + 1, :length])[0] for row, length in enumerate(LENGTHS)]
    first = max(error(full[row, :length], expected[row]) for row, length in enumerate(LENGTHS))

    starts = [length - 6 for length in LENGTHS]  # blocks of four, at another place in each row, with two tokens behind
    places = torch.tensor(starts)[:, None] + torch.arange(4)
    block = CacheWindow.looking_around(cache, places, LENGTHS)
    again = model.logits(cached_states(model, tokens.gather(1, places), block)).transpose(0, 1)
    second = max(error(again[row], expected[row][places[row]]) for row in range(len(LENGTHS)))

    model = build(name, num_layers=1)
    cache = KVCache.of_model(model, rows=len(LENGTHS), places=PLACES)
    cached_states(model, tokens, CacheWindow.looking_around(cache, whole.positions, LENGTHS))
    changed = tokens.scatter(1, places, 7)
    block = CacheWindow.looking_around(cache, places, LENGTHS)
    found = model.logits(cached_states(model, changed.gather(1, places), block)).transpose(0, 1)
    third = max(
        error(found[row], model(changed[row : row + 1, :length])[0][places[row]]) for row, length in enumerate(LENGTHS)
    )
    return first, second, third


@pytest.mark.parametrize("name", ["llada", "llada-mla"])
def test_blocks_look_around_at_what_is_kept(name: str) -> None:
    """In one layer keys and values depend on their own token alone: so a changed block is exact there."""
    (errors,) = run_distributed(block_with_kept_surroundings, 1, name)
    assert max(errors) < TOLERANCE


def sizes(name: str) -> int:
    cache = KVCache.of_model(build(name), rows=3, places=PLACES)
    return cache.num_bytes


def test_latent_attention_keeps_the_latent_and_the_rotary_key_alone() -> None:
    (latent,) = run_distributed(sizes, 1, "mla")
    assert latent == (24 + 8) * 2 * 4 * 3 * PLACES
    (heads,) = run_distributed(sizes, 1, "gpt")
    assert heads == 2 * 2 * 12 * 2 * 4 * 3 * PLACES


def misuse() -> list[str]:
    model = build("gpt")
    cache = KVCache.of_model(model, rows=2, places=8)
    said = []
    for starts, count in (([3], 6), ([0, 0, 0], 1)):
        with pytest.raises(ValueError, match="the cache has 2 rows of 8 tokens") as caught:
            CacheWindow.looking_back(cache, starts, count)
        said.append(str(caught.value))
    attention = attention_layers(model)[0]
    attention.cache = CacheWindow.looking_back(cache, [0], 1).layers()[0]
    with torch.inference_mode():
        states, mask = torch.zeros(1, 1, 48), torch.zeros(1, 1, 1, 1, dtype=torch.bool)
        with pytest.raises(ValueError, match="attention_mask"):
            attention(states, mask)
    return said


def test_what_does_not_fit_is_refused() -> None:
    ((long, many),) = run_distributed(misuse, 1)
    assert "up to 9 tokens" in long
    assert "3 rows" in many


@torch.inference_mode()
def both_ways_of_latents(count: int) -> float:
    model = build("mla")
    attention = attention_layers(model)[0]
    cache = KVCache.of_model(model, rows=1, places=PLACES)
    cached_states(model, rows()[:1, :20], CacheWindow.looking_back(cache, [0], 20))
    found = []
    for is_absorbed in (True, False):
        attention.is_absorbed = lambda count, answer=is_absorbed: answer
        attention.cache = CacheWindow.looking_back(cache, [20], count).layers()[0]
        x = torch.randn(count, 1, 48, generator=torch.Generator().manual_seed(4))
        found.append(attention(x, None, model.rotary_table(PLACES, torch.arange(20, 20 + count)[None]))[0])
    return error(*found)


@pytest.mark.parametrize("count", [1, 7])
def test_absorbed_equals_expanded(count: int) -> None:
    (difference,) = run_distributed(both_ways_of_latents, 1, count)
    assert difference < TOLERANCE
