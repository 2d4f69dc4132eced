"""Gradients of many records, which stay in their files until they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dagster_project.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np

DIGEST = 16
"""Bytes of the hash of a row."""


class Rows(Protocol):
    """Gradients of records, (records, width) float16: an array, or rows on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> np.ndarray: ...


def digests(rows: np.ndarray) -> np.ndarray:
    """Hash of each row, (rows, DIGEST) uint8."""
    import numpy as np

    hashes = b"".join(hashlib.sha256(np.ascontiguousarray(row).tobytes()).digest()[:DIGEST] for row in rows)
    return np.frombuffer(hashes, np.uint8).reshape(len(rows), DIGEST)


@dataclass(frozen=True)
class RowsOnDisk:
    """Rows of safetensors files. Each row is compared with its hash when it is read."""

    files: Sequence[Path]
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
        for file, places in groupby(order, lambda i: wanted[i] // self.each):
            self._read(file, wanted, list(places), found)
        return found if np.ndim(numbers) else found[0]

    def _read(self, file: int, wanted: Sequence[int], places: Sequence[int], found: np.ndarray) -> None:
        """Fill some rows with those of one file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.files[file], framework="numpy") as opened:
                rows = opened.get_slice("gradients")
                for i in places:
                    within = wanted[i] % self.each
                    found[i] = rows[within : within + 1][0]
        except (OSError, SafetensorError, IndexError, ValueError):
            raise _damaged(self.files[file]) from None
        numbers = [wanted[i] for i in places]
        if (digests(found[list(places)]) != self.known[numbers]).any():
            raise _damaged(self.files[file])


def _damaged(file: Path) -> InputError:
    return InputError(f"the gradients of the model are incomplete or damaged: {file.name}", "add --index to compute them")
