"""raw_examples -> instructions. The validated instruction set: every row judged, every drop accounted for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dagster_project.curation.checks import CHECKS, Rules, judge
from dagster_project.curation.formats import read_multiple_choice
from dagster_project.params import inside
from dagster_project.records import Report, read_ledger, read_records, write_ledger, write_records

TRUTHS = {name: check.truth for name, check in CHECKS.items()}
"""The checks this stage reports, with the truth each looks at."""


class Params(Rules):
    benchmarks: list[str] = []
    """Multiple-choice files inside data/sources/benchmarks/ whose questions must not be trained on."""


def run(root: Path, params: Params, raw_examples: Path, out: Path) -> Report:
    benchmarks = [inside(root, path, "instructions.benchmarks") for path in params.benchmarks]
    held_out = [question["question"] for path in benchmarks for question in read_multiple_choice(path)]
    ledger = read_ledger(raw_examples)
    records = [{**record, "source_row": entry["source_row"]} for record, entry in zip(read_records(raw_examples), ledger, strict=True)]

    judged = judge(records, held_out, params)
    for record, first in zip(records, judged.cluster, strict=True):
        record["group_id"] = records[first]["example_id"]
    kept = [record for record, why in zip(records, judged.reason, strict=True) if why is None]

    write_records(out, [{key: value for key, value in record.items() if key != "source_row"} for record in kept])
    write_ledger(
        out,
        (
            {**record, "outcome": f"dropped:{why}" if why else "kept", "why": CHECKS[why].truth if why else ""}
            for record, why in zip(records, judged.reason, strict=True)
        ),
    )
    dropped = Counter(why for why in judged.reason if why)
    return Report(
        rows_in=len(records),
        rows_out=len(kept),
        dropped={name: dropped[name] for name in CHECKS if dropped[name]},
        checks=judged.results,
        metrics={
            "categories": dict(sorted(Counter(record["category"] or "(none)" for record in kept).items())),
            "held_out_questions": len(held_out),
        },
    )
