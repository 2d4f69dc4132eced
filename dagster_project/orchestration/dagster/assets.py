"""dvc.yaml -> Dagster's assets and checks. Derived at load time from DVC's resolved stages; each body lets DVC run its stage."""

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
from dagster._core.definitions.assets.definition.asset_spec import SYSTEM_METADATA_KEY_AUTO_CREATED_STUB_ASSET
from dagster_pipes import PipesContext, PipesDefaultContextLoader, PipesDefaultMessageWriter, PipesMappingParamsLoader

from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.orchestration import dvc
from dagster_project.orchestration.dagster import pages
from dagster_project.orchestration.dagster.dead_runs import MACHINE_TAG, reap
from dagster_project.orchestration.dagster.metadata import (
    CODE_VERSION,
    IN_SYNC,
    IN_SYNC_TRUTH,
    asset_key,
    check_results,
    definition_key,
    describe,
    in_sync,
    live,
    read_report,
    source_key,
)
from dagster_project.orchestration.dagster.sync import Reading, mirror, read, sync, wanted_tags
from dagster_project.orchestration.dvc import StageState
from dagster_project.pipeline import PEDIGREE, Pipeline

for category in (dg.BetaWarning, dg.PreviewWarning):  # observable sources, Pipes: one line per asset and run, of no use
    warnings.filterwarnings("ignore", category=category)

INPUTS, DATA = "1_inputs", "2_data"
"""Groups of the sources and of the stages that the job `data` runs. dvc.yaml names the groups of all stages, numbered so
that lists show them in flow order."""
FORCE_TAG = "pedigree/force"
DAGSTER_YAML = """\
telemetry: {enabled: false}
nux: {enabled: false}
# true: an asset whose `stale_after_days` in dvc.yaml have passed since its last materialization is shown as overdue
freshness: {enabled: false}
"""


class RunConfig(dg.Config):
    force: bool = False
    """Run the stage even if nothing changed. The run tag `pedigree/force: "true"` does the same for all stages of a run."""


def build_definitions(root: Path, pipeline: Pipeline = PEDIGREE) -> dg.Definitions:
    """All of Dagster's definitions for the project in `root`."""
    states = dvc.read_stages(root)
    for address in states:
        pipeline.split_address(address)
    sources = {i.path for state in states.values() for i in state.inputs if i.producer is None}
    variants = sorted({address.partition("@")[2] for address in states} - {""})
    data = [address for address, state in states.items() if state.meta.get("group") == DATA]
    data = [address for address in states if address in data or any(address in dvc.ancestors(states, one) for one in data)]
    whole = dg.define_asset_job(
        "pipeline",
        selection=dg.AssetSelection.assets(*map(asset_key, states)),
        description="Everything, in flow order; what is up to date runs nothing.",
    )
    return dg.Definitions(
        assets=[
            *(_source(root, path) for path in sorted(sources)),
            *(_definition(root, address) for address in states),
            *(_asset(root, address, state, pipeline) for address, state in states.items()),
        ],
        jobs=[
            whole,
            dg.define_asset_job(
                "data",
                selection=dg.AssetSelection.assets(*map(asset_key, data)),
                description="The data side only: from sources to splits and preferences.",
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
        schedules=[dg.ScheduleDefinition(name="nightly", job=whole, cron_schedule="0 3 * * *", description="An example, off by default.")],
        sensors=[_sync_sensor(root, pipeline)],
        executor=dg.in_process_executor,
    )


def _source(root: Path, path: str) -> dg.SourceAsset:
    @dg.observable_source_asset(key=source_key(path), group_name=INPUTS, description=f"`{path}`, as it is in the workspace.")
    def observe() -> dg.DataVersion:
        return dg.DataVersion(next(i.now for state in dvc.read_stages(root).values() for i in state.inputs if i.path == path))

    return observe


def _definition(root: Path, address: str) -> dg.SourceAsset:
    @dg.observable_source_asset(
        key=definition_key(address),
        group_name="definitions",
        description=f"Command, parameters and code of `{address}`.",
        metadata={SYSTEM_METADATA_KEY_AUTO_CREATED_STUB_ASSET: True},  # hidden by default (docs/decisions/016)
    )
    def observe() -> dg.DataVersion:
        return dg.DataVersion(dvc.read_stages(root)[address].definition_now)

    return observe


def _asset(root: Path, address: str, state: StageState, pipeline: Pipeline) -> dg.AssetsDefinition:
    upstream = dict.fromkeys(
        [asset_key(i.producer) if i.producer else source_key(i.path) for i in state.inputs] + [definition_key(address)]
    )
    checks = [
        dg.AssetCheckSpec(name, asset=asset_key(address), description=truth)
        for name, truth in {**pipeline.check_descriptions(address.partition("@")[0]), IN_SYNC: IN_SYNC_TRUTH}.items()
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
        freshness_policy=freshness,
        metadata={
            "command": f"python -m dagster_project run {address}",
            "output": state.out,
            "pages": dg.MetadataValue.url(pages.url(root, f"{address.replace('@', '/')}/")),
        },
    )
    def body(context: dg.AssetExecutionContext, config: RunConfig) -> Iterator[Any]:
        yield from _bring_up_to_date(context, root, address, pipeline, config.force or context.run.tags.get(FORCE_TAG) == "true")

    return body


def _group(address: str, state: StageState) -> str:
    """Group of an asset; of a variant, a group in that of its stage, e.g. "3_training/adapter_lora".

    A node in Dagster's graph shows only the last part of its key, which is the same for every stage of a variant.
    """
    group = str(state.meta.get("group", "default"))
    return f"{group}/{re.sub('[^A-Za-z0-9_]', '_', address)}" if "@" in address else group


@dataclass(frozen=True)
class Mirrored:
    """State of all stages when this process last brought an instance up to date."""

    run_id: str
    """Run in which that happened. Another run mirrors again, because assets planned by this run were skipped."""
    states: dict[str, StageState]
    stamp: list[tuple[str, int, int, int]] | None
    """`dvc.stamp` from before they were read, if known: while it is the same, they need not be read again."""


_mirrored: WeakKeyDictionary[dg.DagsterInstance, Mirrored] = WeakKeyDictionary()


def _bring_up_to_date(context: dg.AssetExecutionContext, root: Path, address: str, pipeline: Pipeline, force: bool) -> Iterator[Any]:
    """Sync, let DVC run the stage if it is not up to date, report checks and version, sync again."""
    instance = context.instance
    instance.add_run_tags(context.run_id, {MACHINE_TAG: platform.node()})
    try:
        pipeline.validate(root)  # before anything is reported: bad input leaves the event log as it was
        known = _mirrored.get(instance)
        known = known if known and known.run_id == context.run_id else None
        now = dvc.stamp(root, known.states) if known else None
        if known and now == known.stamp:
            states = known.states
        else:
            reading = _settled(context, root, address, pipeline)
            states = reading.states
            if not known or states != known.states:
                mirror(root, instance, reading, pipeline)
            _mirrored[instance] = Mirrored(context.run_id, states, now if known and states.keys() == known.states.keys() else None)
        if address not in states:
            raise dg.Failure(f"{address} is no longer in dvc.yaml. Reload the code location.", allow_retries=False)
        if why := _not_ready(states, address):
            raise dg.Failure(f"{address} was not run: {why}.", allow_retries=False)
        done = "nothing"
        after: Reading | None = None
        if force or states[address].changed:
            for _ in range(2):  # an output restored from a tampered cache object is set aside, then the stage runs
                done = _reproduce(context, root, address, force)
                after = _read(context, root, pipeline)
                states = after.states
                if not states[address].doubt:
                    break
        else:
            context.log.info(f"{address} is up to date; nothing was run")
    except PedigreeError as error:
        with suppress(PedigreeError):  # the error may be that the stages cannot be read
            report = read_report(root, dvc.read_stages(root)[address]) or {}
            yield from check_results(root, address, report if report.get("passed") is False else {}, pipeline)
        raise dg.Failure(str(error), allow_retries=False) from None
    state = states[address]
    report = read_report(root, state) or {}
    yield from check_results(root, address, report, pipeline)
    yield in_sync(state)
    if report.get("passed") is False:
        raise dg.Failure(f"{address}: its report says that a blocking check failed. See {state.report}.", allow_retries=False)
    if state.doubt:
        raise dg.Failure(f"{address}: {state.doubt}. Materialize it again.", allow_retries=False)
    # the tags are those that sync would report, so that there is nothing to correct and no second materialization
    yield dg.MaterializeResult(
        asset_key=asset_key(address),
        data_version=dg.DataVersion(state.version),
        metadata={**describe(root, state), "done": done},
        tags=wanted_tags(state),
    )
    if after is not None:
        mirror(root, instance, after, pipeline)
        _mirrored[instance] = Mirrored(context.run_id, states, None)


def _read(context: dg.AssetExecutionContext, root: Path, pipeline: Pipeline) -> Reading:
    reading = read(root, context.instance, pipeline)
    for line in reading.lines:
        context.log.warning(line)
    return reading


def _settled(context: dg.AssetExecutionContext, root: Path, address: str, pipeline: Pipeline) -> Reading:
    """State of all stages, once no process works on the inputs of `address`: DVC removes outputs briefly even if it then restores them."""
    logged = False
    while True:
        reading = _read(context, root, pipeline)
        states = reading.states
        holder = dvc.at_work(root, [states[name].out for name in dvc.ancestors(states, address)]) if address in states else ""
        if not holder:
            return reading
        if not logged:
            context.log.info(f"{address} waits: {holder} is writing its inputs")
            logged = True
        time.sleep(0.5)


def _not_ready(states: Mapping[str, StageState], address: str) -> str:
    """Why a stage cannot run yet and what to do; empty if all of its inputs are up to date. Nothing has been deleted yet."""
    above = dvc.ancestors(states, address)
    for name in [*above, address]:
        for source in states[name].inputs:
            if source.unclean:
                return source.unclean
    unclean = [name for name in above if states[name].changed]
    if not unclean:
        return ""
    first = states[unclean[0]]
    fetch = ""
    if first.version == dvc.MISSING and first.recorded:
        fetch = (
            f"; `dvc checkout {first.out}` brings it back"
            if first.in_cache
            else f"; it is not in the cache: `dvc pull {first.out}` fetches it"
        )
    return f"{', '.join(unclean)} must be brought up to date first ({first.address}: {first.changed[0]}{fetch})"


def _reproduce(context: dg.AssetExecutionContext, root: Path, address: str, force: bool) -> str:
    """DVC runs the stage command; what the command logs streams into this run's log through Dagster Pipes. Returns "run", "restored" or "nothing"."""
    seen = live(root, address)  # of an earlier run

    def watching() -> None:
        nonlocal seen
        now = live(root, address)
        if now and now != seen:
            context.log_event(dg.AssetObservation(asset_key(address), metadata=now))
        seen = now

    with dg.open_pipes_session(
        context=context, context_injector=dg.PipesTempFileContextInjector(), message_reader=dg.PipesTempFileMessageReader()
    ) as session:
        variables = session.get_bootstrap_env_vars()
        done = dvc.reproduce(
            root,
            address,
            force,
            {**variables, "PYTHONUNBUFFERED": "1"},
            waiting=lambda who: context.log.info(f"{address} waits: {who}"),
            watching=watching,
        )
        if Path(session.message_reader_params["path"]).stat().st_size:
            return "run"
        reader = PipesMappingParamsLoader(variables)  # no command was started: send the Pipes messages here
        with PipesContext(reader, PipesDefaultContextLoader(), PipesDefaultMessageWriter()):
            context.log.info(f"{address} was restored from DVC's run cache" if done else f"{address} is up to date; nothing was run")
        return "restored" if done else "nothing"


def _sync_sensor(root: Path, pipeline: Pipeline) -> dg.SensorDefinition:
    @dg.sensor(
        name="sync",
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Mirrors what DVC did into Dagster's event log, and ends runs whose process was killed.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        lines = reap(context.instance) + sync(root, context.instance, pipeline)
        return dg.SkipReason("; ".join(lines) if lines else "Dagster and DVC agree.")

    return sensor


def project_root() -> Path:
    """The project this package belongs to: PEDIGREE_PROJECT, or the folder above the package."""
    return Path(os.environ.get("PEDIGREE_PROJECT") or Path(__file__).resolve().parents[3])


OWNER = "pedigree_project"
"""File in Dagster's home: the project that it belongs to."""


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
                f"unset DAGSTER_HOME, or set it to a folder of this project's own, e.g. {root / '.dagster'}",
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
    return dg.DagsterInstance.from_config(str(home(root)))
