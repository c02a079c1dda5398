"""Our masked-diffusion model and objective against an implementation that shares no code with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.models.llada.config import LLaDAConfig, LLaDALatentConfig
from gptoughts.models.llada.model import build_model, build_objective
from gptoughts.objectives.masked_diffusion import uniform_draws
from gptoughts.parallel import groups
from tests.parity.llada_reference import Attention, LatentAttention, Reference, diffusion_loss

LARGEST_ERROR = 1e-5
SEED, LENGTH, VOCABULARY = 77, 40, 90
SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "seq_length": LENGTH, "rotary_base": 500, "layernorm_epsilon": 1e-3,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa-bias": {"num_query_groups": 2, "add_qkv_bias": True},
    "tied": {"untie_embeddings_and_output_weights": False},
    "many-cut-large-epsilon": {"random_length_probability": 0.7, "mask_epsilon": 0.2},
    "mla": {"attention": "mla", "kv_lora_rank": 24, "qk_head_dim": 12, "qk_pos_emb_head_dim": 8, "v_head_dim": 10},
    "many-cut-mla-q-latent": {
        "attention": "mla", "q_lora_rank": 20, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4,
        "v_head_dim": 14, "random_length_probability": 0.7,
    },
}  # fmt: skip
AnyShape = LLaDAConfig | LLaDALatentConfig


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=SEED)
    yield
    groups.destroy()


def reference_attention(shape: AnyShape) -> nn.Module:
    width, heads, base = shape.hidden_size, shape.num_attention_heads, shape.rotary_base
    if isinstance(shape, LLaDALatentConfig):
        return LatentAttention(
            width, heads, base, shape.layernorm_epsilon, q_rank=shape.q_lora_rank, rank=shape.kv_lora_rank,
            plain=shape.qk_head_dim, turned=shape.qk_pos_emb_head_dim, value=shape.v_head_dim,
        )  # fmt: skip
    return Attention(width, heads, shape.num_query_groups or heads, base, shape.add_qkv_bias)


def both_models(shape: AnyShape) -> tuple[nn.Module, Reference]:
    """Ours with random weights (norms not 1, biases not 0), and the reference with the same."""
    ours = build_model(ExperimentConfig(model_type="llada", model=shape, seed=SEED), params_dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=generator)
    theirs = Reference(
        [reference_attention(shape) for _ in range(shape.num_layers)], width=shape.hidden_size,
        inner=shape.ffn_hidden_size, vocabulary=shape.padded_vocab_size, epsilon=shape.layernorm_epsilon,
        tied=not shape.untie_embeddings_and_output_weights,
    )  # fmt: skip
    values = plain_names(dict(ours.named_parameters()), theirs)
    names = {name for name, _ in theirs.named_parameters()}
    theirs.load_state_dict({name: value for name, value in values.items() if name in names}, strict=False)
    return ours, theirs


def plain_names(fused: dict[str, Any], theirs: Reference) -> dict[str, Tensor]:
    """Our tensors (weights or gradients) under the reference's names; fused matrices taken apart."""
    found = {"embedding.weight": fused["embedding.word_embeddings.weight"]}
    found["norm.weight"] = fused["decoder.final_layernorm.weight"]
    if "output_layer.weight" in fused:
        found["head.weight"] = fused["output_layer.weight"]
    for number, block in enumerate(theirs.blocks):
        prefix, plain = f"decoder.layers.{number}", f"blocks.{number}"
        found[f"{plain}.attention_norm.weight"] = fused[f"{prefix}.input_layernorm.weight"]
        found[f"{plain}.feed_forward_norm.weight"] = fused[f"{prefix}.pre_mlp_layernorm.weight"]
        found[f"{plain}.down.weight"] = fused[f"{prefix}.mlp.linear_fc2.weight"]
        gate, up = fused[f"{prefix}.mlp.linear_fc1.weight"].detach().chunk(2)
        found[f"{plain}.gate.weight"], found[f"{plain}.up.weight"] = gate, up
        attention = attention_names(fused, f"{prefix}.self_attention", block.attention)
        found |= {f"{plain}.attention.{name}": tensor for name, tensor in attention.items()}
    return found


LATENT_NAMES = {
    "q": "linear_q_proj", "q_down": "linear_q_down_proj", "q_norm": "q_layernorm", "q_up": "linear_q_up_proj",
    "kv_down": "linear_kv_down_proj", "kv_norm": "kv_layernorm", "kv_up": "linear_kv_up_proj",
}  # fmt: skip


def attention_names(fused: dict[str, Any], prefix: str, theirs: nn.Module) -> dict[str, Tensor]:
    found = {"out.weight": fused[f"{prefix}.linear_proj.weight"]}
    if isinstance(theirs, LatentAttention):
        ours = {name: f"{prefix}.{our}.weight" for name, our in LATENT_NAMES.items()}
        return found | {f"{name}.weight": fused[our] for name, our in ours.items() if our in fused}
    assert isinstance(theirs, Attention)
    per_group = theirs.heads // theirs.groups
    for kind in ("weight", "bias"):
        tensor = fused.get(f"{prefix}.linear_qkv.{kind}")
        if tensor is not None:
            parts = tensor.detach().unflatten(0, (theirs.groups, per_group + 2, theirs.size))
            q, k, v = parts.split([per_group, 1, 1], dim=1)
            found |= {f"{name}.{kind}": part.flatten(0, 2) for name, part in (("q", q), ("k", k), ("v", v))}
    return found


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(case: str) -> None:
    shape_class = LLaDALatentConfig if "mla" in case else LLaDAConfig
    shape: AnyShape = shape_class(**SHAPE, **CASES[case]).filled()
    ours, theirs = both_models(shape)
    tokens = torch.randint(0, VOCABULARY, (6, LENGTH), generator=torch.Generator().manual_seed(2))
    assert error(ours(tokens), theirs(tokens)) <= LARGEST_ERROR

    objective = build_objective(ExperimentConfig(model_type="llada", model=shape, seed=SEED))
    first = 30
    inputs = objective.prepare(tokens, torch.arange(first, first + 6))
    per_token = ours(
        inputs.input_ids, inputs.position_ids, inputs.attention_mask, inputs.labels,
        selected_positions=inputs.selected_positions,
    )  # fmt: skip
    loss = objective.reduce(per_token, inputs.loss_weights) / inputs.denominator
    loss.backward()

    levels = [uniform_draws(SEED, 0, first + row, 1)[0] for row in range(6)]
    lengths = inputs.is_counted.sum(dim=1).tolist()
    assert (min(lengths) < LENGTH) == case.startswith("many-cut")
    is_masked = inputs.input_ids == shape.mask_token_id
    expected = diffusion_loss(
        theirs,
        [row[:length] for row, length in zip(tokens, lengths, strict=True)],
        [row[:length] for row, length in zip(is_masked, lengths, strict=True)],
        levels, mask_id=VOCABULARY, epsilon=shape.mask_epsilon,
    )  # fmt: skip
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=LARGEST_ERROR)
    gradients = plain_names({name: p.grad for name, p in ours.named_parameters()}, theirs)
    compared = dict(theirs.named_parameters())
    assert gradients.keys() == compared.keys()
    for name, parameter in compared.items():
        assert error(gradients[name], parameter.grad) <= LARGEST_ERROR, name
