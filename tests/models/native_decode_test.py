"""Our C++ for decoding, beside plain formulas in fp64; ``decode_step_test`` has it beside the modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.models import native_decode
from gptoughts.models.decode_step import DecodeStep
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.kv_cache import CacheWindow, KVCache
from gptoughts.models.native_decode import MOST_ROWS, native_decoder
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups
from tests.distributed import run_distributed
from tests.models.kv_cache_test import build, error

pytestmark = pytest.mark.skipif(
    (library := native_decode.library()) is None or not library.decode_width(),
    reason="needs a C++ compiler with OpenMP, and a processor with AVX2",
)

PLACES = 96
SHAPES = {
    "one head of keys each": GPTConfig(
        num_layers=2, hidden_size=128, ffn_hidden_size=336, num_attention_heads=2, vocab_size=131, seq_length=PLACES
    ),
    "groups of four": GPTConfig(
        num_layers=2, hidden_size=128, ffn_hidden_size=176, num_attention_heads=8, num_query_groups=2, vocab_size=50,
        seq_length=PLACES, qk_layernorm=True, add_qkv_bias=True,
    ),
    "wide heads": GPTConfig(
        num_layers=1, hidden_size=256, ffn_hidden_size=64, num_attention_heads=2, kv_channels=144, vocab_size=64,
        seq_length=PLACES,
    ),
}  # fmt: skip


def model_of(shape: GPTConfig, dtype: torch.dtype = torch.float32, tensor: int = 1) -> Any:
    parallel = ParallelConfig(tensor=tensor)
    groups.initialize(parallel, seed=3)
    config = ExperimentConfig(
        model_type="gpt", model=replace(shape, init_method_std=0.2).filled(), parallel=parallel, seed=3
    )
    model = FAMILIES["gpt"].load_model_builder()(config, params_dtype=dtype).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are no ones and zeros
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def plain(model: Any, tokens: Tensor) -> Tensor:
    """States after the final norm [s, h] of a whole causal row, in fp64 and without any of our code."""
    config = model.config
    d = config.kv_channels
    groups_, per_group = config.num_query_groups, config.num_attention_heads // config.num_query_groups
    angle = torch.arange(tokens.numel(), dtype=torch.float64)[:, None] * 10000.0 ** (
        -torch.arange(0, d, 2, dtype=torch.float64) / d
    )

    def normed(x: Tensor, norm: Any) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()

    def turned(x: Tensor) -> Tensor:  # [s, heads, d]
        left, right = x.chunk(2, dim=-1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

    x = model.embedding.word_embeddings.weight.double()[tokens]
    for layer in model.decoder.layers:
        attention = layer.self_attention
        mixed = normed(x, layer.input_layernorm) @ attention.linear_qkv.weight.double().t()
        if attention.linear_qkv.bias is not None:
            mixed = mixed + attention.linear_qkv.bias.double()
        q, k, v = mixed.view(len(tokens), groups_, per_group + 2, d).split((per_group, 1, 1), dim=2)
        if config.qk_layernorm:
            q, k = normed(q, attention.q_layernorm), normed(k, attention.k_layernorm)
        q = turned(q.flatten(1, 2))
        k, v = turned(k.squeeze(2)).repeat_interleave(per_group, 1), v.squeeze(2).repeat_interleave(per_group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / d**0.5
        scores.masked_fill_(torch.ones(len(tokens), len(tokens)).triu(1).bool(), -torch.inf)
        found = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + found @ attention.linear_proj.weight.double().t()
        gate, up = (normed(x, layer.pre_mlp_layernorm) @ layer.mlp.linear_fc1.weight.double().t()).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ layer.mlp.linear_fc2.weight.double().t()
    return normed(x, model.decoder.final_layernorm)


def products(rows: Tensor, weight: Tensor, threads: int = 2) -> Tensor:
    """rows weight^T by the library alone."""
    assert library is not None
    found = torch.empty(rows.size(0), weight.size(0))
    library.decode_product(
        rows.data_ptr(), rows.size(0), weight.data_ptr(), weight.size(1), weight.size(0), found.data_ptr(), threads
    )
    return found


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 1), (384, 50), (512, 97), (528, 48), (1408, 131), (4096, 25)])
def test_products_of_any_size_have_one_order_of_sums(inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(8)
    rows, weight = (torch.randn(n, inputs, generator=generator) for n in (MOST_ROWS, outputs))
    expected = rows.double() @ weight.double().t()
    alone = torch.cat([products(row, weight, 1) for row in rows.split(1)])
    assert error(alone.double(), expected) < 1e-6
    for count in (*range(2, 20), MOST_ROWS):
        for threads in (1, 2, 3):
            assert torch.equal(products(rows[:count].contiguous(), weight, threads), alone[:count]), (count, threads)


@torch.inference_mode()
def one_by_one(name: str) -> tuple[float, float]:
    """Errors of states and logits of a row, decoded token after token."""
    model = model_of(SHAPES[name])
    step, tokens = DecodeStep(model), torch.randint(0, 50, (PLACES,), generator=torch.Generator().manual_seed(5))
    assert step.native is not None
    cache = KVCache.of_model(model, rows=1, places=PLACES)
    found = torch.cat([step.states([int(token)], [place], cache) for place, token in enumerate(tokens)])
    expected = plain(model, tokens)
    output = step.output.detach().double()
    return error(found.double(), expected), error(step.logits(found[:64]).double(), expected[:64] @ output.t())


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_equals_the_formulas(name: str) -> None:
    (errors,) = run_distributed(one_by_one, 1, name)
    assert max(errors) < 2e-5


@torch.inference_mode()
def rows_alone_and_together(name: str) -> list[bool]:
    """Whether states of 1 ... 9 and of all rows have the bits of those alone, on one to three threads."""
    model = model_of(SHAPES[name])
    step, before = DecodeStep(model), torch.get_num_threads()
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(0, 50, (MOST_ROWS,), generator=generator)
    starts = torch.randint(0, PLACES - 1, (MOST_ROWS,), generator=generator).tolist()
    cache = KVCache.of_model(model, rows=MOST_ROWS, places=PLACES)
    for kept in cache.whole:
        kept.normal_(generator=generator)
    alone = []
    for row in range(MOST_ROWS):
        own = KVCache.of_model(model, rows=1, places=PLACES)
        for kept, source in zip(own.whole, cache.whole, strict=True):
            kept.copy_(source[:, row : row + 1])
        states = step.states([int(ids[row])], [starts[row]], own)
        alone.append((states, step.logits(states)))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in (*range(1, 10), MOST_ROWS):
            states = step.states(ids[:count].tolist(), starts[:count], cache)
            expected = [torch.cat(parts) for parts in zip(*alone[:count], strict=True)]
            found.append(torch.equal(states, expected[0]) and torch.equal(step.logits(states), expected[1]))
    torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_neither_other_rows_nor_threads_change_a_bit(name: str) -> None:
    (found,) = run_distributed(rows_alone_and_together, 1, name)
    assert all(found)
    assert len(found) == 30


@torch.inference_mode()
def extremes() -> tuple[bool, bool]:
    """Whether states are finite where scores are of hundreds, and NaN where an input is."""
    model = model_of(SHAPES["one head of keys each"])
    for layer in model.decoder.layers:
        layer.self_attention.linear_qkv.weight.mul_(60.0)
        layer.mlp.linear_fc1.weight.mul_(200.0)
    step = DecodeStep(model)
    cache = KVCache.of_model(model, rows=1, places=PLACES)
    for place in range(9):
        found = step.states([place], [place], cache)
    model.embedding.word_embeddings.weight[7] = torch.nan
    broken = step.states([7], [9], cache)
    return bool(found.isfinite().all()), bool(broken.isnan().all())


def test_large_scores_stay_finite_and_a_nan_is_no_number() -> None:
    assert run_distributed(extremes, 1) == [(True, True)]


@torch.inference_mode()
def who_has_one() -> dict[str, bool]:
    shape = SHAPES["one head of keys each"]
    models = {
        "it": model_of(shape),
        "bf16": model_of(shape, torch.bfloat16),
        "width": model_of(replace(shape, ffn_hidden_size=84)),
        "experts": build("deepseek"),
        "latents": build("mla"),
    }
    found = {name: native_decoder(model, model.output_layer.weight) is not None for name, model in models.items()}
    turned = model_of(shape)
    weight = turned.decoder.layers[1].mlp.linear_fc2.weight
    weight.data = weight.data.t().contiguous().t()
    return found | {"layout": native_decoder(turned, turned.output_layer.weight) is not None}


def test_models_that_it_does_not_know_stay_with_torch() -> None:
    (found,) = run_distributed(who_has_one, 1)
    assert [name for name, has in found.items() if has] == ["it"]


def divided() -> bool:
    model = model_of(SHAPES["one head of keys each"], tensor=2)
    return DecodeStep(model).native is None


def test_divided_layers_stay_with_torch() -> None:
    assert run_distributed(divided, 2) == [True, True]


@torch.inference_mode()
def large_windows() -> tuple[bool, bool]:
    """Whether a window of the most rows goes through C++, and one more through torch, with states alike."""
    model = model_of(SHAPES["groups of four"])
    step, calls = DecodeStep(model), []
    assert step.native is not None
    states = step.native.states
    step.native.states = lambda *given: calls.append(given[0].size(0)) or states(*given)  # type: ignore[method-assign]
    tokens = torch.randint(0, 50, (1, MOST_ROWS + 1), generator=torch.Generator().manual_seed(7))
    found = []
    for count in (MOST_ROWS, MOST_ROWS + 1):
        cache = KVCache.of_model(model, rows=1, places=PLACES)
        positions = torch.arange(count)[None]
        window = CacheWindow.looking_around(cache, positions, [MOST_ROWS])
        found.append(step.window_states(tokens[0, :count], window))
    return calls == [MOST_ROWS], error(found[1][:MOST_ROWS], found[0]) < 1e-5


def test_many_rows_are_the_libraries() -> None:
    assert run_distributed(large_windows, 1) == [(True, True)]
