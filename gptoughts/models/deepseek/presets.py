"""Shapes of the family ``deepseek``.

House shapes: depth, width, heads, learning rate and latent attention as in ``mla``; 8 (debug) or 32 routed experts of
DeepSeekMoE's fine grain (a quarter of the dense width, arXiv:2401.06066, section 4.1.3) of which a token passes 2 or 3,
and one shared one, so that a token passes about as many parameters as in the dense model of that name, and the model
holds several times as many. The published shapes are those of the config.json of each repository.
"""

from __future__ import annotations

from dataclasses import replace

from gptoughts.models.deepseek.config import DeepSeekConfig
from gptoughts.models.family import Preset

_SOURCE = (
    "arXiv:2005.14165, table 2.1, row '{}', adapted to SwiGLU and RMSNorm, with latent attention in the proportions of "
    "DeepSeek-V2-Lite (arXiv:2405.04434, appendix B) and experts in those of DeepSeekMoE (arXiv:2401.06066)"
)

_HOUSE = DeepSeekConfig(
    vocab_size=32768, seq_length=2048, num_moe_experts=32, moe_router_topk=3, moe_router_topk_scaling_factor=2.5
)

DEEPSEEK_PRESETS = {
    "debug": Preset(
        model=DeepSeekConfig(num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=4,
                             q_lora_rank=192, kv_lora_rank=128, qk_head_dim=64, qk_pos_emb_head_dim=32, v_head_dim=64),
        source="house shape: trains in minutes on a CPU",
        num_parameters=9_573_888,
        lr=1e-3,
        batch_size=8,
    ),
    "small": Preset(
        model=replace(_HOUSE, num_layers=12, hidden_size=768, ffn_hidden_size=2048, num_attention_heads=12,
                      kv_lora_rank=256, qk_head_dim=64, qk_pos_emb_head_dim=32, v_head_dim=64,
                      moe_ffn_hidden_size=512, moe_shared_expert_intermediate_size=512),
        source=_SOURCE.format("GPT-3 Small"),
        num_parameters=508_622_592,
        lr=6e-4,
        batch_size=8,
    ),
    "medium": Preset(
        model=replace(_HOUSE, num_layers=24, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16,
                      kv_lora_rank=256, qk_head_dim=64, qk_pos_emb_head_dim=32, v_head_dim=64,
                      moe_ffn_hidden_size=704, moe_shared_expert_intermediate_size=704),
        source=_SOURCE.format("GPT-3 Medium"),
        num_parameters=1_800_625_152,
        lr=3e-4,
        batch_size=8,
    ),
    "large": Preset(
        model=replace(_HOUSE, num_layers=24, hidden_size=1536, ffn_hidden_size=4096, num_attention_heads=16,
                      kv_lora_rank=384, qk_head_dim=96, qk_pos_emb_head_dim=48, v_head_dim=96,
                      moe_ffn_hidden_size=1024, moe_shared_expert_intermediate_size=1024),
        source=_SOURCE.format("GPT-3 Large"),
        num_parameters=3_887_958_528,
        lr=2.5e-4,
        batch_size=4,
    ),
    "xl": Preset(
        model=replace(_HOUSE, num_layers=24, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=24,
                      kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128,
                      moe_ffn_hidden_size=1408, moe_shared_expert_intermediate_size=1408),
        source=_SOURCE.format("GPT-3 XL"),
        num_parameters=7_217_657_856,
        lr=2e-4,
        batch_size=2,
    ),
    "deepseek-v2-lite": Preset(
        model=DeepSeekConfig(num_layers=27, hidden_size=2048, ffn_hidden_size=10944, num_attention_heads=16,
                             vocab_size=102400, seq_length=4096, layernorm_epsilon=1e-6, init_method_std=0.006,
                             kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128,
                             first_k_dense_layers=1, num_moe_experts=64, moe_router_topk=6, moe_ffn_hidden_size=1408,
                             moe_shared_expert_intermediate_size=2 * 1408, moe_router_score_function="softmax",
                             moe_router_normalize_gates=False, moe_router_enable_expert_bias=False,
                             moe_aux_loss_coeff=1e-3, rotary_scaling_factor=40.0, original_max_position_embeddings=4096,
                             mscale=0.707, mscale_all_dim=0.707),
        source="https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite, config.json; arXiv:2405.04434, appendix B",
        num_parameters=15_700_000_000,
        lr=4.2e-4,
        batch_size=1,
    ),
    "deepseek-v3": Preset(
        model=DeepSeekConfig(num_layers=61, hidden_size=7168, ffn_hidden_size=18432, num_attention_heads=128,
                             vocab_size=129280, seq_length=4096, layernorm_epsilon=1e-6, init_method_std=0.006,
                             q_lora_rank=1536, kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64,
                             v_head_dim=128, first_k_dense_layers=3, num_moe_experts=256, moe_router_topk=8,
                             moe_ffn_hidden_size=2048, moe_shared_expert_intermediate_size=2048,
                             moe_router_num_groups=8, moe_router_group_topk=4, moe_router_topk_scaling_factor=2.5,
                             rotary_scaling_factor=40.0, original_max_position_embeddings=4096,
                             mscale=1.0, mscale_all_dim=1.0, mtp_num_layers=1),
        source="https://huggingface.co/deepseek-ai/DeepSeek-V3, config.json and README_WEIGHTS.md; arXiv:2412.19437, "
               "section 4.2 (counts without its multi-token prediction module, 11.5B more)",
        num_parameters=671_000_000_000,
        num_active_parameters=36_700_000_000,
        lr=2.2e-4,
        batch_size=1,
    ),
}  # fmt: skip
"""Size -> preset."""
