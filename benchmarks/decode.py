"""Tokens per second while decoding: ours beside transformers' generate, on the same weights, in one run.

    python -m benchmarks.decode                      # gpt beside Llama with a static cache; mla beside DeepSeek-V3

Contestants of a case take turns, in one process with the same threads. Every one continues the same random prompt
greedily; the time between two tokens counts, from the third token on, and its median over all turns. Their answers have
to be equal, or the run fails. In fp32, as on a CPU both are by default.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from gptoughts.inference.autoregressive import BatchGenerator, Request
from gptoughts.inference.loading import LoadedModel, load_model
from gptoughts.inference.sampling_options import SamplingOptions
from gptoughts.parallel import groups
from gptoughts.platform.startup import prepare_process

VOCABULARY = 8192
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 8400, "rms_norm_eps": 1e-6,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "kv_lora_rank": 256, "q_lora_rank": None, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "first_k_dense_replace": 8,
}  # fmt: skip
"""DeepSeek-V2-Lite's proportions, as in the presets of ``mla``; all layers dense."""

Contestant = Callable[[list[list[int]], int], tuple[list[list[int]], list[float]]]
"""(prompts, new tokens) -> (answers, seconds between tokens)."""


def publish(family: str, folder: Path) -> Any:
    """Random weights in transformers' form, kept in ``folder`` for ours; returns transformers' model."""
    torch.manual_seed(0)
    if family == "gpt":
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))
    else:
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**COMMON | LATENT))
    for parameter in model.parameters():
        parameter.data.mul_(2.0)  # so that no two tokens are as likely as each other
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return model.eval()


class Clock(transformers.generation.BaseStreamer):
    """Notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def theirs(model: Any, cache: str) -> Contestant:
    """transformers' generate."""

    def run(prompts: list[list[int]], count: int) -> tuple[list[list[int]], list[float]]:
        ids, clock = torch.tensor(prompts), Clock()
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
                cache_implementation=cache, streamer=clock if len(prompts) == 1 else None,
            )  # fmt: skip
        times = clock.times[3:]  # the prompt, and two tokens
        return found[:, ids.size(1) :].tolist(), _between(times)

    return run


def ours(loaded: LoadedModel, rows: int, places: int) -> tuple[Contestant, BatchGenerator]:
    """Our generator, with its cache for ``rows`` sequences of ``places`` tokens."""
    generator = BatchGenerator(loaded.model, vocab_size=VOCABULARY, context_tokens=places, rows=rows)

    def run(prompts: list[list[int]], count: int) -> tuple[list[list[int]], list[float]]:
        requests = [Request(list(prompt), SamplingOptions(count, temperature=0)) for prompt in prompts]
        times = [time.perf_counter() for number, _ in enumerate(generator.run(requests)) if number % len(prompts) == 0]
        return [request.new_ids for request in requests], _between(times[2:])

    return run, generator


def _between(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def compare(name: str, contestants: dict[str, Contestant], prompt_tokens: int, new_tokens: int, turns: int) -> None:
    """Let contestants take turns and print a line."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, VOCABULARY, (1, prompt_tokens), generator=generator).tolist()
    seconds: dict[str, list[float]] = {who: [] for who in contestants}
    answers = {}
    for _ in range(turns):
        for who, run in contestants.items():
            answers[who], times = run(prompts, new_tokens)
            seconds[who] += times
    first, *others = answers.values()
    if any(other != first for other in others):
        raise SystemExit(f"{name}: contestants gave different answers")
    rates = {who: 1 / statistics.median(times) for who, times in seconds.items()}
    mine, their = rates.values()
    figures = {f"{who} tokens/s": round(rate, 1) for who, rate in rates.items()}
    report(name, prompt_tokens=prompt_tokens, new_tokens=new_tokens, **figures, ratio=round(mine / their, 2))


def batches(loaded: LoadedModel, prompt_tokens: int, new_tokens: int, turns: int) -> None:
    """Our own rate with one row and with eight, which read the same weights but keys and values of their own."""
    generator = torch.Generator().manual_seed(2)
    seconds: dict[int, list[float]] = {1: [], 8: []}
    runs = {rows: ours(loaded, rows, prompt_tokens + new_tokens)[0] for rows in seconds}
    for _ in range(turns):
        for rows, run in runs.items():
            prompts = torch.randint(1, VOCABULARY, (rows, prompt_tokens), generator=generator).tolist()
            seconds[rows] += run(prompts, new_tokens)[1]
    rates = {rows: rows / statistics.median(times) for rows, times in seconds.items()}
    figures = {f"{rows} rows tokens/s": round(rate, 1) for rows, rate in rates.items()}
    report("gpt, rows at once", prompt_tokens=prompt_tokens, new_tokens=new_tokens, **figures,
           ratio=round(rates[8] / rates[1], 2))  # fmt: skip


def report(name: str, **figures: Any) -> None:
    """One line of JSON."""
    print(json.dumps({"case": name, "threads": torch.get_num_threads()} | figures), flush=True)


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3, help="of each contestant, where the context is short")
    parser.add_argument("--only", choices=("gpt", "mla"), help="unset: both")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    prepare_process()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        for family in ("gpt", "mla"):
            if arguments.only in (None, family):
                _run_family(family, Path(folder) / family, arguments.turns)
    groups.destroy()


def _run_family(family: str, folder: Path, turns: int) -> None:
    model, loaded = publish(family, folder), load_model(folder)
    contexts = {256: turns} if family == "gpt" else {1024: turns, 8192: 1}
    for prompt_tokens, repeats in contexts.items():
        new_tokens = 48 if prompt_tokens < 8192 else 12
        mine, generator = ours(loaded, 1, prompt_tokens + new_tokens)
        if family == "mla":
            per_token = generator.cache.num_bytes / (prompt_tokens + new_tokens)
            expected = (LATENT["kv_lora_rank"] + LATENT["qk_rope_head_dim"]) * COMMON["num_hidden_layers"] * 4
            assert per_token == expected, "latents and rotary keys alone"
            report(f"mla at {prompt_tokens}", cache_bytes_per_token=expected)
        # The peer's faster way: a static cache with its masks for gpt, as asked; latents in a dynamic one.
        cache = "static" if family == "gpt" else "dynamic"
        contestants = {"ours": mine, f"transformers ({cache} cache)": theirs(model, cache)}
        compare(f"{family} at {prompt_tokens}", contestants, prompt_tokens, new_tokens, repeats)
    if family == "gpt":
        for prompt_tokens in (64, 256):
            batches(loaded, prompt_tokens, 48, turns)


if __name__ == "__main__":
    main()
