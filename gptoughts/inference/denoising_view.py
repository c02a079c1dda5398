"""The restoring of a row as pictures: live in a terminal, or saved as an animation.

Tokens that were given are plain, masks are shaded, and what was restored has the colour of its confidence, from red
(none) over yellow to green (certain).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.live import Live
from rich.text import Text

from gptoughts.data.tokenizer import Tokenizer
from gptoughts.errors import ConfigError
from gptoughts.inference.diffusion import Kept

HOLE = "░░"
"""What a mask looks like; of one width, since nobody knows yet how long its token will be."""
_BROKEN = "\ufffd"
_LONGEST_CHARACTER = 4
"""Tokens that may share a character: as many as it has bytes in UTF-8."""
_COLUMNS, _FONT_SIZE, _MARGIN = 88, 15, 14
_STEP_MILLISECONDS, _LAST_MILLISECONDS, _MOST_FRAMES = 110, 2500, 240
_BACKGROUND, _GIVEN, _HOLE = (16, 18, 24), (205, 209, 217), (84, 90, 104)


class Piece(NamedTuple):
    """Some characters of one look."""

    text: str
    confidence: float | None
    """Of the restored token; None: it was given, or is a mask."""
    is_hole: bool


class DenoisingPicture:
    """A row as it is after each step.

    Args:
        row: Tokens and masks.
        mask: Id of the mask.
        tokenizer: Gives the texts of tokens.
    """

    def __init__(self, row: Sequence[int], mask: int, tokenizer: Tokenizer) -> None:
        self.tokens: list[int | None] = [None if token == mask else token for token in row]
        self.confidences: list[float | None] = [None] * len(row)
        self.tokenizer = tokenizer
        # Some decoders drop a text's first space: a token's text is what it adds to another one.
        self._before = tokenizer.encode("a")[:1]
        self._num_before = len(tokenizer.decode(self._before))
        self._texts: dict[tuple[int, ...], str] = {}

    def keep(self, kept: Kept, row: int) -> None:
        """Take over what a step restored in a row of the batch."""
        for number, position, token, confidence in zip(
            kept.rows, kept.positions, kept.tokens, kept.confidences, strict=True
        ):
            if number == row:
                self.tokens[position], self.confidences[position] = token, confidence

    def pieces(self) -> list[Piece]:
        """The row from left to right; no piece ends within a character."""
        found: list[Piece] = []
        start = 0
        while start < len(self.tokens):
            if self.tokens[start] is None:
                found.append(Piece(HOLE, None, True))
                start += 1
                continue
            text, count = self._character(start)
            known = [c for c in self.confidences[start : start + count] if c is not None]
            found.append(Piece(text, min(known, default=None), False))
            start += count
        return found

    def _character(self, start: int) -> tuple[str, int]:
        """The text of the fewest tokens from ``start`` on that are whole characters, and how many they are."""
        tokens: tuple[int, ...] = ()
        for token in self.tokens[start : start + _LONGEST_CHARACTER]:
            if token is None:
                break
            tokens += (token,)
            if _BROKEN not in (text := self._text(tokens)):
                return text, len(tokens)
        return "·", 1  # the rest of this character is still masked, or no character

    def _text(self, tokens: tuple[int, ...]) -> str:
        if tokens not in self._texts:
            self._texts[tokens] = self.tokenizer.decode([*self._before, *tokens])[self._num_before :]
        return self._texts[tokens]


def colour(confidence: float) -> tuple[int, int, int]:
    """Red at 0, yellow at a half, green at 1."""
    rising, falling = min(1.0, 2.0 * confidence), min(1.0, 2.0 - 2.0 * confidence)
    return round(80 + 160 * falling), round(80 + 140 * rising), 90


def _colour_of(piece: Piece) -> tuple[int, int, int]:
    if piece.confidence is not None:
        return colour(piece.confidence)
    return _HOLE if piece.is_hole else _GIVEN


class DenoisingView:
    """Shows a row while it is restored, and saves an animation of it at the end. Use it as a context.

    Args:
        picture: The row.
        row: Its number in the batch.
        console: Where it is shown; unset: it is not.
        animation: File to write; unset: none.
    """

    def __init__(
        self, picture: DenoisingPicture, row: int = 0, *, console: Console | None = None, animation: Path | None = None
    ) -> None:
        self.picture, self.row, self.animation = picture, row, animation
        self.frames = [picture.pieces()]
        self.live = Live(self.text(), console=console, auto_refresh=False) if console is not None else None

    def on_step(self, kept: Kept) -> None:
        """Draw what a step of the sampler restored."""
        self.picture.keep(kept, self.row)
        self.frames.append(self.picture.pieces())
        if self.live is not None:
            self.live.update(self.text(), refresh=True)

    def text(self) -> Text:
        """The newest frame for a terminal."""
        text = Text()
        for piece in self.frames[-1]:
            text.append(piece.text, style="rgb({},{},{})".format(*_colour_of(piece)))
        return text

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
        if self.animation is not None and kind is None:
            save_animation(self.frames, self.animation)


def save_animation(frames: Sequence[Sequence[Piece]], path: Path) -> None:
    """Write frames as one animated picture that stands still at its end.

    Raises:
        ConfigError: the file cannot be written.
    """
    every = -(-len(frames) // _MOST_FRAMES)
    chosen = [*frames[:-1:every], frames[-1]]
    laid_out = [_lines(frame) for frame in chosen]
    rows = max(len(lines) for lines in laid_out)
    pictures = [_draw(lines, rows) for lines in laid_out]
    if path.suffix.lower() == ".gif":
        pictures = _with_one_palette(pictures)
    durations = [_STEP_MILLISECONDS * every] * (len(pictures) - 1) + [_LAST_MILLISECONDS]
    try:
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    except OSError as error:
        raise ConfigError(f"save_animation={str(path)!r}: cannot be written ({error})") from error


def _with_one_palette(pictures: list[Image.Image]) -> list[Image.Image]:
    """The pictures in the colours of the first, the middle and the last: GIF has 256, and Pillow is slow to find them
    for each picture anew."""
    width, height = pictures[0].size
    sample = Image.new("RGB", (width, 3 * height))
    for n, picture in enumerate((pictures[0], pictures[len(pictures) // 2], pictures[-1])):
        sample.paste(picture, (0, n * height))
    palette = sample.quantize(256)
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]


def _lines(pieces: Sequence[Piece]) -> list[list[tuple[str, tuple[int, int, int]]]]:
    """Characters with their colours, in lines of at most so many columns."""
    lines: list[list[tuple[str, tuple[int, int, int]]]] = [[]]
    for piece in pieces:
        for character in piece.text.expandtabs(4):
            if character == "\n" or len(lines[-1]) == _COLUMNS:
                lines.append([])
            if character != "\n":
                lines[-1].append((character, _colour_of(piece)))
    return lines


def _draw(lines: Sequence[Sequence[tuple[str, tuple[int, int, int]]]], rows: int) -> Image.Image:
    font = _font()
    width, height = font.getbbox("M")[2], round(_FONT_SIZE * 1.4)
    image = Image.new("RGB", (2 * _MARGIN + _COLUMNS * int(width), 2 * _MARGIN + rows * height), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        column = 0
        for fill, run in groupby(line, key=lambda cell: cell[1]):
            text = "".join(character for character, _ in run)
            draw.text((_MARGIN + column * int(width), _MARGIN + row * height), text, font=font, fill=fill)
            column += len(text)
    return image


def _font() -> ImageFont.FreeTypeFont:
    """A monospaced font that comes with matplotlib, which draws loss curves here: the same on every machine."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf", _FONT_SIZE)
