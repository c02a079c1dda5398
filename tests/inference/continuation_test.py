"""Texts that go on: the samplers behind one face, the same on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.data.tokenizer import load_tokenizer
from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.continuation import Prompt, continue_texts
from gptoughts.inference.evaluation_tasks import read_results
from gptoughts.inference.loading import LoadedModel
from gptoughts.models.registry import FAMILIES
from gptoughts.parallel import groups
from tests.checkpoint.huggingface.conftest import tokenizer_folder  # noqa: F401
from tests.distributed import run_distributed
from tests.harness import SEQUENCE, Layout, toy_experiment

TEXTS = ("the cat sat", "on the mat and the dog sat on", "log")


def loaded_toy(family: str, layout: Layout, folder: str, tokenizer: str) -> LoadedModel:
    """A model with initial weights, and 270 entries so that every token has a text."""
    mask = ("--model.mask_token_id=2",) if family == "llada" else ()
    layout = Layout(tensor=layout.tensor, data=layout.data, extra=("--model.vocab_size=270", *mask))
    config = toy_experiment(family, layout, Path(folder)).config
    groups.initialize(config.parallel, seed=config.seed)
    model = FAMILIES[family].load_model_builder()(config, params_dtype=torch.float32).eval()
    return LoadedModel(model, load_tokenizer(tokenizer), config, Path(folder))


def go_on(family: str, layout: Layout, folder: str, tokenizer: str) -> list[str]:
    loaded = loaded_toy(family, layout, folder, tokenizer)
    prompts = [Prompt(loaded.tokenizer.encode(text), 8) for text in TEXTS]
    done: list[int] = []
    answers = continue_texts(loaded, prompts, batch_size=2, advance=done.append)
    assert sum(done) == len(range(groups.data_parallel_rank(), 3, groups.data_parallel_size()))
    longest = max(answers, key=len)
    number, stop = answers.index(longest), longest[len(longest) // 2]
    (stopped,) = continue_texts(
        loaded, [Prompt(prompts[number].ids, 8, ("\0never", stop))], batch_size=1, advance=done.append
    )
    assert stopped == longest[: longest.index(stop)]
    drawn = Prompt(prompts[0].ids, 8, (), (("temperature", 2.0), ("seed", 3)))
    again = [continue_texts(loaded, [drawn], batch_size=1, advance=done.append)[0] for _ in range(2)]
    assert again[0] == again[1] != answers[0]
    return answers


@pytest.mark.parametrize("family", ["gpt", "llada"])
def test_answers_are_the_same_on_every_layout(family: str, tokenizer_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    arguments = (str(tmp_path), str(tokenizer_folder))
    (expected,) = run_distributed(go_on, 1, family, Layout(), *arguments)
    assert any(expected)
    for layout in (Layout(data=2), Layout(tensor=2)):
        for found in run_distributed(go_on, 2, family, layout, *arguments):
            assert found == expected


def refuse(folder: str, tokenizer: str) -> None:
    loaded = loaded_toy("gpt", Layout(), folder, tokenizer)

    def ask(*prompts: Prompt) -> Any:
        return continue_texts(loaded, prompts, batch_size=1, advance=lambda count: None)

    with pytest.raises(ConfigError, match="threshold: family gpt has no such option of sampling; it has: temperature"):
        ask(Prompt([1], 4, (), (("threshold", 0.9),)))
    with pytest.raises(ConfigError, match="temperature=-1"):
        ask(Prompt([1], 4, (), (("temperature", -1.0),)))
    for ids in ([], [1] * SEQUENCE):
        with pytest.raises(DataError, match=f"a prompt of {len(ids)} tokens"):
            ask(Prompt(ids, 4))


def test_what_cannot_go_on_is_said(tokenizer_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    run_distributed(refuse, 1, str(tmp_path), str(tokenizer_folder))


def test_the_harness_dictionary_becomes_figures() -> None:
    pytest.importorskip("lm_eval", reason="its version is part of the results")
    found = read_results(
        {
            "results": {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A", "f1,strict": 0.25,
                              "f1_stderr,strict": 0.1}},
            "n-samples": {"a": {"original": 9, "effective": 4}}, "n-shot": {"a": 2}, "versions": {"a": 1.0},
            "configs": {"a": {"process_docs": len, "list": (1, None)}},
        }
    )  # fmt: skip
    assert [(one.metric, one.filter, one.value, one.standard_error) for one in found.metrics] == [
        ("acc", "none", 0.5, None), ("f1", "strict", 0.25, 0.1),
    ]  # fmt: skip
    assert {(one.num_questions, one.num_fewshot, one.version) for one in found.metrics} == {(4, 2, "1.0")}
    assert found.harness["configs"] == {"a": {"process_docs": "len", "list": [1, None]}}
