"""Joins defaults, preset, DeepSpeed's JSON, YAML and flags into one resolved run, and names every contradiction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gptoughts.config.deepspeed_json import DeepSpeedJson, expert_parallel_problems, for_deepspeed
from gptoughts.config.deepspeed_values import JsonValue
from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.fp8 import filled_fp8, fp8_problems
from gptoughts.config.model import ModelConfig
from gptoughts.config.options import Option, PresetLike
from gptoughts.config.pipeline import microbatch_problems
from gptoughts.config.settings import Setting
from gptoughts.config.validate import resolve_batch, validate

WARMUP_FRACTION, MIN_WARMUP_STEPS, MAX_WARMUP_STEPS = 0.02, 10, 2000


def default_warmup_steps(steps: int) -> int:
    """Warmup of a run of ``steps`` updates where none is asked for; never longer than the run."""
    return min(steps, max(MIN_WARMUP_STEPS, min(MAX_WARMUP_STEPS, round(WARMUP_FRACTION * steps))))


@dataclass(frozen=True)
class Inspection:
    """What a look at the disk adds: corpus, tokenizer, output folder."""

    vocab_size: int | None
    """Entries of the corpus's tokenizer; None where there is none."""
    problems: list[str]
    special_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Special tokens of the corpus's tokenizer: role -> id."""


@dataclass(frozen=True)
class Experiment:
    """One resolved run."""

    config: ExperimentConfig
    """The tree, filled in; ``train.gradient_accumulation_steps`` stays unset where it follows from the batch sizes."""
    deepspeed: dict[str, Any]
    """Ready for ``deepspeed.initialize``."""
    zero_stage: int
    num_microbatches: int
    """Microbatches per step and rank."""
    data_parallel_size: int
    sources: Mapping[str, str]
    """Dotted name -> where its value comes from."""
    dry_run: bool

    @property
    def samples_per_step(self) -> int:
        """Samples per step over all ranks."""
        return (self.config.batch_size or 0) * self.num_microbatches * self.data_parallel_size


def preset_values(preset: PresetLike) -> dict[str, Any]:
    """Dotted name -> what a preset says of it."""
    values = {f"model.{f.name}": getattr(preset.model, f.name) for f in dataclasses.fields(preset.model)}
    return values | {"optim.lr": preset.lr, "batch_size": preset.batch_size}


def contradictions(explicit: Mapping[str, Setting], json_values: Mapping[str, JsonValue], label: str) -> list[str]:
    """A line for each flag or YAML value that differs from a concrete value in the JSON."""
    problems = []
    for name, setting in explicit.items():
        held = json_values.get(name)
        if held is not None and setting.value is not None and setting.value != held.value:
            advice = 'set one to "auto"' if held.key != "scheduler.type" else "remove one"
            problems.append(
                f"{name}={_shown(setting.value)} ({setting.source}) contradicts {held.key}={_shown(held.written)} in "
                f"{label}; {advice}"
            )
    return problems


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Origin:
    """The model that ``--init_from`` names."""

    path: str
    model_type: str
    model: ModelConfig
    adopted: Mapping[str, Any] | None = None
    """Fields of this run's shape where that is of another family."""

    def values(self) -> dict[str, Any]:
        """Dotted name -> value of its shape; the length of sequences is this run's own."""
        fields = self.adopted or {f.name: getattr(self.model, f.name) for f in dataclasses.fields(self.model)}
        return {f"model.{name}": value for name, value in fields.items() if name != "seq_length"}


@dataclass(frozen=True)
class Layers:
    """Everything that the tree is joined from, weakest first: default, preset, init_from, JSON, explicit."""

    options: Mapping[str, Option]
    preset_name: str
    preset: PresetLike
    json: DeepSpeedJson
    json_values: Mapping[str, JsonValue]
    explicit: Mapping[str, Setting]
    origin: Origin | None = None

    def join(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Dotted name -> value, and dotted name -> source."""
        values = {name: option.default for name, option in self.options.items()}
        sources = dict.fromkeys(values, "default")
        for name, value in preset_values(self.preset).items():
            values[name], sources[name] = value, f"preset {self.preset_name}"
        if self.origin is not None:
            for name, value in self.origin.values().items():
                values[name], sources[name] = value, f"init_from {self.origin.path}"
            if self.origin.adopted is None:
                values["model_type"], sources["model_type"] = self.origin.model_type, f"init_from {self.origin.path}"
        for name, held in self.json_values.items():
            values[name], sources[name] = held.value, self.json.label
        for name, setting in self.explicit.items():
            if setting.value is None and name in self.json_values:
                continue  # an explicit null leaves the choice to the JSON
            values[name], sources[name] = setting.value, setting.source
        return values, sources


def build_tree(values: Mapping[str, Any], model_class: type[ModelConfig]) -> ExperimentConfig:
    """The typed tree from dotted names and values."""

    def build(config_class: type, prefix: str) -> Any:
        hints = {f.name: f for f in dataclasses.fields(config_class)}
        arguments = {n: values[prefix + n] for n in hints if prefix + n in values}
        return config_class(**arguments)

    sections = {}
    for field in dataclasses.fields(ExperimentConfig):
        kind = model_class if field.name == "model" else field.default_factory
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            sections[field.name] = build(kind, f"{field.name}.")
    top = {f.name: values[f.name] for f in dataclasses.fields(ExperimentConfig) if f.name in values}
    return ExperimentConfig(**top, **sections)


def settle(
    layers: Layers,
    model_class: type[ModelConfig],
    *,
    problems: list[str],
    inspect: Callable[[ExperimentConfig], Inspection] | None,
) -> tuple[ExperimentConfig, dict[str, str]]:
    """The tree before anybody asks how many ranks there are, and dotted name -> source; ``problems`` grows."""
    problems += contradictions(layers.explicit, layers.json_values, layers.json.label)
    values, sources = layers.join()
    _settle_length(values, sources, problems)
    config = _fill(build_tree(values, model_class), sources)
    if inspect is not None and (config.block_size or 0) >= 1:
        inspection = inspect(config)
        problems += inspection.problems
        config = _settle_vocabulary(config, inspection.vocab_size, sources, problems)
        if inspection.vocab_size is not None:
            config = _settle_special_tokens(config, inspection.special_ids, sources)
    if not config.model.problems():
        config = replace(config, model=config.model.filled())  # some of it follows from the vocabulary
    return config, sources


def resolve(
    layers: Layers,
    model_class: type[ModelConfig],
    *,
    world_size: int,
    dry_run: bool,
    problems: list[str],
    inspect: Callable[[ExperimentConfig], Inspection] | None,
) -> Experiment | None:
    """The resolved run, or None where ``problems`` (given and new ones) forbid it."""
    config, sources = settle(layers, model_class, problems=problems, inspect=inspect)
    found, data_parallel_size = validate(config, sources, world_size=world_size)
    problems += found + expert_parallel_problems(layers.json, config)
    problems += fp8_problems(config, layers.explicit)
    config, num_microbatches, found = resolve_batch(config, sources, data_parallel_size)
    problems += found or microbatch_problems(config, sources, num_microbatches)
    if problems:
        return None
    return Experiment(
        config=config,
        deepspeed=for_deepspeed(layers.json, config, data_parallel_size),
        zero_stage=layers.json.zero_stage,
        num_microbatches=num_microbatches,
        data_parallel_size=data_parallel_size,
        sources=sources,
        dry_run=dry_run,
    )


def _settle_length(values: dict[str, Any], sources: dict[str, str], problems: list[str]) -> None:
    """One length: ``block_size`` and ``model.seq_length`` are equal afterwards."""
    block, length = values["block_size"], values["model.seq_length"]
    is_stated = not sources["model.seq_length"].startswith(("preset", "default"))
    if block is None:
        values["block_size"], sources["block_size"] = length, sources["model.seq_length"]
    elif is_stated and block != length:
        problems.append(
            f"block_size={block} ({sources['block_size']}) contradicts model.seq_length={length} "
            f"({sources['model.seq_length']}); give one of them"
        )
    else:
        values["model.seq_length"], sources["model.seq_length"] = block, sources["block_size"]


def _fill(config: ExperimentConfig, sources: dict[str, str]) -> ExperimentConfig:
    """Fill in what has a default that follows from other values."""
    warmup = default_warmup_steps(config.train.steps)
    train, optim = config.train, config.optim
    if train.precision is None:
        train = replace(train, precision="bf16")
    if optim.warmup_steps is None:
        optim, sources["optim.warmup_steps"] = replace(optim, warmup_steps=warmup), "from train.steps"
    return replace(
        config,
        train=train,
        optim=optim,
        grad_clip=1.0 if config.grad_clip is None else config.grad_clip,
        use_fp8=bool(config.use_fp8),
        fp8=filled_fp8(config),
    )


def _settle_special_tokens(
    config: ExperimentConfig, special_ids: Mapping[str, int], sources: dict[str, str]
) -> ExperimentConfig:
    """Ids that nobody stated are the tokenizer's; a preset's belong to the tokenizer of that preset."""
    found: dict[str, Any] = {}
    for role, token_id in config.model.token_roles().items():
        name = f"model.{role}_token_id"
        if token_id is None or sources[name].startswith(("preset", "default")):
            found[f"{role}_token_id"], sources[name] = special_ids.get(role), "tokenizer of the corpus"
    return replace(config, model=replace(config.model, **found)) if found else config


def _settle_vocabulary(
    config: ExperimentConfig, vocab_size: int | None, sources: dict[str, str], problems: list[str]
) -> ExperimentConfig:
    if vocab_size is None or vocab_size == config.model.vocab_size:
        return config
    source = sources["model.vocab_size"]
    if source.startswith(("preset", "default")):
        sources["model.vocab_size"] = "tokenizer of the corpus"
        return replace(config, model=replace(config.model, vocab_size=vocab_size))
    if config.model.vocab_size < vocab_size:
        problems.append(
            f"model.vocab_size={config.model.vocab_size} ({source}): the tokenizer of the corpus has {vocab_size} "
            "entries; leave the flag out or give at least as many"
        )
    return config
