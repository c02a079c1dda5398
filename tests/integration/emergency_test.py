"""The emergency scripts: arguments, what they read from a run that went wrong, and how they go on with it."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gptoughts.checkpoint import layout
from gptoughts.errors import CheckpointError, DataError
from gptoughts.training import diagnose, emergency, optimize, simplified
from gptoughts.training.events import read_events
from gptoughts.training.metrics import read_metrics
from gptoughts.training.optimize import Machine
from gptoughts.training.pretrain import main as pretrain
from tests.distributed import run_distributed
from tests.faults import Fault, run_with_faults
from tests.integration.conftest import ROOT, TINY, Corpus

SCRIPTS = ("train_simplified", "emergency_training", "optimize_nan", "optimize")


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHON": sys.executable} | environment
    command = [str(ROOT / "launchers" / f"{name}.sh"), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str) -> None:
    done = script(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"{name}.sh" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train_simplified", ("small", "four"), "invalid int value: 'four'"),
        ("train_simplified", ("small", "4", "64", "out", "maybe"), "invalid choice: 'maybe'"),
        ("train_simplified", ("small", "4", "64", "out", "true", "more"), "unrecognized arguments: more"),
        ("emergency_training", (), "checkpoint_dir"),
        ("emergency_training", ("/nowhere/at/all",), "/nowhere/at/all: no such checkpoint"),
        ("optimize_nan", (), "RUN"),
        ("optimize_nan", ("/nowhere/at/all",), "is no run's folder"),
        ("optimize", (), "name at least one of --memory, --cuda, --all"),
        ("optimize", ("--everything",), "unrecognized arguments: --everything"),
    ],
)
def test_wrong_arguments_end_with_status_2(name: str, arguments: tuple[str, ...], message: str) -> None:
    done = script(name, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def failed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose samples turn bad for good at step 12, ended by its guard."""
    run = tmp_path_factory.mktemp("failed")
    config = run.with_name("ds.json")
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 2.0}))
    flags = [
        *TINY, f"--data={corpus.prefix}", f"--output_dir={run}", "--train.steps=20", f"--deepspeed_config={config}",
        "--stability.max_skips=1", "--stability.max_rollbacks=1", "--stability.max_lr_cuts=0", "--optim.lr=1e-3",
        "--stability.snapshot_interval_steps=4", "--checkpoint.interval_steps=3", "--log.plot=false",
    ]  # fmt: skip
    (message,) = run_distributed(run_with_faults, 1, flags, [Fault("nan_gradient", tuple(range(22, 200)))])
    assert message is not None
    return run


def test_diagnosis_of_a_run(failed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnose.main([str(failed)]) == 0
    out = capsys.readouterr().out
    assert "the guard stepped in 4 time(s)" in out
    assert "step 12: non finite" in out
    assert "first seen in: decoder.layers.0.mlp.linear_fc2 (" in out
    assert "look at samples 22" in out
    assert "clip gradients: --grad_clip 1.0 (now 2)" in out
    assert "lower the learning rate: --optim.lr 0.00033 (now 0.001)" in out
    newest = layout.list_checkpoints(failed)[-1]
    assert f"checkpoint {newest}: good" in out
    assert f"--resume {newest}" in out


def test_diagnosis_of_a_run_without_a_guard_reads_its_metrics(tmp_path: Path) -> None:
    losses = [3.0 - 0.01 * i for i in range(30)]
    losses[20], losses[25], losses[26] = 30.0, float("nan"), float("nan")
    lines = [{"step": i + 1, "loss": loss, "grad_norm": 1.0, "applied": loss == loss} for i, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text(
        "grad_clip: 0.0\noptim: {lr: 0.001, beta2: 0.999, warmup_steps: 15}\nstability: {enabled: false}\n"
    )
    found = diagnose.diagnose(tmp_path)
    assert [(one.first, one.last, one.kind) for one in found.trouble] == [
        (21, 21, "loss spike"), (26, 27, "non-finite loss or gradient norm"),
    ]  # fmt: skip
    advice = "\n".join(diagnose.advice(found))
    for words in (
        "--grad_clip 1.0 (now 0, off)",
        "--optim.beta2 0.95",
        "--optim.warmup_steps 30",
        "--stability.enabled",
    ):
        assert words in advice
    assert "FP8" not in advice


def test_an_emergency_run_goes_on_from_the_newest_good_checkpoint(failed: Path) -> None:
    broken = layout.list_checkpoints(failed)[-1]
    file = broken / layout.shard_file(0)
    intact = file.read_bytes()
    content = bytearray(intact)
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    plan = emergency.plan(failed)
    assert [one.folder for one in plan.rejected] == [broken]
    assert plan.checkpoint == layout.list_checkpoints(failed)[-2]
    file.write_bytes(intact)
    plan = emergency.plan(failed)
    assert plan.checkpoint == broken
    arguments = plan.command[plan.command.index(emergency.LAUNCHER) + 1 :]
    assert run_distributed(pretrain, 1, arguments) == [0]
    lines = read_metrics(failed / "metrics.jsonl")
    assert lines[-1]["step"] == 20
    resumed = [line for line in lines if line["step"] > layout.step_of(broken)]
    assert max(line["lr"] for line in resumed) < 3.01e-4
    assert json.loads((failed / "emergency_deepspeed.json").read_text())["gradient_clipping"] == "auto"
    assert len(read_events(failed)) == 4, "nothing was wrong with these samples, and nothing happened since"
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        emergency.plan(ROOT / "docs")


@pytest.mark.slow
def test_a_run_that_went_nan_is_diagnosed_and_goes_on(corpus: Corpus, tmp_path: Path) -> None:
    """Without a guard, a weight breaks after step 7: all that follows is NaN, and so is the last checkpoint."""
    run = tmp_path / "run"
    flags = [
        *TINY, f"--data={corpus.prefix}", f"--output_dir={run}", "--train.steps=13", "--stability.enabled=false",
        "--checkpoint.interval_steps=3", "--checkpoint.keep_last=0", "--log.plot=false", "--optim.lr=1e-3",
    ]  # fmt: skip
    run_distributed(run_with_faults, 1, flags, [Fault("corrupted_weight", step=7)])
    assert all(math.isnan(line["loss"]) for line in read_metrics(run / "metrics.jsonl")[7:])
    done = script("optimize_nan", str(run), "--run")
    assert done.returncode == 0, done.stderr
    for words in (
        "metrics: step 8 to 13: non-finite loss or gradient norm",
        "step_00000006: good",
        f"step_00000013: weight {Fault.parameter} is not finite",
        "switch the guard on: --stability.enabled true",
        "step_00000006 --optim.lr 0.0003",
    ):
        assert words in done.stdout
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 14))
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert lines[-1]["loss"] < lines[5]["loss"]
    assert max(line["lr"] for line in lines[6:]) < 3.01e-4
    assert emergency.verify(layout.list_checkpoints(run)[-1]).problem is None
    assert layout.step_of(layout.list_checkpoints(run)[-1]) == 13


def test_a_run_without_a_good_checkpoint_cannot_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("grad_clip: 1.0\nstability: {enabled: true}\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": float("nan"), "grad_norm": 1.0}) + "\n")
    assert diagnose.main([str(tmp_path), "--run"]) == 1
    assert "no good checkpoint to go on from: start anew" in capsys.readouterr().out


def test_the_scripts_print_what_they_would_run(failed: Path, corpus: Corpus) -> None:
    done = script("emergency_training", str(failed), "--dry_run")
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout.splitlines()[-1])[1] == emergency.LAUNCHER
    assert "gradients clipped at" in done.stdout
    out = str(failed.with_name("simplified"))
    done = script("train_simplified", "debug", "2", "64", out, "false", DATA=str(corpus.prefix), DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    for words in ("--model_type mla", "--grad_clip 1.0", "--block_size 64", "--train.precision bf16"):
        assert words in done.stdout
    done = script("train_simplified", "huge", "2", "64", out, DATA=str(corpus.prefix), DRY_RUN="1")
    assert done.returncode == 2
    assert "size=huge (command line): no preset of mla" in done.stderr


def test_simplified_starts_fp8_in_bf16() -> None:
    arguments = simplified.argparse.Namespace(
        size="small", batch_size=4, block_size=512, output_dir="o", use_fp8="true"
    )
    first, second = simplified.commands(arguments, data="d", steps=500, ranks=1)
    assert first[first.index("--use_fp8") + 1] == "false"
    assert first[first.index("--train.stop_after_steps") + 1] == "50"
    assert second[second.index("--use_fp8") + 1] == "true"
    assert "--train.stop_after_steps" not in second


@pytest.mark.slow
def test_simplified_trains(corpus: Corpus, tmp_path: Path) -> None:
    done = script("train_simplified", "debug", "2", "64", str(tmp_path), "false", DATA=str(corpus.prefix), STEPS="3")
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 3


def test_simplified_names_a_missing_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DATA", raising=False)
    monkeypatch.setattr(simplified, "_CORPUS", tmp_path / "none")
    with pytest.raises(DataError, match="make corpus"):
        simplified.main(["debug"])


def test_optimize_sets_what_the_machine_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = Machine(num_gpus=8, gpu_name="H100", capability=(9, 0), torch_version=(2, 13), has_infiniband=True)
    monkeypatch.setattr(Machine, "look", classmethod(lambda cls: gpus))
    assert optimize.main(["--all"]) == 0
    captured = capsys.readouterr()
    assert "export PYTORCH_ALLOC_CONF=expandable_segments:True" in captured.out
    assert "export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1" in captured.out
    assert "zero3_offload.json" in captured.out
    assert "NCCL: refused: InfiniBand is there" in captured.err
    assert "compile: refused: DeepCompile" in captured.err
    old = Machine(num_gpus=1, gpu_name="V100", capability=(7, 0), torch_version=(2, 6))
    named = {one.name: one for one in optimize.settings(old, ["launchers/pretrain.py", "--deepspeed_config=mine.json"])}
    assert named["TF32"].lacking == "V100 has no TF32"
    assert named["one queue of kernels"].lacking == "one GPU only"
    assert "PYTORCH_CUDA_ALLOC_CONF" in named["allocator"].environment
    assert "of its own" in (named["offload"].lacking or "")
    assert named["recompute"].lacking is None
    assert named["recompute"].flags == ("--parallel.recompute_granularity", "full")
    other = {one.name: one for one in optimize.settings(old, ["python", "mine.py"])}
    assert all("no launchers/pretrain.py" in (other[name].lacking or "") for name in ("offload", "recompute"))


def test_optimize_runs_a_command_with_its_settings() -> None:
    done = script(
        "optimize", "--memory", "--", sys.executable, "-c", "import os; print(os.environ['MALLOC_ARENA_MAX'])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"
