"""Rows in a scratch file: a sequence of any length in little memory."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

BLOCK = 4096
"""Rows that are decoded at once when all are read in order, and rows in one item for `Workers`."""


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
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it lives as long as the object
        self._ends = array("Q", [0])
        self.extend(rows)

    def append(self, row: dict[str, Any]) -> None:
        self.append_encoded(encode(row))

    def append_encoded(self, line: bytes) -> None:
        """Append a row that `encode` has encoded."""
        self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))

    def extend(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self.append(row)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return [decode(line) for line in self.encoded(start, stop)] if step == 1 else [self[i] for i in range(start, stop, step)]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(index)
        return decode(self.encoded(at, at + 1)[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]

    def encoded(self, start: int, stop: int) -> list[bytes]:
        """Rows start to stop as they are stored, without decoding."""
        if start >= stop:
            return []
        self._file.flush()
        first = self._ends[start]
        data = os.pread(self._file.fileno(), self._ends[stop] - first, first)
        return [data[self._ends[i] - first : self._ends[i + 1] - first] for i in range(start, stop)]


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
        self, rows: Sequence[dict[str, Any]], indices: Sequence[int], change: Callable[[int, dict[str, Any]], dict[str, Any]] | None = None
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
