"""Recompute in plans: bytes by hand, what it costs, and when it is proposed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptoughts.config.cli import load_experiment
from gptoughts.config.experiment import ExperimentConfig, ParallelConfig, TrainConfig
from gptoughts.models.deepseek.config import DeepSeekConfig
from gptoughts.models.flops import flops_of_layers_per_token
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.registry import FAMILIES
from gptoughts.planning.activations import chunk_memory, rotary_bytes, stage_activation_bytes
from gptoughts.planning.command import best_plans
from gptoughts.planning.communication import data_bytes, second_forward_bytes
from gptoughts.planning.layers import Kept, Microbatch, layer_bytes, layer_memory
from gptoughts.planning.memory import Division
from gptoughts.planning.recompute import describe, ladder, second_forward_flops_per_token
from gptoughts.planning.report import arguments
from gptoughts.planning.request import read_options, read_run
from gptoughts.planning.zero import ZeroSettings

GPT = GPTConfig(num_layers=3, hidden_size=8, ffn_hidden_size=24, num_attention_heads=4, vocab_size=100).filled()
MLA = MLAConfig(num_layers=2, hidden_size=8, ffn_hidden_size=24, num_attention_heads=2, kv_lora_rank=6,
                qk_head_dim=4, qk_pos_emb_head_dim=2, v_head_dim=3)  # fmt: skip
EXPERTS = DeepSeekConfig(
    num_layers=2, hidden_size=8, ffn_hidden_size=24, num_attention_heads=2, num_moe_experts=4, moe_router_topk=2,
    moe_ffn_hidden_size=10, moe_shared_expert_intermediate_size=6,
)  # fmt: skip
ONE_TOKEN = Microbatch(tokens=1, tensor=1, is_sequence_divided=False, expert=1, width=4)
LAYER = layer_bytes(GPT, 0, ONE_TOKEN)
INPUT = 4 * 8


def full(**fields: Any) -> ParallelConfig:
    return ParallelConfig(recompute_granularity="full", **fields)


def test_parts_that_are_remade_are_not_kept() -> None:
    """Norms' outputs 2 x 32. Turned queries and keys 64 and log-sum-exp 16. SwiGLU 3 x 24 numbers."""
    saved = {("layernorm",): (64, 32), ("core_attn",): (80, 80 - 288), ("mlp",): (288, 288)}
    for modules, (less, remade) in saved.items():
        assert layer_memory(GPT, 0, ONE_TOKEN, modules) == Kept(LAYER - less, max(0, remade)), modules
    # The feed-forward half is let go of before attention's backward; beside it, it needs the norm's output.
    assert layer_memory(GPT, 0, ONE_TOKEN, ("core_attn", "layernorm", "mlp")) == Kept(LAYER - 432, 288 + 32)


def test_latent_attention_without_its_projections() -> None:
    whole = layer_bytes(MLA, 0, ONE_TOKEN)
    # Keys 12 numbers, and 14 of which values are a view; queries have no latent.
    assert whole - layer_memory(MLA, 0, ONE_TOKEN, ("mla_up_proj",)).kept == 4 * (12 + 14)
    with_latent = replace(MLA, q_lora_rank=5)
    less = layer_bytes(with_latent, 0, ONE_TOKEN) - layer_memory(with_latent, 0, ONE_TOKEN, ("mla_up_proj",)).kept
    assert less == 4 * (12 + 12 + 14)
    # Of the attention there remain the latent with the rotary part, 8, and the output, 6.
    both = layer_memory(MLA, 0, ONE_TOKEN, ("mla_up_proj", "core_attn"))
    assert both.kept == 2 * (32 + 32 + 4) + 4 * (8 + 6) + 4 * 72


def test_experts() -> None:
    whole = layer_bytes(EXPERTS, 1, ONE_TOKEN)
    shared = layer_memory(EXPERTS, 1, ONE_TOKEN, ("shared_experts",))
    assert shared == Kept(whole - 4 * 18, 4 * 18)
    everything = layer_memory(EXPERTS, 1, ONE_TOKEN, ("moe",))
    assert everything.kept + everything.remade == whole
    assert layer_memory(EXPERTS, 1, ONE_TOKEN, ("mlp",)) == Kept(whole)


def test_groups_of_layers_keep_their_input() -> None:
    rotary = rotary_bytes(GPT, ONE_TOKEN)
    layers = range(3)
    assert chunk_memory(GPT, layers, ONE_TOKEN, ParallelConfig()) == Kept(3 * LAYER + rotary)
    assert chunk_memory(GPT, layers, ONE_TOKEN, full()) == Kept(3 * INPUT + rotary, LAYER - INPUT)
    pairs = chunk_memory(GPT, layers, ONE_TOKEN, full(recompute_num_layers=2))
    # When the first pair's backward comes, the last layer's input is gone.
    assert pairs == Kept(2 * INPUT + rotary, 2 * LAYER - 2 * INPUT)
    block = full(recompute_method="block", recompute_num_layers=2)
    assert chunk_memory(GPT, layers, ONE_TOKEN, block) == Kept(2 * INPUT + LAYER + rotary)


def test_the_loss_and_a_second_forward_do_not_meet() -> None:
    config = ExperimentConfig(
        model=GPT, batch_size=1, block_size=1, parallel=full(), train=TrainConfig(precision="fp32")
    )
    kept = 3 * INPUT + rotary_bytes(GPT, ONE_TOKEN) + 8
    logits = 32 + 4 + 32 + 4 * 128 + 4 + 8 + 4
    assert stage_activation_bytes(config, ONE_TOKEN, 0, 1) == kept + max(logits, LAYER - INPUT)


def test_a_second_forward_costs_a_third() -> None:
    family = FAMILIES["gpt"]
    layers = flops_of_layers_per_token(family, GPT, range(3), 16)
    assert second_forward_flops_per_token(family, GPT, full(), 0, 16) == layers // 3
    one = full(recompute_method="block", recompute_num_layers=1)
    assert second_forward_flops_per_token(family, GPT, one, 0, 16) == layers // 9
    assert second_forward_flops_per_token(family, GPT, ParallelConfig(), 0, 16) == 0

    def parts(*names: str) -> int:
        chosen = ParallelConfig(recompute_granularity="selective", recompute_modules=",".join(names))
        return second_forward_flops_per_token(family, GPT, chosen, 0, 16)

    assert parts("layernorm") == 0
    assert parts("mlp") == 3 * 2 * 3 * 8 * 24
    assert parts("core_attn") == 3 * 16 * 4 * 4 // 1  # scores and weighted sums, of which a causal mask needs half


def test_what_is_sent_once_more() -> None:
    batch = Microbatch(tokens=16, tensor=2, is_sequence_divided=False, expert=1, width=2)
    config = ExperimentConfig(model=GPT, parallel=full(tensor=2))
    assert second_forward_bytes(config, batch, 0)["tensor"] == 3 * 2 * (1 / 2 * 16 * 2 * 2 * 8)
    division, zero = Division(100, 0, 4, 1), ZeroSettings.read({"zero_optimization": {"stage": 3}}, "bf16")
    assert data_bytes(division, zero, 2, 5, 1.0) - data_bytes(division, zero, 2, 5) == 3 / 4 * 100 * 5 * 2


def plans(*flags: str) -> list[Any]:
    options = read_options(["--gpus", "2", "--gpu", "h100", "--size", "small", *flags])
    return [plan for plan, _ in best_plans(read_run(options), options)[0]]


def test_recompute_is_proposed_where_memory_is_short() -> None:
    shape = ("--parallel.pipeline", "1", "--parallel.tensor", "1", "--parallel.context", "1", "--batch_size", "8")
    roomy = plans(*shape, "--gpu_memory_gib", "80")
    assert {describe(plan.config.parallel) for plan in roomy} == {""}
    for fields, kind in zip(ladder(GPT), ("layernorm", "3 parts", "full"), strict=True):
        stated = [f"--parallel.{field}={value}" for field, value in fields.items()]
        needed = min(plan.memory.total for plan in plans(*shape, *stated, "--gpu_memory_gib", "80"))
        found = plans(*shape, "--gpu_memory_gib", str(1.001 * needed / 2**30 / 0.9))
        assert min(found, key=lambda plan: plan.memory.total).memory.total <= 1.001 * needed
        # Of plans with other ZeRO stages, some need more than this kind.
        kinds = {describe(plan.config.parallel) for plan in found}
        assert kind in kinds
        assert "" not in kinds


def test_the_command_starts_what_was_planned() -> None:
    shape = ("--parallel.pipeline", "1", "--parallel.tensor", "1", "--parallel.context", "1", "--batch_size", "8")
    (best, *_) = plans(*shape, "--gpu_memory_gib", "8")
    flags = ["--size", "small", *shape]
    accepted = load_experiment(arguments(best, flags), FAMILIES, world_size=2).config
    assert accepted.parallel == best.config.parallel
    assert best.config.parallel.recompute_granularity != "none"


def test_what_the_run_states_stays() -> None:
    from gptoughts.errors import ConfigError

    shape = ("--parallel.pipeline", "1", "--parallel.tensor", "1", "--batch_size", "8", "--gpu_memory_gib", "8")
    with pytest.raises(ConfigError, match=r"without parallel.recompute_granularity=none"):
        plans(*shape, "--parallel.context", "1", "--parallel.recompute_granularity", "none")


def test_every_kind_that_is_tried_is_accepted() -> None:
    for name, family in FAMILIES.items():
        for fields in ladder(family.presets["debug"].model):
            flags = [f"--parallel.{field}={value}" for field, value in fields.items()]
            accepted = load_experiment([f"--model_type={name}", "--size=debug", *flags], FAMILIES, world_size=1)
            assert {field: getattr(accepted.config.parallel, field) for field in fields} == fields
