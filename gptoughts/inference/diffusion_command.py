"""What ``launchers/generate.py`` does with masked-diffusion models: their flags, and their answers.

Nothing here loads torch until there is something to restore.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptoughts.errors import DataError
from gptoughts.inference.animation_file import animation_problems
from gptoughts.inference.answers import Answer
from gptoughts.inference.diffusion_options import DiffusionOptions
from gptoughts.inference.infill import num_masks, pieces_of, row_of, text_of, unescaped

if TYPE_CHECKING:
    from gptoughts.inference.diffusion import DiffusionSampler, Restored
    from gptoughts.inference.loading import LoadedModel


@dataclass(frozen=True)
class DiffusionCommand(DiffusionOptions):
    """Flags of ``launchers/generate.py`` for masked-diffusion families."""

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
        found = []
        if "max_new_tokens" in stated:
            found.append(
                f"max_new_tokens={self.max_new_tokens}: how many tokens there are is said by the holes of infill; "
                "leave it out"
            )
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
        DataError: its tokenizer has no mask token.
    """

    def __init__(self, loaded: LoadedModel, command: DiffusionCommand) -> None:
        from gptoughts.inference.diffusion import build_sampler

        self.tokenizer = loaded.tokenizer
        self.sampler: DiffusionSampler = build_sampler(loaded)
        self.command = command

    def problems(self, prompts: Sequence[list[int]]) -> list[str]:
        """Prompts that the model's context has no room for."""
        return [
            problem
            for number, prompt in enumerate(prompts, start=1)
            for problem in self.sampler.problems(self._row(prompt), f"prompt {number}")
        ]

    def stream(self, prompt: list[int]) -> Generator[str, None, None]:
        """The answer, which is whole at once: tokens are restored in no order. Collective: tensor-parallel group."""
        yield self.answer_all([prompt])[0].text

    def answer_all(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """Answers to prompts of tokens, each without its end. Collective: tensor-parallel group."""
        answers = [one.answer(self.sampler.special) for one in self._restore([self._row(p) for p in prompts])]
        return [
            Answer(text_of(ids, self.tokenizer), "length" if len(ids) == self.command.max_new_tokens else "end")
            for ids in answers
        ]

    def fill(self) -> str:
        """The text of ``--infill`` with its holes filled.

        Raises:
            DataError: the text is longer than the context.
        Collective: tensor-parallel group.
        """
        assert self.command.infill is not None
        row = row_of(pieces_of(unescaped(self.command.infill)), self.tokenizer, self.sampler.special.mask)
        (restored,) = self._restore([row])
        return text_of(restored.tokens, self.tokenizer)

    def _row(self, prompt: list[int]) -> list[int]:
        from gptoughts.inference.diffusion import continuation

        return continuation(prompt, self.command.max_new_tokens, self.sampler.special)

    def _restore(self, rows: list[list[int]]) -> list[Restored]:
        from gptoughts.parallel import groups

        command = self.command
        is_drawn = groups.rank() == 0 and (command.show or command.save_animation is not None)
        if not is_drawn:
            return self.sampler.restore(rows, command)
        from rich.console import Console

        from gptoughts.inference.denoising_view import DenoisingPicture, DenoisingView

        picture = DenoisingPicture(rows[0], self.sampler.special.mask, self.tokenizer)
        console = Console(stderr=True) if command.show else None
        with DenoisingView(picture, console=console, animation=command.save_animation) as view:
            return self.sampler.restore(rows, command, on_step=view.on_step)
