"""Whole runs of a masked-diffusion model: mask token, validation bound, and what cannot be done with it."""

from __future__ import annotations

from pathlib import Path

from gptoughts.checkpoint import layout
from gptoughts.config.cli import from_yaml
from gptoughts.data.tokenizer import load_tokenizer
from gptoughts.models.registry import FAMILIES
from gptoughts.training.metrics import read_metrics
from gptoughts.training.pretrain import main
from tests.distributed import run_distributed
from tests.integration.conftest import TINY, Corpus, run_program

LLADA = [word for word in TINY if not word.startswith("--model_type")] + ["--model_type=llada"]


def pretrain(corpus: Corpus, run: Path, *arguments: str) -> None:
    assert run_distributed(main, 1, [*LLADA, f"--data={corpus.prefix}", f"--output_dir={run}", *arguments]) == [0]


def test_a_run_carries_its_mask_token_and_is_refused_by_the_autoregressive_sampler(
    corpus: Corpus, tmp_path: Path
) -> None:
    pretrain(corpus, tmp_path, "--train.steps=2", "--train.stop_after_steps=1")
    pretrain(corpus, tmp_path, "--train.steps=2")
    folder = layout.list_checkpoints(tmp_path)[-1]
    config = from_yaml((folder / layout.CONFIG).read_text(), FAMILIES)
    assert config.model.token_roles() == {"mask": 2, "eos": 0, "eot": 1}, "the tokenizer's own"
    carried, original = load_tokenizer(folder / layout.TOKENIZER), load_tokenizer(corpus.tokenizer)
    assert carried.special_ids() == original.special_ids() == config.model.token_roles()
    assert carried.vocab_size == original.vocab_size
    assert carried.eod_id == original.eod_id
    text = "def read(path): [MASK]"
    assert carried.encode(text) == original.encode(text), "a text that mentions the mask token is plain text"
    assert carried.decode(carried.encode(text)) == text
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["step"] == 2
    assert last["valid_loss"] > 0
    assert last["valid_bits_per_byte"] > 0

    command = ("launchers/generate.py", "--checkpoint", str(tmp_path), "--max_new_tokens=16", "--steps=8")
    answered = run_program(*command, "--prompt", "def")
    assert answered.returncode == 0, answered.stderr
    assert len(answered.stdout) > 1
    picture = tmp_path / "out.gif"
    filled = run_program(
        "launchers/generate.py", "--checkpoint", str(tmp_path), "--cache=dual", "--threshold=0.9",
        "--infill", r"def f(x):\n    [MASK*4]\n    return y", f"--save_animation={picture}",
    )  # fmt: skip
    assert filled.returncode == 0, filled.stderr
    assert filled.stdout.startswith("def f(x):\n    ")
    assert filled.stdout.endswith("\n    return y\n")
    assert picture.is_file()
    refused = run_program(*command, "--prompt", "def", "--top_k=5", "--min_p=0.1")
    assert refused.returncode == 2
    assert refused.stdout == ""
    for flag in ("top_k=5", "min_p=0.1"):
        expected = f"{flag} (command line): family llada (masked-diffusion language model) has no such option"
        assert expected in refused.stderr
    assert "Traceback" not in refused.stderr


def test_tokens_of_ones_own_are_carried(corpus: Corpus, tmp_path: Path) -> None:
    pretrain(corpus, tmp_path, "--train.steps=1", "--model.mask_token_id=1", "--model.eot_token_id=0")
    folder = layout.list_checkpoints(tmp_path)[-1]
    assert load_tokenizer(folder / layout.TOKENIZER).special_ids() == {"mask": 1, "eos": 0, "eot": 0}
    assert load_tokenizer(corpus.tokenizer).special_ids() == {"mask": 2, "eos": 0, "eot": 1}


def test_validation_does_not_depend_on_the_batch(corpus: Corpus, tmp_path: Path) -> None:
    """With (next to) no learning rate the weights stay as they were, and the bound with its fixed noise too."""
    found = []
    for name, batch_size in (("a", 2), ("b", 4)):
        pretrain(corpus, tmp_path / name, "--train.steps=1", "--optim.lr=1e-12", f"--batch_size={batch_size}")
        found.append(read_metrics(tmp_path / name / "metrics.jsonl")[-1]["valid_loss"])
    assert abs(found[0] - found[1]) < 1e-5 * found[0]
