"""``tools/plan.py`` as a program: table, JSON, the ready command, mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptoughts.errors import ConfigError, PlatformError
from gptoughts.planning import meta_rank
from gptoughts.planning.command import main
from gptoughts.planning.request import read_options, read_run
from gptoughts.planning.search import search

ROOT = Path(__file__).parents[2]
RUN = ("--model_type", "mla", "--size", "debug", "--gpus", "8", "--gpus_per_node", "4", "--gpu", "h100")


def call(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def test_json_says_everything_and_its_command_passes_the_launchers_dry_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ("--parallel.tensor", "2", "--output_dir", str(tmp_path / "run"))
    assert main([*RUN, *flags, "--json", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["world_size"], found["global_batch_size"], found["sequence_length_tokens"]) == (8, 64, 512)
    assert found["num_searched"] >= found["num_fitting"] >= 2
    best, second = found["layouts"]
    assert best["step_seconds"] <= second["step_seconds"]
    assert best["tensor"] * best["pipeline"] * best["data"] == 8
    memory = best["memory_bytes"]
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
    assert memory["total"] == sum(memory[part] for part in parts) > 0
    assert best["command"].startswith("deepspeed --num_nodes 2 --num_gpus 4 launchers/pretrain.py --model_type mla")
    done = call("launchers/pretrain.py", *best["arguments"], "--dry_run", WORLD_SIZE="8")
    assert done.returncode == 0, done.stderr
    assert f"{memory['total'] / 2**20:,.1f} MiB (predicted" in done.stdout


def test_the_table_shows_as_many_as_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--top", "3"]) == 0
    printed = capsys.readouterr().out
    assert "(predicted, per rank; 3 shown)" in printed
    assert printed.rstrip().splitlines()[-1].startswith("deepspeed ")
    assert "tokens/s" in printed


@pytest.mark.parametrize(("gpus", "expected"), [("16", 8), ("12", 6), ("2", 2)])
def test_nodes_are_as_large_as_fits(gpus: str, expected: int) -> None:
    options = read_options(["--gpus", gpus, "--gpu_memory_gib", "80"])
    assert options.ranks_per_node == options.machine.links.ranks_per_node == expected
    assert options.machine.flops_per_second == 0.5 * 989e12


def test_the_planner_loads_no_heavy_library() -> None:
    code = (
        "import sys; from gptoughts.planning.command import main; main(sys.argv[1:]); "
        "print(*sorted({'torch', 'megatron', 'deepspeed', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = call("-c", code, *RUN)
    assert done.returncode == 0
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--gpus", "8"], "gpu_memory_gib (command line): is needed"),
        (["--gpus", "0", "--gpu", "h100"], "gpus=0 (command line): must be greater than 0"),
        (
            ["--gpus", "12", "--gpu", "h100", "--gpus_per_node", "8"],
            "gpus=12 (command line): not a multiple of gpus_per_node=8",
        ),
        (["--gpus", "8", "--gpu", "h100", "--usable_fraction", "2"], "usable_fraction=2.0 (command line)"),
        (["--gpus", "8", "--gpu", "h100", "--top", "-1"], "top=-1 (command line)"),
        (["--gpus", "8", "--gpu", "h100", "--dry_run"], "dry_run (command line): the planner starts nothing"),
        (["--gpus", "8", "--gpu", "h100", "--init_from", "x"], "init_from=x (command line)"),
        (["--gpus", "8", "--gpu", "h100", "--batch_sise", "3"], "--batch_sise (command line): unknown flag; did you"),
        (["--gpus", "8", "--gpu", "h100", "--model_type", "gtp"], "model_type=gtp (command line): unknown family"),
        (["--gpus", "8", "--gpu", "h100", "--model.num_layers", "0"], "model.num_layers=0"),
    ],
)
def test_mistakes_are_named(flags: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(flags)
    assert any(problem.startswith(line) for problem in caught.value.problems), caught.value.problems


def test_mistakes_end_the_program_with_status_2() -> None:
    done = call("tools/plan.py", "--gpus", "1", "--gpu", "rtx4090", "--size", "llama-3-8b")
    assert done.returncode == 2
    assert "needs " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rank_of_a_large_world_is_built_without_memory() -> None:
    """Of 64 ranks, three stages' first ones; what is built is compared with what was predicted."""
    flags = ("--model_type", "deepseek", "--size", "deepseek-v2-lite", "--gpus", "64", "--gpu", "h100", "--json",
             "--parallel.tensor", "2", "--parallel.pipeline", "3", "--top", "1")  # fmt: skip
    done = call("tools/plan.py", *flags, "--validate")
    assert done.returncode == 2  # 64 ranks are no multiple of 6
    done = call("tools/plan.py", *flags, "--validate", "--gpus", "48", "--parallel.expert", "4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["validated_parameters"]) == ["0", "16", "32"]


def test_a_wrong_prediction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = search(read_run(read_options(RUN))).plans[0]
    monkeypatch.setattr(meta_rank, "count_built", lambda *_: 7)
    with pytest.raises(PlatformError, match=r"rank 0 \(stage 0\): 7 parameters are built"):
        meta_rank.check_parameters(plan)
