"""What training and the engine say to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptoughts.engine.file_tensor import nameless_tensor
from gptoughts.engine.replay import NonFiniteWatch


class Microbatch(Protocol):
    """What one forward consumes: made by an objective, opaque to the engine but for its denominator."""

    @property
    def denominator(self) -> Tensor:
        """fp64 scalar on the CPU: what this microbatch adds to the step's denominator (e.g. target tokens)."""


@dataclass(frozen=True)
class ForwardOutput:
    """What ``forward_step`` returns for one microbatch on the last pipeline stage."""

    loss_sum: Tensor
    """fp32 scalar with gradient: sum of weighted token losses, nats."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached fp32 scalars to be summed over microbatches and data-parallel ranks for the log."""
    auxiliary_sum: Tensor | None = None
    """fp32 scalar with gradient that is learned from together with ``loss_sum``, over the same denominator, and is no
    part of the loss that is reported."""


ForwardStep = Callable[[nn.Module, Any], ForwardOutput | Tensor]
"""(chunk, microbatch) -> ForwardOutput on the last pipeline stage, the hidden states on others."""


AfterStep = Callable[[bool], Mapping[str, float]]
"""(whether the update was applied) -> figures for the log, equal on all ranks; what a model does after each step that
no gradient does. Collective: every rank of the world."""

NamedBuffers = Callable[[], Mapping[str, Tensor]]
"""() -> tensors that belong in a checkpoint but get no gradient, by global name; the same on every rank."""


Judge = Callable[[float, float], bool]
"""(mean loss, gradient norm) of a step -> whether to apply its update. Called ahead of the update, on every rank with
the same figures, where the norm is finite; every rank has to give the same answer. Collective: none."""


InitialOfBuffer = Callable[[str], float | None]
"""A buffer's global name -> ``StateFragment.initial``."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, equal on all ranks."""

    loss_sum: float
    """Sum of weighted token losses over the global batch, nats."""
    denominator: float
    """Global denominator; loss = loss_sum / denominator."""
    grad_norm: float
    """Global gradient norm before clipping (each parameter counted once)."""
    applied: bool
    """False where the update was skipped: gradients were not finite, or the judge refused it."""
    extras: Mapping[str, float]
    """Sums over the global batch of ``ForwardOutput.extras``."""
    flags: Mapping[str, float]
    """Sums over all ranks of the flags handed to ``train_step`` (they ride on its reduction)."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the model said after the step (``AfterStep``)."""
    is_refused: bool = False
    """Whether the judge refused the update."""

    @property
    def loss(self) -> float:
        """Mean loss, nats."""
        return self.loss_sum / self.denominator


@dataclass(frozen=True)
class StateFragment:
    """A contiguous piece of one parameter's training state that this rank owns, under the parameter's global name.

    The piece is ``[start, start + numel)`` of the flattened tensor-parallel shard, which holds the experts of all
    expert-parallel ranks. Fragments of all ranks cover each shard exactly once (replicas are written by one rank only,
    ``is_owner``).
    """

    name: str
    """Global parameter name (layers numbered over the whole model)."""
    kind: str
    """"weight" (fp32 master where there is one), "exp_avg", "exp_avg_sq", or "buffer" (moved by no gradient)."""
    tensor: Tensor
    """1-D view of the live state, fp32; loading copies into it."""
    start: int
    """Offset in the flattened tensor-parallel shard, in elements."""
    shard_shape: tuple[int, ...]
    """Shape of this rank's tensor-parallel shard, all experts included."""
    partition_dim: int | None
    """Tensor dimension that tensor parallelism divides; None where every tensor-parallel rank holds the whole."""
    partition_stride: int
    """megatron-core's partition_stride: 2 for fused SwiGLU (gate and up interleaved per rank), else 1."""
    is_owner: bool
    """Whether this rank writes the fragment."""
    initial: float | None = None
    """What all its elements are where a checkpoint lacks it (state of an option that was off); None: it may not."""
    folder: Path | None = None
    """Where the file is that the tensor lies in (offload to NVMe); None: it is in memory."""

    def empty_copy(self) -> Tensor:
        """A tensor like it for a copy on the host: in memory, or on the disk where the piece itself is on one.

        Raises:
            OSError: that disk has not enough space.
        """
        if self.folder is not None:
            return nameless_tensor(self.folder, self.tensor.numel(), self.tensor.dtype)
        return torch.empty(self.tensor.shape, dtype=self.tensor.dtype, pin_memory=self.tensor.is_cuda)


class Engine(Protocol):
    """The face of ``engine.deepspeed_engine.TrainEngine``."""

    chunks: Sequence[nn.Module]
    buffers_before_step: Mapping[str, Tensor]
    """Copies of the buffers that belong in a checkpoint, as they were when the latest step began."""

    def train_step(
        self,
        microbatches: Sequence[Microbatch],
        *,
        lr: float,
        flags: Mapping[str, float] | None = None,
        judge: Judge | None = None,
    ) -> StepResult:
        """Forward, backward and one update, unless ``judge`` refuses it. Collective: every rank of the world."""

    def eval_step(self, microbatches: Sequence[Microbatch]) -> StepResult:
        """Forward only (grad_norm 0, applied False). Collective: every rank of the world."""

    def replay(self, microbatches: Sequence[Microbatch], watch: NonFiniteWatch) -> None:
        """Forward and backward without an update, under ``watch``. Collective: every rank of the world."""

    def before_next_update(self, wait: Callable[[], object]) -> None:
        """Call ``wait`` once, ahead of the next update or load, which change weights and moments. Collective: none."""

    def state_fragments(self) -> Sequence[StateFragment]:
        """This rank's pieces of weights and optimizer state. Collective: none."""

    def scalar_state(self) -> dict[str, Any]:
        """JSON-able state that is no tensor: optimizer step counts, loss scale."""

    def loss_scaler_state(self) -> dict[str, Any]:
        """The numbers of fp16's loss scaler; empty in other precisions. Collective: none."""

    def load_state(self, read: Callable[[StateFragment], torch.Tensor], scalars: Mapping[str, Any]) -> None:
        """Fill every fragment with what ``read`` returns for it, then refresh the model's own weights.

        Collective: data-parallel group (weights are gathered again).
        """
