"""The cases: what the configuration accepts of the product of all axes, and a few of them that cover all pairs."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from gptoughts.config.pipeline import microbatch_problems
from gptoughts.config.resolve import Experiment
from gptoughts.config.validate import resolve_batch, validate
from gptoughts.models.registry import FAMILIES as REGISTRY
from tests.harness import Layout, toy_experiment

MAX_RANKS = 4
FAMILIES = tuple(REGISTRY)
AXES: dict[str, Sequence[Any]] = {
    "tensor": (1, 2),
    "sequence": (False, True),
    "pipeline": (1, 2, 4),
    "virtual": (1, 2),
    "context": (1, 2),
    "expert": (1, 2),
    "data": (1, 2, 4),
    "zero": (0, 1, 2, 3),
    "accumulation": (1, 4),
}
"""Fields of :class:`tests.harness.Layout`."""
RECOMPUTE = ("none", "full", "selective")
"""What backward makes again. No axis of the product, as it changes no bit (tests/models/recompute_test.py), but one of
the settings of which all pairs are covered."""
SAMPLES_PER_STEP = 16
SEQUENCE = 32
LIMIT = 40
"""Layouts that `make test` may run."""
SEED = 1
"""Of the choice between cases that cover equally many new pairs."""

_SMALL = {
    "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 16, "num_moe_experts": 4, "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32,
}  # fmt: skip
"""So small that what a layout does takes the time, rather than arithmetic."""


@cache
def shape_flags(family: str) -> tuple[str, ...]:
    """What makes a family's debug preset small: those of :data:`_SMALL` that its shape has."""
    model = REGISTRY[family].presets["debug"].model
    return (f"--block_size={SEQUENCE}", *(f"--model.{n}={v}" for n, v in _SMALL.items() if getattr(model, n, None)))


@cache
def recompute_flags(family: str, recompute: str) -> tuple[str, ...]:
    """Selective: all that this family's layers can make again in parts."""
    if recompute == "none":
        return ()
    flags = (f"--parallel.recompute_granularity={recompute}",)
    if recompute == "full":
        return flags
    model = REGISTRY[family].presets["debug"].model
    names = [name for name in model.recompute_modules() if name != "shared_experts"]  # a part of moe
    return (*flags, f"--parallel.recompute_modules={','.join(names)}")


@dataclass(frozen=True)
class Case:
    """One layout of one family's toy model."""

    family: str
    layout: Layout
    recompute: str = "none"

    def __str__(self) -> str:
        name = f"{self.family}-{self.layout}"
        return name if self.recompute == "none" else f"{name}-{self.recompute}"

    @property
    def one_rank(self) -> Case:
        """What it is compared with."""
        return make_case(self.family, {name: values[0] for name, values in AXES.items()}, layers=self.layout.layers)

    def settings(self) -> dict[str, Any]:
        """Axis -> value, family and recompute among them."""
        axes = {name: getattr(self.layout, name) for name in AXES}
        return {"family": self.family, **axes, "recompute": self.recompute}

    def recomputed(self, recompute: str) -> Case:
        """The same layout, another of :data:`RECOMPUTE`."""
        assert self.recompute == "none"
        extra = (*self.layout.extra, *recompute_flags(self.family, recompute))
        return replace(self, layout=replace(self.layout, extra=extra), recompute=recompute)

    def refusal(self) -> list[str]:
        """What the configuration says against it; nothing where it can be run."""
        # A JSON that holds a stage and nothing else adds no reason.
        return _refusal(self.family, replace(self.layout, zero=0))


def make_case(family: str, values: dict[str, Any], *, layers: int | None = None) -> Case:
    """The case of these values of all axes; layers unset: one or more per chunk, and experts on every stage."""
    if layers is None:
        chunks = values["pipeline"] * values["virtual"]
        # The lowest layer is dense: a stage of its own would have no experts to divide.
        layers = max(2, chunks * (2 if values["pipeline"] > 1 and values["expert"] > 1 else 1))
    layout = Layout(**values, layers=layers)
    accumulated = f"--train.gradient_accumulation_steps={layout.accumulation}"
    batch = (f"--train.global_batch_size={SAMPLES_PER_STEP}", f"--batch_size={_batch_size(layout)}", accumulated)
    return Case(family, replace(layout, extra=(*shape_flags(family), *batch)))


def _batch_size(layout: Layout) -> int:
    return SAMPLES_PER_STEP // (layout.data * layout.accumulation)


@cache
def _base(family: str) -> Experiment:
    case = make_case(family, {name: values[0] for name, values in AXES.items()})
    with tempfile.TemporaryDirectory() as folder:
        return toy_experiment(family, case.layout, Path(folder))


@cache
def _refusal(family: str, layout: Layout) -> list[str]:
    base = _base(family)
    parallel = replace(
        base.config.parallel,
        **{name: getattr(layout, name) for name in ("tensor", "sequence", "pipeline", "context", "expert")},
        virtual_pipeline=layout.virtual,
    )
    train = replace(base.config.train, gradient_accumulation_steps=layout.accumulation)
    model = replace(base.config.model, num_layers=layout.layers)
    config = replace(base.config, model=model, parallel=parallel, train=train, batch_size=_batch_size(layout))
    found, data = validate(config, base.sources, world_size=layout.world_size)
    config, num_microbatches, problems = resolve_batch(config, dict(base.sources), data)
    return found + (problems or microbatch_problems(config, base.sources, num_microbatches))


@cache
def every_case() -> tuple[Case, ...]:
    """All combinations on at most :data:`MAX_RANKS` ranks, whether or not they can be run."""
    return tuple(_products())


def _products() -> Iterator[Case]:
    for family in FAMILIES:
        for values in itertools.product(*AXES.values()):
            case = make_case(family, dict(zip(AXES, values, strict=True)))
            if case.layout.world_size <= MAX_RANKS:
                yield case


@cache
def feasible_cases() -> tuple[Case, ...]:
    """What the configuration accepts."""
    return tuple(case for case in every_case() if not case.refusal())


@cache
def covering_cases() -> tuple[Case, ...]:
    """At most :data:`LIMIT`, with every pair of settings that the configuration accepts, recompute among them."""
    return tuple(covering([case.recomputed(r) for case in feasible_cases() for r in RECOMPUTE], LIMIT))


@cache
def all_cases() -> tuple[Case, ...]:
    """All layouts that the configuration accepts, and the covering ones with recompute."""
    return (*feasible_cases(), *(case for case in covering_cases() if case.recompute != RECOMPUTE[0]))


Pair = tuple[tuple[str, Any], tuple[str, Any]]
"""Two axes with a value each."""


def pairs_of(case: Case) -> frozenset[Pair]:
    """All pairs of values that a case tries together."""
    return frozenset(itertools.combinations(sorted(case.settings().items(), key=lambda item: item[0]), 2))


def covering(cases: Sequence[Case], limit: int) -> list[Case]:
    """At most ``limit`` cases that have together as many pairs of values as a greedy choice can reach.

    Each next case is one with most pairs that no former one has, of these one with the fewest ranks and layers; what is
    left is chance from a fixed seed. The result is in the order of ``cases``.
    """
    numbers: dict[Pair, int] = {}
    left: list[tuple[Case, int]] = []
    for case in cases:
        bits = 0
        for pair in pairs_of(case):
            bits |= 1 << numbers.setdefault(pair, len(numbers))
        left.append((case, bits))
    random.Random(SEED).shuffle(left)
    left.sort(key=lambda entry: (entry[0].layout.world_size, entry[0].layout.layers))
    missing = (1 << len(numbers)) - 1
    chosen = []
    while missing and len(chosen) < limit:
        case, bits = max(left, key=lambda entry: (entry[1] & missing).bit_count())
        chosen.append(case)
        missing &= ~bits
    return sorted(chosen, key=cases.index)
