"""DeepSeek-V2 and V3: latent attention and a fine-grained mixture of experts."""
