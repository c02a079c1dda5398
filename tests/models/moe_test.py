"""The router's losses and bias, and experts against a loop over tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.models.deepseek.config import DeepSeekConfig
from gptoughts.models.deepseek.model import build_model
from gptoughts.models.expert_load import expert_routers, finish_step, load_figures
from gptoughts.models.grouped_experts import assign
from gptoughts.models.language_model import LanguageModel
from gptoughts.models.moe import MixtureOfExperts
from gptoughts.models.parameter_names import global_buffer_names
from gptoughts.parallel import groups

TOY = DeepSeekConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, vocab_size=128, seq_length=16,
    kv_lora_rank=16, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=8, moe_ffn_hidden_size=12,
    moe_shared_expert_intermediate_size=0, moe_aux_loss_coeff=0.0, moe_router_bias_update_rate=0.25,
)  # fmt: skip
BIAS = "decoder.layers.1.mlp.router.expert_bias"


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=5)
    yield
    groups.destroy()


def build(dtype: torch.dtype = torch.float32, **fields: object) -> LanguageModel:
    shape = dataclasses.replace(TOY, **fields)  # type: ignore[arg-type]
    return build_model(ExperimentConfig(model_type="deepseek", model=shape), params_dtype=dtype)


def run(model: LanguageModel) -> torch.Tensor:
    tokens = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(1))
    return model(tokens[:, :-1], None, None, tokens[:, 1:]).mean()


def test_experts_equal_a_loop_over_tokens_also_where_one_has_none() -> None:
    (layer,) = [m for m in build().modules() if isinstance(m, MixtureOfExperts)]
    experts = layer.experts
    x = torch.randn(5, 32, requires_grad=True)
    gates = torch.rand(5, 2, requires_grad=True)
    chosen = torch.tensor([[0, 1], [1, 7], [7, 0], [3, 1], [0, 3]])
    inputs = (x, gates, experts.linear_fc1_weight, experts.linear_fc2_weight)
    ours = experts(x, gates, assign(chosen, 8))
    rows = []
    for t in range(5):
        row = torch.zeros(32)
        for k in range(2):
            gate, up = (experts.linear_fc1_weight[chosen[t, k]] @ x[t]).chunk(2)
            row = row + gates[t, k] * (experts.linear_fc2_weight[chosen[t, k]] @ (F.silu(gate) * up))
        rows.append(row)
    expected = torch.stack(rows)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn(5, 32)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_bias_moves_after_applied_steps_only_and_stays_fp32() -> None:
    model = build(torch.bfloat16).bfloat16()
    bias = global_buffer_names(model)[BIAS]
    assert list(global_buffer_names(model)) == [BIAS]
    assert bias.dtype is torch.float32
    (router,) = expert_routers(model).values()
    router.tokens_per_expert += torch.tensor([4, 0, 2, 2, 2, 2, 2, 2])
    assert finish_step([model], is_applied=False)
    assert not bias.any()
    assert not router.tokens_per_expert.any()
    router.tokens_per_expert += torch.tensor([4, 0, 2, 2, 2, 2, 2, 2])
    figures = finish_step([model], is_applied=True)
    assert bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0]
    assert (figures["layer_1_expert_load_min"], figures["layer_1_expert_load_max"]) == (0.0, 2.0)


def test_counts_are_of_training_alone() -> None:
    model = build()
    (router,) = expert_routers(model).values()
    run(model)
    assert router.take_counts().sum() == 2 * 16 * 2
    run(model.eval())
    with torch.no_grad():
        run(model.train())
    assert not router.take_counts().any()


def test_load_figures() -> None:
    assert load_figures(torch.ones(4).double()) == {"min": 1.0, "max": 1.0, "entropy": pytest.approx(1.0)}
    assert load_figures(torch.tensor([8.0, 0, 0, 0]).double()) == {"min": 0.0, "max": 4.0, "entropy": 0.0}


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("loss", ["moe_aux_loss_coeff", "moe_z_loss_coeff"])
def test_a_balance_loss_changes_gradients_and_not_the_loss(score: str, loss: str) -> None:
    fields = {"moe_router_score_function": score, "moe_router_enable_expert_bias": False}
    values, gradients = [], []
    for coefficient in (0.0, 1.0):
        model = build(**fields, **{loss: coefficient})
        value = run(model)
        value.backward()
        (router,) = expert_routers(model).values()
        values.append(value.item())
        gradients.append(router.weight.grad)
    assert values[0] == values[1]
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-2)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_padding_counts_neither_for_the_load_nor_in_a_loss(score: str) -> None:
    """A row with a padded end balances as that row without its end."""
    fields = {"moe_router_score_function": score, "moe_router_enable_expert_bias": False, "moe_aux_loss_coeff": 1.0}
    (router,) = expert_routers(build(**fields)).values()
    x = torch.randn(12, 2, 32)
    is_padding = torch.zeros(2, 12, dtype=torch.bool)
    is_padding[1, 7:] = True
    found = []
    for pieces in ([(x, is_padding)], [(x[:, :1], None), (x[:7, 1:], None)]):
        router.weight.grad = None
        for hidden, padding in pieces:
            gates, _ = router(hidden, padding)
            (gates.sum() * 0.0).backward()
        found.append((router.take_counts(), router.weight.grad))
    (counts, gradient), (expected_counts, summed) = found
    assert counts.tolist() == expected_counts.tolist()
    torch.testing.assert_close(gradient, summed / 2, msg="the mean over sequences, not their sum")


def test_padding_counts_not_in_the_z_loss() -> None:
    fields = {"moe_router_enable_expert_bias": False, "moe_z_loss_coeff": 1.0}
    (router,) = expert_routers(build(**fields)).values()
    x = torch.randn(12, 2, 32)
    is_padding = torch.zeros(2, 12, dtype=torch.bool)
    is_padding[1, 7:] = True
    gates, _ = router(x, is_padding)
    (gates.sum() * 0.0).backward()
    logits = (x @ router.weight.t()).transpose(0, 1)[~is_padding]
    expected = torch.autograd.grad(logits.logsumexp(-1).square().sum() / 24, router.weight)[0]
    torch.testing.assert_close(router.weight.grad, expected)
