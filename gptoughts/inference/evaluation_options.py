"""What ``launchers/evaluate.py`` is asked, and all that is wrong with it, before anything heavy loads."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.origin import origin_tokenizer, read_origin
from gptoughts.data.indexed import index_path
from gptoughts.errors import CheckpointError, ConfigError, DataError
from gptoughts.inference.precisions import PRECISIONS
from gptoughts.models.registry import FAMILIES

METHODS = ("monte_carlo", "chain_rule")
CORPUS_SAMPLES, TASK_SAMPLES = 8, 128
"""Masks per row of a corpus and per answer of a task, unless said otherwise: rows are long and many."""


@dataclass(frozen=True)
class Options:
    """A checked command line."""

    checkpoint: Path
    data: tuple[str, ...]
    """Prefixes of corpora that are there."""
    batch_size: int
    block_size: int | None
    """Tokens that the model may see; None: as many as in its training."""
    num_texts: int
    """Rows or documents of each corpus; -1: all."""
    stride: int | None
    """Score documents by themselves in windows that go on by so many tokens; None: rows."""
    method: str
    """Of masked diffusion."""
    num_samples: int | None
    seed: int
    precision: str | None
    """Of weights and products; None: the device's usual one."""
    tensor_size: int
    output: Path | None
    tasks: tuple[str, ...]
    task_folder: Path | None
    """Where further tasks of the lm-evaluation-harness are described."""
    num_fewshot: int | None
    limit: int | None
    """Questions of each task; None: all."""
    gen_kwargs: str | None
    truncates_prompts: bool
    is_causal: bool
    family: str


class _Parser(argparse.ArgumentParser):
    """Says a mistake like any other of the program's: one line, from one rank."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (command line)")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="evaluate.py",
        description="How well a model predicts texts (nats per token, perplexity, bits per byte of indexed corpora) "
        "and answers questions (tasks of the lm-evaluation-harness). deepspeed or torchrun start several ranks. "
        "docs/evaluation.md says what is measured.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a run (its newest checkpoint), a checkpoint, or a Hugging Face "
        "folder")  # fmt: skip
    add("--data", nargs="+", default=[], metavar="PREFIX", help="indexed corpora (tools/preprocess_data.py); of one "
        "with a validation part that part")  # fmt: skip
    add("--texts", type=int, default=-1, metavar="N", help="rows (or documents) of each corpus, -1: all (default)")
    add("--block_size", type=int, metavar="TOKENS", help="tokens that the model may see (default: as in its training)")
    add("--stride", type=int, metavar="TOKENS", help="score each document by itself, in windows that go on by so many "
        "tokens and see what is before them; next-token models (default: rows, as validation in training)")  # fmt: skip
    add("--batch_size", type=int, default=8, metavar="N", help="sequences of block_size tokens that go through the "
        "model together on each rank (default: 8); no result depends on it")  # fmt: skip
    add("--method", choices=METHODS, help="of masked diffusion: monte_carlo estimates the bound (default), chain_rule "
        "restores from left to right, one forward per token")  # fmt: skip
    add("--num_samples", type=int, metavar="N", help="of monte_carlo: masks per row or answer, an even number "
        f"(default: {CORPUS_SAMPLES} for --data, {TASK_SAMPLES} for --tasks)")  # fmt: skip
    add("--seed", type=int, help="of monte_carlo: draws the masks (default: 0)")
    add("--precision", choices=PRECISIONS, help="of weights and products (default: bf16 on a GPU, fp32 on a CPU)")
    add("--parallel.tensor", type=int, default=1, dest="tensor", metavar="RANKS", help="ranks that divide each layer; "
        "what they leave of the world share the texts (default: 1)")  # fmt: skip
    add("--tasks", metavar="NAME[,NAME]", help="tasks of the lm-evaluation-harness (pip install -e '.[eval]')")
    add("--task_folder", type=Path, metavar="DIR", help="further tasks: YAML files, whose paths are relative to it")
    add("--num_fewshot", type=int, metavar="N", help="answered questions before each question (default: the task's)")
    add("--limit", type=int, metavar="N", help="the first questions of each task only")
    add("--gen_kwargs", metavar="NAME=VALUE[,...]", help="options of generated answers, in place of the tasks' own, as "
        "max_gen_toks=64, and those of the sampler (docs/inference.md)")  # fmt: skip
    add("--truncate_prompts", action="store_true", help="cut prompts of tasks that are longer than the context from "
        "the left (default: refuse them)")  # fmt: skip
    add("--output", type=Path, metavar="FILE", help="write the results there as JSON too")
    add("--local_rank", help=argparse.SUPPRESS)  # given by DeepSpeed's launcher; LOCAL_RANK decides
    return parser


def read_options(argv: Sequence[str] | None) -> Options:
    """The checked command line; loads no torch.

    Raises:
        GptoughtsError: every mistake that can be seen without the weights.
    """
    given = build_parser().parse_args(argv)
    family_name, model = read_origin(str(given.checkpoint))
    if origin_tokenizer(str(given.checkpoint)) is None:
        raise CheckpointError(f"{given.checkpoint}: carries no {layout.TOKENIZER}, so texts cannot be read")
    family = FAMILIES[family_name]
    problems = _value_problems(given) + _task_problems(given)
    if not given.data and not given.tasks:
        problems.append("nothing to evaluate: name a corpus with --data PREFIX, or a task with --tasks NAME")
    if family.is_causal:
        stated = [name for name in ("method", "num_samples", "seed") if getattr(given, name) is not None]
        problems += [
            f"{name}={getattr(given, name)} (command line): is of masked diffusion; the likelihood of family "
            f"{family_name} is exact"
            for name in stated
        ]
    elif given.stride is not None:
        problems.append(
            f"stride={given.stride} (command line): is of next-token models; family {family_name} scores whole rows"
        )
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        problems.append(f"WORLD_SIZE={size} (environment): a number of ranks is expected, 1 or more")
    elif given.tensor > 0 and int(size) % given.tensor:
        problems.append(f"parallel.tensor={given.tensor} (command line): the world size {size} is not divisible by it")
    problems += [
        f"parallel.tensor={given.tensor} (command line): {name}={count} is not divisible by it"
        for name, count in model.tensor_parallel_divisors().items()
        if given.tensor > 0 and count % given.tensor
    ]
    problems += _output_problems(given.output)
    if problems:
        raise ConfigError(problems)
    return Options(
        checkpoint=given.checkpoint,
        data=tuple(find_corpora(given.data)),
        batch_size=given.batch_size,
        block_size=given.block_size,
        num_texts=given.texts,
        stride=given.stride,
        method=given.method or METHODS[0],
        num_samples=given.num_samples,
        seed=given.seed or 0,
        precision=given.precision,
        tensor_size=given.tensor,
        output=given.output,
        is_causal=family.is_causal,
        family=family_name,
        tasks=tuple((given.tasks or "").split(",")) if given.tasks else (),
        task_folder=None if given.task_folder is None else given.task_folder.absolute(),
        num_fewshot=given.num_fewshot,
        limit=given.limit,
        gen_kwargs=given.gen_kwargs,
        truncates_prompts=given.truncate_prompts,
    )


def _value_problems(given: argparse.Namespace) -> list[str]:
    found = []
    for name, label in (("batch_size", "batch_size"), ("tensor", "parallel.tensor"), ("block_size", "block_size")):
        value = getattr(given, name)
        if value is not None and value < 1:
            found.append(f"{label}={value} (command line): at least 1")
    if given.texts != -1 and given.texts < 1:
        found.append(f"texts={given.texts} (command line): at least 1, or -1 for all")
    if given.stride is not None and given.stride < 1:
        found.append(f"stride={given.stride} (command line): at least 1")
    if given.num_samples is not None and (given.num_samples < 2 or given.num_samples % 2):
        found.append(f"num_samples={given.num_samples} (command line): an even number, 2 or more")
    if given.num_samples is not None and given.method == METHODS[1]:
        found.append(f"num_samples={given.num_samples} (command line): method=chain_rule draws nothing; leave it out")
    if given.seed is not None and not 0 <= given.seed < 2**32:
        found.append(f"seed={given.seed} (command line): from 0 to 2^32 - 1")
    return found


_OF_TASKS = ("task_folder", "num_fewshot", "limit", "gen_kwargs", "truncate_prompts")
_OF_CORPORA = ("stride", "block_size")


def _task_problems(given: argparse.Namespace) -> list[str]:
    found = []
    for name, value in (("num_fewshot", 0), ("limit", 1)):
        if (stated := getattr(given, name)) is not None and stated < value:
            found.append(f"{name}={stated} (command line): at least {value}")
    if given.task_folder is not None and not given.task_folder.is_dir():
        found.append(f"task_folder={given.task_folder} (command line): is no folder")
    kinds = [("tasks", _OF_TASKS), ("data", _OF_CORPORA)]
    found += [
        f"{name}={getattr(given, name)} (command line): needs --{kind}"
        for kind, names in kinds
        for name in names
        if not getattr(given, kind) and getattr(given, name) not in (None, False)
    ]
    if given.tasks and importlib.util.find_spec("lm_eval") is None:
        found.append(
            f"tasks={given.tasks} (command line): needs the package 'lm-eval', which is not installed; "
            "pip install -e '.[eval]'"
        )
    return found


def find_corpora(prefixes: Sequence[str]) -> list[str]:
    """The prefixes that are meant: the validation part of a divided corpus, else the corpus itself.

    Raises:
        DataError: where there is neither.
    """
    found, problems = [], []
    for prefix in (given.removesuffix(".idx").removesuffix(".bin") for given in prefixes):
        there = [one for one in (prefix, f"{prefix}_valid") if os.path.isfile(index_path(one))]
        found += there[:1]
        if not there:
            problems.append(f"data={prefix}: no corpus: neither {prefix}.idx nor {prefix}_valid.idx is there")
    if problems:
        raise DataError(problems)
    return found


def _output_problems(output: Path | None) -> list[str]:
    """Before hours of work rather than after."""
    if output is None:
        return []
    folder = output.absolute().parent
    if output.is_dir():
        return [f"output={output} (command line): is a folder; name a file"]
    if not folder.is_dir():
        return [f"output={output} (command line): there is no folder {folder}"]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [f"output={output} (command line): {folder} cannot be written by this user"]
    return []
