"""raw_examples -> instructions: every row is kept or dropped for a reason,
review decisions apply, and the pages show changes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from builders.records import CHECK_EXAMPLES, LONG, ask, placed
from conftest import draw_pages

from dagster_project.core.errors import InputError
from dagster_project.core.records import Report, read_ledger, read_records, read_table, write_ledger, write_records
from dagster_project.curation.checks.row_checks import ROW_CHECKS
from dagster_project.stages import instructions

Record = dict[str, Any]


def run(folder: Path, model: Path, rows: list[Record], previous: str | None = None, **params: Any) -> Report:
    """Rows through the stage, into `folder`/out and `folder`/pages; `previous` is the folder of an earlier run."""
    rows = placed(rows)
    write_records(
        folder / "data/raw_examples",
        [{key: value for key, value in row.items() if key != "source_row"} for row in rows],
    )
    write_ledger(folder / "data/raw_examples", rows)
    before = {path.name: path for path in Path(previous, "out").iterdir()} if previous else {}
    report = instructions.produce(
        folder,
        instructions.Params(**params),
        folder / "data/raw_examples",
        model,
        folder / "out",
        folder / "pages",
        before,
    )
    draw_pages("instructions", report, folder / "out", folder / "pages")
    return report


def test_every_row_is_kept_or_dropped_for_a_reason(tmp_path: Path, tiny_model: Path) -> None:
    alone = {"exact_duplicates", "benchmark_leakage", "template_mismatch"}
    bad = [
        name
        for name, check in ROW_CHECKS.items()
        if check.action == "drop" and check.kind is None and name not in alone
    ]
    rows = [ask("Hi"), *(CHECK_EXAMPLES[name][1][-1] for name in bad), ask("Hi"), ask("Ho")]
    report = run(tmp_path, tiny_model, rows)
    assert (report.rows_in, report.rows_out) == (len(rows), 2)
    assert report.dropped == {**dict.fromkeys(bad, 1), "exact_duplicates": 1}
    assert len(read_records(tmp_path / "out")) == 2
    outcomes = ["kept", *(f"dropped:{name}" for name in bad), "dropped:exact_duplicates", "kept"]
    assert [(row["source_row"], row["outcome"]) for row in read_ledger(tmp_path / "out")] == list(enumerate(outcomes))
    found = json.loads((tmp_path / "out/findings.json").read_text())
    assert (found["rows"], found["kept"], found["dropped"]) == (report.rows_in, report.rows_out, report.dropped)


@pytest.mark.parametrize("rows", [[ask("Hi")], [ask("Hi", "")]], ids=["a row is kept", "none is"])
def test_every_check_is_always_reported(rows: list[Record], tmp_path: Path, tiny_model: Path) -> None:
    assert {check.name for check in run(tmp_path, tiny_model, rows).checks} == instructions.CHECK_DESCRIPTIONS.keys()


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, tiny_model: Path) -> None:
    rows = [ask(LONG), ask(LONG.replace("garden", "yellow")), ask("Hi", "Hello you"), ask("Hi", "Bye you")]
    for name in ("a", "b"):
        run(tmp_path / name, tiny_model, rows)
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name


def test_every_overlap_is_listed_with_its_rule_and_score(tmp_path: Path, tiny_model: Path) -> None:
    run(tmp_path, tiny_model, [ask(LONG), ask(LONG + " again"), ask(LONG), ask(LONG.replace("garden", "yellow"))])
    found = [(row["check"], row["source_row"], row["rule"]) for row in read_table(tmp_path / "out/overlaps.parquet")]
    assert found == [
        ("exact_duplicates", 2, "equal"),
        ("near_duplicates", 1, "jaccard"),
        ("grouped", 3, "jaccard"),
        ("grouped", 3, "jaccard"),
    ]


def test_a_decision_in_the_review_file_is_applied_on_the_next_run(tmp_path: Path, tiny_model: Path) -> None:
    rows = [ask("Hi", "Hello you"), ask("Hi", "Bye you")]
    assert run(tmp_path, tiny_model, rows).metrics["waiting_for_review"] == 1
    with (tmp_path / "pages/review.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["place"], line["check"], line["response"]) == ("rows.jsonl:1", "conflicting_responses", "Bye you")
    with (tmp_path / "decided.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, line)
        writer.writeheader()
        writer.writerow({**line, "decision": "drop", "reason": "rude"})
    report = run(tmp_path, tiny_model, rows, review="decided.csv")
    assert (report.dropped, report.metrics["waiting_for_review"]) == ({"conflicting_responses": 1}, 0)
    assert read_ledger(tmp_path / "out")[1]["why"] == "dropped: rude"


def test_only_the_page_shows_changes_since_the_recorded_version(tmp_path: Path, tiny_model: Path) -> None:
    run(tmp_path / "old", tiny_model, [ask("Hi"), ask("Where is my blue kite?")])
    rows = [ask("Hi"), ask("Where is my red kite?"), ask("Ho")]
    run(tmp_path / "new", tiny_model, rows, previous=str(tmp_path / "old"))
    run(tmp_path / "alone", tiny_model, rows)
    page = (tmp_path / "new/pages/report.html").read_text()
    assert (
        "the version recorded before" in page
        and "the version recorded before" not in (tmp_path / "alone/pages/report.html").read_text()
    )
    assert (tmp_path / "new/out/findings.json").read_bytes() == (tmp_path / "alone/out/findings.json").read_bytes()


def test_expectations_are_a_check_and_a_section_of_the_page(tmp_path: Path, tiny_model: Path) -> None:
    suite = {
        "name": "mine",
        "expectations": [
            {"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 5}, "severity": "critical"}
        ],
    }
    (tmp_path / "suite.json").write_text(json.dumps(suite))
    report = run(tmp_path, tiny_model, [ask("Hi")], expectations="suite.json")
    assert [check.name for check in report.failures] == ["expectations"]
    assert not (tmp_path / "pages/data_docs").exists()
    page = (tmp_path / "pages/report.html").read_text()
    assert 'id="expectations"' in page and "0 of 1 expectation passed" in page and "failed (error)" in page
    assert "Not ready to train on" in page and "Ready to train on" not in page


def test_data_docs_are_built_if_requested(tmp_path: Path, tiny_model: Path) -> None:
    suite = {
        "name": "mine",
        "expectations": [{"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 1}}],
    }
    (tmp_path / "suite.json").write_text(json.dumps(suite))
    run(tmp_path, tiny_model, [ask("Hi")], expectations="suite.json", data_docs=True)
    assert (tmp_path / "pages/data_docs/index.html").is_file()


def test_an_invalid_suite_is_refused_by_name(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "suite.json").write_text('{"name": "mine", "expectations": [{"type": "expect_luck"}]}')
    with pytest.raises(InputError, match=r"suite\.json: expectations\[0\]"):
        run(tmp_path, tiny_model, [ask("Hi")], expectations="suite.json")
