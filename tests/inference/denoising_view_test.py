"""Pictures of a row while it is restored."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from gptoughts.data.tokenizer import Tokenizer
from gptoughts.errors import ConfigError
from gptoughts.inference.animation_file import animation_problems
from gptoughts.inference.denoising_view import (
    HOLE,
    DenoisingPicture,
    DenoisingView,
    colour,
    save_animation,
)
from gptoughts.inference.diffusion import Kept
from tests.inference.infill_test import MASK, byte_tokenizer

TEXT = "def f(x):\n\treturn 'naïve 日本'  # ☃\n"
NUM_GIVEN = 9


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path)


def steps_of(ids: list[int]) -> list[Kept]:
    """The tokens after the given ones in any order, three a step, with a confidence each."""
    order = list(range(NUM_GIVEN, len(ids)))
    random.Random(1).shuffle(order)
    chunks = [order[n : n + 3] for n in range(0, len(order), 3)]
    return [Kept([0] * len(c), c, [ids[p] for p in c], [p / len(ids) for p in c]) for c in chunks]


def picture_of(ids: list[int], tokenizer: Tokenizer) -> DenoisingPicture:
    return DenoisingPicture([*ids[:NUM_GIVEN], *[MASK] * (len(ids) - NUM_GIVEN)], MASK, tokenizer)


def test_a_text_appears_in_whole_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    picture = picture_of(ids, tokenizer)
    assert [piece.text for piece in picture.pieces()] == [*"def f(x):", *[HOLE] * (len(ids) - NUM_GIVEN)]
    for step in steps_of(ids):
        picture.keep(Kept([1], [NUM_GIVEN], [0], [0.0]), 0)  # another row's
        picture.keep(step, 0)
        assert "\ufffd" not in "".join(piece.text for piece in picture.pieces())
    pieces = picture.pieces()
    assert "".join(piece.text for piece in pieces) == TEXT
    assert [piece.confidence for piece in pieces[:NUM_GIVEN]] == [None] * NUM_GIVEN
    assert pieces[NUM_GIVEN].confidence == NUM_GIVEN / len(ids)
    snowman = next(piece for piece in pieces if piece.text == "☃")
    assert snowman.confidence == TEXT.encode().index("☃".encode()) / len(ids), "the least sure of its bytes"


def test_colours_run_from_red_over_yellow_to_green() -> None:
    (red, yellow, green) = (colour(c) for c in (0.0, 0.5, 1.0))
    assert red[0] > 2 * red[1]
    assert yellow[0] == pytest.approx(yellow[1], abs=30)
    assert green[1] > 2 * green[0]


def test_the_terminal_shows_every_step_and_the_animation_has_a_frame_for_each(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ids = tokenizer.encode(TEXT)
    out, file = io.StringIO(), tmp_path / "out.gif"
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=100)
    with DenoisingView(picture_of(ids, tokenizer), console=console, animation=file) as view:
        for step in steps_of(ids):
            view.on_step(step)
    shown = out.getvalue()
    assert re.sub(r"\x1b\[[\d;?]*\w", "", shown).count("def f(x):") >= len(view.frames), "one drawing for each frame"
    assert "38;2;{};{};{}mr".format(*colour(TEXT.index("r") / len(ids))) in shown
    with Image.open(file) as animation:
        assert animation.n_frames == len(view.frames) == 1 + len(steps_of(ids))
        first = animation.convert("RGB").tobytes()
        animation.seek(animation.n_frames - 1)
        assert animation.info["duration"] > 1000, "the end stands still"
        assert animation.convert("RGB").tobytes() != first


@pytest.mark.parametrize("kind", [".webp", ".png"])
def test_other_kinds_of_animations(tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    ids = tokenizer.encode("def f(x): abc")
    picture = picture_of(ids, tokenizer)
    frames = [picture.pieces()]
    for step in steps_of(ids):
        picture.keep(step, 0)
        frames.append(picture.pieces())
    save_animation(frames, tmp_path / f"out{kind}")
    with Image.open(tmp_path / f"out{kind}") as animation:
        assert animation.n_frames == len(frames)


def test_an_error_saves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = tokenizer.encode(TEXT)
    with pytest.raises(KeyError), DenoisingView(picture_of(ids, tokenizer), animation=tmp_path / "out.gif"):
        raise KeyError
    assert not (tmp_path / "out.gif").exists()


def test_files_that_cannot_be(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (kind, folder) = animation_problems(tmp_path / "none" / "out.mp4")
    assert kind.endswith("ends in '.mp4'; allowed: .gif, .webp, .png")
    assert folder.endswith(f"there is no folder '{tmp_path / 'none'}'")
    assert animation_problems(tmp_path / "out.GIF") == []
    (tmp_path / "taken.gif").mkdir()
    frames = [picture_of(tokenizer.encode(TEXT), tokenizer).pieces()]
    with pytest.raises(ConfigError, match="cannot be written"):
        save_animation(frames, tmp_path / "taken.gif")
