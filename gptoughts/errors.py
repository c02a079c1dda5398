"""Errors that a user can cause, and how a program ends on one: a message, exit status 2, no traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

USER_ERROR_STATUS = 2
_PRINTING_SECONDS = 5.0


class GptoughtsError(Exception):
    """A problem that the person at the keyboard can solve.

    Each problem is one line that names what, its value, where it was set and what would be right.

    Args:
        problems: One line, or several that were found together.
        is_rank_local: True where only this rank knows of it; every such rank prints, otherwise rank 0 alone.
    """

    status = USER_ERROR_STATUS
    """Exit status of a program that ends on it."""

    def __init__(self, problems: str | Sequence[str], *, is_rank_local: bool = False) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        self.is_rank_local = is_rank_local
        super().__init__("\n".join(self.problems))


class ConfigError(GptoughtsError, ValueError):
    """A flag, YAML or JSON value that cannot be used."""


class PlatformError(GptoughtsError, RuntimeError):
    """The machine lacks what was asked for."""


class CheckpointError(GptoughtsError, RuntimeError):
    """A checkpoint that is missing, damaged, of another model, or could not be written."""


class DataError(GptoughtsError, RuntimeError):
    """A corpus, tokenizer or indexed file that cannot be used."""


class LostRankError(GptoughtsError, RuntimeError):
    """Another rank is gone; the message names it. The same command goes on from the last checkpoint."""

    status = 1

    def __init__(self, problem: str) -> None:
        super().__init__(problem, is_rank_local=True)


class StabilityError(GptoughtsError, RuntimeError):
    """Training went wrong again and again, and the guard has ended it; the message says what was tried."""

    status = 1


def exit_with(error: GptoughtsError) -> NoReturn:
    """Print the problems to stderr (one rank only, unless the error is rank-local) and leave with its status."""
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0 and not error.is_rank_local:
        # A launcher ends all ranks as soon as one leaves: give rank 0 the time to print.
        time.sleep(_PRINTING_SECONDS)
    if rank == 0 or error.is_rank_local:
        prefix = f"[rank {rank}] " if error.is_rank_local else ""
        for problem in error.problems:
            print(f"{prefix}{problem}", file=sys.stderr, flush=True)
    sys.exit(error.status)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's ``main``; a :class:`GptoughtsError` becomes its message and exit status (2, unless said)."""
    try:
        status = main()
    except GptoughtsError as error:
        exit_with(error)
    sys.exit(status or 0)
