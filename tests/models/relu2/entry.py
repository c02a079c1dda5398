"""The example family's line of the registry, for as long as a test needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gptoughts.models.family import Family
from gptoughts.models.registry import FAMILIES, register
from tests.models.relu2.config import ReLU2Config
from tests.models.relu2.presets import RELU2_PRESETS


@contextmanager
def registered() -> Iterator[Family]:
    """Inside, ``--model_type relu2`` exists in this process."""
    register(
        Family(
            "relu2", "Llama-style decoder with an ungated squared ReLU", ReLU2Config, RELU2_PRESETS,
            "tests.models.relu2.model:build_model", "tests.models.relu2.objective:build_objective",
        )
    )  # fmt: skip
    try:
        yield FAMILIES["relu2"]
    finally:
        del FAMILIES["relu2"]


def with_example(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function where the example is registered (for ranks, which do not share this process's table)."""
    with registered():
        return function(*arguments)
