"""Which activations are recomputed: groups of layers, parts by name, and what is refused."""

from __future__ import annotations

import pytest

from gptoughts.config.experiment import ParallelConfig
from gptoughts.config.recompute import layer_groups, recomputed_modules
from tests.config.validate_test import load, problems

FULL = "--parallel.recompute_granularity full "
SELECTIVE = "--parallel.recompute_granularity selective "


def groups(num_layers: int, **recompute: object) -> list[tuple[list[int], bool]]:
    parallel = ParallelConfig(recompute_granularity="full", **recompute)  # type: ignore[arg-type]
    return [(list(layers), is_recomputed) for layers, is_recomputed in layer_groups(num_layers, parallel)]


def test_groups_of_layers() -> None:
    assert groups(2) == [([0], True), ([1], True)]
    assert groups(5, recompute_num_layers=2) == [([0, 1], True), ([2, 3], True), ([4], True)]
    assert groups(3, recompute_method="block", recompute_num_layers=2) == [([0], True), ([1], True), ([2], False)]
    assert layer_groups(2, ParallelConfig()) == [(range(1), False), (range(1, 2), False)]


def test_parts_by_name() -> None:
    assert recomputed_modules(ParallelConfig()) == ()
    assert recomputed_modules(load(SELECTIVE).config.parallel) == ("core_attn",)
    named = load(SELECTIVE + "--parallel.recompute_modules mlp,layernorm").config.parallel
    assert recomputed_modules(named) == ("mlp", "layernorm")
    everything = "core_attn,layernorm,mlp,mla_up_proj,moe,shared_experts"
    for names in (everything.removesuffix(",shared_experts"), everything.replace(",moe", "")):
        load(f"{SELECTIVE}--model_type deepseek --parallel.recompute_modules {names}")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--parallel.recompute_granularity some", "expected one of none, full, selective"),
        ("--parallel.recompute_num_layers 2", "recompute_num_layers=2 (command line): belongs to parallel.recompute_"
         "granularity=full, which is none (default)"),
        (FULL + "--parallel.recompute_modules mlp", "recompute_modules=mlp (command line): belongs to"),
        (SELECTIVE + "--parallel.recompute_method block", "recompute_method=block (command line): belongs to"),
        (FULL + "--parallel.recompute_num_layers 0", "must be 1 or more"),
        (FULL + "--parallel.recompute_num_layers 5", "the model has 4 layers; allowed: 1 to 4"),
        (FULL + "--parallel.recompute_num_layers 3 --parallel.pipeline 2", "the largest chunk of a stage has 2 layers"),
        (SELECTIVE + "--parallel.recompute_modules moe_act", "the routed experts never keep their activation"),
        (SELECTIVE + "--parallel.recompute_modules core_atn", "did you mean 'core_attn'?; allowed: core_attn, "
         "layernorm, mlp"),
        (SELECTIVE + "--parallel.recompute_modules mlp,", "recompute_modules= (command line): no part of"),
        (SELECTIVE + "--parallel.recompute_modules mla_up_proj", "no part of this model's layers"),
        (SELECTIVE + "--parallel.recompute_modules mlp,mlp", "stands there 2 times"),
        (SELECTIVE + "--model_type mla --parallel.recompute_modules mla_up_proj --parallel.context 2",
         "attention keeps what ranks have sent"),
        (SELECTIVE + "--model_type mla --parallel.recompute_modules mla_up_proj --use_fp8 true",
         "would be cast with later scales"),
        (SELECTIVE + "--model_type deepseek --parallel.recompute_modules moe,shared_experts", "moe holds them already"),
        (SELECTIVE + "--model_type deepseek --model.first_k_dense_layers 0 --parallel.recompute_modules mlp",
         "allowed: core_attn, layernorm, mla_up_proj, moe, shared_experts"),
    ],
)  # fmt: skip
def test_what_is_refused(flags: str, part: str) -> None:
    assert part in problems(flags, 2)


def test_deepspeeds_own_checkpointing_is_refused_with_the_flag_to_use() -> None:
    from gptoughts.config.deepspeed_keys import TOP_LEVEL

    assert "--parallel.recompute_granularity" in TOP_LEVEL["activation_checkpointing"].note
