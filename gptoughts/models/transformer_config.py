"""megatron-core's TransformerConfig for one of our model shapes and layouts."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from gptoughts.config.experiment import ExperimentConfig, ParallelConfig
from gptoughts.config.model import ModelConfig
from gptoughts.config.pipeline import chunk_layers
from gptoughts.models.expert_shape import ExpertFields
from gptoughts.models.gpt.config import GPTConfig
from gptoughts.models.mla.config import MLAConfig
from gptoughts.models.recompute import recompute_fields
from gptoughts.models.yarn import YarnFields
from gptoughts.platform import device
from gptoughts.precision.backend import choose_transformer_impl


def leave_uninitialized(weight: Tensor) -> None:
    """The init method that megatron-core gets: ``models.initialization`` writes values once the model stands."""


def transformer_config(
    config: ExperimentConfig, *, params_dtype: torch.dtype, **family_fields: Any
) -> TransformerConfig:
    """megatron-core's configuration of any shape; an ``MLATransformerConfig`` where the attention is latent.

    Args:
        config: The run: its shape, its layout, and whose layers it takes.
        params_dtype: Dtype of the parameters.
        family_fields: Fields of megatron-core's configuration that a family sets by itself; they win.
    """
    model, impl = config.model, choose_transformer_impl(config)
    fields = _common_fields(model, config.parallel, params_dtype) | {
        "transformer_impl": impl,
        "persist_layer_norm": impl == "transformer_engine",
    }
    if isinstance(model, ExpertFields):
        fields |= _expert_fields(model)
    with warnings.catch_warnings():
        # What it says of core_attn holds for its own modules (transformer_config.py:1225, 0.16.1): ours include more.
        warnings.filterwarnings("ignore", message="If you are using transformer_engine")
        if isinstance(model, MLAConfig):
            return MLATransformerConfig(**fields | _latent_fields(model) | family_fields)
        if isinstance(model, GPTConfig):
            fields |= _grouped_query_fields(model)
        return TransformerConfig(**fields | family_fields)


def _grouped_query_fields(model: GPTConfig) -> dict[str, Any]:
    filled = model.filled()
    return {
        "num_query_groups": filled.num_query_groups,
        "kv_channels": filled.kv_channels,
        "qk_layernorm": model.qk_layernorm,
        "add_qkv_bias": model.add_qkv_bias,
    }


def _expert_fields(model: ExpertFields) -> dict[str, Any]:
    has_groups = model.moe_router_num_groups > 1
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size or None,
        "moe_layer_freq": [int(n >= model.first_k_dense_layers) for n in range(model.num_layers)],
        "moe_router_topk": model.moe_router_topk,
        "moe_router_score_function": model.moe_router_score_function,
        "moe_router_num_groups": model.moe_router_num_groups if has_groups else None,
        "moe_router_group_topk": model.moe_router_group_topk if has_groups else None,
        "moe_router_topk_scaling_factor": model.moe_router_topk_scaling_factor,
        "moe_router_enable_expert_bias": model.moe_router_enable_expert_bias,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": model.moe_token_dispatcher_type,
    }


def _latent_fields(model: MLAConfig) -> dict[str, Any]:
    # The softmax scale follows from these (frequencies are models.yarn's). megatron-core's default is YaRN's factor 40,
    # which it reads under plain RoPE too (transformer/multi_latent_attention.py:116, 0.16.1).
    scaling = {"rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    if isinstance(model, YarnFields):
        scaling = {name: getattr(model, name) for name in scaling}
    return {
        "multi_latent_attention": True,
        # 0.19.2 (transformer/mla_qk_norm_config.py:79) wants the latent norms said here as well as in the spec.
        "qk_layernorm": True,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_head_dim,
        "qk_pos_emb_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.v_head_dim,
        "rope_type": "rope",
        "rotary_base": model.rotary_base,
        **scaling,
    }


def _common_fields(model: ModelConfig, parallel: ParallelConfig, params_dtype: torch.dtype) -> dict[str, Any]:
    is_cuda = device.is_cuda()
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "init_method": leave_uninitialized,
        "output_layer_init_method": leave_uninitialized,
        # 0.16 and later initialise embeddings by a method of their own.
        "embedding_init_method": leave_uninitialized,
        "params_dtype": params_dtype,
        "pipeline_dtype": params_dtype,
        "bf16": params_dtype is torch.bfloat16,
        "fp16": params_dtype is torch.float16,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.tensor,
        "context_parallel_size": parallel.context,
        # Of Transformer Engine's ring; ours goes by it, too. Unset: the exchange around attention is ours.
        "cp_comm_type": "p2p" if parallel.context > 1 and parallel.context_method == "ring" else None,
        "sequence_parallel": parallel.sequence,
        **_pipeline_fields(model, parallel),
        **recompute_fields(parallel),
        # jit and CUDA features, chosen where they exist; on a CPU our own kernels stand in their place.
        "bias_dropout_fusion": is_cuda,
        "bias_activation_fusion": is_cuda,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "cross_entropy_loss_fusion": False,
        "calculate_per_token_loss": False,
    }


def _pipeline_fields(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """How the layers are divided, and how stages talk to each other."""
    if parallel.pipeline == 1:
        return {}
    chunks = [["decoder"] * count for count in chunk_layers(model.num_layers, parallel)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    is_interleaved = parallel.virtual_pipeline > 1
    return {
        "pipeline_model_parallel_layout": chunks,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if is_interleaved else None,
        # Interleaved, two stages are each other's predecessor and successor at once. In one batch of sends and receives
        # their activations and gradients would change places (pipeline_parallel/p2p_communication.py:15, 0.16.1); sent
        # singly they go through two groups (line 54 there). Without interleaving only batches are supported.
        "overlap_p2p_comm": is_interleaved,
        "batch_p2p_comm": not is_interleaved,
    }
