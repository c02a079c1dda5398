"""Whole runs: resume, extension, signals, damage, monitors, samples."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.portable import CheckpointReader
from gptoughts.training.metrics import read_metrics
from gptoughts.training.pretrain import main
from tests.distributed import run_distributed
from tests.integration.conftest import ROOT, TINY, Corpus, run_program

METRIC_KEYS = {
    "step", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "data_seconds", "mfu_fraction",
    "achieved_tflops", "consumed_samples", "consumed_tokens", "memory_bytes",
}  # fmt: skip


def pretrain(corpus: Corpus, run: Path, *arguments: str) -> None:
    """A run in a pooled worker, which has its imports behind it."""
    assert run_distributed(main, 1, [*TINY, f"--data={corpus.prefix}", f"--output_dir={run}", *arguments]) == [0]


def curve(run: Path) -> dict[int, tuple[float, float]]:
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in read_metrics(run / "metrics.jsonl")}


def final_state(run: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(layout.list_checkpoints(run)[-1])
    return {f"{k}/{n}": reader.full(n, k) for k in ("weight", "exp_avg", "exp_avg_sq") for n in reader.names(k)}


def test_metrics_checkpoints_plot_and_config(corpus: Corpus, tmp_path: Path) -> None:
    pretrain(corpus, tmp_path, "--train.steps=5", "--checkpoint.interval_steps=2", "--checkpoint.keep_last=2")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line.keys() >= METRIC_KEYS for line in lines)
    assert lines[-1]["consumed_tokens"] == 5 * 2 * 64
    assert lines[-1]["valid_loss"] > 0
    assert lines[-1]["valid_bits_per_byte"] > 0
    assert [layout.step_of(folder) for folder in layout.list_checkpoints(tmp_path)] == [4, 5]
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert (tmp_path / "config.yaml").read_text() == (layout.step_folder(tmp_path, 5) / "config.yaml").read_text()


def test_stages_train_validate_and_save_for_one_process(corpus: Corpus, tmp_path: Path) -> None:
    zero3 = tmp_path / "ds.json"
    zero3.write_text('{"zero_optimization": {"stage": 3}}')
    shape = ("--model.num_layers=4", "--train.steps=4", "--train.global_batch_size=8")
    run = [*TINY, f"--data={corpus.prefix}", f"--output_dir={tmp_path / 'run'}", *shape]
    stages = ("--parallel.pipeline=2", "--parallel.virtual_pipeline=2", f"--deepspeed_config={zero3}")
    assert run_distributed(main, 2, [*run, *stages, "--train.stop_after_steps=2"]) == [0, 0]
    assert run_distributed(main, 1, run) == [0]
    assert run_distributed(main, 1, [*run, f"--output_dir={tmp_path / 'one'}"]) == [0]
    moved, whole = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "one"))
    assert [line["step"] for line in moved] == [1, 2, 3, 4]
    for ours, theirs in zip(moved, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["tokens_per_second"] > 0
    assert moved[1]["valid_loss"] > 0, "two stages have validated"
    assert moved[3]["valid_loss"] == pytest.approx(whole[3]["valid_loss"], rel=1e-4)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(corpus: Corpus, tmp_path: Path) -> None:
    pretrain(corpus, tmp_path / "whole", "--train.steps=6")
    # What is saved while training goes on is as good.
    asynchronous = ("--checkpoint.asynchronous=true", "--checkpoint.interval_steps=1", "--checkpoint.keep_last=0")
    pretrain(corpus, tmp_path / "halves", "--train.steps=6", "--train.stop_after_steps=3", *asynchronous)
    assert [layout.step_of(folder) for folder in layout.list_checkpoints(tmp_path / "halves")] == [1, 2, 3]
    assert layout.step_of(layout.list_checkpoints(tmp_path / "halves")[-1]) == 3
    pretrain(corpus, tmp_path / "halves", "--train.steps=6")
    assert curve(tmp_path / "halves") == curve(tmp_path / "whole")
    whole, halves = final_state(tmp_path / "whole"), final_state(tmp_path / "halves")
    assert whole.keys() == halves.keys()
    assert all(torch.equal(halves[name], tensor) for name, tensor in whole.items())


def test_a_finished_run_can_be_extended(corpus: Corpus, tmp_path: Path) -> None:
    steady = ("--optim.schedule=constant", "--optim.warmup_steps=0")
    pretrain(corpus, tmp_path / "long", "--train.steps=6", *steady)
    pretrain(corpus, tmp_path / "extended", "--train.steps=4", *steady)
    pretrain(corpus, tmp_path / "extended", "--train.steps=6", *steady)
    assert curve(tmp_path / "extended") == curve(tmp_path / "long")


def test_running_a_finished_run_again_changes_nothing(corpus: Corpus, tmp_path: Path) -> None:
    pretrain(corpus, tmp_path, "--train.steps=3")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png"}
    pretrain(corpus, tmp_path, "--train.steps=3")
    assert {path: path.read_bytes() for path in before} == before


def test_monitors_have_our_step_on_their_x_axis(corpus: Corpus, tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text(
        '{"csv_monitor": {"enabled": true, "output_path": "%s", "job_name": "csv"}}' % (tmp_path / "monitor")
    )
    pretrain(corpus, tmp_path / "run", "--train.steps=4", "--log.interval_steps=2", f"--deepspeed_config={config}")
    (file,) = (tmp_path / "monitor").rglob("*train_loss.csv")
    _, *rows = csv.reader(file.read_text().splitlines())
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [int(row[0]) for row in rows] == [2, 4]
    assert [float(row[1]) for row in rows] == pytest.approx([line["loss"] for line in lines])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(corpus: Corpus, tmp_path: Path) -> None:
    arguments = (*TINY, f"--data={corpus.prefix}", f"--output_dir={tmp_path}")
    pretrain(corpus, tmp_path, "--train.steps=4", "--checkpoint.interval_steps=2")
    broken = layout.step_folder(tmp_path, 4) / layout.shard_file(0)
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    broken.write_bytes(content)
    layout.start_partial(layout.step_folder(tmp_path, 6))  # as left by a process that was killed while saving
    done = run_program("launchers/pretrain.py", *arguments, "--train.steps=5")
    assert done.returncode == 0, done.stderr
    assert f"{broken}: checksum differs" in done.stderr
    assert f"resumed from {layout.step_folder(tmp_path, 2)}" in done.stdout
    assert layout.step_of(layout.list_checkpoints(tmp_path)[-1]) == 5


def test_samples_from_a_run(corpus: Corpus, tmp_path: Path) -> None:
    pretrain(corpus, tmp_path, "--train.steps=2")
    command = ("launchers/generate.py", "--checkpoint", str(tmp_path), "--prompt", "def read(", "--max_new_tokens=8")
    first, second = run_program(*command), run_program(*command)
    assert first.returncode == 0, first.stderr
    assert len(first.stdout) > 1
    assert "def read(" not in first.stdout, "the answer alone"
    assert first.stdout == second.stdout


def launch(corpus: Corpus, run: Path, *arguments: str) -> subprocess.Popen[str]:
    """Two ranks under DeepSpeed's launcher, as a user starts them."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [str(deepspeed), "--num_accelerators=2", "--master_port=29713", "launchers/pretrain.py", *TINY]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{deepspeed.parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [*command, f"--data={corpus.prefix}", f"--output_dir={run}", *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_step(run: Path, step: int, *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    path = run / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < step:
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.1)


def wait_until_gone(processes: list[psutil.Process], *, seconds: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive, "ranks outlived their launcher"


@pytest.mark.parametrize("receiver", ["launcher", "rank"])
def test_a_signal_saves_on_all_ranks_and_leaves_none_behind(corpus: Corpus, tmp_path: Path, receiver: str) -> None:
    """SIGTERM to the `deepspeed` parent, which does not pass it on; or SIGUSR1 to one rank, as SLURM may send it."""
    process = launch(corpus, tmp_path, "--train.steps=1000000", "--deepspeed_config=ds_configs/zero2.json")
    try:
        wait_for_step(tmp_path, 3)
        below = psutil.Process(process.pid).children(recursive=True)
        ranks = [child for child in below if "launchers/pretrain.py" in child.cmdline() and child.children() == []]
        if receiver == "launcher":
            process.send_signal(signal.SIGTERM)
        else:
            ranks[-1].send_signal(signal.SIGUSR1)
        wait_until_gone(below, seconds=60)
        process.wait(timeout=30)
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
    newest = layout.list_checkpoints(tmp_path)[-1]
    files = layout.read_manifest(newest)["files"]
    assert {layout.shard_file(0), layout.shard_file(1)} <= files.keys()
    assert all(layout.find_damage(newest, name, record) is None for name, record in files.items())
    assert not list(layout.checkpoints_folder(tmp_path).glob("*.partial"))
    if receiver == "rank":
        assert process.returncode == 0
        assert f"stopped at step {layout.step_of(newest)}" in (process.stdout.read() if process.stdout else "")


def test_a_killed_rank_is_named_and_the_run_goes_on_with_those_that_are_left(corpus: Corpus, tmp_path: Path) -> None:
    arguments = ("--train.steps=1000000", "--deepspeed_config=ds_configs/zero2.json", "--checkpoint.interval_steps=5",
                 "--checkpoint.asynchronous=true", "--train.global_batch_size=4")  # fmt: skip
    process = launch(corpus, tmp_path, *arguments)
    try:
        wait_for_step(tmp_path, 12)
        below = psutil.Process(process.pid).children(recursive=True)
        ranks = [child for child in below if "launchers/pretrain.py" in child.cmdline() and child.children() == []]
        victim = next(child for child in ranks if child.environ()["RANK"] == "1")
        victim.kill()
        wait_until_gone(below, seconds=60)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode != 0
    assert f"rank 1 (pid {victim.pid} on " in output
    kept = layout.list_checkpoints(tmp_path)[-1]
    assert layout.step_of(kept) in (5, 10)  # that of step 10 may have been on its way
    again = run_program(
        "launchers/pretrain.py", *TINY, f"--data={corpus.prefix}", f"--output_dir={tmp_path}", *arguments,
        f"--train.stop_after_steps={layout.step_of(kept) + 1}",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert f"resumed from {kept}" in again.stdout


def test_two_ranks_speak_with_one_voice(corpus: Corpus, tmp_path: Path) -> None:
    process = launch(corpus, tmp_path, "--parallel.tensor=3")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in output
    assert output.count("num_attention_heads=2 is not divisible by 3") <= 1
    assert output.count("parallel.tensor=3") >= 1
