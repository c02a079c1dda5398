"""The product that stands inside megatron-core's linear layers gives the gradients of torch's."""

import pytest
import torch
import torch.nn.functional as F

from gptoughts.platform.linear import parallel_linear


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_gradients(has_bias: bool, is_frozen: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((32, 4, 160), (96, 160), (96,))]
    grad = torch.randn(32, 4, 96, generator=generator)

    def run(function) -> list[torch.Tensor]:
        x, weight, bias = (value.clone().requires_grad_() for value in values)
        weight.requires_grad_(not is_frozen)
        out = function(x, weight, bias if has_bias else None)
        out.backward(grad)
        return [out.detach(), x.grad, *([] if is_frozen else [weight.grad]), *([bias.grad] if has_bias else [])]

    ours = run(lambda x, weight, bias: parallel_linear(x, weight, bias, False, False, False, tp_group=None))
    for got, expected in zip(ours, run(F.linear), strict=True):
        # fp32 sums of up to 160 products of unit size, in another order.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
