"""Tiny published models on disk, with a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptoughts.data import train_tokenizer

SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 8.0, "beta_slow": 0.2,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2, "eos_token_id": 0, "bos_token_id": None}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 24}),
    "mistral": ("Mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    "deepseek": ("DeepseekV3", {
        "kv_lora_rank": 24, "q_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
        "first_k_dense_replace": 2, "num_key_value_heads": 4,
    }),
    "deepseek-v3-moe": ("DeepseekV3", {
        "kv_lora_rank": 24, "q_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
        "first_k_dense_replace": 1, "num_key_value_heads": 4, "moe_intermediate_size": 20, "n_routed_experts": 12,
        "num_experts_per_tok": 4, "n_group": 4, "topk_group": 3, "n_shared_experts": 2, "routed_scaling_factor": 2.5,
        "num_hidden_layers": 3, "num_mtp_layers": 0, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    }),
    "deepseek-v2-moe": ("DeepseekV2", {
        "kv_lora_rank": 24, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
        "first_k_dense_replace": 1, "moe_intermediate_size": 20, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "n_shared_experts": 1,
        "routed_scaling_factor": 16.0, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.9},
    }),
}  # fmt: skip

Publish = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log\n" * 20)
    train_tokenizer.main(["--input", str(text), "--vocab_size", "270", "--output", str(folder / "tokenizer")])
    return folder / "tokenizer"


@pytest.fixture
def publish(tmp_path: Path, tokenizer_folder: Path) -> Publish:
    """Make a Hugging Face folder of a kind; weights are random, norms are not 1."""

    def make(kind: str, *, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "1GB", **options: Any) -> Path:
        name, own = KINDS[kind]
        torch.manual_seed(5)
        model = getattr(transformers, f"{name}ForCausalLM")(
            getattr(transformers, f"{name}Config")(**SHAPE | own | options)
        )
        biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for tensor in (*model.parameters(), *biases):
            tensor.data.add_(0.2 * torch.randn_like(tensor))
        folder = tmp_path / f"published-{kind}"
        model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        for file in tokenizer_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return make
