"""Our diffusion sampler against a plain one on an independent model with the same weights, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.diffusion import DiffusionSampler, Kept, Restored, continuation
from gptoughts.inference.diffusion_options import DiffusionOptions
from gptoughts.inference.remasking import SpecialTokens
from gptoughts.models.llada.config import LLaDAConfig, LLaDAExpertConfig, LLaDALatentConfig
from gptoughts.models.llada.model import build_model
from gptoughts.parallel import groups
from tests.distributed import run_distributed
from tests.inference.diffusion_reference import Freezing, Logits, Plain
from tests.parity.llada_test import both_models

VOCABULARY, MASK, CONTEXT = 90, 90, 64
EOS, EOT = 21, 76
"""Tokens that the random model likes, so that the options about ends matter."""
SPECIAL = SpecialTokens(MASK, EOS, EOT)
SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "seq_length": CONTEXT, "rotary_base": 500,
}  # fmt: skip
LATENT = {"kv_lora_rank": 24, "qk_head_dim": 12, "qk_pos_emb_head_dim": 8, "v_head_dim": 10}
SHAPES = {
    "mha": LLaDAConfig(**SHAPE).filled(),
    "wide": LLaDAConfig(**SHAPE | {"hidden_size": 64}).filled(),  # our C++ takes it
    "gqa": LLaDAConfig(**SHAPE, num_query_groups=2).filled(),
    "mla": LLaDALatentConfig(**SHAPE, **LATENT).filled(),
    "moe": LLaDAExpertConfig(**SHAPE, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24).filled(),
}
PROMPT = [11, 5, 70, 33, 8]
PLAIN_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one token a step": ({}, {}),
    "blocks": ({"block_length": 8}, {"block_length": 8, "steps_per_block": 8}),
    "uneven steps": ({"block_length": 8, "steps": 9}, {"block_length": 8, "steps_per_block": 3}),
    "one step": ({"steps": 1}, {"steps_per_block": 1}),
    "guidance": ({"cfg_scale": 1.5}, {"guidance": 1.5}),
    "suppressed end": ({"suppress_eos": True}, {"never": (EOS,)}),
    "deferred ends": ({"defer_ends": True}, {"last": (EOS, EOT)}),
    "temperature": ({"temperature": 0.7}, {"temperature": 0.7}),
    "deferred ends at a temperature": (
        {"defer_ends": True, "temperature": 1.0},
        {"last": (EOS, EOT), "temperature": 1.0},
    ),
    "random": (
        {"remasking": "random", "temperature": 1.0, "steps": 8},
        {"is_random": True, "temperature": 1.0, "steps_per_block": 8},
    ),
    "threshold": ({"threshold": 0.6, "block_length": 12}, {"threshold": 0.6, "block_length": 12}),
    "factor": ({"factor": 1.2, "block_length": 12}, {"factor": 1.2, "block_length": 12}),
    "guided threshold": ({"threshold": 0.9, "cfg_scale": 0.5}, {"threshold": 0.9, "guidance": 0.5}),
}


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=1)
    yield
    groups.destroy()


def built(kind: str, *, seed: int = 1) -> nn.Module:
    """Our model with random weights whose predictions are now sure, now not."""
    model = build_model(ExperimentConfig(model_type="llada", model=SHAPES[kind], seed=1), params_dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.25, generator=generator)
    return model.eval()


def independent(kind: str, *, sides: int = 1) -> tuple[nn.Module, Logits]:
    """Our model, and the logits of another one with its weights; of our own, whole rows alone, for experts."""
    if kind == "moe":
        model = built(kind)
        return model, lambda row, window: model(torch.tensor([row]))[0, :, :MASK]
    model, theirs = both_models(SHAPES[kind])
    with torch.no_grad():
        for ours in (model, theirs):
            for name, parameter in ours.named_parameters():
                if name.startswith(("output_layer", "head")):
                    parameter.mul_(2.0)
    return model.eval(), Freezing(theirs, MASK, sides=sides)


def sampler_of(model: nn.Module, **changes: Any) -> DiffusionSampler:
    given = {"vocab_size": MASK, "context_tokens": CONTEXT, "special": SPECIAL}
    return DiffusionSampler(model, **(given | changes))


def plain(logits_of: Logits, num_masks: int, **options: Any) -> Plain:
    return Plain(logits_of, MASK, **({"block_length": num_masks, "steps_per_block": num_masks} | options))


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_as_the_published_sampler(case: str) -> None:
    changes, plain_changes = PLAIN_CASES[case]
    model, logits_of = independent("mha", sides=2 if "cfg_scale" in changes else 1)
    row = continuation(PROMPT, 24, SPECIAL)
    options = DiffusionOptions(24, stop_at_end=False, **changes)
    with torch.no_grad():
        reference = plain(logits_of, 24, **plain_changes)
        expected = reference.restore(row)
    assert options.problems() == []
    steps: list[Kept] = []
    sampler = sampler_of(model)
    (found,) = sampler.restore([row], options, on_step=steps.append)
    assert found.tokens == expected
    assert [sorted(step.positions) for step in steps] == [sorted(kept) for kept in reference.kept_by_step if kept]
    assert sampler.num_forwards == len(steps)
    assert MASK not in found.tokens
    if changes:
        (default,) = sampler.restore([row], DiffusionOptions(24, stop_at_end=False))
        assert (found.tokens, len(steps)) != (default.tokens, 24), "the option matters"


@pytest.mark.parametrize("kind", ["gqa", "mla", "moe"])
def test_every_block_of_the_family(kind: str) -> None:
    model, logits_of = independent(kind)
    row = continuation(PROMPT, 24, SPECIAL)
    for changes, plain_changes in (
        ({"block_length": 8}, {"block_length": 8, "steps_per_block": 8}),
        PLAIN_CASES["factor"],
    ):
        with torch.no_grad():
            expected = plain(logits_of, 24, **plain_changes).restore(row)
        (found,) = sampler_of(model).restore([row], DiffusionOptions(24, stop_at_end=False, **changes))
        assert found.tokens == expected


CACHED_CASES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "uneven steps": {"steps": 9},
    "threshold": {"threshold": 0.6},
    "guidance": {"cfg_scale": 1.5},
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [*(("gqa", case) for case in CACHED_CASES), ("mha", "fixed"), ("wide", "threshold"), ("mla", "threshold")],
)
@pytest.mark.parametrize("cache", ["prefix", "dual", "delayed"])
def test_caches_freeze_what_is_outside_the_window(kind: str, cache: Any, case: str) -> None:
    changes = CACHED_CASES[case]
    model, logits_of = independent(kind, sides=2 if case == "guidance" else 1)
    rows = [continuation(PROMPT, 24, SPECIAL), RAGGED[2]]
    options = DiffusionOptions(24, block_length=8, cache=cache, stop_at_end=False, **changes)
    sampler = sampler_of(model)
    for row in rows[: 1 if case == "uneven steps" else 2]:
        with torch.no_grad():
            reference = plain(
                logits_of, 24, block_length=8, steps_per_block=3 if "steps" in changes else 8, cache=cache,
                threshold=changes.get("threshold"), guidance=changes.get("cfg_scale", 0.0),
            )  # fmt: skip
            expected = reference.restore(row)
        (found,) = sampler.restore([row], options)
        assert found.tokens == expected


RAGGED = [
    continuation([11, 5, 70, 33, 8], 24, SPECIAL),
    continuation([9], 24, SPECIAL),
    [1, MASK, MASK, 17, 33, *[MASK] * 9, 60, 61, MASK, 62],
    continuation(list(range(30, 60)), 16, SPECIAL),
    continuation([11, 5, 70, 33, 8], 24, SPECIAL),
]
RAGGED_CASES = {
    "fixed": ("gqa", {"stop_at_end": True}),
    "threshold": ("moe", {"threshold": 0.6}),
    "guided noise": ("gqa", {"cfg_scale": 1.0, "temperature": 1.0}),
    "random": ("mla", {"remasking": "random", "temperature": 0.5, "stop_at_end": True}),
    "prefix cache": ("gqa", {"threshold": 0.6, "cache": "prefix"}),
    "dual cache of latents": ("mla", {"cache": "dual"}),
    "dual cache, guided": ("gqa", {"threshold": 0.6, "cache": "dual", "cfg_scale": 1.0, "stop_at_end": True}),
    "dual cache, experts": ("moe", {"factor": 1.2, "cache": "dual"}),
    "delayed cache": ("wide", {"threshold": 0.6, "cache": "delayed"}),
    "delayed cache of latents, guided": ("mla", {"cache": "delayed", "cfg_scale": 1.0, "stop_at_end": True}),
}


@pytest.mark.parametrize("case", RAGGED_CASES)
def test_a_row_of_a_batch_ends_as_it_would_alone(case: str) -> None:
    kind, changes = RAGGED_CASES[case]
    sampler = sampler_of(built(kind))
    options = DiffusionOptions(**({"block_length": 8, "stop_at_end": False} | changes))
    seeds = [3, 4, 5, 6, 7]
    together = sampler.restore(RAGGED, options, seeds=seeds)
    forwards = sampler.num_forwards
    alone, alone_forwards = [], 0
    for row, seed in zip(RAGGED, seeds, strict=True):
        alone += sampler.restore([row], options, seeds=[seed])
        alone_forwards += sampler.num_forwards
    assert together == alone
    assert forwards < alone_forwards
    for row, found in zip(RAGGED, together, strict=True):
        assert all(b == a for a, b in zip(row, found.tokens, strict=True) if a != MASK), "what was given stays"
    if options.cache != "none":
        assert sampler.restore(RAGGED, replace(options, cache="none"), seeds=seeds) != together, (
            "caches are no shortcut"
        )
    if options.temperature:
        assert together[0] != together[-1], "the seed of each row counts"
        assert sampler.restore(RAGGED[:1], options, seeds=[7])[0] == together[-1]


def test_leaving_at_the_end_changes_nothing_before_it() -> None:
    model = built("gqa")
    row = continuation(PROMPT, 32, SPECIAL)
    whole = sampler_of(model).restore([row], DiffusionOptions(32, block_length=8, stop_at_end=False))[0]
    ends = SpecialTokens(MASK, eos=whole.tokens[len(PROMPT) + 11])
    sampler = sampler_of(model, special=ends)
    (left,) = sampler.restore([row], DiffusionOptions(32, block_length=8))
    end = whole.tokens.index(ends.eos, len(PROMPT))
    assert left.tokens[:end] == whole.tokens[:end]
    assert set(left.tokens[end:]) == {ends.eos}
    assert left.answer(ends) == whole.answer(ends) == whole.tokens[len(PROMPT) : end]
    assert sampler.num_forwards <= 16, "later blocks were not begun"
    (holed,) = sampler.restore([[*row[:-1], 5]], DiffusionOptions(32, block_length=8))
    assert MASK not in holed.tokens, "a row that goes on after its masks is restored whole"
    assert holed.tokens[-1] == 5
    assert sampler.num_forwards > 16


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "delayed"])
def test_a_shifted_model_is_read_one_position_earlier(cache: Any) -> None:
    model, logits_of = independent("gqa")
    sampler = sampler_of(model, is_shifted=True)
    options = DiffusionOptions(block_length=8, stop_at_end=False, cache=cache)
    for row in RAGGED[:3]:
        with torch.no_grad():
            expected = plain(logits_of, 24, block_length=8, steps_per_block=8, cache=cache, shift=1).restore(row)
        assert sampler.restore([row], options)[0].tokens == expected
    assert [found.tokens for found in sampler.restore(RAGGED[:3], options)][2] == expected
    with pytest.raises(DataError, match=r"row 1: begins with a mask, but this model \(is_shifted\)"):
        sampler.restore([[*PROMPT, MASK], [MASK, 5]], DiffusionOptions(stop_at_end=False, cache=cache))


def test_rows_that_cannot_be_restored_are_named() -> None:
    sampler = sampler_of(built("gqa"))
    with pytest.raises(DataError) as caught:
        sampler.restore([[5, 6], [MASK] * (CONTEXT + 1)], DiffusionOptions())
    assert caught.value.problems == [
        "row 0: has no mask, so there is nothing to restore",
        f"row 1: 0 tokens and {CONTEXT + 1} masks are {CONTEXT + 1}, more than the model's context of {CONTEXT}",
    ]
    with pytest.raises(DataError, match="token 1 is the mask"):
        continuation([5, MASK], 4, SPECIAL)
    assert sampler.restore([], DiffusionOptions()) == []
    with pytest.raises(ConfigError) as refused:
        sampler.restore([[5, *[MASK] * 12]], DiffusionOptions(block_length=5, steps=4, temperature=-1))
    assert [problem.split(":")[0] for problem in refused.value.problems] == ["temperature=-1", "steps=4"]
    endless = sampler_of(built("gqa"), special=SpecialTokens(MASK))
    with pytest.raises(
        ConfigError, match="suppress_eos=True: the model has no end-of-text token\ndefer_ends=True: the"
    ):
        endless.restore([[5, MASK]], DiffusionOptions(suppress_eos=True, defer_ends=True))


def restored_on_this_rank(tensor: int, kind: str, options: DiffusionOptions) -> list[Restored]:
    groups.initialize(ParallelConfig(tensor=tensor), seed=1)
    config = ExperimentConfig(model_type="llada", model=SHAPES[kind], parallel=ParallelConfig(tensor=tensor), seed=8)
    model = build_model(config, params_dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12.0)
    return sampler_of(model).restore(RAGGED, options, seeds=[1, 2, 3, 4, 5])


@pytest.mark.parametrize("kind", ["gqa", "mla", "moe"])
def test_tensor_parallel_ranks_restore_what_one_rank_does(kind: str) -> None:
    options = DiffusionOptions(block_length=8, temperature=0.5, threshold=0.3, cache="dual", stop_at_end=False)
    (alone,) = run_distributed(restored_on_this_rank, 1, 1, kind, options)
    first, second = run_distributed(restored_on_this_rank, 2, 2, kind, options)
    assert first == second == alone
    assert len({tuple(row.tokens) for row in alone}) == 5
