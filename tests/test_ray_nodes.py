"""A training in two processes on two nodes of a Ray cluster, as one job of a project: `execution` with `nodes: 2`.

Each node has its own folder. The record and the bytes are those of two processes on one host.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders import training_pipeline
from builders.cluster import Cluster, add_remote
from builders.s3 import BUCKET, S3Server
from builders.small_pipeline import published
from builders.training import LORA
from conftest import run, skip_without

from dagster_project.core.layout import measured_path
from dagster_project.orchestration.executors.ray import PROJECT, _project_id

pytestmark = [pytest.mark.cluster, pytest.mark.long]

skip_without("ray", "moto", "dvc_s3")

PARAMS = {**LORA, "num_train_epochs": 2, "gradient_accumulation_steps": 1, "load_best_model_at_end": False}
"""Eight steps of a pass in each process; the fourth and the eighth have one row, so the second process has none."""
DRIVER = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["dvc", "repro", "adapter@x"]
runpy.run_module("dvc", run_name="__main__")
"""
"""`dvc repro`, also where this process ignores interrupts."""
IMPATIENT = """
import runpy, signal, sys
from dagster_project.orchestration.executors import ray
signal.signal(signal.SIGINT, signal.default_int_handler)
ray.WAITING_LOG_SECONDS = 1.0
sys.argv = ["training_pipeline.py", "run", "adapter@x"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The stage's command, which logs every second that it waits."""


@pytest.fixture
def away(tmp_path: Path, tiny_model: Path, cluster: Cluster, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose training runs on both nodes, and waits in its fourth step for the file `gate`."""
    for name, value in {**cluster.variables(), **cluster.environment}.items():
        monkeypatch.setenv(name, value)
    root = tmp_path / "away" / "project"
    training_pipeline.make_project(root, tiny_model, PARAMS, processes=2)
    placed = {"stages": {"adapter": {"on": "ray", "nodes": 2}}, "price_per_hour": {"cpus": 36.0}}
    values = json.loads((root / "params.yaml").read_text())
    (root / "params.yaml").write_text(json.dumps({**values, "execution": placed}))
    (root / "hold.json").write_text(json.dumps({"before": 4, "gate": str(tmp_path / "gate")}))
    add_remote(root, f"s3://{BUCKET}/{tmp_path.name}", s3.endpoint)
    return root


def start(root: Path, driver: str = DRIVER) -> subprocess.Popen[bytes]:
    log = root.with_suffix(".log").open("ab")
    return subprocess.Popen([sys.executable, "-c", driver], cwd=root, stdout=log, stderr=log, start_new_session=True)


def until(condition: Callable[[], Any], process: subprocess.Popen[bytes], root: Path, seconds: float = 400) -> Any:
    """Wait for a condition while the driver runs; its value."""
    ends = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None and time.monotonic() < ends, root.with_suffix(".log").read_text()
        time.sleep(0.2)
    return value


def on_nodes(cluster: Cluster, text: str) -> list[psutil.Process]:
    """Processes on the nodes with this text in their command."""
    found = []
    for process in psutil.process_iter():
        try:
            cache = process.environ().get("PEDIGREE_NODE_CACHE", "")
            if text in " ".join(process.cmdline()) and cache.startswith(str(cluster.folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def jobs(root: Path) -> list[Any]:
    from ray.job_submission import JobSubmissionClient

    found = JobSubmissionClient(os.environ["RAY_ADDRESS"]).list_jobs()
    return [job for job in found if (job.metadata or {}).get(PROJECT) == _project_id(root)]


def until_it_trains(
    cluster: Cluster, root: Path, process: subprocess.Popen[bytes], s3: S3Server
) -> tuple[psutil.Process, psutil.Process]:
    """Wait for a checkpoint; the process of the stage on the first node, and that of its part on the other one."""
    until(lambda: s3.names(f"{root.parents[1].name}/pedigree/", "complete.json"), process, root)
    [stage] = [one for one in on_nodes(cluster, "run adapter@x") if one.cmdline()[-2:] == ["run", "adapter@x"]]
    [part] = on_nodes(cluster, "executors.ray_nodes")
    return stage, part


def test_a_training_on_two_nodes_survives_the_loss_of_one_and_gives_the_record_of_two_processes_on_one_host(
    cluster: Cluster, away: Path, tiny_model: Path, tmp_path: Path, s3: S3Server
) -> None:
    home = training_pipeline.make_project(tmp_path / "home" / "project", tiny_model, PARAMS, processes=2)
    done = run([sys.executable, "-m", "dvc", "repro", "adapter@x"], home)
    assert done.returncode == 0, done.stdout + done.stderr
    process = start(away)
    try:
        stage, part = until_it_trains(cluster, away, process, s3)
        folders = [Path(one.cwd()) for one in (stage, part)]
        caches = [cluster.node_cache(name) for name in ("first", "second")]
        assert sorted(path.parents[1] for path in folders) == caches, "each node has its own copy of the inputs"
        part.parent().kill()  # the worker of Ray Train
        (tmp_path / "gate").touch()
        assert process.wait(400) == 0, away.with_suffix(".log").read_text()
    finally:
        process.kill()
    log = away.with_suffix(".log").read_text()
    assert len(jobs(away)) == 2 and "ended without a result" in log and "from the checkpoint of step 2" in log, log
    assert published(away, "adapter@x") == published(home, "adapter@x")
    assert (away / "dvc.lock").read_bytes() == (home / "dvc.lock").read_bytes()
    execution = json.loads(measured_path(away, "adapter@x").read_text())["execution"]
    nodes = execution["node_id"].split(", ")
    assert len(set(nodes)) == 2 and execution["resources"] == {"cpus": 2}
    assert execution["cost"] == pytest.approx(
        0.02 * (execution["compute_seconds"] + execution["lost_seconds"]), rel=0.5
    )


def test_an_interrupt_ends_a_training_on_two_nodes(cluster: Cluster, away: Path, s3: S3Server) -> None:
    process = start(away)
    try:
        stage, part = until_it_trains(cluster, away, process, s3)
        asked = time.time()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) != 0
    finally:
        process.kill()
    [job] = jobs(away)
    assert job.status == "STOPPED"
    assert job.end_time / 1000 - asked < 10, "docs/cluster.md: the job ends within 10 seconds"
    ends = time.monotonic() + 60
    while stage.is_running() or part.is_running() or on_nodes(cluster, "multiprocessing.spawn"):
        assert time.monotonic() < ends, "processes of the training are left on the nodes"
        time.sleep(0.2)
    assert not (away / "data/adapter").exists() and not (away / "dvc.lock").exists()


def test_a_training_on_more_nodes_than_the_cluster_has_says_so(cluster: Cluster, away: Path) -> None:
    values = json.loads((away / "params.yaml").read_text())
    values["compute"]["processes"] = values["execution"]["stages"]["adapter"]["nodes"] = 3
    (away / "params.yaml").write_text(json.dumps(values))
    process = start(away, IMPATIENT)
    said = (
        "for 3 nodes with 1 CPU each on the cluster; fewer than 3 nodes have these resources, so it waits until others"
    )
    try:
        until(lambda: said in away.with_suffix(".log").read_text(), process, away)
        # Ray says so while Ray Train waits for nodes; the first message can come before Ray has started the job
        until(lambda: [str(job.status) for job in jobs(away)] == ["RUNNING"], process, away)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) != 0
    finally:
        process.kill()
    assert [str(job.status) for job in jobs(away)] == ["STOPPED"]
