"""Capture and restore every random number generator that training draws from."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

_TRACKER = "tracker/"


def capture() -> dict[str, Tensor]:
    """States of torch's generators and of megatron-core's model-parallel ones, uint8 on the CPU. Collective: none."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tracked = get_cuda_rng_tracker().get_states()
    states |= {_TRACKER + name: state.cpu() for name, state in tracked.items()}
    return {name: state.clone() for name, state in states.items()}


def restore(states: dict[str, Tensor]) -> None:
    """Put back what :func:`capture` returned. Collective: none."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {
        name.removeprefix(_TRACKER): state.clone() for name, state in states.items() if name.startswith(_TRACKER)
    }
    if tracked:
        get_cuda_rng_tracker().set_states(tracked)
