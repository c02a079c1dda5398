"""What only a GPU can show: run by `make test-gpu`, skipped by everything else."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_kernels() -> None:
    """Beyond a few shapes torch.compile falls back to operators, which round more often: each test has its own few."""
    torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TEST_GPU") == "1" and torch.cuda.is_available():
        return
    reason = "needs a GPU and TEST_GPU=1 (make test-gpu)"
    for item in items:
        if "/tests/gpu/" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=reason))
