"""Stages on a Ray cluster of two nodes (real processes) with a real S3 server:
the same bytes as at home, whatever is killed, lost or damaged.

Every test starts from a project in which everything has run at home; the output
of one stage is then removed, from the workspace and from the cache.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from builders import small_pipeline, training_pipeline
from builders.cluster import Cluster, add_remote
from builders.full_remote import DISK, QUOTA, full_remote
from builders.ray_jobs import POLL, commands, jobs, until, until_running
from builders.relay import Relay
from builders.s3 import BUCKET, S3Server
from builders.small_pipeline import PIPELINE, hold, published
from builders.training import LORA
from conftest import run, skip_without

from dagster_project.core.errors import Busy, CheckFailed, InputError, PedigreeError
from dagster_project.core.layout import measured_path, report_of
from dagster_project.core.records import write_json
from dagster_project.execution import Execution, Placement
from dagster_project.lineage.history import Objects
from dagster_project.orchestration import durations
from dagster_project.orchestration.executors.local import LocalExecutor
from dagster_project.orchestration.executors.ray import ClusterGone, RayExecutor, TokenRefused
from dagster_project.orchestration.run_all import run_all
from dagster_project.orchestration.run_stage import run_stage

pytestmark = pytest.mark.cluster

skip_without("ray", "moto", "dvc_s3")


@pytest.fixture
def driver(
    driver: dict[str, str],
    cluster: Cluster,
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[dict[str, str]]:
    """As in conftest. Afterwards, however the stages of the test ended, no credential is in anything that they wrote,
    or that Ray shows of them."""
    caplog.set_level(logging.INFO, logger="pedigree")
    yield driver
    monkeypatch.setenv("RAY_ADDRESS", cluster.url)
    logged = "\n".join(record.getMessage() for record in caplog.get_records("call"))
    assert places_with_credentials(cluster, s3, tmp_path, logged) == []


@pytest.fixture
def root(tmp_path: Path, _made: Path, s3: S3Server) -> Path:
    """A project in which everything has run at home, with a remote on S3."""
    project = Path(shutil.copytree(_made, tmp_path / "project", symlinks=True))
    add_remote(project, f"s3://{BUCKET}/{tmp_path.name}", s3.endpoint)
    return project


def forget(root: Path, address: str) -> dict[str, bytes]:
    """Remove a stage's output and report, and its objects from the cache. Returns what they were."""
    before = published(root, address)
    oids = [oid for oid in objects_of(root, address) if Objects(root).at(oid).is_file()]
    for oid in oids:
        Objects(root).at(oid).unlink()
    shutil.rmtree(root / "data" / address.replace("@", "/"))
    (root / report_of(address)).unlink()
    shutil.rmtree(root / ".dvc/cache/runs", ignore_errors=True)
    return before


def objects_of(root: Path, address: str) -> list[str]:
    from ruamel.yaml import YAML

    lock = YAML(typ="safe").load((root / "dvc.lock").read_text())["stages"][address]
    main = [out["md5"] for out in lock["outs"] if out["md5"].endswith(".dir")]
    return [oid for whole in main for oid in (whole, *(Objects(root).listing(whole) or {}).values())]


def start(root: Path, address: str, *, script: str = "small_pipeline.py", **environment: str) -> subprocess.Popen[str]:
    """A driver in a process of its own."""
    log = (root.parent / f"{address}.log").open("a")
    command = [
        sys.executable,
        "-c",
        "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"from dagster_project.orchestration.executors import ray; ray.POLL, ray.WAITING_LOG_SECONDS = {POLL}, 1.0; "
        f"sys.argv = ['{script}', 'run', '{address}']; runpy.run_path('{script}', run_name='__main__')",
    ]
    return subprocess.Popen(
        command, cwd=root, env={**os.environ, **environment}, stdout=log, stderr=log, text=True, start_new_session=True
    )


def with_two_steps(root: Path) -> None:
    """Let `adapter` do two steps, also on a node, which does not get the environment of this process."""
    path = root / "small_pipeline.py"
    path.write_text(path.read_text().replace('os.environ.get("STEPS", "0")', 'os.environ.get("STEPS", "2")'))


# --- the same result


def test_a_stage_on_a_node_gives_the_same_bytes_and_shows_where_it_ran_and_no_secret(
    cluster: Cluster, driver: dict[str, str], root: Path, s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    before = forget(root, "adapter@lora")
    (root / "params.yaml").write_text(
        json.dumps({**json.loads((root / "params.yaml").read_text()), "execution": {
            "price_per_hour": {"cpus": 36.0},
            "stages": {"adapter": {"on": "ray", "resources": {"second": 1}, "image": "second", "memory": 0.01}}}})
    )  # fmt: skip
    del os.environ["PEDIGREE_EXECUTION"]
    with caplog.at_level(logging.INFO, logger="pedigree"):
        run_stage(root, "adapter@lora", PIPELINE)
    assert published(root, "adapter@lora") == before
    assert small_pipeline.changed_in_dvc(root) == set()
    assert "runs on node" in caplog.text
    execution = json.loads(measured_path(root, "adapter@lora").read_text())["execution"]
    [job] = jobs(root, "adapter@lora")
    assert execution["node_id"] == job.driver_node_id and execution["job"] == job.submission_id
    assert execution["dashboard"] == f"{cluster.url}/#/jobs/{job.submission_id}"
    assert (cluster.node_cache("second") / "cache").is_dir()  # the node that was asked for, with a cache of its own
    assert execution["queue_seconds"] > 0 and execution["transfer_bytes"] > 0
    assert execution["cost"] == pytest.approx(0.01 * execution["compute_seconds"], abs=0.3)
    assert not s3.names(
        f"{root.parent.name}/pedigree/"
    )  # nothing is left beside DVC's objects: DVC records nothing here


@pytest.mark.long
def test_parts_of_a_stage_are_tasks_of_the_cluster_and_give_the_same_bytes(
    cluster: Cluster, driver: dict[str, str], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = forget(root, "tok")
    placed = {"execution": {"stages": {"tok": {"on": "ray", "workers": 2}}}}
    (root / "params.yaml").write_text(json.dumps({**json.loads((root / "params.yaml").read_text()), **placed}))
    with caplog.at_level(logging.INFO, logger="pedigree"):
        run_stage(root, "tok", PIPELINE)
    assert published(root, "tok") == before
    assert re.search(r"tok: \d+ parts in \d+ other processes", caplog.text), caplog.text


def places_with_credentials(cluster: Cluster, s3: S3Server, folder: Path, logged: str) -> list[str]:
    """Where an S3 key, its secret or the cluster's token is: in the log of the driver, what Ray's API shows of jobs,
    objects in the remotes of a test, files of its folder (projects, reports, Dagster's event log), or those of the
    cluster (Ray's logs, files of jobs, caches of nodes)."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(cluster.url)
    found = {"log": logged.encode()}
    for job in client.list_jobs():
        shown = job.model_dump_json() if hasattr(job, "model_dump_json") else job.json()
        assert "pedigree/project" in shown or not job.submission_id, "the search sees what it should"
        found[f"job {job.submission_id}"] = shown.encode()
    found |= {f"s3://{name}": s3.read(name) for name in s3.names(folder.name)}
    files = (
        Path(place, name) for top in (folder, cluster.folder) for place, _, names in os.walk(top) for name in names
    )
    for path in files:
        with suppress(OSError):  # it was removed meanwhile
            if path.is_file() and path != cluster.token:
                found[str(path)] = path.read_bytes()
    credentials = [text.encode() for text in (s3.key, s3.secret, cluster.token.read_text())]
    return [place for place, content in found.items() if any(text in content for text in credentials)]


def test_a_credential_in_a_file_of_a_project_or_in_the_log_is_found(
    cluster: Cluster, driver: dict[str, str], s3: S3Server, tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_text(f'{{"key": "{s3.key}"}}')
    assert places_with_credentials(cluster, s3, tmp_path, s3.secret) == ["log", str(tmp_path / "report.json")]
    (tmp_path / "report.json").unlink()


def test_a_result_stays_until_dvc_has_recorded_it_and_a_forced_run_computes_again(
    cluster: Cluster, driver: dict[str, str], root: Path, tmp_path: Path
) -> None:
    """Through a folder as remote. DVC is gone when the first driver ends, so nothing
    records its result; the next run takes it, and gives the same dvc.lock. A forced run
    computes. So does one of other inputs, and its result replaces the one that waits."""
    lock = (root / "dvc.lock").read_bytes()
    add_remote(root, str(tmp_path / "shared"))
    before = forget(root, "tok")
    assert start(root, "tok", DVC_STAGE="tok").wait(120) == 0
    shutil.rmtree(root / "data/tok")
    for options, submitted in (([], 1), (["--force", "--single-item"], 2)):
        done = run([sys.executable, "-m", "dvc", "repro", *options, "tok"], root, **driver)
        assert done.returncode == 0, done.stdout + done.stderr
        assert published(root, "tok") == before and (root / "dvc.lock").read_bytes() == lock
        assert len(jobs(root, "tok")) == submitted
        [kept] = (tmp_path / "shared/pedigree/jobs").iterdir()
        assert {path.name for path in kept.iterdir()} <= {"result.json", "pages.tar"}
    assert small_pipeline.changed_in_dvc(root) == set()
    (root / "code/tok.py").write_text("V = 3\n")
    assert start(root, "tok", DVC_STAGE="tok").wait(120) == 0
    assert published(root, "tok")["data/tok/train.txt"].endswith(b"V = 3")
    [other] = (tmp_path / "shared/pedigree/jobs").iterdir()
    assert other != kept and len(jobs(root, "tok")) == 3


def test_a_gate_that_fails_on_a_node_fails_here_with_its_report_and_is_not_run_again(
    driver: dict[str, str], root: Path
) -> None:
    before = published(root, "inst")
    (root / "data/sources/g.txt").write_text("BAD\n")
    assert run([sys.executable, "-m", "dvc", "repro", "raw"], root, PEDIGREE_EXECUTION="local").returncode == 0
    with pytest.raises(CheckFailed, match=r"inst: 1 blocking check\(s\) failed. no_bad_rows: 1 row \(first: 0\)"):
        run_stage(root, "inst", PIPELINE)
    assert json.loads((root / report_of("inst")).read_text())["passed"] is False
    assert published(root, "inst")["data/inst/rows.txt"] == before["data/inst/rows.txt"]
    assert len(jobs(root, "inst")) == 1


def test_live_tables_and_log_lines_arrive_while_the_stage_runs(
    cluster: Cluster, driver: dict[str, str], root: Path
) -> None:
    forget(root, "adapter@dora")
    with_two_steps(root)
    begin, first_step, second_step = hold(root, "adapter", 3)
    begin.touch()
    process = start(root, "adapter@dora")
    try:
        live = root / "data/live/adapter/dora/loss.csv"
        first = until(lambda: live.is_file() and live.read_text())
        first_step.touch()
        until(lambda: live.read_text() != first)
        assert process.poll() is None  # it is still running
        second_step.touch()
        assert process.wait(timeout=120) == 0
        assert live.read_text() == f"step,loss\n2,{1 / 2}\n"
    finally:
        process.kill()


def test_other_versions_on_a_node_are_refused_before_anything_is_computed(
    driver: dict[str, str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is the driver that sees another numpy: what counts is that they differ."""
    (tmp_path / "other" / "numpy-9.9.9.dist-info").mkdir(parents=True)
    (tmp_path / "other" / "numpy-9.9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: numpy\nVersion: 9.9.9\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    before = published(root, "tok")
    hold(root, "tok")
    import numpy

    with pytest.raises(InputError, match=rf"numpy {numpy.__version__} instead of 9\.9\.9"):
        run_stage(root, "tok", PIPELINE)
    assert published(root, "tok") == before and len(jobs(root, "tok")) == 1


# --- waits


def on_one_slot(root: Path) -> Path:
    """Both variants are edited, and the cluster has room for one. Both logs say what waits, more often than by default.

    Returns:
        The file that lets them end.
    """
    values = json.loads((root / "params.yaml").read_text())
    placed = {"stages": {"adapter": {"on": "ray", "resources": {"second": 1}}}}
    (root / "params.yaml").write_text(json.dumps({**values, "execution": placed}))
    (root / "code/adapter.py").write_text("V = 9\n")
    impatient = (
        "        logging.basicConfig(level=logging.INFO)\n"
        "        from dagster_project.orchestration.executors import ray\n"
        f"        ray.POLL, ray.WAITING_LOG_SECONDS = {POLL}, 1.0\n"
    )
    text, found = (root / "small_pipeline.py").read_text(), '    if sys.argv[1] == "run":\n'
    assert found in text
    (root / "small_pipeline.py").write_text(text.replace(found, found + impatient))
    for address, seconds in {"adapter@lora": 6000.0, "adapter@dora": 6000.0, "cmp": 60.0}.items():
        place = "local" if address == "cmp" else "ray"
        write_json(root / durations.SECONDS / place / f"{address}.json", {"seconds": seconds})
    return hold(root, "adapter")[0]


WAITS = re.compile(
    r"(adapter@(?:lora|dora)): has waited \d+:\d\d for 1 CPU, 1 second on the cluster;"
    r" ahead of it: (adapter@(?:lora|dora)) \(1 CPU, 1 second; about 1:\d\d:\d\d left\);"
    r" estimate: it could begin in about 1:\d\d:\d\d, if they hold what it needs and take as long as the last time;"
    r" `ray status` on the cluster shows what its nodes have"
)


def test_a_stage_that_waits_says_behind_what_and_the_time_left_of_all_stages_leaves_its_wait_out(
    driver: dict[str, str], root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("PEDIGREE_EXECUTION")
    monkeypatch.setattr("dagster_project.orchestration.run_all.PROGRESS_INTERVAL", 1.0)
    gate = on_one_slot(root)
    shown = re.compile(
        r"running: .*adapter@\w+ waits on the cluster.*\. 1 running, 1 waiting on the cluster, 1 queued,"
        r" about 1:4\d:\d\d left if all run, by the last runs; waits on the cluster are not included"
    )

    def release() -> None:
        try:
            until(lambda: WAITS.search(caplog.text) and shown.search(caplog.text), 240)
        finally:
            gate.touch()

    releaser = threading.Thread(target=release)
    with caplog.at_level(logging.INFO, logger="pedigree"):
        releaser.start()
        document = run_all(root, 2, False, PIPELINE.validate, pipeline=PIPELINE)
        releaser.join()
    assert document["passed"], caplog.text
    waits = WAITS.search(caplog.text)
    assert waits and {waits[1], waits[2]} == {"adapter@lora", "adapter@dora"}, caplog.text
    assert shown.search(caplog.text), caplog.text
    for address in ("adapter@lora", "adapter@dora"):
        [job] = jobs(root, address)
        assert job.metadata["pedigree/seconds"] == "6000.0"
        queued = json.loads(measured_path(root, address).read_text())["execution"]["queue_seconds"]
        assert (durations.last(root, address, "ray") or 6000) < 600
        assert queued > 0
    assert durations.jobs(root) == []


@pytest.mark.long
def test_the_log_of_a_run_in_dagster_has_the_wait_of_a_stage_and_what_is_left(
    driver: dict[str, str], root: Path, synced: dg.DagsterInstance
) -> None:
    gate = on_one_slot(root)
    variables = {name: value for name, value in os.environ.items() if name != "PEDIGREE_EXECUTION"}
    command = [sys.executable, "small_pipeline.py", "materialize-at-once"]
    process = subprocess.Popen(command, cwd=root, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def messages() -> list[str]:
        return [entry.user_message for run in synced.get_runs() for entry in synced.all_logs(run.run_id)]

    try:
        until(lambda: process.poll() is not None or any(map(WAITS.fullmatch, messages())), 300)
        gate.touch()
        assert process.wait(300) == 0, messages()
    finally:
        process.kill()
    assert any(map(WAITS.fullmatch, messages())), messages()
    started = [line for line in messages() if "stages done" in line and line.startswith("adapter@")]
    assert len(started) == 2
    assert all(line.endswith("by the last runs; waits on the cluster are not included") for line in started), started


# --- killed and lost


@pytest.mark.long
def test_a_killed_worker_is_replaced_and_the_training_ends_in_the_same_bytes_from_its_checkpoint(
    cluster: Cluster,
    driver: dict[str, str],
    tmp_path: Path,
    tiny_model: Path,
    s3: S3Server,
    caplog: pytest.LogCaptureFixture,
) -> None:
    home = training_pipeline.make_project(tmp_path / "home" / "project", tiny_model, {**LORA, "num_train_epochs": 1})
    away = Path(shutil.copytree(home, tmp_path / "away" / "project", symlinks=True))
    run_stage(home, "adapter@x", training_pipeline.PIPELINE, LocalExecutor())
    add_remote(away, f"s3://{BUCKET}/{tmp_path.name}", s3.endpoint)
    gate = tmp_path / "gate"
    (away / "hold.json").write_text(
        json.dumps({"before": 6, "gate": str(gate)})
    )  # in the third of four steps; the second has a checkpoint
    killed: list[str] = []

    def kill_after_a_checkpoint() -> None:
        until(lambda: s3.names(f"{tmp_path.name}/pedigree/", "complete.json"))
        worker = until_running(cluster, away, "adapter@x")
        killed.append(str(worker.pid))
        worker.kill()
        gate.touch()

    killer = threading.Thread(target=kill_after_a_checkpoint)
    killer.start()
    with caplog.at_level(logging.INFO, logger="pedigree"):
        run_stage(away, "adapter@x", training_pipeline.PIPELINE)
    killer.join()
    assert killed and len(jobs(away, "adapter@x")) == 2
    assert "ended without a result" in caplog.text and "checkpoint of step" in caplog.text
    assert published(away, "adapter@x") == published(home, "adapter@x")
    assert (away / "data/plots/loss/x.csv").read_bytes() == (home / "data/plots/loss/x.csv").read_bytes()
    assert not s3.names(f"{tmp_path.name}/pedigree/")  # checkpoints included


@pytest.mark.long
def test_a_lost_node_does_not_end_the_stage(
    cluster: Cluster, driver: dict[str, str], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = forget(root, "tok")
    [gate] = hold(root, "tok")

    def lose_the_node() -> None:
        until_running(cluster, root, "tok")
        cluster.kill("second")
        gate.touch()
        cluster.add("second", f"--address=127.0.0.1:{cluster.port}")

    loser = threading.Thread(target=lose_the_node)
    loser.start()
    try:
        with caplog.at_level(logging.INFO, logger="pedigree"):
            run_stage(root, "tok", PIPELINE, RayExecutor(Execution(), Placement(on="ray", resources={"second": 1})))
    finally:
        loser.join()
    assert published(root, "tok") == before
    assert "ended without a result" in caplog.text and len(jobs(root, "tok")) == 2


def test_the_job_of_a_killed_driver_records_nothing_and_the_next_driver_takes_it_over(
    cluster: Cluster, driver: dict[str, str], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = forget(root, "tok")
    [gate] = hold(root, "tok")
    process = start(root, "tok")
    until_running(cluster, root, "tok")
    process.kill()
    process.wait()
    assert not (root / "data/tok").exists() and jobs(root, "tok")[0].status == "RUNNING"
    threading.Thread(target=lambda: (until(lambda: "going on with job" in caplog.text), gate.touch())).start()
    with caplog.at_level(logging.INFO, logger="pedigree"):
        run_stage(root, "tok", PIPELINE)
    assert published(root, "tok") == before and len(jobs(root, "tok")) == 1
    assert "going on with job" in caplog.text


@pytest.mark.long
def test_a_waiting_result_is_verified(
    cluster: Cluster, driver: dict[str, str], root: Path, s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver is killed and its job ends alone. One object of its output is
    damaged where it lies: the next driver notices and computes again."""
    before = forget(root, "tok")
    [gate] = hold(root, "tok")
    process = start(root, "tok")
    until_running(cluster, root, "tok")
    process.kill()
    process.wait()
    gate.touch()
    until(lambda: s3.names(f"{root.parent.name}/pedigree/", "result.json"))
    oid = next(
        oid for oid in objects_in(s3, root) if not oid.endswith(".dir") and b"test 7" in s3.read(object_key(root, oid))
    )
    s3.write(object_key(root, oid), b"test 8")
    with caplog.at_level(logging.INFO, logger="pedigree"):
        run_stage(root, "tok", PIPELINE)
    assert published(root, "tok") == before and len(jobs(root, "tok")) == 2
    assert (
        "the result of an earlier job with the same inputs is used" in caplog.text
        and "it is computed again" in caplog.text
    )
    assert s3.read(object_key(root, oid)) == b"test 7"
    assert not s3.names(f"{root.parent.name}/pedigree/")


@pytest.mark.long
def test_a_live_job_that_computes_from_other_inputs_is_stopped(
    cluster: Cluster, driver: dict[str, str], root: Path
) -> None:
    hold(root, "tok")
    process = start(root, "tok")
    until_running(cluster, root, "tok")
    process.kill()
    process.wait()
    (root / "hold.json").unlink()
    (root / "code/tok.py").write_text("V = 3\n")
    run_stage(root, "tok", PIPELINE)
    assert sorted(job.status for job in jobs(root, "tok")) == ["STOPPED", "SUCCEEDED"]
    assert published(root, "tok")["data/tok/train.txt"].endswith(b"V = 3")


def objects_in(s3: S3Server, root: Path) -> list[str]:
    return ["".join(key.split("/")[-2:]) for key in s3.names(f"{root.parent.name}/files/")]


def object_key(root: Path, oid: str) -> str:
    return f"{root.parent.name}/files/md5/{oid[:2]}/{oid[2:]}"


@pytest.mark.long
def test_an_input_damaged_in_the_remote_is_sent_again(
    driver: dict[str, str], root: Path, s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    from dagster_project.orchestration.dvc_remote import inputs_by_hash
    from dagster_project.orchestration.remote_store import open_store

    (root / "data/sources/g.txt").write_text("rows that no node has seen\n")
    assert run([sys.executable, "-m", "dvc", "repro", "inst"], root, PEDIGREE_EXECUTION="local").returncode == 0
    with open_store(root) as opened:
        opened.push(inputs_by_hash(root, "tok").values())
    oid = next(oid for oid in objects_in(s3, root) if not oid.endswith(".dir"))
    s3.write(object_key(root, oid), b"damaged")
    with caplog.at_level(logging.INFO, logger="pedigree"):
        run_stage(root, "tok", PIPELINE)
    assert b"ROWS THAT NO NODE HAS SEEN" in published(root, "tok")["data/tok/train.txt"]
    assert "1 input(s) were damaged in the remote; they are sent again" in caplog.text


# --- interrupted, at once, unreachable


@pytest.mark.long
def test_an_interrupt_ends_the_job_and_a_second_driver_is_refused_meanwhile(
    cluster: Cluster, driver: dict[str, str], root: Path
) -> None:
    before = published(root, "tok")
    (root / "code/tok.py").write_text("V = 4\n")
    hold(root, "tok")
    process = start(root, "tok")
    worker = until_running(cluster, root, "tok")
    with pytest.raises(Busy, match="tok is being run by process"):
        run_stage(root, "tok", PIPELINE)
    assert len(jobs(root, "tok")) == 1
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) != 0
    [job] = jobs(root, "tok")
    assert job.status == "STOPPED"
    until(lambda: not worker.is_running() and not commands(cluster, "run tok"), 60)
    assert published(root, "tok") == before


def test_a_stopped_job_that_waits_for_a_node_that_does_not_exist_does_not_delay_the_next_run(
    cluster: Cluster, driver: dict[str, str], root: Path
) -> None:
    before = forget(root, "tok")
    placed = json.dumps({"stages": {"tok": {"on": "ray", "resources": {"nowhere": 1}}}})
    process = start(root, "tok", PEDIGREE_EXECUTION=placed)
    warning = re.compile(
        r"tok: has waited 0:\d\d for 1 CPU, 1 nowhere on the cluster; no node has these resources, so it waits until"
        r" one joins \(see `ray status` and `execution`\)"
    )
    until(lambda: warning.search((root.parent / "tok.log").read_text()))
    assert len(jobs(root, "tok")) == 1
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) != 0
    assert [job.status for job in jobs(root, "tok")] == ["PENDING"], "docs/cluster.md: Ray keeps it in its queue"
    run_stage(root, "tok", PIPELINE)
    assert published(root, "tok") == before
    assert sorted(job.status for job in jobs(root, "tok")) == ["PENDING", "SUCCEEDED"]


def test_dagster_runs_an_asset_on_ray_when_its_run_says_so_and_shows_where_but_no_secret(
    cluster: Cluster, driver: dict[str, str], root: Path, instance: Any, s3: S3Server
) -> None:
    import dagster as dg

    from dagster_project.orchestration.dagster.assets import build_definitions
    from dagster_project.orchestration.dagster_dvc.keys import asset_key

    del os.environ["PEDIGREE_EXECUTION"]
    before = forget(root, "tok")
    definitions = build_definitions(root, PIPELINE)
    job = definitions.resolve_implicit_global_asset_job_def()
    config = {"ops": {"tok": {"config": {"on": "ray"}}}, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    done = job.execute_in_process(instance=instance, asset_selection=[asset_key("tok")], run_config=config)
    assert done.success and published(root, "tok") == before
    event = instance.fetch_materializations(asset_key("tok"), limit=1).records[0]
    metadata = {name: value.value for name, value in event.asset_materialization.metadata.items()}
    [ran] = jobs(root, "tok")
    assert metadata["dashboard"] == f"{cluster.url}/#/jobs/{ran.submission_id}"
    assert metadata["execution"]["node_id"] == ran.driver_node_id
    assert isinstance(event.asset_materialization.metadata["dashboard"], dg.UrlMetadataValue)
    stored = b"".join(path.read_bytes() for path in Path(instance.root_directory).rglob("*") if path.is_file())
    assert ran.submission_id.encode() in stored  # the search sees what it should
    for secret in (s3.secret, cluster.token.read_text()):
        assert secret.encode() not in stored


@pytest.mark.long
def test_terminating_a_run_of_dagster_ends_the_job_of_its_stage_and_records_nothing(
    cluster: Cluster, driver: dict[str, str], root: Path, synced: Any
) -> None:
    import dagster as dg

    from dagster_project.orchestration.dagster_dvc.keys import asset_key

    before, lock = published(root, "tok"), (root / "dvc.lock").read_bytes()
    (root / "code/tok.py").write_text("V = 4\n")
    hold(root, "tok")
    events = synced.fetch_materializations(asset_key("tok"), limit=9).records
    process = subprocess.Popen(
        [sys.executable, "small_pipeline.py", "materialize-at-once", "tok"],
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        worker = until_running(cluster, root, "tok")
        asked = time.time()
        process.send_signal(signal.SIGINT)  # what Dagster sends to a run that is terminated
        assert process.wait(timeout=120) != 0
    finally:
        process.kill()
    [job] = jobs(root, "tok")
    assert job.status == "STOPPED"
    assert job.end_time / 1000 - asked < 10, "docs/cluster.md: the job ends within 10 seconds"
    until(lambda: not worker.is_running() and not commands(cluster, "run tok"), 60)
    assert published(root, "tok") == before and (root / "dvc.lock").read_bytes() == lock
    assert synced.fetch_materializations(asset_key("tok"), limit=9).records == events
    [run] = [found for found in synced.get_runs() if found.job_name == "pipeline"]
    assert run.status in {dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.FAILURE}


def test_a_token_that_changes_and_a_cluster_that_is_gone_are_one_message_each_and_nothing_is_recorded(
    cluster: Cluster, driver: dict[str, str], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver reaches the cluster through a relay. While the job runs, the relay puts another token into the
    requests, then it goes away; afterwards the job's result is found."""
    before = forget(root, "tok")
    [gate] = hold(root, "tok")
    relay = Relay(cluster.dashboard)
    os.environ["RAY_ADDRESS"] = relay.url
    token = cluster.token.read_text()
    caplog.set_level(logging.INFO, logger="pedigree")

    def after(line: str, action: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=lambda: (until(lambda: line in caplog.text), action()))
        thread.start()
        return thread

    rotator = after("tok: runs on node", lambda: relay.replace.update({token.encode(): secrets.token_hex(32).encode()}))
    with pytest.raises(
        TokenRefused, match=rf"tok: the Ray cluster at {relay.url} no longer accepts the token"
    ) as refused:
        run_stage(root, "tok", PIPELINE)
    rotator.join()
    assert (
        "nothing was recorded" in str(refused.value)
        and token not in str(refused.value)
        and not (root / "data/tok").exists()
    )
    with pytest.raises(InputError, match=rf"the Ray cluster at {relay.url} requires another token"):
        run_stage(root, "tok", PIPELINE)
    relay.replace.clear()
    cutter = after("tok: going on with job", relay.close)
    with pytest.raises(ClusterGone, match=rf"the Ray cluster at {relay.url} has not answered for 3 s") as error:
        run_stage(root, "tok", PIPELINE, RayExecutor(Execution(), Placement(on="ray"), patience=3))
    cutter.join()
    assert "nothing was recorded" in str(error.value) and not (root / "data/tok").exists()
    with pytest.raises(ClusterGone, match="no Ray cluster answers at"):
        run_stage(root, "tok", PIPELINE)
    os.environ["RAY_ADDRESS"] = cluster.url
    gate.touch()
    run_stage(root, "tok", PIPELINE)
    assert published(root, "tok") == before and len(jobs(root, "tok")) == 1


def test_a_remote_that_is_unreachable_is_one_message(
    cluster: Cluster, driver: dict[str, str], root: Path, s3: S3Server
) -> None:
    """It goes away while the stage runs, first noticed by the worker; then the driver finds none at its start."""
    before = published(root, "tok")
    relay = Relay(int(s3.endpoint.rpartition(":")[2]))
    add_remote(root, f"s3://{BUCKET}/other", relay.url)
    [gate] = hold(root, "tok")
    stopper = threading.Thread(target=lambda: (until_running(cluster, root, "tok"), relay.close(), gate.touch()))
    stopper.start()
    with pytest.raises(PedigreeError, match=rf"DVC's remote s3://{BUCKET}/other cannot be (read|written): ") as error:
        run_stage(root, "tok", PIPELINE)
    stopper.join()
    assert "nothing was recorded" in str(error.value) and s3.secret not in str(error.value)
    assert "keeps the result for a week" in str(error.value)
    with pytest.raises(PedigreeError, match=rf"DVC's remote s3://{BUCKET}/other cannot be read: "):
        run_stage(root, "tok", PIPELINE)
    assert published(root, "tok") == before


def test_a_remote_that_is_full_is_one_message_and_a_finished_stage_is_not_computed_again(
    cluster: Cluster, driver: dict[str, str], root: Path, instance: Any, s3: S3Server
) -> None:
    """Full when the driver sends the inputs, in a run of DVC; then, in a run of Dagster, from the second checkpoint on,
    so that the outputs are refused, too. Then there is space."""
    from ray.job_submission import JobSubmissionClient

    from dagster_project.orchestration.dagster_dvc.keys import asset_key

    (root / "code/adapter.py").write_text("V = 3\n")
    with_two_steps(root)
    begin, first_step, second_step = hold(root, "adapter", 3)
    placed = {"stages": {"adapter": {"on": "ray", "resources": {"second": 1}}}}
    os.environ["PEDIGREE_EXECUTION"] = json.dumps(placed)
    before, lock = published(root, "adapter@dora"), (root / "dvc.lock").read_bytes()
    prefix = root.parent.name
    message = f"DVC's remote s3://{BUCKET}/{prefix} cannot be written: it is full, or a quota is reached"

    def as_before() -> bool:
        return published(root, "adapter@dora") == before and (root / "dvc.lock").read_bytes() == lock

    with full_remote(s3.endpoint) as remote:
        add_remote(root, f"s3://{BUCKET}/{prefix}", remote.url)

        def fill_up() -> None:
            begin.touch()
            until(lambda: s3.names(f"{prefix}/pedigree/", "step-00000001/complete.json"), 300)
            remote.answer = QUOTA
            first_step.touch()
            until(lambda: len([path for path in remote.refused if "step-00000002" in path]) == 2)
            assert [job.status for job in jobs(root, "adapter@dora")] == ["RUNNING"]
            second_step.touch()

        remote.answer = DISK
        done = run([sys.executable, "-m", "dvc", "repro", "--single-item", "adapter@dora"], root)
        shown = done.stdout + done.stderr
        assert done.returncode != 0 and shown.count(message) == 1 and "Traceback" not in shown
        assert "hint: nothing was recorded; free some space in the remote, or ask for a larger quota" in shown
        assert as_before() and jobs(root, "adapter@dora") == []
        assert len(remote.refused) == len({*remote.refused}) > 0, "no object is sent twice"

        remote.answer = None
        remote.refused.clear()
        with ThreadPoolExecutor(1) as thread:
            filled = thread.submit(fill_up)
            failed = small_pipeline.materialize(root, instance, ["adapter@dora"])
            filled.result()
        assert not failed.success and as_before()
        assert instance.fetch_materializations(asset_key("adapter@dora"), limit=1).records == []
        events = "\n".join(entry.message for entry in instance.all_logs(failed.run_id))
        assert message in events and "keeps the result for a week" in events
        [job] = jobs(root, "adapter@dora")
        log = JobSubmissionClient(cluster.url).get_job_logs(job.submission_id)
        assert log.count("checkpoint was not copied to the remote") == 1
        refused = [path for path in remote.refused if "step-00000002" not in path]
        assert len(refused) == len({*refused}) > 0 and all("/files/md5/" in path for path in refused)

        [kept] = (cluster.node_cache("second") / "results").glob("adapter.dora-*.json")
        seconds = json.loads(kept.read_text())["seconds"]["compute_seconds"]
        remote.answer = None
        assert small_pipeline.materialize(root, instance, ["adapter@dora"]).success
    found = published(root, "adapter@dora")
    assert len(jobs(root, "adapter@dora")) == 2 and not kept.exists()
    execution = json.loads(measured_path(root, "adapter@dora").read_text())["execution"]
    assert execution["compute_seconds"] == seconds, "it was not computed again"
    assert "adapter@dora" not in small_pipeline.changed_in_dvc(root)
    run_stage(root, "adapter@dora", PIPELINE, LocalExecutor())
    assert published(root, "adapter@dora") == found != before
