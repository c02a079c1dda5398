"""The device of this process: which one, its memory, its peak rate, and what its libraries can do."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import psutil
import torch

from gptoughts.errors import PlatformError
from gptoughts.platform import matrix_product

_GIB = 1024**3


def is_cuda() -> bool:
    """Whether this process computes on a CUDA device."""
    return torch.cuda.is_available()


def local_rank() -> int:
    """Rank on this host, from the launcher's environment; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def current_device() -> torch.device:
    """The device that tensors of this process live on."""
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda() else torch.device("cpu")


def claim_device() -> torch.device:
    """Make this rank's device the current one and return it.

    Raises:
        PlatformError: the host has fewer devices than local ranks.
    """
    if not is_cuda():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank() >= count:
        raise PlatformError(
            f"LOCAL_RANK={local_rank()}: this host has {count} CUDA device(s); start at most {count} rank(s) here",
            is_rank_local=True,
        )
    torch.cuda.set_device(local_rank())
    return current_device()


def communication_backend() -> str:
    """torch.distributed's backend for this device."""
    return "nccl" if is_cuda() else "gloo"


def device_count() -> int:
    """CUDA devices of this host; 0 without CUDA."""
    return torch.cuda.device_count() if is_cuda() else 0


def device_name() -> str:
    """The current CUDA device's name; empty without CUDA."""
    return torch.cuda.get_device_name() if is_cuda() else ""


def compute_capability() -> tuple[int, int]:
    """The current CUDA device's; (0, 0) without CUDA."""
    return torch.cuda.get_device_capability() if is_cuda() else (0, 0)


def synchronize() -> None:
    """Wait until the device has done all work handed to it."""
    if is_cuda():
        torch.cuda.synchronize()


@contextmanager
def background_stream() -> Iterator[None]:
    """Inside, a thread's work on the device runs beside the compute stream's, after what that was handed so far.

    It is done when the context is left. Nothing on a CPU.
    """
    if not is_cuda():
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def memory_bytes() -> int:
    """Peak device memory allocated by this process (CUDA), or its resident memory now (CPU), in bytes."""
    if is_cuda():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def total_memory_bytes() -> int:
    """Memory of the device (CUDA) or of the host (CPU), in bytes."""
    if is_cuda():
        return int(torch.cuda.get_device_properties(current_device()).total_memory)
    return int(psutil.virtual_memory().total)


def seed_device(seed: int) -> None:
    """Seed torch's default generators of the CPU and of the device."""
    torch.manual_seed(seed)


def rng_state() -> dict[str, torch.Tensor]:
    """State of torch's default generators, by device kind; uint8 tensors on the CPU."""
    state = {"cpu": torch.get_rng_state()}
    if is_cuda():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Set what :func:`rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if is_cuda() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def describe() -> str:
    """One line for a log: the device and its memory."""
    gib = total_memory_bytes() / _GIB
    if is_cuda():
        return f"{torch.cuda.get_device_name()} ({gib:.0f} GiB)"
    return f"CPU, {torch.get_num_threads()} thread(s) per rank ({gib:.0f} GiB host memory)"


def supports_precision(dtype: torch.dtype) -> bool:
    """Whether forward and backward can run in this dtype here: fp16 wants CUDA, DeepSpeed refuses it on a CPU."""
    if dtype is torch.float16:
        return is_cuda()
    if dtype is torch.bfloat16 and is_cuda():
        return torch.cuda.is_bf16_supported()
    return dtype in (torch.float32, torch.bfloat16)


TRANSFORMER_ENGINE_CAPABILITY = (8, 0)
"""Least compute capability of a GPU for Transformer Engine's layers."""
FP8_CAPABILITY = (8, 9)
"""Least compute capability of a GPU with FP8 tensor cores."""


@cache
def transformer_engine_obstacle() -> str | None:
    """Why Transformer Engine's layers cannot run here, half a sentence; None: they can."""
    return _capability_obstacle("Transformer Engine", TRANSFORMER_ENGINE_CAPABILITY) or _import_obstacle()


@cache
def fp8_obstacle() -> str | None:
    """Why Transformer Engine cannot compute in FP8 here, half a sentence; None: it can."""
    return _capability_obstacle("Transformer Engine's FP8", FP8_CAPABILITY) or _import_obstacle()


def _capability_obstacle(what: str, least: tuple[int, int]) -> str | None:
    wanted = f"{what} needs a GPU of compute capability {least[0]}.{least[1]} or newer, and "
    if not is_cuda():
        return f"{wanted}this is a CPU"
    found = torch.cuda.get_device_capability()
    return f"{wanted}{torch.cuda.get_device_name()} has {found[0]}.{found[1]}" if found < least else None


def _import_obstacle() -> str | None:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        # OSError: the package is there but a shared library it loads is not; RuntimeError: half of it is installed.
        return f"transformer_engine.pytorch cannot be imported: {error}"
    return None


@cache
def peak_tflops(dtype: torch.dtype, *, size: int | None = None, repeats: int = 3) -> float:
    """Rate of a large square matrix product on this device, in TFLOP/s: the best of ``repeats`` after a warm-up.

    Args:
        dtype: Operands' dtype.
        size: Rows and columns; unset: 8192 on CUDA, 2048 on a CPU (about 0.1 s each).
        repeats: Timed products.
    """
    edge = size or (8192 if is_cuda() else 2048)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(edge, edge, generator=generator).to(current_device(), dtype)
    matrix_product.linear(left, left)
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        matrix_product.linear(left, left)
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * edge**3 / best / 1e12
