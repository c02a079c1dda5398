"""A Hugging Face folder becomes one of our checkpoints, one tensor at a time.

Every name, shape and dtype is compared from the files' headers before anything is written.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.huggingface.base import Entry, is_ignorable, padded_rows
from gptoughts.checkpoint.huggingface.formats import CONFIG_FILE, Published, read_published
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
from gptoughts.checkpoint.huggingface.tensor_files import CONVERTIBLE, TensorFolder, plan_files
from gptoughts.checkpoint.identity import model_identity
from gptoughts.checkpoint.safetensors_file import TensorHeader, write_file
from gptoughts.config.cli import to_yaml
from gptoughts.config.experiment import ExperimentConfig, TrainConfig
from gptoughts.errors import CheckpointError

_PRECISIONS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_MOST_LISTED = 4
_EMBEDDING, _OUTPUT_LAYER = "model.embed_tokens.weight", "lm_head.weight"


def import_model(
    source: Path,
    output: Path,
    *,
    dequantized: str = "BF16",
    max_file_bytes: int = MAX_FILE_BYTES,
    check: Check | None = None,
) -> Conversion:
    """Make a run folder with one checkpoint, ``checkpoints/step_00000000``, from a Hugging Face folder.

    Args:
        source: Folder with config.json and safetensors.
        output: Run folder to make.
        dequantized: safetensors' name of the dtype that FP8 matrices are written in.
        max_file_bytes: Weights are divided over files of about this size.
        check: Looks at the finished folder before it gets its name.
    Raises:
        CheckpointError: every problem of the source; nothing is written.
        ConfigError: a check for a format that transformers has no class for.
    """
    published = read_published(source)
    refuse_check(published, check)
    folder = TensorFolder(source, published.quantization, dequantized)
    entries = published.format.entries(published.model)
    problems = import_problems(folder, entries)
    if not (source / layout.TOKENIZER).is_file():
        problems.append(f"{source / layout.TOKENIZER}: missing; save the tokenizer with AutoTokenizer.save_pretrained")
    if problems:
        raise CheckpointError(problems)
    by_name = {entry.ours: entry for entry in entries}
    headers = [TensorHeader(e.ours, folder.headers[next(iter(e.theirs))].dtype, e.our_shape) for e in entries]
    stored = headers[0].dtype if published.quantization is None else dequantized
    config = _imported_config(published, stored, output)
    with new_folder(output) as partial, progress("importing", headers) as written:
        checkpoint = layout.step_folder(partial, 0)
        checkpoint.mkdir(parents=True)
        for number, part in enumerate(plan_files(headers, max_file_bytes)):
            flat = [_stored(header, by_name[header.name].kind) for header in part]
            table = {stored.name: [list(h.shape), None, 1] for stored, h in zip(flat, part, strict=True)}

            def read(key: str) -> Iterator[Tensor]:
                entry = by_name[key.split("/", 2)[2]]
                for names in entry.sources():  # experts one by one: a layer's are many gigabytes
                    yield entry.transform.join([folder.read(name) for name in names])

            metadata = {"tensor_rank": "0", "tensor_size": "1", "fragments": json.dumps(table)}
            write_file(checkpoint / f"weights_{number:05d}.safetensors", flat, read, metadata=metadata, written=written)
        _finish_checkpoint(checkpoint, source, config, published, entries)
        (partial / layout.CONFIG).write_text(to_yaml(config), encoding="utf-8")
        if check is not None:
            check(partial)
    return conversion(output, published, entries, len(list(layout.step_folder(output, 0).glob("weights_*"))))


def import_problems(folder: TensorFolder, entries: Sequence[Entry]) -> list[str]:
    """Every unknown, missing, wrong-shaped or unreadable tensor, by name."""
    problems = list(folder.problems)
    expected = {name: shape for entry in entries for name, shape in entry.theirs.items()}
    for name, shape in expected.items():
        found = folder.headers.get(name)
        if found is None:
            problems.append(f"{name}: missing, shape {shape} expected")
        elif found.shape != shape:
            problems.append(f"{name}: shape {found.shape}, {shape} expected")
        elif found.dtype not in CONVERTIBLE:
            problems.append(f"{name}: dtype {found.dtype}; allowed: {', '.join(CONVERTIBLE)}")
    copies = {copy: next(iter(entry.theirs)) for entry in entries for copy in entry.copies}
    for name in folder.headers:
        if name == _OUTPUT_LAYER and name not in expected:
            problems += _copy_problem(folder, name, _EMBEDDING, "although tie_word_embeddings=true")
        elif name in copies:
            problems += _copy_problem(folder, name, copies[name], "which multi-token prediction shares here")
        elif name not in expected and not is_ignorable(name):
            problems.append(f"{name}: unknown to this format")
    for entry in entries:
        dtypes = {folder.headers[name].dtype for name in entry.theirs if name in folder.headers}
        if len(dtypes) > 1:
            names = list(entry.theirs)
            listed = ", ".join(names) if len(names) <= _MOST_LISTED else f"{names[0]} ... {names[-1]}"
            problems.append(f"{listed}: differ in dtype ({', '.join(sorted(dtypes))})")
    return problems


def _copy_problem(folder: TensorFolder, name: str, original: str, why: str) -> list[str]:
    if original in folder.headers and not torch.equal(folder.read(name), folder.read(original)):
        return [f"{name}: is not equal to {original}, {why}"]
    return []


def _stored(header: TensorHeader, kind: str) -> TensorHeader:
    """As a checkpoint's file holds it: flat, under kind, offset and name."""
    return TensorHeader(f"{kind}/0/{header.name}", header.dtype, (math.prod(header.shape),))


def _imported_config(published: Published, dtype: str, output: Path) -> ExperimentConfig:
    return ExperimentConfig(
        model_type=published.format.family,
        block_size=published.model.seq_length,
        output_dir=str(output),
        model=published.model,
        train=TrainConfig(precision=_PRECISIONS[dtype]),  # type: ignore[arg-type]
    )


def _carry_dequantized_config(source: Path, target: Path, config: ExperimentConfig) -> None:
    """The carried config.json describes what an export will hold: no FP8."""
    text = json.loads(source.read_text(encoding="utf-8"))
    del text["quantization_config"]
    for name in ("dtype", "torch_dtype"):
        if name in text:
            text[name] = _TORCH_NAMES[str(config.train.precision)]
    target.write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _finish_checkpoint(
    checkpoint: Path, source: Path, config: ExperimentConfig, published: Published, entries: Sequence[Entry]
) -> None:
    """Everything but the weights, the manifest last."""
    (checkpoint / CARRIED_FOLDER).mkdir()
    for name in CARRIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, checkpoint / CARRIED_FOLDER / name)
    if published.quantization is not None:
        _carry_dequantized_config(source / CONFIG_FILE, checkpoint / CARRIED_FOLDER / CONFIG_FILE, config)
    for name in (layout.TOKENIZER, layout.TOKENIZER_CONFIG):
        if (source / name).is_file():
            shutil.copyfile(source / name, checkpoint / name)
    (checkpoint / layout.CONFIG).write_text(to_yaml(config), encoding="utf-8")
    state = {"step": 0, "consumed_samples": 0, "consumed_tokens": 0}
    (checkpoint / layout.TRAIN_STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    records = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        layout.sync_file(path)
        records[path.relative_to(checkpoint).as_posix()] = layout.FileRecord.of(path)
    origin = {"format": published.format.model_type, "padded_rows": padded_rows(entries)}
    header = {"step": 0, "world_size": 1, "model": model_identity(config), layout.WEIGHTS_ONLY: True, "origin": origin}
    layout.write_manifest(checkpoint, records, header)
    layout.write_atomically(checkpoint.parent / layout.LATEST, checkpoint.name + "\n")
