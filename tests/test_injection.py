"""Texts of rows stay texts wherever they are shown or written: pages, Markdown,
CSV files, metadata of Dagster, terminal.

One run of the small pipeline on rows that hold every payload in every field, and in the
name of their file; then every artifact is read by a parser that is not the project's.
Pages that this run does not draw have the same test on documents (test_views).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mistune
import pytest
from builders.files import jsonl
from conftest import draw_pages, evaluate
from markdown_it import MarkdownIt

from dagster_project import __main__ as command_line
from dagster_project.core.params import parse
from dagster_project.core.records import Report, read_records
from dagster_project.core.text import cell, markdown
from dagster_project.evaluation.evaluator import Settings
from dagster_project.lineage.export.model_card import model_card
from dagster_project.lineage.export.summary import from_reports
from dagster_project.orchestration.dagster import metadata
from dagster_project.stages import instructions, raw_examples, splits, tokenized

MARK = "zqx"
"""Is in every payload, so that an artifact without it shows that the payload did not get there."""
NAME = (
    f"=1+1 {MARK}<img src=x"
    " onerror=alert(1)>[a](evil.example)![b](evil.example)`|www.evil.example\x1b[31m\x9b2J\u202e\\"
)
"""Also the name of a file: without slashes."""
PAYLOAD = (
    f"{NAME}</script></style><script>alert(1)</script>\" onload='alert(1)' http://evil.example/"
    f" <http://evil.example>\n# {MARK}\n\n- x\r"
)
FORMULA = ("=", "+", "-", "@", "\t", "\r")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def rows() -> list[dict[str, Any]]:
    """Plain rows whose answer is a label, rows with tools, and rows that checks drop or ask a person about."""
    subjects = [
        "kites",
        "hedges",
        "lamps",
        "boots",
        "parcels",
        "gloves",
        "heaters",
        "spades",
        "seeds",
        "ladders",
        "buckets",
        "hoses",
    ]
    labels = [f"{PAYLOAD} {i % 2}" for i in range(len(subjects))]
    plain = [
        {
            "messages": [
                {"role": "system", "content": f"{PAYLOAD} rules"},
                {"role": "user", "content": f"{PAYLOAD} asks about {subject} that {subject[::-1]} needs"},
                {"role": "assistant", "content": label},
            ],
            "category": label,
            "id": f"{PAYLOAD} {subject}",
            f"{PAYLOAD} field": PAYLOAD,
        }
        for subject, label in zip(subjects, labels, strict=True)
    ]
    function = {
        "name": PAYLOAD,
        "description": PAYLOAD,
        "parameters": {"type": "object", "properties": {PAYLOAD: {"type": "string"}}},
    }
    called = {
        "type": "function",
        "id": PAYLOAD,
        "function": {"name": PAYLOAD, "arguments": json.dumps({PAYLOAD: PAYLOAD})},
    }
    tools = {
        "messages": [
            {"role": "user", "content": f"{PAYLOAD} calls"},
            {"role": "assistant", "content": PAYLOAD, "tool_calls": [called], "reasoning_content": PAYLOAD},
            {"role": "tool", "content": PAYLOAD, "tool_call_id": PAYLOAD, "name": PAYLOAD},
            {"role": "assistant", "content": PAYLOAD, "name": PAYLOAD},
        ],
        "tools": [{"type": "function", "function": function}],
        "category": PAYLOAD,
    }
    broken = {
        "messages": [{"role": PAYLOAD, "content": PAYLOAD}, {"role": "assistant", "content": PAYLOAD}],
        "category": PAYLOAD,
    }
    private = {
        "messages": [
            {"role": "user", "content": f"{PAYLOAD} ann@{MARK}.org"},
            {"role": "assistant", "content": f"{PAYLOAD} x"},
        ]
    }
    question = {"role": "user", "content": f"=A1 {MARK} {PAYLOAD} which?"}
    conflicting = [
        {"messages": [question, {"role": "assistant", "content": f"@SUM(1) {MARK} {answer}"}]}
        for answer in ("one", "two")
    ]
    return [*plain, tools, broken, private, *conflicting, plain[0]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> SimpleNamespace:
    """The stages of the small pipeline on these rows: the folder of all artifacts, and the reports."""
    root = tmp_path_factory.mktemp("injection")
    jsonl(root / "data/sources" / MARK / f"{NAME}.jsonl", *rows())
    read = parse(
        raw_examples.Params, {"sources": [{"path": f"data/sources/{MARK}", "license": PAYLOAD}]}, "raw_examples"
    )
    reports: dict[str, Report] = {"raw_examples": raw_examples.produce(root, read, root / "data/raw_examples")}
    checked, pages = root / "instructions", root / "pages/instructions"
    rules = parse(
        instructions.Params, {"policy": {"encoding": "warn"}}, "instructions"
    )  # by default it drops control characters
    reports["instructions"] = instructions.produce(
        root, rules, root / "data/raw_examples", tiny_model, checked, pages, {}
    )
    draw_pages("instructions", reports["instructions"], checked, pages, root)
    (root / "dealt").mkdir()
    reports["splits"] = splits.produce(root, splits.Params(test=0.4, validation=0.2), 1, checked, root / "dealt/splits")
    reports["tokenized"] = tokenized.produce(
        root, tokenized.Params(max_length=1024), 1, root / "dealt/splits", tiny_model, root / "tokenized"
    )
    plain = [
        {**record, "group_id": record["example_id"]}
        for record in read_records(checked)
        if record["category"] != PAYLOAD
    ]
    labelled = [record for record in plain if record["category"]]
    settings = parse(Settings, {"task": {"labels": "auto"}, "max_new_tokens": 2, "max_examples": 4}, "evaluation")
    scored = evaluate(root, tiny_model, settings, labelled[:4], labelled[4:])
    documents = {
        "base_model": {"origin": PAYLOAD, "license": PAYLOAD},
        **{name: report.document() for name, report in reports.items()},
    }
    documents |= {"evaluation@one": scored["one"], "comparison": {"advice": scored["advice"]}}
    (root / "README.md").write_text(model_card(from_reports("merged@one", documents)))
    return SimpleNamespace(root=root, reports=documents, model=tiny_model)


class Elements(HTMLParser):
    """Elements with their attributes, and text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def refuse_active_html(page: str) -> None:
    parsed = Elements(page)
    assert MARK in parsed.text
    for tag, attributes in parsed.found:
        assert tag != "img" or not (attributes.get("src") or "").startswith("x"), tag
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert not any("evil" in (attributes.get(name) or "") for name in ("href", "src", "action")), (tag, attributes)
    assert not CONTROL.search(page)


def refuse_active_markdown(text: str) -> None:
    """No link, image, code or HTML in what two libraries read, besides the code that the text is written with."""
    assert MARK in text
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    commonmark = MarkdownIt("commonmark", {"html": True}).enable("table")
    kinds = [
        (token.type, token.content) for block in commonmark.parse(body) for token in [block, *(block.children or [])]
    ]
    github = mistune.create_markdown(renderer="ast", plugins=["table", "url", "strikethrough"])(body)
    kinds += [(node["type"], str(node)) for node in _nodes(github)]
    active = [(kind, content) for kind, content in kinds if re.search("link|image|html", kind)]
    assert active == []
    assert not [content for kind, content in kinds if "code" in kind and MARK in content]
    assert not [content for kind, content in kinds if kind == "heading" and f"# {MARK}" in content]
    assert not CONTROL.search(body)


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    for node in tree:
        yield node
        yield from _nodes(node.get("children", []))


def test_no_page_has_an_element_or_attribute_from_a_row(ran: SimpleNamespace) -> None:
    pages = sorted(path for path in ran.root.rglob("*.html"))
    assert {path.name for path in pages} >= {"report.html", "comparison.html"}
    for page in pages:
        refuse_active_html(page.read_text(encoding="utf-8"))


def test_no_cell_of_a_csv_file_is_a_formula(ran: SimpleNamespace) -> None:
    files = [path for path in ran.root.rglob("*.csv") if path.parent.name != MARK]
    texts = {path.name: path.read_text(encoding="utf-8") for path in files}
    assert {name for name, text in texts.items() if MARK in text} >= {"review.csv", "one.csv"}
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            cells = [value for row in csv.reader(file) for value in row]
        assert [
            value for value in cells if value.startswith(FORMULA) and not re.fullmatch(r"-?[0-9.e+-]+", value)
        ] == []


@pytest.mark.parametrize("value", ["-1", "+1", "-0.5", "a", "", "1-2"])
def test_a_number_or_harmless_text_is_no_formula(value: str) -> None:
    assert cell(value) == value


def test_the_model_card_has_no_markup_from_a_row(ran: SimpleNamespace) -> None:
    text = (ran.root / "README.md").read_text(encoding="utf-8")
    assert all(found in text for found in ("Weakest category", "## Data", "Tuned from"))
    refuse_active_markdown(text)


def test_the_metadata_block_of_the_model_card_holds_the_license_as_text(ran: SimpleNamespace) -> None:
    from ruamel.yaml import YAML

    block = (ran.root / "README.md").read_text(encoding="utf-8").split("\n---\n")[0].removeprefix("---\n")
    assert YAML(typ="safe").load(block)["license_name"] == PAYLOAD


@pytest.mark.parametrize("stage", ["raw_examples", "instructions", "splits", "tokenized", "evaluation@one"])
def test_metadata_in_dagster_has_no_markup_from_a_row(ran: SimpleNamespace, stage: str) -> None:
    import dagster as dg

    (ran.root / "data/reports").mkdir(exist_ok=True)
    (ran.root / "data/reports/it.json").write_text(json.dumps(ran.reports[stage]))
    state = SimpleNamespace(address=stage, out="nothing", version="v", report="data/reports/it.json", meta={})
    found = metadata.describe(ran.root, state)  # type: ignore[arg-type]
    checks = ran.reports[stage].get("checks", {}).values()
    found |= {
        f"{i} {name}": one
        for i, check in enumerate(checks)
        for name, one in metadata.check_metadata(ran.root, stage, check).items()
    }
    texts = [value.value for value in found.values() if isinstance(value, dg.MarkdownMetadataValue)]
    for text in texts:
        refuse_active_markdown(f"{text}\n\n{MARK}")
    assert MARK in "".join(texts) or stage != "evaluation@one"
    tables = [value for value in found.values() if isinstance(value, dg.TableMetadataValue)]
    cells = "".join(str(value) for table in tables for record in table.records for value in record.data.values())
    assert not CONTROL.search(cells) and (MARK in cells or stage != "instructions")
    assert not [value for value in found.values() if isinstance(value, dg.UrlMetadataValue)]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_terminal_gets_no_control_character_from_a_row(
    ran: SimpleNamespace,
    as_json: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = next((ran.root / "data/sources" / MARK).iterdir())
    options = [
        "--report",
        "page.html",
        "--out",
        "clean.jsonl",
        "--dropped",
        "dropped.jsonl",
        "--show",
        "3",
        "--template",
        "chatml",
    ]
    assert command_line.main(["check", str(source), *options, *(["--json"] if as_json else [])]) == 1
    captured = capsys.readouterr()
    for text in captured:
        assert not CONTROL.search(text)
    assert MARK in captured.out
    refuse_active_html((tmp_path / "page.html").read_text(encoding="utf-8"))
    if as_json:
        assert MARK in json.dumps(json.loads(captured.out))


@pytest.mark.parametrize(
    "text",
    [PAYLOAD, "\\[a](b)", "&lt;b&gt;", "https://a.example", "ftp://a.example", "www.a.example", "``a``", "~~a~~ **a**"],
)
def test_escaped_text_is_read_back_as_it_was(text: str) -> None:
    from dagster_project.core.text import visible

    [paragraph] = mistune.create_markdown(renderer="ast", plugins=["url", "strikethrough"])(f"a {markdown(text)} b")
    assert {node["type"] for node in paragraph["children"]} == {"text"}
    shown = "".join(node["raw"] for node in paragraph["children"])
    assert shown == f"a {visible(text).replace(chr(10), ' ')} b"


def test_text_without_markup_is_unchanged() -> None:
    for text in (
        "data/sources/triage_alpaca.json",
        "hub:org/set@0123:train",
        "s3://bucket/set",
        "CC-BY-4.0",
        "accuracy 0.81 (n = 40)",
        "a_b_c",
    ):
        assert markdown(text) == text
