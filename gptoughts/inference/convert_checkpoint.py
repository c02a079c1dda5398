"""``tools/convert_checkpoint.py``: Hugging Face folders to our checkpoints and back; DeepSpeed's to weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptoughts.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from gptoughts.checkpoint.huggingface.output import Conversion

LARGEST_LOGIT_ERROR = 1e-3
"""Of ``--verify``, relative to the largest logit; fp32 sums in another order differ by some 1e-6."""
_DTYPES: dict[str, str | None] = {"stored": None, "fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="convert_checkpoint.py", description="Convert models, exact to the bit.")
    ways = parser.add_subparsers(dest="way", required=True, metavar="WAY")
    to_ours = ways.add_parser("hf-to-gptoughts", help="a Hugging Face folder becomes a run with one checkpoint")
    to_theirs = ways.add_parser("gptoughts-to-hf", help="a run or checkpoint becomes a Hugging Face folder")
    to_ours.add_argument("--input", type=Path, required=True, help="folder with config.json and safetensors")
    to_ours.add_argument(
        "--dequantize_to", choices=["bf16", "fp32"], default="bf16",
        help="dtype of matrices that are stored in FP8 by blocks (DeepSeek-V3's files)",
    )  # fmt: skip
    to_theirs.add_argument("--input", type=Path, required=True, help="a run (its newest checkpoint), or a checkpoint")
    to_theirs.add_argument(
        "--dtype", choices=list(_DTYPES), default="stored", help="dtype of the weights; a trained run stores fp32"
    )
    to_whole = ways.add_parser("zero-to-whole", help="DeepSpeed's own ZeRO checkpoint becomes whole fp32 weights")
    to_whole.add_argument(
        "--input",
        type=Path,
        required=True,
        help="what engine.save_checkpoint was given (its newest tag), or one tag's folder",
    )
    to_layout = ways.add_parser("reshard", help="a checkpoint in files that are divided for another layout")
    to_layout.add_argument("--input", type=Path, required=True, help="a run (its newest checkpoint), or a checkpoint")
    to_layout.add_argument("--target_tensor_parallel", type=int, default=1, help="ranks that divide each layer")
    to_layout.add_argument("--target_pipeline_parallel", type=int, default=1, help="stages that divide the layers")
    for way in (to_ours, to_theirs, to_whole, to_layout):
        way.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    for way in (to_ours, to_theirs, to_whole):
        way.add_argument("--max_file_gb", type=float, default=5.0, help="size of one file of weights, 1e9 bytes")
    for way in (to_ours, to_theirs):
        way.add_argument(
            "--verify", metavar="TEXT", help="compare both models' logits on this text before the output gets its name"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status.

    Raises:
        GptoughtsError: whatever the user can mend.
    """
    arguments = build_parser().parse_args(argv)
    if not getattr(arguments, "max_file_gb", 1.0) > 0:
        raise ConfigError(f"max_file_gb={arguments.max_file_gb} (command line): must be greater than 0")
    if getattr(arguments, "verify", None) == "":
        raise ConfigError("verify='' (command line): is empty; give at least one character")
    from gptoughts.platform.startup import prepare_process

    prepare_process()
    _print_summary(_WAYS[arguments.way](arguments), arguments.way)
    return 0


def _with_hugging_face(arguments: argparse.Namespace) -> Conversion:
    from gptoughts.checkpoint.huggingface.exporting import export_model
    from gptoughts.checkpoint.huggingface.importing import import_model

    source, output, text = arguments.input, arguments.output, arguments.verify
    num_bytes = int(arguments.max_file_gb * 1e9)
    if arguments.way == "hf-to-gptoughts":
        check = _check(text, lambda made: (made, source))
        return import_model(
            source, output, dequantized=_DTYPES[arguments.dequantize_to] or "", max_file_bytes=num_bytes, check=check
        )
    check = _check(text, lambda made: (source, made))
    return export_model(source, output, dtype=_DTYPES[arguments.dtype], max_file_bytes=num_bytes, check=check)


def _from_zero(arguments: argparse.Namespace) -> Conversion:
    from gptoughts.checkpoint.zero_to_whole import write_whole_weights

    return write_whole_weights(arguments.input, arguments.output, max_file_bytes=int(arguments.max_file_gb * 1e9))


def _reshard(arguments: argparse.Namespace) -> Conversion:
    from gptoughts.checkpoint.reshard import Target, reshard

    target = Target(arguments.target_tensor_parallel, arguments.target_pipeline_parallel)
    return reshard(arguments.input, arguments.output, target)


_WAYS: dict[str, Callable[[argparse.Namespace], Conversion]] = {
    "hf-to-gptoughts": _with_hugging_face,
    "gptoughts-to-hf": _with_hugging_face,
    "zero-to-whole": _from_zero,
    "reshard": _reshard,
}


def _check(text: str | None, sides: Callable[[Path], tuple[Path, Path]]) -> Callable[[Path], None] | None:
    """The comparison for ``--verify``; ``sides`` gives (our folder, their folder)."""
    if text is None:
        return None

    def check(made: Path) -> None:
        ours, theirs = sides(made)
        error = logit_error(ours, theirs, text)
        print(f"logits on {len(text)} characters differ by at most {error:.1e} of the largest")
        if not error <= LARGEST_LOGIT_ERROR:
            raise CheckpointError(
                f"verify: logits differ by {error:.1e}, at most {LARGEST_LOGIT_ERROR} allowed; nothing was kept"
            )

    return check


def logit_error(ours: Path, theirs: Path, text: str) -> float:
    """max|a - b| / max|b| of both models' logits on a text, in fp32 where the device is a CPU."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from gptoughts.inference.loading import load_model
    from gptoughts.platform import device

    loaded = load_model(ours)
    ids = loaded.tokenizer.encode(text)
    dtype = next(loaded.model.parameters()).dtype
    reference: nn.Module = AutoModelForCausalLM.from_pretrained(theirs, dtype=dtype)
    reference.to(device.current_device()).eval()
    tokens = torch.tensor([ids], device=device.current_device())
    with torch.no_grad():
        expected = reference(tokens).logits.float()
        found = loaded.model(tokens)[..., : expected.size(-1)].float()
    return float((found - expected).abs().max() / expected.abs().max())


def _print_summary(made: Conversion, way: str) -> None:
    print(f"{made.folder}: {made.num_parameters:,} parameters, {made.format}, {made.num_files} file(s) of weights")
    if made.padded_rows:
        done = "added to" if way == "hf-to-gptoughts" else "left out of"
        print(f"  {made.padded_rows} rows of padding {done} the vocabulary")
