"""The conversion program: verified both ways, sampled from, and read by transformers without code of ours."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path

import pytest
import torch
import transformers

from gptoughts.errors import CheckpointError
from tests.checkpoint.huggingface.conftest import Publish, publish, tokenizer_folder  # noqa: F401
from tests.checkpoint.plain_deepspeed import train_and_save
from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun

TEXT = "the cat sat on the dog"


def call(*commands: list[str]) -> list[str]:
    """What each command prints; the first word is its program."""
    from gptoughts.inference import convert_checkpoint, generate

    programs = {"convert": convert_checkpoint.main, "generate": generate.main}
    said = []
    for program, *arguments in commands:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert programs[program](arguments) == 0
        said.append(out.getvalue())
    return said


@pytest.mark.parametrize("kind", ["llama", "deepseek", "deepseek-v3-moe", "deepseek-v2-moe"])
def test_verified_there_and_back_and_sampled(kind: str, publish: Publish, tmp_path: Path) -> None:  # noqa: F811
    source, run, back = publish(kind, dtype=torch.float32), tmp_path / "run", tmp_path / "back"
    (there, sampled, again), = run_distributed(
        call, 1,
        ["convert", "hf-to-gptoughts", f"--input={source}", f"--output={run}", "--verify", TEXT],
        ["generate", f"--checkpoint={run}", "--prompt", "the cat", "--max_new_tokens=4"],
        ["convert", "gptoughts-to-hf", f"--input={run}", f"--output={back}", "--verify", TEXT],
    )  # fmt: skip
    for said in (there, again):
        assert float(said.split("at most ")[1].split(" ")[0]) < 1e-5
        assert "84 rows of padding" in said
    assert len(sampled) > 1


def train_and_export(family: str, folder: str, tokenizer: str, extra: tuple[str, ...]) -> str:
    run = ToyRun(
        family, Layout(extra=("--model.vocab_size=270", "--model.layernorm_epsilon=1e-6", *extra)), Path(folder)
    )
    run.manager = dataclasses.replace(run.manager, tokenizer=Path(tokenizer) / "tokenizer.json")
    list(run.train(2))
    saved = run.save()
    run.close()
    (said,) = call(
        ["convert", "gptoughts-to-hf", f"--input={saved}", f"--output={folder}/out", "--verify", TEXT, "--dtype=fp32"]
    )
    return said


@pytest.mark.parametrize(
    ("family", "extra", "expected"),
    [
        ("gpt", ("--model.num_query_groups=2",), transformers.LlamaForCausalLM),
        ("gpt", ("--model.kv_channels=32", "--model.num_attention_heads=6"), transformers.MistralForCausalLM),
        ("gpt", ("--model.add_qkv_bias=true",), transformers.Qwen2ForCausalLM),
        ("gpt", ("--model.qk_layernorm=true",), transformers.Qwen3ForCausalLM),
        ("mla", (), transformers.DeepseekV3ForCausalLM),
        ("deepseek", ("--model.moe_router_bias_update_rate=0.05",), transformers.DeepseekV3ForCausalLM),
        (
            "deepseek",
            (
                "--model.moe_router_score_function=softmax", "--model.moe_router_enable_expert_bias=false",
                "--model.moe_router_normalize_gates=false", "--model.rotary_scaling_factor=4",
                "--model.original_max_position_embeddings=16", "--model.mscale=0.7", "--model.mscale_all_dim=0.9",
            ),
            transformers.DeepseekV2ForCausalLM,
        ),
    ],
)  # fmt: skip
def test_what_we_trained_is_loaded_without_custom_code(
    family: str, extra: tuple[str, ...], expected: type, tokenizer_folder: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    (said,) = run_distributed(train_and_export, 1, family, str(tmp_path), str(tokenizer_folder), extra)
    assert float(said.split("at most ")[1].split(" ")[0]) < 1e-5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is expected
    assert model.config.eos_token_id == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


def test_what_no_format_holds_is_refused_with_reasons() -> None:
    from gptoughts.checkpoint.huggingface.formats import format_for
    from gptoughts.models.gpt.config import GPTConfig
    from gptoughts.models.mla.config import MLAConfig

    with pytest.raises(CheckpointError) as caught:
        format_for("gpt", GPTConfig(add_qkv_bias=True, qk_layernorm=True))
    assert "qwen3 cannot hold this model: add_qkv_bias=True" in caught.value.problems
    with pytest.raises(CheckpointError, match="its latent norms always have 1e-06"):
        format_for("mla", MLAConfig())


def test_whole_weights_from_deepspeeds_own_files(tmp_path: Path) -> None:
    run_distributed(train_and_save, 2, str(tmp_path / "ds"), 2, "bf16", False)
    ((said,),) = run_distributed(
        call, 1, ["convert", "zero-to-whole", f"--input={tmp_path / 'ds'}", f"--output={tmp_path / 'whole'}"]
    )
    assert "DeepSpeed ZeRO 2 of 2 ranks" in said
    assert (tmp_path / "whole" / "model.safetensors").is_file()
