"""Learning rate as a pure function of the step, so that a resume needs no scheduler state.

With peak η, minimum η_min = min_lr_fraction · η, W warmup steps and T steps in all, the update with index t (0, 1, ...)
uses

- warmup, t < W: η (t + 1) / W;
- cosine: η_min + (η - η_min) (1 + cos(π (t - W) / (T - W))) / 2 (SGDR, arXiv:1608.03983, eq. 5);
- wsd, warmup-stable-decay (MiniCPM, arXiv:2404.06395, §4): η until the last D = decay_fraction · T steps, then a
  straight line down to η_min;
- constant: η.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from gptoughts.config.experiment import OptimConfig
from gptoughts.config.resolve import default_warmup_steps

Schedule = Callable[[int], float]
"""step (updates already applied) -> learning rate of the next update."""


def build_schedule(optim: OptimConfig, *, steps: int) -> Schedule:
    """The schedule of a run of ``steps`` updates.

    Args:
        optim: ``lr`` has to be set; ``warmup_steps`` None takes :func:`default_warmup_steps`.
        steps: Updates of the whole run; beyond them the rate stays at the minimum (or constant).
    Raises:
        ValueError: no peak learning rate.
    """
    if optim.lr is None:
        raise ValueError("optim.lr is not set")
    peak = optim.lr
    floor = optim.min_lr_fraction * peak
    warmup_steps = default_warmup_steps(steps) if optim.warmup_steps is None else optim.warmup_steps
    decay_steps = {
        "cosine": max(0, steps - warmup_steps),
        "wsd": min(round(optim.decay_fraction * steps), max(0, steps - warmup_steps)),
        "constant": 0,
    }[optim.schedule]
    decay_start = steps - decay_steps

    def learning_rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        if optim.schedule == "constant" or step < decay_start:
            return peak
        if step >= steps or decay_steps == 0:
            return floor
        progress = (step - decay_start) / decay_steps
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1.0 - progress
        return floor + (peak - floor) * remaining

    return learning_rate
