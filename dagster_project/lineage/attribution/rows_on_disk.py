"""Gradients of many records, which stay in their files until they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dagster_project.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np

DIGEST = 16
"""Bytes of the hash of a row."""
THREADS = 16
"""Files that are read at the same time. A disk gives far more of many small parts when it is asked for several."""


class Rows(Protocol):
    """Gradients of records, (records, width) float16: an array, or rows on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> np.ndarray: ...


def digests(rows: np.ndarray) -> np.ndarray:
    """Hash of each row, (rows, DIGEST) uint8."""
    import numpy as np

    hashes = b"".join(hashlib.sha256(np.ascontiguousarray(row).data).digest()[:DIGEST] for row in rows)
    return np.frombuffer(hashes, np.uint8).reshape(len(rows), DIGEST)


@dataclass(frozen=True)
class RowsOnDisk:
    """Rows of safetensors files. Each row is compared with its hash when it is read."""

    path: Callable[[int], Path]
    """File by number."""
    each: int
    """Rows of a file; the last one may have fewer."""
    shape: tuple[int, int]
    known: np.ndarray
    """Hash of each row, (rows, DIGEST) uint8."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Raises:
        InputError: a row is missing or damaged.
        """
        import numpy as np

        numbers = np.arange(len(self))[rows]
        wanted: list[int] = np.atleast_1d(numbers).tolist()
        found = np.empty((len(wanted), self.shape[1]), np.float16)
        order = sorted(range(len(wanted)), key=wanted.__getitem__)
        files = [(file, list(places)) for file, places in groupby(order, lambda i: wanted[i] // self.each)]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda one: self._read(one[0], one[1], wanted, found), files))
        return found if np.ndim(numbers) else found[0]

    def _read(self, file: int, places: Sequence[int], wanted: Sequence[int], found: np.ndarray) -> None:
        """Fill some rows with those of one file."""
        path, size = self.path(file), found.shape[1] * found.itemsize
        try:
            with path.open("rb") as opened:
                header = opened.read(int.from_bytes(opened.read(8), "little"))
                first = 8 + len(header) + json.loads(header)["gradients"]["data_offsets"][0]
                for i in places:
                    opened.seek(first + size * (wanted[i] % self.each))
                    opened.readinto(found[i].data.cast("B"))
        except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
            raise _damaged(path) from None
        if (digests(found[list(places)]) != self.known[[wanted[i] for i in places]]).any():
            raise _damaged(path)


def _damaged(file: Path) -> InputError:
    return InputError(
        f"the gradients of the model are incomplete or damaged: {file.name}", "add --index to compute them"
    )
