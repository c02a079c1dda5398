"""Names of tensors and modules that are the same in every layout: layers are numbered over the whole model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import Parameter

Named = TypeVar("Named")

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+(?=\.|$)")


def globally_named(model: nn.Module, named: Iterable[tuple[str, Named]]) -> dict[str, Named]:
    """What has a name in ``model`` (a parameter, a buffer, a module), by its global name."""
    first_layers = {
        name: module.layer_number - 1  # type: ignore[union-attr,operator]
        for name, module in model.named_modules()
        if re.search(r"decoder\.layers\.\d+$", name)
    }
    names: dict[str, Named] = {}
    for name, thing in named:
        match = _LAYER.search(name)
        if match:
            number = first_layers[name[: match.end()]]
            name = f"{name[: match.start()]}{number}{name[match.end() :]}"
        names[name] = thing
    return names


def global_parameter_names(model: nn.Module) -> dict[str, Parameter]:
    """Parameters by a name that is the same in every layout: layers are numbered over the whole model.

    A parameter that two modules share (tied embeddings) appears once, under its first name.
    """
    return globally_named(model, model.named_parameters())


def global_buffer_names(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong in a checkpoint (biases of routers, FP8's histories and scales), named like parameters."""
    persistent = model.state_dict(keep_vars=True)
    found = globally_named(model, ((name, buffer) for name, buffer in model.named_buffers() if name in persistent))
    products: Any = getattr(model, "fp8", None)
    return found if products is None else found | products.tensors()


def global_module_names(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by names like those of parameters, the model itself left out."""
    return globally_named(model, ((name, module) for name, module in model.named_modules() if name))
