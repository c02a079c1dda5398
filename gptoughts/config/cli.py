"""From a command line to a resolved run, with every problem of flags, YAML, JSON and disk in one error."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from gptoughts.config.deepspeed_json import read_json
from gptoughts.config.deepspeed_values import tree_values
from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.model import ModelConfig
from gptoughts.config.options import FamilyLike, build_parser, did_you_mean, foreign_options, tree_options
from gptoughts.config.resolve import Experiment, Inspection, Layers, Origin, build_tree, preset_values, resolve
from gptoughts.config.settings import (
    COMMAND_LINE,
    Arguments,
    Setting,
    check_flags,
    check_leaves,
    parse_yaml,
    read_yaml,
    split_arguments,
)
from gptoughts.errors import ConfigError, GptoughtsError

Inspect = Callable[[ExperimentConfig], Inspection]
ReadOrigin = Callable[[str], tuple[str, ModelConfig]]
"""``--init_from``'s path -> family and shape of the model there."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command line asks for, before it is joined into one tree."""

    layers: Layers
    family: FamilyLike
    """The variant that the stated choices of the model name."""
    dry_run: bool


def load_experiment(
    argv: Sequence[str],
    families: Mapping[str, FamilyLike],
    *,
    world_size: int,
    inspect: Inspect | None = None,
    read_origin: ReadOrigin | None = None,
) -> Experiment:
    """Read the command line (without the program's name) and everything that it names.

    Args:
        argv: Flags; ``--help`` prints and leaves with status 0.
        families: What ``--model_type`` can name.
        world_size: Ranks of the run.
        inspect: Looks at corpus and tokenizer; its problems join the others.
        read_origin: Looks at what ``--init_from`` names; its shape takes the preset's place.
    Raises:
        ConfigError: with every problem that was found.
    """
    problems: list[str] = []
    request = read_request(argv, families, problems, read_origin=read_origin)
    experiment = resolve(
        request.layers, request.family.config_class, world_size=world_size, dry_run=request.dry_run, problems=problems,
        inspect=inspect,
    )  # fmt: skip
    if experiment is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    return experiment


def read_request(
    argv: Sequence[str],
    families: Mapping[str, FamilyLike],
    problems: list[str],
    *,
    read_origin: ReadOrigin | None = None,
) -> Request:
    """Read flags, YAML files and the DeepSpeed JSON; what is wrong with single values goes to ``problems``.

    Raises:
        ConfigError: no such family or preset; without one there is no tree.
    """
    arguments = split_arguments(argv)
    problems += arguments.problems
    yaml_leaves = [(path, read_yaml(path, problems)) for path in arguments.config_files]
    origin = _origin(arguments, yaml_leaves, families, read_origin, problems)
    model_type, size, family = _peek(arguments, yaml_leaves, families, problems, origin)
    preset = family.presets.get(size) if family is not None else None
    foreign = foreign_options(families[model_type], family) if family is not None else {}
    options = tree_options(family.config_class if family is not None else ModelConfig)
    parser = build_parser(options, preset_values(preset) if preset is not None else {}, families.values())
    if arguments.wants_help:
        parser.prog = os.path.basename(sys.argv[0]) or "gptoughts"
        parser.print_help()
        raise SystemExit(0)
    if family is None or preset is None:
        # the model's own options cannot be told without a family
        arguments.flags = {n: w for n, w in arguments.flags.items() if not n.startswith("model.")}
    explicit: dict[str, Setting] = {}
    for path, leaves in yaml_leaves:
        explicit |= check_leaves(leaves, path, options, parser, problems, foreign)
    explicit |= check_flags(arguments.flags, options, parser, problems, foreign)
    named = explicit.get("deepspeed_config")
    json = read_json(named.value if named is not None else None, problems)
    json_values = tree_values(json, problems)
    if family is None or preset is None:
        raise ConfigError(problems)
    layers = Layers(options, f"{model_type}/{size}", preset, json, json_values, explicit, origin)
    return Request(layers, family, arguments.dry_run)


_YamlLeaves = Sequence[tuple[str, Mapping[str, Any]]]


def _stated(name: str, default: str, arguments: Arguments, yaml_leaves: _YamlLeaves) -> Setting:
    """A text that has to be known before the other options are."""
    found = Setting(default, "default")
    for path, leaves in yaml_leaves:
        if leaves.get(name) is not None:
            found = Setting(str(leaves[name]), path)
    word = arguments.peek(name)
    return Setting(word, COMMAND_LINE) if word is not None else found


def _origin(
    arguments: Arguments,
    yaml_leaves: _YamlLeaves,
    families: Mapping[str, FamilyLike],
    read_origin: ReadOrigin | None,
    problems: list[str],
) -> Origin | None:
    path = _stated("init_from", "null", arguments, yaml_leaves)
    if path.value == "null" or read_origin is None or arguments.wants_help:
        return None
    try:
        origin = Origin(path.value, *read_origin(path.value))
    except GptoughtsError as error:
        problems += [f"init_from={path.value} ({path.source}): {line}" for line in error.problems]
        return None
    stated = _stated("model_type", origin.model_type, arguments, yaml_leaves)
    family = families.get(stated.value)
    if family is None or family.name == origin.model_type:
        return origin
    adopted = family.config_class.adopted(origin.model)
    if adopted is None:
        problems.append(
            f"model_type={stated.value} ({stated.source}): init_from={origin.path} is of the family "
            f"{origin.model_type}, from which {stated.value} cannot start; leave the flag out"
        )
        return None
    return dataclasses.replace(origin, adopted=adopted)


def _peek(
    arguments: Arguments,
    yaml_leaves: _YamlLeaves,
    families: Mapping[str, FamilyLike],
    problems: list[str],
    origin: Origin | None,
) -> tuple[str, str, FamilyLike | None]:
    """Model type, size and variant, which decide what the other options are; unknown ones go to ``problems``."""
    default = ExperimentConfig.model_type if origin is None else origin.model_type
    model_type = _stated("model_type", default, arguments, yaml_leaves)
    size = _stated("size", ExperimentConfig.size, arguments, yaml_leaves)
    family = families.get(model_type.value)
    if family is None:
        guess = did_you_mean(model_type.value, families)
        problems.append(
            f"model_type={model_type.value} ({model_type.source}): unknown family; built are: "
            f"{', '.join(families)}{guess}"
        )
        return model_type.value, size.value, None
    shape = {} if origin is None else origin.adopted or vars(origin.model)
    given = {name: str(shape[name]) for name in family.config_class.CHOICES if name in shape}
    stated = {}
    for name in family.config_class.CHOICES:
        setting = _stated(f"model.{name}", given.get(name, ""), arguments, yaml_leaves)
        stated[name] = given.get(name, setting.value)
        if setting.value != stated[name] and origin is not None:
            problems.append(
                f"model.{name}={setting.value} ({setting.source}): init_from={origin.path} has {stated[name]}; "
                "leave it out"
            )
    variant = family.variant({name: value for name, value in stated.items() if value})
    if size.value not in variant.presets:
        guess = did_you_mean(size.value, variant.presets)
        allowed = ", ".join(variant.presets)
        chosen = f" with {variant.chosen_by}" if variant is not family else ""
        problems.append(
            f"size={size.value} ({size.source}): no preset of {family.name}{chosen}; allowed: {allowed}{guess}"
        )
    return model_type.value, size.value, variant


def to_yaml(config: ExperimentConfig) -> str:
    """The tree as YAML; :func:`from_yaml` gives an equal tree back, and ``--config`` takes it."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def from_yaml(text: str, families: Mapping[str, FamilyLike], *, label: str = "config.yaml") -> ExperimentConfig:
    """The tree that :func:`to_yaml` wrote.

    Raises:
        ConfigError: an unknown family or name, a wrong type, or no YAML; ``label`` is named in the message.
    """
    problems: list[str] = []
    leaves = parse_yaml(text, label, problems)
    model_type = leaves.get("model_type", ExperimentConfig.model_type)
    family = families.get(model_type)
    if family is None:
        problems.append(f"{label}: model_type={model_type}: unknown family; built are: {', '.join(families)}")
        raise ConfigError(problems)
    names = family.config_class.CHOICES
    family = family.variant({name: str(leaves[f"model.{name}"]) for name in names if f"model.{name}" in leaves})
    options = tree_options(family.config_class)
    settings = check_leaves(leaves, label, options, build_parser(options, {}, families.values()), problems)
    if problems:
        raise ConfigError(problems)
    return build_tree({name: setting.value for name, setting in settings.items()}, family.config_class)
