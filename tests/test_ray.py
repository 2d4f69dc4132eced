"""Stages on a Ray cluster of two nodes (real processes) with a real S3 server: the same bytes as at home, whatever is killed, lost or damaged.

Every test starts from a project in which everything has run at home; the output of one stage is then removed, from the workspace and from the cache.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders import small_pipeline, training_pipeline
from builders.cluster import Cluster
from builders.s3 import BUCKET, S3Server, s3_server
from builders.small_pipeline import PIPELINE, published
from builders.training import LORA
from conftest import dvc, run

from dagster_project.core.errors import Busy, CheckFailed, InputError, PedigreeError
from dagster_project.core.layout import measured_path, report_of
from dagster_project.execution import Execution, Placement
from dagster_project.orchestration.dvc import store
from dagster_project.orchestration.executors.ray import ClusterGone, RayExecutor, _project_id
from dagster_project.orchestration.run_stage import run_stage

pytestmark = pytest.mark.cluster

for needed in ("ray", "moto", "dvc_s3"):
    if importlib.util.find_spec(needed) is None and not os.environ.get("CI"):
        pytest.skip(f"{needed} is not installed: pip install '.[dev,cluster]'", allow_module_level=True)


@pytest.fixture(scope="session")
def cluster(s3: S3Server) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="pray-", dir="/tmp"))  # Ray's sockets need a short path
    nodes = Cluster(folder, credentials(s3))
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.stop()
        shutil.rmtree(folder, ignore_errors=True)


def credentials(s3: S3Server) -> dict[str, str]:
    """In the environment of drivers and nodes, and nowhere else."""
    return {**s3.environment, "AWS_MAX_ATTEMPTS": "2"}


@pytest.fixture
def driver(cluster: Cluster, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Environment of a driver that uses the cluster, also set for this process."""
    variables = {**cluster.variables(), **credentials(s3), "PEDIGREE_EXECUTION": "ray"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.fixture
def root(tmp_path: Path, _made: Path, s3: S3Server) -> Path:
    """A project in which everything has run at home, with a remote on S3."""
    project = Path(shutil.copytree(_made, tmp_path / "project", symlinks=True))
    add_remote(project, s3, tmp_path.name)
    return project


def add_remote(project: Path, s3: S3Server, folder: str) -> None:
    assert dvc(project, "remote", "add", "-q", "-d", "storage", f"s3://{BUCKET}/{folder}").returncode == 0
    assert dvc(project, "remote", "modify", "storage", "endpointurl", s3.endpoint).returncode == 0


def forget(root: Path, address: str) -> dict[str, bytes]:
    """Remove a stage's output and report, and its objects from the cache. Returns what they were."""
    before = published(root, address)
    oids = [oid for oid in objects_of(root, address) if store(root).at(oid).is_file()]
    for oid in oids:
        store(root).at(oid).unlink()
    shutil.rmtree(root / "data" / address.replace("@", "/"))
    (root / report_of(address)).unlink()
    shutil.rmtree(root / ".dvc/cache/runs", ignore_errors=True)
    return before


def objects_of(root: Path, address: str) -> list[str]:
    from ruamel.yaml import YAML

    lock = YAML(typ="safe").load((root / "dvc.lock").read_text())["stages"][address]
    main = [out["md5"] for out in lock["outs"] if out["md5"].endswith(".dir")]
    return [oid for whole in main for oid in (whole, *(store(root).files(whole) or {}).values())]


def slow(root: Path, stage: str, seconds: float = 60) -> None:
    """Make a stage take that long, without changing what it depends on."""
    (root / "slow.json").write_text(json.dumps({stage: seconds}))


def start(root: Path, address: str, *, script: str = "small_pipeline.py", **environment: str) -> subprocess.Popen[str]:
    """A driver in a process of its own."""
    log = (root.parent / f"{address}.log").open("a")
    command = [sys.executable, "-c", "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
               f"sys.argv = ['{script}', 'run', '{address}']; runpy.run_path('{script}', run_name='__main__')"]  # fmt: skip
    return subprocess.Popen(command, cwd=root, env={**os.environ, **environment}, stdout=log, stderr=log, text=True, start_new_session=True)


def jobs(root: Path, address: str) -> list[Any]:
    """Ray's details of all jobs of a stage of this workspace."""
    from ray.job_submission import JobSubmissionClient

    project = _project_id(root)
    found = [
        job for job in JobSubmissionClient(os.environ["RAY_ADDRESS"]).list_jobs() if (job.metadata or {}).get("pedigree/project") == project
    ]
    return [job for job in found if job.metadata["pedigree/stage"] == address]


def commands(cluster: Cluster, text: str) -> list[psutil.Process]:
    """Processes on the nodes with this text in their command."""
    found = []
    for process in psutil.process_iter():
        try:
            if text in " ".join(process.cmdline()) and str(cluster.folder) in process.environ().get("PEDIGREE_NODE_CACHE", ""):
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Wait for a condition; its value."""
    ends = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.1)
    return value


def until_running(cluster: Cluster, root: Path, address: str) -> psutil.Process:
    """Wait until the stage's own process runs on a node; its worker."""
    until(lambda: commands(cluster, f"run {address}"))
    return next(
        one for one in commands(cluster, "executors.worker") if f'"{address}"' in " ".join(one.cmdline()) and "sh" not in one.name()
    )


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
    assert not s3.names(f"{root.parent.name}/pedigree/")  # nothing is left beside DVC's objects
    assert_no_secret(cluster, root, caplog.text, s3)


def assert_no_secret(cluster: Cluster, root: Path, text: str, s3: S3Server) -> None:
    """Neither the S3 secret nor the token is in anything that is written or shown."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(cluster.url)
    shown = [text]
    for job in client.list_jobs():
        shown += [job.model_dump_json() if hasattr(job, "model_dump_json") else job.json(), client.get_job_logs(job.submission_id)]
    shown += [path.read_text(errors="replace") for path in root.rglob("*") if path.is_file() and ".dvc/cache" not in str(path)]
    shown += [path.read_text(errors="replace") for path in cluster.node_cache("second").rglob("*") if path.is_file()]
    bodies = [s3.read(key).decode(errors="replace") for key in s3.names()]
    whole = "\n".join([*shown, *bodies])
    assert "adapter" in whole and "s3://" in whole  # the search sees what it should
    for secret in (s3.secret, cluster.token.read_text()):
        assert secret not in whole


def test_dvc_repro_records_the_same_lock_through_a_directory_as_remote(
    cluster: Cluster, driver: dict[str, str], root: Path, tmp_path: Path
) -> None:
    lock = (root / "dvc.lock").read_bytes()
    assert dvc(root, "remote", "add", "-q", "-f", "-d", "storage", str(tmp_path / "shared")).returncode == 0
    before = forget(root, "tok")
    done = run([sys.executable, "-m", "dvc", "repro", "tok"], root, **driver)
    assert done.returncode == 0, done.stdout + done.stderr
    assert published(root, "tok") == before and (root / "dvc.lock").read_bytes() == lock
    assert small_pipeline.changed_in_dvc(root) == set() and jobs(root, "tok")


def test_a_gate_that_fails_on_a_node_fails_here_with_its_report_and_is_not_run_again(driver: dict[str, str], root: Path) -> None:
    before = published(root, "inst")
    (root / "data/sources/g.txt").write_text("BAD\n")
    assert run([sys.executable, "-m", "dvc", "repro", "raw"], root, PEDIGREE_EXECUTION="local").returncode == 0
    with pytest.raises(CheckFailed, match=r"inst: 1 blocking check\(s\) failed. no_bad_rows: 1 rows \(first: 0\)"):
        run_stage(root, "inst", PIPELINE)
    assert json.loads((root / report_of("inst")).read_text())["passed"] is False
    assert published(root, "inst")["data/inst/rows.txt"] == before["data/inst/rows.txt"]
    assert len(jobs(root, "inst")) == 1


def test_live_tables_and_log_lines_arrive_while_the_stage_runs(cluster: Cluster, driver: dict[str, str], root: Path) -> None:
    forget(root, "adapter@dora")
    text = (root / "small_pipeline.py").read_text().replace('os.environ.get("STEPS", "0")', 'os.environ.get("STEPS", "40")')
    (root / "small_pipeline.py").write_text(text)
    process = start(root, "adapter@dora")
    try:
        live = root / "data/live/adapter/dora/loss.csv"
        first = until(lambda: live.is_file() and live.read_text())
        until(lambda: live.read_text() != first)
        assert process.poll() is None  # it is still running
        assert process.wait(timeout=120) == 0
        assert live.read_text() == f"step,loss\n40,{1 / 40}\n"
    finally:
        process.kill()


def test_other_versions_on_a_node_are_refused_before_anything_is_computed(
    driver: dict[str, str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is the driver that sees another numpy: what counts is that they differ."""
    (tmp_path / "other" / "numpy-9.9.9.dist-info").mkdir(parents=True)
    (tmp_path / "other" / "numpy-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    before = published(root, "tok")
    slow(root, "tok", 300)
    import numpy

    with pytest.raises(InputError, match=rf"numpy {numpy.__version__} instead of 9\.9\.9"):
        run_stage(root, "tok", PIPELINE)
    assert published(root, "tok") == before and len(jobs(root, "tok")) == 1


# --- killed and lost


def test_a_killed_worker_is_replaced_and_the_training_ends_in_the_same_bytes_from_its_checkpoint(
    cluster: Cluster, driver: dict[str, str], tmp_path: Path, tiny_model: Path, s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    home = training_pipeline.make_project(tmp_path / "home" / "project", tiny_model, LORA)
    away = Path(shutil.copytree(home, tmp_path / "away" / "project", symlinks=True))
    assert run([sys.executable, "-m", "dvc", "repro", "-q"], home, PEDIGREE_EXECUTION="local").returncode == 0
    add_remote(away, s3, tmp_path.name)
    (away / "slow.json").write_text("0.6")
    killed: list[str] = []

    def kill_after_a_checkpoint() -> None:
        until(lambda: s3.names(f"{tmp_path.name}/pedigree/", "complete.json"))
        worker = until_running(cluster, away, "adapter@x")
        killed.append(str(worker.pid))
        worker.kill()

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


def test_a_lost_node_does_not_end_the_stage(cluster: Cluster, driver: dict[str, str], root: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = forget(root, "tok")
    slow(root, "tok", 8)
    cluster.add("third", f"--address=127.0.0.1:{cluster.port}", '--resources={"spot": 1}')

    def lose_the_node() -> None:
        until_running(cluster, root, "tok")
        cluster.kill("third")
        cluster.add("fourth", f"--address=127.0.0.1:{cluster.port}", '--resources={"spot": 1}')

    loser = threading.Thread(target=lose_the_node)
    loser.start()
    try:
        with caplog.at_level(logging.INFO, logger="pedigree"):
            run_stage(root, "tok", PIPELINE, RayExecutor(Execution(), Placement(on="ray", resources={"spot": 1})))
    finally:
        loser.join()
        for name in {"third", "fourth"} & set(cluster.processes):
            cluster.kill(name)
    assert published(root, "tok") == before
    assert "ended without a result" in caplog.text and len(jobs(root, "tok")) == 2


def test_the_job_of_a_killed_driver_records_nothing_and_the_next_driver_takes_it_over(
    cluster: Cluster, driver: dict[str, str], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = forget(root, "tok")
    slow(root, "tok", 6)
    process = start(root, "tok")
    until_running(cluster, root, "tok")
    process.kill()
    process.wait()
    assert not (root / "data/tok").exists() and jobs(root, "tok")[0].status == "RUNNING"
    with caplog.at_level(logging.INFO, logger="pedigree"):
        run_stage(root, "tok", PIPELINE)
    assert published(root, "tok") == before and len(jobs(root, "tok")) == 1
    assert "going on with job" in caplog.text


def test_a_waiting_result_is_taken_by_identity_only_and_verified(
    cluster: Cluster, driver: dict[str, str], root: Path, s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver is killed and its job ends alone. One object of its output is damaged where it lies: the next driver notices and computes again.
    Then the result of another orphan waits, and the stage's code changes: that result is not used."""
    before = forget(root, "tok")
    orphan(cluster, root, s3)
    oid = next(oid for oid in objects_in(s3, root) if not oid.endswith(".dir") and b"test 7" in s3.read(object_key(root, oid)))
    s3.write(object_key(root, oid), b"test 8")
    with caplog.at_level(logging.INFO, logger="pedigree"):
        run_stage(root, "tok", PIPELINE)
    assert published(root, "tok") == before and len(jobs(root, "tok")) == 2
    assert "ended while no driver waited" in caplog.text and "it is computed again" in caplog.text
    assert s3.read(object_key(root, oid)) == b"test 7"
    orphan(cluster, root, s3)
    (root / "code/tok.py").write_text("V = 3\n")
    run_stage(root, "tok", PIPELINE)
    assert published(root, "tok")["data/tok/train.txt"].endswith(b"V = 3") and len(jobs(root, "tok")) == 4
    assert not s3.names(f"{root.parent.name}/pedigree/")


def test_a_live_job_that_computes_from_other_inputs_is_stopped(cluster: Cluster, driver: dict[str, str], root: Path) -> None:
    slow(root, "tok", 300)
    process = start(root, "tok")
    until_running(cluster, root, "tok")
    process.kill()
    process.wait()
    slow(root, "tok", 0)
    (root / "code/tok.py").write_text("V = 3\n")
    run_stage(root, "tok", PIPELINE)
    assert sorted(job.status for job in jobs(root, "tok")) == ["STOPPED", "SUCCEEDED"]
    assert published(root, "tok")["data/tok/train.txt"].endswith(b"V = 3")


def orphan(cluster: Cluster, root: Path, s3: S3Server) -> None:
    """Let a job of `tok` end after its driver was killed."""
    slow(root, "tok", 3)
    process = start(root, "tok")
    until_running(cluster, root, "tok")
    process.kill()
    process.wait()
    until(lambda: s3.names(f"{root.parent.name}/pedigree/", "result.json"))


def objects_in(s3: S3Server, root: Path) -> list[str]:
    return ["".join(key.split("/")[-2:]) for key in s3.names(f"{root.parent.name}/files/")]


def object_key(root: Path, oid: str) -> str:
    return f"{root.parent.name}/files/md5/{oid[:2]}/{oid[2:]}"


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


def test_an_interrupt_ends_the_job_and_a_second_driver_is_refused_meanwhile(cluster: Cluster, driver: dict[str, str], root: Path) -> None:
    before = published(root, "tok")
    (root / "code/tok.py").write_text("V = 4\n")
    slow(root, "tok", 300)
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


def test_dagster_runs_an_asset_on_ray_when_its_run_says_so_and_shows_where(
    cluster: Cluster, driver: dict[str, str], root: Path, instance: Any
) -> None:
    import dagster as dg

    from dagster_project.orchestration.dagster.assets import build_definitions
    from dagster_project.orchestration.dagster.metadata import asset_key

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


def test_a_cluster_that_is_gone_is_one_message_and_nothing_is_recorded(cluster: Cluster, driver: dict[str, str], root: Path) -> None:
    """The driver reaches the cluster through a relay, which goes away while the job runs; afterwards the job's result is found."""
    before = forget(root, "tok")
    slow(root, "tok", 6)
    relay = Relay(cluster.dashboard)
    os.environ["RAY_ADDRESS"] = relay.url
    cutter = threading.Thread(target=lambda: (until_running(cluster, root, "tok"), relay.close()))
    cutter.start()
    with pytest.raises(ClusterGone, match=rf"the Ray cluster at {relay.url} has not answered for 3 s") as error:
        run_stage(root, "tok", PIPELINE, RayExecutor(Execution(), Placement(on="ray"), patience=3))
    cutter.join()
    assert "nothing was recorded" in str(error.value) and not (root / "data/tok").exists()
    with pytest.raises(ClusterGone, match="no Ray cluster answers at"):
        run_stage(root, "tok", PIPELINE)
    os.environ["RAY_ADDRESS"] = cluster.url
    run_stage(root, "tok", PIPELINE)
    assert published(root, "tok") == before and len(jobs(root, "tok")) == 1


class Relay:
    """A port that passes connections on to another one until it is closed."""

    def __init__(self, port: int) -> None:
        self.target, self.server, self.open = port, socket.create_server(("127.0.0.1", 0)), True
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while self.open:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            if not self.open:
                client.close()
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            source.close()
            sink.close()

    def close(self) -> None:
        self.open = False
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()


def test_a_remote_that_is_unreachable_is_one_message(driver: dict[str, str], root: Path, tmp_path: Path, s3: S3Server) -> None:
    """First for the driver; then only for the worker, which loses it while the stage runs."""
    before = published(root, "tok")
    with s3_server(tmp_path) as other:
        add_remote_of(root, other)
        slow(root, "tok", 4)
        stopper = threading.Thread(target=lambda: (until(lambda: jobs(root, "tok")), time.sleep(5), other.kill()))
        stopper.start()
        with pytest.raises(PedigreeError, match=rf"DVC's remote s3://{BUCKET}/other cannot be (read|written): ") as error:
            run_stage(root, "tok", PIPELINE)
        stopper.join()
    assert "nothing was recorded" in str(error.value) and s3.secret not in str(error.value)
    with pytest.raises(PedigreeError, match=rf"DVC's remote s3://{BUCKET}/other cannot be read: "):
        run_stage(root, "tok", PIPELINE)
    assert published(root, "tok") == before


def add_remote_of(root: Path, server: S3Server) -> None:
    for command in (["add", "-q", "-f", "-d", "storage", f"s3://{BUCKET}/other"], ["modify", "storage", "endpointurl", server.endpoint]):
        assert dvc(root, "remote", *command).returncode == 0
