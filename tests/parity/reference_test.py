"""Our models against transformers': logits, loss and every gradient, with the conversion's own table in between.

Random weights with norms that are not 1 and biases that are not 0; error = max|a - b| / max|b| per tensor, fp32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from gptoughts.checkpoint.huggingface.formats import FORMATS, format_for, understand
from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.models.parameter_names import global_parameter_names
from gptoughts.models.registry import FAMILIES
from tests.distributed import run_distributed

TOLERANCE = 1e-5
LENGTH, BATCH = 48, 2
SHAPE = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "attn_implementation": "eager",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MLA = {
    "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha-untied": ("Llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("Llama", {"num_key_value_heads": 2}),
    "llama-mqa-wide-heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama-tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-llama3": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2-bias": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3-norms": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 24}),
    "deepseek-v3-dense": ("DeepseekV3", {**MLA, "q_lora_rank": 20}),
    "deepseek-v2-dense": ("DeepseekV2", {**MLA, "q_lora_rank": 20}),
    "deepseek-v2-dense-plain-queries": ("DeepseekV2", {**MLA, "q_lora_rank": None}),
}


def build_reference(kind: str, options: dict[str, Any]) -> Any:
    """transformers' model of a case, every weight random."""
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.1 * noise)
    return model.train()


def published_tensors(reference: Any, what: str) -> dict[str, Tensor]:
    """Weights (``data``) or gradients (``grad``) by published name."""
    return {name: getattr(parameter, what).detach() for name, parameter in reference.named_parameters()}


def compare(name: str) -> dict[str, float]:
    """Error of each tensor of a case."""
    from gptoughts.parallel import groups

    kind, options = CASES[name]
    reference = build_reference(kind, options)
    found = understand(reference.config.to_dict(), reference.config.model_type, name)
    config = ExperimentConfig(model_type=found.format.family, block_size=64, model=found.model)
    groups.initialize(ParallelConfig(), seed=1)
    ours = FAMILIES[config.model_type].load_model_builder()(config, params_dtype=torch.float32)
    parameters = global_parameter_names(ours)
    entries = found.format.entries(found.model)
    assert {entry.ours for entry in entries} == parameters.keys()
    weights = published_tensors(reference, "data")
    assert {their for entry in entries for their in entry.theirs} == weights.keys()
    with torch.no_grad():
        for entry in entries:
            parameters[entry.ours].copy_(entry.transform.join([weights[their] for their in entry.theirs]))
    tokens = torch.randint(0, 256, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    their_logits = reference(inputs).logits
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), labels.flatten())
    their_loss.backward()
    with torch.no_grad():
        errors = {"logits": relative(ours(inputs), their_logits)}
    loss = ours(inputs, labels=labels.contiguous()).mean()
    loss.backward()
    errors["loss"] = relative(loss, their_loss)
    gradients = published_tensors(reference, "grad")
    for entry in entries:
        for their, gradient in zip(entry.theirs, entry.transform.split(parameters[entry.ours].grad), strict=True):
            errors[their] = relative(gradient, gradients[their])
    return errors


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str) -> None:
    (errors,) = run_distributed(compare, 1, name)
    assert {where: error for where, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_survives_both_ways(name: str) -> None:
    kind, options = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **options)
    found = understand(config.to_dict(), config.model_type, name)
    written = found.format.write(found.model)
    assert understand(written, config.model_type, "written").model == found.model
    loaded = type(config)(**written)
    assert understand(loaded.to_dict(), config.model_type, "loaded").model == found.model
    assert format_for(found.format.family, found.model) in FORMATS
