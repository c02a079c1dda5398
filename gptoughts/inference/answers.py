"""What answers are, and what a way of answering has to offer. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol


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
