"""Trials of `pedigree sweep` on a Ray cluster of two nodes: two at once, with the commits and bytes of a local sweep.

A trial runs in DVC's copy of the workspace, whose drivers are processes of DVC's workers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders import small_pipeline
from builders.cluster import Cluster, add_remote
from builders.ray_jobs import all_jobs, commands, is_stage_command, stages_on_nodes, until
from builders.s3 import BUCKET, S3Server
from conftest import skip_without
from ruamel.yaml import YAML

from dagster_project.lineage.history import Objects
from dagster_project.orchestration import experiments

pytestmark = [pytest.mark.cluster, pytest.mark.long]

skip_without("ray", "moto", "dvc_s3")


@pytest.fixture
def root(tmp_path: Path, _made: Path, driver: dict[str, str], s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which everything has run, whose `params.yaml` places `adapter` on Ray. A file that is not committed
    names the remote, and settings that git ignores have its address and its credentials."""
    project = Path(shutil.copytree(_made, tmp_path / "project", symlinks=True))
    add_remote(project, f"s3://{BUCKET}/{tmp_path.name}")
    secret = {"endpointurl": s3.endpoint, "access_key_id": s3.key, "secret_access_key": s3.secret}
    lines = ["['remote \"storage\"']", *(f"{option} = {value}" for option, value in secret.items())]
    (project / ".dvc/config.local").write_text("\n".join(lines))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "PEDIGREE_EXECUTION"):
        monkeypatch.delenv(name)
    values = json.loads((project / "params.yaml").read_text())
    placed = {"stages": {"adapter": {"on": "ray"}}}
    (project / "params.yaml").write_text(json.dumps({**values, "execution": placed}))
    return project


@pytest.fixture
def gate(root: Path) -> Path:
    """A file until which every trial waits in its stage; git has the one that names it."""
    [path] = small_pipeline.hold(root, "adapter")
    small_pipeline.git(root, "add", "hold.json")
    return path


@pytest.fixture
def sweep(root: Path) -> Iterator[Any]:
    """Start `pedigree sweep` of the rank, two trials at once."""
    started: list[subprocess.Popen[str]] = []

    def start(ranks: str, project: Path = root, **environment: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "small_pipeline.py", "sweep", "variants.lora", "2", f"r={ranks}"],
                cwd=project,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=project.with_suffix(".err").open("a"),
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
    experiments.cancel(root, [*experiments.trials(root)], 60)


@pytest.fixture
def new_jobs(driver: dict[str, str]) -> Any:
    """Jobs that were submitted since the test began."""
    before = {job.submission_id for job in all_jobs()}
    return lambda: [job for job in all_jobs() if job.submission_id not in before]


def on_nodes(jobs: list[Any]) -> set[str]:
    """The nodes on which jobs run."""
    return {job.driver_node_id for job in jobs if job.status == "RUNNING" and job.driver_node_id}


def finished(process: subprocess.Popen[str], project: Path) -> dict[str, Any]:
    output, _ = process.communicate(timeout=500)
    assert output, project.with_suffix(".err").read_text()
    return dict(json.loads(output))


def state(root: Path) -> Any:
    """Of the workspace."""
    files = [root / name for name in ("params.yaml", "dvc.lock", "dvc.yaml", small_pipeline.LOG)]
    return [path.read_bytes() for path in files], small_pipeline.git(root, "status", "--porcelain")


def result(project: Path, trial: str) -> tuple[str, dict[str, bytes]]:
    """The tree of a trial's commit, and the files of its adapter, from the cache of the workspace."""
    refs = small_pipeline.git(project, "for-each-ref", "--format=%(refname)", "refs/exps").split()
    [commit] = [ref for ref in refs if ref.endswith(f"/{trial}")]
    lock = YAML(typ="safe").load(small_pipeline.git(project, "show", f"{commit}:dvc.lock"))
    [oid] = [out["md5"] for out in lock["stages"]["adapter@lora"]["outs"] if out["path"] == "data/adapter/lora"]
    files = {name: Objects(project).at(one).read_bytes() for name, one in (Objects(project).listing(oid) or {}).items()}
    return small_pipeline.git(project, "rev-parse", f"{commit}^{{tree}}"), files


def test_trials_on_two_nodes_at_once_are_the_commits_of_a_local_sweep(
    cluster: Cluster, root: Path, gate: Path, sweep: Any, new_jobs: Any, s3: S3Server, tmp_path: Path
) -> None:
    local, before = Path(shutil.copytree(root, tmp_path / "local/project", symlinks=True)), state(root)
    process = sweep("2,4", RAY_AUTH_TOKEN_PATH=os.path.relpath(cluster.token, root))
    until(lambda: len(on_nodes(new_jobs())) == 2, 400, 1)
    gate.touch()
    document = finished(process, root)
    assert document["passed"], root.with_suffix(".err").read_text()
    assert [job.status for job in new_jobs()] == ["SUCCEEDED"] * 2
    assert state(root) == before, "it leaves the workspace alone"
    assert not s3.names(f"{tmp_path.name}/pedigree/"), "no later run would use what is there"

    expected = finished(sweep("2,4", local, PEDIGREE_EXECUTION="local"), local)
    assert len(new_jobs()) == 2
    for here, there in zip(document["trials"], expected["trials"], strict=True):
        assert (here["params"], here["metrics"]) == (there["params"], there["metrics"])
        tree, files = result(root, here["name"])
        assert (tree, files) == result(local, there["name"]), "the same dvc.lock, reports, parameters and bytes"
        assert f"'r': {here['params']['r']}" in files["weights.txt"].decode()


def test_an_interrupt_ends_the_jobs_of_all_trials(
    cluster: Cluster, root: Path, gate: Path, sweep: Any, new_jobs: Any, s3: S3Server, tmp_path: Path
) -> None:
    before = state(root)
    process = sweep("2,4,3")
    until(lambda: len(on_nodes(new_jobs())) == 2 and len(stages_on_nodes(cluster, "adapter@lora")) == 2, 400, 1)
    process.send_signal(signal.SIGINT)
    document = finished(process, root)
    assert document["interrupted"] and {trial["status"] for trial in document["trials"]} == {"canceled"}
    assert [job.status for job in new_jobs()] == ["STOPPED"] * 2, "the third trial did not start"
    until(lambda: not commands(cluster, "adapter@lora"), 60)
    assert state(root) == before
    assert not s3.names(f"{tmp_path.name}/pedigree/")
    assert not [trial for trial in experiments.trials(root).values() if trial.alive or trial.status == "Queued"]
    assert not [*root.glob(".dvc/tmp/exps/tmp*")]


def test_the_job_of_a_killed_trial_is_stopped_by_the_next_one(
    cluster: Cluster, root: Path, gate: Path, sweep: Any, new_jobs: Any, s3: S3Server, tmp_path: Path
) -> None:
    """Each trial runs in a copy of its own, so that no later run takes the job over."""
    process = sweep("2")
    until(lambda: on_nodes(new_jobs()), 400, 1)
    [trial] = experiments.trials(root).values()
    [driver] = filter(is_stage_command, psutil.Process(trial.pid).children(recursive=True))
    driver.kill()
    assert not finished(process, root)["passed"]
    [job] = new_jobs()
    assert job.status == "RUNNING"
    second = sweep("3")
    until(lambda: [one.status for one in new_jobs() if one.submission_id == job.submission_id] == ["STOPPED"], 400, 1)
    gate.touch()
    assert finished(second, root)["passed"], root.with_suffix(".err").read_text()
    assert sorted(one.status for one in new_jobs()) == ["STOPPED", "SUCCEEDED"]
    assert not s3.names(f"{tmp_path.name}/pedigree/")
