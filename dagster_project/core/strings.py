"""Columns of text in little memory: strings in one buffer, and different strings numbered by their hashes."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from dagster_project.core.lazy_sequence import LazySequence

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

AT_ONCE = 8192
"""Strings that are Python objects at the same time while all are read in order."""


class Strings(LazySequence[str]):
    """Strings in one buffer: their UTF-8 bytes, and eight bytes more for each."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._data, self._ends = bytearray(), array("q", [0])
        self.extend(values)

    def append(self, value: str) -> None:
        self._data += _bytes(value)
        self._ends.append(len(self._data))

    def extend(self, values: Iterable[str]) -> None:
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _item(self, index: int) -> str:
        return self._data[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), AT_ONCE):
            ends = self._ends[start : start + AT_ONCE + 1]
            data = bytes(self._data[ends[0] : ends[-1]])
            for a, b in pairwise(ends):
                yield data[a - ends[0] : b - ends[0]].decode("utf-8", "surrogatepass")

    def arrow(self) -> pa.LargeStringArray:
        """The same strings as an Arrow array, without a copy. Nothing can be appended while it is in use."""
        import pyarrow as pa

        return pa.LargeStringArray.from_buffers(len(self), pa.py_buffer(self._ends), pa.py_buffer(self._data))


class StringIndex:
    """Different strings, numbered in the order in which they first appear.

    Only hashes of 128 bits are kept, 32 bytes for each string: two strings with the same hash are not expected in any
    data set.
    """

    def __init__(self, strings: Iterable[str | None]) -> None:
        """Args:
        strings: None has no number.
        """
        import numpy as np

        data, places, count = bytearray(), array("q"), 0
        for string in strings:
            if string is not None:
                data += _hash(string)
                places.append(count)
            count += 1
        hashes, at = np.frombuffer(bytes(data), "S16"), np.array(places, np.int64)
        del data
        order = np.argsort(hashes, kind="stable")
        found = hashes[order]
        new = np.ones(len(found), np.bool_)
        new[1:] = found[1:] != found[:-1]
        first = order[new]  # the first string with each hash, because the sort is stable
        appearance = np.argsort(first, kind="stable")
        number = np.empty(len(first), np.int32)
        number[appearance] = np.arange(len(first), dtype=np.int32)
        self.numbers: np.ndarray = np.full(count, -1, np.int32)
        """Number of each string, (strings,) int32; -1 for None."""
        self.numbers[at[order]] = number[np.cumsum(new) - 1]
        self.first: np.ndarray = at[first[appearance]]
        """Index of the first string with each number, (different strings,) int64."""
        self._hashes, self._number = found[new], number

    def __len__(self) -> int:
        return len(self.first)

    def find(self, strings: Sequence[str]) -> np.ndarray:
        """Number of each string, (strings,) int32; -1 for strings that are not in the index."""
        import numpy as np

        if not len(self):
            return np.full(len(strings), -1, np.int32)
        wanted = np.frombuffer(b"".join(map(_hash, strings)), "S16")
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self) - 1)
        return np.where(self._hashes[at] == wanted, self._number[at], np.int32(-1))

    def __contains__(self, string: object) -> bool:
        return isinstance(string, str) and bool(self.find([string])[0] >= 0)


def digests(strings: Iterable[str]) -> np.ndarray:
    """sha256 of each string, (strings,) of 32 bytes, which numpy sorts as `bytes` are sorted."""
    import numpy as np

    data = bytearray()
    for string in strings:
        data += hashlib.sha256(_bytes(string)).digest()
    return np.frombuffer(data, "S32")


def _hash(string: str) -> bytes:
    return hashlib.blake2b(_bytes(string), digest_size=16).digest()


def _bytes(string: str) -> bytes:
    return string.encode("utf-8", "surrogatepass")
