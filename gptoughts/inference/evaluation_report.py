"""Results of an evaluation for people and programs: a table, and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gptoughts.checkpoint.layout import write_atomically
from gptoughts.inference.evaluation import CorpusResult
from gptoughts.inference.evaluation_tasks import TaskResults


def corpora_as_json(results: Sequence[CorpusResult]) -> list[dict[str, Any]]:
    """One object per corpus; what cannot be said is null."""
    return [
        {
            "data": found.prefix,
            "num_texts": found.num_texts,
            "num_tokens": found.num_tokens,
            "num_bytes": found.num_bytes,
            "nats_per_token": found.nats_per_token,
            "nats_per_token_standard_error": found.standard_error,
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte,
            "bits_per_byte_standard_error": found.bits_per_byte_standard_error,
        }
        for found in results
    ]


def corpora_table(results: Sequence[CorpusResult], *, measure: str, unit: str) -> Table:
    """One line per corpus.

    Args:
        results: What was found.
        measure: What the figures are, in words.
        unit: What a text is: rows or documents.
    """
    table = Table(box=SIMPLE_HEAD, title=measure, title_justify="left")
    table.add_column("corpus", overflow="fold")
    for title in (unit, "tokens", "nats per token", "perplexity", "bits per byte"):
        table.add_column(title, justify="right")
    for found in results:
        table.add_row(
            found.prefix,
            f"{found.num_texts:,}",
            f"{found.num_tokens:,}",
            _with_error(found.nats_per_token, found.standard_error),
            f"{found.perplexity:,.3f}",
            _with_error(found.bits_per_byte, found.bits_per_byte_standard_error),
        )
    return table


def tasks_table(results: TaskResults) -> Table:
    """One line per task and metric."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("task", overflow="fold")
    for title in ("questions", "shots", "filter", "metric"):
        table.add_column(title)
    table.add_column("value", justify="right")
    for found in results.metrics:
        table.add_row(
            found.task,
            "-" if found.num_questions is None else f"{found.num_questions:,}",
            "-" if found.num_fewshot is None else str(found.num_fewshot),
            found.filter,
            found.metric,
            _with_error(found.value, found.standard_error),
        )
    return table


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f} ± {error:.4f}" if error else f"{value:.4f}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace the file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
