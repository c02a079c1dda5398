"""Asks, between the backward and the update, whether a step is to be applied.

Each optimizer knows the gradient norm before it changes anything, and each can skip: DeepSpeed's where its overflow
check says so, ours likewise. So an update is refused by taking that way: gradients are dropped, weights and moments
have not moved, nothing has to be copied back. Between the norm and the update both of DeepSpeed's optimizers call
``_update_scale`` and then look at ``overflow`` (zero/stage_1_and_2.py:3047, zero/stage3.py:2826 of 0.19.8): there the
question is asked. A refused update leaves the loss scaler as it was, an overflow lowers its scale as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups

from gptoughts.engine.replicated_optimizer import ReplicatedOptimizer


class UpdateGate:
    """Stands in the way of one optimizer's updates.

    Args:
        optimizer: What DeepSpeed's engine steps, of any ZeRO stage.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._judge: Callable[[float], bool] | None = None
        self.grad_norm = float("inf")
        """Gradient norm of the latest step that was asked about, before clipping."""
        self.is_refused = False
        """Whether the latest step was refused (False where it was applied, or skipped for non-finite gradients)."""
        if isinstance(optimizer, ReplicatedOptimizer):
            optimizer.is_wanted = self._is_wanted
            return
        self._update_scale = optimizer._update_scale
        optimizer._update_scale = self._ask_before_update_scale
        name = "scaled_global_norm" if hasattr(optimizer, "bit16_groups") else "_get_norm_groups"
        self._compute_norm = getattr(optimizer, name)
        setattr(optimizer, name, self._keep_norm)

    def set_judge(self, judge: Callable[[float], bool] | None) -> None:
        """Ask ``judge``, which gets the gradient norm, about the next step; None: every step is wanted.

        It is called on every rank, before weights and moments change, and only where the norm is finite; its answer
        has to be the same on all of them.
        """
        self._judge = judge
        self.is_refused = False
        self.grad_norm = float("inf")
        if judge is not None and hasattr(self._optimizer.loss_scaler, "raise_error_at_min_scale"):
            # The judge's owner hears of every overflow and decides when it is one too many (loss_scaler.py:257).
            self._optimizer.loss_scaler.raise_error_at_min_scale = False

    def drop_gradients(self) -> None:
        """After a step that was not applied.

        With offload ZeRO 1 and 2 keep their sums on this way, and would add the next step's gradients to them
        (zero/stage_1_and_2.py:3056 of 0.19.8 drops them without offload only).
        """
        if getattr(self._optimizer, "cpu_offload", False):
            sums = self._optimizer.averaged_gradients
            sums.update(dict.fromkeys(sums))

    def _is_wanted(self, grad_norm: float) -> bool:
        self.grad_norm = grad_norm
        self.is_refused = self._judge is not None and not self._judge(grad_norm)
        return not self.is_refused

    def _keep_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._scaled = self._compute_norm(*args, **kwargs)
        return self._scaled

    def _ask_before_update_scale(self, has_overflow: bool = False) -> None:
        if not has_overflow and self._judge is not None:
            # Stage 3 has a norm per group of parameters here, stages 1 and 2 have joined them.
            is_joined = isinstance(self._scaled, torch.Tensor)
            scaled = float(self._scaled if is_joined else combine_grad_norm_groups(self._scaled))
            if not self._is_wanted(scaled / float(self._optimizer.loss_scale)):
                self._optimizer.overflow = True
                return
        self._update_scale(has_overflow)
