"""The fp8 section: where its values come from, and which names stay out of FP8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptoughts.config.cli import from_yaml, load_experiment, to_yaml
from gptoughts.config.experiment import Fp8Config
from gptoughts.config.fp8 import is_kept, unmatched
from gptoughts.models.registry import FAMILIES

SHIPPED = Path(__file__).parents[2] / "ds_configs" / "zero3_fp8.json"


def load(*argv: str) -> Any:
    return load_experiment(list(argv), FAMILIES, world_size=1)


def test_defaults_are_transformer_engines_and_off_means_unset() -> None:
    on = load("--use_fp8=true").config.fp8
    assert (on.format, on.recipe, on.margin, on.amax_history_len) == ("hybrid", "delayed", 0, 1024)
    assert (on.amax_compute_algo, on.backend) == ("max", "auto")
    assert on.keep_bf16 == ["embedding", "output_layer"]
    assert load().config.fp8 == Fp8Config()


def test_the_shipped_file_switches_it_on_and_deepspeed_does_not_see_it() -> None:
    run = load("--deepspeed_config", str(SHIPPED))
    assert run.config.use_fp8
    assert run.zero_stage == 3
    assert "fp8" not in run.deepspeed
    assert run.sources["fp8.margin"] == str(SHIPPED)


def test_flags_fill_in_auto(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    keys = ("format", "margin", "amax_history_len", "amax_compute_algo", "backend", "keep_bf16")
    file.write_text(json.dumps({"fp8": {"enabled": "auto", **dict.fromkeys(keys, "auto")}}))
    argv = ("--deepspeed_config", str(file))
    assert not load(*argv).config.use_fp8
    found = load(
        *argv, "--use_fp8=true", "--fp8.format=e4m3", "--fp8.margin=2", "--fp8.amax_history_len=16",
        "--fp8.amax_compute_algo=most_recent", "--fp8.backend=emulated", "--fp8.keep_bf16", "first_1_layers", "*fc2",
    ).config.fp8  # fmt: skip
    assert (found.format, found.margin, found.amax_history_len) == ("e4m3", 2, 16)
    assert (found.amax_compute_algo, found.backend) == ("most_recent", "emulated")
    assert found.keep_bf16 == ["embedding", "output_layer", "first_1_layers", "*fc2"]


def test_the_resolved_tree_loads_back_equal(tmp_path: Path) -> None:
    config = load("--deepspeed_config", str(SHIPPED), "--size=debug").config
    assert from_yaml(to_yaml(config), FAMILIES) == config
    again = tmp_path / "config.yaml"
    again.write_text(to_yaml(config))
    assert load("--config", str(again)).config == config


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("first_1_layers", {0}),
        ("last_2_layers", {2, 3}),
        ("*.linear_fc2", {0, 1, 2, 3}),
        ("decoder.layers.1", {1}),
        ("decoder.layers.?.mlp.linear_fc1", set()),
        ("embedding", set()),
    ],
)
def test_words_of_keep_bf16(word: str, kept: set[int]) -> None:
    names = [f"decoder.layers.{layer}.mlp.linear_fc2" for layer in range(4)]
    assert {layer for layer, name in enumerate(names) if is_kept(name, [word], 4)} == kept
    assert unmatched(names, [word], 4) == ([word] if word.endswith("linear_fc1") else [])
