"""Likelihoods against brute force on models small enough to enumerate, and of every family in every layout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gptoughts.config.experiment import ParallelConfig
from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.diffusion_likelihood import DiffusionScorer, LikelihoodOptions, maskings, num_maskings
from gptoughts.inference.likelihood import build_scorer, encode_pair, log_likelihood
from gptoughts.inference.likelihood_scorer import AutoregressiveScorer, Likelihood, LikelihoodScorer, Request
from gptoughts.inference.row_scorer import RowScorer
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups
from tests.distributed import run_distributed
from tests.harness import VARIANTS, Layout, text_rows, toy_experiment

ENTRIES, PADDED, MASK, WIDTH = 11, 16, 11, 6


class Toy(nn.Module):
    """Sees all earlier tokens, or all tokens; the padding of its vocabulary has the largest logits."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.table = torch.randn(PADDED, 64, WIDTH, generator=generator)
        self.head = 2.0 * torch.randn(WIDTH, PADDED, generator=generator)
        self.is_causal = is_causal
        self.num_forwards = 0

    def forward(
        self, input_ids: Tensor, position_ids: None, mask: Tensor | None, selected_positions: Tensor | None = None
    ) -> Tensor:
        self.num_forwards += 1
        b, s = input_ids.shape
        own = self.table[input_ids, torch.arange(s)]
        seen = own if mask is None else own.masked_fill(mask[:, 0, 0, :, None], 0.0)
        context = seen.cumsum(1) if self.is_causal else seen.sum(1, keepdim=True)
        logits = torch.tanh(own + 0.5 * context) @ self.head
        logits[..., ENTRIES:] = 50.0
        return logits if selected_positions is None else logits.view(b * s, -1)[selected_positions]


def log_probs(model: Toy, ids: Sequence[int]) -> Tensor:
    """fp64 [s, entries] of one row by itself."""
    return model(torch.tensor([list(ids)]), None, None)[0, :, :ENTRIES].double().log_softmax(-1)


def toy_scorer(
    model: Toy, *, batch_tokens: int = 1000, shifted: bool = False, checks_greedy: bool = True, **options: Any
) -> LikelihoodScorer:
    groups.initialize(ParallelConfig(), seed=0)
    rows = RowScorer(model, num_entries=ENTRIES, is_causal=model.is_causal, batch_tokens=batch_tokens)
    if model.is_causal:
        return AutoregressiveScorer(rows, context_tokens=64, checks_greedy=checks_greedy)
    return DiffusionScorer(
        rows, options=LikelihoodOptions(**options), mask_token_id=MASK, is_shifted=shifted, context_tokens=64,
        checks_greedy=checks_greedy,
    )  # fmt: skip


def ragged(count: int, longest_answer: int) -> list[Request]:
    generator = np.random.default_rng(1)
    return [
        Request(
            generator.integers(0, ENTRIES, 1 + 3 * number % 8).tolist(),
            generator.integers(0, ENTRIES, 1 + number % longest_answer).tolist(),
        )
        for number in range(count)
    ]


def greedy_next(model: Toy, prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(log_probs(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def score_next_tokens() -> None:
    model = Toy(is_causal=True)
    requests = [*ragged(9, 5), Request([3, 1], greedy_next(model, [3, 1], 4)), Request([3], [])]
    for batch_tokens in (1, 1000):
        for request, found in zip(requests, toy_scorer(model, batch_tokens=batch_tokens).score(requests), strict=True):
            row, start = [*request.prompt_ids, *request.answer_ids], len(request.prompt_ids)
            expected = sum(float(log_probs(model, row[:i])[-1, row[i]]) for i in range(start, len(row)))
            assert found.log_likelihood == pytest.approx(expected, rel=1e-5)
            assert (found.standard_error, found.num_tokens) == (0.0, len(request.answer_ids))
            assert found.is_greedy == (
                list(request.answer_ids) == greedy_next(model, request.prompt_ids, found.num_tokens)
            )
    model.num_forwards = 0
    choices = toy_scorer(model).score([Request([4, 2, 7], [token]) for token in range(ENTRIES)])
    assert model.num_forwards == 1, "one row answers all of them"
    assert sum(math.exp(found.log_likelihood) for found in choices) == pytest.approx(1, abs=1e-6)
    assert sum(bool(found.is_greedy) for found in choices) == 1


def test_next_token_likelihood_is_the_products() -> None:
    run_distributed(score_next_tokens, 1)


def full_sum(model: Toy, request: Request, shift: int = 0) -> float:
    """The bound's definition: over counts, over subsets of that size, over the masked tokens."""
    count, start = len(request.answer_ids), len(request.prompt_ids)
    total = 0.0
    for size in range(1, count + 1):
        subsets = list(itertools.combinations(range(count), size))
        for subset in subsets:
            row = [*request.prompt_ids, *request.answer_ids]
            for i in subset:
                row[start + i] = MASK
            found = log_probs(model, row)
            read = sum(float(found[start + i - shift, request.answer_ids[i]]) for i in subset)
            total += read * count / size / len(subsets) / count
    return total


def greedy_unmasked(model: Toy, request: Request) -> list[int]:
    """LLaDA's greedy answer: the surest position of all masked ones is committed, again and again."""
    row = [*request.prompt_ids, *[MASK] * len(request.answer_ids)]
    while MASK in row:
        best = log_probs(model, row).max(-1)
        place = max((i for i, token in enumerate(row) if token == MASK), key=lambda i: float(best.values[i]))
        row[place] = int(best.indices[place])
    return row[len(request.prompt_ids) :]


def score_by_masking() -> None:
    model = Toy(is_causal=False)
    requests = [*ragged(8, 4), Request([], [5, 1])]
    requests.append(Request([2], greedy_unmasked(model, Request([2], [0] * 4))))
    found = toy_scorer(model, num_samples=16).score(requests)
    for request, one in zip(requests, found, strict=True):
        assert one.log_likelihood == pytest.approx(full_sum(model, request), rel=1e-5)
        assert one.standard_error == 0
        assert one.is_greedy == (list(request.answer_ids) == greedy_unmasked(model, request))
    assert found[-1].is_greedy
    shifted = toy_scorer(model, num_samples=16, shifted=True, checks_greedy=False).score(requests[:8])
    for request, one in zip(requests, shifted, strict=False):
        assert one.log_likelihood == pytest.approx(full_sum(model, request, 1), rel=1e-5)
        assert one.is_greedy is None


def test_the_bound_of_short_answers_is_the_full_sum_over_masks() -> None:
    run_distributed(score_by_masking, 1)


def sample_the_bound() -> None:
    model = Toy(is_causal=False)
    request = Request([3, 8], [1, 7, 2, 9, 4, 4])
    expected = full_sum(model, request)
    estimates = [
        toy_scorer(model, num_samples=8, seed=seed, checks_greedy=False).score([request])[0] for seed in range(400)
    ]
    values = [one.log_likelihood for one in estimates]
    spread = pstdev(values)
    assert abs(mean(values) - expected) < 3 * spread / math.sqrt(len(values)), "the estimate is unbiased"
    reported = math.sqrt(mean(one.standard_error**2 for one in estimates))
    assert 0.9 * spread < reported < 1.6 * spread, "its standard error is the spread, or a little more"
    more = toy_scorer(model, num_samples=62, checks_greedy=False).score([request])[0]
    assert 0 < more.standard_error < 0.6 * reported


def test_the_drawn_bound_is_unbiased_and_knows_its_error() -> None:
    run_distributed(sample_the_bound, 1)


def test_counts_are_exact_and_stratified() -> None:
    options = LikelihoodOptions(num_samples=64)
    found = list(maskings(Request([1], list(range(8))), options))
    assert len(found) == num_maskings(8, options) == 64
    sizes = [len(one.masked) for one in found]
    assert sizes == sorted(sizes)
    assert [sizes.count(size) for size in range(1, 9)] == [8] * 8
    assert sum(one.weight * len(one.masked) for one in found) == pytest.approx(8)
    assert len({tuple(one.masked) for one in found if len(one.masked) == 4}) > 4


def chain() -> None:
    model = Toy(is_causal=False)
    requests = ragged(6, 5)
    for request, found in zip(requests, toy_scorer(model, method="chain_rule").score(requests), strict=True):
        expected, greedy = 0.0, []
        for i, token in enumerate(request.answer_ids):
            hidden = [MASK] * (len(request.answer_ids) - i)
            there = log_probs(model, [*request.prompt_ids, *request.answer_ids[:i], *hidden])
            expected += float(there[len(request.prompt_ids) + i, token])
            greedy.append(int(there[len(request.prompt_ids) + i].argmax()))
        assert found.log_likelihood == pytest.approx(expected, rel=1e-5)
        assert found.standard_error == 0
        assert found.is_greedy == (greedy == list(request.answer_ids))


def test_the_chain_rule_unmasks_from_left_to_right() -> None:
    run_distributed(chain, 1)


def batch_sizes() -> list[list[Likelihood]]:
    model, requests = Toy(is_causal=False), ragged(7, 6)
    found = [
        toy_scorer(model, num_samples=4, batch_tokens=tokens).score(requests) for tokens in (1, 30, 1000)
    ]  # fmt: skip
    found.append(toy_scorer(model, num_samples=4).score(requests[::-1])[::-1])
    found.append(toy_scorer(model, num_samples=4, seed=1).score(requests))
    return found


def test_draws_depend_on_the_seed_and_the_request_alone() -> None:
    ((*same, other),) = run_distributed(batch_sizes, 1)
    values = [[one.log_likelihood for one in found] for found in same]
    for found in values[1:]:
        assert found == pytest.approx(values[0], rel=1e-5)
    # Answers of one or two tokens are enumerated, so that no seed changes them.
    changed = [abs(a - b.log_likelihood) > 1e-4 for a, b in zip(values[0], other, strict=True)]
    assert changed == [one.num_tokens > 2 for one in other]


def refusals() -> None:
    for is_causal in (True, False):
        scorer = toy_scorer(Toy(is_causal))
        with pytest.raises(DataError, match=r"1 of 2 .* of 64 tokens; .* prompt of 60 .* answer of 9"):
            scorer.score([Request([1], [2]), Request([1] * 60, [2] * 9)])
    with pytest.raises(DataError, match="a prompt is empty"):
        toy_scorer(Toy(is_causal=True)).score([Request([], [1])])
    with pytest.raises(DataError, match="a prompt is empty"):
        toy_scorer(Toy(is_causal=False), shifted=True).score([Request([], [1])])


def test_what_cannot_be_scored_is_said() -> None:
    run_distributed(refusals, 1)
    problems = LikelihoodOptions(method="guess", num_samples=3, seed=-1).problems()
    assert [problem.split("=")[0] for problem in problems] == ["method", "num_samples", "seed"]


def score_family(family: str, layout: Layout, folder: str) -> tuple[list[float], list[float]]:
    """Likelihoods of ragged texts; minus their training loss where it is exact, else each scored by itself."""
    config = toy_experiment(family, layout, Path(folder)).config
    groups.initialize(config.parallel, seed=config.seed)
    entry = FAMILIES[config.model_type]
    model = entry.load_model_builder()(config, params_dtype=torch.float32).eval()
    scorer = build_scorer(
        model, config, batch_size=2, diffusion=None if entry.is_causal else LikelihoodOptions(num_samples=4)
    )
    rows = text_rows(5, 40)
    requests = [Request(row[: 3 + 5 * n].tolist(), row[3 + 5 * n : 12 + 6 * n].tolist()) for n, row in enumerate(rows)]
    done: list[int] = []
    found = [one.log_likelihood for one in scorer.score(requests, done.append)]
    assert sum(done) == len(range(groups.data_parallel_rank(), len(requests), groups.data_parallel_size()))
    if not entry.is_causal:
        return found, [scorer.score([request])[0].log_likelihood for request in requests]
    losses = []
    for request in requests:
        row = torch.tensor([[*request.prompt_ids, *request.answer_ids]])
        with torch.no_grad():
            loss = model(row[:, :-1], None, None, labels=row[:, 1:])
        losses.append(-float(loss[0, len(request.prompt_ids) - 1 :].sum()))
    return found, losses


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)]
)  # fmt: skip
def test_every_family_scores_alike_on_every_layout(family: str, tmp_path: Path) -> None:
    ((expected, plain),) = run_distributed(score_family, 1, family, Layout(), str(tmp_path))
    assert expected == pytest.approx(plain, rel=1e-5)
    for layout in (Layout(tensor=2), Layout(data=2)):
        for found, _ in run_distributed(score_family, 2, family, layout, str(tmp_path)):
            assert found == pytest.approx(expected, rel=1e-5)


@dataclass(frozen=True)
class Words:
    """A tokenizer of words with their leading space; "!" joins the word before it."""

    eod_id: int | None = 0

    def encode(self, text: str) -> list[int]:
        import re

        return [1 + sum(map(ord, word)) % 10 for word in re.findall(r"\s*[^\s!]+!*|\s+", text)]


def texts() -> None:
    tokenizer: Any = Words()
    scorer = toy_scorer(Toy(is_causal=True))
    (with_space,) = log_likelihood(scorer, tokenizer, "a bc ", ["d"])
    (plain,) = log_likelihood(scorer, tokenizer, "a bc", [" d"])
    assert with_space == plain
    (start,) = log_likelihood(scorer, tokenizer, "", ["a bc"])
    (expected,) = scorer.score([Request([0], tokenizer.encode("a bc"))])
    assert start == expected
    with pytest.raises(DataError, match="no end-of-text token"):
        log_likelihood(scorer, Words(eod_id=None), "", ["a"])  # type: ignore[arg-type]


def test_texts_are_cut_where_the_answer_begins() -> None:
    run_distributed(texts, 1)
    tokenizer: Any = Words()
    crossing = encode_pair(tokenizer, "a bc", "! d")
    assert crossing.prompt_ids == tokenizer.encode("a bc")
    assert crossing.answer_ids == tokenizer.encode("! d")


def test_options_of_another_family_are_refused(tmp_path: Path) -> None:
    config = toy_experiment("gpt", Layout(), tmp_path).config
    with pytest.raises(ConfigError) as caught:
        build_scorer(nn.Identity(), config, batch_size=0, diffusion=LikelihoodOptions())
    assert [problem.split(": ")[0] for problem in caught.value.problems] == ["batch_size=0", "method=monte_carlo"]
