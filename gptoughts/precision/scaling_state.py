"""Histories and scales of a model's cast tensors: where they live, when they are written, and when they move on.

As in Transformer Engine (``FP8GlobalStateManager``, transformer_engine/pytorch/quantization.py), a forward in training
records the magnitudes of what it casts, and its end moves the forward states of all layers on, after one reduction over
the amax group; the end of that microbatch's backward does so for the backward states. Weights are cast, and count as an
update of their history, in every microbatch: under ZeRO-3 a cast copy kept over microbatches would be a second, whole
model on each rank. (Transformer Engine does so where ``is_first_microbatch`` is unset.)

- An evaluation (gradients off) reads scales and records nothing.
- Recomputed layers run twice. The first forward, without gradients inside one with, records; the second one, in
  backward, uses the scales that the first had, and records nothing. Forwards and backwards of one layer take its
  microbatches in the same order, so that the scales wait in a queue.

Legend: L length of the history, g products of a layer (1, or its experts).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptoughts.platform import device
from gptoughts.precision.fp8_recipe import DelayedScaling, initial_history, initial_scale, update

FORWARD_SLOTS, BACKWARD_SLOTS = 3, 2
"""Tensors of one product: input, weight, output; output gradient, input gradient. As in Transformer Engine, whose
outputs and input gradients stay in high precision too: their columns keep their initial values."""
INPUT, WEIGHT, GRAD_OUTPUT = 0, 1, 0
ROLES = ("input", "weight", "grad_output")
Observer = Callable[[int, int, Tensor, Tensor, float], None]
"""(index in ``ROLES``, product, tensor, what it was cast to, scale)."""
STATE_NAMES = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
"""Transformer Engine's names in its ``_extra_state``."""


class ScalingState(nn.Module):
    """Histories and scales of one layer's products; product i has columns [3i, 3i + 3) forward, [2i, 2i + 2) backward.

    The tensors are no entries of ``state_dict``: the layer hands them out as Transformer Engine's do, in
    ``_extra_state``.
    Checkpoints have them by names of their own (``models.fp8``).

    Args:
        recipe: Length of the histories and how scales follow from them.
        products: How many.
    """

    scale_fwd: Tensor
    amax_history_fwd: Tensor
    scale_bwd: Tensor
    amax_history_bwd: Tensor

    def __init__(self, recipe: DelayedScaling, products: int = 1) -> None:
        super().__init__()
        self.recipe = recipe
        where = device.current_device()
        for suffix, slots in (("fwd", FORWARD_SLOTS), ("bwd", BACKWARD_SLOTS)):
            count = slots * products
            self.register_buffer(f"scale_{suffix}", initial_scale(count, where), persistent=False)
            self.register_buffer(f"amax_history_{suffix}", initial_history(recipe, count, where), persistent=False)
        self.region: ScalingRegion | None = None
        self.observer: Observer | None = None
        """Sees every cast in training but those of second forwards."""
        self._first_forwards: deque[list[float]] = deque()

    def _apply(self, fn: Any, recurse: bool = True) -> ScalingState:
        # A conversion of the model to bf16 (DeepSpeed makes one) would round what is summed over thousands of steps.
        kept = {name: getattr(self, name) for name in STATE_NAMES}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def states(self) -> dict[str, Tensor]:
        """The live tensors by Transformer Engine's names."""
        return {name: getattr(self, name) for name in STATE_NAMES}

    def forward_scales(self) -> list[float]:
        """Scales of the forward that begins, [3g]; in a second forward those of the first."""
        if self.is_recording:
            scales = self.scale_fwd.tolist()
            if not torch.is_grad_enabled():
                self._first_forwards.append(scales)
            return scales
        if torch.is_grad_enabled() and self._first_forwards:
            return self._first_forwards.popleft()
        return self.scale_fwd.tolist()

    @property
    def is_recording(self) -> bool:
        """Whether this is the (first) forward of a microbatch in training."""
        return self.region is not None and self.region.is_recording

    def record_forward(self, column: int, amax: Tensor) -> None:
        """Note the largest magnitude of a cast input or weight."""
        row = self.amax_history_fwd[0]
        row[column] = torch.maximum(row[column], amax)

    def record_backward(self, column: int, amax: Tensor) -> None:
        """Note the largest magnitude of a cast gradient."""
        row = self.amax_history_bwd[0]
        row[column] = torch.maximum(row[column], amax)

    def forget(self) -> None:
        """Back to the initial values; what a second forward was waiting for is dropped."""
        for name, tensor in self.states().items():
            tensor.fill_(initial_of(name))
        self._first_forwards.clear()


class ScalingRegion:
    """The layers whose states move on together: those of one model chunk.

    Args:
        states: In the order of the model, the same on every rank of ``group``.
        recipe: Of all of them.
        group: Ranks over which magnitudes are reduced (megatron-core's amax reduction group); None: this rank alone.
    """

    def __init__(self, states: Sequence[ScalingState], recipe: DelayedScaling, group: dist.ProcessGroup | None) -> None:
        self._states = list(states)
        self._recipe = recipe
        self._group = group
        self.is_recording = False
        for state in self._states:
            state.region = self

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward of one microbatch. Collective: the amax group, at its end, where gradients are on."""
        self.is_recording = torch.is_grad_enabled()
        try:
            yield
        finally:
            was_recording, self.is_recording = self.is_recording, False
        if was_recording:
            self._move_on("fwd")

    def end_of_backward(self, hidden_states: Tensor) -> Tensor:
        """``hidden_states``, the input of the first layer: its gradient is the last one of a microbatch's backward.

        Collective: the amax group, in backward.
        """
        if not torch.is_grad_enabled():
            return hidden_states
        anchor = torch.zeros((), device=hidden_states.device, requires_grad=True)
        return _EndOfBackward.apply(hidden_states, anchor, self)

    def _move_on(self, suffix: str) -> None:
        histories = [getattr(state, f"amax_history_{suffix}") for state in self._states]
        scales = [getattr(state, f"scale_{suffix}") for state in self._states]
        latest = torch.cat([history[0] for history in histories])
        if self._group is not None and self._group.size() > 1:
            dist.all_reduce(latest, op=dist.ReduceOp.MAX, group=self._group)
        fp8 = self._recipe.forward_format if suffix == "fwd" else self._recipe.backward_format
        update(histories, scales, latest, fp8, self._recipe)


class _EndOfBackward(torch.autograd.Function):
    """Identity; ``anchor`` makes its backward run also where nothing below the layers learns."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, anchor: Tensor, region: ScalingRegion) -> Tensor:
        ctx.region = region
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            ctx.region._move_on("bwd")
        return grad, None, None


def initial_of(name: str) -> float:
    """The initial value of one of ``STATE_NAMES``."""
    return 1.0 if name.startswith("scale") else 0.0
