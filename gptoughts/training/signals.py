"""Requests to stop: SIGTERM, SIGUSR1, SIGINT, and a launcher that is gone.

A request only raises a flag; the flag rides on the next step's reduction, so that all ranks save at the same step.
A second SIGINT leaves at once.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType

import psutil

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_LAUNCHER_WORDS = ("deepspeed", "torchrun", "torch.distributed")
_WATCH_INTERVAL_SECONDS = 1.0


def launcher_ancestors() -> list[psutil.Process]:
    """The unbroken chain of launcher processes (deepspeed, torchrun) above this one, nearest first."""
    chain: list[psutil.Process] = []
    for parent in psutil.Process().parents():
        try:
            command = parent.cmdline()
        except psutil.Error:
            break
        # Shells around the launcher do not count: a run started in the background outlives its shell.
        is_python = bool(command) and "python" in os.path.basename(command[0])
        if not is_python or not any(word in " ".join(command) for word in _LAUNCHER_WORDS):
            break
        chain.append(parent)
    return chain


class StopRequests:
    """Collects requests to stop while training runs.

    Args:
        launchers: Processes without which this one is to stop; unset: :func:`launcher_ancestors`.
        grace_seconds: How long a rank may go on saving after its launcher died before it is ended for good.
    """

    def __init__(self, launchers: Sequence[psutil.Process] | None = None, *, grace_seconds: float = 300.0) -> None:
        self._launchers = launcher_ancestors() if launchers is None else list(launchers)
        self.reason: str | None = None
        self._was_interrupted = False
        self._grace_seconds = grace_seconds
        self._former: dict[int, object] = {}
        self._done = threading.Event()

    def __enter__(self) -> StopRequests:
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._on_signal)
        if self._launchers:
            threading.Thread(target=self._watch, name="launcher-watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def is_requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.reason is not None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            if self._was_interrupted:
                os._exit(128 + number)
            self._was_interrupted = True
        if self.reason is None:
            self.reason = name

    def _watch(self) -> None:
        while not self._done.wait(_WATCH_INTERVAL_SECONDS):
            gone = [process.pid for process in self._launchers if not _is_alive(process)]
            if gone:
                self.reason = self.reason or f"launcher (pid {gone[0]}) is gone"
                break
        else:
            return
        if not self._done.wait(self._grace_seconds):
            # Peers may be gone too, and a collective would wait for them until its timeout.
            os._exit(1)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
