"""Which backend a run takes, and our side of Transformer Engine's, against stand-ins with its interface."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gptoughts.config.experiment import ExperimentConfig, Fp8Config, TrainConfig
from gptoughts.platform import device
from gptoughts.precision import te_backend
from gptoughts.precision.backend import BackendChoice, backend_problems, choose_backend, choose_transformer_impl
from gptoughts.precision.fp8_recipe import DelayedScaling
from gptoughts.precision.scaling_state import STATE_NAMES, ScalingState


def run(backend: Any = "auto", layers: Any = "auto", use_fp8: bool = True) -> ExperimentConfig:
    return ExperimentConfig(use_fp8=use_fp8, fp8=Fp8Config(backend=backend), train=TrainConfig(transformer_impl=layers))


def problems(config: ExperimentConfig) -> list[str]:
    return backend_problems(config, {"fp8.backend": "flag", "train.transformer_impl": "flag"})


def test_without_a_gpu_auto_emulates_and_te_is_refused() -> None:
    choice = choose_backend(run())
    assert choice.name == "emulated"
    assert "compute capability 8.9" in choice.reason
    assert choose_transformer_impl(run()) == choose_transformer_impl(run(use_fp8=False)) == "local"
    (problem,) = problems(run("te"))
    assert "this is a CPU" in problem
    (problem,) = problems(run(layers="transformer_engine", use_fp8=False))
    assert "compute capability 8.0" in problem
    assert problems(run()) == problems(run("emulated")) == problems(run(layers="local", use_fp8=False)) == []


def test_with_transformer_engine_auto_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "fp8_obstacle", lambda: None)
    monkeypatch.setattr(device, "transformer_engine_obstacle", lambda: None)
    assert choose_backend(run()).name == "te"
    assert choose_transformer_impl(run()) == choose_transformer_impl(run(use_fp8=False)) == "transformer_engine"
    assert choose_transformer_impl(run("emulated")) == "local"
    assert choose_backend(run(layers="local")) == BackendChoice("emulated", "train.transformer_impl=local")
    assert problems(run("te")) == problems(run("emulated")) == problems(run(layers="local")) == []
    (problem,) = problems(run("te", "local"))
    assert "needs Transformer Engine's layers" in problem
    (problem,) = problems(run("emulated", "transformer_engine"))
    assert "not emulated" in problem


def test_where_its_layers_run_but_not_in_fp8_auto_emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "fp8_obstacle", lambda: "an A100 has 8.0")
    monkeypatch.setattr(device, "transformer_engine_obstacle", lambda: None)
    assert choose_backend(run()) == BackendChoice("emulated", "an A100 has 8.0")
    assert choose_transformer_impl(run()) == "local"
    assert choose_transformer_impl(run(use_fp8=False)) == "transformer_engine"


class StandIn(nn.Module):
    """The part of ``transformer_engine.pytorch.Linear`` that we touch."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))
        self.fp8_meta: dict[str, Any] = {}
        self.length = 4

    def init_fp8_metadata(self, num_gemms: int) -> None:
        for key, slots in (("scaling_fwd", 3 * num_gemms), ("scaling_bwd", 2 * num_gemms)):
            history = torch.zeros(self.length, slots)
            self.fp8_meta[key] = SimpleNamespace(scale=torch.ones(slots), amax_history=history)

    def forward(self) -> list[bool]:
        if self.fp8_meta:
            self.fp8_meta["scaling_fwd"].amax_history[0].fill_(3.0)
        return list(_AUTOCASTS)


_AUTOCASTS: list[bool] = []


@contextmanager
def autocast(enabled: bool = True) -> Iterator[None]:
    _AUTOCASTS.append(enabled)
    yield
    _AUTOCASTS.pop()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import fp8_utils

    package = ModuleType("transformer_engine.pytorch")
    package.fp8_autocast, package.Linear = autocast, StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", package)
    monkeypatch.setattr(fp8_utils, "get_fp8_context", lambda config: autocast(bool(config.fp8)))


@pytest.mark.usefixtures("engine")
def test_layers_that_stay_out_switch_the_autocast_off_for_themselves() -> None:
    config = SimpleNamespace(fp8="hybrid")
    model = nn.ModuleDict({"a": StandIn(16, 16), "b": StandIn(16, 16), "norm": nn.LayerNorm(4)})
    layers = te_backend.linear_layers(dict(model.named_modules()))
    assert list(layers) == ["a", "b"]
    linears = te_backend.TeLinears(layers, lambda name: name == "b", config)
    with linears.forward():
        assert model["a"]() == [True]
        assert model["b"]() == [True, False]
    assert list(linears.layers) == ["a"]
    linears.fall_back("a")
    with linears.forward():
        assert model["a"]() == [True, False]
    assert linears.states() == {}


@pytest.mark.usefixtures("engine")
def test_the_state_has_the_layout_of_the_emulated_one_and_evaluation_leaves_it_alone() -> None:
    layer = StandIn(16, 16)
    linears = te_backend.TeLinears({"a": layer}, lambda _: False, SimpleNamespace(fp8="hybrid"))
    state = linears.states()["a"]
    assert tuple(state) == STATE_NAMES
    ours = ScalingState(DelayedScaling(amax_history_len=4)).states()
    assert {name: tensor.shape for name, tensor in state.items()} == {name: t.shape for name, t in ours.items()}
    with torch.no_grad(), linears.forward():
        layer()
    assert (state["amax_history_fwd"] == 0).all()
    with linears.forward():
        layer()
    assert (state["amax_history_fwd"][0] == 3).all()


def test_shapes_that_tensor_cores_cannot_multiply_are_named() -> None:
    layers = {"a": StandIn(16, 24), "b": StandIn(16, 32)}
    problems = te_backend.shape_problems(layers, rows=12)
    assert len(problems) == 2
    assert "12 tokens per rank" in problems[0]
    assert "a is 16 x 24 on this rank" in problems[1]
    assert te_backend.shape_problems({"b": layers["b"]}, rows=16) == []


def test_megatron_cores_configuration_is_set_whole() -> None:
    config = SimpleNamespace()
    te_backend.configure(config, DelayedScaling("e4m3", 1, 8, "most_recent"))
    assert vars(config) == {
        "fp8": "e4m3", "fp8_recipe": "delayed", "fp8_margin": 1, "fp8_amax_history_len": 8,
        "fp8_amax_compute_algo": "most_recent", "disable_parameter_transpose_cache": True,
    }  # fmt: skip
