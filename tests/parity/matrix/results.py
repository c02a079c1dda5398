"""What has been measured: one line of JSON per finished case, so that a stopped run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.parity.matrix.layouts import Case
from tests.parity.matrix.runs import Outcome

ROOT = Path(__file__).parents[3]
SOURCES = (
    "gptoughts/errors.py", "gptoughts/checkpoint/*.py", "gptoughts/config", "gptoughts/engine", "gptoughts/models",
    "gptoughts/objectives", "gptoughts/parallel", "gptoughts/platform", "gptoughts/precision",
    "gptoughts/training/setup.py", "tests/distributed.py", "tests/harness.py", "tests/parity/comparison.py",
    "tests/parity/matrix",
)  # fmt: skip
"""What a case's outcome depends on: files, folders, patterns."""
PACKAGES = ("torch", "deepspeed", "megatron-core")


@dataclass(frozen=True)
class Record:
    """One finished case."""

    case: str
    source: str
    """:func:`source_hash` of what ran."""
    settings: dict[str, Any]
    """Axis -> value."""
    problems: list[str]
    """Nothing where it is equal to one rank."""
    errors: dict[str, float] | None
    """As in ``comparison.Errors``; None where it did not come to an end."""
    widest_tie: float = 0.0
    seconds: float = 0.0
    day: str = field(default_factory=lambda: date.today().isoformat())


def record_of(case: Case, source: str, outcome: Outcome | Exception) -> Record:
    """What is kept of a case that came to an end, or did not."""
    if isinstance(outcome, Exception):
        return Record(str(case), source, case.settings(), [f"{type(outcome).__name__}: {outcome}"], None)
    return Record(
        str(case), source, case.settings(), outcome.problems(), asdict(outcome.errors), outcome.widest_tie,
        round(outcome.seconds, 2),
    )  # fmt: skip


def source_hash(root: Path = ROOT) -> str:
    """Names the sources and the versions of the libraries: another hash, and everything has to be measured anew."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        digest.update(f"{package}={version(package)}\n".encode())
    for path in sorted(_source_files(root)):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _source_files(root: Path) -> Iterable[Path]:
    for name in SOURCES:
        yield from (root / name).rglob("*.py") if (root / name).is_dir() else root.glob(name)


class ResultsFile:
    """Lines of :class:`Record`; several processes may append to one file.

    Args:
        path: Need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Record]:
        """All records, oldest first. A last line that a killed process left unfinished is passed over."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text().splitlines():
            try:
                found.append(Record(**json.loads(line)))
            except json.JSONDecodeError:
                continue
        return found

    def append(self, record: Record) -> None:
        """One write, so that lines of two processes do not mix."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")

    def passed(self, source: str) -> set[str]:
        """Names of the cases that these sources have passed."""
        return {record.case for record in self.read() if record.source == source and not record.problems}


def shard_of(cases: Sequence[Case], index: int, count: int) -> list[Case]:
    """Every ``count``-th case, from ``index`` (1 ... count): shards share nothing and miss nothing."""
    return list(cases[index - 1 :: count])
