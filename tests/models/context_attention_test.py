"""Attention over context-parallel ranks against the same attention on one: outputs and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gptoughts.config.experiment import ParallelConfig
from gptoughts.models.context_attention import context_parallel, key_value_heads
from gptoughts.models.core_attention import SDPACoreAttention
from gptoughts.parallel import groups
from gptoughts.parallel.context import own_part, places_of
from tests.distributed import run_distributed

S, B = 24, 2
RELATIVE = 1e-6
"""Of the largest number: the same products; only tiles and their order may differ."""


@dataclass(frozen=True)
class Case:
    heads: int = 4
    groups: int = 4
    size: int = 8
    v_size: int = 8
    method: str = "ulysses"
    mask: str = "causal"
    """causal, none, cut (keys beyond a length are forbidden), by_head, bias, packed."""

    def config(self, ranks: int) -> TransformerConfig:
        return TransformerConfig(
            num_layers=1, hidden_size=self.heads * self.size, num_attention_heads=self.heads,
            num_query_groups=self.groups, attention_dropout=0.0, context_parallel_size=ranks,
            cp_comm_type="p2p" if ranks > 1 and self.method == "ring" else None,
        )  # fmt: skip

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        b = 1 if self.mask == "packed" else B
        shapes = ((self.heads, self.size), (self.groups, self.size), (self.groups, self.v_size))
        return [torch.randn(S, b, *shape, generator=generator) for shape in shapes]

    def upstream(self) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        return torch.randn(S, 1 if self.mask == "packed" else B, self.heads * self.v_size, generator=generator)

    def options(self) -> tuple[Tensor | None, dict[str, Any]]:
        if self.mask == "cut":
            return (torch.arange(S) >= torch.tensor([S - 5, S])[:, None])[:, None, None, :], {}
        if self.mask == "by_head":
            distance = torch.arange(S)[:, None] - torch.arange(S)
            return torch.stack([distance > 2 + 3 * head for head in range(self.heads)])[None], {}
        if self.mask == "bias":
            return None, {"attention_bias": torch.linspace(-2, 2, self.heads)[:, None, None] * torch.eye(S)[None, None]}
        if self.mask == "packed":
            ends = torch.tensor([0, 7, 15, S], dtype=torch.int32)
            return None, {"packed_seq_params": PackedSeqParams(cu_seqlens_q=ends, cu_seqlens_kv=ends)}
        return None, {}


def attend(case: Case, ranks: int) -> list[Tensor]:
    """Output and gradients of query, key and value, of this rank's tokens."""
    groups.initialize(ParallelConfig(context=ranks), seed=1)
    config = case.config(ranks)
    mask_type = AttnMaskType.causal if case.mask in ("causal", "packed") else AttnMaskType.no_mask
    attention = context_parallel(SDPACoreAttention, config)(
        config, 1, mask_type, "self", k_channels=case.size, v_channels=case.v_size
    )
    own = partial(own_part, is_zigzag=case.method == "ring")
    inputs = [own(x.transpose(0, 1)).transpose(0, 1).clone().requires_grad_() for x in case.inputs()]
    mask, options = case.options()
    given = [x.squeeze(1) for x in inputs] if case.mask == "packed" else inputs
    out = attention(*given, mask, **options)
    if case.mask == "packed":
        out = out.unsqueeze(1)
    gradients = torch.autograd.grad(out, inputs, own(case.upstream().transpose(0, 1)).transpose(0, 1))
    return [x.to(torch.float32) for x in (out.detach(), *gradients)]


CASES = [
    (2, Case()),
    (4, Case()),
    (2, Case(mask="none")),
    (2, Case(groups=2)),
    (4, Case(groups=2)),  # every key head is sent to two ranks
    (4, Case(heads=12, groups=6)),  # 12 are sent: some ranks need parts of two groups
    (2, Case(heads=6, groups=3, mask="none")),
    (2, Case(size=12)),  # latent attention's unequal heads
    (4, Case(size=6, v_size=10, mask="none")),
    (2, Case(mask="cut")),
    (2, Case(groups=2, mask="by_head")),
    (2, Case(mask="bias")),
    (2, Case(groups=2, mask="packed")),
    *((ranks, Case(method="ring", mask=mask)) for ranks in (2, 4) for mask in ("causal", "none", "cut")),
    (4, Case(method="ring", heads=2, groups=1)),  # more ranks than heads
    (2, Case(method="ring", size=12)),
    (4, Case(method="ring", heads=3, groups=3, size=6, v_size=10, mask="none")),
]


@pytest.mark.parametrize(("ranks", "case"), CASES, ids=str)
def test_equals_one_rank(ranks: int, case: Case) -> None:
    (expected,) = run_distributed(attend, 1, case, 1)
    parts = run_distributed(attend, ranks, case, ranks)
    for number, whole in enumerate(expected):
        found = torch.cat([part[number] for part in parts])
        if case.method == "ring":
            where = torch.cat([places_of(rank, ranks, S, found.device) for rank in range(ranks)])
            found = torch.empty_like(found).index_copy_(0, where, found)
        assert float((found - whole).abs().max()) <= RELATIVE * float(whole.abs().max()), number


@pytest.mark.parametrize(
    ("on_rank", "ranks", "exchanged"), [(4, 2, 4), (2, 4, 4), (1, 2, 2), (6, 4, 12), (3, 2, 6), (8, 8, 8)]
)
def test_how_many_key_heads_travel(on_rank: int, ranks: int, exchanged: int) -> None:
    assert key_value_heads(on_rank, ranks) == exchanged


def test_one_rank_gets_the_class_itself() -> None:
    assert context_parallel(SDPACoreAttention, Case().config(1)) is SDPACoreAttention


def ring_refuses() -> list[str]:
    groups.initialize(ParallelConfig(context=2), seed=1)
    case = Case(method="ring")
    config = case.config(2)
    attention = context_parallel(SDPACoreAttention, config)
    ring = attention(config, 1, AttnMaskType.causal, "self")
    x = torch.zeros(4, 1, 4, 8)
    ends = torch.tensor([0, 8], dtype=torch.int32)
    found = []
    for call in (
        lambda: attention(config, 1, AttnMaskType.causal, "self", attention_dropout=0.1),
        lambda: ring(x, x, x, None, packed_seq_params=PackedSeqParams(cu_seqlens_q=ends, cu_seqlens_kv=ends)),
        lambda: ring(x, x, x, torch.zeros(1, 1, 8, 8, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match=r"must be 0|ring attention takes") as caught:
            call()
        found.append(str(caught.value))
    return found


def test_a_ring_refuses_what_it_cannot_do() -> None:
    for messages in run_distributed(ring_refuses, 2):
        for message, part in zip(messages, ("attention_dropout=0.1", "packed sequences", "(1, 1, 8, 8)"), strict=True):
            assert part in message


def parts_of_heads() -> tuple[int, int, int]:
    groups.initialize(ParallelConfig(tensor=2, context=2), seed=1)
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=8, num_query_groups=2, tensor_model_parallel_size=2,
        context_parallel_size=2,
    )  # fmt: skip
    attention: Any = context_parallel(SDPACoreAttention, config)(config, 1, AttnMaskType.causal, "self")
    told = attention.config
    return told.num_attention_heads, told.num_query_groups, told.context_parallel_size


def test_a_kernel_is_told_its_part_of_the_heads() -> None:
    """Of 8 heads in 2 groups a tensor-parallel rank has 4 in 1; of these a context-parallel one has 2 in 1 (a copy).
    Kernels divide what they are told by tensor-parallel ranks: 4 heads in 2 groups."""
    assert run_distributed(parts_of_heads, 4) == [(4, 2, 1)] * 4
