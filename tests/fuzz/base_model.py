"""A model folder of a few kilobytes: a byte-level tokenizer with a ChatML template, and a Llama of one layer."""

from __future__ import annotations

from functools import cache

from builders.random_history import tokenizer_files


@cache
def tokenizer_folder() -> dict[str, bytes]:
    """File -> content, without weights."""
    return dict(tokenizer_files())
