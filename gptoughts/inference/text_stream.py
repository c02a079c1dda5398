"""Text of tokens as they come: no half characters, nothing of a stop string, what was given out is never taken back."""

from __future__ import annotations

from collections.abc import Sequence

from gptoughts.data.tokenizer import Tokenizer

_BROKEN = "\ufffd"
"""What a tokenizer's decoder writes for bytes that are no UTF-8."""
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8's longest characters, and so tokens that one may be spread over."""


class TextStream:
    """Turns token ids into text piece by piece; the pieces together are the whole text.

    Bytes that are no UTF-8 and never will be are left out. Special tokens have no text.

    Args:
        tokenizer: Theirs.
        stop: The text ends before the first of these.
        before: Tokens that come before, without text: some tokenizers write a word's space by what precedes it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.text = ""
        """Everything given out so far."""
        self.is_stopped = False
        """Whether a stop string has come."""
        self._ids = list(before[-_LONGEST_CHARACTER:])
        self._known = len(self._ids)
        """How many of ``_ids`` have had their text given out, or held back for a stop string."""
        self._held = ""

    def push(self, token: int) -> str:
        """Text that is certain now, perhaps empty."""
        self._ids.append(token)
        return self._give(is_last=False)

    def finish(self) -> str:
        """What was held back; nothing comes after."""
        return self._give(is_last=True)

    def _give(self, *, is_last: bool) -> str:
        if self.is_stopped:
            return ""
        self._held += self._new_text(is_last)
        found = min((at for end in self.stop if (at := self._held.find(end)) >= 0), default=None)
        if found is not None:
            self.is_stopped = True
            given = self._held[:found]
        else:
            kept = 0 if is_last else self._possible_stop()
            given = self._held[: len(self._held) - kept]
        self._held = self._held[len(given) :]
        self.text += given
        return given

    def _new_text(self, is_last: bool) -> str:
        before, upto = self.tokenizer.decode(self._ids[: self._known], skip_special=True), len(self._ids)
        whole = self.tokenizer.decode(self._ids, skip_special=True)
        if whole.endswith(_BROKEN) and not is_last:
            # A character that is not whole yet begins in one of the last tokens; broken bytes before are broken.
            upto -= _LONGEST_CHARACTER - 1
            if upto <= self._known:
                return ""
            whole = self.tokenizer.decode(self._ids[:upto], skip_special=True)
        first = max(0, upto - _LONGEST_CHARACTER)  # a few tokens stay as what precedes the next ones
        self._ids, self._known = self._ids[first:], upto - first
        return whole[len(before) :].replace(_BROKEN, "")

    def _possible_stop(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max(
            (n for end in self.stop for n in range(1, len(end)) if self._held.endswith(end[:n])),
            default=0,
        )
