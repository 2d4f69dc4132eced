"""Files read as a source is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dagster_project.curation.sources.call_texts import Think
from dagster_project.curation.sources.files import files_of, read_blocks, size_of
from dagster_project.curation.sources.streaming import How, Records, SourceFile


def to_records(
    path: Path,
    source: str,
    layout: str = "auto",
    mapping: Mapping[str, str] | None = None,
    split: str | None = None,
    think: Think = "auto",
    pairs: bool = False,
) -> tuple[str, list[dict[str, Any]]]:
    """The layout of a file, or of those in a folder, and their records."""
    named = (
        [(f"{path.name}/{name}", f"{source.rstrip('/')}/{name}", file) for name, file in files_of(path)]
        if path.is_dir()
        else []
    )
    files = named or [(path.name, source, path)]
    records = Records(path.parent)
    blocks = [SourceFile(name, whose, read_blocks(file), size_of(file)) for name, whose, file in files]
    facts = records.read(blocks, How(path.name, pairs, layout, mapping or {}, split, think), None)
    return facts.layout, list(records.rows())


def to_pairs(path: Path, source: str, *args: Any, **options: Any) -> tuple[str, list[dict[str, Any]]]:
    """As `to_records`, for preference pairs."""
    return to_records(path, source, *args, pairs=True, **options)
