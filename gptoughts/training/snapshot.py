"""A copy of this rank's training state in the host's memory: what a rollback goes back to without a checkpoint.

It is taken between the backward and the update of a step whose loss and gradient norm, computed from this very state,
were found good. So it is known to be good when it is made, and one copy is enough. State that is on a disk (offload to
NVMe) is copied on that disk: the host's memory is what such a run has not enough of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptoughts.checkpoint import random_state
from gptoughts.engine.interface import Engine, StateFragment
from gptoughts.errors import CheckpointError

_Key = tuple[str, str, int]


class Snapshot:
    """Weights, moments and buffers of one rank, its random states, and where the run stood."""

    def __init__(self) -> None:
        self._tensors: dict[_Key, Tensor] = {}
        self._scalars: Mapping[str, Any] = {}
        self._rng: dict[str, Tensor] = {}
        self.train_state: dict[str, Any] = {}
        """``TrainState.as_dict()`` of the moment; empty before the first :meth:`take`."""

    @torch.no_grad()
    def take(self, engine: Engine, train_state: Mapping[str, Any], rng: dict[str, Tensor]) -> None:
        """Copy the state as it was before the running step; memory is kept for the next copy.

        Args:
            engine: Between backward and update: only buffers have moved since the step began.
            train_state: Where the run stood before the step.
            rng: Random states of that moment.
        Raises:
            CheckpointError: the disk that the state is on has no room for a copy.
        Collective: none.
        """
        for fragment in engine.state_fragments():
            source = fragment.tensor
            if fragment.name in engine.buffers_before_step:
                source = engine.buffers_before_step[fragment.name].view(-1)
            key = _key(fragment)
            copy = self._tensors.get(key)
            if copy is None:
                copy = self._tensors[key] = _room_for(fragment)
            # On the stream of the update, which therefore waits for it.
            copy.copy_(source, non_blocking=True)
        self._scalars = engine.scalar_state()
        self._rng = rng
        self.train_state = dict(train_state)

    def restore(self, engine: Engine) -> None:
        """Put the state back, to the bit. Collective: data-parallel group."""
        engine.load_state(lambda fragment: self._tensors[_key(fragment)], self._scalars)
        random_state.restore(self._rng)

    @property
    def num_bytes(self) -> int:
        """Host memory (or disk) that the copy takes on this rank."""
        return sum(tensor.nbytes for tensor in self._tensors.values())


def _room_for(fragment: StateFragment) -> Tensor:
    try:
        return fragment.empty_copy()
    except OSError as error:
        raise CheckpointError(
            f"{fragment.folder}: the stability guard's snapshot does not fit ({error.strerror}); make room for 12 "
            "bytes per parameter of a rank, or set --stability.snapshot_interval_steps 0",
            is_rank_local=True,
        ) from None


def _key(fragment: StateFragment) -> _Key:
    return fragment.kind, fragment.name, fragment.start
