"""How layers are divided over stages, and what the schedule loses."""

from __future__ import annotations

import pytest

from gptoughts.config.experiment import ParallelConfig
from gptoughts.config.pipeline import bubble_fraction, chunk_layers, stage_layers, suggested_layout
from tests.config.validate_test import load, problems


def test_chunks_go_round_the_stages() -> None:
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2)
    assert chunk_layers(8, parallel) == [2, 2, 2, 2]
    assert stage_layers(8, parallel) == [[range(2), range(4, 6)], [range(2, 4), range(6, 8)]]


def test_uneven_chunks_cover_every_layer_once() -> None:
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2, pipeline_layout="1,3,2,1")
    assert stage_layers(7, parallel) == [[range(1), range(4, 6)], [range(1, 4), range(6, 7)]]


def test_the_suggestion_is_a_layout() -> None:
    assert suggested_layout(7, 4) == "2,2,2,1"
    run = load(f"--model.num_layers 7 --parallel.pipeline 4 --parallel.pipeline_layout {suggested_layout(7, 4)}", 4)
    assert run.data_parallel_size == 1


def test_the_bubble_shrinks_with_microbatches_and_virtual_stages() -> None:
    assert bubble_fraction(ParallelConfig(), 1) == 0
    assert bubble_fraction(ParallelConfig(pipeline=4), 4) == pytest.approx(3 / 7)
    assert bubble_fraction(ParallelConfig(pipeline=4, virtual_pipeline=2), 4) == pytest.approx(3 / 11)


def test_pipeline_and_tensor_parallelism_leave_the_rest_to_data() -> None:
    run = load("--parallel.pipeline 2 --parallel.tensor 2 --batch_size 2 --train.global_batch_size 16", 8)
    assert (run.data_parallel_size, run.num_microbatches) == (2, 4)


@pytest.mark.parametrize(
    ("flags", "world_size", "part"),
    [
        ("--parallel.pipeline 0", 1, "parallel.pipeline=0 (command line): must be 1 or more"),
        ("--parallel.virtual_pipeline 0", 1, "parallel.virtual_pipeline=0 (command line): must be 1 or more"),
        ("--parallel.pipeline 2", 3, "the world size 3 is not divisible by 2; start a multiple of 2 ranks"),
        ("--parallel.pipeline 2 --parallel.tensor 2", 6, "the world size 6 is not divisible by 4"),
        ("--parallel.pipeline 3", 3, "model.num_layers=4 is not divisible by 3; choose a divisor, or say how many"),
        ("--parallel.pipeline 3", 3, "--parallel.pipeline_layout 2,1,1"),
        ("--parallel.pipeline 8", 8, "model.num_layers=4 leaves no layer for some of 8 stages"),
        ("--parallel.pipeline 2 --parallel.virtual_pipeline 4", 2, "leaves no layer for some of 8 stages"),
        ("--parallel.virtual_pipeline 2", 1, "interleaves the layers of several stages; needs parallel.pipeline of 2"),
        ("--parallel.pipeline_layout 2,2", 1, "needs parallel.pipeline of 2 or more"),
        ("--parallel.pipeline 2 --parallel.pipeline_layout 2,x", 2, "numbers of layers, 1 or more, are expected: 2,2"),
        ("--parallel.pipeline 2 --parallel.pipeline_layout 4,0", 2, "numbers of layers, 1 or more, are expected"),
        ("--parallel.pipeline 2 --parallel.pipeline_layout 2,1,1", 2, "has 3 numbers"),
        ("--parallel.pipeline 2 --parallel.pipeline_layout 2,3", 2, "adds up to 5, not to model.num_layers=4"),
        ("--parallel.pipeline 2 --parallel.virtual_pipeline 2", 2, "the 1 microbatches of a step are not a multiple"),
    ],
)
def test_what_cannot_be_run(flags: str, world_size: int, part: str) -> None:
    assert part in problems(flags, world_size)
