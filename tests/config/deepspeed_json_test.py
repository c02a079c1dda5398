"""DeepSpeed's JSON: the table against the installed DeepSpeed, messages, translations, what DeepSpeed is given."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gptoughts.config.cli import load_experiment
from gptoughts.config.deepspeed_keys import BLOCKS, TOP_LEVEL
from gptoughts.config.resolve import Experiment
from gptoughts.errors import ConfigError
from gptoughts.models.registry import FAMILIES

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


@pytest.fixture
def load(tmp_path: Path):
    def run(values: Any, *argv: str, world_size: int = 1) -> Experiment:
        path = tmp_path / "ds.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return load_experiment(["--deepspeed_config", str(path), *argv], FAMILIES, world_size=world_size)

    return run


@pytest.fixture
def refused(load):
    def run(values: Any, *argv: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(values, *argv)
        return "\n".join(caught.value.problems)

    return run


class _Recorder(dict[str, Any]):
    """A dict that notes every key that is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        recorder = self

        class Keys:
            def __contains__(self, key: object) -> bool:
                return key in recorder

            def __iter__(self) -> Any:
                return dict.__iter__(recorder)

        return Keys()

    def __copy__(self) -> _Recorder:
        return self


def test_the_table_names_every_key_that_the_installed_deepspeed_reads() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    recorder = _Recorder(train_micro_batch_size_per_gpu=1)
    DeepSpeedConfig(recorder)
    assert len(recorder.asked) > 40  # the recorder works
    assert recorder.asked - TOP_LEVEL.keys() == set()


def test_blocks_name_every_field_of_the_installed_deepspeed() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
    }
    for block, model in models.items():
        known = {field.alias or name for name, field in model.model_fields.items()}
        assert known - BLOCKS[block].keys() == set(), block
        invented = {k for k, rule in BLOCKS[block].items() if rule.action == "honoured"} - known
        assert invented == set(), f"DeepSpeed does not have {block}.{invented}"


def test_every_honoured_block_has_its_keys() -> None:
    for rules, prefix in [(TOP_LEVEL, "")] + [(rules, f"{name}.") for name, rules in BLOCKS.items()]:
        for key, rule in rules.items():
            if rule.kind == "block" and key not in ("optimizer", "scheduler"):
                assert prefix + key in BLOCKS


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
@pytest.mark.parametrize("world_size", [1, 2])
def test_shipped_files_are_accepted_by_us_and_by_deepspeed(path: Path, world_size: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    run = load_experiment(
        ["--deepspeed_config", str(path), "--batch_size", "3", "--grad_clip", "0.5"], FAMILIES, world_size=world_size
    )
    assert "auto" not in json.dumps(run.deepspeed)
    assert run.zero_stage == int(path.stem[4])
    config = DeepSpeedConfig(json.loads(json.dumps(run.deepspeed)))
    assert config.train_micro_batch_size_per_gpu == 3
    assert config.gradient_clipping == 0.5
    assert config.gradient_accumulation_steps == 1
    assert config.managed_gradient_accumulation is False
    assert config.zero_optimization_stage == run.zero_stage
    assert config.bfloat16_config.enabled
    if run.zero_stage == 3:
        assert config.zero_config.param_persistence_threshold == 10 * run.config.model.hidden_size


def test_shipped_files_are_there_and_every_key_is_explained() -> None:
    names = {"zero1", "zero2", "zero3", "zero2_offload", "zero3_fp8", "zero3_offload", "zero3_infinity"}
    assert {p.stem for p in SHIPPED} == names
    text = (SHIPPED[0].parent / "README.md").read_text()

    def keys(block: dict[str, Any]) -> set[str]:
        return set(block) | {k for v in block.values() if isinstance(v, dict) for k in keys(v)}

    for path in SHIPPED:
        for key in keys(json.loads(path.read_text())):
            assert f"`{key}`" in text, key


def test_the_readme_prints_the_whole_table() -> None:
    text = (SHIPPED[0].parent / "README.md").read_text()
    for prefix, rules in [("", TOP_LEVEL)] + [(f"{name}.", rules) for name, rules in BLOCKS.items()]:
        for key, rule in rules.items():
            assert f"| `{prefix}{key}` | {rule.action} | {rule.note} |" in text, (
                f"{prefix}{key}: regenerate with `python -m gptoughts.config.deepspeed_table`"
            )


def test_offload_to_a_disk_is_filled_in_from_the_runs_folder_and_the_size_of_a_ranks_part(load) -> None:
    offload = {"offload_optimizer": {"device": "nvme", "pipeline_read": True}, "offload_param": {"device": "nvme"}}
    run = load({"zero_optimization": {"stage": 3, **offload}}, "--output_dir=runs/here", "--size=small")
    zero = run.deepspeed["zero_optimization"]
    assert zero["offload_optimizer"]["nvme_path"] == zero["offload_param"]["nvme_path"] == "runs/here/swap"
    assert zero["offload_optimizer"]["buffer_count"] == 8
    assert zero["offload_param"]["max_in_cpu"] == 0
    assert zero["sub_group_size"] == -(-run.config.model.total_parameters() // 8)
    plain = load({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})
    assert plain.deepspeed["zero_optimization"]["sub_group_size"] == 10**9


def test_no_file_is_stage_zero_in_bf16() -> None:
    run = load_experiment([], FAMILIES, world_size=1)
    assert run.deepspeed == {
        "zero_optimization": {"stage": 0},
        "train_micro_batch_size_per_gpu": run.config.batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }


def test_concrete_values_win_over_defaults_and_land_in_the_tree(load) -> None:
    run = load(
        {
            "train_batch_size": 12, "train_micro_batch_size_per_gpu": 3, "gradient_clipping": 0.25,
            "bf16": {"enabled": False}, "fp8": {"enabled": False},
            "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0}},
            "scheduler": {"type": "WarmupCosineLR", "params": {
                "total_num_steps": 50, "warmup_num_steps": 5, "cos_min_ratio": 0.2, "warmup_type": "linear"}},
        },
        world_size=2,
    )  # fmt: skip
    config, optim = run.config, run.config.optim
    assert (config.batch_size, config.train.global_batch_size, run.num_microbatches) == (3, 12, 2)
    assert (config.grad_clip, config.train.precision, config.train.steps) == (0.25, "fp32", 50)
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (2e-4, 0.8, 0.9, 1e-6, 0.0)
    assert (optim.schedule, optim.warmup_steps, optim.min_lr_fraction) == ("cosine", 5, 0.2)
    assert not {"optimizer", "scheduler", "fp8", "train_batch_size"} & run.deepspeed.keys()
    assert run.sources["optim.lr"].endswith("ds.json")


def test_linear_decay_and_constant_schedules(load) -> None:
    linear = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_type": "linear"}}
    optim = load({"scheduler": linear}).config.optim
    assert (optim.schedule, optim.decay_fraction, optim.min_lr_fraction) == ("wsd", 1.0, 0.0)
    constant = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_type": "linear", "warmup_min_lr": 0}}
    optim = load({"scheduler": constant}).config.optim
    assert (optim.schedule, optim.lr) == ("constant", 1e-2)


def test_auto_is_filled_by_flags(load) -> None:
    run = load(
        {
            "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
            "optimizer": {"type": "Adam", "params": {"lr": "auto"}},
            "csv_monitor": {"enabled": True, "output_path": "auto"},
        },
        "--batch_size", "5", "--grad_clip", "2", "--train.precision", "fp32", "--optim.lr", "0.5", "--output_dir", "o",
    )  # fmt: skip
    assert run.deepspeed["train_micro_batch_size_per_gpu"] == 5
    assert run.deepspeed["gradient_clipping"] == 2.0
    assert run.deepspeed["bf16"] == {"enabled": False}
    assert run.deepspeed["csv_monitor"]["output_path"] == os.path.join("o", "monitor")
    assert run.config.optim.lr == 0.5


@pytest.mark.parametrize(
    ("values", "flag", "part"),
    [
        ({"train_batch_size": 8}, "--train.global_batch_size=4", "contradicts train_batch_size=8"),
        ({"gradient_accumulation_steps": 8}, "--train.gradient_accumulation_steps=4", "gradient_accumulation_steps=8"),
        ({"gradient_clipping": 1.5}, "--grad_clip=1", "grad_clip=1.0 (command line) contradicts gradient_clipping=1.5"),
        ({"bf16": {"enabled": True}}, "--train.precision=fp32", "train.precision=fp32 (command line) contradicts "
                                                                "bf16.enabled=true"),
        ({"bf16": {"enabled": False}}, "--train.precision=bf16", "contradicts bf16.enabled=false"),
        ({"fp8": {"enabled": False}}, "--use_fp8=true", "use_fp8=true (command line) contradicts fp8.enabled=false"),
        ({"fp8": {"enabled": True, "margin": 0}}, "--fp8.margin=1",
         "fp8.margin=1 (command line) contradicts fp8.margin=0"),
        ({"fp8": {"enabled": True, "backend": "te"}}, "--fp8.backend=emulated", "contradicts fp8.backend=te"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "--optim.lr=2", "contradicts optimizer.params.lr=1"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear"}}}, "--optim.schedule=wsd",
         "optim.schedule=wsd (command line) contradicts scheduler.type=WarmupLR"),
    ],
)  # fmt: skip
def test_contradictions_name_both_places(refused, values: dict[str, Any], flag: str, part: str) -> None:
    text = refused(values, flag)
    assert part in text
    assert "ds.json" in text


def test_equal_values_are_no_contradiction(load) -> None:
    assert load({"gradient_clipping": 1}, "--grad_clip", "1.0").config.grad_clip == 1.0


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"gradient_acumulation_steps": 2}, "unknown key 'gradient_acumulation_steps'; did you mean "
                                            "'gradient_accumulation_steps'?"),
        ({"zero_optimization": {"stge": 1}}, "unknown key 'zero_optimization.stge'; did you mean 'stage'?"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage=7: allowed: 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage="auto": no flag or rule'),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "overlap_comm=true needs stage 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer needs"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
         "zero_optimization.offload_optimizer to nvme needs stage 3 or more (stage is 2)"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "disk"}}}, "allowed: none, cpu, nvme"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "nvme_path": "/tmp"}}},
         'offload_optimizer.nvme_path belongs to "device": "nvme" (device is "cpu")'),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "buffer_count": 3}}},
         "offload_optimizer.buffer_count=3: at least 4"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "buffer_count": 8,
                                                                  "pipeline_read": True, "pipeline_write": True}}},
         "offload_optimizer.buffer_count=8: at least 12"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "buffer_size": 100}}},
         "offload_param.buffer_size=100 is refused: buffers are made as weights are fetched"),
        ({"zero_optimization": {"stage": 3}, "aio": {"queue_depth": 8}}, "aio belongs to an offload to"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}, "aio": {"queue_depth": 0}},
         "aio.queue_depth=0: must be 1 or more"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}, "aio": {"block_size": 1000}},
         "aio.block_size=1000: must be a multiple of 4096 bytes, a disk's block"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}, "aio": {"use_gds": True}},
         "aio.use_gds=true is refused: GPUDirect Storage is not supported"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "quantised collectives"),
        ({"zero_optimization": 3}, "zero_optimization=3: expected a block"),
        ({"train_batch_size": "8"}, 'train_batch_size="8": expected a whole number'),
        ({"train_batch_size": 8.5}, "expected a whole number"),
        ({"gradient_clipping": -1}, "gradient_clipping=-1: must be 0 or more"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled=1: expected true or false"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "are both true"),
        ({"fp8": {"enabled": 1}}, "fp8.enabled=1: expected true or false"),
        ({"fp8": {"margins": 0}}, "unknown key 'fp8.margins'; did you mean 'margin'?"),
        ({"fp8": {"enabled": True, "format": "e5m2"}}, 'fp8.format="e5m2": allowed: hybrid, e4m3'),
        ({"fp8": {"enabled": True, "recipe": "tensorwise"}}, 'fp8.recipe="tensorwise": allowed: delayed'),
        ({"fp8": {"enabled": True, "amax_history_len": 0}}, "fp8.amax_history_len=0"),
        ({"fp8": {"enabled": True, "margin": 100}}, "fp8.margin=100: from 0 to 64"),
        ({"fp8": {"enabled": True, "keep_bf16": "embedding"}}, "fp8.keep_bf16=embedding: expected a list of texts"),
        ({"fp8": {"enabled": True, "keep_bf16": ["last_4_layers"]}}, "model.num_layers=4 leaves no layer for FP8"),
        ({"compile": {"deepcompile": True}}, "DeepCompile refuses caller-owned accumulation"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type=Lamb is refused"),
        ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}, "unknown key 'optimizer.params.lea"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "adam_w_mode=False is refused"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type=OneCycle is refused"),
        ({"scheduler": {"type": "WarmupLR"}}, "warmup_type=log (DeepSpeed's default is log) is refused"),
        ({"communication_data_type": "fp16"}, "communication_data_type needs ZeRO stage"),
        ({"managed_gradient_accumulation": True}, "must not divide a second time"),
        ('{"gradient_clipping": Infinity}', "gradient_clipping=inf: must be 0 or more, and finite"),
        ({"bf16": None}, "bf16=null: leave the key out"),
        ("{", "no valid JSON in line 1"),
        ("[]", "expected a block"),
        ('{"bf16": {}, "bf16": {}}', "key 'bf16' stands there twice"),
    ],
)  # fmt: skip
def test_refusals(refused, values: Any, part: str) -> None:
    assert part in refused(values)


@pytest.mark.parametrize("key", sorted(k for k, rule in TOP_LEVEL.items() if rule.action == "refused"))
def test_refused_keys_give_their_reason_and_pass_where_they_ask_for_nothing(refused, load, key: str) -> None:
    assert f'{key}="yes" is refused: {TOP_LEVEL[key].note}' in refused({key: "yes"})
    off = load({key: {"enabled": False}})
    assert off.deepspeed.get(key) in (None, False)  # only managed_gradient_accumulation is set, by us


def test_bucket_values_that_are_given_stay(load) -> None:
    run = load({"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e5, "stage3_prefetch_bucket_size": 7}})
    zero = run.deepspeed["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (500_000, 7)
    assert isinstance(zero["reduce_bucket_size"], int)
    assert zero["allgather_bucket_size"] == run.config.model.total_parameters()
