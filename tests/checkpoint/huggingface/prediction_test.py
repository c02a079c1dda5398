"""Multi-token prediction's weights, which transformers drops: layers above the last, there and back bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.huggingface.exporting import export_model
from gptoughts.checkpoint.huggingface.importing import import_model
from gptoughts.checkpoint.portable import CheckpointReader
from gptoughts.errors import CheckpointError
from tests.checkpoint.huggingface.conftest import Publish
from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun

LAYERS, HIDDEN, DEPTHS = 3, 32, 2


def with_prediction(publish: Publish) -> Path:
    """As DeepSeek-V3 is published: depth k is layer N + k, with its own norms and projection, and shared copies."""
    folder = publish("deepseek-v3-moe")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(8)
    last = {name: tensor for name, tensor in tensors.items() if name.startswith(f"model.layers.{LAYERS - 1}.")}
    for depth in range(DEPTHS):
        place = f"model.layers.{LAYERS + depth}."
        for name, tensor in last.items():
            drawn = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            tensors[place + name.removeprefix(f"model.layers.{LAYERS - 1}.")] = drawn
        for name, shape in (("enorm", (HIDDEN,)), ("hnorm", (HIDDEN,)), ("shared_head.norm", (HIDDEN,)),
                            ("eh_proj", (HIDDEN, 2 * HIDDEN))):  # fmt: skip
            tensors[f"{place}{name}.weight"] = torch.randn(shape, generator=generator).bfloat16()
        tensors[f"{place}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{place}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": DEPTHS}))
    return folder


def test_there_and_back_with_copies(publish: Publish, tmp_path: Path) -> None:
    source = with_prediction(publish)
    import_model(source, tmp_path / "run")
    reader = CheckpointReader(layout.locate(tmp_path / "run"))
    before = load_file(source / "model.safetensors")
    for depth in range(DEPTHS):
        ours, theirs = f"mtp.layers.{depth}.", f"model.layers.{LAYERS + depth}."
        # [embedding; hidden] on both sides: no columns change places.
        assert torch.equal(reader.full(f"{ours}eh_proj.weight"), before[f"{theirs}eh_proj.weight"])
        assert torch.equal(reader.full(f"{ours}final_layernorm.weight"), before[f"{theirs}shared_head.norm.weight"])
        gate = before[f"{theirs}mlp.experts.5.gate_proj.weight"]
        assert torch.equal(reader.full(f"{ours}transformer_layer.mlp.experts.linear_fc1_weight")[5, : len(gate)], gate)
        bias = reader.full(f"{ours}transformer_layer.mlp.router.expert_bias", "buffer")
        assert torch.equal(bias, before[f"{theirs}mlp.gate.e_score_correction_bias"])
    made = export_model(tmp_path / "run", tmp_path / "back")
    # Neither the copies nor the routers' biases are parameters.
    left_out = ("embed_tokens.weight", "shared_head.head.weight", "e_score_correction_bias")
    counted = [t for n, t in before.items() if n == "model.embed_tokens.weight" or not n.endswith(left_out)]
    assert made.num_parameters == sum(tensor.numel() for tensor in counted)
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_copy_that_is_none_is_named(publish: Publish, tmp_path: Path) -> None:
    source = with_prediction(publish)
    tensors = load_file(source / "model.safetensors")
    name = f"model.layers.{LAYERS + 1}.shared_head.head.weight"
    tensors[name][3, 4] += 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}: is not equal to lm_head\.weight"):
        import_model(source, tmp_path / "run")


def test_files_decide_where_transformers_dropped_the_tensors(publish: Publish, tmp_path: Path) -> None:
    source = publish("deepseek-v3-moe")
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    import_model(source, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def train(folder: str) -> str:
    extra = ("--model.mtp_num_layers=1", "--model.layernorm_epsilon=1e-6")
    run = ToyRun("deepseek", Layout(extra=extra), Path(folder))
    list(run.train(2))
    saved = run.save()
    run.close()
    return str(saved)


def test_what_we_trained_says_its_depths_and_is_loaded_without_them(tmp_path: Path) -> None:
    (saved,) = run_distributed(train, 1, str(tmp_path / "ours"))
    export_model(Path(saved), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["model.layers.2.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    import_model(tmp_path / "out", tmp_path / "again")
    before, after = CheckpointReader(Path(saved)), CheckpointReader(layout.locate(tmp_path / "again"))
    assert before.names() == after.names()
    assert all(torch.equal(after.full(name), before.full(name)) for name in before.names())


@pytest.mark.parametrize("length", [2**63, 2**50])
def test_a_damaged_header_is_named(length: int, publish: Publish, tmp_path: Path) -> None:
    """The first eight bytes of a file say how long its header is."""
    file = with_prediction(publish) / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        import_model(file.parent, tmp_path / "run")
