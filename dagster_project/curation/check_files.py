"""`pedigree check`: applies the checks of the pipeline to any files, without running the pipeline."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dagster_project.core.errors import InputError
from dagster_project.core.frames import read_ledger, read_pairs, read_records
from dagster_project.core.messages import calls
from dagster_project.core.params import parse
from dagster_project.core.records import example_id, ignored_in, prompt_text, response_text, subject_text
from dagster_project.curation.checks import findings, quotes, references
from dagster_project.curation.checks.checks import Judgement, Rules, judge
from dagster_project.curation.checks.privacy import mask
from dagster_project.curation.checks.token_counts import ESTIMATED, Tokens
from dagster_project.curation.similarity.overlap import shared_span, thirteen_gram_pairs
from dagster_project.curation.sources import fields, formats
from dagster_project.curation.sources.benchmarks import (
    BENCHMARKS,
    Item,
    benchmark_of,
    has_only_prompts,
    items_of,
    read_item,
)
from dagster_project.curation.sources.class_labels import FolderLabels
from dagster_project.curation.sources.files import (
    Row,
    files_of,
    found_in,
    others_of,
    read_blocks,
    read_rows,
    require_rows,
    rows_of,
)
from dagster_project.curation.sources.hub import held_out_label, parse_spec, read_split
from dagster_project.curation.sources.s3 import SCHEME, digest_of, problem_of
from dagster_project.curation.sources.s3 import Reader as S3Reader
from dagster_project.curation.write_checked import write_rows

Kind = Literal["examples", "preferences", "benchmark"]
ALIASES = {"hh": "transcripts", "openai": "messages", "chatml": "messages"}
PAIRS = "dpo"
"""Not a layout, but the kind of the rows: preference pairs in any layout."""
KNOWN = ("auto", *dict.fromkeys([*formats.LAYOUTS, *formats.PAIR_LAYOUTS, PAIRS, *BENCHMARKS, *ALIASES]))


@dataclass(frozen=True)
class LoadedRecords:
    """Records of one kind, ready for the checks."""

    kind: Kind
    layout: str
    records: list[dict[str, Any]]
    revision: str | None = None
    """Of objects in S3: the digest of their list, which params.yaml names."""


def check_paths(
    paths: Sequence[str],
    layout: str = "auto",
    against: Sequence[str] = (),
    rules: Rules | None = None,
    tokens: Tokens = ESTIMATED,
    since: Sequence[str] = (),
    previous: str = "",
    thirteen_grams: bool = False,
    mapping: Mapping[str, str] | None = None,
    out: Path | None = None,
    dropped: Path | None = None,
    show: Callable[[Judgement], list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Check files of examples, preference pairs or benchmark questions.

    Args:
        against: held-out files of examples or benchmark questions, which `paths` must not overlap.
        rules: policy, limits and waivers.
        since: the previous version of `paths`, to report changes; `previous` is its name.
        thirteen_grams: also report leakage by the common rule of any 13 shared words (in `thirteen_grams`).
        mapping: field -> column, for a custom layout; see `mapping` of a source in params.yaml.
        out, dropped: JSONL files for kept and dropped rows.
        show: returns the part `shown` of the document.
    Returns:
        `findings.document`; `rows` are 0-based source rows, numbered consecutively across files.
    Raises:
        InputError: a file is missing, empty or in an unknown format, or the files are of different kinds.
    """
    rules, name = rules or Rules(), ", ".join(paths)
    loaded = load(paths, layout, mapping)
    if loaded.kind == "benchmark" and (out or dropped or show):
        options = "--out and --dropped write" if out or dropped else "--show renders"
        raise InputError(f"{name}: holds benchmark questions", f"{options} examples and preference pairs")
    held_out = [item for path in against for item in _items(path)]
    counted = fields.taken(loaded.records)
    judged = judge(loaded.records, held_out, rules, tokens, kind=loaded.kind)
    document = {"fixed": {}, **findings.document(name, loaded.layout, judged, held_out)}
    if counted:
        document["fields"] = counted
    if thirteen_grams:
        document["thirteen_grams"] = _thirteen(loaded.records, held_out)
    if since:
        before = load(since, layout, mapping)
        if before.kind != loaded.kind:
            kinds = f"{previous} holds {before.kind}, {name} {loaded.kind}"
            raise InputError(kinds, "use an earlier version of the same data")
        was = judge(before.records, held_out, rules, tokens, kind=before.kind)
        old = findings.references(previous, before.layout, was, held_out, matches=0)
        document["changes"] = {
            **findings.changes(_rename_sources(before.records, since, paths), loaded.records, previous),
            "findings": findings.finding_changes(old["findings"], document["findings"]),
        }
    if show:
        document["shown"] = show(judged)
    write_rows(judged, out, dropped)
    return document


def _rename_sources(
    records: Sequence[dict[str, Any]], places: Sequence[str], names: Sequence[str]
) -> list[dict[str, Any]]:
    """The records with sources renamed from `places` to `names`, which are the same files elsewhere."""
    renamed = []
    for record in records:
        source = record["source"]
        for place, name in zip(places, names, strict=False):
            place = place.rstrip("/")
            if source == place or source.startswith(f"{place}/"):
                source = name.rstrip("/") + source[len(place) :]
                break
        renamed.append({**record, "source": source})
    return renamed


def load(paths: Sequence[str], layout: str = "auto", mapping: Mapping[str, str] | None = None) -> LoadedRecords:
    """Load files, folders, splits on the Hub and objects in S3.

    Args:
        mapping: field -> column, for a custom layout.
    Raises:
        InputError: a file is missing or unreadable, or the files are of different kinds.
    """
    layout = ALIASES.get(layout, layout)
    if layout not in KNOWN:
        raise InputError(f"unknown format {layout!r}", f"known formats: {', '.join(KNOWN)}")
    if mapping and layout != "auto":
        raise InputError(f"both a format ({layout}) and a mapping", "leave --format or --mapping out")
    parts = [part for path in paths for part in _load(path, layout, mapping)]
    kinds = {part.kind: part.records[0]["source"] for part in parts if part.records}
    if len(kinds) > 1:
        held = ", ".join(f"{path} holds {kind}" for kind, path in kinds.items())
        raise InputError(f"different kinds of data: {held}", "check them one by one")
    layouts = ", ".join(dict.fromkeys(part.layout for part in parts))
    records = [record for part in parts for record in part.records]
    return LoadedRecords(parts[0].kind, layouts, records, parts[0].revision)


def _load(path: str, layout: str, mapping: Mapping[str, str] | None = None) -> list[LoadedRecords]:
    if hub := parse_spec(path):
        return [_rows(read_split(hub), hub.name, layout, held_out_label(hub), mapping)]
    if path.startswith(SCHEME):
        parts = ((_rows(rows, name, layout, mapping=mapping), revision) for name, rows, revision in _objects(path))
        return [replace(part, revision=revision) for part, revision in parts]
    place = _existing_path(path)
    if layout == "auto" and not mapping and _is_canonical(place):
        return [_load_output(place)]
    if place.is_dir():
        others_of(place)
        named, labels = files_of(place), FolderLabels(place)
        rows = ((name, read_rows(file, partial(labels.of, name))) for name, file in named)
        return [_rows(each, f"{path.rstrip('/')}/{name}", layout, mapping=mapping) for name, each in rows]
    return [_rows(read_rows(place), path, layout, mapping=mapping)]


def _objects(url: str) -> Iterator[tuple[str, list[Row], str]]:
    """Name and rows of each object under a prefix in S3, with the digest of the list of all of them.

    Raises:
        InputError: no valid address, no such object, or one that cannot be read.
    """
    if problem := problem_of(url, None):
        raise InputError(problem, "check the address")
    with tempfile.TemporaryDirectory() as scratch:
        objects = S3Reader().list(url, Path(scratch))
        revision = digest_of(objects)
        for one in objects:
            rows = rows_of(read_blocks(one))
            require_rows(one.name, found_in(rows))
            yield one.name, rows, revision


def _existing_path(path: str) -> Path:
    """The existing path.

    Raises:
        InputError: it does not exist or is empty; an empty path would be the current folder.
    """
    try:
        if path and Path(path).exists():
            return Path(path)
    except OSError:  # the name is too long
        pass
    raise InputError(
        f"{path or 'an empty path'} does not exist",
        "use a file, a folder, hub:org/name@REVISION:split or s3://BUCKET/PREFIX",
    )


def _rows(
    rows: list[Row], source: str, layout: str, split: str | None = None, mapping: Mapping[str, str] | None = None
) -> LoadedRecords:
    name = source.rpartition("/")[2]
    if mapping:
        kind: Kind = "preferences" if PAIR_ONLY & mapping.keys() else "examples"
    else:
        kind, layout = _kind(rows, name, layout)
    if kind == "preferences":
        layout, pairs = formats.pairs_of(rows, name, source, layout, mapping, split)
        return LoadedRecords(kind, layout, [formats.as_record(pair) for pair in pairs])
    if kind == "benchmark":
        return LoadedRecords(kind, layout, [_question(layout, row, source) for row in rows])
    layout, records = formats.records_of(rows, name, source, layout, mapping, split)
    return LoadedRecords(kind, layout, records)


PAIR_ONLY = formats.PAIR_FIELDS.keys() - formats.RECORD_FIELDS.keys()
"""Fields of a mapping that exist only for pairs."""


def read_mapping(text: str) -> dict[str, str]:
    """ "prompt=q,response=a"  ->  {"prompt": "q", "response": "a"}

    Raises:
        InputError: a field is unknown, missing or duplicated.
    """
    parts = [part.partition("=") for part in text.split(",")]
    named = [field.strip() for field, _, _ in parts]
    mapping = {field.strip(): column.strip() for field, _, column in parts}
    fields = formats.PAIR_FIELDS if PAIR_ONLY & mapping.keys() else formats.RECORD_FIELDS
    if not all(sign and column.strip() for _, sign, column in parts):
        problem = "expected FIELD=COLUMN,..."
    elif len(mapping) < len(named):
        problem = f"field {next(field for field in named if named.count(field) > 1)!r} is duplicated"
    else:
        problem = formats.mapping_problem(mapping, fields)
    if problem:
        raise InputError(f"--mapping {text}: {problem}", "e.g. prompt=q,response=a or prompt=q,chosen=a,rejected=b")
    return mapping


def _kind(rows: Sequence[Row], name: str, layout: str) -> tuple[Kind, str]:
    """Kind and layout of the rows. If two kinds share the name of a format, the keys decide."""
    if layout == PAIRS:
        try:
            return "preferences", formats.detect(rows, name, formats.PAIR_LAYOUTS)
        except InputError as error:
            raise InputError(error.what, "leave --format out, or set the layout of the rows") from None
    if layout != "auto":
        tables: dict[Kind, Collection[str]] = {
            "examples": formats.LAYOUTS,
            "preferences": formats.PAIR_LAYOUTS,
            "benchmark": BENCHMARKS,
        }
        owners = [kind for kind, table in tables.items() if layout in table]
        return (formats.kind(rows) if len(owners) > 1 else owners[0]), layout
    benchmark = benchmark_of(rows)
    if benchmark and benchmark != "gsm8k":
        return "benchmark", benchmark
    kind = formats.kind(rows)
    return kind, formats.detect(rows, name, formats.PAIR_LAYOUTS if kind == "preferences" else formats.LAYOUTS)


def _is_canonical(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("records-00000.parquet", "ledger.parquet"))


def _load_output(folder: Path) -> LoadedRecords:
    """Load an output of `raw_examples`, `instructions` or `raw_preferences`, with the row numbers of its sources.

    Raises:
        InputError: it is incomplete or was not written by this project.
    """
    try:
        records = read_records(folder)
        if records and "chosen" in records[0]:
            pairs = [formats.as_record(pair) for pair in read_pairs(folder)]
            loaded = LoadedRecords("preferences", "canonical pairs", pairs)
        else:
            kept = [entry for entry in read_ledger(folder) if not entry["outcome"].startswith("dropped")]
            for record, entry in zip(records, kept, strict=True):
                record |= {"source_row": entry["source_row"], **ignored_in(entry)}
            loaded = LoadedRecords("examples", "canonical records", records)
        if invalid := [references.place(record) for record in loaded.records if not _is_valid(record)]:
            raise ValueError(f"{invalid[0]} is not a canonical record")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: not a complete data set of this project: {error}", "run its stage again, or use another folder"
        ) from None
    return loaded


def _is_valid(record: Mapping[str, Any]) -> bool:
    texts, messages = [record["example_id"], record["source"]], [*record["messages"], *record.get("rejected", ())]
    texts += [text for message in messages for text in (message["role"], message["content"])]
    texts += [call.name for message in messages for call in calls(message)]
    return all(isinstance(text, str) for text in texts) and isinstance(json.loads(record["meta"]), dict)


def _question(layout: str, row: Row, source: str) -> dict[str, Any]:
    """A benchmark question as a record whose assistant turn is the correct answer."""
    try:
        item = read_item(layout, row, source)
    except (ValueError, TypeError, KeyError) as error:
        problem = f"no key {error}" if isinstance(error, KeyError) else str(error)
        messages: list[dict[str, str]] = []
        meta: dict[str, Any] = {"problem": problem, "row": row.value}
        labelled, category = True, None
    else:
        choices = "".join(f"\n{choice}" for choice in item.choices)
        answer = item.text or item.rubric or "(no answer)"
        messages = [{"role": "user", "content": item.question + choices}, {"role": "assistant", "content": answer}]
        labelled, meta, category = item.labelled, {}, item.subject or None
    return {
        "example_id": example_id(messages or [{"role": "malformed", "content": json.dumps(row.value, sort_keys=True)}]),
        "source": source,
        "source_row": row.source_row,
        "messages": messages,
        "category": category,
        "group_id": None,
        "meta": json.dumps(meta),
        "labelled": labelled,
    }


def _items(path: str) -> list[Item]:
    """Questions and answers of held-out benchmark questions, prompts or examples: files, a folder, on the Hub or in S3.

    Raises:
        InputError: a row cannot be read, and so cannot be checked for leakage.
    """
    if hub := parse_spec(path):
        return _items_of(read_split(hub), hub.name)
    if path.startswith(SCHEME):
        return [item for name, rows, _ in _objects(path) for item in _items_of(rows, name)]
    place = _existing_path(path)
    if _is_canonical(place):
        return _held_out(_load_output(place))
    if place.is_dir():
        labels, base = FolderLabels(place), path.rstrip("/")
        rows = ((f"{base}/{name}", read_rows(file, partial(labels.of, name))) for name, file in files_of(place))
        return [item for name, each in rows for item in _items_of(each, name)]
    return _items_of(read_rows(place), path)


def _items_of(rows: list[Row], source: str) -> list[Item]:
    if benchmark_of(rows) or (has_only_prompts(rows) and not formats.is_known(rows)):
        return items_of(rows, source.rpartition("/")[2], source)
    return _held_out(_rows(rows, source, "auto"))


def _held_out(found: LoadedRecords) -> list[Item]:
    items = []
    for record in found.records:
        place, messages = references.place(record), record["messages"]
        if not messages:
            raise InputError(f"{place}: {quotes.excerpt(record)}", "fix the row, or remove it from the held-out data")
        items.append(Item(place, subject_text(messages), text=response_text(messages)))
    return items


def _thirteen(records: Sequence[dict[str, Any]], held_out: Sequence[Item]) -> dict[str, Any]:
    """Leakage by the common rule of any 13 shared words, for comparison."""
    texts = [prompt_text(record["messages"]) for record in records]
    questions = [item.question for item in held_out]
    pairs = list(thirteen_gram_pairs(texts, questions))
    matches = []
    for i, j in pairs[: findings.ROWS]:
        text = mask(texts[i][: 10 * quotes.WIDTH])
        (start, end), _ = shared_span(text, mask(questions[j][: 10 * quotes.WIDTH]))
        place, other = references.place(records[i]), held_out[j].place
        matches.append({"place": place, "other": other, "shared": text[start:end][:300]})
    return {"rows": len({i for i, _ in pairs}), "pairs": len(pairs), "matches": matches}


def read_policy(path: Path) -> Rules:
    """Read policy, limits and waivers from a YAML file with the keys of `instructions`, or from a params.yaml.

    Raises:
        InputError: the file is unreadable or has unknown keys or values.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        raise InputError(f"{path} is not a file", "use a YAML file with the keys of `instructions` in params.yaml")
    try:
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (
        YAMLError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ) as error:  # ValueError: dates such as 30 February
        raise InputError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}", "fix that line") from None
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read: {error.strerror}", "check the file's permissions") from None
    if isinstance(values, dict) and "instructions" in values:
        values = values["instructions"]
        if isinstance(values, dict):
            values = {key: value for key, value in values.items() if key not in STAGE_ONLY}
    if values is not None and not isinstance(values, dict):
        raise InputError(f"{path.name}: expected a mapping", f"keys: {', '.join(Rules.model_fields)}")
    return parse(Rules, values, "instructions", path.name)


STAGE_ONLY = frozenset({"benchmarks", "review", "expectations"})
"""Keys of `instructions` that refer to files of the project and do not apply to other data."""
