"""Ranks that are killed, that fail, that go silent: each is named."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from gptoughts.errors import LostRankError
from gptoughts.parallel.heartbeat import Heartbeat, is_communication_error

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 3.0
RANK = """
import datetime, sys, time
import torch.distributed as dist
from gptoughts.parallel.heartbeat import Heartbeat
port, rank, world_size, timeout, grace = (float(word) for word in sys.argv[1:])
store = dist.TCPStore("127.0.0.1", int(port), is_master=False, timeout=datetime.timedelta(seconds=20))
with Heartbeat(store, rank=int(rank), world_size=int(world_size), timeout_seconds=timeout, grace_seconds=grace):
    print("beating", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=20), wait_for_workers=False)


def beat(store: dist.Store, rank: int, **options: float) -> Heartbeat:
    return Heartbeat(store, rank=rank, world_size=2, timeout_seconds=TIMEOUT_SECONDS, grace_seconds=60.0, **options)


def start_rank(store: dist.TCPStore, rank: int, *, grace_seconds: float = 60.0) -> subprocess.Popen[str]:
    words = [str(store.port), str(rank), "2", str(TIMEOUT_SECONDS), str(grace_seconds)]
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "beating\n"
    return process


def lost(heartbeat: Heartbeat) -> str:
    with pytest.raises(LostRankError) as caught:
        heartbeat.raise_if_lost(wait=True)
    return str(caught.value)


def test_a_killed_rank_is_named(store: dist.TCPStore) -> None:
    process = start_rank(store, 1)
    with beat(store, 0) as heartbeat:
        heartbeat.raise_if_lost(wait=False)
        process.kill()
        message = lost(heartbeat)
        assert message.startswith(f"rank 1 (pid {process.pid} on ")
        assert message.endswith("is gone (killed?)")
    process.wait()


def test_a_rank_on_another_host_that_goes_silent(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    other = beat(store, 1)
    monkeypatch.undo()
    other._publish()
    with beat(store, 0) as heartbeat:
        assert re.search(r"rank 1 .* on elsewhere\) has shown no sign of life for \d+ s$", lost(heartbeat))


def test_a_rank_that_never_came(store: dist.TCPStore) -> None:
    with beat(store, 0) as heartbeat:
        assert lost(heartbeat) == "rank 1 never showed a sign of life"


def test_a_rank_that_failed_says_why(store: dist.TCPStore) -> None:
    with beat(store, 0) as heartbeat:
        with pytest.raises(ValueError, match="boom"), beat(store, 1):
            raise ValueError("boom")
        assert lost(heartbeat).endswith("ended with ValueError: boom")


def test_a_rank_that_left_is_not_missed(store: dist.TCPStore) -> None:
    with beat(store, 0) as heartbeat:
        with beat(store, 1) as other:
            time.sleep(0.3)
        heartbeat.raise_if_lost(wait=True)
        other.raise_if_lost(wait=False)
        assert not store.check(["heartbeat/lost"])
        assert json.loads(store.get("heartbeat/1"))[-1] == "left"


def test_ranks_that_do_not_watch_the_lost_one_learn_of_it(store: dist.TCPStore) -> None:
    """Of three ranks, rank 1 is watched by rank 0 alone."""
    options = {"world_size": 3, "timeout_seconds": TIMEOUT_SECONDS, "grace_seconds": 60.0}
    first, last = (Heartbeat(store, rank=rank, **options) for rank in (0, 2))
    with first, last:
        assert lost(first) == lost(last) == "rank 1 never showed a sign of life"


def test_a_main_thread_that_waits_for_ever_is_ended(store: dist.TCPStore) -> None:
    process = start_rank(store, 0, grace_seconds=0.2)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == "[rank 0] rank 1 never showed a sign of life; this rank ends\n"
    assert output == ""


def test_a_store_that_is_gone(tmp_path: Path) -> None:
    host = subprocess.Popen(
        [sys.executable, "-c", "import time, torch.distributed as d; s = d.TCPStore('127.0.0.1', 0, is_master=True, "
         "wait_for_workers=False); print(s.port, flush=True); time.sleep(60)"],
        text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert host.stdout is not None
    store = dist.TCPStore(
        "127.0.0.1", int(host.stdout.readline()), is_master=False, timeout=datetime.timedelta(seconds=5)
    )
    with beat(store, 0) as heartbeat, beat(store, 1):
        os.kill(host.pid, signal.SIGKILL)
        host.wait()
        assert "the host of the rendezvous store" in lost(heartbeat)


def test_one_rank_needs_nobody() -> None:
    store = dist.HashStore()
    with Heartbeat(store, rank=0, world_size=1, timeout_seconds=1.0) as heartbeat:
        heartbeat.raise_if_lost(wait=True)
        assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
    assert not store.check(["heartbeat/0"])


def test_errors_of_collectives() -> None:
    assert is_communication_error(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:554] x"))
    assert is_communication_error(dist.DistBackendError("x"))
    assert not is_communication_error(RuntimeError("shape '[3]' is invalid for input of size 4"))
