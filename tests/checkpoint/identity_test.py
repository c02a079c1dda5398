"""Which checkpoints a run goes on from: those of the same model, of earlier versions too."""

from __future__ import annotations

from typing import Any

import pytest

from gptoughts.checkpoint.identity import identity_differences, model_identity
from gptoughts.config.cli import load_experiment
from gptoughts.config.model import ModelConfig
from gptoughts.models.registry import FAMILIES


def _identity(family: str, **fields: Any) -> tuple[dict[str, Any], ModelConfig]:
    flags = [f"--model.{name}={value}" for name, value in fields.items()]
    config = load_experiment([f"--model_type={family}", *flags], FAMILIES, world_size=1).config
    return model_identity(config), config.model


@pytest.mark.parametrize(
    ("family", "later", "changed"),
    [
        ("deepseek", ["mtp_num_layers"], {"mtp_num_layers": 1}),
        ("llada", ["attention", "num_moe_experts", "is_shifted"], {"is_shifted": True}),
        ("llada", ["attention", "num_moe_experts", "is_shifted"], {"num_moe_experts": 4}),
        ("llada", ["attention", "num_moe_experts", "is_shifted"], {"attention": "mla"}),
    ],
)
def test_checkpoints_made_before_a_field_existed(family: str, later: list[str], changed: dict[str, Any]) -> None:
    saved, model = _identity(family)
    earlier = {name: value for name, value in saved.items() if name not in later}
    assert identity_differences(earlier, saved, model.LATER_FIELDS) == {}
    other, other_model = _identity(family, **changed)
    name, value = next(iter(changed.items()))
    assert identity_differences(earlier, other, other_model.LATER_FIELDS)[name] == (saved[name], value)
    # The other way round, too: what a checkpoint has and the run has not.
    assert identity_differences(other, saved, model.LATER_FIELDS)[name] == (value, saved[name])


def test_what_may_change_when_a_run_goes_on() -> None:
    """DeepSeek-V3 (arXiv:2412.19437, section 4.2) lowered the bias's rate and the factor of its second loss."""
    steps = {"moe_router_bias_update_rate": 0.0, "moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 0.001}
    assert _identity("deepseek")[0] == _identity("deepseek", **steps)[0]
    with_depth = _identity("deepseek", mtp_num_layers=1)[0]
    assert with_depth == _identity("deepseek", mtp_num_layers=1, mtp_loss_scaling_factor=0.1)[0]
    assert _identity("llada", num_moe_experts=4)[0] == _identity("llada", num_moe_experts=4, **steps)[0]
