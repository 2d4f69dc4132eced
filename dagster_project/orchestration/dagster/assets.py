"""dvc.yaml -> Dagster's assets and checks, derived from DVC's resolved stages at load time. Each asset runs its stage by DVC."""

import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import dagster as dg
from dagster_pipes import PipesContext, PipesDefaultContextLoader, PipesDefaultMessageWriter, PipesMappingParamsLoader

from dagster_project.core import params
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.execution import placement
from dagster_project.lineage import code_lock
from dagster_project.orchestration import dvc
from dagster_project.orchestration.dagster import pages
from dagster_project.orchestration.dagster.concurrency import FORCE_TAG, ON_TAG, build_executor, placement_variables, pool_of
from dagster_project.orchestration.dagster.dead_runs import MACHINE_TAG, end_with_run, reap
from dagster_project.orchestration.dagster.instance import open_at
from dagster_project.orchestration.dagster.metadata import (
    CODE_VERSION,
    IN_SYNC,
    IN_SYNC_DESCRIPTION,
    asset_key,
    check_results,
    definition_key,
    describe,
    in_sync,
    live,
    read_report,
    source_key,
)
from dagster_project.orchestration.dagster.sync import Snapshot, expected_tags, mirror, read, sync
from dagster_project.orchestration.dvc import StageState
from dagster_project.orchestration.private_api import private_module
from dagster_project.pipeline import PEDIGREE, Pipeline

for category in (dg.BetaWarning, dg.PreviewWarning):  # observable sources and Pipes: one line per asset and run
    warnings.filterwarnings("ignore", category=category)

INPUTS, DATA = "1_inputs", "2_data"
"""Groups of the sources and of the stages that the job `data` runs. dvc.yaml names the groups of all stages, numbered so
that lists show them in flow order."""
DAGSTER_YAML = """\
telemetry: {enabled: false}
nux: {enabled: false}
# true: an asset is shown as overdue `stale_after_days` (dvc.yaml) after its last materialization
freshness: {enabled: false}
"""


class RunConfig(dg.Config):
    force: bool = False
    """Run the stage even if nothing changed. The run tag `pedigree/force: "true"` does the same for all stages of a run."""
    on: str = ""
    """Where the stage runs: `local`, `ray`, or empty for the section `execution` of params.yaml. The run tag `pedigree/on` does the same for all
    stages of a run."""


def build_definitions(root: Path, pipeline: Pipeline = PEDIGREE) -> dg.Definitions:
    """All of Dagster's definitions for the project in `root`."""
    states, values = dvc.read_stages(root), params.read(root)
    for address in states:
        pipeline.split_address(address)
    sources = {i.path for state in states.values() for i in state.inputs if i.producer is None}
    variants = sorted({address.partition("@")[2] for address in states} - {""})
    data = [address for address, state in states.items() if state.meta.get("group") == DATA]
    upstream = {name for address in data for name in dvc.ancestors(states, address)}
    data = [address for address in states if address in data or address in upstream]
    whole = dg.define_asset_job(
        "pipeline",
        selection=dg.AssetSelection.assets(*map(asset_key, states)),
        description="All stages, in flow order. Stages that are up to date are not run.",
    )
    return dg.Definitions(
        assets=[
            *(_source(root, path) for path in sorted(sources)),
            *(_definition(root, address) for address in states),
            *(_asset(root, address, state, pipeline, values) for address, state in states.items()),
        ],
        jobs=[
            whole,
            dg.define_asset_job(
                "data",
                selection=dg.AssetSelection.assets(*map(asset_key, data)),
                description="Data stages only: from sources to splits and preferences.",
            ),
            *(
                dg.define_asset_job(
                    f"variant_{name}",
                    selection=dg.AssetSelection.assets(*(asset_key(a) for a in states if a.endswith(f"@{name}"))),
                    description=f"Train, merge and evaluate {name}.",
                )
                for name in variants
            ),
        ],
        schedules=[
            dg.ScheduleDefinition(
                name="nightly", job=whole, cron_schedule="0 3 * * *", description="Example of a schedule, off by default."
            )
        ],
        sensors=[_sync_sensor(root, pipeline)],
        executor=build_executor(root, pipeline),
    )


def _source(root: Path, path: str) -> dg.SourceAsset:
    @dg.observable_source_asset(key=source_key(path), group_name=INPUTS, description=f"`{path}` in the workspace.")
    def observe() -> dg.DataVersion:
        return dg.DataVersion(next(i.now for state in dvc.read_stages(root).values() for i in state.inputs if i.path == path))

    return observe


def _definition(root: Path, address: str) -> dg.SourceAsset:
    @dg.observable_source_asset(
        key=definition_key(address),
        group_name="definitions",
        description=f"Command, parameters and code of `{address}`.",
        metadata={_hidden_asset_key(): True},  # hidden by default (docs/decisions/016)
    )
    def observe() -> dg.DataVersion:
        return dg.DataVersion(dvc.read_stages(root)[address].definition_now)

    return observe


def _hidden_asset_key() -> str:
    """Metadata key of assets that Dagster's UI hides."""
    return str(private_module("dagster._core.definitions.assets.definition.asset_spec").SYSTEM_METADATA_KEY_AUTO_CREATED_STUB_ASSET)


def _asset(root: Path, address: str, state: StageState, pipeline: Pipeline, values: Mapping[str, Any]) -> dg.AssetsDefinition:
    upstream = dict.fromkeys(
        [asset_key(i.producer) if i.producer else source_key(i.path) for i in state.inputs] + [definition_key(address)]
    )
    checks = [
        dg.AssetCheckSpec(name, asset=asset_key(address), description=description)
        for name, description in {**pipeline.check_descriptions(address.partition("@")[0]), IN_SYNC: IN_SYNC_DESCRIPTION}.items()
    ]

    days = state.meta.get("stale_after_days")
    freshness = dg.FreshnessPolicy.time_window(fail_window=timedelta(days=days)) if days else None

    @dg.asset(
        key=asset_key(address),
        deps=list(upstream),
        code_version=CODE_VERSION,
        check_specs=checks,
        description=state.description,
        group_name=_group(address, state),
        kinds=set(state.meta.get("kinds", [])),
        pool=pool_of(address, pipeline, values),
        freshness_policy=freshness,
        metadata={
            "command": f"python -m dagster_project run {address}",
            "output": state.out,
            "pages": dg.MetadataValue.url(pages.url(root, f"{address.replace('@', '/')}/")),
        },
    )
    def body(context: dg.AssetExecutionContext, config: RunConfig) -> Iterator[Any]:
        force = config.force or context.run.tags.get(FORCE_TAG) == "true"
        yield from _bring_up_to_date(context, root, address, pipeline, force, config.on or context.run.tags.get(ON_TAG, ""))

    return body


def _group(address: str, state: StageState) -> str:
    """Group of an asset; for a variant, a subgroup of its stage's group, e.g. "3_training/adapter_lora".

    A node in Dagster's graph shows only the last part of its key, which is the same for every stage of a variant.
    """
    group = str(state.meta.get("group", "default"))
    return f"{group}/{re.sub('[^A-Za-z0-9_]', '_', address)}" if "@" in address else group


@dataclass(frozen=True)
class MirrorState:
    """State of all stages when this process last mirrored it to an instance."""

    run_id: str
    """Another run mirrors again, because assets planned by this run were skipped."""
    states: dict[str, StageState]
    stamp: list[tuple[str, int, int, int]] | None
    """`dvc.stamp` from before the states were read; None if unknown. While it is the same, they are not read again."""


_mirrored: WeakKeyDictionary[dg.DagsterInstance, MirrorState] = WeakKeyDictionary()


def _bring_up_to_date(
    context: dg.AssetExecutionContext, root: Path, address: str, pipeline: Pipeline, force: bool, on: str
) -> Iterator[Any]:
    """Sync, run the stage by DVC if it is not up to date, report checks and version, sync again.

    Raises:
        Failure: the stage is not ready, or failed.
    """
    instance = context.instance
    end_with_run(instance, context.run_id)
    instance.add_run_tags(context.run_id, {MACHINE_TAG: platform.node()})
    try:
        placement(
            pipeline.validate(root), address, pipeline.stages, pipeline.variants_of, placement_variables(on)
        )  # first: bad input leaves the log unchanged
        known = _mirrored.get(instance)
        known = known if known and known.run_id == context.run_id else None
        now = dvc.stamp(root, known.states) if known else None
        if known and now == known.stamp:
            states = known.states
        else:
            snapshot = _read_when_idle(context, root, address, pipeline)
            states = snapshot.states
            if not known or states != known.states:
                mirror(root, instance, snapshot, pipeline)
            _mirrored[instance] = MirrorState(context.run_id, states, now if known and states.keys() == known.states.keys() else None)
        if address not in states:
            raise dg.Failure(f"{address} is no longer in dvc.yaml. Reload the code location.", allow_retries=False)
        if reason := _not_ready(states, address):
            raise dg.Failure(f"{address} was not run: {reason}.", allow_retries=False)
        done = "nothing"
        after: Snapshot | None = None
        if force or states[address].changed:
            for _ in range(2):  # an output restored from a tampered object is set aside, then the stage runs
                done = _reproduce(context, root, address, force, on)
                after = _read(context, root, pipeline)
                states = after.states
                if not states[address].output_problem:
                    break
        else:
            context.log.info(f"{address} is up to date; it was not run")
    except PedigreeError as error:
        with suppress(PedigreeError):  # the stages may be unreadable
            report = read_report(root, dvc.read_stages(root)[address]) or {}
            yield from check_results(root, address, report if report.get("passed") is False else {}, pipeline)
        raise dg.Failure(str(error), allow_retries=False) from None
    state = states[address]
    report = read_report(root, state) or {}
    yield from check_results(root, address, report, pipeline)
    yield in_sync(state)
    if report.get("passed") is False:
        raise dg.Failure(f"{address}: a blocking check failed. See {state.report}.", allow_retries=False)
    if state.output_problem:
        raise dg.Failure(f"{address}: {state.output_problem}. Materialize it again.", allow_retries=False)
    # the same tags as sync reports, so that it does not report a second materialization
    yield dg.MaterializeResult(
        asset_key=asset_key(address),
        data_version=dg.DataVersion(state.version),
        metadata={**describe(root, state), "done": done},
        tags=expected_tags(state),
    )
    if after is not None:
        mirror(root, instance, after, pipeline)
        _mirrored[instance] = MirrorState(context.run_id, states, None)


def _read(context: dg.AssetExecutionContext, root: Path, pipeline: Pipeline) -> Snapshot:
    snapshot = read(root, context.instance, pipeline)
    for line in snapshot.lines:
        context.log.warning(line)
    return snapshot


def _read_when_idle(context: dg.AssetExecutionContext, root: Path, address: str, pipeline: Pipeline) -> Snapshot:
    """State of all stages, once no process writes inputs of `address`: DVC removes outputs for a moment even if it then restores them."""
    logged = False
    while True:
        snapshot = _read(context, root, pipeline)
        states = snapshot.states
        writer = dvc.writer_of(root, [states[name].out for name in dvc.ancestors(states, address)]) if address in states else ""
        if not writer:
            return snapshot
        if not logged:
            context.log.info(f"{address} is waiting: {writer} is writing its inputs")
            logged = True
        time.sleep(0.5)


def _not_ready(states: Mapping[str, StageState], address: str) -> str:
    """Why a stage cannot run yet, and the next step; empty if all of its inputs are up to date."""
    upstream = dvc.ancestors(states, address)
    for name in [*upstream, address]:
        for source in states[name].inputs:
            if source.problem:
                return source.problem
    changed = [name for name in upstream if states[name].changed]
    if not changed:
        return ""
    first = states[changed[0]]
    fetch = ""
    if first.version == dvc.MISSING and first.recorded:
        restore, pull = f"`dvc checkout {first.out}` restores it", f"it is not in the cache: `dvc pull {first.out}` fetches it"
        fetch = f"; {restore if first.in_cache else pull}"
    return f"{', '.join(changed)} must be brought up to date first ({first.address}: {first.changed[0]}{fetch})"


def _reproduce(context: dg.AssetExecutionContext, root: Path, address: str, force: bool, on: str) -> str:
    """Run the stage's command by DVC, and stream its log to this run through Dagster Pipes.

    Returns:
        "run", "restored" or "nothing".
    """
    latest = live(root, address)  # of an earlier run

    def report_progress() -> None:
        nonlocal latest
        now = live(root, address)
        if now and now != latest:
            context.log_event(dg.AssetObservation(asset_key(address), metadata=now))
        latest = now

    with dg.open_pipes_session(
        context=context, context_injector=dg.PipesTempFileContextInjector(), message_reader=dg.PipesTempFileMessageReader()
    ) as session:
        variables = session.get_bootstrap_env_vars()
        done = dvc.reproduce(
            root,
            address,
            force,
            {**variables, "PYTHONUNBUFFERED": "1", **placement_variables(on)},
            on_wait=lambda holder: context.log.info(f"{address} is waiting: {holder}"),
            on_progress=report_progress,
        )
        if Path(session.message_reader_params["path"]).stat().st_size:
            return "run"
        reader = PipesMappingParamsLoader(variables)  # no command was started, so the Pipes messages are sent here
        with PipesContext(reader, PipesDefaultContextLoader(), PipesDefaultMessageWriter()):
            context.log.info(f"{address} was restored from DVC's run cache" if done else f"{address} is up to date; it was not run")
        return "restored" if done else "nothing"


def _sync_sensor(root: Path, pipeline: Pipeline) -> dg.SensorDefinition:
    @dg.sensor(
        name="sync",
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports DVC's state to Dagster's event log, and marks runs as failed whose process was killed.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        lines = reap(context.instance) + sync(root, context.instance, pipeline)
        return dg.SkipReason("; ".join(lines) if lines else "Dagster and DVC agree.")

    return sensor


def project_root() -> Path:
    """The project to show: PEDIGREE_PROJECT; else the working folder if its stages run with installed code; else the clone with this package; else the
    working folder."""
    if os.environ.get("PEDIGREE_PROJECT"):
        return Path(os.environ["PEDIGREE_PROJECT"])
    here, clone = Path.cwd(), Path(__file__).resolve().parents[3]
    return clone if (clone / "dvc.yaml").is_file() and not code_lock.is_used(here) else here


OWNER = "pedigree_project"
"""File in Dagster's home with the path of its project."""


def home(root: Path) -> Path:
    """Dagster's home: DAGSTER_HOME, or .dagster in the project.

    Raises:
        InputError: it is not writable, or belongs to another project.
    """
    folder = Path(os.environ.get("DAGSTER_HOME") or root / ".dagster").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if not (folder / "dagster.yaml").exists():
            (folder / "dagster.yaml").write_text(DAGSTER_YAML)
        owner = folder / OWNER
        other = Path(owner.read_text().strip()) if owner.is_file() else folder.parent if (folder.parent / "dvc.yaml").is_file() else root
        if other != root and not folder.is_relative_to(root) and (other / "dvc.yaml").is_file():
            raise InputError(
                f"Dagster's home {folder} belongs to the project in {other}",
                f"unset DAGSTER_HOME, or set it to a folder of this project, e.g. {root / '.dagster'}",
            )
        if not owner.is_file() or other != root:
            owner.write_text(f"{root}\n")
    except OSError as error:
        raise InputError(
            f"Dagster's home {folder} is not writable: {error.strerror}", "fix its permissions, or set DAGSTER_HOME to another folder"
        ) from None
    return folder


def open_instance(root: Path) -> dg.DagsterInstance:
    """The persistent Dagster instance of the project. Use it in a `with` block."""
    return open_at(home(root))
