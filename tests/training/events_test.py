"""The guard's events: what is written can be read, and every action has a sentence."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gptoughts.errors import PlatformError
from gptoughts.training.events import EventsFile, describe, read_events

BASE = {"step": 7, "trigger": "loss_spike", "loss": 30.0, "grad_norm": math.inf, "zscore": 12.3, "samples": [[24, 28]]}
BACK = {"step": 4, "source": "a checkpoint"}


def test_numbers_that_json_has_not_become_texts(tmp_path: Path) -> None:
    file = EventsFile(tmp_path)
    assert read_events(tmp_path) == []
    file.write(BASE | {"loss": math.nan, "abandoned": [[6, 3.5]]})
    EventsFile(tmp_path).write({"step": 8})
    first, second = read_events(tmp_path)
    assert (first["loss"], first["grad_norm"]) == ("nan", "inf")
    assert first["abandoned"] == [[6, 3.5]]
    assert second == {"step": 8}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"action": "skip"}, "update skipped"),
        (
            {"action": "rollback", "went_back_to": {"step": 4, "source": "a checkpoint"}},
            "back to step 4 (a checkpoint)",
        ),
        (
            {
                "action": "cut_lr",
                "went_back_to": BACK,
                "lr_factor": 0.5,
                "lr_cut_until_step": 104,
            },
            "learning rate x 0.5 until step 104",
        ),
        (
            {"action": "fallback", "went_back_to": BACK, "left_fp8": ["a", "b"]},
            "2 products leave FP8 (a, b",
        ),
        ({"action": "stop", "went_back_to": BACK}, "stopped"),
        ({"action": "skip", "origin": {"text": "NaN in the loss"}}, "first seen: NaN in the loss"),
    ],
)
def test_every_action_has_a_sentence(more: dict[str, object], sentence: str) -> None:
    text = describe(BASE | more)
    assert text.startswith("step 7: loss spike (loss 30, gradient norm inf, z = 12.3; samples 24-27)")
    assert sentence in text


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match=r"events\.jsonl: cannot be written"):
        EventsFile(tmp_path / "gone").write(BASE)
