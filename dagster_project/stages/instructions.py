"""raw_examples -> instructions.

The validated instruction set: every row is checked, and every dropped row is recorded with its reason.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core import row_cache
from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.frames import placed_records
from dagster_project.core.params import inside
from dagster_project.core.records import (
    LEDGER,
    CheckResult,
    Report,
    StoredPart,
    iter_table,
    ledger_schema,
    ledger_table,
    read_lines,
    record_schema,
    uncollected,
    write_json,
    write_stored_records,
    write_tables,
)
from dagster_project.core.stored_rows import Selected, StoredRows
from dagster_project.core.strings import Strings
from dagster_project.curation.checks import account, expectations, findings, references
from dagster_project.curation.checks.checks import Judgement, Rules, checks_of, judge
from dagster_project.curation.checks.review import read_decisions, refuse_missing_files
from dagster_project.curation.checks.token_counts import tokens_of
from dagster_project.curation.sources.benchmarks import Item, read_items
from dagster_project.curation.sources.reading import locate

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

CHECK_DESCRIPTIONS = {
    **{name: check.description for name, check in checks_of("examples").items()},
    "expectations": expectations.TRUTH,
}
"""The checks of this stage -> their descriptions."""


class Params(Rules):
    """How strictly the instruction set is checked. See docs/checks.md."""

    benchmarks: list[str] = []
    """Files inside data/sources/benchmarks/ with questions that must not be trained on."""
    review: str | None = None
    """CSV file inside data/sources/review/ with people's decisions on rows that no rule can decide. See
    docs/checks.md."""
    expectations: str | None = None
    """Great Expectations suite inside data/expectations/: the data owner's expectations of the whole set."""
    data_docs: bool = False
    """Also build Great Expectations' own Data Docs, in data/pages/instructions/data_docs. They load styles and scripts
    from the web."""


def validate(params: Params, ctx: ValidationContext) -> None:
    refuse_missing_files(params, ctx)
    if params.expectations:
        locate(ctx.root, params.expectations, "instructions.expectations", "data/expectations")


def run(ctx: StageContext) -> Report:
    with row_cache.using(ctx.root, "instructions"):
        params = ctx.params("instructions", Params)
        raw_examples, base_model = ctx.output_of("raw_examples"), ctx.output_of("base_model")
        return produce(ctx.root, params, raw_examples, base_model, ctx.out, ctx.pages, ctx.recorded())


@uncollected
def produce(
    root: Path,
    params: Params,
    raw_examples: Path,
    base_model: Path,
    out: Path,
    pages: Path,
    previous: Mapping[str, Path],
) -> Report:
    """Check all rows, write those that are kept, and account for the others.

    Args:
        pages: folder for documents about this run (changes.json, expectations.json), review.csv, and, if requested,
            Data Docs.
        previous: files of the output as recorded before, by relative path; used only for the changes shown on the page.
    """
    held_out: list[Item] = []
    for path in params.benchmarks:
        held_out += read_items(inside(root, path, "instructions.benchmarks"), path)
    review = inside(root, params.review, "instructions.review") if params.review else None
    decisions = read_decisions(review, checks_of("examples")) if review else []
    records = StoredRows(folder=out.parent)
    for line in placed_records(raw_examples):
        records.append_encoded(line)

    judged = judge(records, held_out, params, tokens_of(base_model), decisions)
    left = array("q", (i for i, reason in enumerate(judged.reason) if reason is None))
    kept = Selected(judged.records, left)
    checks = [findings.check_result(verdict, judged, held_out) for verdict in judged.verdicts.values()]
    if params.expectations is None or not len(kept):
        note = "no suite is named" if len(kept) else "no rows to evaluate"
        checks.append(CheckResult(expectations.NAME, passed=True, note=note))
    else:
        suite = inside(root, params.expectations, "instructions.expectations")
        data_docs = pages / "data_docs" if params.data_docs else None
        groups = _groups(judged, left)
        outcome = expectations.run(
            expectations.table(kept, groups, read=len(records)), suite, data_docs, params.expectations
        )
        places = {i: references.place(kept[i]) for one in outcome.expectations for i in one.rows}
        checks.append(expectations.check(outcome, places))
        write_json(pages / "expectations.json", expectations.document(outcome, places))

    ids, repaired = Strings(), any(judged.repaired.values()) or bool(judged.edited)
    write_tables(out / LEDGER, _ledger(judged, ids, repaired), ledger_schema(repaired))
    added = {"group_id": Strings(ids[judged.cluster[i]] for i in left)}
    is_rich = any(judged.reason[i] is None for i in judged.rich)
    write_stored_records(judged.records, ids, record_schema(), [StoredPart(out, left, is_rich, added)])
    account.write_account("instructions", judged, held_out, out, pages, previous, partial(_read_kept, out.parent))

    return Report(
        rows_in=len(records),
        rows_out=len(kept),
        dropped=judged.dropped,
        fixed=judged.fixed,
        checks=checks,
        metrics={
            "categories": judged.profile["categories"],
            "held_out_questions": len(held_out),
            "near_duplicate_groups": account.count_groups(judged),
            "waiting_for_review": len({i for i, _ in judged.waiting}),
        },
    )


def _groups(judged: Judgement, rows: Sequence[int]) -> np.ndarray:
    """For each of some rows a number that it shares with those that get the same `group_id`."""
    import numpy as np
    import polars as pl

    assert judged.identities is not None
    identities = judged.identities[np.array(judged.cluster, np.int64)[np.array(rows, np.int64)]]
    first = pl.col("row").first().over(identities.columns)
    return identities.with_row_index("row").select(first).to_series().to_numpy()


def _ledger(judged: Judgement, ids: Strings, repaired: bool) -> Iterator[pa.Table]:
    """Lines of the ledger, by batch.

    Args:
        ids: gets the `example_id` of every row.
        repaired: whether any of the rows was repaired or edited.
    """
    import pyarrow as pa

    names = ("source", "source_row", "example_id", *(("source_id", "repaired") if repaired else ()))
    schema, start = pa.schema([ledger_schema(repaired).field(name) for name in names]), 0
    for block in judged.records.blocks():
        rows = range(start, start + len(block))
        start += len(block)
        columns: dict[str, Any] = dict(zip(names, read_lines(block, schema).columns, strict=True))
        ids.extend(columns["example_id"].to_pylist())
        repairs = columns["repaired"].to_pylist() if repaired else [None] * len(rows)
        reasons = [judged.reason[i] for i in rows]
        columns["outcome"] = [f"dropped:{reason}" if reason else "kept" for reason in reasons]
        columns["why"] = [account.why(judged, i, {"repaired": of_row}) for i, of_row in zip(rows, repairs, strict=True)]
        yield ledger_table(columns, repaired)


def _read_kept(scratch: Path, previous: Mapping[str, Path]) -> StoredRows:
    shards = (row for name in sorted(previous) if name.startswith("records-") for row in iter_table(previous[name]))
    placed = (row for row in iter_table(previous["ledger.parquet"]) if row["outcome"] == "kept")
    kept = zip(shards, placed, strict=True)
    return StoredRows(({**record, "source_row": line["source_row"]} for record, line in kept), scratch)
