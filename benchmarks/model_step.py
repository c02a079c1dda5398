"""Forward, backward and AdamW in a bare loop: our gpt beside transformers' LlamaForCausalLM, in one run, as ratios.

    python benchmarks/model_step.py --precision both --threads 2

Both models have the same shape and get the same tokens; steps alternate, so that a noisy machine hits both, and the
median step counts. In bf16 the peers are transformers with fp32 weights under autocast, and with bf16 weights.
The floor is the rate of a large matrix product: ``fraction of peak`` is achieved model FLOPs over it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.models.flops import flops_per_token
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups
from gptoughts.platform import device

Step = Callable[[torch.Tensor], float]
CPU_SHAPE = GPTConfig(
    num_layers=6, hidden_size=384, ffn_hidden_size=1024, num_attention_heads=6, vocab_size=8192, seq_length=512
)
"""17M parameters."""
GPU_SHAPE = GPTConfig(
    num_layers=12, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=16, vocab_size=32768, seq_length=2048
)
"""0.75G parameters."""
SHAPE = GPU_SHAPE if device.is_cuda() else CPU_SHAPE
"""One that fills this machine's device."""


def fused_adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The optimizer of every contestant."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def our_step(dtype: torch.dtype) -> Step:
    """One update of our model with weights in ``dtype``."""
    from gptoughts.models.gpt.model import build_model

    model = build_model(ExperimentConfig(model=SHAPE), params_dtype=dtype)
    optimizer = fused_adamw(model)

    def step(tokens: torch.Tensor) -> float:
        loss = model(tokens[:, :-1], None, None, tokens[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def our_training_step(dtype: torch.dtype) -> Step:
    """One update of our model with the Trainer's arithmetic: fp32 masters and moments, clipping at norm 1."""
    from gptoughts.models.gpt.model import build_model

    model = build_model(ExperimentConfig(model=SHAPE), params_dtype=dtype)
    weights = list(model.parameters())
    masters = weights if dtype == torch.float32 else [torch.nn.Parameter(w.detach().float()) for w in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(tokens: torch.Tensor) -> float:
        loss = model(tokens[:, :-1], None, None, tokens[:, 1:]).mean()
        loss.backward()
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        if masters is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def llama_step(dtype: torch.dtype, *, autocast: bool) -> Step:
    """One update of transformers' model with weights in ``dtype``, its loss as its users call it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=SHAPE.num_layers,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.ffn_hidden_size,
        num_attention_heads=SHAPE.num_attention_heads,
        num_key_value_heads=SHAPE.num_attention_heads,
        vocab_size=SHAPE.vocab_size,
        max_position_embeddings=SHAPE.seq_length,
        rms_norm_eps=SHAPE.layernorm_epsilon,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device.current_device(), dtype)
    optimizer = fused_adamw(model)

    def step(tokens: torch.Tensor) -> float:
        kind = device.current_device().type
        with torch.autocast(kind, dtype=torch.bfloat16) if autocast else nullcontext():
            logits = model(input_ids=tokens[:, :-1]).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(contestants: dict[str, Step], *, batch_size: int, steps: int, warmup_steps: int) -> dict[str, float]:
    """Median seconds per step of each contestant; steps alternate between them."""
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(warmup_steps + steps):
        tokens = torch.randint(0, SHAPE.vocab_size, (batch_size, SHAPE.seq_length + 1), generator=generator)
        tokens = tokens.to(device.current_device())
        for name, step in contestants.items():
            device.synchronize()
            started = time.perf_counter()
            step(tokens)
            device.synchronize()
            if index >= warmup_steps:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(precision: str, *, batch_size: int, steps: int, warmup_steps: int) -> dict[str, Any]:
    """Tokens per second of each contestant, our ratio to each peer, and our fraction of the machine's peak."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    contestants = {"gptoughts": our_step(dtype)}
    if precision == "bf16":
        contestants["llama fp32 weights, autocast"] = llama_step(torch.float32, autocast=True)
        contestants["llama bf16 weights"] = llama_step(torch.bfloat16, autocast=False)
    else:
        contestants["llama"] = llama_step(torch.float32, autocast=False)
    seconds = measure(contestants, batch_size=batch_size, steps=steps, warmup_steps=warmup_steps)
    tokens = batch_size * SHAPE.seq_length
    achieved = (
        flops_per_token(FAMILIES["gpt"], SHAPE, seq_length=SHAPE.seq_length) * tokens / seconds["gptoughts"] / 1e12
    )
    return {
        "precision": precision,
        "tokens_per_second": {name: round(tokens / value, 1) for name, value in seconds.items()},
        "ratio": {name: round(value / seconds["gptoughts"], 3) for name, value in seconds.items()},
        "achieved_tflops": round(achieved, 4),
        "fraction of peak": round(achieved / device.peak_tflops(dtype), 3),
    }


def main() -> None:
    """Print one JSON line per precision; ``ratio`` above 1 means that we are faster than that peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both")
    parser.add_argument("--batch_size", type=int, default=4, help="samples per step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per contestant")
    parser.add_argument("--warmup_steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    groups.initialize(ParallelConfig(), seed=1234)
    for precision in ("fp32", "bf16") if options.precision == "both" else (options.precision,):
        result = compare(
            precision, batch_size=options.batch_size, steps=options.steps, warmup_steps=options.warmup_steps
        )
        print(json.dumps(result), flush=True)
    groups.destroy()


if __name__ == "__main__":
    main()
