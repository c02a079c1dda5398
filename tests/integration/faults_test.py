"""A rank killed (-9) at any moment: the others end within a minute and name it, and fewer ranks can go on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from gptoughts.checkpoint import layout
from gptoughts.training.metrics import read_metrics
from tests.integration.conftest import ROOT, TINY, Corpus, run_program

PROGRAM = "tests/integration/dying_rank.py"
INTERVAL_STEPS, DEATH_STEP = 4, 8
GONE_WITHIN_SECONDS = 60.0
RUN = (*TINY, "--train.steps=40", f"--checkpoint.interval_steps={INTERVAL_STEPS}", "--checkpoint.keep_last=0",
       "--train.global_batch_size=8", "--log.plot=false", "--train.valid_interval_steps=0")  # fmt: skip
ASYNCHRONOUS = "--checkpoint.asynchronous=true"
ZERO2, ZERO3 = ("--deepspeed_config=ds_configs/zero2.json",), ("--deepspeed_config=ds_configs/zero3.json",)
STAGES = ("--parallel.pipeline=2", "--model.num_layers=2", "--train.gradient_accumulation_steps=4")


@dataclass(frozen=True)
class Death:
    """Who dies when, and how the ranks were started."""

    moment: str
    rank: int = 1
    launcher: str = "environment"
    flags: tuple[str, ...] = ZERO2
    world_size: int = 2
    extra: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        layout_name = "-stages" if STAGES[0] in self.flags else ""
        kind = "-async" if ASYNCHRONOUS in self.extra else ""
        return f"{self.launcher}-{self.moment}{kind}-rank{self.rank}of{self.world_size}{layout_name}"


def free_port() -> int:
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start(death: Death, arguments: Sequence[str]) -> list[subprocess.Popen[str]]:
    """The ranks, or DeepSpeed's launcher of them."""
    binaries = Path(sys.executable).parent
    common = os.environ | {
        "DEATH": f"{death.moment}:{death.rank}:{DEATH_STEP}",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{binaries}:{os.environ['PATH']}",
    }
    port = str(free_port())
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    if death.launcher == "deepspeed":
        command = [str(binaries / "deepspeed"), f"--num_accelerators={death.world_size}", f"--master_port={port}"]
        return [subprocess.Popen([*command, PROGRAM, *arguments], env=common, **options)]
    started = []
    for rank in range(death.world_size):
        # What torchrun, SLURM's srun and MPI's launchers leave in the environment.
        environment = common | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(death.world_size),
            "LOCAL_WORLD_SIZE": str(death.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        started.append(subprocess.Popen([sys.executable, PROGRAM, *arguments], env=environment, **options))
    return started


def run_until_all_are_gone(death: Death, arguments: Sequence[str]) -> tuple[list[str], float]:
    """What each started process printed, and the seconds between the death and the end of the last process."""
    processes = start(death, arguments)
    try:
        if death.launcher == "environment":
            processes[death.rank].wait(timeout=240)
        else:
            find_victim(processes[0], death).wait(timeout=240)
        died = time.monotonic()
        outputs = [process.communicate(timeout=GONE_WITHIN_SECONDS)[0] for process in processes]
        assert all(process.returncode != 0 for process in processes)
        return outputs, time.monotonic() - died
    finally:
        for process in processes:
            for below in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                below.kill()
            process.kill()


def find_victim(launcher: subprocess.Popen[str], death: Death) -> psutil.Process:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for below in psutil.Process(launcher.pid).children(recursive=True):
            try:
                if PROGRAM in below.cmdline() and below.environ().get("RANK") == str(death.rank):
                    return below
            except psutil.Error:
                continue  # ended between two looks
        time.sleep(0.2)
    raise AssertionError("the launcher started no rank")


DEATHS = [
    Death("write", extra=(ASYNCHRONOUS,)),
    Death("write"),
    Death("forward"),
    Death("update", flags=ZERO3),
    Death("forward", rank=0),
    Death("publish", rank=0),
    Death("write", rank=0, extra=(ASYNCHRONOUS,)),
    Death("forward", flags=ZERO2 + STAGES),
    Death("write", rank=2, world_size=4, flags=ZERO3),
    Death("forward", launcher="deepspeed"),
    Death("update", launcher="deepspeed", rank=0),
    Death("write", launcher="deepspeed"),
    Death("write", launcher="deepspeed", extra=(ASYNCHRONOUS,)),
    Death("publish", launcher="deepspeed", rank=0, extra=(ASYNCHRONOUS,)),
]


@pytest.mark.parametrize(
    "death",
    [pytest.param(death, id=str(death), marks=() if death == DEATHS[0] else pytest.mark.slow) for death in DEATHS],
)
def test_a_killed_rank_is_named_and_fewer_ranks_go_on(death: Death, corpus: Corpus, tmp_path: Path) -> None:
    arguments = [*RUN, *death.flags, *death.extra, f"--data={corpus.prefix}", f"--output_dir={tmp_path}"]
    outputs, seconds = run_until_all_are_gone(death, arguments)
    assert seconds < GONE_WITHIN_SECONDS
    survivors = outputs if death.launcher == "deepspeed" else [*outputs[: death.rank], *outputs[death.rank + 1 :]]
    for output in survivors:
        # Rank 0 keeps the store: whoever loses that says so instead.
        lost_store = death.rank == 0 and "the host of the rendezvous store (rank 0, or its launcher) is gone" in output
        assert f"rank {death.rank} (pid " in output or lost_store, output[-3000:]
        assert "Traceback" not in output, output[-3000:]

    kept = layout.list_checkpoints(tmp_path)
    assert kept, "every checkpoint before the death is there"
    # The checkpoint of the step of death is not: nobody published it. An asynchronous one before it may be on its way.
    assert layout.step_of(kept[-1]) == DEATH_STEP - INTERVAL_STEPS
    done = run_program(
        "launchers/pretrain.py", *RUN, f"--data={corpus.prefix}", f"--output_dir={tmp_path}",
        f"--train.stop_after_steps={DEATH_STEP + 1}", *(flag for flag in death.flags if "num_layers" in flag),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"resumed from {kept[-1]} (step {layout.step_of(kept[-1])})" in done.stdout
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, DEATH_STEP + 2))
    assert not list(layout.checkpoints_folder(tmp_path).glob("*.partial"))
