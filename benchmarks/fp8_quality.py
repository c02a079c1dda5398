"""Does FP8 train as well as bf16? Each family's debug preset twice, with the same weights, data and steps.

    python -m benchmarks.fp8_quality --data data_cache/stdlib-8192/python --steps 300

Every run is the launcher's own, in a process of its own; ``--backends te emulated`` compares both on a GPU. What is
compared is the validation loss after the last step, over the same samples; the claim is that FP8's is at most 1% above
(docs/fp8.md).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.corpus import random_corpus
from gptoughts.models.registry import FAMILIES
from gptoughts.training.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).parent.parent


def validation_loss(family: str, output: Path, arguments: argparse.Namespace, flags: tuple[str, ...]) -> float:
    """Train from nothing; nats per token at the end."""
    command = [
        sys.executable, str(ROOT / "launchers" / "pretrain.py"), f"--model_type={family}", "--size=debug", "--data",
        arguments.data, f"--train.steps={arguments.steps}", f"--batch_size={arguments.batch_size}",
        f"--block_size={arguments.block_size}", f"--output_dir={output}", f"--train.valid_samples={arguments.samples}",
        "--train.valid_interval_steps=0", "--checkpoint.keep_last=1", "--resume=none", "--log.plot=false",
        "--log.interval_steps=50", *arguments.flags, *flags,
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = [line for line in read_metrics(output / METRICS_FILE) if "valid_loss" in line]
    return float(lines[-1]["valid_loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="indexed corpus with PREFIX_valid beside it; unset: random tokens")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=512)
    parser.add_argument("--backends", nargs="+", default=["emulated"], choices=("emulated", "te"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--samples", type=int, default=64, help="validation samples")
    parser.add_argument("--flags", nargs="*", default=[], help="further flags of the launcher, for both runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.data is None:
            random_corpus(folder / "corpus_valid", num_tokens=100_000, vocab_size=8192)
            arguments.data = str(random_corpus(folder / "corpus", num_tokens=1_000_000, vocab_size=8192))
        ways = {"bf16": ()} | {
            backend: ("--use_fp8=true", f"--fp8.backend={backend}") for backend in arguments.backends
        }
        with ThreadPoolExecutor(arguments.jobs) as pool:
            runs = {
                (family, way): pool.submit(validation_loss, family, folder / f"{family}-{way}", arguments, flags)
                for family in arguments.families
                for way, flags in ways.items()
            }
            for family in arguments.families:
                plain = runs[family, "bf16"].result()
                for backend in arguments.backends:
                    fp8 = runs[family, backend].result()
                    found = f"bf16 {plain:.4f}, FP8 ({backend}) {fp8:.4f}: {fp8 / plain - 1:+.2%}"
                    print(f"{family}: validation loss {found}", flush=True)


if __name__ == "__main__":
    main()
