"""Names of weights and buffers that are the same in every layout."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

AnyTensor = TypeVar("AnyTensor", bound=Tensor)

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+(?=\.)")


def global_parameter_names(model: torch.nn.Module) -> dict[str, Parameter]:
    """Parameters by a name that is the same in every layout: layers are numbered over the whole model.

    A parameter that two modules share (tied embeddings) appears once, under its first name.
    """
    return _globally_named(model, model.named_parameters())


def global_buffer_names(model: torch.nn.Module) -> dict[str, Tensor]:
    """Buffers that belong in a checkpoint (biases of routers), by names like those of parameters."""
    persistent = model.state_dict(keep_vars=True)
    return _globally_named(model, ((name, buffer) for name, buffer in model.named_buffers() if name in persistent))


def _globally_named(model: torch.nn.Module, tensors: Iterable[tuple[str, AnyTensor]]) -> dict[str, AnyTensor]:
    first_layers = {
        name: module.layer_number - 1  # type: ignore[union-attr,operator]
        for name, module in model.named_modules()
        if re.search(r"decoder\.layers\.\d+$", name)
    }
    names: dict[str, AnyTensor] = {}
    for name, tensor in tensors:
        match = _LAYER.search(name)
        if match:
            number = first_layers[name[: match.end()]]
            name = f"{name[: match.start()]}{number}{name[match.end() :]}"
        names[name] = tensor
    return names
