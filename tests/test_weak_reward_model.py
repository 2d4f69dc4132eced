"""A reward model that misses its gate is shown as failed at both front ends, and stops only what learns from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import dvc, edit_params

from dagster_project.doors.dagster_assets import build_definitions
from dagster_project.doors.report import asset_key


def weaken(values: dict[str, Any]) -> None:
    """No three steps reach this accuracy."""
    values["reward_model"]["min_accuracy"] = 1.0
    online = {"method": "rloo", "adapter": "lora", "max_steps": 1, "samples": 2, "max_new_tokens": 4}
    values["aligned"]["rloo"] = {**online, "options": {"num_generations": 2, "max_completion_length": 4}}


def materialize(root: Path, instance: Any, address: str) -> Any:
    job = build_definitions(root).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(instance=instance, asset_selection=[asset_key(address)], raise_on_error=False)


def test_dpo_runs_and_rloo_is_refused_at_both_front_ends(finished: Path, instance: Any) -> None:
    edit_params(finished, weaken)
    shown = materialize(finished, instance, "reward_model")
    found = {one.check_name: (one.passed, one.severity.value) for one in shown.get_asset_check_evaluations()}
    assert shown.success and found["prefers_as_people_do"] == (False, "ERROR")

    done = dvc(finished, "repro", "aligned@dpo")
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads((finished / "data/reports/aligned/dpo.json").read_text())
    assert report["passed"] and not report["checks"]["reward_model_is_reliable"]["passed"]

    refused = dvc(finished, "repro", "aligned@rloo")
    said = refused.stderr + refused.stdout
    assert refused.returncode != 0 and "Traceback" not in said
    assert "reward_model.min_accuracy" in said and "aligned.rloo.rewards" in said
    assert not (finished / "data/aligned/rloo").exists()

    failed = materialize(finished, instance, "aligned@rloo")
    [check] = [one for one in failed.get_asset_check_evaluations() if one.check_name == "reward_model_is_reliable"]
    assert not failed.success and not check.passed and check.severity.value == "ERROR"
