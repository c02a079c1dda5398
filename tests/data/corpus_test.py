"""The check before a run: what a prefix means, and every problem in one error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gptoughts.config.experiment import DataConfig
from gptoughts.data.corpus import CorpusInfo, inspect_corpus, parse_blend
from gptoughts.errors import DataError
from tests.data.conftest import VOCAB_SIZE, MakeCorpus


def _inspect(*train: str, seq_length: int = 16, vocab_size: int | None = None, **data: object) -> CorpusInfo:
    config = DataConfig(train=list(train), **data)  # type: ignore[arg-type]
    return inspect_corpus(config, seq_length=seq_length, vocab_size=vocab_size)


def test_split_corpus_is_found_by_its_stem(make_corpus: MakeCorpus) -> None:
    train, valid = make_corpus("c_train", lengths=[100, 50]), make_corpus("c_valid", lengths=[40])
    stem = train.removesuffix("_train")
    for given in (stem, train, f"{train}.idx", f"{train}.bin"):
        info = _inspect(given)
        assert info.train == [(150.0, train)]
        assert info.valid == [(1.0, valid)]
        assert (info.num_train_tokens, info.num_valid_tokens) == (150, 40)
    assert _inspect(stem, valid=[train]).valid == [(1.0, train)]


def test_weights(make_corpus: MakeCorpus) -> None:
    first, second = make_corpus("a", lengths=[100]), make_corpus("b", lengths=[300])
    assert _inspect(first, second).train == [(100.0, first), (300.0, second)]
    assert _inspect("0.3", first, "7", second).train == [(0.3, first), (7.0, second)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0.3", "a", "b"], "a WEIGHT before every PREFIX"),
        (["a", "0.3"], "a WEIGHT before every PREFIX"),
        (["0", "a"], "weight 0; positive"),
        (["-1", "a", "inf", "b"], "weight -1, inf; positive"),
        (["nan", "a"], "weight nan; positive"),
    ],
)
def test_bad_weights(words: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_blend(words, option="data.train")


def test_all_problems_come_together(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    short, broken, empty = (
        make_corpus("short", lengths=[5]),
        make_corpus("broken", lengths=[50]),
        make_corpus("e", lengths=[]),
    )
    with open(f"{broken}.bin", "r+b") as stream:
        stream.truncate(7)
    with pytest.raises(DataError) as caught:
        _inspect(short, broken, empty, str(tmp_path / "none"), tokenizer=str(tmp_path / "t.json"), valid=["1", short])
    problems = "\n".join(caught.value.problems)
    for expected in (
        "'" + short + "': 5 tokens are fewer than one sample of 17",
        "broken.bin: truncated",
        "it is empty",
        "none': no such file",
        "data.tokenizer: tokenizer",
        "it takes no weights",
    ):
        assert expected in problems


def test_no_corpus_given() -> None:
    with pytest.raises(DataError, match="no corpus given"):
        _inspect()


def test_vocabulary_of_the_sidecar(make_corpus: MakeCorpus, tokenizer_folder: Path) -> None:
    sidecar = {"vocab_size": 1000, "eod_id": 3, "max_token_id": 77, "tokenizer": str(tokenizer_folder)}
    prefix = make_corpus(lengths=[100], sidecar=sidecar)
    info = _inspect(prefix)
    assert (info.vocab_size, info.eod_id, info.max_token_id) == (1000, 3, 77)
    assert info.tokenizer == str(tokenizer_folder)
    with pytest.raises(DataError, match="token id 77, but the vocabulary has 64"):
        _inspect(prefix, vocab_size=64)
    other = make_corpus("other", lengths=[99], sidecar=sidecar | {"vocab_size": 2000})
    with pytest.raises(DataError, match="blended corpora need one tokenizer"):
        _inspect(prefix, other)
    lost = make_corpus("lost", lengths=[99], sidecar=sidecar | {"tokenizer": "gone"})
    with pytest.raises(DataError, match="gone' is missing"):
        _inspect(lost)


def test_tokens_are_read_where_no_sidecar_vouches(make_corpus: MakeCorpus, tokenizer_folder: Path) -> None:
    prefix = make_corpus(lengths=[5000], vocab_size=900)
    assert _inspect(prefix).vocab_size is None
    assert _inspect(prefix).max_token_id == 899
    with pytest.raises(DataError, match=f"token id 899, but the vocabulary has {VOCAB_SIZE}"):
        _inspect(prefix, tokenizer=str(tokenizer_folder))
    stale = make_corpus(
        "s", lengths=[5000], vocab_size=900, sidecar={"vocab_size": 512, "max_token_id": 1, "bin_bytes": 4}
    )
    with pytest.raises(DataError, match="token id 899"):
        _inspect(stale)


def test_damaged_sidecar(make_corpus: MakeCorpus) -> None:
    prefix = make_corpus(lengths=[100])
    Path(f"{prefix}.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        _inspect(prefix)


def test_imports_neither_torch_nor_megatron() -> None:
    heavy = ("torch", "megatron", "deepspeed", "tokenizers", "datasets")
    code = f"import sys, gptoughts.data.corpus; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
