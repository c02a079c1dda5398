"""What a run reports: one JSON line per logged step, in a file that a resumed run continues without a seam."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptoughts.checkpoint.layout import write_atomically
from gptoughts.errors import DataError, PlatformError

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; a last line that was cut off in the middle is left out.

    Raises:
        DataError: the file is missing, or a line before the last is no JSON; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected the metrics.jsonl of a run") from None
    return list(_parse(path, lines))


def _parse(path: Path, lines: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):
                raise DataError(f"{path}:{number}: not JSON: {line[:80]!r}") from None


class MetricsFile:
    """Appends lines to ``metrics.jsonl``, or to another file of lines with a step.

    Args:
        run: The run's folder.
        resumed_step: Step that the run goes on from; lines of later steps, which will be run again, are dropped.
        name: The file's.
    Raises:
        DataError: there is such a file, and it is damaged.
        PlatformError: the disk is full or gone.
    """

    def __init__(self, run: Path, *, resumed_step: int, name: str = METRICS_FILE) -> None:
        self.path = run / name
        self._open(resumed_step)

    def _open(self, resumed_step: int) -> None:
        try:
            if self.path.exists():
                kept = [line for line in read_metrics(self.path) if line["step"] <= resumed_step]
                write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._cannot_be_written(error) from None

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps, which will be run again.

        Raises:
            PlatformError: the disk is full or gone.
        """
        self.close()
        self._open(step)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system at once.

        Raises:
            PlatformError: the disk is full or gone.
        """
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._cannot_be_written(error) from None

    def _cannot_be_written(self, error: OSError) -> PlatformError:
        return PlatformError(f"{self.path}: cannot be written: {error.strerror}", is_rank_local=True)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
