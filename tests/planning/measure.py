"""Real tensor bytes of a toy run on this rank: what engine and graph hold, storage by storage (no process memory)."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gptoughts.config.fp8 import is_fp8_state
from gptoughts.models import moe
from gptoughts.models.recompute import RemadeOutputs
from gptoughts.models.stages import shared_embedding_weight
from tests.harness import Layout, ToyRun, step_microbatches

_PACK, _UNPACK, _MAKE = RemadeOutputs.pack, RemadeOutputs.unpack, RemadeOutputs._make


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of all different storages among the tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())


class KeptTensors:
    """What the graph keeps for backward at any time; weights do not count."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.weights = list(weights)
        self.users: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, every saved tensor is counted until its node in the graph lets go of it."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            assignment = assign(*args, **kwargs)
            for indices in (assignment.order, assignment.place):  # kept beside the graph's own tensors
                self._add(indices)
                weakref.finalize(indices, self._drop, indices.untyped_storage().data_ptr())
            return assignment

        def pack(remade: RemadeOutputs, tensor: Tensor) -> Any:
            noted = _PACK(remade, tensor)
            return self._pack(tensor) if noted is tensor else noted

        def make(remade: RemadeOutputs, place: int) -> Tensor:
            is_first = remade._made is None
            made = _MAKE(remade, place)
            if is_first:
                for tensor in remade._made or ():
                    self._add(tensor)
                    weakref.finalize(tensor, self._drop, tensor.untyped_storage().data_ptr())
            return made

        assign = moe.assign
        with (
            patch.object(moe, "assign", recorded),
            # Its hooks stand in front of these.
            patch.object(RemadeOutputs, "pack", pack),
            patch.object(RemadeOutputs, "unpack", lambda remade, saved: _unpack(_UNPACK(remade, saved))),
            patch.object(RemadeOutputs, "_make", make),
            torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack),
        ):
            yield

    def _pack(self, tensor: Tensor) -> Any:
        pointer = tensor.untyped_storage().data_ptr()
        if any(pointer == weight.untyped_storage().data_ptr() for weight in self.weights):
            return tensor
        self._add(tensor)
        return _Held(self, tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.users[storage.data_ptr()] += 1
        if self.users[storage.data_ptr()] == 1:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _drop(self, pointer: int) -> None:
        self.users[pointer] -= 1
        if self.users[pointer] == 0:
            self.now -= self.sizes.pop(pointer)


class _Held:
    def __init__(self, owner: KeptTensors, tensor: Tensor) -> None:
        self.owner, self.tensor = owner, tensor

    def __del__(self) -> None:
        self.owner._drop(self.tensor.untyped_storage().data_ptr())


def _unpack(held: Any) -> Tensor:
    return held.tensor if isinstance(held, _Held) else held


def _parameters(run: ToyRun) -> list[Tensor]:
    found = [p for chunk in run.engine.chunks for p in chunk.parameters()]
    copy = shared_embedding_weight(run.engine.chunks)  # type: ignore[arg-type]
    partitions = [p.ds_tensor for p in found if hasattr(p, "ds_tensor")]
    return [*found, *partitions, *([copy] if copy is not None else [])]


def _gradients(run: ToyRun) -> list[Any]:
    optimizer = run.engine.deepspeed.optimizer
    parameters = [p for chunk in run.engine.chunks for p in chunk.parameters()]
    found: list[Any] = [p.grad for p in parameters] + [getattr(p, "grad_accum", None) for p in parameters]
    found += [master.grad for master in getattr(optimizer, "masters", [])]
    found.append(getattr(optimizer, "grad_partitions_flat_buffer", None))
    for name in ("averaged_gradients", "all_grad_tensors"):
        for held in getattr(optimizer, name, {}).values():
            found += held if isinstance(held, list) else [getattr(held, "flat_partition", held)]
    return found


def _optimizer_state(run: ToyRun) -> list[Any]:
    optimizer = run.engine.deepspeed.optimizer
    found = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    parameters = {id(p) for chunk in run.engine.chunks for p in chunk.parameters()}
    found += [master for master in getattr(optimizer, "masters", []) if id(master) not in parameters]
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        found += getattr(optimizer, name, [])
    return found


def _scaling(run: ToyRun) -> list[Tensor]:
    """FP8's histories and scales, and their copies."""
    live = [fragment.tensor for fragment in run.engine.state_fragments() if is_fp8_state(fragment.name)]
    return live + [tensor for name, tensor in run.engine.buffers_before_step.items() if is_fp8_state(name)]


def _buckets(run: ToyRun) -> list[Any]:
    found: list[Any] = []
    for bucket in getattr(run.engine.deepspeed.optimizer, "ipg_buckets", {}).values():
        found += bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
    return found


def measure(family: str, layout: Layout, folder: str) -> Mapping[str, float]:
    """Bytes on this rank in the second step (ZeRO-3 has recorded its trace in the first)."""
    run = ToyRun(family, layout, Path(folder))
    next(run.train(1))
    kept = KeptTensors(_parameters(run))
    found: dict[str, float] = {}
    update = run.engine.deepspeed.step

    def step() -> None:
        found["gradients"] = storage_bytes(_gradients(run))
        found["buckets"] = storage_bytes(_buckets(run))
        update()

    microbatches = step_microbatches(run.experiment, run.objective, 1, run.data_rank)
    selected = [len(m.selected_positions) / m.labels.numel() for m in microbatches if m.selected_positions is not None]
    with kept.watched(), patch.object(run.engine.deepspeed, "step", step):
        run.engine.train_step(microbatches, lr=1e-3)
    found["parameters"] = storage_bytes(_parameters(run))
    found["optimizer"] = storage_bytes(_optimizer_state(run))
    found["scaling"] = storage_bytes(_scaling(run))
    found["activations"] = kept.peak
    found["left_over"] = kept.now
    found["output_fraction"] = max(selected, default=1.0)
    run.close()
    return found
