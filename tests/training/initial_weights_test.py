"""--init_from: exact weights in every layout, a fresh optimizer, and the shape that the run takes from there."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptoughts.checkpoint.huggingface.exporting import export_model
from gptoughts.checkpoint.huggingface.formats import read_published
from gptoughts.checkpoint.huggingface.tensor_files import TensorFolder
from gptoughts.checkpoint.origin import read_origin
from gptoughts.checkpoint.portable import CheckpointReader
from gptoughts.config.cli import load_experiment
from gptoughts.config.fp8 import is_fp8_state
from gptoughts.data.tokenizer import tokenizer_file
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.models.registry import FAMILIES
from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun
from tests.integration.conftest import Corpus, corpus  # noqa: F401

SHAPE = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip


def publish(folder: Path, **options: Any) -> Path:
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SHAPE | options)))
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("published") / "model")


def start_and_step(layout: Layout, source: str, folder: str) -> tuple[dict[str, Any], str, float, float, Any]:
    """Start from weights, save at once, then train one step."""
    from gptoughts.models.stages import all_names
    from gptoughts.training.initial_weights import load_initial_weights

    run = ToyRun("gpt", layout, Path(folder))
    load_initial_weights(Path(source), run.engine, all_names(list(run.parameters)), run.experiment.config.model)
    largest_moment = max(float(f.tensor.abs().max()) for f in run.engine.state_fragments() if f.kind != "weight")
    saved = run.save()
    scalars = run.engine.scalar_state()
    (result,) = run.train(1)
    run.close()
    return scalars, str(saved), largest_moment, result.loss, result.grad_norm


LAYOUTS = [
    Layout(), Layout(zero=1, precision="bf16"), Layout(data=2, zero=3), Layout(tensor=2, zero=2),
    Layout(tensor=2, sequence=True, zero=3), Layout(pipeline=2, zero=3),
]  # fmt: skip
_losses: dict[str, float] = {}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_weights_are_exact_and_the_rest_is_fresh(layout: Layout, published: Path, tmp_path: Path) -> None:
    results = run_distributed(start_and_step, layout.world_size, layout, str(published), str(tmp_path))
    scalars, saved, largest_moment, loss, _ = results[0]
    assert scalars["optimizer_steps"] == 0
    assert largest_moment == 0.0
    found, tensors = read_published(published), TensorFolder(published)
    reader = CheckpointReader(Path(saved))
    for entry in found.format.entries(found.model):
        expected = entry.transform.join([tensors.read(name) for name in entry.theirs])
        assert torch.equal(reader.full(entry.ours), expected), entry.ours
    if layout.precision == "fp32":
        _losses[str(layout)] = loss
        assert loss == pytest.approx(_losses[str(LAYOUTS[0])], rel=1e-6)


def test_from_one_of_our_checkpoints_of_another_layout(published: Path, tmp_path: Path) -> None:
    ((_, first, _, loss, norm),) = run_distributed(start_and_step, 1, Layout(), str(published), str(tmp_path / "a"))
    layout = Layout(tensor=2, zero=3)
    results = run_distributed(start_and_step, 2, layout, first, str(tmp_path / "b"))
    assert results[0][3:] == pytest.approx((loss, norm), rel=1e-5)


def test_a_model_of_another_shape_is_refused(published: Path, tmp_path: Path) -> None:
    other = publish(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(AssertionError, match=r"decoder\.layers\.2\.mlp\.linear_fc1\.weight: is in one of both models"):
        run_distributed(start_and_step, 1, Layout(), str(other), str(tmp_path / "run"))


def load(*argv: str) -> Any:
    return load_experiment(argv, FAMILIES, world_size=1, read_origin=read_origin)


def test_the_shape_comes_from_there_but_not_the_length(published: Path) -> None:
    run = load("--init_from", str(published), "--model.rotary_base=500000")
    model = run.config.model
    assert (model.num_layers, model.ffn_hidden_size, model.vocab_size, model.rotary_base) == (2, 704, 256, 500000)
    assert model.seq_length == 512  # the preset's
    assert run.sources["model.num_layers"] == f"init_from {published}"


def test_what_contradicts_it_is_named(published: Path, tmp_path: Path) -> None:
    for argv, expected in (
        (["--init_from", str(published), "--model_type=mla"], "is of the family gpt"),
        (["--init_from", str(tmp_path / "none")], "nor is there a Hugging Face folder"),
        (["--init_from", str(published), "--resume", "somewhere"], "contradicts resume=somewhere"),
    ):
        with pytest.raises(ConfigError, match=expected):
            load(*argv)
    from gptoughts.training import pretrain

    arguments = ["--init_from", str(published), "--model.num_layers=3", "--model.hidden_size=128",
                 f"--output_dir={tmp_path / 'run'}", "--dry_run"]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        pretrain.main(arguments)
    assert f"model.num_layers=3: init_from={published} has 2; leave it out" in caught.value.problems
    assert f"model.hidden_size=128: init_from={published} has 256; leave it out" in caught.value.problems


def pretrain_twice(arguments: list[str]) -> list[str]:
    """What two runs of the program in one folder print."""
    from gptoughts.training import pretrain

    said = []
    for steps in (2, 3):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            pretrain.main([*arguments, f"--train.steps={steps}", f"--train.stop_after_steps={steps}"])
        said.append(out.getvalue())
    return said


def test_the_program_starts_once_and_resumes_after_that(corpus: Corpus, tmp_path: Path) -> None:  # noqa: F811
    source = publish(tmp_path / "model", vocab_size=512, hidden_size=64, intermediate_size=128)
    arguments = [
        f"--init_from={source}", f"--data={corpus.prefix}", f"--output_dir={tmp_path / 'run'}", "--block_size=64",
        "--batch_size=2", "--train.precision=fp32", "--train.valid_samples=4", "--log.plot=false",
    ]  # fmt: skip
    ((first, second),) = run_distributed(pretrain_twice, 1, arguments)
    assert f"starts from the weights of {source}, at step 0 with a fresh optimizer" in first
    assert "resumed from" in second
    assert f"init_from {source} is not read again" in second


def test_weights_alone_cannot_be_resumed_from(published: Path, tmp_path: Path) -> None:
    from gptoughts.checkpoint.huggingface.importing import import_model

    (published / "tokenizer.json").write_text("{}")
    import_model(published, tmp_path / "run")
    with pytest.raises(AssertionError, match="holds weights only, so no run can be resumed from it"):
        run_distributed(resume_from, 1, str(tmp_path / "run"))
    assert dataclasses.asdict(read_origin(str(tmp_path / "run"))[1])["num_layers"] == 2


def resume_from(folder: str) -> None:
    from gptoughts.checkpoint.manager import CheckpointManager

    CheckpointManager(Path(folder), 0, "", {}).find("auto")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_origin(str(tmp_path / "none"))


def test_a_corpus_in_another_tokenizer_is_refused(corpus: Corpus, tmp_path: Path) -> None:  # noqa: F811
    """Its ids are in range, and mean other words."""
    from gptoughts.training import pretrain

    source = publish(tmp_path / "model", vocab_size=512, hidden_size=64, intermediate_size=128)
    own = tokenizer_file(corpus.tokenizer)
    text = json.loads(own.read_text(encoding="utf-8"))
    arguments = [f"--init_from={source}", f"--data={corpus.prefix}", f"--output_dir={tmp_path / 'run'}", "--dry_run",
                 "--block_size=64"]  # fmt: skip
    vocabulary = text["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (source / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"gives other ids than the corpus's \(.*\) to 2 tokens"):
        pretrain.main(arguments)
    # A further special token moves no ordinary one.
    text = json.loads(own.read_text(encoding="utf-8"))
    text["added_tokens"].append({**text["added_tokens"][0], "id": 512, "content": "<|further|>"})
    (source / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    assert pretrain.main(arguments) == 0


def test_weights_pass_through_a_run_in_fp8(published: Path, tmp_path: Path) -> None:
    """FP8's state is fresh beside published weights, and is left behind when they are exported."""
    layout = Layout(precision="bf16", extra=("--use_fp8=true", "--fp8.backend=emulated", "--fp8.amax_history_len=4"))
    ((_, saved, _, loss, _),) = run_distributed(start_and_step, 1, layout, str(published), str(tmp_path / "run"))
    assert loss < 20
    reader = CheckpointReader(Path(saved))
    states = [name for name in reader.names("buffer") if is_fp8_state(name)]
    assert len(states) == 4 * 4 * 2
    for name in states:
        assert (reader.full(name, "buffer") == (0.0 if "history" in name else 1.0)).all(), name
    export_model(Path(saved), tmp_path / "exported")
    before, after = TensorFolder(published), TensorFolder(tmp_path / "exported")
    assert sorted(after.headers) == sorted(before.headers)
