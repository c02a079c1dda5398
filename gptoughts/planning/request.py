"""What ``tools/plan.py`` is asked: its own options, and a run described by the launcher's flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptoughts.config.cli import read_request
from gptoughts.config.deepspeed_json import DeepSpeedJson, read_json
from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.resolve import Inspection, settle
from gptoughts.errors import ConfigError, DataError
from gptoughts.models.registry import FAMILIES
from gptoughts.planning.communication import Links
from gptoughts.planning.hardware import ACCELERATORS
from gptoughts.planning.search import PLANNED, Run, divisors
from gptoughts.planning.throughput import Machine

GIB = 2**30
_DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
_STAGES = ("zero1.json", "zero2.json", "zero3.json")
OFFLOAD = "zero3_offload.json"
_RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Options:
    """The planner's own options."""

    world_size: int
    ranks_per_node: int
    memory_gib: float
    usable_fraction: float
    machine: Machine
    top: int
    wants_json: bool
    wants_validation: bool
    flags: tuple[str, ...]
    """The launcher's, as given."""

    @property
    def limit_bytes(self) -> float:
        """Most that a rank may need."""
        return self.memory_gib * GIB * self.usable_fraction


def parser() -> argparse.ArgumentParser:
    """The command line; whatever it does not know describes the run."""
    found = argparse.ArgumentParser(
        description="Print layouts of a run that fit a number of GPUs, the fastest first, with predicted memory per "
        "rank, communication and tokens per second. All other flags are the launcher's (launchers/pretrain.py --help) "
        "and describe the run; an axis that they state (--parallel.tensor 4, --batch_size 2, --deepspeed_config FILE) "
        "stays as stated. docs/parallelism.md has the formulas.",
        usage="%(prog)s --gpus N (--gpu NAME | --gpu_memory_gib GIB) [options] [--model_type FAMILY --size SIZE ...]",
        allow_abbrev=False,
    )
    add = found.add_argument
    add("--gpus", type=int, required=True, metavar="N", help="ranks, one per GPU")
    add("--gpu", choices=sorted(ACCELERATORS), help="fills in memory, peak and links (data sheets)")
    add("--gpu_memory_gib", type=float, metavar="GIB", help="memory of one GPU; the rest is h100's then")
    add("--gpus_per_node", type=int, metavar="N", help="GPUs that share fast links (default: up to 8)")
    add("--peak_tflops", type=float, metavar="T", help="dense bf16 matrix products of one GPU")
    add("--intra_node_gb_per_second", type=float, metavar="GB", help="within a node, per GPU and direction")
    add("--inter_node_gb_per_second", type=float, metavar="GB", help="between nodes, per GPU and direction")
    add("--efficiency_fraction", type=float, default=0.5, help="part of the peak that is reached (default: 0.5)")
    add("--usable_fraction", type=float, default=0.9, help="part of the memory that tensors may take (default: 0.9)")
    add("--top", type=int, default=10, metavar="N", help="layouts to print (default: 10; 0: all that fit)")
    add("--validate", action="store_true", help="build ranks of the first layout without memory and count parameters")
    add("--json", action="store_true", help="print JSON")
    return found


_POSITIVE = (
    "gpus", "gpu_memory_gib", "gpus_per_node", "peak_tflops", "intra_node_gb_per_second", "inter_node_gb_per_second",
)  # fmt: skip
_FRACTIONS = ("efficiency_fraction", "usable_fraction")


def read_options(argv: Sequence[str]) -> Options:
    """The planner's options out of a command line.

    Raises:
        ConfigError: values out of range, or no memory size.
    """
    given, flags = parser().parse_known_args(argv)
    problems = [
        f"{name}={getattr(given, name)} (command line): must be greater than 0 and finite"
        for name in _POSITIVE
        if getattr(given, name) is not None and not 0 < getattr(given, name) < float("inf")
    ]
    for name in _FRACTIONS:
        if not 0 < getattr(given, name) <= 1:
            problems.append(f"{name}={getattr(given, name)} (command line): a fraction above 0, at most 1")
    if given.top < 0:
        problems.append(f"top={given.top} (command line): must be 0 or more")
    if given.gpu is None and given.gpu_memory_gib is None:
        names = ", ".join(sorted(ACCELERATORS))
        problems.append(f"gpu_memory_gib (command line): is needed, or --gpu with one of {names}")
    if problems:
        raise ConfigError(problems)
    preset = ACCELERATORS[given.gpu or "h100"]
    ranks_per_node = min(given.gpus_per_node or max(divisors(given.gpus, _RANKS_PER_NODE)), given.gpus)
    if given.gpus % ranks_per_node:
        raise ConfigError(f"gpus={given.gpus} (command line): not a multiple of gpus_per_node={ranks_per_node}")
    links = Links(
        (given.intra_node_gb_per_second or preset.intra_node_gb_per_second) * 1e9,
        (given.inter_node_gb_per_second or preset.inter_node_gb_per_second) * 1e9,
        ranks_per_node,
    )
    peak = (given.peak_tflops or preset.peak_tflops) * 1e12
    return Options(
        world_size=given.gpus,
        ranks_per_node=ranks_per_node,
        memory_gib=given.gpu_memory_gib or preset.memory_gib,
        usable_fraction=given.usable_fraction,
        machine=Machine(peak * given.efficiency_fraction, links),
        top=given.top,
        wants_json=given.json,
        wants_validation=given.validate,
        flags=tuple(flags),
    )


def read_run(options: Options) -> Run:
    """The run that the launcher's flags describe, without a layout.

    Raises:
        ConfigError: whatever the launcher would refuse in any layout.
    """
    problems: list[str] = []
    request = read_request(options.flags, FAMILIES, problems)
    if request.dry_run:
        problems.append("dry_run (command line): the planner starts nothing; leave the flag out")
    config, sources = settle(request.layers, request.family.config_class, problems=problems, inspect=_inspect)
    if config.init_from is not None:
        problems.append(f"init_from={config.init_from} ({sources['init_from']}): name the shape instead")
    problems += [f"model.{line}" for line in config.model.problems()]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    if config.train.global_batch_size is None:
        accumulation = config.train.gradient_accumulation_steps or 1
        samples = (config.batch_size or 1) * options.world_size * accumulation
        config = replace(config, train=replace(config.train, global_batch_size=samples))
        sources["train.global_batch_size"] = PLANNED
    jsons = [request.layers.json] if config.deepspeed_config is not None else shipped_jsons()
    return Run(FAMILIES[config.model_type], config, sources, jsons, options.world_size)


def shipped_jsons() -> list[DeepSpeedJson]:
    """One file per ZeRO stage; stage 0 needs none."""
    return [DeepSpeedJson({}, ""), *(shipped_json(name) for name in _STAGES)]


def shipped_json(name: str) -> DeepSpeedJson:
    """One of ds_configs/, labelled as one would write it from here.

    Raises:
        ConfigError: it is not there.
    """
    path = _DS_CONFIGS / name
    label = f"ds_configs/{name}" if Path("ds_configs").resolve() == _DS_CONFIGS else str(path)
    problems: list[str] = []
    found = read_json(str(path), problems)
    if problems:
        raise ConfigError([*problems, "deepspeed_config: name a file of your own"])
    return DeepSpeedJson(found.values, label)


def _inspect(config: ExperimentConfig) -> Inspection:
    """The corpus decides on the vocabulary, as it does when the run starts."""
    if not config.data.train:
        return Inspection(None, [])
    from gptoughts.data.corpus import inspect_corpus

    try:
        corpus = inspect_corpus(config.data, seq_length=config.block_size or config.model.seq_length)
    except DataError as error:
        return Inspection(None, error.problems)
    return Inspection(corpus.vocab_size, [])
