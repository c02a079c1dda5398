"""Which of the two FP8 backends a run takes, and why."""

from __future__ import annotations

from dataclasses import dataclass

from gptoughts.config.experiment import Fp8Config
from gptoughts.platform import device


@dataclass(frozen=True)
class BackendChoice:
    """What ``fp8.backend`` came to on this machine."""

    name: str
    """te or emulated."""
    reason: str
    """Half a sentence for the log."""


def choose_backend(section: Fp8Config) -> BackendChoice:
    """The backend of a run with FP8 on that this machine can run (:func:`backend_problem`). Collective: none."""
    obstacle = device.fp8_obstacle()
    if section.backend == "te":
        return BackendChoice("te", "asked for")
    if section.backend == "emulated":
        return BackendChoice("emulated", "asked for")
    if obstacle is None:
        return BackendChoice("te", "Transformer Engine runs here")
    return BackendChoice("emulated", obstacle)


def backend_problem(section: Fp8Config) -> str | None:
    """Why the backend that was asked for cannot run here; None: it can."""
    obstacle = device.fp8_obstacle()
    if section.backend == "te" and obstacle is not None:
        return f"fp8.backend=te: {obstacle}; allowed here: emulated, auto (the same numbers, without the speed)"
    if section.backend == "emulated" and device.is_transformer_engine_usable():
        return (
            "fp8.backend=emulated: on this machine Transformer Engine's layers are used, which are not emulated; take "
            "te or auto, or an environment without transformer-engine"
        )
    return None
