"""LLaDA under its published names: an independent implementation reads what we write and gives what we give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.huggingface.exporting import export_model
from gptoughts.checkpoint.huggingface.formats import format_for, read_published, understand
from gptoughts.checkpoint.huggingface.importing import import_model
from gptoughts.config.cli import from_yaml
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.models.llada.config import LLaDAConfig
from gptoughts.models.registry import FAMILIES
from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun
from tests.parity.llada_reference import Attention, Reference

ROWS, MASK, LENGTH = 300, 290, 24
CONFIG: dict[str, Any] = {  # the fields of GSAI-ML/LLaDA-8B-Base's config.json, at toy size
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 32,
    "embedding_dropout": 0.0, "embedding_size": ROWS, "eos_token_id": 281, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": MASK, "max_sequence_length": 64, "mlp_hidden_size": 48,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2,
    "pad_token_id": 281, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True,
    "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "use_cache": False,
    "vocab_size": ROWS, "weight_tying": False,
}  # fmt: skip
BLOCK = {
    "attn_norm": "attention_norm", "ff_norm": "feed_forward_norm", "q_proj": "attention.q", "k_proj": "attention.k",
    "v_proj": "attention.v", "attn_out": "attention.out", "ff_proj": "gate", "up_proj": "up", "ff_out": "down",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "8b": {},
    "grouped-bias": {"n_kv_heads": 2, "include_qkv_bias": True},
    "tied-one-group": {"n_kv_heads": None, "multi_query_attention": True, "weight_tying": True},
}


def reference(config: dict[str, Any]) -> Reference:
    groups = config["n_kv_heads"] or (1 if config["multi_query_attention"] else config["n_heads"])
    width, heads, base = config["d_model"], config["n_heads"], config["rope_theta"]
    attentions = [Attention(width, heads, groups, base, config["include_qkv_bias"]) for _ in range(config["n_layers"])]
    return Reference(
        attentions, width=width, inner=config["mlp_hidden_size"], vocabulary=config["embedding_size"],
        epsilon=config["rms_norm_eps"], tied=config["weight_tying"],
    )  # fmt: skip


def published_names(model: Reference) -> dict[str, str]:
    """The reference's parameter -> its name in the published files."""
    names = {"embedding.weight": "wte.weight", "norm.weight": "ln_f.weight", "head.weight": "ff_out.weight"}
    there = {ours: theirs for theirs, ours in BLOCK.items()}
    for name, _ in model.named_parameters():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            module, _, kind = rest.rpartition(".")
            names[name] = f"blocks.{number}.{there[module]}.{kind}"
    return {name: f"model.transformer.{names[name]}" for name, _ in model.named_parameters()}


def publish(folder: Path, tokenizer: Path, changes: dict[str, Any]) -> tuple[Path, Reference]:
    config = CONFIG | changes
    model = reference(config)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=generator)
    names = published_names(model)
    folder.mkdir()
    save_file({names[n]: p.detach().clone() for n, p in model.named_parameters()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_llada.py", "modeling_llada.py"):
        (folder / name).write_text("raise RuntimeError('code that comes with a model is never run')\n")
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder, model


def logits(folder: str, tokens: Tensor) -> Tensor:
    from gptoughts.inference.loading import load_model

    with torch.no_grad():
        return load_model(Path(folder)).model(tokens)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_published_files_give_the_same_logits_and_come_back_as_they_were(
    case: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    source, model = publish(tmp_path / "published", tokenizer_folder, CASES[case])
    made = import_model(source, tmp_path / "run")
    assert made.padded_rows == 84  # 300 rounded up to 384
    tokens = torch.randint(0, ROWS, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    (found,) = run_distributed(logits, 1, str(tmp_path / "run"), tokens)
    with torch.no_grad():
        assert relative_error(found[..., :ROWS], model(tokens)) <= 1e-5
    back = export_model(tmp_path / "run", tmp_path / "back")
    assert (back.format, back.padded_rows) == ("llada", 84)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for name in ("config.json", "modeling_llada.py", "configuration_llada.py", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    saved = from_yaml((layout.locate(tmp_path / "run") / layout.CONFIG).read_text(), FAMILIES)
    assert (saved.model_type, saved.model.mask_token_id) == ("llada", MASK)


def train(folder: str, extra: tuple[str, ...], tokens: Tensor) -> tuple[str, Tensor]:
    run = ToyRun("llada", Layout(extra=extra), Path(folder))
    list(run.train(2))
    saved = run.save()
    with torch.no_grad():
        found = run.engine.chunks[0](tokens)
    run.close()
    return str(saved), found


@pytest.mark.parametrize("extra", [(), ("--model.num_query_groups=2", "--model.add_qkv_bias=true")], ids=["mha", "gqa"])
def test_what_we_trained_is_read_by_another_implementation(extra: tuple[str, ...], tmp_path: Path) -> None:
    tokens = torch.randint(0, 257, (2, LENGTH), generator=torch.Generator().manual_seed(2))  # 256 is the mask
    ((saved, found),) = run_distributed(train, 1, str(tmp_path), extra, tokens)
    export_model(Path(saved), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["embedding_size"], config["mask_token_id"], config["model_type"]) == (257, 256, "llada")
    assert "auto_map" not in config
    model = reference(config)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    names = published_names(model)
    assert set(names.values()) == tensors.keys()
    model.load_state_dict({name: tensors[published] for name, published in names.items()}, strict=True)
    with torch.no_grad():
        assert relative_error(found[..., :257], model(tokens)) <= 1e-5
    again = read_published(tmp_path / "out").model
    assert isinstance(again, LLaDAConfig)
    assert (again.vocab_size, again.mask_token_id, again.padded_vocab_size) == (257, 256, 384)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"block_type": "sequential"}, "block_type='sequential': has no place here; allowed: 'llama'"),
        ({"activation_type": "swiglu"}, "activation_type='swiglu'"),
        ({"attention_layer_norm": True}, "attention_layer_norm=True"),
        ({"rope": False, "alibi": True}, "alibi=True"),
        ({"scale_logits": True}, "scale_logits=True"),
        ({"block_group_size": 2}, "block_group_size=2"),
        ({"mask_token_id": None}, "mask_token_id: missing"),
        ({"mask_token_id": ROWS}, "mask_token_id=300: the embedding has 300 rows"),
        ({"multi_query_attention": True, "n_kv_heads": 2}, "multi_query_attention=True: contradicts n_kv_heads=2"),
        ({"rope_theta": 0.5}, "rope_theta=0.5"),
    ],
)
def test_what_is_not_held_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        understand(CONFIG | changes, "llada", "config.json")
    assert problem in str(caught.value)


def test_what_the_format_does_not_hold_is_refused() -> None:
    for changes, reason in (
        ({"qk_layernorm": True}, "qk_layernorm=True"),
        ({"rotary_scaling": "linear", "rotary_scaling_factor": 2.0}, "rotary_scaling=linear"),
        ({"kv_channels": 48}, "kv_channels=48"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            format_for("llada", LLaDAConfig(**changes))


def test_logits_cannot_be_verified(tokenizer_folder: Path, tmp_path: Path) -> None:
    source, _ = publish(tmp_path / "published", tokenizer_folder, {})
    with pytest.raises(ConfigError, match="no class for model_type=llada"):
        import_model(source, tmp_path / "run", check=lambda made: None)
    assert not (tmp_path / "run").exists()


def test_the_published_shape() -> None:
    """8.02B parameters: nine tensors per layer, and three at the ends."""
    preset = FAMILIES["llada"].presets["llada-8b"].model.filled()
    form = format_for("llada", preset)
    entries = form.entries(preset)
    assert sum(torch.Size(s).numel() for entry in entries for s in entry.theirs.values()) == 8_015_581_184
    assert sum(len(entry.theirs) for entry in entries) == 9 * 32 + 3
    assert understand(form.write(preset) | {"model_type": "llada"}, "llada", "config.json").model == preset
