"""Sync during runs of the same assets: each materialization is in the event log
once, with its checks. On the small pipeline."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from builders import small_pipeline
from conftest import dvc, edit_params, shown_checks

from dagster_project.orchestration.dagster.assets import build_definitions
from dagster_project.orchestration.dagster.project import PedigreeProject
from dagster_project.orchestration.dagster.sync import sync, sync_after
from dagster_project.orchestration.dagster_dvc import dead_runs
from dagster_project.orchestration.dagster_dvc.dead_runs import ALIVE, MACHINE_TAG, in_progress
from dagster_project.orchestration.dagster_dvc.keys import asset_key
from dagster_project.orchestration.dagster_dvc.sync import mirror, read
from dagster_project.orchestration.dvc import read_stages, records_locked
from dagster_project.orchestration.last_sync import LastSync
from dagster_project.orchestration.rwlock import writer_of

pytestmark = pytest.mark.usefixtures("warm_small")

TOK = asset_key("tok")


def project_of(root: Path) -> PedigreeProject:
    return PedigreeProject(root, pipeline=small_pipeline.PIPELINE)


def versions(synced: dg.DagsterInstance, address: str) -> Counter[str]:
    """How often each data version of an asset was reported as materialized."""
    records = synced.fetch_materializations(asset_key(address), limit=100).records
    return Counter((record.asset_materialization.tags or {})["dagster/data_version"] for record in records)


def each_version_once_and_every_check_shown(root: Path, synced: dg.DagsterInstance) -> None:
    for address, state in read_stages(root).items():
        assert versions(synced, address)[state.version] == 1, address
        assert set(versions(synced, address).values()) == {1}, address
    shown = shown_checks(root, synced)
    assert shown.keys() == read_stages(root).keys()
    assert {status for checks in shown.values() for status in checks.values()} == {"SUCCEEDED"}, shown


@pytest.mark.long
@pytest.mark.parametrize("front_end", ["dagster", "dvc"])
def test_while_a_stage_runs_those_that_read_it_are_shown_as_failed_only_if_they_are_shown_as_stale(
    root: Path, synced: dg.DagsterInstance, front_end: str
) -> None:
    """DVC removes the output and the report of a stage before it runs."""
    command = (
        ["small_pipeline.py", "materialize", "tok"] if front_end == "dagster" else ["-m", "dvc", "repro", "-s", "tok"]
    )
    process = small_pipeline.start_until_tok_runs(root, *command, SLOW_SECONDS="600")
    try:
        assert not (root / "data/tok").exists() and not (root / "data/reports/tok.json").exists()
        lines = sync(root, synced, small_pipeline.PIPELINE)
        assert {line for line in lines if not line.startswith("def/tok is now")} == set()
        assert small_pipeline.not_fresh(root, synced) <= {"tok"}
        edit_params(root, lambda values: values["variants"]["lora"].update(r=9))
        lines = [line.partition(" is now")[0] for line in sync(root, synced, small_pipeline.PIPELINE)]
        failed = {f"check {name} dvc_in_sync: failed" for name in ("adapter@lora", "cmp")}
        assert {*lines} == {"def/adapter/lora", "def/cmp"} | failed
        assert small_pipeline.not_fresh(root, synced) - {"tok"} == {"adapter@lora", "cmp"}
        assert sync(root, synced, small_pipeline.PIPELINE) == []
        for _ in range(2):
            assert sync_after(LastSync.read(root, ()), synced, small_pipeline.PIPELINE) == []
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not LastSync.read(root, ()).unchanged, "what the killed stage left was never reported"
    assert any(line.startswith("tok is missing") for line in sync(root, synced, small_pipeline.PIPELINE))
    assert small_pipeline.not_fresh(root, synced) == small_pipeline.changed_in_dvc(root)


@pytest.mark.long
def test_syncs_during_and_after_a_run_do_not_repeat_its_reports(root: Path, synced: dg.DagsterInstance) -> None:
    process = small_pipeline.start_until_tok_runs(root, "small_pipeline.py", "materialize", SLOW_SECONDS="2")
    syncs = 0
    while process.poll() is None:
        sync(root, synced, small_pipeline.PIPELINE)
        syncs += 1
        time.sleep(0.3)  # otherwise the syncs would take the core from the run, which would take the longer
    assert process.returncode == 0 and syncs > 1
    sync(root, synced, small_pipeline.PIPELINE)
    event = synced.get_latest_materialization_event(TOK)
    assert event is not None and event.run_id
    changed = {a for a, s in read_stages(root).items() if len(versions(synced, a)) > 1}
    assert changed >= {"tok", "cmp"}
    for address in changed:
        assert set(versions(synced, address).values()) == {1}, address
    assert {status for checks in shown_checks(root, synced).values() for status in checks.values()} == {"SUCCEEDED"}
    assert sync(root, synced, small_pipeline.PIPELINE) == []
    assert small_pipeline.not_fresh(root, synced) == small_pipeline.changed_in_dvc(root) == set()


def test_a_sync_that_read_during_a_run_does_not_report_it_after_its_end(root: Path, synced: dg.DagsterInstance) -> None:
    process = small_pipeline.start_until_tok_runs(root, "small_pipeline.py", "materialize", "tok", SLOW_SECONDS="1")
    reading = read(project_of(root), synced)
    assert TOK in reading.in_progress and asset_key("cmp") not in reading.in_progress
    assert process.wait(60) == 0 and in_progress(synced) == frozenset()
    assert not [line for line in mirror(project_of(root), synced, reading) if line.startswith("tok ")]
    assert versions(synced, "tok")[read_stages(root)["tok"].version] == 1
    assert set(shown_checks(root, synced)["tok"].values()) == {"SUCCEEDED"}


def test_a_sync_that_read_before_a_run_does_not_repeat_its_reports(root: Path, synced: dg.DagsterInstance) -> None:
    (root / "code/tok.py").write_text("V = 9\n")
    reading = read(project_of(root), synced)
    assert small_pipeline.materialize(root, synced).success
    before = {address: versions(synced, address) for address in reading.states}
    mirror(project_of(root), synced, reading)
    assert {address: versions(synced, address) for address in reading.states} == before
    assert {status for checks in shown_checks(root, synced).values() for status in checks.values()} == {"SUCCEEDED"}


def test_two_syncs_at_once_report_one_materialization(root: Path, synced: dg.DagsterInstance) -> None:
    (root / "code/tok.py").write_text("V = 9\n")
    assert dvc(root, "repro").returncode == 0
    first, second = read(project_of(root), synced), read(project_of(root), synced)
    assert mirror(project_of(root), synced, first)
    mirror(project_of(root), synced, second)
    each_version_once_and_every_check_shown(root, synced)


def test_an_unsynced_dvc_run_is_reported_once_when_it_is_materialized(root: Path, synced: dg.DagsterInstance) -> None:
    (root / "code/tok.py").write_text("V = 9\n")
    assert dvc(root, "repro").returncode == 0
    assert small_pipeline.materialize(root, synced, ["tok"]).success
    assert versions(synced, "tok")[read_stages(root)["tok"].version] == 1
    sync(root, synced, small_pipeline.PIPELINE)
    each_version_once_and_every_check_shown(root, synced)


def test_a_materialization_that_sync_reports_comes_with_its_checks(root: Path, synced: dg.DagsterInstance) -> None:
    (root / "code/inst.py").write_text("V = 5\n")
    assert small_pipeline.materialize(root, synced).success  # so that the checks are those of a run
    (root / "dvc.yaml").write_text(small_pipeline.dvc_yaml(note=" --note"))  # runs again, and says and makes the same
    assert dvc(root, "repro").returncode == 0
    lines = sync(root, synced, small_pipeline.PIPELINE)
    assert any(line.startswith("inst is ") for line in lines) and "check inst no_bad_rows: passed" in lines
    assert {status for checks in shown_checks(root, synced).values() for status in checks.values()} == {"SUCCEEDED"}
    assert sync(root, synced, small_pipeline.PIPELINE) == []


def test_a_killed_run_does_not_block_sync(root: Path, synced: dg.DagsterInstance) -> None:
    process = small_pipeline.start_until_tok_runs(root, "small_pipeline.py", "materialize", "tok")
    assert in_progress(synced) == {TOK}
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    assert synced.get_runs(dg.RunsFilter(statuses=ALIVE)), "a killed run stays started"
    assert in_progress(synced) == frozenset()
    assert dvc(root, "repro").returncode == 0
    assert any(line.startswith("tok is ") for line in sync(root, synced, small_pipeline.PIPELINE))
    assert small_pipeline.not_fresh(root, synced) == small_pipeline.changed_in_dvc(root) == set()
    assert {status for checks in shown_checks(root, synced).values() for status in checks.values()} == {"SUCCEEDED"}


def test_a_run_of_another_machine_counts_until_it_has_been_quiet_for_an_hour(
    root: Path, synced: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = small_pipeline.start_until_tok_runs(root, "small_pipeline.py", "materialize", "tok")
    [run] = synced.get_runs(dg.RunsFilter(statuses=ALIVE))
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    synced.add_run_tags(run.run_id, {MACHINE_TAG: "elsewhere"})
    assert in_progress(synced) == {TOK}
    monkeypatch.setattr(dead_runs, "QUIET", 0.0)
    assert in_progress(synced) == frozenset()


def test_the_sensor_does_not_wait_for_a_command_that_holds_dvcs_lock(root: Path, synced: dg.DagsterInstance) -> None:
    """As `dvc push` does until it ends: the waiting sensors would use up the threads of Dagster's code server."""
    sensor = build_definitions(root, small_pipeline.PIPELINE, whole_location=True).resolve_sensor_def("sync")
    (root / "data/sources/g.txt").write_text("other")

    def tick() -> str:
        answer = sensor(dg.build_sensor_context(instance=synced))
        assert isinstance(answer, dg.SkipReason)
        return answer.skip_message or ""

    with ThreadPoolExecutor(1) as thread, records_locked(root):
        waiting = thread.submit(tick)
        assert waiting.result(300) == f"Not synced: process {os.getpid()} holds DVC's lock of the project"
    assert "sources/g.txt is now" in tick()


@pytest.mark.parametrize("when", ["before the sync", "during the sync"])
def test_a_sync_leaves_a_check_to_the_run_that_was_launched(
    root: Path, synced: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A result that sync reports between launch and end of the run would hide that of the run: the check would be shown
    as not evaluated."""
    job = build_definitions(root, small_pipeline.PIPELINE).resolve_implicit_global_asset_job_def()
    storage, launched = synced.event_log_storage, list[dg.DagsterRun]()
    read_latest = storage.get_latest_asset_check_execution_by_key

    def launch() -> None:
        part = job.get_subset(asset_selection={TOK})
        launched.append(synced.create_run_for_job(job_def=part, asset_selection={TOK}))

    def launch_meanwhile(keys: Sequence[dg.AssetCheckKey]) -> Any:
        found = read_latest(keys)
        if not launched:
            launch()
        return found

    (root / "code/tok.py").write_text("V = 2\n")
    if when == "before the sync":
        launch()
    else:
        monkeypatch.setattr(storage, "get_latest_asset_check_execution_by_key", launch_meanwhile)
    line = "check tok dvc_in_sync: failed"
    assert line not in sync(root, synced, small_pipeline.PIPELINE)
    synced.report_run_canceled(launched[0])
    assert line in sync(root, synced, small_pipeline.PIPELINE)


def test_a_sync_does_not_repeat_a_check_that_a_run_reports_meanwhile(
    root: Path, synced: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repetition would belong to the materialization before that of the run, so the check would be shown as not
    evaluated."""
    storage, reported = synced.event_log_storage, list[str]()
    read_latest = storage.get_latest_asset_check_execution_by_key

    def report_meanwhile(keys: Sequence[dg.AssetCheckKey]) -> Any:
        found = read_latest(keys)
        if not reported:
            reported.append("tok")
            synced.report_runless_asset_event(
                dg.AssetCheckEvaluation(asset_key=TOK, check_name="dvc_in_sync", passed=True)
            )
        return found

    (root / "code/tok.py").write_text("V = 2\n")
    monkeypatch.setattr(storage, "get_latest_asset_check_execution_by_key", report_meanwhile)
    line = "check tok dvc_in_sync: failed"
    assert line not in sync(root, synced, small_pipeline.PIPELINE)
    assert line in sync(root, synced, small_pipeline.PIPELINE)


def test_definitions_load_while_a_command_holds_dvcs_lock(root: Path) -> None:
    """Until then neither the UI nor a run has started, so neither could say what it waits for."""
    expected = build_definitions(root, small_pipeline.PIPELINE).resolve_asset_graph().get_all_asset_keys()
    with ThreadPoolExecutor(1) as thread, records_locked(root):
        loaded = thread.submit(build_definitions, root, small_pipeline.PIPELINE).result(300)
        assert loaded.resolve_asset_graph().get_all_asset_keys() == expected


def test_the_ui_starts_and_the_command_says_why_it_waits_while_dvcs_lock_is_held(
    root: Path, synced: dg.DagsterInstance, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pedigree")
    (root / "data/sources/g.txt").write_text("other")
    last, text = LastSync.read(root, ()), f"process {os.getpid()} holds DVC's lock of the project"

    def synced_lines(wait: bool) -> list[str]:
        return sync_after(last, synced, small_pipeline.PIPELINE, wait)

    until = time.monotonic() + 300
    with ThreadPoolExecutor(1) as thread:
        with records_locked(root):
            assert thread.submit(synced_lines, False).result(300) == [f"not synced yet: {text}"]
            waiting = thread.submit(synced_lines, True)
            while f"waiting: {text}" not in caplog.messages:
                assert time.monotonic() < until
                time.sleep(0.1)
        assert any("sources/g.txt is now" in line for line in waiting.result(300))


@pytest.mark.long
def test_whoever_waits_for_a_run_of_dagster_is_told_its_id(root: Path, synced: dg.DagsterInstance) -> None:
    """The command line of its process has all settings of Dagster's database."""
    process = small_pipeline.start_until_tok_runs(root, "small_pipeline.py", "materialize", SLOW_SECONDS="600")
    try:
        [run] = synced.get_runs(dg.RunsFilter(statuses=ALIVE))
        assert writer_of(root, ["data/tok"]) == f"process {process.pid} (dagster run {run.run_id[:8]})"
        refused = dvc(root, "repro", "-s", "tok")
        assert refused.returncode == 255 and f"dagster run {run.run_id[:8]}" in refused.stderr
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_run_names_the_process_whose_lock_it_waits_for(root: Path, synced: dg.DagsterInstance) -> None:
    definitions = build_definitions(root, small_pipeline.PIPELINE)
    text, until = f"tok is waiting: process {os.getpid()} holds DVC's lock of the project", time.monotonic() + 300

    def is_logged() -> bool:
        return any(text in one.user_message for run in synced.get_runs() for one in synced.all_logs(run.run_id))

    with ThreadPoolExecutor(1) as thread:
        with records_locked(root):
            run = thread.submit(small_pipeline.materialize, root, synced, ["tok"], definitions)
            while not is_logged():
                assert time.monotonic() < until
                time.sleep(0.2)
        assert run.result().success
