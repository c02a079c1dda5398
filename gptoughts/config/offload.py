"""Offload to the host's memory and to a disk (NVMe): what of DeepSpeed's JSON goes together, and what fills it in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

BLOCKS = {"offload_optimizer": 1, "offload_param": 3}
"""Block of ``zero_optimization`` -> least ZeRO stage."""
_NVME_STAGE = 3
_NVME_KEYS = ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "max_in_cpu")
_AIO_BLOCK_BYTES = 4096
_TENSORS = 4
"""What DeepSpeed has in memory of a sub-group while it is updated: weights, gradients and two moments."""
_DEFAULT_SUB_GROUP = 1_000_000_000
"""DeepSpeed 0.19.8, runtime/zero/config.py."""
_LARGEST_SUB_GROUP = 100_000_000
LEAST_SUB_GROUP = 2**18
"""fp32 elements of 1 MiB: what is smaller DeepSpeed keeps in memory (runtime/swap_tensor/utils.py:15, 0.19.8)."""
_SUB_GROUPS = 8
SWAP = "swap"
"""Folder in the run's where files go if the JSON names none."""


def buffers_needed(block: Mapping[str, Any]) -> int:
    """Least ``buffer_count``: a sub-group is at work, and the next and the former may be on their way."""
    return _TENSORS * (1 + bool(block.get("pipeline_read")) + bool(block.get("pipeline_write")))


def offload_problems(label: str, stage: int, at: Callable[[str], Any]) -> list[str]:
    """A line for whatever of a JSON's offload cannot be.

    Args:
        label: The file, for messages.
        stage: Its ZeRO stage.
        at: The value under a dotted key; None: it is not there.
    """
    problems, devices = [], []
    for block, least in BLOCKS.items():
        name = f"zero_optimization.{block}"
        found = at(name) if isinstance(at(name), dict) else {}
        device = found.get("device", "none")
        devices.append(device)
        if device not in ("none", "cpu", "nvme"):
            problems.append(f'{label}: {name}.device="{device}": unknown device; allowed: none, cpu, nvme')
        elif device != "none" and stage < (least := _NVME_STAGE if device == "nvme" else least):
            to = " to nvme" if device == "nvme" else ""
            problems.append(f"{label}: {name}{to} needs stage {least} or more (stage is {stage})")
        if device != "nvme":
            problems += [
                f'{label}: {name}.{key} belongs to "device": "nvme" (device is "{device}"); leave it out'
                for key in _NVME_KEYS
                if found.get(key) not in (None, False)
            ]
        elif block == "offload_optimizer":
            count, needed = found.get("buffer_count"), buffers_needed(found)
            if isinstance(count, int) and count < needed:
                problems.append(
                    f"{label}: {name}.buffer_count={count}: at least {needed} (weights, gradients and two moments of "
                    'each sub-group that is at work or on its way); "auto" is that'
                )
    return problems + _aio_problems(label, at, is_used="nvme" in devices)


def _aio_problems(label: str, at: Callable[[str], Any], *, is_used: bool) -> list[str]:
    if at("aio") is None:
        return []
    if not is_used:
        return [f'{label}: aio belongs to an offload to "device": "nvme", and there is none; leave it out']
    problems = [
        f"{label}: aio.{key}={at(f'aio.{key}')}: must be 1 or more"
        for key in ("queue_depth", "intra_op_parallelism")
        if at(f"aio.{key}") == 0
    ]
    size = at("aio.block_size")
    if isinstance(size, int | float) and (size <= 0 or size % _AIO_BLOCK_BYTES):
        problems.append(
            f"{label}: aio.block_size={size}: must be a multiple of {_AIO_BLOCK_BYTES} bytes, a disk's block"
        )
    return problems


def automatic_offload(zero: Mapping[str, Any], output_dir: str, part: int) -> dict[str, Any]:
    """Dotted JSON key -> value where the file has none or ``"auto"``; empty without offload to NVMe.

    Args:
        zero: The JSON's ``zero_optimization``.
        output_dir: The run's folder.
        part: Parameters of a rank, of whose state it holds one part of several.
    """
    values: dict[str, Any] = {}
    if zero.get("sub_group_size") == "auto":
        values["zero_optimization.sub_group_size"] = _DEFAULT_SUB_GROUP
    for block in BLOCKS:
        found = zero.get(block) or {}
        if found.get("device") != "nvme":
            continue
        name = f"zero_optimization.{block}"
        values[f"{name}.nvme_path"] = os.path.join(output_dir, SWAP)
        # The default is the whole part of most ranks, and would be in memory at once.
        wanted = max(LEAST_SUB_GROUP, -(-part // _SUB_GROUPS))
        values["zero_optimization.sub_group_size"] = min(_LARGEST_SUB_GROUP, wanted)
        if block == "offload_optimizer":
            values[f"{name}.buffer_count"] = buffers_needed(found)
        else:
            values[f"{name}.max_in_cpu"] = 0
    return values
