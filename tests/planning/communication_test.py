"""Bytes on the links and the time of a step, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig, TrainConfig
from gptoughts.models.deepseek.config import DeepSeekConfig
from gptoughts.models.flops import flops_per_token
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.registry import FAMILIES
from gptoughts.planning.communication import (
    Links,
    context_bytes,
    data_bytes,
    expert_bytes,
    pipeline_bytes,
    step_traffic,
    tensor_bytes,
)
from gptoughts.planning.layers import Microbatch
from gptoughts.planning.memory import Division
from gptoughts.planning.throughput import Machine, stage_flops_per_token, step_time
from gptoughts.planning.zero import ZeroSettings

GPT = GPTConfig(num_layers=4, hidden_size=8, ffn_hidden_size=24, num_attention_heads=4, vocab_size=100).filled()
BATCH = Microbatch(tokens=10, tensor=4, is_sequence_divided=False, expert=1, width=2)


ONE_RANK = ParallelConfig()


def experiment(parallel: ParallelConfig = ONE_RANK, model: GPTConfig | MLAConfig = GPT) -> ExperimentConfig:
    return ExperimentConfig(
        model=model, batch_size=2, block_size=16, parallel=parallel, train=TrainConfig(precision="bf16")
    )


def settings(stage: int) -> ZeroSettings:
    return ZeroSettings.read({"zero_optimization": {"stage": stage}}, "bf16")


def test_tensor_parallelism_reduces_two_inputs_and_two_outputs_per_layer() -> None:
    """Ring all-reduces over 4 ranks send 2 x 3/4 of 10 x 8 numbers of 2 bytes, four times a layer."""
    assert tensor_bytes(experiment(), BATCH, [0], is_last=False) == 4 * 2 * 0.75 * 160
    assert tensor_bytes(experiment(), replace(BATCH, tensor=1), [0], is_last=True) == 0
    # Divided sequences: gathered twice and scattered twice forward, backward the same, and gathered twice once more.
    divided = replace(BATCH, is_sequence_divided=True)
    assert tensor_bytes(experiment(), divided, [0], is_last=False) == 10 * 0.75 * 160
    # The output layer's input.
    assert tensor_bytes(experiment(), divided, [0], is_last=True) == 13 * 0.75 * 160


def test_latent_attention_exchanges_its_latents() -> None:
    model = MLAConfig(num_layers=1, hidden_size=8, ffn_hidden_size=24, num_attention_heads=4, kv_lora_rank=6)
    found = tensor_bytes(experiment(model=model), BATCH, [0], is_last=False)
    assert found == 2 * 0.75 * 10 * 2 * ((8 + 8 + 6) + 8 + 8 + 8)


def test_experts_are_sent_to_and_fro_twice() -> None:
    model = DeepSeekConfig(num_layers=3, hidden_size=8, num_attention_heads=4, moe_router_topk=3)
    batch = replace(BATCH, tensor=1, expert=4)
    assert expert_bytes(experiment(model=model), batch, [0, 1, 2]) == 2 * 4 * 0.75 * 3 * 160  # layer 0 is dense
    everything = replace(model, moe_token_dispatcher_type="allgather")
    assert expert_bytes(experiment(model=everything), batch, [1]) == 4 * 3 * 160
    assert expert_bytes(experiment(), batch, [0]) == 0


def test_context_parallelism_exchanges_all_of_attention_twice() -> None:
    """Each way 3/4 of 4 query, 4 key, 4 value heads of size 2, and of 4 outputs; two tensor-parallel ranks halve it."""
    batch = replace(BATCH, tensor=1, context=4)
    assert context_bytes(experiment(), batch, [0, 1]) == 2 * 2 * 0.75 * 10 * 2 * (4 * 4 * 2)
    assert context_bytes(experiment(), replace(batch, tensor=2), [0]) == 2 * 0.75 * 10 * 2 * (2 * 4 + 2 * 8) * 2 / 2
    grouped = replace(GPT, num_query_groups=2)  # each key head to two of the ranks
    assert context_bytes(experiment(model=grouped), batch, [0]) == 2 * 0.75 * 10 * 2 * (4 * 4 * 2)
    assert context_bytes(experiment(), BATCH, [0]) == 0
    ring = replace(batch, is_ring=True)  # keys and values three times there and again, fp32 gradients four times
    assert context_bytes(experiment(model=grouped), ring, [0]) == 10 * (2 * 2 * 2) * (2 * 3 * 2 + 4 * 4)
    latent = MLAConfig(num_layers=1, hidden_size=8, num_attention_heads=4, qk_head_dim=4, qk_pos_emb_head_dim=2,
                       v_head_dim=3)  # fmt: skip
    assert context_bytes(experiment(model=latent), batch, [0]) == 2 * 0.75 * 10 * 2 * 4 * (6 + 6 + 3 + 3)


def test_stages_hand_on_what_they_hold_of_the_sequence() -> None:
    stages = experiment(ParallelConfig(pipeline=2, virtual_pipeline=2))
    assert pipeline_bytes(stages, BATCH) == 2 * 2 * 160
    assert pipeline_bytes(stages, replace(BATCH, is_sequence_divided=True)) == 2 * 2 * 2 * 8 * 2  # 10 // 4 tokens
    assert pipeline_bytes(experiment(), BATCH) == 0


@pytest.mark.parametrize(("stage", "expected"), [(0, 8), (1, 4), (2, 3 * 2 + 2), (3, 3 * (2 * 2 + 2))])
def test_zero_exchanges_gradients_and_weights(stage: int, expected: int) -> None:
    """Bytes per parameter in a step of 3 microbatches, 3/4 of them elsewhere."""
    assert data_bytes(Division(1000, 0, 4, 1), settings(stage), 2, 3) == 0.75 * 1000 * expected
    # Experts that two of the four ranks share have two ranks to be reduced over.
    assert data_bytes(Division(0, 1000, 4, 2), settings(stage), 2, 3) == 0.5 * 1000 * expected


def test_the_slowest_link_of_a_group_decides() -> None:
    links = Links(intra_node=100.0, inter_node=10.0, ranks_per_node=8)
    assert links.of_group(1, 8) == links.of_group(4, 2) == 100.0
    assert links.of_group(1, 16) == links.of_group(8, 2) == 10.0
    traffic = step_traffic(
        experiment(ParallelConfig(tensor=4)), Division(1000, 0, 4, 1), settings(1), 0, num_microbatches=3, links=links
    )
    assert traffic.seconds["tensor"] == traffic.num_bytes["tensor"] / 100.0
    assert traffic.seconds["data"] == traffic.num_bytes["data"] / 10.0
    assert traffic.num_bytes["data"] == 0.75 * 1000 * 4


def test_stages_share_the_models_operations() -> None:
    family = FAMILIES["gpt"]
    whole = stage_flops_per_token(family, experiment())
    assert whole == [flops_per_token(family, GPT, 16)]
    stages = stage_flops_per_token(family, experiment(ParallelConfig(pipeline=2)))
    assert sum(stages) == whole[0]
    assert stages[1] - stages[0] == 6 * (128 * 8 + 8)  # output layer and final norm


def test_a_step_is_products_bubble_and_links() -> None:
    config = experiment(ParallelConfig(pipeline=2))
    flops = max(stage_flops_per_token(FAMILIES["gpt"], config))
    free = Links(float("inf"), float("inf"), 8)
    found = step_time(FAMILIES["gpt"], config, settings(1), Machine(1e6, free), data=4, num_microbatches=3)
    products = 3 * 32 * flops / 1e6
    assert found.compute_seconds == pytest.approx(products)
    assert found.seconds == pytest.approx(products / 3 * (3 + 1))  # (P - 1) / V = 1 microbatch is lost
    assert found.bubble_fraction == 0.25
    assert found.tokens_per_second == pytest.approx(4 * 3 * 32 / found.seconds)
    slow = step_time(FAMILIES["gpt"], config, settings(1), Machine(1e6, Links(1e3, 1e3, 8)), data=4, num_microbatches=3)
    waited = slow.traffic.seconds["pipeline"] * 4 / 3 + slow.traffic.seconds["data"]
    assert slow.seconds == pytest.approx(found.seconds + waited)


def test_context_parallel_ranks_share_the_products() -> None:
    machine = Machine(1e6, Links(float("inf"), float("inf"), 8))
    alone, shared = (
        step_time(FAMILIES["gpt"], experiment(ParallelConfig(context=n)), settings(1), machine, data=4 // n,
                  num_microbatches=3)
        for n in (1, 2)
    )  # fmt: skip
    assert shared.compute_seconds == alone.compute_seconds / 2
    assert shared.tokens_per_second == pytest.approx(alone.tokens_per_second)  # half the samples, in half the time


def test_zero_3_exchanges_beside_products() -> None:
    config = experiment()
    machine = Machine(1e6, Links(1e6, 1e6, 8))
    found = step_time(FAMILIES["gpt"], config, settings(3), machine, data=4, num_microbatches=1)
    assert 0 < found.traffic.seconds["data"] < found.compute_seconds
    assert found.seconds == found.compute_seconds
