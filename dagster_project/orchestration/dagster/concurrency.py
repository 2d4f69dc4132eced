"""Concurrency of stages in a Dagster run: the executor of all jobs, and the
limits of its pools (docs/decisions/025)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import combinations
from typing import TYPE_CHECKING, Any

import dagster as dg

from dagster_project.core import params
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.execution import VARIABLE, placement
from dagster_project.orchestration import dvc, dvc_run
from dagster_project.orchestration.dagster_dvc.dead_runs import reap
from dagster_project.orchestration.dagster_dvc.failure import StageFailure
from dagster_project.orchestration.dagster_dvc.project import is_forced
from dagster_project.orchestration.private_api import private_module
from dagster_project.pipeline import Pipeline

if TYPE_CHECKING:
    from dagster_project.orchestration.dagster.project import PedigreeProject

GPU, CPU, RAY = "gpu", "cpu", "ray"
"""Pools: stages that train or generate on this machine, all others on it, and
stages that `execution` of params.yaml sends to a cluster."""
ON_TAG = "pedigree/on"
"""Tag of a run: where all of its stages run."""
FREE_EVERY = 10.0
"""Seconds between two searches for killed runs while steps wait."""


def pool_of(address: str, pipeline: Pipeline, values: Mapping[str, Any], on: str = "") -> str:
    """Pool of a stage.

    Args:
        values: params.yaml.
        on: where a run places the stage; empty for the section `execution`.
    """
    with suppress(InputError):  # an invalid section `execution`: the stage reports it when it runs
        if placement(values, address, pipeline.stages, pipeline.variants_of, placement_variables(on))[1].on == "ray":
            return RAY
    return GPU if address.partition("@")[0] in pipeline.floating_point else CPU


def placement_variables(on: str) -> dict[str, str]:
    """Environment of a stage command, with the placement `on`, or else that of this process."""
    return {VARIABLE: on} if on else {name: os.environ[name] for name in (VARIABLE,) if name in os.environ}


def default_limits(prefix: str = "") -> dict[str, int]:
    """Limit of each pool, until the user sets another one.

    A stage that trains or generates uses a whole GPU, or all threads. The driver of a stage on a cluster takes 0.5 GB
    of this machine's memory while it waits.
    """
    return {prefix + GPU: 1, prefix + CPU: os.cpu_count() or 1, prefix + RAY: 8}


def set_default_limits(instance: dg.DagsterInstance, prefix: str = "") -> dict[str, int]:
    """Give each pool without a limit its default.

    Args:
        prefix: of the pools' names (`PedigreeProject.pool_prefix`).
    Returns:
        The limit of each pool.
    """
    storage = instance.event_log_storage
    limits = {pool.name: pool.limit for pool in storage.get_pool_limits()}
    defaults = default_limits(prefix)
    for pool, limit in defaults.items():
        if pool not in limits:
            storage.set_concurrency_slots(pool, limit)
            limits[pool] = limit
    return {pool: limits[pool] for pool in defaults}


def build_executor(project: PedigreeProject) -> dg.ExecutorDefinition:
    """Executor of all jobs of a project. It accepts the configuration of Dagster's `multi_or_in_process_executor`."""
    base = dg.multi_or_in_process_executor
    schema: Any = base.config_schema

    @dg.executor(name="stages", config_schema=schema, requirements=base.get_requirements)
    def stages(init_context: dg.InitExecutorContext) -> dg.Executor:
        """Runs independent stages at once, each in a process, within the limits
        of the pools `gpu`, `cpu` and `ray`. Other runs use one process."""
        # frees the slots of killed runs: without a daemon, nothing else does
        reap(init_context.instance, project.owns_instance)
        limits = set_default_limits(init_context.instance, project.pool_prefix)
        config = dict(init_context.executor_config)
        if "multiprocess" not in config:
            return _create(base, init_context, config)
        options: dict[str, Any] = {**_mapping(config["multiprocess"])}
        options["max_concurrent"] = options.get("max_concurrent") or sum(limits.values())
        if options["max_concurrent"] < 0:  # Dagster would wait forever for a step to start
            raise InputError(
                f"the run configuration has max_concurrent: {options['max_concurrent']}",
                "give 1 or more, or leave it out",
            )
        preload = ["dagster_project.orchestration.dagster.assets", *dvc_run.PRELOAD]
        options["start_method"] = options.get("start_method") or {"forkserver": {"preload_modules": preload}}
        return StagesExecutor(
            project,
            _create(base, init_context, {"multiprocess": options}),
            _create(base, init_context, {"in_process": {"retries": options.get("retries") or {"enabled": {}}}}),
        )

    return stages


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _create(
    definition: dg.ExecutorDefinition, init_context: dg.InitExecutorContext, config: Mapping[str, object]
) -> dg.Executor:
    create = definition.executor_creation_fn
    assert create is not None
    return create(init_context._replace(executor_config=config))


class StagesExecutor(dg.Executor):
    """Dagster's multiprocess executor; its in-process executor for a run in which no two stages can run at once.

    Starting a step process takes longer than a stage that is up to date (docs/decisions/025).
    """

    def __init__(self, project: PedigreeProject, multiprocess: dg.Executor, in_process: dg.Executor) -> None:
        self.project, self.multiprocess, self.in_process = project, multiprocess, in_process

    @property
    def retries(self) -> Any:
        return self.multiprocess.retries

    @property
    def step_dependency_config(self) -> Any:
        return self.multiprocess.step_dependency_config

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[dg.DagsterEvent]:
        keys = plan_context.job.get_definition().asset_layer.selected_asset_keys
        tags = plan_context.dagster_run.tags
        ops = _mapping(plan_context.run_config.get("ops"))
        options = {step: _mapping(_mapping(one).get("config")) for step, one in ops.items()}
        try:
            forced = is_forced(tags) or any(one.get("force") for one in options.values())
            # interrupts do not reach this, and if it takes too much for changed, that costs processes only
            states = self.project.read(wait=False)
            planned = {address for key in keys if (address := self.project.address_of(key)) is not None}
            several = can_run_at_once(states, planned, forced)
            steps = {self.project.asset_key(address).to_python_identifier(): address for address in states}
            on = {step: str(options.get(step, {}).get("on") or tags.get(ON_TAG, "")) for step in steps}
            values = params.read(self.project.root)
            pools = {
                step: self.project.pool(address, states[address], values, on[step]) for step, address in steps.items()
            }
            set_pools(execution_plan, pools)
        except (PedigreeError, StageFailure):
            several = False  # bad input: the first stage reports it
        executor = self.multiprocess if several else self.in_process
        with waiting_for_slots(lambda: reap(plan_context.instance, self.project.owns_instance)):
            yield from executor.execute(plan_context, execution_plan)


@contextmanager
def waiting_for_slots(free: Callable[[], object]) -> Iterator[None]:
    """While open, a run of which every step waits for a slot of a pool sleeps, and frees the slots of killed runs.

    Dagster's executors do neither: they use a whole CPU while they wait, and wait forever for a run that is killed
    meanwhile.

    Args:
        free: frees those slots.
    """
    executors = [private_module(f"dagster._core.executor.{name}") for name in ("multiprocess", "in_process")]
    claims = private_module("dagster._core.execution.plan.instance_concurrency_context").InstanceConcurrencyContext

    class Claims(claims):  # type: ignore[misc, valid-type]
        freed = time.monotonic()

        def pending_claim_steps(self) -> Any:
            """The steps that wait, which the executors ask for each time that they have looked for free slots."""
            if self.has_pending_claims() and not self._claims:
                time.sleep(0.05)
                if time.monotonic() - self.freed > FREE_EVERY:
                    free()
                    self.freed = time.monotonic()
            return super().pending_claim_steps()

    try:
        for executor in executors:
            executor.InstanceConcurrencyContext = Claims
        yield
    finally:
        for executor in executors:
            executor.InstanceConcurrencyContext = claims


def set_pools(plan: Any, pools: Mapping[str, str]) -> None:
    """Put the steps of a run's plan into these pools, by key.

    Those of the definitions follow from params.yaml as it was when Dagster loaded it, and do not include the run's own
    placement.
    """
    assert isinstance(plan, private_module("dagster._core.execution.plan.plan").ExecutionPlan)
    for handle, step in list(plan.step_dict.items()):
        plan.step_dict[handle] = plan.step_dict_by_key[step.key] = step._replace(pool=pools.get(step.key, step.pool))


def can_run_at_once(states: Mapping[str, dvc.StageState], planned: set[str], forced: bool) -> bool:
    """Whether two of the planned stages may run at once: both are changed, or
    read one that is, and neither reads the other."""
    above = {address: set(dvc.ancestors(states, address)) for address in states}
    changed = {address for address in planned & states.keys() if forced or states[address].changed}
    work = [address for address in states if address in planned and (address in changed or above[address] & changed)]
    return any(a not in above[b] and b not in above[a] for a, b in combinations(work, 2))
