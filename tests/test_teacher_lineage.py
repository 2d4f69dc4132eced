"""A model that was distilled names its teacher: in the audit, in what is
exported, and to who asks by the hash of a file of the teacher."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from builders.history import Project, entry, identity, out

from dagster_project.core.errors import InputError
from dagster_project.lineage.export.cyclonedx import cyclonedx
from dagster_project.lineage.export.eu_summary import eu_summary
from dagster_project.lineage.export.export import summarize
from dagster_project.lineage.export.model_card import model_card
from dagster_project.lineage.export.spdx import spdx
from dagster_project.lineage.export.summary import from_reports
from dagster_project.lineage.impact.question import impact
from dagster_project.lineage.impact.text import as_text
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import as_text as audit_text
from dagster_project.lineage.lineage import audit, find
from dagster_project.lineage.signing import provenance
from dagster_project.lineage.signing.claims import contradictions, read
from dagster_project.training.trainers.alignment import teacher
from dagster_project.views.lineage import _details

WEIGHTS, CONFIG = "a1" * 32, "c2" * 32
TEACHER = {
    "folder": "models/large one",
    "license": "GPL-3.0-only",
    "sha256": {"model.safetensors": WEIGHTS, "config.json": CONFIG},
}
SETTINGS: dict[str, Any] = {"method": "gkd", "adapter": "lora", "options": {"teacher": TEACHER}}
PAIRS = "data/sources/pairs.jsonl"


@pytest.fixture
def made(tmp_path: Path) -> Project:
    """aligned@student is distilled, aligned@dpo is not."""
    project = Project(tmp_path / "project")
    lock = project.lock([("cats", "train", "data/sources/faq.jsonl")]) | project.splits(
        [("mice", "train", PAIRS)], "preferences"
    )
    reads = {"data/preferences": out(lock, "preferences"), "data/merged/lora": out(lock, "merged@lora")}
    for name, settings in (("student", SETTINGS), ("dpo", {"method": "dpo", "adapter": "lora"})):
        lock[f"aligned@{name}"] = entry(
            f"aligned@{name}", reads, project.put({"adapter_model.safetensors": name.encode()})
        )
        lock[f"aligned@{name}"]["params"] = {"params.yaml": {f"aligned.{name}": settings}}
        inputs = {"data/merged/lora": out(lock, "merged@lora"), f"data/aligned/{name}": out(lock, f"aligned@{name}")}
        lock[f"merged_aligned@{name}"] = entry(
            f"merged_aligned@{name}", inputs, project.put({"model.safetensors": f"all {name}".encode()})
        )
    project.commit(lock)
    return project


@pytest.mark.parametrize("stage", ["aligned", "merged_aligned"])
def test_an_audit_names_the_teacher_and_its_hashes(made: Project, stage: str) -> None:
    found = audit(made.root, f"{stage}@student")
    assert found["teachers"] == [{"training": "aligned@student", **TEACHER}]
    line = f"models/large one, GPL-3.0-only, learned from by aligned@student, sha256 {WEIGHTS}"
    assert f"teacher    {line}" in audit_text(found) and ("teacher", line) in _details(found)
    other = audit(made.root, f"{stage}@dpo")
    assert "teachers" not in other and "\nteacher  " not in audit_text(other)


@pytest.mark.parametrize("name", ["student", "dpo"])
def test_exports_name_the_teacher(made: Project, name: str) -> None:
    summary = summarize(find(Index(made.root), f"merged_aligned@{name}")) | {"provider": {}, "data_sets": {}}
    bom, eu, card = (export(summary, date(2026, 1, 2)) for export in (cyclonedx, eu_summary, model_card))
    document, distilled = json.loads(bom), name == "student"
    parts = {part["bom-ref"]: part for part in document["components"] if part["bom-ref"].startswith("teacher:")}
    tasks = {task["name"]: json.dumps(task["inputs"]) for task in document["formulation"][0]["workflows"][0]["tasks"]}
    limits = " ".join(document["metadata"]["component"]["modelCard"]["considerations"]["technicalLimitations"])
    assert (
        "teacher:aligned@student" in parts,
        '"teacher:' in tasks[f"aligned@{name}"],
        "learned from models/large one" in limits,
    ) == (distilled,) * 3
    if distilled:
        found = {one["name"]: one["value"] for one in parts["teacher:aligned@student"]["properties"]}
        assert parts["teacher:aligned@student"]["name"] == TEACHER["folder"]
        assert parts["teacher:aligned@student"]["licenses"] == [{"license": {"id": TEACHER["license"]}}]
        assert found == {"pedigree:sha256:model.safetensors": WEIGHTS, "pedigree:sha256:config.json": CONFIG}
    graph = json.loads(spdx(summary, date(2026, 1, 2)))["@graph"]
    packages = {one["spdxId"]: one for one in graph if one["type"] == "ai_AIPackage"}
    (whole,) = [one for one in packages.values() if one["name"] == f"merged_aligned@{name}"]
    parents = {
        packages[to]["name"]: [digest["hashValue"] for digest in packages[to]["verifiedUsing"]]
        for one in graph
        if one["type"] == "Relationship"
        and one["relationshipType"] == "descendantOf"
        and one["from"] == whole["spdxId"]
        for to in one["to"]
    }
    assert parents == ({TEACHER["folder"]: [WEIGHTS]} if distilled else {})
    synthetic = eu[eu.index("### 2.5") : eu.index("### 2.6")]
    assert (
        "- **Used:** yes" in synthetic and WEIGHTS in synthetic,
        f"distillation by aligned@{name}" in eu[: eu.index("## 2")],
    ) == (distilled,) * 2
    assert ("license_name: GPL-3.0-only" in card) == distilled, "the most restrictive one, of what it was made from"
    assert (
        f"aligned@{name} is distilled from the larger model models/large one" in card and WEIGHTS in card
    ) == distilled


def test_its_weights_are_compared_with_those_of_the_teacher_and_not_of_the_base_model(made: Project) -> None:
    base = {"origin": "models/base", "sha256": {"model.safetensors": "b3" * 32}}
    summary = summarize(find(Index(made.root), "merged_aligned@student")) | {
        "provider": {},
        "data_sets": {},
        "base_model": base,
    }
    bill = spdx(summary, date(2026, 1, 2))
    for text, wrong in ((bill, []), (bill.replace(WEIGHTS, "d4" * 32), ["exports/model.spdx.json"])):
        texts = {"audit/audit.json": json.dumps(summary), "exports/model.spdx.json": text}
        found, _ = contradictions({name: read(name, content.encode()) or () for name, content in texts.items()})
        assert list(found) == wrong and all("teacher of aligned@student" in one for one in found.values())


def test_a_card_that_a_stage_writes_from_reports_names_it_too() -> None:
    reports = {"aligned@student": {"adapter": "lora", "teacher": TEACHER}, "aligned@dpo": {"adapter": "lora"}}
    for name in ("student", "dpo"):
        card = model_card(from_reports("release", reports, released=name))
        assert (WEIGHTS in card) == (name == "student")


def test_a_statement_has_the_hashes_of_the_teacher_among_what_was_read_and_is_read_again() -> None:
    read = {"cmd": "run", "deps": [], "outs": [], "params": {"params.yaml": {"aligned.student": SETTINGS}}}
    said = provenance.statement(provenance.StageRecord("aligned@student", read, "", {}, {}, {}))
    found = {one["uri"]: one["digest"] for one in said["predicate"]["buildDefinition"]["resolvedDependencies"][1:]}
    assert found == {
        "file:models/large%20one/config.json": {"sha256": CONFIG},
        "file:models/large%20one/model.safetensors": {"sha256": WEIGHTS},
    }
    assert provenance._attested(said).read == {}


def test_the_hash_of_a_file_of_the_teacher_finds_what_was_distilled_from_it(made: Project) -> None:
    found = impact(made.root, content=WEIGHTS[:16])
    assert found["verdict"] == "yes" and {one["stage"] for one in found["models"]} == {
        "aligned@student",
        "merged_aligned@student",
    }
    text = as_text(found)
    assert text.count("distilled from it") == 2 and "is this model" not in text
    assert {one["stage"] for one in impact(made.root, record=identity("mice"))["models"]} == {
        f"{stage}@{name}" for stage in ("aligned", "merged_aligned") for name in ("student", "dpo")
    }
    with pytest.raises(InputError, match="no output, file of one, or source in history has this hash"):
        impact(made.root, content="f" * 16)


def test_a_teacher_that_a_stage_of_this_project_makes_is_refused_because_lineage_would_not_name_its_records(
    tmp_path: Path,
) -> None:
    for folder in ("data/merged/big", "models/big"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_bytes(b"x")
    hashes = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
    with pytest.raises(
        InputError, match=r"aligned\.x\.options\.teacher\.folder: data/merged/big is the output of a stage"
    ):
        teacher.locate(teacher.Teacher(folder="data/merged/big", sha256=hashes), tmp_path, "aligned.x.options.teacher")
    assert teacher.locate(teacher.Teacher(folder="models/big", sha256=hashes), tmp_path, "x").name == "big"
