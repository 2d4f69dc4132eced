"""dvc.lock and workspace -> Dagster's event log. Reports only differences; a second sync in a row reports nothing."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)

from dagster_project.doors import dvc
from dagster_project.doors.dvc import StageState
from dagster_project.doors.report import (
    CODE_VERSION,
    REPORT_TAG,
    asset_key,
    check_results,
    definition_key,
    describe,
    read_report,
    source_key,
)

INPUT_TAG_PREFIX = "dagster/input_data_version/"


def sync(root: Path, instance: dg.DagsterInstance) -> list[str]:
    """Bring Dagster's view up to date with DVC.

    Returns:
        One line for each event reported; empty if Dagster already knew everything.
    """
    street = dvc.read_street(root)
    said: list[str] = []
    for path, version in {i.path: i.now for state in street.values() for i in state.inputs if i.producer is None}.items():
        said += _observe(instance, source_key(path), version)
    for address, state in street.items():
        said += _observe(instance, definition_key(address), state.definition_now)
    for address, state in street.items():
        said += _materialize(root, instance, address, state)
        said += _checks(root, instance, address, state)
    return said


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

    An output that is not what dvc.lock recorded gets a code version of its own, which makes the asset stale.
    """
    doubt = "" if state.outs_clean else "+output-differs-from-dvc.lock" if state.recorded else "+not-in-dvc.lock"
    tags = {DATA_VERSION_TAG: state.version, CODE_VERSION_TAG: CODE_VERSION + doubt, DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
    inputs = {asset_key(i.producer) if i.producer else source_key(i.path): i.recorded or "unrecorded" for i in state.inputs}
    inputs[definition_key(state.address)] = state.definition_recorded or "unrecorded"
    for key, version in inputs.items():
        tags[get_input_data_version_tag(key)] = version
        tags[get_input_event_pointer_tag(key)] = "NULL"
    return tags


def _materialize(root: Path, instance: dg.DagsterInstance, address: str, state: StageState) -> list[str]:
    event = instance.get_latest_materialization_event(asset_key(address))
    if event is None and not state.recorded:
        return []
    have = dict(event.asset_materialization.tags or {}) if event and event.asset_materialization else {}
    want = wanted_tags(state)
    compared = {
        tag: value for tag, value in want.items() if tag.startswith(INPUT_TAG_PREFIX) or tag in {DATA_VERSION_TAG, CODE_VERSION_TAG}
    }
    extra = {tag for tag in have if tag.startswith(INPUT_TAG_PREFIX)} - set(want)
    if not extra and all(have.get(tag) == value for tag, value in compared.items()):
        return []
    instance.report_runless_asset_event(dg.AssetMaterialization(asset_key(address), tags=want, metadata=describe(root, state)))
    return [f"{address} is {state.version[:8]}" + ("" if state.outs_clean else ", not what dvc.lock recorded")]


def _checks(root: Path, instance: dg.DagsterInstance, address: str, state: StageState) -> list[str]:
    report = read_report(root, state)
    if report is None:
        return []
    said = []
    for result in check_results(address, report):
        key = dg.AssetCheckKey(asset_key(address), str(result.check_name))
        record = instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).get(key)
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
        said.append(f"check {address} {key.name}: {'passed' if result.passed else 'failed'}")
    return said
