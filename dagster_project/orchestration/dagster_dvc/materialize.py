"""The body of a stage's asset: sync, `dvc repro` of this stage alone, checks, version."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import dagster as dg
from dagster_pipes import PipesContext, PipesDefaultContextLoader, PipesDefaultMessageWriter, PipesMappingParamsLoader
from sqlalchemy.exc import SQLAlchemyError

from dagster_project.core import faults
from dagster_project.core.errors import CheckFailed, PedigreeError
from dagster_project.orchestration import durations, dvc, dvc_run, rwlock
from dagster_project.orchestration.dagster_dvc.dead_runs import end_with_run, interrupt_if_canceled, remaining, tag_run
from dagster_project.orchestration.dagster_dvc.failure import StageFailure, StageInterrupted, StageRetry
from dagster_project.orchestration.dagster_dvc.metadata import check_result, finite, in_sync, read_report
from dagster_project.orchestration.dagster_dvc.progress import progress
from dagster_project.orchestration.dagster_dvc.project import DvcProject
from dagster_project.orchestration.dagster_dvc.sync import Snapshot, expected_tags, mirror, read
from dagster_project.orchestration.dvc import StageState

log = logging.getLogger("pedigree")

ATTEMPTS = 1_000_000
"""How often a step begins that finds each time that another step of its run has to end first."""
NO_RESULT = "the report has no such check; if it was renamed or removed in dvc.yaml, reload the code location"


@dataclass(frozen=True)
class MirrorState:
    """State of all stages when this process last mirrored it to an instance."""

    run_id: str
    """Another run mirrors again, because assets planned by this run were skipped."""
    states: dict[str, StageState]
    stamp: list[tuple[str, int, int, int]] | None
    """`dvc.stamp` from before the states were read; None if unknown. While it is the same, they are not read again."""


_mirrored: WeakKeyDictionary[dg.DagsterInstance, dict[DvcProject, MirrorState]] = WeakKeyDictionary()


def bring_up_to_date(
    context: dg.AssetExecutionContext, project: DvcProject, address: str, force: bool, variables: Mapping[str, str]
) -> Iterator[Any]:
    """Sync, run the stage by DVC if it is not up to date, report checks and version, sync again.

    Args:
        variables: for the environment of the stage command.
    Raises:
        StageFailure: the stage is not ready, or failed.
        StageInterrupted: the run was terminated.
    """
    instance, key = context.instance, project.asset_key(address)
    end_with_run(instance, context.run_id, project.owns_instance)
    interrupt_if_canceled(instance, context.run_id)
    tag_run(instance, context.run_id)
    mirrored = _mirrored.setdefault(instance, {})
    reported: tuple[int, ...] | None = None
    try:
        project.before_sync(instance)
        project.validate(address, variables)  # first: bad input leaves the log unchanged
        states = _states_before(context, project, address)
        _refuse_removed(states, address)
        _refuse_unready(context, project, states, address)
        done = "nothing"
        after: Snapshot | None = None
        if not states[address].frozen and (states[address].changed or force):
            reported = _report_stamp(project.root, states[address])
            why = ", ".join(states[address].changed) or "forced"
            context.log.info(f"{address}: started ({why}). {progress(instance, context.run, project, states, address)}")
            for _ in range(2):  # an output restored from a tampered object is set aside, then the stage runs
                done = _reproduce(context, project, address, force, variables)
                # a forced run of it may have waited for this one
                after = _read_when_idle(context, project, address, own=True)
                states = after.states
                _refuse_removed(states, address)
                if not states[address].differs:
                    break
        else:
            context.log.info(f"{address} is {'frozen' if states[address].frozen else 'up to date'}; it was not run")
    except dg.DagsterExecutionInterruptedError:
        raise StageInterrupted(f"{address} was interrupted; nothing was recorded.") from None
    except Exception as error:
        known = faults.explained(error, project.root)
        if known is None:
            raise
        with suppress(PedigreeError, KeyError, OSError):  # the stages may be unreadable
            failed = project.read()[address]
            if reported not in (None, _report_stamp(project.root, failed)):  # otherwise it is of an earlier attempt
                report = read_report(project.root, failed) or {}
                results = project.check_results(address, failed, report if project.blocks(address, report) else {})
                yield from (one for one in results if one.check_name in _planned_checks(context, key))
        raise StageFailure(str(known)) from None
    state = states[address]
    report = read_report(project.root, state) or {}
    results = [*project.check_results(address, state, report), in_sync(key, state)]
    found = {one.check_name: one for one in results}
    for name in _planned_checks(context, key):
        yield found.get(name) or check_result(key, name, "", {"note": NO_RESULT}, "warn", {})
    if project.blocks(address, report):
        raise StageFailure(f"{address}: a blocking check failed. See {state.report}.")
    if state.differs:
        raise StageFailure(f"{address}: {state.output_problem}. Materialize it again.")
    # the same tags as sync reports, so that it does not report a second materialization
    yield dg.MaterializeResult(
        asset_key=key,
        data_version=dg.DataVersion(state.version),
        metadata={**project.describe(state), "done": done},
        tags=expected_tags(project, state, states),
    )
    if after is not None:
        mirror(project, instance, after)
        mirrored[project] = MirrorState(context.run_id, states, None)


def _report_stamp(root: Path, state: StageState) -> tuple[int, ...]:
    """Identity and time of a stage's report; empty if there is none."""
    try:
        found = (root / (state.report or "")).stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns


def _refuse_removed(states: Mapping[str, StageState], address: str) -> None:
    """Raises:
    StageFailure: the stage was removed from dvc.yaml, or its variant from params.yaml, since Dagster loaded it.
    """
    if address not in states:
        raise StageFailure(f"{address} is no longer in dvc.yaml. Reload the code location.")


def _planned_checks(context: dg.AssetExecutionContext, key: dg.AssetKey) -> list[str]:
    """Names of an asset's checks when Dagster loaded it. It requires a result of each, and allows no other."""
    return sorted(check.name for check in context.selected_asset_check_keys if check.asset_key == key)


def _states_before(context: dg.AssetExecutionContext, project: DvcProject, address: str) -> dict[str, StageState]:
    """State of all stages, mirrored to the instance.

    It is read and mirrored again only if a file changed since this run last did.
    """
    mirrored = _mirrored[context.instance]
    known = mirrored.get(project)
    known = known if known and known.run_id == context.run_id else None
    now = dvc.stamp(project.root, known.states) if known else None
    if known and now == known.stamp:
        return known.states
    snapshot = _read_when_idle(context, project, address)
    states = snapshot.states
    if not known or states != known.states:
        mirror(project, context.instance, snapshot)
    mirrored[project] = MirrorState(
        context.run_id, states, now if known and states.keys() == known.states.keys() else None
    )
    return states


def _read(context: dg.AssetExecutionContext, project: DvcProject) -> Snapshot:
    snapshot = read(project, context.instance)
    for line in snapshot.lines:
        context.log.warning(line)
    return snapshot


def _read_when_idle(
    context: dg.AssetExecutionContext, project: DvcProject, address: str, own: bool = False
) -> Snapshot:
    """State of all stages, once no other process holds DVC's lock of the project, or writes inputs of `address`.

    DVC removes outputs for a moment even if it then restores them.

    Args:
        own: wait for its outputs instead.
    """
    logged = ""
    while True:
        if holder := rwlock.lock_holder(project.root):
            waits_for = f"{holder} holds DVC's lock of the project"
        else:
            snapshot = _read(context, project)
            states = snapshot.states
            names = ([address] if own else dvc.ancestors(states, address)) if address in states else []
            writer = rwlock.writer_of(project.root, [path for name in names for path in states[name].outs])
            if not writer:
                return snapshot
            waits_for = f"{writer} is writing its {'outputs' if own else 'inputs'}"
        if logged != waits_for:
            context.log.info(f"{address} is waiting: {waits_for}")
            logged = waits_for
        interrupt_if_canceled(context.instance, context.run_id)
        time.sleep(0.5)


def _refuse_unready(
    context: dg.AssetExecutionContext, project: DvcProject, states: Mapping[str, StageState], address: str
) -> None:
    """Raises:
    StageRetry: a stage upstream is in this run and has not ended. If the selection has no stages between, Dagster
        does not know that it comes first.
    StageFailure: an input of the stage is not up to date.
    """
    if not (reason := _not_ready(states, address)):
        return
    if remaining(context.instance, context.run_id) & {*map(project.asset_key, dvc.ancestors(states, address))}:
        raise StageRetry(f"{address} is waiting: {reason}", ATTEMPTS, seconds=10)
    raise StageFailure(f"{address} was not run: {reason}.")


def _not_ready(states: Mapping[str, StageState], address: str) -> str:
    """Why a stage cannot run yet, and the next step; empty if all of its inputs are up to date."""
    # as DVC's graph
    running = {name: replace(state, inputs=()) if state.frozen else state for name, state in states.items()}
    upstream = dvc.ancestors(running, address)
    for name in [*upstream, address]:
        for source in running[name].inputs:
            if source.problem:
                return source.problem
    changed = [name for name in upstream if not states[name].as_recorded]
    if not changed:
        return states[address].frozen_problem
    first = states[changed[0]]
    # a variant that was added since Dagster loaded the project: a run of all assets does not include it
    fetch = "" if first.recorded else "; if Dagster does not list it, reload the code location"
    if first.version == dvc.MISSING and first.recorded:
        restore = f"`dvc checkout {first.out}` restores it"
        pull = f"it is not in the cache: `dvc pull {first.out}` fetches it"
        fetch = f"; {restore if first.in_cache else pull}"
    return f"{', '.join(changed)} must be brought up to date first ({first.address}: {first.changed[0]}{fetch})"


class MessageReader(dg.PipesTempFileMessageReader):
    """Dagster's reader of a file.

    Only the count is new: Dagster marks its default as a preview, and warns in each run that uses it.
    """

    @property
    def expected_writer_count(self) -> int:
        return 1


def _is_of_database(error: Exception) -> bool:
    """Whether Dagster's database caused it. The second class is of an optional package."""
    return isinstance(error, SQLAlchemyError) or type(error).__name__ == "DagsterPostgresException"


def _reproduce(
    context: dg.AssetExecutionContext, project: DvcProject, address: str, force: bool, variables: Mapping[str, str]
) -> str:
    """Run the stage's command by DVC. A command that uses Dagster Pipes streams its log to this run.

    Returns:
        "run", "restored" or "nothing".
    """
    latest = project.progress(address)  # of an earlier run

    def report_progress() -> None:
        nonlocal latest
        now = project.progress(address)
        try:
            interrupt_if_canceled(context.instance, context.run_id)
            if now and now != latest:
                context.log_event(dg.AssetObservation(project.asset_key(address), metadata=finite(now)))
        except Exception as error:
            if not _is_of_database(error):
                raise
            # an error here would end the stage; the database may answer again before it is done
            reason = str(error).strip().partition("\n")[0]
            log.warning(f"{address} goes on running, although Dagster's database does not answer: {reason}")
        latest = now

    try:
        with dg.open_pipes_session(
            context=context, context_injector=dg.PipesTempFileContextInjector(), message_reader=MessageReader()
        ) as session:
            pipes, began = session.get_bootstrap_env_vars(), time.monotonic()
            with dvc_run.commands_started() as started:
                done = dvc_run.reproduce(
                    project.root,
                    address,
                    force,
                    {**pipes, "PYTHONUNBUFFERED": "1", **variables},
                    on_wait=lambda holder: context.log.info(f"{address} is waiting: {holder}"),
                    on_progress=report_progress,
                    before_attempt=lambda: interrupt_if_canceled(context.instance, context.run_id),
                    # that of the process has two thousand characters, all settings of Dagster's database among them
                    command=["dagster", "run", context.run_id[:8]],
                )
            outcome = "run" if started else "restored" if done else "nothing"
            if started:
                durations.record(project.root, address, time.monotonic() - began)
            if Path(session.message_reader_params["path"]).stat().st_size:
                return outcome
            reader = PipesMappingParamsLoader(pipes)  # the command sent no messages, so they are sent here
            with PipesContext(reader, PipesDefaultContextLoader(), PipesDefaultMessageWriter()):
                context.log.info(f"{address} {OUTCOMES[outcome]}")
            return outcome
    except CheckFailed:
        # "see its own message above" would be far above, before the results of all checks
        said = [one for one in session.get_custom_messages() if isinstance(one, Mapping) and dvc_run.FAILURE in one]
        if not said:
            raise
        raise CheckFailed(*said[-1][dvc_run.FAILURE]) from None


OUTCOMES = {
    "run": "was run by DVC",
    "restored": "was restored from DVC's run cache",
    "nothing": "is up to date; it was not run",
}
