"""Both families as built: counts, names, initial weights and layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.config.model import ModelConfig
from gptoughts.models.flops import count_parameters
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.initialization import initial_value
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups, partition
from tests.distributed import run_distributed

_TOY: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 200,
    "seq_length": 32,
}  # fmt: skip
_MLA_TOY = _TOY | {"kv_lora_rank": 32, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 12}
SHAPES: dict[str, tuple[str, ModelConfig]] = {
    "gpt": ("gpt", GPTConfig(**_TOY)),
    "gpt-gqa-qknorm-bias-tied": (
        "gpt",
        GPTConfig(
            **_TOY,
            num_query_groups=2,
            qk_layernorm=True,
            add_qkv_bias=True,
            untie_embeddings_and_output_weights=False,
        ),
    ),
    "gpt-wide-heads": ("gpt", GPTConfig(**_TOY, kv_channels=32)),
    "mla": ("mla", MLAConfig(**_MLA_TOY)),
    "mla-q-latent": ("mla", MLAConfig(**_MLA_TOY, q_lora_rank=48)),
}


def build(
    shape: str, parallel: ParallelConfig | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> torch.nn.Module:
    family, model = SHAPES[shape]
    config = ExperimentConfig(model_type=family, model=model, parallel=parallel or ParallelConfig())
    return FAMILIES[family].load_model_builder()(config, params_dtype=dtype, **options)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 200, (3, 33), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture
def _one_rank() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=5)
    yield
    groups.destroy()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_names_and_first_loss(shape: str) -> None:
    from gptoughts.models.parameter_names import global_parameter_names

    family, model = SHAPES[shape]
    built = build(shape)
    names = global_parameter_names(built)
    assert sum(p.numel() for p in names.values()) == count_parameters(FAMILIES[family], model).total
    assert "decoder.layers.1.mlp.linear_fc1.weight" in names
    inputs, labels = batch()
    loss = built(inputs, None, None, labels)
    assert loss.shape == (3, 32)
    assert loss.dtype is torch.float32
    # Small random weights predict nearly uniformly over the padded vocabulary.
    assert loss.mean().item() == pytest.approx(math.log(model.padded_vocab_size), abs=0.1)
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in names.values())


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_cross_entropy_of_the_logits_and_looks_back_only(shape: str) -> None:
    built = build(shape).eval()
    inputs, labels = batch()
    logits = built(inputs)
    assert logits.shape == (3, 32, 256)
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    assert torch.allclose(built(inputs, None, None, labels), expected, atol=1e-5)
    changed = inputs.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 200
    difference = (built(changed) - logits).abs().amax(dim=(0, 2))
    assert difference[:20].max() == 0
    assert difference[20:].min() > 0


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("shape", ["gpt", "mla"])
def test_bidirectional_attention_looks_both_ways(shape: str) -> None:
    from megatron.core.transformer.enums import AttnMaskType

    built = build(shape, attn_mask_type=AttnMaskType.no_mask).eval()
    inputs, _ = batch()
    changed = inputs.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 200
    assert (built(changed) - built(inputs)).abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.usefixtures("_one_rank")
def test_weights_are_keyed_by_seed_and_name() -> None:
    one, same = (dict(build("gpt").named_parameters()) for _ in range(2))
    for name, parameter in one.items():
        assert torch.equal(parameter, same[name]), name
    first, second = (one[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx(0.02, rel=0.05)
    # Two layers: what writes to the residual stream is smaller by sqrt(2 * 2).
    assert one["decoder.layers.0.mlp.linear_fc2.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    assert one["decoder.layers.0.self_attention.linear_proj.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.all(one["decoder.final_layernorm.weight"] == 1)


def test_initial_values_know_norms_and_biases() -> None:
    def value(name: str) -> torch.Tensor:
        return initial_value(name, (4,), seed=1, std=0.02, num_layers=2)

    assert value("decoder.layers.0.input_layernorm.weight").tolist() == [1.0] * 4
    assert value("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight").tolist() == [1.0] * 4
    assert value("decoder.layers.0.input_layernorm.bias").tolist() == [0.0] * 4
    assert value("decoder.layers.0.self_attention.linear_qkv.bias").tolist() == [0.0] * 4


def _losses_and_gradients(shape: str, parallel: ParallelConfig) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    from gptoughts.models.initialization import partition_of
    from gptoughts.models.parameter_names import global_parameter_names

    groups.initialize(parallel, seed=5)
    built = build(shape, parallel)
    inputs, labels = batch()
    loss = built(inputs, None, None, labels)
    loss.mean().backward()
    gradients: dict[str, Any] = {}
    for name, parameter in global_parameter_names(built).items():
        assert parameter.grad is not None, name
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(parameter.grad, group=groups.tensor_parallel_group())
        gradients[name] = (parameter.grad, parameter.detach(), *partition_of(parameter))
    with torch.no_grad():
        logits = built(inputs)
    return loss.detach(), logits, gradients


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_tensor_parallel_ranks_agree_with_one_rank(shape: str, sequence: bool) -> None:
    (whole,) = run_distributed(_losses_and_gradients, 1, shape, ParallelConfig())
    parts = run_distributed(_losses_and_gradients, 2, shape, ParallelConfig(tensor=2, sequence=sequence))
    for loss, logits, _ in parts:
        assert torch.allclose(loss, whole[0], rtol=1e-6, atol=2e-6)
        assert torch.allclose(logits, whole[1], atol=2e-6)
    for name, (gradient, weight, _, _) in whole[2].items():
        dim, stride = parts[0][2][name][2:]
        assert torch.equal(partition.merge([part[2][name][1] for part in parts], dim, stride), weight), name
        merged = partition.merge([part[2][name][0] for part in parts], dim, stride)
        assert ((merged - gradient).norm() / gradient.norm()).item() < 1e-5, name


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("shape", ["gpt", "mla"])
def test_bfloat16_is_near_float32(shape: str) -> None:
    inputs, labels = batch()
    single = build(shape)(inputs, None, None, labels)
    half = build(shape, dtype=torch.bfloat16)(inputs, None, None, labels)
    assert half.dtype is torch.float32
    assert half.mean().item() == pytest.approx(single.mean().item(), rel=2e-3)


@pytest.mark.usefixtures("_one_rank")
def test_overfits_one_batch() -> None:
    built = build("mla")
    optimizer = torch.optim.AdamW(built.parameters(), lr=3e-3)
    inputs, labels = batch()
    for _ in range(60):
        loss = built(inputs, None, None, labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
