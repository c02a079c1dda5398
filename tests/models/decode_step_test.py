"""A token through a decoder in few operations, beside its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch

from gptoughts.models.decode_operations import lay_out_for_decoding
from gptoughts.models.decode_step import DecodeStep, is_decodable
from gptoughts.models.kv_cache import CacheWindow, KVCache, cached_states
from gptoughts.platform import native_library
from tests.distributed import run_distributed
from tests.models.kv_cache_test import LENGTHS, PLACES, TOLERANCE, build, error, rows

PREFIX = 9


@contextmanager
def compiler(is_there: bool) -> Iterator[None]:
    """With our C++, or as where it cannot be compiled."""
    with nullcontext() if is_there else patch.object(native_library, "load", lambda source: None):
        yield


@torch.inference_mode()
def step_beside_modules(
    name: str, ragged: bool, tied: bool = False, tensor: int = 1, native: bool = False
) -> tuple[float, float]:
    """Errors of states over three steps, and of what is kept at the end."""
    changes = {"q_lora_rank": None} if name == "mla" and ragged else {}
    model = build(name, tensor, untie_embeddings_and_output_weights=not tied, **changes)
    assert is_decodable(model)
    tokens = rows()
    caches = [KVCache.of_model(model, rows=len(LENGTHS), places=PLACES) for _ in range(2)]
    for cache in caches:
        cached_states(model, tokens[:, :PREFIX], CacheWindow.looking_back(cache, [0] * len(LENGTHS), PREFIX))
    starts = [PREFIX - row * int(ragged) for row in range(len(LENGTHS))]
    expected, found = [], []
    for number in range(3):
        now = [start + number for start in starts]
        window = CacheWindow.looking_back(caches[0], now, 1)
        expected.append(cached_states(model, tokens[:, number : number + 1], window)[0])
    if not native:
        lay_out_for_decoding(model)
    with compiler(native):
        step = DecodeStep(model)
    assert (step.native is not None) == native
    for number in range(3):
        now = [start + number for start in starts]
        found.append(step.states(tokens[:, number].tolist(), now, caches[1]))
        assert error(step.logits(found[-1]), model.logits(expected[number][None])[0]) < TOLERANCE
    states = error(torch.stack(found), torch.stack(expected))
    layers = zip(caches[0].kept, caches[1].kept, strict=True)
    kept = max(error(a, b) for one, other in layers for a, b in zip(one, other, strict=True))
    return states, kept


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("name", "native"), [("gpt", False), ("gpt-wide", True), ("mla", False), ("deepseek", False)])
def test_a_step_equals_the_modules(name: str, native: bool, ragged: bool) -> None:
    (errors,) = run_distributed(step_beside_modules, 1, name, ragged, False, 1, native)
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "ragged", "tied"), [("gpt", False, True), ("mla", False, False), ("mla", True, False)]
)
def test_a_step_of_tensor_parallel_ranks_equals_their_modules(name: str, ragged: bool, tied: bool) -> None:
    for errors in run_distributed(step_beside_modules, 2, name, ragged, tied, 2):
        assert max(errors) < TOLERANCE


def test_divided_experts_stay_with_the_modules() -> None:
    assert run_distributed(knows_divided_experts, 2) == [False, False]


def knows_divided_experts() -> bool:
    return is_decodable(build("deepseek", 2))


@torch.inference_mode()
def latents_on_threads() -> list[float]:
    """Errors of a row of latent attention on one, two and four threads, beside the modules."""
    model, tokens, before = build("mla"), rows()[:1], torch.get_num_threads()
    cache = KVCache.of_model(model, rows=1, places=PLACES)
    expected = cached_states(model, tokens, CacheWindow.looking_back(cache, [0], tokens.size(1)))[-1]
    step, found = DecodeStep(model), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(error(step.states([int(tokens[0, -1])], [tokens.size(1) - 1], cache), expected))
    torch.set_num_threads(before)
    return found


def test_threads_share_the_heads_of_one_row() -> None:
    (errors,) = run_distributed(latents_on_threads, 1)
    assert max(errors) < TOLERANCE


@torch.inference_mode()
def windows_beside_modules(name: str, around: bool, ragged: bool, native: bool) -> tuple[float, float]:
    """Errors of states of five tokens of each row, and of what is kept of them."""
    model, tokens = build(name), rows()
    count, starts = len(LENGTHS), [PREFIX - row * int(ragged) for row in range(len(LENGTHS))]
    caches = [KVCache.of_model(model, rows=count, places=PLACES) for _ in range(2)]
    for cache in caches:
        cached_states(model, tokens[:, :PREFIX], CacheWindow.looking_back(cache, [0] * count, PREFIX))
    if around:
        positions = torch.tensor(starts)[:, None] + torch.arange(5)
        lengths = [PREFIX + 5 + row * int(ragged) for row in range(count)]
        windows = [CacheWindow.looking_around(cache, positions, lengths) for cache in caches]
    else:
        windows = [CacheWindow.looking_back(cache, starts, 5) for cache in caches]
    expected = cached_states(model, tokens[:, :5], windows[0]).transpose(0, 1).flatten(0, 1)
    with compiler(native):
        step = DecodeStep(model)
    assert (step.native is not None) == native
    found = step.window_states(tokens[:, :5].flatten(), windows[1])
    layers = zip(*(cache.kept for cache in caches), strict=True)
    return error(found, expected), max(error(a, b) for one, other in layers for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("name", "around", "native"),
    [
        ("gpt", False, False), ("gpt-wide", False, True), ("mla", False, False),
        ("llada", True, False), ("llada-wide", True, True), ("llada-mla", True, False),
    ],
)  # fmt: skip
def test_a_window_of_several_tokens_equals_the_modules(name: str, around: bool, native: bool, ragged: bool) -> None:
    (errors,) = run_distributed(windows_beside_modules, 1, name, around, ragged, native)
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize(("name", "native"), [("gpt", False), ("gpt-wide", True)])
def test_one_matrix_for_both_ends(name: str, native: bool) -> None:
    (errors,) = run_distributed(step_beside_modules, 1, name, False, True, 1, native)
    assert max(errors) < TOLERANCE


@torch.inference_mode()
def layout_beside_layout() -> float:
    model = build("mla")
    before = model(rows())
    lay_out_for_decoding(model)
    assert model.output_layer.weight.stride() == (1, 128), "by input"
    return error(model(rows()), before)


def test_another_layout_of_matrices_changes_nothing() -> None:
    (difference,) = run_distributed(layout_beside_layout, 1)
    assert difference < TOLERANCE


@torch.inference_mode()
def experts_read() -> tuple[list[int], list[int]]:
    """Experts that a step chose, and those whose matrices it used."""
    from gptoughts.models import decode_operations

    model = build("deepseek")
    cache = KVCache.of_model(model, rows=1, places=PLACES)
    mixture = model.decoder.layers[1].mlp
    chosen: list[int] = []
    mixture.router.register_forward_hook(lambda module, given, result: chosen.extend(result[1].flatten().tolist()))
    places = {mixture.experts.linear_fc1_weight[e].data_ptr(): e for e in range(6)}
    used: list[int] = []
    linear = decode_operations.F.linear

    def watched(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        used.extend([places[weight.data_ptr()]] if weight.data_ptr() in places else [])
        return linear(x, weight, *rest)

    with patch.object(decode_operations.F, "linear", watched):
        DecodeStep(model).states([5], [0], cache)
    return sorted(chosen), sorted(used)


def test_only_chosen_experts_are_computed() -> None:
    ((chosen, used),) = run_distributed(experts_read, 1)
    assert len(chosen) == 2
    assert used == chosen
