"""``launchers/evaluate.py``: how well a model predicts texts, on all ranks that a launcher starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.evaluation_options import CORPUS_SAMPLES, METHODS, TASK_SAMPLES, Options, read_options

if TYPE_CHECKING:
    from gptoughts.inference.evaluation import CorpusResult
    from gptoughts.inference.evaluation_tasks import TaskResults
    from gptoughts.inference.evaluation_texts import Texts
    from gptoughts.inference.loading import LoadedModel

_ROUND_BATCHES = 8
"""Batches that each rank scores between two meetings."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status.

    Raises:
        GptoughtsError: whatever the user can mend.
    """
    options = read_options(argv)
    from gptoughts.platform.startup import prepare_process

    prepare_process()
    import torch.distributed as dist

    from gptoughts.inference.loading import load_model
    from gptoughts.parallel import groups

    is_world_ours = not dist.is_initialized()
    loaded = load_model(options.checkpoint, precision=options.precision, tensor_size=options.tensor_size)
    try:
        corpora = _evaluate_corpora(options, loaded) if options.data else []
        tasks = _evaluate_tasks(options, loaded) if options.tasks else None
        _report(options, loaded, corpora, tasks)
    finally:
        if is_world_ours:
            groups.destroy()
    return 0


def _block_size(options: Options, loaded: LoadedModel) -> int:
    """Tokens that the model may see.

    Raises:
        ConfigError: more than in its training, or fewer than a window goes on by.
    """
    found = options.block_size or loaded.context_tokens
    problems = []
    if found > loaded.context_tokens:
        problems.append(
            f"block_size={found} (command line): the model's context has {loaded.context_tokens} tokens; at most that"
        )
    if options.stride is not None and options.stride > found:
        problems.append(f"stride={options.stride} (command line): at most block_size={found}, or tokens are left out")
    if problems:
        raise ConfigError(problems)
    return found


def _texts(options: Options, loaded: LoadedModel, prefix: str, block_size: int) -> Texts:
    from gptoughts.inference.evaluation_texts import Documents, Rows

    if options.stride is None:
        is_shifted = bool(getattr(loaded.config.model, "is_shifted", False))
        return Rows(prefix, block_size=block_size, is_causal=options.is_causal, is_shifted=is_shifted)
    start_id = loaded.tokenizer.eod_id
    if start_id is None:
        raise DataError(
            f"stride={options.stride} (command line): {loaded.tokenizer.file} has no end-of-text token to put before "
            "a document; leave --stride out"
        )
    return Documents(prefix, block_size=block_size, stride=options.stride, start_id=start_id)


def _evaluate_corpora(options: Options, loaded: LoadedModel) -> list[CorpusResult]:
    """Every corpus in turn. Collective: every rank of the world."""
    from gptoughts.inference.diffusion_likelihood import LikelihoodOptions
    from gptoughts.inference.evaluation import evaluate_corpus
    from gptoughts.inference.evaluation_texts import check_corpora
    from gptoughts.inference.likelihood import build_scorer
    from gptoughts.inference.progress import progress_bar
    from gptoughts.parallel import groups

    block_size = _block_size(options, loaded)
    check_corpora(
        options.data,
        loaded.tokenizer,
        # Documents may be shorter than a row.
        block_size=block_size if options.stride is None else 0,
        num_extra_tokens=int(options.is_causal),
        vocab_size=loaded.config.model.vocab_size,
    )
    num_samples = options.num_samples or CORPUS_SAMPLES
    diffusion = None if options.is_causal else LikelihoodOptions(options.method, num_samples, options.seed)
    scorer = build_scorer(
        loaded.model,
        loaded.config,
        batch_size=options.batch_size,
        diffusion=diffusion,
        checks_greedy=False,
        context_tokens=block_size,
    )
    token_bytes = loaded.tokenizer.token_byte_lengths()
    found = []
    for prefix in options.data:
        texts = _texts(options, loaded, prefix, block_size)
        number = len(texts) if options.num_texts < 0 else min(options.num_texts, len(texts))
        with progress_bar(prefix, number, is_quiet=groups.rank() != 0) as advance:
            found.append(
                evaluate_corpus(
                    scorer,
                    texts,
                    prefix=prefix,
                    num_texts=number,
                    texts_per_round=_ROUND_BATCHES * options.batch_size * groups.data_parallel_size(),
                    token_bytes=token_bytes,
                    advance=advance,
                )
            )
    return found


def _evaluate_tasks(options: Options, loaded: LoadedModel) -> TaskResults:
    """Tasks of the lm-evaluation-harness. Collective: every rank of the world."""
    from gptoughts.inference.evaluation_tasks import TaskRequest, evaluate_tasks
    from gptoughts.inference.lm_eval_adapter import GptoughtsLM

    stated = {} if options.is_causal else {
        "method": options.method, "num_samples": options.num_samples or TASK_SAMPLES, "seed": options.seed
    }  # fmt: skip
    model = GptoughtsLM(
        loaded, batch_size=options.batch_size, truncate_prompts=options.truncates_prompts, **stated  # type: ignore[arg-type]
    )  # fmt: skip
    wanted = TaskRequest(
        options.tasks, options.task_folder, options.num_fewshot, options.limit, options.gen_kwargs
    )  # fmt: skip
    return evaluate_tasks(model, wanted)


def _measure(options: Options) -> str:
    if options.is_causal:
        return f"{options.family}: exact"
    if options.method == "chain_rule":
        return f"{options.family}: restored from left to right (chain rule)"
    count = options.num_samples or CORPUS_SAMPLES
    return f"{options.family}: upper bound, {count} masks per row, seed {options.seed}"


def _report(options: Options, loaded: LoadedModel, corpora: Sequence[CorpusResult], tasks: TaskResults | None) -> None:
    """Table and JSON, from rank 0."""
    from rich.console import Console

    from gptoughts.inference.evaluation_report import corpora_as_json, corpora_table, tasks_table, write_json
    from gptoughts.parallel import groups

    if groups.rank() != 0:
        return
    console = Console(highlight=False, soft_wrap=True)
    is_drawn = not options.is_causal and options.method == METHODS[0]
    content: dict[str, Any] = {
        "checkpoint": str(loaded.checkpoint),
        "model_type": options.family,
        "method": "exact" if options.is_causal else options.method,
        "seed": options.seed if is_drawn else None,
    }
    if corpora:
        unit = "rows" if options.stride is None else "documents"
        console.print(corpora_table(corpora, measure=_measure(options), unit=unit))
        content |= {
            "block_size": _block_size(options, loaded),
            "stride": options.stride,
            "num_samples": (options.num_samples or CORPUS_SAMPLES) if is_drawn else None,
            "corpora": corpora_as_json(corpora),
        }
    if tasks is not None:
        console.print(tasks_table(tasks))
        content |= {
            "task_num_samples": (options.num_samples or TASK_SAMPLES) if is_drawn else None,
            "tasks": tasks.as_json(),
            "lm_eval": tasks.harness,
        }
    if options.output is None:
        return
    try:
        write_json(options.output, content)
    except OSError as error:
        raise ConfigError(f"output={options.output} (command line): cannot be written: {error.strerror}") from None
    console.print(f"results {options.output}")
