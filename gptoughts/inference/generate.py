"""``launchers/generate.py``: answer prompts with a model of any family; the answers alone go to stdout."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from gptoughts.errors import CheckpointError, ConfigError, DataError
from gptoughts.inference.answers import FillingAnswerer
from gptoughts.inference.generate_flags import build_parser, command_for
from gptoughts.inference.ways import WAYS, way_of
from gptoughts.models.family import Family
from gptoughts.models.registry import FAMILIES

if TYPE_CHECKING:
    from gptoughts.inference.answers import Answerer
    from gptoughts.inference.chat import ChatTemplate
    from gptoughts.inference.loading import LoadedModel

INTERRUPTED_STATUS = 130
"""Exit status after Ctrl-C, as shells have it."""


def family_of(checkpoint: Path) -> Family:
    """The family of a checkpoint, run or Hugging Face folder; reads no weights.

    Raises:
        CheckpointError: there is none at the path, or its family is unknown.
    """
    from gptoughts.checkpoint import layout
    from gptoughts.checkpoint.huggingface.formats import is_huggingface, read_published

    if is_huggingface(checkpoint):
        return FAMILIES[read_published(checkpoint).format.family]
    folder = layout.locate(checkpoint)
    name = layout.read_manifest(folder).get("model", {}).get("model_type", "")
    if name not in FAMILIES:
        raise CheckpointError(f"{folder}: model_type={name!r}: unknown family; built are: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status.

    Raises:
        GptoughtsError: whatever the user can mend.
    """
    arguments = build_parser(FAMILIES).parse_args(argv)
    # Checked before torch loads: a mistake should cost no seconds.
    texts = _read_prompts(arguments)
    family = family_of(arguments.checkpoint)
    command = command_for(family, vars(arguments), FAMILIES, len(texts))
    try:
        return _run(arguments, texts, family, command)
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS


def _read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Texts of all prompts that the command line names.

    Raises:
        ConfigError: flags that contradict each other.
        DataError: a prompt is empty, or the file is not as it should be; names the line.
    """
    in_place = [way.prompt_field for way in WAYS.values() if way.prompt_field is not None]
    sources = ["prompt", "prompts_file", "interactive", *in_place]
    stated = [name for name in sources if vars(arguments).get(name) not in (None, False)]
    problems = []
    if len(stated) != 1:
        said = " and ".join(stated) or "none"
        problems.append(f"{', '.join(sources)} (command line): exactly one of them is needed, not {said}")
    if arguments.chat and set(stated) & set(in_place):
        problems.append(f"chat=true (command line): contradicts {' and '.join(in_place)}, which is no conversation")
    if arguments.system is not None and not arguments.chat:
        problems.append(f"system={arguments.system} (command line): only with --chat")
    if arguments.interactive and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("interactive=true (command line): a terminal belongs to one rank; start one")
    if problems:
        raise ConfigError(problems)
    if arguments.prompt == "":
        raise DataError("prompt='' (command line): is empty; give at least one character")
    if arguments.prompts_file is not None:
        return _read_file(arguments.prompts_file)
    return [arguments.prompt] if arguments.prompt is not None else []


def _read_file(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    texts, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            text = None
        if isinstance(text, str) and text:
            texts.append(text)
        else:
            problems.append(f'{file}, line {number}: not {{"prompt": TEXT}} with a text that is not empty')
    if not texts and not problems:
        problems.append(f"{file}: holds no prompt")
    if problems:
        raise DataError(problems)
    return texts


def _run(arguments: argparse.Namespace, texts: list[str], family: Family, command: Any) -> int:
    from gptoughts.platform.startup import prepare_process

    prepare_process()
    from gptoughts.inference.loading import load_model

    way = way_of(family)
    loaded = load_model(arguments.checkpoint, precision=arguments.precision)
    template = None
    if arguments.chat:
        from gptoughts.inference.chat import PLAIN_STOP, ChatTemplate

        template = ChatTemplate(loaded.tokenizer, loaded.checkpoint)
        if template.is_plain and hasattr(command, "stop"):
            from dataclasses import replace

            command = replace(command, stop=(*command.stop, PLAIN_STOP))
    answerer = way.load(loaded, command)
    if arguments.interactive:
        _interact(arguments, loaded, answerer, template)
        return 0
    if not texts:
        _write(cast(FillingAnswerer, answerer).fill() + "\n")
        return 0
    system = [{"role": "system", "content": arguments.system}] if arguments.system is not None else []
    if template is not None:
        prompts = [template.encode([*system, {"role": "user", "content": text}]) for text in texts]
    else:
        prompts = [loaded.tokenizer.encode(text) for text in texts]
    if problems := answerer.problems(prompts):
        raise DataError(problems)
    if arguments.prompts_file is not None:
        _answer_file(answerer, texts, prompts)
    else:
        _answer_one(answerer, prompts[0], None if arguments.chat else texts[0])
    return 0


def _interact(
    arguments: argparse.Namespace, loaded: LoadedModel, answerer: Answerer, template: ChatTemplate | None
) -> None:
    from gptoughts.inference.session import Conversation, run_session

    conversation = Conversation(template, answerer, arguments.system) if template is not None else None
    run_session(answerer, loaded.tokenizer.encode, conversation)


def _answer_one(answerer: Answerer, prompt: list[int], shown: str | None) -> None:
    """Stream an answer to stdout; on a terminal it stands behind its prompt, which goes to stderr."""
    if shown is not None and sys.stderr.isatty():
        _write(shown, sys.stderr)
    for piece in answerer.stream(prompt):
        _write(piece)
    _write("\n")


def _answer_file(answerer: Answerer, texts: list[str], prompts: list[list[int]]) -> None:
    """A line of JSON on stdout for each prompt."""
    for text, answer in zip(texts, answerer.answer_all(prompts), strict=True):
        line = {"prompt": text, "answer": answer.text, "end_reason": answer.end_reason}
        _write(json.dumps(line, ensure_ascii=False) + "\n")


def _write(text: str, where: TextIO | None = None) -> None:
    """To stdout, from the first rank alone."""
    from gptoughts.parallel import groups

    if groups.rank() == 0:
        print(text, end="", flush=True, file=where)
