"""Faults to put into real runs: what samples, ranks and memory do to a run that its guard has to survive."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.engine.interface import ForwardOutput, StateFragment
from gptoughts.models.parameter_names import global_module_names
from gptoughts.training.trainer import Callback, StepReport, Trainer


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    ``nan_gradient``: in the backward, the gradient of a module's output becomes NaN in the rows of these samples.
    ``inf_activation``: in the forward, one element of a module's output becomes infinite in these rows.
    ``loss_spike``: the losses of microbatches with these samples are multiplied by ``factor``.
    ``corrupted_weight``: after the update of ``step`` (counted from 1) the first weight of a parameter becomes
    ``value``, once, on the rank that owns it.
    ``poisoned_amax``: after the update of ``step`` FP8's forward scales and histories of ``module`` become ``value``.
    """

    kind: str
    samples: tuple[int, ...] = ()
    module: str = "decoder.layers.0.mlp.linear_fc2"
    parameter: str = "decoder.layers.0.mlp.linear_fc1.weight"
    rank: int | None = None
    """The only rank on which an activation goes wrong; None: every rank that has the sample."""
    factor: float = 10.0
    step: int = 0
    value: float = float("nan")


@dataclass
class FaultInjector(Callback):
    """Puts faults into the run that it is a callback of."""

    faults: Sequence[Fault]
    course: list[tuple[int, float, bool]] = field(default_factory=list)
    """What this rank saw: each step's number (from 1), loss, and whether its update was applied."""
    outcome: dict[str, Any] = field(default_factory=dict)
    """The run's state at its end, without times."""
    _done: set[int] = field(default_factory=set)

    def on_train_start(self, trainer: Trainer) -> None:
        engine: Any = trainer.engine
        forward_step = engine._forward_step

        def with_faults(chunk: nn.Module, inputs: Any) -> Any:
            found = [number for number, mine in enumerate(trainer.microbatches) if mine is inputs]
            if not found:
                return forward_step(chunk, inputs)  # a validation
            samples = trainer.batches[found[0]].sample_indices
            handles = []
            output_factor = 1.0
            for fault in self.faults:
                rows = [row for row, sample in enumerate(samples.tolist()) if sample in fault.samples]
                if not rows:
                    continue
                if fault.kind == "loss_spike":
                    output_factor *= fault.factor
                elif fault.rank is None or fault.rank == torch.distributed.get_rank():
                    modules = global_module_names(chunk.__dict__["_chunk"])
                    if fault.module in modules:
                        handles.append(
                            modules[fault.module].register_forward_hook(_hook(fault.kind, rows), prepend=True)
                        )
            output = forward_step(chunk, inputs)
            for handle in handles:
                handle.remove()
            if isinstance(output, ForwardOutput):
                output = dataclasses.replace(output, loss_sum=output.loss_sum * output_factor)
            return output

        engine._forward_step = with_faults

    def on_step_end(self, trainer: Trainer, report: StepReport) -> None:
        self.course.append((trainer.state.step, report.result.loss, report.result.applied))
        for number, fault in enumerate(self.faults):
            if fault.kind == "corrupted_weight" and trainer.state.step == fault.step and number not in self._done:
                self._done.add(number)
                corrupt(trainer.engine, fault.parameter, fault.value)
            if fault.kind == "poisoned_amax" and trainer.state.step == fault.step and number not in self._done:
                self._done.add(number)
                for fragment in trainer.engine.state_fragments():
                    if fragment.name.startswith(f"{fault.module}.fp8.") and fragment.name.endswith("_fwd"):
                        fragment.tensor.fill_(fault.value)

    def on_train_end(self, trainer: Trainer) -> None:
        self.outcome = {name: value for name, value in trainer.state.as_dict().items() if name != "seconds"}


def corrupt(engine: Any, parameter: str, value: float) -> None:
    """Overwrite a parameter's first element. Collective: data-parallel group."""

    def read(fragment: StateFragment) -> Tensor:
        piece = fragment.tensor.clone()
        if fragment.name == parameter and fragment.kind == "weight" and fragment.start == 0:
            piece[0] = value
        return piece

    engine.load_state(read, engine.scalar_state())


def _hook(kind: str, rows: list[int]) -> Any:
    def poison_gradient(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:, rows] = torch.nan
        return gradient

    def forward_hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        if kind == "nan_gradient":
            if hidden.requires_grad:
                hidden.register_hook(poison_gradient)
            return output
        assert kind == "inf_activation", kind
        hidden = hidden.clone()
        hidden[0, rows, 0] = torch.inf
        return (hidden, *rest) if isinstance(output, tuple) else hidden

    return forward_hook


def run_with_faults(arguments: Sequence[str], faults: Sequence[Fault]) -> str | None:
    """A pretraining run with faults; returns the message where the guard stopped it. Collective: the world."""
    return run_and_tell(arguments, faults)[0]


def run_and_tell(
    arguments: Sequence[str], faults: Sequence[Fault]
) -> tuple[str | None, list[tuple[int, float, bool]], dict[str, Any]]:
    """The same; also what this rank saw of each step, and its state at the end: see :class:`FaultInjector`."""
    from gptoughts.config.cli import load_experiment
    from gptoughts.errors import StabilityError
    from gptoughts.models.registry import FAMILIES
    from gptoughts.training.pretrain import inspect
    from gptoughts.training.run import run

    world_size = torch.distributed.get_world_size()
    experiment = load_experiment(list(arguments), FAMILIES, world_size=world_size, inspect=inspect)
    injector = FaultInjector(faults)
    message = None
    try:
        run(experiment, extra_callbacks=[injector])
    except StabilityError as error:
        message = str(error)
    return message, injector.course, injector.outcome
