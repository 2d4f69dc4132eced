"""Searches files of any kind for erased records.

As bytes, and decompressed: Parquet, Arrow, zip, gzip, bzip2, xz, Zstandard and LZ4, also in tar. UTF-16 is read as
text, and SQLite also row by row, because it divides long values between pages.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import sqlite3
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dagster_project.lineage.erasure.needles import Needles

BLOCK = 16 * 2**20
"""Bytes that are searched at once."""
DEEPEST = 4
"""Archives in archives that are opened; one that is deeper counts as unreadable."""
HEAD, TAR = 262, b"ustar"
"""Bytes by which a packed file is known. Those of tar end with TAR."""
ARROW_STREAM = b"\xff\xff\xff\xff"
"""How a stream of Arrow begins; its buffers can be compressed."""
GZIP, BZIP2, XZ, ZSTD, LZ4 = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"
COMPRESSED = (GZIP, BZIP2, XZ, ZSTD, LZ4)
"""How compressed files begin."""
CLOSED = (b"7z\xbc\xaf\x27\x1c", b"Rar!")
"""How archives begin that are not opened, but counted."""
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""How texts of some programs for Windows begin."""
SQLITE = b"SQLite format 3\0"
"""How a database begins."""
ROLLBACK = b"\x01\x01"
"""Bytes 18 and 19 of a database that has no write-ahead log, as SQLite requires of one in memory."""
MAY_SPAN_PAGES = 60
"""Bytes that a row has at least of which a part is on another page. Searched as bytes, all others are found."""
MOST = 2**30
"""Bytes that a part of an archive may have when it is decompressed; a larger one counts as unreadable."""
TEXT, ID, SURE = "text", "id", "sure"
"""What a file holds: a fragment of a text; an id; enough of a record that no
other text can be meant: an id, or two fragments of one text."""


class Scanner:
    """Searches bytes for some needles.

    To prepare thousands of patterns takes longer than to search a small file, so many are searched at once.
    """

    def __init__(self, needles: Needles) -> None:
        self.needles = needles
        self.patterns = needles.patterns()
        self.overlap = max(map(len, self.patterns), default=1) - 1
        self.unreadable: list[str] = []
        """Archives that could not be opened: searched as they are."""
        self._waiting: list[tuple[bytes, set[int | None]]] = []
        """What is searched next, each with the set that gets what is found in it."""
        self._waiting_bytes = 0

    def files(self, paths: Iterable[Path]) -> list[set[str] | OSError]:
        """Kinds of what each file holds: TEXT, ID, SURE; or why it cannot be read.

        A file that is deleted meanwhile holds nothing.
        """
        found = [self._file(path) for path in paths]
        self._search_waiting()
        return [one if isinstance(one, OSError) else self._kinds(one) for one in found]

    def file(self, path: Path) -> set[str]:
        """As `files`, for one.

        Raises:
            OSError: it cannot be read.
        """
        (kinds,) = self.files([path])
        if isinstance(kinds, OSError):
            raise kinds
        return kinds

    def contents(self, given: Iterable[tuple[str, bytes]]) -> list[set[str]]:
        """As `files`, for bytes.

        Args:
            given: (name, bytes) of each.
        """
        found: list[set[int | None]] = []
        for name, data in given:
            found.append(set())
            self._content(data, name, 0, found[-1])
        self._search_waiting()
        return [*map(self._kinds, found)]

    def content(self, data: bytes, name: str = "") -> set[str]:
        """As `contents`, for one."""
        return self.contents([(name, data)])[0]

    def _kinds(self, found: set[int | None]) -> set[str]:
        fragments = {number for number in found if number is not None}
        has_id = None in found
        sure = has_id or self.needles.are_apart(fragments)
        return {kind for kind, holds in ((TEXT, fragments), (ID, has_id), (SURE, sure)) if holds}

    def _file(self, path: Path) -> set[int | None] | OSError:
        found: set[int | None] = set()
        try:
            with path.open("rb") as file:
                head = file.read(HEAD)
                file.seek(0)
                if _is_packed(head) and not _is_tar(head) and not head.startswith(SQLITE):
                    self._content(file.read(), str(path), 0, found)
                    return found
                self._stream(file, found)  # tar and databases are not read at once: they may be large
                if head.startswith(SQLITE):
                    self._parts(_texts_of_database(path), str(path), 0, found)
                if _is_tar(head):
                    self._parts(_packed_members(file), str(path), 0, found)
        except FileNotFoundError:
            return set()
        except OSError as error:
            return error
        return found

    def _stream(self, file: Any, found: set[int | None]) -> None:
        tail = b""
        while block := file.read(BLOCK):
            self._waiting.append((tail + block, found))
            self._waiting_bytes += len(tail) + len(block)
            if self._waiting_bytes >= BLOCK:
                self._search_waiting()
            tail = block[-self.overlap :] if self.overlap else b""

    def _content(self, data: bytes, name: str, depth: int, found: set[int | None]) -> None:
        self._stream(io.BytesIO(data), found)
        if _is_packed(data[:HEAD]):
            self._parts(_unpacked(data), name, depth, found)

    def _parts(self, parts: Iterator[bytes], name: str, depth: int, found: set[int | None]) -> None:
        try:
            if depth == DEEPEST:
                raise ValueError("too deep")
            for part in parts:
                self._content(part, name, depth + 1, found)
        except (
            OSError,
            EOFError,
            zlib.error,
            lzma.LZMAError,
            zipfile.BadZipFile,
            tarfile.TarError,
            sqlite3.DatabaseError,
            NotImplementedError,
            RuntimeError,
            ValueError,
        ):
            self.unreadable.append(name)

    def _search_waiting(self) -> None:
        """Search what waits: add the positions of the fragments that it holds, and None if it holds an id."""
        import polars as pl

        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        series = pl.Series([data.decode("latin-1") for data, _ in waiting], dtype=pl.String)
        patterns = list(self.patterns)
        if not patterns or not waiting:
            return
        holding = series.str.contains_any(patterns).arg_true()
        if len(holding):
            for i, held in zip(
                holding.to_list(),
                series.gather(holding).str.extract_many(patterns, overlapping=True).to_list(),
                strict=True,
            ):
                waiting[i][1].update(self.patterns[one] for one in held)


def _is_packed(head: bytes) -> bool:
    return _is_tar(head) or head.startswith(
        (b"PAR1", b"ARROW1", ARROW_STREAM, b"PK\x03\x04", SQLITE, *COMPRESSED, *CLOSED, *UTF_16)
    )


def _is_tar(head: bytes) -> bool:
    return head[HEAD - len(TAR) : HEAD] == TAR


def _packed_members(file: BinaryIO) -> Iterator[bytes]:
    """Content of the files in tar that are packed themselves. The others are in it as they are."""
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            opened = archive.extractfile(member) if member.isfile() else None
            if opened and _is_packed(head := opened.read(HEAD)):
                yield _bounded(head + opened.read(MOST + 1 - len(head)))


def _unpacked(data: bytes) -> Iterator[bytes]:
    if _is_tar(data):
        yield from _packed_members(io.BytesIO(data))
    elif data.startswith(COMPRESSED):
        with _decompressed(data) as file:
            yield _bounded(file.read(MOST + 1))
    elif data.startswith(CLOSED):
        raise ValueError("no library to open it")
    elif data.startswith(UTF_16):
        yield _bounded(data).decode("utf-16", "replace").encode("utf-8", "replace")
    elif data.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    yield _bounded(file.read(MOST + 1))
    elif data.startswith(SQLITE):
        yield from _texts_of_database(_bounded(data))
    else:
        yield from _table_texts(data)


def _texts_of_database(stored: Path | bytes) -> Iterator[bytes]:
    """Texts and bytes of the long rows of a SQLite file, which is opened without locks and never written."""
    on_disk = f"{stored.absolute().as_uri()}?mode=ro&immutable=1" if isinstance(stored, Path) else ":memory:"
    with closing(sqlite3.connect(on_disk, uri=True)) as db:
        if isinstance(stored, bytes):
            db.deserialize(stored[:18] + ROLLBACK + stored[20:])
        db.text_factory = bytes
        db.execute("PRAGMA trusted_schema = OFF")
        tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE 'CREATE VIRTUAL%'"
        for name in [_quoted(row[0]) for row in db.execute(tables)]:
            columns = [_quoted(row[1]) for row in db.execute(f"PRAGMA table_info({name})")]
            size = " + ".join(f"ifnull(length(CAST({column} AS BLOB)), 0)" for column in columns)
            for row in db.execute(f"SELECT * FROM {name} WHERE {size} >= {MAY_SPAN_PAGES}"):
                yield b"\n".join(value for value in row if isinstance(value, bytes))


def _quoted(name: bytes) -> str:
    return '"' + name.decode().replace('"', '""') + '"'


def _decompressed(data: bytes) -> Any:
    import pyarrow as pa

    if data.startswith((ZSTD, LZ4)):
        return pa.CompressedInputStream(pa.BufferReader(data), "zstd" if data.startswith(ZSTD) else "lz4")
    opened = gzip.open if data.startswith(GZIP) else bz2.open if data.startswith(BZIP2) else lzma.open
    return opened(io.BytesIO(data))


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
        elif data.startswith(ARROW_STREAM):
            batches = pa.ipc.open_stream(source)
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
    elif (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    ):
        data = array.buffers()[2]
        yield data.to_pybytes() if data is not None else b""
    elif pa.types.is_fixed_size_binary(kind) or pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        yield b"\n".join(one.encode() if isinstance(one, str) else one for one in array.to_pylist() if one is not None)


@dataclass(frozen=True)
class Hit:
    """A file that holds something of an erased record."""

    path: Path
    size: int
    sure: bool
    """Whether it holds an id, or two fragments of one text: one short fragment can be of another text."""


@dataclass
class Walk:
    """The files of folders, and what is not searched there."""

    skipped: Collection[str] = ()
    """Names of folders that are left out, at any depth."""
    links: list[Path] = field(default_factory=list)
    """Symbolic links, which are not followed."""
    unreadable: list[str] = field(default_factory=list)
    """Folders that cannot be listed."""
    repositories: list[Path] = field(default_factory=list)
    """Folders named .git, and bare repositories."""

    def files(self, folder: Path) -> Iterator[Path]:
        """Every regular file in a folder, sorted."""
        for parent, folders, files in os.walk(folder, onerror=self._failed):
            names = sorted(name for name in folders if name not in self.skipped)
            self.repositories += [Path(parent, name) for name in folders if name == ".git"]
            self.repositories += [Path(parent)] if "HEAD" in files and {"objects", "refs"} <= {*folders} else []
            folders[:] = [name for name in names if not self._is_link(Path(parent, name))]
            for path in (Path(parent, name) for name in sorted(files)):
                if not self._is_link(path) and self._is_regular(path):
                    yield path

    def _is_regular(self, path: Path) -> bool:
        try:
            return path.is_file()
        except OSError as error:
            self._failed(error)
            return False

    def _is_link(self, path: Path) -> bool:
        if path.is_symlink():
            self.links.append(path)
            return True
        return False

    def _failed(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            self.unreadable.append(str(error.filename))


def is_weights(path: Path) -> bool:
    """Whether a file is safetensors: numbers, which have no text.

    Which models saw a record is known from lineage, not from a search.
    """
    with path.open("rb") as file:
        head = file.read(9)
    return (
        len(head) == 9
        and head[8:] == b"{"
        and 2 <= int.from_bytes(head[:8], "little") < min(path.stat().st_size, 2**27)
    )
