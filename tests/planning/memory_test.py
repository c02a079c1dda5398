"""Predicted bytes: by hand for ZeRO's table, and against real tensors of real steps on gloo ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.planning.activations import pipeline_output_bytes
from gptoughts.planning.layers import microbatch
from gptoughts.planning.memory import (
    Division,
    StageNeeds,
    buffer_bytes,
    cut_gradient_bytes,
    gathered_elements,
    largest_memory,
    rank_memory,
    stage_needs,
    state_bytes,
    swap_memory,
)
from gptoughts.planning.zero import ZeroSettings
from tests.config.validate_test import load
from tests.distributed import run_distributed
from tests.harness import Layout, toy_experiment
from tests.planning.measure import measure

LARGEST_ERROR = 0.1
_TIED = "--model.untie_embeddings_and_output_weights false"
_HEAD_NORMS = "--model.qk_layernorm=true"
_WHOLE_ROWS = ("--model.random_length_probability=0",)  # cut samples keep masks, which are not predicted
_FULL = ("--parallel.recompute_granularity=full",)
_FP8 = ("--use_fp8=true", "--fp8.backend=emulated")
_PAIRS = (*_FULL, "--parallel.recompute_num_layers=2")


def _selective(*modules: str) -> tuple[str, ...]:
    return ("--parallel.recompute_granularity=selective", f"--parallel.recompute_modules={','.join(modules)}")


def settings(stage: int, **block: object) -> ZeroSettings:
    return ZeroSettings.read({"zero_optimization": {"stage": stage, **block}}, "bf16")


@pytest.mark.parametrize(
    ("stage", "width", "expected"),
    [
        (0, 4, (4 * 160, 4 * 160, 8 * 160)),
        (0, 2, (2 * 160, 4 * 160, 12 * 160)),
        (1, 2, (2 * 160, 4 * 160, 12 * 50)),
        (1, 4, (4 * 160, 4 * 160, 12 * 50)),
        (2, 2, (2 * 160, 4 * 50, 12 * 50)),
        (3, 2, (2 * 50, 4 * 50, 12 * 50)),
    ],
)
def test_zero_divides_state(stage: int, width: int, expected: tuple[int, int, int]) -> None:
    """120 dense parameters on a rank over 4, 40 of experts over the 2 ranks that have the same ones: 30 + 20."""
    exact = Division(dense=120, routed=40, data=4, expert=2)
    assert (exact.whole, exact.part) == (160, 50)
    found = state_bytes(exact, settings(stage), width)
    assert tuple(found.values()) == expected


def test_gradients_accumulate_in_the_dtype_that_the_json_says() -> None:
    zero = ZeroSettings.read({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "bf16"}}, "bf16")
    assert zero.gradient_width == 2
    assert settings(1).gradient_width == 4
    assert settings(0).communication_width == 4
    assert settings(2).communication_width == 2


def test_gathered_weights_are_bounded_by_the_reuse_distance() -> None:
    division = Division(dense=10_000, routed=0, data=4, expert=1)
    assert gathered_elements(division, settings(2), 100) == 0
    assert gathered_elements(division, settings(3), 100) == 10_000  # DeepSpeed's distance of 1e9: all of them stay
    near = settings(3, stage3_max_reuse_distance=1000, stage3_prefetch_bucket_size=50)
    assert gathered_elements(division, near, 100) == 500 + 50 + 2 * 100


def test_buffers_of_the_two_moments() -> None:
    division = Division(dense=1000, routed=0, data=4, expert=1)
    some = {"layer_elements": 0, "temporaries": 7}
    assert buffer_bytes(division, settings(0), 2, kept=0, **some) == 4 * 1000  # no bucket is larger than the model
    assert buffer_bytes(Division(1000, 0, 1, 1), settings(0), 2, kept=0, **some) == 7  # nothing to reduce
    first = settings(1, reduce_bucket_size=300)
    assert buffer_bytes(division, first, 2, kept=0, **some) == 4 * 300 + 4 * 250
    assert buffer_bytes(division, first, 2, kept=2000, **some) == 200  # activations are gone by then
    second = settings(2, reduce_bucket_size=300, overlap_comm=True)
    assert buffer_bytes(division, second, 2, kept=5000, **some) == 7 + 2 * 2 * 300
    third = settings(3, reduce_bucket_size=300, stage3_max_reuse_distance=0)
    assert buffer_bytes(division, third, 2, kept=5000, **some) == 7 + 2 * 300


def test_offload_moves_state_to_the_host() -> None:
    needs = StageNeeds(Division(1000, 0, 4, 1), kept=10, logits=4, temporaries=0, copied_elements=0, layer_elements=0)
    offloaded = settings(2, reduce_bucket_size=1, offload_optimizer={"device": "cpu"})
    found = rank_memory(needs, offloaded, 2)
    assert (found.parameters, found.gradients, found.optimizer) == (2000, 0, 0)
    assert found.host == 4 * 250 + 12 * 250
    assert (found.activations, found.logits) == (6, 4)
    assert found.total == 2000 + 10 + found.buffers


def test_offload_to_a_disk_leaves_buffers_on_the_host() -> None:
    needs = StageNeeds(
        Division(1000, 0, 4, 1), kept=10, logits=4, temporaries=0, copied_elements=0, layer_elements=30,
        tensor_elements=40,
    )  # fmt: skip
    nvme = {"device": "nvme", "buffer_count": 8}
    zero = settings(
        3, reduce_bucket_size=1, sub_group_size=60, offload_optimizer=nvme, offload_param={"device": "nvme"},
        stage3_max_reuse_distance=0,
    )  # fmt: skip
    found = rank_memory(needs, zero, 2)
    assert (found.parameters, found.gradients, found.optimizer) == (0, 0, 0)
    assert found.disk == 2 * 250 + 12 * 250 + 4 * 250, "weights, state, and gradients on their way"
    sub_group = 60 + 40 // 4
    assert swap_memory(needs, zero, 2) == 8 * 4 * sub_group + 2 * (sub_group + 2 * 30 // 4)
    assert found.host == 4 * 250 + swap_memory(needs, zero, 2)
    assert found.buffers == 4 * 250 - 10, "a rank's gradients are on the device whole before the update"


def test_copies_of_what_is_on_a_disk_are_there_too(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}')
    expected = {}
    for flags in ("--stability.snapshot_interval_steps 0", "", "--checkpoint.asynchronous true"):
        run = load(f"--model_type gpt --deepspeed_config {path} {flags}", 2)
        zero = ZeroSettings.read(run.deepspeed, "bf16")
        needs = stage_needs(run.config, data=2, num_microbatches=1)
        expected[flags] = largest_memory(run.config, zero, needs)
    plain, snapshot, both = expected.values()
    part = needs[0].division.part
    assert plain.host == snapshot.host == both.host
    assert (snapshot.disk - plain.disk, both.disk - snapshot.disk) == (12 * int(part), 12 * int(part))


def test_zero_2_keeps_tensors_whole_that_its_parts_cut_in_fp32() -> None:
    needs = StageNeeds(Division(1000, 0, 4, 1), 0, 0, 0, copied_elements=0, layer_elements=0, tensor_elements=70)
    assert cut_gradient_bytes(needs, settings(2), 4) == 2 * 4 * 70
    assert cut_gradient_bytes(needs, settings(2), 2) == 0
    assert cut_gradient_bytes(needs, settings(3), 4) == 0


def test_a_copy_of_a_tied_embedding_counts_whole() -> None:
    """64 numbers: weights of the copy, and their fp32 gradient during a step, at any ZeRO stage."""
    needs = StageNeeds(Division(1000, 0, 4, 1), kept=0, logits=0, temporaries=7, copied_elements=64, layer_elements=0)
    zero = settings(3, reduce_bucket_size=1, stage3_max_reuse_distance=0)
    found = rank_memory(needs, zero, 2)
    assert found.parameters == 2 * 250 + 2 * 64
    assert found.buffers == max(7 + 4 * 64 + 2, 4 * 250 + 2)


@pytest.mark.parametrize(("flags", "stages"), [("", []), ("--model.mtp_num_layers 1", [1]), (_TIED, [1])])
def test_who_has_a_copy_of_the_embedding(flags: str, stages: list[int]) -> None:
    config = load(f"--model_type deepseek --parallel.pipeline 2 {flags}", 2).config
    copied = [needs.copied_elements for needs in stage_needs(config, data=1, num_microbatches=1)]
    assert [stage for stage, count in enumerate(copied) if count] == stages
    assert sum(copied) == len(stages) * config.model.embedding_parameters()


def cases() -> list[object]:
    """Every family, precision, ZeRO stage and axis in the default run; more of their products are slow."""
    default = [
        ("gpt", Layout(tensor=2, sequence=True, precision="bf16")),
        ("gpt", Layout(pipeline=2, accumulation=4, zero=1, tied=True)),
        ("mla", Layout(data=2, zero=3)),
        ("deepseek", Layout(data=2, expert=2, zero=1, precision="bf16")),
        ("llada", Layout(data=2, zero=2, precision="bf16", accumulation=2, extra=_WHOLE_ROWS)),
        ("deepseek", Layout(context=2, data=1, zero=3, expert=2)),
        ("gpt", Layout(layers=4, extra=_FULL)),
        ("gpt", Layout(pipeline=2, layers=4, accumulation=2, extra=_selective("layernorm", "core_attn"))),
        ("deepseek", Layout(layers=3, extra=_selective("mla_up_proj", "moe", "layernorm"))),
    ]
    slow = [
        ("gpt", Layout()),
        ("gpt", Layout(tensor=2, data=2, zero=3, precision="bf16")),
        ("gpt", Layout(extra=("--model.num_query_groups=2", "--model.qk_layernorm=true"))),
        ("mla", Layout(tensor=2)),
        ("mla", Layout(tensor=2, sequence=True, extra=("--model.q_lora_rank=64",))),
        ("mla", Layout(pipeline=2, data=2, zero=2, accumulation=2, precision="bf16")),
        ("gpt", Layout(context=2, zero=2, precision="bf16")),
        ("gpt", Layout(tensor=2, sequence=True, context=2, extra=("--model.num_query_groups=2", _HEAD_NORMS))),
        ("gpt", Layout(pipeline=2, context=2, accumulation=4)),
        ("mla", Layout(context=2)),
        ("mla", Layout(context=2, context_method="ring", zero=1)),
        ("gpt", Layout(context=2, context_method="ring", precision="bf16")),
        ("llada", Layout(context=2, zero=1, extra=_WHOLE_ROWS)),
        ("deepseek", Layout(pipeline=2, virtual=2, layers=4, accumulation=4, zero=1)),
        ("deepseek", Layout(tensor=2, sequence=True, data=2, zero=2)),
        ("deepseek", Layout(data=2, zero=3, expert=2)),
        ("deepseek", Layout(extra=("--model.mtp_num_layers=2",))),
        ("deepseek", Layout(pipeline=2, zero=1, accumulation=2, extra=("--model.mtp_num_layers=1",))),
        ("deepseek", Layout(pipeline=2, zero=3, accumulation=2, tied=True, extra=("--model.mtp_num_layers=1",))),
        ("llada", Layout(tensor=2, sequence=True, extra=_WHOLE_ROWS)),
        ("llada-moe", Layout(data=2, zero=1, extra=_WHOLE_ROWS)),
        ("llada-mla-moe", Layout(precision="bf16", extra=_WHOLE_ROWS)),
        *(("gpt", Layout(layers=4, extra=_selective(name))) for name in ("core_attn", "layernorm", "mlp")),
        *(("mla", Layout(layers=4, extra=_selective(*names))) for names in (("mla_up_proj",), ("core_attn",))),
        ("mla", Layout(layers=4, extra=(*_selective("mla_up_proj", "core_attn"), "--model.q_lora_rank=64"))),
        ("mla", Layout(tensor=2, sequence=True, extra=_selective("mla_up_proj", "layernorm", "mlp"))),
        *(("deepseek", Layout(layers=3, extra=_selective(*names))) for names in (("shared_experts",), ("moe", "mlp"))),
        ("deepseek", Layout(layers=4, extra=(*_FULL, "--model.mtp_num_layers=1"))),
        ("deepseek", Layout(pipeline=2, data=2, layers=4, accumulation=4, zero=3, extra=_FULL)),
        ("gpt", Layout(pipeline=2, virtual=2, layers=8, accumulation=4, precision="bf16", extra=_PAIRS)),
        ("gpt", Layout(layers=4, extra=(*_FULL, "--parallel.recompute_method=block"))),
        ("llada", Layout(tensor=2, layers=4, precision="bf16", extra=(*_WHOLE_ROWS, *_PAIRS))),
        ("gpt", Layout(context=2, layers=4, zero=1, extra=_selective("core_attn", "layernorm", "mlp"))),
        ("gpt", Layout(context=2, context_method="ring", layers=4, precision="bf16", extra=_selective("core_attn"))),
        ("mla", Layout(context=2, layers=4, extra=_selective("mla_up_proj", "core_attn"))),
        ("mla", Layout(context=2, context_method="ring", layers=4, extra=_selective("mla_up_proj", "core_attn"))),
        ("deepseek", Layout(context=2, context_method="ring", layers=4, zero=3, extra=_FULL)),
        ("gpt", Layout(context=2, context_method="ring", extra=_FP8)),
        ("mla", Layout(context=2, extra=_FP8)),
        ("gpt", Layout(tensor=2, sequence=True, precision="bf16", extra=_FP8)),
        ("mla", Layout(zero=3, data=2, extra=(*_FP8, "--model.q_lora_rank=64"))),
        ("deepseek", Layout(pipeline=2, accumulation=2, extra=(*_FP8, "--model.mtp_num_layers=1"))),
    ]
    return [pytest.param(*case, id=_name(*case)) for case in default] + [
        pytest.param(*case, id=_name(*case), marks=pytest.mark.slow) for case in slow
    ]


def _name(family: str, layout: Layout) -> str:
    values = [flag.partition("=")[2] for flag in layout.extra if flag.startswith("--parallel.recompute_")]
    return "-".join([f"{family}-{layout}", *values, *(["fp8"] if "--use_fp8=true" in layout.extra else [])])


@pytest.mark.parametrize(("family", "layout"), cases())
def test_a_real_step_needs_what_is_predicted(family: str, layout: Layout, tmp_path: Path) -> None:
    """Each part on each rank. Apart: gathered weights and buckets (``buffers``), outputs that a stage has sent on, and
    gradients that ZeRO-2 keeps whole in fp32 (up to a bound)."""
    measured = run_distributed(measure, layout.world_size, family, layout, str(tmp_path))
    experiment = toy_experiment(family, layout, tmp_path / "predicted")
    config: ExperimentConfig = experiment.config
    zero = ZeroSettings.read(experiment.deepspeed, layout.precision)
    count = experiment.num_microbatches
    batch = microbatch(config)
    for rank, found in enumerate(measured):
        stage = rank // (layout.tensor * layout.context * layout.data)
        needs = stage_needs(config, data=layout.data, num_microbatches=count, output_fraction=found["output_fraction"])[
            stage
        ]
        memory = rank_memory(needs, zero, batch.width)
        sent = pipeline_output_bytes(config, batch, stage, count)
        predicted = {
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": memory.activations + memory.logits - sent,
        }
        whole_tensors = found["gradients"] - memory.gradients
        if 0 < whole_tensors <= cut_gradient_bytes(needs, zero, batch.width):
            predicted["gradients"] += int(whole_tensors)
        for part, expected in predicted.items():
            assert expected == pytest.approx(found[part], rel=LARGEST_ERROR), (rank, part)
        assert found["scaling"] == memory.scaling
        assert found["left_over"] == 0  # everything kept was let go of: it has been measured wholly
        assert found["buckets"] <= max(memory.buffers, zero.gradient_width * zero.bucket_elements)
