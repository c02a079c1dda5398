"""Checkpoints: portable, checked, atomic."""
