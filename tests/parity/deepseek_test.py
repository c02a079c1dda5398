"""DeepSeek against transformers: logits, loss and every gradient at toy size in fp32, every option exercised.

Error of a tensor: max|a - b| / max|b|. Weights travel from transformers' model to ours, gradients the same way, so that
the map is under test on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.models.deepseek.config import DeepSeekConfig
from gptoughts.models.deepseek.model import build_model
from gptoughts.models.expert_load import expert_routers
from gptoughts.models.parameter_names import global_parameter_names
from gptoughts.parallel import groups

RELATIVE = 1e-5
LAYERS, HEADS, NOPE, ROPE, VALUE = 3, 4, 12, 8, 10
SEQUENCE, VOCABULARY = 40, 128

COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "kv_lora_rank": 24, "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "first_k_dense_replace": 1, "moe_intermediate_size": 20,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "use_cache": False, "attn_implementation": "eager",
    "experts_implementation": "eager",
}  # fmt: skip


def yarn(mscale: float, mscale_all_dim: float) -> dict[str, Any]:
    """A factor of 4 over 16 positions, so that the test's 40 positions lie on every part of the ramp."""
    return {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 8.0, "beta_slow": 0.2, "mscale": mscale, "mscale_all_dim": mscale_all_dim,
    }  # fmt: skip


@dataclass(frozen=True)
class Case:
    version: int
    theirs: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})


CASES = {
    # topk // group_topk = 1 and 3: megatron-core's group score would be the best one, and the sum of the best three.
    "v3-groups-3-of-4": Case(
        3,
        {"q_lora_rank": 28, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 3,
         "n_shared_experts": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
        rope=yarn(1.0, 1.0),
    ),
    "v3-groups-2-of-4": Case(
        3,
        {"q_lora_rank": None, "n_routed_experts": 16, "num_experts_per_tok": 6, "n_group": 4, "topk_group": 2,
         "n_shared_experts": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": False},
        rope=yarn(0.707, 1.3),
    ),
    "v3-plain": Case(
        3,
        {"q_lora_rank": 28, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
         "n_shared_experts": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True},
    ),
    "v2-groups-2-of-4": Case(
        2,
        {"q_lora_rank": 28, "n_routed_experts": 16, "num_experts_per_tok": 6, "n_group": 4, "topk_group": 2,
         "n_shared_experts": 2, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy"},
        rope=yarn(0.707, 0.707),
    ),
    "v2-greedy": Case(
        2,
        {"q_lora_rank": None, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1,
         "n_shared_experts": 1, "routed_scaling_factor": 1.0, "topk_method": "greedy"},
        rope=yarn(1.2, 0.6),
    ),
}  # fmt: skip


def our_shape(case: Case) -> DeepSeekConfig:
    theirs = case.theirs
    rope = {k: v for k, v in case.rope.items() if k not in ("rope_type", "rope_theta", "factor")}
    return DeepSeekConfig(
        num_layers=LAYERS, hidden_size=64, ffn_hidden_size=96, num_attention_heads=HEADS, vocab_size=VOCABULARY,
        seq_length=64, layernorm_epsilon=1e-6, q_lora_rank=theirs["q_lora_rank"], kv_lora_rank=24, qk_head_dim=NOPE,
        qk_pos_emb_head_dim=ROPE, v_head_dim=VALUE, first_k_dense_layers=1, moe_ffn_hidden_size=20,
        num_moe_experts=theirs["n_routed_experts"], moe_router_topk=theirs["num_experts_per_tok"],
        moe_shared_expert_intermediate_size=20 * theirs["n_shared_experts"],
        moe_router_score_function="sigmoid" if case.version == 3 else "softmax",
        moe_router_num_groups=theirs["n_group"], moe_router_group_topk=theirs["topk_group"],
        moe_router_topk_scaling_factor=theirs["routed_scaling_factor"],
        moe_router_normalize_gates=theirs.get("norm_topk_prob", False),
        moe_router_enable_expert_bias=case.version == 3, moe_aux_loss_coeff=0.0,
        rotary_scaling_factor=case.rope.get("factor", 1.0), **rope,
    )  # fmt: skip


def their_model(case: Case) -> torch.nn.Module:
    """Random weights: matrices of a size that makes scores differ, norm weights about 1, biases of the router."""
    config_class = DeepseekV3Config if case.version == 3 else DeepseekV2Config
    model_class = DeepseekV3ForCausalLM if case.version == 3 else DeepseekV2ForCausalLM
    model = model_class(config_class(**COMMON, **case.theirs, rope_parameters=dict(case.rope)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.15, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2, generator=generator)
    return model


def half_split(weight: Tensor, before: int) -> Tensor:
    """Rows of each head, of which the last ROPE are interleaved pairs, to all first and then all second members."""
    heads = weight.view(-1, before + ROPE, weight.size(-1))
    plain, turned = heads[:, :before], heads[:, before:]
    return torch.cat((plain, turned[:, 0::2], turned[:, 1::2]), dim=1).reshape(weight.shape)


def translated(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters (or their gradients) by our names, from transformers'."""
    ours = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
    }
    plain = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
        "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
        "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "mlp.router.weight": "mlp.gate.weight",
        "mlp.experts.linear_fc1_weight": "mlp.experts.gate_up_proj",
        "mlp.experts.linear_fc2_weight": "mlp.experts.down_proj",
        "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
    }
    rotated = {
        "self_attention.linear_q_proj.weight": ("self_attn.q_proj.weight", NOPE),
        "self_attention.linear_q_up_proj.weight": ("self_attn.q_b_proj.weight", NOPE),
    }
    for layer in range(LAYERS):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        ours |= {here + a: theirs[there + b] for a, b in plain.items() if there + b in theirs}
        ours |= {here + a: half_split(theirs[there + b], n) for a, (b, n) in rotated.items() if there + b in theirs}
        down = theirs[there + "self_attn.kv_a_proj_with_mqa.weight"]
        latent, shared = down.split([down.size(0) - ROPE, ROPE])
        ours[here + "self_attention.linear_kv_down_proj.weight"] = torch.cat((latent, half_split(shared, 0)))
        for part in ("mlp", "mlp.shared_experts"):
            if f"{there}{part}.gate_proj.weight" in theirs:
                both = [theirs[f"{there}{part}.{name}.weight"] for name in ("gate_proj", "up_proj")]
                ours[f"{here}{part}.linear_fc1.weight"] = torch.cat(both)
    return ours


def our_model(case: Case, theirs: torch.nn.Module) -> torch.nn.Module:
    shape = our_shape(case)
    assert shape.problems() == []
    model = build_model(ExperimentConfig(model_type="deepseek", model=shape), params_dtype=torch.float32)
    weights = translated({name: p.detach() for name, p in theirs.named_parameters()})
    parameters = global_parameter_names(model)
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])
        for layer, router in expert_routers(model).items():
            if router.expert_bias is not None:
                router.expert_bias.copy_(theirs.model.layers[layer].mlp.gate.e_score_correction_bias)
    return model


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture
def _one_rank() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=5)
    yield
    groups.destroy()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str) -> None:
    case = CASES[name]
    theirs = their_model(case)
    ours = our_model(case, theirs)
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(3))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    expected = theirs(input_ids=inputs).logits
    assert error(ours(inputs), expected) <= RELATIVE

    their_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    our_loss = ours(inputs, None, None, labels).mean()
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=RELATIVE)

    their_loss.backward()
    our_loss.backward()
    gradients = translated({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    for parameter_name, parameter in global_parameter_names(ours).items():
        assert parameter.grad is not None, parameter_name
        assert error(parameter.grad, gradients[parameter_name]) <= RELATIVE, parameter_name


def _top_of_a_group_times_three(router: Any) -> Callable[[Tensor], Tensor]:
    """megatron-core's group score: the sum of the best topk // group_topk."""
    config = router.config

    def routing(scores: Tensor) -> Tensor:
        choice = scores if router.expert_bias is None else scores + router.expert_bias
        groups_of = choice.view(choice.size(0), config.moe_router_num_groups, -1)
        best = config.moe_router_topk // config.moe_router_group_topk
        group_scores = groups_of.topk(best, dim=-1).values.sum(-1)
        mask = torch.full_like(group_scores, float("-inf"))
        mask.scatter_(1, group_scores.topk(config.moe_router_group_topk, dim=-1).indices, 0.0)
        return (groups_of + mask.unsqueeze(-1)).view_as(choice).topk(config.moe_router_topk, dim=-1).indices

    return routing


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("name", ["v3-groups-3-of-4", "v3-groups-2-of-4", "v2-groups-2-of-4"])
def test_the_shapes_tell_the_published_group_rule_from_the_short_cut(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    theirs = their_model(case)
    ours = our_model(case, theirs)
    for router in expert_routers(ours).values():
        monkeypatch.setattr(router, "routing", _top_of_a_group_times_three(router))
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(3))
    assert error(ours(tokens), theirs(input_ids=tokens).logits) > 1e-3
