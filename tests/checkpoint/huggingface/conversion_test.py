"""Hugging Face folders to checkpoints and back: exact, complete, refused by name, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.huggingface.exporting import export_model
from gptoughts.checkpoint.huggingface.importing import import_model
from gptoughts.checkpoint.portable import CheckpointReader
from gptoughts.config.cli import from_yaml
from gptoughts.errors import CheckpointError
from gptoughts.models.registry import FAMILIES
from tests.checkpoint.huggingface.conftest import KINDS, Publish


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_there_and_back_is_equal_to_the_bit(kind: str, dtype: torch.dtype, publish: Publish, tmp_path: Path) -> None:
    source = publish(kind, dtype=dtype)
    made = import_model(source, tmp_path / "run")
    assert made.padded_rows == 84  # 300 rounded up to 384
    back = export_model(tmp_path / "run", tmp_path / "back")
    assert (made.format, made.num_files, back.num_files) == (back.format, 1, 1)
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype is dtype
        assert torch.equal(after[name], tensor), name
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name


def test_the_checkpoint_is_one_of_ours(publish: Publish, tmp_path: Path) -> None:
    import_model(publish("llama"), tmp_path / "run")
    folder = layout.locate(tmp_path / "run")
    assert folder == layout.step_folder(tmp_path / "run", 0)
    layout.check_files(folder)
    config = from_yaml((folder / layout.CONFIG).read_text(), FAMILIES)
    assert config.model_type == "gpt"
    assert (config.model.vocab_size, config.block_size, config.train.precision) == (300, 64, "bf16")
    embedding = CheckpointReader(folder).full("embedding.word_embeddings.weight")
    assert embedding.shape == (384, 32)
    assert not embedding[300:].any()
    assert layout.read_manifest(folder)["origin"] == {"format": "llama", "padded_rows": 84}


def test_several_files_in_and_out(publish: Publish, tmp_path: Path) -> None:
    source = publish("llama", max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    made = import_model(source, tmp_path / "run", max_file_bytes=20_000)
    back = export_model(tmp_path / "run", tmp_path / "back", max_file_bytes=20_000)
    assert made.num_files > 2
    assert back.num_files > 2
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert index["weight_map"].keys() == before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in before.values())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(loaded.state_dict()["model.norm.weight"], before["model.norm.weight"])


def test_another_dtype_is_rounded_and_said(publish: Publish, tmp_path: Path) -> None:
    source = publish("llama", dtype=torch.float32)
    import_model(source, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "back", dtype="BF16")
    after = tensors_of(tmp_path / "back")
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in tensors_of(source).items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_everything_wrong_with_the_tensors_is_named_and_nothing_written(publish: Publish, tmp_path: Path) -> None:
    source = publish("llama")
    file = source / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(5, 32, dtype=torch.bfloat16)
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"].float()
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # in old files; no weight
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        import_model(source, tmp_path / "run")
    text = caught.value.problems
    assert len(text) == 4
    assert "model.norm.weight: missing, shape (32,) expected" in text
    assert "model.layers.1.mlp.up_proj.weight: shape (5, 32), (48, 32) expected" in text
    assert "model.layers.2.mlp.up_proj.weight: unknown to this format" in text
    assert any("k_proj.weight" in line and "differ in dtype (BF16, F32)" in line for line in text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published-llama"]


def test_a_tied_output_layer_may_be_in_the_file_if_it_is_the_embedding(publish: Publish, tmp_path: Path) -> None:
    source = publish("llama-tied")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    import_model(source, tmp_path / "run")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: is not equal to model\.embed_tokens\.weight"):
        import_model(source, tmp_path / "another")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': not one of those that convert: llama, mistral"),
        ({"attention_bias": True}, "attention_bias=true: biases"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights are not read"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn': not built"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "rope_scaling.low_freq_factor: missing"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": "64"}, "hidden_size='64': a whole number is needed"),
        ({"num_hidden_layers": 2.5}, "num_layers=2.5: a whole number is needed"),
        ({"rope_theta": [], "rope_parameters": None}, "a value of no use: "),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window=32"),
        ({"model_type": "mistral"}, "sliding_window: missing"),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 1}, "n_routed_experts: missing"),
    ],
)
def test_what_no_family_holds_is_refused(changes: dict, problem: str, publish: Publish, tmp_path: Path) -> None:
    source = publish("llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError) as caught:
        import_model(source, tmp_path / "run")
    assert problem in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_pickles_and_leftovers(publish: Publish, tmp_path: Path) -> None:
    source = publish("llama")
    (tmp_path / "run.partial").mkdir()  # a conversion that was killed
    (tmp_path / "run.partial" / "half").write_text("")
    import_model(source, tmp_path / "run")
    assert not (tmp_path / "run.partial").exists()
    assert not (tmp_path / "run" / "half").exists()
    with pytest.raises(CheckpointError, match="exists already"):
        import_model(source, tmp_path / "run")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles, which are never opened"):
        import_model(source, tmp_path / "another")


def test_a_failing_check_keeps_nothing(publish: Publish, tmp_path: Path) -> None:
    def check(made: Path) -> None:
        assert (made / "checkpoints" / "latest").is_file()
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        import_model(publish("llama"), tmp_path / "run", check=check)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published-llama"]


def test_a_damaged_checkpoint_is_not_exported(publish: Publish, tmp_path: Path) -> None:
    import_model(publish("llama"), tmp_path / "run")
    file = next(tmp_path.glob("run/checkpoints/step_00000000/weights_*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights_00000\.safetensors: checksum differs"):
        export_model(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_tensor_in_two_files_is_named(publish: Publish, tmp_path: Path) -> None:
    source = publish("llama", max_shard_size="40KB")
    first, second = sorted(source.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor + 1}, second)
    with pytest.raises(CheckpointError, match=rf"{name}: in several files, {second.name} and another"):
        import_model(source, tmp_path / "run")
