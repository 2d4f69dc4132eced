"""The whole pipeline on Ray: every stage is a job on a node that shares no
folder with the project, and dvc.lock is that of a local run.

It takes about nine minutes of processor time, so `make test-projects` runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from builders.cluster import Cluster, add_remote
from builders.s3 import BUCKET, S3Server
from conftest import edit_params, skip_without

from dagster_project.core.layout import measured_path
from dagster_project.orchestration.executors.ray import PROJECT, STAGE, _project_id
from dagster_project.pipeline import STAGES

pytestmark = pytest.mark.projects
skip_without("ray", "moto", "dvc_s3")


def start(project: Path, **environment: str) -> subprocess.Popen[str]:
    """`pedigree run --all`, with its output in files beside the project."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PEDIGREE_", "RAY_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "dagster_project", "run", "--all", "--jobs", "2", "--json"], cwd=project, text=True,
        env={**variables, "DAGSTER_HOME": str(project / ".dagster"), "PEDIGREE_PROJECT": str(project), **environment},
        stdout=project.with_suffix(".out").open("w"), stderr=project.with_suffix(".err").open("w"),
    )  # fmt: skip


def outcomes(process: subprocess.Popen[str], project: Path) -> dict[str, str]:
    """Outcome of every stage, after a run that succeeded."""
    code = process.wait(5000)  # seconds; a busy machine has taken an hour
    assert code == 0, project.with_suffix(".err").read_text()
    stages = json.loads(project.with_suffix(".out").read_text())["stages"]
    return {address: one["outcome"] for address, one in stages.items()}


def jobs_of(cluster: Cluster, project: Path) -> list[dict[str, Any]]:
    """The jobs of a project, as Ray lists them."""
    with urllib.request.urlopen(
        urllib.request.Request(f"{cluster.url}/api/jobs/", headers=cluster.headers), timeout=60
    ) as answer:
        return [job for job in json.load(answer) if (job["metadata"] or {}).get(PROJECT) == _project_id(project)]


def recorded(project: Path) -> dict[str, Any]:
    """dvc.lock: for each stage its command, its parameters, and the hashes of
    all that it read and wrote, reports included."""
    from ruamel.yaml import YAML

    return dict(YAML(typ="safe").load((project / "dvc.lock").read_text())["stages"])


@pytest.mark.timeout(9000)  # 34 runs of stages, half of them as jobs
def test_every_stage_of_the_pipeline_runs_on_ray_and_is_recorded_as_by_a_local_run(
    cluster: Cluster, project: Path, s3: S3Server, tmp_path: Path
) -> None:
    here = Path(shutil.copytree(project, tmp_path / "here", symlinks=True))
    add_remote(project, f"s3://{BUCKET}/{tmp_path.name}", s3.endpoint)
    nodes = {
        stage: ("first", "second")[number % 2] for number, stage in enumerate(STAGES)
    }  # so that files travel from node to node
    placed = {
        "address": cluster.url,
        "stages": {stage: {"on": "ray", "resources": {node: 1}} for stage, node in nodes.items()},
    }
    edit_params(project, lambda values: values.update(execution=placed))
    driver = {key: value for key, value in cluster.variables().items() if key != "RAY_ADDRESS"} | dict(
        cluster.environment
    )
    local, away = start(here), start(project, **driver)
    try:
        on_ray = outcomes(away, project)
        assert {address.partition("@")[0] for address in on_ray} == set(STAGES) and set(on_ray.values()) == {"run"}
        assert outcomes(local, here) == on_ray
    finally:
        local.kill()
        away.kill()
    assert recorded(project) == recorded(here)
    jobs = {job["metadata"][STAGE]: job for job in jobs_of(cluster, project)}
    assert {address: job["status"] for address, job in jobs.items()} == dict.fromkeys(on_ray, "SUCCEEDED")
    ran = {address: json.loads(measured_path(project, address).read_text())["execution"] for address in jobs}
    assert {address: one["job"] for address, one in ran.items()} == {
        address: job["submission_id"] for address, job in jobs.items()
    }
    places = {(nodes[address.partition("@")[0]], job["driver_node_id"]) for address, job in jobs.items()}
    assert len(places) == len({node_id for _, node_id in places}) == 2, "each on its node"
    assert set(outcomes(start(project, **driver), project).values()) == {"up to date"}
    assert len(jobs_of(cluster, project)) == len(on_ray), "one job for each stage"
