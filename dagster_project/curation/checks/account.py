"""Outputs of the checks in a stage.

Findings and all overlaps are in its output; changes and the review file are in its folder of pages.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.records import write_json, write_table
from dagster_project.core.stored_rows import Selected
from dagster_project.curation.checks import findings
from dagster_project.curation.checks.checks import CHECKS, Judgement
from dagster_project.curation.checks.review import queue
from dagster_project.curation.sources.benchmarks import Item

if TYPE_CHECKING:
    import pyarrow as pa


def write_account(
    name: str,
    judged: Judgement,
    held_out: Sequence[Item],
    out: Path,
    pages: Path,
    previous: Mapping[str, Path],
    kept_of: Callable[[Mapping[str, Path]], Sequence[dict[str, Any]]],
) -> None:
    """Args:
    name: of the set.
    held_out: all items that an overlap may name.
    out: the stage's output, which gets overlaps.parquet and findings.json.
    pages: folder of pages, which gets changes.json and review.csv.
    previous: files of the output as recorded before, by their path in it; used only for the changes shown on the page.
    kept_of: reads the kept records out of those. KeyError, ValueError, OSError and ArrowException mean that there are
    none, or that their format differs.
    """
    write_table(out / "overlaps.parquet", _overlaps(judged), overlap_schema())
    document = findings.references(name, "canonical records", judged, held_out)
    write_json(out / "findings.json", document)
    kept = Selected(judged.records, array("q", (i for i, reason in enumerate(judged.reason) if reason is None)))
    write_json(pages / "changes.json", _changes(previous, kept_of, kept, document))
    (pages / "review.csv").write_text(queue(judged.records, judged.waiting), encoding="utf-8", newline="")


def why(judged: Judgement, i: int, record: Mapping[str, Any]) -> str:
    """Reason of a row's outcome in the ledger: a reviewer's comment or the violated check; and the repairs."""
    check, repaired = judged.reason[i], record.get("repaired")
    said = judged.said.get(i) or (CHECKS[check].description if check else "")
    return "; ".join(filter(None, [said, f"repaired: {', '.join(repaired)}" if repaired else ""]))


def count_groups(judged: Judgement) -> int:
    """Number of clusters of near-duplicates that have kept rows.

    Two with the same key, the `example_id` of their first row, count once.
    """
    import numpy as np

    assert judged.identities is not None
    kept = np.array([reason is None for reason in judged.reason], np.bool_)
    firsts = np.unique(np.asarray(judged.cluster, np.int64)[kept])
    return judged.identities[firsts].n_unique() if len(firsts) else 0


@cache
def overlap_schema() -> pa.Schema:
    """All overlaps, including those that the report omits."""
    import pyarrow as pa

    columns = [
        ("check", pa.string()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("example_id", pa.string()),
        ("other", pa.string()),  # example_id of the earlier row, or "<file>:<row>" of the benchmark item
        ("part", pa.string()),  # prompt, response, rejected, reasoning_content or tool_calls
        ("rule", pa.string()),  # equal, jaccard, containment, one_word
        ("score", pa.float64()),
    ]
    return pa.schema(columns)


def _overlaps(judged: Judgement) -> Iterator[dict[str, Any]]:
    for check, links in judged.overlaps.links.items():
        for link, record in zip(links, Selected(judged.records, [link.row for link in links]), strict=True):
            yield {
                **{key: record[key] for key in ("source", "source_row", "example_id")},
                "check": check,
                "other": judged.records[link.other]["example_id"] if isinstance(link.other, int) else link.other,
                "part": link.part,
                "rule": link.rule,
                "score": link.score,
            }


def _changes(
    previous: Mapping[str, Path],
    kept_of: Callable[[Mapping[str, Path]], Sequence[dict[str, Any]]],
    kept: Sequence[dict[str, Any]],
    document: dict[str, Any],
) -> dict[str, Any] | None:
    """Differences from the previously recorded version; None if there is none."""
    import pyarrow as pa

    try:
        old = kept_of(previous)
        found = json.loads(previous["findings.json"].read_text(encoding="utf-8"))["findings"]
    except (KeyError, ValueError, OSError, pa.ArrowException):
        return None
    return {
        **findings.changes(old, kept, "the version recorded before"),
        "findings": findings.finding_changes(found, document["findings"]),
    }
