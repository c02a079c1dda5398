"""log p(answer | prompt) of masked-diffusion models: a bound by Monte Carlo, or the chain rule.

**The bound** (LLaDA, arXiv:2502.09992, equation 6). With l ~ U{1 ... A} of the A answer tokens masked, which ones
chosen uniformly,

    log p(a | prompt)  >=  E_l E_(S, |S| = l)  (A / l) sum_(i in S) log p(a_i | prompt, a without S).

Counts are exact (not Bernoulli's) and stratified: of n samples, sample j has l_j = 1 + floor(A (j + u_j) / n). Where
all 2^A - 1 masks are no more than n, each is evaluated once with its weight: the expectation itself.

**Standard error.** One sample per stratum leaves no variance to estimate within it, so neighbouring strata are taken
together in pairs: sqrt(sum_k (x_2k - x_(2k+1))^2) / n, on average a little too large (Cochran, Sampling Techniques,
section 5A.12).

**The chain rule** (SMDM, arXiv:2410.18514): the likelihood of unmasking from left to right, A forwards, the
i-th with the positions >= i masked. Nothing is drawn.

Draws are a function of (seed, prompt, answer): of no batch, order or number of ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gptoughts.inference.likelihood_scorer import Advance, Likelihood, LikelihoodScorer, Request
from gptoughts.inference.row_scorer import Row, RowScorer
from gptoughts.objectives.masked_diffusion import uniform_draws

METHODS = ("monte_carlo", "chain_rule")
_LIKELIHOOD_STREAM = 2
"""Third use of a seed's randomness, beside those of ``objectives.masked_diffusion``."""


@dataclass(frozen=True)
class LikelihoodOptions:
    """How a masked-diffusion model's likelihood is found."""

    method: str = "monte_carlo"
    """``monte_carlo``: the bound; ``chain_rule``: left to right."""
    num_samples: int = 128
    """Forwards per answer at the most, even (``monte_carlo``)."""
    seed: int = 0
    """Seeds the masks."""

    def problems(self) -> list[str]:
        """What cannot be, one line each."""
        found = []
        if self.method not in METHODS:
            found.append(f"method={self.method}: one of {', '.join(METHODS)}")
        if self.num_samples < 2 or self.num_samples % 2:
            found.append(f"num_samples={self.num_samples}: an even number, 2 or more (pairs give the standard error)")
        if not 0 <= self.seed < 2**32:
            found.append(f"seed={self.seed}: from 0 to 2^32 - 1")
        return found


@dataclass(frozen=True)
class Masking:
    """One forward: which answer positions are masked and read, and the factor of the sum of their log-probabilities."""

    masked: NDArray[np.int64]
    read: NDArray[np.int64]
    weight: float


def is_enumerated(num_tokens: int, options: LikelihoodOptions) -> bool:
    """Whether all masks of so many tokens are no more than the samples, so that nothing has to be drawn."""
    return options.method == "monte_carlo" and 2 ** min(num_tokens, 63) - 1 <= options.num_samples


def num_maskings(num_tokens: int, options: LikelihoodOptions) -> int:
    """Forwards that an answer of so many tokens takes."""
    if options.method == "chain_rule":
        return num_tokens
    return 2**num_tokens - 1 if is_enumerated(num_tokens, options) else options.num_samples


def maskings(request: Request, options: LikelihoodOptions) -> Iterator[Masking]:
    """The forwards of a request, as many as :func:`num_maskings` says."""
    count = len(request.answer_ids)
    if options.method == "chain_rule":
        positions = np.arange(count)
        yield from (Masking(positions[i:], positions[i : i + 1], 1.0) for i in range(count))
    elif is_enumerated(count, options):
        for size in range(1, count + 1):
            weight = 1.0 / (size * math.comb(count, size))  # (1 / A) (A / l) / (subsets of l)
            for subset in itertools.combinations(range(count), size):
                yield Masking(np.array(subset), np.array(subset), weight)
    else:
        yield from _drawn(request, options)


def _drawn(request: Request, options: LikelihoodOptions) -> Iterator[Masking]:
    count, samples = len(request.answer_ids), options.num_samples
    draws = uniform_draws(options.seed, _LIKELIHOOD_STREAM, _identity(request), samples * (count + 1))
    for number, draw in enumerate(draws.reshape(samples, count + 1)):
        size = min(count, 1 + int(count * (number + draw[0]) / samples))
        masked = np.sort(np.argsort(draw[1:], kind="stable")[:size])
        yield Masking(masked, masked, count / (size * samples))


def _identity(request: Request) -> int:
    """64 bits of the tokens, so that equal requests get equal draws wherever they stand."""
    sides = [np.array(ids, dtype=np.int64).tobytes() for ids in (request.prompt_ids, request.answer_ids)]
    digest = hashlib.blake2b(len(sides[0]).to_bytes(8, "little") + sides[0] + sides[1], digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def standard_error(parts: Sequence[float], num_tokens: int, options: LikelihoodOptions) -> float:
    """Of the sum of an answer's weighted ``parts``, one per masking."""
    if options.method == "chain_rule" or is_enumerated(num_tokens, options):
        return 0.0
    return math.hypot(*(first - second for first, second in zip(parts[::2], parts[1::2], strict=True)))


class DiffusionScorer(LikelihoodScorer):
    """Scores answers by masking parts of them.

    Args:
        rows: Runs the model.
        options: Method, samples, seed.
        mask_token_id: What stands at a masked position.
        is_shifted: The output at position i is about token i + 1.
        context_tokens: Longest sequence that the model may see.
        checks_greedy: Whether ``is_greedy`` is wanted: by ``chain_rule`` from left to right; else the likeliest of all
            masked positions' tokens is committed, one position per forward, as LLaDA's evaluation does.
    """

    def __init__(
        self,
        rows: RowScorer,
        *,
        options: LikelihoodOptions,
        mask_token_id: int,
        is_shifted: bool,
        context_tokens: int,
        checks_greedy: bool,
    ) -> None:
        super().__init__(rows, context_tokens=context_tokens, checks_greedy=checks_greedy)
        self._options = options
        self._mask_token_id = mask_token_id
        self._shift = int(is_shifted)
        self.needs_prompt = is_shifted

    def length(self, request: Request) -> int:
        """Prompt and answer."""
        return len(request.prompt_ids) + len(request.answer_ids)

    def _share_key(self, number: int, request: Request) -> Hashable:
        return number

    def _score_own(self, requests: Sequence[Request], advance: Advance) -> list[Likelihood]:
        parts = [[0.0] * num_maskings(len(request.answer_ids), self._options) for request in requests]
        is_greedy = [True] * len(requests)
        for row, scores in self._rows.run(self._rows_of(requests)):
            number, sample, weight = row.key
            parts[number][sample] = weight * float(scores.log_probs.sum())
            is_greedy[number] &= bool((scores.best_ids == torch.tensor(row.targets)).all())
            if sample + 1 == len(parts[number]):
                advance(1)
        if self._checks_greedy and self._options.method != "chain_rule":
            is_greedy = self._are_greedy(requests)
        return [
            Likelihood(
                math.fsum(parts[number]),
                standard_error(parts[number], len(request.answer_ids), self._options),
                is_greedy[number] if self._checks_greedy else None,
                len(request.answer_ids),
            )
            for number, request in enumerate(requests)
        ]

    def _rows_of(self, requests: Sequence[Request]) -> Iterator[Row]:
        for number, request in enumerate(requests):
            for sample, masking in enumerate(maskings(request, self._options)):
                yield self._row(request, masking, (number, sample, masking.weight))

    def _row(self, request: Request, masking: Masking, key: Any) -> Row:
        answer = np.array(request.answer_ids)
        seen = answer.copy()
        seen[masking.masked] = self._mask_token_id
        positions = masking.read + (len(request.prompt_ids) - self._shift)
        return Row([*request.prompt_ids, *seen.tolist()], positions.tolist(), answer[masking.read].tolist(), key)

    def _are_greedy(self, requests: Sequence[Request]) -> list[bool]:
        """Whether each answer is what committing the likeliest token, position after position, gives.

        One forward per round for the answers that hold so far, most of which fail in the first.
        """
        is_greedy = [True] * len(requests)
        masked = {number: np.arange(len(request.answer_ids)) for number, request in enumerate(requests)}
        while masked:
            rows = [
                self._row(requests[number], Masking(left, left, 1.0), number) for number, left in masked.items()
            ]  # fmt: skip
            for row, scores in self._rows.run(rows):
                best = int(scores.best_log_probs.argmax())
                is_greedy[row.key] = int(scores.best_ids[best]) == row.targets[best]
                masked[row.key] = np.delete(masked[row.key], best)
            masked = {number: left for number, left in masked.items() if len(left) and is_greedy[number]}
        return is_greedy
