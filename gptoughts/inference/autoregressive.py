"""Continues prompts token after token, many at a time, with a cache of what attention has seen.

Requests wait in a queue. Each running one has a row of the cache; rows are dense (a request that ends leaves its row to
the last one), so that a forward sees the first rows and no others. New requests read their prompts together, in chunks,
and then join those that run: a batch need not wait for its longest answer.

Every request draws from a generator of its own, so that it says the same whoever runs beside it (but for rounding: a
product of other rows is summed in another order).

Legend: n running requests, s tokens of a chunk, h hidden, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptoughts.inference.sampling import Sampler, likeliest
from gptoughts.inference.sampling_options import SamplingOptions
from gptoughts.inference.text_stream import TextStream
from gptoughts.models.decode_operations import lay_out_for_decoding
from gptoughts.models.decode_step import DecodeStep, is_decodable
from gptoughts.models.kv_cache import CacheWindow, KVCache, cached_states
from gptoughts.models.native_decode import MOST_ROWS
from gptoughts.parallel import groups

END, STOP, LENGTH, CONTEXT = "end", "stop", "length", "context"
"""Why a request ended: an end token, a stop string, its number of tokens, the model's context is full."""
_LEAST_CHUNK_TOKENS = 16


@dataclass(eq=False)
class Request:
    """A prompt and what has been said to it."""

    prompt_ids: list[int]
    options: SamplingOptions
    text: TextStream | None = None
    """Is given each new token; its stop strings end the request."""
    new_ids: list[int] = field(default_factory=list)
    """The answer, without its end token."""
    end_reason: str | None = None
    """None while it runs."""

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.options)

    @property
    def ids(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt_ids + self.new_ids

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer."""
        return len(self.prompt_ids) + len(self.new_ids)


@dataclass(frozen=True)
class NewText:
    """What a step adds to one request."""

    request: Request
    text: str
    """Empty without a ``TextStream``, and where nothing is certain yet."""


class BatchGenerator:
    """Runs requests on a model.

    Args:
        model: A ``LanguageModel`` that looks back only, in evaluation mode.
        vocab_size: Entries of the tokenizer; ids above are the embedding's padding and never drawn.
        context_tokens: Tokens of a sequence at the most: the cache's places.
        end_ids: Tokens that end an answer.
        rows: Requests that run at once at the most.
        prefill_tokens: Tokens of prompts that one forward reads.
    """

    def __init__(
        self,
        model: Any,
        *,
        vocab_size: int,
        context_tokens: int,
        end_ids: Iterable[int] = (),
        rows: int = 8,
        prefill_tokens: int = 1024,
    ) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.end_ids = frozenset(end_ids)
        self.prefill_tokens = prefill_tokens
        self.cache = KVCache.of_model(model, rows=rows, places=context_tokens)
        self.decode_step: DecodeStep | None = None
        """Stands for a forward of one token per row where it knows the model."""
        if is_decodable(model):
            self.decode_step = DecodeStep(model)
            if self.decode_step.native is None or rows > MOST_ROWS:
                lay_out_for_decoding(model)
        self.running: list[Request] = []
        """By row."""

    @torch.inference_mode()
    def run(self, requests: Iterable[Request]) -> Iterator[NewText]:
        """Run a queue to its end, yielding as tokens come; a request is taken from it when a row is free.

        Leaving the iteration early gives up what runs.

        Raises:
            ValueError: a prompt is empty, or leaves no room in the context.
        Collective: tensor-parallel group; the queue and its order are equal on its ranks.
        """
        queue = iter(requests)
        try:
            while True:
                if arrived := list(islice(queue, self.cache.rows - len(self.running))):
                    yield from self._prefill(arrived)
                elif not self.running:
                    return
                if self.running:
                    yield from self._step()
        finally:
            self.running.clear()

    def _prefill(self, arrived: list[Request]) -> list[NewText]:
        """Read prompts together, and draw their first tokens."""
        for request in arrived:
            if not 0 < len(request.prompt_ids) < self.cache.places:
                raise ValueError(
                    f"a prompt of {len(request.prompt_ids)} tokens: 1 to {self.cache.places - 1} have room in a "
                    f"context of {self.cache.places} and leave some for an answer"
                )
        # Longest first: those that have read their prompts drop out at the end of the rows.
        arrived.sort(key=lambda request: -len(request.prompt_ids))
        prompts = [request.prompt_ids for request in arrived]
        first_row = len(self.running)
        chunk = max(_LEAST_CHUNK_TOKENS, self.prefill_tokens // len(arrived))
        last_states: list[Tensor] = [torch.empty(0)] * len(arrived)
        for start in range(0, len(prompts[0]), chunk):
            reading = [prompt[start : start + chunk] for prompt in prompts if len(prompt) > start]
            states = self._forward(reading, [start] * len(reading), first_row)
            for row, part in enumerate(reading):
                if start + len(part) == len(prompts[row]):
                    last_states[row] = states[len(part) - 1, row]
        self.running += arrived
        return self._advance(self.model.logits(torch.stack(last_states)[None])[0], arrived)

    def _step(self) -> list[NewText]:
        """One token for every running request."""
        tokens = [request.new_ids[-1] for request in self.running]
        starts = [request.num_tokens - 1 for request in self.running]
        if self.decode_step is not None:
            logits = self.decode_step.logits(self.decode_step.states(tokens, starts, self.cache))
        else:
            logits = self.model.logits(self._forward([[token] for token in tokens], starts, 0))[0]
        return self._advance(logits, list(self.running))

    def _forward(self, tokens: Sequence[list[int]], starts: Sequence[int], first_row: int) -> Tensor:
        """States [s, n, h] of rows of tokens, padded behind."""
        longest = max(map(len, tokens))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=self.cache.device)
        window = CacheWindow.looking_back(self.cache, starts, longest, first_row=first_row)
        return cached_states(self.model, padded, window)

    def _advance(self, logits: Tensor, requests: list[Request]) -> list[NewText]:
        """Draw a token for each request from its row of logits [n, v]; rows of those that end are freed."""
        tokens = draw_tokens(logits[:, : self.vocab_size], requests)
        found = [
            NewText(request, accept(request, token, self.end_ids, self.cache.places))
            for request, token in zip(requests, tokens, strict=True)
        ]
        for row in range(len(self.running) - 1, -1, -1):
            if self.running[row].end_reason is not None:
                last = self.running.pop()
                if row < len(self.running):
                    self.running[row] = last
                    self.cache.copy_row(len(self.running), row, last.num_tokens)
        return found


def draw_tokens(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """The next token of each request, from logits [n, tokenizer's vocabulary].

    Collective: tensor-parallel group: its first rank's draws count, so that no rounding sets the ranks apart.
    """
    if all(request.options.is_plain_greedy for request in requests):
        tokens = likeliest(logits)
    else:
        rows = logits.float().cpu()
        drawn = [request.sampler.draw(row, request.ids) for request, row in zip(requests, rows, strict=True)]
        tokens = torch.tensor(drawn, device=logits.device)
    if groups.tensor_parallel_size() > 1:
        group = groups.tensor_parallel_group()
        dist.broadcast(tokens, dist.get_global_rank(group, 0), group=group)
    return tokens.tolist()


def accept(request: Request, token: int, end_ids: frozenset[int], context_tokens: int) -> str:
    """Add a token to a request, or end it; returns the text that is certain now."""
    if token in end_ids:
        request.end_reason = END
        return request.text.finish() if request.text is not None else ""
    request.new_ids.append(token)
    text = request.text.push(token) if request.text is not None else ""
    if request.text is not None and request.text.is_stopped:
        request.end_reason = STOP
    elif len(request.new_ids) >= request.options.max_new_tokens:
        request.end_reason = LENGTH
    elif request.num_tokens >= context_tokens:
        request.end_reason = CONTEXT
    if request.end_reason is not None and request.text is not None:
        text += request.text.finish()
    return text
