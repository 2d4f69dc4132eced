"""A reward model that only measures a training: what it was trained on is not
what the measured model learned from, and is named as watched."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from builders.history import Project, entry, identity, out, table

from dagster_project.lineage.export.cyclonedx import cyclonedx
from dagster_project.lineage.export.eu_summary import eu_summary
from dagster_project.lineage.export.export import summarize
from dagster_project.lineage.export.model_card import model_card
from dagster_project.lineage.impact.question import exposed_in_workspace, impact
from dagster_project.lineage.impact.text import as_text
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import as_text as audit_text
from dagster_project.lineage.lineage import audit, find
from dagster_project.lineage.signing.provenance import StageRecord, statement
from dagster_project.training.trainers.harness.weight_audit import seen_schema

FAQ, OLD, NEW = "data/sources/faq.jsonl", "data/sources/old.jsonl", "data/sources/new.jsonl"
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"method": "dpo"},
    "kto": {"method": "kto"},
    "ppo": {"method": "ppo"},
    "rules": {"method": "grpo", "rewards": {"valid_json": 1.0}},
}
WATCHED, LEARNED = {"dpo", "kto", "rules"}, {"ppo"}


@pytest.fixture
def made(tmp_path: Path) -> Project:
    """Pairs of OLD trained the reward model, then NEW replaced them: aligned
    models read NEW, and the reward model of OLD."""
    project = Project(tmp_path / "project")
    lock = project.lock([("cats", "train", FAQ)])
    before = lock | project.splits([("mice", "train", OLD), ("rats", "test", OLD)], "preferences")
    seen = [{"step": 3, "epoch": 1, "position": 0, "example_id": identity("mice")}]
    files = {"model.safetensors": b"reward", "examples.parquet": table(seen, seen_schema())}
    before["reward_model"] = entry("reward_model", {"data/preferences": out(before, "preferences")}, project.put(files))
    project.commit(before, "before")
    lock = before | project.splits([("birds", "train", NEW)], "preferences")
    reads = {
        "data/preferences": out(lock, "preferences"),
        "data/reward_model": out(lock, "reward_model"),
        "data/merged/lora": out(lock, "merged@lora"),
    }
    for name, settings in SETTINGS.items():
        lock[f"aligned@{name}"] = entry(
            f"aligned@{name}", reads, project.put({"adapter_model.safetensors": name.encode()})
        )
        lock[f"aligned@{name}"]["params"] = {"params.yaml": {f"aligned.{name}": settings}}
        inputs = {"data/merged/lora": out(lock, "merged@lora"), f"data/aligned/{name}": out(lock, f"aligned@{name}")}
        lock[f"merged_aligned@{name}"] = entry(
            f"merged_aligned@{name}", inputs, project.put({"model.safetensors": f"all {name}".encode()})
        )
    project.commit(lock, "after")
    return project


def md5_of(made: Project, address: str) -> str:
    return next(run.md5 for run in Index(made.root).runs.values() if run.address == address)


def both(names: set[str]) -> set[str]:
    return {f"{stage}@{name}" for stage in ("aligned", "merged_aligned") for name in names}


QUESTIONS: list[dict[str, str]] = [
    {"record": identity("mice")},
    {"text": "All about mice."},
    {"source": OLD},
    {"containing": "mice"},
]


@pytest.mark.parametrize("asked", QUESTIONS, ids=lambda asked: next(iter(asked)))
def test_a_pair_that_only_the_reward_model_saw_is_learned_by_ppo_and_watched_by_dpo(
    made: Project, asked: dict[str, str]
) -> None:
    found = impact(made.root, **asked)  # type: ignore[arg-type]
    assert {one["stage"] for one in found["models"]} == {"reward_model", *both(LEARNED)}
    assert {one["stage"] for one in found["watched"]} == both(WATCHED)
    for one in found["watched"]:
        name = one["stage"].partition("@")[2]
        assert [(watcher["by"], watcher["training"]) for watcher in one["watched_by"]] == [
            ("reward_model", f"aligned@{name}")
        ]
    text = as_text(found)
    learned, watched = text.split("watched by a model that saw it, and not trained on it:")
    assert (
        "aligned@ppo" in learned
        and "aligned@dpo" not in learned
        and "aligned@dpo" in watched
        and "aligned@ppo" not in watched
    )
    assert json.loads(json.dumps(found)) == found


def test_a_pair_that_the_models_learned_from_is_watched_by_nobody(made: Project) -> None:
    found = impact(made.root, record=identity("birds"))
    assert {one["stage"] for one in found["models"]} == both({*SETTINGS}) and "watched" not in found
    assert "watched" not in as_text(found)


def test_an_erasure_counts_what_was_learned_from_and_not_what_only_watched(made: Project) -> None:
    index = Index(made.root)
    index.read_records()
    assert exposed_in_workspace(index, [identity("mice")]) == (sorted(["reward_model", *both(LEARNED)]), [])


@pytest.mark.parametrize("name", [*SETTINGS])
def test_an_audit_says_watched_or_learned(made: Project, name: str) -> None:
    found = audit(made.root, f"merged_aligned@{name}")
    sources = set(found["sources"])
    if name in LEARNED:
        assert (
            OLD in sources
            and "watched_by" not in found
            and "reward_model" in {one["stage"] for one in found["parents"]}
        )
        assert found["records"]["learnt_by"].keys() >= {"reward_model"} and "watched by" not in audit_text(found)
    else:
        assert OLD not in sources and "reward_model" not in {
            *found["records"]["learnt_by"],
            *(one["stage"] for one in found["parents"]),
        }
        md5 = md5_of(made, "reward_model")
        assert found["watched_by"] == [
            {"stage": "reward_model", "path": "data/reward_model", "md5": md5, "training": f"aligned@{name}"}
        ]
        assert f"watched by reward_model  md5 {md5}, while aligned@{name} was trained" in audit_text(found)


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_exports_name_the_reward_model_as_watching_or_as_a_part(made: Project, name: str) -> None:
    subject = find(Index(made.root), f"merged_aligned@{name}")
    summary = summarize(subject)
    assert [one["stage"] for one in summary["watched_by"]] == (["reward_model"] if name in WATCHED else [])
    assert ("reward_model" in summary["stages"], OLD in summary["sources"]) == (name in LEARNED, name in LEARNED)
    exports = {
        export.__name__: export(summary | {"provider": {}, "data_sets": {}}, date(2026, 1, 2))
        for export in (cyclonedx, eu_summary, model_card)
    }
    named = {
        "cyclonedx": '"pedigree:watched_by"',
        "eu_summary": (
            f"**Watched by, not trained on:** reward_model (content md5 {md5_of(made, 'reward_model')}) during"
            f" aligned@{name}"
        ),
        "model_card": f"The training of aligned@{name} was watched by reward_model",
    }
    assert {export: words in exports[export] for export, words in named.items()} == dict.fromkeys(
        named, name in WATCHED
    )
    assert {export: OLD in text for export, text in exports.items()} == dict.fromkeys(exports, name in LEARNED)


@pytest.mark.parametrize("name", [*SETTINGS])
def test_a_statement_marks_the_files_that_only_watched(name: str) -> None:
    deps = [{"path": path} for path in ("data/preferences", "data/reward_model", "data/merged/lora")]
    files = {f"{dep['path']}/x": {"md5": "0" * 32, "sha256": "0" * 64} for dep in deps}
    read = {"cmd": "run", "deps": deps, "outs": [], "params": {"params.yaml": {f"aligned.{name}": SETTINGS[name]}}}
    said = statement(StageRecord(f"aligned@{name}", read, "", {}, files, {}))
    marked = [
        one["name"] for one in said["predicate"]["buildDefinition"]["resolvedDependencies"] if "annotations" in one
    ]
    assert marked == (["data/reward_model/x"] if name in WATCHED else [])
