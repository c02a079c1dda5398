"""What is inside a checkpoint, and where two differ (``tools/inspect_checkpoint.py``); reads a tensor at a time."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.portable import KINDS, CheckpointReader
from gptoughts.errors import CheckpointError

Found = TypeVar("Found")

_DIFFERENT_STATUS = 1
_FILE_WIDTH = 160
"""Columns where the output is no terminal."""


def overview(reader: CheckpointReader) -> dict[str, Any]:
    """What a checkpoint holds, JSON-able.

    Raises:
        CheckpointError: its state or configuration cannot be read.
    """
    state_file, config_file = reader.folder / layout.TRAIN_STATE, reader.folder / layout.CONFIG
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{reader.folder}: {layout.TRAIN_STATE} or {layout.CONFIG}: {error}") from None
    kinds = {}
    for kind in KINDS:
        numels = {name: reader.describe(name, kind).numel for name in reader.names(kind)}
        if numels:
            dtypes = {str(reader.dtype(name, kind)).removeprefix("torch.") for name in numels}
            kinds[kind] = {"tensors": len(numels), "elements": sum(numels.values()), "dtypes": sorted(dtypes)}
    return {
        "folder": str(reader.folder),
        "model_type": config.get("model_type"),
        "size": config.get("size"),
        "model": reader.manifest.get("model", {}),
        "world_size": reader.manifest.get("world_size"),
        "parallel": {key: value for key, value in (config.get("parallel") or {}).items() if isinstance(value, int)},
        "deepspeed_config": config.get("deepspeed_config"),
        "can_be_resumed": not reader.manifest.get(layout.WEIGHTS_ONLY, False),
        "train_state": state,
        "kinds": kinds,
        "files": {name: record["bytes"] for name, record in reader.manifest["files"].items()},
    }


def statistics(reader: CheckpointReader, name: str, kind: str) -> dict[str, float | int]:
    """Smallest, largest, root of the mean square (all of the finite elements), and how many are not finite."""
    tensor = reader.full(name, kind).flatten().double()
    finite = tensor[tensor.isfinite()]
    if not finite.numel():
        finite = torch.zeros(1, dtype=torch.float64)
    return {
        "min": finite.min().item(),
        "max": finite.max().item(),
        "rms": finite.square().mean().sqrt().item(),
        "not_finite": int(tensor.numel() - tensor.isfinite().sum()),
    }


def differences(first: CheckpointReader, second: CheckpointReader, pattern: str) -> list[dict[str, Any]]:
    """Every tensor that is not equal to the bit in both, the largest relative difference first."""
    found = []
    for kind in KINDS:
        names = sorted({*first.names(kind), *second.names(kind)})
        for name in track(_matching(names, pattern), f"compare {kind}", console=Console(stderr=True), transient=True):
            missing = [reader.folder for reader in (first, second) if name not in reader.names(kind)]
            if missing:
                found.append({"name": name, "kind": kind, "what": f"not in {missing[0]}", "relative": float("inf")})
                continue
            a, b = first.full(name, kind), second.full(name, kind)
            if a.shape != b.shape:
                what = f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
                found.append({"name": name, "kind": kind, "what": what, "relative": float("inf")})
            elif not torch.equal(a, b):
                largest = (a.double() - b.double()).abs().max().item()
                relative = largest / max(b.double().abs().max().item(), 1e-300)
                what = f"{int((a != b).sum()):,} of {a.numel():,} elements differ, by up to {largest:.3g}"
                found.append({"name": name, "kind": kind, "what": what, "relative": relative})
    return sorted(found, key=lambda entry: -entry["relative"])


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}" if unit != "bytes" else f"{num_bytes} bytes"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def _table(first: str, *others: str) -> Table:
    """Names in the first column stay whole."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column(first, overflow="fold", no_wrap=True)
    for title in others:
        table.add_column(title)
    return table


def _print_overview(found: Mapping[str, Any], console: Console) -> None:
    state = found["train_state"]
    console.print(f"{found['folder']}")
    console.print(f"{found['model_type']} {found['size']}, step {state.get('step')}")
    console.print(f"{state.get('consumed_samples', 0):,} samples, {state.get('consumed_tokens', 0):,} tokens consumed")
    layout_text = ", ".join(f"{key} {value}" for key, value in found["parallel"].items())
    console.print(
        f"written by {found['world_size']} rank(s): {layout_text}; DeepSpeed JSON {found['deepspeed_config']}"
    )
    if not found["can_be_resumed"]:
        console.print("weights only: start from it with --init_from; it cannot be resumed")
    table = _table("kind", "tensors", "elements", "dtype")
    for kind, entry in found["kinds"].items():
        table.add_row(kind, f"{entry['tensors']:,}", f"{entry['elements']:,}", ", ".join(entry["dtypes"]))
    console.print(table)
    table = _table("file", "size")
    for name, num_bytes in found["files"].items():
        table.add_row(name, _size(num_bytes))
    console.print(table)


def _tensor_rows(reader: CheckpointReader, kind: str, pattern: str, has_statistics: bool) -> list[dict[str, Any]]:
    rows = []
    names = _matching(reader.names(kind), pattern)
    if not names:
        raise CheckpointError(f"{reader.folder}: no {kind} has a name like {pattern!r}")
    for name in track(names, "read", console=Console(stderr=True), transient=True, disable=not has_statistics):
        saved = reader.describe(name, kind)
        dtype = str(reader.dtype(name, kind)).removeprefix("torch.")
        row = {"name": name, "shape": list(saved.full_shape), "dtype": dtype, "divided": saved.division}
        rows.append(row | (statistics(reader, name, kind) if has_statistics else {}))
    return rows


def _print_rows(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = _table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def _print_differences(found: Sequence[Mapping[str, Any]], console: Console) -> None:
    if not found:
        console.print("equal to the bit")
        return
    table = _table("name", "kind", "relative", "what")
    for entry in found:
        table.add_row(entry["name"], entry["kind"], f"{entry['relative']:.3g}", entry["what"])
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Print what a checkpoint holds, or where two checkpoints differ.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run (its newest checkpoint)")
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with its checksum")
    parser.add_argument("--tensors", action="store_true", help="list tensors: shape, dtype, how they were divided")
    parser.add_argument("--stats", action="store_true", help="with smallest, largest, rms, and how many are not finite")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="kind of the listed tensors (default: weight)")
    parser.add_argument("--match", metavar="PATTERN", default="*", help="only names like PATTERN, e.g. '*.layers.0.*'")
    parser.add_argument(
        "--compare", type=Path, metavar="OTHER", help="list what differs from another checkpoint; status 1 if anything"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """``tools/inspect_checkpoint.py``.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """
    arguments = _parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    folder = layout.locate(arguments.checkpoint)
    if arguments.verify:
        layout.check_files(folder)
    reader = CheckpointReader(folder)
    if arguments.compare is not None:
        different = differences(reader, CheckpointReader(layout.locate(arguments.compare)), arguments.match)
        _show(different, _print_differences, arguments.json, console)
        return _DIFFERENT_STATUS if different else 0
    if arguments.tensors or arguments.stats or arguments.match != "*":
        rows = _tensor_rows(reader, arguments.kind, arguments.match, arguments.stats)
        _show(rows, _print_rows, arguments.json, console)
    else:
        _show(overview(reader), _print_overview, arguments.json, console)
    if arguments.verify and not arguments.json:
        console.print(f"{folder}: every file is as it was written")
    return 0


def _show(found: Found, show: Callable[[Found, Console], None], is_json: bool, console: Console) -> None:
    if is_json:
        print(json.dumps(found, indent=2))
    else:
        show(found, console)
