"""What ``launchers/generate.py`` does with masked-diffusion models: their flags, and their answers.

Nothing here loads torch until there is something to restore.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.animation_file import animation_problems
from gptoughts.inference.answers import Answer
from gptoughts.inference.diffusion_options import DiffusionOptions
from gptoughts.inference.infill import num_masks, pieces_of, row_of, text_of, unescaped

if TYPE_CHECKING:
    from gptoughts.inference.denoising_view import DenoisingView
    from gptoughts.inference.diffusion import DiffusionSampler, Restored
    from gptoughts.inference.loading import LoadedModel

END, STOP, LENGTH = "end", "stop", "length"
"""Why an answer ended: an end token, a stop text, its number of tokens."""


@dataclass(frozen=True)
class DiffusionCommand(DiffusionOptions):
    """Flags of ``launchers/generate.py`` for masked-diffusion families."""

    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    batch_rows: int = 8
    """Prompts that are answered at once at the most."""
    infill: str | None = None
    r"""A text with holes in place of a prompt: 'def f(x):\n    [MASK*20]\n    return y', where [MASK*N] is N tokens;
    \n is a line break, \t a tab, \\ a backslash."""
    show: bool = False
    """Draw the restoring in the terminal (on stderr)."""
    save_animation: Path | None = None
    """Save the restoring as an animated .gif, .webp or .png."""

    def refusals(self, stated: Collection[str], num_prompts: int) -> list[str]:
        """What cannot be, one line each, as far as it is known before anything is loaded (``answers.Command``)."""
        found = self.problems() if self.infill is None else self._infill_problems(self.infill, stated)
        if not all(self.stop):
            found.append(f"stop={', '.join(self.stop)}: an empty text ends every answer; leave it out")
        if self.batch_rows < 1:
            found.append(f"batch_rows={self.batch_rows}: at least 1")
        if num_prompts > 1:
            drawn = {"show": self.show, "save_animation": self.save_animation}
            found += [
                f"{name}={value}: draws one answer, but there are {num_prompts} prompts"
                for name, value in drawn.items()
                if value
            ]
        if self.save_animation is not None:
            found += animation_problems(self.save_animation)
        return found

    def _infill_problems(self, text: str, stated: Collection[str]) -> list[str]:
        found = [
            f"{name}={value}: what is to be found is said by the holes of infill; leave it out"
            for name, value in (("max_new_tokens", self.max_new_tokens), ("stop", ", ".join(self.stop)))
            if name in stated
        ]
        try:
            pieces = pieces_of(unescaped(text))
        except DataError as error:
            return [*found, *error.problems]
        return found + self.problems(num_masks(pieces))


class DiffusionAnswerer:
    """Answers to prompts, and texts without holes, from one loaded model (``answers.FillingAnswerer``).

    Args:
        loaded: A masked-diffusion model.
        command: What was asked for.

    Raises:
        ConfigError: what was asked for is about ends that the model has not.
        DataError: its tokenizer has no mask token.
    """

    def __init__(self, loaded: LoadedModel, command: DiffusionCommand) -> None:
        from gptoughts.inference.diffusion import build_sampler

        self.tokenizer = loaded.tokenizer
        self.sampler: DiffusionSampler = build_sampler(loaded)
        self.command = command
        if problems := self.sampler.option_problems(command):
            raise ConfigError([f"{problem} (command line)" for problem in problems])

    def problems(self, prompts: Sequence[list[int]]) -> list[str]:
        """Prompts that the model's context has no room for, or that have masks of their own."""
        found, mask = [], self.sampler.special.mask
        for number, prompt in enumerate(prompts, start=1):
            if mask in prompt:
                found.append(f"prompt {number}: has the mask token in it; fill holes with --infill")
            row = [*prompt, *[mask] * self.command.max_new_tokens]
            found += self.sampler.problems(row, f"prompt {number}")
        return found

    def stream(self, prompt: list[int]) -> Generator[str, None, None]:
        """One answer; a piece is what now stands before its first mask. Collective: tensor-parallel group."""
        from gptoughts.inference.text_stream import TextStream

        row = self._row(prompt)
        text = TextStream(self.tokenizer, self.command.stop, before=prompt)
        start, is_over = len(prompt), False
        with self._drawn(row) as view:
            for kept in self.sampler.start([row], self.command).steps():
                if view is not None:
                    view.on_step(kept)
                for position, token in zip(kept.positions, kept.tokens, strict=True):
                    row[position] = token
                piece = ""
                while start < len(row) and row[start] != self.sampler.special.mask and not is_over:
                    is_over = row[start] in self.sampler.special.ends()
                    piece += "" if is_over else text.push(row[start])
                    start += 1
                # A drawn answer is said at its end, or the two would be written over each other.
                yield piece if view is None else ""
                if text.is_stopped:
                    break
        rest = text.finish()
        yield rest if view is None else text.text

    def answer_all(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """Answers to prompts of tokens, each without its end. Collective: tensor-parallel group."""
        found = []
        for start in range(0, len(prompts), self.command.batch_rows):
            some = prompts[start : start + self.command.batch_rows]
            restored = self.sampler.restore([self._row(prompt) for prompt in some], self.command)
            found += [self._answer(prompt, one) for prompt, one in zip(some, restored, strict=True)]
        return found

    def fill(self) -> str:
        """The text of ``--infill`` with its holes filled.

        Raises:
            DataError: the text is longer than the context.
        Collective: tensor-parallel group.
        """
        assert self.command.infill is not None
        row = row_of(pieces_of(unescaped(self.command.infill)), self.tokenizer, self.sampler.special.mask)
        with self._drawn(row) as view:
            (restored,) = self.sampler.restore([row], self.command, on_step=None if view is None else view.on_step)
        return text_of(restored.tokens, self.tokenizer)

    def _row(self, prompt: list[int]) -> list[int]:
        from gptoughts.inference.diffusion import continuation

        return continuation(prompt, self.command.max_new_tokens, self.sampler.special)

    def _answer(self, prompt: list[int], restored: Restored) -> Answer:
        from gptoughts.inference.text_stream import TextStream

        ids = restored.answer(self.sampler.special)
        text = TextStream(self.tokenizer, self.command.stop, before=prompt)
        for token in ids:
            text.push(token)
        text.finish()
        reason = LENGTH if len(ids) == self.command.max_new_tokens else END
        return Answer(text.text, STOP if text.is_stopped else reason)

    def _drawn(self, row: list[int]) -> AbstractContextManager[DenoisingView | None]:
        """What draws a row, where this rank is to."""
        from gptoughts.parallel import groups

        command = self.command
        if groups.rank() != 0 or not (command.show or command.save_animation is not None):
            return nullcontext()
        from rich.console import Console

        from gptoughts.inference.denoising_view import DenoisingPicture, DenoisingView

        picture = DenoisingPicture(row, self.sampler.special.mask, self.tokenizer)
        console = Console(stderr=True) if command.show else None
        return DenoisingView(picture, console=console, animation=command.save_animation)
