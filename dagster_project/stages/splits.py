"""instructions -> splits. Groups stay together, so near-duplicates cannot straddle two splits; categories keep their shares."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from dagster_project.curation.split import assign, straddling
from dagster_project.params import Section
from dagster_project.records import CheckResult, Report, read_records, record_schema, write_records

TRUTHS = {
    "split_leakage": "No group of near-duplicates stands in more than one split.",
    "schema": "Every split has rows.",
}


class Params(Section):
    test: float = Field(default=0.2, ge=0, lt=1)
    """Share of each category that is held out and never trained on."""
    validation: float = Field(default=0.1, ge=0, lt=1)
    """Share that training watches but does not learn from."""
    stratify_by: Literal["category", "source", "none"] = "category"
    """Each split gets the same share of every value of this."""

    @model_validator(mode="after")
    def _leave_some(self) -> Params:
        if self.test + self.validation >= 1:
            raise ValueError(f"test {self.test} and validation {self.validation} leave nothing to train on")
        return self


def run(params: Params, seed: int, instructions: Path, out: Path) -> Report:
    import pyarrow as pa

    records = read_records(instructions)
    strata = [str(record[params.stratify_by]) if params.stratify_by != "none" else "" for record in records]
    splits = assign([record["group_id"] for record in records], strata, {"test": params.test, "validation": params.validation}, seed)
    rows = [{**record, "split": split} for record, split in zip(records, splits, strict=True)]

    order = ("train", "validation", "test")
    wanted = {"train": 1.0, "validation": params.validation, "test": params.test}
    empty = [name for name in order if wanted[name] and name not in splits]
    crossing = straddling([record["group_id"] for record in records], splits)
    schema = record_schema().append(pa.field("split", pa.string()))
    for name in order:
        write_records(out / name, [row for row in rows if row["split"] == name], schema)
    return Report(
        rows_in=len(records),
        rows_out=len(rows),
        metrics={name: splits.count(name) for name in order},
        checks=[
            CheckResult("split_leakage", passed=not crossing, blocking=True, count=len(crossing), rows=crossing[:20]),
            CheckResult(
                "schema", passed=not empty, blocking=True, count=len(empty), note=f"no rows in: {', '.join(empty)}" if empty else ""
            ),
        ],
    )
