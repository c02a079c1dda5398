"""A terminal session with a model: ask, see the answer come, ask again; Ctrl-C ends an answer, Ctrl-D the session.

What the user reads as the answer goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field

from gptoughts.errors import DataError, GptoughtsError
from gptoughts.inference.answers import Answerer
from gptoughts.inference.chat import ChatTemplate

PROMPT = "> "
HELP = "Ctrl-C ends an answer, Ctrl-D the session; /reset forgets the conversation."


@dataclass
class Conversation:
    """What has been said; turns that no longer fit into the model's context are forgotten, the oldest first."""

    template: ChatTemplate
    answerer: Answerer
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> list[int]:
        """Add what the user says; returns the prompt.

        Raises:
            DataError: the template cannot write it, or it is too long by itself.
        """
        kept = [*self.messages, {"role": "user", "content": text}]
        while problems := self.answerer.problems([prompt := self.template.encode(self._all(kept))]):
            if len(kept) == 1:
                raise DataError(problems)
            kept = kept[2:]
        if forgotten := (len(self.messages) + 1 - len(kept)) // 2:
            _note(f"(the first {forgotten} turn(s) no longer fit into the model's context)")
        self.messages = kept
        return prompt

    def hear(self, answer: str) -> None:
        """Add what the model said."""
        self.messages.append({"role": "assistant", "content": answer.strip()})

    def _all(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, *messages] if self.system is not None else messages


def show(answerer: Answerer, prompt: list[int]) -> str:
    """Write one answer to stdout as it comes; returns it. Ctrl-C leaves it as far as it is."""
    said = []
    with suppress(KeyboardInterrupt), closing(answerer.stream(prompt)) as pieces:
        for piece in pieces:
            said.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(said)


def run_session(
    answerer: Answerer,
    encode: Callable[[str], list[int]],
    conversation: Conversation | None,
    *,
    read: Callable[[], str] | None = None,
) -> None:
    """Ask until the input ends.

    Args:
        answerer: Answers.
        encode: A text's tokens, where there is no conversation: every line is a prompt of its own.
        conversation: What remembers earlier turns.
        read: Gives the next line; unset: the terminal, with the history that readline keeps.
    """
    read = read or _terminal_reader()
    _note(HELP)
    while True:
        try:
            line = read()
        except EOFError:
            _note("")
            return
        except KeyboardInterrupt:
            _note("")  # a line that was not sent
            continue
        if not line.strip():
            continue
        if line.strip() == "/reset":
            if conversation is not None:
                conversation.messages.clear()
            continue
        try:
            prompt = conversation.ask(line) if conversation is not None else encode(line)
            if problems := answerer.problems([prompt]):
                raise DataError(problems)
        except GptoughtsError as error:
            _note(*error.problems)
            continue
        answer = show(answerer, prompt)
        if conversation is not None:
            conversation.hear(answer)


def _terminal_reader() -> Callable[[], str]:
    with suppress(ImportError):  # not on every system; lines are then read without a history
        import readline  # noqa: F401

    def read() -> str:
        sys.stderr.write(PROMPT)
        sys.stderr.flush()
        return input()

    return read


def _note(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)
