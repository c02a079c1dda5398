"""The output of preprocessing: one or two corpora with their sidecars, and the journal of an unfinished run."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gptoughts.data.encoding import EncodedTask, EncodeSettings, Task
from gptoughts.data.files import write_json
from gptoughts.data.indexed import IndexedWriter, bin_path, index_path, optimal_dtype, read_sidecar, sidecar_path
from gptoughts.data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer
from gptoughts.errors import DataError

SIDECAR_VERSION = 1
_SYNC_SECONDS = 20.0


@dataclass
class SplitState:
    """How far one output corpus has come."""

    num_tokens: int = 0
    num_documents: int = 0
    text_bytes: int = 0
    max_token_id: int = -1


@dataclass
class OutputProgress:
    """What the journal says: everything that a later run needs to go on."""

    fingerprint: str
    num_tasks: int = 0
    num_empty: int = 0
    num_not_utf8: int = 0
    splits: dict[str, SplitState] = field(default_factory=dict)


class CorpusOutput:
    """The output corpora of one call and their journal."""

    def __init__(self, prefix: str, settings: EncodeSettings, tokenizer: Tokenizer, fingerprint: str) -> None:
        self.prefix = prefix
        self.settings = settings
        self.tokenizer = tokenizer
        self.journal = Path(f"{prefix}.journal")
        self.dtype = optimal_dtype(tokenizer.vocab_size)
        self.prefixes = {"train": f"{prefix}_train", "valid": f"{prefix}_valid"}
        if not settings.validation_fraction:
            self.prefixes = {"train": prefix}
        self.progress = self._resume(fingerprint) or OutputProgress(
            fingerprint, splits={name: SplitState() for name in self.prefixes}
        )
        self.writers = {
            name: IndexedWriter(
                self.prefixes[name], self.dtype, num_tokens=state.num_tokens, num_documents=state.num_documents
            )
            for name, state in self.progress.splits.items()
        }
        self._synced_at = time.monotonic()

    def _resume(self, fingerprint: str) -> OutputProgress | None:
        try:
            journal = json.loads(self.journal.read_text())
        except (OSError, ValueError):
            return None
        if journal.get("fingerprint") != fingerprint:
            return None
        journal["splits"] = {name: SplitState(**state) for name, state in journal["splits"].items()}
        progress = OutputProgress(**journal)
        can_resume = all(
            IndexedWriter.can_resume(
                self.prefixes[name], self.dtype, num_tokens=state.num_tokens, num_documents=state.num_documents
            )
            for name, state in progress.splits.items()
        )
        return progress if can_resume else None

    def add(self, task: Task, encoded: EncodedTask) -> None:
        for name, part in encoded.splits.items():
            self.writers[name].add(part.tokens, part.lengths, is_continued=not task.is_start)
            state = self.progress.splits[name]
            state.text_bytes += part.text_bytes
            state.max_token_id = max(state.max_token_id, part.max_token_id)
        self.progress.num_tasks += 1
        self.progress.num_empty += encoded.num_empty
        self.progress.num_not_utf8 += encoded.num_not_utf8
        if task.is_end and time.monotonic() - self._synced_at > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        for name, writer in self.writers.items():
            writer.sync()
            state = self.progress.splits[name]
            state.num_tokens, state.num_documents = writer.num_tokens, writer.num_documents
        write_json(self.journal, asdict(self.progress))
        self._synced_at = time.monotonic()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()

    def discard(self) -> None:
        """Leave nothing behind."""
        for writer in self.writers.values():
            writer.discard()
        self.journal.unlink(missing_ok=True)

    def finish(self) -> None:
        """Name the files; each sidecar comes last and marks its corpus as complete."""
        empty = [name for name, writer in self.writers.items() if writer.num_documents == 0]
        if empty:
            reason = self._why_empty(empty)
            self.discard()
            raise DataError(reason)
        self.sync()
        folder = Path(f"{self.prefix}_tokenizer")
        folder.mkdir(exist_ok=True)
        for name in (TOKENIZER_CONFIG_FILE, TOKENIZER_FILE):
            source = self.tokenizer.file if name == TOKENIZER_FILE else self.tokenizer.file.parent / name
            if source.is_file() and source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
        for name, writer in self.writers.items():
            writer.finish()
            write_json(sidecar_path(self.prefixes[name]), self._sidecar(name, folder.name))
        self.journal.unlink(missing_ok=True)

    def _why_empty(self, empty: list[str]) -> str:
        total = sum(writer.num_documents for writer in self.writers.values())
        if total == 0:
            return "the input holds no text: no document has a token"
        return (
            f"validation_fraction={self.settings.validation_fraction}: no document fell into the {empty[0]} split, "
            f"there are only {total}; use another fraction or --seed, or give more and shorter documents"
        )

    def _sidecar(self, name: str, tokenizer_folder: str) -> dict[str, Any]:
        prefix, state = self.prefixes[name], self.progress.splits[name]
        return {
            "version": SIDECAR_VERSION,
            "split": name if self.settings.validation_fraction else "all",
            "tokenizer": tokenizer_folder,
            "tokenizer_source": str(self.tokenizer.file.resolve()),
            "vocab_size": self.tokenizer.vocab_size,
            "eod_id": self.tokenizer.eod_id,
            "has_eod": self.settings.append_eod,
            "num_tokens": state.num_tokens,
            "num_documents": state.num_documents,
            "text_bytes": state.text_bytes,
            "max_token_id": state.max_token_id,
            "bin_bytes": os.path.getsize(bin_path(prefix)),
            "idx_bytes": os.path.getsize(index_path(prefix)),
            "fingerprint": self.progress.fingerprint,
        }


def _is_interrupted_run(journal: Path, fingerprint: str) -> bool:
    try:
        return json.loads(journal.read_text()).get("fingerprint") == fingerprint
    except (OSError, ValueError):
        return False


def is_up_to_date(prefix: str, names: Sequence[str], fingerprint: str, *, overwrite: bool) -> bool:
    """Whether the same corpus is there already.

    Raises:
        DataError: Another one is there, and it may not be replaced.
    """
    sidecars = {
        written: read_sidecar(written) for written in (f"{prefix}_{name}" if name else prefix for name in names)
    }
    is_same = all(
        sidecar is not None
        and sidecar.get("fingerprint") == fingerprint
        and os.path.isfile(bin_path(written))
        and os.path.getsize(bin_path(written)) == sidecar.get("bin_bytes")
        and os.path.isfile(index_path(written))
        and os.path.getsize(index_path(written)) == sidecar.get("idx_bytes")
        for written, sidecar in sidecars.items()
    )
    if is_same or overwrite:
        return is_same
    is_ours = _is_interrupted_run(Path(f"{prefix}.journal"), fingerprint)
    for written, sidecar in sidecars.items():
        is_other = sidecar is None and os.path.isfile(index_path(written)) and not is_ours
        if is_other or (sidecar is not None and sidecar.get("fingerprint") != fingerprint):
            raise DataError(
                f"output_prefix: {written}.idx was made from other inputs, tokenizer or settings; "
                "--overwrite replaces it, or choose another --output_prefix"
            )
    return False
