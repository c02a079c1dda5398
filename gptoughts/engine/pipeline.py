"""DeepSpeed's engine under megatron-core's forward-backward schedules.

The schedules call one module per chunk of the model and want its ``config``, ``model_type``, ``set_input_tensor`` and,
with several chunks, ``vp_stage``. DeepSpeed wraps exactly one module. So all chunks live in a :class:`ChunkDispatcher`
that DeepSpeed wraps, and the schedule is handed a :class:`ChunkProxy` per chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ChunkDispatcher(nn.Module):
    """All chunks of this rank as one module; forward names the chunk."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    def forward(self, chunk_index: int, *inputs: Any, **kwargs: Any) -> Any:
        """Forward of ``chunks[chunk_index]``."""
        return self.chunks[chunk_index](*inputs, **kwargs)


class ChunkProxy(nn.Module):
    """One chunk as the schedule sees it: its attributes are the chunk's, its forward goes through the engine."""

    def __init__(self, chunk: nn.Module, chunk_index: int, forward: Callable[..., Any]) -> None:
        super().__init__()
        # Kept out of nn.Module's registry: the parameters belong to the engine's module alone.
        self.__dict__["_chunk"] = chunk
        self.__dict__["_chunk_index"] = chunk_index
        self.__dict__["_forward"] = forward

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Forward of the chunk through DeepSpeed's engine, so that its hooks see the backward."""
        return self.__dict__["_forward"](self.__dict__["_chunk_index"], *inputs, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_chunk"], name)


def run_schedule(
    proxies: Sequence[ChunkProxy],
    microbatches: Sequence[Any],
    forward_step: Callable[[nn.Module, Any], tuple[Tensor, Callable[[Tensor], tuple[Tensor, Any]]]],
    *,
    is_forward_only: bool,
    seq_length: int,
    micro_batch_size: int,
) -> list[Any]:
    """One pass of megatron-core's schedule over all microbatches.

    Args:
        proxies: One per chunk of this rank.
        microbatches: The step's, in order; each chunk sees all of them.
        forward_step: (proxy, microbatch) -> output tensor and a function of it that gives (loss, what to keep).
        seq_length: Tokens per sequence, for the shapes that stages exchange (unused with one stage).
        micro_batch_size: Samples per microbatch, likewise.
    Returns:
        What the loss functions kept, one entry per microbatch on the last stage, else empty.
    Collective: tensor- and pipeline-parallel group, and under ZeRO 2 and 3 the data-parallel group.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Iterator[Any], chunk: nn.Module) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Any]]]:
        return forward_step(chunk, next(iterator))

    run = get_forward_backward_func()
    with torch.set_grad_enabled(not is_forward_only), _own_balance_scale():
        return run(
            forward_step_func=step,
            data_iterator=[iter(microbatches) for _ in proxies],
            model=list(proxies),
            num_microbatches=len(microbatches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=is_forward_only,
        )


@contextmanager
def _own_balance_scale() -> Iterator[None]:
    """Inside, balance losses have the scale that the schedule gives them; none is taken over, and none left behind.

    megatron-core keeps it for the process. A backward that no schedule ran leaves a scalar, into which a schedule's
    scale of shape [1] cannot be copied (transformer/moe/moe_utils.py:270 and 286, 0.16.1).
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    try:
        yield
    finally:
        MoEAuxLossAutoScaler.main_loss_backward_scale = None


def is_last_stage() -> bool:
    """Whether this rank computes losses."""
    from megatron.core import parallel_state

    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)
