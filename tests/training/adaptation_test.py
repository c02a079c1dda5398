"""--init_from an autoregressive model with --model_type llada: the same block, a mask token, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.checkpoint.adaptation import Adaptation
from gptoughts.checkpoint.origin import read_origin
from gptoughts.checkpoint.portable import BUFFER, CheckpointReader
from gptoughts.config.cli import load_experiment
from gptoughts.errors import ConfigError
from gptoughts.models.registry import FAMILIES
from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun
from tests.training.initial_weights_test import published  # noqa: F401

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
FAMILY_FLAGS = {
    "gpt": ("llada", ()),
    "mla": ("llada-mla", ()),
    "deepseek": ("llada-mla-moe", ("--model.num_moe_experts=8",)),
}


def save_trained(family: str, folder: str) -> str:
    """A next-token model after three steps: its weights, and the biases of its routers, are no longer fresh."""
    run = ToyRun(family, Layout(), Path(folder))
    for _ in run.train(3):
        pass
    saved = run.save()
    run.close()
    return str(saved)


def start(variant: str, layout: Layout, source: str, folder: str) -> tuple[str, float]:
    from gptoughts.training.initial_weights import load_initial_weights

    run = ToyRun(variant, layout, Path(folder))
    load_initial_weights(Path(source), run.engine, run.parameters, run.experiment.config.model)
    saved = run.save()
    (result,) = run.train(1)
    run.close()
    return str(saved), result.loss


@pytest.mark.parametrize("family", FAMILY_FLAGS)
def test_the_block_is_kept_and_the_mask_is_the_mean(family: str, tmp_path: Path) -> None:
    """256 tokens fill the toy's vocabulary: the mask's row is new, and the matrices grow."""
    variant, flags = FAMILY_FLAGS[family]
    (source,) = run_distributed(save_trained, 1, family, str(tmp_path / "source"))
    layout = Layout(extra=(*flags, "--model.is_shifted=true"))
    ((saved, loss),) = run_distributed(start, 1, variant, layout, source, str(tmp_path / "run"))
    there, here = CheckpointReader(Path(source)), CheckpointReader(Path(saved))
    for name in here.names():
        ours, theirs = here.full(name), there.full(name)
        if name in (EMBEDDING, OUTPUT):
            assert ours.shape == (384, 256)
            assert torch.equal(ours[:256], theirs)
            torch.testing.assert_close(ours[256], theirs.mean(dim=0))
            assert not ours[257:].any()
        else:
            assert torch.equal(ours, theirs), name
    assert here.names(BUFFER) == there.names(BUFFER)
    for name in here.names(BUFFER):
        assert torch.equal(here.full(name, BUFFER), there.full(name, BUFFER)), name
        assert here.full(name, BUFFER).any()
    if family == "gpt":
        layout = Layout(tensor=2, data=1, zero=3, extra=layout.extra)
        results = run_distributed(start, 2, variant, layout, source, str(tmp_path / "divided"))
        assert results[0][1] == pytest.approx(loss, rel=1e-6)
        divided = CheckpointReader(Path(results[0][0]))
        assert torch.equal(divided.full(EMBEDDING), here.full(EMBEDDING))


def test_a_hugging_face_folder_becomes_a_diffusion_model(published: Path, tmp_path: Path) -> None:  # noqa: F811
    layout = Layout(extra=("--model.is_shifted=true",))
    ((saved, _),) = run_distributed(start, 1, "llada", layout, str(published), str(tmp_path))
    embedding = CheckpointReader(Path(saved)).full(EMBEDDING)
    torch.testing.assert_close(embedding[256], embedding[:256].mean(dim=0))


def test_a_reserved_token_keeps_its_row_of_the_output_layer() -> None:
    adaptation = Adaptation(num_entries=6, mask_token_id=2)
    source = torch.randn(8, 3)
    embedding, output = (adaptation.matrix(name, source, 8) for name in (EMBEDDING, OUTPUT))
    torch.testing.assert_close(embedding[2], source[[0, 1, 3, 4, 5]].mean(dim=0))
    assert torch.equal(embedding[[0, 1, 3, 4, 5, 6, 7]], source[[0, 1, 3, 4, 5, 6, 7]])
    assert torch.equal(output, source)


def load(*argv: str) -> Any:
    return load_experiment(argv, FAMILIES, world_size=1, read_origin=read_origin)


def test_the_shape_comes_from_there(published: Path) -> None:  # noqa: F811
    run = load("--model_type=llada", "--init_from", str(published))
    model = run.config.model
    assert (run.config.model_type, model.num_layers, model.attention, model.num_moe_experts) == ("llada", 2, "mha", 0)
    assert (model.mask_token_id, model.padded_vocab_size) == (256, 384)
    assert model.is_shifted
    assert not load(
        "--model_type=llada", "--init_from", str(published), "--model.is_shifted=false"
    ).config.model.is_shifted
    assert not load("--model_type=llada").config.model.is_shifted


def test_what_contradicts_it_is_named(published: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError) as caught:
        load("--model_type=llada", "--init_from", str(published), "--model.attention=mla")
    assert f"model.attention=mla (command line): init_from={published} has mha; leave it out" in caught.value.problems
    with pytest.raises(ConfigError, match="is of the family gpt, from which deepseek cannot start"):
        load("--model_type=deepseek", "--init_from", str(published))
