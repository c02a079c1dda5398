"""Forward, backward and AdamW in a bare loop: our deepseek beside transformers' DeepseekV3ForCausalLM, as ratios.

    python -m benchmarks.moe_step --precision both --threads 2

Both models have the same shape (8 routed experts, a token passes 2, and a shared one) and get the same tokens, with
transformers' own choice of attention and of how experts run. Both sides do the same work: forward, mean loss in fp32,
backward, torch's fused AdamW on all parameters in the parameters' dtype; neither clips. In bf16 both hold their weights
and moments in bf16 alone, no fp32 masters, and both route in fp32. Ours moves the routers' biases besides.
``ratio`` is of wall time, ``processor_time_ratio`` of what the processes themselves used (see benchmarks/turns.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.model_step import Step, fused_adamw
from benchmarks.turns import Contestant, median_ratio, take_turns
from gptoughts.config.experiment import ExperimentConfig
from gptoughts.models.deepseek.presets import DEEPSEEK_PRESETS
from gptoughts.models.expert_load import finish_step
from gptoughts.platform import device

SHAPE = DEEPSEEK_PRESETS["debug"].model


def our_step(dtype: torch.dtype) -> Step:
    """One update of our model with weights in ``dtype``."""
    from gptoughts.models.deepseek.model import build_model

    model = build_model(ExperimentConfig(model_type="deepseek", model=SHAPE), params_dtype=dtype)
    optimizer = fused_adamw(model)

    def step(tokens: torch.Tensor) -> float:
        loss = model(tokens[:, :-1], None, None, tokens[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        finish_step([model], is_applied=True)
        return loss.item()

    return step


def their_step(dtype: torch.dtype) -> Step:
    """One update of transformers' model with weights in ``dtype``, its loss as its users call it."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        num_hidden_layers=SHAPE.num_layers,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.ffn_hidden_size,
        moe_intermediate_size=SHAPE.moe_ffn_hidden_size,
        num_attention_heads=SHAPE.num_attention_heads,
        num_key_value_heads=SHAPE.num_attention_heads,
        n_routed_experts=SHAPE.num_moe_experts,
        n_shared_experts=SHAPE.moe_shared_expert_intermediate_size // SHAPE.moe_ffn_hidden_size,
        num_experts_per_tok=SHAPE.moe_router_topk,
        first_k_dense_replace=SHAPE.first_k_dense_layers,
        n_group=SHAPE.moe_router_num_groups,
        topk_group=SHAPE.moe_router_group_topk,
        routed_scaling_factor=SHAPE.moe_router_topk_scaling_factor,
        norm_topk_prob=SHAPE.moe_router_normalize_gates,
        q_lora_rank=SHAPE.q_lora_rank,
        kv_lora_rank=SHAPE.kv_lora_rank,
        qk_nope_head_dim=SHAPE.qk_head_dim,
        qk_rope_head_dim=SHAPE.qk_pos_emb_head_dim,
        v_head_dim=SHAPE.v_head_dim,
        vocab_size=SHAPE.vocab_size,
        max_position_embeddings=SHAPE.seq_length,
        use_cache=False,
    )
    model = DeepseekV3ForCausalLM(config).to(device.current_device(), dtype)
    optimizer = fused_adamw(model)

    def step(tokens: torch.Tensor) -> float:
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def compare(precision: str, *, batch_size: int, steps: int, warmup_steps: int, threads: int) -> dict[str, Any]:
    """Tokens per second of both and the ratios."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    turns = take_turns(
        {
            "gptoughts": Contestant(partial(our_step, dtype), is_ours=True),
            "transformers": Contestant(partial(their_step, dtype), is_ours=False),
        },
        vocab_size=SHAPE.vocab_size,
        batch_size=batch_size,
        seq_length=SHAPE.seq_length,
        steps=steps,
        warmup_steps=warmup_steps,
        threads=threads,
    )
    ours, theirs = turns["gptoughts"], turns["transformers"]
    tokens = batch_size * SHAPE.seq_length
    return {
        "precision": precision,
        "tokens_per_second": {name: round(tokens / statistics.median(times.wall), 1) for name, times in turns.items()},
        "ratio": round(median_ratio(theirs.wall, ours.wall), 3),
        "processor_seconds": {name: round(statistics.median(times.processor), 4) for name, times in turns.items()},
        "processor_time_ratio": round(median_ratio(theirs.processor, ours.processor), 3),
    }


def main() -> None:
    """Print one JSON line per precision; a ratio above 1 means that we are faster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both")
    parser.add_argument("--batch_size", type=int, default=4, help="samples per step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per contestant")
    parser.add_argument("--warmup_steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    for precision in ("fp32", "bf16") if options.precision == "both" else (options.precision,):
        result = compare(
            precision,
            batch_size=options.batch_size,
            steps=options.steps,
            warmup_steps=options.warmup_steps,
            threads=options.threads,
        )
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
