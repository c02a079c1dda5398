"""Text to token ids and back, by any Hugging Face ``tokenizers`` file, and the bytes that each token stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gptoughts.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
END_OF_DOCUMENT, END_OF_TURN, MASK = "<|endoftext|>", "<|eot_id|>", "[MASK]"
"""What tools/train_tokenizer.py calls its special tokens."""
# Ends of text in published tokenizers, tried in this order where no tokenizer_config.json names one.
_DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"  # written with full-width bars
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", _DEEPSEEK_END, "<|im_end|>", "</s>", "<eos>", "<|eot_id|>")
_KNOWN = {
    "eos": _KNOWN_ENDS,
    "eot": (END_OF_TURN, "<|eot|>", "<|im_end|>", "<end_of_turn>"),
    "mask": (MASK, "<|mdm_mask|>", "<|mask|>", "<mask>"),
}
"""Role -> names that published tokenizers have for it, tried in this order where tokenizer_config.json has no
``ROLE_token``: LLaDA's are <|endoftext|>, <|eot_id|>, <|mdm_mask|> (huggingface.co/GSAI-ML/LLaDA-8B-Base)."""


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json that a path means: the file itself, or the one in that folder.

    Raises:
        DataError: There is none.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        looked = f"no {TOKENIZER_FILE} in it" if path.is_dir() else "no such file"
        raise DataError(
            f"tokenizer {str(path)!r}: {looked}; give a tokenizer.json or a folder with one "
            "(tools/train_tokenizer.py makes one)"
        )
    return file


class Tokenizer:
    """A tokenizers file, without its post-processor: no begin-of-text token is ever added.

    Args:
        file: tokenizer.json.
        eod_token: The end-of-document token; unset: what tokenizer_config.json beside it names, else a well-known one.
    """

    def __init__(self, file: str | Path, *, eod_token: str | None = None) -> None:
        self.file = Path(file)
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(self.file))
        except Exception as error:  # tokenizers raises bare Exception for any unreadable file
            raise DataError(f"tokenizer {str(file)!r}: not a tokenizers file ({error})") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"tokenizer {str(file)!r}: its vocabulary is empty")
        self.vocab_size: int = max(vocabulary.values()) + 1
        """Largest token id plus one (a vocabulary may have holes)."""
        self.eod_token = eod_token if eod_token is not None else self._find_token("eos", vocabulary)
        if self.eod_token is not None and self.eod_token not in vocabulary:
            raise DataError(f"tokenizer {str(file)!r}: it has no token {self.eod_token!r}")
        self.eod_id: int | None = None if self.eod_token is None else vocabulary[self.eod_token]
        """Id of the end-of-document token, or None where the tokenizer has none."""

    def special_ids(self) -> dict[str, int]:
        """Ids of the roles that the tokenizer has a token for: ``eos`` (end of text), ``eot`` (of a turn), ``mask``."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        names = {role: self._find_token(role, vocabulary) for role in _KNOWN}
        return {role: vocabulary[name] for role, name in names.items() if name is not None}

    def differences(self, other: Tokenizer) -> dict[str, tuple[int | None, int | None]]:
        """Ordinary tokens that the two do not have under the same id: token -> (id here, id there).

        Special and added tokens are left out: a copy may have more of them, or other names for reserved ones.
        """
        sides = [self.backend.get_vocab(with_added_tokens=False), other.backend.get_vocab(with_added_tokens=False)]
        for tokenizer in (self, other):
            for added in tokenizer.backend.get_added_tokens_decoder().values():
                for side in sides:
                    side.pop(added.content, None)
        here, there = sides
        names = sorted(here.keys() | there.keys())
        return {name: (here.get(name), there.get(name)) for name in names if here.get(name) != there.get(name)}

    def _find_token(self, role: str, vocabulary: dict[str, int]) -> str | None:
        config_file = self.file.parent / TOKENIZER_CONFIG_FILE
        if config_file.is_file():
            named = _read_config(config_file).get(f"{role}_token")
            named = named.get("content") if isinstance(named, dict) else named
            if isinstance(named, str) and named in vocabulary:
                return named
        return next((token for token in _KNOWN[role] if token in vocabulary), None)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text; special tokens spelt in it are plain text unless ``allow_special``."""
        self.backend.encode_special_tokens = not allow_special
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, fast (no character offsets); special tokens spelt in them are plain text."""
        # Without this a document that merely mentions <|endoftext|> would be cut in two.
        self.backend.encode_special_tokens = True
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_byte_lengths(self) -> NDArray[np.int64]:
        """UTF-8 bytes that each token id stands for, [vocab_size]; 0 for special tokens and unused ids.

        Exact for byte-level BPE (GPT-2, Llama 3, DeepSeek, Qwen): the lengths of a text's tokens add up to its bytes.
        Of SentencePiece vocabularies it counts the word mark as one space and ``<0xAB>`` as one byte.
        """
        added = self.backend.get_added_tokens_decoder()
        is_byte_level = self._is_byte_level()
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, token_id in self.backend.get_vocab(with_added_tokens=True).items():
            if token_id in added:
                lengths[token_id] = 0 if added[token_id].special else len(token.encode())
            elif is_byte_level:
                lengths[token_id] = len(token)  # in the byte-level alphabet one character is one byte
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                lengths[token_id] = 1
            else:
                lengths[token_id] = len(token.replace("▁", " ").encode())
        return lengths

    def _is_byte_level(self) -> bool:
        stages = [json.loads(self.backend.to_str()).get(stage) for stage in ("pre_tokenizer", "decoder")]
        while stages:
            stage = stages.pop()
            if isinstance(stage, dict):
                if stage.get("type") == "ByteLevel":
                    return True
                stages.extend(stage.get("pretokenizers") or stage.get("decoders") or [])
        return False


def _read_config(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not a JSON object ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}: not a JSON object")
    return found


def load_tokenizer(path: str | Path, *, eod_token: str | None = None) -> Tokenizer:
    """Load a tokenizer from a tokenizer.json or a folder with one.

    Raises:
        DataError: Missing, unreadable, empty, or without the named end-of-document token.
    """
    return Tokenizer(tokenizer_file(path), eod_token=eod_token)


def with_special_tokens(
    source: str | Path, tokens: Mapping[str, int], folder: Path, roles: Mapping[str, int] | None = None
) -> Path:
    """A tokenizer.json that has the named special tokens: the given one where it does, else a copy with them added.

    An id that the tokenizer gives to a special token of another name is taken as that one.

    Args:
        source: tokenizer.json or a folder with one.
        tokens: Name -> id.
        folder: Where a copy goes, with a tokenizer_config.json; one process may write it.
        roles: Role -> id, for which :meth:`Tokenizer.special_ids` of the result gives the same.
    Raises:
        DataError: an id belongs to an ordinary token, or is not the one that the tokenizer has (or would give).
    """
    file = tokenizer_file(source)
    tokenizer = Tokenizer(file)
    backend, found = tokenizer.backend, tokenizer.special_ids()
    added = backend.get_added_tokens_decoder()
    missing = {}
    for name, token_id in tokens.items():
        existing = backend.id_to_token(token_id)
        if existing is not None and not (token_id in added and added[token_id].special):
            raise DataError(f"tokenizer {str(source)!r}: id {token_id} of {name} is its ordinary token {existing!r}")
        if existing is None:
            missing[name] = token_id
    untold = {role: token_id for role, token_id in (roles or {}).items() if found.get(role) != token_id}
    if not missing and not untold:
        return file
    for name, token_id in missing.items():
        backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
        if (given := backend.token_to_id(name)) != token_id:
            raise DataError(
                f"tokenizer {str(source)!r}: its {name} has id {given}, but the model's has {token_id}; "
                f"give the model {given}"
            )
    beside = file.parent / TOKENIZER_CONFIG_FILE
    config = _read_config(beside) if beside.is_file() else {}
    for role, token_id in untold.items():
        text = backend.id_to_token(token_id)
        if text is None:
            raise DataError(
                f"tokenizer {str(source)!r}: has no token {token_id}, which {role}_token_id names; leave it out, or "
                "add a special token (tools/train_tokenizer.py --special_tokens)"
            )
        config[f"{role}_token"] = text
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / TOKENIZER_FILE))
    if config:
        (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder / TOKENIZER_FILE
