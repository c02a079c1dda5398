"""Which experts each token passes: recorded on one rank, and replayed where the tokens are divided otherwise.

Two nearly equal experts may change places by rounding, and what follows is another run. With the recorded choice every
layout computes the same function, and what it would have chosen itself may differ only where that choice was a tie.

Legend: s sequence on this rank, b microbatch, t = s b tokens, e experts, k topk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoughts.models.router import ExpertRouter
from gptoughts.parallel import groups
from tests.harness import ToyRun

TIE_MARGIN = 1e-5
"""Affinities that are closer than this may be taken for equal."""
Table = dict[int, Tensor]
"""Layer's number -> int64 [steps, samples per step, whole sequence, k], each token's experts in ascending order."""


class RoutingLog:
    """What happened to the choice on this rank.

    Args:
        run: The run, before its first step.
        table: What is to be replayed; None: experts are chosen freely, and recorded where this is the only rank.
        is_free: Compare with the table only.
    """

    def __init__(self, run: ToyRun, table: Table | None, *, is_free: bool = False) -> None:
        self._run = run
        self._table = table
        self._is_free = is_free
        self._samples = torch.empty(0, dtype=torch.int64)
        self._forwards: dict[int, deque[Tensor]] = {}
        self.recorded: dict[int, list[list[Tensor]]] = {}
        self.widest_tie = [0.0]
        """Per step: how much less than the best another choice had, over all tokens whose own choice differs."""

    def take_microbatch(self, samples: Tensor) -> None:
        """The microbatch of the next forward: places in the step's batch, int64 [b]."""
        self._samples = samples

    def begin_step(self) -> None:
        """Before a step's first forward."""
        self._forwards.clear()
        self.widest_tie.append(0.0)

    def chosen(self, router: ExpertRouter, own: Tensor, scores: Tensor) -> Tensor:
        """What is to be passed, int64 [t, k]; ``own`` is what the router would choose from affinities [t, e]."""
        if not router.training:
            return own
        layer = int(router.layer_number)  # type: ignore[arg-type]
        waiting = self._forwards.setdefault(layer, deque())
        # Recompute runs a forward without a graph first, and anew within its backward; backwards come in their order.
        if torch._C._current_graph_task_id() != -1:
            samples = waiting.popleft()
        else:
            samples = self._samples
            waiting.append(samples)
        own = own.sort(dim=-1).values
        if self._table is None:
            self._record(layer, samples, own)
            return own
        expected = self._expected(layer, samples, len(own), is_divided=router.config.sequence_parallel)
        choice = scores if router.expert_bias is None else scores + router.expert_bias
        loss = choice.gather(1, own).sum(1) - choice.gather(1, expected).sum(1)
        self.widest_tie[-1] = max(self.widest_tie[-1], float(loss.abs().max()))
        return own if self._is_free else expected

    def _record(self, layer: int, samples: Tensor, own: Tensor) -> None:
        b = len(samples)
        whole = own.view(-1, b, own.size(1)).transpose(0, 1)
        steps = self.recorded.setdefault(layer, [])
        while len(steps) <= self._run.step:
            steps.append([])
        steps[self._run.step].append(whole.clone())

    def table(self) -> Table:
        """What was recorded: microbatches came in the order of the step's batch."""
        return {layer: torch.stack([torch.cat(step) for step in steps]) for layer, steps in self.recorded.items()}

    def _expected(self, layer: int, samples: Tensor, num_tokens: int, *, is_divided: bool) -> Tensor:
        assert self._table is not None
        whole = self._table[layer][self._run.step, samples]
        length = num_tokens // len(samples)
        part = groups.context_parallel_rank() * (groups.tensor_parallel_size() if is_divided else 1)
        part += groups.tensor_parallel_rank() if is_divided else 0
        return whole[:, part * length :][:, :length].transpose(0, 1).reshape(num_tokens, -1)


@contextmanager
def logged_routing(run: ToyRun, table: Table | None, *, is_free: bool = False) -> Iterator[RoutingLog]:
    """Inside, every router of this process asks the log."""
    log = RoutingLog(run, table, is_free=is_free)
    routing, forward_step, train_step = ExpertRouter.routing, run.engine._forward_step, run.engine.train_step
    places: dict[int, Tensor] = {}

    def logged(router: ExpertRouter, scores: Tensor) -> Tensor:
        return log.chosen(router, routing(router, scores), scores)

    def told(chunk: Any, inputs: Any) -> Any:
        log.take_microbatch(places[id(inputs)])
        return forward_step(chunk, inputs)

    def step(microbatches: Any, **options: Any) -> Any:
        rows, data = run.experiment.config.batch_size or 1, run.experiment.data_parallel_size
        places.clear()
        for i, inputs in enumerate(microbatches):
            first = (i * data + run.data_rank) * rows
            places[id(inputs)] = torch.arange(first, first + rows)
        log.begin_step()
        return train_step(microbatches, **options)

    ExpertRouter.routing = logged  # type: ignore[method-assign]
    run.engine._forward_step, run.engine.train_step = told, step  # type: ignore[method-assign]
    try:
        yield log
    finally:
        ExpertRouter.routing = routing  # type: ignore[method-assign]
        run.engine._forward_step, run.engine.train_step = forward_step, train_step  # type: ignore[method-assign]


def load_table(path: Path) -> Table:
    """What a one-rank run has recorded; empty for a model without experts."""
    return torch.load(path, weights_only=True)
