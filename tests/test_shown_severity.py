"""A finding has the same severity in Dagster and on the data-quality page."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_project.core.records import Report, example_id
from dagster_project.core.severity import shown
from dagster_project.curation.checks.checks import Rules, judge
from dagster_project.curation.checks.findings import check_result, document
from dagster_project.orchestration.dagster.project import PedigreeProject
from dagster_project.pipeline import Pipeline
from dagster_project.stages import instructions
from dagster_project.views.data_quality import data_quality_page

CHECKED = Pipeline(
    {"instructions": instructions}, {}, lambda stage: {"pii": "No text holds personal data."}, lambda root: {}
)


def on_the_page(finding: dict[str, Any]) -> str:
    document = {
        "name": "a",
        "format": "alpaca",
        "rows": 9,
        "kept": 5,
        "dropped": {},
        "findings": [finding],
        "similarity": {},
        "profile": {},
    }
    (severity,) = re.findall(r'<article class="card (\w+)"', data_quality_page(document))
    return str(severity)


def in_dagster(root: Path, check: dict[str, Any]) -> str:
    reported = {name: value for name, value in check.items() if value != []}  # as a report leaves out what is empty
    (result,) = PedigreeProject(root, pipeline=CHECKED).check_results(
        "instructions", None, {"checks": {"pii": reported}}
    )
    return "passed" if result.passed else {"ERROR": "error", "WARN": "warn"}[result.severity.value]


@pytest.mark.parametrize(("severity", "passed", "count"), product(("error", "warn", "info"), (True, False), (0, 4)))
def test_every_finding_has_the_same_severity_in_dagster_and_on_the_page(
    tmp_path: Path, severity: str, passed: bool, count: int
) -> None:
    finding = {
        "check": "pii",
        "severity": severity,
        "passed": passed,
        "count": count,
        "dropped": count if passed else 0,
        "elsewhere": 0,
        "waived": 0,
        "rows": [],
        "places": [],
        "examples": [],
        "truth": "",
        "note": "",
        "next": "",
        "matches": [],
    }
    assert {"info": "passed"}.get(on_the_page(finding), on_the_page(finding)) == in_dagster(tmp_path, finding)


def test_an_error_whose_rows_were_dropped_is_a_warning_and_one_whose_rows_are_kept_is_an_error() -> None:
    assert (shown("error", True, 3), shown("error", False, 3), shown("error", True, 0)) == ("warn", "error", None)
    assert (shown("warn", True, 3), shown("info", False, 3)) == ("warn", "info")


def test_the_checks_of_a_set_agree_with_its_page(tmp_path: Path) -> None:
    def asked(prompt: str, answer: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return {"example_id": example_id(messages), "messages": messages, "category": None, "meta": "{}"}

    long = "Tell me at length how one plants an apple tree in a garden of heavy clay, and when"
    rows = [
        asked(long, "Dig a deep hole first."),
        asked(long, "Dig a deep hole first."),
        asked("Write to me at once", " "),
    ]
    rows += [
        asked("Who wrote to bob.smith@corporate-mail.com today, and why?", "Nobody wrote to him."),
        asked("Say hi", "Hi"),
    ]
    placed = [{**row, "source": "rows.jsonl", "source_row": i} for i, row in enumerate(rows)]
    judged = judge(placed, [], Rules(policy={"pii": "warn"}))
    html = data_quality_page(document("rows.jsonl", "messages", judged, []))
    cards = {
        name: severity
        for severity, name in re.findall(r'<article class="card (\w+)".*?<h3><bdi dir="auto">(\w+)<', html, re.S)
    }
    report = Report(checks=[check_result(verdict, judged, []) for verdict in judged.verdicts.values()]).document()
    results = {
        str(result.check_name): result
        for result in PedigreeProject(tmp_path).check_results("instructions", None, report)
    }
    words = {dg.AssetCheckSeverity.ERROR: "error", dg.AssetCheckSeverity.WARN: "warn"}
    failed = {name: words[result.severity] for name, result in results.items() if not result.passed}
    assert failed == {name: severity for name, severity in cards.items() if severity != "info"}
    assert report["checks"]["empty_response"]["severity"] == "error" and failed["empty_response"] == "warn"
    assert failed["pii"] == "warn" and cards["short_response"] == "info"
