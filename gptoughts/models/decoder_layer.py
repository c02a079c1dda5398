"""megatron-core's transformer layer and block, with recompute done by ``models.recompute``."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from functools import partial
from typing import Any

from megatron.core.fp8_utils import get_fp8_context
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import transformer_block
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from gptoughts.config.experiment import ParallelConfig
from gptoughts.config.recompute import layer_groups
from gptoughts.models.recompute import recomputes, remake_norm_for, run_again


class DecoderLayer(TransformerLayer):
    """A layer whose halves recompute their own parts.

    megatron-core's layer is constructed as if nothing were recomputed. It takes every feed-forward half for dense that
    is not its own expert layer, and its recompute of norms needs Transformer Engine even without FP8
    (tensor_parallel/random.py:636 of 0.16.1 and :740 of 0.19.2: the flag reads ``fp8 is not None``, and its default is
    False), while with FP8 it has the linears behind them keep unquantised inputs, which delayed scaling refuses
    (transformer_layer.py:513, 0.19.2; transformer_engine/pytorch/module/linear.py:422, 2.20).
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        granularity, config.recompute_granularity = config.recompute_granularity, None
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.recompute_granularity = granularity
        if recomputes(self.config, "layernorm"):
            remake_norm_for(self.self_attention, self.input_layernorm)
            remake_norm_for(self.mlp, self.pre_mlp_layernorm)


def recompute_whole_layers(block: transformer_block.TransformerBlock) -> None:
    """Let the block's full recompute be the one below.

    0.16.1 forgets the padding mask in layers that it does not recompute, and reads past the last layer where the
    groups do not divide them (transformer/transformer_block.py:562 and :539). 0.19 has a function in place of the
    method, in which these are repaired (megatron/core/recompute.py, 0.19.2); what ``models.recompute.run_again`` does
    about random states is missing in both.
    """
    if hasattr(block, "_checkpointed_forward"):
        block._checkpointed_forward = partial(_forward_groups, block)
    else:
        transformer_block.checkpointed_forward = _forward_groups


def _forward_groups(
    block: transformer_block.TransformerBlock,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    context: None,
    context_mask: None,
    rotary_pos_emb: Tensor | None,
    attention_bias: Tensor | None,
    packed_seq_params: PackedSeqParams | None,
    use_inner_quantization_context: bool,
    padding_mask: Tensor | None = None,
    extract_layer_indices: Collection[int] = (),
    layer_offset: int = 0,
) -> Tensor:
    """The block's layers, [s, b, h] to [s, b, h], in groups (``config.recompute.layer_groups``)."""
    assert not extract_layer_indices, "features of single layers are not asked for"
    config = block.config

    def run(layers: range) -> Any:
        def function(hidden_states: Tensor, rotary_pos_emb: Tensor | None) -> Tensor:
            for index in layers:
                layer = block.layers[index]
                is_quantized = use_inner_quantization_context and config.fp8
                with get_fp8_context(config, layer.layer_number - 1) if is_quantized else nullcontext():
                    hidden_states, _ = layer(
                        hidden_states=hidden_states,
                        attention_mask=attention_mask,
                        rotary_pos_emb=rotary_pos_emb,
                        attention_bias=attention_bias,
                        packed_seq_params=packed_seq_params,
                        padding_mask=padding_mask,
                    )
            return hidden_states

        return function

    settings = ParallelConfig(
        recompute_granularity="full",
        recompute_method=config.recompute_method,
        recompute_num_layers=config.recompute_num_layers,
    )
    for group in layer_groups(len(block.layers), settings):
        inputs = (hidden_states, rotary_pos_emb)
        hidden_states = (
            run_again(config, run(group.layers), *inputs) if group.is_recomputed else run(group.layers)(*inputs)
        )
    return hidden_states
