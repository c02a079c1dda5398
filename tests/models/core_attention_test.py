"""Core attention against softmax(q k^T) v written out, in each of its forms."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gptoughts.config.experiment import ParallelConfig
from gptoughts.models import tiled_attention
from gptoughts.models.core_attention import SDPACoreAttention
from gptoughts.parallel import groups


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=5)
    yield
    groups.destroy()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def attention(mask_type: AttnMaskType = AttnMaskType.causal, **options: object) -> SDPACoreAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0
    )
    return SDPACoreAttention(config, 1, mask_type, "self", **options)  # type: ignore[arg-type]


def written_out(q: Tensor, k: Tensor, v: Tensor, forbidden: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """[s, b, np, hn] to [s, b, np * hn_v], in fp64."""
    q, k, v = (x.double().permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    if bias is not None:
        scores = scores + bias.double()
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, float("-inf"))
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def heads(s: int, b: int, count: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(s, b, count, size).to(dtype).requires_grad_()


def future(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)


@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask])
@pytest.mark.parametrize("groups_count", [1, 2, 4])
@pytest.mark.parametrize("v_size", [8, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("s", "is_one_head"), [(5, False), (300, False), (300, True)])
def test_values_and_gradients(
    mask_type: AttnMaskType,
    groups_count: int,
    v_size: int,
    dtype: torch.dtype,
    tolerance: float,
    s: int,
    is_one_head: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiled_attention, "_is_one_head_faster", lambda query, key: is_one_head)
    q, k = heads(s, 2, 4, 8, dtype), heads(s, 2, groups_count, 8, dtype)
    v = heads(s, 2, groups_count, v_size, dtype)
    found = attention(mask_type, k_channels=8, v_channels=v_size)(q, k, v, None)
    expected = written_out(q, k, v, future(s, s) if mask_type is AttnMaskType.causal else None)
    direction = torch.randn_like(found)
    found_grads = torch.autograd.grad(found, (q, k, v), direction)
    expected_grads = torch.autograd.grad(expected, (q, k, v), direction.double())
    for one, other in zip((found, *found_grads), (expected, *expected_grads), strict=True):
        assert one.dtype is dtype
        assert ((one.double() - other.double()).norm() / other.double().norm()).item() < tolerance


def test_attention_mask_joins_the_causal_one() -> None:
    q, k, v = heads(6, 2, 4, 8), heads(6, 2, 2, 8), heads(6, 2, 2, 8)
    forbidden = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    forbidden[1, ..., 1:3] = True
    assert torch.allclose(
        attention()(q, k, v, forbidden).double(), written_out(q, k, v, forbidden | future(6, 6)), atol=1e-5
    )


def test_attention_bias() -> None:
    q, k, v = heads(6, 2, 4, 8), heads(6, 2, 2, 8), heads(6, 2, 2, 8)
    bias = torch.randn(1, 4, 6, 6)
    found = attention()(q, k, v, None, attention_bias=bias)
    assert torch.allclose(found.double(), written_out(q, k, v, future(6, 6), bias), atol=1e-5)


def test_fewer_queries_than_keys_are_the_last_positions() -> None:
    q, k, v = heads(2, 1, 4, 8), heads(7, 1, 2, 8), heads(7, 1, 2, 8)
    assert torch.allclose(attention()(q, k, v, None).double(), written_out(q, k, v, future(2, 7)), atol=1e-5)


@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_packed_sequences_do_not_see_each_other(mask_type: AttnMaskType) -> None:
    q, k, v = heads(9, 1, 4, 8), heads(9, 1, 2, 8), heads(9, 1, 2, 8)
    boundaries = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    layer = attention(mask_type)
    found = layer(q[:, 0], k[:, 0], v[:, 0], None, packed_seq_params=packed)
    alone = [layer(q[a:z], k[a:z], v[a:z], None)[:, 0] for a, z in ((0, 4), (4, 9))]
    assert torch.allclose(found, torch.cat(alone), atol=1e-5)


def test_dropout_draws_from_the_model_parallel_generator() -> None:
    q, k, v = heads(16, 1, 4, 8), heads(16, 1, 2, 8), heads(16, 1, 2, 8)
    layer = attention(attention_dropout=0.5)
    states, outside = groups.rng_tracker_states(), torch.get_rng_state()
    first = layer(q, k, v, None)
    assert torch.equal(torch.get_rng_state(), outside)
    second = layer(q, k, v, None)
    groups.set_rng_tracker_states(states)
    assert torch.equal(layer(q, k, v, None), first)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.allclose(layer(q, k, v, None).double(), written_out(q, k, v, future(16, 16)), atol=1e-5)


def test_unsupported_options_are_refused() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    config.window_size = (4, 0)
    with pytest.raises(ValueError, match="window_size"):
        SDPACoreAttention(config, 1, AttnMaskType.causal, "self")
