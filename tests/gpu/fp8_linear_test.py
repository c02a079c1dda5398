"""One linear layer in FP8, Transformer Engine's beside the emulated one: the same histories, scales and products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from gptoughts.config.experiment import ParallelConfig
from gptoughts.parallel import groups
from gptoughts.precision.fp8_linear import ColumnParallelLinear
from gptoughts.precision.fp8_recipe import DelayedScaling
from gptoughts.precision.scaling_state import BACKWARD_SLOTS, FORWARD_SLOTS, STATE_NAMES, ScalingRegion
from gptoughts.precision.te_backend import _states_of
from tests.gpu.training_test import needs_engine

ROWS, INPUTS, OUTPUTS = 64, 256, 128
PRODUCT_RELATIVE = 2**-8
"""Of the largest element: products of equal FP8 numbers, summed in another order and rounded to bf16."""
MAGNITUDES = (1.0, 30.0, 1e-3, 200.0, 0.5, 0.5, 1e-2, 3.0, 1.0, 1.0)
"""Of the input in each microbatch; gradients go the other way. The history is shorter than that."""


def our_layer(recipe: DelayedScaling) -> Any:
    groups.initialize(ParallelConfig(), seed=1)
    config = TransformerConfig(
        num_layers=1, hidden_size=INPUTS, num_attention_heads=4, params_dtype=torch.bfloat16, bf16=True
    )
    layer = ColumnParallelLinear(
        INPUTS, OUTPUTS, config=config, init_method=lambda weight: nn.init.normal_(weight, std=0.1), bias=False,
        skip_bias_add=True, gather_output=False,
    )  # fmt: skip
    return layer.cuda(), ScalingRegion([layer.enable_fp8(recipe)], recipe, None)


def their_layer(recipe: DelayedScaling, weight: Tensor) -> Any:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as te_recipe

    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer, te_recipe.DelayedScaling(
        margin=recipe.margin,
        fp8_format=te_recipe.Format.HYBRID if recipe.format == "hybrid" else te_recipe.Format.E4M3,
        amax_history_len=recipe.amax_history_len,
        amax_compute_algo=recipe.amax_compute_algo,
    )


def same(found: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(found.isfinite(), expected.isfinite()):
        raise AssertionError(
            f"{what}: not finite in {(~found.isfinite()).sum()} and {(~expected.isfinite()).sum()} places"
        )
    is_finite = expected.isfinite()
    found, expected = found[is_finite].float(), expected[is_finite].float()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        found, expected, rtol=PRODUCT_RELATIVE, atol=PRODUCT_RELATIVE * largest, msg=lambda text: f"{what}: {text}"
    )


@needs_engine
@pytest.mark.parametrize("poison", [None, float("inf"), float("nan")], ids=["finite", "inf", "nan"])
@pytest.mark.parametrize("algo", ["max", "most_recent"])
@pytest.mark.parametrize(("fp8_format", "margin"), [("hybrid", 0), ("e4m3", 1)])
def test_both_have_the_same_histories_scales_and_products(
    fp8_format: Any, margin: int, algo: Any, poison: float | None
) -> None:
    """``poison`` is one element of the fifth microbatch's input and of the sixth one's gradient."""
    from transformer_engine.pytorch import fp8_autocast

    recipe = DelayedScaling(format=fp8_format, margin=margin, amax_history_len=4, amax_compute_algo=algo)
    ours, region = our_layer(recipe)
    theirs, their_recipe = their_layer(recipe, ours.weight)
    generator = torch.Generator("cuda").manual_seed(3)
    for number, magnitude in enumerate(MAGNITUDES):

        def draw(*shape: int, generator: Any = generator) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        x, grad = draw(ROWS, 1, INPUTS) * magnitude, draw(ROWS, 1, OUTPUTS) / magnitude * 1e-3
        if poison is not None and number == 4:
            x[3, 0, 5] = poison
        if poison is not None and number == 5:
            grad[7, 0, 2] = poison
        results = []
        for layer in (ours, theirs):
            layer.weight.grad = None
            inputs = x.clone().requires_grad_()
            if layer is ours:
                with region.forward():
                    output = ours(region.end_of_backward(inputs))[0]
            else:
                with fp8_autocast(enabled=True, fp8_recipe=their_recipe):
                    output = theirs(inputs)
            output.backward(grad)
            results.append({"output": output.detach(), "dx": inputs.grad, "dW": layer.weight.grad})
        for what, expected in results[1].items():
            same(results[0][what], expected, f"microbatch {number}, {what}")
        found, expected_states = ours.fp8.states(), _states_of(theirs)
        for name in STATE_NAMES:
            slots = FORWARD_SLOTS if name.endswith("fwd") else BACKWARD_SLOTS
            own, other = found[name].view(-1, slots), expected_states[name].view(-1, slots)
            torch.testing.assert_close(
                own,
                other,
                rtol=0,
                atol=0,
                equal_nan=True,
                msg=lambda text, where=f"microbatch {number}, {name}": f"{where}: {text}",
            )
