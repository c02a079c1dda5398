"""One case: run, and compared with the one-rank run of the same model, which is made once and kept in a folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.distributed import run_distributed
from tests.harness import ToyRun
from tests.parity.comparison import STEPS, Errors, Run, measure
from tests.parity.matrix.layouts import Case
from tests.parity.matrix.routing import TIE_MARGIN, load_table, logged_routing

_ROUTING, _HISTORY = "routing.pt", "history.json"


@dataclass(frozen=True)
class Outcome:
    """What a case has shown."""

    errors: Errors
    widest_tie: float
    """How unequal the affinities of two experts were at most that took each other's place; 0 without experts."""
    seconds: float

    def problems(self) -> list[str]:
        """A line for whatever exceeds its tolerance."""
        found = self.errors.beyond()
        if not self.widest_tie <= TIE_MARGIN:
            found.append(f"chose experts whose affinities differ by {self.widest_tie:.1e}, more than {TIE_MARGIN:.0e}")
        return found


def train_case(case: Case, folder: str, table_path: str | None, steps: int, is_free: bool) -> dict[str, Any]:
    """A toy run on this rank, saved after its first step and its last; with a table its experts are replayed.

    Returns each step's figures, and per step the widest tie (see :class:`RoutingLog`).
    """
    run = ToyRun(case.family, case.layout, Path(folder), steps=STEPS)
    table = None if table_path is None else load_table(Path(table_path))
    history: list[dict[str, Any]] = []
    with logged_routing(run, table, is_free=is_free) as log:
        for result in run.train(steps):
            history.append({**dataclasses.asdict(result), "loss": result.loss})
            if run.step in (1, STEPS):
                run.save()
    if table is None:
        torch.save(log.table(), Path(folder) / _ROUTING)
    run.close()
    return {"history": history, "widest_tie": log.widest_tie[1:]}


def one_rank_run(case: Case, folder: Path) -> Run:
    """The run that a case is compared with: made where ``folder`` does not have it yet."""
    kept = folder / f"{case.family}-{case.layout.layers}"
    if not kept.exists():
        # Several shards may want it at once: each makes its own, and one of them gives it the name.
        own = folder / f"{kept.name}.{os.getpid()}"
        ((ranks),) = (run_distributed(train_case, 1, case.one_rank, str(own), None, STEPS, False),)
        (own / _HISTORY).write_text(json.dumps(ranks[0]["history"]))
        try:
            os.rename(own, kept)
        except OSError:
            shutil.rmtree(own)
    return json.loads((kept / _HISTORY).read_text()), kept / "run"


def run_case(case: Case, folder: Path, references: Path) -> Outcome:
    """Run a case on the pool of workers and measure it.

    Args:
        case: What to run.
        folder: Where it may write.
        references: Folder of the one-rank runs of these sources.
    Raises:
        AssertionError: ranks disagree, or a rank failed.
    """
    expected = one_rank_run(case, references)
    started = time.perf_counter()
    table = str(expected[1].parent / _ROUTING)
    ranks = run_distributed(train_case, case.layout.world_size, case, str(folder), table, STEPS, False)
    histories = [rank["history"] for rank in ranks]
    assert all(history == histories[0] for history in histories), "a step's figures differ between ranks"
    errors = measure((histories[0], folder / "run"), expected)
    widest_tie = max(max(rank["widest_tie"]) for rank in ranks)
    return Outcome(errors, widest_tie, time.perf_counter() - started)
