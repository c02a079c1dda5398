"""Our own C++ for the CPU, compiled where it runs at its first use and kept for later ones.

A source includes nothing but the standard library, so that it compiles in two seconds, and is called through ctypes.
What is compiled is named by all that it depends on: its text, the compiler and the processor, of which a home that
machines share sees several.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC")
_COMPILE_SECONDS = 120


@cache
def load(source: Path) -> ctypes.CDLL | None:
    """The library of a source; None, with a warning once, where it cannot be had: all it does can be done without.

    Files of its folder that it includes by name, ``#include "other.h"``, belong to it.
    """
    try:
        target = _target(source)
        if target.is_file():
            try:
                return _open(target)
            except OSError:  # of a broken disk, or of another C library
                logger.info("%s cannot be loaded and is compiled anew", target)
        _compile(source, target)
        return _open(target)
    # RuntimeError: who runs this has no home.
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        printed = (getattr(error, "stderr", None) or "").strip().splitlines()
        logger.warning(
            "%s cannot be compiled here, so torch's operators stand for it, which are slower: %s",
            source.name,
            printed[0] if printed else error,
        )
        return None


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first one on PATH."""
    found = (shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name)
    return next(filter(None, found), None)


def _target(source: Path) -> Path:
    """Where the library of a source lies, or will.

    Raises:
        OSError: there is no compiler, or the source cannot be read.
    """
    texts = [source.read_text()]
    texts += [(source.parent / name).read_text() for name in re.findall(r'^#include "(.+)"', texts[0], re.MULTILINE)]
    program = compiler()
    if program is None:
        raise FileNotFoundError("no C++ compiler is on PATH; install one, e.g. g++")
    told = (
        *texts,
        program,
        _run(program, "--version"),
        *_FLAGS,
        platform.machine(),
        *platform.libc_ver(),
        _processor(),
    )
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptoughts" / "native"
    return folder / f"{source.stem}-{hashlib.sha256(chr(0).join(told).encode()).hexdigest()[:16]}.so"


def _compile(source: Path, target: Path) -> None:
    """Raises OSError or subprocess.SubprocessError."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Ranks may compile at once: each to a name of its own, and whole files only get the name that is looked for.
    with tempfile.TemporaryDirectory(dir=target.parent) as own:
        made = Path(own) / target.name
        logger.info("compiling %s (once on this machine)", source.name)
        _run(str(compiler()), *_FLAGS, str(source), "-o", str(made))
        made.chmod(0o700)
        with made.open("rb") as stream:
            os.fsync(stream.fileno())
        made.replace(target)


def _open(target: Path) -> ctypes.CDLL:
    """Load what this user compiled, and nobody else.

    Raises:
        OSError: it is no library; PermissionError: somebody else could have put it there.
    """
    for path in (target.parent, target):
        state = path.stat()
        if state.st_uid != os.getuid() or state.st_mode & 0o022:
            raise PermissionError(f"{path} belongs to others or can be written by them; remove it")
    return ctypes.CDLL(str(target))


def _run(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS
    ).stdout


def _processor() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("model name", "flags", "Features", "CPU")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(told)))
