"""The time left of stages that run, are queued, or wait for a cluster, by the durations of past runs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from builders import foreign_project
from builders.small_pipeline import PIPELINE
from conftest import dvc, tool

from dagster_project.core.layout import measured_path, report_of
from dagster_project.core.records import remove, write_json
from dagster_project.orchestration import durations
from dagster_project.orchestration.dagster.concurrency import set_default_limits
from dagster_project.orchestration.dagster.project import PedigreeProject
from dagster_project.orchestration.dagster_dvc.definitions import build_dvc_definitions
from dagster_project.orchestration.dagster_dvc.progress import progress
from dagster_project.orchestration.durations import SECONDS, elapsed, known, last, record, remaining, time_left
from dagster_project.orchestration.dvc import read_stages
from dagster_project.orchestration.executors.ray_queue import PROJECT, RESOURCES, STAGE, has_too_few_nodes, jobs_ahead
from dagster_project.orchestration.executors.ray_queue import SECONDS as DURATION
from dagster_project.orchestration.run_all import on_cluster

TRAININGS = {"adapter@lora": 600.0, "adapter@dora": 300.0, "cmp": 60.0}


def room_for(jobs: int) -> Any:
    def has_room(at_work: Collection[str], _: str) -> bool:
        return len(at_work) < jobs

    return has_room


def took(root: Path, seconds: dict[str, float], place: str = "local") -> None:
    for address, value in seconds.items():
        write_json(root / SECONDS / place / f"{address}.json", {"seconds": value})


# --- the estimate


def test_the_time_left_follows_the_longest_chain_and_the_number_of_jobs() -> None:
    above: dict[str, set[str]] = {"a": set(), "b": set(), "c": {"a", "b"}, "d": {"c"}}
    seconds = {"a": 10.0, "b": 4.0, "c": 1.0, "d": 2.0}
    assert remaining(above, {}, ["a", "b", "c", "d"], seconds, room_for(1)) == 17
    assert remaining(above, {}, ["a", "b", "c", "d"], seconds, room_for(2)) == 13
    assert remaining(above, {"a": 7.0, "b": 1.0}, ["c", "d"], seconds, room_for(2)) == 6
    assert remaining(above, {"a": 99.0}, ["c", "d"], seconds, room_for(2)) == 3, (
        "longer than the last time: it may end at any moment"
    )
    assert remaining(above, {"a": 2.0}, [], {}, room_for(1)) == 0
    assert math.isinf(remaining(above, {}, ["a"], seconds, room_for(0)))


def test_the_text_says_what_is_unknown_and_what_is_left_out() -> None:
    above: dict[str, set[str]] = {"a": set(), "b": {"a"}}

    def text(running: Any, seconds: Any, cluster: Collection[str] = (), jobs: int = 1) -> str:
        return time_left(above, running, ["b"], seconds, cluster, room_for(jobs))

    both = {"a": 100.0, "b": 20.0}
    assert text({"a": 40.0}, both) == "1 running, 1 queued, about 1:20 left if all run, by the last runs"
    assert text({"a": 40.0}, {"b": 20.0}) == "1 running, 1 queued, at least 0:20 left if all run, by the last runs"
    assert text({"a": 40.0}, {}) == "1 running, 1 queued, time left unknown: no run of them was measured here"
    assert text({"a": 40.0}, both, jobs=0) == "1 running, 1 queued, time left unknown: some cannot start"
    assert text({"a": 40.0}, both, {"b"}).endswith(
        "1:20 left if all run, by the last runs; waits on the cluster are not included"
    )
    assert text({"a": 40.0}, both, {"a"}) == text({"a": 40.0}, both, {"b"})
    assert text({"a": None}, both, {"a"}) == (
        "0 running, 1 waiting on the cluster, 1 queued, about 2:00 left if all run, by the last runs;"
        " waits on the cluster are not included"
    )


# --- durations


def test_a_run_by_dvc_repro_is_measured_and_one_that_dvc_restores_is_not(root: Path) -> None:
    remove(root / SECONDS)
    (root / "data/sources/g.txt").write_text("r5")
    assert dvc(root, "repro", "raw").returncode == 0
    assert (last(root, "raw", "local") or 0) > 0 and last(root, "inst", "local") is None
    took(root, {"raw": 1234.0})
    (root / "data/sources/g.txt").write_text("r0")
    assert dvc(root, "repro", "raw").returncode == 0
    assert last(root, "raw", "local") == 1234


def test_a_duration_on_a_cluster_has_no_wait_and_is_not_that_of_this_machine(root: Path) -> None:
    took(root, {"tok": 9.0})
    report = json.loads((root / report_of("tok")).read_text())
    execution = {
        "on": "ray",
        "queue_seconds": 500.0,
        "lost_seconds": 70.0,
        "compute_seconds": 40.0,
        "transfer_seconds": 2.0,
    }
    write_json(measured_path(root, "tok"), {"output_sha256": report["output_sha256"], "execution": execution})
    assert (last(root, "tok", "ray"), last(root, "tok", "local")) == (42, 9), "of a run before durations were recorded"
    record(root, "tok", 650.0)
    remove(measured_path(root, "tok"))
    assert (last(root, "tok", "ray"), last(root, "tok", "local"), last(root, "tok")) == (42, 9, 42)
    assert known(root, ["tok", "cmp"], {"cmp"}) == {"tok": 9}
    record(root, "tok", 8.0)
    assert (last(root, "tok", "ray"), last(root, "tok", "local"), last(root, "tok")) == (42, 8, 8)


def test_a_stage_that_waits_on_a_cluster_has_not_run_yet(root: Path) -> None:
    now = time.time()
    assert elapsed(root, "tok", now - 30, now) == 30
    durations.write_job(root, "tok", "job", None)
    assert elapsed(root, "tok", now - 30, now) is None
    durations.write_job(root, "tok", "job", now - 5)
    assert elapsed(root, "tok", now - 30, now) == 5
    durations.write_job(root, "tok", "job", now - 5000)
    assert elapsed(root, "tok", now - 30, now) == 5000, "a job that an earlier driver submitted"
    assert elapsed(root, "tok", now + 5000, now + 5010) == 10, "the job of a driver that was killed"


def test_stages_on_a_cluster_are_those_of_the_section_and_of_the_variable(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = json.loads((root / "params.yaml").read_text())
    (root / "params.yaml").write_text(json.dumps({**values, "execution": {"stages": {"tok": {"on": "ray"}}}}))
    assert on_cluster(root, ["tok", "cmp", "own"], PIPELINE) == {"tok"}
    monkeypatch.setenv("PEDIGREE_EXECUTION", "ray")
    assert on_cluster(root, ["tok", "cmp", "own"], PIPELINE) == {"tok", "cmp"}, "a stage of the user's own runs here"


# --- in Dagster


def started(synced: dg.DagsterInstance) -> dict[str, str]:
    """What the log of the runs has of each stage that started."""
    texts = [entry.user_message for run in synced.get_runs() for entry in synced.all_logs(run.run_id)]
    found = [re.fullmatch(r"(\S+): started \(.*\)\. (\d of \d stages done, .*)", text) for text in texts]
    return {match[1]: match[2] for match in found if match}


@pytest.mark.parametrize(
    ("command", "slots", "first"),
    [
        pytest.param("materialize-at-once", 1, 960, id="one at a time"),
        pytest.param("materialize-at-once", 2, 660, id="two at once", marks=pytest.mark.long),
        pytest.param("materialize", 2, 960, id="in one process", marks=pytest.mark.long),
    ],
)
def test_a_stage_that_starts_in_dagster_logs_what_is_queued_and_the_time_left_by_the_pools(
    command: str, slots: int, first: int, root: Path, synced: dg.DagsterInstance
) -> None:
    """Both variants and what reads them; the stages before are up to date and count as nothing."""
    took(root, {**TRAININGS, "raw": 5000.0, "tok": 5000.0})
    (root / "code/adapter.py").write_text("V = 9\n")
    set_default_limits(synced)
    synced.event_log_storage.set_concurrency_slots("cpu", slots)
    done = subprocess.run([sys.executable, "small_pipeline.py", command], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = started(synced)
    assert {*lines} == {*TRAININGS}
    assert lines["cmp"] == "5 of 6 stages done, 1 running, 0 queued, about 1:00 left, by the last runs"
    pattern = r"3 of 6 stages done, (\d) running, (\d) queued, about (\d+):(\d\d) left if all run, by the last runs"
    beginnings = [[int(n) for n in match.groups()] for line in lines.values() if (match := re.fullmatch(pattern, line))]
    assert len(beginnings) == 1 or (len(beginnings) == slots == 2 and command == "materialize-at-once"), lines
    for running, queued, minutes, seconds in beginnings:  # two that start at the same time see each other
        assert running + queued == 3 and first - 60 <= 60 * minutes + seconds <= first, lines
    assert all((last(root, address) or 999) < 50 for address in TRAININGS), "measured again"
    project, [ended, *_] = PedigreeProject(root, pipeline=PIPELINE), synced.get_runs(limit=1)
    repeated = progress(synced, ended, project, read_stages(root), "cmp")  # a step that Dagster repeats
    assert repeated.startswith("5 of 6 stages done, 1 running, 0 queued, about ")


@pytest.mark.long
def test_a_stage_of_any_dvc_project_is_measured_in_dagster(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    root = foreign_project.make_project(tmp_path / "project")
    defs = build_dvc_definitions(root)
    job = defs.resolve_job_def("pipeline")
    assert job.execute_in_process(instance=instance).success
    lines = started(instance)
    unknown = "time left unknown: no run of them was measured here"
    assert lines["prepare"].startswith("0 of ") and lines["prepare"].endswith(unknown)
    assert (last(root, "prepare") or 0) > 0


# --- on a cluster


def job(name: str, status: str, since: float, resources: str = "1 CPU", **metadata: str) -> Any:
    """Ray's details of a job, of the workspace `here` unless given."""
    statuses = tool("ray.job_submission").JobStatus
    known = {STAGE: name, PROJECT: "here", RESOURCES: resources, **metadata} if name else metadata
    return SimpleNamespace(
        submission_id=f"id-{name}", status=statuses(status), start_time=int(since * 1000), metadata=known
    )


def test_a_job_that_waits_names_what_is_ahead_of_it_and_when_that_could_end(tmp_path: Path) -> None:
    now = time.time()
    own = job("own", "PENDING", now - 60)
    first = job("adapter@a", "RUNNING", now - 900, **{DURATION: "600"})
    durations.write_job(tmp_path, "adapter@a", "id-adapter@a", now - 100)
    earlier = job("adapter@b", "PENDING", now - 90, **{DURATION: "30"})
    later, ended = job("later", "PENDING", now - 30, **{DURATION: "5"}), job("ended", "SUCCEEDED", now - 900)

    def text(*jobs: Any) -> str:
        return jobs_ahead([own, later, ended, *jobs], "id-own", tmp_path, now)

    assert text() == "no other job is ahead of it"
    if_so = ", if they hold what it needs and take as long as the last time"
    one = "ahead of it: adapter@a (1 CPU; about 8:20 left)"
    assert text(first) == f"{one}; estimate: it could begin in about 8:20{if_so}"
    more = text(first, earlier)
    assert more.startswith(f"{one}, adapter@b (1 CPU, waits; took 0:30 the last time); estimate: ")
    assert "begin in about 8:20, when the first of them ends, or in about 8:50, when all have ended, if" in more
    unknown = job("adapter@b", "PENDING", now - 90)
    assert text(first, unknown).endswith(f"it could begin in about 8:20, when the first of them ends{if_so}")
    longer = job("adapter@a", "RUNNING", now - 900, **{DURATION: "50"})
    assert "(1 CPU; runs longer than the last time); estimate: it could begin at any moment," in text(longer)


def node(resources: dict[str, float], **labels: str) -> Any:
    return SimpleNamespace(resources_total=resources, labels=labels)


def test_a_job_has_too_few_nodes_only_if_the_resources_of_all_nodes_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("ray.util.state")
    nodes: list[Any] = []

    def list_nodes(url: str, *, limit: int = 100, **_: Any) -> list[Any]:  # Ray's default limit
        return nodes[:limit]

    monkeypatch.setattr(api, "list_nodes", list_nodes)
    needed = {"GPU": 1.0, "memory": 2e9}
    assert not has_too_few_nodes("http://head", needed), "no node is known"
    nodes += [node({"CPU": 8.0, "GPU": 1.0, "memory": 1e9})] * 120
    assert has_too_few_nodes("http://head", needed)
    nodes.append(node({}))
    assert not has_too_few_nodes("http://head", needed), "one is joining"
    nodes[-1] = node({"GPU": 1.0, "memory": 2e9})
    assert not has_too_few_nodes("http://head", needed), "the last of 121 nodes has them"


def test_a_job_of_several_nodes_needs_as_many_with_its_resources_and_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node({"CPU": 4.0}, image="gpu"), node({"CPU": 9.0}, image="cpu"), node({"CPU": 1.0}, image="gpu")]
    monkeypatch.setattr(pytest.importorskip("ray.util.state"), "list_nodes", lambda *_, **__: nodes)

    def has_enough(cpus: float, count: int, image: str | None = None) -> bool:
        return not has_too_few_nodes("http://head", {"CPU": cpus}, count, image)

    assert has_enough(4, 2) and not has_enough(4, 3) and has_enough(1, 3) and not has_enough(1, 4)
    assert has_enough(4, 1, "gpu") and not has_enough(4, 2, "gpu") and not has_enough(1, 1, "arm")


def test_what_is_unknown_of_the_jobs_ahead_is_not_estimated(tmp_path: Path) -> None:
    now = time.time()
    own = job("own", "PENDING", now - 60)

    def text(*jobs: Any) -> str:
        return jobs_ahead([own, *jobs], "id-own", tmp_path, now)

    unknown = job("adapter@a", "RUNNING", now - 900)
    assert text(unknown) == "ahead of it: adapter@a (1 CPU; how long it takes is unknown)"
    here = job("adapter@b", "RUNNING", now - 900, **{DURATION: "600"})
    assert "estimate" not in text(unknown, here), "either may end first"
    assert text(here, job("", "RUNNING", now)) == (
        "ahead of it: adapter@b (1 CPU; at most about 10:00 left), 1 job of other programs"
    )
    there = job("adapter@c", "RUNNING", now - 900, **{PROJECT: "there", DURATION: "600"})
    assert text(there).startswith("ahead of it: adapter@c of another workspace (1 CPU; at most about 10:00 left);")
    assert "it could begin in at most about 10:00, if" in text(there), "its job may have waited, too"
    for value in ("nan", "inf", "soon", ""):
        assert "estimate" not in text(job("adapter@c", "RUNNING", now, **{DURATION: value}))
    shown = text(job("\x1b[2J../../x\n" + "y" * 999, "RUNNING", now, "\u202e", **{DURATION: "9" * 9}))
    assert shown.isprintable() and len(shown) < 500
