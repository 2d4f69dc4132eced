"""No text of a row is in a report, in findings, in the audit of labels or in
Dagster's event log; pages and terminal show it from the shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders.files import jsonl
from conftest import draw_pages, pedigree
from markupsafe import escape

from dagster_project.core.params import parse
from dagster_project.core.records import Report
from dagster_project.curation.checks.quotes import MISSING
from dagster_project.orchestration.dagster import metadata
from dagster_project.orchestration.dagster_dvc.metadata import check_result
from dagster_project.stages import instructions, preferences, raw_examples, raw_preferences, splits, tokenized
from dagster_project.views.trained_examples import trained_examples

Fields = dict[str, Any]
SOURCE, PAIRS, QUIZ = "data/sources/rows.jsonl", "data/sources/pairs.jsonl", "data/sources/benchmarks/quiz.jsonl"
MASKED = ("planted.zephyr@example.org", "AKIAZEPHYRPLANTED7QW")
KITE = "Please tell me what became of the parcel with the garden kite that went to the wrong house last week"


def word(name: str) -> str:
    """A word that is nowhere but in the rows that it was planted in."""
    return f"qx{name}planted"


def ask(name: str, prompt: str, answer: str = "It is on its way to you.", **more: Any) -> Fields:
    return {
        "messages": [{"role": "user", "content": f"{prompt} {word(name)}"}, {"role": "assistant", "content": answer}],
        **more,
    }


def rows() -> list[Fields]:
    """Rows with each kind of finding, and kept ones that are alike."""
    weather = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    call = {
        "type": "function",
        "id": "abcdefghi",
        "function": {"name": "weather", "arguments": json.dumps({"town": word("argument")})},
    }
    tools = [
        {"role": "user", "content": f"Cold in {word('tools')}?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": f"I look at {word('reasoning')}.",
            "tool_calls": [call],
        },
        {"role": "tool", "content": word("result"), "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "Yes, it is cold."},
    ]
    flow = "In a few words, explain to a child of ten years what this could mean:"
    many = "Thank you for asking, the answer to this is that nobody knows."
    return [
        ask("pii", f"Write to {MASKED[0]} about"),
        ask("secret", f"My key is {MASKED[1]} for"),
        ask("duplicate", "The same twice about"),
        ask("duplicate", "The same twice about"),
        ask("near", KITE),
        ask("near", KITE.replace("garden", "yellow")),
        ask("conflict", "Which label has", "The first label."),
        ask("conflict", "Which label has", "Another label."),
        ask("train", f"{KITE} or a violin", split="train"),
        ask("train", f"{KITE} or a violin", split="test"),
        ask("leak", "Which planet do people sometimes call the red planet of"),
        ask("long", "word " * 900),
        ask("empty", "No answer to", ""),
        ask("mojibake", "The cafÃ© of"),
        ask("hidden", "In\u200bvisible"),
        ask("mark", "An end <|im_end|> of"),
        ask("input", "Look", "Of course I look at it."),
        ask("refused", "Do", "I'm sorry, but I can't help with that."),
        {"messages": [{"role": "user", "content": word("roles")}, {"role": "user", "content": word("roles")}]},
        {"messages": word("malformed")},
        {"messages": tools, "tools": [weather]},
        *(ask(f"flow{'abcdefghij'[i // 10]}{'abcdefghij'[i % 10]}", flow, many) for i in range(60)),
    ]


def pairs() -> list[Fields]:
    return [
        {
            "prompt": f"Where is it? {word('pair')}",
            "chosen": "On its way to you.",
            "rejected": f"No. {word('rejected')}",
        },
        {
            "prompt": f"Where is it? {word('pair')}",
            "chosen": "On its way to you.",
            "rejected": f"No. {word('rejected')}",
        },
        {"prompt": f"{KITE} {word('near')}", "chosen": f"Soon. {word('chosen')}", "rejected": f"Never. {MASKED[0]}"},
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> SimpleNamespace:
    """The stages of the data on these rows, with the layout of a project."""
    root = tmp_path_factory.mktemp("quotes")
    data = root / "data"
    shutil.copytree(tiny_model, data / "base_model")
    jsonl(root / SOURCE, *rows())
    jsonl(root / PAIRS, *pairs())
    jsonl(
        root / QUIZ,
        {"question": f"Which planet do people sometimes call the red planet of {word('leak')}", "answer": "Mars"},
    )
    read = parse(raw_examples.Params, {"sources": [{"path": SOURCE}]}, "raw_examples")
    rules = {
        "policy": {"pii": "fix", "refusal": "warn", "near_duplicates": "warn"},
        "max_tokens": 3000,
        "benchmarks": [QUIZ],
    }
    given = parse(raw_preferences.Params, {"sources": [{"path": PAIRS}]}, "raw_preferences")
    reports: dict[str, Report] = {"raw_examples": raw_examples.produce(root, read, data / "raw_examples")}
    (data / "work").mkdir()
    reports["instructions"] = instructions.produce(
        root,
        parse(instructions.Params, rules, "instructions"),
        data / "raw_examples",
        data / "base_model",
        data / "instructions",
        data / "pages/instructions",
        {},
    )
    dealing = splits.Params(test=0.2, validation=0.1)
    reports["splits"] = splits.produce(root, dealing, 1, data / "instructions", data / "splits")
    reports["tokenized"] = tokenized.produce(
        root, tokenized.Params(max_length=512), 1, data / "splits", data / "base_model", data / "tokenized"
    )
    reports["raw_preferences"] = raw_preferences.produce(root, given, data / "raw_preferences")
    reports["preferences"] = preferences.produce(
        root,
        parse(preferences.Params, {"test": 0.0, "validation": 0.0}, "preferences"),
        7,
        data / "raw_preferences",
        data / "splits",
        data / "base_model",
        data / "preferences",
        data / "pages/preferences",
        {},
    )
    for stage in ("instructions", "preferences"):
        draw_pages(stage, reports[stage], data / stage, data / "pages" / stage, root)
    for stage, report in reports.items():
        (data / "reports").mkdir(exist_ok=True)
        (data / f"reports/{stage}.json").write_text(json.dumps({"passed": True, **report.document()}))
    return SimpleNamespace(root=root, reports=reports)


def planted() -> Iterator[str]:
    text = json.dumps([rows(), pairs()])
    yield from (one for one in {part.strip('".?,:\\}{ ]') for part in text.split()} if one.startswith("qx"))
    yield from (
        "zephyr",
        "ZEPHYR",
        "Thank you",
        "nobody knows",
        "garden kite",
        "child of ten",
        "first label",
        "red planet",
    )


def test_every_kind_of_finding_is_there(ran: SimpleNamespace) -> None:
    found = {one["check"] for one in json.loads((ran.root / "data/instructions/findings.json").read_text())["findings"]}
    wanted = {
        "pii",
        "secrets",
        "exact_duplicates",
        "near_duplicates",
        "conflicting_responses",
        "benchmark_leakage",
        "split_leakage",
        "too_long",
    }
    wanted |= {
        "empty_response",
        "encoding",
        "hidden_characters",
        "special_tokens_in_text",
        "refusal",
        "invalid_roles",
        "malformed_row",
    }
    assert wanted | {"invalid_tool_call", "low_diversity"} <= found
    assert {"exact_duplicates", "pii"} <= {
        one["check"] for one in json.loads((ran.root / "data/preferences/findings.json").read_text())["findings"]
    }


def test_no_planted_word_is_in_a_report_in_findings_or_in_the_audit_of_labels(ran: SimpleNamespace) -> None:
    files = [*sorted((ran.root / "data/reports").iterdir())]
    files += [
        ran.root / "data" / name
        for name in ("instructions/findings.json", "preferences/findings.json", "tokenized/audit.json")
    ]
    assert len(files) == 9
    found = {(path.name, one) for path in files for one in planted() if one in path.read_text(encoding="utf-8")}
    assert found == set()


def test_no_planted_word_is_in_the_event_log_of_dagster(ran: SimpleNamespace, tmp_path: Path) -> None:
    import dagster as dg

    planned = [*planted()]
    earlier = {
        "count": 1,
        "rows": [f"{SOURCE}:0"],
        "examples": [word("pii")],
        "severity": "warn",
        "passed": False,
    }  # of a version with quotes
    match = {
        "place": "a:0",
        "other": "b:1",
        "part": "prompt",
        "rule": "equal",
        "score": 1.0,
        "text": word("near"),
        "other_text": word("near"),
    }
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        for stage, report in ran.reports.items():
            state = SimpleNamespace(
                address=stage, out=f"data/{stage}", version="v", report=f"data/reports/{stage}.json", meta={}
            )
            described = metadata.describe(ran.root, state)  # type: ignore[arg-type]
            instance.report_runless_asset_event(dg.AssetMaterialization(stage, metadata=described))
            checks = {
                **report.document()["checks"],
                "earlier": {**earlier, "matches": [{**match, "span": [0, 1], "other_span": [0, 1]}]},
            }
            for name, check in checks.items():
                extra = metadata.check_metadata(ran.root, stage, check)
                result = check_result(dg.AssetKey(stage), name, "", check, metadata.severity_of(check), extra)
                instance.report_runless_asset_event(
                    dg.AssetCheckEvaluation(
                        result.asset_key, name, result.passed, result.metadata, severity=result.severity
                    )
                )
    logged = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert f"{SOURCE}:0".encode() in logged and b"full report" in logged
    assert [one for one in planned if one.encode() in logged] == []


def test_the_pages_show_the_texts_masked(ran: SimpleNamespace) -> None:
    page = (ran.root / "data/pages/instructions/report.html").read_text(encoding="utf-8")
    shown = (
        "duplicate",
        "near",
        "conflict",
        "train",
        "leak",
        "empty",
        "roles",
        "malformed",
        "argument",
        "reasoning",
        "result",
    )
    assert [name for name in shown if word(name) not in page] == []
    assert (
        "cafÃ©" in page
        and "e-mail: " in page
        and "[e-mail]" in page
        and "[aws key]" in page
        and not [one for one in MASKED if one in page]
    )
    assert "explain to a child of ten years" in page.lower() and "Thank you for asking" in page and MISSING not in page
    page = (ran.root / "data/pages/preferences/report.html").read_text(encoding="utf-8")
    assert word("pair") in page and MASKED[0] not in page and MISSING not in page


def test_the_training_page_shows_the_examples(ran: SimpleNamespace) -> None:
    audit = json.loads((ran.root / "data/tokenized/audit.json").read_text())
    assert all("planted" in "".join(piece.text for piece in one.pieces) for one in trained_examples(ran.root, audit))


def test_a_page_says_so_where_the_rows_are_gone_or_are_others(ran: SimpleNamespace, tmp_path: Path) -> None:
    for change in ("gone", "others"):
        root = tmp_path / change
        shutil.copytree(ran.root, root)
        if change == "gone":
            for name in ("raw_examples", "splits", "sources"):
                shutil.rmtree(root / "data" / name)
            for shard in (root / "data/instructions").glob("records-*"):
                shard.unlink()
        else:
            jsonl(root / SOURCE, *({"messages": [{"role": "user", "content": f"New {i}"}]} for i in range(len(rows()))))
            read = parse(raw_examples.Params, {"sources": [{"path": SOURCE}]}, "raw_examples")
            shutil.rmtree(root / "data/raw_examples")
            raw_examples.produce(root, read, root / "data/raw_examples")
        draw_pages(
            "instructions",
            ran.reports["instructions"],
            root / "data/instructions",
            root / "data/pages/instructions",
            root,
        )
        page = (root / "data/pages/instructions/report.html").read_text(encoding="utf-8")
        assert str(escape(MISSING)) in page and f"{SOURCE}:0" in page and "New 1" not in page
        assert word("empty") not in page  # a dropped row, which only the data as read have


def test_the_command_check_quotes_the_rows_of_the_file(ran: SimpleNamespace) -> None:
    done = pedigree(ran.root, "check", str(ran.root / SOURCE), "--report", str(ran.root / "check.html"))
    assert word("duplicate") in done.stdout and MASKED[0] not in done.stdout, done.stderr
    assert 'most frequent openings: "in a"' in done.stdout
    page = (ran.root / "check.html").read_text(encoding="utf-8")
    assert word("near") in page and word("empty") in page and not [one for one in MASKED if one in page]
