"""Turn text into megatron-core indexed corpora (``tools/preprocess_data.py``).

The inputs are cut into tasks, worker processes tokenize them, and one process writes the results in order, so that
the output does not depend on the number of workers. An interrupted run goes on where it was: every so many seconds
the partial files are synced and ``PREFIX.journal`` says how many tasks they hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path

import jsonargparse
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gptoughts.data.documents import Inputs, find_inputs
from gptoughts.data.encoding import EncodedTask, EncodeSettings, Task, encode_task, make_tasks, prepare_worker
from gptoughts.data.options import add_input_arguments
from gptoughts.data.output import SIDECAR_VERSION, CorpusOutput, is_up_to_date
from gptoughts.data.tokenizer import load_tokenizer
from gptoughts.errors import ConfigError, DataError

_TASKS_IN_FLIGHT_PER_WORKER = 4
_INTERRUPTED_STATUS = 130


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
    files = [(os.path.abspath(file.path), file.num_bytes, os.stat(file.path).st_mtime_ns) for file in inputs.files]
    content = asdict(settings) | {"files": files, "version": SIDECAR_VERSION}
    content["tokenizer"] = blake2b(Path(settings.tokenizer).read_bytes(), digest_size=16).hexdigest()
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _sigint_held() -> Iterator[None]:
    """Ctrl-C waits, and processes started meanwhile never see one: they would print tracebacks while they import."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _encoded(tasks: Iterator[Task], settings: EncodeSettings, workers: int) -> Iterator[tuple[Task, EncodedTask]]:
    """Results in the order of the tasks, with a bounded number of them in flight."""
    if workers == 1:
        for task in tasks:
            yield task, encode_task(task, settings)
        return
    waiting: deque[tuple[Task, Future[EncodedTask]]] = deque()
    # multiprocessing's tracker is started with these options; after Ctrl-C it would complain of the pool's semaphores.
    sys.warnoptions.append("ignore:resource_tracker")
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=prepare_worker, initargs=(settings.tokenizer,)
    )
    try:
        for task in tasks:
            with _sigint_held():
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
        # After an error or Ctrl-C not waited for: pieces in flight would take seconds. Without any there is nothing to
        # wait for but the pool's thread, which at exit Python wakes through a pipe that the thread may be closing.
        pool.shutdown(wait=not waiting, cancel_futures=True)


def preprocess(
    inputs: Inputs, settings: EncodeSettings, *, prefix: str, workers: int, overwrite: bool = False
) -> Summary | None:
    """Write the corpus, or corpora, for ``prefix``; None where it was there already.

    Raises:
        DataError: Unreadable input, no text in it, or another corpus is in the way.
    """
    try:
        return _preprocess(inputs, settings, prefix=prefix, workers=workers, overwrite=overwrite)
    except OSError as error:  # inputs are reported as DataError where they are read: this is the output's disk
        raise DataError(
            f"output {error.filename or prefix!r}: {error.strerror}; running the same command again goes on from here"
        ) from error


def _preprocess(
    inputs: Inputs, settings: EncodeSettings, *, prefix: str, workers: int, overwrite: bool
) -> Summary | None:
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
    if is_up_to_date(prefix, names, fingerprint, overwrite=overwrite):
        return None
    output = CorpusOutput(prefix, settings, tokenizer, fingerprint)
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
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that tokenize")
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
    others = active_children()
    try:
        summary = preprocess(
            inputs, settings, prefix=options.output_prefix, workers=options.workers, overwrite=options.overwrite
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr, flush=True)
        workers = [process for process in active_children() if process not in others]
        for process in workers:
            process.kill()
        if workers:
            # What is done is in the journal. The pool's threads would wait, up to Python 3.11 for ever, to hand the
            # killed workers their next pieces: leave without them.
            os._exit(_INTERRUPTED_STATUS)
        return _INTERRUPTED_STATUS
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
