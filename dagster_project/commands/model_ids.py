"""Names of models outside of the project: the name of the stage with the first digits of the content hash."""

from __future__ import annotations

import re

DIGITS = 8
"""Hex digits of the hash."""


def model_id(name: str, digest: str) -> str:
    """`merged@lora` with the hash 6d292c0994... -> `merged-lora-6d292c09`;
    `model-6d292c09` if the name has no letter or digit of ASCII."""
    return f"{re.sub(r'[^A-Za-z0-9._]+', '-', name).strip('-') or 'model'}-{digest[:DIGITS]}"
