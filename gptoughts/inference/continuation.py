"""Continuing many texts with a model of any family, dealt to the data-parallel ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.diffusion_options import DiffusionOptions
from gptoughts.inference.loading import LoadedModel
from gptoughts.inference.sampling_options import SamplingOptions
from gptoughts.inference.ways import way_of
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups

_NOT_OPTIONS = ("max_new_tokens", "stop")
"""Fields of the samplers' options that a prompt says in its own way."""
_CHUNK_BATCHES = 8
"""Batches of prompts that are handed on together: rows of those that end early go to the next ones."""


@dataclass(frozen=True)
class Prompt:
    """A text to go on from."""

    ids: Sequence[int]
    """At least one token, fewer than the context has."""
    max_new_tokens: int
    """The answer's at the most; an answer also ends where the context is full."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    options: tuple[tuple[str, Any], ...] = ()
    """Options of the family's sampler, by name; the default is greedy."""


def sampler_options(family: str) -> tuple[str, ...]:
    """Names that ``Prompt.options`` may have."""
    kind = SamplingOptions if FAMILIES[family].is_causal else DiffusionOptions
    return tuple(field.name for field in dataclasses.fields(kind) if field.name not in _NOT_OPTIONS)


def continue_texts(
    loaded: LoadedModel, prompts: Sequence[Prompt], *, batch_size: int, advance: Callable[[int], None]
) -> list[str]:
    """The answer to each prompt, the same on every rank.

    Args:
        loaded: The model.
        prompts: What to go on from.
        batch_size: Texts that go on together on each rank.
        advance: Told how many more of this rank's prompts are done.
    Raises:
        ConfigError: options that the family's sampler does not have, or values that cannot be.
        DataError: a prompt that is empty or leaves no room in the context.
    Collective: every rank of the world, with the same prompts.
    """
    commands = _commands(loaded, prompts, batch_size)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].ids))
    own = order[groups.data_parallel_rank() :: groups.data_parallel_size()]
    alike: dict[Any, list[int]] = {}
    for number in own:
        alike.setdefault(commands[number], []).append(number)
    found: dict[int, str] = {}
    for command, numbers in alike.items():
        answerer = way_of(FAMILIES[loaded.config.model_type]).load(loaded, command)
        chunk = batch_size * (_CHUNK_BATCHES if isinstance(command, SamplingOptions) else 1)
        for start in range(0, len(numbers), chunk):
            together = numbers[start : start + chunk]
            answers = answerer.answer_all([list(prompts[number].ids) for number in together])
            found |= {n: _until(one.text, prompts[n].stop) for n, one in zip(together, answers, strict=True)}
            advance(len(together))
    everyone: list[dict[int, str] | None] = [None] * groups.data_parallel_size()
    dist.all_gather_object(everyone, found, group=groups.data_parallel_group())
    joined = {number: text for part in everyone if part is not None for number, text in part.items()}
    return [joined[number] for number in range(len(prompts))]


def _commands(loaded: LoadedModel, prompts: Sequence[Prompt], batch_size: int) -> list[Any]:
    """What each prompt asks the family's sampler for; equal ones can be answered together."""
    family = FAMILIES[loaded.config.model_type]
    known, command = sampler_options(family.name), way_of(family).command
    found: list[Any] = []
    problems: dict[str, None] = {}
    for prompt in prompts:
        room = loaded.context_tokens - len(prompt.ids)
        if not len(prompt.ids) or room < 1:
            raise DataError(
                f"a prompt of {len(prompt.ids)} tokens: 1 to {loaded.context_tokens - 1} have room in the model's "
                f"context of {loaded.context_tokens} and leave some for an answer"
            )
        if unknown := [name for name, _ in prompt.options if name not in known]:
            problems |= dict.fromkeys(
                f"{name}: family {family.name} has no such option of sampling; it has: {', '.join(known)}"
                for name in unknown
            )
            continue
        values: dict[str, Any] = {"temperature": 0.0, **dict(prompt.options)}
        if family.is_causal:  # its sampler ends by itself where the context is full
            values |= {"stop": prompt.stop, "max_new_tokens": prompt.max_new_tokens, "batch_rows": batch_size}
        else:
            values |= {"max_new_tokens": min(room, prompt.max_new_tokens)}
        found.append(command(**values))
        problems |= dict.fromkeys(found[-1].problems())
    if problems:
        raise ConfigError(list(problems))
    return found


def _until(text: str, stop: Sequence[str]) -> str:
    """The text before the first of ``stop``."""
    return text[: min((at for end in stop if (at := text.find(end)) >= 0), default=len(text))]
