"""DeepSpeed's JSON: reading and checking it, the values of the tree that it holds, and what DeepSpeed is given."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.config.deepspeed_auto import automatic_values, parameters_on_rank
from gptoughts.config.deepspeed_keys import BLOCKS, TOP_LEVEL, Kind, Rule
from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.offload import automatic_offload, offload_problems
from gptoughts.config.options import LARGEST, did_you_mean

AUTO = "auto"
_KINDS: Mapping[Kind, tuple[str, tuple[type, ...]]] = {
    "bool": ("true or false", (bool,)),
    "int": ("a whole number", (int,)),
    "number": ("a number", (int, float)),
    "text": ("a text", (str,)),
    "block": ("a block {...}", (dict,)),
}


@dataclass(frozen=True)
class DeepSpeedJson:
    """One DeepSpeed JSON file."""

    values: dict[str, Any]
    label: str
    """The file's path, for messages."""

    def at(self, dotted: str) -> Any:
        """The value under a dotted key; None where it is not there."""
        found: Any = self.values
        for part in dotted.split("."):
            if not isinstance(found, dict) or part not in found:
                return None
            found = found[part]
        return found

    def concrete(self, dotted: str) -> Any:
        """As :meth:`at`, but ``"auto"`` is None as well."""
        found = self.at(dotted)
        return None if found == AUTO else found

    @property
    def zero_stage(self) -> int:
        """ZeRO stage; 0 where the file has none (or a wrong one, which is reported elsewhere)."""
        stage = self.concrete("zero_optimization.stage")
        return stage if isinstance(stage, int) and stage in range(4) else 0


def read_json(path: str | None, problems: list[str]) -> DeepSpeedJson:
    """Read and check ``path``; None gives an empty file. What is wrong goes to ``problems``, a line each."""
    if path is None:
        return DeepSpeedJson({}, "deepspeed_config")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        problems.append(f"{path}: no valid JSON in line {error.lineno}, column {error.colno}: {error.msg}")
        return DeepSpeedJson({}, path)
    except (OSError, ValueError) as error:
        problems.append(f"deepspeed_config={path}: cannot be used: {getattr(error, 'strerror', None) or error}")
        return DeepSpeedJson({}, path)
    if not isinstance(values, dict):
        problems.append(f"{path}: expected a block {{...}}, found {type(values).__name__}")
        return DeepSpeedJson({}, path)
    found = DeepSpeedJson(values, path)
    problems += _check_block(values, "", TOP_LEVEL, path)
    problems += _check_zero(found)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"key '{twice[0]}' stands there twice")
    return dict(pairs)


def _check_block(values: Mapping[str, Any], prefix: str, rules: Mapping[str, Rule], label: str) -> list[str]:
    problems = []
    for key, value in values.items():
        name, rule = prefix + key, rules.get(key)
        if rule is None:
            problems.append(f"{label}: unknown key '{name}'" + did_you_mean(key, rules))
        elif rule.action == "refused":
            if not _asks_for_nothing(value, rule):
                problems.append(f"{label}: {name}={json.dumps(value)} is refused: {rule.note}")
        elif value == AUTO:
            if not rule.auto:
                problems.append(f'{label}: {name}="auto": no flag or rule fills it in; write a value or leave it out')
        elif value is None:
            problems.append(f"{label}: {name}=null: leave the key out instead")
        elif not _is_kind(value, rule.kind):
            problems.append(f"{label}: {name}={json.dumps(value)}: expected {_KINDS[rule.kind][0]}")
        elif isinstance(value, dict) and name in BLOCKS:
            problems += _check_block(value, f"{name}.", BLOCKS[name], label)
        elif isinstance(value, int | float) and not 0 <= value < LARGEST:
            problems.append(f"{label}: {name}={value}: must be 0 or more, and finite")
    return problems


def _asks_for_nothing(value: Any, rule: Rule) -> bool:
    if isinstance(value, dict):
        return not value or value.get("enabled") is False
    return any(value == h and isinstance(value, bool) == isinstance(h, bool) for h in rule.harmless)


def _is_kind(value: Any, kind: Kind) -> bool:
    if kind == "any":
        return True
    if isinstance(value, bool):
        return kind == "bool"
    if kind == "int" and isinstance(value, float):
        return value.is_integer()  # 5e8 is how DeepSpeed's own examples write a bucket
    return isinstance(value, _KINDS[kind][1])


def _check_zero(found: DeepSpeedJson) -> list[str]:
    problems = []
    stage = found.at("zero_optimization.stage")
    if isinstance(stage, int) and stage not in range(4):
        problems.append(f"{found.label}: zero_optimization.stage={stage}: allowed: 0, 1, 2, 3")
    if found.zero_stage < 2 and found.at("zero_optimization.overlap_comm") is True:
        problems.append(
            f"{found.label}: zero_optimization.overlap_comm=true needs stage 2 or 3 (stage is {found.zero_stage}): "
            "below, DeepSpeed has no overlap with caller-owned accumulation"
        )
    problems += offload_problems(found.label, found.zero_stage, found.at)
    for key in ("communication_data_type", "data_types.grad_accum_dtype"):
        dtype = found.at(key)
        if isinstance(dtype, str) and dtype not in ("fp32", "bf16", "fp16"):
            problems.append(f'{found.label}: {key}="{dtype}": allowed: fp32, bf16, fp16')
        elif dtype is not None and found.zero_stage == 0:
            problems.append(f"{found.label}: {key} needs ZeRO stage 1, 2 or 3")
    return problems


def expert_parallel_problems(found: DeepSpeedJson, config: ExperimentConfig) -> list[str]:
    """A line for each value of the file with which DeepSpeed cannot shard experts of their own ranks."""
    if config.parallel.expert == 1 or found.zero_stage not in (1, 2):
        return []
    # stage_1_and_2.py:863-870 (0.19.8): its other ways to reduce know one group of ranks only.
    return [
        f"{found.label}: zero_optimization.{key}=false: with parallel.expert={config.parallel.expert} DeepSpeed's "
        "stages 1 and 2 need it; leave the key out"
        for key in ("reduce_scatter", "contiguous_gradients")
        if found.at(f"zero_optimization.{key}") is False
    ]


def for_deepspeed(found: DeepSpeedJson, config: ExperimentConfig, data_parallel_size: int) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given: no ``"auto"``, nothing of ours, nothing that asks for nothing.

    Args:
        found: A file without problems.
        config: The resolved tree.
        data_parallel_size: Data-parallel ranks.
    """
    given = _pruned(copy.deepcopy(found.values), TOP_LEVEL, "")
    automatic = automatic_values(config, found.zero_stage)
    zero = given.setdefault("zero_optimization", {})
    zero["stage"] = found.zero_stage
    part = parameters_on_rank(config) // (config.parallel.pipeline * config.parallel.context * data_parallel_size)
    automatic |= automatic_offload(zero, config.output_dir, max(1, part))
    for name, value in automatic.items():
        block, _, key = name.rpartition(".")
        holder: Any = given
        for part_of_name in block.split("."):
            holder = holder.get(part_of_name)
            if holder is None:
                break
        if holder is not None and holder.get(key) in (None, AUTO, ""):
            holder[key] = value
    given["train_micro_batch_size_per_gpu"] = config.batch_size
    # the schedule accumulates: DeepSpeed would divide the loss a second time (engine.py, "managed" accumulation)
    given["gradient_accumulation_steps"] = 1
    given["managed_gradient_accumulation"] = False
    given["gradient_clipping"] = config.grad_clip
    precision = config.train.precision
    given["bf16"] = given.get("bf16", {}) | {"enabled": precision == "bf16"}
    given["fp16"] = given.get("fp16", {}) | {"enabled": precision == "fp16"}
    return given


def _pruned(values: dict[str, Any], rules: Mapping[str, Rule], prefix: str) -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        if rules[key].action != "honoured":
            continue
        name = prefix + key
        if isinstance(value, dict) and name in BLOCKS:
            value = _pruned(value, BLOCKS[name], f"{name}.")
        elif rules[key].kind == "int" and isinstance(value, float):
            value = int(value)
        kept[key] = value
    return kept
