"""Answers of published models, token for token those of transformers' generate (greedy, fp32)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.checkpoint.huggingface.conftest import Publish, publish, tokenizer_folder  # noqa: F401
from tests.distributed import run_distributed

PROMPTS = [[5, 17, 200, 33, 8], [90], [7, 7, 41, 42, 43, 44, 45, 260, 12, 3, 100, 101]]
NEW_TOKENS = 24


def ours(folder: str, penalty: float) -> list[list[int]]:
    from gptoughts.inference.autoregressive import BatchGenerator, Request
    from gptoughts.inference.loading import load_model
    from gptoughts.inference.sampling_options import SamplingOptions

    loaded = load_model(Path(folder))
    options = SamplingOptions(max_new_tokens=NEW_TOKENS, temperature=0, repetition_penalty=penalty)
    requests = [Request(list(prompt), options) for prompt in PROMPTS]
    generator = BatchGenerator(
        loaded.model, vocab_size=300, context_tokens=loaded.context_tokens, rows=3, prefill_tokens=21
    )
    list(generator.run(requests))
    return [request.new_ids for request in requests]


@torch.no_grad()
def theirs(folder: Path, penalty: float) -> list[list[int]]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            repetition_penalty=penalty,
            pad_token_id=0,
        )
        found.append(answer[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize(
    ("kind", "penalty", "ranks"),
    [
        ("llama", 1.0, 1), ("llama", 1.3, 1), ("deepseek", 1.0, 1), ("deepseek-v2-moe", 1.0, 1),
        ("deepseek-v3-moe", 1.0, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("llama", 1.0, 2), ("qwen3", 1.0, 1), ("deepseek-v3-moe", 1.0, 1),
        )),
    ],
)  # fmt: skip
def test_greedy_answers_are_those_of_transformers(
    kind: str, penalty: float, ranks: int, publish: Publish  # noqa: F811
) -> None:  # fmt: skip
    folder = publish(kind, dtype=torch.float32)
    expected = theirs(folder, penalty)
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    for found in run_distributed(ours, ranks, str(folder), penalty):
        assert found == expected
