"""A project without preferences, as documented: no sources of pairs, no aligned variants. The whole pipeline runs in either front end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders.small_pipeline import changed_in_dvc, not_fresh
from conftest import dvc, edit_params, run

from dagster_project.orchestration.dagster.assets import build_definitions
from dagster_project.orchestration.dagster.metadata import asset_key
from dagster_project.orchestration.dagster.sync import sync
from dagster_project.orchestration.dvc import read_stages
from dagster_project.pipeline import PEDIGREE

HEADERS = {
    "data/plots/reward.csv": "step,loss,accuracy,margin,learning_rate,grad_norm,tokens",
    "data/plots/calibration.csv": "confidence,accuracy,pairs",
}


@pytest.fixture
def without_preferences(project: Path) -> Path:
    edit_params(project, lambda values: values.update(raw_preferences={"sources": []}, aligned={}))
    return project


def repro(root: Path, instance: Any) -> None:
    done = dvc(root, "repro")
    assert done.returncode == 0, done.stderr + done.stdout


def materialize_all(root: Path, instance: Any) -> None:
    job = build_definitions(root).resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=instance, asset_selection=[asset_key(a) for a in read_stages(root)], raise_on_error=False)
    failed = [str(event.event_specific_data) for event in result.all_events if event.is_step_failure]
    assert result.success, "\n".join(failed)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("front_end", [repro, materialize_all], ids=["dvc", "dagster"])
def test_a_project_without_preferences_runs_through_to_a_release(without_preferences: Path, instance: Any, front_end: Any) -> None:
    root = without_preferences
    front_end(root, instance)

    assert json.loads((root / "data/release/release.json").read_text())["variant"] == "lora"
    assert {path: (root / path).read_text() for path in HEADERS} == {path: f"{line}\n" for path, line in HEADERS.items()}
    assert json.loads((root / "data/reports/reward_model.json").read_text())["pairs"] == 0
    assert "aligned" not in "".join(read_stages(root))

    sync(root, instance)
    assert changed_in_dvc(root) == set() == not_fresh(root, instance, PEDIGREE)
    assert sync(root, instance) == []
    shown = dvc(root, "plots", "show", "--json")
    assert shown.returncode == 0, shown.stderr

    audit = run(["python", "-m", "dagster_project", "audit", "release", "--json"], root)
    assert audit.returncode == 0, audit.stderr
