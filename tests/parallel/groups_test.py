"""Process groups: layouts, seeds, and that nothing leaks from one layout to the next."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gptoughts.config.experiment import ParallelConfig
from gptoughts.errors import ConfigError
from gptoughts.parallel import groups
from tests.distributed import WorkerError, run_distributed


def _layout(parallel: ParallelConfig) -> dict[str, object]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    groups.initialize(parallel, seed=7)
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return {
        "tensor": (groups.tensor_parallel_rank(), groups.tensor_parallel_size()),
        "data": (groups.data_parallel_rank(), groups.data_parallel_size()),
        "context": (groups.context_parallel_rank(), groups.context_parallel_size()),
        "expert": (groups.expert_parallel_rank(), groups.expert_parallel_size()),
        "world": (groups.rank(), groups.world_size()),
        "default": torch.rand(1).item(),
        "tracked": tracked,
        "groups": len(torch.distributed.distributed_c10d._world.pg_map),
    }


def test_tensor_ranks_share_the_default_generator_and_not_the_tracked_one() -> None:
    ranks = run_distributed(_layout, 2, ParallelConfig(tensor=2))
    assert [rank["tensor"] for rank in ranks] == [(0, 2), (1, 2)]
    assert [rank["data"] for rank in ranks] == [(0, 1), (0, 1)]
    assert ranks[0]["default"] == ranks[1]["default"]
    assert ranks[0]["tracked"] != ranks[1]["tracked"]


def test_replicas_draw_different_numbers() -> None:
    ranks = run_distributed(_layout, 2, ParallelConfig())
    assert [rank["data"] for rank in ranks] == [(0, 2), (1, 2)]
    assert ranks[0]["default"] != ranks[1]["default"]
    assert ranks[0]["tracked"] != ranks[1]["tracked"]


def test_neighbouring_replicas_share_the_experts() -> None:
    ranks = run_distributed(_layout, 4, ParallelConfig(expert=2))
    assert [rank["data"] for rank in ranks] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [rank["expert"] for rank in ranks] == [(0, 2), (1, 2), (0, 2), (1, 2)]


def test_parts_of_a_sequence_draw_different_numbers() -> None:
    ranks = run_distributed(_layout, 4, ParallelConfig(context=2))
    assert [rank["context"] for rank in ranks] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [rank["data"] for rank in ranks] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert len({rank["default"] for rank in ranks}) == len({rank["tracked"] for rank in ranks}) == 4


def test_context_parallel_ranks_may_share_the_experts() -> None:
    ranks = run_distributed(_layout, 4, ParallelConfig(context=2, expert=4))
    assert [rank["expert"] for rank in ranks] == [(0, 4), (1, 4), (2, 4), (3, 4)]


def _refuses_two_of_one() -> str:
    with pytest.raises(ConfigError) as caught:
        groups.initialize(ParallelConfig(tensor=2, expert=2), seed=1)
    return caught.value.problems[0]


def test_replicas_must_divide_by_the_experts_ranks() -> None:
    for message in run_distributed(_refuses_two_of_one, 2):
        assert message == "parallel.expert=2: the 1 data-parallel ranks are not divisible by it"


def test_changing_the_layout_leaves_no_groups_behind() -> None:
    counts = [run_distributed(_layout, 2, ParallelConfig(tensor=tensor))[0]["groups"] for tensor in (1, 2, 1, 2, 1, 2)]
    assert counts[2:] == counts[:2] * 2


def _refuses_three() -> str:
    with pytest.raises(ConfigError) as caught:
        groups.initialize(ParallelConfig(tensor=3), seed=1)
    return caught.value.problems[0]


def test_world_must_divide() -> None:
    for message in run_distributed(_refuses_three, 2):
        assert message == ("parallel.tensor=3 x parallel.pipeline=1: the world size 2 is not divisible by 3")


def _refuses_contexts() -> list[str]:
    messages = []
    for parallel in (ParallelConfig(context=4), ParallelConfig(context=2, expert=4)):
        with pytest.raises(ConfigError) as caught:
            groups.initialize(parallel, seed=1)
        messages += caught.value.problems
    return messages


def test_parts_of_a_sequence_must_divide_the_world() -> None:
    for messages in run_distributed(_refuses_contexts, 2):
        assert messages == [
            "parallel.tensor=1 x parallel.pipeline=1 x parallel.context=4: the world size 2 is not divisible by 4",
            "parallel.expert=4: the 2 data- and context-parallel ranks are not divisible by it",
        ]


def _fails() -> None:
    raise AssertionError("on purpose")


def test_a_failing_rank_is_reported() -> None:
    with pytest.raises(WorkerError, match="on purpose"):
        run_distributed(_fails, 2)


def test_tracker_states_round_trip() -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    groups.initialize(ParallelConfig(), seed=7)
    states = groups.rng_tracker_states()
    with get_cuda_rng_tracker().fork():
        first = torch.rand(2)
    groups.set_rng_tracker_states(states)
    with get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(2), first)
    groups.destroy()


def test_one_process_needs_no_launcher() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    program = (
        "from gptoughts.parallel import groups\n"
        "from gptoughts.config.experiment import ParallelConfig\n"
        "groups.initialize(ParallelConfig(), seed=1)\n"
        "assert groups.world_size() == groups.data_parallel_size() == 1\n"
        "groups.destroy()\n"
        "assert groups.rank() == 0\n"
    )
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
