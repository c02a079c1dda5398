"""Run the parity matrix, or write its table: ``python -m tests.parity.matrix --help``."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.distributed import WorkerError, close_pools
from tests.parity.matrix.layouts import FAMILIES, Case, all_cases, covering_cases
from tests.parity.matrix.results import ROOT, Record, ResultsFile, record_of, shard_of, source_hash
from tests.parity.matrix.runs import run_case
from tests.parity.matrix.table import latest, render, write_table

RESULTS = ROOT / ".parity" / "results.jsonl"


def main() -> int:
    """0 where everything asked for is equal to one rank."""
    options = _parser().parse_args()
    results = ResultsFile(options.results)
    if options.write_table:
        records = latest(results.read(), options.source)
        if not records:
            print(f"{options.results}: no results{f' of {options.source}' if options.source else ''}", file=sys.stderr)
            return 2
        write_table(render(records))
        return 0
    chosen = covering_cases() if options.covering else all_cases()
    cases = [case for case in chosen if case.family in options.family]
    shard = shard_of(cases, *options.shard)
    return run_cases(shard, results, options.results.parent / "one_rank", options.minutes * 60)


def run_cases(cases: list[Case], results: ResultsFile, references: Path, seconds: float) -> int:
    """Run what these sources have not passed yet, for so long; 1 where something is not equal or was not run."""
    # Workers inherit these settings, which tests/conftest.py makes for pytest.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    source, console = source_hash(), Console(highlight=False)
    passed = results.passed(source)
    left = [case for case in cases if str(case) not in passed]
    console.print(f"{len(left)} of {len(cases)} layouts left for sources {source}; results in {results.path}")
    begun, done, failures = time.monotonic(), 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    (references / source).mkdir(parents=True, exist_ok=True)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(left))
        for case in left:
            if time.monotonic() - begun > seconds:
                break
            done += 1
            progress.update(task, description=str(case))
            record = _run_one(case, source, references / source)
            results.append(record)
            if record.problems:
                failures += 1
                progress.console.print(f"[red]{case}[/red]: " + "\n".join(record.problems))
            progress.advance(task)
    close_pools()
    console.print(f"{done - failures} equal to one rank, {failures} not, {len(left) - done} not run")
    return 1 if failures or done < len(left) else 0


def _run_one(case: Case, source: str, references: Path) -> Record:
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        try:
            return record_of(case, source, run_case(case, Path(folder), references))
        except (WorkerError, AssertionError) as error:
            return record_of(case, source, error)


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m tests.parity.matrix", description=__doc__)
    add = found.add_argument
    add("--results", type=Path, default=RESULTS, metavar="FILE", help="JSON lines; finished cases are not run again")
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help="the I-th of N parts (1/N ... N/N)")
    add("--minutes", type=float, default=math.inf, help="begin no layout after so many")
    add(
        "--covering",
        action="store_true",
        help="only the few of `make test`, which have every pair of settings, recompute too",
    )
    add("--family", nargs="+", choices=FAMILIES, default=FAMILIES, help="of these families alone")
    add("--write_table", action="store_true", help="run nothing: write the table into docs/parallelism.md")
    add("--source", metavar="HASH", help="with --write_table: of these sources; unset: those of the newest result")
    return found


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text}: I/N with 1 <= I <= N is expected, e.g. 2/4")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
