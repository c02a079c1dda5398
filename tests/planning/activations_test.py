"""Kept activations of small cases, counted by hand from what each module saves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig, TrainConfig
from gptoughts.models.deepseek.config import DeepSeekConfig
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.llada.config import LLaDAConfig
from gptoughts.models.mla.config import MLAConfig
from gptoughts.planning.activations import (
    forwards_in_flight,
    fullest_bytes,
    last_stage_bytes,
    pipeline_output_bytes,
    stage_activation_bytes,
)
from gptoughts.planning.layers import Microbatch, layer_bytes, microbatch

GPT = GPTConfig(num_layers=2, hidden_size=8, ffn_hidden_size=24, num_attention_heads=4, vocab_size=100).filled()
ONE_TOKEN = Microbatch(tokens=1, tensor=1, is_sequence_divided=False, expert=1, width=2)
WIDE = replace(ONE_TOKEN, width=4)


def test_a_dense_layer() -> None:
    """Two norms: input 16, output 16 and inverse 4 each. Attention: projection 48, q and k 32, output 16, log-sum-exp
    16. SwiGLU: 96 and 48."""
    assert layer_bytes(GPT, 0, ONE_TOKEN) == 2 * (16 + 16 + 4) + 48 + 32 + 16 + 16 + 96 + 48
    assert layer_bytes(GPT, 0, replace(ONE_TOKEN, tokens=7)) == 7 * layer_bytes(GPT, 0, ONE_TOKEN)


def test_grouped_queries_and_head_norms() -> None:
    grouped = replace(GPT, num_query_groups=2)
    saved = 2 * 2 * 2 * 2 + 2 * 2 * 2  # keys and values of two heads in the projection, turned keys
    assert layer_bytes(GPT, 0, ONE_TOKEN) - layer_bytes(grouped, 0, ONE_TOKEN) == saved
    normed = replace(GPT, qk_layernorm=True)
    assert layer_bytes(normed, 0, ONE_TOKEN) - layer_bytes(GPT, 0, ONE_TOKEN) == (4 + 4) * 4
    both = replace(grouped, qk_layernorm=True)
    assert layer_bytes(both, 0, ONE_TOKEN) - layer_bytes(grouped, 0, ONE_TOKEN) == (4 + 2) * 4 + 8 * 2


def test_tensor_parallelism_divides_the_inside_and_the_sequence_the_rest() -> None:
    batch = replace(ONE_TOKEN, tokens=4)
    residual = 4 * 2 * (16 + 16 + 4)
    inside = layer_bytes(GPT, 0, batch) - residual
    assert layer_bytes(GPT, 0, replace(batch, tensor=2)) == residual + inside // 2
    assert layer_bytes(GPT, 0, replace(batch, tensor=2, is_sequence_divided=True)) == (residual + inside) // 2


def test_context_parallelism_keeps_what_is_exchanged() -> None:
    """Of a part of four tokens: queries, keys and values 48 each token, the output twice 32, log-sum-exp 16."""
    outside = 4 * 2 * (16 + 16 + 4) + 4 * (96 + 48)
    batch = replace(ONE_TOKEN, tokens=4, context=2)
    assert layer_bytes(GPT, 0, batch) == outside + 4 * (48 + 32 + 16)
    # A ring keeps turned queries, its own keys and values, and the output once.
    assert layer_bytes(GPT, 0, replace(batch, is_ring=True)) == outside + 4 * (16 + 32 + 16 + 16)
    # One key head of each kind, sent to both ranks: 4 + 2 + 2 of size 2. Norms of heads keep the projection, 4 + 2.
    grouped = replace(GPT, num_query_groups=1)
    assert layer_bytes(grouped, 0, batch) == outside + 4 * (32 + 32 + 16)
    normed = layer_bytes(replace(grouped, qk_layernorm=True), 0, batch)
    assert normed - layer_bytes(grouped, 0, batch) == 4 * (24 + 16 + 5 * 4)


def test_a_rank_has_its_part_of_the_tokens() -> None:
    config = ExperimentConfig(model=GPT, batch_size=3, block_size=32, parallel=ParallelConfig(context=4))
    assert microbatch(config).tokens == 24


def test_latent_attention() -> None:
    model = MLAConfig(num_layers=1, hidden_size=8, ffn_hidden_size=24, num_attention_heads=2, kv_lora_rank=6,
                      qk_head_dim=4, qk_pos_emb_head_dim=2, v_head_dim=3)  # fmt: skip
    # q and k 2 x 12 numbers, their source with values 14, output padded to keys' size 12 and cut to 6, fp32 lse 2;
    # latent with the rotary part 8, its norm's output 6 and inverse.
    attention = 4 * (24 + 14 + 12 + 6) + 4 * 2 + 4 * (8 + 6) + 4
    assert layer_bytes(model, 0, WIDE) == 2 * (32 + 32 + 4) + attention + 4 * 72
    # Exchanged queries, keys and values 12, 12 and 6; output padded 12, and ahead of its projection 6.
    exchanged = layer_bytes(model, 0, replace(WIDE, context=2))
    assert layer_bytes(model, 0, WIDE) - exchanged == 4 * (24 + 14 + 12 + 6) - 4 * (30 + 12 + 6)
    ring = layer_bytes(model, 0, replace(WIDE, context=2, is_ring=True))
    assert layer_bytes(model, 0, WIDE) - ring == 4 * (24 + 14 + 12 + 6) - 4 * (30 + 6)
    with_queries = layer_bytes(replace(model, q_lora_rank=5), 0, WIDE)
    assert with_queries - layer_bytes(model, 0, WIDE) == 4 * (5 + 5) + 4


def test_experts() -> None:
    model = DeepSeekConfig(
        num_layers=2, hidden_size=8, ffn_hidden_size=24, num_attention_heads=2, num_moe_experts=4, moe_router_topk=2,
        moe_ffn_hidden_size=10, moe_shared_expert_intermediate_size=6,
    )  # fmt: skip
    dense, experts = layer_bytes(model, 0, WIDE), layer_bytes(model, 1, WIDE)
    # scores 4, chosen 2 ids and gates, two sums of scores; per pair gate and up 20, gate, two places; shared 18
    router = 4 * 4 + 2 * (8 + 4) + 4 + 4
    routed = 2 * (4 * 20 + 4 + 16)
    assert experts - (dense - 4 * 72) == router + routed + 4 * 18
    # In bf16 the router has copies in fp32: of its input, and of its weight once.
    half = replace(WIDE, width=2)
    narrow = layer_bytes(model, 1, half) - (layer_bytes(model, 0, half) - 2 * 72)
    assert narrow == router + 2 * (2 * 20 + 4 + 16) + 2 * 18 + 4 * 8 + 4 * 4 * 8
    # Rows from other ranks are kept, and whose they are.
    travelled = layer_bytes(model, 1, replace(WIDE, expert=2)) - experts
    assert travelled == 2 * (4 * 8 + 16)


def test_the_last_stage() -> None:
    # norm 16 + 4, output layer's input 16, logits of the padded vocabulary, log-sum-exp, id, weight
    assert last_stage_bytes(GPT, ONE_TOKEN) == 16 + 4 + 16 + 2 * 128 + 4 + 8 + 4
    masked = LLaDAConfig(num_layers=2, hidden_size=8, num_attention_heads=4, vocab_size=100).filled()
    batch = replace(ONE_TOKEN, tokens=10)
    whole, half = last_stage_bytes(masked, batch), last_stage_bytes(masked, batch, 0.5)
    assert whole - half == 5 * (16 + 8 + 2 * 128 + 12)


@pytest.mark.parametrize(
    ("parallel", "microbatches", "expected"),
    [
        (ParallelConfig(pipeline=4), 8, [4, 3, 2, 1]),
        (ParallelConfig(pipeline=4), 2, [2, 2, 2, 1]),
        (ParallelConfig(pipeline=2, virtual_pipeline=2), 4, [5, 3]),
        (ParallelConfig(pipeline=2, virtual_pipeline=2), 2, [4, 3]),
    ],
)
def test_microbatches_in_flight(parallel: ParallelConfig, microbatches: int, expected: list[int]) -> None:
    found = [forwards_in_flight(parallel, stage, microbatches) for stage in range(parallel.pipeline)]
    assert found == expected


def test_the_fullest_moment_of_unequal_chunks() -> None:
    """Stage 0 of 2 with 2 chunks: forwards 0 0 1 1 0, then a backward of chunk 1 and a forward in turn."""
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2)
    assert fullest_bytes([1, 0], parallel, 0, 4) == 4  # 0 0 1 1 0, and 0 once more in place of a 1
    assert fullest_bytes([0, 1], parallel, 0, 4) == 2


def test_a_stage_keeps_what_it_has_sent_on() -> None:
    config = ExperimentConfig(
        model=GPT, batch_size=1, block_size=1, parallel=ParallelConfig(pipeline=2), train=TrainConfig(precision="bf16")
    )
    assert pipeline_output_bytes(config, ONE_TOKEN, 0, 4) == 2 * 16
    assert pipeline_output_bytes(config, ONE_TOKEN, 1, 4) == 0
    # Two microbatches of one layer, with a rotary table of two numbers (of a head's size) and the token's id.
    assert stage_activation_bytes(config, ONE_TOKEN, 0, 4) == 2 * (layer_bytes(GPT, 0, ONE_TOKEN) + 4 + 8)
