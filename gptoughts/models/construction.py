"""What is said to every builder of a model about the stage that it builds, and handed on as it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypedDict

from gptoughts.models.initialization import Gathered

ConstructionContext = Callable[[], AbstractContextManager[object]]
"""Entered around the construction of modules (ZeRO-3's ``deepspeed.zero.Init``)."""


class Construction(TypedDict, total=False):
    """Keywords of ``build_language_model`` that a family's builder takes as ``**construction`` and passes on."""

    pre_process: bool
    """This stage embeds tokens; unset: it does."""
    post_process: bool
    """This stage makes logits; unset: it does."""
    construction_context: ConstructionContext
    """Entered around construction."""
    gathered: Gathered
    """Entered around each write of initial values."""
