"""data/sources/* -> raw_examples. Every source file in one canonical form, one row per example, nothing dropped."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from dagster_project.curation import formats
from dagster_project.errors import InputError
from dagster_project.params import Section, inside
from dagster_project.records import Report, write_ledger, write_records


class Source(Section):
    path: str
    """File relative to the project, inside data/sources/ (which is what DVC watches)."""
    format: str = "auto"
    """A format's name, or "auto" to tell it from the keys of the rows."""
    mapping: dict[str, str] = {}
    """Field (prompt, response, system, category) -> column, for a layout of your own; then leave `format` out."""
    licence: str = "unknown"
    """Licence of the text, carried into every audit and model card."""
    origin: str = ""
    """Where the file came from, in words."""

    @field_validator("mapping")
    @classmethod
    def _sound(cls, mapping: dict[str, str]) -> dict[str, str]:
        if mapping and (problem := formats.mapping_problem(mapping)):
            raise ValueError(problem)
        return mapping


class Params(Section):
    sources: list[Source] = Field(min_length=1)
    """The files to learn from, in order."""
    limit: int | None = Field(default=None, ge=1)
    """Rows to take from each source, for a quick try. null takes all."""

    @field_validator("sources")
    @classmethod
    def _named_once(cls, sources: list[Source]) -> list[Source]:
        for source in sources:
            if [s.path for s in sources].count(source.path) > 1:
                raise ValueError(f"{source.path} is named twice")
        return sources


def run(root: Path, params: Params, out: Path) -> Report:
    """Args:
    root: the project's folder, which source paths are relative to.
    """
    paths = [locate(root, source.path) for source in params.sources]
    rows: list[dict[str, Any]] = []
    files: dict[str, Any] = {}
    for source, path in zip(params.sources, paths, strict=True):
        layout, found = formats.to_records(path, source.path, source.format, source.mapping)
        found = found[: params.limit]
        rows += found
        files[source.path] = {
            "format": layout,
            "rows": len(found),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "licence": source.licence,
            **({"origin": source.origin} if source.origin else {}),
        }
    write_records(out, [{key: value for key, value in row.items() if key != "source_row"} for row in rows])
    write_ledger(out, ({**row, "outcome": "read", "why": ""} for row in rows))
    return Report(rows_in=len(rows), rows_out=len(rows), metrics={"sources": files})


def locate(root: Path, path: str, where: str = "raw_examples.sources", folder: str = "data/sources") -> Path:
    """A source's file, once it is known to lie where DVC watches it.

    Raises:
        InputError: outside the project, outside the watched folder, missing, or a folder.
    """
    full = inside(root, path, where)
    if not full.is_relative_to((root / folder).resolve()):
        raise InputError(f"params.yaml: {where}: {path} is not inside {folder}/", f"move it to {folder}/, which DVC watches for changes")
    if not full.is_file():
        raise InputError(f"params.yaml: {where}: {path} is a folder", "name one file")
    return full
