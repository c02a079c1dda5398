"""``launchers/pretrain.py``: read the configuration, then print it or train; torch loads only for training."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gptoughts.checkpoint import layout
from gptoughts.checkpoint.origin import origin_tokenizer, read_origin, shape_contradictions
from gptoughts.config.cli import load_experiment
from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.resolve import Inspection
from gptoughts.data.corpus import inspect_corpus
from gptoughts.errors import CheckpointError, ConfigError, DataError
from gptoughts.models.registry import FAMILIES


def inspect(config: ExperimentConfig) -> Inspection:
    """Look at what the configuration names on disk: corpus, tokenizer, output folder, checkpoint."""
    problems: list[str] = []
    vocab_size: int | None = None
    tokenizer: str | None = None
    special_ids: dict[str, int] = {}
    if config.data.train:
        try:
            corpus = inspect_corpus(config.data, seq_length=config.block_size or config.model.seq_length)
            vocab_size, tokenizer = corpus.vocab_size, corpus.tokenizer
            if corpus.tokenizer is not None and config.model.token_roles():
                # Not above: --help needs no tokenizer.
                from gptoughts.data.tokenizer import load_tokenizer

                special_ids = load_tokenizer(corpus.tokenizer).special_ids()
            if vocab_size is None and corpus.max_token_id >= config.model.vocab_size:
                problems.append(
                    f"model.vocab_size={config.model.vocab_size}: the corpus, which names no tokenizer, holds token id "
                    f"{corpus.max_token_id}; name it with --data.tokenizer, or set --model.vocab_size"
                )
        except DataError as error:
            problems += error.problems
    try:
        layout.candidates(Path(config.output_dir), config.resume or "auto")
    except CheckpointError as error:
        problems += [f"--resume {line}" for line in error.problems]
    if config.init_from is not None and not config.model.problems():
        problems += shape_contradictions(config.init_from, config.model)
        if tokenizer is not None:
            problems += _tokenizer_contradictions(config.init_from, tokenizer)
    problems += _output_problems(Path(config.output_dir))
    return Inspection(vocab_size=vocab_size, problems=problems, special_ids=special_ids)


def _tokenizer_contradictions(init_from: str, tokenizer: str) -> list[str]:
    """Whether the weights would meet the tokens that they know: ids of another tokenizer mean other words."""
    from gptoughts.data.tokenizer import load_tokenizer, tokenizer_file

    try:
        origin, file = origin_tokenizer(init_from), tokenizer_file(tokenizer)
        if origin is None or origin.read_bytes() == file.read_bytes():
            return []
        differences = load_tokenizer(file).differences(load_tokenizer(origin))
    except CheckpointError:
        return []  # said where the shape was looked for
    except DataError as error:
        return error.problems
    if not differences:
        return []
    token, (here, there) = next(iter(differences.items()))
    return [
        f"init_from={init_from}: its tokenizer ({origin}) gives other ids than the corpus's ({file}) to "
        f"{len(differences)} tokens: {token!r} is {there} there, {here} here; prepare the corpus with the model's own, "
        f"tools/preprocess_data.py --tokenizer {origin}"
    ]


def _output_problems(folder: Path) -> list[str]:
    """Whether the output folder can be written (nothing is made: ``--dry_run`` leaves no trace)."""
    if folder.exists() and not folder.is_dir():
        return [f"output_dir={folder}: is a file; a folder is needed"]
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return [f"output_dir={folder}: {existing} is a file, so no folder can be made below it"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"output_dir={folder}: {existing} cannot be written by this user"]
    return []


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE={text} (environment): a number of ranks is expected, 1 or more")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status.

    Raises:
        GptoughtsError: whatever the user can mend.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    world_size = _world_size()
    experiment = load_experiment(arguments, FAMILIES, world_size=world_size, inspect=inspect, read_origin=read_origin)
    if experiment.dry_run:
        from gptoughts.training.summary import print_summary

        if int(os.environ.get("RANK", "0")) == 0:
            print_summary(experiment, FAMILIES[experiment.config.model_type])
        return 0
    if not experiment.config.data.train:
        raise DataError("data.train is empty: name a corpus with --data PREFIX (tools/preprocess_data.py makes one)")
    from gptoughts.training.signals import launcher_ancestors

    # Before seconds of imports, in which the launcher may go.
    launchers = launcher_ancestors()
    from gptoughts.platform.startup import prepare_process

    prepare_process()
    from gptoughts.training.run import run

    return run(experiment, launchers=launchers)
