"""What a process settles before megatron-core and DeepSpeed are imported; what the user has set stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import json, os, torch
from gptoughts.platform.startup import prepare_process
prepare_process()
names = ("WANDB_MODE", "DS_ACCELERATOR")
print(json.dumps({"threads": torch.get_num_threads()} | {name: os.environ.get(name) for name in names}))
"""


def settle(**environment: str) -> dict[str, object]:
    names = ("WANDB_MODE", "DS_ACCELERATOR", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="these are a CPU's settings")
def test_defaults_share_the_cores_among_the_ranks_of_a_host() -> None:
    cores = len(os.sched_getaffinity(0))
    assert settle() == {"threads": cores, "WANDB_MODE": "offline", "DS_ACCELERATOR": "cpu"}
    assert settle(LOCAL_SIZE=str(cores))["threads"] == 1
    assert settle(LOCAL_WORLD_SIZE=str(10 * cores))["threads"] == 1


def test_what_the_user_has_set_stays() -> None:
    found = settle(WANDB_MODE="online", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", LOCAL_SIZE="1")
    assert found == {"threads": 1, "WANDB_MODE": "online", "DS_ACCELERATOR": "cpu"}
