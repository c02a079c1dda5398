"""DeepSpeed's own checkpoints become whole weights, equal to the live ones; nothing in them is run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptoughts.checkpoint.zero_files import ZeroCheckpoint
from gptoughts.checkpoint.zero_to_whole import write_whole_weights
from gptoughts.errors import CheckpointError
from tests.checkpoint.plain_deepspeed import Toy, train_and_save
from tests.distributed import run_distributed

CASES = {
    "stage1": (1, "fp32", False),
    "stage2-groups": (2, "fp32", True),
    "stage3-groups": (3, "fp32", True),
    "stage3-bf16": (3, "bf16", False),
}


@pytest.mark.parametrize("case", CASES)
def test_whole_weights_are_the_live_ones(case: str, tmp_path: Path) -> None:
    stage, precision, has_groups = CASES[case]
    live, _ = run_distributed(train_and_save, 2, str(tmp_path / "ds"), stage, precision, has_groups)
    made = write_whole_weights(tmp_path / "ds", tmp_path / "whole", max_file_bytes=400)
    assert made.num_files > 1
    assert made.format == f"DeepSpeed ZeRO {stage} of 2 ranks"
    found = {name: t for path in (tmp_path / "whole").glob("*.safetensors") for name, t in load_file(path).items()}
    assert found.keys() == live.keys()
    for name, tensor in live.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert found["count"].item() == 3
    Toy().load_state_dict(found, strict=True)
    if case == "stage2-groups":
        check_problems(tmp_path / "ds")


def check_problems(folder: Path) -> None:
    """Everything that can be wrong with the files of two ranks, each in a copy."""

    def copy(name: str) -> Path:
        target = folder.parent / name / "step3"
        shutil.copytree(folder / "step3", target)
        return target

    rank_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    missing = copy("missing")
    (missing / rank_1).unlink()
    with pytest.raises(CheckpointError, match=f"{rank_1} is missing; 2 ranks wrote it"):
        ZeroCheckpoint(missing)

    extra = copy("extra")
    shutil.copyfile(extra / rank_1, extra / rank_1.replace("rank_1", "rank_2"))
    with pytest.raises(CheckpointError, match="files of two checkpoints are mixed"):
        ZeroCheckpoint(extra)

    no_model = copy("no_model")
    (no_model / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*_model_states\.pt"):
        ZeroCheckpoint(no_model)

    tensor = copy("tensor")
    shutil.copyfile(tensor / "mp_rank_00_model_states.pt", tensor / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match=r"model parallelism \(mp_rank_01\)"):
        ZeroCheckpoint(tensor)

    torn = copy("torn")
    (torn / rank_1).write_bytes((torn / rank_1).read_bytes()[:500])
    with pytest.raises(CheckpointError, match=f"{rank_1}: "):
        ZeroCheckpoint(torn)

    flipped = copy("flipped")
    content = bytearray((flipped / rank_1).read_bytes())
    state = torch.load(flipped / rank_1, weights_only=False)["optimizer_state_dict"]
    place = content.index(state["single_partition_of_fp32_groups"][0].detach().numpy().tobytes())
    content[place] ^= 1  # the last bit of one weight
    (flipped / rank_1).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{rank_1}: checksum of .* differs"):
        ZeroCheckpoint(flipped)

    short = copy("short")
    content = torch.load(short / rank_1, weights_only=False)
    groups = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    groups[1] = groups[1][:-20].clone()
    torch.save(content, short / rank_1)
    with pytest.raises(CheckpointError, match="elements, the files hold"):
        ZeroCheckpoint(short)

    foreign = copy("foreign")
    (foreign / "layer_00-model_00-model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="DeepSpeed's pipeline engine wrote it"):
        ZeroCheckpoint(foreign)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_code_in_a_file_is_named_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"module": Evil()}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": Evil()}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match=r"holds (__builtin__|builtins)\.print, which would have to be run"):
        ZeroCheckpoint(tmp_path)
    assert "run" not in capsys.readouterr().out


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        ZeroCheckpoint(tmp_path / "none")
    (tmp_path / "latest").write_text("global_step7")
    with pytest.raises(CheckpointError, match="names 'global_step7', and there is no such folder"):
        ZeroCheckpoint(tmp_path)
