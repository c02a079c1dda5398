"""ZeRO's weights put together by broadcasts on gloo: the same to the bit as by gloo's own gathering."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from gptoughts.config.experiment import OptimConfig, ParallelConfig
from tests.distributed import run_distributed
from tests.engine.toys import build_toy_engine, toy_batch, zero_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _gathered(dtype: torch.dtype, is_inside: bool) -> bool:
    """Shards of a group of the first and last rank; the middle one has no part in it."""
    from gptoughts.engine import zero_engine
    from gptoughts.engine.weight_gathering import Broadcasts

    zero_engine.initialize_communication()
    world = dist.get_world_size()
    group = dist.new_group([0, world - 1])
    if dist.get_rank() not in (0, world - 1):
        return True
    expected = torch.arange(14).to(dtype)
    whole = torch.zeros(14, dtype=dtype)
    place = whole.chunk(2)[group.rank()]
    shard = place if is_inside else torch.empty(7, dtype=dtype)
    shard.copy_(expected.chunk(2)[group.rank()])
    Broadcasts(shard, whole, group).wait()
    return torch.equal(whole, expected)


@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_shard_comes_to_its_place(dtype: torch.dtype, is_inside: bool) -> None:
    assert all(run_distributed(_gathered, 3, dtype, is_inside))


def _train(stage: int, dtype: str, is_by_gloo: bool) -> tuple[list[torch.Tensor], list[float], int]:
    """State and losses after three steps, and how often gloo gathered."""
    from deepspeed.comm.torch import TorchBackend

    from gptoughts.engine import weight_gathering
    from gptoughts.parallel import groups

    calls: list[Any] = []
    gather, is_on_gloo = TorchBackend.all_gather_into_tensor, weight_gathering._is_on_gloo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TorchBackend, "all_gather_into_tensor", lambda *args, **named: calls.append(1) or gather(*args, **named)
        )
        patch.setattr(weight_gathering, "_is_on_gloo", lambda *args: not is_by_gloo and is_on_gloo(*args))
        groups.initialize(ParallelConfig(), seed=1)
        engine = build_toy_engine(zero_json(stage, dtype=dtype), OptimConfig(lr=1e-2), DTYPES[dtype])
        rank = dist.get_rank()
        losses = [engine.train_step([toy_batch(rank), toy_batch(3 + rank)], lr=1e-2).loss_sum for _ in range(3)]
        losses.append(engine.eval_step([toy_batch(rank)]).loss_sum)
        state = [fragment.tensor.clone() for fragment in engine.state_fragments()]
        engine.close()
    return state, losses, len(calls)


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_run_is_the_same_to_the_bit(stage: int, dtype: str) -> None:
    ours = run_distributed(_train, 3, stage, dtype, False)
    for (state, losses, calls), (expected, expected_losses, gloo_calls) in zip(
        ours, run_distributed(_train, 3, stage, dtype, True), strict=True
    ):
        # Stage 3's few parameters that stay whole, and reads outside of a step, go DeepSpeed's way.
        assert calls < gloo_calls
        assert calls == 0 or stage == 3
        assert losses == expected_losses
        assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))
