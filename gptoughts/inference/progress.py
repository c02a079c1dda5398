"""A bar on stderr for work whose results go to stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(what: str, total: int, *, is_quiet: bool) -> Iterator[Callable[[int], None]]:
    """Draws until it is left.

    Args:
        what: Stands before the bar.
        total: Units of work.
        is_quiet: Draws nothing (ranks but the first).
    Yields:
        To be told how many more units are done.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, quiet=is_quiet), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
