"""The table of replacements: complete for the installed megatron-core, idempotent, and undone without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from gptoughts.errors import PlatformError
from gptoughts.platform import mcore_cpu, versions
from gptoughts.platform.mcore_cpu import PATCHES, Patch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the table is for machines without CUDA")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    was_installed = mcore_cpu.is_installed()
    mcore_cpu.uninstall()
    yield
    mcore_cpu.uninstall()
    if was_installed:
        mcore_cpu.install()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_every_target_exists(patch: Patch) -> None:
    if patch.applies_to(versions.megatron_core_version()):
        patch.resolve()
    assert patch.reason
    assert patch.upstream


def test_install_is_idempotent_and_uninstall_restores() -> None:
    schedules = import_module("megatron.core.pipeline_parallel.schedules")
    original = torch.cuda.current_device
    assert mcore_cpu.install()
    assert not mcore_cpu.install()
    assert torch.cuda.current_device() == torch.device("cpu")
    assert schedules.torch.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
    assert schedules.torch.ones is torch.ones
    mcore_cpu.uninstall()
    assert torch.cuda.current_device is original
    assert schedules.torch is torch


def test_a_missing_target_is_named() -> None:
    patch = Patch("megatron.core.utils:no_such_thing", lambda original: original, "a test", "nowhere:1")
    with pytest.raises(PlatformError, match=r"no_such_thing does not exist.*supported: >= 0\.16\.1, < 0\.20"):
        patch.resolve()


def test_rows_apply_to_their_versions_only() -> None:
    patch = Patch("a:b", lambda original: original, "a test", "nowhere:1", versions=("0.16.1", "0.18"))
    found = [patch.applies_to(version) for version in ("0.16.0", "0.16.1", "0.17.0rc1", "0.18.0", "0.19.2")]
    assert found == [False, True, True, False, False]


@pytest.mark.parametrize(("found", "message"), [(None, "not installed"), ("0.15.3", "0.15.3"), ("0.20.0", "0.20.0")])
def test_unsupported_versions_are_refused(found: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda package: found)
    with pytest.raises(PlatformError, match=message):
        versions.megatron_core_version()


def test_tracker_forks_nest_and_leave_the_outer_generator_alone() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    mcore_cpu.install()
    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    torch.manual_seed(0)
    outside = torch.get_rng_state()
    with tracker.fork("a"):
        first = torch.rand(2)
        with tracker.fork("b"):
            inner = torch.rand(2)
        second = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), outside)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(first, torch.rand(2, generator=generator))
    assert torch.equal(second, torch.rand(2, generator=generator))
    assert torch.equal(inner, torch.rand(2, generator=torch.Generator().manual_seed(2)))
    with pytest.raises(ValueError, match="seed 1 already exists"):
        tracker.add("c", 1)
    with pytest.raises(ValueError, match="rng state a already exists"):
        tracker.add("a", 9)
    with pytest.raises(ValueError, match="rng state z is not added"), tracker.fork("z"):
        pass


def test_streams_and_events_do_nothing() -> None:
    mcore_cpu.install()
    stream, given = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        event = torch.cuda.current_stream().record_event()
        assert stream.record_event(given) is given
        assert stream.wait_event(event) is None  # a wait that has to come to an end
        assert torch.cuda.synchronize() is None
