"""Multi-token prediction in whole toy runs: it learns, is counted, logged, saved, and leaves the rest alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from gptoughts.config.cli import load_experiment
from gptoughts.models.deepseek.config import DeepSeekConfig
from gptoughts.models.flops import count_parameters, flops_per_token
from gptoughts.models.registry import FAMILIES
from gptoughts.objectives.multi_token import multi_token_figures
from gptoughts.training.summary import print_summary
from tests.distributed import run_distributed
from tests.golden import curve
from tests.harness import Layout, ToyRun, run_layout, step_microbatches
from tests.models.families_test import DROPOUT, FAST, resume_in_the_middle

DEEPSEEK = FAMILIES["deepseek"]
ONE_DEPTH = ("--model.mtp_num_layers=1",)
ROUTER_BIAS = "mtp.layers.0.transformer_layer.mlp.router.expert_bias"


def overfit(folder: str) -> list[dict[str, float]]:
    run = ToyRun("deepseek", Layout(extra=(*FAST, "--model.mtp_num_layers=2")), Path(folder))
    batch = step_microbatches(run.experiment, run.objective, 0, 0)
    results = [run.engine.train_step(batch, lr=3e-3, flags={}) for _ in range(20)]
    run.close()
    return [{"loss": result.loss} | multi_token_figures(result.extras) for result in results]


def test_twenty_steps_on_one_batch_lower_every_depth(tmp_path: Path) -> None:
    (figures,) = run_distributed(overfit, 1, str(tmp_path))
    first, last = figures[0], figures[-1]
    assert first.keys() == {"loss", "mtp_loss", "mtp_1_loss", "mtp_2_loss"}
    for name in first:
        assert first[name] == pytest.approx(5.55, abs=0.3), "ln 256 = 5.5 is where an untrained byte model starts"
        assert last[name] < 3.0, name


@pytest.mark.parametrize(
    "layout",
    [Layout(precision="bf16", zero=1, extra=(*ONE_DEPTH, *DROPOUT)), Layout(data=2, zero=3, extra=ONE_DEPTH)],
    ids=str,
)
def test_save_and_resume_is_bitwise_equal(layout: Layout, tmp_path: Path) -> None:
    for expected, found, is_equal in run_distributed(
        resume_in_the_middle, layout.world_size, "deepseek", layout, str(tmp_path)
    ):
        assert found == expected
        assert is_equal


def inspect(folder: str) -> tuple[int, dict[str, Any], list[float], list[str]]:
    run = ToyRun("deepseek", Layout(extra=ONE_DEPTH), Path(folder))
    built = sum(parameter.numel() for parameter in run.parameters.values())
    (result,) = run.train(1)
    biases = {f.name: f.tensor.abs().tolist() for f in run.engine.state_fragments() if f.kind == "buffer"}
    evaluated = run.engine.eval_step(step_microbatches(run.experiment, run.objective, 0, 0))
    run.close()
    return built, dict(result.figures), biases[ROUTER_BIAS], sorted(evaluated.extras)


def test_its_parameters_load_and_bias_are_those_of_a_further_layer(tmp_path: Path) -> None:
    ((built, figures, bias, evaluated),) = run_distributed(inspect, 1, str(tmp_path))
    model = load_experiment(
        ["--model_type=deepseek", "--model.num_layers=2", "--model.vocab_size=256", *ONE_DEPTH], FAMILIES, world_size=1
    ).config.model
    count = count_parameters(DEEPSEEK, model)
    assert built == count.total + count.mtp
    assert {"layer_1_expert_load_entropy", "layer_2_expert_load_entropy"} <= figures.keys()
    assert any(bias)
    assert all(value == 0 or value == pytest.approx(1e-3) for value in bias)
    assert evaluated == ["target_bytes"]


def test_golden_curve(tmp_path: Path) -> None:
    golden = json.loads(curve.golden_file("deepseek-mtp").read_text())["losses"]
    (history,) = run_distributed(run_layout, 1, "deepseek", Layout(extra=ONE_DEPTH), str(tmp_path), curve.STEPS, ())
    losses = [step["loss"] for step in history]
    assert losses[:10] == pytest.approx(golden[:10], rel=1e-4)
    assert mean(losses[90:]) == pytest.approx(mean(golden[90:]), rel=1e-2)


def test_it_is_counted_apart_and_its_work_is_not_forgotten() -> None:
    model = DEEPSEEK.presets["debug"].model
    having = dataclasses.replace(model, mtp_num_layers=2)
    without, count = count_parameters(DEEPSEEK, model), count_parameters(DEEPSEEK, having)
    assert (without.total, without.active, without.mtp, without.active_mtp) == (count.total, count.active, 0, 0)
    own = model.layer_parameters() + 2 * 256 * 256 + 3 * 256
    assert count.mtp == 2 * own
    passed = model.active_layer_parameters() + 2 * 256 * 256 + 3 * 256 + count.embedding
    assert count.active_mtp == 2 * passed
    attention = 3 * 512 * model.attention_width()
    assert flops_per_token(DEEPSEEK, having, 512) - flops_per_token(DEEPSEEK, model, 512) == 2 * (
        6 * passed + attention
    )


def test_dry_run_says_what_it_adds(capsys: pytest.CaptureFixture[str]) -> None:
    sums = []
    for options in ((), ONE_DEPTH):
        experiment = load_experiment(["--model_type=deepseek", "--size=debug", *options], FAMILIES, world_size=1)
        print_summary(experiment, DEEPSEEK)
        text = capsys.readouterr().out
        sums.append(float(text.split("sum per rank")[1].split("MiB")[0].replace(",", "")))
        assert ("in multi-token prediction" in text) == bool(options)
    model = dataclasses.replace(experiment.config.model)
    assert sums[1] - sums[0] == pytest.approx(model.mtp_parameters() * 16 / 2**20, rel=0.3)
    assert sums[1] > sums[0]


def test_shapes_that_make_no_sense_are_named() -> None:
    problems = DeepSeekConfig(mtp_num_layers=-1, mtp_loss_scaling_factor=-0.1).problems()
    assert problems == [
        "mtp_num_layers=-1: must be 0 or greater",
        "mtp_loss_scaling_factor=-0.1: must be 0 or greater",
    ]
