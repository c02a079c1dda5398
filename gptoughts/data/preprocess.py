"""Turn text into megatron-core indexed corpora (``tools/preprocess_data.py``).

The inputs are cut into tasks, worker processes tokenize them, and one process writes the results in order, so that
the output does not depend on the number of workers. An interrupted run goes on where it was: every so many seconds
the partial files are synced and ``PREFIX.journal`` says how many tasks they hold.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jsonargparse
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gptoughts.data.documents import Inputs, find_inputs
from gptoughts.data.encoding import EncodedTask, EncodeSettings, Task, encode_task, make_tasks, prepare_worker
from gptoughts.data.files import write_json
from gptoughts.data.indexed import IndexedWriter, bin_path, index_path, optimal_dtype, read_sidecar, sidecar_path
from gptoughts.data.options import add_input_arguments
from gptoughts.data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer, load_tokenizer
from gptoughts.errors import ConfigError, DataError

SIDECAR_VERSION = 1
_SYNC_SECONDS = 20.0
_TASKS_IN_FLIGHT_PER_WORKER = 4


@dataclass
class _SplitState:
    """How far one output corpus has come."""

    num_tokens: int = 0
    num_documents: int = 0
    text_bytes: int = 0
    max_token_id: int = -1


@dataclass
class _Progress:
    """What the journal says: everything that a later run needs to go on."""

    fingerprint: str
    num_tasks: int = 0
    num_empty: int = 0
    num_not_utf8: int = 0
    splits: dict[str, _SplitState] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What one call wrote."""

    num_tokens: dict[str, int]
    num_documents: dict[str, int]
    text_bytes: int
    num_empty: int
    num_not_utf8: int
    seconds: float


def _fingerprint(inputs: Inputs, settings: EncodeSettings) -> str:
    """Identifies inputs and settings; a run with the same one would write the same corpus."""
    files = [(file.path, file.num_bytes, os.stat(file.path).st_mtime_ns) for file in inputs.files]
    content = asdict(settings) | {"files": files, "version": SIDECAR_VERSION}
    content["tokenizer"] = blake2b(Path(settings.tokenizer).read_bytes(), digest_size=16).hexdigest()
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _encoded(tasks: Iterator[Task], settings: EncodeSettings, workers: int) -> Iterator[tuple[Task, EncodedTask]]:
    """Results in the order of the tasks, with a bounded number of them in flight."""
    if workers == 1:
        for task in tasks:
            yield task, encode_task(task, settings)
        return
    waiting: deque[tuple[Task, Future[EncodedTask]]] = deque()
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=prepare_worker, initargs=(settings.tokenizer,)
    ) as pool:
        try:
            for task in tasks:
                waiting.append((task, pool.submit(encode_task, task, settings)))
                if len(waiting) >= workers * _TASKS_IN_FLIGHT_PER_WORKER:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process ended abruptly (out of memory?); try fewer --workers; running the same command "
                "again goes on where this one was"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Output:
    """The output corpora of one call and their journal."""

    def __init__(self, prefix: str, settings: EncodeSettings, tokenizer: Tokenizer, fingerprint: str) -> None:
        self.prefix = prefix
        self.settings = settings
        self.tokenizer = tokenizer
        self.journal = Path(f"{prefix}.journal")
        self.dtype = optimal_dtype(tokenizer.vocab_size)
        names = ("train", "valid") if settings.validation_fraction else ("train",)
        self.prefixes = {name: f"{prefix}_{name}" if settings.validation_fraction else prefix for name in names}
        self.progress = self._resume(fingerprint) or _Progress(fingerprint, splits={n: _SplitState() for n in names})
        self.writers = {
            name: IndexedWriter(
                self.prefixes[name], self.dtype, num_tokens=state.num_tokens, num_documents=state.num_documents
            )
            for name, state in self.progress.splits.items()
        }
        self._synced_at = time.monotonic()

    def _resume(self, fingerprint: str) -> _Progress | None:
        try:
            journal = json.loads(self.journal.read_text())
        except (OSError, ValueError):
            return None
        if journal.get("fingerprint") != fingerprint:
            return None
        journal["splits"] = {name: _SplitState(**state) for name, state in journal["splits"].items()}
        progress = _Progress(**journal)
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

    def finish(self) -> None:
        """Name the files; each sidecar comes last and marks its corpus as complete."""
        empty = [name for name, writer in self.writers.items() if writer.num_documents == 0]
        if empty:
            self.close()
            raise DataError(self._why_empty(empty))
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


def _is_up_to_date(prefix: str, names: Sequence[str], fingerprint: str, *, overwrite: bool) -> bool:
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


def preprocess(
    inputs: Inputs, settings: EncodeSettings, *, prefix: str, workers: int, overwrite: bool = False
) -> Summary | None:
    """Write the corpus, or corpora, for ``prefix``; None where it was there already.

    Raises:
        DataError: Unreadable input, no text in it, or another corpus is in the way.
    """
    started = time.perf_counter()
    tokenizer = load_tokenizer(settings.tokenizer)
    if settings.append_eod and tokenizer.eod_id is None:
        raise DataError(
            f"tokenizer {settings.tokenizer!r}: no end-of-document token for --append_eod; "
            "name it as eos_token in a tokenizer_config.json beside it"
        )
    fingerprint = _fingerprint(inputs, settings)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    names = ("train", "valid") if settings.validation_fraction else ("",)
    if _is_up_to_date(prefix, names, fingerprint, overwrite=overwrite):
        return None
    output = _Output(prefix, settings, tokenizer, fingerprint)
    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%  {task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, transient=True) as bar:
            shown = bar.add_task("", total=inputs.num_bytes, speed="")
            tasks = make_tasks(inputs, settings)
            bar.advance(shown, sum(task.num_input_bytes for task in islice(tasks, output.progress.num_tasks)))
            for task, encoded in _encoded(tasks, settings, workers):
                output.add(task, encoded)
                done = sum(state.text_bytes for state in output.progress.splits.values())
                speed = f"{done / 1e6 / (time.perf_counter() - started):.1f} MB/s"
                bar.update(shown, advance=task.num_input_bytes, speed=speed)
    except BaseException:
        output.close()
        raise
    output.finish()
    splits = output.progress.splits
    return Summary(
        num_tokens={name: state.num_tokens for name, state in splits.items()},
        num_documents={name: state.num_documents for name, state in splits.items()},
        text_bytes=sum(state.text_bytes for state in splits.values()),
        num_empty=output.progress.num_empty,
        num_not_utf8=output.progress.num_not_utf8,
        seconds=time.perf_counter() - started,
    )


def build_parser() -> jsonargparse.ArgumentParser:
    """The command line of ``tools/preprocess_data.py``."""
    parser = jsonargparse.ArgumentParser(
        prog="preprocess_data.py",
        description="Turn text into a corpus for training: PREFIX.bin, PREFIX.idx, PREFIX.json.",
    )
    add_input_arguments(parser)
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="tokenizer.json or a folder with one")
    parser.add_argument("--output_prefix", required=True, metavar="PREFIX", help="path of the corpus without .bin/.idx")
    parser.add_argument("--append_eod", action="store_true", help="end every document with the end-of-document token")
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=0.0,
        help="hold out about this fraction of the documents: writes PREFIX_train and PREFIX_valid",
    )
    parser.add_argument("--seed", type=int, default=1234, help="chooses the documents that are held out")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenize")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that was made from something else")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``tools/preprocess_data.py``.

    Raises:
        ConfigError, DataError: The input or the options cannot be used.
    """
    options = build_parser().parse_args(argv)
    problems = []
    if not 0.0 <= options.validation_fraction < 1.0:
        problems.append(f"validation_fraction={options.validation_fraction}: at least 0 and below 1 expected")
    if options.workers < 1:
        problems.append(f"workers={options.workers}: at least 1 expected")
    if problems:
        raise ConfigError(problems)
    tokenizer = load_tokenizer(options.tokenizer)
    inputs = find_inputs(options.input, suffixes=options.suffix, exclude=options.exclude)
    settings = EncodeSettings(
        tokenizer=str(tokenizer.file),
        append_eod=options.append_eod,
        text_field=options.text_field,
        encoding_errors=options.encoding_errors,
        validation_fraction=options.validation_fraction,
        seed=options.seed,
    )
    summary = preprocess(
        inputs, settings, prefix=options.output_prefix, workers=options.workers, overwrite=options.overwrite
    )
    if summary is None:
        print(f"{options.output_prefix}: up to date, made from the same inputs, tokenizer and settings")
    else:
        _print_summary(summary, inputs, options.output_prefix)
    return 0


def _print_summary(summary: Summary, inputs: Inputs, prefix: str) -> None:
    for name, num_tokens in summary.num_tokens.items():
        written = f"{prefix}_{name}" if len(summary.num_tokens) > 1 else prefix
        print(f"{written}: {num_tokens:,} tokens in {summary.num_documents[name]:,} documents")
    left_out = {
        "empty documents left out": summary.num_empty,
        "files that are not text left out": inputs.num_binary_files,
        "files that are not UTF-8 (see --encoding_errors)": summary.num_not_utf8,
    }
    for what, count in left_out.items():
        if count:
            print(f"  {count:,} {what}")
    print(f"  {summary.text_bytes / 1e6:.1f} MB of text in {summary.seconds:.1f} s")
