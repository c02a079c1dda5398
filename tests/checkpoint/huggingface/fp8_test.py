"""Matrices stored in FP8 by blocks: read as what they stand for, refused where a factor is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoughts.checkpoint.huggingface.exporting import export_model
from gptoughts.checkpoint.huggingface.fp8 import BlockQuantization
from gptoughts.checkpoint.huggingface.importing import import_model
from gptoughts.errors import CheckpointError
from tests.checkpoint.huggingface.conftest import Publish

BLOCK = (16, 24)  # divides neither 20 nor 48, so that blocks at the edges are cut
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK)}


def quantized(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, factors, and the matrix that they stand for in fp64, block by block in plain loops."""
    rows, columns = BLOCK
    scales = torch.empty(math.ceil(matrix.size(0) / rows), math.ceil(matrix.size(1) / columns))
    values = torch.empty_like(matrix, dtype=torch.float8_e4m3fn)
    whole = torch.empty_like(matrix, dtype=torch.float64)
    for i in range(scales.size(0)):
        for j in range(scales.size(1)):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = matrix[place].float().abs().max() / 448.0
            values[place] = (matrix[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
            whole[place] = values[place].double() * scales[i, j].double()
    return values, scales, whole


def publish_fp8(publish: Publish) -> tuple[Path, dict[str, Tensor]]:
    """As DeepSeek-V3 is published: projections in FP8; embedding, norms and router are not; the bias is fp32."""
    folder = publish("deepseek-v3-moe")
    file = folder / "model.safetensors"
    stored, expected = {}, {}
    for name, tensor in load_file(file).items():
        if name.endswith("proj.weight") or "kv_a_proj" in name:
            stored[name], stored[name + "_scale_inv"], expected[name] = quantized(tensor)
        else:
            tensor = tensor.float() if name.endswith("e_score_correction_bias") else tensor
            stored[name] = expected[name] = tensor
    save_file(stored, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    return folder, expected


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_fp8_is_read_as_the_matrix_that_it_stands_for(
    name: str, dtype: torch.dtype, publish: Publish, tmp_path: Path
) -> None:
    source, expected = publish_fp8(publish)
    import_model(source, tmp_path / "run", dequantized=name)
    export_model(tmp_path / "run", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if tensor.dtype is torch.float64:
            # One product in fp32, then rounded to what was asked for.
            assert found[key].dtype is dtype, key
            assert torch.equal(found[key], tensor.float().to(dtype)), key
        else:
            assert found[key].dtype is tensor.dtype, key
            assert torch.equal(found[key], tensor), key
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_missing_and_wrong_factors_are_named(publish: Publish, tmp_path: Path) -> None:
    source, _ = publish_fp8(publish)
    file = source / "model.safetensors"
    tensors = load_file(file)
    missing = "model.layers.1.mlp.experts.3.gate_proj.weight_scale_inv"
    wrong = "model.layers.0.mlp.down_proj.weight_scale_inv"
    del tensors[missing]
    tensors[wrong] = tensors[wrong][:1].clone()
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        import_model(source, tmp_path / "run")
    assert f"{missing}: missing; F32 or BF16 (2, 2) expected" in caught.value.problems
    assert f"{wrong}: F32 (1, 2); F32 or BF16 (2, 2) expected" in caught.value.problems
    assert not (tmp_path / "run").exists()


def test_fp8_without_a_configuration_is_refused(publish: Publish, tmp_path: Path) -> None:
    source, _ = publish_fp8(publish)
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="dtype F8_E4M3; allowed: F32, BF16, F16"):
        import_model(source, tmp_path / "run")


def test_blocks_of_the_published_size() -> None:
    values = torch.full((130, 257), 2.0).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = BlockQuantization(128, 128).dequantize(values, scales)
    corners = [found[i, j].item() for i in (0, 127, 128, 129) for j in (0, 127, 128, 255, 256)]
    row, last = [2.0, 2.0, 4.0, 4.0, 6.0], [8.0, 8.0, 10.0, 10.0, 12.0]
    assert corners == [*row, *row, *last, *last]
