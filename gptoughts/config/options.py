"""The configuration tree as a flat list of options and as a jsonargparse parser with their types, defaults and help."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser

from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.model import ModelConfig

LARGEST = 1e18
"""No count, size or rate is as large; beyond it integers no longer fit their C types."""


class PresetLike(Protocol):
    """What the configuration needs to know of ``models.family.Preset``."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def source(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def batch_size(self) -> int: ...


class FamilyLike(Protocol):
    """What the configuration needs to know of ``models.family.Family`` (a row above, so not imported)."""

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def config_class(self) -> type[ModelConfig]: ...
    @property
    def presets(self) -> Mapping[str, PresetLike]: ...
    @property
    def chosen_by(self) -> str: ...
    @property
    def variants(self) -> Sequence[FamilyLike]: ...
    def variant(self, stated: Mapping[str, str]) -> FamilyLike: ...


@dataclass(frozen=True)
class Option:
    """One leaf of the tree."""

    name: str
    """Dotted name, as on the command line."""
    type: Any
    default: Any
    help: str

    @property
    def is_list(self) -> bool:
        """Whether the option takes several values."""
        return get_origin(self.type) is list

    @property
    def expected(self) -> str:
        """The type in words, for messages."""
        choices = [c for t in (self.type, *get_args(self.type)) if get_origin(t) is Literal for c in get_args(t)]
        if choices:
            return "one of " + ", ".join(map(str, choices))
        names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
        if self.is_list:
            return "a list of texts"
        return " or ".join(names.get(t, str(t)) for t in get_args(self.type) or (self.type,))


def tree_options(model_class: type[ModelConfig]) -> dict[str, Option]:
    """All leaves of the tree, dotted name -> option, with ``model_class`` as its model."""
    found = _leaves(ExperimentConfig, "", {"model": model_class})
    return {option.name: option for option in found}


def foreign_options(family: FamilyLike, chosen: FamilyLike) -> dict[str, str]:
    """Options that other variants of ``family`` have and ``chosen`` has not: dotted name -> flags that choose one."""
    if not family.variants:
        return {}
    own = tree_options(chosen.config_class)
    found: dict[str, str] = {}
    for one in (family, *family.variants):
        for name in tree_options(one.config_class):
            if name not in own:
                found.setdefault(name, one.chosen_by)
    return found


def _leaves(config_class: type, prefix: str, replaced: Mapping[str, type]) -> list[Option]:
    found: list[Option] = []
    hints, texts = get_type_hints(config_class), _attribute_docstrings(config_class)
    for field in dataclasses.fields(config_class):
        kind = replaced.get(field.name, hints[field.name])
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            found += _leaves(kind, f"{prefix}{field.name}.", {})
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        found.append(Option(prefix + field.name, kind, default, texts[field.name]))
    return found


def _attribute_docstrings(config_class: type) -> dict[str, str]:
    """The literal under each field, base classes first."""
    texts: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            parsed = docstring_parser.parse_from_object(base)
            texts |= {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}
    return texts


def build_parser(
    options: Mapping[str, Option], defaults: Mapping[str, Any], families: Iterable[FamilyLike]
) -> ArgumentParser:
    """The parser that checks single values and prints ``--help``.

    Args:
        options: The tree's leaves.
        defaults: Dotted name -> value that replaces the leaf's own default (the preset's).
        families: What ``--model_type`` can name.
    """
    parser = ArgumentParser(
        usage="%(prog)s [--model_type FAMILY] [--size SIZE] [--data PREFIX ...] [--config FILE.yaml] [options]",
        description=(
            "Pretrain a language model. A value is taken from its default, then from the preset of --model_type and "
            "--size, then from --config, then from flags; docs/config.md has the whole story."
        ),
        exit_on_error=False,
        add_help=False,
    )
    program = parser.add_argument_group("Program")
    program.add_argument("--help", "-h", action="help", help="Show this text and leave; defaults are the preset's.")
    program.add_argument("--config", metavar="FILE.yaml", help="YAML file with options below, nested by their dots.")
    program.add_argument("--dry_run", action="store_true", help="Print the resolved run and what it costs, then leave.")
    program.add_argument("--local_rank", metavar="N", help="Given by DeepSpeed's launcher; LOCAL_RANK decides.")
    texts = {
        "model_type": "; ".join(f"{f.name} ({f.summary})" for f in families) + ".",
        "size": "Preset of the family: " + ", ".join(dict.fromkeys(s for f in families for s in f.presets)) + ".",
    }
    groups = {"": parser.add_argument_group("Everyday options")}
    for option in options.values():
        section = option.name.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(f"--{section}.*")
        groups[section].add_argument(
            f"--{option.name}",
            type=option.type,
            default=defaults.get(option.name, option.default),
            help=texts.get(option.name, option.help),
            metavar=_metavar(option),
        )
    return parser


def _metavar(option: Option) -> str:
    choices = [c for t in (option.type, *get_args(option.type)) if get_origin(t) is Literal for c in get_args(t)]
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    if bool in (option.type, *get_args(option.type)):
        return "{true,false}"
    return "PREFIX" if option.is_list else option.name.rpartition(".")[2].upper()


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was probably meant to be, or None."""
    candidates = list(known)
    ends = [c for c in candidates if c.rpartition(".")[2] == name.rpartition(".")[2]]
    if len(ends) == 1:
        return ends[0]
    close = difflib.get_close_matches(name.replace("-", "_"), candidates, n=1, cutoff=0.6)
    if close:
        return close[0]
    by_end = {c.rpartition(".")[2]: c for c in candidates}
    close = difflib.get_close_matches(name.replace("-", "_"), by_end, n=1, cutoff=0.7)
    return by_end[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "'", suffix: str = "'") -> str:
    """``; did you mean 'x'?``, or nothing where no known name is near."""
    guess = nearest(name, known)
    return f"; did you mean {prefix}{guess}{suffix}?" if guess else ""
