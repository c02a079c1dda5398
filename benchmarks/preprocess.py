"""Preprocessing beside plain ``tokenizers``, in one run: the whole tool against ``encode_batch_fast`` on loaded texts.

The peer does less: it reads no file, writes none, and splits nothing. Each is run ``--repeats`` times, in turn, and the
fastest of each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import tokenizers

from gptoughts.data import train_tokenizer
from gptoughts.data.documents import Inputs, find_inputs, read_text
from gptoughts.data.encoding import EncodeSettings
from gptoughts.data.options import DEFAULT_EXCLUDE
from gptoughts.data.preprocess import preprocess


def run_peer(file: Path, texts: list[str], workers: int) -> tuple[float, int]:
    """Seconds and tokens of one ``encode_batch_fast`` over all texts, ids copied into arrays."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True  # as in preprocessing: a text that names one is no text with one
    started = time.perf_counter()
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    num_tokens = sum(len(np.array(encoding.ids, dtype=np.uint16)) for encoding in encodings)
    return time.perf_counter() - started, num_tokens


def run_tool(file: Path, inputs: Inputs, workers: int, prefix: Path) -> tuple[float, int]:
    """Seconds and tokens of the whole of preprocessing: workers started, files read, corpora written and synced."""
    settings = EncodeSettings(
        tokenizer=str(file),
        append_eod=False,
        text_field="text",
        encoding_errors="replace",
        validation_fraction=0.01,
        seed=1,
    )
    started = time.perf_counter()
    summary = preprocess(inputs, settings, prefix=str(prefix), workers=workers)
    assert summary is not None
    return time.perf_counter() - started, sum(summary.num_tokens.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", default=sysconfig.get_path("stdlib"), help="folder of .py files")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    inputs = find_inputs([options.input], suffixes=[".py"], exclude=DEFAULT_EXCLUDE)
    texts = [read_text(file.path, "replace")[0] or "" for file in inputs.files]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        train_tokenizer.main(["--input", options.input, "--suffix", ".py", "--output", folder])
        training_seconds = time.perf_counter() - started
        file = Path(folder) / "tokenizer.json"
        tool, peer = [], []
        for number in range(options.repeats):
            tool.append(run_tool(file, inputs, options.workers, Path(folder) / f"corpus{number}"))
            peer.append(run_peer(file, texts, options.workers))
    if tool[0][1] != peer[0][1]:
        raise SystemExit(f"token counts differ: {tool[0][1]} and {peer[0][1]}")
    fastest_tool, fastest_peer = min(tool)[0], min(peer)[0]
    result = {
        "text_megabytes": round(megabytes, 1),
        "workers": options.workers,
        "train_tokenizer_seconds": round(training_seconds, 1),
        "preprocess_megabytes_per_second": round(megabytes / fastest_tool, 2),
        "encode_batch_fast_megabytes_per_second": round(megabytes / fastest_peer, 2),
        "ratio": round(fastest_peer / fastest_tool, 3),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
