"""FP8 by Transformer Engine: what megatron-core's configuration needs, layers that stay out, the state by our names.

megatron-core's transformer block enters ``fp8_autocast`` with the recipe that it makes from ``TransformerConfig.fp8*``
and with the amax group. Here one more is entered around the whole forward of a chunk: the update follows its end alone,
and layers of multi-token prediction, which lie outside the block, are in FP8 too.

Transformer Engine is imported only where it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.precision.fp8_recipe import DelayedScaling
from gptoughts.precision.scaling_state import STATE_NAMES

FEATURE_MULTIPLE, ROW_MULTIPLE = 16, 8
"""What cuBLAS wants of a matrix's sides (``assert_dim_for_fp8_exec``, transformer_engine/pytorch/utils.py)."""


def configure(config: Any, recipe: DelayedScaling) -> None:
    """Set FP8 in a ``TransformerConfig``, before modules are made from it."""
    config.fp8 = recipe.format
    config.fp8_recipe = "delayed"
    config.fp8_margin = recipe.margin
    config.fp8_amax_history_len = recipe.amax_history_len
    config.fp8_amax_compute_algo = recipe.amax_compute_algo
    # Cast weights are not kept from one microbatch to the next: see precision.scaling_state.
    config.disable_parameter_transpose_cache = True


class TeLinears:
    """Transformer Engine's linear layers of one chunk.

    Args:
        layers: By global name.
        is_kept: Whether a layer stays out of FP8.
        config: megatron-core's configuration, after :func:`configure`.
    """

    def __init__(self, layers: Mapping[str, nn.Module], is_kept: Callable[[str], bool], config: Any) -> None:
        self._config = config
        self.layers: dict[str, Any] = {}
        """Those in FP8."""
        for name, layer in layers.items():
            if is_kept(name):
                keep_out(layer)
            else:
                self.layers[name] = layer
        self._make_states()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward of one microbatch. Collective: the amax group, at its end, where gradients are on."""
        from megatron.core.fp8_utils import get_fp8_context

        with get_fp8_context(self._config):
            yield
        if not torch.is_grad_enabled():
            # Casts have written their magnitudes to where the next step's are collected.
            for states in self.states().values():
                states["amax_history_fwd"][0].zero_()

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Live histories and scales by layer and by Transformer Engine's names; the layout of ``ScalingState``."""
        return {name: _states_of(layer) for name, layer in self.layers.items()}

    def fall_back(self, name: str) -> None:
        """Take a layer out of FP8, between two steps; its state is dropped."""
        keep_out(self.layers.pop(name))

    def _make_states(self) -> None:
        """Transformer Engine makes them in the first forward; a checkpoint is read before it."""
        from megatron.core.fp8_utils import get_fp8_context

        with torch.no_grad(), get_fp8_context(self._config):
            for layer in self.layers.values():
                layer.init_fp8_metadata(num_gemms=1)


def _states_of(layer: Any) -> dict[str, Tensor]:
    forward, backward = layer.fp8_meta["scaling_fwd"], layer.fp8_meta["scaling_bwd"]
    tensors = (forward.scale, forward.amax_history, backward.scale, backward.amax_history)
    return dict(zip(STATE_NAMES, tensors, strict=True))


def keep_out(layer: Any) -> None:
    """Let a layer compute in its parameters' dtype also inside ``fp8_autocast``.

    megatron-core's own way (``first_last_layers_bf16``) leaves the outermost autocast between layers, which delayed
    scaling forbids (megatron/core/fp8_utils.py:607, 0.16.1); an inner one that is off does not.
    """
    from transformer_engine.pytorch import fp8_autocast

    forward = layer.forward

    def forward_in_high_precision(*args: Any, **kwargs: Any) -> Any:
        with fp8_autocast(enabled=False):
            return forward(*args, **kwargs)

    layer.forward = forward_in_high_precision


def linear_layers(named_modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the modules that are Transformer Engine's linear layers."""
    from transformer_engine.pytorch import Linear

    return {name: module for name, module in named_modules.items() if isinstance(module, Linear)}


def shape_problems(layers: Mapping[str, Any], rows: int) -> list[str]:
    """A line for what FP8 products cannot multiply.

    Args:
        layers: In FP8, by global name.
        rows: Tokens of a microbatch on one rank.
    """
    problems = []
    if rows % ROW_MULTIPLE:
        problems.append(
            f"fp8: a microbatch has {rows} tokens per rank (batch_size x block_size); Transformer Engine needs a "
            f"multiple of {ROW_MULTIPLE}"
        )
    for name, layer in layers.items():
        shape = tuple(getattr(layer.weight, "ds_shape", layer.weight.shape))
        if any(side % FEATURE_MULTIPLE for side in shape):
            problems.append(
                f"fp8: {name} is {shape[0]} x {shape[1]} on this rank; Transformer Engine needs multiples of "
                f"{FEATURE_MULTIPLE}; change the shape or parallel.tensor, or name it in fp8.keep_bf16"
            )
    return problems
