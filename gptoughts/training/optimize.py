"""Memory and CUDA settings of a machine: which apply, why, and which it lacks (``launchers/optimize.sh``)."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gptoughts.config.model import ModelConfig
from gptoughts.config.options import tree_options
from gptoughts.errors import PlatformError, run_main

_ROOT = Path(__file__).parents[2]
MEMORY, CUDA = "memory", "cuda"
_GIB = 1024**3


@dataclass(frozen=True)
class Machine:
    """What settings depend on."""

    num_gpus: int = 0
    gpu_name: str = ""
    capability: tuple[int, int] = (0, 0)
    torch_version: tuple[int, int] = (2, 6)
    free_host_bytes: int = 0
    has_infiniband: bool = False
    is_glibc: bool = True

    @classmethod
    def look(cls) -> Machine:
        """This machine."""
        import psutil

        from gptoughts.platform import device
        from gptoughts.platform.versions import installed_version

        major, minor = (installed_version("torch") or "2.6").split(".")[:2]
        fabric = Path("/sys/class/infiniband")
        return cls(
            num_gpus=device.device_count(),
            gpu_name=device.device_name(),
            capability=device.compute_capability(),
            torch_version=(int(major), int(minor)),
            free_host_bytes=int(psutil.virtual_memory().available),
            has_infiniband=fabric.is_dir() and any(fabric.iterdir()),
            is_glibc=platform.libc_ver()[0] == "glibc",
        )


@dataclass(frozen=True)
class Setting:
    """One thing to set, or why it cannot be."""

    group: str
    name: str
    why: str
    environment: Mapping[str, str] = field(default_factory=dict)
    flags: Sequence[str] = ()
    lacking: str | None = None
    """What the machine, or the project, has not."""


def settings(machine: Machine, command: Sequence[str]) -> list[Setting]:
    """All settings, as they are for this machine and for the command that is to be run (empty: none is known)."""
    no_gpu = None if machine.num_gpus else "no CUDA device"
    allocator = "PYTORCH_ALLOC_CONF" if machine.torch_version >= (2, 9) else "PYTORCH_CUDA_ALLOC_CONF"
    return [
        Setting(
            MEMORY, "allocator", "segments that grow leave no holes between tensors of changing size",
            {allocator: "expandable_segments:True"}, lacking=no_gpu,
        ),
        Setting(
            MEMORY, "host allocator", "threads share two heaps instead of eight per core, which keep what is freed",
            {"MALLOC_ARENA_MAX": "2"}, lacking=None if machine.is_glibc else "the C library is not glibc",
        ),
        Setting(
            MEMORY, "offload", "weights and optimizer state in the host's memory (16 bytes per parameter of a rank, "
            f"{machine.free_host_bytes / _GIB:.0f} GiB are free); steps take longer",
            flags=("--deepspeed_config", str(_ROOT / "ds_configs" / "zero3_offload.json")),
            lacking=no_gpu or _flag_problem("--deepspeed_config", command),
        ),
        Setting(
            MEMORY, "recompute", "the backward computes activations anew, a third more work, instead of keeping them",
            flags=("--parallel.recompute_granularity", "full"), lacking=_recompute_lacking(command),
        ),
        Setting(
            CUDA, "TF32", "products of fp32 matrices on tensor cores, with 10 bits of mantissa; bf16 ones stay",
            {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
            lacking=no_gpu or (None if machine.capability >= (8, 0) else f"{machine.gpu_name} has no TF32"),
        ),
        Setting(
            CUDA, "one queue of kernels", "communication starts before the product beside it (tensor parallelism)",
            {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, lacking=no_gpu or _single(machine),
        ),
        Setting(
            CUDA, "NCCL", "no search for InfiniBand, which is not there",
            {"NCCL_IB_DISABLE": "1"},
            lacking=no_gpu or _single(machine) or ("InfiniBand is there and used" if machine.has_infiniband else None),
        ),
        Setting(
            CUDA, "compile", "DeepSpeed's DeepCompile",
            lacking="DeepCompile refuses caller-owned accumulation (ds_configs/README.md); nothing here is compiled",
        ),
    ]  # fmt: skip


def _recompute_lacking(command: Sequence[str]) -> str | None:
    name = "parallel.recompute_granularity"
    if name not in tree_options(ModelConfig):
        return "this version keeps all activations"
    return _flag_problem(f"--{name}", command)


def _flag_problem(flag: str, command: Sequence[str]) -> str | None:
    """Why a flag cannot be added to the command."""
    if command and not any("pretrain" in word for word in command):
        return "the command is no launchers/pretrain.py, which alone knows the flag"
    if any(word.split("=")[0] == flag for word in command):
        return f"the command has a {flag} of its own"
    return None


def _single(machine: Machine) -> str | None:
    return "one GPU only" if machine.num_gpus == 1 else None


def main(argv: Sequence[str] | None = None) -> int:
    """``launchers/optimize.sh``."""
    words = list(sys.argv[1:] if argv is None else argv)
    command: list[str] = []
    if "--" in words:
        words, command = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="optimize.sh",
        usage="%(prog)s [--memory] [--cuda] [--all] [-- COMMAND ...]",
        description="Set what saves memory and what makes CUDA faster, and say why. A COMMAND is run with these "
        'settings; without, they are printed for the shell: eval "$(launchers/optimize.sh --all)". What the machine '
        "lacks is refused by name; where nothing of what was asked for can be set, the exit status is 2.",
    )
    parser.add_argument("--memory", action="store_true", help="allocators, offload")
    parser.add_argument("--cuda", action="store_true", help="TF32, kernels' queue, NCCL, compile")
    parser.add_argument("--all", action="store_true", help="both")
    arguments = parser.parse_args(words)
    asked = {MEMORY} if arguments.memory or arguments.all else set()
    asked |= {CUDA} if arguments.cuda or arguments.all else set()
    if not asked:
        parser.error("name at least one of --memory, --cuda, --all")
    found = [one for one in settings(Machine.look(), command) if one.group in asked]
    chosen = [one for one in found if one.lacking is None]
    for one in found:
        if one.lacking is not None:
            print(f"{one.group}: {one.name}: refused: {one.lacking}", file=sys.stderr)
    if not chosen:
        raise PlatformError(f"nothing of {' and '.join(f'--{group}' for group in sorted(asked))} can be set here")
    for one in chosen:
        print(f"{one.group}: {one.name}: {one.why}", file=sys.stderr)
    environment = {name: value for one in chosen for name, value in one.environment.items()}
    flags = [word for one in chosen for word in one.flags]
    if not command:
        for name, value in environment.items():
            print(f"export {name}={shlex.quote(value)}")
        if flags:
            print(f"# flags for the run: {shlex.join(flags)}")
        return 0
    for name, value in environment.items():
        print(f"set {name}={value}", file=sys.stderr)
    sys.stderr.flush()
    os.execvpe(command[0], [*command, *flags], os.environ | environment)


if __name__ == "__main__":
    run_main(main)
