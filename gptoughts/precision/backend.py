"""Whose layers a run takes, which of the two FP8 backends, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.platform import device


@dataclass(frozen=True)
class BackendChoice:
    """What ``fp8.backend`` came to on this machine."""

    name: str
    """te or emulated."""
    reason: str
    """Half a sentence for the log."""


def choose_transformer_impl(config: ExperimentConfig) -> str:
    """``transformer_engine`` or ``local``: whose layers a run takes that this machine can run. Collective: none."""
    if config.train.transformer_impl != "auto":
        return config.train.transformer_impl
    is_emulated = config.use_fp8 and choose_backend(config).name == "emulated"
    return "local" if is_emulated or device.transformer_engine_obstacle() is not None else "transformer_engine"


def choose_backend(config: ExperimentConfig) -> BackendChoice:
    """The backend of a run with FP8 on that this machine can run (:func:`backend_problems`). Collective: none."""
    asked = config.fp8.backend
    if asked == "te" or asked == "emulated":
        return BackendChoice(asked, "asked for")
    if config.train.transformer_impl == "local":
        return BackendChoice("emulated", "train.transformer_impl=local")
    obstacle = device.fp8_obstacle()
    if obstacle is None:
        return BackendChoice("te", "Transformer Engine runs here")
    return BackendChoice("emulated", obstacle)


def backend_problems(config: ExperimentConfig, sources: Mapping[str, str]) -> list[str]:
    """A line for each choice that cannot run here, or not with the other one.

    Args:
        config: The run.
        sources: Where each key's value comes from.
    """
    layers, backend, problems = config.train.transformer_impl, config.fp8.backend, []
    obstacle = device.transformer_engine_obstacle()
    if layers == "transformer_engine" and obstacle is not None:
        where = sources["train.transformer_impl"]
        problems.append(f"train.transformer_impl={layers}: {obstacle}; allowed here: local, auto ({where})")
    if not config.use_fp8:
        return problems
    where, obstacle = sources["fp8.backend"], device.fp8_obstacle()
    if backend == "te" and obstacle is not None:
        problems.append(
            f"fp8.backend=te: {obstacle}; allowed here: emulated, auto (the same numbers, without the speed) ({where})"
        )
    if backend == "te" and layers == "local":
        problems.append(
            f"fp8.backend=te: needs Transformer Engine's layers, and train.transformer_impl=local ({where})"
        )
    if backend == "emulated" and layers == "transformer_engine":
        problems.append(
            f"fp8.backend=emulated: Transformer Engine's layers are not emulated, and train.transformer_impl={layers} "
            f"({where}); leave train.transformer_impl unset"
        )
    return problems
