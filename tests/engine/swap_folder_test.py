"""Each rank swaps into a folder of its own, which goes with it, or with the next one after it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptoughts.engine.file_tensor import MappedFile, nameless_tensor
from gptoughts.engine.swap_folder import SwapFolder, sweep

_CLAIM = """
import sys, time
from pathlib import Path
from gptoughts.engine.swap_folder import SwapFolder
folder = SwapFolder(Path(sys.argv[1]))
(folder.path / "0.tensor.swp").write_text("state")
print(folder.path, flush=True)
if sys.argv[2] == "waits":
    time.sleep(600)
if sys.argv[2] == "raises":
    raise ValueError
"""


def start(parent: Path, ending: str) -> tuple[subprocess.Popen[str], Path]:
    """Another process that claims a folder in ``parent``; its folder."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CLAIM, str(parent), ending],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    return child, Path(child.stdout.readline().strip())


def test_two_runs_in_one_folder_leave_each_others_files_alone(tmp_path: Path) -> None:
    ours = SwapFolder(tmp_path)
    (ours.path / "0.tensor.swp").write_text("ours")
    child, theirs = start(tmp_path, "waits")
    assert sweep(tmp_path) == [], "both live"
    assert (theirs / "0.tensor.swp").read_text() == "state"
    assert (ours.path / "0.tensor.swp").read_text() == "ours"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert theirs.exists()
    assert sweep(tmp_path) == [theirs]
    assert ours.path.exists()
    ours.remove()
    ours.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["returns", "raises"])
def test_an_orderly_end_leaves_nothing(tmp_path: Path, ending: str) -> None:
    child, folder = start(tmp_path, ending)
    child.wait()
    assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_new_claim_sweeps_up_after_a_killed_one(tmp_path: Path) -> None:
    child, left = start(tmp_path, "waits")
    child.kill()
    child.wait()
    folder = SwapFolder(tmp_path)
    assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.path.name, f"{folder.path.name}.lock"]
    folder.remove()


def test_a_folder_that_the_run_made_goes_with_the_last_claim(tmp_path: Path) -> None:
    first = SwapFolder(tmp_path / "swap")
    second = SwapFolder(tmp_path / "swap")
    first.remove()
    assert second.path.exists()
    second.remove()
    assert not (tmp_path / "swap").exists()


def test_a_forked_child_does_not_take_the_folder_along(tmp_path: Path) -> None:
    folder = SwapFolder(tmp_path)
    if (child := os.fork()) == 0:
        folder.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.path.exists()
    folder.remove()


def test_a_mapped_file_is_its_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    torch.arange(8, dtype=torch.float32).numpy().tofile(path)
    mapped = MappedFile(path, 5)
    assert mapped.tensor.tolist() == [0, 1, 2, 3, 4]
    mapped.tensor.fill_(7)
    mapped.flush()
    assert torch.from_file(str(path), size=8).tolist() == [7, 7, 7, 7, 7, 5, 6, 7]


def test_a_nameless_tensor_takes_space_and_leaves_no_file(tmp_path: Path) -> None:
    tensor = nameless_tensor(tmp_path, 1000).fill_(2.0)
    assert float(tensor.sum()) == 2000.0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=r"No space left|File too large"):
        nameless_tensor(tmp_path, 2**52)
    assert nameless_tensor(tmp_path, 0).numel() == 0
