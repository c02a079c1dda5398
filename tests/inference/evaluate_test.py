"""``launchers/evaluate.py``: corpora against training's validation, transformers and brute force; what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gptoughts.data import preprocess
from gptoughts.data.tokenizer import load_tokenizer
from gptoughts.errors import GptoughtsError
from gptoughts.inference import evaluate
from gptoughts.inference.evaluation_texts import windows
from tests.checkpoint.huggingface.conftest import Publish, publish, tokenizer_folder  # noqa: F401
from tests.distributed import run_distributed
from tests.harness import SEQUENCE, TEXT
from tests.inference.saved_toy import save_toy, validation_loss

NUM_DOCUMENTS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:  # noqa: F811
    """The licence's first paragraphs, one document each."""
    folder = tmp_path_factory.mktemp("evaluated")
    documents = TEXT.read_text().split("\n\n")[:NUM_DOCUMENTS]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    preprocess.main(
        ["--input", str(folder / "text.jsonl"), "--tokenizer", str(tokenizer_folder), "--output_prefix",
         str(folder / "text"), "--append_eod", "--workers", "1"]
    )  # fmt: skip
    return folder / "text"


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint and its validation loss, nats per token."""

    checkpoint: str
    validation_loss: float


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> dict[str, Saved]:  # noqa: F811
    found = {}
    for family in ("gpt", "llada"):
        folder = str(tmp_path_factory.mktemp(f"saved-{family}"))
        (checkpoint,) = run_distributed(save_toy, 1, family, folder, str(tokenizer_folder))
        (loss,) = run_distributed(validation_loss, 1, family, folder, str(corpus))
        found[family] = Saved(checkpoint, loss)
    return found


def call(arguments: list[str]) -> tuple[str, list[str]]:
    """What the program prints on this rank, and the problems that it ends on."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            assert evaluate.main(arguments) == 0
    except GptoughtsError as error:
        return out.getvalue(), error.problems
    return out.getvalue(), []


def measure(tmp_path: Path, *arguments: str, ranks: int = 1) -> dict[str, Any]:
    file = tmp_path / "found.json"
    (said, problems), *others = run_distributed(call, ranks, [*arguments, "--output", str(file)])
    assert problems == []
    assert f"results {file}" in said
    assert all(other == ("", []) for other in others), "rank 0 speaks"
    return json.loads(file.read_text())


def figures(corpus: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in corpus.items() if name != "data"}


def test_rows_have_the_validation_loss_of_training(saved: dict[str, Saved], corpus: Path, tmp_path: Path) -> None:
    one = saved["gpt"]
    found = measure(tmp_path, "--checkpoint", one.checkpoint, "--data", str(corpus))
    assert found["method"] == "exact"
    (rows,) = found["corpora"]
    assert rows["nats_per_token"] == pytest.approx(one.validation_loss, rel=1e-5)
    assert rows["nats_per_token_standard_error"] == 0
    assert rows["num_tokens"] == rows["num_texts"] * SEQUENCE
    assert rows["perplexity"] == pytest.approx(math.exp(one.validation_loss), rel=1e-4)
    nats = rows["nats_per_token"] * rows["num_tokens"]
    assert rows["bits_per_byte"] == pytest.approx(nats / math.log(2) / rows["num_bytes"])
    for tensor in (1, 2):
        other = measure(
            tmp_path, "--checkpoint", one.checkpoint, "--data", str(corpus), f"--parallel.tensor={tensor}",
            "--batch_size=1", ranks=2,
        )  # fmt: skip
        assert figures(other["corpora"][0]) == pytest.approx(figures(rows), rel=1e-5)


def test_the_bound_agrees_with_the_validation_loss(saved: dict[str, Saved], corpus: Path, tmp_path: Path) -> None:
    one = saved["llada"]
    found = measure(tmp_path, "--checkpoint", one.checkpoint, "--data", f"{corpus}.idx", "--num_samples=8")
    (rows,) = found["corpora"]
    assert (found["method"], found["num_samples"], found["seed"]) == ("monte_carlo", 8, 0)
    assert 0 < rows["nats_per_token_standard_error"] < 0.1
    # Training's own figure has noise too: one mask per row.
    assert rows["nats_per_token"] == pytest.approx(one.validation_loss, abs=0.4)
    other = measure(
        tmp_path, "--checkpoint", one.checkpoint, "--data", str(corpus), "--num_samples=8", "--batch_size=1", ranks=2
    )
    assert figures(other["corpora"][0]) == pytest.approx(figures(rows), rel=1e-5)
    seeded = measure(tmp_path, "--checkpoint", one.checkpoint, "--data", str(corpus), "--num_samples=8", "--seed=5")
    assert seeded["corpora"][0]["nats_per_token"] != rows["nats_per_token"]
    chain = measure(
        tmp_path, "--checkpoint", one.checkpoint, "--data", str(corpus), "--method=chain_rule", "--texts=1"
    )  # fmt: skip
    assert chain["num_samples"] is None
    assert chain["corpora"][0]["num_texts"] == 1
    assert chain["corpora"][0]["nats_per_token_standard_error"] == 0


def test_windows_score_each_token_once_with_its_past() -> None:
    tokens = list(range(30))
    for block_size, stride in ((8, 8), (8, 3), (8, 1), (29, 5), (100, 7)):
        found = windows(tokens, block_size, stride)
        assert [token for one in found for token in one.answer_ids] == tokens[1:]
        for number, one in enumerate(found):
            start = one.answer_ids[0]
            assert list(one.prompt_ids) == tokens[start - len(one.prompt_ids) : start]
            assert len(one.prompt_ids) + len(one.answer_ids) - 1 <= block_size
            assert number == 0 or len(one.prompt_ids) > block_size - stride
        assert len(found[0].answer_ids) == min(29, block_size)
    assert windows([5], 8, 8) == []


def by_transformers(folder: Path, prefix: Path, block_size: int, stride: int) -> tuple[float, int]:
    """Nats of all documents in overlapping windows, and tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16).astype(np.int64)
    ends = np.flatnonzero(tokens == 0) + 1
    nats = 0.0
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        document = torch.tensor([0, *tokens[start:stop]])
        scored = 0
        while scored < len(document) - 1:
            upto = min(len(document) - 1, block_size if scored == 0 else scored + stride)
            seen = document[max(0, upto - block_size) : upto]
            with torch.no_grad():
                log_probs = model(seen[None]).logits[0].double().log_softmax(-1)
            count = upto - scored
            nats -= float(log_probs[-count:].gather(1, document[scored + 1 : upto + 1, None]).sum())
            scored = upto
    return nats, len(tokens)


def test_documents_of_a_hugging_face_model_in_overlapping_windows(
    publish: Publish, corpus: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    source = publish("llama", dtype=torch.float32)
    found = measure(
        tmp_path, "--checkpoint", str(source), "--data", str(corpus), "--stride=20", "--block_size=48", ranks=2
    )
    nats, num_tokens = by_transformers(source, corpus, 48, 20)
    (documents,) = found["corpora"]
    assert documents["num_tokens"] == num_tokens
    assert documents["num_texts"] == NUM_DOCUMENTS
    assert documents["nats_per_token"] == pytest.approx(nats / num_tokens, rel=1e-5)
    assert documents["num_bytes"] == sum(len(one.encode()) for one in TEXT.read_text().split("\n\n")[:NUM_DOCUMENTS])


def test_mistakes_are_seen_before_any_weight(
    saved: dict[str, Saved], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt, llada = ("--checkpoint", saved["gpt"].checkpoint), ("--checkpoint", saved["llada"].checkpoint)
    data = ("--data", str(corpus))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cases: list[tuple[tuple[str, ...], list[str]]] = [
        ((*gpt,), ["nothing to evaluate"]),
        ((*gpt, *data, "--batchsize=3"), ["unrecognized arguments: --batchsize=3 (command line)"]),
        ((*gpt, *data, "--limit=4", "--num_fewshot=-1"), ["limit=4", "num_fewshot=-1", "needs --tasks"]),
        ((*gpt, "--tasks=x", "--task_folder=/nowhere", "--stride=3"), ["/nowhere", "stride=3 (command line): needs"]),
        ((*gpt, "--tasks=x"), ["needs the package 'lm-eval'"]),
        (("--checkpoint", str(tmp_path), *data), ["holds no checkpoint", "nor is there a Hugging Face folder"]),
        ((*gpt, "--data", "/nowhere/text"), ["data=/nowhere/text: no corpus"]),
        ((*gpt, *data, "--num_samples=4", "--seed=1"), ["num_samples=4", "seed=1"]),
        ((*llada, *data, "--stride=4", "--num_samples=3"), ["num_samples=3", "stride=4"]),
        ((*llada, *data, "--method=chain_rule", "--num_samples=4"), ["num_samples=4"]),
        ((*gpt, *data, "--batch_size=0", "--texts=0", "--stride=0"), ["batch_size=0", "texts=0", "stride=0"]),
        ((*gpt, *data, "--output", str(tmp_path)), ["is a folder"]),
        ((*gpt, *data, "--output", "/nowhere/found.json"), ["there is no folder /nowhere"]),
        ((*gpt, *data, "--parallel.tensor=3"), ["world size 1 is not divisible", "num_attention_heads"]),
    ]
    for arguments, expected in cases:
        said, problems = call(list(arguments))
        assert said == ""
        for text in expected:
            assert any(text in problem for problem in problems), (text, problems)


def test_what_only_the_model_knows_is_said(
    saved: dict[str, Saved], corpus: Path, tmp_path: Path, tokenizer_folder: Path  # noqa: F811
) -> None:  # fmt: skip
    gpt = ("--checkpoint", saved["gpt"].checkpoint)

    def refused(*arguments: str) -> list[str]:
        ((said, problems),) = run_distributed(call, 1, [*gpt, *arguments])
        assert said == ""
        return problems

    (problem,) = refused("--data", str(corpus), "--block_size=1000")
    assert "block_size=1000" in problem
    assert f"{SEQUENCE} tokens" in problem
    (problem,) = refused("--data", str(corpus), "--stride=70")
    assert "stride=70" in problem

    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": "the cat"}\n')
    preprocess.main(
        ["--input", str(empty), "--tokenizer", str(tokenizer_folder), "--output_prefix", str(tmp_path / "short"),
         "--append_eod", "--workers", "1"]
    )  # fmt: skip
    (problem,) = refused("--data", str(tmp_path / "short"))
    assert "fewer than one sample of 65" in problem
    Path(f"{tmp_path / 'short'}.bin").write_bytes(b"")
    (problem,) = refused("--data", str(tmp_path / "short"), "--stride=8")
    assert "truncated" in problem


def test_a_corpus_of_another_tokenizer_is_refused(
    saved: dict[str, Saved], corpus: Path, tmp_path: Path, tokenizer_folder: Path  # noqa: F811
) -> None:  # fmt: skip
    other = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    copy = tmp_path / "text"
    for suffix in (".bin", ".idx", ".json"):
        Path(f"{copy}{suffix}").write_bytes(Path(f"{corpus}{suffix}").read_bytes())
    folder = tmp_path / json.loads(Path(f"{copy}.json").read_text())["tokenizer"]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(other))
    assert load_tokenizer(folder).vocab_size == 270
    ((_, (problem,)),) = run_distributed(call, 1, ["--checkpoint", saved["gpt"].checkpoint, "--data", str(copy)])
    assert "gives other ids than the model's" in problem
    assert "'a'" in problem or "'b'" in problem


def test_a_checkpoint_without_a_tokenizer_is_refused(saved: dict[str, Saved], corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_00000000"
    folder.mkdir()
    for file in Path(saved["gpt"].checkpoint).iterdir():
        if not file.name.startswith("tokenizer"):
            (folder / file.name).write_bytes(file.read_bytes())
    _, (problem,) = call(["--checkpoint", str(folder), "--data", str(corpus)])
    assert "carries no tokenizer.json" in problem
