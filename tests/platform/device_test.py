"""Device, determinism and the doctor on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gptoughts.platform import determinism, device, doctor, mcore_cpu


@pytest.fixture
def _restore() -> Iterator[None]:
    was_enabled = determinism.is_enabled()
    yield
    if not was_enabled:
        determinism.disable()


def test_device_facts_are_consistent() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert device.claim_device().type == device.current_device().type == expected
    assert device.communication_backend() == ("nccl" if expected == "cuda" else "gloo")
    assert 0 < device.memory_bytes() < device.total_memory_bytes()
    assert device.supports_precision(torch.float32)
    assert device.supports_precision(torch.float16) == (expected == "cuda")
    assert not device.supports_precision(torch.float64)
    assert device.describe()


def test_peak_rate_is_measured_once() -> None:
    first = device.peak_tflops(torch.float32, size=256)
    assert 1e-4 < first < 1e5
    assert device.peak_tflops(torch.float32, size=256) == first


def test_generator_state_round_trip() -> None:
    device.seed_device(3)
    state = device.rng_state()
    first = torch.rand(3)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.usefixtures("_restore")
def test_deterministic_mode_leaves_uninitialized_memory_alone() -> None:
    determinism.enable()
    assert determinism.is_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is False
    determinism.disable()
    assert not determinism.is_enabled()


def test_doctor_reports_and_fails_on_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "peak_tflops", lambda dtype: 0.5)
    assert doctor.main([]) == 0
    assert "is supported" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "diagnose", lambda: [doctor.Finding("ninja", "not found", is_problem=True)])
    assert doctor.main([]) == 1
    assert "PROBLEM ninja" in capsys.readouterr().out


def test_doctor_names_an_operator_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    if device.is_cuda():
        pytest.skip("operators are built for machines without CUDA")
    monkeypatch.setitem(doctor._CPU_BUILDERS, "comm", ("NoSuchBuilder",))
    (finding,) = doctor.build_ops("comm")
    assert finding.is_problem
    assert finding.topic == "NoSuchBuilder"


def test_the_doctor_says_that_half_of_transformer_engine_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> bool:
        raise FileNotFoundError("Could not find shared object file for Transformer Engine torch lib.")

    monkeypatch.setattr(mcore_cpu, "install", fail)
    assert doctor.main([]) == 1
    assert "cannot be imported: Could not find shared object file for Transformer Engine" in capsys.readouterr().out
