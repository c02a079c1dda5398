"""Where a conversion writes: a folder that appears whole or not at all, with a progress bar on the way."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.huggingface.base import Entry, padded_rows
from gptoughts.checkpoint.huggingface.formats import CONFIG_FILE, Published
from gptoughts.checkpoint.safetensors_file import TensorHeader
from gptoughts.errors import CheckpointError, ConfigError

MAX_FILE_BYTES = 5_000_000_000
CARRIED_FOLDER = "huggingface"
"""Subfolder of a checkpoint with the files that came along."""
CARRIED_FILES = (
    CONFIG_FILE, "generation_config.json", layout.TOKENIZER, layout.TOKENIZER_CONFIG, "tokenizer.model", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "configuration_llada.py", "modeling_llada.py",
)  # fmt: skip
"""What is carried along as it is, where a folder has it."""

Check = Callable[[Path], None]
"""Looks at the finished folder before it gets its name; raises to keep it from getting it."""


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    folder: Path
    format: str
    num_parameters: int
    num_files: int
    padded_rows: int
    """Rows of the vocabulary that were added (or left out, on the way back)."""


def refuse_check(published: Published, check: Check | None) -> None:
    """Raise ConfigError where a check is wanted that needs a class which transformers lacks."""
    if check is not None and not published.format.is_in_transformers:
        raise ConfigError(
            f"verify (command line): transformers has no class for model_type={published.format.model_type}, and code "
            "that comes with a model is not run; leave it out"
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A ``.partial`` folder that becomes ``output`` if all goes well, and vanishes if not."""
    if output.exists():
        raise CheckpointError(f"output={output}: exists already; name a new folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = layout.start_partial(output)
    except OSError as error:
        raise CheckpointError(f"output={output}: cannot be written: {error.strerror}") from None
    try:
        yield partial
        layout.sync_file(partial)
        partial.rename(output)
        layout.sync_file(output.parent)
    except OSError as error:
        raise CheckpointError(f"output={output}: cannot be written: {error.strerror}; nothing was kept") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def progress(what: str, headers: Sequence[TensorHeader]) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of ``headers``; gives what is to be told of each tensor's bytes."""
    columns = (TextColumn(what), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=sum(header.num_bytes for header in headers))
        yield lambda num_bytes: bar.advance(task, num_bytes)


def conversion(output: Path, published: Published, entries: Sequence[Entry], num_files: int) -> Conversion:
    """What was written; parameters as they are published, each once, without padding, copies and routers' biases."""
    shapes = [shape for entry in entries if entry.kind == "weight" for shape in entry.theirs.values()]
    total = sum(math.prod(shape) for shape in shapes)
    return Conversion(output, published.format.model_type, total, num_files, padded_rows(entries))
