"""dvc.lock and workspace -> Dagster's event log. Reports only differences; a second sync in a row reports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_project.orchestration import dvc, integrity, locks
from dagster_project.orchestration.dagster.dead_runs import in_progress
from dagster_project.orchestration.dagster.metadata import (
    CODE_VERSION,
    REPORT_TAG,
    asset_key,
    check_results,
    definition_key,
    describe,
    in_sync,
    read_report,
    source_key,
)
from dagster_project.orchestration.dvc import StageState
from dagster_project.orchestration.private_api import private_module
from dagster_project.pipeline import PEDIGREE, Pipeline

SYNC_LOCK = ".sync"
INPUT_TAG_PREFIX = "dagster/input_data_version/"


@dataclass(frozen=True)
class Snapshot:
    """State of all stages, and of the event log before they were read: events that a run reports meanwhile are newer."""

    states: dict[str, StageState]
    lines: list[str]
    """One for each output that was set aside because it was tampered with."""
    in_progress: frozenset[dg.AssetKey]
    """Assets that a run was about to materialize."""
    materialized: Mapping[dg.AssetKey, int | None]
    """Storage id of the latest materialization of each asset."""


def sync(root: Path, instance: dg.DagsterInstance, pipeline: Pipeline = PEDIGREE) -> list[str]:
    """Report DVC's state to Dagster.

    Returns:
        One line for each reported event, and for each output that was set aside because it was tampered with.
    """
    snapshot = read(root, instance, pipeline)
    return snapshot.lines + mirror(root, instance, snapshot, pipeline)


def read(root: Path, instance: dg.DagsterInstance, pipeline: Pipeline = PEDIGREE) -> Snapshot:
    """Set aside the outputs that were tampered with, then read the state of all stages.

    Raises:
        InputError: dvc.yaml has a stage that pipeline.py does not list.
    """
    busy, materialized = in_progress(instance), _materialized(instance)
    states = dvc.read_stages(root)
    for address in states:
        pipeline.split_address(address)
    lines = integrity.set_tampered_aside(root, states.values())
    return Snapshot(dvc.read_stages(root) if lines else states, lines, busy, materialized)


def _materialized(instance: dg.DagsterInstance) -> dict[dg.AssetKey, int | None]:
    entries = [record.asset_entry for record in instance.get_asset_records()]
    return {entry.asset_key: entry.last_materialization_storage_id for entry in entries}


def mirror(root: Path, instance: dg.DagsterInstance, snapshot: Snapshot, pipeline: Pipeline = PEDIGREE) -> list[str]:
    """Report the differences between these stages and Dagster's event log, one process at a time.

    Assets are skipped that a run is about to materialize, or that were materialized after the snapshot: that run reports the materialization
    and its checks. A second materialization would separate the checks from the one that they evaluate.

    Returns:
        One line for each event.
    """
    states = snapshot.states
    with locks.hold(root, SYNC_LOCK, lambda _: None):
        observed = {source_key(i.path): i.now for state in states.values() for i in state.inputs if i.producer is None}
        observed |= {definition_key(address): state.definition_now for address, state in states.items()}
        events = [line for key, version in observed.items() for line in _observe(instance, key, version)]
        busy = snapshot.in_progress | in_progress(instance)
        records = {record.asset_entry.asset_key: record.asset_entry for record in instance.get_asset_records([*map(asset_key, states)])}
        idle = {}
        for address, state in states.items():
            key = asset_key(address)
            latest = records[key].last_materialization_record if key in records else None
            if key not in busy and (latest.storage_id if latest else None) == snapshot.materialized.get(key):
                idle[address] = state
                events += _materialize(root, instance, state, latest.event_log_entry if latest else None)
        return events + _checks(root, instance, idle, pipeline)


def _observe(instance: dg.DagsterInstance, key: dg.AssetKey, version: str) -> list[str]:
    records = instance.fetch_observations(key, limit=1).records
    latest = records[0].asset_observation if records else None
    names = _tag_names()
    if latest and latest.tags.get(names.DATA_VERSION_TAG) == version:
        return []
    tags = {names.DATA_VERSION_TAG: version, names.DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
    instance.report_runless_asset_event(dg.AssetObservation(key, tags=tags))
    return [f"{key.to_user_string()} is now {version[:8]}"]


def _tag_names() -> Any:
    """Dagster's module with the names of the tags for versions of assets and of their inputs."""
    return private_module("dagster._core.definitions.data_version")


def expected_tags(state: StageState) -> dict[str, str]:
    """Tags of a materialization in Dagster: version from disk, input versions from dvc.lock.

    An output that differs from dvc.lock gets a different code version, which makes the asset stale if nothing else does. So the report of a
    gate that failed on new input changes nothing, and a failed gate is never reported as materialized.
    """
    names, problem = _tag_names(), state.output_problem
    code = CODE_VERSION + (f"+{problem}" if not state.recorded or state.changed == [problem] else "")
    tags = {names.DATA_VERSION_TAG: state.version, names.CODE_VERSION_TAG: code, names.DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
    inputs = {asset_key(i.producer) if i.producer else source_key(i.path): i.recorded or "unrecorded" for i in state.inputs}
    inputs[definition_key(state.address)] = state.definition_recorded or "unrecorded"
    for key, version in inputs.items():
        tags[names.get_input_data_version_tag(key)] = version
        tags[names.get_input_event_pointer_tag(key)] = "NULL"
    return tags


def _materialize(root: Path, instance: dg.DagsterInstance, state: StageState, latest: dg.EventLogEntry | None) -> list[str]:
    if latest is None and not state.recorded:
        return []
    actual = dict(latest.asset_materialization.tags or {}) if latest and latest.asset_materialization else {}
    expected, names = expected_tags(state), _tag_names()
    compared = {
        tag: value
        for tag, value in expected.items()
        if tag.startswith(INPUT_TAG_PREFIX) or tag in {names.DATA_VERSION_TAG, names.CODE_VERSION_TAG}
    }
    extra = {tag for tag in actual if tag.startswith(INPUT_TAG_PREFIX)} - set(expected)
    if not extra and all(actual.get(tag) == value for tag, value in compared.items()):
        return []
    instance.report_runless_asset_event(dg.AssetMaterialization(asset_key(state.address), tags=expected, metadata=describe(root, state)))
    return [f"{state.address} is {state.version[:8]}" + (f", {state.output_problem}" if state.output_problem else "")]


def _checks(root: Path, instance: dg.DagsterInstance, states: Mapping[str, StageState], pipeline: Pipeline) -> list[str]:
    """Report each check result that differs from the latest one, or that Dagster would not show because it evaluates an earlier materialization."""
    results = {
        dg.AssetCheckKey(asset_key(address), str(result.check_name)): result
        for address, state in states.items()
        for result in [*check_results(root, address, read_report(root, state) or {}, pipeline), in_sync(state)]
    }
    recorded = {asset_key(address): state.recorded for address, state in states.items()}
    records = instance.event_log_storage.get_latest_asset_check_execution_by_key([*results])
    assets = {record.asset_entry.asset_key: record.asset_entry for record in instance.get_asset_records([*recorded])}
    events = []
    for key, result in results.items():
        record = records.get(key)
        if record is None and not recorded[key.asset_key]:
            continue  # never run: the asset already shows this
        latest = assets[key.asset_key].last_materialization_record if key.asset_key in assets else None
        event = record.event.dagster_event if record and record.event else None
        evaluation = event.event_specific_data if event else None
        if record and isinstance(evaluation, dg.AssetCheckEvaluation):
            if evaluation.metadata.get(REPORT_TAG) == result.metadata[REPORT_TAG] and _evaluates(record, evaluation, latest):
                continue
        elif record and (planned := instance.get_run_by_id(record.run_id)) and planned.status == dg.DagsterRunStatus.QUEUED:
            continue  # a run is about to report it
        target = (
            _target_type()(storage_id=latest.storage_id, run_id=latest.event_log_entry.run_id, timestamp=latest.timestamp)
            if latest
            else None
        )
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=key.asset_key,
                check_name=key.name,
                passed=result.passed,
                severity=result.severity,
                description=result.description,
                metadata=result.metadata,
                target_materialization_data=target,
            )
        )
        events.append(f"check {'@'.join(key.asset_key.path)} {key.name}: {'passed' if result.passed else 'failed'}")
    return events


def _target_type() -> Any:
    """Class of the reference from an evaluation of a check to a materialization."""
    return private_module("dagster._core.definitions.asset_checks.asset_check_evaluation").AssetCheckEvaluationTargetMaterializationData


def _evaluates(record: Any, evaluation: dg.AssetCheckEvaluation, latest: dg.EventLogRecord | None) -> bool:
    """Whether Dagster shows this evaluation for the latest materialization.

    The same rule as Dagster's `AssetCheckExecutionRecord.targets_latest_materialization`.

    Args:
        record: an AssetCheckExecutionRecord.
    """
    runless = private_module("dagster._core.instance.utils").RUNLESS_RUN_ID
    if latest is None or latest.event_log_entry.run_id == record.run_id != runless:
        return True
    target = evaluation.target_materialization_data
    return target.storage_id == latest.storage_id if target else latest.timestamp < record.create_timestamp
