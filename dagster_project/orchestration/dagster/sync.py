"""dvc.lock and workspace -> Dagster's event log. Reports only differences; a second sync in a row reports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationTargetMaterializationData
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)
from dagster._core.instance.utils import RUNLESS_RUN_ID
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecord

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
from dagster_project.pipeline import PEDIGREE, Pipeline

SYNC_LOCK = ".sync"
INPUT_TAG_PREFIX = "dagster/input_data_version/"


@dataclass(frozen=True)
class Reading:
    """State of all stages, and of the event log before they were read: events that a run reports meanwhile are newer than this reading."""

    states: dict[str, StageState]
    lines: list[str]
    """One for each output that was tampered with."""
    in_progress: frozenset[dg.AssetKey]
    """Assets that a run was about to materialize."""
    materialized: Mapping[dg.AssetKey, int | None]
    """Storage id of the latest materialization of each asset."""


def sync(root: Path, instance: dg.DagsterInstance, pipeline: Pipeline = PEDIGREE) -> list[str]:
    """Bring Dagster's view up to date with DVC.

    Returns:
        One line for each event reported and for each output that was tampered with.
    """
    reading = read(root, instance, pipeline)
    return reading.lines + mirror(root, instance, reading, pipeline)


def read(root: Path, instance: dg.DagsterInstance, pipeline: Pipeline = PEDIGREE) -> Reading:
    """State of all stages, after outputs that were tampered with were set aside.

    Raises:
        InputError: dvc.yaml has a stage that pipeline.py does not list.
    """
    busy, materialized = in_progress(instance), _materialized(instance)
    states = dvc.read_stages(root)
    for address in states:
        pipeline.split_address(address)
    lines = integrity.set_tampered_aside(root, states.values())
    return Reading(dvc.read_stages(root) if lines else states, lines, busy, materialized)


def _materialized(instance: dg.DagsterInstance) -> dict[dg.AssetKey, int | None]:
    entries = [record.asset_entry for record in instance.get_asset_records()]
    return {entry.asset_key: entry.last_materialization_storage_id for entry in entries}


def mirror(root: Path, instance: dg.DagsterInstance, reading: Reading, pipeline: Pipeline = PEDIGREE) -> list[str]:
    """Report to Dagster how these stages differ from its event log, one process at a time.

    An asset that a run is about to materialize, or that was materialized after the stages were read, is skipped: that run reports the
    materialization and its checks. A second materialization would separate the checks from the one that they evaluate.

    Returns:
        One line for each event.
    """
    states = reading.states
    with locks.hold(root, SYNC_LOCK, lambda _: None):
        observed = {source_key(i.path): i.now for state in states.values() for i in state.inputs if i.producer is None}
        observed |= {definition_key(address): state.definition_now for address, state in states.items()}
        events = [line for key, version in observed.items() for line in _observe(instance, key, version)]
        busy = reading.in_progress | in_progress(instance)
        records = {record.asset_entry.asset_key: record.asset_entry for record in instance.get_asset_records([*map(asset_key, states)])}
        settled = {}
        for address, state in states.items():
            key = asset_key(address)
            latest = records[key].last_materialization_record if key in records else None
            if key not in busy and (latest.storage_id if latest else None) == reading.materialized.get(key):
                settled[address] = state
                events += _materialize(root, instance, state, latest.event_log_entry if latest else None)
        return events + _checks(root, instance, settled, pipeline)


def _observe(instance: dg.DagsterInstance, key: dg.AssetKey, version: str) -> list[str]:
    records = instance.fetch_observations(key, limit=1).records
    known = records[0].asset_observation if records else None
    if known and known.tags.get(DATA_VERSION_TAG) == version:
        return []
    tags = {DATA_VERSION_TAG: version, DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
    instance.report_runless_asset_event(dg.AssetObservation(key, tags=tags))
    return [f"{key.to_user_string()} is now {version[:8]}"]


def wanted_tags(state: StageState) -> dict[str, str]:
    """Tags of a materialization in Dagster: version from disk, input versions from dvc.lock.

    An output that is not what dvc.lock recorded gets a different code version, which makes the asset stale where nothing else does. So
    the report of a gate that failed on new input changes nothing, and a failed gate is never reported as materialized.
    """
    code = CODE_VERSION + (f"+{state.doubt}" if not state.recorded or state.changed == [state.doubt] else "")
    tags = {DATA_VERSION_TAG: state.version, CODE_VERSION_TAG: code, DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
    inputs = {asset_key(i.producer) if i.producer else source_key(i.path): i.recorded or "unrecorded" for i in state.inputs}
    inputs[definition_key(state.address)] = state.definition_recorded or "unrecorded"
    for key, version in inputs.items():
        tags[get_input_data_version_tag(key)] = version
        tags[get_input_event_pointer_tag(key)] = "NULL"
    return tags


def _materialize(root: Path, instance: dg.DagsterInstance, state: StageState, known: dg.EventLogEntry | None) -> list[str]:
    if known is None and not state.recorded:
        return []
    have = dict(known.asset_materialization.tags or {}) if known and known.asset_materialization else {}
    want = wanted_tags(state)
    compared = {
        tag: value for tag, value in want.items() if tag.startswith(INPUT_TAG_PREFIX) or tag in {DATA_VERSION_TAG, CODE_VERSION_TAG}
    }
    extra = {tag for tag in have if tag.startswith(INPUT_TAG_PREFIX)} - set(want)
    if not extra and all(have.get(tag) == value for tag, value in compared.items()):
        return []
    instance.report_runless_asset_event(dg.AssetMaterialization(asset_key(state.address), tags=want, metadata=describe(root, state)))
    return [f"{state.address} is {state.version[:8]}" + (f", {state.doubt}" if state.doubt else "")]


def _checks(root: Path, instance: dg.DagsterInstance, states: Mapping[str, StageState], pipeline: Pipeline) -> list[str]:
    """Report each check result that differs from the latest one, or that Dagster would not show because it judges an earlier materialization."""
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
            continue  # never run, which the asset shows already
        latest = assets[key.asset_key].last_materialization_record if key.asset_key in assets else None
        event = record.event.dagster_event if record and record.event else None
        evaluation = event.event_specific_data if event else None
        if record and isinstance(evaluation, dg.AssetCheckEvaluation):
            if evaluation.metadata.get(REPORT_TAG) == result.metadata[REPORT_TAG] and _judges(record, evaluation, latest):
                continue
        elif record and (planned := instance.get_run_by_id(record.run_id)) and planned.status == dg.DagsterRunStatus.QUEUED:
            continue  # a run is about to report it
        target = (
            AssetCheckEvaluationTargetMaterializationData(
                storage_id=latest.storage_id, run_id=latest.event_log_entry.run_id, timestamp=latest.timestamp
            )
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


def _judges(record: AssetCheckExecutionRecord, known: dg.AssetCheckEvaluation, latest: dg.EventLogRecord | None) -> bool:
    """Whether Dagster shows this evaluation for the latest materialization: same rule as `AssetCheckExecutionRecord.targets_latest_materialization`."""
    if latest is None or latest.event_log_entry.run_id == record.run_id != RUNLESS_RUN_ID:
        return True
    target = known.target_materialization_data
    return target.storage_id == latest.storage_id if target else latest.timestamp < record.create_timestamp
