"""One of our checkpoints becomes a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.huggingface.base import Entry
from gptoughts.checkpoint.huggingface.deepseek import MTP_FIELD
from gptoughts.checkpoint.huggingface.formats import CONFIG_FILE, Published, format_for, understand
from gptoughts.checkpoint.huggingface.output import (
    CARRIED_FILES,
    CARRIED_FOLDER,
    MAX_FILE_BYTES,
    Check,
    Conversion,
    conversion,
    new_folder,
    progress,
    refuse_check,
)
from gptoughts.checkpoint.huggingface.tensor_files import write_folder
from gptoughts.checkpoint.portable import BUFFER, WEIGHT, CheckpointReader
from gptoughts.checkpoint.safetensors_file import DTYPES, NAMES, TensorHeader
from gptoughts.config.cli import from_yaml
from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.fp8 import is_fp8_state
from gptoughts.data.tokenizer import load_tokenizer
from gptoughts.errors import CheckpointError
from gptoughts.models.registry import FAMILIES

_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def export_model(
    source: Path,
    output: Path,
    *,
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    check: Check | None = None,
) -> Conversion:
    """Make a Hugging Face folder from a run's newest checkpoint, or from one.

    Args:
        source: A run or a checkpoint.
        output: Folder to make.
        dtype: safetensors' name of the dtype to write (rounding to nearest); unset: as stored.
        max_file_bytes: Weights are divided over files of about this size.
        check: Looks at the finished folder before it gets its name.
    Raises:
        CheckpointError: no good checkpoint, or no format that holds its model; nothing is written.
        ConfigError: a check for a format that transformers has no class for.
    """
    checkpoint = layout.locate(source)
    layout.check_files(checkpoint)
    config = from_yaml((checkpoint / layout.CONFIG).read_text(encoding="utf-8"), FAMILIES, label=str(checkpoint))
    reader = CheckpointReader(checkpoint)
    published, text = _exported_config(checkpoint, config, dtype)
    refuse_check(published, check)
    entries = published.format.entries(published.model)
    problems = export_problems(reader, entries)
    if problems:
        raise CheckpointError(problems)
    headers = [
        TensorHeader(their, _written_dtype(reader, entry, dtype), shape)
        for entry in entries
        for their, shape in entry.published().items()
    ]
    read = _published_reader(reader, entries, dtype)
    with new_folder(output) as partial, progress("exporting", headers) as written:
        num_files = write_folder(partial, headers, read, max_file_bytes=max_file_bytes, written=written)
        _finish_published(partial, checkpoint, text | {"dtype": _TORCH_NAMES[headers[0].dtype]} if text else None)
        if check is not None:
            check(partial)
    return conversion(output, published, entries, num_files)


def _written_dtype(reader: CheckpointReader, entry: Entry, dtype: str | None) -> str:
    return dtype if dtype is not None and entry.kind == WEIGHT else NAMES[reader.dtype(entry.ours, entry.kind)]


def _published_reader(
    reader: CheckpointReader, entries: Sequence[Entry], dtype: str | None
) -> Callable[[str], list[Tensor]]:
    """Published tensors by name, each asked for once; those made of one of ours (of one expert) follow each other."""
    origin = {
        their: (entry, None if entry.slices is None else number, names)
        for entry in entries
        for number, names in enumerate(entry.sources())
        for their in (*names, *(entry.copies if number == 0 else ()))
    }
    cache: dict[str, Tensor] = {}

    def read(name: str) -> list[Tensor]:
        entry, number, names = origin[name]
        if name not in cache:
            cache.clear()
            ours = reader.full(entry.ours, entry.kind, number)
            cache.update(zip(names, entry.transform.split(ours), strict=True))
            cache.update(dict.fromkeys(entry.copies, cache[names[0]]))
        return [cache.pop(name).to(DTYPES[_written_dtype(reader, entry, dtype)])]

    return read


def export_problems(reader: CheckpointReader, entries: Sequence[Entry]) -> list[str]:
    """Every unknown, missing or wrong-shaped tensor of a checkpoint, by name."""
    expected = {(entry.ours, entry.kind): entry.our_shape for entry in entries}
    # How the run was trained is no part of the model.
    found = {(name, kind) for kind in (WEIGHT, BUFFER) for name in reader.names(kind) if not is_fp8_state(name)}
    problems = [f"{name}: unknown to this format" for name, _ in sorted(found - expected.keys())]
    for (name, kind), shape in expected.items():
        if (name, kind) not in found:
            problems.append(f"{name}: missing, shape {shape} expected")
        elif (there := reader.describe(name, kind).full_shape) != shape:
            problems.append(f"{name}: shape {there}, {shape} expected")
    return problems


def _exported_config(
    checkpoint: Path, config: ExperimentConfig, dtype: str | None
) -> tuple[Published, dict[str, Any] | None]:
    """The format to write, and what config.json says; None: the one that came along, as it is."""
    came_along = checkpoint / CARRIED_FOLDER / CONFIG_FILE
    if came_along.is_file():
        text = json.loads(came_along.read_text(encoding="utf-8"))
        text.pop("torch_dtype", None)  # what transformers 4 called dtype
        depths = {MTP_FIELD: getattr(config.model, "mtp_num_layers", 0)} if text.get(MTP_FIELD) else {}
        return understand(text | depths, text.get("model_type"), str(came_along)), None if dtype is None else text
    chosen = format_for(config.model_type, config.model)
    # Unset, transformers takes ids of Llama 2's vocabulary.
    ends: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if (checkpoint / layout.TOKENIZER).is_file():
        ends["eos_token_id"] = load_tokenizer(checkpoint / layout.TOKENIZER).eod_id
    start = {"architectures": [chosen.architecture], "model_type": chosen.model_type}
    return Published(chosen, config.model), start | chosen.write(config.model) | ends


def _finish_published(partial: Path, checkpoint: Path, config: dict[str, Any] | None) -> None:
    """Configuration, tokenizer and whatever else came along."""
    for folder in (checkpoint, checkpoint / CARRIED_FOLDER):
        for name in CARRIED_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
    if config is not None:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (partial / CONFIG_FILE).write_text(text, encoding="utf-8")
    tokenizer_config = partial / layout.TOKENIZER_CONFIG
    if (partial / layout.TOKENIZER).is_file() and not tokenizer_config.is_file():
        tokenizer_config.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n', encoding="utf-8")
    for path in partial.iterdir():
        layout.sync_file(path)
