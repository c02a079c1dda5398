"""Latent attention with the settings that keep it stable (``launchers/train_simplified.sh``)."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gptoughts.errors import DataError, run_main
from gptoughts.training.emergency import LAUNCHER, launcher

_ROOT = Path(__file__).parents[2]
_CORPUS = _ROOT / "data_cache" / "stdlib-8192" / "python"
_STABLE = (
    "--model_type", "mla", "--grad_clip", "1.0", "--optim.beta2", "0.95", "--train.precision", "bf16",
    "--stability.enabled", "true", "--stability.on_non_finite", "rollback",
)  # fmt: skip
_BF16_FRACTION = 0.1
"""Part of the run in bf16 before FP8 begins."""


def commands(arguments: argparse.Namespace, *, data: str, steps: int, ranks: int) -> list[list[str]]:
    """What to run, one after the other: all of it in bf16, or a first part, and the rest in FP8.

    Args:
        arguments: Of the command line.
        data: Prefix of the corpus.
        steps: Of the whole run.
        ranks: To start on this machine.
    """
    own = [
        "--size", arguments.size, "--batch_size", str(arguments.batch_size), "--block_size", str(arguments.block_size),
        "--output_dir", arguments.output_dir, "--data", data, "--train.steps", str(steps),
        "--deepspeed_config", str(_ROOT / "ds_configs" / "zero2.json"),
    ]  # fmt: skip
    common = [*launcher(ranks), LAUNCHER, *_STABLE, *own]
    if arguments.use_fp8 == "false":
        return [[*common, "--use_fp8", "false"]]
    first = max(1, round(_BF16_FRACTION * steps))
    return [
        [*common, "--use_fp8", "false", "--train.stop_after_steps", str(first)],
        [*common, "--use_fp8", "true", "--resume", "auto"],
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """``launchers/train_simplified.sh``."""
    parser = argparse.ArgumentParser(
        prog="train_simplified.sh",
        usage="%(prog)s [size] [batch_size] [block_size] [output_dir] [use_fp8]",
        description="Train a model with multi-head latent attention (mla) with settings that keep it stable: gradients "
        "clipped at 1.0, beta2 0.95, bf16 (with use_fp8 true for the first tenth of the run, then FP8), the guard on. "
        "From the environment: DATA (prefix of the corpus, default: that of make corpus), STEPS (1000), RANKS (1), "
        "DRY_RUN=1 (print what would be run).",
    )
    parser.add_argument("size", nargs="?", default="small", help="preset (default: %(default)s)")
    parser.add_argument("batch_size", nargs="?", type=int, default=4, help="samples per microbatch and rank (4)")
    parser.add_argument("block_size", nargs="?", type=int, default=512, help="tokens per sample (512)")
    parser.add_argument("output_dir", nargs="?", default="runs/simplified", help="run folder (runs/simplified)")
    parser.add_argument("use_fp8", nargs="?", choices=("true", "false"), default="false", help="true or false (false)")
    arguments = parser.parse_args(argv)
    data = os.environ.get("DATA", str(_CORPUS))
    if "DATA" not in os.environ and not _CORPUS.with_name(f"{_CORPUS.name}_train.idx").is_file():
        raise DataError(f"{data}: there is no corpus yet; run make corpus, or name one: DATA=PREFIX {parser.prog}")
    steps, ranks = _number(parser, "STEPS", 1000), _number(parser, "RANKS", 1)
    todo = commands(arguments, data=data, steps=steps, ranks=ranks)
    # Each part is checked before the first one is run.
    for command in todo:
        print(shlex.join(command), flush=True)
        status = _run([launcher(1)[0], *command[command.index(LAUNCHER) :], "--dry_run"], ranks, is_quiet=True)
        if status:
            return status
    if os.environ.get("DRY_RUN", "0") not in ("", "0"):
        return 0
    return next((status for command in todo if (status := _run(command, None, is_quiet=False))), 0)


def _number(parser: argparse.ArgumentParser, name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        parser.error(f"{name}={text} (environment): a number is expected, 1 or more")
    return int(text)


def _run(command: Sequence[str], claimed_ranks: int | None, *, is_quiet: bool) -> int:
    """Run in the foreground; ``claimed_ranks``: say that there are so many, for a dry run."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), environment.get("PYTHONPATH")]))
    if claimed_ranks is not None:
        environment["WORLD_SIZE"] = str(claimed_ranks)
    parts = [str(_ROOT / part) if part == LAUNCHER else part for part in command]
    output = subprocess.DEVNULL if is_quiet else None
    return subprocess.run(parts, env=environment, stdout=output, check=False).returncode


if __name__ == "__main__":
    run_main(main)
