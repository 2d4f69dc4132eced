"""Pedigree's pipeline -> Dagster: the assets of dagster_dvc with Pedigree's names, jobs and executor. Also the instance in a project's folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_project.core import faults
from dagster_project.core.errors import InputError
from dagster_project.lineage import code_lock
from dagster_project.orchestration import dvc
from dagster_project.orchestration.dagster.concurrency import build_executor
from dagster_project.orchestration.dagster.instance import open_at
from dagster_project.orchestration.dagster.project import PedigreeProject
from dagster_project.orchestration.dagster_dvc import definitions
from dagster_project.pipeline import PEDIGREE, Pipeline

DATA = "2_data"
"""Group of the stages that the job `data` runs. dvc.yaml names the groups of all stages, numbered so that lists show them in flow order."""
DAGSTER_YAML = """\
telemetry: {enabled: false}
nux: {enabled: false}
# true: an asset is shown as overdue `stale_after_days` (dvc.yaml) after its last materialization
freshness: {enabled: false}
"""


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
        key_prefix: first parts of all asset keys, e.g. `"support"` or `["ml", "support"]`. Names of jobs, schedule, sensor and pools follow from it.
        group_name: group that contains the project's groups; default: the prefix.
        whole_location: whether the code location and the Dagster instance have no other assets. Then the project's executor also runs assets that are
            materialized without a job, and every run of a killed process is marked as failed.
    Raises:
        InputError: no DVC project in the folder, or invalid dvc.yaml or params.yaml.
    """
    project = PedigreeProject(Path(project_dir).resolve(), definitions.as_prefix(key_prefix), group_name, whole_location, pipeline)
    states = project.load()
    executor = build_executor(project)
    whole = definitions.all_stages(project, states, executor)
    return dg.Definitions(
        assets=definitions.assets(project, states),
        jobs=[whole, *_partial_jobs(project, states, executor)],
        schedules=[
            dg.ScheduleDefinition(
                name=project.name("nightly"), job=whole, cron_schedule="0 3 * * *", description="Example of a schedule, off by default."
            )
        ],
        sensors=[definitions.sync_sensor(project)],
        executor=executor if whole_location else None,
    )


def _partial_jobs(project: PedigreeProject, states: dict[str, dvc.StageState], executor: dg.ExecutorDefinition) -> list[Any]:
    """Jobs of the stages of data, and of each variant."""
    data = [address for address, state in states.items() if state.meta.get("group") == DATA]
    upstream = {name for address in data for name in dvc.ancestors(states, address)}
    selected = {"data": ([a for a in states if a in data or a in upstream], "Data stages only: from sources to splits and preferences.")}
    for variant in sorted({address.partition("@")[2] for address in states} - {""}):
        selected[f"variant_{variant}"] = ([a for a in states if a.endswith(f"@{variant}")], f"Train, merge and evaluate {variant}.")
    return [
        dg.define_asset_job(
            project.name(name),
            selection=dg.AssetSelection.assets(*map(project.asset_key, addresses)),
            description=description,
            executor_def=executor,
        )
        for name, (addresses, description) in selected.items()
    ]


def project_root() -> Path:
    """The project to show: PEDIGREE_PROJECT; else the working folder if its stages run with installed code; else the clone with this package; else the
    working folder."""
    if os.environ.get("PEDIGREE_PROJECT"):
        return Path(os.environ["PEDIGREE_PROJECT"])
    here, clone = Path.cwd(), Path(__file__).resolve().parents[3]
    return clone if (clone / "dvc.yaml").is_file() and not code_lock.is_used(here) else here


OWNER = "pedigree_project"
"""File in Dagster's home with the path of its project."""


def home(root: Path, shared: bool = False) -> Path:
    """Dagster's home: DAGSTER_HOME, or .dagster in the project.

    Args:
        shared: whether it may have assets of other projects, because those of this one have a key prefix.
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
        if shared:
            return folder
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
        if faults.is_full(error):
            raise
        raise InputError(
            f"Dagster's home {folder} is not writable: {error.strerror}", "fix its permissions, or set DAGSTER_HOME to another folder"
        ) from None
    return folder


def open_instance(root: Path, shared: bool = False) -> dg.DagsterInstance:
    """The persistent Dagster instance of the project. Use it in a `with` block.

    Args:
        shared: see `home`.
    """
    return open_at(home(root, shared))
