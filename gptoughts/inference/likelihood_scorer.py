"""log p(answer | prompt) of next-token models, exact: sum_i log p(a_i | prompt, a_<i); the face of all scorers.

Work is dealt to the data-parallel ranks here; masked-diffusion models have a scorer in ``diffusion_likelihood``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gptoughts.errors import DataError
from gptoughts.inference.row_scorer import Row, RowScorer
from gptoughts.parallel import groups

Advance = Callable[[int], None]
"""Told how many more requests of this rank are done."""


@dataclass(frozen=True)
class Request:
    """An answer to score after a prompt."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of an answer."""

    log_likelihood: float
    """Nats; for masked diffusion by ``monte_carlo`` the estimate of a lower bound."""
    standard_error: float
    """Of that estimate, nats; 0 where nothing was drawn."""
    is_greedy: bool | None
    """Whether the model would give this answer by itself, always taking the likeliest; None where nobody asked."""
    num_tokens: int
    """Tokens of the answer."""


class LikelihoodScorer(ABC):
    """Scores requests on all data-parallel ranks.

    Args:
        rows: Runs the model.
        context_tokens: Longest sequence that the model may see.
        checks_greedy: Whether ``Likelihood.is_greedy`` is wanted.
    """

    needs_prompt = True
    """Whether the first answer token needs a token before it."""

    def __init__(self, rows: RowScorer, *, context_tokens: int, checks_greedy: bool) -> None:
        self._rows = rows
        self._checks_greedy = checks_greedy
        self.context_tokens = context_tokens

    def score(self, requests: Sequence[Request], advance: Advance | None = None) -> list[Likelihood]:
        """The likelihood of each request, the same on every rank.

        Raises:
            DataError: a request that is longer than the context, or without a prompt where one is needed.
        Collective: every rank of the world, with the same requests.
        """
        self._check(requests)
        shares: dict[Hashable, list[int]] = {}
        for number, request in enumerate(requests):
            if len(request.answer_ids):
                shares.setdefault(self._share_key(number, request), []).append(number)
        # The longest first: memory runs out at once or never, and neighbours are of like length.
        longest = sorted(shares.values(), key=lambda numbers: -self.length(requests[numbers[0]]))
        own = [
            number
            for numbers in longest[groups.data_parallel_rank() :: groups.data_parallel_size()]
            for number in numbers
        ]
        found = dict(zip(own, self._score_own([requests[i] for i in own], advance or (lambda _: None)), strict=True))
        everything = {number: one for part in _from_all_ranks(found) for number, one in part.items()}
        nothing = Likelihood(0.0, 0.0, True if self._checks_greedy else None, 0)
        return [everything.get(number, nothing) for number in range(len(requests))]

    @abstractmethod
    def length(self, request: Request) -> int:
        """Positions that the model needs for a request."""

    @abstractmethod
    def _share_key(self, number: int, request: Request) -> Hashable:
        """Requests of equal keys are better scored together."""

    @abstractmethod
    def _score_own(self, requests: Sequence[Request], advance: Advance) -> list[Likelihood]:
        """Score this rank's requests."""

    def _check(self, requests: Sequence[Request]) -> None:
        too_long = [one for one in requests if self.length(one) > self.context_tokens]
        if too_long:
            worst = max(too_long, key=self.length)
            raise DataError(
                f"{len(too_long)} of {len(requests)} requests do not fit into the model's context of "
                f"{self.context_tokens} tokens; the longest has a prompt of {len(worst.prompt_ids)} and an answer of "
                f"{len(worst.answer_ids)} tokens"
            )
        if self.needs_prompt and any(len(one.answer_ids) and not len(one.prompt_ids) for one in requests):
            raise DataError("a prompt is empty: this model predicts a token from the one before it; give one token")


class AutoregressiveScorer(LikelihoodScorer):
    """Exact, one forward per row; answers of one token to the same prompt share theirs."""

    def length(self, request: Request) -> int:
        """Prompt and answer without its last token, which nothing follows."""
        return len(request.prompt_ids) + len(request.answer_ids) - 1

    def _share_key(self, number: int, request: Request) -> Hashable:
        return (*request.prompt_ids, *request.answer_ids[:-1])

    def _score_own(self, requests: Sequence[Request], advance: Advance) -> list[Likelihood]:
        together: dict[Hashable, list[int]] = {}
        for number, request in enumerate(requests):
            together.setdefault(self._share_key(number, request), []).append(number)
        found: list[Likelihood] = [Likelihood(0.0, 0.0, None, 0)] * len(requests)
        for row, scores in self._rows.run(self._row(requests, numbers) for numbers in together.values()):
            start = 0
            for number in row.key:
                here = slice(start, start + len(requests[number].answer_ids))
                targets = torch.tensor(row.targets[here])
                is_greedy = bool((scores.best_ids[here] == targets).all()) if self._checks_greedy else None
                found[number] = Likelihood(float(scores.log_probs[here].sum()), 0.0, is_greedy, len(targets))
                start = here.stop
            advance(len(row.key))
        return found

    @staticmethod
    def _row(requests: Sequence[Request], numbers: list[int]) -> Row:
        first = requests[numbers[0]]
        positions: list[int] = []
        targets: list[int] = []
        for request in (requests[number] for number in numbers):
            start = len(request.prompt_ids) - 1
            positions += range(start, start + len(request.answer_ids))
            targets += list(request.answer_ids)
        return Row([*first.prompt_ids, *first.answer_ids[:-1]], positions, targets, key=numbers)


def _from_all_ranks(found: dict[int, Likelihood]) -> list[dict[int, Likelihood]]:
    """Every replica's results. Collective: data-parallel group."""
    everyone: list[dict[int, Likelihood] | None] = [None] * groups.data_parallel_size()
    dist.all_gather_object(everyone, found, group=groups.data_parallel_group())
    return [part for part in everyone if part is not None]
