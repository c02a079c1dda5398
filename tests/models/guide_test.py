"""docs/adding_a_family.md, followed: its code is the example's, and the example is a family like any other."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.checkpoint.huggingface.formats import format_for
from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.models.family import Family
from gptoughts.models.llada.config import LLaDAConfig
from gptoughts.models.registry import FAMILIES, register
from gptoughts.training.pretrain import main
from tests.distributed import run_distributed
from tests.harness import Layout, run_layout
from tests.models import families_test, presets_test, registry_test
from tests.models.relu2 import entry
from tests.models.relu2.objective import LateCausalLM
from tests.parity import comparison

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "adding_a_family.md").read_text(encoding="utf-8")
EXAMPLE = Path(entry.__file__).parent
BLOCKS = dict(re.findall(r"`([\w/]+\.py)`[^\n]*\n+```python\n(.*?)```", GUIDE, re.DOTALL))
"""File that the guide writes -> what it writes there."""
WHOLE_FILES = [f"gptoughts/models/relu2/{name}.py" for name in ("config", "presets", "objective", "model")]
LINE = "gptoughts/models/registry.py"


@pytest.fixture
def family() -> Iterator[Family]:
    with entry.registered() as found:
        yield found


def on_ranks(world_size: int, *call: Any) -> list[Any]:
    return run_distributed(entry.with_example, world_size, *call)


def test_the_guide_writes_these_files_and_no_other() -> None:
    assert sorted(BLOCKS) == sorted([*WHOLE_FILES, LINE])
    assert GUIDE.count("```python") == len(BLOCKS)
    assert {path.name for path in EXAMPLE.glob("*.py")} == {Path(p).name for p in WHOLE_FILES} | {
        "__init__.py", "entry.py",
    }  # fmt: skip


@pytest.mark.parametrize("path", WHOLE_FILES)
def test_a_file_of_the_guide_is_the_examples(path: str) -> None:
    source = (EXAMPLE / Path(path).name).read_text(encoding="utf-8")
    assert BLOCKS[path] == _as_in_the_package(source)


def test_the_registrys_line_is_the_examples() -> None:
    source = _as_in_the_package(Path(entry.__file__).read_text(encoding="utf-8"))
    assert textwrap.indent(BLOCKS[LINE], "    ") in source


def _as_in_the_package(source: str) -> str:
    """The file under the name that it would have in the package, imports sorted accordingly."""
    lines = source.replace("tests.models.relu2", "gptoughts.models.relu2").splitlines(keepends=True)
    ours = [index for index, line in enumerate(lines) if line.startswith("from gptoughts.")]
    if ours:
        lines[ours[0] : ours[-1] + 1] = sorted(lines[ours[0] : ours[-1] + 1])
    return "".join(lines)


def test_every_path_and_name_in_the_guide_exists() -> None:
    text = re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL)
    paths = set(re.findall(r"`((?:gptoughts|tests|tools|docs)/[\w/.]+)`", text))
    assert len(paths) > 10
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert {path for path in missing if "relu2" not in path} == set()
    names = set(re.findall(r"`ModelConfig\.(\w+)", text))
    assert names
    from gptoughts.config.model import ModelConfig

    assert [name for name in names if not hasattr(ModelConfig, name)] == []


@pytest.mark.parametrize("size", presets_test.HOUSE)
def test_its_presets_are_sound(family: Family, size: str) -> None:
    presets_test.test_a_preset_is_sound(family, size)
    presets_test.test_a_preset_keeps_to_its_table(family, size)


def test_its_entry_is_whole(family: Family) -> None:
    registry_test.test_an_entry_is_whole(family)
    registry_test.test_builder_and_objective_load(family)


def test_it_is_offered_and_its_options_are_told(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--model_type", "relu2", "--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"relu2 ({family.summary})" in text
    assert "--model.unscored_tokens" in text
    with pytest.raises(ConfigError, match=r"model\.unscored_tokens=512 \(command line\): from 0 to seq_length - 1"):
        main(["--model_type", "relu2", "--model.unscored_tokens", "512", "--dry_run"])


def test_dry_run_as_the_guide_says(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (words,) = re.findall(r"^python launchers/pretrain\.py (.*--dry_run.*)$", GUIDE, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 0
    assert "7,342,336" in capsys.readouterr().out


def test_its_objective_leaves_out_the_first_tokens() -> None:
    inputs = LateCausalLM(unscored_tokens=3).prepare(torch.arange(22).view(2, 11), torch.arange(2))
    assert inputs.denominator.item() == 2 * 7
    assert inputs.is_counted.sum(dim=1).tolist() == [7, 7]
    assert inputs.loss_weights[0].tolist() == [0.0] * 3 + [1.0] * 7


def layer_against_formula() -> float:
    from gptoughts.parallel import groups

    groups.initialize(ParallelConfig(), seed=5)
    example = FAMILIES["relu2"]
    shape = dataclasses.replace(example.presets["debug"].model, num_layers=1)
    model = example.load_model_builder()(ExperimentConfig(model_type="relu2", model=shape), params_dtype=torch.float32)
    half = model.decoder.layers[0].mlp
    x = torch.randn(5, 2, shape.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = (x @ half.linear_fc1.weight.T).clamp(min=0) ** 2 @ half.linear_fc2.weight.T
    return float((half(x)[0] - expected).abs().max() / expected.abs().max())


def test_its_feed_forward_half_is_what_it_says() -> None:
    assert on_ranks(1, layer_against_formula)[0] <= 1e-5


def test_it_is_built_with_the_parameters_that_are_counted(tmp_path: Path) -> None:
    ((built, counted),) = on_ranks(1, families_test.count_built_parameters, "relu2", str(tmp_path))
    assert built == counted


def test_it_overfits_one_batch(tmp_path: Path) -> None:
    (losses,) = on_ranks(1, families_test.overfit_one_batch, "relu2", str(tmp_path))
    assert losses[0] > 5.0
    assert losses[-1] < families_test.OVERFIT_GOAL


RESUMES = [
    Layout(zero=3, precision="bf16", extra=families_test.DROPOUT),
    Layout(data=2, zero=1, extra=("--model.unscored_tokens=9",)),
]


@pytest.mark.parametrize("layout", RESUMES, ids=str)
def test_it_resumes_to_the_bit(layout: Layout, tmp_path: Path) -> None:
    for expected, found, is_equal in on_ranks(
        layout.world_size, families_test.resume_in_the_middle, "relu2", layout, str(tmp_path)
    ):
        assert found == expected
        assert is_equal


def test_a_layout_equals_one_rank(tmp_path: Path) -> None:
    late = ("--model.unscored_tokens=9",)
    runs = []
    for layout in (Layout(extra=late), Layout(tensor=2, sequence=True, zero=3, extra=late)):
        folder = tmp_path / str(layout)
        steps, saved = comparison.STEPS, (1, comparison.STEPS)
        histories = on_ranks(layout.world_size, run_layout, "relu2", layout, str(folder), steps, saved)
        runs.append((histories[0], folder / "run"))
    comparison.assert_equal(runs[1], runs[0])


def record_golden(folder: str) -> list[float]:
    from tests.golden import curve

    curve = importlib.reload(curve)  # as imported where the line stands in registry.py
    curve.STEPS = 5  # no shorter than the toy's warm-up
    curve.golden_file = lambda name: Path(folder) / f"{name}.json"
    try:
        assert curve.main(["relu2"]) == 0
    finally:
        with_line = FAMILIES.pop("relu2")
        importlib.reload(curve)
        FAMILIES["relu2"] = with_line
    losses: list[float] = json.loads((Path(folder) / "relu2.json").read_text())["losses"]
    return losses


def test_its_golden_curve_can_be_recorded(tmp_path: Path) -> None:
    assert "python tools/update_golden.py relu2\n" in GUIDE
    (losses,) = on_ranks(1, record_golden, str(tmp_path))
    assert len(losses) == 5
    assert losses[0] == pytest.approx(5.55, abs=0.15)


def test_it_is_not_taken_for_the_family_that_its_shape_extends(family: Family) -> None:
    model = family.presets["debug"].model
    with pytest.raises(CheckpointError, match="model_type=relu2: has no Hugging Face format"):
        format_for("relu2", model)
    assert LLaDAConfig.adopted(model) is None


def test_the_registry_refuses_what_contradicts_itself(family: Family) -> None:
    with pytest.raises(ValueError, match="relu2: a family of this name is registered"):
        register(family)
    odd = dataclasses.replace(
        family,
        name="odd",
        presets={"small": FAMILIES["gpt"].presets["small"]},
        objective="tests.models.relu2.objective.build_objective",
    )
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        register(odd)
    assert str(caught.value).splitlines() == [
        "odd: 'tests.models.relu2.objective.build_objective' is no path package.module:function",
        "odd: preset 'small' is a GPTConfig, not a ReLU2Config",
        "odd: ReLU2Config has no preset 'debug'",
    ]
    assert "odd" not in FAMILIES
