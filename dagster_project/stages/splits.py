"""instructions -> splits.

Related rows stay in one split, upstream split labels are kept, and the shards are verified to have no leakage.
"""

from __future__ import annotations

import io
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from dagster_project.core import row_cache, workers
from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.params import Section, inside
from dagster_project.core.records import (
    BATCH,
    LEDGER,
    CheckResult,
    Report,
    StoredPart,
    is_rich,
    ledger_schema,
    ledger_table,
    loaded,
    read_arrow,
    record_schema,
    uncollected,
    write_stored_records,
    write_tables,
)
from dagster_project.core.stored_rows import Selected, SelectedTexts, StoredRows, StoredTexts, encode, encoded
from dagster_project.core.strings import StringIndex, Strings
from dagster_project.core.text import many
from dagster_project.curation.sources.reading import locate
from dagster_project.curation.splitting.augment import FORMAT, AddedRows, Augment, Paraphrase, augment, read_paraphrases
from dagster_project.curation.splitting.split import (
    DROPPED,
    SPLITS,
    TRAIN,
    Assignment,
    Verification,
    assign_splits,
    find_copies,
    joined,
    renamed,
    subject_texts,
    verify_splits,
)

if TYPE_CHECKING:
    import pyarrow as pa

CHECK_DESCRIPTIONS = {
    "split_leakage": "No row, nor a near-copy of one, is in two splits.",
    "schema": "Every split has rows.",
    "augmented_rows": (
        "Validation and test contain only rows of the instruction set, none created by `augment`, and train contains"
        " some if it is set."
    ),
}
WHOLE = re.compile(r"-?[0-9]+\.0+")
"""A whole number as tables write it in a column of floats."""
PLACEHOLDER = re.compile(r"\[[A-Z][A-Z0-9_]*\]")
"""What `pii: fix` and `secrets: fix` write in place of a value."""
NOTABLE_DEVIATION = 0.01
"""Deviation of a split from its share, as a fraction of all rows, above which it is reported."""


class Params(Section):
    """How examples are divided into train, validation and test. See docs/splits.md."""

    test: float = Field(default=0.2, ge=0, lt=1)
    """Share of each category that is held out and never trained on."""
    validation: float = Field(default=0.1, ge=0, lt=1)
    """Share that training measures its loss on but does not learn from."""
    stratify_by: Literal["category", "source", "none"] = "category"
    """Every split gets the same share of each value of this field, as far as rows that must stay together allow. With
    `by: source` or `by: category` it has no effect."""
    by: Literal["group", "source", "category", "key"] = "group"
    """Rows that stay in one split. `group`: near-copies. `source`, `category`: also all rows of one source or category,
    to test on sources or kinds that were never trained on. `key`: also rows with the same value of the field `key`."""
    key: str | None = None
    """With `by: key`: a field of the source rows, e.g. customer_id. 17, 17.0 and "17" are the same value. A row without
    the field is grouped by near-copies only."""
    keep_labels: bool = True
    """Keep the split that a row has in an upstream data set (`split` in its `meta`)."""
    augment: Augment | None = None
    """Copies of train rows with a changed prompt. null: none."""

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if self.test + self.validation >= 1:
            raise ValueError(f"test {self.test} and validation {self.validation} leave nothing to train on")
        if self.by == "key" and self.key is None:
            raise ValueError("`by: key` requires `key`, the field to group by")
        if self.by != "key" and self.key is not None:
            raise ValueError("`key` requires `by: key`")
        return self


def validate(params: Params, ctx: ValidationContext) -> None:
    if params.augment and params.augment.paraphrases:
        locate(ctx.root, params.augment.paraphrases, "splits.augment.paraphrases", "data/sources/paraphrases")


def run(ctx: StageContext) -> Report:
    with row_cache.using(ctx.root, "splits"):
        params, instructions = ctx.params("splits", Params), ctx.output_of("instructions")
        return produce(ctx.root, params, ctx.compute.seed, instructions, out=ctx.out)


@dataclass
class Rows:
    """The rows of `instructions`, in scratch files, and of each what decides its split. Equal values are one object."""

    records: StoredRows
    texts: StoredTexts
    """The texts by which rows are compared."""
    ids: Strings = field(default_factory=Strings)
    groups: Strings = field(default_factory=Strings)
    sources: list[str] = field(default_factory=list)
    strata: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    """Key of rows that must stay together, by `params.by`; None without one."""
    labels: list[str | None] = field(default_factory=list)
    """Split that the row has in its source."""
    rich: bytearray = field(default_factory=bytearray)
    """Whether the row has fields of `rich_schema`."""

    def __len__(self) -> int:
        return len(self.groups)


@uncollected
def produce(root: Path, params: Params, seed: int, instructions: Path, out: Path) -> Report:
    """Assign rows to splits, augment train, write the shards and verify them.

    Args:
        root: the project's folder; the path of paraphrases is relative to it.
    """
    import pyarrow as pa

    paraphrases, sources = _paraphrases(root, params.augment)
    read = _read(params, instructions, scratch=out.parent)
    before = _kept_lines(instructions)
    _refuse_masked_keys(params, read.keys, before)
    copies = find_copies(read.texts)
    link = joined(copies.links(read.groups))
    shares = {"test": params.test, "validation": params.validation}
    dealt = assign_splits(renamed(read.groups, link), read.keys, read.labels, read.strata, shares, seed)

    rows = {name: array("q", (i for i, split in enumerate(dealt.splits) if split == name)) for name in SPLITS}
    counts = {name: len(rows[name]) for name in SPLITS}
    added = AddedRows()
    if params.augment:
        held_out = SelectedTexts(read.texts, [i for name in SPLITS[1:] for i in rows[name]])
        added = augment(params.augment, seed, Selected(read.records, rows[TRAIN]), held_out, copies.index, paraphrases)
    repaired = "repaired" in before.column_names
    write_tables(out / LEDGER, _ledger(read, before, dealt, rows[TRAIN], added), ledger_schema(repaired))
    known = StringIndex(read.ids)
    for _, _, record in added.rows:
        rows[TRAIN].append(len(read.records))
        _append(read, record)
    schema = record_schema().append(pa.field("split", pa.string()))
    parts: list[StoredPart] = []
    for name, of_split in rows.items():
        rich = any(read.rich[i] for i in of_split)
        parts.append(StoredPart(out / name, of_split, rich, {"split": [name] * len(of_split)}))
    write_stored_records(read.records, read.ids, schema, parts)

    verification = verify_splits(out, copies, known)
    if verification.rows != {**counts, TRAIN: counts[TRAIN] + len(added.rows)}:
        found = f"{counts} assigned, {len(added.rows)} added, {verification.rows} in the shards"
        raise AssertionError(f"rows lost: {found}")
    dropped = dealt.splits.count(DROPPED)
    augmented = Counter(kind for _, kind, _ in added.rows)
    metrics = {
        **counts,
        **({"augmented": dict(sorted(augmented.items()))} if params.augment else {}),
        **({"augmented_dropped": added.dropped} if added.dropped else {}),
        **({"sources": sources} if sources else {}),
    }
    checks = [
        _split_leakage(read, dealt, verification, regrouped=sum(group in link for group in read.groups)),
        _schema(params, counts, read.labels, dealt, strata=len(set(read.strata))),
        _augmented_rows(params, verification, added),
    ]
    return Report(
        rows_in=len(read),
        rows_out=sum(counts.values()),
        dropped={"split_leakage": dropped} if dropped else {},
        metrics=metrics,
        checks=checks,
    )


def _paraphrases(root: Path, settings: Augment | None) -> tuple[list[Paraphrase], dict[str, dict[str, Any]]]:
    """The paraphrases that `augment` names, and the facts about their file for the report.

    The facts are those that `raw_examples` has of its sources.
    """
    if settings is None or settings.paraphrases is None:
        return [], {}
    path = inside(root, settings.paraphrases, "splits.augment.paraphrases")
    paraphrases = read_paraphrases(path)
    of_file = {"format": FORMAT, "rows": len(paraphrases), "sha256": sha256_of_file(path)}
    return paraphrases, {settings.paraphrases: {**of_file, "license": settings.license, **settings.given}}


class Facts(NamedTuple):
    """The rows of a shard as a worker read them, by column."""

    lines: list[bytes]
    """As `stored_rows.encode` encodes them."""
    texts: list[str]
    ids: list[str]
    groups: list[str]
    sources: list[str]
    strata: list[str]
    keys: list[str | None]
    labels: list[str | None]
    rich: list[bool]


def _read(params: Params, instructions: Path, scratch: Path) -> Rows:
    """Read the instruction set with the stage's workers.

    Args:
        scratch: folder of the scratch files.
    Raises:
        InputError: no row has a key.
    """
    read = Rows(StoredRows(folder=scratch), StoredTexts(scratch))
    same: dict[str | None, Any] = {}

    def first(values: Sequence[str | None]) -> list[Any]:
        """The first object that is equal to each string."""
        return [same.setdefault(value, value) for value in values]

    shards = (shard.read_bytes() for shard in sorted(instructions.glob("records-*.parquet")))
    for facts in workers.current().map(_facts, params, shards):
        for line, text in zip(facts.lines, facts.texts, strict=True):
            read.records.append_encoded(line)
            read.texts.append(text)
        read.ids.extend(facts.ids)
        read.groups.extend(facts.groups)
        read.sources.extend(first(facts.sources))
        read.strata.extend(first(facts.strata))
        read.keys.extend(first(facts.keys))
        read.labels.extend(first(facts.labels))
        read.rich.extend(facts.rich)
    if len(read) and params.by != "group" and not any(key is not None for key in read.keys):
        _refuse_missing_key(params, read)
    return read


def _facts(params: Params, shard: bytes) -> Facts:
    """Work of a worker: the rows of a shard, given as the bytes of its file."""
    import polars as pl

    stratify_by = "none" if params.by in {"source", "category"} else params.stratify_by
    table = read_arrow(io.BytesIO(shard))
    if "tools" in table.column_names:
        rows = [*map(loaded, table.to_pylist())]
        lines, rich = [*map(encode, rows)], [*map(is_rich, rows)]
    else:
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        lines, rich = encoded(frame), [False] * len(table)
    names = ("example_id", "source", "category", "group_id", "meta")
    columns: dict[str, list[Any]] = {name: table[name].to_pylist() for name in names}
    strata = [""] * len(table) if stratify_by == "none" else list(map(str, columns[stratify_by]))
    return Facts(
        lines=lines,
        texts=subject_texts(table["messages"]),
        ids=columns["example_id"],
        groups=columns["group_id"],
        sources=columns["source"],
        strata=strata,
        keys=_keys(params, columns),
        labels=[_label(meta) if params.keep_labels and '"split"' in meta else None for meta in columns["meta"]],
        rich=rich,
    )


def _append(read: Rows, record: dict[str, Any]) -> None:
    """Add a row that is written and not assigned."""
    read.records.append(record)
    read.ids.append(record["example_id"])
    read.rich.append(is_rich(record))


def _keys(params: Params, columns: dict[str, list[Any]]) -> list[str | None]:
    if params.by == "group":
        return [None] * len(columns["meta"])
    if params.key is not None:
        return [_text(json.loads(meta).get(params.key)) for meta in columns["meta"]]
    return columns[params.by]


def _refuse_missing_key(params: Params, read: Rows) -> None:
    if params.key is None:
        hint = "use `by: group`, or add categories to the rows"
        raise InputError("params.yaml: splits.by: no row has a category", hint)
    fields = Counter(name for record in read.records[:10_000] for name in json.loads(record["meta"]))
    named = ", ".join(name for name, _ in fields.most_common(12))
    available = f"fields that rows have: {named}" if fields else "the rows have no such fields"
    raise InputError(
        f"params.yaml: splits.key: no row has a field {params.key!r}",
        f"{available}; use one that identifies rows that must stay together",
    )


def _refuse_masked_keys(params: Params, keys: Sequence[str | None], before: pa.Table) -> None:
    """Refuse keys that `instructions` masked: of one value, some rows have a placeholder, as have rows of other values.

    Args:
        before: lines of the ledger of `instructions`.
    """
    if params.by not in {"key", "category"} or "repaired" not in before.column_names:
        return
    masked = [
        found[0]
        for key, checks in zip(keys, before["repaired"].to_pylist(), strict=True)
        if key and {"pii", "secrets"} & {*(checks or ())} and (found := PLACEHOLDER.search(key))
    ]
    if masked:
        name = params.key or params.by
        raise InputError(
            f"params.yaml: splits.by: {name!r} is masked in {len(masked)} rows ({masked[0]}), because"
            " instructions.policy is `fix` for `pii` or `secrets`; so rows with the same value cannot stay together",
            "use a field that holds no personal data, such as a number or a keyed hash of the value",
        )


def _text(value: Any) -> str | None:
    """Normal form of a key: 17 equals "17", and 17.0, as tables write a column of whole numbers with gaps.

    None if the key is empty.
    """
    if value in (None, "", [], {}):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and WHOLE.fullmatch(value):
        value = value.partition(".")[0]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _label(meta: str) -> str | None:
    label = json.loads(meta).get("split")
    return label if label in SPLITS else None


def _kept_lines(instructions: Path) -> pa.Table:
    """The lines of the ledger of `instructions` whose rows are in its output, in the same order.

    It has `source_id` and `repaired` if any of them was repaired or edited.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    used = {"source_row", "outcome", "source_id", "repaired"}
    stored = pq.read_schema(instructions / LEDGER).names
    ledger = read_arrow(instructions / LEDGER, [name for name in stored if name in used])
    kept = ledger.filter(pc.invert(pc.starts_with(ledger["outcome"], "dropped")))
    if "source_id" in kept.column_names and kept["source_id"].null_count == len(kept):
        return kept.drop_columns(["repaired", "source_id"])
    return kept


def _ledger(
    read: Rows, before: pa.Table, dealt: Assignment, train: Sequence[int], added: AddedRows
) -> Iterator[pa.Table]:
    repaired = [name for name in ("source_id", "repaired") if name in before.column_names]
    if len(before) != len(read.groups):
        raise AssertionError(f"{len(read.groups)} rows, and {len(before)} lines in the ledger")
    parents = [train[i] for i, _, _ in added.rows]
    for start in range(0, len(before), BATCH):
        lines = before.slice(start, BATCH)
        rows = range(start, start + len(lines))
        columns = {
            "source": read.sources[start : start + BATCH],
            "source_row": lines["source_row"],
            "example_id": read.ids[start : start + len(lines)],
            "outcome": ["dropped:split_leakage" if dealt.splits[i] == DROPPED else dealt.splits[i] for i in rows],
            "why": [_why(read, dealt, i) for i in rows],
            **{name: lines[name] for name in repaired},
        }
        yield ledger_table(columns, bool(repaired))
    if added.rows:
        ledger = before.take(parents)
        columns = {
            "source": [read.sources[i] for i in parents],
            "source_row": ledger["source_row"],
            "example_id": [record["example_id"] for _, _, record in added.rows],
            "outcome": [f"augmented:{kind}" for _, kind, _ in added.rows],
            "why": [f"copy of {read.ids[i]}" for i in parents],
            **{name: ledger[name] for name in repaired},
        }
        yield ledger_table(columns, bool(repaired))


def _why(read: Rows, dealt: Assignment, i: int) -> str:
    if i in dealt.because:
        keeper = dealt.because[i]
        return f"belongs to {dealt.splits[keeper]}/{read.ids[keeper]}"
    return "label of the source" if i in dealt.labelled else ""


def _split_leakage(read: Rows, dealt: Assignment, verification: Verification, regrouped: int) -> CheckResult:
    because = sorted(dealt.because.items())
    places = [f"{leak.place} and {leak.other}: {leak.why}" for leak in verification.leaks]
    for i, keeper in because[:20]:
        kept = f"{dealt.splits[keeper]}/{read.ids[keeper]}"
        places.append(f"{read.labels[i]}/{read.ids[i]} belongs to {kept}: dropped")
    notes = []
    if verification.leaking:
        rows = many(verification.leaking, "row")
        notes.append(f"{rows} of the finished splits, or near-copies of them, are in two splits")
    if because:
        by_label = Counter(str(read.labels[i]) for i, _ in because)
        dropped = [f"{n} dropped from {name}" for name, n in sorted(by_label.items())]
        notes.append(f"the labels of the source leak: {', '.join(dropped)}")
    if regrouped:
        rows = many(regrouped, "row has near-copies", "rows have near-copies")
        notes.append(f"{rows} in a group of another group_id; they were kept together")
    return CheckResult(
        "split_leakage",
        passed=not verification.leaking,
        blocking=True,
        count=verification.leaking + len(because),
        rows=places[:20],
        note="; ".join(notes),
    )


def _schema(
    params: Params, counts: dict[str, int], labels: Sequence[str | None], dealt: Assignment, strata: int
) -> CheckResult:
    shares = {"train": 1.0, "validation": params.validation, "test": params.test}
    empty = [name for name in SPLITS if shares[name] and not counts[name]]
    total, labelled = sum(counts.values()), sum(label is not None for label in labels)
    notes = [f"no rows in: {', '.join(empty)}"] if empty else []
    untested = not empty and not counts["test"]
    if untested:
        notes.append(
            "no row is held out (`test: 0`): models can be trained, but `evaluation`, and so `comparison` and"
            " `release`, need a test split"
        )
    if labelled:
        left, have = len(labels) - labelled, "has a split in its" if labelled == 1 else "have a split in their"
        rest = f"; the other {many(left, 'was', 'were')} assigned by share" if left else ""
        notes.append(f"{labelled} of {many(len(labels), 'row')} {have} source{rest}")
        unnamed = [name for name in SPLITS if shares[name] and name not in labels]
        if unnamed and not empty:
            notes.append(f"the source names no {' or '.join(unnamed)}: taken from train")
    tolerated = max(1, NOTABLE_DEVIATION * total)
    missed = [name for name in SPLITS[1:] if not labelled and abs(counts[name] - shares[name] * total) > tolerated]
    for name in missed:
        actual = f"{counts[name]} of {many(total, 'row')} ({counts[name] / total:.1%})"
        notes.append(f"{name} has {actual} instead of {shares[name]:.1%}")
    if (missed or empty) and dealt.largest > 1:
        key = f"{params.key or params.by}, with all that belongs to it,"
        unit = "group of near-copies" if params.by == "group" else key
        notes.append(f"the largest {unit} has {dealt.largest} rows and is not divided")
    elif missed or empty:
        kinds = f" of {strata} kinds by `stratify_by: {params.stratify_by}`" if strata > 1 else ""
        notes.append(f"there {'is' if total == 1 else 'are'} {many(total, 'row')}{kinds}")
    return CheckResult(
        "schema",
        passed=not empty and not untested,
        severity="warn" if untested else "error",
        blocking=not untested,
        count=len(empty) or int(untested),
        note="; ".join(notes),
    )


def _augmented_rows(params: Params, verification: Verification, added: AddedRows) -> CheckResult:
    notes = [f"{many(n, 'copy', 'copies')} left out: {reason.replace('_', ' ')}" for reason, n in added.dropped.items()]
    if added.unused:
        unused = many(added.unused, "paraphrase is", "paraphrases are")
        notes.append(f"{unused} of no row in train that has a prompt")
    unaugmented = params.augment is not None and not added.rows and not verification.unexpected
    if unaugmented:
        notes.insert(0, "no row was added; see splits.augment, or leave it out")
    return CheckResult(
        "augmented_rows",
        passed=not verification.unexpected and not unaugmented,
        severity="warn" if unaugmented else "error",
        blocking=not unaugmented,
        count=len(verification.unexpected),
        rows=verification.unexpected[:20],
        note="; ".join(notes),
    )
