"""Sources in params.yaml (files, folders, splits on the Hub) -> rows. Every row is read and accounted for."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file, sha256_of_text
from dagster_project.core.params import Section, inside
from dagster_project.curation.sources import formats, s3
from dagster_project.curation.sources.class_labels import FolderLabels
from dagster_project.curation.sources.declarations import Declared
from dagster_project.curation.sources.files import (
    SHOWN_FILES,
    Block,
    as_parsed,
    files_of,
    others_of,
    read_blocks,
    size_of,
)
from dagster_project.curation.sources.hub import HubSplit, RowsDigest, held_out_label, split_blocks
from dagster_project.curation.sources.s3 import Reader as S3Reader
from dagster_project.curation.sources.s3 import S3Object, require_revision
from dagster_project.curation.sources.streaming import Facts, How, Records, SourceFile


class Source(Declared):
    """A file, a folder, objects in S3 or a data set on the Hugging Face Hub. Exactly one of `path` and `hub`."""

    FIELDS: ClassVar[Mapping[str, bool]] = formats.RECORD_FIELDS
    """Fields that `mapping` may contain -> whether they are required."""
    LAYOUTS: ClassVar[Collection[str]] = formats.LAYOUTS
    """Names that `format` may have besides `auto`."""

    path: str | None = None
    """File or folder inside data/sources/, relative to the project; DVC tracks changes in data/sources/ only. Or an
    object, or all objects under a prefix, in S3: `s3://BUCKET/PREFIX`, which requires `revision`."""
    hub: str | None = None
    """Instead of `path`: a data set on the Hugging Face Hub, `org/name`. Requires `revision` and `split`."""
    revision: str | None = None
    """With `hub`: the commit, 40 hex digits. Branches and tags are refused, because they move. With an `s3://` path:
    the digest of the list of objects, 64 hex digits; a run without it prints it and stops."""
    config: str | None = None
    """With `hub`: name of the configuration (subset), if the data set has several."""
    split: str | None = None
    """With `hub`: the split to read. With `path`: `train`, `validation` or `test` labels all rows, `from_file_names`
    labels each file by its name. See docs/sources.md."""
    format: str = "auto"
    """Name of the layout of the rows. `auto` detects it from the keys of the rows. See docs/sources.md for the
    layouts."""
    mapping: dict[str, str] = {}
    """Field -> column, for a layout without a name, e.g. `{prompt: q, response: a}`; optional fields are `system`,
    `category`, `tools`, `tool_calls` (JSON; `response` is then optional) and `reasoning`. `response` and `category` may
    be the same column, whose values are then labels. Not together with `format`."""
    think: formats.Think = "auto"
    """Traces of reasoning at the beginning of answers. `auto` moves `<think>...</think>` and OpenThoughts'
    `<|begin_of_thought|>` spans to `reasoning_content`; `split` also moves what is before a `</think>` without an
    opening tag; `keep` leaves all of it in the text."""
    origin: str = ""
    """Where the text came from, in words."""

    @field_validator("path")
    @classmethod
    def _one_spelling(cls, path: str | None) -> str | None:
        """ "./data//sources/a.jsonl"  ->  "data/sources/a.jsonl": the name by which `impact` and `erase` find it."""
        if not path or path.startswith(s3.SCHEME):
            return path
        return posixpath.normpath(path) + ("/" if path.endswith("/") else "")

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        if name not in {"auto", *cls.LAYOUTS}:
            raise ValueError(f"unknown format {name!r}; known formats: auto, {', '.join(cls.LAYOUTS)}")
        return name

    @field_validator("mapping")
    @classmethod
    def _valid_mapping(cls, mapping: dict[str, str]) -> dict[str, str]:
        if mapping and (problem := formats.mapping_problem(mapping, cls.FIELDS)):
            raise ValueError(problem)
        return mapping

    @model_validator(mode="after")
    def _exactly_one_location(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise ValueError("set either path or hub")
        if self.mapping and self.format != "auto":
            raise ValueError(f"both a format ({self.format}) and a mapping: leave one of them out")
        if self.hub is not None and (self.revision is None or self.split is None):
            raise ValueError("hub requires `revision` (the commit, 40 hex digits) and `split`")
        if self.hub is not None and self.on_hub.problem:
            raise ValueError(self.on_hub.problem)
        if self.is_s3 and (problem := s3.problem_of(self.path or "", self.revision)):
            raise ValueError(problem)
        if self.is_s3 and self.config:
            raise ValueError("config belongs to a hub data set, not to objects in S3")
        if self.path is not None and not self.is_s3 and (self.revision or self.config):
            raise ValueError("revision and config belong to a hub data set, not to a path")
        splits = ("train", "validation", "test", formats.FROM_FILE_NAMES)
        if self.path is not None and self.split not in (None, *splits):
            raise ValueError(f"split {self.split!r} of a path must be {', '.join(splits[:-1])} or {splits[-1]}")
        return self

    @property
    def on_hub(self) -> HubSplit:
        return HubSplit(self.hub or "", self.revision or "", self.split or "", self.config)

    @property
    def is_s3(self) -> bool:
        return self.path is not None and self.path.startswith(s3.SCHEME)

    @property
    def name(self) -> str:
        """Name in messages, the report and the ledger."""
        return self.on_hub.name if self.path is None else self.path


class PairSource(Source):
    """A source of preferences. Keys are those of a source of examples; `format` and `mapping` take other values."""

    FIELDS = formats.PAIR_FIELDS
    LAYOUTS = formats.PAIR_LAYOUTS

    format: str = "auto"
    """Name of the layout of the rows. `auto` detects it from the keys of the rows. See docs/sources.md for the layouts
    of preferences."""
    mapping: dict[str, str] = {}
    """Field -> column, for a layout without a name, e.g. `{prompt: q, chosen: good, rejected: bad}`; optional fields:
    `category` and `tools`. Not together with `format`."""


class Reading(Section):
    """How sources are read. Whoever reads adds `sources`."""

    limit: int | None = Field(default=None, ge=1)
    """Examples or pairs to read from each source, for a quick try; of a data set on the Hub, rows. One row may give
    several examples or pairs, and two rows one pair. null: all."""
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
    root: Path, sources: Sequence[Source], reading: Reading, section: str, pairs: bool, scratch: Path
) -> tuple[Records, dict[str, dict[str, Any]]]:
    """Read every row of every source, in order.

    Args:
        root: the project's folder; source paths are relative to it.
        section: section of params.yaml, for messages.
        pairs: read preference pairs, not examples.
        scratch: folder for scratch files.
    Returns:
        The records or pairs, and facts about each source for the report.
    Raises:
        InputError: a source is missing, misnamed, mostly unreadable, held out or read twice, or objects in S3 are not
            those that are pinned.
    """
    places = locate_sources(root, sources, f"{section}.sources")
    pinned = _pinned_objects(root, sources, section, scratch)
    records = Records(scratch)
    facts: dict[str, dict[str, Any]] = {}
    for source, path in zip(sources, places, strict=True):
        name = source.name if path is None else path.name
        how = How(name, pairs, source.format, source.mapping, source.split, source.think)
        if path:
            found, details = _from_path(records, source, how, reading.limit, path)
        elif objects := pinned.get(source.name):
            found, details = _from_s3(records, source, how, reading.limit, objects)
        else:
            found, details = _from_hub(records, source, how, reading.limit)
        _refuse_unreadable(source, found, reading.max_malformed, section)
        origin = {"origin": source.origin} if source.origin else {}
        rows, counts = found.rows.total(), {"pairs" if pairs else "examples": found.records}
        if not pairs and found.records == rows:
            counts = {}
        facts[source.name] = {
            "format": found.layout,
            "rows": rows,
            **counts,
            **details,
            "license": source.license,
            **source.given,
            **origin,
            "fields": found.fields.shown(),
        }
    return records, facts


def _from_path(
    records: Records, source: Source, how: How, limit: int | None, path: Path
) -> tuple[Facts, dict[str, Any]]:
    """Add the records of a file or folder. Returns facts about its rows, and further facts for the report."""
    if path.is_file():
        facts = records.read([SourceFile(path.name, source.name, read_blocks(path), size_of(path))], how, limit)
        return facts, {"sha256": sha256_of_file(path)}
    files, folder = files_of(path), source.name.rstrip("/")
    labels = FolderLabels(path)
    parts = [
        SourceFile(
            f"{path.name}/{name}", f"{folder}/{name}", read_blocks(file, partial(labels.of, name)), size_of(file)
        )
        for name, file in files
    ]
    facts = records.read(parts, how, limit)
    details = listed(
        {name: {"rows": facts.rows[f"{folder}/{name}"], "sha256": sha256_of_file(file)} for name, file in files}
    )
    if others := others_of(path):
        details["not_read"] = {"files": len(others), "names": others[:SHOWN_FILES]}
    return facts, details


def listed(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a report says about several files, by name: they, and the sha256 of the list that `sha256sum` prints."""
    lines = "".join(f"{file['sha256']}  {name}\n" for name, file in files.items())
    return {"sha256": sha256_of_text(lines), "files": files}


def _pinned_objects(root: Path, sources: Sequence[Source], section: str, scratch: Path) -> dict[str, list[S3Object]]:
    """Name of each source in S3 -> its objects, before any of them is read."""
    urls = {source.name: source for source in sources if source.is_s3}
    reader = S3Reader() if urls else None
    found = {}
    for name, source in urls.items():
        assert reader
        found[name] = reader.list(name, scratch)
        require_revision(found[name], name, source.revision, root, section)
    return found


def _from_s3(
    records: Records, source: Source, how: How, limit: int | None, objects: Sequence[S3Object]
) -> tuple[Facts, dict[str, Any]]:
    """As `_from_path`, for objects in S3."""
    facts = records.read([SourceFile(one.name, one.name, read_blocks(one), one.size) for one in objects], how, limit)
    files = {}
    for one in objects:
        files[one.path] = {"rows": facts.rows[one.name], "sha256": one.sha256, "size": one.size, "etag": one.etag}
    details = listed(files)
    if [one.name for one in objects] == [source.name]:
        details["sha256"] = objects[0].sha256
    return facts, {**details, "revision": source.revision}


def _from_hub(records: Records, source: Source, how: How, limit: int | None) -> tuple[Facts, dict[str, Any]]:
    """As `_from_path`, for a split on the Hub."""
    digest = RowsDigest()
    blocks = _digested(split_blocks(source.on_hub), limit, digest)
    how = how._replace(split=held_out_label(source.on_hub))
    facts = records.read([SourceFile(source.name, source.name, blocks)], how, None)
    config = {"config": source.config} if source.config else {}
    details = {"hub": source.hub, "revision": source.revision, **config, "split": source.split}
    return facts, {"sha256": digest.hexdigest(), **details}


def _digested(blocks: Iterable[Block], limit: int | None, digest: RowsDigest) -> Iterator[Block]:
    """The first rows of a file, of which the hash is computed."""
    for block in blocks:
        rows = block.rows()[:limit]
        digest.update(rows)
        yield Block(as_parsed, rows)
        if limit is not None and (limit := limit - len(rows)) == 0:
            return


def _refuse_unreadable(source: Source, found: Facts, most: float, section: str) -> None:
    """Refuse a source with too many unreadable rows. Rows with images and the like are readable; a check drops them.

    Raises:
        InputError: the share of unreadable rows is above `most`, or all are unreadable.
    """
    empty = found.unreadable + found.unsupported
    if not empty or (found.unreadable <= most * found.records and empty < found.records):
        return
    count = found.unreadable or found.unsupported
    what = f"{source.name}: {count} of {found.records} rows cannot be read ({found.layout}); the first:"
    hint = f"fix them, or set the right format; {section}.max_malformed ({most}) is the share that may be unreadable"
    raise InputError("\n".join([what, *found.problems[not found.unreadable]]), hint)


def locate_sources(root: Path, sources: Sequence[Source], where: str) -> list[Path | None]:
    """Paths of the sources (None on the Hub and in S3), after checking that no row is read twice or held out.

    Args:
        where: path of the list in params.yaml, for messages, e.g. "raw_examples.sources".
    Raises:
        InputError: as `locate`; or two sources overlap, or one of them overlaps the benchmarks.
    """
    places = [
        None if source.path is None or source.is_s3 else _inside_sources(root, source.path, where, "data/sources")
        for source in sources
    ]
    where = f"params.yaml: {where}"
    benchmarks = (root / "data/sources/benchmarks").resolve()
    for source, place in zip(sources, places, strict=True):
        if place and place.is_relative_to(benchmarks):
            what = f"{where}: {source.name} is held out, because it is in data/sources/benchmarks/"
            raise InputError(what, "use other files")
        if place and benchmarks.is_relative_to(place):
            what = f"{where}: {source.name} is a folder that contains the held-out benchmarks"
            raise InputError(what, "use folders next to benchmarks/")
        for other, there in zip(sources, places, strict=True):
            is_inside = place and there and there.is_relative_to(place)
            is_under = source.is_s3 and other.is_s3 and PurePosixPath(other.name).is_relative_to(source.name)
            if other is not source and (is_inside or is_under):
                what = f"{where}: {other.name} is in {source.name} and would be read twice"
                raise InputError(what, "list one of them")
    return places


def locate(root: Path, path: str, where: str, folder: str) -> Path:
    """Path of a file in params.yaml, after checking that DVC tracks it.

    Raises:
        InputError: outside the project or the tracked folder, missing, or a folder.
    """
    full = _inside_sources(root, path, where, folder)
    if not full.is_file():
        raise InputError(f"params.yaml: {where}: {path} is a folder", "use a file")
    return full


def _inside_sources(root: Path, path: str, where: str, folder: str) -> Path:
    full = inside(root, path, where)
    if not full.is_relative_to((root / folder).resolve()):
        what = f"params.yaml: {where}: {path} is not inside {folder}/"
        raise InputError(what, f"move it to {folder}/, which DVC tracks")
    return full
