"""A project without preferences, as documented: no sources of pairs, no aligned
variants. The whole pipeline runs in either front end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from builders.small_pipeline import changed_in_dvc, not_fresh
from conftest import dvc, edit_params, run
from ruamel.yaml import YAML

from dagster_project.orchestration.dagster.assets import build_definitions
from dagster_project.orchestration.dagster.sync import sync
from dagster_project.orchestration.dagster_dvc.keys import asset_key
from dagster_project.orchestration.dvc import read_stages
from dagster_project.pipeline import PEDIGREE

HEADERS = {
    "data/plots/reward.csv": "step,loss,accuracy,margin,learning_rate,grad_norm,tokens",
    "data/plots/calibration.csv": "confidence,accuracy,pairs",
}


@pytest.fixture
def without_preferences(project: Path, _finished: Path) -> Path:
    """Nothing has run here. DVC's cache has the runs of the finished project,
    so that stages with the same inputs there are restored."""
    shutil.copytree(_finished / ".dvc/cache", project / ".dvc/cache")
    edit_params(project, lambda values: values.update(raw_preferences={"sources": []}, aligned={}))
    return project


def materialize(root: Path, instance: Any, addresses: Iterable[str], **tags: str) -> set[str]:
    """Returns: what was done for these stages: "run", "restored" or "nothing"."""
    job = build_definitions(root).resolve_implicit_global_asset_job_def()
    keys = [asset_key(address) for address in addresses]
    result = job.execute_in_process(instance=instance, asset_selection=keys, raise_on_error=False, tags=tags)
    failed = [str(event.event_specific_data) for event in result.all_events if event.is_step_failure]
    assert result.success, "\n".join(failed)
    return {str(event.materialization.metadata["done"].value) for event in result.get_asset_materialization_events()}


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_project_without_preferences_runs_through_to_a_release(without_preferences: Path, instance: Any) -> None:
    """With DVC; then with Dagster, which runs again what reads preferences, and
    restores all else from DVC's run cache."""
    root = without_preferences
    done = dvc(root, "repro")
    assert done.returncode == 0, done.stderr + done.stdout
    check(root, instance)
    lock = recorded(root)

    (root / "dvc.lock").unlink()
    shutil.rmtree(root / "data/reward_model")
    assert materialize(root, instance, read_stages(root)) == {"restored"}
    assert materialize(
        root, instance, ["raw_preferences", "preferences", "reward_model"], **{"pedigree/force": "true"}
    ) == {"run"}
    assert recorded(root) == lock
    check(root, instance)


def recorded(root: Path) -> Any:
    return YAML(typ="safe").load((root / "dvc.lock").read_text())


def check(root: Path, instance: Any) -> None:
    assert json.loads((root / "data/release/release.json").read_text())["variant"] == "lora"
    assert {path: (root / path).read_text() for path in HEADERS} == {
        path: f"{line}\n" for path, line in HEADERS.items()
    }
    assert json.loads((root / "data/reports/reward_model.json").read_text())["pairs"] == 0
    assert "aligned" not in "".join(read_stages(root))

    sync(root, instance)
    assert changed_in_dvc(root) == set() == not_fresh(root, instance, PEDIGREE)
    assert sync(root, instance) == []
    shown = dvc(root, "plots", "show", "--json")
    assert shown.returncode == 0, shown.stderr

    audit = run(["python", "-m", "dagster_project", "audit", "release", "--json"], root)
    assert audit.returncode == 0, audit.stderr
