"""Facts about single rows, and about whole sets, that an earlier run computed.

A cache beside the outputs: without it, results are the same and take longer.

A fact is found by the hash of the row without its number in the source, so rows keep theirs when others are inserted,
edited or reordered. Facts of other parameters, other code or other libraries are in other folders.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from dagster_project.core import workers
from dagster_project.core.files import replacing
from dagster_project.core.stored_rows import Selected, StoredRows

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

S = TypeVar("S")
FOLDER = Path(".dvc") / "tmp" / "pedigree" / "rows"
LIMIT = 2 << 30
"""Bytes of all files of a stage. Above it the files that were not used for the longest time are removed."""
FILES = 8
"""Files of one kind of facts. One more, and all become one, without the rows that the latest run did not have."""
NUMBER = re.compile(rb'\{"source_row":\d+,')
"""Beginning of an encoded row whose number in its source is not part of its identity."""
KEYS = ("key_0", "key_1")
PACKAGE = Path(__file__).resolve().parents[1]
LIBRARIES = tuple(Path(path) for path in sys.path)
"""Folders of installed libraries. Later entries of `sys.path` do not count: setuptools appends its own copies of
libraries when it is imported."""

_folder: ContextVar[Path | None] = ContextVar("row_cache", default=None)
_known: WeakKeyDictionary[StoredRows | Selected, np.ndarray] = WeakKeyDictionary()
"""Hashes of rows that are in use: several kinds of facts are about the same rows, which can be appended to, and not
changed."""


@contextmanager
def using(root: Path, stage: str) -> Iterator[None]:
    """While open, `facts` are kept in a project's folder, if DVC manages it.

    Args:
        root: the project's folder.
    """
    token = _folder.set(root / FOLDER / stage if (root / ".dvc").is_dir() else None)
    try:
        yield
    finally:
        _folder.reset(token)


def facts(
    work: Callable[[S, Sequence[bytes]], pl.DataFrame],
    shared: S,
    rows: StoredRows | Selected,
    identity: Sequence[object] | None,
) -> pl.DataFrame:
    """One row of facts per row, in order: `work(shared, rows)`, where it is not known from an earlier run.

    Args:
        work: a function of a module that gets encoded rows without `source_row`, if that was their first field. Its
            result about a row depends on `shared` and that row only, and it always has the same columns.
        identity: what determines `shared`; None if that is unknown, so that nothing is kept.
    """
    import polars as pl

    if _folder.get() is None or identity is None or not len(rows):
        return pl.concat([work(shared, []), *_computed(work, shared, rows.blocks())])

    def compute(missing: np.ndarray) -> pl.DataFrame:
        blocks = rows.blocks() if len(missing) == len(rows) else Selected(rows, missing).blocks()
        return pl.concat(_computed(work, shared, blocks))

    return _looked_up(f"{work.__module__}.{work.__name__}", identity, _keys(rows), compute)


def fact_of_set(name: str, texts: Iterable[str], compute: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    """`compute()`, one row about a set of texts, unless an earlier run had exactly these texts, in this order.

    Args:
        name: of the fact.
    """
    import numpy as np
    import polars as pl

    if _folder.get() is None:
        return compute()
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    halves = np.frombuffer(digest.digest(), "<u8")
    keys = pl.DataFrame({key: halves[i : i + 1] for i, key in enumerate(KEYS)})
    return _looked_up(name, (), keys, lambda _: compute())


def _looked_up(
    name: str, identity: Sequence[object], keys: pl.DataFrame, compute: Callable[[np.ndarray], pl.DataFrame]
) -> pl.DataFrame:
    """One row of facts per key, in order.

    Args:
        compute: indices of keys that no earlier run had -> their facts.
    """
    import numpy as np
    import polars as pl

    code, folder = _code(), _folder.get()
    assert folder
    store, requested = _Store(folder / _digest(name, code, *identity)), keys.with_row_index("row")
    stored = store.read()
    if stored is None:
        cached = requested.select("row").clear()
    else:
        cached = requested.join(stored, on=KEYS, how="inner").drop(KEYS)
    is_missing = np.ones(len(keys), np.bool_)
    is_missing[cached["row"].to_numpy()] = False
    missing = np.flatnonzero(is_missing)
    if not len(missing):  # nothing is called that would load what it needs to compute facts
        return cached.sort("row").drop("row")
    new = compute(missing).insert_column(0, pl.Series("row", missing, dtype=requested["row"].dtype))
    all_facts = pl.concat([cached.select(new.columns), new]).sort("row") if len(cached) else new
    if code == _code(changed=True):  # else the facts may be of other code than the folder says
        store.write(requested, new, all_facts)
        _limit(folder)
    return all_facts.drop("row")


def unnumbered(line: bytes) -> bytes:
    """An encoded row without its number in the source, if that is its first field."""
    number = NUMBER.match(line)
    return b"{" + line[number.end() :] if number else line


def numbered(line: bytes, original: bytes) -> bytes:
    """An encoded row with the number that another one has, if that is its first field."""
    number = NUMBER.match(original)
    return number.group() + line[1:] if number else line


def _computed(
    work: Callable[[S, Sequence[bytes]], pl.DataFrame], shared: S, blocks: Iterable[Sequence[bytes]]
) -> Iterator[pl.DataFrame]:
    return workers.current().map(work, shared, ([*map(unnumbered, block)] for block in blocks))


def _keys(rows: StoredRows | Selected) -> pl.DataFrame:
    """Hash of each row, as two numbers of 64 bits. Equal hashes of different rows are not expected in any data set."""
    import numpy as np
    import polars as pl

    if isinstance(rows, Selected) and rows.stored:
        base, indices = rows.stored
        hashes = _hashes(base)[np.asarray(indices, np.int64)]
    else:
        hashes = _hashes(rows)
    return pl.DataFrame({name: hashes[:, i] for i, name in enumerate(KEYS)})


def _hashes(rows: StoredRows | Selected) -> np.ndarray:
    """(rows, 2) uint64."""
    import numpy as np

    if (known := _known.get(rows)) is None or len(known) != len(rows):
        hashes = bytearray()
        for block in rows.blocks():
            for line in block:
                hashes += hashlib.blake2b(unnumbered(line), digest_size=16).digest()
        known = _known[rows] = np.frombuffer(bytes(hashes), "<u8").reshape(-1, 2)
    return known


class _Store:
    """Files with facts of one kind. The name of each is the hash of the folder's name and of its content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[Path] = []

    def read(self) -> pl.DataFrame | None:
        """All facts, one row per key; None without any.

        Files that are damaged, or of another kind, are removed and count as missing.
        """
        import polars as pl

        frames: list[pl.DataFrame] = []
        for file in sorted(self.folder.glob("*.arrow")):
            with suppress(OSError):  # removed by someone meanwhile, or not readable
                content = file.read_bytes()
                if file.stem != _digest(self.folder.name, content):
                    file.unlink()
                    continue
                frames.append(pl.read_ipc(io.BytesIO(content)))
                os.utime(file)
                self._files.append(file)
        if len(frames) < 2:
            return frames[0] if frames else None
        return pl.concat(frames).unique(KEYS, keep="any")

    def write(self, requested: pl.DataFrame, new: pl.DataFrame, all_facts: pl.DataFrame) -> None:
        """Keep new facts in a file of their own; those of all rows of this run, if there are many files.

        Args:
            requested: row and key.
            new: row, and facts that were computed.
            all_facts: row, and facts of all rows.
        """
        merge = len(self._files) >= FILES
        kept = (all_facts if merge else new).join(requested, on="row", how="left").drop("row").unique(KEYS, keep="any")
        file = io.BytesIO()
        kept.sort(KEYS).write_ipc(file, compression="lz4")
        content = file.getvalue()
        path = self.folder / f"{_digest(self.folder.name, content)}.arrow"
        try:
            with replacing(path) as scratch:
                scratch.write_bytes(content)
        except OSError:  # a full or read-only disk makes the next run slower, nothing else
            return
        for old in self._files if merge else ():
            if old != path:
                with suppress(OSError):
                    old.unlink()


def _limit(folder: Path) -> None:
    """Remove the files that were not used for the longest time, until all have at most `LIMIT` bytes."""
    found = []
    for file in folder.glob("*/*.arrow"):
        with suppress(OSError):
            found.append((file.stat().st_mtime_ns, file.stat().st_size, file))
    size = sum(each for _, each, _ in found)
    for _, each, file in sorted(found):
        if size <= LIMIT:
            return
        with suppress(OSError):
            file.unlink()
            size -= each
            file.parent.rmdir()  # only if it is empty


def _digest(*parts: Any) -> str:
    """Hash of texts and bytes, each with its length, so that no two lists have the same."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _code(changed: bool = False) -> str:
    """Hash of the code that facts may depend on: these packages, Python, and the versions of all installed libraries.

    Args:
        changed: as the files are now; otherwise as they were when this module was imported, with the code that runs.
    """
    if not changed:
        return _CODE_AT_IMPORT
    own: list[str | bytes] = []
    try:
        for file in [*sorted((PACKAGE / "core").rglob("*")), *sorted((PACKAGE / "curation").rglob("*"))]:
            if "__pycache__" not in file.parts and file.is_file():
                own += [str(file.relative_to(PACKAGE)), file.read_bytes()]
    except OSError:  # someone removes a file, or it cannot be read: like no other code
        return os.urandom(32).hex()
    libraries = sorted({entry.name for path in LIBRARIES if path.is_dir() for entry in path.glob("*.dist-info")})
    return _digest(*own, sys.version, *libraries)


_CODE_AT_IMPORT = _code(changed=True)
