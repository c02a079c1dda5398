"""Every family learns real text at its ``debug`` size, through the launcher's ``main``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gptoughts.data.indexed import bin_path, read_index
from gptoughts.models.registry import FAMILIES
from gptoughts.training.metrics import read_metrics
from gptoughts.training.pretrain import main
from tests.distributed import run_distributed
from tests.integration.conftest import Corpus

STEPS = 200
BOUND_ALLOWANCE = 0.25
"""Nats above the unigram entropy that a masked-diffusion model's bound may have after these steps: it has found the
frequencies by then (5.42 where they are worth 5.28 and an untrained model has 6.24) and stays there for a while."""


def unigram_entropy(prefix: str) -> float:
    """Nats per token of the best model that looks at no context, fitted to the very text that it is measured on."""
    tokens = np.fromfile(bin_path(prefix), dtype=read_index(prefix).dtype)
    counts = np.unique(tokens, return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_validation_loss_falls_to_the_unigram_entropy(family: str, corpus: Corpus, tmp_path: Path) -> None:
    """Below it, which frequencies of tokens alone cannot reach: the model has learned from context, and generalises."""
    arguments = [
        f"--model_type={family}", "--size=debug", f"--data={corpus.prefix}", f"--output_dir={tmp_path}",
        f"--train.steps={STEPS}", "--train.valid_interval_steps=50", "--train.precision=fp32", "--block_size=128",
        "--batch_size=8", "--log.interval_steps=50",
    ]  # fmt: skip
    assert run_distributed(main, 1, arguments) == [0]
    losses = [line["valid_loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "valid_loss" in line]
    assert len(losses) >= 4
    assert losses[-1] < losses[0]
    allowance = 0.0 if FAMILIES[family].is_causal else BOUND_ALLOWANCE
    assert losses[-1] < unigram_entropy(f"{corpus.prefix}_valid") + allowance
