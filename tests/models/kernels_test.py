"""Our autograd steps against the formulas written out: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gptoughts.models.cross_entropy import cross_entropy
from gptoughts.models.norms import RMSNorm
from gptoughts.models.rotary import rotary_table, rotate
from gptoughts.models.swiglu import swiglu
from tests.distributed import run_distributed


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def test_swiglu_is_silu_of_gate_times_up() -> None:
    x = torch.randn(5, 3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(swiglu(x), F.silu(x[..., :12]) * x[..., 12:])
    assert torch.autograd.gradcheck(swiglu, (x,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm(dtype: torch.dtype, tolerance: float) -> None:
    norm = RMSNorm(TransformerConfig(num_layers=1, hidden_size=48, num_attention_heads=4), 48, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    x = (torch.randn(7, 3, 48) * 3).to(dtype).requires_grad_()
    direction = torch.randn(7, 3, 48).to(dtype)
    found = norm(x)
    reference_x, reference_w = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = reference_w * reference_x / (reference_x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    found_grads = torch.autograd.grad(found, (x, norm.weight), direction)
    expected_grads = torch.autograd.grad(expected, (reference_x, reference_w), direction.double())
    for one, other in zip((found, *found_grads), (expected, *expected_grads), strict=True):
        assert one.dtype is dtype
        assert relative_error(one.detach(), other.detach()) < tolerance


def test_rotate_turns_pairs_by_position() -> None:
    x = torch.randn(7, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    table = rotary_table(7, 8, 10000.0, torch.float64)
    angle = torch.outer(torch.arange(7.0, dtype=torch.float64), 10000.0 ** (-torch.arange(0, 8, 2).double() / 8))
    turned = torch.view_as_complex(torch.stack((x[..., :4], x[..., 4:]), -1)) * torch.polar(
        torch.ones_like(angle), angle
    ).view(7, 1, 1, 4)
    assert torch.allclose(rotate(x, table), torch.cat((turned.real, turned.imag), -1))
    assert torch.autograd.gradcheck(lambda y: rotate(y, table), (x,))


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    table = rotary_table(64, 16, 10000.0, torch.float64)
    scores = [(rotate(q, table[:, p : p + 1]) * rotate(k, table[:, p - 5 : p - 4])).sum().item() for p in (5, 20, 63)]
    assert scores == pytest.approx([scores[0]] * 3)


def test_rotary_positions_may_restart() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    table = rotary_table(8, 4, 10000.0, torch.float32, positions)
    whole = rotary_table(8, 4, 10000.0, torch.float32)
    assert table.shape == (2, 5, 2, 1, 2)
    assert torch.equal(table[:, 3, 0], whole[:, 0, 0])
    assert torch.equal(table[:, :, 1], whole[:, :5, 0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_cross_entropy_and_its_gradient(dtype: torch.dtype, tolerance: float) -> None:
    # 700 rows of 1000 make several tiles, the last one short.
    logits = (torch.randn(700, 1000) * 5).to(dtype)
    labels = torch.randint(0, 1000, (700,))
    weights = torch.rand(700)
    reference = logits.double().requires_grad_()
    expected = F.cross_entropy(reference, labels, reduction="none")
    (expected * weights).sum().backward()
    leaf = logits.clone().requires_grad_()
    found = cross_entropy(leaf.clone(), labels)
    (found * weights).sum().backward()
    assert found.dtype is torch.float32
    assert leaf.grad is not None
    assert reference.grad is not None
    assert relative_error(found.detach(), expected.detach()) < 1e-6
    assert relative_error(leaf.grad, reference.grad) < tolerance


def test_cross_entropy_survives_large_logits() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [1e4, 1e4, 1e4]])
    found = cross_entropy(logits.clone(), torch.tensor([1, 0]))
    # lse is one fp32 number: near 1e4 it has steps of 1e-3.
    assert found.tolist() == pytest.approx([6e4, torch.log(torch.tensor(3.0)).item()], abs=1e-3)


def test_cross_entropy_refuses_a_second_backward() -> None:
    leaf = torch.randn(4, 8, requires_grad=True)
    loss = cross_entropy(leaf * 1.0, torch.arange(4)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _divided_cross_entropy() -> tuple[Tensor, Tensor]:
    group = torch.distributed.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 64, generator=generator) * 4
    labels = torch.randint(0, 64, (50,), generator=generator)
    weights = torch.rand(50, generator=generator)
    leaf = logits.chunk(group.size(), dim=-1)[group.rank()].contiguous().requires_grad_()
    loss = cross_entropy(leaf.clone(), labels, group)
    (loss * weights).sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def test_cross_entropy_over_a_divided_vocabulary() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(50, 64, generator=generator) * 4).requires_grad_()
    labels = torch.randint(0, 64, (50,), generator=generator)
    weights = torch.rand(50, generator=generator)
    expected = F.cross_entropy(logits, labels, reduction="none")
    (expected * weights).sum().backward()
    results = run_distributed(_divided_cross_entropy, 2)
    for loss, _ in results:
        assert relative_error(loss, expected.detach()) < 1e-6
    assert logits.grad is not None
    assert relative_error(torch.cat([grad for _, grad in results], -1), logits.grad) < 1e-6
