"""dvc.lock and workspace -> Dagster's event log. Reports only differences; a second sync in a row reports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)

from dagster_project.doors import dvc, integrity
from dagster_project.doors.dvc import StageState
from dagster_project.doors.report import (
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
from dagster_project.pipeline import PEDIGREE, Pipeline

INPUT_TAG_PREFIX = "dagster/input_data_version/"


def sync(root: Path, instance: dg.DagsterInstance, pipeline: Pipeline = PEDIGREE) -> list[str]:
    """Bring Dagster's view up to date with DVC.

    Returns:
        One line for each event reported and for each output found tampered with; empty if there was nothing to say.
    """
    street, said = read(root, pipeline)
    return said + mirror(root, instance, street, pipeline)


def read(root: Path, pipeline: Pipeline = PEDIGREE) -> tuple[dict[str, StageState], list[str]]:
    """The street as it is, once what was tampered with has been set aside, and a line for each such output.

    Raises:
        InputError: dvc.yaml has a stage that the code does not know.
    """
    street = dvc.read_street(root)
    for address in street:
        pipeline.split_address(address)
    said = integrity.set_tampered_aside(root, street.values())
    return (dvc.read_street(root) if said else street), said


def mirror(root: Path, instance: dg.DagsterInstance, street: Mapping[str, StageState], pipeline: Pipeline = PEDIGREE) -> list[str]:
    """Report to Dagster what it does not know of these stages. Returns one line for each event."""
    observed = {source_key(i.path): i.now for state in street.values() for i in state.inputs if i.producer is None}
    observed |= {definition_key(address): state.definition_now for address, state in street.items()}
    said = [line for key, version in observed.items() for line in _observe(instance, key, version)]
    records = {record.asset_entry.asset_key: record for record in instance.get_asset_records([*map(asset_key, street)])}
    for address, state in street.items():
        record = records.get(asset_key(address))
        said += _materialize(root, instance, state, record.asset_entry.last_materialization if record else None)
    return said + _checks(root, instance, street, pipeline)


def _observe(instance: dg.DagsterInstance, key: dg.AssetKey, version: str) -> list[str]:
    records = instance.fetch_observations(key, limit=1).records
    known = records[0].asset_observation if records else None
    if known and known.tags.get(DATA_VERSION_TAG) == version:
        return []
    tags = {DATA_VERSION_TAG: version, DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
    instance.report_runless_asset_event(dg.AssetObservation(key, tags=tags))
    return [f"{key.to_user_string()} is now {version[:8]}"]


def wanted_tags(state: StageState) -> dict[str, str]:
    """What Dagster must believe of a stage that was run: version from disk, input versions from dvc.lock.

    An output that is not what dvc.lock recorded gets a code version of its own, which makes the asset stale where nothing else does. So the report
    of a gate that failed on new input is no news, and a failed gate is never reported as materialized.
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


def _checks(root: Path, instance: dg.DagsterInstance, street: Mapping[str, StageState], pipeline: Pipeline) -> list[str]:
    results = {
        dg.AssetCheckKey(asset_key(address), str(result.check_name)): result
        for address, state in street.items()
        for result in [*check_results(root, address, read_report(root, state) or {}, pipeline), in_sync(state)]
    }
    recorded = {asset_key(address): state.recorded for address, state in street.items()}
    records = instance.event_log_storage.get_latest_asset_check_execution_by_key([*results])
    said = []
    for key, result in results.items():
        record = records.get(key)
        if record is None and not recorded[key.asset_key]:
            continue  # never run, which the asset says itself
        event = record.event.dagster_event if record and record.event else None
        known = event.event_specific_data if event else None
        if isinstance(known, dg.AssetCheckEvaluation):
            if known.metadata.get(REPORT_TAG) == result.metadata[REPORT_TAG]:
                continue
        elif record and (planned := instance.get_run_by_id(record.run_id)) and not planned.is_finished:
            continue  # a run is about to report it
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=key.asset_key, check_name=key.name, passed=result.passed, severity=result.severity, metadata=result.metadata
            )
        )
        said.append(f"check {'@'.join(key.asset_key.path)} {key.name}: {'passed' if result.passed else 'failed'}")
    return said
