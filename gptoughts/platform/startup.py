"""What has to be settled before megatron-core and DeepSpeed are imported."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings

import torch

_UNNEEDED_WARNINGS = (
    # megatron-core 0.16.1, optimizer/__init__.py:24 and others; tools/doctor.py says it once.
    (".*Transformer Engine and Apex are not installed.*", UserWarning),
    (".*Apex is not installed.*", UserWarning),
    # transformer_config.py:1705 warns of its own default; torch 2.13 warns of names that DeepSpeed 0.19.8 still calls.
    (".*full scope is deprecated.*", UserWarning),
    (".*`torch.distributed.*` is deprecated.*", FutureWarning),
)
# malloc.h of glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER_BYTES = 2**31 - 1


def prepare_process() -> None:
    """Choose DeepSpeed's accelerator, share the cores among the ranks of this host, keep the terminal readable.

    What the user has set (``DS_ACCELERATOR``, ``OMP_NUM_THREADS``, ``WANDB_MODE``) stays.
    """
    # A compute node often has no way out, and wandb would wait for one: `wandb sync` uploads later.
    os.environ.setdefault("WANDB_MODE", "offline")
    for message, category in _UNNEEDED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING if is_first else logging.ERROR)
    logging.getLogger("gptoughts").setLevel(logging.INFO if is_first else logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "warning" if is_first else "error")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, _cores() // _ranks_on_this_host()))


def keep_freed_memory() -> bool:
    """Let glibc keep and reuse freed memory instead of handing large blocks back; returns whether it did.

    A training step on a CPU allocates and frees the same large activations over and over. By default glibc maps each
    block above 32 MB afresh, and the kernel then clears its pages one fault at a time: several percent of a step.
    ``MALLOC_`` variables that the user has set stay.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER_BYTES))


def _ranks_on_this_host() -> int:
    # torchrun says LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
