"""What is searched: everything that the configuration accepts, and nothing that it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gptoughts.config.cli import load_experiment
from gptoughts.errors import ConfigError
from gptoughts.models.registry import FAMILIES
from gptoughts.planning.command import best_plans
from gptoughts.planning.report import arguments
from gptoughts.planning.request import read_options, read_run
from gptoughts.planning.search import Plan, search

COMMON = ("--gpu", "h100")


def plans(*flags: str) -> list[Plan]:
    return search(read_run(read_options([*COMMON, *flags]))).plans


def layouts(found: Sequence[Plan]) -> set[tuple[int, int, int, int]]:
    return {
        (p.config.parallel.tensor, p.config.parallel.pipeline, p.config.parallel.virtual_pipeline,
         p.config.parallel.expert) for p in found
    }  # fmt: skip


def test_everything_that_divides_is_tried() -> None:
    found = plans("--gpus", "4", "--size", "debug")  # 4 layers, 4 heads
    assert layouts(found) == {
        (1, 1, 1, 1), (2, 1, 1, 1), (4, 1, 1, 1), (1, 2, 1, 1), (1, 2, 2, 1), (2, 2, 1, 1), (2, 2, 2, 1), (1, 4, 1, 1),
    }  # fmt: skip
    assert {p.zero.stage for p in found} == {0, 1, 2, 3}
    assert {p.config.batch_size for p in found if p.data == 4} == {1, 2, 4, 8}
    assert all(p.config.parallel.sequence == (p.config.parallel.tensor > 1) for p in found)
    assert all(p.config.batch_size * p.data * p.num_microbatches == 32 for p in found)


def test_experts_are_divided_where_there_are_any() -> None:
    found = plans("--gpus", "4", "--model_type", "deepseek", "--size", "debug", "--parallel.pipeline", "1")
    assert {expert for *_, expert in layouts(found)} == {1, 2, 4}


def test_long_sequences_are_divided() -> None:
    """4 heads, parts of 2048 tokens and more."""
    flags = ("--gpus", "8", "--size", "debug", "--parallel.pipeline", "1", "--block_size", "8192")
    found = {(p.config.parallel.tensor, p.config.parallel.context, p.data) for p in plans(*flags)}
    assert found == {(1, 1, 8), (1, 2, 4), (1, 4, 2), (2, 1, 4), (2, 2, 2), (4, 1, 2)}
    stated = plans(*flags[:-2], "--parallel.context", "2")  # shorter, but somebody wants it
    assert {p.config.parallel.context for p in stated} == {2}
    assert all("--parallel.context" in arguments(p, []) for p in plans(*flags) if p.config.parallel.context > 1)


def test_what_is_stated_stays() -> None:
    found = plans("--gpus", "8", "--size", "debug", "--parallel.tensor", "2", "--parallel.sequence", "false",
                  "--batch_size", "2", "--deepspeed_config", "ds_configs/zero2.json")  # fmt: skip
    assert {tensor for tensor, *_ in layouts(found)} == {2}
    assert {(p.config.parallel.sequence, p.config.batch_size, p.zero.stage) for p in found} == {(False, 2, 2)}


def test_layers_that_do_not_divide_get_a_layout() -> None:
    found = plans("--gpus", "2", "--size", "debug", "--model.num_layers", "5", "--parallel.pipeline", "2")
    assert {p.config.parallel.pipeline_layout for p in found} == {"3,2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_launcher_accepts_every_plan_and_needs_what_was_predicted(family: str) -> None:
    flags = ["--model_type", family, "--size", "debug", "--train.global_batch_size", "16"]
    for plan in plans("--gpus", "8", *flags)[::17]:
        experiment = load_experiment(arguments(plan, flags), FAMILIES, world_size=8)
        assert experiment.config.parallel == plan.config.parallel
        assert experiment.config.batch_size == plan.config.batch_size
        assert (experiment.zero_stage, experiment.data_parallel_size) == (plan.zero.stage, plan.data)
        assert experiment.num_microbatches == plan.num_microbatches
        precision = experiment.config.train.precision or ""
        assert plan.zero.read(experiment.deepspeed, precision) == plan.zero


def test_the_first_plan_is_the_fastest_that_fits() -> None:
    options = read_options([*COMMON, "--gpus", "8", "--model_type", "gpt", "--size", "llama-3-8b"])
    found, number = best_plans(read_run(options), options)
    assert 0 < len(found) < number
    seconds = [time.seconds for _, time in found]
    assert seconds == sorted(seconds)
    assert max(plan.memory.total for plan, _ in found) <= options.limit_bytes == 80 * 2**30 * 0.9


def refusal(*flags: str) -> list[str]:
    options = read_options([*flags])
    with pytest.raises(ConfigError) as caught:
        best_plans(read_run(options), options)
    return list(caught.value.problems)


def test_what_does_not_fit_says_what_it_needs_and_what_would() -> None:
    shape = ("--model_type", "gpt", "--size", "llama-3-8b", "--block_size", "1024", "--batch_size", "1")
    first = ("--gpus", "8", "--gpu_memory_gib", "40", "--deepspeed_config", "ds_configs/zero1.json",
             "--parallel.tensor", "1", "--parallel.pipeline", "1")  # fmt: skip
    needs, change = refusal(*shape, *first)
    assert needs.startswith("gpu_memory_gib=40: needs 6")
    assert "ZeRO-1" in needs
    assert "36.0 GiB are usable" in needs
    assert change.startswith("with another --deepspeed_config: tensor 1 x data 8, ZeRO-2")
    _, change = refusal("--gpus", "2", "--gpu_memory_gib", "24", *shape)
    assert "zero3_offload.json" in change
    assert "of the host's memory" in change


def test_a_stated_axis_in_the_way_is_named() -> None:
    flags = ("--gpus", "8", *COMMON, "--gpu_memory_gib", "30", "--model_type", "gpt", "--size", "llama-3-8b")
    lines = refusal(*flags, "--parallel.tensor", "1", "--batch_size", "8")
    assert lines[0].endswith("recompute full), 27.0 GiB are usable")
    assert lines[1].startswith("without parallel.tensor=1: tensor 8 x data 1")


def test_what_no_layout_accepts_is_refused_in_the_launchers_words() -> None:
    lines = refusal("--gpus", "4", *COMMON, "--size", "debug", "--parallel.tensor", "3")
    assert any(line.startswith("parallel.tensor=3 (command line): num_attention_heads=4") for line in lines)
