"""Rows in a scratch file: a sequence of any length in little memory."""

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
from typing import IO, TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import numpy as np

BLOCK = 8192
"""Rows that are read at once when all are read in order, and rows in one item for `Workers`."""


class StoredRows(Sequence[dict[str, Any]]):
    """Rows with values that JSON can represent, decoded each time they are read.

    Changing a row that was read does not change the sequence. The file has no name and is freed with the object.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = (), folder: Path | None = None) -> None:
        """Args:
        folder: for the scratch file; None: the folder for temporary files.
        """
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it lives as long as the object
        self._starts, self._lengths = array("Q"), array("L")
        self.extend(rows)

    def append(self, row: dict[str, Any]) -> None:
        self.append_encoded(encode(row))

    def append_encoded(self, line: bytes) -> None:
        """Append a row that `encode` has encoded."""
        self._starts.append(self._file.tell())
        self._lengths.append(len(line))
        self._file.write(line)

    def extend(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self.append(row)

    def with_changes(self, changed: Iterable[tuple[int, bytes]]) -> StoredRows:
        """The same rows with some of them replaced, given as index and encoded row. Shares the file; nothing may be appended to either later."""
        new = copy(self)
        new._starts, new._lengths = self._starts[:], self._lengths[:]
        for i, line in changed:
            new._starts[i], new._lengths[i] = self._file.tell(), len(line)
            self._file.write(line)
        return new

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [decode(line) for line in self.encoded(range(*index.indices(len(self))))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(index)
        return decode(self.encoded([at])[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for block in self.blocks():
            yield from map(decode, block)

    def blocks(self) -> Iterator[list[bytes]]:
        """All rows, encoded, in blocks of `BLOCK` rows."""
        return self.blocks_at(range(len(self)))

    def blocks_at(self, indices: Sequence[int] | np.ndarray) -> Iterator[list[bytes]]:
        """As `blocks`, of the rows at these indices."""
        for start in range(0, len(indices), BLOCK):
            yield self.encoded(indices[start : start + BLOCK])

    def encoded(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """Rows as they are stored, without decoding."""
        self._file.flush()
        lines: list[bytes] = []
        while len(lines) < len(indices):  # rows that are neighbors in the file are read at once
            first = end = self._starts[indices[len(lines)]]
            lengths = []
            for i in indices[len(lines) :]:
                if self._starts[i] != end:
                    break
                lengths.append(self._lengths[i])
                end += lengths[-1]
            data, at = os.pread(self._file.fileno(), end - first, first), 0
            for length in lengths:
                lines.append(data[at : at + length])
                at += length
        return lines


def encode(row: dict[str, Any]) -> bytes:
    """JSON in ASCII, which can represent unpaired surrogates."""
    return ENCODER.encode(row).encode()


ENCODER = json.JSONEncoder(separators=(",", ":"))


def decode(line: bytes) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(line.decode("ascii"))  # json.loads would detect the encoding of bytes
    return row


class Selected(Sequence[dict[str, Any]]):
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

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = self._indices[index]
        return self._change(at, self._rows[at]) if self._change else self._rows[at]

    def blocks(self) -> Iterator[list[bytes]]:
        """As `StoredRows.blocks`."""
        if isinstance(self._rows, StoredRows) and not self._change:
            yield from self._rows.blocks_at(self._indices)
        else:
            for start in range(0, len(self), BLOCK):
                yield [encode(row) for row in self[start : start + BLOCK]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if isinstance(self._rows, StoredRows):
            lines = chain.from_iterable(self._rows.blocks_at(self._indices))
            for at, line in zip(self._indices, lines, strict=True):
                yield self._change(at, decode(line)) if self._change else decode(line)
        else:
            yield from (self[i] for i in range(len(self)))


class Texts(Sequence[str]):
    """A text of each of some rows, computed when it is read."""

    def __init__(self, rows: Sequence[dict[str, Any]], indices: Sequence[int] | np.ndarray, text: Callable[[dict[str, Any]], str]) -> None:
        self._rows, self._text = Selected(rows, indices), text

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return [self._text(row) for row in self._rows[index]] if isinstance(index, slice) else self._text(self._rows[index])

    def __iter__(self) -> Iterator[str]:
        return map(self._text, self._rows)


class Chained(Sequence[str]):
    """Several sequences of texts as one."""

    def __init__(self, *parts: Sequence[str]) -> None:
        self._parts = parts
        self._ends = [*accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._parts)
