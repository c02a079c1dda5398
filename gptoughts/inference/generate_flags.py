"""The command line of ``launchers/generate.py``: flags of all families, from the fields of their commands; no torch."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser

from gptoughts.errors import ConfigError
from gptoughts.inference.precisions import PRECISIONS
from gptoughts.inference.ways import Way, way_of
from gptoughts.models.family import Family

_COMMAND_LINE = "(command line)"


@dataclass(frozen=True)
class Flag:
    """One field of a command."""

    name: str
    type: Any
    default: Any
    help: str

    def add_to(self, group: argparse._ArgumentGroup, help: str) -> None:
        """Add it to a parser; what is not said stays absent from the namespace."""
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help.replace("``", "").replace("%", "%%")}
        inner = [kind for kind in get_args(self.type) if kind is not NoneType] or [self.type]
        if self.type is bool:
            group.add_argument(f"--{self.name}", action=argparse.BooleanOptionalAction, **options)
        elif get_origin(self.type) is tuple:
            group.add_argument(f"--{self.name}", action="append", metavar="TEXT", **options)
        elif get_origin(self.type) is Literal:
            group.add_argument(f"--{self.name}", choices=get_args(self.type), **options)
        else:
            kind = inner[0]
            group.add_argument(f"--{self.name}", type=kind, metavar=kind.__name__.upper(), **options)


def flags_of(way: Way) -> dict[str, Flag]:
    """Fields of a way's command by name."""
    hints = get_type_hints(way.command)
    texts: dict[str, str] = {}
    for base in reversed(way.command.__mro__):
        if dataclasses.is_dataclass(base):
            parsed = docstring_parser.parse_from_object(base)
            texts |= {one.arg_name: " ".join((one.description or "").split()) for one in parsed.params}
    return {
        field.name: Flag(field.name, hints[field.name], field.default, texts[field.name])
        for field in dataclasses.fields(way.command)
    }


def build_parser(families: Mapping[str, Family]) -> argparse.ArgumentParser:
    """The parser, with each way's own flags in a group that names its families."""
    parser = argparse.ArgumentParser(
        prog="generate.py", description="Answer prompts with a trained model. The answer alone goes to stdout."
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="PATH",
        help="a run's folder (its newest checkpoint), a checkpoint, or a Hugging Face folder",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue; with --chat what the user says")
    parser.add_argument(
        "--prompts_file",
        type=Path,
        metavar="FILE.jsonl",
        help='many prompts, one {"prompt": TEXT} a line; each gives a line with its answer on stdout, in their order',
    )
    parser.add_argument(
        "--chat", action="store_true", help="put prompts into the tokenizer's chat template, or a plain one"
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the system says first")
    parser.add_argument(
        "--interactive", action="store_true", help="ask again and again; with --chat as one conversation"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of weights and products [bf16 on a GPU, fp32 on a CPU]"
    )
    by_way: dict[str, tuple[Way, list[str]]] = {}
    for family in families.values():
        way = way_of(family)
        by_way.setdefault(way.name, (way, []))[1].append(family.name)
    tables = {name: flags_of(way) for name, (way, _) in by_way.items()}
    shared = set.intersection(*(set(table) for table in tables.values()))
    common = parser.add_argument_group("every family")
    first, *_ = tables.values()
    for name in [name for name in first if name in shared]:
        defaults = {", ".join(by_way[one][1]): table[name].default for one, table in tables.items()}
        said = defaults.values() if len(set(defaults.values())) > 1 else [first[name].default]
        stated = "; ".join(f"{who}: {value}" for who, value in defaults.items()) if len(said) > 1 else str(*said)
        first[name].add_to(common, f"{first[name].help} [{stated}]")
    for name_of_way, table in tables.items():
        group = parser.add_argument_group(f"{name_of_way} families ({', '.join(by_way[name_of_way][1])})")
        for name, flag in table.items():
            if name not in shared:
                flag.add_to(group, f"{flag.help} [{flag.default}]" if flag.default not in (None, ()) else flag.help)
    return parser


def command_for(family: Family, stated: Mapping[str, Any], families: Mapping[str, Family], num_prompts: int) -> Any:
    """The family's command from what was said.

    Raises:
        ConfigError: a flag that the family has not, or values that cannot be; all at once.
    """
    way = way_of(family)
    own = flags_of(way)
    every = {name for other in families.values() for name in flags_of(way_of(other))}
    problems = [
        f"{name}={_shown(stated[name])} {_COMMAND_LINE}: family {family.name} ({family.summary}) has no such option; "
        f"it has: {', '.join(own)}"
        for name in sorted(every & stated.keys() - own.keys())
    ]
    values = {name: stated[name] for name in own if name in stated}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    command = way.command(**values)
    for problem in command.refusals(values.keys(), num_prompts):
        what, colon, reason = problem.partition(": ")
        problems.append(f"{what} {_COMMAND_LINE}{colon}{reason}")
    if problems:
        raise ConfigError(problems)
    return command


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
