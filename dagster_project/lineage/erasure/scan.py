"""Searches files of any kind for erased records: as bytes, and decompressed: Parquet, Arrow, gzip and zip. SQLite stores text as it is."""

from __future__ import annotations

import gzip
import io
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.lineage.erasure.needles import Needles

BLOCK = 16 * 2**20
"""Bytes that are searched at once."""
DEEPEST = 3
"""Archives in archives that are opened."""
MOST = 2**30
"""Bytes that a part of an archive may have when it is decompressed; a larger one counts as unreadable."""
TEXT, ID = "text", "id"


class Scanner:
    """Searches bytes for some needles."""

    def __init__(self, needles: Needles) -> None:
        texts, ids = needles.patterns()
        self.patterns = {TEXT: texts, ID: ids}
        self.overlap = max((len(one) for patterns in self.patterns.values() for one in patterns), default=1) - 1
        self.unreadable: list[str] = []
        """Archives that could not be opened: searched as they are."""

    def file(self, path: Path) -> set[str]:
        """Kinds of what a file holds: "text", "id". A file that ends to exist meanwhile holds nothing."""
        try:
            with path.open("rb") as file:
                head = file.read(8)
                file.seek(0)
                if _is_packed(head):
                    return self.content(file.read(), str(path))
                return self._stream(file)
        except FileNotFoundError:
            return set()

    def _stream(self, file: Any) -> set[str]:
        found: set[str] = set()
        tail = b""
        while block := file.read(BLOCK):
            found |= self._search(tail + block)
            if len(found) == len(self.patterns):
                break
            tail = block[-self.overlap :] if self.overlap else b""
        return found

    def content(self, data: bytes, name: str = "", depth: int = 0) -> set[str]:
        """As `file`, for bytes."""
        found = self._stream(io.BytesIO(data))
        if depth < DEEPEST and _is_packed(data[:8]):
            try:
                for part in _unpacked(data):
                    found |= self.content(part, name, depth + 1)
            except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError):
                self.unreadable.append(name)
        return found

    def _search(self, data: bytes) -> set[str]:
        import polars as pl

        series = pl.Series([data.decode("latin-1")])
        return {kind for kind, patterns in self.patterns.items() if patterns and series.str.contains_any(patterns)[0]}


def _is_packed(head: bytes) -> bool:
    return head.startswith((b"PAR1", b"ARROW1", b"\x1f\x8b", b"PK\x03\x04"))


def _unpacked(data: bytes) -> Iterator[bytes]:
    if data.startswith(b"\x1f\x8b"):
        with gzip.open(io.BytesIO(data)) as file:
            yield _bounded(file.read(MOST + 1))
    elif data.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    yield _bounded(file.read(MOST + 1))
    else:
        yield from _table_texts(data)


def _bounded(content: bytes) -> bytes:
    if len(content) > MOST:
        raise ValueError("too large")
    return content


def _table_texts(data: bytes) -> Iterator[bytes]:
    """All strings and bytes in a Parquet or Arrow file, those of a column one after the other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = pa.BufferReader(data)
    try:
        if data.startswith(b"PAR1"):
            batches: Iterable[Any] = pq.ParquetFile(source).iter_batches()
        else:
            reader = pa.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            for column in batch.columns:
                yield from _strings(column)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None


def _strings(array: Any) -> Iterator[bytes]:
    import pyarrow as pa

    kind = array.type
    if pa.types.is_dictionary(kind):
        yield from _strings(array.dictionary)
    elif pa.types.is_struct(kind):
        for part in array.flatten():
            yield from _strings(part)
    elif pa.types.is_map(kind):
        yield from _strings(array.keys)
        yield from _strings(array.items)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _strings(array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        data = array.buffers()[2]
        yield data.to_pybytes() if data is not None else b""
    elif pa.types.is_fixed_size_binary(kind) or pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        yield b"\n".join(one.encode() if isinstance(one, str) else one for one in array.to_pylist() if one is not None)


@dataclass(frozen=True)
class Hit:
    """A file that holds something of an erased record."""

    path: Path
    kinds: tuple[str, ...]
    size: int


def files_under(folder: Path, skipped: Iterable[str] = ()) -> Iterator[Path]:
    """Every file in a folder, sorted; links are not followed.

    Args:
        skipped: names of folders that are left out, at any depth.
    """
    names = set(skipped)
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in names)
        for name in sorted(files):
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                yield path


def is_weights(path: Path) -> bool:
    """Whether a file is safetensors: numbers, which have no text. Which models saw a record is known from lineage, not from a search."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") < min(path.stat().st_size, 2**27)
