"""Reads a run's folder and says where it went wrong, why, and what to change (``launchers/optimize_nan.sh``)."""

from __future__ import annotations

import argparse
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gptoughts.checkpoint import layout
from gptoughts.config.experiment import StabilityConfig
from gptoughts.errors import DataError, run_main
from gptoughts.training.emergency import Verified, plan, run_command, verify
from gptoughts.training.events import Event, describe, read_events
from gptoughts.training.metrics import METRICS_FILE, read_metrics
from gptoughts.training.stability import LOSS_FLOOR, robust_zscore

_SHOWN_EVENTS = 12
_STABLE_CLIP, _STABLE_BETA2 = 1.0, 0.95


@dataclass(frozen=True)
class Trouble:
    """A stretch of logged steps with something wrong."""

    first: int
    last: int
    kind: str
    """What was wrong in its first step."""


def find_trouble(lines: Sequence[Mapping[str, Any]]) -> list[Trouble]:
    """Stretches of metrics.jsonl in which losses are not finite, updates were skipped, or losses spiked."""
    limits = StabilityConfig()
    found: list[Trouble] = []
    history: list[float] = []
    is_troubled = False
    for line in lines:
        loss, norm = float(line["loss"]), float(line.get("grad_norm", 0.0))
        kind = None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kind = "non-finite loss or gradient norm"
        elif len(history) >= limits.min_window_steps and robust_zscore(loss, history, LOSS_FLOOR) > limits.loss_zscore:
            kind = "loss spike"
        elif not line.get("applied", True):
            kind = "update not applied"
        if kind is None:
            history = [*history, loss][-limits.window_steps :]
        elif is_troubled:
            found[-1] = Trouble(found[-1].first, line["step"], found[-1].kind)
        else:
            found.append(Trouble(line["step"], line["step"], kind))
        is_troubled = kind is not None
    return found


@dataclass(frozen=True)
class Diagnosis:
    """What a run's folder tells."""

    run: Path
    config: Mapping[str, Any]
    lines: list[dict[str, Any]]
    events: list[Event]
    trouble: list[Trouble]
    checkpoints: list[Verified]


def diagnose(run: Path) -> Diagnosis:
    """Read everything that a run wrote.

    Raises:
        DataError: no run is there, or its files are damaged.
    """
    if not (run / layout.CONFIG).is_file():
        raise DataError(f"{run}: is no run's folder ({layout.CONFIG} expected); give what --output_dir was")
    lines = read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).is_file() else []
    return Diagnosis(
        run,
        yaml.safe_load((run / layout.CONFIG).read_text(encoding="utf-8")),
        lines,
        read_events(run),
        find_trouble(lines),
        [verify(folder) for folder in layout.list_checkpoints(run)],
    )


def report(found: Diagnosis) -> list[str]:
    """Where it went wrong: events, stretches of trouble, layers, samples, checkpoints."""
    out = [f"run {found.run}: {found.lines[-1]['step'] if found.lines else 0} steps logged"]
    if found.events:
        counts = Counter((event["trigger"], event["action"]) for event in found.events)
        kinds = ", ".join(f"{number} x {trigger} -> {action}" for (trigger, action), number in counts.most_common())
        out.append(f"the guard stepped in {len(found.events)} time(s): {kinds}")
        out += [f"  {describe(event)}" for event in found.events[-_SHOWN_EVENTS:]]
    for one in found.trouble:
        until = f" to {one.last}" if one.last > one.first else ""
        out.append(f"metrics: step {one.first}{until}: {one.kind}")
    places = Counter(where for event in found.events if (where := _place(event)))
    if places:
        out.append("first seen in: " + ", ".join(f"{where} ({number} x)" for where, number in places.most_common()))
    repeated = [str(sample) for sample, number in suspects(found.events).most_common() if number > 1]
    if repeated:
        out.append(f"samples that were at fault more than once: {', '.join(repeated)}")
    out += [f"checkpoint {one.folder}: {one.problem or 'good'}" for one in found.checkpoints]
    if not found.events and not found.trouble:
        out.append("nothing went wrong that loss, gradient norm or the guard would show")
    return out


def _place(event: Mapping[str, Any]) -> str | None:
    origin = event.get("origin") or {}
    return origin.get("module") or origin.get("parameter")


def suspects(events: Sequence[Mapping[str, Any]]) -> Counter[int]:
    """How often each sample held the first non-finite value."""
    return Counter(sample for event in events for sample in (event.get("origin") or {}).get("samples", []))


def advice(found: Diagnosis) -> list[str]:
    """What to change, most telling first; each with its reason."""
    config, events = found.config, found.events
    triggers = Counter(event["trigger"] for event in events)
    phases = Counter((event.get("origin") or {}).get("phase") for event in events)
    ranks = {origin["rank"] for event in events if "rank" in (origin := event.get("origin") or {})}
    spikes = triggers["loss_spike"] + triggers["grad_spike"] + sum(one.kind == "loss spike" for one in found.trouble)
    out = []
    if phases["state"]:
        out.append("weights were broken between two steps: no data does that. Test the memory of the machines")
    if phases["none"]:
        out.append("something did not happen again in a replay: suspect a machine (memory, GPU) before the data")
    if len(ranks) == 1 and len(events) > 2 and (found.config.get("parallel") or {}).get("pipeline", 1) == 1:
        out.append(f"every non-finite value began on rank {next(iter(ranks))}: look at that machine")
    samples = [str(sample) for sample, _ in suspects(events).most_common(8)]
    if samples:
        out.append(f"look at samples {', '.join(samples)}; --stability.on_non_finite rollback leaves such samples out")
    if config.get("use_fp8"):
        out.append("train without FP8 until losses are calm (--use_fp8 false), then switch it on again")
    if triggers["overflow"] or (config.get("train") or {}).get("precision") == "fp16":
        out.append("fp16 overflows where bf16 does not: --train.precision bf16 where the device has it")
    clip = float(config.get("grad_clip") or 0.0)
    if (spikes or triggers["non_finite"]) and not 0 < clip <= _STABLE_CLIP:
        out.append(f"clip gradients: --grad_clip {_STABLE_CLIP} (now {clip:g}{', off' if clip == 0 else ''})")
    optim = config.get("optim") or {}
    if spikes and float(optim.get("beta2", 0.0)) > _STABLE_BETA2:
        out.append(f"--optim.beta2 {_STABLE_BETA2} (now {optim['beta2']}): the second moment follows spikes faster")
    first = min([event["step"] for event in events] + [one.first for one in found.trouble], default=None)
    warmup = int(optim.get("warmup_steps") or 0)
    if spikes and first is not None and first <= 2 * warmup:
        out.append(f"it began in or soon after the warmup: --optim.warmup_steps {2 * warmup} (now {warmup})")
    if any(event["action"] in ("cut_lr", "stop") for event in events) or (spikes > 1 and optim.get("lr")):
        out.append(f"lower the learning rate: --optim.lr {float(optim['lr']) / 3:.2g} (now {float(optim['lr']):.2g})")
    if not (config.get("stability") or {}).get("enabled", False):
        out.append("switch the guard on: --stability.enabled true")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """``launchers/optimize_nan.sh``."""
    parser = argparse.ArgumentParser(
        prog="optimize_nan.sh",
        description="Say where a run went wrong (steps, samples, layer), what to change, and how to go on.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder (its --output_dir)")
    parser.add_argument("--run", action="store_true", dest="is_run", help="go on at once, with the command it prints")
    arguments = parser.parse_args(argv)
    found = diagnose(arguments.run)
    for line in report(found):
        print(line)
    changes = advice(found)
    for number, line in enumerate(changes, start=1):
        print(f"{'change' if number == 1 else '      '} {number}. {line}")
    if not any(one.problem is None for one in found.checkpoints):
        print("no good checkpoint to go on from: start anew, with these changes and another --output_dir")
        return 1 if arguments.is_run else 0
    emergency = plan(arguments.run)
    print(f"to go on: {shlex.join(emergency.command)}")
    return run_command(emergency) if arguments.is_run else 0


if __name__ == "__main__":
    run_main(main)
