"""Jobs of a cluster of tests (builders.cluster), and their processes on its nodes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from builders.cluster import Cluster
from dagster_project.orchestration.executors.ray import _project_id

POLL = 0.2
"""Polling interval of drivers in tests, in seconds."""


def all_jobs() -> list[Any]:
    """Ray's details of all jobs of the cluster."""
    from ray.job_submission import JobSubmissionClient

    return list(JobSubmissionClient(os.environ["RAY_ADDRESS"]).list_jobs())


def jobs(root: Path, address: str) -> list[Any]:
    """Ray's details of all jobs of a stage of this workspace."""
    project = _project_id(root)
    found = [job for job in all_jobs() if (job.metadata or {}).get("pedigree/project") == project]
    return [job for job in found if job.metadata["pedigree/stage"] == address]


def commands(cluster: Cluster, text: str, without: str = "\0") -> list[psutil.Process]:
    """Processes on the nodes with this text, and without the other one, in their command."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            if (
                text in command
                and without not in command
                and str(cluster.folder) in process.environ().get("PEDIGREE_NODE_CACHE", "")
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(condition: Callable[[], Any], seconds: float = 120, pause: float = 0.2) -> Any:
    """Wait for a condition; its value."""
    ends = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(pause)
    return value


def until_running(cluster: Cluster, root: Path, address: str) -> psutil.Process:
    """Wait until the stage's own process runs on a node; its worker."""
    # the argument of the worker, which runs earlier, has the command of the stage
    until(lambda: commands(cluster, f"run {address}", without="executors.worker"))
    return until(lambda: next(iter(workers(cluster, address)), None))


def workers(cluster: Cluster, address: str) -> list[psutil.Process]:
    found = commands(cluster, "executors.worker")
    return [one for one in found if f'"{address}"' in " ".join(one.cmdline()) and "sh" not in one.name()]


def is_stage_command(process: psutil.Process) -> bool:
    """Whether a process is `python small_pipeline.py run STAGE` itself: on a node that of the stage, on this host its
    driver. The command of a worker contains the same words."""
    try:
        return process.cmdline()[1:3] == ["small_pipeline.py", "run"]
    except psutil.Error:
        return False


def stages_on_nodes(cluster: Cluster, stage: str = "") -> list[psutil.Process]:
    """The processes of a stage, or of all, on the nodes. Their last argument is its address."""
    return [one for one in commands(cluster, f"small_pipeline.py run {stage}") if is_stage_command(one)]
