"""Next-token sampling from a model whose answers are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gptoughts.inference.autoregressive import SamplingOptions, generate, next_token


class Successor(nn.Module):
    """Says that token n is followed by n + 1; padding beyond the vocabulary has the largest logits."""

    def __init__(self, vocab_size: int, padded: int) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.vocab_size, self.padded = vocab_size, padded
        self.longest = 0

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: None) -> Tensor:
        assert position_ids.tolist() == [list(range(input_ids.shape[1]))]
        self.longest = max(self.longest, input_ids.shape[1])
        logits = nn.functional.one_hot((input_ids + 1) % self.vocab_size, self.padded).float()
        logits[..., self.vocab_size :] = 100.0
        return logits


def run(prompt: list[int], *, end_id: int | None = None, context_tokens: int = 99, count: int = 5) -> list[int]:
    model = Successor(vocab_size=10, padded=128)
    options = SamplingOptions(max_new_tokens=count, temperature=0)
    found = generate(model, prompt, options, vocab_size=10, context_tokens=context_tokens, end_id=end_id)
    return list(found)


def test_greedy_follows_the_model_and_never_draws_padding() -> None:
    assert run([3]) == [4, 5, 6, 7, 8]


def test_stops_before_the_end_token() -> None:
    assert run([3], end_id=6) == [4, 5]


def test_the_window_slides_over_a_long_prompt() -> None:
    model = Successor(10, 16)
    options = SamplingOptions(max_new_tokens=4, temperature=0)
    assert list(generate(model, [1, 2, 3, 4], options, vocab_size=10, context_tokens=3, end_id=None)) == [5, 6, 7, 8]
    assert model.longest == 3


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        run([])


def test_top_k_and_temperature_shape_the_draws() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    draws = [next_token(logits, SamplingOptions(temperature=1.0, top_k=2), generator) for _ in range(400)]
    assert set(draws) == {2, 3}
    share = draws.count(3) / len(draws)
    assert share == pytest.approx(1 / (1 + torch.e ** torch.tensor(-1.0).item()), abs=0.08)
    cold = [next_token(logits, SamplingOptions(temperature=0.05), generator) for _ in range(50)]
    assert set(cold) == {3}


def test_the_seed_decides() -> None:
    logits = torch.zeros(1000)
    options = SamplingOptions(temperature=1.0)
    draws = [next_token(logits, options, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_problems_of_options() -> None:
    problems = SamplingOptions(max_new_tokens=0, temperature=-1.0, top_k=-5).problems()
    assert [problem.split("=")[0] for problem in problems] == ["max_new_tokens", "temperature", "top_k"]
    assert SamplingOptions().problems() == []
