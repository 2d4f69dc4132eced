"""Arrays in scratch files, written by blocks and read by partitions, or the other way round."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

GAP, SPAN = 2**16, 2**24
"""Bytes between two requested spans that are read rather than skipped, and bytes read at once for several spans."""
_READ = 2**30


class Column:
    """Numbers in a scratch file without a name, which is freed with the object."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the object
        self.size = 0

    def append(self, values: Array) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).data.cast("B") if values.size else b"")
        self.size += values.size

    def read(self, start: int, stop: int) -> Array:
        """The numbers start:stop."""
        self._file.flush()
        width = self._dtype.itemsize
        values = np.empty(stop - start, self._dtype)
        view, at = values.view(np.uint8).data, 0
        while at < len(view):  # a single call reads at most 2 GB
            at += os.preadv(self._file.fileno(), [view[at : at + _READ]], start * width + at)
        return values

    def spans(self, low: Array, high: Array) -> Array:
        """The spans low[k]:high[k], which ascend, one after the other."""
        from dagster_project.curation.similarity._rounds_numba import take

        if not len(low):
            return np.empty(0, self._dtype)
        width = self._dtype.itemsize
        breaks = (low[1:] - high[:-1] > GAP // width) | (low[1:] * width // SPAN != low[:-1] * width // SPAN)
        taken = []
        for first, last in _runs(breaks):
            start, run = int(low[first]), slice(first, last + 1)
            taken.append(take(self.read(start, int(high[last])), low[run] - start, high[run] - start))
        return np.concatenate(taken)


def _runs(breaks: Array) -> list[tuple[int, int]]:
    """First and last index of each run; breaks[k] is whether one ends between k and k + 1."""
    ends = np.flatnonzero(breaks)
    return list(zip([0, *(ends + 1).tolist()], [*ends.tolist(), len(breaks)], strict=True))


class Shuffle:
    """Rows of `width` numbers that blocks give to partitions; or one number for each of them, given back."""

    def __init__(self, parts: int, width: int, dtype: Any = np.int32) -> None:
        self.parts, self._width = parts, width
        self._rows = Column(dtype)
        self._starts: list[Array] = []  # for each block the first row of each partition, and the end

    def add(self, rows: Array, counts: Array) -> None:
        """Add a block.

        Args:
            rows: by partition.
            counts: rows of each partition.
        """
        first = self.size
        self._rows.append(rows.reshape(-1))
        self._starts.append(first + np.concatenate(([0], np.cumsum(counts))))

    @property
    def size(self) -> int:
        """Number of rows."""
        return self._rows.size // self._width

    def part(self, part: int) -> Array:
        """Rows of a partition (n, width), in the order of the blocks."""
        width = self._width
        blocks = [self._rows.read(int(at[part]) * width, int(at[part + 1]) * width) for at in self._starts]
        return np.concatenate(blocks or [self._rows.read(0, 0)]).reshape(-1, width)

    def back(self, answers: Sequence[int]) -> list[list[tuple[int, int]]]:
        """For each block the (start, stop) of its answers in a column that has those of all partitions, in order.

        Args:
            answers: start of each partition in the column.
        """
        at = np.array(answers, np.int64)
        spans = []
        for starts in self._starts:
            counts = np.diff(starts)
            spans.append([(int(start), int(start + count)) for start, count in zip(at, counts, strict=True)])
            at = at + counts
        return spans
