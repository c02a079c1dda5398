"""The command line: precedence, messages, round trips; everything goes through load_experiment."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from gptoughts.config.cli import from_yaml, load_experiment, to_yaml
from gptoughts.config.deepspeed_keys import BLOCKS, TOP_LEVEL
from gptoughts.config.experiment import ExperimentConfig
from gptoughts.config.options import tree_options
from gptoughts.config.resolve import Experiment, Inspection
from gptoughts.errors import ConfigError
from gptoughts.models.registry import FAMILIES


def load(*argv: str, world_size: int = 1, inspect=None) -> Experiment:
    return load_experiment(argv, FAMILIES, world_size=world_size, inspect=inspect)


def problems(*argv: str, world_size: int = 1, inspect=None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*argv, world_size=world_size, inspect=inspect)
    return caught.value.problems


def write(path: Path, text: str | dict) -> str:
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return str(path)


def test_order_is_default_preset_yaml_flags(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "seed: 1\noptim: {lr: 3e-4, beta2: 0.99}\nmodel: {num_layers: 3}\n")
    second = write(tmp_path / "b.yaml", "seed: 2\n")
    run = load("--size", "small", "--config", first, "--config", second, "--model.num_layers=5")
    config, preset = run.config, FAMILIES["gpt"].presets["small"]
    assert config.optim.beta1 == ExperimentConfig().optim.beta1  # default
    assert config.model.hidden_size == preset.model.hidden_size  # preset
    assert config.batch_size == preset.batch_size
    assert (config.optim.lr, config.optim.beta2, config.seed) == (3e-4, 0.99, 2)  # YAML, the later file wins
    assert config.model.num_layers == 5  # flag
    assert run.sources["model.num_layers"] == "command line"
    assert run.sources["optim.lr"] == first
    assert run.sources["seed"] == second
    assert run.sources["model.hidden_size"] == "preset gpt/small"
    assert run.sources["optim.beta1"] == "default"


def test_yaml_chooses_family_and_size_unless_a_flag_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "model_type: mla\nsize: small\nmodel: {kv_lora_rank: 64}\n")
    assert load("--config", path).config.model.kv_lora_rank == 64
    assert load("--config", path, "--size", "debug").config.model.num_layers == 4
    assert any("model.kv_lora_rank" in p for p in problems("--config", path, "--model_type", "gpt"))


def test_everyday_flags_and_data_shorthand() -> None:
    run = load(
        "--data", "0.3", "a", "0.7", "b", "--batch_size=2", "--block_size", "128", "--grad_clip", "0",
        "--use_fp8", "false", "--output_dir", "123", "--dry_run", "--local_rank=3", "--resume", "none",
    )  # fmt: skip
    config = run.config
    assert config.data.train == ["0.3", "a", "0.7", "b"]
    assert (config.batch_size, config.grad_clip, config.use_fp8, config.resume) == (2, 0.0, False, "none")
    assert config.block_size == config.model.seq_length == 128
    assert config.output_dir == "123"  # a text, not a number
    assert run.dry_run


@pytest.mark.parametrize(
    ("flag", "meant"),
    [("--batch-size", "--batch_size"), ("--lr", "--optim.lr"), ("--parallel.tensro", "--parallel.tensor"),
     ("--steps", "--train.steps"), ("--dryrun", "--dry_run"), ("--dataa", "--data")],
)  # fmt: skip
def test_unknown_flag_names_the_nearest(flag: str, meant: str) -> None:
    (problem,) = problems(flag, "1")
    assert problem == f"{flag} (command line): unknown flag; did you mean {meant}?"


def test_all_problems_come_together(tmp_path: Path) -> None:
    json_path = write(tmp_path / "z.json", {"gradient_acumulation_steps": 2, "train_micro_batch_size_per_gpu": 4})
    yaml_path = write(tmp_path / "y.yaml", "optim: {beta3: 1}\nseed: many\n")
    found = problems(
        "--frobnicate", "1", "--batch_size", "8", "--deepspeed_config", json_path, "--config", yaml_path,
        "--model.num_attention_heads", "8", "--parallel.tensor", "3", "--train.steps", "0.5",
        world_size=3, inspect=lambda config: Inspection(None, ["corpus is missing"]),
    )  # fmt: skip
    text = "\n".join(found)
    assert (
        f"{json_path}: unknown key 'gradient_acumulation_steps'; did you mean 'gradient_accumulation_steps'?" in found
    )
    assert (
        f"batch_size=8 (command line) contradicts train_micro_batch_size_per_gpu=4 in {json_path}; "
        'set one to "auto"' in found
    )
    assert "parallel.tensor=3 (command line): num_attention_heads=8 is not divisible by 3; allowed: 1, 2, 4, 8" in found
    assert f"{yaml_path}: unknown name 'optim.beta3'; did you mean 'optim.beta" in text
    assert f"seed=many ({yaml_path}): expected an integer" in found
    assert "train.steps=0.5 (command line): expected an integer" in found
    assert "--frobnicate (command line): unknown flag" in found
    assert "corpus is missing" in found
    assert all("\n" not in p for p in found)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--seed"], "seed (command line): needs a value, an integer"),
        (["--seed", "1", "2"], "seed=1 2 (command line): takes one value, an integer"),
        (["stray"], "'stray' (command line): a value without a flag before it"),
        (["-x"], "-x (command line): unknown flag"),
        (["--config", "/nowhere.yaml"], "config=/nowhere.yaml (command line): cannot be read: No such file"),
        (["--config"], "needs the path of a YAML file"),
        (["--deepspeed_config", "/nowhere.json"], "deepspeed_config=/nowhere.json: cannot be used: No such file"),
        (["--model_type", "gtp"], "model_type=gtp (command line): unknown family; built are: gpt, mla, deepseek"),
        (["--model_type", "llama"], "unknown family; built are: gpt, mla, deepseek, llada"),
        (["--size", "smal"], "size=smal (command line): no preset of gpt; allowed: debug, small, medium, large, xl, "
                             "llama-3-8b; did you mean 'small'?"),
        (["--fp8.margin", "1"], "fp8.margin=1 (command line): FP8 is off; add --use_fp8 true"),
        (["--use_fp8", "true", "--fp8.keep_bf16", "auto"], "needs fp8.report"),
        (["--use_fp8", "true", "--fp8.report", "x"], "is read for fp8.keep_bf16=auto only"),
        (["--use_fp8", "true", "--fp8.format", "e5m2"], "expected one of hybrid, e4m3"),
        (["--optim.schedule", "linear"], "expected one of cosine, wsd, constant"),
        (["--model.vocab_size", "0"], "model.vocab_size=0 (command line): must be greater than 0"),
        (["--model.num_query_groups", "3"], "model.num_query_groups=3 (command line): num_attention_heads=4"),
        (["--model.hidden_dropout", "1"], "model.hidden_dropout=1.0 (command line): a probability"),
        (["--train.stop_after_steps", "2000"], "must be from 1 to train.steps=1000"),
        (["--optim.warmup_steps", "2000"], "longer than the run"),
        (["--optim.lr", ".inf"], "optim.lr=inf (command line): must be greater than 0 and finite"),
        (["--block_size", "0"], "block_size=0 (command line): must be 1 or more"),
        (["--block_size", "64", "--model.seq_length", "32"], "contradicts model.seq_length=32 (command line)"),
        (["--batch_size", "0"], "batch_size=0 (command line): must be 1 or more"),
        (["--seed", "-1"], "seed=-1 (command line): from 0 to"),
        (["--dry_run", "5"], "dry_run=5 (command line): takes no value"),
    ],
)  # fmt: skip
def test_bad_values(argv: list[str], part: str) -> None:
    assert any(part in p for p in problems(*argv)), problems(*argv)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "just text", "\t"])
def test_yaml_that_is_none(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "bad.yaml", text)
    assert problems("--config", path)[0].startswith(path)


def test_vocabulary_comes_from_the_corpus() -> None:
    def corpus(config: ExperimentConfig) -> Inspection:
        return Inspection(5000, [])

    run = load(inspect=corpus)
    assert (run.config.model.vocab_size, run.config.model.padded_vocab_size) == (5000, 5120)
    assert run.sources["model.vocab_size"] == "tokenizer of the corpus"
    assert load("--model.vocab_size", "6000", inspect=corpus).config.model.vocab_size == 6000
    assert "model.vocab_size=4000 (command line): the tokenizer of the corpus has 5000 entries" in "".join(
        problems("--model.vocab_size", "4000", inspect=corpus)
    )


@pytest.mark.parametrize("model_type", list(FAMILIES))
@pytest.mark.parametrize("size", ["debug", "xl"])
def test_yaml_round_trip(model_type: str, size: str, tmp_path: Path) -> None:
    run = load("--model_type", model_type, "--size", size, "--data", "0.1", "weird: path", "--optim.eps", "1e-9",
               "--optim.lr", "0.1234567890123", "--data.tokenizer", "null", "--output_dir", "on")  # fmt: skip
    text = to_yaml(run.config)
    assert from_yaml(text, FAMILIES) == run.config
    again = load("--config", write(tmp_path / "config.yaml", text))
    assert again.config == run.config


def test_from_yaml_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"unknown name 'model\.n_embd'"):
        from_yaml("model: {n_embd: 3}", FAMILIES)
    with pytest.raises(ConfigError, match="unknown family"):
        from_yaml("model_type: rwkv", FAMILIES)


def test_a_saved_configuration_fits_another_number_of_ranks(tmp_path: Path) -> None:
    run = load("--batch_size", "2", "--train.global_batch_size", "8")
    assert run.num_microbatches == 4
    again = load("--config", write(tmp_path / "c.yaml", to_yaml(run.config)), world_size=2)
    assert (again.num_microbatches, again.samples_per_step) == (2, 8)


def test_every_option_is_documented() -> None:
    for family in FAMILIES.values():
        for variant in (family, *family.variants):
            for option in tree_options(variant.config_class).values():
                assert len(option.help) > 10, option.name


LATENT = ("--model_type", "llada", "--model.attention", "mla")
EXPERTS = ("--model_type", "llada", "--model.num_moe_experts", "4")


def test_options_of_the_model_choose_a_variant() -> None:
    latent, experts = load(*LATENT, "--model.kv_lora_rank", "64"), load(*EXPERTS)
    both = load(*LATENT, *EXPERTS[2:], "--model.moe_router_topk", "1", "--model.rotary_scaling_factor", "2")
    models = [run.config.model for run in (load("--model_type", "llada"), latent, experts, both)]
    assert [(m.attention, m.num_moe_experts) for m in models] == [("mha", 0), ("mla", 0), ("mha", 4), ("mla", 4)]
    assert len({type(m) for m in models}) == 4
    for run in (latent, experts, both):
        assert from_yaml(to_yaml(run.config), FAMILIES) == run.config


def test_a_yaml_file_chooses_a_variant_and_flags_override_it(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", to_yaml(load(*EXPERTS).config))
    assert load("--config", path).config == load(*EXPERTS).config
    assert load("--config", path, "--model.num_moe_experts", "2").config.model.num_moe_experts == 2


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("--model_type", "llada", "--model.kv_lora_rank", "64"),
         "model.kv_lora_rank=64 (command line): has no meaning in the model that is chosen; it belongs to "
         "--model.attention mla"),
        ((*LATENT, "--model.num_query_groups", "2"),
         "model.num_query_groups=2 (command line): has no meaning in the model that is chosen; it belongs to "
         "--model.attention mha"),
        ((*LATENT, "--model.moe_router_topk", "1"),
         "model.moe_router_topk=1 (command line): has no meaning in the model that is chosen; it belongs to "
         "--model.num_moe_experts N"),
        (("--model_type", "llada", "--model.attention", "none"),
         "model.attention=none (command line): expected one of mha, mla"),
        (("--model_type", "llada", "--model.num_moe_experts", "-1"),
         "model.num_moe_experts=-1 (command line): must be greater than 0"),
        ((*LATENT, "--size", "llada-8b"),
         "size=llada-8b (command line): no preset of llada with --model.attention mla; allowed: debug, small, medium, "
         "large, xl"),
        (("--model_type", "gpt", "--model.attention", "mla"), "--model.attention (command line): unknown flag"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_a_variant_has_not_is_refused(argv: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    (found,) = caught.value.problems
    assert found.startswith(problem)


def test_help_shows_units_and_the_presets_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        load("--help", "--model_type", "mla", "--size", "xl")
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    for part in ("--model.kv_lora_rank", "default: 512", "Sequence length in tokens", "--data.train", "--dry_run"):
        assert part in text


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from gptoughts.config.cli import load_experiment\n"
        "from gptoughts.models.registry import FAMILIES\n"
        "try: load_experiment(['--help'], FAMILIES, world_size=1)\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'megatron', 'deepspeed', 'transformers', 'numpy'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_nonsense_always_ends_in_a_message(tmp_path: Path) -> None:
    """Random flags and JSON blocks give a run or a ConfigError, never another exception."""
    rng = random.Random(0)
    names = [*tree_options(FAMILIES["mla"].config_class), "data", "config", "nonsense"]
    values = ["-1", "0", "1", "3", "nan", ".nan", ".inf", "1e400", "9" * 400, "x", "", "null", "true", "[", "{}", "[1]"]
    junk = [-1, 0, 1, 2.5, math.nan, math.inf, 10**400, "auto", "x", None, True, False, [], {}, {"enabled": True},
            {"type": "AdamW", "params": 3},
            {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "x", "total_num_steps": True}}]  # fmt: skip
    for trial in range(120):
        blocks = {k: rng.choice(junk) for k in rng.sample(sorted(TOP_LEVEL), 4)}
        block = rng.choice([b for b in BLOCKS if "." not in b])
        blocks[block] = {k: rng.choice(junk) for k in rng.sample(sorted(BLOCKS[block]), 1)}
        argv = ["--deepspeed_config", write(tmp_path / "junk.json", blocks)] if trial % 2 else []
        for name in rng.sample(names, 3):
            argv += [f"--{name}", *rng.choices(values, k=rng.choice([0, 1, 1, 1, 2]))]
        found = ["none"]
        try:
            load(*argv, world_size=rng.choice([1, 2, 3]))
        except ConfigError as error:
            found = error.problems
        assert found, argv
        assert all(p and "\n" not in p for p in found), found
