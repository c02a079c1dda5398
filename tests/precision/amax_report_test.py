"""What casts lose is counted right, layers that lose too much are named, and named layers stay out of FP8."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptoughts.config.experiment import Fp8Config
from gptoughts.errors import DataError
from gptoughts.precision import amax_report
from gptoughts.precision.cast_statistics import CastStatistics
from gptoughts.precision.fp8_linear import cast_backward, cast_forward
from gptoughts.precision.fp8_recipe import DelayedScaling
from gptoughts.precision.scaling_state import INPUT, ScalingRegion, ScalingState
from gptoughts.training.fp8_callback import Fp8Callback
from gptoughts.training.fp8_report import main
from gptoughts.training.metrics import MetricsFile
from tests.harness import Layout, ToyRun

FP8 = ("--use_fp8=true", "--fp8.backend=emulated", "--fp8.amax_history_len=4")
BAD = "decoder.layers.1.mlp.linear_fc2"


def line(step: int, name: str, role: str, **figures: Any) -> dict[str, Any]:
    usual = {"amax": 1.0, "scale": 448.0, "saturated_fraction": 0.0, "underflowed_fraction": 0.0, "snr_db": 31.0}
    return {"step": step, "name": name, "role": role, **(usual | figures)}


def test_sums_of_casts_are_counted() -> None:
    state = ScalingState(DelayedScaling(amax_history_len=2))
    ScalingRegion([state], state.recipe, None)
    state.scale_fwd[INPUT], state.scale_bwd[0] = 100.0, 1.0
    watching = CastStatistics({"a": state})
    x = torch.tensor([1.0, -2.0, 9.0, 1e-6, 0.0, 3.3])
    for _ in range(2):
        cast_forward(state, x, INPUT, 100.0, is_recording=True)
    cast_forward(state, x, INPUT, 100.0, is_recording=False)  # a second forward or an evaluation
    cast_backward(state, torch.tensor([1.0, 1e-9]))
    watching.stop()
    cast_backward(state, torch.tensor([5.0, 5.0]))
    first, second = watching.lines(7, None)
    assert (first["step"], first["name"], first["role"]) == (7, "a", "input")
    assert first["amax"] == 9.0
    assert first["scale"] == pytest.approx(100.0)
    assert first["saturated_fraction"] == pytest.approx(1 / 6)
    assert first["underflowed_fraction"] == pytest.approx(1 / 6)
    cast = torch.tensor([0.96, -1.92, 4.48, 0.0, 0.0, 3.2])  # 100 -> 96, -200 -> -192, 900 -> 448, 330 -> 320
    noise = (x - cast).square().sum()
    assert first["snr_db"] == pytest.approx(10 * math.log10(x.square().sum() / noise), abs=1e-3)
    assert (second["role"], second["amax"]) == ("grad_output", 1.0)
    assert second["underflowed_fraction"] == 0.5


def test_the_later_half_decides() -> None:
    lines = [line(step, "early", "weight", snr_db=10.0 if step < 3 else 31.0) for step in range(1, 6)]
    lines += [line(step, "noisy", "grad_output", snr_db=18.0) for step in range(1, 6)]
    lines += [line(step, "small", "input", underflowed_fraction=0.03) for step in range(1, 6)]
    lines += [line(step, "large", "input", saturated_fraction=0.002, snr_db=None, amax=None) for step in range(1, 6)]
    lines += [line(step, "once", "input", snr_db=3.0 if step == 4 else 31.0) for step in range(1, 6)]
    found = {finding.name: finding.reasons for finding in amax_report.judge(lines)}
    assert found == {
        "noisy": ("grad_output: 18.0 dB, below 19",),
        "small": ("input: 3.00% underflowed, above 2.00%",),
        "large": ("input: 0.20% saturated, above 0.10%",),
    }


def test_reports_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fp8.jsonl: No such file.*log.fp8"):
        amax_report.read_report(tmp_path)
    file = tmp_path / "fp8.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"fp8.jsonl:1: no line of an FP8 report"):
        amax_report.read_report(tmp_path)
    file.write_text(json.dumps(line(1, "a", "input")) + '\n{"step":')
    assert len(amax_report.read_report(file)) == 1
    file.write_text("")
    with pytest.raises(DataError, match="holds no lines"):
        amax_report.read_report(file)


def test_a_run_is_watched_and_its_bad_layer_stays_out_of_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    run = ToyRun("gpt", Layout(extra=FP8), tmp_path / "first")
    file = MetricsFile(tmp_path, resumed_step=0, name=amax_report.REPORT_FILE)
    callback = Fp8Callback(run.engine.chunks, file, 2)
    trainer: Any = SimpleNamespace(state=SimpleNamespace(step=0), last_step=5)
    callback.on_train_start(trainer)
    state = run.engine.chunks[0].fp8.states[BAD]
    for _ in run.train(5):
        trainer.state.step += 1
        callback.on_step_end(trainer, SimpleNamespace())
        state.scale_bwd.fill_(0.05)  # its gradients are a few of the smallest numbers
    callback.on_train_end(trainer)
    run.close()
    lines = amax_report.read_report(tmp_path)
    assert sorted({found["step"] for found in lines}) == [1, 2, 4, 5]
    assert len(lines) == 4 * 3 * 8
    usual = [found for found in lines if found["step"] > 1 and found["name"] != BAD]
    for found in usual:
        expected = 25.5 if found["role"] == "grad_output" else 31.5
        assert found["snr_db"] == pytest.approx(expected, abs=3), found
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"  {BAD}: grad_output: " in text
    assert (tmp_path / "fp8.png").stat().st_size > 10_000

    again = ToyRun("gpt", Layout(extra=(*FP8, "--fp8.keep_bf16", "auto", f"--fp8.report={tmp_path}")), tmp_path / "b")
    names = set(again.engine.chunks[0].fp8.states)
    again.close()
    assert BAD not in names
    assert len(names) == 7


def test_auto_is_replaced_and_other_words_stay(tmp_path: Path) -> None:
    lines = [line(1, "decoder.layers.3.mlp.linear_fc1", "input", snr_db=1.0), line(1, "b", "input")]
    (tmp_path / "fp8.jsonl").write_text("".join(json.dumps(found) + "\n" for found in lines))
    section = Fp8Config(keep_bf16=["embedding", "auto", "first_1_layers"], report=str(tmp_path))
    assert amax_report.kept_words(section) == ["embedding", "first_1_layers", "decoder.layers.3.mlp.linear_fc1"]
