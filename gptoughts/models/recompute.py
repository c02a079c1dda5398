"""Activations that are thrown away in forward and made again in backward (Chen et al., arXiv:1604.06174).

Two ways. A *region* (:func:`run_again`) keeps its inputs alone: its forward runs without a graph, and once more with
one when its backward comes; random states are replayed, so that dropout falls on the same places. *Remade outputs*
(:class:`RemadeOutputs`) are results of something cheap, of a norm say, that others keep for their backward: there
they are replaced by a note of how to make them, and the graph stays as it is. Both give the same numbers to the bit.

What is recomputed is said by megatron-core's own fields: ``recompute_granularity`` and, with "full",
``recompute_method`` and ``recompute_num_layers`` (``config.recompute.layer_groups``), with "selective"
``recompute_modules``:

    core_attn        a region from the heads' projections to the attention's output: head norms, rotary embedding, core
    mla_up_proj      queries, keys and values of latent attention, remade from the latents; with core_attn one region
    layernorm        outputs of both norms of a layer, remade
    mlp, moe, shared_experts    regions of the dense feed-forward half, of a whole expert layer, of its shared experts

**Side effects happen once if they ask which pass it is.** Of a region's two passes only the second one has a graph, so
what is counted where gradients are enabled (the router's loads and losses) is counted once. What has to happen in the
first pass alone, such as the statistics of a scale, asks :func:`is_recomputing`.

Legend: s sequence, b microbatch, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from gptoughts.config.experiment import ParallelConfig
from gptoughts.config.recompute import recomputed_modules


def is_recomputing() -> bool:
    """Whether this forward runs in the middle of a backward: it has been run before, with the same inputs."""
    return torch._C._current_graph_task_id() != -1


def recomputes(config: TransformerConfig, module: str) -> bool:
    """Whether the part of a layer with this name is to be recomputed."""
    return config.recompute_granularity == "selective" and module in (config.recompute_modules or ())


def run_again(config: TransformerConfig, function: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """``function(*inputs)`` as a region.

    Args:
        config: megatron-core's configuration.
        function: What it closes over stays alive until backward.
        inputs: The tensors that gradients flow to; at least one of them wants a gradient.

    Collective: those of ``function``, twice.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    function = _drawing_from_the_same_state(function)
    if config.fp8 and config.transformer_impl == "transformer_engine":
        # Its own, which keeps the scales of the first pass for the second.
        from megatron.core.extensions.transformer_engine import te_checkpoint

        group = parallel_state.get_tensor_model_parallel_group()
        return te_checkpoint(function, False, tensor_parallel.get_cuda_rng_tracker, group, *inputs)
    return tensor_parallel.checkpoint(function, False, *inputs)


def _drawing_from_the_same_state(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose second pass draws from the named random state from which the first one drew.

    Under sequence parallelism layers run inside a fork of the tracker, and attention's dropout forks the same name
    again. megatron-core replays all states, but not which of them was in use, and its table has that one as it was when
    the fork began (tensor_parallel/random.py:441, 0.16.1): the second pass would draw other numbers.
    """
    tracker = tensor_parallel.get_cuda_rng_tracker()
    name = tracker._current_state_name
    if name not in tracker.get_states():  # the default one
        return function
    with tracker.fork(name):
        pass  # writes the state in use into the table

    def drawing(*inputs: Tensor | None) -> Any:
        with tracker.fork(name) if is_recomputing() else nullcontext():
            return function(*inputs)

    return drawing


class RemadeOutputs:
    """Tensors that :meth:`kept_by_nobody` keeps out of the graph.

    Args:
        outputs: The tensors.
        remake: Makes them again, equal to the bit, from what the graph keeps anyway.
    """

    def __init__(self, outputs: Sequence[Tensor], remake: Callable[[], Sequence[Tensor]]) -> None:
        # By storage: what is kept may be a view, or an alias that a hook of ZeRO-3 has made.
        self._places = {output.untyped_storage()._cdata: place for place, output in enumerate(outputs)}
        self._remake = remake
        self._made: Sequence[Tensor] | None = None
        self._users = 0

    @contextmanager
    def kept_by_nobody(self) -> Iterator[None]:
        """Inside, what operators save of the outputs is a note of how to make it; other tensors are saved as ever."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            yield

    def pack(self, tensor: Tensor) -> Any:
        """What the graph gets in the tensor's place."""
        place = self._places.get(tensor.untyped_storage()._cdata)
        if place is None:
            return tensor
        return _Note(self, place, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, saved: Any) -> Tensor:
        """The tensor, made again where it was not kept."""
        return saved.tensor() if isinstance(saved, _Note) else saved

    def _make(self, place: int) -> Tensor:
        if self._made is None:
            with torch.no_grad():
                self._made = self._remake()
        return self._made[place]

    def _come(self) -> None:
        self._users += 1

    def _go(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._made = None


class _Note:
    """A view of one of the outputs, by number and geometry; the last one that goes takes what was made with it."""

    def __init__(
        self, owner: RemadeOutputs, place: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
    ) -> None:
        self._owner, self._place = owner, place
        self._geometry = shape, stride, offset
        owner._come()

    def tensor(self) -> Tensor:
        return self._owner._make(self._place).as_strided(*self._geometry)

    def __del__(self) -> None:
        self._owner._go()


def remake_norm_for(half: nn.Module, norm: nn.Module) -> None:
    """Let ``half`` (attention or feed-forward), which is given the norm's output, keep nothing of it.

    The norm's input is kept by the norm itself.
    """
    latest: list[RemadeOutputs] = []

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        latest.clear()
        if module.training and torch.is_grad_enabled():
            # A call of the module, not of its forward: under ZeRO-3 that gathers its weight.
            latest.append(RemadeOutputs([output], lambda: [module(*inputs)]))

    forward = half.forward

    def forward_keeping_nothing(*args: Any, **kwargs: Any) -> Any:
        with latest.pop().kept_by_nobody() if latest else nullcontext():
            return forward(*args, **kwargs)

    norm.register_forward_hook(remember)
    half.forward = forward_keeping_nothing  # type: ignore[method-assign]


def recompute_fields(parallel: ParallelConfig) -> dict[str, Any]:
    """megatron-core's fields for what the run asks for."""
    if parallel.recompute_granularity == "none":
        return {}
    if parallel.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(recomputed_modules(parallel))}
    return {
        "recompute_granularity": "full",
        "recompute_method": parallel.recompute_method or "uniform",
        "recompute_num_layers": parallel.recompute_num_layers or 1,
    }
