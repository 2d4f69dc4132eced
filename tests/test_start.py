"""Commands and stages import what they need and nothing else; and what a stage computes with is set before torch is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import LOADED, ROOT, run

from dagster_project.commands import own_process
from dagster_project.orchestration import dvc
from dagster_project.pipeline import STAGES

COMPUTES = {"torch", "transformers", "datasets"}
SCORES = {*COMPUTES, "peft", "scipy"}
TRAINS = {*SCORES, "trl"}
CHECKS = {"polars", "pandera"}
NEEDED: dict[str, set[str]] = {
    "base_model": COMPUTES,
    "raw_examples": set(),
    "instructions": {*CHECKS, "great_expectations", "scipy"},
    "splits": CHECKS,
    "tokenized": {"transformers"},
    "adapter": TRAINS,
    "merged": SCORES,
    "raw_preferences": set(),
    "preferences": CHECKS,
    "reward_model": TRAINS,
    "aligned": TRAINS,
    "merged_aligned": SCORES,
    "baselines": {*SCORES, "sklearn"},
    "evaluation": SCORES,
    "evaluation_aligned": SCORES,
    "comparison": set(),
    "release": SCORES,
}
"""Libraries that take long to import and that a stage of the quick project uses."""
LARGE = {
    *TRAINS, *CHECKS, "great_expectations", "sklearn", "bitsandbytes", "boto3", "sqlalchemy", "psycopg2", "grpc", "dagster", "matplotlib",
    "ray", "rfc3987_syntax", "altair",
}  # fmt: skip


def test_no_stage_loads_a_large_library_that_it_does_not_need(_finished: Path) -> None:
    loaded: dict[str, set[str]] = {}
    for line in (_finished / LOADED).read_text().splitlines():
        process = json.loads(line)
        if process["arguments"][:3] == ["-m", "dagster_project", "run"]:
            loaded[process["arguments"][3].partition("@")[0]] = {name.partition(".")[0] for name in process["modules"]}
    assert loaded.keys() == STAGES.keys() == NEEDED.keys()
    assert {stage: sorted(names & LARGE - NEEDED[stage]) for stage, names in loaded.items()} == {stage: [] for stage in STAGES}


def test_modules_of_stages_load_no_large_library() -> None:
    code = f"""import json, sys
from dagster_project.pipeline import sections
sections()
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}} & {LARGE!r})))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_question_about_records_loads_no_definitions_of_parameters() -> None:
    code = """import sys
from dagster_project.lineage.impact.question import impact
print(sorted({"pydantic", "jsonschema", "polars"} & sys.modules.keys()))"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_model_is_given_adapters_without_bitsandbytes_which_remains_available(tiny_model: Path) -> None:
    code = f"""import sys
from pathlib import Path
from dagster_project.core.params import Compute
from dagster_project.training.methods.build import build
from dagster_project.training.methods.hardware import prepare
device, dtype = prepare(Compute(threads=1, dtype="float32"))
build("lora", {{"r": 2, "target_modules": "all-linear"}}, Path({str(tiny_model)!r}), device, dtype, "adapter.lora")
assert "torch" in sys.modules and "bitsandbytes" not in sys.modules
built = build("lora", {{"r": 2, "target_modules": "all-linear"}}, Path({str(tiny_model)!r}), device, dtype, "adapter.lora", quantization="nf4")
print(sorted({{type(module).__name__ for module in built.model.modules()}} & {{"Linear4bit", "Params4bit"}}))"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["['Linear4bit']"], done.stderr


FRONT_ENDS = {
    "run": ["-m", "dagster_project", "run", "base_model"],
    "repro": ["-m", "dvc", "repro", "base_model"],
    "dagster": ["-m", "dagster", "asset", "materialize", "--select", "base_model", "-m", "dagster_project.definitions"],
}


HOG = """import os
if hasattr(os, "SCHED_IDLE"):
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # the kernel counts it, and gives it only what nothing else needs
while True:
    pass
"""


@pytest.fixture
def busy() -> Iterator[None]:
    """A process that never waits."""
    hog = subprocess.Popen([sys.executable, "-c", HOG])
    yield
    hog.kill()
    hog.wait()


@pytest.mark.long
@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_beside_other_work_waiting_threads_sleep_whichever_front_end_starts_a_stage(
    project: Path, monkeypatch: pytest.MonkeyPatch, front_end: str
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")  # the OpenMP library prints what it found when torch loaded it
    (project / ".dagster").mkdir()
    done = run([sys.executable, *FRONT_ENDS[front_end]], project)
    assert done.returncode == 0, done.stderr
    assert "GOMP_SPINCOUNT = '0'" in done.stdout + done.stderr, "it calls the policy passive also where none was chosen"


def kernel(path: Path, running: int) -> Path:
    """A copy of what the kernel writes, with `running` threads."""
    path.write_text(f"cpu  1 2 3 4\nctxt 5\nprocesses 6\nprocs_running {running}\nprocs_blocked 0\n")
    return path


@pytest.mark.parametrize(
    "running, looks, expected",
    [
        (1, 3, {"GOMP_SPINCOUNT": "3000"}),
        (2, 3, {"OMP_WAIT_POLICY": "passive"}),
        (1, 0, {"OMP_WAIT_POLICY": "passive"}),
        (0, 3, {"OMP_WAIT_POLICY": "passive"}),
    ],
    ids=["quiet", "beside another process", "a command that computes nothing", "a sandbox that does not count"],
)
def test_threads_spin_briefly_only_if_nothing_else_runs(tmp_path: Path, running: int, looks: int, expected: dict[str, str]) -> None:
    environment: dict[str, str] = {}
    own_process.set_waiting(environment, looks, kernel(tmp_path / "stat", running))
    assert environment == {**expected, "PEDIGREE_WAITING": next(iter(expected))}


@pytest.mark.parametrize("command", ["run", "chat", "serve", "why", "bisect", "plan", "audit"])
def test_threads_of_commands_that_compute_spin_briefly_on_a_quiet_machine(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(own_process.os, "environ", environment)
    monkeypatch.setattr(own_process, "is_quiet", lambda looks, stat: True)
    own_process.prepare([command])
    assert ("GOMP_SPINCOUNT" in environment) == (command != "audit")


def test_threads_sleep_where_the_kernel_does_not_say_what_runs(tmp_path: Path) -> None:
    for stat in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").write_text("")
        environment: dict[str, str] = {}
        own_process.set_waiting(environment, 3, stat)
        assert environment["OMP_WAIT_POLICY"] == "passive"


def test_each_process_decides_for_itself_how_its_threads_wait(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    own_process.set_waiting(environment, 3, kernel(tmp_path / "stat", 2))
    own_process.set_waiting(environment, 3, kernel(tmp_path / "stat", 1))
    assert environment == {"GOMP_SPINCOUNT": "3000", "PEDIGREE_WAITING": "GOMP_SPINCOUNT"}


@pytest.mark.parametrize("setting", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_a_wait_policy_of_the_user_is_kept(tmp_path: Path, setting: dict[str, str]) -> None:
    environment = dict(setting)
    own_process.set_waiting(environment, 3, kernel(tmp_path / "stat", 1))
    assert environment == setting


def test_the_guard_of_a_stage_parses_the_pipeline_as_often_as_one_stage_needs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.utils import strictyaml

    states, parsed, producers = dvc.read_stages(root), list[str](), list[dvc.StageState]()
    load = strictyaml.load
    monkeypatch.setattr(strictyaml, "load", lambda path, *args, **kwargs: [parsed.append(Path(path).name), load(path, *args, **kwargs)][1])
    found = dvc.verified_fingerprint(root, "tok", producers.extend)
    assert parsed.count("dvc.yaml") == 2  # the index of all stages, and the files with variables
    assert producers == [states[i.producer] for i in states["tok"].inputs if i.producer] and producers
    assert found == dvc.fingerprint(root, "tok")


def test_the_guard_of_a_stage_needs_no_record_of_other_stages(root: Path) -> None:
    """As in a clone without dvc.lock, where DVC restores stages from the run cache and runs the others."""
    lock = root / "dvc.lock"
    stages = yaml.safe_load(lock.read_text())["stages"]
    for kept in ({}, {"raw": stages["raw"]}):
        lock.write_text(yaml.safe_dump({"schema": "2.0", "stages": kept}))
        assert not dvc.verified_fingerprint(root, "tok", lambda _: None).leftovers
    lock.unlink()
    assert not dvc.verified_fingerprint(root, "tok", lambda _: None).leftovers
