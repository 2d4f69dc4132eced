"""Items of bytes, and texts, in a scratch file: any number of them in little memory."""

from __future__ import annotations

import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

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
