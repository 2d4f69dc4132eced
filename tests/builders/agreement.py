"""What holds of the small pipeline after any operation: DVC and Dagster agree, and what they call fresh is correct."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from builders import small_pipeline
from dagster_project.orchestration.dagster.sync import sync
from dagster_project.orchestration.dagster_dvc.dead_runs import ALIVE, reap
from dagster_project.orchestration.dagster_dvc.keys import asset_key
from dagster_project.orchestration.dvc import read_stages


def agree(root: Path, instance: dg.DagsterInstance, what: str) -> set[str]:
    """Sync, and compare both front ends.

    Args:
        what: the operation, for messages.
    Returns:
        The stages that both call changed.
    """
    reap(instance)
    assert not instance.get_runs(dg.RunsFilter(statuses=ALIVE)), f"{what}: a dead run counts as alive"
    sync(root, instance, small_pipeline.PIPELINE)
    changed = small_pipeline.changed_in_dvc(root)
    assert small_pipeline.not_fresh(root, instance) == changed, f"{what}: DVC says {changed}"
    state_of = read_stages(root)
    for address, state in state_of.items():
        event = instance.get_latest_materialization_event(asset_key(address))
        if event:
            assert event.asset_materialization.tags["dagster/data_version"] == state.version, f"{what}: {address}"
    assert sync(root, instance, small_pipeline.PIPELINE) == [], what
    for name in ("inst", "tok", "adapter", "cmp", "extra"):
        for path in (root / "data" / name).rglob("*.txt"):
            address = f"adapter@{path.parent.name}" if name == "adapter" else name
            if address in state_of and not state_of[address].changed:
                assert "BAD" not in path.read_text(), f"{what}: a bad row in {path.relative_to(root)}"
    return changed
