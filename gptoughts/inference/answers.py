"""How a family answers prompts: what may be asked of it, and what does it. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from gptoughts.inference.diffusion_command import DiffusionCommand
from gptoughts.inference.sampling_options import NextTokenCommand
from gptoughts.models.family import Family

if TYPE_CHECKING:
    from gptoughts.inference.loading import LoadedModel


@dataclass(frozen=True)
class Answer:
    """What was said to a prompt."""

    text: str
    end_reason: str
    """Why it ends, in the words of the way that made it."""


class Command(Protocol):
    """Flags of a way of answering: a frozen dataclass with a docstring under each field."""

    def refusals(self, stated: Collection[str], num_prompts: int) -> list[str]:
        """What cannot be, one line each, as ``name=value: reason``, before anything is loaded.

        Args:
            stated: Fields that the command line names.
            num_prompts: Prompts that it brings; 0 where they come one by one, or a field stands for one.
        """


class Answerer(Protocol):
    """A loaded model that answers."""

    def problems(self, prompts: Sequence[list[int]]) -> list[str]:
        """Why these prompts (token ids) cannot be answered, one line each."""

    def stream(self, prompt: list[int]) -> Generator[str, None, None]:
        """One answer in pieces; empty ones say that work goes on. Leaving early is allowed."""

    def answer_all(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """All answers, in the prompts' order."""


class FillingAnswerer(Answerer, Protocol):
    """One that can also answer what a field of its command says in place of a prompt."""

    def fill(self) -> str:
        """That answer."""


@dataclass(frozen=True)
class Way:
    """A way of answering."""

    name: str
    command: type[Any]
    """Its :class:`Command`."""
    answerer: str
    """Dotted path of what makes an :class:`Answerer` from (loaded model, command)."""
    prompt_field: str | None = None
    """The field that may stand for a prompt; its answerer is a :class:`FillingAnswerer`."""

    def load(self, loaded: LoadedModel, command: Any) -> Answerer:
        """Make the answerer (torch loads here)."""
        module, _, name = self.answerer.partition(":")
        answerer: Answerer = getattr(import_module(module), name)(loaded, command)
        return answerer


NEXT_TOKEN = Way("next-token", NextTokenCommand, "gptoughts.inference.next_token_answers:NextTokenAnswerer")
MASKED_DIFFUSION = Way(
    "masked-diffusion", DiffusionCommand, "gptoughts.inference.diffusion_command:DiffusionAnswerer", "infill"
)
WAYS: Mapping[bool, Way] = {True: NEXT_TOKEN, False: MASKED_DIFFUSION}
"""By ``Family.is_causal``."""


def way_of(family: Family) -> Way:
    """How a family answers."""
    return WAYS[family.is_causal]
