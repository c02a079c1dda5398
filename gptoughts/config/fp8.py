"""FP8's section of the tree: its defaults, what may stay out of FP8, and what cannot be combined; imports no torch."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

from gptoughts.config.experiment import ExperimentConfig, Fp8Config
from gptoughts.config.options import LARGEST
from gptoughts.config.settings import Setting

FP8_CHOICES: Mapping[str, tuple[str, ...]] = {
    "format": ("hybrid", "e4m3"),
    "recipe": ("delayed",),
    "amax_compute_algo": ("max", "most_recent"),
    "backend": ("auto", "te", "emulated"),
}
"""Key -> the words it may have."""
ALWAYS_KEPT = ("embedding", "output_layer")
"""megatron-core builds both outside Transformer Engine: neither backend has an FP8 form of them."""
FROM_REPORT = "auto"
MAX_MARGIN = 64
"""Beyond it every scale underflows."""
_DEFAULTS = Fp8Config(
    format="hybrid", recipe="delayed", margin=0, amax_history_len=1024, amax_compute_algo="max", backend="auto"
)
"""``transformer_engine.common.recipe.DelayedScaling``'s own defaults (megatron-core's are a history of 1)."""
_ENDS = re.compile(r"(first|last)_(\d+)_layers?")


def is_fp8_state(name: str) -> bool:
    """Whether a tensor of a checkpoint is one of FP8's histories and scales, by its global name."""
    return ".fp8." in name


def filled_fp8(config: ExperimentConfig) -> Fp8Config:
    """The section of a resolved run: nothing unset where FP8 is on, nothing set where it is off."""
    if not config.use_fp8:
        return Fp8Config()
    section = config.fp8
    unset = {f.name: getattr(_DEFAULTS, f.name) for f in fields(section) if getattr(section, f.name) is None}
    return replace(section, **unset, keep_bf16=with_always_kept(section.keep_bf16))


def with_always_kept(words: list[str]) -> list[str]:
    """``fp8.keep_bf16`` with what stays out of FP8 in any case, each word once."""
    return list(dict.fromkeys([*ALWAYS_KEPT, *words]))


def fp8_problems(config: ExperimentConfig, explicit: Mapping[str, Setting]) -> list[str]:
    """Whatever of the section cannot be done, one line each."""
    if not config.use_fp8:
        return [
            f"{name}={setting.value} ({setting.source}): FP8 is off; add --use_fp8 true"
            for name, setting in explicit.items()
            if name.startswith(("fp8.", "log.fp8")) and setting.value not in (None, [], False)
        ]
    problems = []
    section = config.fp8
    source = explicit["fp8.keep_bf16"].source if "fp8.keep_bf16" in explicit else config.deepspeed_config
    for word in section.keep_bf16:
        match = _ENDS.fullmatch(word)
        if match and not 1 <= int(match[2]) < LARGEST:
            problems.append(f"fp8.keep_bf16={word} ({source}): a number of layers from 1 on is expected")
        elif match and int(match[2]) >= config.model.num_layers:
            problems.append(
                f"fp8.keep_bf16={word} ({source}): model.num_layers={config.model.num_layers} leaves no layer for FP8; "
                "use fewer, or --use_fp8 false"
            )
        elif not word:
            problems.append(f"fp8.keep_bf16 ({source}): an empty name")
    if FROM_REPORT in section.keep_bf16 and section.report is None:
        problems.append(
            f"fp8.keep_bf16={FROM_REPORT} ({source}): needs fp8.report, the folder of a run that was trained with "
            "--log.fp8 true"
        )
    if section.report is not None and FROM_REPORT not in section.keep_bf16:
        problems.append(f"fp8.report={section.report}: is read for fp8.keep_bf16={FROM_REPORT} only; add that")
    if section.margin is not None and section.margin > MAX_MARGIN:
        problems.append(f"fp8.margin={section.margin}: from 0 to {MAX_MARGIN}; every scale would vanish")
    return problems


def is_kept(name: str, words: Iterable[str], num_layers: int) -> bool:
    """Whether a module stays out of FP8.

    Args:
        name: Its global name, e.g. ``decoder.layers.3.mlp.linear_fc2``.
        words: ``fp8.keep_bf16``.
        num_layers: Layers of the decoder.
    """
    return any(_matches(name, word, num_layers) for word in words)


def unmatched(names: Iterable[str], words: Iterable[str], num_layers: int) -> list[str]:
    """The words that no module answers to, but those that are always right."""
    known = list(names)
    free = (*ALWAYS_KEPT, FROM_REPORT)
    return [word for word in words if word not in free and not any(_matches(name, word, num_layers) for name in known)]


def _matches(name: str, word: str, num_layers: int) -> bool:
    ends = _ENDS.fullmatch(word)
    if ends is None:
        return fnmatch.fnmatchcase(name, word) or name.startswith(f"{word}.")
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer is None:
        return False
    index, count = int(layer[1]), int(ends[2])
    return index < count if ends[1] == "first" else index >= num_layers - count
