"""What ``launchers/generate.py`` does with a model of the family ``llada``: its flags, and its answers.

Nothing here loads torch until there is something to restore.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptoughts.errors import DataError
from gptoughts.inference.animation_file import animation_problems
from gptoughts.inference.diffusion_options import DiffusionOptions
from gptoughts.inference.infill import num_masks, pieces_of, row_of, text_of, unescaped

if TYPE_CHECKING:
    from gptoughts.inference.diffusion import DiffusionSampler, Restored
    from gptoughts.inference.loading import LoadedModel

_OPTIONS = (
    "block_length", "steps", "remasking", "cfg_scale", "suppress_eos", "defer_ends", "threshold", "factor", "cache",
)  # fmt: skip
_FLAGS = (*_OPTIONS, "infill", "show", "save_animation")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that no other family has; those that are not given are None."""
    group = parser.add_argument_group(
        "masked-diffusion models (llada)", "How masks are restored (docs/llada.md). Without these: as published."
    )

    def add(name: str, text: str, **settings: object) -> None:
        group.add_argument(f"--{name}", help=text, default=None, **settings)  # type: ignore[arg-type]

    add(
        "infill",
        "a text with holes in place of a prompt: 'def f(x):\\n    [MASK*20]\\n    return y', where [MASK*N] is N "
        "tokens; \\n is a line break, \\t a tab, \\\\ a backslash",
        metavar="TEXT",
    )
    add("block_length", "tokens that are restored before those to their right are looked at (unset: 32)", type=int)
    add("steps", "steps for a whole answer, divided evenly over its blocks (unset: one for each token)", type=int)
    add("remasking", "predictions that a step keeps: the surest, or any", choices=("low_confidence", "random"))
    add("cfg_scale", "weight of classifier-free guidance; 0: none", type=float)
    add("suppress_eos", "never predict the end of the text", action="store_true")
    add("defer_ends", "keep ends of text and of turn last", action="store_true")
    add("threshold", "keep every prediction of at least this probability, instead of a number per step", type=float)
    add("factor", "keep the n surest predictions while (n + 1)(1 - probability of the n-th) is within this", type=float)
    add(
        "cache",
        "keys and values that a block's steps take as they were at its start",
        choices=("none", "prefix", "dual"),
    )
    add("show", "draw the restoring in the terminal (on stderr)", action="store_true")
    add("save_animation", "save the restoring as an animated .gif, .webp or .png", type=Path, metavar="FILE")


def given_flags(arguments: argparse.Namespace) -> list[str]:
    """Those of :func:`add_flags` that were given."""
    return [name for name in _FLAGS if getattr(arguments, name) is not None]


def refused_flags(arguments: argparse.Namespace, family: str) -> list[str]:
    """Why a family of next-token models cannot do what was asked for, one line each."""
    return [
        f"{name} (command line): is for masked-diffusion models (llada); this one is of the family {family}"
        for name in given_flags(arguments)
    ]


def options_of(arguments: argparse.Namespace) -> DiffusionOptions:
    """The sampler's options: what was given, and its defaults."""
    names = (*_OPTIONS, "max_new_tokens", "temperature", "seed")
    values = {name: getattr(arguments, name) for name in names}
    return DiffusionOptions(**{name: value for name, value in values.items() if value is not None})


def problems_of(arguments: argparse.Namespace, num_prompts: int) -> list[str]:
    """What cannot be, one line each, as far as it is known before anything is loaded.

    Args:
        arguments: Parsed; ``max_new_tokens``, ``temperature`` and ``seed`` are None where they were not given.
        num_prompts: Prompts that were given.
    """
    options = options_of(arguments)
    found = options.problems() if arguments.infill is None else _infill_problems(arguments, options, num_prompts)
    if num_prompts > 1:
        found += [
            f"{name}: draws one answer, but there are {num_prompts} prompts"
            for name in ("show", "save_animation")
            if getattr(arguments, name) is not None
        ]
    if arguments.save_animation is not None:
        found += animation_problems(arguments.save_animation)
    return [f"{problem} (command line)" for problem in found]


def _infill_problems(arguments: argparse.Namespace, options: DiffusionOptions, num_prompts: int) -> list[str]:
    found = ["prompt and infill: one of them; a text with holes is its own prompt"] if num_prompts else []
    if arguments.max_new_tokens is not None:
        found.append(
            f"max_new_tokens={arguments.max_new_tokens}: how many tokens there are is said by the holes of infill; "
            "leave it out"
        )
    try:
        pieces = pieces_of(unescaped(arguments.infill))
    except DataError as error:
        return [*found, *error.problems]
    return found + options.problems(num_masks(pieces))


class DiffusionAnswers:
    """Answers to prompts, and texts without holes, from one loaded model.

    Args:
        loaded: A model of the family ``llada``.
        arguments: Parsed, and without :func:`problems_of`.

    Raises:
        DataError: its tokenizer has no mask token.
    """

    def __init__(self, loaded: LoadedModel, arguments: argparse.Namespace) -> None:
        from gptoughts.inference.diffusion import build_sampler

        self.tokenizer = loaded.tokenizer
        self.sampler: DiffusionSampler = build_sampler(loaded)
        self.arguments, self.options = arguments, options_of(arguments)

    def answers(self, prompts: Sequence[Sequence[int]], *, draws: bool = True) -> list[list[int]]:
        """Tokens of the answers to prompts of tokens, each without its end.

        Args:
            prompts: Token ids.
            draws: Whether this rank shows and saves pictures, where they were asked for.

        Raises:
            DataError: a prompt is longer than the context leaves room for.
        Collective: tensor-parallel group.
        """
        from gptoughts.inference.diffusion import continuation

        special = self.sampler.special
        rows = [continuation(prompt, self.options.max_new_tokens, special) for prompt in prompts]
        return [restored.answer(special) for restored in self._restore(rows, draws)]

    def filled(self, *, draws: bool = True) -> str:
        """The text of ``--infill`` with its holes filled.

        Raises:
            DataError: the text is longer than the context.
        Collective: tensor-parallel group.
        """
        row = row_of(pieces_of(unescaped(self.arguments.infill)), self.tokenizer, self.sampler.special.mask)
        (restored,) = self._restore([row], draws)
        return text_of(restored.tokens, self.tokenizer)

    def _restore(self, rows: list[list[int]], draws: bool) -> list[Restored]:
        arguments = self.arguments
        is_drawn = draws and (arguments.show or arguments.save_animation is not None)
        if not is_drawn:
            return self.sampler.restore(rows, self.options)
        from rich.console import Console

        from gptoughts.inference.denoising_view import DenoisingPicture, DenoisingView

        picture = DenoisingPicture(rows[0], self.sampler.special.mask, self.tokenizer)
        console = Console(stderr=True) if arguments.show else None
        with DenoisingView(picture, console=console, animation=arguments.save_animation) as view:
            return self.sampler.restore(rows, self.options, on_step=view.on_step)
