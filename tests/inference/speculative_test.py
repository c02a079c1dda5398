"""Guesses of multi-token prediction: they change how many forwards there are, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptoughts.inference.autoregressive import BatchGenerator, Request
from gptoughts.inference.sampling_options import SamplingOptions
from gptoughts.inference.speculative import SpeculativeGenerator
from tests.distributed import run_distributed
from tests.inference.autoregressive_test import VOCABULARY, prompts
from tests.models.kv_cache_test import PLACES, build


class Oracle:
    """Guesses of which none, one or two are right, so that all ways are taken."""

    def __init__(self, generator: SpeculativeGenerator, answers: list[list[int]]) -> None:
        self.real, self.answers, self.request = generator._guess, answers, 0
        self.calls = 0

    def __call__(self, states: Any, start: int, ids: list[int]) -> list[int]:
        depths = len(self.real(states, start, ids))
        self.calls += 1
        for prompt, answer in zip(prompts(), self.answers, strict=True):
            whole = prompt + answer
            if whole[: len(ids)] == ids and self.calls % 3:
                following = whole[len(ids) : len(ids) + depths] + [0] * depths
                # Wrong from the second on, sometimes.
                return [*following[: self.calls % 3], *[0] * depths][:depths]
        return [0] * depths


def with_and_without_guesses(tensor: int, helped: bool) -> tuple[list[list[int]], list[list[int]], int, int]:
    model = build("deepseek", tensor, mtp_num_layers=2)
    kinds = [SamplingOptions(12, temperature=0), SamplingOptions(9, temperature=0.8, seed=4, repetition_penalty=1.2)]
    options: dict[str, Any] = {"vocab_size": VOCABULARY, "context_tokens": PLACES, "end_ids": (3,), "prefill_tokens": 8}
    plain = [Request(prompt, kinds[n % 2]) for n, prompt in enumerate(prompts())]
    list(BatchGenerator(model, rows=1, **options).run(plain))
    answers = [request.new_ids for request in plain]
    guessed = [Request(prompt, kinds[n % 2]) for n, prompt in enumerate(prompts())]
    generator = SpeculativeGenerator(model, **options)
    if helped:
        generator._guess = Oracle(generator, answers)  # type: ignore[method-assign]
    list(generator.run(guessed))
    return [request.new_ids for request in guessed], answers, generator.num_guesses, generator.num_right


@pytest.mark.parametrize(("tensor", "helped"), [(1, False), (1, True), (2, False)])
def test_guesses_do_not_change_what_is_said(tensor: int, helped: bool) -> None:
    for found, expected, guesses, right in run_distributed(with_and_without_guesses, tensor, tensor, helped):
        assert found == expected
        assert 0 < guesses <= 2 * sum(map(len, expected))
        if helped:
            assert right > 5, "tokens that took no forward of their own"


@torch.inference_mode()
def guesses_beside_training() -> tuple[list[list[int]], list[list[int]]]:
    """Guesses of three modules along a text of which they guess nothing, and their predictions on all of it.

    The second module's prediction rests on the first one's guess, the third one's on both, so their predictions are
    those of the text up to there with these guesses behind it.
    """
    from gptoughts.objectives.multi_token import shift_left

    model = build("deepseek", mtp_num_layers=3)
    text = prompts()[1]
    generator = SpeculativeGenerator(model, vocab_size=VOCABULARY, context_tokens=PLACES)
    states = generator._states(text, 0)
    found, expected, start = [], [], 0
    for end in (4, 5, 7, 8, 9, 12, 13):
        found.append(generator._guess(states[start:end], start, text[: end + 1]))
        start = end
        known = text[: end + 1]
        for depth in range(1, 4):
            ids = torch.tensor([known])
            whole = states[:end]
            for number in range(1, depth + 1):
                ahead = shift_left(ids, number)[:, :end]
                embedded = model.embedding(input_ids=ahead, position_ids=None)
                table = model.rotary_table(end, None)
                whole = model.mtp.layers[number - 1](whole, embedded, attention_mask=None, rotary_pos_emb=table)
            known = [*known, int(model.logits(whole[-1:])[0, 0, :VOCABULARY].argmax())]
        expected.append(known[end + 1 :])
    return found, expected


def test_guesses_are_the_modules_predictions() -> None:
    ((found, expected),) = run_distributed(guesses_beside_training, 1)
    assert found == expected
    assert len({token for guesses in found for token in guesses}) > 5
