"""The masked-diffusion family: its mask token, its two-way attention, and an output layer at masked positions only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.models.flops import flops_per_token
from gptoughts.models.llada.config import LLaDAConfig
from gptoughts.models.llada.model import build_model, build_objective
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups
from tests.distributed import run_distributed

SHAPE = LLaDAConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, vocab_size=200,
    seq_length=32, random_length_probability=0.5,
).filled()  # fmt: skip
ROWS = 5


def tokens() -> torch.Tensor:
    return torch.randint(0, 200, (ROWS, 32), generator=torch.Generator().manual_seed(1))


def masked_and_full_head(tensor: int, sequence: bool, tied: bool) -> tuple[float, float, float, int]:
    """Loss with the output layer at selected positions, loss with it everywhere, largest error of a gradient."""
    parallel = ParallelConfig(tensor=tensor, sequence=sequence)
    groups.initialize(parallel, seed=3)
    shape = replace(SHAPE, untie_embeddings_and_output_weights=not tied)
    config = ExperimentConfig(model_type="llada", model=shape, parallel=parallel, seed=3)
    model, objective = build_model(config, params_dtype=torch.float32), build_objective(config)
    inputs = objective.prepare(tokens(), torch.arange(ROWS))
    assert inputs.selected_positions is not None
    assert inputs.selected_positions.numel() < inputs.labels.numel()
    losses, gradients = [], []
    for selected in (inputs.selected_positions, None):
        per_token = model(
            inputs.input_ids, inputs.position_ids, inputs.attention_mask, inputs.labels, selected_positions=selected
        )
        loss = objective.reduce(per_token, inputs.loss_weights) / inputs.denominator
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(*gradients, strict=True))
    return losses[0], losses[1], error, inputs.selected_positions.numel()


@pytest.mark.parametrize(
    ("tensor", "sequence", "tied"), [(1, False, False), (1, False, True), (2, False, False), (2, True, False)]
)
def test_an_output_layer_at_masked_positions_gives_the_same_loss(tensor: int, sequence: bool, tied: bool) -> None:
    for selected, full, error, count in run_distributed(masked_and_full_head, tensor, tensor, sequence, tied):
        assert count % 16 == 0
        assert selected == pytest.approx(full, rel=1e-6)
        assert error < 1e-5


def selected_and_all_logits(tensor: int, sequence: bool, tied: bool) -> tuple[torch.Tensor, torch.Tensor]:
    parallel = ParallelConfig(tensor=tensor, sequence=sequence)
    groups.initialize(parallel, seed=3)
    shape = replace(SHAPE, untie_embeddings_and_output_weights=not tied)
    config = ExperimentConfig(model_type="llada", model=shape, parallel=parallel, seed=3)
    model = build_model(config, params_dtype=torch.float32)
    selected = torch.tensor([40, 3, 159, 32])
    with torch.no_grad():
        return model(tokens(), selected_positions=selected), model(tokens()).flatten(0, 1)[selected]


@pytest.mark.parametrize(("tensor", "sequence", "tied"), [(1, False, True), (2, False, False), (2, True, True)])
def test_logits_at_selected_positions(tensor: int, sequence: bool, tied: bool) -> None:
    for selected, expected in run_distributed(selected_and_all_logits, tensor, tensor, sequence, tied):
        assert selected.shape == (4, 256)
        assert (selected - expected).abs().max() <= 1e-5 * expected.abs().max()


def first_logits(shape: LLaDAConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a row; of the row with another last token; of the row where the last token may not be looked at."""
    groups.initialize(ParallelConfig(), seed=3)
    model = build_model(ExperimentConfig(model_type="llada", model=shape), params_dtype=torch.float32)
    row = tokens()[:1]
    other = row.clone()
    other[0, -1] = (other[0, -1] + 1) % 200
    hidden = torch.zeros(1, 1, 1, 32, dtype=torch.bool)
    hidden[..., -1] = True
    with torch.no_grad():
        short = model(row[:, :-1])
        return model(other)[0, :-1] - model(row)[0, :-1], model(row, None, hidden)[0, :-1] - short[0], short


def test_a_token_sees_what_comes_after_it_unless_that_is_hidden() -> None:
    ((change, hidden_change, logits),) = run_distributed(first_logits, 1, SHAPE)
    scale = logits.abs().max()
    assert change[0].abs().max() > 1e-4 * scale, "the first position looks at the last one"
    assert hidden_change.abs().max() < 1e-5 * scale, "a hidden end is as good as no end"


def test_the_mask_token_is_the_first_free_id_or_one_of_the_tokenizer() -> None:
    free = LLaDAConfig(vocab_size=256)
    assert free.filled().mask_token_id == 256
    assert free.padded_vocab_size == free.filled().padded_vocab_size == 384, "a full vocabulary grows by one padding"
    assert LLaDAConfig(vocab_size=255).padded_vocab_size == 256
    own = LLaDAConfig(vocab_size=256, mask_token_id=7)
    assert own.padded_vocab_size == 256
    assert own.special_tokens() == {"[MASK]": 7}
    assert own.problems() == free.problems() == []


@pytest.mark.parametrize(
    "wrong",
    [{"mask_token_id": -1}, {"mask_token_id": 300}, {"mask_epsilon": 0.0}, {"mask_epsilon": 1.0},
     {"random_length_probability": 1.5}],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_said(wrong: dict[str, Any]) -> None:
    (problem,) = LLaDAConfig(vocab_size=256, **wrong).problems()
    ((name, value),) = wrong.items()
    assert problem.startswith(f"{name}={value}: ")


def test_the_published_shape() -> None:
    """8,015,581,184 parameters (huggingface.co/GSAI-ML/LLaDA-8B-Base, safetensors metadata)."""
    assert FAMILIES["llada"].presets["llada-8b"].model.total_parameters() == 8_015_581_184


def test_flops_count_both_directions_and_half_an_output_layer() -> None:
    model = replace(SHAPE, mask_epsilon=1e-9)
    bidirectional = 6 * 2 * 32 * model.attention_width()
    block = 2 * model.layer_parameters() + model.hidden_size
    expected = 6 * block + 3 * model.embedding_parameters() + bidirectional
    assert flops_per_token(FAMILIES["llada"], model, 32) == pytest.approx(expected, rel=1e-6)
