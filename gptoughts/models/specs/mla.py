"""Layer spec of a dense decoder with multi-head latent attention."""

from __future__ import annotations

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig

from gptoughts.models.attention import MLASelfAttention
from gptoughts.models.specs.backends import SpecBackend, select_backend
from gptoughts.models.specs.dense import decoder_layer_spec


def mla_layer_spec(
    config: MLATransformerConfig,
    *,
    attn_mask_type: AttnMaskType = AttnMaskType.causal,
    backend: SpecBackend | None = None,
) -> ModuleSpec:
    """A layer with latent attention and a dense SwiGLU; arguments as in ``dense_layer_spec``."""
    backend = backend or select_backend(config.normalization)
    return decoder_layer_spec(mla_attention_spec(backend, attn_mask_type), backend)


def mla_attention_spec(backend: SpecBackend, attn_mask_type: AttnMaskType) -> ModuleSpec:
    """Latent attention alone (layers with experts use it too)."""
    return ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": attn_mask_type},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=backend.column_parallel_linear,
            linear_q_down_proj=backend.replicated_linear,
            linear_q_up_proj=backend.column_parallel_linear,
            linear_kv_down_proj=backend.replicated_linear,
            linear_kv_up_proj=backend.column_parallel_linear,
            core_attention=backend.core_attention,
            linear_proj=backend.row_parallel_linear,
            q_layernorm=backend.norm,
            kv_layernorm=backend.norm,
        ),
    )
