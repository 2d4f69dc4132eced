"""Rows in a scratch file: a sequence of any length in little memory."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

BLOCK = 4096
"""Rows that are decoded at once when all are read in order, and rows in one item for `Workers`."""


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
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it lives as long as the object
        self._ends = array("Q", [0])
        self._written = 0
        """Items that have left the buffer."""

    def append(self, item: bytes) -> None:
        self._file.write(item)
        self._ends.append(self._ends[-1] + len(item))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def items(self, start: int, stop: int) -> list[bytes]:
        """Items start to stop."""
        if start >= stop:
            return []
        first, data = self._ends[start], self._read(start, stop)
        return [data[self._ends[i] - first : self._ends[i + 1] - first] for i in range(start, stop)]

    def chosen(self, indices: Iterable[int]) -> Iterator[bytes]:
        """Items by their indices, in any order. Those that follow each other closely are read at once."""
        data, first, after = b"", 0, 0  # a part of the file, and the end of the item before
        for i in indices:
            start, stop = self._ends[i], self._ends[i + 1]
            if not first <= start <= stop <= first + len(data):
                near = after <= start < after + WINDOW // 4
                data, first = self._read(i, self._until(i, start + WINDOW) if near else i + 1), start
            yield data[start - first : stop - first]
            after = stop

    def _until(self, item: int, end: int) -> int:
        return max(item + 1, bisect_right(self._ends, end, item) - 1)

    def _read(self, start: int, stop: int) -> bytes:
        if self._written < stop:
            self._file.flush()
            self._written = len(self)
        return os.pread(self._file.fileno(), self._ends[stop] - self._ends[start], self._ends[start])


class StoredRows(Sequence[dict[str, Any]]):
    """Rows with values that JSON can represent, decoded each time they are read.

    Changing a row that was read does not change the sequence. The file has no name and is freed with the object.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = (), folder: Path | None = None) -> None:
        """Args:
        folder: for the scratch file; None: the folder for temporary files.
        """
        self._lines = Scratch(folder)
        self.extend(rows)

    def append(self, row: dict[str, Any]) -> None:
        self._lines.append(encode(row))

    def append_encoded(self, line: bytes) -> None:
        """Append a row that `encode` has encoded."""
        self._lines.append(line)

    def extend(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self.append(row)

    def __len__(self) -> int:
        return len(self._lines)

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
        return self._lines.items(start, stop)

    def encoded_rows(self, indices: Iterable[int]) -> Iterator[bytes]:
        """Rows by their indices as they are stored, without decoding."""
        return self._lines.chosen(indices)


class StoredTexts(Sequence[str]):
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

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return list(self.chosen(range(*index.indices(len(self)))))
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(index)
        return next(self.chosen([at]))

    def __iter__(self) -> Iterator[str]:
        return self.chosen(range(len(self)))

    def chosen(self, indices: Iterable[int]) -> Iterator[str]:
        """Texts by their indices."""
        return (text.decode("utf-8", "surrogatepass") for text in self._texts.chosen(indices))


_ENCODER = json.JSONEncoder(separators=(",", ":"))


def encode(row: dict[str, Any]) -> bytes:
    """JSON in ASCII, which can represent unpaired surrogates."""
    return _ENCODER.encode(row).encode()


def decode(line: bytes) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(line.decode())
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

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = (
            map(decode, self._rows.encoded_rows(self._indices))
            if isinstance(self._rows, StoredRows)
            else map(self._rows.__getitem__, self._indices)
        )
        return map(self._change, self._indices, rows) if self._change else rows


class SelectedTexts(Sequence[str]):
    """Some texts of a sequence, read when they are used."""

    def __init__(self, texts: Sequence[str], indices: Sequence[int]) -> None:
        self._texts, self._indices = texts, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._texts[self._indices[index]]

    def __iter__(self) -> Iterator[str]:
        return self._texts.chosen(self._indices) if isinstance(self._texts, StoredTexts) else map(self._texts.__getitem__, self._indices)
