"""The programs that people start, on a GPU: the FP8 command under its launcher, resume, samples as a CPU draws them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptoughts.models.registry import FAMILIES
from gptoughts.training.metrics import read_metrics
from tests.checkpoint.huggingface.conftest import tokenizer_folder
from tests.gpu.training_test import needs_engine
from tests.inference.saved_toy import save_toy
from tests.integration.conftest import ROOT, Corpus, corpus, python_path, run_program

__all__ = ["corpus", "tokenizer_folder"]  # fixtures


def launch(*arguments: str, timeout_seconds: float = 240) -> subprocess.CompletedProcess[str]:
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher)] if launcher.is_file() else [sys.executable, "-m", "deepspeed.launcher.runner"]
    command += ["--num_gpus", "1", "--master_port", str(20000 + os.getpid() % 20000), "launchers/pretrain.py"]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": python_path()}, capture_output=True,
        text=True, timeout=timeout_seconds, check=False,
    )  # fmt: skip


@needs_engine
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fp8_command_trains_and_goes_on(family: str, corpus: Corpus, tmp_path: Path) -> None:
    arguments = [
        f"--model_type={family}", "--size=debug", f"--data={corpus.prefix}", f"--output_dir={tmp_path}",
        "--deepspeed_config=ds_configs/zero3_fp8.json", "--block_size=128", "--train.valid_samples=16",
        "--log.interval_steps=1",
    ]  # fmt: skip
    done = launch(*arguments, "--train.steps=40", "--train.stop_after_steps=20")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "backend te: Transformer Engine runs here" in done.stdout
    done = launch(*arguments, "--train.steps=40")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_samples_what_a_cpu_samples(family: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    checkpoint = save_toy(family, str(tmp_path), str(tokenizer_folder))
    arguments = ["--checkpoint", checkpoint, "--prompt", "the cat sat", "--max_new_tokens", "24", "--temperature", "0"]
    arguments += ["--precision", "fp32"]
    here = run_program("launchers/generate.py", *arguments)
    assert here.returncode == 0, here.stderr[-3000:]
    on_cpu = run_program(
        "launchers/generate.py", *arguments, prefix=["env", "CUDA_VISIBLE_DEVICES=", "DS_ACCELERATOR=cpu"]
    )
    assert on_cpu.returncode == 0, on_cpu.stderr[-3000:]
    assert here.stdout == on_cpu.stdout


def test_the_doctor_knows_the_gpu() -> None:
    done = run_program("tools/doctor.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NVIDIA" in done.stdout
    assert "nccl" in done.stdout
