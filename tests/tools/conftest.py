"""Fixtures of the data tests, for the tools that turn text into corpora."""

from tests.data.conftest import tokenizer_folder

__all__ = ["tokenizer_folder"]
