"""What the stability guard sees and decides; what is done about it is in ``training.recovery``. Imports no torch.

A step has three triggers: ``non_finite`` (loss or gradient norm is NaN or infinite), ``loss_spike`` and ``grad_spike``.
A figure x spikes where it lies far above those of the last applied steps, in robust units:

    z = (x - median) / max(1.4826 MAD, floor * median),    MAD = median of |x_i - median|,

1.4826 MAD being the standard deviation of normally distributed figures (Huber, "Robust Statistics", 1981, section 5.1).
One bad step among many moves neither median nor MAD, so that a second one is seen as well. Where the figures hardly
vary, the floor keeps a small step up from counting as a spike.

Each trigger has an action. Those that do not help are followed by stronger ones:

    skip (the update) → rollback (to a good state, past the samples) → fallback (in FP8: roll back, layers leave it)
    → cut_lr (roll back, then a lower rate) → stop
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gptoughts.config.experiment import StabilityConfig

SKIP, ROLLBACK, FALLBACK, CUT_LR, STOP = "skip", "rollback", "fallback", "cut_lr", "stop"
NON_FINITE, LOSS_SPIKE, GRAD_SPIKE, OVERFLOW = "non_finite", "loss_spike", "grad_spike", "overflow"
_MAD_TO_STANDARD_DEVIATION = 1.4826
LOSS_FLOOR, GRAD_FLOOR = 0.02, 0.1
"""Least spread that counts, as a fraction of the median: losses vary by less than norms."""


def robust_zscore(value: float, history: list[float], floor: float) -> float:
    """How far ``value`` lies above the median of ``history``, see the module's text; 0 without history."""
    if not history:
        return 0.0
    median = statistics.median(history)
    deviation = statistics.median(abs(old - median) for old in history)
    spread = max(_MAD_TO_STANDARD_DEVIATION * deviation, floor * abs(median))
    if spread == 0.0:
        return 0.0 if value <= median else math.inf
    return (value - median) / spread


@dataclass
class GuardState:
    """What the guard remembers; saved with every checkpoint, so that a resumed run decides as the whole one does."""

    losses: list[float] = field(default_factory=list)
    """Losses of the last applied steps, oldest first."""
    grad_norms: list[float] = field(default_factory=list)
    """Gradient norms of the same steps."""
    skips: int = 0
    """Updates skipped since the last applied one or the last rollback."""
    rollbacks: int = 0
    """Rollbacks since training was last calm."""
    lr_cuts: int = 0
    """Cuts of the learning rate since training was last calm."""
    doubtful_samples: list[tuple[int, int]] = field(default_factory=list)
    """Samples of the steps that were not applied since the last applied one: a rollback leaves them out."""
    trouble_step: int = -1
    """Latest step, over all attempts, that was in trouble; -1: none."""
    left_fp8: list[str] = field(default_factory=list)
    """Products that a fallback took out of FP8, by their global names; they stay out."""
    lr_factor: float = 1.0
    """What the learning rate is multiplied by ..."""
    lr_cut_until_step: int = -1
    """... below this step."""

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> GuardState:
        """From :meth:`as_dict`, also of a version with fewer fields."""
        known = {name: value for name, value in saved.items() if name in cls.__dataclass_fields__}
        known["doubtful_samples"] = [(first, stop) for first, stop in known.get("doubtful_samples", [])]
        return cls(**known)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a step, and what is to be done."""

    trigger: str
    action: str
    zscore: float | None
    """Of a spike."""
    is_escalated: bool
    """Whether the action is stronger than the trigger's own, which did not help."""


class Guard:
    """Judges steps. Pure: figures that are equal on all ranks lead to equal verdicts, so no rank asks another.

    Args:
        config: Triggers, actions, limits.
        state: What was remembered so far; changed in place.
    """

    def __init__(self, config: StabilityConfig, state: GuardState) -> None:
        self.config = config
        self.state = state

    def trigger(self, loss: float, grad_norm: float) -> tuple[str, float | None] | None:
        """What is wrong with a step's figures, and the z-score of a spike; None: nothing."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return NON_FINITE, None
        if len(self.state.losses) < self.config.min_window_steps:
            return None
        for name, value, history, floor, limit in (
            (LOSS_SPIKE, loss, self.state.losses, LOSS_FLOOR, self.config.loss_zscore),
            (GRAD_SPIKE, grad_norm, self.state.grad_norms, GRAD_FLOOR, self.config.grad_norm_zscore),
        ):
            zscore = robust_zscore(value, history, floor)
            if zscore > limit:
                return name, zscore
        return None

    def note_applied(self, step: int, loss: float, grad_norm: float) -> None:
        """A step was fine and its update applied.

        Args:
            step: Its number, from 0.
            loss: Mean loss, nats.
            grad_norm: Before clipping.
        """
        state = self.state
        state.losses = [*state.losses, loss][-self.config.window_steps :]
        state.grad_norms = [*state.grad_norms, grad_norm][-self.config.window_steps :]
        state.skips = 0
        if step - state.trouble_step >= self.config.calm_steps:
            state.rollbacks = state.lr_cuts = 0

    def verdict(self, step: int, trigger: str, zscore: float | None, *, can_fall_back: bool = False) -> Verdict:
        """What to do about a step in trouble; the state counts it.

        Args:
            step: Its number, from 0.
            trigger: As :meth:`trigger` says, or ``overflow``: fp16 gradients beyond what the loss scale allows, which
                the scaler mends by itself.
            zscore: Of a spike.
            can_fall_back: Whether anything is in FP8.
        """
        if trigger == OVERFLOW:
            return Verdict(trigger, SKIP, None, is_escalated=False)
        state, config = self.state, self.config
        own = {NON_FINITE: config.on_non_finite, LOSS_SPIKE: config.on_loss_spike, GRAD_SPIKE: config.on_grad_spike}
        action: str = own[trigger]
        if action == SKIP and state.skips >= config.max_skips:
            action = ROLLBACK
        if action == ROLLBACK and state.rollbacks >= config.max_rollbacks:
            action = FALLBACK
        if action == FALLBACK and not can_fall_back:
            action = CUT_LR
        if action == CUT_LR and state.lr_cuts >= config.max_lr_cuts:
            action = STOP
        state.trouble_step = max(state.trouble_step, step)
        if action == SKIP:
            state.skips += 1
        elif action in (ROLLBACK, FALLBACK):
            state.skips, state.rollbacks = 0, state.rollbacks + 1
        elif action == CUT_LR:
            state.skips, state.lr_cuts = 0, state.lr_cuts + 1
        return Verdict(trigger, action, zscore, is_escalated=action != own[trigger])

    def cut_lr(self, step: int) -> None:
        """Lower the learning rate from ``step`` on; a cut within a cut multiplies."""
        state = self.state
        base = state.lr_factor if step < state.lr_cut_until_step else 1.0
        state.lr_factor = base * self.config.lr_cut_factor
        state.lr_cut_until_step = step + self.config.lr_cut_steps

    def lr_factor(self, step: int) -> float:
        """What the scheduled learning rate of a step is multiplied by."""
        return self.state.lr_factor if step < self.state.lr_cut_until_step else 1.0

    def rewind_window(self, earlier: GuardState) -> None:
        """After a rollback: remember the figures up to the state that was gone back to, and all that went wrong."""
        self.state.losses, self.state.grad_norms = list(earlier.losses), list(earlier.grad_norms)
