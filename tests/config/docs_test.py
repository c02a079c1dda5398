"""docs/config.md names only what exists."""

from __future__ import annotations

import re
from pathlib import Path

from gptoughts.config.cli import load_experiment
from gptoughts.config.options import tree_options
from gptoughts.config.settings import split_arguments
from gptoughts.models.registry import FAMILIES

TEXT = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
KNOWN = {
    name
    for family in FAMILIES.values()
    for variant in (family, *family.variants)
    for name in tree_options(variant.config_class)
}


def test_every_flag_in_the_page_exists() -> None:
    flags = set(re.findall(r"--([a-z_][a-z_0-9.]*)", TEXT)) - {"config", "dry_run", "help", "data"}
    assert len(flags) > 10
    assert flags - KNOWN == set()


def test_every_flag_of_the_top_level_is_in_the_page() -> None:
    assert {f"--{name}" for name in KNOWN if "." not in name} - set(re.findall(r"--[a-z_0-9]+", TEXT)) == set()


def test_the_example_command_and_yaml_are_accepted(tmp_path: Path) -> None:
    command = re.search(r"launchers/pretrain\.py (.*?)```", TEXT, re.DOTALL)
    example = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert command
    assert example
    root = Path(__file__).parents[2]
    argv = command[1].replace("\\\n", " ").replace("ds_configs", str(root / "ds_configs")).split()
    assert split_arguments(argv).problems == []
    assert load_experiment(argv, FAMILIES, world_size=4).num_microbatches == 4
    path = tmp_path / "example.yaml"
    path.write_text(example[1])
    config = load_experiment(["--config", str(path)], FAMILIES, world_size=8).config
    assert config.data.train == ["0.7", "corpora/code", "0.3", "corpora/english"]
    assert config.optim.lr == 3e-4
