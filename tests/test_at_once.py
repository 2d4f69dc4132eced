"""Several stages at once: independent variants run in processes of their own,
and kills, interrupts and syncs meanwhile lose nothing. On the small pipeline."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import dagster as dg
import psutil
import pytest
import yaml
from builders import small_pipeline
from builders.small_pipeline import (
    PIPELINE,
    gone,
    shown_failures,
    start_until_both_adapters_run,
    start_until_tok_runs,
)
from conftest import dvc, run, shown_checks
from dagster._core.events import EngineEventData

from dagster_project.orchestration.dagster.assets import build_definitions
from dagster_project.orchestration.dagster.concurrency import (
    can_run_at_once,
    default_limits,
    pool_of,
    set_default_limits,
)
from dagster_project.orchestration.dagster.sync import sync
from dagster_project.orchestration.dagster_dvc import dead_runs
from dagster_project.orchestration.dagster_dvc.dead_runs import ALIVE, in_progress, reap
from dagster_project.orchestration.dagster_dvc.keys import asset_key
from dagster_project.orchestration.dvc import read_stages, records_locked
from dagster_project.orchestration.processes import interrupt_command, start_of
from dagster_project.pipeline import PEDIGREE

BOTH = {"adapter@lora", "adapter@dora"}
AT_ONCE = ("small_pipeline.py", "materialize-at-once", *sorted(BOTH), "cmp")


def agree(root: Path, synced: dg.DagsterInstance) -> set[str]:
    """The stages that both front ends call changed, after one sync."""
    sync(root, synced, PIPELINE)
    changed = small_pipeline.changed_in_dvc(root)
    assert small_pipeline.not_fresh(root, synced) == changed
    assert sync(root, synced, PIPELINE) == []
    return changed


def offspring(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def active_slots(synced: dg.DagsterInstance) -> int:
    return sum(synced.event_log_storage.get_concurrency_info(pool).active_slot_count for pool in default_limits())


def test_two_variants_run_at_once_and_each_is_reported_once_with_its_checks(
    root: Path, synced: dg.DagsterInstance
) -> None:
    process, pids = start_until_both_adapters_run(root, *AT_ONCE, SLOW_SECONDS="4")
    assert all(map(psutil.pid_exists, pids.values())), "both commands run at this moment"
    assert in_progress(synced) == {asset_key(a) for a in [*BOTH, "cmp"]}
    assert reap(synced) == [], "the processes of its steps are not taken for that of the run"
    meanwhile = sync(root, synced, PIPELINE)
    assert not [line for line in meanwhile if line.startswith(("adapter@", "cmp "))]
    assert process.wait(120) == 0, (root / "errors.txt").read_text()
    assert agree(root, synced) == set()
    for address in [*BOTH, "cmp"]:
        records = synced.fetch_materializations(asset_key(address), limit=100).records
        versions = [(record.asset_materialization.tags or {})["dagster/data_version"] for record in records]
        assert len(versions) == len(set(versions)) == 2 and versions[0] == read_stages(root)[address].version, address
    assert {status for checks in shown_checks(root, synced).values() for status in checks.values()} == {"SUCCEEDED"}
    assert active_slots(synced) == 0


def test_terminating_a_run_ends_its_steps_and_commands_and_frees_every_lock(
    root: Path, synced: dg.DagsterInstance
) -> None:
    before = {path: path.read_bytes() for path in (root / "data/adapter").rglob("*.txt")}
    process, pids = start_until_both_adapters_run(root, *AT_ONCE)
    everything = offspring(process.pid) | set(pids.values())
    process.send_signal(signal.SIGINT)  # what Dagster sends to a run that is terminated
    assert process.wait(120) != 0
    assert gone(everything, 60), "a process of the run lives on"
    assert shown_failures(synced) == [f"{name} was interrupted; nothing was recorded.\n" for name in sorted(BOTH)]
    assert {path: path.read_bytes() for path in (root / "data/adapter").rglob("*.txt")} == before
    assert not synced.get_runs(dg.RunsFilter(statuses=ALIVE)) and active_slots(synced) == 0
    assert not json.loads((root / ".dvc/tmp/rwlock").read_text() or "{}").get("write")
    assert agree(root, synced) == BOTH
    assert dvc(root, "repro").returncode == 0, "no lock is left"
    assert agree(root, synced) == set()


@pytest.mark.long
@pytest.mark.parametrize("mark", ["report_run_canceled", "report_run_canceling"])
def test_a_run_that_is_marked_as_canceled_ends_its_steps_and_commands(
    root: Path, synced: dg.DagsterInstance, mark: str
) -> None:
    process, pids = start_until_both_adapters_run(root, *AT_ONCE, SLOW_SECONDS="300")
    everything = offspring(process.pid) | set(pids.values())
    [run] = synced.get_runs(dg.RunsFilter(statuses=ALIVE))
    getattr(synced, mark)(run)
    assert process.wait(120) != 0
    assert gone(everything, 60), "a process of the run lives on"
    ended = synced.get_run_by_id(run.run_id)
    assert ended and ended.status == dg.DagsterRunStatus.CANCELED
    assert active_slots(synced) == 0
    assert agree(root, synced) == BOTH


@pytest.mark.parametrize("asset", ["tok", "cmp"])
def test_a_run_that_waits_for_another_process_ends_when_it_is_marked_as_canceled(
    root: Path, synced: dg.DagsterInstance, asset: str
) -> None:
    """`tok` waits to run the stage that `dvc repro` runs, `cmp` for its input."""
    other = start_until_tok_runs(root, "-m", "dvc", "repro", SLOW_SECONDS="300")
    command = [sys.executable, "small_pipeline.py", "materialize", asset]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (found := synced.get_runs(dg.RunsFilter(statuses=ALIVE))) or not any(
            "is waiting: " in entry.message for entry in synced.all_logs(found[0].run_id)
        ):
            assert process.poll() is None
            time.sleep(0.2)
        synced.report_run_canceled(found[0])
        assert process.wait(60) != 0 and other.poll() is None
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        process.kill()
        other.communicate()


@pytest.mark.long
def test_a_run_of_several_processes_says_that_it_waits_for_dvcs_lock_and_can_be_terminated(
    root: Path, synced: dg.DagsterInstance
) -> None:
    (root / "code/adapter.py").write_text("V = 9\n")
    text, until = f"is waiting: process {os.getpid()} holds DVC's lock of the project", time.monotonic() + 300
    with records_locked(root):
        process = subprocess.Popen([sys.executable, *AT_ONCE], cwd=root, stdout=subprocess.DEVNULL)
        try:
            while not any(text in entry.message for run in synced.get_runs() for entry in synced.all_logs(run.run_id)):
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            assert process.wait(300) != 0
        finally:
            process.kill()
    assert not synced.get_runs(dg.RunsFilter(statuses=ALIVE))


def test_the_exit_code_of_an_interrupted_command_is_left_for_dvc() -> None:
    """Whoever waits for the process first gets its exit code; Popen takes a
    missing one for 0, and DVC would record the run."""
    command = subprocess.Popen(["sleep", "60"], env={**os.environ, "DVC_STAGE": "tok"})
    interrupt_command("tok")
    assert command.wait() != 0


@pytest.mark.long
def test_a_killed_run_takes_its_steps_along_and_the_next_run_is_not_kept_waiting_by_its_slots(
    root: Path, synced: dg.DagsterInstance
) -> None:
    process, pids = start_until_both_adapters_run(root, *AT_ONCE)
    everything = offspring(process.pid) | set(pids.values())
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    assert gone(everything, 20), "an orphan would record results of a dead run"
    assert active_slots(synced) == 2
    assert small_pipeline.run_in(root, *AT_ONCE) == 0
    assert active_slots(synced) == 0 and not synced.get_runs(dg.RunsFilter(statuses=ALIVE))
    assert agree(root, synced) == set()


@pytest.mark.parametrize(
    "addresses",
    [
        pytest.param(AT_ONCE[2:], id="two processes"),
        pytest.param(["adapter@lora"], id="one process", marks=pytest.mark.long),
    ],
)
def test_a_waiting_run_leaves_the_cpu_to_others_and_ends_when_the_run_that_it_waits_for_is_killed(
    addresses: Sequence[str], root: Path, synced: dg.DagsterInstance
) -> None:
    (root / "code/adapter.py").write_text("V = 5\n")
    set_default_limits(synced)
    storage = synced.event_log_storage
    storage.set_concurrency_slots("cpu", 1)
    machine = {dead_runs.MACHINE_TAG: platform.node()}
    other = dg.DagsterRun("pipeline", str(uuid4()), status=dg.DagsterRunStatus.STARTED, tags=machine)
    with subprocess.Popen(["sleep", "600"]) as alive:
        synced.add_run(other)
        synced.report_engine_event("started", other, EngineEventData({"pid": dg.MetadataValue.int(alive.pid)}))
        assert storage.claim_concurrency_slot("cpu", other.run_id, "step").is_claimed
        command = [sys.executable, *AT_ONCE[:2], *addresses]
        with subprocess.Popen(command, cwd=root, stderr=(root / "errors.txt").open("w")) as process:
            try:
                while "blocked by limit" not in (root / "errors.txt").read_text():
                    assert process.poll() is None
                    time.sleep(0.1)
                before = psutil.Process(process.pid).cpu_times().user
                time.sleep(3)
                assert psutil.Process(process.pid).cpu_times().user - before < 1
                alive.kill()
                alive.wait()
                assert process.wait(90) == 0, (root / "errors.txt").read_text()
            finally:
                process.kill()
                alive.kill()
    assert active_slots(synced) == 0
    assert agree(root, synced).isdisjoint(addresses)


@pytest.mark.long
def test_a_killed_step_fails_its_run_and_the_other_variant_is_recorded(root: Path, synced: dg.DagsterInstance) -> None:
    process, pids = start_until_both_adapters_run(root, *AT_ONCE, SLOW_SECONDS="6")
    command = psutil.Process(pids["adapter@lora"])
    step = next(parent for parent in command.parents() if "multiprocessing" in " ".join(parent.cmdline()))
    step.kill()
    assert process.wait(120) != 0
    assert gone({*pids.values()}, 10)
    assert agree(root, synced) == {"adapter@lora", "cmp"}, "cmp reads both"
    assert active_slots(synced) == 0


@pytest.mark.long
def test_a_run_without_two_stages_that_could_run_at_once_uses_one_process(
    root: Path, synced: dg.DagsterInstance
) -> None:
    (root / "code/cmp.py").write_text("V = 3\n")
    assert small_pipeline.run_in(root, *AT_ONCE) == 0
    [run] = [found for found in synced.get_runs() if found.job_name == "pipeline"]
    assert not [entry for entry in synced.all_logs(run.run_id) if "subprocess" in entry.message]
    assert agree(root, synced) == set()


def test_a_negative_number_of_steps_at_once_is_refused(root: Path, synced: dg.DagsterInstance) -> None:
    config = {"run_config": {"execution": {"config": {"multiprocess": {"max_concurrent": -1}}}}}
    (root / "code/adapter.py").write_text("V = 9\n")
    environment = {**os.environ, "RUN": json.dumps(config)}
    done = subprocess.run([sys.executable, *AT_ONCE], cwd=root, env=environment, capture_output=True, timeout=90)
    assert done.returncode == 1
    assert b"has max_concurrent: -1\nhint: give 1 or more, or leave it out" in done.stderr + done.stdout


def test_only_changed_stages_and_their_readers_count_as_work(root: Path) -> None:
    states = read_stages(root)
    assert not can_run_at_once(states, set(states), forced=False), "everything is up to date"
    assert can_run_at_once(states, set(states), forced=True)
    assert not can_run_at_once(states, {"raw", "inst", "tok", "cmp"}, forced=True), "a chain"
    (root / "code/tok.py").write_text("V = 1\n")
    states = read_stages(root)
    assert can_run_at_once(states, {"tok", *BOTH}, forced=False)
    assert not can_run_at_once(states, {"tok", "adapter@lora", "cmp"}, forced=False)
    assert not can_run_at_once(states, BOTH, forced=False), (
        "neither is changed yet, and what would change them is not planned"
    )


def test_trainings_run_one_at_a_time_unless_the_user_raises_the_limit(root: Path, synced: dg.DagsterInstance) -> None:
    trains = replace(PIPELINE, floating_point=frozenset({"adapter"}))
    graph = build_definitions(root, trains).resolve_asset_graph()
    pools = {"@".join(key.path): graph.get(key).pools for key in graph.materializable_asset_keys}
    assert pools == {address: {"gpu" if address in BOTH else "cpu"} for address in read_stages(root)}
    assert {stage for stage in PEDIGREE.stages if pool_of(stage, PEDIGREE, {}) == "gpu"} == {
        "adapter",
        "merged",
        "reward_model",
        "aligned",
        "merged_aligned",
        "baselines",
        "evaluation",
        "evaluation_aligned",
    }
    on_ray = {"adapter": {"lora": {}, "dora": {}}, "execution": {"stages": {"adapter@lora": {"on": "ray"}}}}
    assert [pool_of(f"adapter@{name}", PEDIGREE, on_ray) for name in ("lora", "dora")] == ["ray", "gpu"]
    assert set_default_limits(synced) == {"gpu": 1, "cpu": os.cpu_count(), "ray": 8}
    synced.event_log_storage.set_concurrency_slots("gpu", 8)
    assert set_default_limits(synced)["gpu"] == 8


@pytest.mark.long
@pytest.mark.parametrize(
    ("addresses", "run"),
    [
        (BOTH, {"tags": {"pedigree/on": "local"}}),
        ({"adapter@lora"}, {"run_config": {"ops": {"adapter__lora": {"config": {"on": "local"}}}}}),
    ],
    ids=["two processes, by a tag", "one process, by its configuration"],
)
def test_a_stage_is_in_the_pool_of_the_place_where_its_run_puts_it(
    addresses: set[str], run: dict[str, Any], root: Path, synced: dg.DagsterInstance
) -> None:
    """In params.yaml it is on Ray. Its run puts it on this machine, so it does
    not wait for the pool of Ray, which is full."""
    values = json.loads((root / "params.yaml").read_text())
    (root / "params.yaml").write_text(json.dumps({**values, "execution": {"stages": {"adapter": {"on": "ray"}}}}))
    (root / "code/adapter.py").write_text("V = 5\n")
    set_default_limits(synced)
    synced.event_log_storage.set_concurrency_slots("ray", 0)
    command = [sys.executable, "small_pipeline.py", "materialize-at-once", *sorted(addresses)]
    with subprocess.Popen(command, cwd=root, env={**os.environ, "RUN": json.dumps(run)}) as process:
        try:
            assert process.wait(90) == 0
        finally:
            process.kill()
    assert agree(root, synced).isdisjoint(addresses)


@pytest.mark.long
def test_a_stage_of_the_users_own_is_in_the_pool_that_dvc_yaml_names(root: Path, synced: dg.DagsterInstance) -> None:
    """With one slot, two such stages of a run do not run at once."""
    (root / "own.py").write_text(
        "import sys, time\nbegan = time.time()\ntime.sleep(3)\n"
        "open(f'data/own_{sys.argv[1]}.txt', 'w').write(f'{began} {time.time()}')\n"
    )
    own = {
        f"own_{x}": {"cmd": f"python own.py {x}", "outs": [f"data/own_{x}.txt"], "meta": {"pool": "license"}}
        for x in "ab"
    }
    pipeline = yaml.safe_load((root / "dvc.yaml").read_text())
    (root / "dvc.yaml").write_text(yaml.safe_dump({**pipeline, "stages": {**pipeline["stages"], **own}}))
    set_default_limits(synced)
    synced.event_log_storage.set_concurrency_slots("license", 1)
    done = run([sys.executable, "small_pipeline.py", "materialize-at-once", "own_a", "own_b"], root)
    assert done.returncode == 0, done.stderr
    spans = sorted([float(at) for at in (root / f"data/own_{x}.txt").read_text().split()] for x in "ab")
    assert spans[0][1] <= spans[1][0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells when a process started, whatever the clock says")
def test_a_run_goes_on_although_the_clock_was_set_forward(instance: dg.DagsterInstance) -> None:
    """As it is when a virtual machine goes on that was paused. Then the process of a run seems to have started after
    its first entry in the log."""
    ids = [str(uuid4()) for _ in range(2)]
    with subprocess.Popen(["sleep", "600"]) as alive, subprocess.Popen(["sleep", "600"]) as later:
        for run_id in ids:
            instance.add_run(dg.DagsterRun("pipeline", run_id, status=dg.DagsterRunStatus.STARTED))
            data = EngineEventData({"pid": dg.MetadataValue.int(alive.pid)})
            event = dg.DagsterEvent(dg.DagsterEventType.ENGINE_EVENT.value, "pipeline", event_specific_data=data)
            instance.report_dagster_event(event, run_id, timestamp=time.time() - 3600)
        dead_runs.tag_run(instance, ids[0])
        instance.add_run_tags(ids[1], {dead_runs.PROCESS_TAG: start_of(later.pid)})
        [line] = reap(instance)
        assert ids[1][:8] in line, "another process has the number of its own"
        alive.kill()
        later.kill()
    [line] = reap(instance)
    assert ids[0][:8] in line


def test_the_slots_of_runs_that_cannot_free_them_are_freed(
    synced: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_default_limits(synced)
    canceled = dg.DagsterRun(job_name="pipeline", run_id=str(uuid4()), status=dg.DagsterRunStatus.CANCELED)
    elsewhere = dg.DagsterRun(
        job_name="pipeline",
        run_id=str(uuid4()),
        status=dg.DagsterRunStatus.STARTED,
        tags={dead_runs.MACHINE_TAG: "a replaced pod"},
    )
    storage = synced.event_log_storage
    storage.set_concurrency_slots("cpu", 3)
    for one in (canceled, elsewhere):
        synced.add_run(one)
        assert storage.claim_concurrency_slot("cpu", one.run_id, "step").is_claimed
    assert storage.claim_concurrency_slot("cpu", str(uuid4()), "step").is_claimed  # of a run that was deleted
    assert reap(synced) == []
    assert active_slots(synced) == 1 and storage.get_concurrency_run_ids() == {elsewhere.run_id}
    monkeypatch.setattr(dead_runs, "QUIET", -1.0)  # it has had no event for long
    assert reap(synced) == []
    assert active_slots(synced) == 0
