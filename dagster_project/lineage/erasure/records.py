"""A request for erasure -> the rows of sources that it means, their relatives,
and the texts and ids by which they are found again."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.messages import argument_texts, calls
from dagster_project.core.published_ids import parse_key, published_id
from dagster_project.core.records import LEDGER, iter_table, prompt_text, with_source_rows
from dagster_project.core.text import visible
from dagster_project.curation.left_out import LEFT_OUT, is_remote
from dagster_project.curation.sources.erased import key_id, record_mark, text_marks
from dagster_project.curation.sources.files import READERS, Row, read_rows, suffix_of
from dagster_project.lineage import tables
from dagster_project.lineage.erasure.needles import SHORTEST, Needles, needles_of
from dagster_project.lineage.graph import closure
from dagster_project.lineage.history import is_within
from dagster_project.lineage.impact.question import RECORD_ID
from dagster_project.lineage.impact.sources import names_of
from dagster_project.lineage.index import Index
from dagster_project.lineage.published import key_files, record_of
from dagster_project.lineage.rows import AUGMENTED, COPY_OF, OVERLAPS, record_key
from dagster_project.lineage.runs import StageRun
from dagster_project.lineage.search import Pattern, search

EXAMPLES, PAIRS = "raw_examples", "raw_preferences"
NOTES = {"paraphrases": "data/sources/paraphrases", "review": "data/sources/review"}
"""Kind of relatives -> folder of their files."""
WRITTEN = ("paraphrase", "new_prompt", "new_response")
"""Columns of such files with texts that become part of records."""
COLUMNS = ("record", "containing", "source")
"""Columns of a file of requests, of which each row fills one."""


@dataclass(frozen=True)
class Request:
    """What to erase."""

    records: tuple[str, ...] = ()
    """By `example_id`, or by the id that a release gives it."""
    containing: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    """PATH or PATH:ROW."""

    @property
    def asked(self) -> list[tuple[str, str]]:
        kinds = (("record", self.records), ("containing", self.containing), ("source", self.sources))
        return [(kind, value) for kind, values in kinds for value in values]


def read_request(path: Path) -> Request:
    """A CSV file with the columns `record`, `containing` and `source`, or some of them.

    Raises:
        InputError: it has other columns, or a row that does not fill exactly one of them.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)  # a quote that nothing closes is an error
            names, rows = [*(reader.fieldnames or [])], [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read: {reason}", "give a CSV file in UTF-8") from None
    if not names or not {*names} <= {*COLUMNS}:
        raise InputError(
            f"{path}: its columns are {', '.join(map(visible, names)) or 'missing'}", f"use {', '.join(COLUMNS)}"
        )
    if len({*names}) < len(names):
        raise InputError(f"{path}: a column is named twice: {', '.join(names)}", "name each column once")
    found: dict[str, list[str]] = {name: [] for name in COLUMNS}
    for number, row in rows:
        if reader.restkey in row:  # the text before the comma alone would be another request
            raise InputError(
                f"{path}, line {number}: more values than columns", 'quote a text with a comma: "Doe, Jane"'
            )
        filled = {name: value for name, value in row.items() if isinstance(value, str) and value.strip()}
        if len(filled) != 1:
            raise InputError(f"{path}, line {number}: {len(filled)} columns are filled", "fill exactly one in each row")
        for name, value in filled.items():
            found[name].append(value)
    if not rows:
        raise InputError(f"{path}: no request in it", f"give one in each row, in a column {', '.join(COLUMNS)}")
    return Request(tuple(found["record"]), tuple(found["containing"]), tuple(found["source"]))


@dataclass(frozen=True)
class Raw:
    """A record or pair as a source gave it."""

    stage: str
    source: str
    rows: tuple[int, ...]
    """Of the source: a pair can have two."""
    record: Mapping[str, Any]
    current: bool
    """Whether the workspace's output has it, so that the rows are those of the file as it is."""

    @property
    def example_id(self) -> str:
        return str(self.record["example_id"])

    @property
    def texts(self) -> list[str]:
        return [*texts_of(self.record)]


def texts_of(record: Mapping[str, Any]) -> Iterator[str]:
    """All texts of a record or pair: of its messages and calls, and of the other fields of its source row; also names,
    and numbers with as many digits as a text that is searched for."""
    for message in _messages(record):
        yield from (
            text for name in ("content", "reasoning_content", "name") if isinstance(text := message.get(name), str)
        )
        for arguments in _arguments(message):
            yield from (
                [arguments] if isinstance(arguments, str) else _strings([text for _, text in argument_texts(arguments)])
            )
    meta = json.loads(found) if isinstance(found := record.get("meta"), str) else {}
    if isinstance(meta, dict) and not (record.get("messages") or (record.get("chosen") and record.get("rejected"))):
        meta.pop("problem", None)  # why the row has no messages, or no other side: words of this project
    yield from _strings(meta)


def _all_texts(record: Mapping[str, Any]) -> Iterator[str]:
    """Everything that a request may be about: `texts_of`, the category, and as JSON, with keys and numbers, arguments
    of calls, tools and other fields. Of a line that is not JSON also the text without JSON's escapes."""
    for text in texts_of(record):
        yield text
        if "\\" in text and not record.get("messages"):
            yield _unescaped(text)
    documents = [one for message in _messages(record) for one in _arguments(message)]
    for one in (record.get("category"), record.get("tools"), record.get("meta"), *documents):
        if one:
            yield one if isinstance(one, str) and not one.startswith(("{", "[")) else _as_json(one)


ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|[nrt])")


def _unescaped(text: str) -> str:
    r"""r"Zo\u00eb\nasks"  ->  "Zoë asks" """
    plain = ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else " ", text)
    return plain.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _as_json(value: Any) -> str:
    """JSON with characters as they are, whichever way it was written."""
    try:
        return json.dumps(json.loads(value) if isinstance(value, str) else value, ensure_ascii=False)
    except (ValueError, RecursionError):
        return str(value)


def _messages(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for part in map(record.get, ("messages", "prompt", "chosen", "rejected")):
        yield from [{"content": part}] if isinstance(part, str) else part or ()


def _arguments(message: Mapping[str, Any]) -> list[Any]:
    given = message.get("tool_calls")
    return [
        call.arguments for call in calls({"tool_calls": json.loads(given) if isinstance(given, str) else given or []})
    ]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and len(str(value)) >= SHORTEST:
        yield str(value)
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(one)


@dataclass
class Found:
    """What a request means."""

    asked: list[dict[str, Any]] = field(default_factory=list)
    """{"kind", "mark": keyed hash of the request, "records": number that it means}."""
    meant: list[Raw] = field(default_factory=list)
    """Records to erase: requested, or chosen relatives; of every version that is available."""
    relatives: dict[str, list[str]] = field(default_factory=dict)
    """Kind -> "source:row" of each relative, chosen or not."""
    notes: dict[str, set[int]] = field(default_factory=dict)
    """File of paraphrases or of review -> rows to take out."""
    made: list[str] = field(default_factory=list)
    """Ids of records that the pipeline made from them alone: they end with them."""
    written: list[str] = field(default_factory=list)
    """Ids of records with the text of a request that none of the rows has that
    they were made from: people wrote it into a paraphrase or an edit."""
    containing: tuple[str, ...] = ()
    """Texts of the request."""
    own_ids: list[str] = field(default_factory=list)
    """Ids of the records and of what was made from them, without those that a row that stays has too."""
    tombstones: list[dict[str, Any]] = field(default_factory=list)
    needles: Needles = field(default_factory=Needles)

    @property
    def rows(self) -> dict[str, set[int]]:
        """File -> rows to take out, of sources."""
        found: dict[str, set[int]] = {}
        for raw in self.meant:
            if raw.current:
                found.setdefault(raw.source, set()).update(raw.rows)
        return found

    @property
    def ids(self) -> list[str]:
        return list(dict.fromkeys(raw.example_id for raw in self.meant if raw.example_id))

    def without_tombstone(self, key: bytes) -> list[str]:
        """ "source:row" of each record on the Hub or in S3 that would not be
        left out, because no tombstone names it."""
        stones = {stone["record"] for stone in self.tombstones}
        remote = (raw for raw in self.meant if raw.current and is_remote(raw.source))
        return [
            f"{raw.source}:{raw.rows[0]}"
            for raw in remote
            if not raw.example_id or record_mark(key, raw.example_id) not in stones
        ]


class Finder:
    """Finds the records of a request in all available versions of the raw data sets."""

    def __init__(self, index: Index, key: bytes) -> None:
        self.index, self.root, self.key, self.key_id = index, index.root, key, key_id(key)
        self._known_marks: dict[int, list[str]] = {}

    @cached_property
    def raws(self) -> list[Raw]:
        """Current ones first; of earlier versions only those that no later one has, for memory."""
        runs = {run.md5: run for run in self.index.runs.values() if run.address in (EXAMPLES, PAIRS)}
        current = {run.md5 for run in self.index.runs.values() if run.in_workspace and run.address in (EXAMPLES, PAIRS)}
        ordered = sorted(runs.values(), key=lambda run: (run.md5 not in current, run.id))
        known: set[tuple[Any, ...]] = set()
        found = []
        for run in ordered:
            for raw in self._of(run, run.md5 in current):
                what = (raw.stage, raw.source, raw.example_id, raw.record.get("meta"))
                if raw.current or what not in known:
                    found.append(raw)
                    known.add(what)
        return found

    def _of(self, run: StageRun, current: bool) -> Iterator[Raw]:
        shards = [
            path
            for name in sorted(self.index.files(run.md5) or {})
            if name.endswith(".parquet")
            and name not in (LEDGER, LEFT_OUT)
            and (path := self.index.file_path(run.md5, name))
        ]
        ledger = self.index.file_path(run.md5, LEDGER)
        if not shards or ledger is None:
            return
        records = (row for shard in shards for row in iter_table(shard))
        for row in with_source_rows(records, iter_table(ledger)):
            yield Raw(run.address, row["source"], tuple(row["source_rows"]), row, current)

    def find(self, request: Request, chosen: Sequence[str]) -> Found:
        """Args:
        chosen: kinds of relatives to erase too.
        Raises:
            InputError: a part of the request means no record.
        """
        found = Found(containing=request.containing)
        meant: dict[int, Raw] = {}
        for kind, value in request.asked:
            matched = self._matched(kind, value)
            written = self._written(value, matched) if kind == "containing" else []
            found.written += written
            if not matched and not written:
                raise InputError(
                    f"--{kind} {visible(value) if kind != 'containing' else 'TEXT'}:"
                    " no record found in the available versions of raw_examples and raw_preferences",
                    "check the request with `pedigree impact`; if the source is new,"
                    " run `dvc repro raw_examples raw_preferences` first",
                )
            found.asked.append(
                {
                    "kind": kind,
                    "mark": record_mark(self.key, f"{kind} {value}"),
                    "records": len({raw.example_id for raw in matched}) + len(written),
                }
            )
            meant |= {id(raw): raw for raw in matched}
        found.meant = [*meant.values()]
        self._add_relatives(found, chosen)
        self._describe(found)
        return found

    def _matched(self, kind: str, value: str) -> list[Raw]:
        if kind == "record":
            ids = self._raw_ids(value)
            return [raw for raw in self.raws if raw.example_id in ids]
        if kind == "containing":
            return self._containing(value)
        path, _, row = value.rpartition(":")
        if not (path and row.isdecimal()):
            path, row = value, ""
        for name in filter(None, names_of(path, self.root.absolute())):
            # "./": as earlier versions recorded it
            named = [raw for raw in self.raws if is_within(raw.source.removeprefix("./"), name)]
            if found := [raw for raw in named if not row or (raw.current and int(row) in raw.rows)]:
                return found
        return []

    def _containing(self, text: str) -> list[Raw]:
        import polars as pl

        owners, texts = [], []
        for raw in self.raws:
            for one in _all_texts(raw.record):
                owners.append(raw)
                texts.append(one.encode("utf-8", "replace").decode())
        matching = Pattern(text, False).matches_of(pl.Series(texts, dtype=pl.String))
        return list({id(owners[i]): owners[i] for i in matching}.values())

    def _written(self, text: str, matched: Sequence[Raw]) -> list[str]:
        """Ids of the records of data sets with splits that contain a text,
        apart from those that were made from rows that contain it."""
        ids = dict.fromkeys(match["example_id"] for match in search(self.index, text))
        read = {raw.example_id for raw in matched}
        return [one for one in ids if one not in read.union(self._children(read))] if ids else []

    def _raw_ids(self, asked: str) -> set[str]:
        """Ids of the rows from which a record was made, or its own."""
        if not RECORD_ID.fullmatch(asked):
            raise InputError(
                f"--record {visible(asked)}: not the id of a record", "an example_id has 32 hexadecimal digits"
            )
        identity = asked.lower()
        own = {raw.example_id for raw in self.raws}
        if identity not in own and not self.index.knows_record(record_key(identity)):
            identity = record_of(self.index, identity) or identity
        return {*closure([identity], lambda one: self._parents.get(one, ()))}

    @cached_property
    def _parents(self) -> dict[str, list[str]]:
        """Id of a record -> ids of those that it was made from, by every ledger that is available."""
        found: dict[str, list[str]] = {}
        for run in {run.md5: run for run in self.index.runs.values() if not run.is_model}.values():
            if (path := self.index.file_path(run.md5, LEDGER)) is None:
                continue
            names = tables.column_names(path)
            for row in tables.read(
                path, ["example_id", "outcome", "why", *(["source_id"] if "source_id" in names else [])]
            ).iter_rows(named=True):
                if row.get("source_id"):
                    found.setdefault(row["example_id"], []).append(row["source_id"])
                if (row["outcome"] or "").startswith(AUGMENTED) and (row["why"] or "").startswith(COPY_OF):
                    found.setdefault(row["example_id"], []).append(row["why"].removeprefix(COPY_OF))
        return found

    def _add_relatives(self, found: Found, chosen: Sequence[str]) -> None:
        meant = {id(raw) for raw in found.meant}
        near = self._near({raw.example_id for raw in found.meant} | {*self._children(found.ids)})
        for kind in ("near", "copies", "pairs"):  # near-copies have copies too
            marks = {mark for raw in found.meant for mark in self._marks(raw)}
            prompts = {prompt for raw in found.meant for prompt in [_prompt(raw.record)] if prompt}
            relatives = [
                raw
                for raw in self.raws
                if id(raw) not in meant
                and (
                    raw.example_id in near if kind == "near"
                    else not marks.isdisjoint(self._marks(raw)) if kind == "copies"
                    else raw.stage == PAIRS and _prompt(raw.record) in prompts
                )
            ]  # fmt: skip
            found.relatives[kind] = [f"{raw.source}:{raw.rows[0]}" for raw in relatives if raw.current]
            if kind in chosen:
                found.meant += relatives
                meant |= {id(raw) for raw in relatives}
        rows = {(raw.source, row) for raw in found.meant if raw.current for row in raw.rows}
        same_row = [
            raw
            for raw in self.raws
            if raw.current and id(raw) not in meant and any((raw.source, row) in rows for row in raw.rows)
        ]
        found.relatives["same row"] = [f"{raw.source}:{raw.rows[0]}" for raw in same_row]
        found.meant += same_row
        for kind, folder in NOTES.items():
            notes = self._notes(found, folder)
            found.relatives[kind] = [f"{path}:{row}" for path, numbers in notes.items() for row in sorted(numbers)]
            found.notes |= notes if kind in chosen else {}

    def _marks(self, raw: Raw) -> list[str]:
        known = self._known_marks
        if id(raw) not in known:
            own = [record_mark(self.key, raw.example_id)] if raw.example_id else []
            known[id(raw)] = [*own, *text_marks(self.key, raw.record)]
        return known[id(raw)]

    def _children(self, ids: Iterable[str]) -> list[str]:
        keys = {record_key(one) for one in ids}
        derived = self.index.derivations(keys)
        return list(
            dict.fromkeys(child.hex() for children in derived.values() for child, _ in children if child not in keys)
        )

    def _kept_children(self, kept: set[str], erased: set[str]) -> set[str]:
        """Ids of the records that were made from rows that stay, on a way without an erased record."""
        derived, gone = self.index.derivations(map(record_key, kept)), {*map(record_key, erased)}

        def children(key: bytes) -> list[bytes]:
            return [child for child, _ in derived.get(key, ()) if child not in gone]

        return {
            child.hex() for child in closure((child for one in kept for child in children(record_key(one))), children)
        }

    def _near(self, ids: set[str]) -> set[str]:
        """Ids, as they were read, of the rows that the current tables of overlaps pair with these."""
        others: set[str] = set()
        for run in self.index.runs.values():
            path = self.index.file_path(run.md5, OVERLAPS) if run.in_workspace else None
            for row in tables.read(path, ["check", "example_id", "other"]).iter_rows(named=True) if path else ():
                pair = {row["example_id"], row["other"]}
                if row["check"] != "exact_duplicates" and pair & ids:
                    others |= {one for other in pair - ids if other for one in (other, *self._parents.get(other, ()))}
        return others

    def _notes(self, found: Found, folder: str) -> dict[str, set[int]]:
        """Rows of files in a folder that name one of the records, by its id, the
        beginning of it or its place, or have its prompt: all of its user turns, as files
        of paraphrases name it, or one of them; also as it was after repairs and edits."""
        made = self._children(found.ids)
        ids = {*found.ids, *made}
        places = {f"{raw.source}:{row}" for raw in found.meant if raw.current for row in raw.rows}
        turns = [
            _prompt_messages(record) for record in (*(raw.record for raw in found.meant), *self._records_made({*made}))
        ]
        prompts = {
            text.strip()
            for one in turns
            for text in (
                prompt_text([dict(turn) for turn in one]),
                *(turn["content"] for turn in one if turn["role"] == "user"),
            )
        }
        prompts.discard("")
        patterns = [Pattern(text, False) for text in found.containing]
        notes: dict[str, set[int]] = {}
        for path, rows in rows_of_notes(self.root, folder):
            numbers = {
                row.source_row
                for row in rows
                if row.value
                and (
                    is_name_of(row.value.get("example_id"), ids, places)
                    or str(row.value.get("prompt")).strip() in prompts
                )
            } | _writing(rows, patterns)
            if numbers:
                notes[path] = numbers
        return notes

    def _describe(self, found: Found) -> None:
        """Add tombstones, and what to search for."""
        meant = {id(raw) for raw in found.meant}
        stays = [raw for raw in self.raws if raw.current and id(raw) not in meant]
        kept_marks = {mark for raw in stays for mark in self._marks(raw)}
        kept_ids = {raw.example_id for raw in stays}
        made = self._children(found.ids)
        kept_made = self._kept_children(kept_ids, {*found.ids} - kept_ids) if made else set()
        stones: dict[str, dict[str, Any]] = {}
        for raw in found.meant:
            if raw.example_id and kept_marks.isdisjoint(own := self._marks(raw)):
                derived = (
                    [one for one in self._children([raw.example_id]) if one not in kept_ids | kept_made] if made else []
                )
                # a repaired record is that record, too
                marks = [*own[1:], *(record_mark(self.key, one) for one in derived)]
                stones.setdefault(own[0], {"record": own[0], "texts": marks})
        found.tombstones = [stones[name] for name in sorted(stones)]
        found.made = list(dict.fromkeys([one for one in made if one not in kept_ids | kept_made] + found.written))
        found.own_ids = ids = [one for one in (*found.ids, *found.made) if one not in kept_ids]
        keys = [key for key in map(parse_key, key_files(self.root)) if key]
        published = [published_id(key, one) for key in keys for one in ids]
        kept_labels = {raw.record.get("category") for raw in stays}
        labels = [label for raw in found.meant if (label := raw.record.get("category")) and label not in kept_labels]
        texts = [
            *found.containing,
            *(text for raw in found.meant for text in raw.texts),
            *labels,
            *self._texts_made({*found.made}),
        ]
        others = chain((text for raw in stays for text in raw.texts), self._texts_made(kept_made & {*made}))
        found.needles = needles_of(texts, [one for one in (*ids, *published) if RECORD_ID.fullmatch(one)], others)

    def _texts_made(self, ids: set[str]) -> Iterator[str]:
        """Texts of records that the pipeline made, from every shard that is available."""
        for record in self._records_made(ids):
            yield from texts_of(record)

    def _records_made(self, ids: set[str]) -> Iterator[dict[str, Any]]:
        """Records that the pipeline made, with their messages, from every shard that is available."""
        import polars as pl

        for path in self.index.shard_paths().values() if ids else ():
            names = tables.column_names(path)
            columns = [name for name in ("example_id", "messages", "prompt", "chosen", "rejected") if name in names]
            yield from tables.read(path, columns).filter(pl.col("example_id").is_in(sorted(ids))).iter_rows(named=True)


def rows_of_notes(root: Path, folder: str) -> Iterator[tuple[str, Sequence[Row]]]:
    """Path in the project and rows of each file of notes; a file that cannot be read as rows is left out."""
    for path in sorted((root / folder).rglob("*")):
        if not path.is_file() or suffix_of(path) not in READERS or path.suffix == ".txt" or not path.stat().st_size:
            continue
        try:
            rows = read_rows(path)
        except InputError:  # a file without rows has nothing to take out; the scan at the end reads every byte
            continue
        yield path.relative_to(root).as_posix(), rows


def _writing(rows: Sequence[Row], patterns: Sequence[Pattern]) -> set[int]:
    """Numbers of the rows of a file of notes that write one of some texts into a record."""
    import polars as pl

    written = [
        (row.source_row, text)
        for row in rows
        for name in WRITTEN
        if row.value and isinstance(text := row.value.get(name), str) and text
    ] if patterns else []  # fmt: skip
    texts = pl.Series([text.encode("utf-8", "replace").decode() for _, text in written], dtype=pl.String)
    return {written[i][0] for pattern in patterns for i in pattern.matches_of(texts)}


def is_name_of(name: object, ids: Collection[str], places: Collection[str]) -> bool:
    """Whether a name is that of one of some records, as reviewers and waivers write it: its id, the first 8 or more
    characters of it, or `source:row`."""
    if not isinstance(name, str):
        return False
    return (
        name in ids
        or name in places
        or (re.fullmatch(r"[0-9a-f]{8,31}", name) is not None and any(one.startswith(name) for one in ids))
    )


def _prompt_messages(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*(record["prompt"] if "prompt" in record else record.get("messages") or ())]


def _prompt(record: Mapping[str, Any]) -> str:
    """The user's turns, without differences of case and white space."""
    return " ".join(
        " ".join(message["content"] for message in _prompt_messages(record) if message["role"] == "user")
        .casefold()
        .split()
    )
