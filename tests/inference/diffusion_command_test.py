"""The flags of masked-diffusion models, before anything is loaded."""

from __future__ import annotations

import argparse

import pytest

from gptoughts.inference import diffusion_command
from gptoughts.inference.diffusion_options import DiffusionOptions


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name, kind in (("max_new_tokens", int), ("temperature", float), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind)
    diffusion_command.add_flags(parser)
    return parser.parse_args(arguments)


def test_what_is_not_given_has_the_samplers_default() -> None:
    assert diffusion_command.options_of(parsed()) == DiffusionOptions()
    found = diffusion_command.options_of(
        parsed("--threshold=0.8", "--cache=dual", "--seed=3", "--suppress_eos", "--max_new_tokens=64", "--cfg_scale=0")
    )
    assert found == DiffusionOptions(64, threshold=0.8, cache="dual", seed=3, suppress_eos=True)
    assert diffusion_command.problems_of(parsed(), 1) == []


def test_other_families_refuse_every_flag_by_name() -> None:
    arguments = parsed("--steps=4", "--show", "--infill=a[MASK]")
    assert diffusion_command.refused_flags(arguments, "gpt") == [
        f"{name} (command line): is for masked-diffusion models (llada); this one is of the family gpt"
        for name in ("steps", "infill", "show")
    ]
    assert diffusion_command.refused_flags(parsed("--seed=1"), "gpt") == []


@pytest.mark.parametrize(
    ("arguments", "num_prompts", "expected"),
    [
        (["--max_new_tokens=100", "--block_length=30"], 1, ["block_length=30: max_new_tokens=100 is not divisible"]),
        (["--infill=a[MASK*0]b[MASK*x]"], 0, ["infill: [MASK*0]: a hole is", "infill: [MASK*x]: a hole is"]),
        (["--infill=no hole"], 0, ["infill: the text has no hole"]),
        (["--infill=a[MASK*7]", "--block_length=8"], 0, ["block_length=8: from 1 to the number of masks, 7"]),
        (
            ["--infill=a[MASK*7]", "--max_new_tokens=7"],
            1,
            ["prompt and infill: one of them", "max_new_tokens=7: how many"],
        ),
        (["--show", "--save_animation=out.gif"], 2, ["show: draws one answer", "save_animation: draws one answer"]),
        (
            ["--save_animation=out.avi", "--temperature=-1"],
            1,
            ["temperature=-1.0: 0", "save_animation='out.avi': ends in"],
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_together(arguments: list[str], num_prompts: int, expected: list[str]) -> None:
    found = diffusion_command.problems_of(parsed(*arguments), num_prompts)
    assert len(found) == len(expected)
    for problem, beginning in zip(found, expected, strict=True):
        assert problem.startswith(beginning)
        assert problem.endswith(" (command line)")
