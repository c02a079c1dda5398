"""``tools/plan.py``: which layouts of a run fit, what they need, and how fast they would be."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console

from gptoughts.errors import ConfigError
from gptoughts.planning.report import as_json, command, table, why_nothing_fits
from gptoughts.planning.request import GIB, Options, read_options, read_run
from gptoughts.planning.search import Plan, Run, search
from gptoughts.planning.throughput import StepTime

_FILE_WIDTH = 200
"""Columns where the output is no terminal."""


def best_plans(run: Run, options: Options) -> tuple[list[tuple[Plan, StepTime]], int]:
    """The plans that fit, fastest first (of equally fast ones the smallest), and how many were looked at.

    Raises:
        ConfigError: nothing is acceptable, or nothing fits.
    """
    found = search(run, options.limit_bytes)
    if not found.plans:
        raise ConfigError(list(found.problems) or ["no layout: nothing divides the world"])
    fitting = [plan for plan in found.plans if plan.memory.total <= options.limit_bytes]
    if not fitting:
        raise ConfigError(why_nothing_fits(run, found.plans, options))
    timed = [(plan, plan.time_on(options.machine)) for plan in fitting]
    timed.sort(key=lambda pair: (pair[1].seconds, pair[0].memory.total))
    return timed, len(found.plans)


def main(argv: Sequence[str] | None = None) -> int:
    """``tools/plan.py``.

    Raises:
        ConfigError: a wrong option, or nothing that fits (with the smallest change that would).
    """
    options = read_options(sys.argv[1:] if argv is None else argv)
    run = read_run(options)
    plans, number = best_plans(run, options)
    shown = plans[: options.top or None]
    counts = None
    if options.wants_validation:
        from gptoughts.planning.meta_rank import check_parameters

        counts = check_parameters(shown[0][0])
    if options.wants_json:
        content = {
            "model_type": run.config.model_type,
            "size": run.config.size,
            "world_size": run.world_size,
            "global_batch_size": run.config.train.global_batch_size,
            "sequence_length_tokens": run.config.block_size,
            "limit_bytes": int(options.limit_bytes),
            "num_searched": number,
            "num_fitting": len(plans),
            "layouts": [as_json(plan, time, options) for plan, time in shown],
        }
        print(json.dumps(content | ({"validated_parameters": counts} if counts is not None else {}), indent=2))
        return 0
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    console.print(
        f"{run.config.model_type} {run.config.size}, {run.world_size} ranks, {run.config.train.global_batch_size} "
        f"samples of {run.config.block_size} tokens per step; {len(plans)} of {number} layouts fit into "
        f"{options.limit_bytes / GIB:.1f} GiB (predicted, per rank; {len(shown)} shown)"
    )
    console.print(table(shown))
    if counts is not None:
        for rank, count in counts.items():
            console.print(f"rank {rank}: {count:,} parameters built on the meta device, as predicted")
    console.print(command(shown[0][0], options))
    return 0
