"""Answers of masked-diffusion models: what is asked for, what is said, and when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.errors import DataError
from gptoughts.inference.diffusion import build_sampler
from gptoughts.inference.diffusion_command import END, LENGTH, STOP, DiffusionAnswerer, DiffusionCommand
from gptoughts.inference.loading import LoadedModel
from gptoughts.models.llada.config import LLaDAConfig
from gptoughts.models.llada.model import build_model
from gptoughts.parallel import groups
from tests.inference.infill_test import MASK, byte_tokenizer

COMMAND = DiffusionCommand(max_new_tokens=24, block_length=8, temperature=0.8)


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[LoadedModel]:
    """A random model of bytes."""
    shape = LLaDAConfig(
        num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, vocab_size=257, seq_length=64,
        mask_token_id=MASK, eos_token_id=10,
    ).filled()  # fmt: skip
    config = ExperimentConfig(model_type="llada", model=shape, seed=1)
    groups.initialize(ParallelConfig(), seed=1)
    model = build_model(config, params_dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12.0)
    yield LoadedModel(model, byte_tokenizer(tmp_path), config, tmp_path)
    groups.destroy()


def test_a_streamed_answer_is_that_of_a_batch(loaded: LoadedModel) -> None:
    answerer = DiffusionAnswerer(loaded, COMMAND)
    prompts = [loaded.tokenizer.encode(text) for text in ("def f", "x", "# a comment", "y")]
    answers = DiffusionAnswerer(loaded, replace(COMMAND, batch_rows=3)).answer_all(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        pieces = list(answerer.stream(prompt))
        assert "".join(pieces) == answer.text
        assert len(pieces) > 8, "a piece for each step, empty or not"
        assert answer.end_reason == LENGTH
    assert len({answer.text for answer in answers}) == 4


def test_why_an_answer_ends(loaded: LoadedModel) -> None:
    prompt = loaded.tokenizer.encode("def f")
    (whole,) = DiffusionAnswerer(loaded, COMMAND).answer_all([prompt])
    stop = whole.text[9:11]
    stopped = replace(COMMAND, stop=(stop,))
    (answer,) = DiffusionAnswerer(loaded, stopped).answer_all([prompt])
    assert (answer.text, answer.end_reason) == (whole.text[: whole.text.index(stop)], STOP)
    assert "".join(DiffusionAnswerer(loaded, stopped).stream(prompt)) == answer.text
    tokens = build_sampler(loaded).restore([[*prompt, *[MASK] * 24]], COMMAND)[0].tokens[len(prompt) :]
    ending = replace(loaded.config, model=replace(loaded.config.model, eos_token_id=tokens[10]))
    ended = DiffusionAnswerer(replace(loaded, config=ending), COMMAND)
    (answer,) = ended.answer_all([prompt])
    assert answer.end_reason == END
    assert whole.text.startswith(answer.text)
    assert "".join(ended.stream(prompt)) == answer.text


def test_holes_are_filled_and_drawn(loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = r"def f(x):\n    [MASK*6]\n    return [MASK]"
    command = replace(COMMAND, block_length=4, infill=text)
    filled = DiffusionAnswerer(loaded, command).fill()
    assert filled.startswith("def f(x):\n    ")
    assert "\n    return " in filled
    file = tmp_path / "out.gif"
    drawn = replace(command, show=True, save_animation=file)
    assert DiffusionAnswerer(loaded, drawn).fill() == filled
    shown = capsys.readouterr()
    assert "def f(x):" in shown.err
    assert shown.out == ""
    with Image.open(file) as animation:
        assert animation.n_frames == 1 + 7


def test_a_drawn_answer_is_said_at_its_end(loaded: LoadedModel) -> None:
    prompt = loaded.tokenizer.encode("x")
    expected = "".join(DiffusionAnswerer(loaded, COMMAND).stream(prompt))
    pieces = list(DiffusionAnswerer(loaded, replace(COMMAND, show=True)).stream(prompt))
    assert pieces[-1] == expected
    assert set(pieces[:-1]) == {""}


def test_prompts_that_cannot_be_answered(loaded: LoadedModel) -> None:
    answerer = DiffusionAnswerer(loaded, COMMAND)
    assert answerer.problems([[1] * 40]) == []
    assert answerer.problems([[1] * 40, [1] * 41, [1, MASK]]) == [
        "prompt 2: 41 tokens and 24 masks are 65, more than the model's context of 64",
        "prompt 3: has the mask token in it; fill holes with --infill",
    ]


def test_a_tokenizer_without_a_mask_token_is_refused(loaded: LoadedModel) -> None:
    other = replace(loaded.config, model=replace(loaded.config.model, vocab_size=300, mask_token_id=290))
    with pytest.raises(DataError, match="its tokenizer has no mask token, which the model has under id 290"):
        DiffusionAnswerer(replace(loaded, config=other), COMMAND)
