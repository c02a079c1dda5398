"""One transport device for all gloo groups of a process.

torch gives each gloo group a device of its own, whose thread looks for work a hundred times a second for as long as the
group lives (gloo/transport/tcp/loop.cc: epoll_wait with 10 ms). megatron-core and DeepSpeed make dozens of groups, so
that four ranks on two cores spend a good part of them on waking up. A device serves any number of groups.
"""

from __future__ import annotations

import datetime
from typing import Any

from torch import distributed as dist
from torch.distributed import distributed_c10d

_DEVICES: list[Any] = []


def share_device() -> None:
    """From now on gloo groups of this process share a device. May be called again. Collective: none."""
    if dist.is_gloo_available() and distributed_c10d.ProcessGroupGloo is not _OnSharedDevice:
        distributed_c10d.ProcessGroupGloo = _OnSharedDevice  # type: ignore[misc]


class _OnSharedDevice(dist.ProcessGroupGloo):
    """Constructed as ``distributed_c10d._new_process_group_helper`` constructs a gloo group (torch 2.13)."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        if not _DEVICES:
            _DEVICES.append(dist.ProcessGroupGloo.create_default_device())
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
        options._devices = _DEVICES
        options._timeout = timeout
        super().__init__(store, rank, size, options)
