"""The flags of masked-diffusion models, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from gptoughts.errors import ConfigError
from gptoughts.inference.diffusion_command import DiffusionCommand
from gptoughts.inference.diffusion_options import DiffusionOptions
from gptoughts.inference.generate_flags import build_parser, command_for
from gptoughts.models.registry import FAMILIES


def command(*arguments: str, family: str = "llada", num_prompts: int = 1) -> Any:
    parsed = build_parser(FAMILIES).parse_args(["--checkpoint=x", *arguments])
    return command_for(FAMILIES[family], vars(parsed), FAMILIES, num_prompts)


def test_what_is_not_given_has_the_samplers_default() -> None:
    assert command() == DiffusionCommand()
    found = command("--threshold=0.8", "--cache=dual", "--seed=3", "--suppress_eos", "--max_new_tokens=64")
    assert found == DiffusionCommand(64, threshold=0.8, cache="dual", seed=3, suppress_eos=True)
    assert isinstance(found, DiffusionOptions)
    assert command("--no-stop_at_end").stop_at_end is False


def test_other_families_refuse_every_flag_by_name() -> None:
    with pytest.raises(ConfigError) as caught:
        command("--steps=4", "--show", "--infill=a[MASK]", family="gpt")
    assert [problem.split(" (command line): family gpt (Llama-style")[0] for problem in caught.value.problems] == [
        "infill=a[MASK]", "show=True", "steps=4",
    ]  # fmt: skip
    command("--seed=1", family="gpt")


@pytest.mark.parametrize(
    ("arguments", "num_prompts", "expected"),
    [
        (
            ["--max_new_tokens=100", "--block_length=30"],
            1,
            ["block_length=30 (command line): max_new_tokens=100 is not"],
        ),
        (
            ["--infill=a[MASK*0]b[MASK*x]"],
            0,
            ["infill (command line): [MASK*0]: a hole is", "infill (command line): [MASK*x]: a hole is"],
        ),
        (["--infill=no hole"], 0, ["infill (command line): the text has no hole"]),
        (["--infill=a[MASK*7]", "--block_length=8"], 0, ["block_length=8 (command line): from 1 to the number of"]),
        (
            ["--infill=a[MASK*7]", "--max_new_tokens=7", "--stop=x"],
            0,
            ["max_new_tokens=7 (command line): what is", "stop=x (command line): what is to be found"],
        ),
        (["--stop=", "--batch_rows=0"], 1, ["stop= (command line): an empty", "batch_rows=0 (command line): at least"]),
        (
            ["--show", "--save_animation=out.gif"],
            2,
            ["show=True (command line): draws one", "save_animation=out.gif (command line): draws one answer"],
        ),
        (
            ["--save_animation=out.avi", "--temperature=-1"],
            1,
            ["temperature=-1.0 (command line): 0", "save_animation='out.avi' (command line): ends in"],
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_together(arguments: list[str], num_prompts: int, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        command(*arguments, num_prompts=num_prompts)
    found = caught.value.problems
    assert len(found) == len(expected)
    for problem, beginning in zip(found, expected, strict=True):
        assert problem.startswith(beginning)
