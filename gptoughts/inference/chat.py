"""Conversations as prompts: the tokenizer's chat template, or a plain one where it has none.

A template is Jinja, as Hugging Face publishes it; it comes with a checkpoint and is code of its author, so it runs in
Jinja's sandbox and reaches nothing but the messages and the special tokens' names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.huggingface.output import CARRIED_FOLDER
from gptoughts.data.tokenizer import Tokenizer
from gptoughts.errors import DataError

TEMPLATE_FILE = "chat_template.jinja"
PLAIN_TEMPLATE = """\
{%- for message in messages %}{{ message.role | capitalize }}: {{ message.content }}{{ eot_token }}

{% endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""
"""For tokenizers that have none."""
PLAIN_STOP = "\n\nUser:"
"""Where an answer under the plain template ends if the model goes on speaking for both."""

Message = Mapping[str, str]
"""``role`` ("system", "user", "assistant") and ``content``."""


class ChatTemplate:
    """Turns conversations into token ids.

    Args:
        tokenizer: Whose special tokens the template names.
        folder: Checkpoint or Hugging Face folder that may hold a template.
    Raises:
        DataError: the template cannot be read or is no Jinja; names the file.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        self.tokenizer = tokenizer
        found = _find_template(folder)
        self.is_plain = found is None
        """Whether there was none."""
        self.source, text = found or ("the plain template", PLAIN_TEMPLATE)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        self._special = _special_tokens(tokenizer, folder)
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise DataError(f"{self.source}: no chat template ({error})") from None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Raises:
            DataError: the template refuses the conversation, or fails; says why.
        """
        try:
            text = self._template.render(messages=list(messages), add_generation_prompt=True, **self._special)
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{self.source}: cannot write this conversation ({error})") from None
        return self.tokenizer.encode(text, allow_special=True)


def _refuse(message: str) -> NoReturn:
    """What templates call on conversations that they cannot write."""
    raise TemplateError(message)


def _find_template(folder: Path) -> tuple[str, str] | None:
    """Where a template was found, and it."""
    for place in (folder, folder / CARRIED_FOLDER):
        file = place / TEMPLATE_FILE
        if file.is_file():
            return str(file), file.read_text(encoding="utf-8")
        named = _config(place).get("chat_template")
        if isinstance(named, list):  # several, of which one is the usual
            named = next((one.get("template") for one in named if one.get("name") == "default"), None)
        if isinstance(named, str):
            return str(place / layout.TOKENIZER_CONFIG), named
    return None


def _config(folder: Path) -> dict[str, Any]:
    file = folder / layout.TOKENIZER_CONFIG
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not a JSON object ({error})") from None
    return found if isinstance(found, dict) else {}


def _special_tokens(tokenizer: Tokenizer, folder: Path) -> dict[str, str]:
    """``bos_token`` and the like, as templates name them; empty text where the tokenizer has none."""
    names = {f"{role}_token": "" for role in ("bos", "eos", "eot", "unk", "pad")}
    for role, token_id in tokenizer.special_ids().items():
        names[f"{role}_token"] = tokenizer.backend.id_to_token(token_id) or ""
    for name, value in _config(folder).items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            names[name] = text
    return names
