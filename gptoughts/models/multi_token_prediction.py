"""Modules that predict tokens further ahead than the next one, behind the main model (DeepSeek-V3, arXiv:2412.19437,
section 2.2).

Depth k of position i, with h^0 the main model's states after its final norm, t the tokens:

    x_i = M_k [RMS(Emb(t_(i+k))) ; RMS(h_i^(k-1))],   h^k = RMS(TRM_k(x)),   OutHead(h_i^k) predicts t_(i+k+1).

Emb and OutHead are the main model's. [embedding ; state] is the order of the published weights and of megatron-core; in
the paper's formula the two stand the other way round, the same function with the columns of M_k exchanged. States pass
the final norm before the next depth, as serving software (vLLM) and megatron-core have it; the paper does not say. The
last k positions of a row know no token k places ahead: they get token 0, nothing that has a target sees them, and the
router counts them as padding.

megatron-core's own module is not used: its parameters' names and its layer's number changed between 0.16 and 0.19
(``transformer_layer`` became ``mtp_model_layer``; the names here are 0.16's), and it divides its loss by the target
tokens of each microbatch (models/gpt/gpt_model.py:660, 0.16.1), so that accumulation would change what is learned.

Legend: s sequence (this rank's part under sequence parallelism), b microbatch, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn
from torch.nn import Parameter

from gptoughts.models.norms import mark_partial_gradients
from gptoughts.models.recompute import run_again
from gptoughts.objectives.multi_token import is_without_token, shift_left, shift_positions
from gptoughts.platform import device

Norm = Callable[..., nn.Module]


class EmbeddingStateProjection(nn.Module):
    """[embedding ; state] to the residual stream's width, whole on every tensor-parallel rank.

    It works where the tokens are, so that neither its input nor its output is exchanged (megatron-core gathers the
    input, divides the columns and gathers them).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        where = {"device": device.current_device(), "dtype": config.params_dtype}
        self.weight = Parameter(torch.empty(config.hidden_size, 2 * config.hidden_size, **where))
        if config.sequence_parallel:
            mark_partial_gradients(self)

    def forward(self, embedded: Tensor, states: Tensor) -> Tensor:
        """Two [s, b, h] to one."""
        return F.linear(torch.cat((embedded, states), dim=-1), self.weight)


class MultiTokenPredictionLayer(nn.Module):
    """One depth.

    Args:
        config: megatron-core's configuration.
        layer: Spec of its transformer layer.
        norm: Makes a norm from (config, hidden_size, eps).
        number: The layer's number in the whole model, from 1: after the decoder's.
        vp_stage: Virtual pipeline stage.
    """

    def __init__(
        self, config: TransformerConfig, layer: ModuleSpec, norm: Norm, *, number: int, vp_stage: int | None
    ) -> None:
        super().__init__()
        self.config = config

        def build_norm() -> nn.Module:
            return norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

        self.enorm = build_norm()
        self.hnorm = build_norm()
        self.eh_proj = EmbeddingStateProjection(config)
        # A layer adds its stage's offset to the number that it is given.
        offset = get_transformer_layer_offset(config, vp_stage)
        self.transformer_layer = build_module(layer, config=config, layer_number=number - offset, vp_stage=vp_stage)
        self.final_layernorm = build_norm()

    @property
    def mtp_model_layer(self) -> nn.Module:
        """0.19's name of the layer, by which its schedules look for it (transformer/cuda_graphs.py:2954, 0.19.2)."""
        return self.transformer_layer

    def forward(self, states: Tensor, embedded: Tensor, **layer_inputs: Any) -> Tensor:
        """States of this depth, [s, b, h], normed.

        Args:
            states: [s, b, h], of the depth before.
            embedded: [s, b, h], embeddings of the tokens that are this depth's number of places ahead.
            layer_inputs: What the decoder's layers are given (mask, rotary table, packing).

        Collective: tensor-parallel group.
        """

        def layer(states: Tensor, embedded: Tensor) -> Tensor:
            states = self.eh_proj(self.enorm(embedded), self.hnorm(states))
            return self.transformer_layer(hidden_states=states, **layer_inputs)[0]

        config = self.config
        # Behind the layers of a chunk: "block" counts these alone.
        is_recomputed = config.recompute_granularity == "full" and config.recompute_method == "uniform"
        # Dropout draws from each rank's own generator where ranks hold parts of a sequence, as in TransformerBlock.
        with get_cuda_rng_tracker().fork() if config.sequence_parallel else nullcontext():
            if self.training and is_recomputed:
                states = run_again(config, layer, states, embedded)
            else:
                states = layer(states, embedded)
        return self.final_layernorm(states)


class MultiTokenInputs(NamedTuple):
    """What the language model was given, each as its forward has it."""

    input_ids: Tensor
    labels: Tensor
    selected_positions: Tensor | None
    is_padding: Tensor | None


class MultiTokenPrediction(nn.Module):
    """All depths, in ``layers``; the language model lends them its embedding and its output layer.

    Args:
        config: megatron-core's configuration.
        num_depths: How many.
        layer: Spec of their transformer layers.
        norm: As in :class:`MultiTokenPredictionLayer`.
        vp_stage: Virtual pipeline stage.
    """

    def __init__(
        self, config: TransformerConfig, num_depths: int, layer: ModuleSpec, norm: Norm, *, vp_stage: int | None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MultiTokenPredictionLayer(config, layer, norm, number=config.num_layers + depth, vp_stage=vp_stage)
            for depth in range(1, num_depths + 1)
        )

    def losses(
        self, model: Any, states: Tensor, inputs: MultiTokenInputs, layer_inputs: dict[str, Any]
    ) -> list[Tensor]:
        """Loss per token of every depth, fp32 [b, s] nats.

        To be called after the main output layer: so the modules that evaluation runs are the first of those that
        training runs, and ZeRO-3 keeps the order that it has recorded.

        Args:
            model: The language model.
            states: [s, b, h], after its final norm.
            inputs: What it was given.
            layer_inputs: What its layers were given (mask, rotary table, packing).

        Collective: tensor-parallel group.
        """
        found = []
        for depth, layer in enumerate(self.layers, start=1):
            embedded = model.embed(shift_left(inputs.input_ids, depth))
            padding_mask = model.own_positions(is_without_token(inputs.input_ids, inputs.is_padding, depth))
            states = layer(states, embedded, padding_mask=padding_mask, **layer_inputs)
            selected = inputs.selected_positions
            if selected is not None:
                selected = shift_positions(selected, depth, inputs.labels.size(1))
            found.append(model.token_loss(states, shift_left(inputs.labels, depth), selected))
        return found
