"""Samplers of masked-diffusion models: the published one with a step for each token, and the fast ones.

    python -m benchmarks.diffusion --checkpoint runs/llada-small --prompts 2
    python -m benchmarks.diffusion --size small --train_steps 200 200

Each prompt is the beginning of a document of the validation split. Every sampler warms up on a few tokens, then all of
them take turns at each prompt, alone in its batch. Printed are tokens per second and forwards, how many times faster
than the published sampler that is, the fraction of tokens that are the same, and the answers' log-likelihood under the
model by the chain rule (SMDM, arXiv:2410.18514, section 2: token i with those before it given and those from it on
masked), in nats per token, with its relative difference.

Without ``--checkpoint`` a model is trained first: a next-token model of the shape, and from it (``--init_from``) a
diffusion model, each for so many steps, on the default corpus (``make corpus``; made where it is not there).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gptoughts.data import preprocess, train_tokenizer
from gptoughts.data.indexed import bin_path, read_index
from gptoughts.inference.diffusion import DiffusionSampler, build_sampler, continuation
from gptoughts.inference.diffusion_likelihood import LikelihoodOptions
from gptoughts.inference.diffusion_options import DiffusionOptions
from gptoughts.inference.likelihood import build_scorer
from gptoughts.inference.likelihood_scorer import Request
from gptoughts.inference.loading import LoadedModel, load_model
from gptoughts.parallel import groups
from gptoughts.platform import device

ROOT = Path(__file__).parents[1]
PUBLISHED = "published"


@dataclass
class Contestant:
    """One way to sample, and what came of it."""

    options: DiffusionOptions
    seconds: float = 0.0
    forwards: int = 0
    answers: list[list[int]] = field(default_factory=list)


def contestants(new_tokens: int, block_length: int, threshold: float, factor: float) -> dict[str, Contestant]:
    """The published sampler first."""
    made = {
        PUBLISHED: {},
        "dual cache": {"cache": "dual"},
        "threshold": {"threshold": threshold},
        "prefix cache + threshold": {"cache": "prefix", "threshold": threshold},
        "dual cache + threshold": {"cache": "dual", "threshold": threshold},
        "dual cache + factor": {"cache": "dual", "factor": factor},
        "delayed cache": {"cache": "delayed"},
        "delayed cache + threshold": {"cache": "delayed", "threshold": threshold},
    }
    return {
        name: Contestant(DiffusionOptions(new_tokens, block_length, stop_at_end=False, **changes))  # type: ignore[arg-type]
        for name, changes in made.items()
    }


def default_corpus(folder: Path) -> str:
    """The Makefile's corpus, or, where it has not been made, one of the same files in a folder."""
    made = ROOT / "data_cache" / "stdlib-8192" / "python"
    if Path(f"{made}_valid.idx").is_file():
        return str(made)
    sources = ["--input", sysconfig.get_paths()["stdlib"], "--suffix", ".py"]
    train_tokenizer.main([*sources, "--vocab_size", "8192", "--output", str(folder / "tokenizer")])
    prefix = str(folder / "python")
    preprocess.main(
        [*sources, "--tokenizer", str(folder / "tokenizer"), "--output_prefix", prefix, "--append_eod",
         "--validation_fraction", "0.01"]
    )  # fmt: skip
    return prefix


def train(data: str, size: str, steps: tuple[int, int], block_size: int, folder: Path) -> Path:
    """Train a diffusion model from a next-token model; returns its run folder."""
    runs = folder / "gpt", folder / "llada"
    first = ["--model_type", "gpt", "--size", size]
    second = ["--model_type", "llada", "--init_from", str(runs[0])]
    for run, number, flags in zip(runs, steps, (first, second), strict=True):
        command = [
            sys.executable, "launchers/pretrain.py", "--data", data, "--block_size", str(block_size), *flags,
            "--train.steps", str(number), "--output_dir", str(run), "--deepspeed_config", "ds_configs/zero1.json",
            "--train.valid_samples", "32",
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return runs[1]


def prompts_of(data: str, count: int, prompt_tokens: int) -> list[list[int]]:
    """The beginnings of documents of the validation split, spread over it."""
    index = read_index(f"{data}_valid")
    tokens = np.memmap(bin_path(f"{data}_valid"), dtype=index.dtype, mode="r")
    long = [n for n, length in enumerate(index.lengths) if length >= 2 * prompt_tokens]
    chosen = [long[n * len(long) // count] for n in range(count)]
    starts = [int(index.pointers[n]) // index.dtype.itemsize for n in chosen]
    return [tokens[start : start + prompt_tokens].astype(np.int64).tolist() for start in starts]


def compare(sampler: DiffusionSampler, found: dict[str, Contestant], prompts: list[list[int]]) -> None:
    """Let every contestant continue every prompt."""
    for contestant in found.values():
        row = continuation(prompts[0], 8, sampler.special)
        options = contestant.options
        short = DiffusionOptions(8, threshold=options.threshold, factor=options.factor, cache=options.cache)
        sampler.restore([row], short)
    for prompt in prompts:
        for contestant in found.values():
            row = continuation(prompt, contestant.options.max_new_tokens, sampler.special)
            device.synchronize()
            started = time.perf_counter()
            (restored,) = sampler.restore([row], contestant.options)
            device.synchronize()
            contestant.seconds += time.perf_counter() - started
            contestant.forwards += sampler.num_forwards
            contestant.answers.append(restored.tokens[len(prompt) :])


def report(
    loaded: LoadedModel, found: dict[str, Contestant], prompts: list[list[int]], *, with_likelihood: bool
) -> None:
    """Print one JSON line per contestant."""
    chain_rule = LikelihoodOptions("chain_rule")
    scorer = build_scorer(loaded.model, loaded.config, batch_size=8, diffusion=chain_rule, checks_greedy=False)
    published = found[PUBLISHED]
    expected = 0.0
    for name, contestant in found.items():
        count = sum(map(len, contestant.answers))
        same = sum(
            a == b
            for one, other in zip(contestant.answers, published.answers, strict=True)
            for a, b in zip(one, other, strict=True)
        )
        line: dict[str, str | float] = {
            "sampler": name,
            "tokens_per_second": round(count / contestant.seconds, 2),
            "ratio": round(published.seconds / contestant.seconds, 2),
            "forwards_per_answer": round(contestant.forwards / len(prompts), 1),
            "same_tokens_fraction": round(same / count, 4),
        }
        if with_likelihood:
            requests = [Request(prompt, answer) for prompt, answer in zip(prompts, contestant.answers, strict=True)]
            likelihood = sum(scored.log_likelihood for scored in scorer.score(requests))
            expected = likelihood if name == PUBLISHED else expected
            line["nats_per_token"] = round(-likelihood / count, 4)
            line["likelihood_difference_fraction"] = round((likelihood - expected) / abs(expected), 4)
        print(json.dumps(line), flush=True)


def main() -> None:
    """Print one JSON line per sampler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a run or checkpoint of llada; unset: one is trained")
    parser.add_argument("--data", help="indexed corpus with PREFIX_valid beside it; unset: the default corpus")
    parser.add_argument("--size", default="small", help="preset of the model that is trained")
    parser.add_argument(
        "--train_steps", type=int, nargs=2, default=(60, 60), metavar=("GPT", "LLADA"), help="of the two models"
    )
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--block_length", type=int, default=32)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--factor", type=float, default=1.0)
    parser.add_argument(
        "--samplers", nargs="*", default=("dual cache + threshold", "delayed cache + threshold"),
        help="some by name; none named: all; the published one always runs",
    )  # fmt: skip
    parser.add_argument("--skip_likelihood", action="store_true", help="measure speed alone")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or default_corpus(Path(folder))
        context_tokens = options.prompt_tokens + options.new_tokens
        checkpoint = options.checkpoint or train(
            data, options.size, tuple(options.train_steps), context_tokens, Path(folder)
        )
        loaded = load_model(checkpoint)
        prompts = prompts_of(data, options.prompts, options.prompt_tokens)
    found = contestants(options.new_tokens, options.block_length, options.threshold, options.factor)
    if options.samplers:
        found = {name: one for name, one in found.items() if name == PUBLISHED or name in options.samplers}
    compare(build_sampler(loaded), found, prompts)
    report(loaded, found, prompts, with_likelihood=not options.skip_likelihood)
    groups.destroy()


if __name__ == "__main__":
    main()
