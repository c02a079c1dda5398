"""Builds toys with the real Transformer Engine where there is no GPU, and prints what their parameters and states are.

A process of its own: what is patched here (torch says that there is a Hopper GPU) is asked at import and kept. Nothing
is computed: every tensor is on the meta device.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from gptoughts.models.meta import on_meta_device
from gptoughts.models.parameter_names import global_parameter_names
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups
from gptoughts.platform import device
from tests.harness import Layout, toy_experiment


def describe(family: str, backend: str) -> dict[str, Any]:
    """Shapes of all parameters and FP8 states by name, recipes, and names of the state dict."""
    extra = ("--use_fp8=true", f"--fp8.backend={backend}", "--fp8.amax_history_len=16", "--fp8.margin=1")
    with tempfile.TemporaryDirectory() as folder:
        config = toy_experiment(family, Layout(precision="bf16", extra=extra), Path(folder)).config
    groups.initialize(config.parallel, seed=config.seed)
    build = FAMILIES[config.model_type].load_model_builder()
    # Scaling states are made outside construction: they go to the meta device, too.
    with hopper() if backend == "te" else nullcontext(), on_meta_device():
        model = build(config, params_dtype=torch.bfloat16, construction_context=on_meta_device)
        states = model.fp8.tensors()
        found = {
            "parameters": {name: list(p.shape) for name, p in global_parameter_names(model).items()},
            "states": {name: list(tensor.shape) for name, tensor in states.items()},
            "extra_states": sorted(name for name in model.state_dict() if name.endswith("_extra_state")),
            "classes": sorted({type(m).__module__.partition(".")[0] for m in model.modules() if hasattr(m, "weight")}),
        }
        if backend == "te":
            from megatron.core.fp8_utils import get_fp8_recipe
            from transformer_engine.common.recipe import DelayedScaling

            recipe = get_fp8_recipe(model.config)
            found["recipe"] = {
                "is_delayed_scaling": isinstance(recipe, DelayedScaling),
                "margin": recipe.margin,
                "format": str(recipe.fp8_format),
                "amax_history_len": recipe.amax_history_len,
                "amax_compute_algo": recipe.amax_compute_algo,
            }
    return found


def hopper() -> Any:
    """torch's word that this is a machine with an H100, for modules that ask before they are constructed."""
    properties = SimpleNamespace(major=9, minor=0, name="H100", total_memory=80 * 1024**3, multi_processor_count=132)
    stack = mock.patch.multiple(
        torch.cuda,
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_device_capability=lambda *_: (9, 0),
        get_device_properties=lambda *_: properties,
        get_device_name=lambda *_: "H100",
    )
    device.fp8_obstacle.cache_clear()
    device.transformer_engine_obstacle.cache_clear()
    return stack


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    backend, *families = sys.argv[1:]
    json.dump({family: describe(family, backend) for family in families}, sys.stdout)
