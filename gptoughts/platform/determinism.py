"""Deterministic kernels: two runs in one place are equal to the bit."""

from __future__ import annotations

import os

import torch

from gptoughts.platform import device

_ENVIRONMENT = {
    # cuBLAS keeps its split-K sums in one order only with a fixed workspace (CUDA documentation, cublasSetWorkspace).
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Transformer Engine's attention backward.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # A ring's order of summation does not depend on which algorithm NCCL measures to be the fastest today.
    "NCCL_ALGO": "Ring",
}


def enable() -> None:
    """Make every operation deterministic, or fail where it cannot be. Call it before the first CUDA operation."""
    if device.is_cuda():
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # By default torch.empty is then filled with NaN, to show reads of unwritten memory: a pass over every tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def disable() -> None:
    """Let operations choose their fastest kernel again."""
    torch.use_deterministic_algorithms(False)


def is_enabled() -> bool:
    """Whether deterministic kernels are asked for."""
    return torch.are_deterministic_algorithms_enabled()
