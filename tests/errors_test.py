"""How programs end on a user's mistake."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from gptoughts.errors import ConfigError, run_main

PROGRAM = """
from gptoughts.errors import DataError, run_main
def main():
    raise DataError(["first", "second"], is_rank_local={local})
run_main(main)
"""


def run(rank: int, *, local: bool = False) -> subprocess.CompletedProcess[str]:
    import os

    environment = os.environ | {"RANK": str(rank)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(local=local)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_all_problems_on_stderr_status_2_and_no_traceback() -> None:
    done = run(0)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "first\nsecond\n")


def test_one_rank_speaks_for_all_unless_only_it_knows() -> None:
    started = time.monotonic()
    silent, local = run(1), run(1, local=True)
    assert (silent.returncode, silent.stderr) == (2, "")
    assert time.monotonic() - started > 4, "other ranks have to wait, or the launcher ends rank 0 before it prints"
    assert (local.returncode, local.stderr) == (2, "[rank 1] first\n[rank 1] second\n")


def test_status_of_a_program_that_went_well() -> None:
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: None)
    assert caught.value.code == 0
    assert issubclass(ConfigError, ValueError)
