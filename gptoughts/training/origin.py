"""Where the first non-finite value of a step comes from: broken weights, a layer's forward or backward, the loss."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gptoughts.engine.interface import Engine
from gptoughts.engine.replay import FORWARD, LOSS, Finding, NonFiniteWatch, first_of
from gptoughts.models.stages import stage_depths, stage_modules, stage_parameters
from gptoughts.training.trainer import Trainer

_KINDS = {"weight": "weight", "exp_avg": "first moment", "exp_avg_sq": "second moment", "buffer": "buffer"}


@dataclass(frozen=True)
class _Located:
    """A finding, and what only its rank knows of it."""

    finding: Finding
    rank: int
    samples: list[int]


def find_origin(trainer: Trainer, chunks: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Look into the state, then run the latest step's microbatches again under hooks.

    Args:
        trainer: Its latest step was not finite and not applied; random states are those from before that step.
        chunks: This rank's part of the model.
        names: Parameter names of the whole model, in its order.
    Returns:
        ``text`` for a person; ``phase`` (state, forward, loss, backward, none); ``layer``, ``module``, ``parameter``,
        ``value`` (NaN or Inf), ``samples`` and ``rank`` where they are known.
    Collective: every rank of the world.
    """
    broken = _broken_state(trainer.engine, names)
    if broken:
        kind, name = broken[0]
        more = f" (and {len(broken) - 1} more tensors)" if len(broken) > 1 else ""
        return _origin(
            "state", f"{_KINDS[kind]} {name} is not finite{more}: the state was broken before this step", parameter=name
        )
    located = _replay(trainer, chunks)
    first = first_of(one.finding for one in located)
    if first is None:
        return _origin(
            "none",
            "nothing non-finite in a replay: a fault that has passed (memory, hardware), or one of the update itself",
        )
    chosen = next(one for one in located if one.finding == first)
    return _describe(chosen, [one for one in located if one.rank == chosen.rank])


def _broken_state(engine: Engine, names: Sequence[str]) -> list[tuple[str, str]]:
    """(kind, name) of tensors with a non-finite element on any rank, weights first, in the order of the model."""
    mine = [
        (fragment.kind, fragment.name)
        for fragment in engine.state_fragments()
        if fragment.tensor.is_floating_point() and not bool(torch.isfinite(fragment.tensor).all())
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    kinds, places = list(_KINDS), {name: place for place, name in enumerate(names)}
    found = {one for of_rank in everyone for one in of_rank}
    return sorted(found, key=lambda one: (kinds.index(one[0]), places.get(one[1], len(places)), one[1]))


def _replay(trainer: Trainer, chunks: Sequence[Any]) -> list[_Located]:
    """What all ranks found."""
    parameters: dict[str, nn.Parameter] = stage_parameters(chunks)
    num_rows = len(trainer.batches[0].sample_indices)
    watch = NonFiniteWatch(stage_modules(chunks), parameters, stage_depths(chunks), num_rows)
    trainer.engine.replay(trainer.microbatches, watch)
    mine = []
    for finding in watch.findings:
        samples = trainer.batches[finding.microbatch].sample_indices.tolist()
        rows = finding.rows or range(num_rows)
        mine.append(_Located(finding, dist.get_rank(), [samples[row] for row in rows]))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [one for of_rank in everyone for one in of_rank]


def _describe(chosen: _Located, of_rank: Sequence[_Located]) -> dict[str, Any]:
    finding = chosen.finding
    where = f"samples {', '.join(map(str, chosen.samples))}, rank {chosen.rank}"
    details = {"value": finding.value, "samples": chosen.samples, "rank": chosen.rank}
    if finding.module == LOSS:
        text = f"{finding.value} in the loss, the model's output being finite ({where})"
        return _origin("loss", text, **details)
    if finding.phase == FORWARD:
        text = f"{finding.value} in the output of {finding.module} ({where})"
        return _origin(FORWARD, text, module=finding.module, **details)
    of_parameters = [
        one.finding
        for one in of_rank
        if one.finding.parameter is not None and one.finding.microbatch == finding.microbatch
    ]
    parameter = of_parameters[0].parameter if of_parameters else None
    if finding.parameter is not None:
        text = f"{finding.value} in the gradient of {finding.parameter} ({where})"
        module: str | None = finding.parameter.rpartition(".")[0]
    else:
        text = f"{finding.value} in the gradient of the output of {finding.module} ({where})"
        module = finding.module
        if parameter is not None:
            text += f"; the first parameter with such a gradient is {parameter}"
    return _origin(finding.phase, text, module=module, parameter=parameter, **details)


def _origin(phase: str, text: str, **details: Any) -> dict[str, Any]:
    name = details.get("module") or details.get("parameter") or ""
    layer = re.search(r"layers\.(\d+)", name)
    return {"phase": phase, "layer": int(layer[1]) if layer else None, **details, "text": text}
