"""Specs of a dense decoder with multi-head latent attention."""

from __future__ import annotations

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig

from gptoughts.models.context_attention import context_parallel
from gptoughts.models.latent_attention import MLASelfAttention
from gptoughts.models.specs.backends import SpecBackend, select_backend
from gptoughts.models.specs.dense import decoder_block, decoder_layer


def mla_decoder_spec(
    config: MLATransformerConfig,
    *,
    attn_mask_type: AttnMaskType = AttnMaskType.causal,
    vp_stage: int | None = None,
    backend: SpecBackend | None = None,
) -> TransformerBlockSubmodules:
    """This stage's layers with latent attention and a dense SwiGLU; arguments as in ``dense_decoder_spec``."""
    backend = backend or select_backend(config)
    layer = decoder_layer(mla_attention(config, backend, attn_mask_type), backend)
    return decoder_block(layer, config, backend, vp_stage)


def mla_attention(config: MLATransformerConfig, backend: SpecBackend, attn_mask_type: AttnMaskType) -> ModuleSpec:
    """Latent attention alone."""
    return ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": attn_mask_type},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=backend.column_parallel_linear,
            linear_q_down_proj=backend.replicated_linear,
            linear_q_up_proj=backend.column_parallel_linear,
            linear_kv_down_proj=backend.replicated_linear,
            linear_kv_up_proj=backend.column_parallel_linear,
            core_attention=context_parallel(backend.core_attention, config),
            linear_proj=backend.row_parallel_linear,
            # 0.19 refuses a norm of a latent that is not there (transformer/mla_qk_norm_config.py:259, 0.19.2).
            q_layernorm=backend.norm if config.q_lora_rank is not None else IdentityOp,
            kv_layernorm=backend.norm,
        ),
    )
