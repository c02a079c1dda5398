"""``events.jsonl``: a line for each time that the stability guard stepped in; resumed runs append. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoughts.errors import PlatformError
from gptoughts.training.metrics import read_metrics

EVENTS_FILE = "events.jsonl"
Event = dict[str, Any]


class EventsFile:
    """Appends to a run's ``events.jsonl``, which is made with the first event.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / EVENTS_FILE

    def write(self, event: Mapping[str, Any]) -> None:
        """Append one line; numbers that JSON has not become the texts nan and inf.

        Raises:
            PlatformError: the disk is full or gone.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_json_able(event), allow_nan=False) + "\n")
        except OSError as error:
            raise PlatformError(f"{self.path}: cannot be written: {error.strerror}", is_rank_local=True) from None


def read_events(run: Path) -> list[Event]:
    """The events of a run, in the order in which they happened; none where nothing ever did.

    Raises:
        DataError: the file is damaged; names the line.
    """
    path = run / EVENTS_FILE
    return read_metrics(path) if path.is_file() else []


def describe(event: Mapping[str, Any]) -> str:
    """One line for a person."""
    samples = ", ".join(f"{first}-{stop - 1}" for first, stop in event["samples"])
    parts = [f"step {event['step']}: {event['trigger'].replace('_', ' ')}"]
    figures = [f"loss {_number(event['loss'])}", f"gradient norm {_number(event['grad_norm'])}"]
    if event.get("zscore") is not None:
        figures.append(f"z = {_number(event['zscore'])}")
    parts.append(f"({', '.join(figures)}; samples {samples})")
    text = " ".join(parts)
    if event.get("origin"):
        text += f"; first seen: {event['origin']['text']}"
    return f"{text}; {_consequence(event)}"


def _consequence(event: Mapping[str, Any]) -> str:
    action = event["action"]
    if action == "skip":
        return "update skipped"
    target = event.get("went_back_to")
    back = f"back to step {target['step']} ({target['source']})" if target else "nothing to go back to"
    if action == "fallback":
        left = event["left_fp8"]
        return f"{back}, {len(left)} products leave FP8 ({', '.join(left[:4])}{', ...' if len(left) > 4 else ''})"
    if action == "cut_lr":
        return f"{back}, learning rate x {event['lr_factor']:g} until step {event['lr_cut_until_step']}"
    return f"{back}, stopped" if action == "stop" else back


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _json_able(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_able(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_able(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
