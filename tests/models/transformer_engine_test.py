"""Whole models of Transformer Engine's real modules, constructed without a GPU: the emulated ones' names and shapes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from gptoughts.models.registry import FAMILIES
from tests.harness import VARIANTS
from tests.integration.conftest import ROOT

pytestmark = [
    pytest.mark.te,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
    ),
]


EVERYTHING = [*FAMILIES, *VARIANTS]


@cache
def describe(backend: str) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.transformer_engine_construction", backend, *EVERYTHING],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("family", EVERYTHING)
def test_names_and_shapes_are_those_of_the_emulated_model(family: str) -> None:
    real, emulated = describe("te")[family], describe("emulated")[family]
    assert "transformer_engine" in real["classes"]
    assert "transformer_engine" not in emulated["classes"]
    assert real["parameters"] == emulated["parameters"]
    assert real["states"] == emulated["states"]
    assert len(real["states"]) >= 4 * 4 * 2
    assert real["recipe"] == {
        "is_delayed_scaling": True,
        "margin": 1,
        "format": "Format.HYBRID",
        "amax_history_len": 16,
        "amax_compute_algo": "max",
    }
    # Layers hand their FP8 state to a state dict under the same names.
    assert set(emulated["extra_states"]) <= set(real["extra_states"])
