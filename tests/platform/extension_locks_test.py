"""Locks of killed compilations."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from gptoughts.platform.extension_locks import OPERATORS, clear_stale_locks


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    (tmp_path / OPERATORS[0]).mkdir()
    path = tmp_path / OPERATORS[0] / "lock"
    path.touch()
    return path


def test_an_old_lock_without_a_holder_goes(tmp_path: Path, lock: Path) -> None:
    os.utime(lock, (time.time() - 1000, time.time() - 1000))
    assert clear_stale_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_a_fresh_lock_without_a_holder_is_waited_for(tmp_path: Path, lock: Path) -> None:
    started = time.monotonic()
    assert clear_stale_locks(tmp_path, foreign_build_seconds=1.5) == [lock]
    assert time.monotonic() - started > 1


def test_a_lock_that_a_living_process_holds_stays(tmp_path: Path, lock: Path) -> None:
    os.utime(lock, (time.time() - 1000, time.time() - 1000))
    with lock.open():
        assert clear_stale_locks(tmp_path) == []
    assert lock.exists()


def test_no_lock_is_no_trouble(tmp_path: Path) -> None:
    assert clear_stale_locks(tmp_path) == []
