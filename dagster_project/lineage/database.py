"""The SQLite database of the index: its tables, opened or rebuilt."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from dagster_project.core.errors import DamagedIndex

log = logging.getLogger("pedigree")

T = TypeVar("T")
LONGEST_WAIT = 3600.0
"""Seconds to wait for another process that writes."""
SILENT_WAIT = 2000
"""Milliseconds of it before the wait is logged."""
INDEX_FILE = Path(".dvc", "tmp", "pedigree", "index.sqlite3")
TABLES = """
CREATE TABLE lock (id INTEGER PRIMARY KEY, blob TEXT UNIQUE, readable INTEGER);
CREATE TABLE run (id INTEGER PRIMARY KEY, key TEXT, address TEXT, path TEXT, md5 TEXT, is_model INTEGER, \
report TEXT, report_md5 TEXT, text TEXT, UNIQUE (key, path)); -- one row for each output of an entry; \
text: its section of dvc.lock, as JSON, with paths from the project in their shortest form
CREATE INDEX run_md5 ON run (md5);
CREATE TABLE lock_run (lock INTEGER, run INTEGER, PRIMARY KEY (lock, run)) WITHOUT ROWID;
CREATE TABLE cached_run (name TEXT, run INTEGER, PRIMARY KEY (name, run));
CREATE TABLE scanned (folder TEXT PRIMARY KEY, changed INTEGER) WITHOUT ROWID;
CREATE TABLE input (run INTEGER, dep TEXT, md5 TEXT, watched INTEGER);
CREATE TABLE origin (run INTEGER, source TEXT, sha256 TEXT, format TEXT, rows INTEGER);
CREATE INDEX origin_source ON origin (source);
CREATE TABLE listed (md5 TEXT PRIMARY KEY, is_split INTEGER, has_weights INTEGER) WITHOUT ROWID;
CREATE TABLE file (out TEXT, name TEXT, md5 TEXT, split TEXT);
CREATE INDEX file_out ON file (out);
CREATE INDEX file_md5 ON file (md5, split, out);
CREATE INDEX file_name ON file (name);
CREATE TABLE unread (md5 TEXT PRIMARY KEY, out TEXT, name TEXT) WITHOUT ROWID;
CREATE TABLE content (id INTEGER PRIMARY KEY, md5 TEXT UNIQUE);
CREATE TABLE source_rows (content INTEGER, source TEXT, rows INTEGER);
CREATE INDEX source_rows_content ON source_rows (content);
CREATE TABLE credit (file TEXT, source TEXT, source_row INTEGER, key BLOB);
CREATE INDEX credit_source ON credit (source);
CREATE INDEX credit_file ON credit (file);
CREATE TABLE derived (file TEXT, parent BLOB, child BLOB, how TEXT); -- also edited records
CREATE INDEX derived_parent ON derived (parent);
CREATE INDEX derived_file ON derived (file);
CREATE TABLE training (evidence TEXT, shard TEXT, source TEXT, records INTEGER, first INTEGER, last INTEGER);
CREATE INDEX training_shard ON training (shard, evidence);
CREATE TABLE training_source (evidence TEXT, data TEXT, source TEXT, records INTEGER, first INTEGER, last INTEGER);
CREATE TABLE matched (evidence TEXT, data TEXT, PRIMARY KEY (evidence, data)) WITHOUT ROWID;
CREATE TABLE record (segment INTEGER, first BLOB, keys BLOB, contents BLOB, steps BLOB, epochs BLOB, \
PRIMARY KEY (segment, first));
CREATE TABLE text_record (segment INTEGER, first BLOB, keys BLOB, ids BLOB, PRIMARY KEY (segment, first));
"""
SCHEMA_VERSION = zlib.crc32(TABLES.encode()) >> 1
"""Derived from the tables: an index with another schema is rebuilt."""


def cached_per_instance(method: Callable[..., T]) -> Callable[..., T]:
    """Cache the results of a method in its object.

    functools.cache would keep every object alive, here with its connection.
    """
    name = f"_results_of_{method.__name__}"

    @wraps(method)
    def call(self: Any, *arguments: Any) -> T:
        results: dict[Any, T] = self.__dict__.setdefault(name, {})
        if arguments not in results:
            results[arguments] = method(self, *arguments)
        return results[arguments]

    return call


def _watched(
    method: Callable[..., Any], connection: Callable[[Any], _Connection] = lambda own: own
) -> Callable[..., Any]:
    """A method of sqlite3 that sets the file aside when it finds it damaged."""

    @wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except sqlite3.DatabaseError as error:
            connection(self).set_aside(error)
            raise

    return call


class _Cursor(sqlite3.Cursor):
    __next__, fetchone, fetchmany, fetchall = (
        _watched(method, lambda cursor: cursor.connection)
        for method in (
            sqlite3.Cursor.__next__,
            sqlite3.Cursor.fetchone,
            sqlite3.Cursor.fetchmany,
            sqlite3.Cursor.fetchall,
        )
    )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        while rows := self.fetchmany(500):
            yield from rows


class _Connection(sqlite3.Connection):
    path: Path | None = None
    execute, executemany = _watched(sqlite3.Connection.execute), _watched(sqlite3.Connection.executemany)

    def cursor(self, factory: Any = _Cursor) -> Any:
        return super().cursor(factory)

    def set_aside(self, error: sqlite3.DatabaseError) -> None:
        """Raises:
        DamagedIndex: the error says that the file is damaged.
        """
        damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF in {
            sqlite3.SQLITE_CORRUPT,
            sqlite3.SQLITE_NOTADB,
            sqlite3.SQLITE_FORMAT,
        }
        if not damaged or self.path is None:
            return
        kept = _set_aside(self.path)
        raise DamagedIndex(
            f"the index of audits was damaged ({error}); it is set aside as {kept.name}", "run the command again"
        ) from None


def _set_aside(path: Path) -> Path:
    kept = path.with_name(f"{path.name}.damaged")
    with suppress(FileNotFoundError):
        path.replace(kept)
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
    return kept


class Database:
    """A connection to the database of a project."""

    def __init__(self, root: Path) -> None:
        self._db = _connect(root)

    def _begin(self) -> None:
        """Begin to write, after any other process that writes."""
        end, waits = time.monotonic() + LONGEST_WAIT, False
        while True:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
            if not waits:
                log.info("waiting: another process is reading the history into the index of audits")
                waits = True

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Exclusive write transaction, rolled back on any exception."""
        self._begin()
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _rows(self, query: str, values: Sequence[Any]) -> Iterator[Any]:
        """Run a query that ends in IN for any number of values, in batches."""
        for start in range(0, len(values), 900):
            batch = values[start : start + 900]
            yield from self._db.execute(f"{query} ({','.join('?' * len(batch))})", batch)


def _connect(root: Path) -> sqlite3.Connection:
    """Open the database: rebuilt if its schema differs, set aside if it is
    damaged, in memory if the project is read-only."""
    path = root / INDEX_FILE
    for _ in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(path, timeout=LONGEST_WAIT, isolation_level=None, factory=_Connection)
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if not os.access(path, os.W_OK):  # beside a file `-shm`, it could be opened, and fail later
                break
            if version == SCHEMA_VERSION:
                return _ready(db, path)
            if version == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                db.executescript(
                    f"PRAGMA journal_mode = WAL; BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {SCHEMA_VERSION};"
                    " COMMIT;"
                )
                return _ready(db, path)
            db.close()
            path.unlink()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                break
            log.warning(
                f"the index of audits was damaged ({error});"
                f" it is set aside as {_set_aside(path).name} and created again"
            )
        except OSError:
            break
    memory = sqlite3.connect(":memory:", isolation_level=None)
    memory.executescript(TABLES)
    return memory


def _ready(db: _Connection, path: Path) -> _Connection:
    db.path = path
    db.execute(f"PRAGMA busy_timeout = {SILENT_WAIT}")
    return db
