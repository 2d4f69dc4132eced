"""The `__metadata__` of a safetensors file: read within bounds, and written into a copy. Needs no library.

Layout: length of the header, the header as JSON padded with spaces, the weights. Places count from the end of the
header, so that metadata can be added without a change of what follows. Without our keys the header is again the one
that was written first, byte for byte, and so is the file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dagster_project.core.errors import InputError
from dagster_project.lineage.history import listing_of

LONGEST_HEADER = 100_000_000
"""Bytes, as in the library of the format."""
METADATA = "__metadata__"
NAMESPACE = "pedigree."
"""Beginning of our keys."""


def read_header(path: Path) -> dict[str, Any]:
    """Raises:
    InputError: the file is not safetensors.
    """
    try:
        with path.open("rb") as file:
            return _header(file, path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", "name a file that can be read") from None


def own_metadata(path: Path) -> dict[str, str]:
    """Our keys and their values; empty if the file has none, or is not safetensors."""
    try:
        metadata = read_header(path).get(METADATA)
    except InputError:
        return {}
    if not isinstance(metadata, dict):
        return {}
    return {key: value for key, value in metadata.items() if key.startswith(NAMESPACE) and isinstance(value, str)}


def with_metadata(source: Path, target: Path, added: Mapping[str, str]) -> None:
    """Copy a file with more metadata. The weights are copied byte for byte.

    Args:
        added: keys begin with `NAMESPACE`.
    """
    with source.open("rb") as file, target.open("wb") as copy:
        header = _header(file, source)
        metadata = {**(header.get(METADATA) or {}), **added}
        copy.write(
            _encoded({METADATA: metadata, **{name: value for name, value in header.items() if name != METADATA}})
        )
        shutil.copyfileobj(file, copy, 1 << 20)


def md5_without_pedigree(path: Path) -> str | None:
    """md5, as DVC identifies files, of the file without our metadata: of the file that it was copied from, if nothing
    else was changed. None: the file has no such metadata."""
    if not own_metadata(path):
        return None
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        header = _header(file, path)
        kept = {key: value for key, value in header[METADATA].items() if not key.startswith(NAMESPACE)}
        before = {name: kept if name == METADATA else value for name, value in header.items()}
        if not kept:
            del before[METADATA]
        digest.update(_encoded(before))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def listing_without_pedigree(folder: Path) -> dict[str, str]:
    """As `listing_of`, of the files without our metadata."""
    found = listing_of(folder)
    return {name: md5_without_pedigree(folder / name) or md5 for name, md5 in found.items()}


def _header(file: BinaryIO, path: Path) -> dict[str, Any]:
    """The header of a file, which is then read up to the first weight."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(LONGEST_HEADER, path.stat().st_size):
        raise _not_safetensors(path, f"a header of {length:,} bytes")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError):
        raise _not_safetensors(path, "its header is not JSON, or has a key twice") from None
    if not isinstance(header, dict):
        raise _not_safetensors(path, "its header is not an object")
    return header


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON.

    Of two values of a key, some readers take the first and others the last. A file with a key twice is ambiguous.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _not_safetensors(path: Path, why: str) -> InputError:
    return InputError(f"{path}: not a safetensors file: {why}", "name a complete file or folder of a model")


def _encoded(header: Mapping[str, Any]) -> bytes:
    """As the library of the format writes a header."""
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content
