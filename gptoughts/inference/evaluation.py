"""Mean log-likelihood of corpora, in nats per token and bits per byte, on all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptoughts.inference.evaluation_texts import Texts
from gptoughts.inference.likelihood_scorer import LikelihoodScorer, Request


@dataclass(frozen=True)
class CorpusResult:
    """How well a model predicts a corpus."""

    prefix: str
    num_texts: int
    """Rows or documents that were scored."""
    num_tokens: int
    """Tokens that were scored."""
    num_bytes: int
    """UTF-8 bytes that they stand for."""
    nats_per_token: float
    """Exact for next-token models; for masked diffusion an estimate, of an upper bound by ``monte_carlo``."""
    standard_error: float
    """Of ``nats_per_token``, from the masks that were drawn; 0 where none were."""

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float | None:
        """None where the tokens stand for no bytes."""
        return self._per_byte(self.nats_per_token)

    @property
    def bits_per_byte_standard_error(self) -> float | None:
        """Of ``bits_per_byte``."""
        return self._per_byte(self.standard_error)

    def _per_byte(self, nats: float) -> float | None:
        return nats * self.num_tokens / (math.log(2) * self.num_bytes) if self.num_bytes else None


def evaluate_corpus(
    scorer: LikelihoodScorer,
    texts: Texts,
    *,
    prefix: str,
    num_texts: int,
    texts_per_round: int,
    token_bytes: NDArray[np.int64],
    advance: Callable[[int], None],
) -> CorpusResult:
    """Score the first ``num_texts`` texts.

    Args:
        scorer: Of the model.
        texts: The corpus.
        prefix: Its name, for the result.
        num_texts: At most as many as there are.
        texts_per_round: Texts that all ranks share before they meet; bounds the memory.
        token_bytes: UTF-8 bytes of each token id, [vocabulary].
        advance: Told after each round how many texts it had.
    Collective: every rank of the world.
    """
    likelihoods: list[float] = []
    variance, num_tokens, num_bytes = 0.0, 0, 0
    for start in range(0, num_texts, texts_per_round):
        numbers = range(start, min(start + texts_per_round, num_texts))
        requests: list[Request] = [request for number in numbers for request in texts.requests(number)]
        for request, found in zip(requests, scorer.score(requests), strict=True):
            likelihoods.append(found.log_likelihood)
            variance += found.standard_error**2
            num_tokens += found.num_tokens
            num_bytes += int(token_bytes[np.asarray(request.answer_ids)].sum())
        advance(len(numbers))
    return CorpusResult(
        prefix=prefix,
        num_texts=num_texts,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        nats_per_token=-math.fsum(likelihoods) / num_tokens,
        standard_error=math.sqrt(variance) / num_tokens,
    )
