"""Signs of life between ranks, so that a run that lost one ends soon and says which.

A collective whose peer is gone fails at once with gloo on one host, or waits for its timeout (NCCL, another host), and
neither names the rank. So each rank leaves a count in the rendezvous store every so often, and watches the count of the
next rank: when that stops for too long, or its process is no more, the watcher writes into the store who was lost. All
ranks look for that note.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType

import psutil
import torch.distributed as dist

from gptoughts.errors import LostRankError

_LOST = "heartbeat/lost"
_LEFT = "left"
_BEATS_PER_TIMEOUT = 15
_LONGEST_BEAT_SECONDS = 2.0
_GRACE_SECONDS = 10.0
"""How long the main thread may take to fail by itself before it is ended: it may wait in a collective for ever."""


@dataclass(frozen=True)
class _Beat:
    """What a rank leaves in the store."""

    count: int
    host: str
    pid: int
    state: str = ""

    def encode(self) -> str:
        return json.dumps([self.count, self.host, self.pid, self.state])

    @classmethod
    def decode(cls, content: bytes) -> _Beat:
        return cls(*json.loads(content))


class Heartbeat:
    """Runs from entering to leaving the context, on a thread of its own.

    Args:
        store: The rendezvous store; a client of our own is made of it, as a waiting client makes others wait.
        rank: This rank in the world.
        world_size: Ranks in the world.
        timeout_seconds: How long a rank may show no sign of life; 0: nobody watches.
        grace_seconds: How long after the note of a lost rank this process may go on.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        grace_seconds: float = _GRACE_SECONDS,
    ) -> None:
        self._rank = rank
        self._next = (rank + 1) % world_size
        self._timeout_seconds = timeout_seconds
        self._interval_seconds = min(_LONGEST_BEAT_SECONDS, timeout_seconds / _BEATS_PER_TIMEOUT)
        self._grace_seconds = grace_seconds
        self._beat = _Beat(0, socket.gethostname(), os.getpid())
        self._seen: _Beat | None = None
        self._seen_at = time.monotonic()
        self._lost: str | None = None
        self._found = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if world_size > 1 and timeout_seconds > 0:
            self._store: dist.Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._thread is not None:
            self._publish()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._stopped.set()
        self._thread.join()
        if self._lost is None:
            # Whoever watches this rank learns that it left, and how.
            state = _LEFT if error is None else f"ended with {type(error).__name__}: {error}"
            self._beat = _Beat(self._beat.count, self._beat.host, self._beat.pid, state)
            self._publish_if_possible()

    def raise_if_lost(self, *, wait: bool) -> None:
        """Say which rank was lost, where one was.

        Args:
            wait: Give the watcher the time to notice.
        Raises:
            LostRankError: a rank is gone.
        Collective: none.
        """
        if self._thread is None:
            return
        self._found.wait(self._timeout_seconds + 2 * self._interval_seconds if wait else 0.0)
        if self._lost is not None:
            raise LostRankError(self._lost)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_seconds):
            try:
                self._publish()
                note = self._store.get(_LOST).decode() if self._store.check([_LOST]) else self._watch()
                if note is not None and not self._store.check([_LOST]):
                    self._store.set(_LOST, note)
            except (RuntimeError, OSError) as error:
                # torch's store answers a lost connection with DistNetworkError, a RuntimeError.
                note = f"the host of the rendezvous store (rank 0, or its launcher) is gone: {_first_line(error)}"
            if note is not None:
                self._lost = note
                self._found.set()
                self._end_unless_stopped(note)
                return

    def _watch(self) -> str | None:
        """What is wrong with the next rank, if anything."""
        key = _key(self._next)
        beat = _Beat.decode(self._store.get(key)) if self._store.check([key]) else None
        now = time.monotonic()
        if beat != self._seen:
            self._seen, self._seen_at = beat, now
        if beat is None:
            silent = now - self._seen_at > self._timeout_seconds
            return f"rank {self._next} never showed a sign of life" if silent else None
        if beat.state:
            return None if beat.state == _LEFT else f"{_name(self._next, beat)} {beat.state}"
        if beat.host == self._beat.host and not _is_alive(beat.pid):
            return f"{_name(self._next, beat)} is gone (killed?)"
        if now - self._seen_at > self._timeout_seconds:
            return f"{_name(self._next, beat)} has shown no sign of life for {now - self._seen_at:.0f} s"
        return None

    def _end_unless_stopped(self, note: str) -> None:
        """A main thread that waits for the lost rank cannot be woken: end the process."""
        if not self._stopped.wait(self._grace_seconds):
            print(f"[rank {self._rank}] {note}; this rank ends", file=sys.stderr, flush=True)
            os._exit(LostRankError.status)

    def _publish(self) -> None:
        self._beat = _Beat(self._beat.count + 1, self._beat.host, self._beat.pid, self._beat.state)
        self._store.set(_key(self._rank), self._beat.encode())

    def _publish_if_possible(self) -> None:
        try:
            self._publish()
        except (RuntimeError, OSError):
            # The store has gone first: then nobody is left to read it.
            return


def is_communication_error(error: Exception) -> bool:
    """Whether a collective failed, as it does where a peer is gone."""
    # gloo raises bare RuntimeErrors; the name of its source file is in all of them.
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "closed by peer"))


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _name(rank: int, beat: _Beat) -> str:
    return f"rank {rank} (pid {beat.pid} on {beat.host})"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
