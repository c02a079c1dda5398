"""Writes matplotlib's figures whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gptoughts.errors import DataError


def save_figure(figure: Any, output: Path, *, dpi: int) -> Path:
    """Write a figure as PNG under a temporary name, rename it, and close it; returns ``output``.

    Raises:
        DataError: the file cannot be written.
    """
    from matplotlib import pyplot

    temporary = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, dpi=dpi, format="png")
        os.replace(temporary, output)
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)
    return output
