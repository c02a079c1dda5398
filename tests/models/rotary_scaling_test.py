"""Scaled rotary wavelengths against transformers' rules, and shapes that say them wrongly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.rotary import rotary_table
from gptoughts.models.rotary_scaling import plain_frequencies

LLAMA3 = GPTConfig(
    hidden_size=512, num_attention_heads=4, rotary_base=500000, rotary_scaling="llama3", rotary_scaling_factor=8.0,
    rotary_low_freq_factor=1.0, rotary_high_freq_factor=4.0, original_max_position_embeddings=8192,
)  # fmt: skip
LINEAR = replace(GPTConfig(), rotary_scaling="linear", rotary_scaling_factor=4.0)


def test_llama_3_1_has_the_published_frequencies() -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    found = torch.tensor(LLAMA3.rotary_frequencies())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    plain = torch.tensor(plain_frequencies(128, 500000))
    assert int((found == plain).sum()) > 20  # short waves stay
    assert int(torch.isclose(found, plain / 8).sum()) > 20  # long ones are stretched


def test_linear_scaling_is_a_slower_clock() -> None:
    slow = rotary_table(32, 64, 10000.0, torch.float64, frequencies=LINEAR.rotary_frequencies())
    plain = rotary_table(8, 64, 10000.0, torch.float64)
    torch.testing.assert_close(slow[:, ::4], plain)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (replace(LINEAR, rotary_scaling_factor=None), "rotary_scaling_factor=None: rotary_scaling=linear needs"),
        (replace(LINEAR, rotary_low_freq_factor=1.0), "rotary_low_freq_factor=1.0: has no meaning with"),
        (replace(GPTConfig(), rotary_scaling_factor=2.0), "rotary_scaling_factor=2.0: has no meaning with"),
        (replace(LLAMA3, original_max_position_embeddings=None), "original_max_position_embeddings=None"),
        (replace(LLAMA3, rotary_low_freq_factor=4.0), "must be below rotary_high_freq_factor=4.0"),
    ],
)
def test_a_scaling_that_is_said_wrongly_is_refused(model: GPTConfig, problem: str) -> None:
    assert any(line.startswith(problem) or problem in line for line in model.problems()), model.problems()
    assert LLAMA3.problems() == LINEAR.problems() == []
