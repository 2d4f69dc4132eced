"""Content hashes of files and texts. sha256 for integrity; md5 only where DVC identifies an object by it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

CHUNK = 8 * 2**20
"""Bytes that are hashed at once: other threads of Python hold up each of these steps, by up to 5 ms."""


def sha256_of_file(path: Path) -> str:
    return _hashed(path, hashlib.sha256())


def sha256_of_files(paths: Iterable[Path]) -> str:
    """sha256 over the sha256 of each file's content, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(sha256_of_file(path)))
    return digest.hexdigest()


def sha256_of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_of_text(text: str) -> str:
    """sha256 of a text as UTF-8; lone surrogates are preserved."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_of_example(input_ids: Sequence[int], labels: Sequence[int]) -> str:
    """sha256 of a tokenized example: names it without its tokens, which are its text."""
    return sha256_of_text(json.dumps([[*input_ids], [*labels]]))


def md5_of_file(path: Path) -> str:
    """md5 of a file, as DVC identifies it."""
    return _hashed(path, hashlib.md5(usedforsecurity=False))


def _hashed(path: Path, digest: Any) -> str:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def md5_of_bytes(content: bytes) -> str:
    """md5 of bytes, as DVC identifies them."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def md5_of_folder(listing: Mapping[str, str]) -> str:
    """Hash of a folder, as DVC identifies it ("<md5>.dir").

    Args:
        listing: path within the folder -> md5 of the file.
    """
    entries = [{"md5": listing[path], "relpath": path} for path in sorted(listing)]
    return f"{md5_of_bytes(json.dumps(entries, sort_keys=True).encode())}.dir"
