"""FP8 in a model: what is computed, when histories move on, what recompute and evaluation leave alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoughts.models.fp8 import Fp8Products
from gptoughts.precision.fp8_recipe import E4M3, E5M2
from gptoughts.precision.scaling_state import STATE_NAMES
from tests.harness import Layout, ToyRun, step_microbatches

FP8 = ("--use_fp8=true", "--fp8.backend=emulated", "--fp8.amax_history_len=4")


@pytest.fixture
def start(tmp_path: Path):
    runs: list[ToyRun] = []

    def build(family: str = "gpt", *flags: str, **layout: Any) -> ToyRun:
        torch.set_num_threads(1)
        runs.append(ToyRun(family, Layout(extra=(*FP8, *flags), **layout), tmp_path / str(len(runs))))
        return runs[-1]

    yield build
    for run in runs:
        run.close()


def products(run: ToyRun) -> Fp8Products:
    (chunk,) = run.engine.chunks
    return chunk.fp8


def snapshot(run: ToyRun) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in products(run).tensors().items()}


def dequantised(x: Tensor, scale: Tensor, dtype: torch.dtype, largest: float) -> Tensor:
    """A cast by torch's float8, as the number that the product sees."""
    return (x.float() * scale).clamp(-largest, largest).to(dtype).double() / scale.double()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_layer_multiplies_what_torch_casts(start, precision: str) -> None:
    """All three products of one linear layer, with scales that are no powers of two and saturate some numbers."""
    run = start(precision=precision)
    (chunk,) = run.engine.chunks
    layer = chunk.decoder.layers[0].mlp.linear_fc1
    state = layer.fp8
    state.scale_fwd.copy_(torch.tensor([150.3, 5000.7, 1.0]))
    state.scale_bwd.copy_(torch.tensor([20000.9, 1.0]))
    generator = torch.Generator().manual_seed(0)
    dtype = layer.weight.dtype
    x = torch.randn(48, 2, 256, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(48, 2, layer.weight.size(0), generator=generator).to(dtype)
    with chunk.fp8.forward():
        out, _ = layer(x)
    grad_x, grad_weight = torch.autograd.grad(out, (x, layer.weight), grad)
    scales = torch.tensor([150.3, 5000.7, 20000.9])
    qx = dequantised(x.detach(), scales[0], E4M3.dtype, 448.0).flatten(0, 1)
    qw = dequantised(layer.weight.detach(), scales[1], E4M3.dtype, 448.0)
    qg = dequantised(grad, scales[2], E5M2.dtype, 57344.0).flatten(0, 1)
    assert (qx * 150.3).abs().max() > 447  # some saturate
    unit = 2.0**-8 if dtype is torch.bfloat16 else 1e-5
    for found, expected in (
        (out, qx @ qw.t()), (grad_x, qg @ qw), (grad_weight, qg.t() @ qx),
    ):  # fmt: skip
        error = (found.detach().double().reshape(expected.shape) - expected).abs()
        assert (error <= unit * expected.abs() + 1e-6 * expected.abs().max()).all()


def test_histories_move_on_once_per_microbatch_and_direction(start) -> None:
    run = start(accumulation=2)
    list(run.train(2))
    found = products(run).tensors()
    assert len(found) == 4 * len(STATE_NAMES) * 2  # four products in each of two layers
    for name, tensor in found.items():
        assert tensor.dtype is torch.float32
        slots = 3 if name.endswith("fwd") else 2
        if "history" not in name:
            assert tensor.shape == (slots,)
            assert tensor[-1] == 1.0, "outputs and input gradients are not cast"
            continue
        assert tensor.shape == (4, slots)
        used = 2 if name.endswith("fwd") else 1
        # Two steps of two microbatches: the fourth update has just begun to push the first one out.
        assert (tensor[0] == 0).all()
        assert (tensor[1:, :used] > 0).all()
        assert (tensor[:, used:] == 0).all()
        largest = 448.0 if name.endswith("fwd") else 57344.0
        scale = found[name.replace("amax_history", "scale")][:used]
        assert (scale <= 1.000001 * largest / tensor[:, :used].amax(0)).all()


def test_evaluation_leaves_the_state_alone_and_uses_it(start) -> None:
    run = start()
    list(run.train(2))
    before = snapshot(run)
    batches = step_microbatches(run.experiment, run.objective, 0, 0)
    loss = run.engine.eval_step(batches).loss
    assert all(torch.equal(before[name], tensor) for name, tensor in products(run).tensors().items())
    for state in products(run).states.values():
        state.scale_fwd.fill_(2.0**-10)  # everything underflows
    assert run.engine.eval_step(batches).loss != loss


def test_a_nan_does_not_enter_the_history_and_an_infinity_does(start) -> None:
    run = start()
    (chunk,) = run.engine.chunks
    layer = chunk.decoder.layers[0].mlp.linear_fc1
    x = torch.randn(8, 1, 256)
    x[0, 0, 0], x[1, 0, 0] = math.nan, 5.0
    with chunk.fp8.forward():
        layer(x)
    assert layer.fp8.amax_history_fwd[-1, 0].item() == 5.0
    x[2, 0, 0] = -math.inf
    with chunk.fp8.forward():
        layer(x)
    assert layer.fp8.amax_history_fwd[-1, 0].item() == math.inf
    assert layer.fp8.scale_fwd[0].item() == pytest.approx(448.0 / 5.0)


def test_a_second_forward_takes_the_scales_of_the_first_and_records_nothing(start) -> None:
    """Reentrant recompute, with two microbatches under way as in a pipeline."""
    from megatron.core import tensor_parallel

    run = start()
    (chunk,) = run.engine.chunks
    layer = chunk.decoder.layers[0].mlp.linear_fc1
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(8, 1, 256, generator=generator) * 10**i for i in range(3)]

    def outcome(*, is_recomputed: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        layer.fp8.forget()
        layer.weight.grad = None
        outputs, leaves = [], []
        for x in inputs:
            leaves.append(x.clone().requires_grad_())
            with chunk.fp8.forward():
                run_layer = lambda x: layer(x)[0]  # noqa: E731
                if is_recomputed:
                    outputs.append(tensor_parallel.checkpoint(run_layer, False, leaves[-1]))
                else:
                    outputs.append(run_layer(leaves[-1]))
        for out in outputs:
            out.square().sum().backward()
        state = {name: tensor.clone() for name, tensor in layer.fp8.states().items()}
        return [*outputs, *(leaf.grad for leaf in leaves), layer.weight.grad], state

    kept, again = outcome(is_recomputed=False), outcome(is_recomputed=True)
    assert all(torch.equal(a, b) for a, b in zip(kept[0], again[0], strict=True))
    assert all(torch.equal(kept[1][name], again[1][name]) for name in STATE_NAMES)


def test_layers_that_stay_out_have_no_state(start) -> None:
    run = start("gpt", "--fp8.keep_bf16", "first_1_layers", "*.linear_proj")
    assert list(products(run).states) == [
        "decoder.layers.1.self_attention.linear_qkv",
        "decoder.layers.1.mlp.linear_fc1",
        "decoder.layers.1.mlp.linear_fc2",
    ]
    list(run.train(1))


def test_layers_fall_back_between_steps(start) -> None:
    run = start()
    list(run.train(1))
    gone = products(run).fall_back(lambda name: name.endswith("fc2"))
    assert gone == [f"decoder.layers.{layer}.mlp.linear_fc2" for layer in range(2)]
    list(run.train(1))
    assert not any("fc2" in name for name in products(run).tensors())
    assert len(products(run).fall_back(lambda _: True)) == 6
    list(run.train(1))
    assert products(run).tensors() == {}


def test_a_name_that_no_product_has_is_refused(start) -> None:
    from gptoughts.errors import ConfigError

    with pytest.raises(ConfigError, match=r"fp8.keep_bf16=\*.linear_fc3: no product of the model has such a name"):
        start("gpt", "--fp8.keep_bf16", "*.linear_fc3")


def test_the_state_dict_has_transformer_engines_keys(start) -> None:
    """``weight`` and ``_extra_state``, in which the four tensors have Transformer Engine's names; and it loads back."""
    run = start()
    list(run.train(1))
    (chunk,) = run.engine.chunks
    layer = chunk.decoder.layers[1].mlp.linear_fc2
    state = layer.state_dict()
    assert list(state) == ["weight", "_extra_state"]
    assert tuple(state["_extra_state"]) == STATE_NAMES
    before = {name: tensor.clone() for name, tensor in layer.fp8.states().items()}
    layer.fp8.forget()
    layer.load_state_dict(state)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.fp8.states().items())


def test_conversion_to_bf16_does_not_round_the_state(start) -> None:
    run = start()
    list(run.train(1))
    before = snapshot(run)
    run.engine.chunks[0].bfloat16()
    assert all(torch.equal(before[name], tensor) for name, tensor in products(run).tensors().items())


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("gpt", ("--parallel.recompute_granularity=full",)),
        ("deepseek", ("--parallel.recompute_granularity=selective", "--parallel.recompute_modules=mlp,moe")),
    ],
)
def test_recompute_changes_neither_losses_nor_the_state(start, family: str, flags: tuple[str, ...]) -> None:
    plain, again = start(family, accumulation=2), start(family, *flags, accumulation=2)
    expected = [(result.loss, result.grad_norm) for result in plain.train(3)]
    assert [(result.loss, result.grad_norm) for result in again.train(3)] == expected
    found = products(again).tensors()
    for name, tensor in products(plain).tensors().items():
        assert torch.equal(found[name], tensor), name
    assert not any(state._first_forwards for state in products(again).states.values())
