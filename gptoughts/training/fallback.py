"""Takes layers out of FP8 while a run goes on, on all ranks alike, and keeps them out when it resumes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.portable import CheckpointReader
from gptoughts.config.fp8 import is_kept
from gptoughts.training.stability import GuardState

_LAYER = re.compile(r"layers\.(\d+)\.")


class Fp8Fallback:
    """What runs in FP8, over all pipeline stages.

    Args:
        chunks: This rank's part of the model.
        all_names: Joins the names of all stages.
        num_layers: Of the whole model.
    Collective: pipeline-parallel group.
    """

    def __init__(self, chunks: Sequence[Any], all_names: Callable[[list[str]], list[str]], num_layers: int) -> None:
        self._products = [chunk.fp8 for chunk in chunks]
        self._num_layers = num_layers
        self.running = all_names([name for products in self._products for name in products.running])
        """Products in FP8 on any stage, by their global names."""

    def leave(self, words: list[str], layer: int | None) -> list[str]:
        """Take products out, between two steps; returns their names, all of which ran in FP8. Collective: none.

        Args:
            words: Which ones, as ``fp8.keep_bf16`` says it; empty: those of ``layer``.
            layer: Where the trouble began; None (or a layer with nothing in FP8): all leave.
        """
        if words:
            leaving = [name for name in self.running if is_kept(name, words, self._num_layers)]
        else:
            leaving = [name for name in self.running if (found := _LAYER.search(name)) and int(found[1]) == layer]
        leaving = leaving or list(self.running)
        self.keep_out(leaving)
        return leaving

    def keep_out(self, names: Collection[str]) -> None:
        """Take these out, where they run in FP8. Collective: none."""
        gone = set(names)
        for products in self._products:
            products.fall_back(lambda name: name in gone)
        self.running = [name for name in self.running if name not in gone]


def left_fp8(reader: CheckpointReader) -> list[str]:
    """What had left FP8 when a checkpoint was written."""
    saved = json.loads((reader.folder / layout.TRAIN_STATE).read_text(encoding="utf-8"))
    return GuardState.read(saved.get("guard", {})).left_fp8
