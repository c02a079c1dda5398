"""Llama-style decoder."""
