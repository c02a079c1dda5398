"""Mixtures of experts: published names and config.json, experts one at a time, and what has no place in a format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoughts.checkpoint.huggingface import exporting, importing
from gptoughts.checkpoint.huggingface.formats import format_for, read_published, understand
from gptoughts.checkpoint.portable import CheckpointReader
from gptoughts.errors import CheckpointError
from gptoughts.models.deepseek.config import DeepSeekConfig
from gptoughts.models.registry import FAMILIES
from tests.checkpoint.huggingface.conftest import Publish

SHARED = {"moe_ffn_hidden_size": 176, "moe_shared_expert_intermediate_size": 352, "layernorm_epsilon": 1e-6}
V3 = DeepSeekConfig(**SHARED)
V2 = DeepSeekConfig(**SHARED, moe_router_score_function="softmax", moe_router_enable_expert_bias=False,
                    moe_router_normalize_gates=False)  # fmt: skip


def test_names_are_the_published_ones(publish: Publish) -> None:
    """As in model.safetensors.index.json of deepseek-ai/DeepSeek-V3."""
    names = set(load_file(publish("deepseek-v3-moe") / "model.safetensors"))
    for expected in (
        "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.experts.11.down_proj.weight",
        "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.shared_experts.up_proj.weight", "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
    ):  # fmt: skip
        assert expected in names


def test_experts_pass_one_at_a_time(publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: dict[str, list[tuple[int, ...]]] = {}
    write = importing.write_file

    def watch(path: Path, headers: Any, read: Any, **options: Any) -> None:
        def watched(key: str) -> Any:
            for piece in read(key):
                pieces.setdefault(key, []).append(tuple(piece.shape))
                yield piece

        write(path, headers, watched, **options)

    whole: list[str] = []
    full = CheckpointReader.full

    def asked(self: CheckpointReader, name: str, kind: str = "weight", index: int | None = None) -> torch.Tensor:
        if index is None:
            whole.append(name)
        return full(self, name, kind, index)

    monkeypatch.setattr(importing, "write_file", watch)
    monkeypatch.setattr(CheckpointReader, "full", asked)
    importing.import_model(publish("deepseek-v3-moe"), tmp_path / "run")
    exporting.export_model(tmp_path / "run", tmp_path / "back")
    assert pieces["weight/0/decoder.layers.1.mlp.experts.linear_fc1_weight"] == [(40, 32)] * 12
    assert pieces["weight/0/decoder.layers.1.mlp.experts.linear_fc2_weight"] == [(32, 20)] * 12
    assert "embedding.word_embeddings.weight" in whole
    assert not any(".experts.linear" in name for name in whole)


def test_the_bias_keeps_its_precision(publish: Publish, tmp_path: Path) -> None:
    source = publish("deepseek-v3-moe", dtype=torch.float32)
    importing.import_model(source, tmp_path / "run")
    exporting.export_model(tmp_path / "run", tmp_path / "back", dtype="BF16")
    found = load_file(tmp_path / "back" / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(found[name], load_file(source / "model.safetensors")[name])
    assert found["model.layers.1.mlp.gate.weight"].dtype is torch.bfloat16


def test_one_expert_too_many_and_one_missing(publish: Publish, tmp_path: Path) -> None:
    source = publish("deepseek-v2-moe")
    tensors = load_file(source / "model.safetensors")
    prefix = "model.layers.1.mlp.experts."
    tensors[f"{prefix}8.up_proj.weight"] = tensors.pop(f"{prefix}7.up_proj.weight")
    tensors[f"{prefix}0.down_proj.weight"] = tensors[f"{prefix}0.down_proj.weight"].float()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        importing.import_model(source, tmp_path / "run")
    assert caught.value.problems == [
        f"{prefix}7.up_proj.weight: missing, shape (20, 32) expected",
        f"{prefix}8.up_proj.weight: unknown to this format",
        f"{prefix}0.down_proj.weight ... {prefix}7.down_proj.weight: differ in dtype (BF16, F32)",
    ]


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("v3", {"topk_method": "greedy"}, "topk_method='greedy': allowed for deepseek_v3: noaux_tc"),
        ("v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("v3", {"rope_interleave": False}, "rope_interleave=false"),
        ("v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ("v3", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type='llama3': not built"),
        ("v3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings: missing"),
        ("v2", {"norm_topk_prob": True}, "norm_topk_prob=true"),
        ("v2", {"n_routed_experts": None}, "n_routed_experts=None"),
        ("v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
    ],
)  # fmt: skip
def test_what_is_not_held_is_refused(kind: str, changes: dict, problem: str, publish: Publish) -> None:
    source = publish(f"deepseek-{kind}-moe")
    config = json.loads((source / "config.json").read_text()) | changes
    if "rope_parameters" in changes:
        config["rope_parameters"] = changes["rope_parameters"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        read_published(source)
    assert problem in str(caught.value)


@pytest.mark.parametrize("model", [V3, V2], ids=["v3", "v2"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"rotary_scaling_factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707, "seq_length": 4096},
        {"first_k_dense_layers": 0, "q_lora_rank": 64},
        {"moe_router_topk_scaling_factor": 2.5, "moe_aux_loss_coeff": 0.0},
    ],
)
def test_config_json_says_the_whole_shape(model: DeepSeekConfig, changes: dict[str, Any]) -> None:
    shape = replace(model, **changes)
    form = format_for("deepseek", shape)
    text = form.write(shape)
    found = understand(json.loads(json.dumps(text)) | {"model_type": form.model_type}, form.model_type, "config.json")
    stretched = shape.rotary_scaling_factor * shape.original_max_position_embeddings
    expected = shape if shape.rotary_scaling_factor == 1 else replace(shape, seq_length=int(stretched))
    assert found.model == expected


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (replace(V3, moe_router_enable_expert_bias=False), "moe_router_enable_expert_bias=False"),
        (replace(V3, moe_shared_expert_intermediate_size=0), "moe_shared_expert_intermediate_size=0"),
        (replace(V3, moe_shared_expert_intermediate_size=100), "moe_shared_expert_intermediate_size=100"),
        (replace(V2, moe_router_normalize_gates=True), "moe_router_normalize_gates=True"),
        (replace(V3, rotary_scaling_factor=4.0, mscale=0.7), "mscale=0.7 with mscale_all_dim=0.0"),
        (replace(V3, layernorm_epsilon=1e-5), "layernorm_epsilon=1e-05"),
    ],
)
def test_what_no_format_holds_is_refused_by_name(model: DeepSeekConfig, reason: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        format_for("deepseek", model)
    assert reason in str(caught.value)


@pytest.mark.parametrize(("size", "expected"), [("deepseek-v3", "deepseek_v3"), ("deepseek-v2-lite", "deepseek_v2")])
def test_published_shapes_find_their_format(size: str, expected: str) -> None:
    model = FAMILIES["deepseek"].presets[size].model
    form = format_for("deepseek", model)
    assert form.model_type == expected
    entries = form.entries(model)
    total = sum(torch.Size(entry.our_shape).numel() for entry in entries if entry.kind == "weight")
    assert total == model.total_parameters() + model.mtp_parameters()
    assert len({name for entry in entries for name in entry.theirs}) == sum(len(entry.theirs) for entry in entries)
