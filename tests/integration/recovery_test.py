"""Runs that go wrong and heal: faults of data, numbers and memory, on one rank and on several."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.portable import CheckpointReader
from gptoughts.data.pretrain import build_samples
from gptoughts.training.events import read_events
from gptoughts.training.metrics import read_metrics
from tests.distributed import WorkerError, run_distributed
from tests.faults import Fault, run_and_tell
from tests.integration.conftest import TINY, Corpus

STEPS = 24
BATCH = 4
RUN = (
    *TINY, f"--train.steps={STEPS}", f"--train.global_batch_size={BATCH}", "--train.valid_samples=16",
    "--stability.min_window_steps=6", "--stability.snapshot_interval_steps=4", "--log.plot=false",
    "--checkpoint.keep_last=0", "--optim.lr=1e-3",
)  # fmt: skip


def sample_of(step: int, place: int = 1) -> int:
    """The sample at a place of a step (from 1) of a run that leaves out none."""
    return (step - 1) * BATCH + place


def samples_of(*steps: int) -> tuple[int, ...]:
    return tuple(sample_of(step, place) for step in steps for place in range(BATCH))


FP8 = ("--use_fp8=true", "--fp8.backend=emulated", "--fp8.amax_history_len=8", "--batch_size=4")
FAULTS = {
    "nan_gradient": ([Fault("nan_gradient", (sample_of(12),))], ()),
    "inf_activation": ([Fault("inf_activation", (sample_of(12),), rank=0)], ()),
    "loss_spike": ([Fault("loss_spike", samples_of(12))], ()),
    "corrupted_weight": ([Fault("corrupted_weight", step=13)], ()),
    "large weight": ([Fault("corrupted_weight", parameter="output_layer.weight", step=13, value=1e5)], ()),
    "three in a row": ([Fault("nan_gradient", (sample_of(11), sample_of(12), sample_of(13)))], ()),
    "poisoned amax": ([Fault("poisoned_amax", step=13)], FP8),
    "first step": ([Fault("nan_gradient", (sample_of(1),))], ()),
    "first step, rolled back": (
        [Fault("inf_activation", (sample_of(1),))], ("--stability.on_non_finite=rollback",)
    ),
    "last step": ([Fault("nan_gradient", (sample_of(STEPS),))], ()),
}  # fmt: skip
ACTIONS = {
    "corrupted_weight": ["skip"] * 3 + ["rollback"],
    "large weight": ["skip"] * 3 + ["rollback"],
    "poisoned amax": ["skip"] * 3 + ["rollback"],
    "first step, rolled back": ["rollback"],
    "three in a row": ["skip"] * 3,
}


def train(corpus: Corpus, run: Path, *arguments: str, faults: Any = (), world_size: int = 1) -> str | None:
    flags = [*RUN, f"--data={corpus.prefix}", f"--output_dir={run}", *arguments]
    ranks = run_distributed(run_and_tell, world_size, flags, list(faults))
    assert len({repr(rank) for rank in ranks}) == 1, "ranks saw other losses, or acted otherwise"
    return ranks[0][0]


def valid_loss(run: Path) -> float:
    return read_metrics(run / "metrics.jsonl")[-1]["valid_loss"]


@pytest.fixture(scope="module")
def undisturbed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    train(corpus, run)
    assert read_events(run) == []
    return run


_SLOW_FAULTS = {"large weight"}
"""Close relatives of others."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in _SLOW_FAULTS else []) for name in FAULTS]
)
def test_a_run_heals(corpus: Corpus, undisturbed: Path, tmp_path: Path, name: str) -> None:
    faults, arguments = FAULTS[name]
    assert train(corpus, tmp_path, *arguments, faults=faults) is None
    check_healed(name, tmp_path, undisturbed)


def check_healed(name: str, tmp_path: Path, undisturbed: Path, rank: int = 0) -> None:
    """One of ``FAULTS``, that began on ``rank``, did what it should and left nothing behind."""
    events = read_events(tmp_path)
    assert [event["action"] for event in events] == ACTIONS.get(name, ["skip"])
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert valid_loss(tmp_path) == pytest.approx(valid_loss(undisturbed), rel=2e-2)
    expected = [line["lr"] for line in read_metrics(undisturbed / "metrics.jsonl")]
    assert [line["lr"] for line in lines] == expected, "neither a skip nor a rollback may shift the learning rate"
    state = json.loads((layout.list_checkpoints(tmp_path)[-1] / layout.TRAIN_STATE).read_text())
    assert state["step"] == STEPS
    assert math.isfinite(lines[-1]["loss"]) or name == "last step"
    for event in events:
        check_origin(name, event, rank)


# Layout -> ranks, arguments, the rank that has place 1 of a step (tensor-parallel peers: the first that has it).
SEVERAL: dict[str, tuple[int, tuple[str, ...], int]] = {
    "tp2": (2, ("--batch_size=4", "--parallel.tensor=2"), 0),
    "dp4 zero3": (4, ("--batch_size=1",), 1),
    "tp2 sp dp2 zero2": (4, ("--batch_size=2", "--parallel.tensor=2", "--parallel.sequence=true"), 0),
}
ON_SEVERAL = [
    ("tp2", "inf_activation"),
    *(("dp4 zero3", name) for name in FAULTS),
    *(("tp2 sp dp2 zero2", name) for name in ("nan_gradient", "inf_activation", "corrupted_weight", "poisoned amax")),
]


@pytest.mark.parametrize(
    ("where", "name"),
    [pytest.param(*case, marks=[pytest.mark.slow] if index else []) for index, case in enumerate(ON_SEVERAL)],
)
def test_several_ranks_heal_from_each_fault(
    corpus: Corpus, undisturbed: Path, tmp_path: Path, where: str, name: str
) -> None:
    """The same events as on one rank, the same end, and all ranks alike (:func:`train`).

    An infinity appears on one rank only: in its part of the batch, or in its copy of what tensor-parallel peers share.
    """
    world_size, arguments, rank = SEVERAL[where]
    faults, others = FAULTS[name]
    if "tp2" in where and name == "inf_activation":
        rank = 1  # the second of the two that have the sample
    faults = [dataclasses.replace(fault, rank=rank if fault.kind == "inf_activation" else None) for fault in faults]
    stage = int(where[-1]) if "zero" in where else 0
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    run = tmp_path / "run"
    flags = (*others, f"--deepspeed_config={config}", *arguments)
    assert train(corpus, run, *flags, faults=faults, world_size=world_size) is None
    check_healed(name, run, undisturbed, rank)


def check_origin(name: str, event: dict[str, Any], rank: int) -> None:
    """The event names where it began, as far as numbers that are not finite tell."""
    origin = event.get("origin")
    if event["trigger"] != "non_finite":
        assert origin is None
        return
    fault = FAULTS[name][0][0]
    assert origin is not None
    if fault.kind == "poisoned_amax":
        assert origin["phase"] == "state"
        assert origin["parameter"].startswith(f"{fault.module}.fp8.")
        return
    if fault.kind == "corrupted_weight":
        assert (origin["phase"], origin["parameter"]) == ("state", fault.parameter)
        assert origin["layer"] == 0
        return
    assert origin["samples"] == [sample for sample in fault.samples if sample in samples_of(event["step"])]
    assert (origin["module"], origin["layer"]) == (fault.module, 0)
    assert origin["rank"] == rank
    if fault.kind == "nan_gradient":
        assert (origin["phase"], origin["value"]) == ("backward", "NaN")
        assert origin["parameter"] == f"{fault.module}.weight"
    else:
        assert (origin["phase"], origin["value"]) == ("forward", "Inf")


def state_of(run: Path) -> dict[str, Any]:
    return json.loads((layout.list_checkpoints(run)[-1] / layout.TRAIN_STATE).read_text())


def curve(run: Path) -> list[tuple[int, float, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in read_metrics(run / "metrics.jsonl")]


SPIKE = [Fault("loss_spike", samples_of(12))]
ROLL_BACK = ("--stability.on_loss_spike=rollback",)


def test_a_rollback_leaves_the_samples_out_for_good(corpus: Corpus, undisturbed: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(corpus, whole, *ROLL_BACK, faults=SPIKE)
    (event,) = read_events(whole)
    assert event["went_back_to"] == {"step": 8, "source": "snapshot in memory"}
    assert [step for step, _ in event["abandoned"]] == [9, 10, 11]
    state = state_of(whole)
    assert state["skipped_samples"] == [[44, 48]]
    assert state["consumed_samples"] == STEPS * BATCH + 4
    assert state["consumed_tokens"] == STEPS * BATCH * 64, "what was read before the rollback was not learned from"
    assert curve(whole)[:11] == curve(undisturbed)[:11], "the steps up to the fault, run again, are equal to the bit"
    assert curve(whole)[11:] != curve(undisturbed)[11:]
    # A run that was interrupted after the rollback goes on with the same samples, and sees no fault.
    train(corpus, halves, *ROLL_BACK, "--train.stop_after_steps=14", faults=SPIKE)
    train(corpus, halves, *ROLL_BACK)
    assert curve(halves) == curve(whole)
    assert len(read_events(halves)) == 1


def test_without_a_snapshot_a_rollback_goes_to_a_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    options = ("--stability.snapshot_interval_steps=0", "--checkpoint.interval_steps=5")
    train(corpus, tmp_path, *ROLL_BACK, *options, faults=SPIKE)
    (event,) = read_events(tmp_path)
    assert event["went_back_to"]["step"] == 10
    assert event["went_back_to"]["source"].endswith("step_00000010")
    assert [line[0] for line in curve(tmp_path)] == list(range(1, STEPS + 1))


def test_the_rate_is_cut_for_a_while(corpus: Corpus, undisturbed: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path, "--stability.on_loss_spike=cut_lr", "--stability.lr_cut_steps=7", faults=SPIKE)
    (event,) = read_events(tmp_path)
    assert (event["lr_factor"], event["lr_cut_until_step"]) == (0.5, 15)
    for (step, *_, lr), (*_, expected) in zip(curve(tmp_path), curve(undisturbed), strict=True):
        assert lr == pytest.approx(expected * (0.5 if 8 < step <= 15 else 1.0)), step


def test_a_run_that_cannot_heal_ends_with_a_good_state(corpus: Corpus, undisturbed: Path, tmp_path: Path) -> None:
    always = [Fault("nan_gradient", samples_of(*range(12, 100)))]
    limits = ("--stability.max_skips=1", "--stability.max_rollbacks=1", "--stability.max_lr_cuts=1")
    message = train(corpus, tmp_path, *limits, "--checkpoint.interval_steps=6", faults=always)
    assert [event["action"] for event in read_events(tmp_path)] == [
        "skip", "rollback", "skip", "cut_lr", "skip", "stop",
    ]  # fmt: skip
    last = layout.list_checkpoints(tmp_path)[-1]
    assert message is not None
    assert "1 rollback(s) and 1 cut(s) of the learning rate" in message
    assert str(last) in message
    assert layout.step_of(last) == 6, "where the last rollback went; no snapshot is taken while there is trouble"
    # What was saved is good: without the fault the run goes on from there, its rate still cut.
    train(corpus, tmp_path)
    ours, theirs = curve(tmp_path), curve(undisturbed)
    assert ours[:6] == theirs[:6], "the second rollback went to the checkpoint of step 6"
    assert [line[0] for line in ours] == list(range(1, STEPS + 1))
    assert [line[3] for line in ours[6:]] == [pytest.approx(line[3] / 2) for line in theirs[6:]]
    assert ours[-1][1] < ours[5][1]
    assert len(read_events(tmp_path)) == 6


@pytest.mark.parametrize("world_size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_last_sample_of_an_epoch_is_left_out(corpus: Corpus, tmp_path: Path, world_size: int) -> None:
    options = ("--block_size=512", "--train.global_batch_size=16", "--stability.on_non_finite=rollback")
    samples = build_samples(
        [(1.0, f"{corpus.prefix}_train")], seq_length=512, num_extra_tokens=1, seed=1, cache_dir=None
    )
    (epoch,) = samples.num_samples_per_epoch
    steps = epoch // 16 + 2
    for name, faults in (("bad", [Fault("nan_gradient", (epoch - 1,))]), ("good", [])):
        train(corpus, tmp_path / name, *options, f"--train.steps={steps}", faults=faults, world_size=world_size)
    (event,) = read_events(tmp_path / "bad")
    assert event["origin"]["samples"] == [epoch - 1]
    first = (epoch - 1) // 16 * 16
    assert state_of(tmp_path / "bad")["skipped_samples"] == [[first, first + 16]]
    assert state_of(tmp_path / "bad")["consumed_samples"] == (steps + 1) * 16
    assert valid_loss(tmp_path / "bad") == pytest.approx(valid_loss(tmp_path / "good"), rel=2e-2)


def test_the_guard_can_be_switched_off(corpus: Corpus, tmp_path: Path) -> None:
    train(corpus, tmp_path, "--stability.enabled=false", "--train.steps=14", faults=FAULTS["nan_gradient"][0] + SPIKE)
    assert read_events(tmp_path) == []
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if not line["applied"]] == [12]


LAYOUTS = {
    "dp2 zero3": (2, 3, ()),
    "pp2 zero1": (2, 1, ("--parallel.pipeline=2", "--model.num_layers=2")),
    "tp2 zero2": (2, 2, ("--parallel.tensor=2", "--parallel.sequence=true")),
    "dp2 pp2 zero3": (4, 3, ("--parallel.pipeline=2", "--model.num_layers=2")),
    "ep2 dp2 pp2 zero2": (
        4, 2, ("--model_type=deepseek", "--parallel.expert=2", "--parallel.pipeline=2", "--model.num_layers=4")
    ),
}  # fmt: skip
LAYOUT_FAULTS = [
    Fault("nan_gradient", (sample_of(9, 3),)), Fault("loss_spike", samples_of(12)), Fault("corrupted_weight", step=14),
]  # fmt: skip
EVENTS = ["skip", "rollback", "skip", "skip", "skip", "rollback"]


_QUICK_LAYOUTS = ("dp2 zero3", "pp2 zero1")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _QUICK_LAYOUTS else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_several_ranks_heal_like_one(corpus: Corpus, tmp_path: Path, name: str) -> None:
    world_size, stage, arguments = LAYOUTS[name]
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    shape = [flag for flag in arguments if not flag.startswith("--parallel")]
    if "--model_type=deepseek" in shape:
        shape += ["--model.moe_router_topk=2", "--model.num_moe_experts=4", "--model.first_k_dense_layers=1"]
    options = ("--batch_size=1", *ROLL_BACK, "--optim.eps=1e-4")
    parallel = [flag for flag in arguments if flag.startswith("--parallel")]
    train(
        corpus, tmp_path / "several", *options, *shape, *parallel, f"--deepspeed_config={config}",
        faults=LAYOUT_FAULTS, world_size=world_size,
    )  # fmt: skip
    train(corpus, tmp_path / "one", *options, *shape, faults=LAYOUT_FAULTS)
    several, one = tmp_path / "several", tmp_path / "one"
    for run in (several, one):
        events = read_events(run)
        assert [event["action"] for event in events] == EVENTS
        assert events[0]["origin"]["samples"] == [sample_of(9, 3)]
        assert events[0]["origin"]["module"] == Fault.module
        assert events[0]["origin"]["phase"] == "backward"
        assert events[-1]["origin"]["parameter"] == Fault.parameter
    assert [line[0] for line in curve(several)] == list(range(1, STEPS + 1))
    for ours, theirs in zip(curve(several), curve(one), strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-3, nan_ok=True), ours[0]
    assert state_of(several)["skipped_samples"] == state_of(one)["skipped_samples"]


def test_layers_fall_back_to_bf16_and_stay_there(corpus: Corpus, tmp_path: Path) -> None:
    """A layer whose FP8 product yields Inf in some samples leaves FP8; a resumed run keeps it out."""
    faults = [Fault("inf_activation", (sample_of(12),))]
    options = (*FP8, "--model.num_layers=2", "--stability.on_non_finite=fallback")
    train(corpus, tmp_path, *options, "--train.stop_after_steps=14", faults=faults)
    (event,) = read_events(tmp_path)
    assert event["action"] == "fallback"
    assert event["origin"]["layer"] == 0
    left = set(event["left_fp8"])
    assert len(left) == 4
    assert all(name.startswith("decoder.layers.0.") for name in left)
    train(corpus, tmp_path, *options)
    assert set(state_of(tmp_path)["guard"]["left_fp8"]) == left
    buffers = CheckpointReader(layout.list_checkpoints(tmp_path)[-1]).names("buffer")
    assert buffers
    assert all(name.startswith("decoder.layers.1.") for name in buffers)
    assert [line[0] for line in curve(tmp_path)] == list(range(1, STEPS + 1))


def test_falling_back_needs_fp8(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="takes layers out of FP8, which is off"):
        train(corpus, tmp_path, "--stability.on_non_finite=fallback")
