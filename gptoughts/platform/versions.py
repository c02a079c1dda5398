"""Installed versions of the libraries that this package joins, and the range of megatron-core that it supports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from gptoughts.errors import PlatformError

MCORE_VERSION_RANGE = ("0.16.1", "0.20")
"""First supported megatron-core, and the first that is not."""


def version_tuple(text: str) -> tuple[int, ...]:
    """Leading integers of a version: ``"0.16.1rc2+cpu"`` gives ``(0, 16, 1)``."""
    numbers: list[int] = []
    for part in text.split("+")[0].split("."):
        digits = ""
        for character in part:
            if not character.isdigit():
                break
            digits += character
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def installed_version(package: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def megatron_core_version() -> str:
    """Version of megatron-core.

    Raises:
        PlatformError: it is not installed, or outside the supported range.
    """
    found = installed_version("megatron-core")
    first, end = MCORE_VERSION_RANGE
    if found is None:
        raise PlatformError(f"megatron-core is not installed; supported: >= {first}, < {end}")
    if not version_tuple(first) <= version_tuple(found) < version_tuple(end):
        raise PlatformError(f"megatron-core {found} is installed; supported: >= {first}, < {end}")
    return found
