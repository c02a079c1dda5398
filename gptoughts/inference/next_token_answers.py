"""Answers of families that predict the next token."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from typing import Any

from gptoughts.errors import ConfigError
from gptoughts.inference.answers import Answer
from gptoughts.inference.autoregressive import CONTEXT, BatchGenerator, Request
from gptoughts.inference.loading import LoadedModel
from gptoughts.inference.sampling_options import NextTokenCommand
from gptoughts.inference.speculative import SpeculativeGenerator
from gptoughts.inference.text_stream import TextStream

logger = logging.getLogger(__name__)


class NextTokenAnswerer:
    """See ``answers.Answerer``."""

    def __init__(self, loaded: LoadedModel, command: NextTokenCommand) -> None:
        self.loaded, self.command = loaded, command
        special = loaded.tokenizer.special_ids()
        self.end_ids = {special[role] for role in ("eos", "eot") if role in special}
        if command.speculative and not getattr(loaded.model, "mtp_num_layers", 0):
            raise ConfigError(
                f"speculative=True (command line): this model of the family {loaded.config.model_type} has no "
                "multi-token prediction; leave it out"
            )
        self._generator: BatchGenerator | SpeculativeGenerator | None = None

    def problems(self, prompts: Sequence[list[int]]) -> list[str]:
        """Prompts that are too long for the model."""
        context = self.loaded.context_tokens
        return [
            f"prompt {number + 1}: {len(prompt)} tokens; the model's context is {context} tokens and has to leave room "
            "for an answer"
            for number, prompt in enumerate(prompts)
            if len(prompt) >= context
        ]

    def stream(self, prompt: list[int]) -> Generator[str, None, None]:
        """One answer in pieces. Collective: every rank."""
        request = self._request(prompt)
        for new in self._generator_for([prompt]).run([request]):
            yield new.text
        self._say_end([request])

    def answer_all(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """All answers. Collective: every rank."""
        requests = [self._request(prompt) for prompt in prompts]
        for _ in self._generator_for(prompts).run(requests):
            pass
        self._say_end(requests)
        return [Answer(self._text(request), str(request.end_reason)) for request in requests]

    def _request(self, prompt: list[int]) -> Request:
        text = TextStream(self.loaded.tokenizer, self.command.stop, before=prompt)
        return Request(list(prompt), self.command, text)

    def _generator_for(self, prompts: Sequence[list[int]]) -> BatchGenerator | SpeculativeGenerator:
        """With a cache that is large enough; the last one where it is."""
        places = min(self.loaded.context_tokens, max(map(len, prompts)) + self.command.max_new_tokens)
        rows = min(self.command.batch_rows, len(prompts))
        kept = self._generator
        if kept is not None and kept.cache.places >= places and (kept.cache.rows >= rows or self.command.speculative):
            return kept
        options: dict[str, Any] = {
            "vocab_size": self.loaded.tokenizer.vocab_size,
            "context_tokens": places,
            "end_ids": self.end_ids,
            "prefill_tokens": self.command.prefill_tokens,
        }
        if self.command.speculative:
            self._generator = SpeculativeGenerator(self.loaded.model, **options)
        else:
            self._generator = BatchGenerator(self.loaded.model, rows=rows, **options)
        return self._generator

    def _say_end(self, requests: Sequence[Request]) -> None:
        full = sum(request.end_reason == CONTEXT for request in requests)
        if full:
            context = self.loaded.context_tokens
            logger.warning("%d answer(s) end because the model's context of %d tokens is full", full, context)

    @staticmethod
    def _text(request: Request) -> str:
        return request.text.text if request.text is not None else ""
