"""Memory that FP8 takes: products as the model has them, their histories, and weights that stay cast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.planning.activations import stage_activation_bytes
from gptoughts.planning.fp8 import cast_weights, layer_products, scaling_bytes
from gptoughts.planning.layers import Kept, microbatch
from gptoughts.planning.memory import largest_memory, stage_needs
from gptoughts.planning.zero import ZeroSettings
from tests.config.validate_test import load
from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun, toy_experiment

LENGTH = 8
FP8 = ("--use_fp8=true", "--fp8.backend=emulated", f"--fp8.amax_history_len={LENGTH}")
GPT = "--model_type gpt --size debug --model.num_layers 4 --train.precision bf16"


def products_of_a_model(family: str, layout: Layout, folder: str) -> tuple[dict[str, int], int]:
    """Weights of each product that can run in FP8 (0: experts'), and bytes of all histories and scales."""
    run = ToyRun(family, layout, Path(folder))
    chunk: Any = run.engine.chunks[0]
    products = {
        name: 0 if ".experts." in name else run.parameters[f"{name}.weight"].numel() for name in chunk.fp8.names
    }
    num_bytes = sum(tensor.nbytes for tensor in chunk.fp8.tensors().values())
    run.close()
    return products, num_bytes


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("gpt", ("--model.num_query_groups=2",)),
        ("mla", ("--model.q_lora_rank=64",)),
        ("deepseek", ("--model.mtp_num_layers=1", "--model.moe_shared_expert_intermediate_size=64")),
        ("mla", ("--fp8.keep_bf16", "first_1_layers", "*.linear_proj")),
    ],
)
def test_products_and_state_are_the_models(family: str, extra: tuple[str, ...], tmp_path: Path) -> None:
    layout = Layout(extra=(*FP8, *extra))
    ((products, num_bytes),) = run_distributed(products_of_a_model, 1, family, layout, str(tmp_path / "run"))
    config = toy_experiment(family, layout, tmp_path / "predicted").config
    model = config.model
    prefixes = [f"decoder.layers.{index}" for index in range(model.num_layers)]
    prefixes += [f"mtp.layers.{depth}.transformer_layer" for depth in range(model.mtp_depths())]
    expected = {
        f"{prefix}.{one.name}": one.weights
        for index, prefix in enumerate(prefixes)
        for one in layer_products(model, min(index, model.num_layers))
    }
    assert products == expected
    assert num_bytes == scaling_bytes(config, 0)


def resolved(flags: str, world_size: int = 1) -> ExperimentConfig:
    return load(flags, world_size).config


def test_transformer_engine_keeps_weights_cast() -> None:
    """gpt debug: per layer 4 matrices of [768 or 256 or 1408, 256] and [256, 704]."""
    h, f = 256, 704
    attention, feed_forward = 4 * h * h, 3 * h * f
    config = resolved(f"{GPT} --use_fp8 true --fp8.backend auto")
    assert cast_weights(config, 0) == Kept(2 * (attention + feed_forward))
    assert cast_weights(config, 0, ("mlp",)) == Kept(2 * attention, 2 * feed_forward)
    config = resolved(f"{GPT} --use_fp8 true --fp8.keep_bf16 first_1_layers decoder.layers.1.mlp")
    assert [cast_weights(config, index).kept for index in range(3)] == [
        0, 2 * attention, 2 * (attention + feed_forward),
    ]  # fmt: skip
    config = resolved(f"{GPT} --use_fp8 true --parallel.tensor 2", 2)
    assert cast_weights(config, 0) == Kept(attention + feed_forward)
    assert cast_weights(resolved(f"{GPT} --use_fp8 true --fp8.backend emulated"), 0) == Kept(0)
    assert cast_weights(resolved(GPT), 0) == Kept(0)


def test_cast_weights_wait_with_each_microbatch_in_flight() -> None:
    flags = f"{GPT} --parallel.pipeline 2 --train.global_batch_size 16 --batch_size 4"
    without, with_fp8 = resolved(flags, 2), resolved(f"{flags} --use_fp8 true", 2)
    layer = cast_weights(with_fp8, 0).kept
    for stage, in_flight in ((0, 2), (1, 1)):
        more = stage_activation_bytes(with_fp8, microbatch(with_fp8), stage, 4)
        more -= stage_activation_bytes(without, microbatch(without), stage, 4)
        assert more == in_flight * 2 * layer
    # Whole layers that run again keep the weights of one of them, in its backward alone.
    full = "--parallel.recompute_granularity full"
    without, with_fp8 = resolved(f"{flags} {full}", 2), resolved(f"{flags} {full} --use_fp8 true", 2)
    more = stage_activation_bytes(with_fp8, microbatch(with_fp8), 0, 4)
    assert more - stage_activation_bytes(without, microbatch(without), 0, 4) == layer


def test_histories_count_on_the_device_twice_and_in_the_snapshot_once() -> None:
    zero = ZeroSettings.read({"zero_optimization": {"stage": 3}}, "bf16")
    found = []
    for flags in (GPT, f"{GPT} --use_fp8 true --fp8.backend emulated"):
        config = resolved(flags)
        found.append(largest_memory(config, zero, stage_needs(config, data=1, num_microbatches=1)))
    without, with_fp8 = found
    state = 4 * 4 * 5 * 4 * 1025  # layers, products, tensors, bytes, history and scale
    assert with_fp8.scaling == with_fp8.total - without.total == 2 * state
    assert with_fp8.host - without.host == state
    assert without.scaling == 0
