"""The executor interface: a stage that runs in another folder and process gives
the same record as one that runs in place."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from builders import small_pipeline
from conftest import dvc, edit_params, run

from dagster_project.core.errors import INNER, CheckFailed, InputError
from dagster_project.core.layout import RECORD_KEY, measured_path, report_of
from dagster_project.core.workers import LocalProcesses
from dagster_project.curation.sources.erased import TOMBSTONES
from dagster_project.execution import VARIABLE
from dagster_project.orchestration.dvc_run import is_forced
from dagster_project.orchestration.executors import StageJob, StageResult
from dagster_project.orchestration.executors.local import LocalExecutor
from dagster_project.orchestration.executors.ray import _project_id
from dagster_project.orchestration.run_stage import _executor, run_stage
from dagster_project.pipeline import PEDIGREE

log = logging.getLogger("pedigree")


class Elsewhere:
    """Runs the stage's command in a copy of the project, and brings its files back into the working folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, job: StageJob) -> StageResult:
        root, address = self.folder / "project", job.ctx.address
        shutil.copytree(job.ctx.root, root, symlinks=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")} | {
            "STEPS": "1"
        }
        command = [sys.executable, "small_pipeline.py", "run", address]
        done = subprocess.run(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        for line in done.stderr.splitlines():
            log.info(line)
        for kind in ("live", "pages", *(["."] if done.returncode == 0 else [])):
            source = root / "data" / kind / address.replace("@", "/")
            target = (job.ctx.root if kind == "live" else job.ctx.scratch) / "data" / kind / address.replace("@", "/")
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
        report = root / report_of(address)
        measured = measured_path(root, address)
        return StageResult(
            done.returncode,
            (
                {k: v for k, v in json.loads(report.read_text()).items() if k not in {"passed", "output_sha256"}}
                if report.is_file()
                else None
            ),
            (
                {k: v for k, v in json.loads(measured.read_text()).items() if k != "output_sha256"}
                if measured.is_file()
                else {}
            ),
        )


@pytest.fixture
def root(_made: Path, tmp_path: Path) -> Path:
    """A small pipeline in which everything has run."""
    root = tmp_path / "driver" / "project"
    shutil.copytree(_made, root, symlinks=True)
    return root


def outputs(root: Path, address: str) -> dict[str, bytes]:
    folder = root / "data" / address.replace("@", "/")
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {**found, "report": (root / report_of(address)).read_bytes()}


def test_a_stage_that_runs_elsewhere_gives_the_same_outputs_and_report(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = {address: outputs(root, address) for address in ("tok", "adapter@lora")}
    for address in here:
        with caplog.at_level(logging.INFO, logger="pedigree"):
            run_stage(root, address, small_pipeline.PIPELINE, Elsewhere(tmp_path / address))
        assert outputs(root, address) == here[address]
    assert small_pipeline.changed_in_dvc(root) == set()
    assert (root / "data/live/adapter/lora/loss.csv").is_file() and measured_path(root, "adapter@lora").is_file()


def test_workers_on_this_host_give_the_same_outputs_and_report(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = outputs(root, "tok")
    edit_params(root, lambda values: values.update(execution={"stages": {"tok": {"workers": 2}}}))
    run_stage(root, "tok", small_pipeline.PIPELINE)
    assert outputs(root, "tok") == here and re.search(r"tok: \d+ parts in \d+ other processes", capsys.readouterr().out)
    assert small_pipeline.changed_in_dvc(root) == set()


def test_a_stage_that_reads_a_key_which_git_ignores_runs_on_this_machine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A job gets only what git does not ignore, and `pedigree init` lets git ignore the key of record ids."""
    values = {"execution": {"stages": {stage: {"on": "ray"} for stage in ("release", "raw_examples")}}}
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for path in (RECORD_KEY, ".gitignore"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"/{RECORD_KEY}\n")

    def place(address: str, *inputs: str) -> str:
        return type(_executor(tmp_path, values, address, PEDIGREE, inputs)).__name__

    with caplog.at_level(logging.INFO, logger="pedigree"):
        assert place("release", "data/merged", "data/keys") == "LocalExecutor"
    assert "release: runs on this machine" in caplog.text and RECORD_KEY in caplog.text
    assert place("release", "data/merged") == place("raw_examples", "data/sources") == "RayExecutor"
    (tmp_path / TOMBSTONES).parent.mkdir(parents=True)
    (tmp_path / TOMBSTONES).touch()
    assert place("raw_examples", "data/sources") == "LocalExecutor", "it compares records with those that were erased"
    subprocess.run(["git", "add", "--force", RECORD_KEY], cwd=tmp_path, check=True)
    assert place("release", "data/keys") == place("raw_examples", "data/sources") == "RayExecutor"


def test_verify_makes_stages_again_on_this_machine_wherever_they_are_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scratch copy is not a git repository, from which a job could get its files."""
    values = {"execution": {"stages": {"splits": {"on": "ray", "workers": 3}}}}
    monkeypatch.delenv(VARIABLE, raising=False)
    assert type(_executor(tmp_path, values, "splits", PEDIGREE, [])).__name__ == "RayExecutor"
    monkeypatch.setenv(INNER, "1")
    here = _executor(tmp_path, values, "splits", PEDIGREE, [])
    assert isinstance(here, LocalExecutor) and isinstance(here.workers, LocalProcesses) and here.workers.count == 3


@pytest.mark.usefixtures("warm_small")
def test_a_gate_that_fails_on_another_machine_fails_here_and_publishes_only_its_report(
    root: Path, tmp_path: Path
) -> None:
    before = (root / "data/inst/rows.txt").read_bytes()
    (root / "data/sources/g.txt").write_text("BAD\n")
    assert dvc(root, "repro", "raw").returncode == 0
    with pytest.raises(CheckFailed, match=r"inst: 1 blocking check\(s\) failed. no_bad_rows: 1 row \(first: 0\)"):
        run_stage(root, "inst", small_pipeline.PIPELINE, Elsewhere(tmp_path / "elsewhere"))
    assert (root / "data/inst/rows.txt").read_bytes() == before
    assert json.loads((root / report_of("inst")).read_text())["passed"] is False


@pytest.mark.parametrize(("code", "error"), [(1, CheckFailed), (2, InputError), (137, CheckFailed)])
def test_a_run_that_ends_without_a_report_publishes_nothing(root: Path, code: int, error: type[Exception]) -> None:
    class Lost:
        def run(self, job: StageJob) -> StageResult:
            (job.ctx.out / "half.txt").write_text("half")
            return StageResult(code, None, {})

    before = outputs(root, "tok")
    with pytest.raises(error, match=f"tok ended with exit code {code} and without a report"):
        run_stage(root, "tok", small_pipeline.PIPELINE, Lost())
    assert outputs(root, "tok") == before and small_pipeline.changed_in_dvc(root) == set()


def test_a_job_is_identified_by_what_it_reads_and_a_failed_exit_code_never_publishes(root: Path) -> None:
    jobs: list[StageJob] = []

    class Failing:
        def run(self, job: StageJob) -> StageResult:
            jobs.append(job)
            return StageResult(1, {}, {})

    for _ in range(2):
        with pytest.raises(CheckFailed):
            run_stage(root, "tok", small_pipeline.PIPELINE, Failing())
    assert jobs[0].inputs == jobs[1].inputs and {"data/inst", "code/tok.py", "params.yaml"} <= set(jobs[0].inputs)
    assert small_pipeline.changed_in_dvc(root) == set()


def test_a_run_that_is_canceled_stops_what_it_started_publishes_nothing_and_frees_the_stage(root: Path) -> None:
    """Real signals: the driver gets an interrupt while a process that its executor started is at work."""
    script = root / "cancel.py"
    script.write_text(
        "import signal, subprocess, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)  # a process started"
        " in the background ignores it\nfrom pathlib import Path\nimport small_pipeline\nfrom"
        " dagster_project.orchestration.run_stage import run_stage\nclass Remote:\n    def run(self, job):\n       "
        " (job.ctx.out / 'half.txt').write_text('half')\n        worker = subprocess.Popen([sys.executable, '-c',"
        " 'import time; time.sleep(600)'], start_new_session=True)\n        try:\n            print(worker.pid,"
        " flush=True)\n            worker.wait()\n        except KeyboardInterrupt:\n            worker.kill();"
        " worker.wait()\n            raise\nrun_stage(Path.cwd(), 'tok', small_pipeline.PIPELINE, Remote())\n"
    )
    before = outputs(root, "tok")
    driver = subprocess.Popen(
        [sys.executable, str(script)], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert driver.stdout
    worker = int(driver.stdout.readline())
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode != 0 and "KeyboardInterrupt" in errors
    assert not psutil.pid_exists(worker)
    assert outputs(root, "tok") == before and small_pipeline.changed_in_dvc(root) == set()
    (root / "code/tok.py").write_text("V = 1\n")
    assert dvc(root, "repro", "tok").returncode == 0  # the stage is free


FORCED = """
import sys
from pathlib import Path
from dagster_project.orchestration.dvc_run import is_forced

Path("out.txt").write_text(str(is_forced()))
"""
REPRODUCE = (
    "import sys; from pathlib import Path; from dagster_project.orchestration import dvc_run;"
    " dvc_run.reproduce(Path.cwd(), 'one', sys.argv[1] == 'force', {}, print)"
)


@pytest.mark.parametrize(
    ("command", "forced"),
    [
        (["-m", "dvc", "repro"], False),
        (["-m", "dvc", "repro", "--single-item", "one"], False),
        (["-m", "dvc", "repro", "--force"], True),
        (["-m", "dvc", "repro", "-sf", "one"], True),
        (["-m", "dvc", "--wait-for-lock", "repro", "--force", "one"], True),
        (["-m", "dvc", "repro", "--no-run-cache"], True),
        (["-m", "dvc", "exp", "run", "-f"], True),
        ([str(Path(sys.executable).with_name("dvc")), "repro", "-f"], True),
        ([str(Path(sys.executable).with_name("dvc")), "repro"], False),
        (["-c", REPRODUCE, "force"], True),
        (["-c", REPRODUCE, "changed"], False),
    ],
)
def test_a_stage_command_knows_whether_its_run_was_forced(command: list[str], forced: bool, tmp_path: Path) -> None:
    (tmp_path / "stage.py").write_text(FORCED)
    (tmp_path / "dvc.yaml").write_text(
        json.dumps({"stages": {"one": {"cmd": "python stage.py", "deps": ["stage.py"], "outs": ["out.txt"]}}})
    )
    small_pipeline.commit_project(tmp_path)
    done = run([sys.executable, *command], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.txt").read_text() == str(forced)


def test_without_dvc_nothing_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert not is_forced()


def test_drivers_that_start_at_once_in_a_new_workspace_give_it_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two, a job of the driver whose id was replaced would not be found again."""
    ids = iter(("a", "b"))
    second, written = threading.Event(), threading.Event()

    def token(_: int) -> str:
        mine = next(ids)
        (second if mine == "b" else written).set()
        if mine == "a":
            second.wait(0.5)  # for the other driver, if that found no id either
        return mine

    monkeypatch.setattr("dagster_project.orchestration.executors.ray.secrets.token_hex", token)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(_project_id, tmp_path)
        assert written.wait(60)
        later = threads.submit(_project_id, tmp_path)
        assert first.result() == later.result() == _project_id(tmp_path)
    assert not second.is_set()
