"""Pretrain and fine-tune language models built from megatron-core specs under DeepSpeed ZeRO."""

__version__ = "0.1.0"
