"""Reads what a person set explicitly, on the command line and in YAML files, and finds every mistake in it."""

from __future__ import annotations

import json
import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader

from gptoughts.config.options import LARGEST, Option, did_you_mean

COMMAND_LINE = "command line"
_SHORT = {"data": "data.train"}
_PROGRAM_FLAGS = ("help", "config", "dry_run", "local_rank")
_WRONG_VALUE = (ArgumentError, TypeError, ValueError, OverflowError)
"""What jsonargparse raises; its text takes many lines, ours takes one."""
_FOREIGN = "has no meaning in the model that is chosen; it belongs to"
_NONE: Mapping[str, str] = {}
_NUMBER = re.compile(r"-(\d|\.\d)")


@dataclass(frozen=True)
class Setting:
    """A value that somebody wrote down, and where."""

    value: Any
    source: str
    """``command line`` or a file's path."""


@dataclass
class Arguments:
    """The command line, split into flags; nothing is checked against the tree yet."""

    flags: dict[str, list[str]] = field(default_factory=dict)
    """Dotted name -> words; a flag given twice keeps the last."""
    config_files: list[str] = field(default_factory=list)
    wants_help: bool = False
    dry_run: bool = False
    problems: list[str] = field(default_factory=list)

    def peek(self, name: str) -> str | None:
        """The word given for ``name``, if exactly one was."""
        words = self.flags.get(name, [])
        return words[0] if len(words) == 1 else None


def split_arguments(argv: Sequence[str]) -> Arguments:
    """Split ``argv`` (without the program's name) into flags with the words after them."""
    result = Arguments()
    name: str | None = None
    for word in argv:
        if word in ("-h", "--help"):
            result.wants_help, name = True, None
        elif word.startswith("--") and len(word) > 2:
            name, separator, value = word[2:].partition("=")
            name = _SHORT.get(name, name)
            result.flags[name] = [value] if separator else []
            if name == "config" and separator:
                result.config_files.append(value)
            if separator:
                name = None
        elif word.startswith("-") and not _NUMBER.match(word):
            result.problems.append(f"{word} (command line): unknown flag; flags start with two dashes")
            name = None
        elif name is None:
            result.problems.append(f"{word!r} (command line): a value without a flag before it")
        else:
            result.flags[name].append(word)
            if name == "config":
                result.config_files.append(word)
    _take_program_flags(result)
    return result


def _take_program_flags(result: Arguments) -> None:
    words = result.flags.pop("dry_run", None)
    if words is not None:
        result.dry_run = words in ([], ["true"])
        if words not in ([], ["true"], ["false"]):
            result.problems.append(f"dry_run={' '.join(words)} (command line): takes no value")
    if "config" in result.flags and not result.config_files:
        result.problems.append("config (command line): needs the path of a YAML file")
    result.flags.pop("config", None)
    result.flags.pop("local_rank", None)
    result.flags.pop("local-rank", None)


def read_yaml(path: str, problems: list[str]) -> dict[str, Any]:
    """The leaves of a YAML file, dotted name -> value; what is wrong with the file goes to ``problems``."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"config={path} (command line): cannot be read: {getattr(error, 'strerror', None) or error}")
        return {}
    return parse_yaml(text, path, problems)


def parse_yaml(text: str, label: str, problems: list[str]) -> dict[str, Any]:
    """The leaves of YAML ``text``, dotted name -> value."""
    try:
        # jsonargparse's loader, because YAML 1.1 takes 3e-4 for a text
        tree = get_loader("yaml")(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problems.append(f"{label}: no valid YAML{where}: {getattr(error, 'problem', error)}")
        return {}
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        problems.append(f"{label}: expected names and values (name: value), found {type(tree).__name__}")
        return {}
    return _flatten(tree, "")


def _flatten(tree: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def check_flags(
    flags: Mapping[str, list[str]],
    options: Mapping[str, Option],
    parser: ArgumentParser,
    problems: list[str],
    foreign: Mapping[str, str] = _NONE,
) -> dict[str, Setting]:
    """Typed values of all flags; unknown names and values of a wrong type go to ``problems``.

    Args:
        flags: Dotted name -> words.
        options: The tree's leaves.
        parser: Checks types.
        problems: Grows.
        foreign: Names that only another variant of the family has -> what chooses it.
    """
    settings: dict[str, Setting] = {}
    for name, words in flags.items():
        option = options.get(name)
        if name in foreign:
            problems.append(f"{name}={' '.join(words)} (command line): {_FOREIGN} {foreign[name]}")
        elif option is None:
            guess = did_you_mean(name, [*options, *_PROGRAM_FLAGS, *_SHORT], prefix="--", suffix="")
            problems.append(f"--{name} (command line): unknown flag{guess}")
        elif not words:
            problems.append(f"{name} (command line): needs a value, {option.expected}")
        elif len(words) > 1 and not option.is_list:
            problems.append(f"{name}={' '.join(words)} (command line): takes one value, {option.expected}")
        else:
            text = json.dumps(words) if option.is_list else words[0]
            try:
                value = parser.parse_args([f"--{name}={text}"], defaults=False)[name]
            except _WRONG_VALUE:
                problems.append(f"{name}={' '.join(words)} (command line): expected {option.expected}")
            else:
                _keep(settings, name, Setting(value, COMMAND_LINE), problems)
    return settings


def check_leaves(
    leaves: Mapping[str, Any],
    label: str,
    options: Mapping[str, Option],
    parser: ArgumentParser,
    problems: list[str],
    foreign: Mapping[str, str] = _NONE,
) -> dict[str, Setting]:
    """Typed values of a YAML file's leaves; the file is ``label``, the rest as in :func:`check_flags`."""
    settings: dict[str, Setting] = {}
    for name, value in leaves.items():
        option = options.get(name)
        if name in foreign:
            problems.append(f"{name}={value} ({label}): {_FOREIGN} {foreign[name]}")
            continue
        if option is None:
            sections = {o.rpartition(".")[0] for o in options}
            if name in sections and value is None:
                continue  # an empty section
            problems.append(f"{label}: unknown name '{name}'" + did_you_mean(name, options))
            continue
        if option.is_list:
            value = [str(v) for v in (value if isinstance(value, list) else [value])]
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        try:
            checked = parser.parse_object(nested, defaults=False)[name]
        except _WRONG_VALUE:
            problems.append(f"{option.name}={value} ({label}): expected {option.expected}")
        else:
            _keep(settings, name, Setting(checked, label), problems)
    return settings


def _keep(settings: dict[str, Setting], name: str, setting: Setting, problems: list[str]) -> None:
    value = setting.value
    if isinstance(value, int) and not -LARGEST < value < LARGEST:
        problems.append(f"{name} ({setting.source}): a number of {len(str(abs(value)))} digits is too large")
    else:
        settings[name] = setting
