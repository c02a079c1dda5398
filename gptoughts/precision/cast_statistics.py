"""What casts lose: sums over the elements of one microbatch, per product and role, added up over ranks.

With q the cast of x at scale s, over all elements:

    saturated    |x| s > FP8's largest number
    underflowed  x is not 0, q is
    SNR          10 log10( sum x^2 / sum (x - q / s)^2 ) dB
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptoughts.precision.scaling_state import ROLES, ScalingState

SUMS = ("elements", "saturated", "underflowed", "signal", "noise")


class CastStatistics:
    """Watches the casts of one training microbatch.

    Args:
        states: Of the emulated products in FP8, by name.
    """

    def __init__(self, states: Mapping[str, ScalingState]) -> None:
        self._states = dict(states)
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._maxima: dict[tuple[str, int], Tensor] = {}
        for name, state in self._states.items():
            state.observer = partial(self._see, name)

    def stop(self) -> None:
        """See nothing more."""
        for state in self._states.values():
            state.observer = None

    def lines(self, step: int, group: dist.ProcessGroup | None) -> list[dict[str, Any]]:
        """One line per product and role; experts of a layer share theirs. Equal on the ranks of ``group``.

        Collective: ``group``.
        """
        keys = [(name, role) for name in self._states for role in range(len(ROLES))]
        if not keys:
            return []
        nothing = torch.zeros(len(SUMS), dtype=torch.float64)
        sums = torch.stack([self._sums.get(key, nothing).cpu() for key in keys])
        # Scales are reduced as magnitudes are: the least one is the greatest of their inverses.
        maxima = torch.stack([self._maxima.get(key, nothing[:2]).cpu() for key in keys])
        if group is not None and group.size() > 1:
            device = self._states[keys[0][0]].scale_fwd.device
            sums, maxima = sums.to(device), maxima.to(device)
            dist.all_reduce(sums, group=group)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        pairs = zip(keys, sums.tolist(), maxima.tolist(), strict=True)
        return [_line(step, name, ROLES[role], *values) for (name, role), *values in pairs if values[0][0]]

    def _see(self, name: str, role: int, product: int, x: Tensor, q: Tensor, scale: float) -> None:
        state = self._states[name]
        fp8 = state.recipe.backward_format if ROLES[role] == "grad_output" else state.recipe.forward_format
        wide = x.detach().double()
        sums = torch.stack(
            [
                torch.tensor(float(x.numel()), dtype=torch.float64, device=x.device),
                (wide.abs() * scale > fp8.max_value).sum().double(),
                ((x != 0) & (q == 0)).sum().double(),
                wide.square().sum(),
                (wide - q.double() / scale).square().sum(),
            ]
        )
        found = torch.stack([wide.abs().amax(), torch.full_like(wide.abs().amax(), 1.0 / scale)])
        key = (name, role)
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums
        self._maxima[key] = torch.maximum(self._maxima[key], found) if key in self._maxima else found


def _line(step: int, name: str, role: str, sums: list[float], maxima: list[float]) -> dict[str, Any]:
    elements, saturated, underflowed, signal, noise = sums
    snr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 and math.isfinite(signal + noise) else None
    return {
        "step": step,
        "name": name,
        "role": role,
        "amax": maxima[0] if math.isfinite(maxima[0]) else None,
        "scale": 1.0 / maxima[1],
        "saturated_fraction": saturated / elements,
        "underflowed_fraction": underflowed / elements,
        "snr_db": snr,
    }
