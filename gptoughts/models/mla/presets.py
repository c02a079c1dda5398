"""Shapes of the family ``mla``.

Depth, width, heads and learning rate as in ``gpt``; latent attention in DeepSeek-V2's proportions (arXiv:2405.04434,
section 2.1 and appendix B, V2-Lite): kv_lora_rank = 4 x head size, rotary part = half a head, queries not compressed.
``debug`` compresses its queries as well, so that the smallest model runs every part of the layer.
"""

from __future__ import annotations

from gptoughts.models.family import Preset
from gptoughts.models.mla.config import MLAConfig

_SOURCE = (
    "arXiv:2005.14165, table 2.1, row '{}', adapted to SwiGLU and RMSNorm, with latent attention in the proportions of "
    "DeepSeek-V2-Lite (arXiv:2405.04434, appendix B)"
)

MLA_PRESETS = {
    "debug": Preset(
        model=MLAConfig(num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=4,
                        q_lora_rank=192, kv_lora_rank=128, qk_head_dim=64, qk_pos_emb_head_dim=32, v_head_dim=64),
        source="house shape: trains in minutes on a CPU",
        num_parameters=7_540_224,
        lr=1e-3,
        batch_size=8,
    ),
    "small": Preset(
        model=MLAConfig(num_layers=12, hidden_size=768, ffn_hidden_size=2048, num_attention_heads=12,
                        vocab_size=32768, seq_length=2048,
                        kv_lora_rank=256, qk_head_dim=64, qk_pos_emb_head_dim=32, v_head_dim=64),
        source=_SOURCE.format("GPT-3 Small"),
        num_parameters=132_044_544,
        lr=6e-4,
        batch_size=8,
    ),
    "medium": Preset(
        model=MLAConfig(num_layers=24, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16,
                        vocab_size=32768, seq_length=2048,
                        kv_lora_rank=256, qk_head_dim=64, qk_pos_emb_head_dim=32, v_head_dim=64),
        source=_SOURCE.format("GPT-3 Medium"),
        num_parameters=357_358_592,
        lr=3e-4,
        batch_size=8,
    ),
    "large": Preset(
        model=MLAConfig(num_layers=24, hidden_size=1536, ffn_hidden_size=4096, num_attention_heads=16,
                        vocab_size=32768, seq_length=2048,
                        kv_lora_rank=384, qk_head_dim=96, qk_pos_emb_head_dim=48, v_head_dim=96),
        source=_SOURCE.format("GPT-3 Large"),
        num_parameters=739_527_168,
        lr=2.5e-4,
        batch_size=4,
    ),
    "xl": Preset(
        model=MLAConfig(num_layers=24, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=24,
                        vocab_size=32768, seq_length=2048,
                        kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128),
        source=_SOURCE.format("GPT-3 XL"),
        num_parameters=1_446_098_944,
        lr=2e-4,
        batch_size=2,
    ),
}  # fmt: skip
"""Size -> preset."""
