"""Says what this machine can run, and builds DeepSpeed's CPU operators before the first run needs them."""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from gptoughts.errors import GptoughtsError, PlatformError
from gptoughts.platform import async_io
from gptoughts.platform.extension_locks import clear_stale_locks
from gptoughts.platform.startup import prepare_process
from gptoughts.platform.versions import MCORE_VERSION_RANGE, installed_version, megatron_core_version

_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "ninja")
_OPTIONAL_PACKAGES = {
    "transformer-engine": "fused layers and FP8 on GPUs of compute capability 8.9 or newer",
    "apex": "nothing that this project needs: megatron-core falls back to torch",
    "mpi4py": "nothing yet: ranks find each other through the environment of a launcher (deepspeed, torchrun)",
    "lm-eval": "launchers/evaluate.py --tasks: the lm-evaluation-harness (pip install -e '.[eval]')",
    "wandb": "the JSON's wandb monitor",
    "tensorboard": "the JSON's tensorboard monitor",
}
_CPU_BUILDERS = {
    "comm": ("ShareMemCommBuilder",),
    "all": ("ShareMemCommBuilder", "CPUAdamBuilder", async_io.BUILDER),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    text: str
    is_problem: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """``tools/doctor.py``: print the findings; status 1 where something will not work."""
    parser = argparse.ArgumentParser(prog="doctor", description=__doc__)
    parser.add_argument(
        "--build_ops",
        nargs="?",
        const="comm",
        choices=tuple(_CPU_BUILDERS),
        help="compile DeepSpeed's CPU operators now (a minute or two each, once per machine), which the first run "
        "would otherwise wait for: comm (the default) is what every run needs, all adds the offloaded optimizer's and, "
        "where libaio is installed, that of offload to NVMe",
    )
    options = parser.parse_args(argv)
    prepare_process()
    findings = diagnose()
    if options.build_ops:
        findings += build_ops(options.build_ops)
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        print(f"{'PROBLEM ' if finding.is_problem else '        '}{finding.topic:<{width}}  {finding.text}")
    return 1 if any(finding.is_problem for finding in findings) else 0


def diagnose() -> list[Finding]:
    """What is installed and whether it works together here."""
    checks: tuple[Callable[[], list[Finding]], ...] = (
        _check_packages,
        _check_megatron_core,
        _check_device,
        _check_compiler,
        _check_async_io,
    )
    return [finding for check in checks for finding in check()]


def build_ops(which: str = "comm") -> list[Finding]:
    """Compile DeepSpeed's CPU operators (``which``: comm or all); nothing to do where CUDA is used.

    DeepSpeed compiles them in the first ``init_distributed`` of a run and needs ninja on PATH and a C++ compiler.
    """
    from gptoughts.platform import device

    if device.is_cuda():
        return [Finding("operators", "none are needed before the first run on CUDA")]
    from deepspeed.accelerator import get_accelerator

    put_ninja_on_path()
    clear_stale_locks()
    findings = []
    for name in _CPU_BUILDERS[which]:
        if name == async_io.BUILDER and not async_io.has_libaio():
            continue  # _check_async_io has said it
        started = time.perf_counter()
        try:
            builder = get_accelerator().create_op_builder(name)
            if builder is None:
                raise PlatformError("this DeepSpeed has no such operator")
            builder.load(verbose=False)
        # DeepSpeed's builders raise whatever the compiler, ninja or the loader raised.
        except Exception as error:
            findings.append(Finding(name, f"could not be built: {error}", is_problem=True))
        else:
            findings.append(Finding(name, f"ready ({time.perf_counter() - started:.1f} s)"))
    return findings


def _check_packages() -> list[Finding]:
    findings = [Finding("python", f"{platform.python_version()} ({sys.executable})")]
    for package in _PACKAGES:
        found = installed_version(package)
        findings.append(Finding(package, found or "not installed", is_problem=found is None))
    for package, adds in _OPTIONAL_PACKAGES.items():
        findings.append(Finding(package, installed_version(package) or f"not installed (optional); would add: {adds}"))
    return findings


def _check_megatron_core() -> list[Finding]:
    from gptoughts.platform import mcore_cpu

    supported = f">= {MCORE_VERSION_RANGE[0]}, < {MCORE_VERSION_RANGE[1]}"
    try:
        version = megatron_core_version()
        mcore_cpu.install()
        import_module("megatron.core")
    except GptoughtsError as error:
        return [Finding("megatron-core", problem, is_problem=True) for problem in error.problems]
    # It imports Transformer Engine, and an installation of half of that raises whatever its loader meets first.
    except (ImportError, OSError, RuntimeError) as error:
        return [Finding("megatron-core", f"cannot be imported: {error}", is_problem=True)]
    patched = f"{len(mcore_cpu.PATCHES)} replacements for the CPU" if mcore_cpu.is_installed() else "used as it is"
    return [Finding("megatron-core", f"{version} is supported ({supported}); {patched}")]


def _check_device() -> list[Finding]:
    import torch

    from gptoughts.platform import device

    obstacle = device.transformer_engine_obstacle()
    engine = "usable" if obstacle is None else f"not usable here ({obstacle}); our own layers are used"
    findings = [
        Finding("device", device.describe()),
        Finding("backend", device.communication_backend()),
        Finding("transformer engine", engine),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        findings.append(Finding("matrix product", f"{device.peak_tflops(dtype):.2f} TFLOP/s in {dtype}"))
    return findings


def _check_compiler() -> list[Finding]:
    from gptoughts.platform import device

    if device.is_cuda():
        return []
    put_ninja_on_path()
    findings = []
    for program, install in (
        ("ninja", "pip install ninja"),
        ("c++", "install a C++ compiler, e.g. g++ (what decodes on a CPU is compiled too)"),
    ):
        found = shutil.which(program)
        text = found or f"not found; DeepSpeed compiles its CPU operators with it: {install}"
        findings.append(Finding(program, text, is_problem=found is None))
    return findings


def _check_async_io() -> list[Finding]:
    if async_io.has_libaio():
        return [Finding("async_io", "libaio is there; the operator is compiled at first use, or by --build_ops all")]
    return [Finding("async_io", f"not possible; would add: offload to NVMe; needs {async_io.LIBAIO}")]


def put_ninja_on_path() -> None:
    """pip puts ninja beside this Python, which is not on PATH where a virtual environment is not activated."""
    import os
    from pathlib import Path

    folder = str(Path(sys.executable).parent)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
