"""A whole run with multi-token prediction: its log, its validation, and sampling from what it saved."""

from __future__ import annotations

from pathlib import Path

from gptoughts.training.metrics import read_metrics
from gptoughts.training.pretrain import main
from tests.distributed import run_distributed
from tests.integration.conftest import TINY, Corpus, run_program

DEEPSEEK = [
    *(word for word in TINY if not word.startswith("--model_type")),
    "--model_type=deepseek", "--model.num_layers=2", "--model.mtp_num_layers=2", "--model.moe_ffn_hidden_size=16",
    "--model.moe_shared_expert_intermediate_size=16",
]  # fmt: skip


def test_the_log_keeps_the_losses_apart(corpus: Corpus, tmp_path: Path) -> None:
    """With (next to) no learning rate the weights stay: training on the validation corpus shows its loss."""
    arguments = (f"--data={corpus.prefix}_valid", f"--data.valid={corpus.prefix}_valid", "--optim.lr=1e-12")
    run = ("--train.steps=2", "--train.valid_interval_steps=1", f"--output_dir={tmp_path}")
    assert run_distributed(main, 1, [*DEEPSEEK, *arguments, *run]) == [0]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert abs(line["mtp_loss"] - (line["mtp_1_loss"] + line["mtp_2_loss"]) / 2) < 1e-6
        assert line["mtp_loss"] != line["loss"]
        # ln 512 = 6.2, each of them, and no sum of them.
        assert all(5.5 < line[name] < 7 for name in ("loss", "valid_loss", "mtp_1_loss", "mtp_2_loss"))
        assert {"layer_1_expert_load_min", "layer_2_expert_load_min", "layer_3_expert_load_min"} <= line.keys()
    sampled = run_program("launchers/generate.py", "--checkpoint", str(tmp_path), "--prompt=def", "--max_new_tokens=4")
    assert sampled.returncode == 0, sampled.stderr
    assert len(sampled.stdout) > 1
