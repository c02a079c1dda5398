"""Recompute changes what is kept and nothing else: losses, gradient norms, weights, moments and loads to the bit."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptoughts.models import recompute
from tests.distributed import run_distributed
from tests.harness import Layout, ToyRun

FULL = ("--parallel.recompute_granularity=full",)
BLOCK = (*FULL, "--parallel.recompute_method=block")
PAIRS = (*FULL, "--parallel.recompute_num_layers=2")
"""Groups of two of three layers: the last one is smaller."""
DROPOUT = ("--model.hidden_dropout=0.2", "--model.attention_dropout=0.2")
FP8 = ("--use_fp8=true", "--fp8.amax_history_len=4")
CUT_SAMPLES = ("--model.random_length_probability=1",)
STEPS = 2


def selective(*modules: str) -> tuple[str, ...]:
    return ("--parallel.recompute_granularity=selective", f"--parallel.recompute_modules={','.join(modules)}")


def outcome(family: str, layout: Layout, folder: str, name: str) -> dict[str, Any]:
    """Figures of two steps, and a digest of every weight and moment on this rank after them."""
    run = ToyRun(family, layout, Path(folder) / name)
    figures = [(r.loss, r.grad_norm, r.extras, r.figures) for r in run.train(STEPS)]
    state = {(f.name, f.kind, f.start): _digest(f.tensor) for f in run.engine.state_fragments()}
    buffers = {name: _digest(buffer) for chunk in run.engine.chunks for name, buffer in chunk.named_buffers()}
    run.close()
    return {"figures": figures, "state": state, "buffers": buffers}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def outcomes(family: str, layout: Layout, modes: dict[str, tuple[str, ...]], folder: str) -> dict[str, dict[str, Any]]:
    """Of the layout without recompute and with each mode."""
    return {
        name: outcome(family, replace(layout, extra=(*layout.extra, *flags)), folder, name)
        for name, flags in {"none": (), **modes}.items()
    }


def assert_equal_to_the_bit(
    family: str, layout: Layout, modes: dict[str, tuple[str, ...]], folder: Path
) -> dict[str, Any]:
    for of_rank in run_distributed(outcomes, layout.world_size, family, layout, modes, str(folder)):
        expected = of_rank["none"]
        assert expected["figures"][0] != expected["figures"][1]
        for name in modes:
            for part, found in of_rank[name].items():
                assert found == expected[part], (name, part)
    return expected


WHOLE_LAYERS = {"full": FULL, "block": BLOCK, "pairs": PAIRS}
LATENT = {"mla_up_proj": selective("mla_up_proj"), "mla_up_proj core_attn": selective("mla_up_proj", "core_attn")}
EXPERTS = {"moe": selective("moe"), "shared_experts": selective("shared_experts")}
COMMON = {name: selective(name) for name in ("core_attn", "layernorm", "mlp")}
EVERY_MODE = {
    "gpt": WHOLE_LAYERS | COMMON,
    "mla": LATENT | {"norms too": selective("layernorm", "mla_up_proj", "mlp")},
    "deepseek": WHOLE_LAYERS
    | EXPERTS
    | {"all": selective("core_attn", "layernorm", "mlp", "mla_up_proj", "moe")}
    | {"norms and shared experts": selective("layernorm", "shared_experts")},
    "llada-moe": {"block": BLOCK, "full": FULL, "moe": selective("layernorm", "moe")},
}


@pytest.mark.parametrize("family", EVERY_MODE)
def test_every_mode(family: str, tmp_path: Path) -> None:
    """With dropout; samples of `llada-moe` are cut, so that its router sees padding."""
    extra = DROPOUT + (CUT_SAMPLES if family.startswith("llada") else ())
    layout = Layout(layers=3, accumulation=2, zero=1, extra=extra)
    expected = assert_equal_to_the_bit(family, layout, EVERY_MODE[family], tmp_path)
    if family in ("deepseek", "llada-moe"):
        assert any("expert_load" in name for name in expected["figures"][0][3])


PARTS = {
    "deepseek": selective("layernorm", "mla_up_proj", "moe"),
    "gpt": selective("core_attn", "layernorm", "mlp"),
    "llada-moe": selective("core_attn", "layernorm", "moe"),
}


def layout_cases() -> list[object]:
    default = [
        ("deepseek", Layout(data=2, zero=3, accumulation=2)),
        ("gpt", Layout(pipeline=2, data=2, zero=3, layers=4, accumulation=2)),
        ("gpt", Layout(tensor=2, sequence=True, zero=2, extra=DROPOUT)),
        ("deepseek", Layout(pipeline=2, virtual=2, layers=4, accumulation=2, zero=2)),
        ("deepseek", Layout(data=2, expert=2, zero=2, extra=("--model.mtp_num_layers=1",))),
        ("gpt", Layout(accumulation=2, precision="bf16", extra=FP8)),
    ]
    slow = [
        *(("gpt", Layout(data=2, zero=zero, accumulation=2, extra=DROPOUT)) for zero in (0, 1, 2, 3)),
        *(("deepseek", Layout(tensor=2, sequence=True, data=2, expert=2, zero=zero)) for zero in (0, 3)),
        *(("deepseek", Layout(pipeline=2, data=2, accumulation=4, zero=zero)) for zero in (0, 1, 2, 3)),
        ("gpt", Layout(pipeline=2, virtual=2, data=2, layers=4, accumulation=4, zero=3, extra=DROPOUT)),
        ("gpt", Layout(tensor=2, pipeline=2, accumulation=4, zero=1, tied=True, precision="bf16", extra=DROPOUT)),
        ("deepseek", Layout(pipeline=2, layers=4, accumulation=4, zero=1, precision="bf16", extra=FP8)),
        ("gpt", Layout(context=2, zero=3, extra=DROPOUT)),
        ("gpt", Layout(context=2, context_method="ring", zero=1, accumulation=2)),
        ("deepseek", Layout(context=2, data=2, expert=2, zero=3, extra=("--model.mtp_num_layers=1",))),
        ("deepseek", Layout(context=2, context_method="ring", pipeline=2, layers=4, accumulation=2, zero=2)),
        ("gpt", Layout(context=2, tensor=2, sequence=True, zero=0, precision="bf16", extra=FP8)),
        ("deepseek", Layout(context=2, context_method="ring", zero=3, precision="bf16", extra=FP8)),
        ("llada-moe", Layout(context=2, context_method="ring", zero=2, extra=CUT_SAMPLES)),
        ("deepseek", Layout(tensor=2, extra=(*DROPOUT, "--model.q_lora_rank=64"))),
        ("deepseek", Layout(tensor=2, sequence=True, zero=3, precision="bf16", extra=("--model.mtp_num_layers=2",))),
    ]
    return [pytest.param(*case, id=name_of(*case)) for case in default] + [
        pytest.param(*case, id=name_of(*case), marks=pytest.mark.slow) for case in slow
    ]


def name_of(family: str, layout: Layout) -> str:
    flags = [flag.rpartition(".")[2].lstrip("-") for flag in layout.extra]
    return "-".join([f"{family}-{layout}", *flags])


@pytest.mark.parametrize(("family", "layout"), layout_cases())
def test_every_layout(family: str, layout: Layout, tmp_path: Path) -> None:
    parts = PARTS[family]
    if family == "deepseek" and (
        FP8[0] in layout.extra or layout.context > 1
    ):  # which need core_attn beside mla_up_proj
        parts = selective("layernorm", "core_attn", "mla_up_proj", "moe")
    assert_equal_to_the_bit(family, layout, {"full": FULL, "parts": parts}, tmp_path)


class _Doubling(nn.Module):
    """Notes in which pass it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passes.append((recompute.is_recomputing(), torch.is_grad_enabled()))
        return x * x


def test_a_module_can_tell_the_second_pass() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from gptoughts.platform import mcore_cpu

    mcore_cpu.install()
    module, config = _Doubling(), TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    x = torch.ones(3, requires_grad=True)
    recompute.run_again(config, module, x).sum().backward()
    assert module.passes == [(False, False), (True, True)]
    assert torch.equal(x.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    module.passes.clear()
    with torch.no_grad():
        recompute.run_again(config, module, x)
    module(x).sum().backward()
    assert module.passes == [(False, False), (False, True)]


def test_remade_outputs_are_made_once_for_all_their_users() -> None:
    made = []

    def double() -> list[Tensor]:
        made.append(recompute.is_recomputing())
        return [x.detach() * 2.0]

    x = torch.randn(4, 3, requires_grad=True)
    kept = (x * 2.0).detach().requires_grad_()
    remade = recompute.RemadeOutputs([kept], double)
    with remade.kept_by_nobody():
        out = (kept.view(3, 4).t().square() * torch.arange(4.0).view(4, 1)).sum() + kept.exp().sum()
    with torch.no_grad():
        expected = 2 * kept * torch.arange(4.0).repeat(3).view(4, 3) + kept.exp()
        kept.fill_(float("nan"))  # nobody looks at it any more
    out.backward()
    assert torch.equal(kept.grad, expected)  # type: ignore[arg-type]
    assert made == [True]
    assert remade._made is None  # and nothing stays behind
