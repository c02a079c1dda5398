"""Finds where the first non-finite value of a step appears: its microbatches run again, under hooks.

Every module's output is looked at in the forward, and the gradients of these outputs and of the parameters in the
backward, in the order in which they come about. On each rank, and for each microbatch, the first bad one of the forward
and the first two of the backward (an output's gradient and a parameter's) are kept; :func:`first_of` tells which of all
ranks' findings came first in the model's order: a bad forward before any backward, an earlier microbatch before a later
one, and within it in the order of layers (backwards: of layers from the end).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

FORWARD, BACKWARD = "forward", "backward"
LOSS = "loss"
"""Stands for a module where the loss is bad and the model's output was not."""


@dataclass(frozen=True)
class Finding:
    """A tensor with a non-finite element."""

    phase: str
    """``forward`` or ``backward``."""
    microbatch: int
    """Index among this rank's microbatches of the step."""
    depth: int
    """Place of the chunk of layers in the model, counted from the embedding."""
    order: int
    """Running number on its rank."""
    module: str | None
    """Module whose output, or whose output's gradient, it is; None: a parameter's gradient."""
    parameter: str | None
    """Parameter whose gradient it is."""
    value: str
    """NaN or Inf."""
    rows: tuple[int, ...]
    """Rows of the microbatch with such elements; empty where the tensor does not tell."""

    @property
    def key(self) -> tuple[bool, int, int, int]:
        """Findings of all ranks in this order are in the order of what came first."""
        is_backward = self.phase == BACKWARD
        return is_backward, self.microbatch, -self.depth if is_backward else self.depth, self.order


class NonFiniteWatch:
    """Hooks on this rank's model; a context manager.

    Args:
        modules: For each chunk: global name to module.
        parameters: Global name to parameter.
        depths: For each chunk: its place in the model.
        num_rows: Samples per microbatch.
    """

    def __init__(
        self,
        modules: Sequence[Mapping[str, nn.Module]],
        parameters: Mapping[str, nn.Parameter],
        depths: Sequence[int],
        num_rows: int,
    ) -> None:
        self.findings: list[Finding] = []
        self._modules = modules
        self._parameters = parameters
        self._depths = depths
        self._num_rows = num_rows
        self._order = 0
        self._microbatch = 0
        self._depth = 0
        self._handles: list[RemovableHandle] = []
        self._seen: set[tuple[str, int, bool]] = set()

    def __enter__(self) -> NonFiniteWatch:
        for modules, depth in zip(self._modules, self._depths, strict=True):
            for name, module in modules.items():
                self._handles.append(module.register_forward_hook(self._forward_hook(name, depth)))
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._parameter_hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, microbatch: int) -> None:
        """The forward of a microbatch through one chunk begins."""
        self._microbatch = microbatch

    def look_at_loss(self, loss: Tensor) -> None:
        """The loss of the microbatch, on the last stage."""
        self._look(FORWARD, [loss], module=LOSS, depth=max(self._depths))

    def _forward_hook(self, name: str, depth: int) -> Callable[..., None]:
        def after_forward(module: nn.Module, args: Any, output: Any) -> None:
            tensors = list(_floating(output))
            self._look(FORWARD, tensors, module=name, depth=depth)
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient_hook(name, depth, self._microbatch))

        return after_forward

    def _gradient_hook(self, name: str, depth: int, microbatch: int) -> Callable[[Tensor], None]:
        def after_backward(gradient: Tensor) -> None:
            # Forwards and backwards of several microbatches alternate: parameters' hooks, and those of layers that are
            # run again for their activations, know theirs from here.
            self._microbatch, self._depth = microbatch, depth
            self._look(BACKWARD, [gradient], module=name, depth=depth)

        return after_backward

    def _parameter_hook(self, name: str) -> Callable[[Tensor], None]:
        def after_backward(gradient: Tensor) -> None:
            self._look(BACKWARD, [gradient], parameter=name, depth=self._depth)

        return after_backward

    @torch.no_grad()
    def _look(
        self,
        phase: str,
        tensors: Iterable[Tensor],
        *,
        depth: int,
        module: str | None = None,
        parameter: str | None = None,
    ) -> None:
        self._order += 1
        key = (phase, self._microbatch, parameter is not None)
        if key in self._seen:
            return
        for tensor in tensors:
            if bool(tensor.isfinite().all()):
                continue
            self._seen.add(key)
            value = "NaN" if bool(tensor.isnan().any()) else "Inf"
            rows = bad_rows(tensor, self._num_rows)
            self.findings.append(Finding(phase, self._microbatch, depth, self._order, module, parameter, value, rows))
            return


def bad_rows(tensor: Tensor, num_rows: int) -> tuple[int, ...]:
    """Rows of a [s, b, h] or [b, s] tensor with non-finite elements; none where it has another shape."""
    is_bad = ~tensor.isfinite()
    if tensor.dim() == 3 and tensor.size(1) == num_rows:
        found = is_bad.any(dim=2).any(dim=0)
    elif tensor.dim() == 2 and tensor.size(0) == num_rows:
        found = is_bad.any(dim=1)
    else:
        return ()
    return tuple(int(row) for row in found.nonzero().flatten())


def first_of(findings: Iterable[Finding]) -> Finding | None:
    """What came first; None where there is nothing."""
    return min(findings, key=lambda finding: finding.key, default=None)


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _floating(list(output.values()))
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _floating(item)
