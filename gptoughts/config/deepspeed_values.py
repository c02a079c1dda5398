"""Values of the tree that DeepSpeed's JSON may hold: batch, clipping, precision, optimizer, scheduler, FP8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gptoughts.config.deepspeed_json import AUTO, DeepSpeedJson
from gptoughts.config.fp8 import FP8_CHOICES, with_always_kept
from gptoughts.config.options import LARGEST, did_you_mean


@dataclass(frozen=True)
class JsonValue:
    """A concrete value in the JSON that has a home in the tree."""

    value: Any
    key: str
    """The JSON's key, dotted."""
    written: Any
    """The value as it stands there."""


_DIRECT = {
    "batch_size": "train_micro_batch_size_per_gpu",
    "train.global_batch_size": "train_batch_size",
    "train.gradient_accumulation_steps": "gradient_accumulation_steps",
    "grad_clip": "gradient_clipping",
    "use_fp8": "fp8.enabled",
}
_BETAS = ("optim.beta1", "optim.beta2")
_ADAMW_FACTS: Mapping[str, Any] = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False}


def tree_values(found: DeepSpeedJson, problems: list[str]) -> dict[str, JsonValue]:
    """Dotted name in the tree -> what the JSON says of it; ``"auto"`` and absent keys say nothing."""
    values = {}
    for name, key in _DIRECT.items():
        value = found.concrete(key)
        if name == "use_fp8":
            if isinstance(value, bool):
                values[name] = JsonValue(value, key, value)
        elif _is_number(value):  # anything else has been reported as a wrong type
            values[name] = JsonValue(float(value) if name == "grad_clip" else int(value), key, value)
    values |= _precision(found, problems)
    values |= _optimizer(found, problems)
    values |= _scheduler(found, problems)
    values |= _fp8(found, problems)
    return values


def _fp8(found: DeepSpeedJson, problems: list[str]) -> dict[str, JsonValue]:
    """The ``fp8`` block; numbers and texts of a wrong type have been reported."""
    values = {}
    for key, allowed in FP8_CHOICES.items():
        value = found.at(f"fp8.{key}")
        if isinstance(value, str) and value != AUTO:
            if value in allowed:
                values[f"fp8.{key}"] = JsonValue(value, f"fp8.{key}", value)
            else:
                problems.append(
                    f'{found.label}: fp8.{key}="{value}": allowed: {", ".join(allowed)}' + did_you_mean(value, allowed)
                )
    for key in ("margin", "amax_history_len"):
        value = found.concrete(f"fp8.{key}")
        if _is_number(value):
            values[f"fp8.{key}"] = JsonValue(int(value), f"fp8.{key}", value)
    kept = found.concrete("fp8.keep_bf16")
    if isinstance(kept, list) and all(isinstance(word, str) for word in kept):
        values["fp8.keep_bf16"] = JsonValue(with_always_kept(kept), "fp8.keep_bf16", kept)
    elif kept is not None:
        problems.append(f'{found.label}: fp8.keep_bf16={kept}: expected a list of texts, or "auto"')
    return values


def _precision(found: DeepSpeedJson, problems: list[str]) -> dict[str, JsonValue]:
    bf16, fp16 = found.concrete("bf16.enabled"), found.concrete("fp16.enabled")
    if bf16 is True and fp16 is True:
        problems.append(f"{found.label}: bf16.enabled and fp16.enabled are both true; switch one off")
    if bf16 is True:
        return {"train.precision": JsonValue("bf16", "bf16.enabled", True)}
    if fp16 is True:
        return {"train.precision": JsonValue("fp16", "fp16.enabled", True)}
    others = found.at("fp16.enabled") != AUTO and found.at("bf16.enabled") != AUTO
    if bf16 is False and others:
        return {"train.precision": JsonValue("fp32", "bf16.enabled", False)}
    return {}


def _optimizer(found: DeepSpeedJson, problems: list[str]) -> dict[str, JsonValue]:
    block = found.at("optimizer")
    if not isinstance(block, dict):
        return {}
    label, kind = found.label, block.get("type")
    for key in block.keys() - {"type", "params"}:
        problems.append(f"{label}: unknown key 'optimizer.{key}'" + did_you_mean(key, ("type", "params")))
    if not isinstance(kind, str) or kind.lower() not in ("adam", "adamw"):
        problems.append(f"{label}: optimizer.type={kind} is refused: the optimizer is AdamW; allowed: AdamW, Adam")
        return {}
    values: dict[str, JsonValue] = {}
    params = _block(block.get("params", {}), "optimizer.params", label, problems)
    for key, value in params.items():
        where = f"optimizer.params.{key}"
        if key in _ADAMW_FACTS:
            if value is not _ADAMW_FACTS[key]:
                problems.append(f"{label}: {where}={value} is refused: AdamW here has {key}={_ADAMW_FACTS[key]}")
        elif key == "torch_adam":
            problems.append(f"{label}: {where} is refused: the engine chooses the implementation")
        elif key == "betas":
            if value == AUTO:
                continue
            if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)):
                problems.append(f"{label}: {where}={value}: expected two numbers")
            else:
                values |= {n: JsonValue(float(v), where, value) for n, v in zip(_BETAS, value, strict=True)}
        elif key in ("lr", "eps", "weight_decay"):
            _take(values, f"optim.{key}", where, value, float, label, problems)
        else:
            known = ("lr", "betas", "eps", "weight_decay", *_ADAMW_FACTS)
            problems.append(f"{label}: unknown key '{where}'" + did_you_mean(key, known))
    return values


_WARMUP_KEYS = ("warmup_num_steps", "warmup_type")
_SCHEDULERS: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # type -> (what it fixes in the tree, its parameters)
    "WarmupLR": ({"optim.schedule": "constant"}, ("warmup_min_lr", "warmup_max_lr", *_WARMUP_KEYS)),
    "WarmupDecayLR": (  # linear from the warmup to the end
        {"optim.schedule": "wsd", "optim.decay_fraction": 1.0, "optim.min_lr_fraction": 0.0},
        ("total_num_steps", "warmup_min_lr", "warmup_max_lr", *_WARMUP_KEYS),
    ),
    "WarmupCosineLR": (
        {"optim.schedule": "cosine"}, ("total_num_steps", "warmup_min_ratio", "cos_min_ratio", *_WARMUP_KEYS),
    ),
}  # fmt: skip
_SCHEDULER_HOMES: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "total_num_steps": ("train.steps", int),
    "warmup_num_steps": ("optim.warmup_steps", int),
    "warmup_max_lr": ("optim.lr", float),
    "cos_min_ratio": ("optim.min_lr_fraction", float),
}


def _scheduler(found: DeepSpeedJson, problems: list[str]) -> dict[str, JsonValue]:
    block = found.at("scheduler")
    if not isinstance(block, dict):
        return {}
    label, kind = found.label, block.get("type")
    for key in block.keys() - {"type", "params"}:
        problems.append(f"{label}: unknown key 'scheduler.{key}'" + did_you_mean(key, ("type", "params")))
    if not isinstance(kind, str) or kind not in _SCHEDULERS:
        allowed = ", ".join(_SCHEDULERS)
        problems.append(
            f"{label}: scheduler.type={kind} is refused: the learning rate is a function of our own step counter, "
            f"--optim.schedule; translated: {allowed}"
        )
        return {}
    fixed, known = _SCHEDULERS[kind]
    values = {name: JsonValue(value, "scheduler.type", kind) for name, value in fixed.items()}
    params = _block(block.get("params", {}), "scheduler.params", label, problems)
    if params.get("warmup_type", "log") not in ("linear", AUTO):
        problems.append(
            f"{label}: scheduler.params.warmup_type={params.get('warmup_type', 'log')} (DeepSpeed's default is log) is "
            'refused: the warmup is linear; write "linear"'
        )
    for key, value in params.items():
        where = f"scheduler.params.{key}"
        if key not in known:
            problems.append(f"{label}: unknown key '{where}'" + did_you_mean(key, known))
        elif key in ("warmup_min_lr", "warmup_min_ratio"):
            if value not in (0, AUTO):
                problems.append(f"{label}: {where}={value} is refused: the warmup starts from 0")
        elif key in _SCHEDULER_HOMES:
            name, convert = _SCHEDULER_HOMES[key]
            _take(values, name, where, value, convert, label, problems)
    return values


def _block(value: Any, name: str, label: str, problems: list[str]) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    problems.append(f"{label}: {name}={value}: expected a block {{...}}")
    return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _take(
    values: dict[str, JsonValue], name: str, key: str, value: Any, convert: Callable[[Any], Any], label: str,
    problems: list[str],
) -> None:  # fmt: skip
    if value == AUTO:
        return
    if not _is_number(value) or (convert is int and value != int(value)):
        problems.append(f"{label}: {key}={value}: expected a {'whole ' if convert is int else ''}number")
        return
    values[name] = JsonValue(convert(value), key, value)
