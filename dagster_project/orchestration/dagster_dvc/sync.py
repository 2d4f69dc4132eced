"""dvc.lock and workspace -> Dagster's event log. Reports only differences; a second sync in a row reports nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import dagster as dg

from dagster_project.orchestration import dvc, locks, rwlock
from dagster_project.orchestration.dagster_dvc.dead_runs import in_progress, is_pending
from dagster_project.orchestration.dagster_dvc.metadata import CODE_VERSION, IN_SYNC, RESULT_HASH, in_sync, read_report
from dagster_project.orchestration.dagster_dvc.project import DvcProject
from dagster_project.orchestration.dvc import StageState
from dagster_project.orchestration.private_api import private_module

SYNC_LOCK = ".sync"
INPUT_TAG_PREFIX = "dagster/input_data_version/"


@dataclass(frozen=True)
class Snapshot:
    """State of all stages, and of the event log before they were read.

    Events that a run reports meanwhile are newer.
    """

    states: dict[str, StageState]
    lines: list[str]
    """One for each output that was set aside because it was tampered with, for
    each report that cannot be read, and for lost entries of dvc.lock."""
    in_progress: frozenset[dg.AssetKey]
    """Assets that a run was about to materialize."""
    materialized: Mapping[dg.AssetKey, int | None]
    """Storage id of the latest materialization of each asset."""
    written: frozenset[str]
    """Addresses of the stages whose outputs another process was writing. DVC removes them before a stage runs, so what
    is on disk of them says nothing about the stages that read them."""


def sync(project: DvcProject, instance: dg.DagsterInstance) -> list[str]:
    """Report DVC's state to Dagster.

    Returns:
        One line for each reported event, and the lines of the snapshot.
    """
    snapshot = read(project, instance)
    return snapshot.lines + mirror(project, instance, snapshot)


def read(project: DvcProject, instance: dg.DagsterInstance) -> Snapshot:
    """Set aside the outputs that were tampered with, then read the state of all stages.

    Raises:
        InputError: a name that Dagster does not allow, or invalid dvc.yaml or dvc.lock.
    """
    project.refuse_names()
    busy, materialized = in_progress(instance), _materialized(project, instance)
    paths = {*rwlock.written(project.root)}
    states = project.read()
    lines = project.set_tampered_aside(states.values())
    states = project.read() if lines else states
    paths |= {*rwlock.written(project.root)}
    written = frozenset(address for address, state in states.items() if _overlap(state.all_outs, paths))
    lines += [*dvc.lost_records(project.root), *filter(None, map(project.damaged_report, states.values()))]
    return Snapshot(states, lines, busy, materialized, written)


def _overlap(some: Iterable[str], others: Iterable[str]) -> bool:
    return any(dvc.overlap(a, b) for a in some for b in others)


def _materialized(project: DvcProject, instance: dg.DagsterInstance) -> dict[dg.AssetKey, int | None]:
    keys = instance.get_asset_keys(prefix=project.key_prefix) if project.key_prefix else None  # None: all
    entries = [record.asset_entry for record in instance.get_asset_records(keys)]
    return {entry.asset_key: entry.last_materialization_storage_id for entry in entries}


def mirror(project: DvcProject, instance: dg.DagsterInstance, snapshot: Snapshot) -> list[str]:
    """Report the differences between these stages and Dagster's event log, one process at a time.

    An output that no recorded run made, e.g. because its stage was renamed, is reported, as stale, if a stage is
    recorded as having read it: Dagster would call that one stale, too.

    Assets are skipped that a run is about to materialize, or that were materialized
    after the snapshot: that run reports the materialization and its checks. A second
    materialization would separate the checks from the one that they evaluate.
    Of stages whose outputs are being written nothing is reported either, and of those that read them only what does not
    depend on it.

    Returns:
        One line for each event.
    """
    states = snapshot.states
    with locks.hold(project.root, SYNC_LOCK, lambda _: None, "sync"):
        sources = {
            project.source_key(i.path): i.now for state in states.values() for i in state.inputs if i.producer is None
        }
        outs = [path for address in snapshot.written for path in states[address].all_outs]
        settled = {address: _settled(state, snapshot.written, outs) for address, state in states.items()}
        sources |= {
            project.definition_key(address): state.definition_now
            for address, state in states.items()
            if settled[address].definition_changes or not _overlap(state.code, outs)
        }
        addresses = {project.asset_key(address): address for address in states}
        busy = snapshot.in_progress | in_progress(instance)
        records = {
            record.asset_entry.asset_key: record.asset_entry
            for record in instance.get_asset_records([*sources, *addresses])
        }
        latest = {key: record.last_materialization_record for key, record in records.items()}
        events = [
            line
            for key, version in sources.items()
            for line in _source(project, instance, key, version, latest.get(key))
        ]
        others = snapshot.materialized.keys() - sources.keys() - {*map(project.definition_key, states)}
        events += _wipe_definitions(project, instance, others)
        idle = {}
        inputs = [i for one in states.values() if one.recorded for i in one.inputs]
        read = {i.producer for i in inputs if i.now == i.recorded != dvc.MISSING}
        for key, address in addresses.items():
            record = latest.get(key)
            is_known = (record.storage_id if record else None) == snapshot.materialized.get(key)
            if is_known and key not in busy and address not in snapshot.written:
                idle[address] = states[address]
                has_run = record or states[address].recorded or address in read
                if has_run and settled[address] == states[address]:
                    entry = record.event_log_entry if record else None
                    events += _materialize(project, instance, states[address], states, entry)
        return events + _checks(project, instance, idle, settled)


def _settled(state: StageState, written: Collection[str], paths: Iterable[str]) -> StageState:
    """The state of a stage without the differences that may only exist because outputs that it reads are being written.

    Args:
        written: the stages that write, and `paths` their outputs.
    """
    # of a folder with outputs of several stages there is one hash
    in_folder = any(i.of_other_path and i.producer in written for i in state.inputs)
    inputs = tuple(
        replace(i, now=i.recorded) if i.recorded and (i.producer in written or (in_folder and i.of_other_path)) else i
        for i in state.inputs
    )
    changes = tuple(one for one in state.definition_changes if not _overlap([one], paths))
    return replace(state, inputs=inputs, definition_changes=changes)


def _source(
    project: DvcProject, instance: dg.DagsterInstance, key: dg.AssetKey, version: str, latest: dg.EventLogRecord | None
) -> list[str]:
    """Report a source, or the definition of a stage.

    Dagster calls such assets external: something else writes them, and reports it.
    """
    known = latest.asset_materialization if latest else None
    if known and (known.tags or {}).get(_tag_names().DATA_VERSION_TAG) == version:
        return []
    instance.report_runless_asset_event(dg.AssetMaterialization(key, tags=_source_tags(version)))
    return [f"{_shown(project, key)} is now {version[:8]}"]


def _source_tags(version: str) -> dict[str, str]:
    names = _tag_names()
    return {names.DATA_VERSION_TAG: version, names.DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}


def _shown(project: DvcProject, key: dg.AssetKey) -> str:
    """A key without the prefix of its project."""
    return dg.AssetKey(key.path[len(project.key_prefix) :]).to_user_string()


def _wipe_definitions(project: DvcProject, instance: dg.DagsterInstance, others: Iterable[dg.AssetKey]) -> list[str]:
    """Wipe what sync reported of the definitions of stages that no longer exist.

    The catalog would list them: it hides an asset only while the code location has it.

    Args:
        others: assets in the event log that are neither sources nor definitions of stages.
    """
    folder = project.definition_key("").path[:-1]
    former = [key for key in others if key.path[: len(folder)] == folder]
    latest = {
        record.asset_entry.asset_key: record.asset_entry.last_materialization
        for record in (instance.get_asset_records(former) if former else [])
    }
    # an asset that the user defined has other events
    wiped = [key for key, one in latest.items() if one and (one.tags or {}).keys() == _source_tags("").keys()]
    instance.wipe_assets(wiped)
    return [f"{_shown(project, key)} was removed" for key in wiped]


def _tag_names() -> Any:
    """Dagster's module with the names of the tags for versions of assets and of their inputs."""
    return private_module("dagster._core.definitions.data_version")


def expected_tags(project: DvcProject, state: StageState, states: Mapping[str, StageState]) -> dict[str, str]:
    """Tags of a materialization in Dagster: version from disk, input versions from dvc.lock.

    An output that differs from dvc.lock gets a different code version, which makes
    the asset stale if nothing else does. So the report of a gate that failed on
    new input changes nothing, and a failed gate is never reported as materialized.
    """
    names, problem = _tag_names(), state.output_problem
    code = CODE_VERSION + (f"+{problem}" if not state.recorded or state.changed == [problem] else "")
    tags = {
        names.DATA_VERSION_TAG: state.version,
        names.CODE_VERSION_TAG: code,
        names.DATA_VERSION_IS_USER_PROVIDED_TAG: "true",
    }
    # of several outputs of one stage, one that changed comes last
    ordered = sorted(state.inputs, key=lambda i: i.now != i.recorded)
    inputs = {
        project.asset_key(i.producer) if i.producer else project.source_key(i.path): i.recorded or "unrecorded"
        for i in ordered
    }
    # in a folder of several outputs that is as recorded: Dagster has no version of a stage that never ran
    inputs |= {
        project.asset_key(i.producer): names.NULL_DATA_VERSION.value
        for i in ordered
        if i.producer and not states[i.producer].recorded and i.now == i.recorded == dvc.MISSING
    }
    inputs[project.definition_key(state.address)] = state.definition_recorded or "unrecorded"
    for key, version in inputs.items():
        tags[names.get_input_data_version_tag(key)] = version
        tags[names.get_input_event_pointer_tag(key)] = "NULL"
    return tags


def _materialize(
    project: DvcProject,
    instance: dg.DagsterInstance,
    state: StageState,
    states: Mapping[str, StageState],
    latest: dg.EventLogEntry | None,
) -> list[str]:
    actual = dict(latest.asset_materialization.tags or {}) if latest and latest.asset_materialization else {}
    expected, names = expected_tags(project, state, states), _tag_names()
    compared = {
        tag: value
        for tag, value in expected.items()
        if tag.startswith(INPUT_TAG_PREFIX) or tag in {names.DATA_VERSION_TAG, names.CODE_VERSION_TAG}
    }
    extra = {tag for tag in actual if tag.startswith(INPUT_TAG_PREFIX)} - set(expected)
    # what is shown as stale already needs no second report, e.g. of an input that a variant adds: it would look like a
    # run, to automation conditions too
    definition = names.get_input_data_version_tag(project.definition_key(state.address))
    is_stale = state.definition_now != state.definition_recorded and actual.get(definition) not in {
        None,
        state.definition_now,
    }
    unrecorded = {
        names.get_input_data_version_tag(project.asset_key(i.producer)): i.now
        for i in state.inputs
        if i.producer and i.of_other_path
    }
    if is_stale:
        compared = {tag: value for tag, value in compared.items() if tag != definition and tag in actual}
        extra = set()
    if is_stale or any(actual.get(tag, now) != now for tag, now in unrecorded.items()):
        compared = {tag: value for tag, value in compared.items() if tag not in unrecorded}
    if not extra and all(actual.get(tag) == value for tag, value in compared.items()):
        return []
    if state.differs:  # metrics, plots and dvc.lock may be of another version, e.g. without `dvc checkout`
        metadata = {"path": ", ".join(state.outs), "data_version": state.version}
    else:
        metadata = project.describe(state)
    instance.report_runless_asset_event(
        dg.AssetMaterialization(project.asset_key(state.address), tags=expected, metadata=metadata)
    )
    return [f"{state.address} is {state.version[:8]}" + (f", {state.output_problem}" if state.output_problem else "")]


def _is_of_run(instance: dg.DagsterInstance, key: dg.AssetCheckKey, seen: Any) -> bool:
    """Whether a run is about to report the check, or has done so since it was read. A result that is reported later
    would hide that of the run.

    Args:
        seen: the AssetCheckExecutionRecord that was read; None if there was none.
    """
    latest = instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).get(key)
    if latest is None:
        return False
    if latest.event and latest.event.asset_check_evaluation:
        return seen is None or (latest.id, latest.status) != (seen.id, seen.status)
    return is_pending(instance, latest.run_id, key.asset_key)


def _checks(
    project: DvcProject,
    instance: dg.DagsterInstance,
    states: Mapping[str, StageState],
    settled: Mapping[str, StageState],
) -> list[str]:
    """Report each check result that differs from the latest one, or that evaluates an earlier materialization.

    Dagster would not show the latter. The report of another version than the output on disk has none of this output:
    Dagster shows its checks as not evaluated.

    Args:
        settled: the same states without what a running stage may cause.
    """
    reports = {
        address: None if state.report_of_other else read_report(project.root, state)
        for address, state in states.items()
    }
    results = {
        dg.AssetCheckKey(project.asset_key(address), str(result.check_name)): result
        for address, state in states.items()
        for result in [
            *project.check_results(address, state, reports[address] or {}),
            in_sync(project.asset_key(address), settled[address]),
        ]
        if result.check_name != IN_SYNC or settled[address] == state or settled[address].changed
    }
    recorded = {project.asset_key(address): state.recorded for address, state in states.items()}
    records = instance.event_log_storage.get_latest_asset_check_execution_by_key([*results])
    assets = {record.asset_entry.asset_key: record.asset_entry for record in instance.get_asset_records([*recorded])}
    events = []
    for key, result in results.items():
        record = records.get(key)
        latest = assets[key.asset_key].last_materialization_record if key.asset_key in assets else None
        if record is None and latest is None and not recorded[key.asset_key]:
            continue  # never run: the asset already shows this
        event = record.event.dagster_event if record and record.event else None
        evaluation = event.event_specific_data if event else None
        if record and isinstance(evaluation, dg.AssetCheckEvaluation):
            is_same = evaluation.metadata.get(RESULT_HASH) == result.metadata[RESULT_HASH]
            if is_same and _evaluates(record, evaluation, latest):
                continue
        if _is_of_run(instance, key, record):  # read now: the run may have been launched, or have ended, meanwhile
            continue
        target = None
        if latest:
            run_id = latest.event_log_entry.run_id
            target = _target_type()(storage_id=latest.storage_id, run_id=run_id, timestamp=latest.timestamp)
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
        events.append(
            f"check {project.address_of(key.asset_key)} {key.name}: {'passed' if result.passed else 'failed'}"
        )
    return events


def _target_type() -> Any:
    """Class of the reference from an evaluation of a check to a materialization."""
    return private_module(
        "dagster._core.definitions.asset_checks.asset_check_evaluation"
    ).AssetCheckEvaluationTargetMaterializationData


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
