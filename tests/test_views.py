"""Pages are drawn from documents: an edit of a view or the planner makes
nothing stale, and pages render without a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import grimp
import pyarrow as pa
import pytest
from builders.small_pipeline import PIPELINE, changed_in_dvc
from conftest import ROOT, pedigree

from dagster_project import pipeline
from dagster_project.commands.render import _render
from dagster_project.core.context import Documents
from dagster_project.core.layout import measured_path, report_of
from dagster_project.core.records import write_json, write_table, write_text
from dagster_project.orchestration.integrity import sha256_of
from dagster_project.orchestration.run_stage import run_stage
from dagster_project.training.trainers.harness.checkpoint import code_of
from dagster_project.views.alignment import draw_alignment
from dagster_project.views.ballot import ballot_page
from dagster_project.views.comparison import Sample, comparison_page
from dagster_project.views.conversations import conversation
from dagster_project.views.data_quality import data_quality_page
from dagster_project.views.exports import exports_page
from dagster_project.views.lineage import _diagram, lineage_page
from dagster_project.views.trained_examples import Piece, TrainedExample
from dagster_project.views.training import training_page

PACKAGE = ROOT / "dagster_project"
DRAWN_OR_PLANNED = [*sorted((PACKAGE / "views").rglob("*")), *sorted((PACKAGE / "training" / "planning").iterdir())]
FILES = [path.relative_to(ROOT) for path in DRAWN_OR_PLANNED if path.is_file() and path.suffix != ".pyc"]


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("dagster_project", cache_dir=None)


@pytest.mark.parametrize("stage", list(pipeline.STAGES))
def test_a_stage_reaches_no_view_and_no_planner_by_its_imports(stage: str, graph: grimp.ImportGraph) -> None:
    reached = graph.find_upstream_modules(pipeline.module_of(stage).__name__)
    assert [m for m in reached if m.startswith(("dagster_project.views", "dagster_project.training.planning"))] == []


def test_an_edit_of_any_view_or_planner_changes_neither_dvc_status_nor_checkpoint_identity(finished: Path) -> None:
    assert changed_in_dvc(finished) == set()
    package = finished / "dagster_project"

    def identities() -> list[list[bytes]]:
        return [
            [path.read_bytes() for path in code_of(package / "stages" / f"{stage}.py", package)]
            for stage in ("adapter", "reward_model", "aligned")
        ]

    before = identities()
    for file in FILES:
        comment = {".css": "/* edited */", ".js": "/* edited */", ".jinja": "{# edited #}"}.get(file.suffix, "# edited")
        with (finished / file).open("a") as opened:
            opened.write(f"\n{comment}\n")
    assert identities() == before
    assert changed_in_dvc(finished) == set()


@pytest.mark.usefixtures("warm_small")
def test_pages_are_rendered_without_running_a_stage(finished: Path) -> None:
    pages = sorted((finished / "data/pages").rglob("*.html"))
    names = {
        str(page.relative_to(finished / "data/pages"))
        for page in pages
        if page.name != "audit.html" and "data_docs" not in page.parts
    }
    expected = {
        "instructions/report.html",
        "preferences/report.html",
        "adapter/lora/training.html",
        "aligned/dpo/alignment.html",
        "comparison/comparison.html",
    }
    assert names == expected
    before = {name: (finished / "data/pages" / name).read_bytes() for name in names}
    for name in names:
        (finished / "data/pages" / name).unlink()
    lock = (finished / "dvc.lock").read_bytes()
    done = pedigree(finished, "render", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["pages"]) == {f"data/pages/{name}" for name in names} and result["skipped"] == {}
    assert {name: (finished / "data/pages" / name).read_bytes() for name in names} == before
    assert (finished / "dvc.lock").read_bytes() == lock and changed_in_dvc(finished) == set()


@pytest.mark.usefixtures("warm_small")
def test_rendering_names_pages_it_cannot_draw(finished: Path) -> None:
    (finished / "data/pages/comparison/samples.json").unlink()
    done = pedigree(finished, "render", "comparison", "--json")
    assert done.returncode == 0
    assert "not on this machine" in json.loads(done.stdout)["skipped"]["comparison"]
    for stage, message in (("splits", "splits has no pages"), ("nothing", "nothing is not a stage of dvc.yaml")):
        refused = pedigree(finished, "render", stage)
        assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr


def test_pages_are_not_drawn_from_documents_of_two_versions(tmp_path: Path) -> None:
    out, page = tmp_path / "data/comparison", tmp_path / "data/pages/comparison/comparison.html"
    write_json(out / "comparison.json", {})
    report = {"passed": True, "output_sha256": sha256_of(out)}
    write_json(tmp_path / "data/reports/comparison.json", report)
    write_json(page.with_name("measured.json"), {"output_sha256": "0" * 64})
    reason, drawn = _render(tmp_path, "comparison", out)
    assert "its latest run on this machine made another output" in reason and not drawn, (
        "samples.json there is of that run"
    )
    write_json(tmp_path / "data/reports/comparison.json", {**report, "output_sha256": "1" * 64})
    reason, drawn = _render(tmp_path, "comparison", out)
    assert "its report is of another output than data/comparison" in reason and not drawn, (
        "after `git checkout` without `dvc checkout`"
    )


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (None, "it has not run yet"),
        (True, "data/comparison is missing: `dvc repro comparison`"),
        (False, "failed a blocking check"),
    ],
)
def test_a_page_whose_output_is_missing_is_not_drawn(report: bool | None, expected: str, tmp_path: Path) -> None:
    """A clone has reports, which git tracks, and no outputs."""
    if report is not None:
        write_json(tmp_path / "data/reports/comparison.json", {"passed": report, "output_sha256": "0" * 64})
    reason, drawn = _render(tmp_path, "comparison", tmp_path / "data/comparison")
    assert expected in reason and not drawn


def test_pages_of_a_run_have_the_hash_of_its_output(root: Path) -> None:
    write_text(root / "data/pages/tok/report.html", "drawn by the stage")
    run_stage(root, "tok", PIPELINE)
    report = json.loads((root / report_of("tok")).read_bytes())
    assert json.loads(measured_path(root, "tok").read_bytes()) == {"output_sha256": report["output_sha256"]}


def test_documents_of_another_version_are_one_message(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text('stages: {comparison: {cmd: "true", outs: [data/comparison]}}')
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    for name, document in {
        "reports/comparison.json": {"passed": True},
        "comparison/comparison.json": {"systems": {}},
        "pages/comparison/samples.json": {"samples": [], "trained": {}, "headline": ""},
    }.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(json.dumps(document))
    refused = pedigree(tmp_path, "render", "comparison")
    said = "the documents of comparison are not as this version of pedigree-llm writes them (KeyError: 'scores')"
    assert refused.returncode == 2 and refused.stderr.splitlines() == [
        f"error: {said}",
        "hint: run it again: `dvc repro --force --single-item comparison`",
    ]
    assert json.loads(pedigree(tmp_path, "render", "--json").stdout)["skipped"] == {"comparison": said}


HOSTILE = (
    "</script></style></svg><script>alert(1)</script><img src=x onerror=alert(1)>\" onload='alert(1)' {{ 7*7 }}{% raw"
    " %}\x1b[31m\u202e\ud800\x00"
)
Text = Callable[[str], str]


def rich(text: Text) -> dict[str, Any]:
    """A record with text in every optional field."""
    called = {
        "type": "function",
        "id": text("call_1"),
        "function": {"name": text("weather"), "arguments": {text("city"): text("Oslo")}},
    }
    unparsed = {"type": "function", "function": {"name": text("time"), "arguments": text("{")}}
    messages = [
        {"role": text("user"), "content": text("hi"), "name": text("Ann")},
        {
            "role": "assistant",
            "content": text("a"),
            "reasoning_content": text("why"),
            "tool_calls": [called, unparsed],
            "weight": 0.0,
        },
        {"role": "tool", "content": text("b") * 99, "tool_call_id": text("call_1"), "name": text("weather")},
    ]
    tools = [
        {"type": "function", "function": {"name": text("weather"), "description": text("of a city")}},
        {"name": text("time"), "definition": text("{")},
    ]
    return {"messages": messages, "tools": tools, "chosen": messages[1:2], "rejected": messages[1:2], "left_out": 2}


def quality(text: Text, tmp_path: Path) -> str:
    match = {
        "row": 1,
        "place": text("a"),
        "other": text("b"),
        "part": text("prompt"),
        "rule": text("equal"),
        "score": 1.0,
        "text": text("one"),
        "span": [0, 3],
        "other_text": text("two"),
        "other_span": [0, 3],
    }
    finding = {
        "check": text("pii"),
        "severity": "error",
        "count": 40,
        "dropped": 1,
        "waived": 1,
        "elsewhere": 0,
        "fixed": 1,
        "rows": [1, 2],
        "places": [text("a"), text("b")],
        "examples": [text("c")],
        "truth": text("d"),
        "note": text("e"),
        "next": text("f"),
        "matches": [match],
        "conversations": [rich(text), None],
    }
    bins = [{"from": 0.0, "to": 1.0, "rows": 1, "pairs": 2, "near": 1}]
    counts = {text("name"): 3}
    found = {
        "name": text("a"),
        "format": text("b"),
        "rows": 9,
        "kept": 7,
        "dropped": counts,
        "fixed": counts,
        "findings": [finding],
        "conversations": [{"place": text("a"), **rich(text)}],
        "notes": {text("quiet"): text("note")},
        "similarity": {
            "gate": {text("gate"): 0.5},
            "histogram": bins,
            "boilerplate": [{"text": text("phrase"), "rows": 2}],
        },
        "profile": {
            "categories": counts,
            "sources": counts,
            "scripts": counts,
            "roles": counts,
            "lengths": {text("prompt"): {"unit": text("words"), "max": 3, "median": 1, "histogram": bins}},
            "diversity": {text("distinct"): 0.5, "top_openings": counts, "top_responses": counts},
        },
    }
    entry = {"place": text("p"), "text": text("t"), "before": f"a {text('x')} b", "after": f"a {text('y')} b"}
    changes = {
        "previous": text("HEAD"),
        "rows": {},
        "examples": {kind: [entry] for kind in ("added", "removed", "changed")},
        "findings": {
            kind: [{"check": text("pii"), "count": 1, "before": 1, "after": 2}] for kind in ("new", "gone", "changed")
        },
    }
    reading = {
        "sources": {text("a"): {"rows": 1, "license": text("MIT"), "declared": declared(text)}}, "use_policy": {},
        "checks": {"use_policy": {"passed": False, "note": text("no"), "violations": [violation(text)]}},
    }  # fmt: skip
    return data_quality_page(found, changes, reading=reading)


def training(text: Text, tmp_path: Path) -> str:
    document = {
        "loss": {"first": 2.0, "last": 1.0},
        "validation": [],
        "steps": 1,
        "planned_steps": 1,
        "tokens": 1,
        "trained_tokens": 1,
        "settings": {"method": text("lora"), text("name"): [text("value")]},
        "dtype": text("float32"),
        "device": text("cpu"),
        "seed": 7,
        "threads": 2,
        "versions": {text("torch"): text("2")},
        "frozen": {"sha256_before": "a", "sha256_after": "a", "tensors": 2},
        "trained": {text("lora_A"): {"tensors": 1, "moved": 1, "norm_of_change": 0.1}},
    }
    pieces = [
        Piece(text("user"), None),
        Piece(text("answer"), 1.0),
        Piece(text("category"), 16.0),
        Piece(text("rest"), 0.0),
    ]
    examples = [TrainedExample(text("a:1"), pieces, "9 tokens", conversation(rich(text)))]
    measured = {"peak_memory_bytes": 2e9}
    return training_page(
        text("lora"), document, [{"step": 1, "loss": 2.0}], measured, {text("weights"): 10**9}, examples
    )


def stored_text(text: str) -> str:
    """Parquet holds UTF-8."""
    return text.replace("\ud800", "")


def alignment(text: Text, tmp_path: Path) -> str:
    pair = {"sft": 1.0, "aligned": 2.0, "difference": 1.0, "interval": [0.0, 2.0]}
    watch = {
        "reward": pair,
        "win_rate": {"value": 0.5},
        "tokens": pair,
        "distinct": pair,
        "unfinished": pair,
        "kl_per_token": 0.1,
        "prompts": 1,
    }
    metrics = {
        "watch": watch, "preference": {"accuracy": pair}, "method": text("dpo"), "adapter": text("lora"),
        "checks": {"reward_model_is_reliable": {"passed": False, "note": text("note")}},
    }  # fmt: skip
    row = {f"{who}_{what}": 1.0 for who in ("sft", "aligned") for what in ("reward", "tokens")}
    stored = {name: stored_text(text(name)) for name in ("prompt", "sft_answer", "aligned_answer")}
    rows = [{**row, **stored}]
    write_table(tmp_path / "out" / "samples.parquet", rows, pa.Table.from_pylist(rows).schema)
    (tmp_path / "pages").mkdir()
    own = stored_text(text("own.py:f"))
    answer = {"step": 1, "example_id": "a", "reward": 1.0, own: 1.0, "tokens": 3, "unfinished": True}
    sampled = [{**answer, "answer": stored_text(text("sampled")), "reasoning": stored_text(text("trace"))}]
    write_table(tmp_path / "out" / "answers" / "answers-00000.parquet", sampled, pa.Table.from_pylist(sampled).schema)
    history = {"curve": [{"step": 1, "reward": 1.0, own: 1.0}], "signs": [text("sign")], "components": [own]}
    (tmp_path / "pages" / "history.json").write_text(json.dumps(history))
    draw_alignment(Documents(tmp_path, f"aligned@{text('dpo')}", tmp_path / "out", tmp_path / "pages", metrics))
    return (tmp_path / "pages" / "alignment.html").read_text()


def comparison(text: Text, tmp_path: Path) -> str:
    systems, label = [text("lora"), text("few_shot")], {"n": 2, "f1": 0.5}
    score = {
        "n": 8,
        "macro_f1": 0.5,
        "macro_f1_interval": [0.4, 0.6],
        "accuracy": 0.5,
        "by_label": {text("login"): label},
    }
    change = {"base": 0.5, "tuned": 0.6, "difference": 0.1, "interval": [0.0, 0.2]}
    retention = {"accuracy": change, "gold_log_likelihood": change, "questions": 9}
    document = {
        "headline": text("Use it."),
        "advice": [text("advice")],
        "test": {"examples": 9, "answered": 8, "seen": 1},
        "shown": ["macro_f1", "accuracy"],
        "recommended": {"variant": systems[0], "sure": True, "why": text("why")},
        "scores": dict.fromkeys(systems, score),
        "compared": {
            systems[0]: {
                "retention": {"overall": retention, text("subject"): retention},
                "failed_checks": [text("check")],
            }
        },
        "costs": {systems[0]: {"prompt_tokens": 40.0, "bytes": 1, "tokens": 9}, systems[1]: {}},
    }
    answers = {name: (text("answer"), 0.0) for name in systems}
    return comparison_page(document, [Sample(text("prompt"), text("reference"), text("category"), answers)], {})


def declared(text: Text) -> dict[str, Any]:
    return {
        "category": "public",
        "collected": {"from": text("2024")},
        "generator": text("model"),
        "purposes": [text("one"), text("two")],
    }


def violation(text: Text) -> dict[str, Any]:
    return {"source": text("a"), "rows": 3, "rule": "licenses", "why": text("license MIT is not allowed")}


def lineage(text: Text, tmp_path: Path) -> str:
    source = {
        "rows": 1,
        "format": text("alpaca"),
        "license": text("MIT"),
        "origin": text("web"),
        "declared": declared(text),
        "outcomes": {text("kept"): {text("kept"): 1}},
    }
    check = {"passed": False, "severity": text("error"), "count": 1, "note": text("note")}
    stage = {
        "md5": text("abc"),
        "parents": [],
        "output": text("data"),
        "rows_in": 1,
        "rows_out": 0,
        "dropped": {text("pii"): 1},
        "checks": {text("pii"): check},
    }
    part = {"records": 1, "views": 1, "steps": 1, "epochs": 1}
    found = {
        "model": {"stage": text("adapter"), "path": text("data/a"), "md5": text("abc")},
        "parents": [],
        "sources": {text("a.json"): source},
        "read_by": {text("a.json"): [text("adapter")]},
        "stages": {text("adapter"): stage},
        "records": {"records": 1, "learnt_by": {text("adapter"): part}},
        "missing": [{"path": text("a"), "md5": text("b"), "fetch": text("dvc pull")}],
        "shallow": True,
        "waivers": [{"reason": text("because")}],
        "parameters": {text("adapter.lora"): {text("r"): text("4")}},
        "other_values": {text("seed"): [{"value": text("1"), "stages": [text("splits")]}]},
        "metrics": {text("adapter"): {text("loss"): text("1")}},
        "other_files": {text("b.jsonl"): {"md5": text("abc"), "license": text("MIT"), "stages": [text("splits")]}},
        "watched": {
            "stages": {text("release"): stage},
            "sources": {text("c.jsonl"): source},
            "other_files": {
                text("d.jsonl"): {"md5": text("abc"), "license": text("MIT"), "stages": [text("evaluation")]}
            },
        },
        "code": {"commit": None, "lineage_at": None, "after": text("abc"), "files": {text("a.py"): text("abc")}},
        "environment": {text("torch"): text("2")},
        "other_versions": {text("torch"): [{"value": text("1"), "stages": [text("adapter")]}]},
        "base_model": {"origin": text("hub"), "license": text("MIT"), "sha256": {"model.safetensors": text("abc")}},
        "chat_template": {"name": text("chatml"), "sha256": text("abc")},
    }
    found["use_policy"] = {
        "policy": {"as_of": text("2026-01-01")},
        "violations": [violation(text)],
        "waiver": {"expires": text("2027"), "reason": text("why")},
    }
    record = {
        "example_id": text("abc"),
        "source": text("a.json"),
        "source_row": 1,
        "model": text("adapter"),
        "steps": [1],
        "epochs": [1],
    }
    return lineage_page(found, [record])


def ballot(text: Text, tmp_path: Path) -> str:
    prompt = [{"role": text("user"), "content": text("hi")}]
    return ballot_page(
        {
            "ballot": text("abc"),
            "seal": text("def"),
            "pairs": [{"id": text("1"), "prompt": prompt, "answers": [text("a"), text("b")]}],
        }
    )


def exports(text: Text, tmp_path: Path) -> str:
    facts = {name: text(name) for name in ("file", "format", "shows", "shows_not", "sha256", "compared")}
    model = {"stage": text("merged@lora"), "md5": text("0.dir"), "sha256": text("1")}
    signed = {
        "attestations": {"file": text("a"), "sha256": text("e"), "stages": [text("raw")], "remade": text("identical")},
        "signature": {"file": text("b"), "public_key": text("c"), "key": text("d")},
    }
    release = [
        {"file": name, "compared": text("rows")}
        for name in ("README.md", f"audit/{text('lora')}/training.json", text("other"))
    ]
    missing = [{name: text(name) for name in ("name", "why", "next")}]
    document = {
        "model": model,
        "issued": text("2026-01-31"),
        "commit": text("abc"),
        "exports": [facts],
        "missing": missing,
        "release": release,
    }
    return exports_page({**document, **signed})


def test_the_page_of_an_audit_lists_files_that_were_only_watched(tmp_path: Path) -> None:
    page = lineage(lambda text: text, tmp_path)
    watched = page[page.index('<section id="watched"') :].partition("</section>")[0]
    assert all(f'<bdi dir="auto">{name}</bdi>' in watched for name in ("release", "c.jsonl", "d.jsonl"))


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes, and its text without style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))
        self.text += " ".join(value or "" for name, value in attrs if name not in {"class", "content"})

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] not in {"style", "script"}:
            self.text += data


@pytest.mark.parametrize("page", [quality, training, alignment, comparison, lineage, ballot, exports])
def test_hostile_text_in_any_field_of_any_page_stays_text(page: Callable[[Text, Path], str], tmp_path: Path) -> None:
    hostile = page(lambda text: text + HOSTILE, tmp_path / "a")
    harmless = page(lambda text: text + "w" * len(HOSTILE), tmp_path / "b")
    assert Elements(hostile).found == Elements(harmless).found, "text made an element or an attribute"
    assert "<img" not in hostile and not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800]", hostile)
    body = hostile[hostile.index("<body>") :]
    assert "{{ 7*7 }}" in body and "49" not in re.sub("[0-9.]{3,}", "", Elements(body).text)


@pytest.mark.parametrize(("sources", "width"), [(3, "100%"), (20, "3200")])
def test_boxes_of_the_lineage_have_room_for_their_text(sources: int, width: str) -> None:
    """Names of many sources lay over each other. On a narrow screen the style
    sheet keeps the diagram wide, and it scrolls."""
    paths = [f"data/sources/{i}.jsonl" for i in range(sources)]
    document = {
        "model": {"stage": "raw_examples"},
        "parents": [],
        "sources": {path: {"rows": 1, "license": "MIT"} for path in paths},
        "read_by": {path: ["raw_examples"] for path in paths},
        "stages": {"raw_examples": {"parents": [], "md5": "0" * 32, "output": "data/raw_examples"}},
    }
    assert _diagram(document).plot.width == width
