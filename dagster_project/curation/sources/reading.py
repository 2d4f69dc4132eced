"""Where rows come from: files and folders of the project, and splits on the Hub, as params.yaml names them. Every row is read and accounted for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file, sha256_of_text
from dagster_project.core.params import Licensed, Section, inside
from dagster_project.curation.sources import formats
from dagster_project.curation.sources.files import files_of
from dagster_project.curation.sources.hub import HubSplit, held_out_label, read_split, sha256_of_rows


class Source(Licensed):
    """A file, a folder or a data set on the Hugging Face Hub. Exactly one of `path` and `hub`."""

    FIELDS: ClassVar[Mapping[str, bool]] = formats.RECORD_FIELDS
    """What `mapping` may name."""

    path: str | None = None
    """File or folder inside data/sources/, relative to the project. DVC tracks changes in data/sources/ only."""
    hub: str | None = None
    """Instead of `path`: a data set on the Hugging Face Hub, `org/name`. Requires `revision` and `split`."""
    revision: str | None = None
    """With `hub`: the commit, 40 hex digits. Branches and tags are refused, because they move."""
    config: str | None = None
    """With `hub`: name of the configuration (subset), if the data set has several."""
    split: str | None = None
    """With `hub`: the split to read. With `path`: `train`, `validation` or `test` labels all rows, `from_file_names`
    labels each file by its name. See docs/sources.md."""
    format: str = "auto"
    """Name of the layout of the rows. `auto` detects it from the keys of the rows. See docs/sources.md for the
    layouts."""
    mapping: dict[str, str] = {}
    """Field -> column, for a layout without a name, e.g. `{prompt: q, response: a}`; optional fields are `system` and
    `category`. `response` and `category` may be the same column, whose values are then labels. Not together with
    `format`."""
    license: str = "unknown"
    """License of the text. Audits and model cards show it."""
    origin: str = ""
    """Where the text came from, in words."""

    @field_validator("mapping")
    @classmethod
    def _sound(cls, mapping: dict[str, str]) -> dict[str, str]:
        if mapping and (problem := formats.mapping_problem(mapping, cls.FIELDS)):
            raise ValueError(problem)
        return mapping

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise ValueError("name either a path or a hub data set")
        if self.hub is not None and (self.revision is None or self.split is None):
            raise ValueError("hub needs `revision` (the commit, 40 hex digits) and `split`")
        if self.hub is not None and self.on_hub.problem:
            raise ValueError(self.on_hub.problem)
        if self.path is not None and (self.revision or self.config):
            raise ValueError("revision and config belong to a hub data set, not to a path")
        if self.path is not None and self.split not in (None, "train", "validation", "test", formats.FROM_FILE_NAMES):
            raise ValueError(f"split {self.split!r} of a path must be train, validation, test or {formats.FROM_FILE_NAMES}")
        return self

    @property
    def on_hub(self) -> HubSplit:
        return HubSplit(self.hub or "", self.revision or "", self.split or "", self.config)

    @property
    def name(self) -> str:
        """What messages, the report and the ledger call it."""
        return self.on_hub.name if self.path is None else self.path


class PairSource(Source):
    """A source of preferences. Keys are those of a source of examples; `format` and `mapping` take other values."""

    FIELDS = formats.PAIR_FIELDS

    format: str = "auto"
    """Name of the layout of the rows. `auto` detects it from the keys of the rows. See docs/sources.md for the layouts
    of preferences."""
    mapping: dict[str, str] = {}
    """Field -> column, for a layout without a name, e.g. `{prompt: q, chosen: good, rejected: bad}`; optional field:
    `category`. Not together with `format`."""


class Reading(Section):
    """How sources are read. Whoever reads adds `sources`."""

    limit: int | None = Field(default=None, ge=1)
    """Rows to read from each source, for a quick try. null: all rows."""
    max_malformed: float = Field(default=0.5, ge=0, le=1)
    """Largest share of a source's rows that may be unreadable. Above it, or if no row is readable, the source is
    refused with its first three problems, because its format is probably wrong."""

    @field_validator("sources", check_fields=False)
    @classmethod
    def _named_once(cls, sources: list[Source]) -> list[Source]:
        for source in sources:
            if [s.name for s in sources].count(source.name) > 1:
                raise ValueError(f"{source.name} is named twice")
        return sources


def read_sources(
    root: Path, sources: Sequence[Source], reading: Reading, section: str, read: formats.Reader
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Every row of every source, in order, and for the report what each source is.

    Args:
        root: the project's folder, which source paths are relative to.
        section: of params.yaml, used in messages.
        read: `formats.records_of` or `formats.pairs_of`.
    Raises:
        InputError: a source is missing, misnamed, mostly unreadable, held out or read twice.
    """
    rows: list[dict[str, Any]] = []
    facts: dict[str, dict[str, Any]] = {}
    for source, path in zip(sources, locate_sources(root, sources, f"{section}.sources"), strict=True):
        layout, found, more = _from_hub(source, reading.limit, read) if path is None else _from_path(source, path, reading.limit, read)
        _readable(source, found, layout, reading.max_malformed, section)
        rows += found
        origin = {"origin": source.origin} if source.origin else {}
        rows_read = len(_places(found))
        made = {"pairs": len(found)} if read is formats.pairs_of else {"examples": len(found)} if len(found) != rows_read else {}
        facts[source.name] = {"format": layout, "rows": rows_read, **made, **more, "license": source.license, **origin}
    return rows, facts


def _places(found: Iterable[Mapping[str, Any]]) -> set[tuple[str, int]]:
    """The source rows. A row may give several pairs, and two rows one."""
    return {(one["source"], row) for one in found for row in one.get("source_rows", (one["source_row"],))}


Found = tuple[str, list[dict[str, Any]], dict[str, Any]]
"""Layout, rows, and what else the report tells."""


def _from_path(source: Source, path: Path, limit: int | None, read: formats.Reader) -> Found:
    layout, found = formats.of_files(path, source.name, source.format, source.mapping, source.split, read)
    found = found[:limit]
    if path.is_file():
        return layout, found, {"sha256": sha256_of_file(path)}
    count = Counter(name for name, _ in _places(found))
    files = {name: {"rows": count[f"{source.name.rstrip('/')}/{name}"], "sha256": sha256_of_file(file)} for name, file in files_of(path)}
    listed = "".join(f"{file['sha256']}  {name}\n" for name, file in files.items())
    return layout, found, {"sha256": sha256_of_text(listed), "files": files}


def _from_hub(source: Source, limit: int | None, read: formats.Reader) -> Found:
    rows = read_split(source.on_hub)[:limit]
    digest = sha256_of_rows(rows)
    layout, found = read(rows, source.name, source.name, source.format, source.mapping, held_out_label(source.on_hub))
    config = {"config": source.config} if source.config else {}
    return layout, found, {"sha256": digest, "hub": source.hub, "revision": source.revision, **config, "split": source.split}


def _readable(source: Source, found: Sequence[dict[str, Any]], layout: str, most: float, section: str) -> None:
    """Raises:
    InputError: more of the rows than that share cannot be read, or all of them.
    """
    unreadable = [one for one in found if not any(one.get(said) for said in ("messages", "prompt", "chosen", "rejected"))]
    if not unreadable or (len(unreadable) <= most * len(found) and len(unreadable) < len(found)):
        return
    told = [f"  {row['source']}:{row['source_row']}: {json.loads(row['meta'])['problem']}" for row in unreadable[:3]]
    raise InputError(
        "\n".join([f"{source.name}: {len(unreadable)} of {len(found)} rows cannot be read ({layout}); the first:", *told]),
        f"mend them, or name the right format; {section}.max_malformed ({most}) is the share that may be unreadable",
    )


def locate_sources(root: Path, sources: Sequence[Source], where: str) -> list[Path | None]:
    """Where each source lies, None on the Hub, once it is known that no row is read twice or held out.

    Args:
        where: of the list in params.yaml, used in messages, e.g. "raw_examples.sources".
    Raises:
        InputError: as `locate`; or two sources overlap, or one of them overlaps the benchmarks.
    """
    places = [None if source.path is None else _inside_sources(root, source.path, where, "data/sources") for source in sources]
    where = f"params.yaml: {where}"
    benchmarks = (root / "data/sources/benchmarks").resolve()
    for source, place in zip(sources, places, strict=True):
        if place and place.is_relative_to(benchmarks):
            raise InputError(f"{where}: {source.name} is held out, since it lies in data/sources/benchmarks/", "name other files")
        if place and benchmarks.is_relative_to(place):
            raise InputError(
                f"{where}: {source.name} is a folder that has the held-out benchmarks in it", "name folders beside benchmarks/"
            )
        for other, there in zip(sources, places, strict=True):
            if other is not source and place and there and there.is_relative_to(place):
                raise InputError(f"{where}: {other.name} lies in {source.name}, and would be read twice", "name one of them")
    return places


def locate(root: Path, path: str, where: str, folder: str) -> Path:
    """A file named in params.yaml, once it is known to lie where DVC watches it.

    Raises:
        InputError: outside the project, outside the watched folder, missing, or a folder.
    """
    full = _inside_sources(root, path, where, folder)
    if not full.is_file():
        raise InputError(f"params.yaml: {where}: {path} is a folder", "name one file")
    return full


def _inside_sources(root: Path, path: str, where: str, folder: str) -> Path:
    full = inside(root, path, where)
    if not full.is_relative_to((root / folder).resolve()):
        raise InputError(f"params.yaml: {where}: {path} is not inside {folder}/", f"move it to {folder}/, which DVC watches for changes")
    return full
