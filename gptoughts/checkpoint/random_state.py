"""The state of every random number generator that training draws from."""

from __future__ import annotations

from torch import Tensor

from gptoughts.parallel import groups
from gptoughts.platform import device

_DEVICE, _TRACKER = "device/", "tracker/"


def capture() -> dict[str, Tensor]:
    """States of torch's generators and of megatron-core's model-parallel ones, uint8 on the CPU. Collective: none."""
    states = {_DEVICE + name: state for name, state in device.rng_state().items()}
    states |= {_TRACKER + name: state.cpu() for name, state in groups.rng_tracker_states().items()}
    return states


def restore(states: dict[str, Tensor]) -> None:
    """Put back what :func:`capture` returned. Collective: none."""
    device.set_rng_state(_with_prefix(states, _DEVICE))
    groups.set_rng_tracker_states(_with_prefix(states, _TRACKER))


def _with_prefix(states: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
