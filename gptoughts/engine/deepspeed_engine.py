"""One optimizer step of any layout: megatron-core's schedule runs the microbatches, DeepSpeed shards and updates.

The loss of a step is Σ loss_sum / Σ denominator, both sums over all microbatches and data-parallel ranks. The
denominators are known before the first forward, so one all-reduce gives the global one, and each microbatch's loss is

    loss_sum · num_microbatches · data_parallel_size / global_denominator;

megatron-core's mean over microbatches and DeepSpeed's mean over ranks then give the exact global mean, however unequal
the microbatches are. Context-parallel ranks have the loss_sum of their part of the sequences, and DeepSpeed's mean is
over them, too; megatron-core multiplies losses by their number (pipeline_parallel/schedules.py:268, 0.16.1; line 340 of
0.19.2), and those of balance with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from gptoughts.config.experiment import OptimConfig
from gptoughts.engine import state
from gptoughts.engine.interface import (
    AfterStep,
    ForwardOutput,
    ForwardStep,
    InitialOfBuffer,
    Judge,
    Microbatch,
    NamedBuffers,
    StateFragment,
    StepResult,
)
from gptoughts.engine.optimizer import build_optimizer
from gptoughts.engine.pipeline import ChunkDispatcher, ChunkProxy, run_schedule
from gptoughts.engine.reductions import (
    broadcast_from_last_stage,
    is_log_contributor,
    is_replica_contributor,
    sum_over_world,
    sum_tensor_parallel_gradients,
)
from gptoughts.engine.replay import NonFiniteWatch
from gptoughts.engine.update_gate import UpdateGate
from gptoughts.engine.zero_engine import build_zero_engine, has_optimizer_offload, partitioned_construction, zero_stage
from gptoughts.errors import DataError
from gptoughts.parallel.shared_embedding import SharedEmbedding


def construction_context(
    deepspeed_json: Mapping[str, Any], params_dtype: torch.dtype
) -> Callable[[], AbstractContextManager[Any]]:
    """The context in which a model is to be constructed; under ZeRO-3 its parameters are born sharded.

    Args:
        deepspeed_json: The resolved JSON.
        params_dtype: Dtype of the model's parameters.
    Collective: entering it under ZeRO-3, every rank of the world.
    """
    return partitioned_construction(deepspeed_json, params_dtype) if zero_stage(deepspeed_json) == 3 else nullcontext


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Whole parameters inside the context, also where ZeRO-3 has sharded them; what is written there stays.

    Every rank has to write the same values: each keeps its own part of what data-parallel rank 0 wrote.
    Collective: data-parallel group, where the parameters are sharded.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    # A rank within the group that shards the parameter (partition_parameters.py:2450, 0.19.8).
    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0)


def gathered_for_reading(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Whole parameters inside the context, also where ZeRO-3 has sharded them; what is written there is lost.

    Collective: data-parallel group, where the parameters are sharded.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=None) if sharded else nullcontext()


class TrainEngine:
    """See :class:`gptoughts.engine.interface.Engine`.

    Args:
        chunks: This rank's model chunks; each has ``config`` (a TransformerConfig) and ``set_input_tensor``.
        forward_step: Runs one microbatch through a chunk.
        optim: AdamW's settings; the learning rate comes with every step.
        deepspeed_json: The resolved DeepSpeed JSON.
        parameter_names: Global name to parameter, each parameter once; the frozen ones may be left out.
        seq_length: Tokens per sequence, for what pipeline stages exchange.
        named_buffers: What a checkpoint holds beyond parameters.
        initial_of_buffer: Which of these a checkpoint may lack, and what they are then.
        after_step: Called after every update, applied or not.
        shared_embedding_weight: The embedding matrix where two pipeline stages use it: the parameter on the first one,
            a leaf tensor on the last one (``parallel.shared_embedding``).
    Collective: every rank of the world.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        forward_step: ForwardStep,
        optim: OptimConfig,
        deepspeed_json: Mapping[str, Any],
        *,
        parameter_names: Mapping[str, nn.Parameter],
        seq_length: int = 1,
        named_buffers: NamedBuffers = dict,
        initial_of_buffer: InitialOfBuffer = lambda _: None,
        after_step: AfterStep | None = None,
        shared_embedding_weight: Tensor | None = None,
    ) -> None:
        self.chunks: Sequence[nn.Module] = list(chunks)
        self.zero_stage = zero_stage(deepspeed_json)
        self._forward_step = forward_step
        self._after_step = after_step
        self._parameters = dict(parameter_names)
        self._seq_length = seq_length
        self._readers: list[Callable[[], object]] = []
        self._micro_batch_size = int(deepspeed_json.get("train_micro_batch_size_per_gpu", 1))
        self._data_parallel_size = parallel_state.get_data_parallel_world_size()
        optimizer = build_optimizer(self._parameters, optim, is_offloaded=has_optimizer_offload(deepspeed_json))
        sum_tensor_parallel_gradients(self._parameters.values())
        self._shared_embedding: SharedEmbedding | None = None
        if shared_embedding_weight is not None:
            self._shared_embedding = SharedEmbedding(shared_embedding_weight, gathered_for_reading)
        self.deepspeed = build_zero_engine(ChunkDispatcher(self.chunks), optimizer, deepspeed_json)
        self._proxies = [ChunkProxy(chunk, i, self.deepspeed) for i, chunk in enumerate(self.chunks)]
        for chunk in self.chunks:
            config: Any = chunk.config
            config.grad_scale_func = self._scale_loss if self._is_fp16 else None
        self._state = state.TrainingState(self.deepspeed, self._parameters, named_buffers, initial_of_buffer)
        # Listing them walks the whole model: not in each step of a model that has none.
        self._buffers: NamedBuffers = named_buffers if named_buffers() else dict
        self.buffers_before_step: Mapping[str, Tensor] = {}
        self._watch: NonFiniteWatch | None = None
        self._gate = UpdateGate(self.deepspeed.optimizer)
        self._refresh_shared_embedding()

    @property
    def device(self) -> torch.device:
        """Where this rank's model is."""
        return torch.device(self.deepspeed.device)

    def train_step(
        self,
        microbatches: Sequence[Microbatch],
        *,
        lr: float,
        flags: Mapping[str, float] | None = None,
        judge: Judge | None = None,
    ) -> StepResult:
        """Forward, backward and one update with learning rate ``lr``.

        Args:
            microbatches: This data-parallel rank's, the same number on every rank.
            lr: Learning rate of this update.
            flags: Numbers to be summed over all ranks of the world, the same names on every rank.
            judge: Decides, between backward and update, whether the update is applied; unset: it is.
        Returns:
            The same on every rank; ``applied`` is False where gradients were not finite, or the judge refused the
            update: then weights, moments and buffers are as before the step.
        Raises:
            DataError: the global denominator is 0.
        Collective: every rank of the world.
        """
        denominator, summed_flags = self._sum_denominators(microbatches, flags or {})
        self.deepspeed.train()
        self.buffers_before_step = {name: buffer.clone() for name, buffer in self._buffers().items()}
        factor = len(microbatches) * self._data_parallel_size / denominator
        if self._shared_embedding is not None:
            self._shared_embedding.begin_step(len(microbatches))
        losses = self._run(microbatches, factor, is_forward_only=False)
        if self._shared_embedding is not None:
            self._shared_embedding.end_schedule()
        loss_sum, extras = self._sum_losses(losses)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        loss = loss_sum / denominator
        self._gate.set_judge(None if judge is None else lambda norm: judge(loss, norm))
        self._await_readers()
        self.deepspeed.step()
        self._refresh_shared_embedding()
        is_applied, is_refused = bool(self.deepspeed.was_step_applied()), self._gate.is_refused
        norm = self._gate.grad_norm if is_refused else float(self.deepspeed.get_global_grad_norm() or 0.0)
        figures = self._after_step(is_applied) if self._after_step is not None else {}
        if not is_applied:
            self._gate.drop_gradients()
            for name, buffer in self._buffers().items():
                buffer.copy_(self.buffers_before_step[name])
        return StepResult(
            loss_sum, denominator, norm, is_applied, extras, summed_flags, figures=figures, is_refused=is_refused
        )

    def replay(self, microbatches: Sequence[Microbatch], watch: NonFiniteWatch) -> None:
        """Forward and backward of a step once more, without an update, under ``watch``; leaves no trace.

        Collective: every rank of the world.
        """
        scaler = self.loss_scaler_state()
        with watch:
            self._watch = watch
            try:
                self.train_step(microbatches, lr=0.0, judge=lambda loss, norm: False)
            finally:
                self._watch = None
        self._state.set_loss_scaler(scaler)

    def eval_step(self, microbatches: Sequence[Microbatch]) -> StepResult:
        """Forward only, dropout off. Collective: every rank of the world."""
        denominator, _ = self._sum_denominators(microbatches, {})
        self.deepspeed.eval()
        losses = self._run(microbatches, 1.0, is_forward_only=True)
        loss_sum, extras = self._sum_losses(losses)
        return StepResult(
            loss_sum=loss_sum, denominator=denominator, grad_norm=0.0, applied=False, extras=extras, flags={}
        )

    def state_fragments(self) -> list[StateFragment]:
        """This rank's pieces of weights and moments, as live views. Collective: none."""
        return self._state.fragments()

    def scalar_state(self) -> dict[str, Any]:
        """Adam's step count and, in fp16, the loss scaler's numbers. Collective: none."""
        return self._state.scalars()

    def loss_scaler_state(self) -> dict[str, Any]:
        """The numbers of fp16's dynamic loss scaler; empty where there is none. Collective: none."""
        return self._state.loss_scaler() if self._is_fp16 else {}

    def load_state(self, read: Callable[[StateFragment], Tensor], scalars: Mapping[str, Any]) -> None:
        """Fill every fragment with ``read(fragment)`` (1-D, of its length), then refresh the model's weights.

        Raises:
            CheckpointError: a piece of another length.
        Collective: data-parallel group.
        """
        self._await_readers()
        self._state.load(read, scalars)
        self._refresh_shared_embedding()

    def before_next_update(self, wait: Callable[[], object]) -> None:
        """Call ``wait`` once, ahead of the next update or load, which change weights and moments. Collective: none."""
        self._readers.append(wait)

    def _await_readers(self) -> None:
        while self._readers:
            self._readers.pop()()

    def monitor_events(self, events: Sequence[tuple[str, float, int]]) -> None:
        """Write (name, value, step) to the monitors that the JSON switches on. Collective: none."""
        if self.deepspeed.event_monitor.enabled:
            self.deepspeed.event_monitor.write_events(list(events))

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model. Collective: none."""
        self.deepspeed.destroy()

    @property
    def _is_fp16(self) -> bool:
        return bool(self.deepspeed.fp16_enabled())

    def _scale_loss(self, loss: Tensor) -> Tensor:
        # engine.scale accepts scalars only, and the schedule also scales losses of shape [1].
        return loss * self.deepspeed.optimizer.loss_scale

    def _refresh_shared_embedding(self) -> None:
        if self._shared_embedding is not None:
            self._shared_embedding.refresh()

    def _run(self, microbatches: Sequence[Microbatch], factor: float, *, is_forward_only: bool) -> list[Any]:
        def step(chunk: nn.Module, microbatch: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Any]]]:
            if self._watch is not None:
                self._watch.begin(next(i for i, one in enumerate(microbatches) if one is microbatch))
            output = self._forward_step(chunk, microbatch)
            if not isinstance(output, ForwardOutput):
                return output, _no_loss
            kept = (output.loss_sum.detach(), output.extras)
            total = output.loss_sum if output.auxiliary_sum is None else output.loss_sum + output.auxiliary_sum
            if self._watch is not None:
                self._watch.look_at_loss(total)
            return total, lambda loss_sum: (loss_sum * factor, kept)

        return run_schedule(
            self._proxies,
            microbatches,
            step,
            is_forward_only=is_forward_only,
            seq_length=self._seq_length,
            micro_batch_size=self._micro_batch_size,
        )

    def _sum_denominators(
        self, microbatches: Sequence[Microbatch], flags: Mapping[str, float]
    ) -> tuple[float, dict[str, float]]:
        local = sum(float(microbatch.denominator) for microbatch in microbatches)
        names = sorted(flags)
        values = [local if is_replica_contributor() else 0.0, *(float(flags[name]) for name in names)]
        denominator, *summed = sum_over_world(torch.tensor(values, dtype=torch.float64), self.device).tolist()
        if not denominator > 0.0:
            raise DataError(f"denominator={denominator}: this step has no token to learn from on any rank")
        return denominator, dict(zip(names, summed, strict=True))

    def _sum_losses(self, losses: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> tuple[float, dict[str, float]]:
        names = sorted(losses[0][1]) if losses else []
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            names = broadcast_from_last_stage(names)
        total = torch.zeros(1 + len(names), dtype=torch.float64, device=self.device)
        if losses and is_log_contributor():
            total[0] = torch.stack([loss_sum.double() for loss_sum, _ in losses]).sum()
            for i, name in enumerate(names):
                total[1 + i] = torch.stack([extras[name].double() for _, extras in losses]).sum()
        loss_sum, *summed = sum_over_world(total, self.device).tolist()
        return loss_sum, dict(zip(names, summed, strict=True))


def _no_loss(output: Tensor) -> tuple[Tensor, Any]:
    raise AssertionError("forward_step has to return a ForwardOutput on the last pipeline stage")
