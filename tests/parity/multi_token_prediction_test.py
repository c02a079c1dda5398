"""Multi-token prediction and the balance losses against a plain implementation: loss and every gradient.

Error of a tensor: max|a - b| / max|b|, as against transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.models.deepseek.config import DeepSeekConfig
from gptoughts.models.deepseek.model import build_model
from gptoughts.models.language_model import LanguageModel
from gptoughts.models.parameter_names import global_buffer_names, global_parameter_names
from gptoughts.objectives.base import ModelInputs
from gptoughts.objectives.causal_lm import CausalLM
from gptoughts.objectives.multi_token import MultiTokenLoss
from gptoughts.parallel import groups
from tests.parity.deepseek_reference import Losses, Reference

RELATIVE = 1e-5
SEQUENCE, VOCABULARY = 24, 128
SCALING = 0.3
SHAPE = DeepSeekConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, vocab_size=VOCABULARY,
    seq_length=SEQUENCE, kv_lora_rank=16, qk_head_dim=12, qk_pos_emb_head_dim=8, v_head_dim=10, moe_ffn_hidden_size=12,
    moe_shared_expert_intermediate_size=20, moe_router_topk_scaling_factor=1.5, moe_aux_loss_coeff=0.0,
    mtp_loss_scaling_factor=SCALING,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "one-depth": {"mtp_num_layers": 1},
    "two-depths-tied": {"mtp_num_layers": 2, "untie_embeddings_and_output_weights": False, "q_lora_rank": 20},
    "three-depths-v2": {
        "mtp_num_layers": 3, "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False,
        "moe_router_normalize_gates": False,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=5)
    yield
    groups.destroy()


def randomized(shape: DeepSeekConfig) -> LanguageModel:
    """Norm weights about 1, matrices of a size that makes scores differ, biases of routers."""
    model = build_model(ExperimentConfig(model_type="deepseek", model=shape), params_dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in global_parameter_names(model).values():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.15, generator=generator)
        for buffer in global_buffer_names(model).values():
            buffer.normal_(0.0, 0.2, generator=generator)
    return model


def batch() -> tuple[Tensor, ModelInputs]:
    """Two rows whose weights differ from place to place; some are 0, among them the first and the last."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
    inputs = CausalLM().prepare(tokens, torch.arange(2))
    weights = torch.rand(2, SEQUENCE, generator=generator)
    weights[weights < 0.3] = 0.0
    weights[0, 0] = weights[1, -1] = 0.0
    return tokens, dataclasses.replace(inputs, loss_weights=weights, denominator=weights.double().sum())


def our_gradients(model: LanguageModel, inputs: ModelInputs, **options: Any) -> tuple[float, float, dict[str, Tensor]]:
    """Sum of the main loss, of what the depths add, and gradients of their mean."""
    losses = model(inputs.input_ids, inputs.position_ids, None, labels=inputs.labels, **options)
    main = CausalLM().reduce(losses[0], inputs.loss_weights)
    further, extras = MultiTokenLoss(SCALING)(losses[1:], inputs)
    assert not any(extra.requires_grad for extra in extras.values())
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))
    model.zero_grad()
    ((main + further) / inputs.denominator.float()).backward()
    gradients = {name: p.grad for name, p in global_parameter_names(model).items() if p.grad is not None}
    return main.item(), further.item(), gradients


def reference(model: LanguageModel, shape: DeepSeekConfig, tokens: Tensor, weights: Tensor) -> tuple[Losses, Any]:
    """The plain implementation's losses, and its weights."""
    copies = {name: p.detach().clone().requires_grad_() for name, p in global_parameter_names(model).items()}
    return Reference(shape, copies | global_buffer_names(model))(tokens, weights), copies


def check(gradients: dict[str, Tensor], copies: dict[str, Tensor]) -> None:
    assert gradients.keys() == copies.keys()
    for name, copy in copies.items():
        assert copy.grad is not None, name
        error = (gradients[name] - copy.grad).abs().max() / copy.grad.abs().max()
        assert error <= RELATIVE, name


@pytest.mark.parametrize("case", CASES)
def test_equals_a_plain_implementation(case: str) -> None:
    shape = dataclasses.replace(SHAPE, **CASES[case])
    assert shape.problems() == []
    model = randomized(shape)
    tokens, inputs = batch()
    main, further, gradients = our_gradients(model, inputs)
    losses, copies = reference(model, shape, tokens, inputs.loss_weights)
    expected = torch.stack(losses.depths).mean() * SCALING
    assert main == pytest.approx(losses.main.item(), rel=RELATIVE)
    assert further == pytest.approx(expected.item(), rel=RELATIVE)
    ((losses.main + expected) / inputs.denominator.float()).backward()
    check(gradients, copies)


def test_selected_positions_change_no_sum_and_no_gradient() -> None:
    model = randomized(dataclasses.replace(SHAPE, mtp_num_layers=2))
    _, inputs = batch()
    everywhere = our_gradients(model, inputs)
    selected = inputs.loss_weights.flatten().nonzero().squeeze(1)
    there = our_gradients(model, inputs, selected_positions=selected)
    assert there[:2] == pytest.approx(everywhere[:2], rel=1e-6)
    for name, gradient in everywhere[2].items():
        assert (there[2][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_evaluation_runs_the_main_model_alone() -> None:
    shape = dataclasses.replace(SHAPE, mtp_num_layers=2)
    model = randomized(shape)
    _, inputs = batch()
    trained = model(inputs.input_ids, None, None, labels=inputs.labels)
    evaluated = model.eval()(inputs.input_ids, None, None, labels=inputs.labels)
    assert trained.shape == (3, 2, SEQUENCE)
    assert torch.equal(evaluated, trained[0])
    assert model(inputs.input_ids).shape == (2, SEQUENCE, VOCABULARY)


def test_off_by_default_and_initial_weights_of_the_main_model_stay() -> None:
    without = global_parameter_names(
        build_model(ExperimentConfig(model_type="deepseek", model=SHAPE), params_dtype=torch.float32)
    )
    shape = dataclasses.replace(SHAPE, mtp_num_layers=1)
    having = global_parameter_names(
        build_model(ExperimentConfig(model_type="deepseek", model=shape), params_dtype=torch.float32)
    )
    assert not any(name.startswith("mtp.") for name in without)
    assert all(torch.equal(having[name], parameter) for name, parameter in without.items())
    like = "decoder.layers.1."
    own = {name.removeprefix("mtp.layers.0."): p for name, p in having.items() if name.startswith("mtp.")}
    assert own.keys() == {
        "enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight",
        *(f"transformer_layer.{name.removeprefix(like)}" for name in without if name.startswith(like)),
    }  # fmt: skip
    assert own["eh_proj.weight"].shape == (32, 64)
    assert sum(p.numel() for p in own.values()) == shape.mtp_parameters()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("loss", ["balance", "z"])
def test_balance_losses_equal_their_formulas(score: str, loss: str) -> None:
    """The gradient of a step is that of all token losses and of coefficient times the formula, a depth's layer too."""
    name = {"balance": "moe_aux_loss_coeff", "z": "moe_z_loss_coeff"}[loss]
    shape = dataclasses.replace(
        SHAPE, num_layers=3, moe_router_score_function=score, moe_router_enable_expert_bias=score == "sigmoid",
        mtp_num_layers=1, **{name: 0.5},
    )  # fmt: skip
    model = randomized(shape)
    tokens, inputs = batch()
    main, _, gradients = our_gradients(model, inputs)
    losses, copies = reference(model, shape, tokens, inputs.loss_weights)
    assert main == pytest.approx(losses.main.item(), rel=RELATIVE), "what is logged is the main loss alone"
    added = getattr(losses, loss)
    assert len(added) == 3, "two layers of the decoder and one depth"
    total = (losses.main + SCALING * losses.depths[0]) / inputs.denominator.float() + 0.5 * torch.stack(added).sum()
    total.backward()
    check(gradients, copies)
