"""Preprocessing: every format, the same output for any number of workers, interruptions, bad input."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from gptoughts.config.experiment import DataConfig
from gptoughts.data import encoding, output, preprocess
from gptoughts.data.corpus import inspect_corpus
from gptoughts.data.encoding import EncodedTask, is_validation_document
from gptoughts.data.tokenizer import load_tokenizer
from gptoughts.errors import ConfigError, DataError
from tests.data.conftest import TRAINING_TEXT

ROOT = Path(__file__).parents[2]
TEXTS = [f"Document {i}: Straße 東京 " + "word " * (i % 7) + "\n" for i in range(60)] + ["", "<|endoftext|> spelt out"]


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "meta": [1, {"a": None}]}) + "\n" for text in texts).encode()


def _run(tokenizer_path: Path, prefix: Path, *inputs: Path, **options: object) -> int:
    words = [
        "--input",
        *map(str, inputs),
        "--tokenizer",
        str(tokenizer_path),
        "--output_prefix",
        str(prefix),
        "--append_eod",
    ]
    for name, value in ({"workers": 1} | options).items():
        words += [f"--{name}"] if value is True else [f"--{name}", *str(value).split()]
    return preprocess.main(words)


def _texts(prefix: Path) -> list[str]:
    sidecar = json.loads(Path(f"{prefix}.json").read_text())
    tokenizer = load_tokenizer(prefix.parent / sidecar["tokenizer"])
    rows = [row.tolist() for row in IndexedDataset(str(prefix))]
    assert all(row[-1] == sidecar["eod_id"] for row in rows)
    assert sidecar["num_tokens"] == sum(map(len, rows))
    assert sidecar["num_documents"] == len(rows)
    assert sidecar["max_token_id"] == max(max(row) for row in rows)
    texts = [tokenizer.decode(row[:-1]) for row in rows]
    assert sidecar["text_bytes"] == sum(len(text.encode()) for text in texts)
    return texts


def test_every_format_gives_the_same_documents(tmp_path: Path, tokenizer_folder: Path) -> None:
    content = _jsonl(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(content))
    pa.parquet.write_table(pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))}), tmp_path / "a.parquet")
    folder = tmp_path / "folder" / "deep"
    folder.mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    (folder / "binary.txt").write_bytes(b"\0\1\2")
    (tmp_path / "folder" / ".hidden").write_text("not read")
    expected = [text for text in TEXTS if text]
    for number, name in enumerate(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "folder"]):
        prefix = tmp_path / "out" / f"c{number}"
        assert _run(tokenizer_folder, prefix, tmp_path / name) == 0
        assert _texts(prefix) == expected, name


def test_output_does_not_depend_on_workers(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(_jsonl(TEXTS))
    monkeypatch.setattr(encoding, "TASK_BYTES", 20_000)
    for workers in (1, 2):
        inputs = (TRAINING_TEXT, tmp_path / "rows.jsonl")
        assert _run(tokenizer_folder, tmp_path / f"w{workers}", *inputs, workers=workers, validation_fraction=0.2) == 0
    for split in ("train", "valid"):
        for suffix in ("bin", "idx"):
            one, two = (tmp_path / f"w{workers}_{split}.{suffix}" for workers in (1, 2))
            assert one.read_bytes() == two.read_bytes()
    info = inspect_corpus(DataConfig(train=[str(tmp_path / "w2")]), seq_length=64)
    assert info.tokenizer == str(tmp_path / "w2_tokenizer")
    assert 0.05 < info.num_valid_tokens / info.num_train_tokens < 0.6


def test_split_takes_every_document_once(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl(TEXTS))
    _run(tokenizer_folder, tmp_path / "c", tmp_path / "a.jsonl", validation_fraction=0.3)
    train, valid = _texts(tmp_path / "c_train"), _texts(tmp_path / "c_valid")
    assert sorted(train + valid) == sorted(text for text in TEXTS if text)
    assert train == [text for text in TEXTS if text in train]


def test_held_out_share_and_stability() -> None:
    numbers = np.arange(100_000)
    chosen = is_validation_document(numbers, seed=1, fraction=0.05)
    assert abs(chosen.mean() - 0.05) < 0.003
    np.testing.assert_array_equal(chosen[500:900], is_validation_document(numbers[500:900], seed=1, fraction=0.05))
    assert (chosen & is_validation_document(numbers, seed=2, fraction=0.05)).mean() < 0.005
    # A larger fraction keeps what a smaller one held out.
    assert not (chosen & ~is_validation_document(numbers, seed=1, fraction=0.1)).any()


def test_long_documents_stay_whole(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "".join(f"line {i} of a long text, \n\n  indented\tö\n" for i in range(500))
    (tmp_path / "long.txt").write_text(long)
    (tmp_path / "rows.jsonl").write_bytes(_jsonl(["short", long, "end", "x" * 3000]))
    whole = tmp_path / "whole"
    _run(tokenizer_folder, whole, tmp_path / "long.txt", tmp_path / "rows.jsonl")
    monkeypatch.setattr(encoding, "LARGEST_PIECE_CHARACTERS", 1000)
    pieces = tmp_path / "pieces"
    _run(
        tokenizer_folder, pieces, tmp_path / "long.txt", tmp_path / "rows.jsonl", validation_fraction=0, overwrite=True
    )
    assert _texts(pieces) == _texts(whole) == [long, "short", long, "end", "x" * 3000]
    ours, theirs = IndexedDataset(str(pieces)), IndexedDataset(str(whole))
    for number in range(4):  # the last has no line end to cut at: the same text, perhaps other tokens
        np.testing.assert_array_equal(ours[number], theirs[number])


def test_interrupted_run_goes_on(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "TASK_BYTES", 20_000)
    monkeypatch.setattr(output, "_SYNC_SECONDS", -1.0)
    real, calls = preprocess.encode_task, 0

    def count(*arguments: object) -> EncodedTask:
        nonlocal calls
        calls += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(preprocess, "encode_task", count)
    _run(tokenizer_folder, tmp_path / "whole", TRAINING_TEXT, validation_fraction=0.2)
    num_tasks, calls = calls, 0

    def stop(*arguments: object) -> EncodedTask:
        if calls == 5:
            raise KeyboardInterrupt
        return count(*arguments)

    monkeypatch.setattr(preprocess, "encode_task", stop)
    assert _run(tokenizer_folder, tmp_path / "c", TRAINING_TEXT, validation_fraction=0.2) == 130
    assert not (tmp_path / "c_train.idx").exists()
    calls = 0
    monkeypatch.setattr(preprocess, "encode_task", count)
    assert _run(tokenizer_folder, tmp_path / "c", TRAINING_TEXT, validation_fraction=0.2) == 0
    assert calls == num_tasks - 5
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx"):
        assert (tmp_path / f"c_{name}").read_bytes() == (tmp_path / f"whole_{name}").read_bytes()
    for split in ("train", "valid"):
        ours, theirs = (json.loads((tmp_path / f"{stem}_{split}.json").read_text()) for stem in ("c", "whole"))
        assert ours | {"tokenizer": ""} == theirs | {"tokenizer": ""}
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".partial", ".journal")]


def test_interruption_spares_other_processes(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> EncodedTask:
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess, "encode_task", stop)
    bystander = get_context("spawn").Process(target=time.sleep, args=(60.0,))
    bystander.start()
    try:
        assert _run(tokenizer_folder, tmp_path / "c", TRAINING_TEXT) == 130
        assert bystander.is_alive()
    finally:
        bystander.kill()
        bystander.join()


def test_running_again(tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl(TEXTS))
    prefix = tmp_path / "c"
    _run(tokenizer_folder, prefix, tmp_path / "a.jsonl")
    before = Path(f"{prefix}.bin").stat().st_mtime_ns
    _run(tokenizer_folder, prefix, tmp_path / "a.jsonl")
    assert Path(f"{prefix}.bin").stat().st_mtime_ns == before
    assert "up to date" in capsys.readouterr().out
    (tmp_path / "a.jsonl").write_bytes(_jsonl(TEXTS[:9]))
    with pytest.raises(DataError, match="--overwrite replaces it"):
        _run(tokenizer_folder, prefix, tmp_path / "a.jsonl")
    assert _run(tokenizer_folder, prefix, tmp_path / "a.jsonl", overwrite=True) == 0
    assert _texts(prefix) == TEXTS[:9]
    Path(f"{prefix}.bin").unlink()  # lost: made again without being asked twice
    assert _run(tokenizer_folder, prefix, tmp_path / "a.jsonl") == 0
    assert _texts(prefix) == TEXTS[:9]


@pytest.fixture
def bad_inputs(tmp_path: Path) -> Path:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "latin.txt").write_bytes("Straße\n".encode("latin-1"))
    (tmp_path / "other.jsonl").write_text('{"content": "x"}\n')
    (tmp_path / "torn.jsonl").write_text('{"text": "x"}\n{"text": "y\n')
    (tmp_path / "numbers.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(_jsonl(TEXTS))[:-40])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "one.txt").write_text("one document")
    (tmp_path / "nothing").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none.txt", {}, "no such file or folder"),
        ("nothing", {}, "no text files there"),
        ("nothing", {"suffix": ".py .md"}, r"no text files ending in \.py or \.md"),
        ("empty.txt", {}, "holds no text"),
        ("empty.jsonl", {}, "holds no text"),
        ("empty.jsonl.gz", {}, "holds no text"),
        ("latin.txt", {"encoding_errors": "strict"}, r"latin\.txt': byte 4 is not UTF-8"),
        ("latin.txt", {"encoding_errors": "skip"}, "holds no text"),
        ("other.jsonl", {}, "no field 'text'; its fields: content"),
        ("torn.jsonl", {}, r"torn\.jsonl': cannot be read as json"),
        ("numbers.jsonl", {}, "is not text in every row"),
        ("torn.jsonl.gz", {}, "cannot be read as json"),
        ("torn.parquet", {}, "cannot be read as parquet"),
        ("a.zip", {}, "cannot read this format"),
        ("one.txt", {"validation_fraction": 0.5, "seed": 1}, "no document fell into the"),
        ("one.txt", {"tokenizer": "/nowhere/tokenizer.json"}, "no such file"),
    ],
)
def test_bad_input(
    bad_inputs: Path,
    tokenizer_folder: Path,
    name: str,
    options: dict,
    message: str,
) -> None:
    with pytest.raises(DataError, match=message):
        _run(tokenizer_folder, bad_inputs / "c", bad_inputs / name, **options)
    assert not list(bad_inputs.glob("c*.idx"))
    if "holds no text" in message:
        assert not list(bad_inputs.glob("c.*"))


def test_replaced_bytes_and_skipped_files_are_counted(
    bad_inputs: Path,
    tokenizer_folder: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    _run(tokenizer_folder, bad_inputs / "c", bad_inputs / "latin.txt", bad_inputs / "empty.txt")
    assert _texts(bad_inputs / "c") == ["Stra\ufffde\n"]
    printed = capsys.readouterr().out
    assert "1 files that are not UTF-8" in printed
    assert "1 empty documents left out" in printed


def test_bad_options_come_together(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"validation_fraction=1\.5") as caught:
        _run(tokenizer_folder, tmp_path / "c", tmp_path / "a.txt", validation_fraction=1.5, workers=0)
    assert len(caught.value.problems) == 2


def test_output_that_cannot_be_written(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="File exists"):
        _run(tokenizer_folder, tmp_path / "a.txt" / "c", tmp_path / "a.txt")


def _die(*_: object) -> EncodedTask:
    os._exit(1)


def test_a_worker_that_dies(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(preprocess, "encode_task", _die)
    with pytest.raises(DataError, match="a worker process ended abruptly"):
        _run(tokenizer_folder, tmp_path / "c", tmp_path / "a.txt", workers=2)


def test_disk_full(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a.txt").write_text("a")
    with monkeypatch.context() as patch:
        patch.setattr(output.IndexedWriter, "sync", fail)
        with pytest.raises(DataError, match="No space left on device; running the same command again"):
            _run(tokenizer_folder, tmp_path / "c", tmp_path / "a.txt")
    assert not (tmp_path / "c.idx").exists()
    assert _run(tokenizer_folder, tmp_path / "c", tmp_path / "a.txt") == 0


def _start_tool(tmp_path: Path, tokenizer_folder: Path) -> subprocess.Popen:
    """The tool in a process group of its own, in the middle of its work."""
    (tmp_path / "a.txt").write_text("some words\n" * 6_000_000)
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--tokenizer", str(tokenizer_folder)]
    command += ["--input", str(tmp_path / "a.txt"), "--output_prefix", str(tmp_path / "c"), "--workers", "2"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    # Tokens in the output: the workers are at work.
    while not any(path.stat().st_size for path in tmp_path.glob("*.bin.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def _wait_for_end_of_group(group: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("processes of the tool are still running")


def test_ctrl_c_leaves_nothing_running(tmp_path: Path, tokenizer_folder: Path) -> None:
    process = _start_tool(tmp_path, tokenizer_folder)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.strip() == "interrupted; the same command goes on from here"
    _wait_for_end_of_group(process.pid)


def test_workers_end_with_a_killed_parent(tmp_path: Path, tokenizer_folder: Path) -> None:
    process = _start_tool(tmp_path, tokenizer_folder)
    process.kill()
    process.communicate(timeout=60)
    _wait_for_end_of_group(process.pid)


def test_the_tool_ends_with_status_2_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
    command += ["--input", str(tmp_path / "none"), "--tokenizer", str(tmp_path), "--output_prefix", str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("(tools/train_tokenizer.py makes one)")
    assert "Traceback" not in done.stderr
