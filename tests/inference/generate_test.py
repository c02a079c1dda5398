"""The program that answers prompts: what goes to stdout, and what cannot be asked."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.checkpoint.huggingface.formats import SINGLE_FILE
from gptoughts.errors import GptoughtsError
from gptoughts.inference import generate
from tests.checkpoint.huggingface.conftest import Publish, publish, tokenizer_folder  # noqa: F401
from tests.distributed import run_distributed

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('who?') }}{% endif %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def answers(*commands: list[str]) -> list[tuple[str, str]]:
    """(stdout, stderr) of each command."""
    said = []
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert generate.main(command) == 0
        said.append((out.getvalue(), err.getvalue()))
    return said


def greedy(folder: str, prompts: list[str], count: int) -> list[str]:
    from gptoughts.inference.autoregressive import BatchGenerator, Request
    from gptoughts.inference.loading import load_model
    from gptoughts.inference.sampling_options import SamplingOptions

    loaded = load_model(Path(folder))
    found = []
    for prompt in prompts:
        request = Request(loaded.tokenizer.encode(prompt), SamplingOptions(count, temperature=0))
        list(BatchGenerator(loaded.model, vocab_size=270, context_tokens=64, end_ids=(0, 1)).run([request]))
        found.append(loaded.tokenizer.decode(request.new_ids, skip_special=True).replace("\ufffd", ""))
    return found


def test_the_answer_alone_goes_to_stdout(publish: Publish, tmp_path: Path) -> None:  # noqa: F811
    folder, queue = str(publish("llama", dtype=torch.float32)), tmp_path / "queue.jsonl"
    texts = ["the cat", "the dog sat on", "mat"]
    queue.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    common = [f"--checkpoint={folder}", "--max_new_tokens=12", "--temperature=0"]
    ((one, many, drawn, again),), (expected,) = (
        run_distributed(
            answers, 1,
            [*common, "--prompt=the cat"], [*common, f"--prompts_file={queue}", "--batch_rows=2"],
            [*common[:2], "--prompt=the cat", "--top_k=50", "--seed=3"],
            [*common[:2], "--prompt=the cat", "--top_k=50", "--seed=3"],
        ),
        run_distributed(greedy, 1, folder, texts, 12),
    )  # fmt: skip
    assert one == (expected[0] + "\n", "")
    lines = [json.loads(line) for line in many[0].splitlines()]
    assert [line["prompt"] for line in lines] == texts
    assert [line["answer"] for line in lines] == expected
    assert {line["end_reason"] for line in lines} <= {"length", "end"}
    assert drawn == again != one


def test_chat_puts_a_prompt_into_the_template(publish: Publish) -> None:  # noqa: F811
    folder = publish("llama", dtype=torch.float32)
    prompts = [
        "System: be kind<|eot_id|>\n\nUser: the cat<|eot_id|>\n\nAssistant:",
        "[user]the cat<|endoftext|>[assistant]",
    ]
    common = [f"--checkpoint={folder}", "--chat", "--prompt=the cat", "--max_new_tokens=8", "--temperature=0"]
    (((plain, _),),) = run_distributed(answers, 1, [*common, "--system=be kind"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|endoftext|>"}))
    (((templated, _),),) = run_distributed(answers, 1, common)
    (expected,) = run_distributed(greedy_of_special, 1, str(folder), prompts)
    assert [plain, templated] == expected


def greedy_of_special(folder: str, prompts: list[str]) -> list[str]:
    """Greedy answers to prompts whose special tokens are meant."""
    from gptoughts.inference.loading import load_model
    from gptoughts.inference.next_token_answers import NextTokenAnswerer
    from gptoughts.inference.sampling_options import NextTokenCommand

    loaded = load_model(Path(folder))
    answerer = NextTokenAnswerer(loaded, NextTokenCommand(8, temperature=0))
    ids = [loaded.tokenizer.encode(prompt, allow_special=True) for prompt in prompts]
    return [answer.text + "\n" for answer in answerer.answer_all(ids)]


def problems_of(commands: list[list[str]]) -> list[list[str]]:
    found = []
    for command in commands:
        with pytest.raises(GptoughtsError) as caught:
            generate.main(command)
        found.append(caught.value.problems)
    return found


def test_what_cannot_be_answered_is_said(publish: Publish, tmp_path: Path) -> None:  # noqa: F811
    folder = publish("llama", dtype=torch.float32)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"prompt": "a"}\n{"prompt": ""}\nnothing\n')
    at = f"--checkpoint={folder}"
    cases: list[tuple[list[str], list[str]]] = [
        ([at, "--prompt="], ["prompt='' (command line): is empty"]),
        ([at], ["prompt, prompts_file, interactive, infill (command line): exactly one of them is needed, not none"]),
        ([at, "--prompt=a", "--interactive"], ["not prompt and interactive"]),
        ([at, "--prompt=a", "--system=b"], ["system=b (command line): only with --chat"]),
        ([at, f"--prompts_file={wrong}"], [f"{wrong}, line 2: not", f"{wrong}, line 3: not"]),
        ([at, f"--prompts_file={tmp_path}/none"], ["cannot be read"]),
        (
            [at, "--prompt=a", "--steps=3", "--top_p=2", "--temperature=-1"],
            ["steps=3 (command line): family gpt (Llama-style decoder) has no such option; it has: max_new_tokens",
             "temperature=-1.0 (command line): 0", "top_p=2.0 (command line): greater than 0"],
        ),
        ([at, "--prompt=a", "--speculative"], ["speculative=True (command line): this model of the family gpt has no"]),
        ([at, "--prompt=" + "the cat sat " * 40], ["prompt 1: ", "the model's context is 64 tokens"]),
        ([f"--checkpoint={tmp_path}/none", "--prompt=a"], ["no such checkpoint"]),
    ]  # fmt: skip
    (found,) = run_distributed(problems_of, 1, [command for command, _ in cases])
    for problems, (command, expected) in zip(found, cases, strict=True):
        for text in expected:
            assert text in "\n".join(problems), command
    tokenizer = folder / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["vocab"] |= {f"<{number}>": number for number in range(270, 1000)}
    own, _ = tokenizer.read_text(), tokenizer.write_text(json.dumps(content))
    ((larger,),) = run_distributed(problems_of, 1, [[at, "--prompt=a"]])
    assert "1000 tokens, but the model's embedding has" in larger[0]
    tokenizer.write_text(own)
    weights = folder / SINGLE_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    ((cut,),) = run_distributed(problems_of, 1, [[at, "--prompt=a"]])
    assert f"{weights}: cannot be read" in cut[0]
    (folder / "tokenizer.json").unlink()
    ((bare,),) = run_distributed(problems_of, 1, [[at, "--prompt=a"]])
    assert bare == [f"{folder}: carries no tokenizer.json, so prompts cannot be read"]


def two_ranks(folder: str) -> tuple[str, list[str]]:
    ((said, _),) = answers([f"--checkpoint={folder}", "--prompt=the cat", "--max_new_tokens=6", "--temperature=0.9"])
    with pytest.raises(GptoughtsError) as caught:
        generate.main([f"--checkpoint={folder}", "--interactive"])
    return said, caught.value.problems


def test_two_ranks_answer_once(publish: Publish) -> None:  # noqa: F811
    folder = str(publish("llama", dtype=torch.float32))
    first, second = run_distributed(two_ranks, 2, folder)
    assert len(first[0]) > 1
    assert second[0] == ""
    assert "a terminal belongs to one rank" in first[1][0]


class Speaker:
    """Says given pieces; Ctrl-C comes where a piece is None."""

    def __init__(self, *said: list[Any], context: int = 1000) -> None:
        self.said, self.heard, self.context = list(said), [], context

    def problems(self, prompts: list[list[int]]) -> list[str]:
        return ["too long"] if any(len(prompt) > self.context for prompt in prompts) else []

    def stream(self, prompt: list[int]) -> Any:
        self.heard.append(prompt)
        for piece in self.said.pop(0):
            if piece is None:
                signal.raise_signal(signal.SIGINT)
            yield piece or ""


class Terminal:
    """Gives lines; raises what is no line."""

    def __init__(self, *lines: Any) -> None:
        self.lines = [*lines, EOFError]

    def __call__(self) -> str:
        line = self.lines.pop(0)
        if isinstance(line, str):
            return line
        raise line


def conversation(speaker: Speaker, folder: Path) -> Any:
    from gptoughts.data.tokenizer import load_tokenizer
    from gptoughts.inference.chat import ChatTemplate
    from gptoughts.inference.session import Conversation

    return Conversation(ChatTemplate(load_tokenizer(folder), folder), speaker)


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Python's own handler: a shell starts what it puts into the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_a_session_goes_on_after_an_interrupted_answer(
    tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    from gptoughts.inference.session import run_session

    speaker = Speaker(["Hel", "lo"], ["I am", None, " never said"], ["bye"])
    talk = conversation(speaker, tokenizer_folder)
    run_session(speaker, list, talk, read=Terminal("hi", "", KeyboardInterrupt, "who are you?", "well?"))
    out, err = capsys.readouterr()
    assert out == "Hello\nI am\nbye\n"
    assert "Ctrl-C ends an answer" in err
    assert [message["content"] for message in talk.messages] == ["hi", "Hello", "who are you?", "I am", "well?", "bye"]
    heard = talk.template.tokenizer.decode(speaker.heard[-1])
    assert heard.index("Assistant: Hello") < heard.index("User: who are you?") < heard.index("Assistant: I am")


def test_a_conversation_forgets_its_oldest_turns(
    tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    from gptoughts.inference.session import run_session

    speaker = Speaker(["one"], ["two"], ["three"], ["four"], context=45)
    talk = conversation(speaker, tokenizer_folder)
    run_session(speaker, list, talk, read=Terminal("the cat", "the dog", "x" * 100, "the mat", "/reset", "the log"))
    out, err = capsys.readouterr()
    assert out == "one\ntwo\nthree\nfour\n"
    assert "too long" in err
    assert "no longer fit" in err
    heard = [talk.template.tokenizer.decode(prompt) for prompt in speaker.heard]
    assert "the cat" not in heard[2]
    assert "the mat" not in heard[3], "forgotten on request"


def test_templates_that_are_none(tokenizer_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    from gptoughts.data.tokenizer import load_tokenizer
    from gptoughts.inference.chat import ChatTemplate

    tokenizer = load_tokenizer(tokenizer_folder)
    for name, text, expected in (
        ("chat_template.jinja", "{% for", "no chat template"),
        ("chat_template.jinja", "{{ messages.nothing.at_all }}", "cannot write this conversation"),
        ("chat_template.jinja", "{{ raise_exception('only the user speaks') }}", "only the user speaks"),
        ("chat_template.jinja", "{{ ''.__class__.__mro__ }}", "cannot write this conversation"),
        ("tokenizer_config.json", "{", "not a JSON object"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(GptoughtsError, match=expected):
            ChatTemplate(tokenizer, folder).encode([{"role": "user", "content": "hi"}])
