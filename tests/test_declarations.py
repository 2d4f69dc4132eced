"""What people declare of a source is shown wherever its license is, changes no
row, and belongs to the model's own runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders.files import jsonl
from builders.history import Project, md5

from dagster_project.core.context import Documents
from dagster_project.core.errors import InputError
from dagster_project.core.params import parse
from dagster_project.core.records import read_records
from dagster_project.curation.sources import declarations
from dagster_project.curation.sources.declarations import declared_of, declared_sources
from dagster_project.lineage.export.export import summarize
from dagster_project.lineage.export.model_card import model_card
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import as_text, audit, find
from dagster_project.stages import raw_examples, raw_preferences, splits
from dagster_project.views import declared as view
from dagster_project.views.data_quality import draw_data_quality
from dagster_project.views.lineage import lineage_page

FILE, OTHER = "data/sources/a.jsonl", "data/sources/b.jsonl"
DECLARED = {
    "category": "licensed",
    "collected": {"from": "2024-01-01", "to": "2024-06-30"},
    "generator": "Some model 3",
    "permission": "contract 17",
    "retain_until": "2027-01-31",
    "purposes": ["support", "evaluation"],
}
WORDS = ["licensed", "2024-01-01 to 2024-06-30", "Some model 3", "contract 17", "2027-01-31", "support, evaluation"]


def read(root: Path, out: str, **declared: Any) -> dict[str, Any]:
    section = {"sources": [{"path": FILE, "license": "MIT", **declared}]}
    report = raw_examples.produce(root, parse(raw_examples.Params, section, "raw_examples"), root / out)
    facts: dict[str, Any] = report.metrics["sources"][FILE]
    return facts


def test_declarations_enter_the_report_and_leave_every_byte_of_the_output_as_it_was(tmp_path: Path) -> None:
    jsonl(tmp_path / FILE, {"prompt": "Hi", "completion": "Hello"}, "broken")
    plain, declared = read(tmp_path, "plain"), read(tmp_path, "declared", **DECLARED)
    assert "declared" not in plain and declared.pop("declared") == DECLARED and declared == plain
    made = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "declared").iterdir()} and read_records(
        tmp_path / "plain"
    )


@pytest.mark.parametrize("name", DECLARED)
def test_each_field_may_be_given_alone_and_comes_back_as_it_was_written(name: str, tmp_path: Path) -> None:
    jsonl(tmp_path / FILE, {"prompt": "Hi", "completion": "Hello"})
    facts = read(tmp_path, "out", **{name: DECLARED[name]})
    assert facts["declared"] == {name: DECLARED[name]}
    shown = declared_of(facts).shown
    assert shown.pop(name) == dict(zip(DECLARED, WORDS, strict=True))[name] and set(shown.values()) == {"unknown"}


def test_preferences_and_paraphrases_declare_the_same() -> None:
    pairs = parse(raw_preferences.Params, {"sources": [{"path": FILE, **DECLARED}]}, "raw_preferences").sources[0]
    added = parse(
        splits.Params, {"augment": {"paraphrases": "data/sources/paraphrases/p.jsonl", **DECLARED}}, "splits"
    ).augment
    assert added and pairs.given == added.given == {"declared": DECLARED}


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (
            {"category": "own"},
            "raw_examples.sources.0.category: Input should be 'public', 'licensed', 'third_party',"
            " 'crawled', 'user' or 'synthetic'",
        ),
        ({"retain_until": "2027-02-30"}, "raw_examples.sources.0.retain_until: day is out of range for month"),
        ({"retain_until": "31.1.2027"}, "raw_examples.sources.0.retain_until: not a date: write YYYY-MM-DD, in quotes"),
        ({"collected": {}}, "raw_examples.sources.0.collected: give from, to or both"),
        (
            {"collected": {"from": "2024-02-01", "to": "2024-01-31"}},
            "raw_examples.sources.0.collected: from is after to",
        ),
        ({"collected": {"since": "2024-02-01"}}, "raw_examples.sources.0.collected.since: unknown key"),
        ({"purposes": "support"}, "raw_examples.sources.0.purposes: Input should be a valid list"),
        ({"purposes": [""]}, "raw_examples.sources.0.purposes.0: String should have at least 1 character"),
        ({"permission": ""}, "raw_examples.sources.0.permission: String should have at least 1 character"),
    ],
)
def test_a_mistake_names_the_key_and_what_is_allowed(declared: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        parse(raw_examples.Params, {"sources": [{"path": FILE, **declared}]}, "raw_examples")
    assert message in refused.value.what and refused.value.hint


def test_unknown_keys_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError) as refused:
        parse(
            raw_examples.Params,
            {"sources": [{"path": FILE, "retain": "2027-01-31", "collected": {"since": "2024"}}]},
            "raw_examples",
        )
    assert (
        all(name in refused.value.hint for name in DECLARED)
        and "keys of raw_examples.sources.0.collected: from, to" in refused.value.hint
    )


def test_an_unquoted_date_is_refused_before_dvc_fails(tmp_path: Path) -> None:
    from dagster_project.core import params

    (tmp_path / "params.yaml").write_text(f"raw_examples: {{sources: [{{path: {FILE}, retain_until: 2027-01-31}}]}}\n")
    with pytest.raises(InputError, match='DVC cannot parse YAML dates: quote the value: "2027-01-31"'):
        parse(raw_examples.Params, params.read(tmp_path)["raw_examples"], "raw_examples")


def test_a_report_that_declares_what_this_version_does_not_know_is_one_message() -> None:
    for declared in ({"category": "dreamed"}, {"mood": "good"}, "all", ["all"]):
        with pytest.raises(InputError, match=f"report: {FILE}") as refused:
            declared_of({"declared": declared}, FILE)
        assert "restore the report" in refused.value.hint


def declare(made: Project, lock: dict[str, Any], **declared: dict[str, Any]) -> dict[str, Any]:
    """The lock, after the report of `instructions` declares this of its sources, each named by its letter."""
    path = made.root / "data/reports/instructions.json"
    report = json.loads(path.read_text())
    for name, one in declared.items():
        report["sources"][f"data/sources/{name}.jsonl"]["declared"] = one
    path.write_text(json.dumps(report))
    lock["instructions"]["outs"][1]["md5"] = md5(path.read_bytes())
    return lock


def test_a_model_has_the_declarations_of_its_own_runs_whatever_the_workspace_says(tmp_path: Path) -> None:
    made = Project(tmp_path / "project")
    rows = [("cats", "train", FILE), ("dogs", "train", OTHER)]
    first = made.commit(made.trained(declare(made, made.curated(rows), a=DECLARED), ["cats", "dogs"]))
    second = made.commit(
        made.trained(
            declare(made, made.curated([*rows, ("fish", "test", FILE)]), b={"category": "user"}), ["cats", "dogs"]
        )
    )
    (made.root / "params.yaml").write_text(f"raw_examples: {{sources: [{{path: {FILE}, category: crawled}}]}}\n")
    (made.root / "data/reports/instructions.json").write_text("{}")
    expected = {first: {FILE: "licensed", OTHER: None}, second: {FILE: None, OTHER: "user"}}
    for rev, categories in expected.items():
        for model in ("adapter@lora", "merged@lora"):
            subject = find(Index(made.root), model, rev)
            for document in (audit(made.root, model, rev), summarize(subject)):
                assert {name: one.category for name, one in declared_sources(document).items()} == categories


def test_audit_card_and_page_show_every_field_and_unknown_for_the_rest(tmp_path: Path) -> None:
    made = Project(tmp_path / "project")
    made.commit(
        made.trained(
            declare(made, made.curated([("cats", "train", FILE), ("dogs", "train", OTHER)]), a=DECLARED),
            ["cats", "dogs"],
        )
    )
    document = audit(made.root, "merged@lora")
    assert document["sources"][FILE]["declared"] == DECLARED
    assert document["sources"][OTHER]["declared"] == dict.fromkeys(DECLARED, "unknown")
    text = as_text(document)
    assert (
        "    category licensed; collected 2024-01-01 to 2024-06-30; generator Some model 3; permission contract 17"
        in text
    )
    assert "    unknown: category, collected, generator, permission, retain until, purposes" in text
    card = model_card(summarize(find(Index(made.root), "merged@lora")))
    assert f"| {FILE} | {' | '.join(WORDS)} |" in card and f"| {OTHER} | {' | '.join(['unknown'] * 6)} |" in card
    page = lineage_page(document, [])
    assert all(f"<td>{word}</td>" in page for word in [*WORDS, "unknown"])


def test_the_page_of_a_data_set_has_the_declarations_of_its_sources(tmp_path: Path) -> None:
    out, pages = tmp_path / "data/instructions", tmp_path / "data/pages/instructions"
    out.mkdir(parents=True)
    (out / "findings.json").write_text(
        json.dumps({"name": "x", "format": "y", "rows": 1, "kept": 1, "dropped": {}, "findings": []})
    )
    sources = {FILE: {"rows": 3, "license": "MIT", "declared": DECLARED}, OTHER: {"rows": 4, "license": "unknown"}}
    jsonl(tmp_path / "data/reports/raw_examples.json", {"sources": sources})
    draw_data_quality(Documents(tmp_path, "instructions", out, pages, {}))
    page = (pages / "report.html").read_text()
    cells = [f"<td>{word}</td>" for word in ["3", "MIT", *WORDS, "4", *["unknown"] * 7]]
    assert "".join(cells[:8]) in page and "".join(cells[8:]) in page


def test_the_view_has_the_fields_of_the_class() -> None:
    assert view.COLUMNS == declarations.NAMES and {"license", *view.COLUMNS} == set(declarations.Declared.model_fields)
