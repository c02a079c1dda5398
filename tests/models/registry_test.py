"""The registry's entries lead somewhere, and nothing heavy loads with them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.model import ModelConfig
from gptoughts.models.family import Family
from gptoughts.models.registry import FAMILIES


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)
def test_an_entry_is_whole(family: Family) -> None:
    assert FAMILIES[family.name] is family
    assert issubclass(family.config_class, ModelConfig)
    assert list(family.presets)[:5] == ["debug", "small", "medium", "large", "xl"]
    for dotted in (family.model_builder, family.objective):
        module, separator, name = dotted.partition(":")
        assert separator
        assert name
        assert importlib.util.find_spec(module) is not None, f"{family.name}: there is no {module}"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)
def test_builder_and_objective_load(family: Family) -> None:
    assert callable(family.load_model_builder())
    config = ExperimentConfig(model=family.presets["debug"].model)
    assert hasattr(family.load_objective_builder()(config), "prepare")


def test_the_registry_loads_no_heavy_library() -> None:
    code = (
        "import sys; import gptoughts.models.registry, gptoughts.models.flops\n"
        "print(sorted({'torch', 'megatron', 'deepspeed', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
