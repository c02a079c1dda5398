"""Our models under the real lm-evaluation-harness: local tasks with no network, and its own model class as the peer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval (pip install -e '.[eval]')")

from tests.checkpoint.huggingface.conftest import Publish, publish, tokenizer_folder  # noqa: F401
from tests.distributed import run_distributed
from tests.inference.evaluate_test import call
from tests.inference.saved_toy import save_toy

QUESTIONS = (
    {"question": "the cat sat on the", "choices": [" mat", " log on the dog", "!"], "answer": 0},
    {"question": "the dog", "choices": [" sat", " the"], "answer": 1},
    {"question": "on the ", "choices": ["log", "mat and the cat"], "answer": 0},
)
LONG = "the cat sat on the mat and the dog sat on the log\n" * 4
_DATA = (
    "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
    "metadata: {{version: 1.0}}\n"
)
TASKS = {
    "toy_choice": (
        "choice.jsonl",
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        'target_delimiter: ""\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n',
    ),
    "toy_text": (
        "text.jsonl",
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]\n",
    ),
    "toy_answer": (
        "choice.jsonl",
        'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{choices[answer]}}"\n'
        'generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 6}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "choice.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (folder / "text.jsonl").write_text(json.dumps({"text": LONG}) + "\n" + json.dumps({"text": "the cat"}) + "\n")
    for name, (file, content) in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n" + _DATA.format(file=file) + content)
    (folder / "toy_missing.yaml").write_text(
        "task: toy_missing\n" + _DATA.format(file="nowhere.jsonl") + TASKS["toy_choice"][1]
    )
    return folder


@pytest.mark.parametrize("family", ["gpt", "mla", "deepseek", "llada"])
def test_every_family_answers_local_tasks(family: str, tasks: Path, tokenizer_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    (checkpoint,) = run_distributed(save_toy, 1, family, str(tmp_path / "run"), str(tokenizer_folder))
    found = {}
    extra = ["--num_samples=4"] if family == "llada" else []
    for ranks in (1, 2):
        file = tmp_path / f"found-{ranks}.json"
        arguments = ["--checkpoint", checkpoint, "--tasks", ",".join(TASKS), "--task_folder", str(tasks),
                     "--output", str(file), *extra]  # fmt: skip
        (said, problems), *_ = run_distributed(call, ranks, arguments)
        assert problems == []
        assert all(name in said for name in TASKS)
        found[ranks] = json.loads(file.read_text())
    assert [one["task"] for one in found[1]["tasks"]] == list(TASKS)
    assert [one["num_questions"] for one in found[1]["tasks"]] == [3, 2, 3]
    assert found[1]["tasks"][1]["value"] > 3, "an untrained model knows nothing"
    for one, other in zip(found[1]["tasks"], found[2]["tasks"], strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-5)
    assert found[1]["lm_eval"]["configs"]["toy_choice"]["output_type"] == "multiple_choice"


def both_models(folder: str) -> dict[str, tuple[Any, Any]]:
    """What ours and the harness's own class answer to the same requests."""
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from gptoughts.inference.lm_eval_adapter import GptoughtsLM

    ours = GptoughtsLM(folder, batch_size=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = HFLM(pretrained=peer, tokenizer=tokenizer, max_length=ours.max_length, batch_size=1, device="cpu")
    pairs = [(one["question"], choice) for one in QUESTIONS for choice in one["choices"]]
    asked = {
        "loglikelihood": [*pairs, ("", "the cat sat")],
        "loglikelihood_rolling": [(LONG,), ("the cat",)],
        "generate_until": [
            (one["question"], {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}) for one in QUESTIONS
        ],
    }
    found = {}
    for kind, arguments in asked.items():
        answers = []
        for model in (ours, theirs):
            requests = [
                Instance(request_type=kind, doc={}, arguments=one, idx=0)
                for one in arguments  # type: ignore[arg-type]
            ]
            answers.append(getattr(model, kind)(requests))
        found[kind] = (answers[0], answers[1])
    return found


def test_the_harness_finds_the_same_with_its_own_class(publish: Publish) -> None:  # noqa: F811
    # As many entries as the tokenizer: of ids without a text the peer says nothing, and we never say them.
    source = publish("llama", dtype=torch.float32, vocab_size=270)
    (found,) = run_distributed(both_models, 1, str(source))
    ours, theirs = found["loglikelihood"]
    assert [one[0] for one in ours] == pytest.approx([one[0] for one in theirs], rel=1e-4)
    assert [one[1] for one in ours] == [one[1] for one in theirs]
    ours, theirs = found["loglikelihood_rolling"]
    assert ours == pytest.approx(theirs, rel=1e-4)
    # Ours ends at an end-of-turn token too, and leaves halves of characters out.
    pairs = [(one, other.replace("\ufffd", "")) for one, other in zip(*found["generate_until"], strict=True)]
    assert all(other.startswith(one) for one, other in pairs)
    assert sum(one == other != "" for one, other in pairs) >= 2


def test_what_cannot_be_asked_is_said(tasks: Path, tokenizer_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    (checkpoint,) = run_distributed(save_toy, 1, "gpt", str(tmp_path / "run"), str(tokenizer_folder))
    common = ["--checkpoint", checkpoint, "--task_folder", str(tasks)]

    def refused(*arguments: str) -> list[str]:
        ((said, problems),) = run_distributed(call, 1, [*common, *arguments])
        assert said == ""
        return problems

    (problem,) = refused("--tasks", "toy_chioce")
    assert "tasks=toy_chioce (command line): no such task; did you mean toy_choice" in problem
    (problem,) = refused("--tasks", "toy_missing")
    assert "task toy_missing: its description or data cannot be read" in problem
    assert "nowhere.jsonl" in problem
    (problem,) = refused("--tasks", "toy_answer", "--gen_kwargs", "num_beams=4")
    assert "num_beams=4: family gpt has no such option" in problem


def test_prompts_longer_than_the_context(tasks: Path, tokenizer_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    (checkpoint,) = run_distributed(save_toy, 1, "gpt", str(tmp_path / "run"), str(tokenizer_folder))
    folder = tmp_path / "long"
    folder.mkdir()
    (folder / "choice.jsonl").write_text(json.dumps(QUESTIONS[0] | {"question": LONG}) + "\n")
    for name in ("toy_choice", "toy_answer"):
        (folder / f"{name}.yaml").write_text((tasks / f"{name}.yaml").read_text())
    arguments = ["--checkpoint", checkpoint, "--task_folder", str(folder)]
    ((_, (problem,)),) = run_distributed(call, 1, [*arguments, "--tasks", "toy_choice"])
    assert "3 of 3 requests do not fit into the model's context of 64 tokens" in problem
    assert "--truncate_prompts" in problem
    ((said, problems),) = run_distributed(
        call, 1, [*arguments, "--tasks", "toy_choice,toy_answer", "--truncate_prompts"]
    )
    assert problems == []
    assert "toy_answer" in said
