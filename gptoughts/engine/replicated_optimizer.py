"""ZeRO stage 0: AdamW on whole weights that every data-parallel rank has, with fp32 masters for bf16 and fp16.

DeepSpeed's own stage 0 neither checks gradients for NaN in fp32 nor reports their norm, counts only rank 0's shard in
the norm of half-precision gradients under tensor parallelism, and accumulates microbatches in half precision
(runtime/engine.py:3505, runtime/utils.py:394, runtime/fp16/unfused_optimizer.py:197 of 0.19.8). This one keeps the
semantics of ZeRO 1: fp32 accumulation, one mean over the data-parallel group, one norm in which each parameter counts
once, a skip on non-finite gradients, clipping, the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from gptoughts.parallel.partition import is_expert_parallel

CLIP_EPS = 1e-6


class ReplicatedOptimizer:
    """Wraps a basic AdamW; DeepSpeed's engine calls ``step`` and ``zero_grad`` and reads ``overflow``.

    Args:
        basic: AdamW over the model's parameters; half-precision ones are replaced in it by fp32 masters.
        clip_grad: Largest global gradient norm; 0 switches clipping off.
        data_parallel_group: Ranks with the same weights.
        expert_data_parallel_group: Ranks with the same routed experts, where expert parallelism divides them.
        expert_parallel_group: Ranks that hold different experts of the same layers.
        model_parallel_group: Ranks that share one copy of the model.
        tensor_parallel_rank: Replicated parameters count in the norm where it is 0.
        loss_scaler: DeepSpeed's scaler; its scale is 1 except in fp16.
        reduce_bucket_size: Elements per all-reduce.
    """

    def __init__(
        self,
        basic: torch.optim.Optimizer,
        *,
        clip_grad: float,
        data_parallel_group: ProcessGroup,
        expert_data_parallel_group: ProcessGroup,
        expert_parallel_group: ProcessGroup,
        model_parallel_group: ProcessGroup,
        tensor_parallel_rank: int,
        loss_scaler: Any,
        reduce_bucket_size: int,
    ) -> None:
        self.optimizer = basic
        self.clip_grad = clip_grad
        self.loss_scaler = loss_scaler
        self.overflow = False
        self.is_wanted: Callable[[float], bool] = _always
        """Asked with the gradient norm before each update (``engine.update_gate``)."""
        self._global_grad_norm = 0.0
        self._data_parallel_group = data_parallel_group
        self._expert_data_parallel_group = expert_data_parallel_group
        self._expert_parallel_group = expert_parallel_group
        self._model_parallel_group = model_parallel_group
        self._bucket_elements = reduce_bucket_size
        self.parameters: list[nn.Parameter] = []
        self.masters: list[nn.Parameter] = []
        for group in basic.param_groups:
            masters = [_master_of(parameter) for parameter in group["params"]]
            self.parameters.extend(group["params"])
            self.masters.extend(masters)
            group["params"] = masters
        self._is_fused = all(group.get("fused") for group in self.optimizer.param_groups)
        self._copies = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        for parameter, master in self._copies:
            parameter.register_post_accumulate_grad_hook(_fp32_accumulator(master))
        is_first = tensor_parallel_rank == 0
        pairs = list(zip(self.parameters, self.masters, strict=True))
        self._experts = [master for parameter, master in pairs if is_expert_parallel(parameter)]
        self._others = [master for parameter, master in pairs if not is_expert_parallel(parameter)]
        counted = {id(m) for p, m in pairs if is_first or getattr(p, "tensor_model_parallel", False)}
        self._counted = [master for master in self._others if id(master) in counted]
        self._counted_experts = [master for master in self._experts if id(master) in counted]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The basic optimizer's groups (fp32 masters)."""
        return self.optimizer.param_groups

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before the backward."""
        return float(self.loss_scaler.cur_scale)

    @torch.no_grad()
    def step(self) -> None:
        """Reduce, check, clip, update. Collective: data-, expert- and model-parallel group."""
        gradients = self._gradients(self.masters)
        self._average(self._gradients(self._others), self._data_parallel_group)
        # Each is a sum over the samples of an expert-parallel group already: divided by all data-parallel ranks too.
        self._average(self._gradients(self._experts), self._expert_data_parallel_group)
        scale = self.loss_scale
        norm = self._norm() / scale
        self.overflow = not math.isfinite(norm)
        self._global_grad_norm = math.inf if self.overflow else norm
        if not self.overflow and not self.is_wanted(norm):
            self.overflow = True  # for DeepSpeed's engine, which reads it; the scaler learns nothing from it
            return
        self.loss_scaler.update_scale(self.overflow)
        if self.overflow:
            return
        factor = 1.0 / scale
        if self.clip_grad > 0:
            factor *= min(1.0, self.clip_grad / (norm + CLIP_EPS))
        self._update(gradients, factor)
        self.refresh_parameters()

    def _update(self, gradients: Sequence[Tensor], factor: float) -> None:
        """One step of the basic optimizer on ``factor`` times the gradients."""
        if factor != 1.0 and self._is_fused:
            # torch's fused AdamW divides by grad_scale on its way (torch/optim/adamw.py): a pass over memory less.
            self.optimizer.grad_scale = torch.tensor(1.0 / factor, device=gradients[0].device)  # type: ignore[attr-defined]
        elif factor != 1.0:
            torch._foreach_mul_(list(gradients), factor)
        self.optimizer.step()
        if self._is_fused:
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        """Copy the fp32 masters into the half-precision weights. Collective: none."""
        if self._copies:
            torch._foreach_copy_([p for p, _ in self._copies], [m for _, m in self._copies])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None
        for master in self.masters:
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The basic optimizer's state."""
        return self.optimizer.state_dict()

    def _gradients(self, masters: Sequence[nn.Parameter]) -> list[Tensor]:
        for master in masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in masters if master.grad is not None]

    def _average(self, gradients: Sequence[Tensor], group: ProcessGroup) -> None:
        """Sum over ``group``, divided by the number of data-parallel ranks."""
        size = self._data_parallel_group.size()
        if size == 1:
            return
        for bucket in _buckets(gradients, self._bucket_elements):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            all_reduce(flat, ReduceOp.SUM, group=group)
            flat.div_(size)
            pieces = flat.split([gradient.numel() for gradient in bucket])
            for gradient, piece in zip(bucket, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))

    def _norm(self) -> float:
        total = self._squared_norm(self._counted)
        if self._expert_parallel_group.size() > 1:
            experts = self._squared_norm(self._counted_experts)
            all_reduce(experts, ReduceOp.SUM, group=self._expert_parallel_group)
            total += experts
        if self._model_parallel_group.size() > 1:
            all_reduce(total, ReduceOp.SUM, group=self._model_parallel_group)
        return math.sqrt(value) if math.isfinite(value := float(total)) else math.inf

    def _squared_norm(self, masters: Sequence[nn.Parameter]) -> Tensor:
        gradients = [master.grad for master in masters if master.grad is not None]
        if not gradients:
            return torch.zeros((), dtype=torch.float32, device=self.masters[0].device)
        return torch.stack(torch._foreach_norm(gradients)).square().sum()


def _always(_: float) -> bool:
    return True


def _master_of(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float().clone())


def _fp32_accumulator(master: nn.Parameter) -> Any:
    def accumulate(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return accumulate


def _buckets(gradients: Sequence[Tensor], max_elements: int) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        if not buckets or gradient.numel() > room:
            buckets.append([])
            room = max_elements
        buckets[-1].append(gradient)
        room -= gradient.numel()
    return buckets
