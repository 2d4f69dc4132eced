"""Dagster runs whose process is dead, and processes whose run is canceled.

Dagster's default launcher does not check, so a killed run would keep the status "started".
"""

from __future__ import annotations

import os
import platform
import signal
import time
from dataclasses import dataclass

import dagster as dg

from dagster_project.orchestration.processes import descends_from, end_with, is_running, start_of

MACHINE_TAG = "pedigree/machine"
"""Tag of a run: the host of its process. Only that host can check whether the process is alive."""
PROCESS_TAG = ".dagster/pedigree_process"
"""Tag of a run: the start of its process (`start_of`). Dagster does not show tags whose names begin with .dagster/."""
QUIET = 3600.0
"""Seconds without an event after which a run no longer counts as in progress, if its process cannot be checked:
it is on another machine, or the run never reported its process."""
UNHEARD = 15.0
"""Seconds after which a run that is to be terminated, and goes on, interrupts itself."""
ALIVE = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def reap(instance: dg.DagsterInstance, owned: bool = True) -> list[str]:
    """Mark each run as failed whose process was on this machine and no longer exists, and free its concurrency slots.

    A run logs its process id when it starts; a run without one is skipped.

    Args:
        owned: whether the instance has no other runs than those of DVC projects on this machine. In a shared one only
            runs are examined whose tag names the machine: the process of any other run may be on another one.
    Returns:
        One line for each run marked as failed.
    """
    lines = []
    for run in instance.get_runs(dg.RunsFilter(statuses=ALIVE)):
        last = _process(instance, run.run_id)
        machine = run.tags.get(MACHINE_TAG, platform.node() if owned else None)
        if machine != platform.node() or last is None or is_running(*last):
            continue
        now = instance.get_run_by_id(run.run_id)
        if now is None or now.is_finished:  # it ended meanwhile
            continue
        # first: a run that has failed is not examined again
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        lines.append(f"run {run.run_id[:8]} ({run.job_name}): its process {last[0]} was killed; marked as failed")
        instance.report_run_failed(
            run, f"Process {last[0]} of this run was killed. Launch the run again: finished stages are not run twice."
        )
    _free_slots_of_ended_runs(instance, owned)
    return lines


def _free_slots_of_ended_runs(instance: dg.DagsterInstance, owned: bool) -> None:
    """Free the concurrency slots of runs that were deleted, or marked as canceled or failed, and whose process no
    longer exists; and of those that a machine left behind which no longer exists, e.g. a replaced pod."""
    for run_id in instance.event_log_storage.get_concurrency_run_ids():
        run = instance.get_run_by_id(run_id)
        if not owned and (run is None or MACHINE_TAG not in run.tags):
            continue  # of other assets
        if run is None or not (_process_exists(instance, run) or (not run.is_finished and _is_alive(instance, run))):
            instance.event_log_storage.free_concurrency_slots_for_run(run_id)


def _process_exists(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether the process of a run is known to exist on this machine."""
    process = _process_here(instance, run)
    return process is not None and is_running(*process)


def tag_run(instance: dg.DagsterInstance, run_id: str) -> None:
    """Tag a run with the machine and the start of its process."""
    process = _process(instance, run_id)
    tags = {MACHINE_TAG: platform.node(), PROCESS_TAG: start_of(process[0]) if process else ""}
    instance.add_run_tags(run_id, {name: value for name, value in tags.items() if value})


def end_with_run(instance: dg.DagsterInstance, run_id: str, owned: bool = True) -> None:
    """If this is a step process, end it when the process of the run ends.

    An orphan would record results of a killed run.

    Args:
        owned: whether the run's process is surely on this machine. Otherwise it counts only if it started this one.
    """
    process = _process(instance, run_id)
    if process is not None and process[0] != os.getpid() and ((is_child := descends_from(process[0])) or owned):
        end_with(process[0], None if is_child else process[1])


def interrupt_if_canceled(instance: dg.DagsterInstance, run_id: str) -> None:
    """Interrupt the process of a run that was marked as canceled, or deleted, as "terminate" does. Dagster only changes
    the status if it cannot reach the process, e.g. after the web server was started again, or its code server ended:
    then the run would go on as "canceling"."""
    run = instance.get_run_by_id(run_id)
    if run is not None and run.status != dg.DagsterRunStatus.CANCELED and not _is_unheard(instance, run):
        return
    process = _process(instance, run_id)
    os.kill(process[0] if process is not None and descends_from(process[0]) else os.getpid(), signal.SIGINT)


def _is_unheard(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether Dagster was asked a while ago to terminate a run. Otherwise it may be about to interrupt the process, and
    a second interrupt would disturb what ends the stage."""
    record = instance.get_run_record_by_id(run.run_id) if run.status == dg.DagsterRunStatus.CANCELING else None
    return record is not None and time.time() - record.update_timestamp.timestamp() > UNHEARD


def in_progress(instance: dg.DagsterInstance) -> frozenset[dg.AssetKey]:
    """Assets that a live run is going to materialize: planned, and neither
    materialized, failed nor skipped in that run yet.

    The status of a killed run stays "started": a run counts only while its process exists.
    """
    assets: set[dg.AssetKey] = set()
    for run in instance.get_runs(dg.RunsFilter(statuses=ALIVE)):
        if _is_alive(instance, run):
            assets |= remaining(instance, run.run_id)
    return frozenset(assets)


def _is_alive(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    process = _process_here(instance, run)
    if process is not None:
        return is_running(*process)
    record = instance.get_run_record_by_id(run.run_id)
    latest = instance.get_records_for_run(run.run_id, limit=1, ascending=False).records
    times = [record.update_timestamp.timestamp()] if record else []
    return time.time() - max([*times, *(entry.timestamp for entry in latest)], default=0.0) < QUIET


def is_pending(instance: dg.DagsterInstance, run_id: str, key: dg.AssetKey) -> bool:
    """Whether a run is going to report something of an asset: it is being launched, waits in the queue, or has not
    ended the asset's step."""
    run = instance.get_run_by_id(run_id)
    if run is None or run.is_finished:
        return False
    in_queue = run.status == dg.DagsterRunStatus.QUEUED
    return in_queue or (_is_alive(instance, run) and key in remaining(instance, run_id))


def remaining(instance: dg.DagsterInstance, run_id: str) -> set[dg.AssetKey]:
    """Assets that the run planned to materialize and whose step has not ended."""
    return steps_of(instance, run_id).remaining


@dataclass(frozen=True)
class RunSteps:
    """How far a run is."""

    planned: set[dg.AssetKey]
    """Assets that it is going to materialize, or has."""
    remaining: set[dg.AssetKey]
    """Those whose step has not ended."""
    running: dict[dg.AssetKey, float]
    """Those whose step runs, with the time of its start."""


def steps_of(instance: dg.DagsterInstance, run_id: str) -> RunSteps:
    kinds = dg.DagsterEventType
    planned: dict[dg.AssetKey, str | None] = {}
    ended: set[dg.AssetKey | str | None] = set()
    began: dict[str | None, float] = {}
    starts = {kinds.STEP_START, kinds.STEP_RESTARTED}
    of_type = {
        kinds.ASSET_MATERIALIZATION_PLANNED,
        kinds.ASSET_MATERIALIZATION,
        kinds.STEP_SUCCESS,
        kinds.STEP_FAILURE,
        kinds.STEP_SKIPPED,
        kinds.STEP_UP_FOR_RETRY,
        *starts,
    }
    for entry in instance.all_logs(run_id, of_type=of_type):
        event = entry.get_dagster_event()
        if event.event_type == kinds.ASSET_MATERIALIZATION_PLANNED and event.asset_key:
            planned[event.asset_key] = event.step_key
        elif event.event_type == kinds.ASSET_MATERIALIZATION:
            ended.add(event.asset_key)
        elif event.event_type in starts:
            began[event.step_key] = entry.timestamp
        elif event.event_type == kinds.STEP_UP_FOR_RETRY:
            began.pop(event.step_key, None)
        else:
            ended.add(event.step_key)
    left = {key: step for key, step in planned.items() if key not in ended and step not in ended}
    return RunSteps({*planned}, {*left}, {key: began[step] for key, step in left.items() if step in began})


def is_in_one_process(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether the steps of a run run in the process of the run, which is this one, one after another."""
    process = _process(instance, run_id)
    return process is None or process[0] == os.getpid()


def _process_here(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[int, float, str] | None:
    """As `_process`; None also if it is on another machine."""
    return _process(instance, run.run_id) if run.tags.get(MACHINE_TAG, platform.node()) == platform.node() else None


def _process(instance: dg.DagsterInstance, run_id: str) -> tuple[int, float, str] | None:
    """(process id, time of the log entry, tag with its start) of the latest process of a run."""
    for entry in reversed(instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)):
        pid = entry.get_dagster_event().engine_event_data.metadata.get("pid")
        if pid is not None:
            run = instance.get_run_by_id(run_id)
            return int(str(pid.value)), entry.timestamp, run.tags.get(PROCESS_TAG, "") if run else ""
    return None
