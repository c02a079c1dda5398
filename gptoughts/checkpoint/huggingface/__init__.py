"""Weights in Hugging Face's layout: which of their tensors make which of ours."""
