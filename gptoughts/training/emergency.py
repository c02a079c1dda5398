"""Goes on, more carefully, with a run that went wrong (``launchers/emergency_training.sh``)."""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gptoughts.checkpoint import layout
from gptoughts.errors import CheckpointError, run_main

_LR_FACTOR = 0.3
_LARGEST_CLIP = 0.5
_SNAPSHOT_INTERVAL_STEPS = 20
_DEEPSPEED_JSON = "emergency_deepspeed.json"
_CONFIG = "emergency.yaml"
LAUNCHER = "launchers/pretrain.py"


@dataclass(frozen=True)
class Verified:
    """A checkpoint that was looked at."""

    folder: Path
    problem: str | None
    """Why it is not good; None: it is."""


@dataclass(frozen=True)
class Emergency:
    """How to go on."""

    checkpoint: Path
    command: list[str]
    explanation: list[str]
    """What is changed and why."""
    rejected: list[Verified]
    """Newer checkpoints, and why they are not taken."""


def verify(folder: Path) -> Verified:
    """Whether a checkpoint's files match their checksums, and all its numbers are finite."""
    from gptoughts.checkpoint.portable import KINDS, CheckpointReader

    try:
        layout.check_files(folder)
        reader = CheckpointReader(folder)
        if reader.manifest.get(layout.WEIGHTS_ONLY):
            return Verified(folder, "holds weights only, so no run can be resumed from it")
        for kind in KINDS:
            for name in reader.names(kind):
                if not bool(reader.full(name, kind).isfinite().all()):
                    return Verified(folder, f"{kind} {name} is not finite")
    except CheckpointError as error:
        return Verified(folder, "; ".join(error.problems))
    return Verified(folder, None)


def plan(path: Path, *, ranks: int | None = None) -> Emergency:
    """Choose the checkpoint and the settings.

    Args:
        path: A run's folder (its newest good checkpoint is taken), or one checkpoint.
        ranks: How many to start; unset: as many as wrote the checkpoint.
    Raises:
        CheckpointError: there is no good checkpoint; names each and what is wrong with it.
    """
    named = layout.locate(path)
    is_one = (path / layout.MANIFEST).is_file()
    candidates = [named] if is_one else layout.list_checkpoints(named.parent.parent)[::-1]
    rejected: list[Verified] = []
    for folder in candidates:
        found = verify(folder)
        if found.problem is None:
            return _plan_from(folder, ranks, rejected)
        rejected.append(found)
    lines = [f"{one.folder}: {one.problem}" for one in rejected]
    raise CheckpointError([*lines, "no good checkpoint is left to go on from"])


def _plan_from(folder: Path, ranks: int | None, rejected: list[Verified]) -> Emergency:
    run = folder.parent.parent
    config: dict[str, Any] = yaml.safe_load((folder / layout.CONFIG).read_text(encoding="utf-8"))
    lr = float(config["optim"]["lr"]) * _LR_FACTOR
    old_clip = float(config.get("grad_clip") or 0.0)
    clip = min(_LARGEST_CLIP, old_clip / 2) if old_clip > 0 else _LARGEST_CLIP
    flags = {
        "optim.lr": f"{lr:.6g}",
        "grad_clip": f"{clip:g}",
        "use_fp8": "false",
        "stability.enabled": "true",
        "stability.on_non_finite": "rollback",
        "stability.on_loss_spike": "rollback",
        "stability.snapshot_interval_steps": str(_SNAPSHOT_INTERVAL_STEPS),
    }
    explanation = [
        f"from {folder}",
        f"learning rate x {_LR_FACTOR}: {lr:.6g} (was {config['optim']['lr']})",
        f"gradients clipped at {clip:g} (was {old_clip:g})",
        "guard on: non-finite steps and loss spikes are rolled back and their samples left out; a snapshot every "
        f"{_SNAPSHOT_INTERVAL_STEPS} steps",
        "FP8 off",
    ]
    if config.get("deepspeed_config"):
        flags["deepspeed_config"] = str(run / _DEEPSPEED_JSON)
        explanation.append(f"DeepSpeed's JSON without what contradicts this: {run / _DEEPSPEED_JSON}")
        _write_json(Path(config["deepspeed_config"]), run / _DEEPSPEED_JSON)
    # A checkpoint is gone on from, as far as the run was to go, and without FP8 nothing is said of it.
    kept = {**config, "init_from": None, "train": {**config["train"], "stop_after_steps": None}}
    kept.pop("fp8", None)
    kept.get("log", {}).pop("fp8", None)
    layout.write_atomically(run / _CONFIG, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
    arguments = ["--config", str(run / _CONFIG), "--output_dir", str(run), "--resume", str(folder)]
    for name, value in flags.items():
        arguments += [f"--{name}", value]
    size = ranks or int(json.loads((folder / layout.MANIFEST).read_text())["world_size"])
    return Emergency(folder, [*launcher(size), LAUNCHER, *arguments], explanation, rejected)


def launcher(ranks: int) -> list[str]:
    """What starts so many ranks on this machine."""
    if ranks == 1:
        return [sys.executable]
    deepspeed = Path(sys.executable).with_name("deepspeed")
    name = str(deepspeed) if deepspeed.exists() else "deepspeed"
    return [name, "--log_level", "warning", "--num_accelerators", str(ranks)]


def _write_json(source: Path, target: Path) -> None:
    """DeepSpeed's JSON with ``"auto"`` for what the flags say."""
    try:
        content: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"deepspeed_config={source}, which the checkpoint names: {error}") from None
    content = copy.deepcopy(content)
    if "gradient_clipping" in content:
        content["gradient_clipping"] = "auto"
    parameters = content.get("optimizer", {}).get("params", {})
    if "lr" in parameters:
        parameters["lr"] = "auto"
    rates = content.get("scheduler", {}).get("params", {})
    if "warmup_max_lr" in rates:
        rates["warmup_max_lr"] = "auto"
    if "fp8" in content:
        content["fp8"] = {"enabled": False}
    layout.write_atomically(target, json.dumps(content, indent=2) + "\n")


def run_command(emergency: Emergency) -> int:
    """Run it in the foreground; returns its exit status."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    command = [str(root / part) if part == LAUNCHER else part for part in emergency.command]
    return subprocess.run(command, env=environment, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """``launchers/emergency_training.sh``."""
    parser = argparse.ArgumentParser(
        prog="emergency_training.sh",
        description="Go on from the newest good checkpoint of a run that went wrong: lower learning rate, tighter "
        "clipping, guard on, FP8 off.",
    )
    parser.add_argument("checkpoint_dir", type=Path, help="the run's folder, or one of its checkpoints")
    parser.add_argument("--ranks", type=int, help="ranks to start (default: as many as wrote the checkpoint)")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run, then leave")
    arguments = parser.parse_args(argv)
    if arguments.ranks is not None and arguments.ranks < 1:
        parser.error(f"--ranks {arguments.ranks}: 1 or more")
    emergency = plan(arguments.checkpoint_dir, ranks=arguments.ranks)
    for one in emergency.rejected:
        print(f"not from {one.folder}: {one.problem}")
    for line in emergency.explanation:
        print(line)
    print(shlex.join(emergency.command), flush=True)
    return 0 if arguments.dry_run else run_command(emergency)


if __name__ == "__main__":
    run_main(main)
