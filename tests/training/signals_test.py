"""Requests to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from gptoughts.training.signals import SIGNALS, StopRequests


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_the_flag_and_the_handler_goes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequests() as stop:
        assert not stop.is_requested
        os.kill(os.getpid(), number)
        assert stop.is_requested
        assert stop.reason == number.name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("earlier", ["", "os.kill(os.getpid(), signal.SIGTERM)"], ids=["alone", "after_sigterm"])
def test_a_second_interrupt_leaves_at_once(earlier: str) -> None:
    program = textwrap.dedent(
        f"""
        import os, signal
        from gptoughts.training.signals import StopRequests
        with StopRequests():
            {earlier}
            os.kill(os.getpid(), signal.SIGINT)
            print("first", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            print("second", flush=True)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "first\n"
    assert done.returncode == 128 + signal.SIGINT


def test_a_rank_notices_that_its_launcher_is_gone() -> None:
    rank = textwrap.dedent(
        """
        import time
        from gptoughts.training.signals import StopRequests
        with StopRequests(grace_seconds=0.5) as stop:
            print("ready", flush=True)
            while True:
                time.sleep(0.1)
        """
    )
    # The word "torchrun" in the parent's command line is what makes it a launcher.
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])  # torchrun"
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    # Returns when the orphan has closed its end, that is, has ended; the time only keeps a failure from hanging.
    assert process.communicate(timeout=120) == ("", None)


def test_a_launcher_that_went_while_libraries_were_loading_is_missed() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    launchers = [psutil.Process(launcher.pid)]
    launcher.kill()
    launcher.wait()
    with StopRequests(launchers, grace_seconds=60) as stop:
        deadline = time.monotonic() + 20
        while not stop.is_requested and time.monotonic() < deadline:
            time.sleep(0.05)
    assert stop.reason == f"launcher (pid {launcher.pid}) is gone"
