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
    """Guesses that are right half of the time, so that both ways are taken."""

    def __init__(self, generator: SpeculativeGenerator, answers: list[list[int]]) -> None:
        self.real, self.answers, self.request = generator._guess, answers, 0
        self.calls = 0

    def __call__(self, states: Any, start: int, following: Any) -> int:
        self.real(states, start, following)
        self.calls += 1
        known = start + len(following) + 1
        for prompt, answer in zip(prompts(), self.answers, strict=True):
            ids = prompt + answer
            if ids[start + 1 : known] == list(following) and known < len(ids) and self.calls % 2:
                return ids[known]
        return 0


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
        assert 0 < guesses <= sum(map(len, expected))
        if helped:
            assert right > 5, "tokens that took no forward of their own"


@torch.inference_mode()
def guesses_beside_training() -> tuple[list[int], list[int]]:
    """Guesses along a text, and the module's own predictions in a forward of everything."""
    from gptoughts.objectives.multi_token import shift_left

    model = build("deepseek", mtp_num_layers=1)
    ids = torch.tensor([prompts()[1]])
    generator = SpeculativeGenerator(model, vocab_size=VOCABULARY, context_tokens=PLACES)
    states = generator._states(ids[0].tolist(), 0)
    found = [generator._guess(states[:4], 0, ids[0, 1:5].tolist())]
    found += [generator._guess(states[at : at + 1], at, [int(ids[0, at + 1])]) for at in range(4, 20)]
    whole = model.mtp.layers[0](
        states,
        model.embedding(input_ids=shift_left(ids, 1), position_ids=None),
        attention_mask=None,
        rotary_pos_emb=model.rotary_table(ids.size(1), None),
    )
    return found, model.logits(whole)[3:20, 0, :VOCABULARY].argmax(-1).tolist()


def test_guesses_are_the_modules_predictions() -> None:
    ((found, expected),) = run_distributed(guesses_beside_training, 1)
    assert found == expected
    assert len(set(found)) > 3
