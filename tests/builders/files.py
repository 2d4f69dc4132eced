"""Source files of every type, written from rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def arrow_table(rows: Any) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(rows)


def write_csv(path: Path, rows: Any) -> None:
    import csv

    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Any) -> None:
    import pyarrow.parquet as pq

    pq.write_table(arrow_table(rows), path)


def write_stream(path: Path, rows: Any) -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, arrow_table(rows).schema) as writer:
        writer.write_table(arrow_table(rows), max_chunksize=1)


def write_feather(path: Path, rows: Any) -> None:
    import pyarrow.feather

    pyarrow.feather.write_feather(arrow_table(rows), str(path))


def as_lines(rows: Any) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


FILE_WRITERS: dict[str, Callable[[Path, Any], Any]] = {
    ".json": lambda path, rows: path.write_text(json.dumps(rows, indent=2)),
    ".json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    ".jsonl": lambda path, rows: path.write_bytes(as_lines(rows)),
    ".jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(as_lines(rows), mtime=0)),
    ".csv": write_csv,
    ".parquet": write_parquet,
    ".arrow": write_stream,
    ".feather": write_feather,
    ".txt": lambda path, rows: path.write_bytes("\n\n \n".join(row["text"] for row in rows).encode()),
}


def jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def names(folder: Path) -> set[str]:
    """Paths of all files in a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    """All files in a folder, by their paths relative to it."""
    return {name: (folder / name).read_bytes() for name in sorted(names(folder))}


def flip(path: Path, bit: int = -1) -> None:
    """Flip one bit in place, as a disk or an intruder would: the mode stays what it was."""
    mode, content = path.stat().st_mode, bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(mode)
