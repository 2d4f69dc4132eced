"""Dagster runs whose process is dead: Dagster's default launcher never looks, so a killed run would stay "started" for ever."""

from __future__ import annotations

import platform

import dagster as dg
import psutil

MACHINE_TAG = "pedigree/machine"
"""Tag of a run: where its process runs. Only there can be told whether it lives."""
ALIVE = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def reap(instance: dg.DagsterInstance) -> list[str]:
    """Mark each run as failed whose process was on this machine and is gone, and free its slots. Returns a line for each.

    A run tells its process in its log when it starts; one that has not got so far is left alone.
    """
    said = []
    for run in instance.get_runs(dg.RunsFilter(statuses=ALIVE)):
        last = _process(instance, run.run_id)
        if run.tags.get(MACHINE_TAG, platform.node()) != platform.node() or last is None or _runs(*last):
            continue
        now = instance.get_run_by_id(run.run_id)
        if now is None or now.is_finished:  # it ended while we looked
            continue
        said.append(f"run {run.run_id[:8]} ({run.job_name}): its process {last[0]} was killed; marked as failed")
        instance.report_run_failed(run, f"Process {last[0]} of this run was killed. Launch it again: what was finished is not run twice.")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return said


def _process(instance: dg.DagsterInstance, run_id: str) -> tuple[int, float] | None:
    """(process id, time it was told) of the latest process of a run."""
    for entry in reversed(instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)):
        pid = entry.get_dagster_event().engine_event_data.metadata.get("pid")
        if pid is not None:
            return int(str(pid.value)), entry.timestamp
    return None


def _runs(pid: int, told: float) -> bool:
    """Is it there, and not a later process with the same number?"""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= told + 1
    except psutil.NoSuchProcess:
        return False
