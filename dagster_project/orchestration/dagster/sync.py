"""Sync of a Pedigree project with a Dagster instance."""

from __future__ import annotations

import logging
from pathlib import Path

import dagster as dg

from dagster_project.orchestration import rwlock
from dagster_project.orchestration.dagster.project import PedigreeProject
from dagster_project.orchestration.dagster_dvc import sync as dagster_dvc
from dagster_project.orchestration.dagster_dvc.dead_runs import reap
from dagster_project.orchestration.dvc import stamped_paths
from dagster_project.orchestration.last_sync import LastSync
from dagster_project.pipeline import PEDIGREE, Pipeline

log = logging.getLogger("pedigree")

UNFINISHED = dg.RunsFilter(
    statuses=[
        status
        for status in dg.DagsterRunStatus
        if status not in {dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED}
    ]
)


def sync(root: Path, instance: dg.DagsterInstance, pipeline: Pipeline = PEDIGREE) -> list[str]:
    """Report DVC's state to Dagster.

    Returns:
        One line for each reported event, and for each output that was set aside because it was tampered with.
    """
    return dagster_dvc.sync(PedigreeProject(root, pipeline=pipeline), instance)


def sync_after(
    last: LastSync, instance: dg.DagsterInstance, pipeline: Pipeline = PEDIGREE, wait: bool = True
) -> list[str]:
    """Mark runs as failed whose process was killed, and report DVC's state to Dagster.

    If there is nothing to report, and no run or stage that could end or be killed, the state of the files is
    remembered.

    Args:
        wait: see `sync_if_changed`.
    Returns:
        One line for each event.
    """
    lines = reap(instance, owned=not last.key_prefix)
    if holder := rwlock.lock_holder(last.root):
        if not wait:
            return [*lines, f"not synced yet: {holder} holds DVC's lock of the project"]
        log.info(f"waiting: {holder} holds DVC's lock of the project")
    project = PedigreeProject(last.root, last.key_prefix, pipeline=pipeline)
    snapshot = dagster_dvc.read(project, instance)
    lines += snapshot.lines + dagster_dvc.mirror(project, instance, snapshot)
    if lines or snapshot.written or instance.get_runs(UNFINISHED, limit=1):
        return lines
    if not instance.event_log_storage.get_concurrency_run_ids():
        last.remember(stamped_paths(snapshot.states))
    return lines
