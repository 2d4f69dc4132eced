"""Takes what holds an erased record out of Dagster's home: rows of its SQLite files, and log files.

The event log is a view, which a sync fills again.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from dagster_project.core.errors import Busy
from dagster_project.lineage.erasure.scan import SQLITE, SURE, Scanner

LONGEST_WAIT = 30.0
"""Seconds to wait for another process that writes."""
ROWS = 1000
"""Rows that are searched at once."""
ENDINGS = ("-wal", "-shm", "-journal")
"""Of the files that SQLite keeps next to a database."""


def database_of(path: Path) -> Path | None:
    """The SQLite file that a file is, or is a part of; None if it is another file."""
    ending = next((one for one in ENDINGS if path.name.endswith(one)), "")
    base = path.with_name(path.name.removesuffix(ending))
    try:
        with base.open("rb") as file:
            return base if file.read(len(SQLITE)) == SQLITE else None
    except FileNotFoundError:
        return None


def clean(path: Path, scanner: Scanner, only_sure: bool) -> None:
    """Delete the rows that hold something of a record from a SQLite file, and rewrite it, so that no free page does.

    Args:
        only_sure: leave rows with no more than one short fragment of a text:
            projects that share a file can have them by chance.

    Raises:
        Busy: another process uses it.
    """
    try:
        with closing(sqlite3.connect(path, timeout=LONGEST_WAIT, isolation_level=None)) as db:
            db.execute("PRAGMA secure_delete = ON")
            db.execute("BEGIN IMMEDIATE")
            tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
            for (name,) in db.execute(tables).fetchall():
                _clean_table(db, name, scanner, only_sure)
            db.execute("COMMIT")
            db.execute("VACUUM")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.DatabaseError as error:  # locked, or damaged
        raise Busy(
            f"{path} cannot be cleaned: {error}",
            "stop Dagster (`pedigree ui`, its daemon and runs), then run the same command again",
        ) from None


def _clean_table(db: sqlite3.Connection, name: str, scanner: Scanner, only_sure: bool) -> None:
    quoted = name.replace('"', '""')
    try:
        table = db.execute(f'SELECT rowid, * FROM "{quoted}"')
    except sqlite3.OperationalError:  # WITHOUT ROWID: keys of counters
        return
    found: list[tuple[int]] = []
    while rows := table.fetchmany(ROWS):
        held = scanner.contents(("", b"\n".join(filter(None, map(_bytes, row[1:])))) for row in rows)
        found += [
            (row[0],) for row, kinds in zip(rows, held, strict=True) if SURE in kinds or (kinds and not only_sure)
        ]
    db.executemany(f'DELETE FROM "{quoted}" WHERE rowid = ?', found)


def _bytes(value: object) -> bytes:
    return (
        value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass") if isinstance(value, str) else b""
    )
