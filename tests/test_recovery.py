"""Failures between the two front ends: what is reported, and that the pipeline recovers. On the small pipeline."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
from builders import small_pipeline
from conftest import dvc, edit_params, pedigree, run
from dagster._core.errors import DagsterUserCodeLoadError, user_code_error_boundary
from dagster._utils.error import serializable_error_info_from_exc_info
from dvc.ignore import DvcIgnoreFilter

from dagster_project.__main__ import main
from dagster_project.core.errors import InputError
from dagster_project.orchestration import dvc_run
from dagster_project.orchestration.dagster.assets import build_definitions
from dagster_project.orchestration.dagster.home import home
from dagster_project.orchestration.dagster.sync import sync
from dagster_project.orchestration.dagster_dvc.dead_runs import ALIVE, reap
from dagster_project.orchestration.dagster_dvc.keys import asset_key
from dagster_project.orchestration.dvc import open_repo, read_stages, records_locked, verified_fingerprint
from dagster_project.orchestration.dvc_cache import restore_outputs
from dagster_project.orchestration.dvc_remote import inputs_by_hash
from dagster_project.orchestration.erasure.layout import dagster_home
from dagster_project.orchestration.locks import hold

pytestmark = pytest.mark.usefixtures("warm_small")


def failure(result: Any) -> str:
    """Why a run failed, as Dagster shows it."""
    event = next(e for e in result.all_events if e.event_type_value == "STEP_FAILURE")
    return str(event.event_specific_data.user_failure_data.description)


def tamper_with_cache(root: Path, address: str, checkout: bool = True) -> None:
    """Put other bytes into every cache object that holds a file of an output,
    and check it out again. DVC notices nothing."""
    out = root / read_stages(root)[address].out
    for file in list(out.iterdir()):
        content = file.read_bytes()
        for path in (root / ".dvc/cache/files/md5").rglob("*"):
            if path.is_file() and path.read_bytes() == content:
                path.chmod(0o644)
                path.write_bytes(b"TAMPERED")
                path.chmod(0o444)
    shutil.rmtree(out)
    if not checkout:
        return
    assert dvc(root, "checkout").returncode == 0
    assert any(file.read_bytes() == b"TAMPERED" for file in out.iterdir()), "DVC noticed, so nothing is shown"


def test_a_tampered_cache_object_is_set_aside_reported_in_one_line_and_produced_again(
    root: Path, synced: dg.DagsterInstance
) -> None:
    version = read_stages(root)["inst"].version
    tamper_with_cache(root, "inst")
    assert small_pipeline.changed_in_dvc(root) == set()
    said = sync(root, synced, small_pipeline.PIPELINE)
    assert [line for line in said if "sha256 differs" in line and line.startswith("inst: data/inst")] == said[:1]
    assert (root / ".dvc/tmp/pedigree/set_aside/inst/rows.txt").read_bytes() == b"TAMPERED"
    assert small_pipeline.not_fresh(root, synced) == small_pipeline.changed_in_dvc(root) == {"inst", "tok"}
    assert small_pipeline.materialize(root, synced, ["inst"]).success
    assert read_stages(root)["inst"].version == version
    sync(root, synced, small_pipeline.PIPELINE)
    assert small_pipeline.not_fresh(root, synced) == small_pipeline.changed_in_dvc(root) == set()


def test_an_output_with_a_tampered_cache_object_is_rebuilt_instead_of_restored(
    root: Path, synced: dg.DagsterInstance
) -> None:
    version = read_stages(root)["inst"].version
    tamper_with_cache(root, "inst", checkout=False)
    result = small_pipeline.materialize(root, synced)
    assert result.success and read_stages(root)["inst"].version == version
    assert sum("sha256 differs" in entry.user_message for entry in synced.all_logs(result.run_id)) == 1
    assert small_pipeline.changed_in_dvc(root) == set()


def test_dvc_repro_does_not_use_a_tampered_cache_object_either(root: Path) -> None:
    tamper_with_cache(root, "inst")
    (root / "params.yaml").write_text((root / "params.yaml").read_text().replace('"testseed": 7', '"testseed": 8'))
    refused = dvc(root, "repro")
    assert (
        refused.returncode != 0
        and "sha256 differs" in refused.stderr
        and "hint: run `dvc repro tok` again" in refused.stderr
    )
    assert dvc(root, "repro").returncode == 0
    assert "TAMPERED" not in (root / "data/tok/train.txt").read_text()
    assert small_pipeline.changed_in_dvc(root) == set()


def test_an_output_edited_by_hand_cannot_be_recorded_with_dvc_commit(root: Path, synced: dg.DagsterInstance) -> None:
    before = (root / "data/inst/rows.txt").read_text()
    (root / "data/inst/rows.txt").unlink()
    (root / "data/inst/rows.txt").write_text("BAD")
    assert dvc(root, "commit", "-f").returncode == 0
    assert "changed without DVC" in sync(root, synced, small_pipeline.PIPELINE)[0]
    assert dvc(root, "repro").returncode == 0
    assert (root / "data/inst/rows.txt").read_text() == before
    assert not [line for line in sync(root, synced, small_pipeline.PIPELINE) if "sha256" in line]


@pytest.mark.long
def test_a_killed_run_is_ended_frees_its_slots_and_the_next_one_recovers(
    root: Path, synced: dg.DagsterInstance
) -> None:
    process = small_pipeline.start_until_tok_runs(root, "small_pipeline.py", "materialize")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    [run_id] = [found.run_id for found in synced.get_runs(dg.RunsFilter(statuses=ALIVE))]
    slots = synced.event_log_storage
    slots.set_concurrency_slots("training", 1)
    assert slots.claim_concurrency_slot("training", run_id, "tok").is_claimed
    said = reap(synced)
    assert slots.get_concurrency_info("training").active_slot_count == 0
    assert len(said) == 1 and "was killed; marked as failed" in said[0]
    assert synced.get_run_by_id(run_id).status == dg.DagsterRunStatus.FAILURE
    assert reap(synced) == []
    assert small_pipeline.materialize(root, synced).success
    sync(root, synced, small_pipeline.PIPELINE)
    assert small_pipeline.not_fresh(root, synced) == small_pipeline.changed_in_dvc(root) == set()


@pytest.mark.long
def test_a_process_that_is_killed_while_dvc_writes_dvc_lock_leaves_the_former_one(root: Path) -> None:
    (root / "code/cmp.py").write_text("V = 7\n")
    before = (root / "dvc.lock").read_bytes()
    killed = """
import os, signal, sys
from pathlib import Path
from dvc.utils.serialize import _yaml
from dagster_project.orchestration.dvc_run import reproduce

write = _yaml._dump

def write_some(data, stream):
    if "dvc.lock" not in Path(stream.name).name:  # DVC writes the entry of its run cache first
        return write(data, stream)
    stream.write("schema: ")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)

_yaml._dump = write_some
reproduce(Path.cwd(), "cmp", False, {}, print)
"""
    assert run([sys.executable, "-c", killed], root).returncode == -signal.SIGKILL
    assert (root / "dvc.lock").read_bytes() == before and small_pipeline.changed_in_dvc(root) == {"cmp"}
    dvc_run.reproduce(root, "cmp", False, {}, print)
    assert (root / "dvc.lock").read_bytes() != before and not small_pipeline.changed_in_dvc(root)
    assert not run(["git", "status", "--short", "--", "*.new", "*.tmp"], root).stdout


def test_terminating_a_run_ends_its_stage_command_and_loses_nothing(root: Path, synced: dg.DagsterInstance) -> None:
    before = (root / "data/tok/train.txt").read_bytes()
    process = small_pipeline.start_until_tok_runs(root, "small_pipeline.py", "materialize")
    command = json.loads((root / small_pipeline.LOG).read_text().splitlines()[-1])["pid"]
    process.send_signal(signal.SIGINT)  # what Dagster sends to a run that is terminated
    assert process.wait(25) != 0
    assert not psutil.pid_exists(command)
    assert (root / "data/tok/train.txt").read_bytes() == before
    assert not synced.get_runs(dg.RunsFilter(statuses=ALIVE))
    assert small_pipeline.shown_failures(synced) == ["tok was interrupted; nothing was recorded.\n"]
    assert small_pipeline.materialize(root, synced).success


@pytest.mark.long
def test_terminating_a_run_does_not_wait_for_a_command_that_holds_dvcs_lock(
    root: Path, synced: dg.DagsterInstance
) -> None:
    """As `dvc push` does until it ends. DVC has removed the outputs, and would wait before it goes on."""
    before = (root / "data/tok/train.txt").read_bytes()
    process = small_pipeline.start_until_tok_runs(root, "small_pipeline.py", "materialize", SLOW_SECONDS="600")
    with records_locked(root):
        process.send_signal(signal.SIGINT)
        assert process.wait(300) != 0
        assert (root / "data/tok/train.txt").read_bytes() == before
    assert not synced.get_runs(dg.RunsFilter(statuses=ALIVE))
    sync(root, synced, small_pipeline.PIPELINE)
    assert small_pipeline.not_fresh(root, synced) == small_pipeline.changed_in_dvc(root) == {"tok"}


@pytest.mark.long
@pytest.mark.parametrize("mark", ["report_run_canceled", "report_run_canceling"])
def test_a_run_that_is_only_marked_as_canceled_ends_its_stage_command_too(
    root: Path, synced: dg.DagsterInstance, mark: str
) -> None:
    before = (root / "data/tok/train.txt").read_bytes()
    process = small_pipeline.start_until_tok_runs(root, "small_pipeline.py", "materialize", SLOW_SECONDS="300")
    command = json.loads((root / small_pipeline.LOG).read_text().splitlines()[-1])["pid"]
    [run] = synced.get_runs(dg.RunsFilter(statuses=ALIVE))
    getattr(synced, mark)(run)  # what Dagster does if it cannot reach the process: "force terminate", or "terminate"
    assert process.wait(120) != 0
    assert not psutil.pid_exists(command)
    assert (root / "data/tok/train.txt").read_bytes() == before
    ended = synced.get_run_by_id(run.run_id)
    assert ended and ended.status == dg.DagsterRunStatus.CANCELED
    assert small_pipeline.materialize(root, synced).success


def test_an_input_edited_while_a_stage_runs_is_not_recorded(root: Path) -> None:
    process = small_pipeline.start_until_tok_runs(root, "-m", "dvc", "repro", SLOW_SECONDS="2")
    (root / "params.yaml").write_text((root / "params.yaml").read_text().replace('"testseed": 7', '"testseed": 8'))
    assert process.wait(30) != 0
    assert "changed while the stage ran" in (process.stderr.read() if process.stderr else "")
    assert {"tok"} <= small_pipeline.changed_in_dvc(root)


def test_a_stage_that_is_renamed_while_it_runs_is_named_with_the_next_step(root: Path) -> None:
    process = small_pipeline.start_until_tok_runs(root, "-m", "dvc", "repro", "tok", SLOW_SECONDS="2")
    (root / "dvc.yaml").write_text(small_pipeline.dvc_yaml().replace('"tok": {', '"other": {'))
    assert process.wait(30) != 0
    said = process.stderr.read() if process.stderr else ""
    assert "changed while the stage ran: tok is not a stage of dvc.yaml\nhint: undo that change and run" in said


@pytest.mark.parametrize("parameter", [False, True])
def test_what_dvc_yaml_lets_a_stage_read_while_it_runs_is_named(root: Path, parameter: bool) -> None:
    """It did not read the file, and dvc.lock would not record it."""
    process = small_pipeline.start_until_tok_runs(root, "-m", "dvc", "repro", "tok", SLOW_SECONDS="2")
    pipeline = json.loads(small_pipeline.dvc_yaml())
    key, added = ("params", "minlen") if parameter else ("deps", "data/sources/g.txt")
    pipeline["stages"]["tok"][key].append(added)
    (root / "dvc.yaml").write_text(json.dumps(pipeline))
    assert process.wait(30) != 0
    said = process.stderr.read() if process.stderr else ""
    changed = "params.yaml" if parameter else f"dvc.yaml (new: {added})"
    assert f"tok: {changed} changed while the stage ran\nhint: run it again" in said and "Traceback" not in said
    assert "tok" in small_pipeline.changed_in_dvc(root)


def test_the_failure_of_a_run_is_the_message_of_its_stage_without_a_stack_trace(
    root: Path, synced: dg.DagsterInstance
) -> None:
    (root / "data/sources/g.txt").write_text("BAD")
    said = (
        "inst: 1 blocking check(s) failed. no_bad_rows: 1 row (first: 0)\n"
        "hint: fix the rows, or change params.yaml; all findings are in data/reports/inst.json"
    )
    result = small_pipeline.materialize(root, synced, ["raw", "inst"])
    [failure] = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    assert failure.error and failure.error.to_string() == f"{said}\n" and failure.error.cls_name == "Failure"
    assert failure.user_failure_data and failure.user_failure_data.description == said


def test_definitions_that_cannot_be_loaded_are_reported_by_one_message(root: Path) -> None:
    """As Dagster's code server loads them."""
    (root / "params.yaml").write_text("variants: [\n")
    with (
        pytest.raises(InputError) as raised,
        user_code_error_boundary(DagsterUserCodeLoadError, lambda: "definitions"),
    ):
        build_definitions(root, small_pipeline.PIPELINE)
    shown = serializable_error_info_from_exc_info((raised.type, raised.value, raised.tb)).to_string()
    assert shown == f"{raised.value}\n" and shown.startswith("params.yaml is not valid YAML") and "\nhint: " in shown


def test_a_run_that_is_refused_has_no_check_results_of_an_earlier_attempt(
    root: Path, synced: dg.DagsterInstance
) -> None:
    def validate(folder: Path) -> dict[str, Any]:
        if (folder / "refused").exists():
            raise InputError("minlen must be positive", "give a positive number")
        return small_pipeline.PIPELINE.validate(folder)

    definitions = build_definitions(root, replace(small_pipeline.PIPELINE, validate=validate))
    (root / "data/sources/g.txt").write_text("BAD")
    first = small_pipeline.materialize(root, synced, ["raw", "inst"], definitions)
    assert [one.passed for one in first.get_asset_check_evaluations() if one.check_name == "no_bad_rows"] == [False]
    (root / "refused").touch()
    second = small_pipeline.materialize(root, synced, ["inst"], definitions)
    assert "minlen must be positive" in failure(second)
    assert second.get_asset_check_evaluations() == []


def test_a_run_of_what_was_loaded_before_a_variant_was_added_says_to_reload(
    root: Path, synced: dg.DagsterInstance
) -> None:
    loaded = build_definitions(root, small_pipeline.PIPELINE)
    edit_params(root, lambda values: values["variants"].update(x={"r": 4}))
    said = failure(small_pipeline.materialize(root, synced, definitions=loaded))
    assert "(adapter@x: never run; if Dagster does not list it, reload the code location)" in said
    assert small_pipeline.materialize(root, synced).success, "after a reload"


def test_a_selection_without_the_stages_between_runs_in_the_order_of_the_pipeline(
    root: Path, synced: dg.DagsterInstance
) -> None:
    """Dagster begins with `cmp`, the first by name."""
    (root / "dvc.yaml").write_text(small_pipeline.dvc_yaml(note=" --note"))  # inst runs again, and makes the same
    (root / "code/cmp.py").write_text("V = 4\n")
    ran = small_pipeline.commands_run(root)
    result = small_pipeline.materialize(root, synced, ["inst", "cmp"])
    assert result.success and small_pipeline.commands_run(root) == [*ran, "inst", "cmp"]
    [waiting] = [event.step_retry_data for event in result.all_events if event.is_step_up_for_retry]
    said = "cmp is waiting: inst must be brought up to date first (inst: command changed)\n"
    assert waiting.error.to_string() == said
    (root / "code/inst.py").write_text("V = 4\n")
    (root / "code/cmp.py").write_text("V = 5\n")
    result = small_pipeline.materialize(root, synced, ["inst", "cmp"])
    [failure] = [event.step_failure_data.error for event in result.all_events if event.is_step_failure]
    assert failure and "cmp was not run: tok must be brought up to date first" in failure.message
    assert small_pipeline.commands_run(root) == [*ran, "inst", "cmp", "inst"]


def test_a_failed_gate_is_never_reported_as_materialized(root: Path, synced: dg.DagsterInstance) -> None:
    event = synced.get_latest_materialization_event(asset_key("inst"))
    (root / "data/sources/g.txt").write_text("BAD")
    assert "inst" in failure(small_pipeline.materialize(root, synced))
    assert dvc(root, "repro").returncode != 0
    sync(root, synced, small_pipeline.PIPELINE)
    assert synced.get_latest_materialization_event(asset_key("inst")).timestamp == event.timestamp
    assert small_pipeline.not_fresh(root, synced) == small_pipeline.changed_in_dvc(root) == {"inst"}


def test_a_run_with_a_live_process_is_not_changed(root: Path, synced: dg.DagsterInstance) -> None:
    @dg.op
    def look(context) -> None:
        assert reap(context.instance) == []

    @dg.job
    def looking() -> None:
        look()

    assert looking.execute_in_process(instance=synced).success


def test_an_invalid_table_of_locked_paths_is_deleted(root: Path, synced: dg.DagsterInstance) -> None:
    (root / ".dvc/tmp/rwlock").write_text("")
    assert "corrupt" in dvc(root, "repro").stderr
    assert sync(root, synced, small_pipeline.PIPELINE) == []
    assert dvc(root, "repro").returncode == 0


@pytest.mark.long
def test_a_lock_older_than_the_event_log_is_fresh_after_sync(root: Path, synced: dg.DagsterInstance) -> None:
    old = read_stages(root)["inst"].version
    (root / "data/sources/g.txt").write_text("r1")
    assert small_pipeline.materialize(root, synced).success
    sync(root, synced, small_pipeline.PIPELINE)
    assert read_stages(root)["inst"].version != old
    small_pipeline.git(root, "checkout", "-qf", ".")
    assert dvc(root, "checkout").returncode == 0
    assert sync(root, synced, small_pipeline.PIPELINE) != []
    assert small_pipeline.not_fresh(root, synced) == small_pipeline.changed_in_dvc(root) == set()
    assert (
        synced.get_latest_materialization_event(asset_key("inst")).asset_materialization.tags["dagster/data_version"]
        == old
    )


def test_a_run_cache_hit_is_reported_with_its_checks_and_runs_nothing(root: Path, synced: dg.DagsterInstance) -> None:
    values = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(values.replace('"minlen": 1', '"minlen": 2'))
    assert dvc(root, "repro").returncode == 0
    (root / "params.yaml").write_text(values)
    ran = len(small_pipeline.commands_run(root))
    result = small_pipeline.materialize(root, synced)
    assert result.success and len(small_pipeline.commands_run(root)) == ran
    done = {
        "@".join(e.asset_key.path): e.materialization.metadata["done"].value
        for e in result.get_asset_materialization_events()
    }
    assert done == {
        "raw": "nothing",
        **dict.fromkeys(["inst", "tok", "adapter@lora", "adapter@dora", "cmp"], "restored"),
    }
    assert "did not receive any messages" not in "".join(entry.user_message for entry in synced.all_logs(result.run_id))
    said = Counter((c.check_name, c.passed) for c in result.get_asset_check_evaluations())
    assert said == {("no_bad_rows", True): 1, ("dvc_in_sync", True): 6}


def test_every_asset_shows_whether_dvc_considers_it_up_to_date(root: Path, synced: dg.DagsterInstance) -> None:
    def unsynced() -> set[str]:
        keys = {dg.AssetCheckKey(asset_key(address), "dvc_in_sync"): address for address in read_stages(root)}
        records = synced.event_log_storage.get_latest_asset_check_execution_by_key([*keys])
        assert records.keys() == keys.keys()
        return {
            keys[key] for key, record in records.items() if not record.event.dagster_event.event_specific_data.passed
        }

    assert unsynced() == set()
    (root / "code/tok.py").write_text("V = 1\n")
    assert "check tok dvc_in_sync: failed" in sync(root, synced, small_pipeline.PIPELINE)
    assert unsynced() == small_pipeline.changed_in_dvc(root) == {"tok"}
    assert small_pipeline.materialize(root, synced, ["tok"]).success
    sync(root, synced, small_pipeline.PIPELINE)
    assert unsynced() == small_pipeline.changed_in_dvc(root)
    assert sync(root, synced, small_pipeline.PIPELINE) == []


def test_deleting_dagsters_home_and_syncing_brings_the_view_back(root: Path) -> None:
    for _ in range(2):
        (root / ".dagster").mkdir()
        (root / ".dagster" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        with dg.DagsterInstance.from_config(str(root / ".dagster")) as found:
            assert len(sync(root, found, small_pipeline.PIPELINE)) > len(read_stages(root))
            assert small_pipeline.not_fresh(root, found) == set()
            record = found.event_log_storage.get_latest_asset_check_execution_by_key(
                [dg.AssetCheckKey(asset_key("inst"), "no_bad_rows")]
            )
            assert [r.event.dagster_event.event_specific_data.passed for r in record.values()] == [True]
        shutil.rmtree(root / ".dagster")


@pytest.mark.long
def test_a_tracked_source_that_was_edited_but_not_added_stops_an_asset_before_anything_is_deleted(
    root: Path, synced
) -> None:
    (root / "data/sources/d.txt").unlink()
    (root / "data/sources/d.txt").write_text("new")
    before = (root / "data/raw/rows.txt").read_bytes()
    said = failure(small_pipeline.materialize(root, synced, ["raw"]))
    assert "data/sources/d.txt differs from data/sources/d.txt.dvc" in said and "`dvc add data/sources/d.txt`" in said
    assert (root / "data/raw/rows.txt").read_bytes() == before
    assert dvc(root, "add", "data/sources/d.txt").returncode == 0
    assert small_pipeline.materialize(root, synced).success


@pytest.mark.parametrize(
    "path, stage", [("data/sources/d.txt", "raw"), ("data/raw/rows.txt", "inst")], ids=["a source", "an output"]
)
def test_the_next_step_for_an_input_that_was_changed_restores_it(root: Path, path: str, stage: str) -> None:
    def conflicts() -> Sequence[tuple[str, str]]:
        return verified_fingerprint(root, stage, lambda _: None).conflicts

    content = (root / path).read_bytes()
    (root / path).unlink()
    (root / path).write_text("new")
    [(_, hint)] = conflicts()
    [command] = re.findall(r"`dvc (checkout [^`]*)`", hint)
    assert dvc(root, *command.split()).returncode == 0
    assert (root / path).read_bytes() == content and not conflicts()


def test_a_missing_output_names_the_command_that_restores_it(root: Path, synced: dg.DagsterInstance) -> None:
    (root / "code/inst.py").write_text("V = 9\n")
    shutil.rmtree(root / "data/raw")
    assert "`dvc checkout data/raw` restores it" in failure(small_pipeline.materialize(root, synced, ["inst"]))
    shutil.rmtree(root / ".dvc/cache")
    assert "not in the cache: `dvc pull data/raw` fetches it" in failure(
        small_pipeline.materialize(root, synced, ["inst"])
    )
    (root / "data/sources/d.txt").unlink()
    assert "`dvc pull data/sources/d.txt.dvc`" in failure(small_pipeline.materialize(root, synced, ["raw"]))


def test_a_stage_goes_on_while_dagsters_database_does_not_answer(
    root: Path, synced: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise the restart of a database would end a training of many hours."""
    monkeypatch.setattr(dvc_run, "PROGRESS_INTERVAL", 0.2)
    ran = len(small_pipeline.commands_run(root))
    [gate] = small_pipeline.hold(root, "tok")
    (root / "code/tok.py").write_text("V = 9\n")
    database = root / ".dagster/history/runs.db"
    definitions = build_definitions(root, small_pipeline.PIPELINE)
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(small_pipeline.materialize, root, synced, ["tok"], definitions)
        while len(small_pipeline.commands_run(root)) == ran and not run.done():
            time.sleep(0.1)
        aside = database.rename(database.with_name("aside"))
        while "Dagster's database does not answer" not in caplog.text and not run.done():
            time.sleep(0.1)
        aside.replace(database)
        gate.touch()
        assert run.result().success
    assert small_pipeline.commands_run(root)[ran:] == ["tok"] and "tok" not in small_pipeline.changed_in_dvc(root)
    sync(root, synced, small_pipeline.PIPELINE)
    assert small_pipeline.not_fresh(root, synced) == small_pipeline.changed_in_dvc(root)


def test_a_model_is_materialized_although_dvc_lock_lost_another_stage(root: Path, synced: dg.DagsterInstance) -> None:
    """Its lineage is unknown until then, but DVC has recorded it."""
    declared = json.loads((root / "dvc.yaml").read_text())
    declared["stages"]["adapter"]["do"]["meta"] = {"kinds": ["safetensors"]}
    (root / "dvc.yaml").write_text(json.dumps(declared))
    lock, _, _ = (root / "dvc.lock").read_text().partition("\n  cmp:")  # it is the last one
    (root / "dvc.lock").write_text(f"{lock}\n")
    (root / "code/adapter.py").write_text("V = 9\n")
    assert small_pipeline.materialize(root, synced, ["adapter@lora"]).success
    latest = synced.get_latest_materialization_event(asset_key("adapter@lora"))
    assert latest is not None and latest.asset_materialization is not None
    assert latest.asset_materialization.metadata["data_version"].value == read_stages(root)["adapter@lora"].version
    assert "dvc.lock has no complete entry of cmp" in str(latest.asset_materialization.metadata["lineage"].value)


def test_a_report_that_only_git_has_survives_a_failed_run(root: Path) -> None:
    """As in a clone: DVC removes the report before it runs the stage, and its cache has no copy."""
    report = root / "data/reports/inst.json"
    before = report.read_bytes()
    cached = next(
        path for path in (root / ".dvc/cache/files/md5").rglob("*") if path.is_file() and path.read_bytes() == before
    )
    cached.unlink()
    (root / "data/raw/rows.txt").unlink()
    (root / "data/raw/rows.txt").write_text("new")
    refused = dvc(root, "repro", "--single-item", "inst")
    assert refused.returncode != 0 and "data/raw is not what raw recorded" in refused.stderr
    assert report.read_bytes() == before


def test_a_source_that_the_file_system_lists_before_dvc_yaml_is_not_taken_for_the_stage(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources in the project's folder: stages of .dvc files have no name."""
    (root / "a.csv").write_text("x")
    assert dvc(root, "add", "a.csv").returncode == 0
    walk = DvcIgnoreFilter.walk

    def sources_first(*arguments: Any, **named: Any) -> Any:
        for folder, folders, files in walk(*arguments, **named):
            files[:] = sorted(files, key=lambda name: not name.endswith(".dvc"))
            yield folder, folders, files

    monkeypatch.setattr(DvcIgnoreFilter, "walk", sources_first)
    with open_repo(root) as repo:
        assert not hasattr(next(iter(repo.index.stages)), "name")
    assert verified_fingerprint(root, "raw", lambda _: None).conflicts == []
    assert {*inputs_by_hash(root, "raw")} == {"data/sources/d.txt"}
    shutil.rmtree(root / "data/raw")
    restore_outputs(root, "raw")
    assert (root / "data/raw").is_dir()
    restore_outputs(root, "a stage that was removed while it ran")


def test_a_busy_stage_names_the_process_that_runs_it(root: Path) -> None:
    with hold(root, "tok", on_wait=lambda _: None):
        done = run([sys.executable, "small_pipeline.py", "run", "tok"], root)
    assert done.returncode == 1
    assert (
        f"tok is being run by process {os.getpid()} (" in done.stderr
        and "wait for it to end, or stop it" in done.stderr
    )


def test_an_unresolved_merge_in_dvc_lock_is_named(root: Path) -> None:
    text = (root / "dvc.lock").read_text()
    (root / "dvc.lock").write_text(f"<<<<<<< ours\n{text}=======\n{text}>>>>>>> theirs\n")
    done = pedigree(root, "sync")
    assert done.returncode == 2
    assert (
        "dvc.lock has an unresolved merge" in done.stderr
        and "git checkout --ours dvc.lock" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_stage_of_the_users_own_is_shown_and_run_only_by_its_own_command(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = pedigree(root, "sync")  # to the real pipeline, `raw` and `cmp` of this one are such stages
    assert done.returncode == 0, done.stderr
    found = read_stages(root)
    for address in ("raw", "cmp"):
        assert f"{address} is {found[address].version[:8]}" in done.stdout
        assert f"check {address} dvc_in_sync: passed" in done.stdout
    for address, message in (("raw", "`dvc repro raw`"), ("rawest", "unknown stage 'rawest': pipeline.py does not")):
        assert main(["run", address, "--project", str(root)]) == 2
        assert message in capsys.readouterr().err


def test_a_dagster_home_of_another_project_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(root, other, symlinks=True)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "elsewhere"))
    home(root)
    home(root)
    with pytest.raises(InputError, match=f"belongs to the project in {root}") as refusal:
        home(other)
    assert "DAGSTER_HOME" in refusal.value.hint and str(other / ".dagster") in refusal.value.hint
    shutil.rmtree(root)
    home(other)  # nobody's any more


def test_a_dagster_home_is_the_folder_that_dagster_uses(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no shell replaces the ~, as in a file of variables."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DAGSTER_HOME", "~/dagster")
    assert home(root) == dagster_home(root)
    with dg.DagsterInstance.get() as found:
        assert found.root_directory == str(home(root)) and not (root / "~").exists()


def test_a_dagster_home_that_is_named_through_a_link_is_that_of_the_project(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(root)
    monkeypatch.setenv("DAGSTER_HOME", str(link / ".dagster"))
    home(root)
    assert (root / ".dagster" / "pedigree_project").read_text() == f"{root}\n"
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "elsewhere"))
    home(link)
    home(root)


def test_schedule_and_freshness_are_examples_that_are_off(root: Path) -> None:
    from dagster_project.orchestration.dagster.home import DAGSTER_YAML

    definitions = build_definitions(root, small_pipeline.PIPELINE)
    assert [s.default_status for s in definitions.schedules] == [dg.DefaultScheduleStatus.STOPPED]
    assert "freshness: {enabled: false}" in DAGSTER_YAML
    assert {job.name for job in definitions.jobs} == {"pipeline", "data", "variant_lora", "variant_dora"}
