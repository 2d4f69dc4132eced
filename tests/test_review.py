"""Waivers and the review file: every decision names a row and a reason, and invalid ones are refused."""

from __future__ import annotations

import csv
import io
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from builders.records import ask, placed
from pydantic import ValidationError

from dagster_project.core.errors import InputError
from dagster_project.curation.checks import findings
from dagster_project.curation.checks.checks import CHECKS, Rules, judge
from dagster_project.curation.checks.review import COLUMNS, Waiver, queue, read_decisions, refuse_expired

WAIVER: dict[str, Any] = {
    "check": "pii",
    "rows": ["a.jsonl:3"],
    "reason": "our own address",
    "expires": date(2026, 6, 30),
}


def test_a_waiver_is_valid_through_its_last_day_and_refused_after_it() -> None:
    waiver = Waiver(**WAIVER)
    refuse_expired([waiver], "instructions.waivers", date(2026, 6, 30))
    with pytest.raises(InputError, match=r"instructions\.waivers\.0: the waiver for pii expired on 2026-06-30"):
        refuse_expired([waiver], "instructions.waivers", date(2026, 7, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "names neither"),
        ({"reason": ""}, "at least 1"),
        ({"expires": None}, "date"),
        ({"pairs": [["a"]]}, "list of two"),
        ({"rowz": 1}, "Extra"),
    ],
)
def test_a_waiver_without_row_reason_or_date_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Waiver(**{**WAIVER, **change})


def test_a_waiver_for_an_unknown_check_is_refused() -> None:
    with pytest.raises(ValidationError, match="'typos' is not a check on rows"):
        Rules(waivers=[Waiver(**{**WAIVER, "check": "typos"})])


def filled(path: Path, *changes: dict[str, str]) -> Path:
    """The review file of one row a change, filled in by a person."""
    rows = placed([ask(f"Hi {i}", '=1+1, "quoted"\nand so on') for i in range(len(changes))])
    lines = list(
        csv.DictReader(io.StringIO(queue(rows, [(i, "conflicting_responses") for i in range(len(rows))]), newline=""))
    )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**line, **change} for line, change in zip(lines, changes, strict=True))
    return path


def test_completed_decisions_are_read_and_the_rest_stay_open(tmp_path: Path) -> None:
    path = filled(
        tmp_path / "r.csv",
        {"decision": "accept", "reason": "fine"},
        {},
        {"decision": "Edit", "reason": "clearer", "new_response": "Yes."},
    )
    assert [(d.decision, d.check, d.reason, d.new_response) for d in read_decisions(path, CHECKS)] == [
        ("accept", "conflicting_responses", "fine", ""),
        ("edit", "conflicting_responses", "clearer", "Yes."),
    ]


def test_edits_of_a_row_in_the_lines_of_several_checks_are_all_applied(tmp_path: Path) -> None:
    rows = placed([ask("Hi 0", "Hello.")])
    edits = [{"check": "pii", "new_prompt": "Hi you"}, {"check": "secrets", "new_response": "Good day."}]
    same = {"example_id": rows[0]["example_id"], "decision": "edit", "reason": "clearer"}
    judged = judge(
        rows,
        [],
        Rules(),
        decisions=read_decisions(filled(tmp_path / "r.csv", *({**same, **edit} for edit in edits)), CHECKS),
    )
    assert [message["content"] for message in judged.records[0]["messages"]] == ["Hi you", "Good day."]
    edits[1]["new_prompt"] = "Hi all"
    with pytest.raises(InputError, match=r"row 2: .* was already edited otherwise"):
        read_decisions(filled(tmp_path / "r.csv", *({**same, **edit} for edit in edits)), CHECKS)


def test_a_row_that_is_dropped_in_one_line_and_edited_in_another_is_refused(tmp_path: Path) -> None:
    same = {"example_id": placed([ask("Hi 0", "Hello.")])[0]["example_id"], "reason": "wrong"}
    edit = {"check": "pii", "decision": "edit", "new_prompt": "Hi you"}
    path = filled(tmp_path / "r.csv", {**same, **edit}, {**same, "check": "secrets", "decision": "drop"})
    with pytest.raises(InputError, match=r"row 2: .* is both dropped and edited"):
        read_decisions(path, CHECKS)


def test_a_review_file_may_have_prompts_as_long_as_rows(tmp_path: Path) -> None:
    path = filled(tmp_path / "r.csv", {"prompt": "word " * 30_000, "decision": "drop", "reason": "wrong"})
    assert [decision.decision for decision in read_decisions(path, CHECKS)] == ["drop"]
    assert csv.field_size_limit() == 131_072


def test_a_row_that_a_person_drops_for_what_no_check_found_is_counted_as_reviewed(tmp_path: Path) -> None:
    rows = placed([ask("Hi 0", "Hello."), ask("Hi 1", "Good day.")])
    path = filled(tmp_path / "r.csv", {})
    lines = list(csv.DictReader(io.StringIO(path.read_text(), newline="")))
    lines[0] |= {"example_id": rows[1]["example_id"], "check": "reviewed", "decision": "drop", "reason": "wrong label"}
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS).writeheader()
        csv.DictWriter(file, COLUMNS).writerows(lines)
    judged = judge(rows, [], Rules(), decisions=read_decisions(path, CHECKS))
    assert judged.reason == [None, "reviewed"] and judged.dropped == {"reviewed": 1}
    assert judged.said == {1: "dropped: wrong label"}
    assert findings.references("a set", "alpaca", judged, [])["dropped"] == {"reviewed": 1}


def test_a_line_with_an_unquoted_comma_is_refused_and_spaces_around_names_do_not_count(tmp_path: Path) -> None:
    header = ",".join(COLUMNS)
    (tmp_path / "r.csv").write_text(f"{header}\n0a,a:0,pii,q,a,edit,wrong, see ticket,New question?,\n")
    with pytest.raises(InputError, match="row 1: more fields than columns"):  # else the new question is " see ticket"
        read_decisions(tmp_path / "r.csv", CHECKS)
    (tmp_path / "r.csv").write_text(f"{header}\n 0a ,a:0, pii,q,a, drop ,wrong,,\n")
    assert [(d.example_id, d.check, d.decision) for d in read_decisions(tmp_path / "r.csv", CHECKS)] == [
        ("0a", "pii", "drop")
    ]


def test_a_cell_that_a_spreadsheet_would_run_is_made_harmless() -> None:
    line = next(csv.DictReader(io.StringIO(queue(placed([ask("Hi", "=cmd()")]), [(0, "pii")]))))
    assert line["response"] == "'=cmd()"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decision": "keep", "reason": "x"}, "row 1: 'keep' is none of accept, drop, edit"),
        ({"decision": "drop"}, "row 1: no reason"),
        (
            {"decision": "drop", "reason": "x", "check": "typo"},
            "row 1: 'typo' is not a check of this set; for what no check found, write reviewed",
        ),
        ({"decision": "accept", "reason": "x", "check": "reviewed"}, "row 1: accept, but reviewed is not a check"),
        ({"decision": "edit", "reason": "x"}, "row 1: edit, but new_prompt and new_response are both empty"),
    ],
)
def test_an_invalid_decision_is_refused_by_row(change: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_decisions(filled(tmp_path / "r.csv", change), CHECKS)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a,b\n1,2\n", "no column"), (b"\xff\xfe", "not UTF-8"), (b'example_id,check,decision,reason\n"x', "not CSV")],
)
def test_an_invalid_review_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_decisions(tmp_path / "r.csv", CHECKS)
