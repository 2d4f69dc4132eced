"""dvc.yaml -> Dagster's assets, checks, job and sync sensor, derived from DVC's resolved stages at load time."""

# No postponed annotations: Dagster reads the type of a body's configuration from its signature.
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_project.core import faults
from dagster_project.core.errors import InputError
from dagster_project.orchestration import rwlock
from dagster_project.orchestration.dagster_dvc.dead_runs import reap
from dagster_project.orchestration.dagster_dvc.failure import load_failures
from dagster_project.orchestration.dagster_dvc.materialize import bring_up_to_date
from dagster_project.orchestration.dagster_dvc.metadata import CODE_VERSION, IN_SYNC, IN_SYNC_DESCRIPTION
from dagster_project.orchestration.dagster_dvc.project import DvcProject, is_forced
from dagster_project.orchestration.dagster_dvc.sync import sync
from dagster_project.orchestration.dagster_home import refuses_freshness
from dagster_project.orchestration.dvc import StageState
from dagster_project.orchestration.private_api import private_module

WHOLE = "pipeline"
"""Job of all stages."""


@load_failures()
def build_dvc_definitions(
    project_dir: str | Path, key_prefix: str | Sequence[str] = (), group_name: str | None = None
) -> dg.Definitions:
    """Assets, checks, a job and a sensor for any DVC project.

    Args:
        project_dir: the folder with `.dvc` and `dvc.yaml`.
        key_prefix: first parts of all asset keys, e.g. `"churn"` or `["ml", "churn"]`.
        group_name: group of the assets; default: the prefix.
    Raises:
        InputError: no DVC project in the folder, or invalid dvc.yaml.
    """
    project = DvcProject(Path(project_dir).resolve(), as_prefix(key_prefix), group_name)
    states = project.load()
    return dg.Definitions(
        assets=assets(project, states), jobs=[all_stages(project, states)], sensors=[sync_sensor(project)]
    )


def as_prefix(key_prefix: str | Sequence[str]) -> tuple[str, ...]:
    """ "ml/churn", "churn" or ["ml", "churn"] -> the parts."""
    return tuple(filter(None, key_prefix.split("/"))) if isinstance(key_prefix, str) else tuple(key_prefix)


def assets(project: DvcProject, states: dict[str, StageState]) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """An asset for each stage, and an external asset for each source and each stage's definition.

    Raises:
        InputError: the name of a stage or source cannot be part of a name in Dagster, or two assets have one name.
    """
    sources = sorted({i.path for state in states.values() for i in state.inputs if i.producer is None})
    keys = [*map(project.asset_key, states), *map(project.definition_key, states), *map(project.source_key, sources)]
    names = [project.asset_key(address).to_python_identifier() for address in states]
    named = [
        *zip(states, names, strict=True),
        *((path, project.source_key(path).to_python_identifier()) for path in sources),
    ]
    # Dagster makes names of inputs from the paths of sources
    is_valid = private_module("dagster._core.definitions.utils").is_valid_name
    invalid = [one for one, name in named if not is_valid(name) or name == project.name(WHOLE)]
    if invalid or len(set(keys)) < len(keys) or len(set(names)) < len(names):
        what = "two stages or sources have the same name in Dagster"
        if invalid:
            what = f"{', '.join(invalid)} cannot be a name in Dagster"
        raise InputError(
            f"{project.root / 'dvc.yaml'}: {what}",
            "use only letters, digits, _ and - in names of stages and variants, also . and / in paths of sources;"
            " names must differ in more than these marks. Words that are reserved, such as `import`, `input` and"
            f" `{WHOLE}`, can be names in a project with a key_prefix",
        )
    return [
        *(
            dg.AssetSpec(
                project.source_key(path), group_name=project.source_group(), description=f"{path} in the workspace."
            )
            for path in sources
        ),
        *(_definition(project, address) for address in states),
        *(_asset(project, address, state) for address, state in states.items()),
    ]


def _definition(project: DvcProject, address: str) -> dg.AssetSpec:
    return dg.AssetSpec(
        project.definition_key(address),
        group_name=project.group("definitions"),
        description=f"Command, parameters and code of {address}.",
        metadata={_hidden_asset_key(): True},  # hidden by default (docs/decisions/016)
    )


def _hidden_asset_key() -> str:
    """Metadata key of assets that Dagster's UI hides."""
    asset_spec = private_module("dagster._core.definitions.assets.definition.asset_spec")
    return str(asset_spec.SYSTEM_METADATA_KEY_AUTO_CREATED_STUB_ASSET)


def _asset(project: DvcProject, address: str, state: StageState) -> dg.AssetsDefinition:
    key = project.asset_key(address)
    upstream = [project.asset_key(i.producer) if i.producer else project.source_key(i.path) for i in state.inputs]
    checks = {**project.check_descriptions(address, state), IN_SYNC: IN_SYNC_DESCRIPTION}
    days = None if refuses_freshness(project.root) else state.meta.get("stale_after_days")
    url = project.page_url(address)
    config_type = project.config_type

    @dg.asset(
        key=key,
        deps=[*dict.fromkeys([*upstream, project.definition_key(address)])],
        code_version=CODE_VERSION,
        check_specs=[
            dg.AssetCheckSpec(name, asset=key, description=description) for name, description in checks.items()
        ],
        description=state.description,
        group_name=project.group_of(address, state),
        kinds=set(state.meta.get("kinds") or []),
        pool=project.pool_of(address, state),
        freshness_policy=dg.FreshnessPolicy.time_window(fail_window=timedelta(days=days)) if days else None,
        metadata={
            "command": project.command_of(state),
            "output": ", ".join(state.outs),
            **({"pages": dg.MetadataValue.url(url)} if url else {}),
            **project.definition_metadata(address),
        },
    )
    def body(context: dg.AssetExecutionContext, config: config_type) -> Any:  # type: ignore[valid-type]
        tags = context.run.tags
        force = is_forced(tags) or config.force  # type: ignore[attr-defined]
        yield from bring_up_to_date(context, project, address, force, project.variables(config, tags))

    return body


def all_stages(
    project: DvcProject, states: dict[str, StageState], executor: dg.ExecutorDefinition | None = None
) -> Any:
    """The job of all stages."""
    return dg.define_asset_job(
        project.name(WHOLE),
        selection=dg.AssetSelection.assets(*map(project.asset_key, states)),
        description="All stages, in flow order. Stages that are up to date are not run.",
        executor_def=executor,
    )


def sync_sensor(project: DvcProject) -> dg.SensorDefinition:
    """Reports DVC's state to Dagster's event log every 15 seconds."""

    @dg.sensor(
        name=project.name("sync"),
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports DVC's state to Dagster's event log, and marks runs as failed whose process was killed.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        try:
            project.before_sync(context.instance)
            lines = reap(context.instance, project.owns_instance)
            # Dagster ends a sensor that waits for a minute, and its code server has few threads
            if holder := rwlock.lock_holder(project.root):
                return dg.SkipReason("; ".join([*lines, f"Not synced: {holder} holds DVC's lock of the project"]))
            lines += sync(project, context.instance)
        except Exception as error:
            known = faults.explained(error, project.root)
            if known is None:
                raise
            return dg.SkipReason("Not synced: " + str(known).replace("\n", "; "))
        return dg.SkipReason("; ".join(lines) if lines else "Dagster and DVC agree.")

    return sensor
