"""How each family answers prompts: what may be asked of it, and what does it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptoughts.inference.answers import Answerer
from gptoughts.inference.diffusion_command import DiffusionCommand
from gptoughts.inference.sampling_options import NextTokenCommand
from gptoughts.models.family import Family

if TYPE_CHECKING:
    from gptoughts.inference.loading import LoadedModel


@dataclass(frozen=True)
class Way:
    """A way of answering."""

    name: str
    command: type[Any]
    """Its ``answers.Command``."""
    answerer: str
    """Dotted path of what makes an ``answers.Answerer`` from (loaded model, command)."""
    prompt_field: str | None = None
    """The field that may stand for a prompt; its answerer is an ``answers.FillingAnswerer``."""

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
