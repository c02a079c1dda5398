"""The exchange of tokens for heads, and what is whose part of a sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptoughts.config.experiment import ParallelConfig
from gptoughts.parallel import groups
from gptoughts.parallel.context import heads_to_tokens, own_part, places_of, start_ring_step, tokens_to_heads
from tests.distributed import run_distributed

S, B = 12, 3
SHAPES = ((8, 5), (4, 7), (4, 2))
"""Heads and their size of three tensors that travel together."""


def whole(heads: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[S, B, heads, size], every number another one (up to bf16's digits)."""
    return torch.arange(S * B * heads * size, dtype=torch.float32).view(S, B, heads, size).to(dtype)


def part(x: Tensor, dim: int) -> Tensor:
    return x.chunk(groups.context_parallel_size(), dim)[groups.context_parallel_rank()]


def exchange_and_return(dtype: torch.dtype) -> None:
    groups.initialize(ParallelConfig(context=torch.distributed.get_world_size()), seed=1)
    group = groups.context_parallel_group()
    # Strides as those of views of a projection: heads cut out of a wider tensor.
    tokens = [
        torch.cat(
            (
                part(whole(*shape, dtype), 0),
                torch.zeros(1)[None, None, None].expand(S // group.size(), B, shape[0], 1).to(dtype),
            ),
            -1,
        )[..., :-1]
        .detach()
        .requires_grad_()
        for shape in SHAPES
    ]
    heads = tokens_to_heads(tokens, group)
    for found, shape in zip(heads, SHAPES, strict=True):
        assert torch.equal(found, part(whole(*shape, dtype), 2))
    upstream = [part(whole(*shape, dtype) % 13, 2) for shape in SHAPES]
    gradients = torch.autograd.grad(heads, tokens, upstream)
    for found, shape in zip(gradients, SHAPES, strict=True):
        assert torch.equal(found, part(whole(*shape, dtype) % 13, 0))

    own_heads = part(whole(8, 5, dtype), 2).flatten(2).requires_grad_()
    back = heads_to_tokens(own_heads, group)
    assert torch.equal(back, part(whole(8, 5, dtype), 0).flatten(2))
    (gradient,) = torch.autograd.grad(back, own_heads, part(whole(8, 5, dtype) % 11, 0).flatten(2))
    assert torch.equal(gradient, part(whole(8, 5, dtype) % 11, 2).flatten(2))


@pytest.mark.parametrize("size", [2, 4])
def test_tokens_for_heads_and_back(size: int) -> None:
    run_distributed(exchange_and_return, size, torch.float32)


def test_any_precision_travels() -> None:
    run_distributed(exchange_and_return, 2, torch.bfloat16)


def pieces_of_a_batch() -> tuple[list[int], list[int], list[float]]:
    groups.initialize(ParallelConfig(context=4), seed=1)
    group = groups.context_parallel_group()
    found = own_part(torch.arange(16).view(1, 16), is_zigzag=True)
    places = places_of(group.rank(), group.size(), 16, found.device)
    before = start_ring_step(torch.tensor([float(group.rank())]), group)()
    return found[0].tolist(), places.tolist(), before.tolist()


def test_rings_have_an_early_and_a_late_piece_each() -> None:
    found = run_distributed(pieces_of_a_batch, 4)
    assert [part for part, *_ in found] == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    assert all(places == part for part, places, _ in found)
    assert [before for *_, before in found] == [[3.0], [0.0], [1.0], [2.0]]


def parts_of_a_batch() -> tuple[int, list[int]]:
    groups.initialize(ParallelConfig(context=2), seed=1)
    found = own_part(torch.arange(2 * 8).view(2, 8))
    assert found.shape == (2, 4)
    return groups.data_parallel_rank(), found[0].tolist()


def test_neighbours_share_a_sequence_and_its_samples() -> None:
    found = run_distributed(parts_of_a_batch, 4)
    assert found == [(0, [0, 1, 2, 3]), (0, [4, 5, 6, 7]), (1, [0, 1, 2, 3]), (1, [4, 5, 6, 7])]


def test_one_rank_has_whole_sequences() -> None:
    groups.initialize(ParallelConfig(), seed=1)
    x = torch.arange(8).view(1, 8)
    assert own_part(x) is x
    groups.destroy()
