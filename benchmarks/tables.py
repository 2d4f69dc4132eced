"""Measured tables in the docs: written by the benchmark that measured them, between two markers."""

from __future__ import annotations

from pathlib import Path


def replace(path: Path, name: str, table: str) -> None:
    """Replace the table between `<!-- NAME: begin -->` and `<!-- NAME: end -->`; append it if there are no such
    markers."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, _, rest = (path.read_text() if path.is_file() else "").partition(begin)
    path.write_text(before + begin + table + end + rest.partition(end)[2])
