"""Models that take no memory: built by the real builder, with every tensor on torch's meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _device as _default_device


class _EverythingOnMeta(TorchFunctionMode):
    """Sends what names a device itself to meta; ``torch.device("meta")`` moves only what names none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _default_device._device_constructors() or kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def on_meta_device() -> Iterator[None]:
    """A ``construction_context`` for model builders, in which no tensor has values; initial weights are left out."""
    with _EverythingOnMeta(), torch.device("meta"):
        yield
