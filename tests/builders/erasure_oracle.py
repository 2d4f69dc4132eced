"""An independent search for what an erasure must have removed: words and ids in
every byte of a folder, decompressed, and token ids in every table."""

from __future__ import annotations

import gzip
import io
import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq


def traces(folder: Path, words: Sequence[str], ids: Sequence[str], tokens: Sequence[Sequence[int]] = ()) -> list[str]:
    """Files, and git blobs by name, that hold any of the words (in any case),
    an id (as text or as 16 bytes) or a sequence of tokens."""
    wanted = [word.casefold().encode() for word in words] + [one.encode() for one in ids]
    raw = [bytes.fromhex(one) for one in ids]
    found = []
    for path in files(folder):
        content = path.read_bytes()
        views = [content, *unpacked(content, path)]
        if any(one in view.lower() for view in views for one in wanted) or any(
            one in view for view in views for one in raw
        ):
            found.append(path.relative_to(folder).as_posix())
        elif content[:4] == b"PAR1" and any(
            holds(column, row) for column in pq.read_table(path).columns for row in tokens
        ):
            found.append(f"{path.relative_to(folder).as_posix()} (tokens)")
    return found


def files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in {".git", "__pycache__"}]
        yield from (path for name in names if (path := Path(parent, name)).is_file() and not path.is_symlink())


def unpacked(content: bytes, path: Path) -> Iterator[bytes]:
    if content[:2] == b"\x1f\x8b":
        yield gzip.decompress(content)
    elif content[:4] == b"PAR1":
        yield as_json(pq.read_table(io.BytesIO(content)))
    elif content[:6] == b"ARROW1":
        yield as_json(pyarrow.feather.read_table(io.BytesIO(content)))
    elif content[:15] == b"SQLite format 3":
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                for row in db.execute(f'SELECT * FROM "{name}"'):
                    yield b"\n".join(value if isinstance(value, bytes) else str(value).encode() for value in row)


def as_json(table: pa.Table) -> bytes:
    return json.dumps(table.to_pylist(), ensure_ascii=False, default=repr).encode()


def holds(column: Any, sequence: Sequence[int]) -> bool:
    """Whether a column of lists of integers has a list with these consecutive numbers."""
    if not pa.types.is_list(column.type) or not pa.types.is_integer(column.type.value_type):
        return False
    sought = list(sequence)
    return any(
        row[i : i + len(sought)] == sought
        for row in column.to_pylist()
        if row
        for i in range(len(row))
        if row[i] == sought[0]
    )


def blobs_with(folder: Path, word: str) -> set[str]:
    """Hashes of the git blobs that hold a word, whatever reaches them."""
    listed = subprocess.run(
        ["git", "cat-file", "--batch-all-objects", "--batch"], cwd=folder, capture_output=True, check=True
    ).stdout
    found, at = set[str](), 0
    while at < len(listed):
        end = listed.index(b"\n", at)
        name, kind, size = listed[at:end].decode().split()
        at = end + 1 + int(size) + 1  # after the content a line ends
        if kind == "blob" and word.encode() in listed[end + 1 : at - 1]:
            found.add(name)
    return found
