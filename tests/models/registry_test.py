"""The registry's entries lead somewhere, and nothing heavy loads with them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.model import ModelConfig
from gptoughts.models.family import Family
from gptoughts.models.registry import FAMILIES
from tests.golden import curve

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_its_page_its_rows_and_its_curve(family: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n| `{family}` | " in readme, "the table of what there is"
    assert f"\n| [docs/{family}.md](docs/{family}.md) | " in readme, "the table of pages"
    assert f"`--model_type {family}`" in (ROOT / "docs" / f"{family}.md").read_text(encoding="utf-8")
    assert curve.golden_file(family).is_file(), f"python tools/update_golden.py {family}"


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
