"""Pedigree's pipeline -> Dagster: the assets of dagster_dvc with Pedigree's names, jobs and executor.

Also the instance in a project's folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_project.lineage import code_lock
from dagster_project.orchestration import dvc
from dagster_project.orchestration.dagster.concurrency import build_executor
from dagster_project.orchestration.dagster.home import home
from dagster_project.orchestration.dagster.instance import open_at
from dagster_project.orchestration.dagster.project import PedigreeProject
from dagster_project.orchestration.dagster_dvc import definitions
from dagster_project.orchestration.dagster_dvc.failure import load_failures
from dagster_project.pipeline import PEDIGREE, Pipeline

DATA = "2_data"
"""Group of the stages that the job `data` runs. dvc.yaml names the groups of
all stages, numbered so that lists show them in flow order."""


@load_failures()
def build_definitions(
    project_dir: str | Path,
    pipeline: Pipeline = PEDIGREE,
    *,
    key_prefix: str | Sequence[str] = (),
    group_name: str | None = None,
    whole_location: bool = False,
) -> dg.Definitions:
    """Assets, checks, jobs, a schedule and a sensor for the project in a folder.

    Args:
        project_dir: the folder with `dvc.yaml`. The current folder does not matter.
        pipeline: its stages.
        key_prefix: first parts of all asset keys, from which names of jobs, schedule, sensor and pools follow.
        group_name: group that contains the project's groups; default: the prefix.
        whole_location: whether code location and Dagster instance have no other assets. Then the project's executor
            also runs assets that are materialized without a job, and every run of a killed process is marked as failed.
    Raises:
        InputError: no DVC project in the folder, or invalid dvc.yaml or params.yaml.
    """
    project = PedigreeProject(
        Path(project_dir).resolve(), definitions.as_prefix(key_prefix), group_name, whole_location, pipeline
    )
    states = project.load()
    executor = build_executor(project)
    whole = definitions.all_stages(project, states, executor)
    return dg.Definitions(
        assets=definitions.assets(project, states),
        jobs=[whole, *_partial_jobs(project, states, executor)],
        schedules=[
            dg.ScheduleDefinition(
                name=project.name("nightly"),
                job=whole,
                cron_schedule="0 3 * * *",
                description="Runs the stages that are not up to date, every night at 03:00 UTC. Off by default.",
            )
        ],
        sensors=[definitions.sync_sensor(project)],
        executor=executor if whole_location else None,
    )


def _partial_jobs(
    project: PedigreeProject, states: dict[str, dvc.StageState], executor: dg.ExecutorDefinition
) -> list[Any]:
    """Jobs of the stages of data, and of each variant."""
    data = [address for address, state in states.items() if state.meta.get("group") == DATA]
    upstream = {name for address in data for name in dvc.ancestors(states, address)}
    of_data = [address for address in states if address in data or address in upstream]
    selected = {"data": (of_data, "Data stages only: from sources to splits and preferences.")}
    for variant, name in names_of_jobs({address.partition("@")[2] for address in states} - {""}).items():
        selected[name] = ([a for a in states if a.endswith(f"@{variant}")], f"Train, merge and evaluate {variant}.")
    return [
        dg.define_asset_job(
            project.name(name),
            selection=dg.AssetSelection.assets(*map(project.asset_key, addresses)),
            description=description,
            executor_def=executor,
        )
        for name, (addresses, description) in selected.items()
    ]


def names_of_jobs(variants: Iterable[str]) -> dict[str, str]:
    """Names of the jobs of variants, in which Dagster allows no "-".

    >>> names_of_jobs({"a_b", "a-b"})
    {'a-b': 'variant_a_b', 'a_b': 'variant_a_b_'}
    """
    names: dict[str, str] = {}
    for variant in sorted(variants):
        names[variant] = f"variant_{variant.replace('-', '_')}"
        while list(names.values()).count(names[variant]) > 1:
            names[variant] += "_"
    return names


def project_root() -> Path:
    """The project to show: PEDIGREE_PROJECT; else the working folder if its stages run with installed code; else the
    clone with this package; else the working folder."""
    if os.environ.get("PEDIGREE_PROJECT"):
        return Path(os.environ["PEDIGREE_PROJECT"])
    here, clone = Path.cwd(), Path(__file__).resolve().parents[3]
    return clone if (clone / "dvc.yaml").is_file() and not code_lock.is_used(here) else here


def open_instance(root: Path, shared: bool = False) -> dg.DagsterInstance:
    """The persistent Dagster instance of the project. Use it in a `with` block.

    Args:
        shared: see `home`.
    """
    return open_at(home(root, shared))
