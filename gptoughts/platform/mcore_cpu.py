"""megatron-core on a machine without CUDA: one table of what is replaced, with what, and why.

What a layer spec can substitute (attention, norms, linears) is substituted by a spec; the rows here are the rest.
``install`` is called by ``parallel.groups.initialize``, does nothing where CUDA is available, and may be called again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from gptoughts.errors import PlatformError
from gptoughts.platform.linear import parallel_linear
from gptoughts.platform.versions import MCORE_VERSION_RANGE, megatron_core_version, version_tuple

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Patch:
    """One replacement.

    Args:
        target: ``module:attribute.path`` that is replaced.
        make_replacement: Called with the original; returns what stands there afterwards.
        reason: Why the original cannot work, or not at full speed, without CUDA.
        upstream: File and line of megatron-core 0.16.1 where it matters.
        versions: First megatron-core version it applies to, and the first it no longer applies to.
    """

    target: str
    make_replacement: Callable[[Any], Any]
    reason: str
    upstream: str
    versions: tuple[str, str] = MCORE_VERSION_RANGE

    def applies_to(self, version: str) -> bool:
        """Whether the row belongs to this megatron-core version."""
        first, end = self.versions
        return version_tuple(first) <= version_tuple(version) < version_tuple(end)

    def resolve(self) -> tuple[Any, str, Any]:
        """The object that holds the attribute, its name, and what is there now.

        Raises:
            PlatformError: the attribute is not there, so the table does not fit this version.
        """
        module_name, _, path = self.target.partition(":")
        holder: Any = import_module(module_name)
        *parents, name = path.split(".")
        try:
            for parent in parents:
                holder = getattr(holder, parent)
            return holder, name, getattr(holder, name)
        except AttributeError as error:
            raise PlatformError(
                f"megatron-core {megatron_core_version()}: {self.target} does not exist, but platform/mcore_cpu.py "
                f"replaces it; supported: >= {MCORE_VERSION_RANGE[0]}, < {MCORE_VERSION_RANGE[1]}"
            ) from error


class DeviceBlindTorch(ModuleType):
    """``torch`` for one module that writes ``device="cuda"`` in full: factories go to the CPU, the rest is torch."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        """torch.zeros on the CPU whatever the device asked for."""
        return torch.zeros(*args, **{**kwargs, "device": _CPU})

    @staticmethod
    def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        """torch.tensor on the CPU whatever the device asked for."""
        return torch.tensor(*args, **{**kwargs, "device": _CPU})


class NullStream:
    """A stand-in for torch.cuda.Stream and torch.cuda.Event: everything on the CPU happens in program order."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        """Return the event, which has already happened."""
        return event if event is not None else NullStream()

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def record(self, stream: Any = None) -> None:
        """Nothing to record."""

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def _get_rng_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _add_rng_state(tracker: Any, name: str, seed: int) -> None:
    """``CudaRNGStatesTracker.add`` with the CPU generator."""
    if seed in tracker.seeds_:
        raise ValueError(f"seed {seed} already exists")
    if name in tracker.states_:
        raise ValueError(f"rng state {name} already exists")
    tracker._is_initialized = True
    tracker.seeds_.add(seed)
    tracker.states_[name] = torch.Generator().manual_seed(seed).get_state()


@contextlib.contextmanager
def _fork_rng_state(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """``CudaRNGStatesTracker.fork`` with the CPU generator, nesting included.

    The original warns whenever the CPU generator moved inside, which here is the point.
    """
    if name not in tracker.states_:
        raise ValueError(f"rng state {name} is not added")
    outer_name = tracker._current_state_name
    outer_state = torch.get_rng_state()
    if outer_name != "default-rng":
        tracker.states_[outer_name] = outer_state
    torch.set_rng_state(tracker.states_[name])
    tracker._current_state_name = name
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(tracker.states_[outer_name] if outer_name != "default-rng" else outer_state)
        tracker._current_state_name = outer_name


def _null_context(*_args: Any, **_kwargs: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda _original: value


def _returns(value: Any) -> Callable[[Any], Any]:
    return lambda _original: lambda *args, **kwargs: value


def _or_empty_tuple(original: Any) -> Any:
    """Keep a class (Transformer Engine is importable); turn a mock or None into what isinstance accepts."""
    return original if isinstance(original, type) else ()


_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_RANDOM = "megatron.core.tensor_parallel.random"
_LAYERS = "megatron.core.tensor_parallel.layers"

PATCHES: tuple[Patch, ...] = (
    Patch(
        "torch:cuda.current_device",
        _returns(_CPU),
        "device=torch.cuda.current_device() in hundreds of lines needs a CUDA build",
        "tensor_parallel/layers.py:261",
    ),
    Patch(
        "torch:cuda.synchronize",
        _returns(None),
        "synchronises after point-to-point messages",
        "pipeline_parallel/p2p_communication.py:242",
    ),
    Patch(
        "torch:cuda.manual_seed",
        _returns(None),
        "queues a call for a CUDA start that never comes, once per seeding",
        "tensor_parallel/random.py:423",
    ),
    Patch("torch:cuda.Stream", _constant(NullStream), "the MoE dispatcher makes one", "moe/token_dispatcher.py:410"),
    Patch("torch:cuda.Event", _constant(NullStream), "recorded between streams", "moe/token_dispatcher.py:640"),
    Patch("torch:cuda.current_stream", _returns(NullStream()), "asked for ordering", "moe/token_dispatcher.py:640"),
    Patch("torch:cuda.stream", _constant(_null_context), "context of a side stream", "moe/token_dispatcher.py:646"),
    Patch(
        f"{_SCHEDULES}:torch",
        _constant(DeviceBlindTorch()),
        'torch.zeros(..., device="cuda") for token counts',
        "pipeline_parallel/schedules.py:596",
    ),
    Patch(
        "megatron.core.transformer.moe.moe_utils:torch",
        _constant(DeviceBlindTorch()),
        'torch.zeros(..., device="cuda") in the auxiliary-loss tracker',
        "transformer/moe/moe_utils.py:998",
    ),
    Patch(f"{_RANDOM}:_get_cuda_rng_state", _constant(_get_rng_state), "reads CUDA's", "tensor_parallel/random.py:43"),
    Patch(f"{_RANDOM}:_set_cuda_rng_state", _constant(_set_rng_state), "sets CUDA's", "tensor_parallel/random.py:71"),
    Patch(
        f"{_RANDOM}:CudaRNGStatesTracker.add",
        _constant(_add_rng_state),
        "seeds and reads the CUDA generator",
        "tensor_parallel/random.py:223",
    ),
    Patch(
        f"{_RANDOM}:CudaRNGStatesTracker.fork",
        _constant(_fork_rng_state),
        "switches the CUDA generator, and warns when the CPU's moves",
        "tensor_parallel/random.py:250",
    ),
    Patch(
        "megatron.core.transformer.multi_latent_attention:TELinear",
        _or_empty_tuple,
        "without Transformer Engine it is a mock or None, and isinstance raises TypeError",
        "transformer/multi_latent_attention.py:185",
    ),
    Patch(
        f"{_LAYERS}:linear_with_grad_accumulation_and_async_allreduce",
        _constant(parallel_linear),
        "fp32 products at half the rate that a processor with AVX-512 has (platform/matrix_product.py)",
        "tensor_parallel/layers.py:491",
    ),
    Patch(
        f"{_LAYERS}:linear_with_frozen_weight",
        _constant(parallel_linear),
        "the same for weights that are not trained",
        "tensor_parallel/layers.py:340",
    ),
)

_ORIGINALS: dict[str, SimpleNamespace] = {}


def is_needed() -> bool:
    """Whether this process runs without CUDA."""
    return not torch.cuda.is_available()


def is_installed() -> bool:
    """Whether the replacements are in place."""
    return bool(_ORIGINALS)


def install() -> bool:
    """Put every row that applies to the installed megatron-core in place; returns whether anything was done.

    Raises:
        PlatformError: a row's target does not exist in this megatron-core.
    """
    if not is_needed() or is_installed():
        return False
    version = megatron_core_version()
    for patch in PATCHES:
        if not patch.applies_to(version):
            continue
        holder, name, original = patch.resolve()
        _ORIGINALS[patch.target] = SimpleNamespace(holder=holder, name=name, original=original)
        setattr(holder, name, patch.make_replacement(original))
    logger.debug("megatron-core %s: %d replacements for the CPU", version, len(_ORIGINALS))
    return True


def uninstall() -> None:
    """Put the originals back (tests)."""
    for saved in _ORIGINALS.values():
        setattr(saved.holder, saved.name, saved.original)
    _ORIGINALS.clear()
