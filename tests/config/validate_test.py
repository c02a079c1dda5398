"""Batch arithmetic and the checks against the world size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptoughts.config.cli import load_experiment
from gptoughts.config.resolve import Experiment
from gptoughts.errors import ConfigError
from gptoughts.models.registry import FAMILIES


def load(flags: str, world_size: int = 1) -> Experiment:
    return load_experiment(flags.split(), FAMILIES, world_size=world_size)


def problems(flags: str, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        load(flags, world_size)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("flags", "world_size", "expected"),
    [  # expected: batch_size, num_microbatches, samples per step
        ("", 1, (8, 1, 8)),
        ("", 4, (8, 1, 32)),
        ("--batch_size 2", 2, (2, 1, 4)),
        ("--batch_size 2 --train.global_batch_size 16", 2, (2, 4, 16)),
        ("--batch_size 2 --train.gradient_accumulation_steps 3", 2, (2, 3, 12)),
        ("--train.global_batch_size 4", 1, (4, 1, 4)),  # the preset's 8 gives way
        ("--train.global_batch_size 36", 1, (6, 6, 36)),
        ("--train.global_batch_size 24 --train.gradient_accumulation_steps 2", 2, (6, 2, 24)),
        ("--batch_size 2 --train.global_batch_size 8 --train.gradient_accumulation_steps 4", 1, (2, 4, 8)),
        ("--batch_size 2 --train.global_batch_size 8 --parallel.tensor 2", 4, (2, 2, 8)),
        (
            "--batch_size 2 --parallel.context 8 --parallel.context_method ring",
            8,
            (2, 1, 2),
        ),  # more than there are heads
        ("--batch_size 2 --train.global_batch_size 8 --parallel.context 2", 4, (2, 2, 8)),  # 2 data-parallel ranks
    ],
)
def test_batch_sizes(flags: str, world_size: int, expected: tuple[int, int, int]) -> None:
    run = load(flags, world_size)
    assert (run.config.batch_size, run.num_microbatches, run.samples_per_step) == expected
    assert run.config.train.global_batch_size == run.samples_per_step
    assert run.deepspeed["train_micro_batch_size_per_gpu"] == expected[0]


@pytest.mark.parametrize(
    ("flags", "world_size", "part"),
    [
        ("--train.global_batch_size 3", 2, "train.global_batch_size=3 (command line): not divisible by 2 data"),
        ("--batch_size 3 --train.global_batch_size 8", 1, "not divisible by batch_size=3 (command line) x 1"),
        ("--batch_size 8 --train.global_batch_size 4", 1, "not divisible by batch_size=8"),
        ("--batch_size 2 --train.global_batch_size 8 --train.gradient_accumulation_steps 3", 1, "is not batch_size=2"),
        ("--train.global_batch_size 0", 1, "train.global_batch_size=0 (command line): must be 1 or more"),
        ("--train.gradient_accumulation_steps 0", 1, "must be 1 or more"),
        ("--parallel.tensor 2", 3, "world size 3 is not divisible by 2; allowed: 1, or start a multiple of 2"),
        ("--parallel.tensor 2", 1, "the world size 1 is not divisible by 2"),
        ("--parallel.tensor 4 --model.num_query_groups 2", 4, "num_query_groups=2 is not divisible by 4; allowed: 1"),
        ("--parallel.tensor 4 --model.ffn_hidden_size 702", 4, "ffn_hidden_size=702 is not divisible by 4"),
        ("--parallel.tensor 0", 1, "parallel.tensor=0 (command line): must be 1 or more"),
        ("--parallel.expert 2", 2, "parallel.expert=2 (command line): this model (gpt) has no experts to divide"),
        ("--model_type deepseek --parallel.expert 2 --parallel.pipeline 4", 8, "stage 0 would have no layer with"),
        ("--model_type deepseek --parallel.expert 0", 1, "parallel.expert=0 (command line): must be 1 or more"),
        ("--model_type deepseek --parallel.expert 3", 3, "num_moe_experts=8 is not divisible by 3; allowed: 1"),
        ("--model_type deepseek --parallel.expert 4 --parallel.tensor 2", 4,
         "the number of data-parallel ranks=2 is not divisible by 4; allowed: 1, 2"),
        ("--parallel.context 0", 1, "parallel.context=0 (command line): must be 1 or more"),
        ("--parallel.context 2", 3, "parallel.tensor=1 (default) x parallel.pipeline=1 (default) x parallel.context=2 "
         "(command line): the world size 3 is not divisible by 2; start a multiple of 2 ranks"),
        ("--parallel.context 3 --block_size 33", 3, "parallel.context=3 (command line): num_attention_heads=4 is not "
         "divisible by it: in attention each of these ranks has whole heads; allowed: 1, 2, 4, or "
         "--parallel.context_method ring"),
        ("--parallel.context_method ring", 1, "parallel.context_method=ring (command line): is between ranks that "
         "share sequences; needs parallel.context of 2 or more"),
        ("--parallel.context 2 --parallel.context_method ring --block_size 34", 2, "parallel.context=2 (command line): "
         "block_size=34 is not divisible by 4: with ring each rank has two pieces of it"),
        ("--parallel.context 2 --parallel.context_method ring --model.attention_dropout 0.1", 2,
         "model.attention_dropout=0.1: ring draws no random numbers"),
        ("--parallel.context 4 --parallel.tensor 2", 8, "num_attention_heads=4 / parallel.tensor=2 is not divisible by "
         "it: in attention each of these ranks has whole heads; allowed: 1, 2"),
        ("--parallel.context 2 --block_size 33", 2, "parallel.context=2 (command line): block_size=33 is not"),
        ("--parallel.context 2 --parallel.tensor 2 --parallel.sequence true --block_size 34", 4,
         "block_size=34 is not divisible by 2 x parallel.tensor=2 (sequence)"),
        ("--model_type deepseek --parallel.context 2 --parallel.expert 4", 2,
         "the number of data- and context-parallel ranks=2 is not divisible by 4; allowed: 1, 2"),
        ("--parallel.sequence true", 1, "needs parallel.tensor of 2 or more"),
        ("--parallel.sequence true --parallel.tensor 2 --block_size 33", 2, "block_size=33 is not divisible by"),
        ("--model_type mla --model.qk_pos_emb_head_dim 31", 1, "turns pairs; must be even"),
        ("--model_type mla --model.add_qkv_bias true", 1, "has no such bias"),
        ("--model_type mla --model.q_lora_rank -1", 1, "model.q_lora_rank=-1 (command line): must be 0"),
        ("--model.hidden_size 250", 1, "model.num_attention_heads=4 (preset gpt/debug): hidden_size=250 is not"),
        ("--model.kv_channels 33", 1, "model.kv_channels=33 (command line): the rotary embedding turns pairs"),
    ],
)  # fmt: skip
def test_what_cannot_be_run(flags: str, world_size: int, part: str) -> None:
    assert part in problems(flags, world_size)


def test_tensor_parallelism_leaves_the_rest_to_data() -> None:
    run = load("--parallel.tensor 2 --parallel.sequence true", 4)
    assert run.data_parallel_size == 2


def test_experts_are_divided_over_data_parallel_ranks() -> None:
    run = load("--model_type deepseek --parallel.expert 2 --parallel.tensor 2 --batch_size 1", 8)
    assert (run.data_parallel_size, run.samples_per_step) == (4, 4)


@pytest.mark.parametrize(("stage", "is_refused"), [(1, True), (2, True), (3, False)])
@pytest.mark.parametrize("key", ["reduce_scatter", "contiguous_gradients"])
def test_what_deepspeed_cannot_do_with_divided_experts(tmp_path: Path, key: str, stage: int, is_refused: bool) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, key: False}}))
    flags = f"--model_type deepseek --deepspeed_config {path} --parallel.expert "
    assert load(flags + "1", 2).zero_stage == stage
    if is_refused:
        assert f"{path}: zero_optimization.{key}=false: with parallel.expert=2" in problems(flags + "2", 2)
    else:
        assert load(flags + "2", 2).zero_stage == stage


def test_derived_fields_are_filled() -> None:
    config = load("--train.steps 5").config
    assert (config.optim.warmup_steps, config.train.precision, config.use_fp8) == (5, "bf16", False)
    assert (config.model.num_query_groups, config.model.kv_channels) == (4, 64)
    assert load("--model_type mla --model.q_lora_rank 0").config.model.q_lora_rank is None
    assert load("--train.steps 1000000").config.optim.warmup_steps == 2000


def test_texts_that_an_unset_shell_variable_leaves_empty() -> None:
    found = problems("--output_dir= --resume=")
    assert "output_dir= (command line): is empty" in found
    assert "resume= (command line): is empty" in found
