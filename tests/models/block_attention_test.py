"""Attention to some of the keys: written out and tiled give the same, and parts add up to the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptoughts.models import block_attention

S, K, B = 20, 12, 2
RELATIVE = 1e-5


def tensors(heads: int, groups: int, queries: int, keys: int, v_size: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads + groups)
    shapes = ((queries, B, heads, 8), (keys, B, groups, 8), (keys, B, groups, v_size), (B, heads, queries, v_size))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def both_ways(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= RELATIVE * float(expected.abs().max())


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_written_out_equals_tiled(heads: int, groups: int, is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, grad = tensors(heads, groups, S, S if is_causal else K)
    options = {"scale": 0.3, "is_causal": is_causal}
    tiled, tiled_lse = block_attention.attend(query, key, value, None, **options)
    delta = torch.linalg.vecdot(tiled, grad)
    tiled_gradients = block_attention.gradients(query, key, value, grad, tiled_lse, delta, None, **options)

    monkeypatch.setattr(block_attention, "_is_tiled", lambda query, forbidden: False)
    monkeypatch.setattr(block_attention, "_TILE_ELEMENTS", 7 * B * heads * key.size(0))  # seven queries at a time
    out, lse = block_attention.attend(query, key, value, None, **options)
    both_ways(out, tiled)
    both_ways(lse, tiled_lse)
    found = block_attention.gradients(query, key, value, grad, lse, delta, None, **options)
    for ours, theirs in zip(found, tiled_gradients, strict=True):
        both_ways(ours, theirs)


def test_forbidden_keys_are_as_keys_that_are_not_there() -> None:
    query, key, value, grad = tensors(4, 2, S, K)
    forbidden = torch.zeros(1, K, dtype=torch.bool)
    forbidden[:, 5:] = True
    options = {"scale": 0.3, "is_causal": False}
    expected, expected_lse = block_attention.attend(query, key[:5], value[:5], None, **options)
    out, lse = block_attention.attend(query, key, value, forbidden, **options)
    both_ways(out, expected)
    both_ways(lse, expected_lse)
    delta = torch.linalg.vecdot(expected, grad)
    of_few = block_attention.gradients(query, key[:5], value[:5], grad, lse, delta, None, **options)
    found = block_attention.gradients(query, key, value, grad, lse, delta, forbidden, **options)
    both_ways(found[0], of_few[0])
    for ours, theirs in zip(found[1:], of_few[1:], strict=True):
        both_ways(ours[:5], theirs)
        assert not ours[5:].any()


def test_queries_that_see_nothing() -> None:
    query, key, value, _ = tensors(4, 4, S, K)
    out, lse = block_attention.attend(query, key, value, torch.ones(B, K, dtype=torch.bool), scale=1.0, is_causal=False)
    assert not out.any()
    assert (lse == float("-inf")).all()
