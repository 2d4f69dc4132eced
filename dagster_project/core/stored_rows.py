"""Rows and texts in a scratch file: sequences of any length in little memory."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from itertools import accumulate, chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import orjson

from dagster_project.core.lazy_sequence import LazySequence

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

BLOCK = 8192
"""Rows in one item for `Workers`."""
WINDOW = 1 << 20
"""Bytes that are read at once while items are read in order."""


class Scratch:
    """Items of bytes in a file that has no name and is freed with the object."""

    def __init__(self, folder: Path | None = None) -> None:
        """Args:
        folder: for the file; None: the folder for temporary files.
        """
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it lives as long as the object
        self._starts, self._lengths = array("Q"), array("L")
        self._flushed = 0
        """Bytes that have left the buffer."""

    def append(self, item: bytes) -> None:
        self._starts.append(self._file.tell())
        self._lengths.append(len(item))
        self._file.write(item)

    def with_changes(self, changed: Iterable[tuple[int, bytes]]) -> Scratch:
        """The same items with some of them replaced. Shares the file; nothing may be appended to either later."""
        new = copy(self)
        new._starts, new._lengths = self._starts[:], self._lengths[:]
        for i, item in changed:
            new._starts[i], new._lengths[i] = self._file.tell(), len(item)
            self._file.write(item)
        return new

    def __len__(self) -> int:
        return len(self._starts)

    def chosen(self, indices: Iterable[int]) -> Iterator[bytes]:
        """Items by their indices, in any order. Those that follow each other closely are read at once."""
        data, first, after = b"", 0, 0  # a part of the file, and the end of the item before
        for i in indices:
            start, length = self._starts[i], self._lengths[i]
            if not first <= start <= start + length <= first + len(data):
                near = after <= start < after + WINDOW // 4
                part = self._read(start, max(length, WINDOW) if near else length, start + length)
                if near:
                    data, first = part, start
                yield part[:length]  # otherwise a replaced item, at the end of the file: the window stays
            else:
                yield data[start - first : start - first + length]
            after = start + length

    def _read(self, start: int, size: int, needed: int) -> bytes:
        """`size` bytes from `start`, or up to the end of the file.

        Args:
            needed: end of the part that must be read.
        """
        if self._flushed < needed:
            self._file.flush()
            self._flushed = self._file.tell()
        return os.pread(self._file.fileno(), size, start)


class StoredRows(LazySequence[dict[str, Any]]):
    """Rows with values that JSON can represent, decoded each time they are read.

    Changing a row that was read does not change the sequence.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = (), folder: Path | None = None) -> None:
        """Args:
        folder: for the scratch file; None: the folder for temporary files.
        """
        self.folder = folder
        self._lines = Scratch(folder)
        self.extend(rows)

    def append(self, row: dict[str, Any]) -> None:
        self.append_encoded(encode(row))

    def append_encoded(self, line: bytes) -> None:
        """Append a row that `encode` has encoded."""
        self._lines.append(line)

    def extend(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self.append(row)

    def with_changes(self, changed: Iterable[tuple[int, bytes]]) -> StoredRows:
        """The same rows with some of them replaced, given as index and encoded row.

        Nothing may be appended to either later.
        """
        new = copy(self)
        new._lines = self._lines.with_changes(changed)
        return new

    def __len__(self) -> int:
        return len(self._lines)

    def _item(self, index: int) -> dict[str, Any]:
        return decode(next(self.encoded([index])))

    def _items(self, indices: range) -> Iterator[dict[str, Any]]:
        return map(decode, self.encoded(indices))

    def encoded(self, indices: Iterable[int]) -> Iterator[bytes]:
        """Rows by their indices as they are stored, without decoding."""
        return self._lines.chosen(indices)

    def blocks(self) -> Iterator[list[bytes]]:
        """All rows, encoded, in blocks of `BLOCK` rows."""
        return self.blocks_at(range(len(self)))

    def blocks_at(self, indices: Sequence[int] | np.ndarray) -> Iterator[list[bytes]]:
        """As `blocks`, of the rows at these indices."""
        for start in range(0, len(indices), BLOCK):
            yield [*self.encoded(indices[start : start + BLOCK])]


class StoredTexts(LazySequence[str]):
    """Texts in a scratch file."""

    def __init__(self, folder: Path | None = None) -> None:
        """Args:
        folder: for the scratch file; None: the folder for temporary files.
        """
        self._texts = Scratch(folder)

    def append(self, text: str) -> None:
        self._texts.append(text.encode("utf-8", "surrogatepass"))

    def __len__(self) -> int:
        return len(self._texts)

    def _item(self, index: int) -> str:
        return next(self.chosen([index]))

    def _items(self, indices: range) -> Iterator[str]:
        return self.chosen(indices)

    def chosen(self, indices: Iterable[int]) -> Iterator[str]:
        """Texts by their indices."""
        return (text.decode("utf-8", "surrogatepass") for text in self._texts.chosen(indices))


ENCODER = json.JSONEncoder(separators=(",", ":"))


def encode(row: dict[str, Any]) -> bytes:
    """JSON in ASCII, which can represent unpaired surrogates.

    It ends with a space if orjson cannot represent the row: the largest integers, which it would read as floats.
    """
    line = ENCODER.encode(row).encode()
    try:
        orjson.dumps(row)
    except orjson.JSONEncodeError:
        return line + b" "
    return line


def encode_finite(row: dict[str, Any]) -> bytes:
    """As `encode`, in a fifth of the time, of a row without infinite numbers. Text is not escaped."""
    try:
        return orjson.dumps(row)
    except orjson.JSONEncodeError:
        return encode(row)


def decode(line: bytes) -> dict[str, Any]:
    if not line.endswith(b" "):
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:  # infinity, or an unpaired surrogate
            pass
    return json.loads(line.decode())  # json.loads would detect the encoding of bytes


def encoded(table: pl.DataFrame) -> list[bytes]:
    """As `encode` of each row of a table of texts, integers and lists and objects of them.

    No value becomes a Python object. Text is not escaped.
    """
    import polars as pl

    return table.select(pl.struct(pl.all()).struct.json_encode()).to_series().cast(pl.Binary).to_list()


class Selected(LazySequence[dict[str, Any]]):
    """Some rows of a sequence, each changed when it is read."""

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        indices: Sequence[int] | np.ndarray,
        change: Callable[[int, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        """Args:
        indices: of the rows, in the order in which they are read.
        change: index and row -> the row to return; None: unchanged.
        """
        self._rows, self._indices, self._change = rows, indices, change

    def __len__(self) -> int:
        return len(self._indices)

    def _item(self, index: int) -> dict[str, Any]:
        at = self._indices[index]
        return self._change(at, self._rows[at]) if self._change else self._rows[at]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if isinstance(self._rows, StoredRows):
            rows = map(decode, self._rows.encoded(self._indices))
        else:
            rows = map(self._rows.__getitem__, self._indices)
        return map(self._change, self._indices, rows) if self._change else rows

    @property
    def stored(self) -> tuple[StoredRows, Sequence[int] | np.ndarray] | None:
        """The rows and indices, if they are stored and not changed."""
        return (self._rows, self._indices) if isinstance(self._rows, StoredRows) and not self._change else None

    def blocks(self) -> Iterator[list[bytes]]:
        """As `StoredRows.blocks`."""
        if self.stored:
            rows, indices = self.stored
            yield from rows.blocks_at(indices)
        else:
            for start in range(0, len(self), BLOCK):
                yield [encode(row) for row in self[start : start + BLOCK]]


class Texts(LazySequence[str]):
    """A text of each of some rows, computed when it is read."""

    def __init__(
        self, rows: Sequence[dict[str, Any]], indices: Sequence[int] | np.ndarray, text: Callable[[dict[str, Any]], str]
    ) -> None:
        self._rows, self._text = Selected(rows, indices), text

    def __len__(self) -> int:
        return len(self._rows)

    def _item(self, index: int) -> str:
        return self._text(self._rows[index])

    def __iter__(self) -> Iterator[str]:
        return map(self._text, self._rows)


class SelectedTexts(LazySequence[str]):
    """Some texts of a sequence, read when they are used."""

    def __init__(self, texts: Sequence[str], indices: Sequence[int] | np.ndarray) -> None:
        self._texts, self._indices = texts, indices

    def __len__(self) -> int:
        return len(self._indices)

    def _item(self, index: int) -> str:
        return self._texts[self._indices[index]]

    def __iter__(self) -> Iterator[str]:
        if isinstance(self._texts, StoredTexts):
            return self._texts.chosen(self._indices)
        return map(self._texts.__getitem__, self._indices)


class Chained(LazySequence[str]):
    """Several sequences of texts as one."""

    def __init__(self, *parts: Sequence[str]) -> None:
        self._parts = parts
        self._ends = [*accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _item(self, index: int) -> str:
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._parts)
