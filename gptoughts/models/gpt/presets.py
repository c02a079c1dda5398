"""Shapes of the family ``gpt``.

``small`` to ``xl`` take depth, width, heads and learning rate from GPT-3's table 2.1 and are adapted to a Llama-style
block: RMSNorm, rotary embeddings, no biases, and SwiGLU whose width 8/3 h (rounded up to a multiple of 256) keeps the
parameters of a 4 h feed-forward layer (GLU variants, arXiv:2002.05202, section 3). ``xl`` has 24 heads of 128 as that
table prints them, wider than the residual stream.
"""

from __future__ import annotations

from gptoughts.models.family import Preset
from gptoughts.models.gpt.config import GPTConfig

_GPT3 = "Language Models are Few-Shot Learners, arXiv:2005.14165, table 2.1, row '{}', adapted to SwiGLU and RMSNorm"

GPT_PRESETS = {
    "debug": Preset(
        model=GPTConfig(num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=4),
        source="house shape: trains in minutes on a CPU",
        num_parameters=7_407_872,
        lr=1e-3,
        batch_size=8,
    ),
    "small": Preset(
        model=GPTConfig(num_layers=12, hidden_size=768, ffn_hidden_size=2048, num_attention_heads=12,
                        vocab_size=32768, seq_length=2048),
        source=_GPT3.format("GPT-3 Small"),
        num_parameters=135_285_504,
        lr=6e-4,
        batch_size=8,
    ),
    "medium": Preset(
        model=GPTConfig(num_layers=24, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16,
                        vocab_size=32768, seq_length=2048),
        source=_GPT3.format("GPT-3 Medium"),
        num_parameters=375_440_384,
        lr=3e-4,
        batch_size=8,
    ),
    "large": Preset(
        model=GPTConfig(num_layers=24, hidden_size=1536, ffn_hidden_size=4096, num_attention_heads=16,
                        vocab_size=32768, seq_length=2048),
        source=_GPT3.format("GPT-3 Large"),
        num_parameters=780_215_808,
        lr=2.5e-4,
        batch_size=4,
    ),
    "xl": Preset(
        model=GPTConfig(num_layers=24, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=24, kv_channels=128,
                        vocab_size=32768, seq_length=2048),
        source=_GPT3.format("GPT-3 XL"),
        num_parameters=1_568_770_048,
        lr=2e-4,
        batch_size=2,
    ),
    "llama-3-8b": Preset(
        model=GPTConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32,
                        num_query_groups=8, vocab_size=128256, seq_length=8192, rotary_base=500000),
        source="https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json; arXiv:2407.21783, table 3",
        num_parameters=8_030_261_248,
        lr=3e-4,
        batch_size=1,
    ),
}  # fmt: skip
"""Size -> preset."""
