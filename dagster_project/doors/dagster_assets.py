"""dvc.yaml -> Dagster's assets and checks. Derived at load time from DVC's resolved stages; each body lets DVC run its stage."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_project import pipeline
from dagster_project.doors import dvc
from dagster_project.doors.dvc import StageState
from dagster_project.doors.report import CODE_VERSION, asset_key, check_results, definition_key, describe, read_report, source_key
from dagster_project.doors.sync import sync
from dagster_project.errors import InputError, PedigreeError

for category in (dg.BetaWarning, dg.PreviewWarning):  # observable sources, Pipes: one line per asset and run helps nobody
    warnings.filterwarnings("ignore", category=category)

FORCE_TAG = "pedigree/force"


class RunConfig(dg.Config):
    force: bool = False
    """Run the stage even if nothing changed. The run tag `pedigree/force: "true"` does the same for all stages of a run."""


def build_definitions(root: Path) -> dg.Definitions:
    """All of Dagster's definitions for the project in `root`."""
    street = dvc.read_street(root)
    sources = {i.path for state in street.values() for i in state.inputs if i.producer is None}
    variants = sorted({address.partition("@")[2] for address in street} - {""})
    data = [asset_key(address) for address, state in street.items() if state.meta.get("group") == "data"]
    return dg.Definitions(
        assets=[
            *(_source(root, path) for path in sorted(sources)),
            *(_definition(root, address) for address in street),
            *(_asset(root, address, state) for address, state in street.items()),
        ],
        jobs=[
            dg.define_asset_job(
                "street",
                selection=dg.AssetSelection.assets(*map(asset_key, street)),
                description="Everything, in flow order; what is up to date runs nothing.",
            ),
            dg.define_asset_job(
                "data", selection=dg.AssetSelection.assets(*data), description="The data side only: from sources to splits."
            ),
            *(
                dg.define_asset_job(
                    f"variant_{name}",
                    selection=dg.AssetSelection.assets(*(asset_key(a) for a in street if a.endswith(f"@{name}"))),
                    description=f"Train, merge and evaluate {name}.",
                )
                for name in variants
            ),
        ],
        sensors=[_sync_sensor(root)],
        executor=dg.in_process_executor,
    )


def _source(root: Path, path: str) -> dg.SourceAsset:
    @dg.observable_source_asset(key=source_key(path), group_name="sources", description=f"`{path}`, as it is in the workspace.")
    def observe() -> dg.DataVersion:
        return dg.DataVersion(next(i.now for state in dvc.read_street(root).values() for i in state.inputs if i.path == path))

    return observe


def _definition(root: Path, address: str) -> dg.SourceAsset:
    @dg.observable_source_asset(
        key=definition_key(address), group_name="definitions", description=f"Command, parameters and code of `{address}`."
    )
    def observe() -> dg.DataVersion:
        return dg.DataVersion(dvc.read_street(root)[address].definition_now)

    return observe


def _asset(root: Path, address: str, state: StageState) -> dg.AssetsDefinition:
    upstream = dict.fromkeys(
        [asset_key(i.producer) if i.producer else source_key(i.path) for i in state.inputs] + [definition_key(address)]
    )
    checks = [
        dg.AssetCheckSpec(name, asset=asset_key(address), description=truth)
        for name, truth in pipeline.truths(address.partition("@")[0]).items()
    ]

    @dg.asset(
        key=asset_key(address),
        deps=list(upstream),
        code_version=CODE_VERSION,
        check_specs=checks,
        description=state.description,
        group_name=state.meta.get("group", "default"),
        kinds=set(state.meta.get("kinds", [])),
        metadata={"command": f"python -m dagster_project run {address}", "output": state.out},
    )
    def body(context: dg.AssetExecutionContext, config: RunConfig) -> Iterator[Any]:
        yield from _bring_up_to_date(context, root, address, config.force or context.run.tags.get(FORCE_TAG) == "true")

    return body


def _bring_up_to_date(context: dg.AssetExecutionContext, root: Path, address: str, force: bool) -> Iterator[Any]:
    """Sync, let DVC run the stage if it is not up to date, report checks and version, sync again."""
    sync(root, context.instance)
    try:
        pipeline.validate(root)
        street = dvc.read_street(root)
        if address not in street:
            raise dg.Failure(f"{address} is no longer in dvc.yaml. Reload the code location.", allow_retries=False)
        unclean = {name: street[name].changed for name in dvc.ancestors(street, address) if street[name].changed}
        if unclean:
            first = next(iter(unclean))
            raise dg.Failure(
                f"{address} was not run: {', '.join(unclean)} must be brought up to date first ({first}: {unclean[first][0]}).",
                allow_retries=False,
            )
        ran = False
        if force or street[address].changed:
            ran = _reproduce(context, root, address, force)
        else:
            context.log.info(f"{address} is up to date; nothing was run")
    except PedigreeError as error:
        state = dvc.read_street(root).get(address)
        yield from check_results(address, (read_report(root, state) if state else None) or {})
        raise dg.Failure(str(error), allow_retries=False) from None
    state = dvc.read_street(root)[address]
    report = read_report(root, state) or {}
    yield from check_results(address, report)
    if report.get("passed") is False:
        raise dg.Failure(f"{address}: its report says that a blocking check failed. See {state.report}.", allow_retries=False)
    yield dg.MaterializeResult(
        asset_key=asset_key(address), data_version=dg.DataVersion(state.version), metadata={**describe(root, state), "ran": ran}
    )


def _reproduce(context: dg.AssetExecutionContext, root: Path, address: str, force: bool) -> bool:
    """DVC runs the stage command; what the command logs streams into this run's log through Dagster Pipes."""
    with dg.open_pipes_session(
        context=context, context_injector=dg.PipesTempFileContextInjector(), message_reader=dg.PipesTempFileMessageReader()
    ) as session:
        return dvc.reproduce(root, address, force, {**session.get_bootstrap_env_vars(), "PYTHONUNBUFFERED": "1"})


def _sync_sensor(root: Path) -> dg.SensorDefinition:
    @dg.sensor(
        name="sync",
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Mirrors what DVC did into Dagster's event log.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        said = sync(root, context.instance)
        return dg.SkipReason("; ".join(said) if said else "Dagster and DVC agree.")

    return sensor


def project_root() -> Path:
    """The project this package belongs to: PEDIGREE_PROJECT, or the folder above the package."""
    return Path(os.environ.get("PEDIGREE_PROJECT") or Path(__file__).resolve().parents[2])


def home(root: Path) -> Path:
    """Dagster's home: DAGSTER_HOME, or .dagster in the project.

    Raises:
        InputError: it cannot be written.
    """
    folder = Path(os.environ.get("DAGSTER_HOME") or root / ".dagster")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if not (folder / "dagster.yaml").exists():
            (folder / "dagster.yaml").write_text("telemetry: {enabled: false}\nnux: {enabled: false}\n")
    except OSError as error:
        raise InputError(
            f"Dagster's home {folder} is not writable: {error.strerror}", "mend its permissions, or set DAGSTER_HOME to another folder"
        ) from None
    return folder


def open_instance(root: Path) -> dg.DagsterInstance:
    """The persistent Dagster instance of the project. Use it in a `with` block."""
    return dg.DagsterInstance.from_config(str(home(root)))
