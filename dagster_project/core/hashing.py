"""Content hashes of files and texts. sha256 for what Pedigree vouches for; md5 only where DVC names an object by it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(paths: Iterable[Path]) -> str:
    """sha256 over the sha256 of each file's content, in the order given."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(bytes.fromhex(sha256_of_file(path)))
    return whole.hexdigest()


def sha256_of_text(text: str) -> str:
    """sha256 of a text as UTF-8; lone surrogates are kept as they are."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def md5_of_file(path: Path) -> str:
    """The name that DVC gives the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def md5_of_bytes(content: bytes) -> str:
    """The name that DVC gives this content."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def md5_of_folder(listing: Mapping[str, str]) -> str:
    """The name that DVC gives a folder.

    Args:
        listing: path within the folder -> md5 of the file.
    """
    entries = [{"md5": listing[path], "relpath": path} for path in sorted(listing)]
    return f"{md5_of_bytes(json.dumps(entries, sort_keys=True).encode())}.dir"
