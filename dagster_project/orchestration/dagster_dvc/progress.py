"""How far a Dagster run is when one of its stages starts, and the time left, by the durations of past runs."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import dagster as dg

from dagster_project.orchestration import durations, dvc
from dagster_project.orchestration.dagster_dvc.dead_runs import is_in_one_process, steps_of
from dagster_project.orchestration.dagster_dvc.project import DvcProject, is_forced
from dagster_project.orchestration.dvc import StageState


def progress(
    instance: dg.DagsterInstance, run: dg.DagsterRun, project: DvcProject, states: Mapping[str, StageState], starts: str
) -> str:
    """Stages of the project in a run that are done, that run and that are queued, and the time left.

    Stages that are up to date count neither as queued nor in the time. Other runs, which may take slots of the same
    pools, are left out.

    Args:
        starts: the stage that starts now.
    """
    steps = steps_of(instance, run.run_id)
    # a step that Dagster repeats may have ended by its events
    planned = [address for address in states if address == starts or project.asset_key(address) in steps.planned]
    left = [address for address in planned if address == starts or project.asset_key(address) in steps.remaining]
    configs = {address: _config(run, project, address) for address in left}

    def is_up_to_date(address: str) -> bool:
        forced = is_forced(run.tags) or configs[address].force
        return states[address].frozen or not (forced or states[address].changed)

    now = time.time()
    began = {address: steps.running.get(project.asset_key(address)) for address in left}
    running = {
        address: durations.elapsed(project.root, address, since, now)
        for address, since in began.items()
        if since is not None and not is_up_to_date(address)  # otherwise its step is about to end
    }
    running[starts] = 0.0
    above = {address: {*dvc.ancestors(states, address)} & {*left} for address in left}
    queued = durations.expected((one for one in left if began[one] is None), above, running, is_up_to_date)
    variables = {address: project.variables(configs[address], run.tags) for address in [*running, *queued]}
    on_cluster = {address for address in variables if project.on_cluster(address, variables[address])}
    seconds = durations.known(project.root, variables, on_cluster)
    pools = {address: project.pool_of(address, states[address], variables[address]) for address in variables}
    limits = _limits(instance)
    most = 1 if is_in_one_process(instance, run.run_id) else _most(run)

    def has_room(at_work: Collection[str], address: str) -> bool:
        pool = pools[address]
        in_pool = sum(pools[other] == pool for other in at_work)
        return len(at_work) < (most or len(pools)) and (pool not in limits or in_pool < limits[pool])

    text = durations.time_left(above, running, queued, seconds, on_cluster, has_room)
    return f"{len(planned) - len(left)} of {len(planned)} stages done, {text}"


def _config(run: dg.DagsterRun, project: DvcProject, address: str) -> Any:
    """Configuration of a stage in the run."""
    options = _at(run.run_config, "ops", project.asset_key(address).to_python_identifier(), "config")
    plain: dict[str, Any] = {
        name: value for name, value in options.items() if isinstance(value, str | bool)
    }  # not `{env: NAME}`
    return project.config_type(**plain)


def _most(run: dg.DagsterRun) -> int | None:
    """How many steps the run allows at once; None if only pools limit it."""
    most = _at(run.run_config, "execution", "config", "multiprocess").get("max_concurrent")
    return most if isinstance(most, int) and most > 0 else None


def _at(document: Any, *names: str) -> Mapping[str, Any]:
    for name in names:
        document = document.get(name) if isinstance(document, Mapping) else None
    return document if isinstance(document, Mapping) else {}


def _limits(instance: dg.DagsterInstance) -> dict[str | None, int]:
    storage = instance.event_log_storage
    if not storage.supports_global_concurrency_limits:
        return {}
    return {pool.name: pool.limit for pool in storage.get_pool_limits()}
