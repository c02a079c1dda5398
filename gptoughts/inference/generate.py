"""``launchers/generate.py``: continue a prompt; the answer alone goes to stdout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gptoughts.errors import CheckpointError, ConfigError, DataError


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Continue a prompt with a trained model. The prompt and its continuation go to stdout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's folder (its newest checkpoint), or one")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens to add at the most")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="divides the logits; 0 takes the likeliest token"
    )
    parser.add_argument("--top_k", type=int, default=0, help="draw among the k likeliest tokens only; 0: among all")
    parser.add_argument("--seed", type=int, default=0, help="seeds the draws")
    return parser


def refuse_other_samplers(checkpoint: Path) -> None:
    """Next-token sampling is for models of the next token.

    Raises:
        CheckpointError: there is no checkpoint at the path, or its family predicts something else.
    """
    from gptoughts.checkpoint import layout
    from gptoughts.models.registry import FAMILIES

    folder = layout.locate(checkpoint)
    family = FAMILIES.get(layout.read_manifest(folder).get("model", {}).get("model_type", ""))
    if family is not None and not family.is_causal:
        able = ", ".join(name for name, other in FAMILIES.items() if other.is_causal)
        raise CheckpointError(
            f"{folder}: is of family {family.name} ({family.summary}), which cannot be sampled token after token; "
            f"this program continues prompts with: {able}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status.

    Raises:
        GptoughtsError: whatever the user can mend.
    """
    arguments = build_parser().parse_args(argv)
    # Checked before torch loads: a mistake should cost no seconds.
    refuse_other_samplers(arguments.checkpoint)
    if not arguments.prompt:
        raise DataError("prompt='' (command line): is empty; give at least one character")

    from gptoughts.platform.startup import prepare_process

    prepare_process()
    from gptoughts.inference.autoregressive import SamplingOptions, generate
    from gptoughts.inference.loading import load_model

    options = SamplingOptions(arguments.max_new_tokens, arguments.temperature, arguments.top_k, arguments.seed)
    if problems := options.problems():
        raise ConfigError([f"{problem} (command line)" for problem in problems])
    loaded = load_model(arguments.checkpoint)
    prompt_ids = loaded.tokenizer.encode(arguments.prompt)
    new_ids = generate(
        loaded.model,
        prompt_ids,
        options,
        vocab_size=loaded.tokenizer.vocab_size,
        context_tokens=loaded.config.block_size or loaded.config.model.seq_length,
        end_id=loaded.tokenizer.eod_id,
    )
    sys.stdout.write(loaded.tokenizer.decode([*prompt_ids, *new_ids]) + "\n")
    return 0
