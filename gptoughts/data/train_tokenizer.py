"""Train a byte-level BPE tokenizer on text (``tools/train_tokenizer.py``).

Byte-level BPE: Sennrich et al., arXiv:1508.07909, over the 256 bytes as in GPT-2, so that every text has tokens and
comes back unchanged. Text is first cut into words, numbers, runs of punctuation and of white space; merges never
cross a cut. Numbers are cut after two digits: with a small vocabulary, three-digit numbers would take 1000 entries.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import tokenizers
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gptoughts.data.documents import Inputs, find_inputs, read_rows, read_text
from gptoughts.data.files import write_text
from gptoughts.data.options import add_input_arguments
from gptoughts.data.tokenizer import (
    END_OF_DOCUMENT,
    END_OF_TURN,
    MASK,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    load_tokenizer,
)
from gptoughts.errors import ConfigError, DataError

# Contractions | a word with the one character before it | digits | punctuation with its line ends | white space.
WORD_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SMALLEST_VOCABULARY = 256


def train(texts: Iterator[str], *, vocab_size: int, special_tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """Train byte-level BPE; the special tokens get the first ids, the 256 bytes the next.

    Args:
        texts: The training text, in pieces.
        vocab_size: Entries, special tokens and bytes included.
        special_tokens: Among them the end-of-document token, first.

    Raises:
        ConfigError: vocab_size has no room for the bytes and special tokens.
        DataError: The text is too small for that many entries.
    """
    smallest = _SMALLEST_VOCABULARY + len(special_tokens)
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size={vocab_size}: too small; at least {smallest} (256 bytes and the special tokens)")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORD_PATTERN), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Special tokens spelt in the text must not keep their spelling out of the statistics, nor enter them as one token.
    tokenizer.encode_special_tokens = True
    tokenizer.train_from_iterator(texts, trainer=trainer)
    found = tokenizer.get_vocab_size(with_added_tokens=True)
    if found != vocab_size:
        raise DataError(
            f"vocab_size={vocab_size}: the text only yields {found} entries; give more text or ask for fewer"
        )
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, folder: str | Path, *, special_tokens: Sequence[str]) -> None:
    """Write tokenizer.json and the tokenizer_config.json that transformers' AutoTokenizer wants, each atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special_tokens[0],
        "clean_up_tokenization_spaces": False,
    }
    if len(special_tokens) > 1:
        config["additional_special_tokens"] = list(special_tokens[1:])
    if MASK in special_tokens:
        config["mask_token"] = MASK
    content = {TOKENIZER_CONFIG_FILE: json.dumps(config, indent=2), TOKENIZER_FILE: tokenizer.to_str(pretty=True)}
    for name, text in content.items():
        write_text(folder / name, text)


def _texts(inputs: Inputs, options: jsonargparse.Namespace, progress: Progress) -> Iterator[str]:
    limit = options.max_bytes or inputs.num_bytes
    task = progress.add_task("reading", total=min(limit, inputs.num_bytes))
    taken = 0
    for file in inputs.files:
        if file.row_format is None:
            batches: Iterator[list[str]] = iter([[read_text(file.path, options.encoding_errors)[0] or ""]])
        else:
            batches = read_rows(file, options.text_field)
        for batch in batches:
            for text in batch:
                num_bytes = len(text.encode())
                if options.max_bytes and taken + num_bytes > options.max_bytes:
                    progress.update(task, completed=limit, description="merging")
                    return
                taken += num_bytes
                yield text
            progress.update(task, completed=min(taken, limit))
    progress.update(task, completed=limit, description="merging")


def build_parser() -> jsonargparse.ArgumentParser:
    """The command line of ``tools/train_tokenizer.py``."""
    parser = jsonargparse.ArgumentParser(
        prog="train_tokenizer.py", description="Train a byte-level BPE tokenizer and write it as a tokenizer.json."
    )
    add_input_arguments(parser)
    parser.add_argument("--vocab_size", type=int, default=8192, help="entries, special tokens and bytes included")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for tokenizer.json")
    parser.add_argument(
        "--special_tokens",
        nargs="+",
        default=[END_OF_DOCUMENT, END_OF_TURN, MASK],
        help=f"get the first ids; the first of them marks the end of a document. {END_OF_TURN} ends a turn of a chat, "
        f"{MASK} is for masked diffusion: both are found by these names",
    )
    parser.add_argument("--max_bytes", type=int, default=0, help="train on the first so many bytes of text (0: all)")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a tokenizer that is there (a corpus made with it keeps its own copy)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``tools/train_tokenizer.py``.

    Raises:
        ConfigError, DataError: The input or the options cannot be used.
    """
    options = build_parser().parse_args(argv)
    file = Path(options.output) / TOKENIZER_FILE
    if file.is_file() and not options.overwrite:
        found = load_tokenizer(file)
        if (found.vocab_size, found.eod_token) != (options.vocab_size, options.special_tokens[0]):
            raise ConfigError(
                f"output {options.output!r}: holds another tokenizer ({found.vocab_size} entries, end of document "
                f"{found.eod_token!r}); --overwrite replaces it"
            )
        print(f"{file} is there already; --overwrite trains it again")
        return 0
    started = time.perf_counter()
    inputs = find_inputs(options.input, suffixes=options.suffix, exclude=options.exclude)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        tokenizer = train(
            _texts(inputs, options, progress), vocab_size=options.vocab_size, special_tokens=options.special_tokens
        )
    save(tokenizer, options.output, special_tokens=options.special_tokens)
    print(f"{file}: {options.vocab_size} entries from {len(inputs.files)} files, {time.perf_counter() - started:.1f} s")
    return 0
