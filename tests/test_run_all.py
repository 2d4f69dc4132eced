"""`pedigree run --all --jobs N`: the results and records of `dvc repro`, with
independent stages at once. On the small pipeline."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from builders import small_pipeline
from builders.commands import exit_code
from builders.small_pipeline import dvc_yaml, gone, start_until_both_adapters_run
from conftest import dvc, edit_params, run
from ruamel.yaml import YAML

from dagster_project.__main__ import main
from dagster_project.core.errors import InputError
from dagster_project.core.records import write_json
from dagster_project.orchestration.durations import SECONDS
from dagster_project.orchestration.dvc import Input, StageState, read_stages
from dagster_project.orchestration.run_all import Outcome, RunAll, Running, as_text, parents, reproduce_one

BOTH = {"adapter@lora", "adapter@dora"}


def run_all(root: Path, jobs: int = 2, *flags: str) -> dict[str, Any]:
    done = run([sys.executable, "small_pipeline.py", "run-all", str(jobs), *flags], root)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def outcomes(document: dict[str, Any]) -> dict[str, str]:
    return {address: stage["outcome"] for address, stage in document["stages"].items()}


def lock(root: Path) -> Any:
    return YAML(typ="safe").load((root / "dvc.lock").read_text())


def files(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in (root / "data").rglob("*")
        if p.is_file() and "pages" not in p.parts
    }


@pytest.mark.usefixtures("warm_small")
def test_a_stage_of_the_users_own_is_run_and_then_restored(root: Path) -> None:
    """Its command takes no lock of Pedigree."""
    text = json.loads((root / "dvc.yaml").read_text())
    text["stages"]["own"] = {"cmd": "cp data/tok/test.txt own.txt", "deps": ["data/tok"], "outs": ["own.txt"]}
    (root / "dvc.yaml").write_text(json.dumps(text))
    assert {address for address, outcome in outcomes(run_all(root)).items() if outcome == "run"} == {"own"}
    (root / "own.txt").unlink()
    assert outcomes(run_all(root))["own"] == "restored"


@pytest.mark.long
@pytest.mark.usefixtures("warm_small")
def test_it_gives_the_files_and_records_of_dvc_repro_and_runs_nothing_else(root: Path, tmp_path: Path) -> None:
    (root / "data/sources/g.txt").write_text("r5")
    (root / "data/sources/d.txt").unlink()
    (root / "data/sources/d.txt").write_text("d5")  # edited, not added: `dvc repro` records it
    shutil.copytree(root, tmp_path / "other", symlinks=True)
    assert dvc(tmp_path / "other", "repro").returncode == 0
    document = run_all(root)
    assert set(outcomes(document).values()) == {"run"} and document["passed"]
    assert not [stage for stage in document["stages"].values() if "forced" in stage["why"]]
    assert files(root) == files(tmp_path / "other") and lock(root) == lock(tmp_path / "other")
    assert small_pipeline.changed_in_dvc(root) == set()
    assert set(outcomes(run_all(root)).values()) == {"up to date"}
    (root / "data/sources/g.txt").write_text("r0")
    (root / "data/sources/d.txt").write_text("d0")
    assert set(outcomes(run_all(root)).values()) == {"restored"}, "these inputs have run before"
    ran = len(small_pipeline.commands_run(root))
    before = (files(root), lock(root))
    forced = run_all(root, 1, "--force")
    assert set(outcomes(forced).values()) == {"run"} and forced["stages"]["cmp"]["why"] == ["forced"]
    assert len(small_pipeline.commands_run(root)) == ran + 6 and (files(root), lock(root)) == before


@pytest.mark.usefixtures("warm_small")
def test_after_a_failure_nothing_is_started_and_what_runs_is_finished_and_recorded(root: Path) -> None:
    values = json.loads((root / "params.yaml").read_text())
    values["variants"] = {"dora": {"r": 0}, "lora": {"r": 4}}  # r 0: the command of this variant fails
    (root / "params.yaml").write_text(json.dumps(values))
    document = run_all(root)
    assert not document["passed"]
    assert outcomes(document) == {
        "raw": "up to date",
        "inst": "up to date",
        "tok": "up to date",
        "adapter@dora": "failed",
        "adapter@lora": "run",
        "cmp": "not started",
    }
    assert "adapter@dora failed" in document["stages"]["adapter@dora"]["error"]
    assert small_pipeline.changed_in_dvc(root) == {"adapter@dora", "cmp"}
    (root / "data/sources/d.txt").unlink()
    done = run([sys.executable, "small_pipeline.py", "run-all", "2"], root)
    assert "data/sources/d.txt is missing" in done.stderr and not done.stdout


def test_an_interrupt_ends_every_process_and_loses_nothing(root: Path) -> None:
    before = {path: content for path, content in files(root).items() if path.startswith("data/adapter")}
    process, pids = start_until_both_adapters_run(root, "small_pipeline.py", "run-all", "2")
    everything = {child.pid for child in psutil.Process(process.pid).children(recursive=True)} | set(pids.values())
    process.send_signal(signal.SIGTERM)  # the same as Ctrl-C
    output, _ = process.communicate(timeout=60)
    assert gone(everything, 5)
    assert outcomes(json.loads(output))["cmp"] == "not started"
    assert {address for address, outcome in outcomes(json.loads(output)).items() if outcome == "interrupted"} == BOTH
    assert {path: content for path, content in files(root).items() if path.startswith("data/adapter")} == before
    assert dvc(root, "repro").returncode == 0, "no lock is left"


def test_a_stage_that_the_system_kills_says_so_with_the_next_step(root: Path) -> None:
    process, pids = start_until_both_adapters_run(root, "small_pipeline.py", "run-all", "2", SLOW_SECONDS="5")
    os.kill(pids["adapter@lora"], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    error = json.loads(output)["stages"]["adapter@lora"]["error"]
    assert re.search(r"exited with (-9|137)", error), "137 where the shell that DVC starts waits for the command"
    assert "as the system does when memory runs out" in error
    assert "its own message above" not in error, "it could not write any"


@pytest.mark.long
@pytest.mark.parametrize("victim", ["whole", "one stage"])
def test_after_a_kill_no_process_is_left_and_the_next_run_recovers(root: Path, victim: str) -> None:
    process, pids = start_until_both_adapters_run(root, "small_pipeline.py", "run-all", "2", SLOW_SECONDS="5")
    everything = {child.pid for child in psutil.Process(process.pid).children(recursive=True)} | set(pids.values())
    if victim == "whole":
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        assert gone(everything, 20)
        assert small_pipeline.changed_in_dvc(root) == {*BOTH, "cmp"}, "DVC had removed their outputs"
    else:
        command = psutil.Process(pids["adapter@lora"])
        next(parent for parent in command.parents() if "multiprocessing" in " ".join(parent.cmdline())).kill()
        output, _ = process.communicate(timeout=120)
        assert gone(everything, 10)
        found = outcomes(json.loads(output))
        assert (found["adapter@lora"], found["adapter@dora"], found["cmp"]) == ("failed", "run", "not started")
        return
    assert run_all(root)["passed"]
    assert small_pipeline.changed_in_dvc(root) == set()


def test_while_a_file_is_invalid_nothing_is_started_and_what_runs_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def invalid() -> Any:
        raise InputError("dvc.yaml is invalid")

    def running(alive: bool) -> Any:
        sentinel, other = os.pipe()
        if not alive:
            os.close(other)
        process = SimpleNamespace(sentinel=sentinel, is_alive=lambda: alive, join=lambda: None)
        result = SimpleNamespace(poll=lambda: True, recv=lambda: {"outcome": "restored"}, close=lambda: None)
        return Running(process, result, threading.Thread(target=int), 0, [])  # type: ignore[arg-type]

    monkeypatch.setattr(threading.Thread, "join", lambda *_: None)
    whole = RunAll(tmp_path, 2, False)
    whole.states = dict.fromkeys("abc")  # type: ignore[assignment]
    whole.running = {"a": running(False), "b": running(True)}
    monkeypatch.setattr(whole, "_read", invalid)
    whole._wait()
    assert (*whole.running,) == ("b",) and whole.outcomes["a"].outcome == "restored"
    assert whole._stopped, "c is not started"
    whole.running["b"] = running(False)
    monkeypatch.setattr(whole, "_read", dict)
    whole._wait()
    assert not whole.running and not whole._stopped
    whole.running = {"c": running(False)}
    monkeypatch.setattr(whole, "_read", invalid)
    with pytest.raises(InputError):
        whole._wait()


def test_two_at_once_share_the_work_and_run_nothing_twice(root: Path) -> None:
    ran = len(small_pipeline.commands_run(root))
    (root / "code/adapter.py").write_text("V = 77\n")
    both = [
        subprocess.Popen(
            [sys.executable, "small_pipeline.py", "run-all", "2"],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=300)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sorted(small_pipeline.commands_run(root)[ran:]) == ["adapter@dora", "adapter@lora", "cmp"]


@pytest.mark.usefixtures("warm_small")
def test_stages_that_are_up_to_date_count_neither_as_queued_nor_in_the_time_left(root: Path) -> None:
    """Of two variants one is edited. The other one, whose last run took an hour, is not run again."""
    for address, seconds in {"adapter@lora": 60.0, "adapter@dora": 3600.0, "cmp": 30.0}.items():
        write_json(root / SECONDS / "local" / f"{address}.json", {"seconds": seconds})
    edit_params(root, lambda values: values["variants"]["lora"].update(r=9))
    done = run([sys.executable, "small_pipeline.py", "run-all", "1"], root)
    assert outcomes(json.loads(done.stdout)) == {
        **dict.fromkeys(["raw", "inst", "tok", "adapter@dora"], "up to date"), "adapter@lora": "run", "cmp": "run"
    }  # fmt: skip
    [shown] = re.findall(r"adapter@lora: started .*\. (1 running, .*)", done.stderr)
    assert re.fullmatch(r"1 running, 1 queued, about 1:[0-3]\d left if all run, by the last runs", shown)


def test_a_stage_waits_for_those_whose_report_it_reads(root: Path) -> None:
    assert parents(read_stages(root)) == {
        "raw": set(),
        "inst": {"raw"},
        "tok": {"inst"},
        "adapter@lora": {"tok"},
        "adapter@dora": {"tok"},
        "cmp": {"tok", *BOTH},
    }
    text = json.loads((root / "dvc.yaml").read_text())
    text["stages"]["tok"]["deps"].append("data/reports/raw.json")
    (root / "dvc.yaml").write_text(json.dumps(text))
    assert parents(read_stages(root))["tok"] == {"inst", "raw"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "STAGE or --all is required"),
        (["run", "--all", "splits"], "--all cannot be combined with splits"),
        (["run", "--jobs", "2", "splits"], "require --all"),
        (["run", "--all", "--jobs", "0"], "not a whole number from 1"),
    ],
)
def test_wrong_usage_is_refused_with_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 2 and message in capsys.readouterr().err


def test_bad_parameters_are_refused_before_anything_runs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace('"splits"', '"split"'))
    assert main(["run", "--all", "--json", "--project", str(project)]) == 2
    captured = capsys.readouterr()
    assert "split: unknown section" in captured.err and "split: unknown section" in json.loads(captured.out)["error"]
    assert not (project / "dvc.lock").exists()


@pytest.mark.usefixtures("warm_small")
def test_a_missing_source_is_refused_before_an_edited_one_is_recorded(root: Path) -> None:
    for name in ("a.txt", "z.txt"):
        (root / "data/sources" / name).write_text(name)
        assert dvc(root, "add", "-q", f"data/sources/{name}").returncode == 0
    let_raw_read(root, "data/sources/a.txt", "data/sources/z.txt")
    names = sorted(path.name for path in (root / "data/sources").glob("*.dvc"))
    for name in names[:-1]:
        path = root / "data/sources" / name.removesuffix(".dvc")
        path.unlink()
        path.write_text("edited")
    (root / "data/sources" / names[-1].removesuffix(".dvc")).unlink()
    before = {name: (root / "data/sources" / name).read_bytes() for name in names}
    with pytest.raises(InputError, match="is missing"):
        RunAll(root, 1, False).run()
    assert len(names) == 3 and {name: (root / "data/sources" / name).read_bytes() for name in names} == before


@pytest.mark.usefixtures("warm_small")
def test_a_file_under_dvc_that_no_stage_reads_may_be_missing_and_its_edits_are_not_recorded(root: Path) -> None:
    for name in ("edited.bin", "missing.bin"):
        (root / name).write_text("old")
        assert dvc(root, "add", "-q", name).returncode == 0
    (root / "missing.bin").unlink()
    (root / "edited.bin").unlink()
    (root / "edited.bin").write_text("new")
    before = (root / "edited.bin.dvc").read_bytes()
    assert {*(one.outcome for one in RunAll(root, 1, False).run().values())} == {"up to date"}, "as for `dvc repro`"
    assert (root / "edited.bin.dvc").read_bytes() == before


@pytest.mark.usefixtures("warm_small")
def test_stages_of_a_pipeline_in_a_subfolder_are_named_if_they_are_not_up_to_date(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`dvc repro` would run them."""
    caplog.set_level("WARNING")
    (root / "prepare").mkdir()
    (root / "prepare/in.txt").write_text("one")
    stage = {"cmd": "cp in.txt out.txt", "deps": ["in.txt"], "outs": ["out.txt"]}
    (root / "prepare/dvc.yaml").write_text(json.dumps({"stages": {"clean": stage}}))
    let_raw_read(root, "prepare/out.txt")
    assert dvc(root, "repro", "-q").returncode == 0
    RunAll(root, 1, False).run()
    assert "only `dvc repro` runs them" not in caplog.text
    (root / "prepare/in.txt").write_text("two")
    RunAll(root, 1, False).run()
    assert "only `dvc repro` runs them: prepare/dvc.yaml:clean" in caplog.text


def let_raw_read(root: Path, *paths: str) -> None:
    text = json.loads((root / "dvc.yaml").read_text())
    text["stages"]["raw"]["deps"] += paths
    (root / "dvc.yaml").write_text(json.dumps(text))


def test_a_stage_has_the_environment_of_who_asks_and_not_that_of_the_first_who_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server that forks its process began before the variable was set."""
    monkeypatch.delenv("PROBE", raising=False)
    context = multiprocessing.get_context("forkserver")
    first = context.Process(target=int)
    first.start()
    first.join()
    small_pipeline.commit_project(tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages:\n  probe:\n    cmd: printenv PROBE > out\n    outs: [out]\n")
    monkeypatch.setenv("PROBE", "here")
    answer = answer_of(tmp_path, "probe")
    assert "error" not in answer, answer
    assert (tmp_path / "out").read_text() == "here\n"


def answer_of(root: Path, address: str) -> dict[str, str]:
    """What the process of one stage sends."""
    context = multiprocessing.get_context("forkserver")
    (_, send_log), (receive, send) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    given = (root, address, False, os.getpid(), time.time(), {**os.environ}, send_log, send)
    process = context.Process(target=reproduce_one, args=given)
    process.start()
    send.close()
    answer = receive.recv()
    process.join()
    return dict(answer)


def test_an_error_of_the_operating_system_in_the_process_of_a_stage_is_its_error(tmp_path: Path) -> None:
    table = tmp_path / ".dvc/tmp/rwlock"
    table.mkdir(parents=True)
    answer = answer_of(tmp_path, "probe")
    assert answer["outcome"] == "failed" and answer["error"].startswith(f"{table}: Is a directory"), answer


def test_nothing_is_started_after_a_stage_was_interrupted_by_someone_else(tmp_path: Path) -> None:
    whole = RunAll(tmp_path, 1, False)
    unchanged: Any = SimpleNamespace(changed=[], frozen=False, as_recorded=True)
    whole.states, whole.above = {"a": unchanged, "b": unchanged}, {"a": set(), "b": {"a"}}
    for outcome, after in (("interrupted", {}), ("run", {"b": Outcome("up to date")})):
        whole.outcomes = {"a": Outcome(outcome)}
        whole._start_ready()
        assert whole.outcomes == {"a": Outcome(outcome), **after}
    document = {
        "stages": {"a": {"outcome": "interrupted"}},
        "seconds": 1.0,
        "jobs": 1,
        "interrupted": False,
        "passed": False,
    }
    assert "stopped: a was interrupted. Finished stages are kept; run the command again." in as_text(document)


def test_the_reasons_name_what_changed(root: Path) -> None:
    edit_params(root, lambda values: values["variants"]["lora"].update(r=9))
    (root / "code/tok.py").write_text("V = 2\n")
    (root / "dvc.yaml").write_text(dvc_yaml(note=" --note"))
    report = root / "data/reports/adapter/dora.json"
    report.write_text(report.read_text() + " ")
    changed = {address: state.changed for address, state in read_stages(root).items() if state.changed}
    assert changed == {
        "inst": ["command changed"],
        "tok": ["code/tok.py changed"],
        "adapter@lora": ["parameter variants.lora changed"],
        "adapter@dora": ["data/reports/adapter/dora.json differs from dvc.lock (modified)"],
        "cmp": ["parameter variants changed", "data/reports/adapter changed"],
    }


@pytest.mark.usefixtures("warm_small")
def test_some_stages_are_run_without_those_that_they_read_and_one_that_dvc_yaml_got_meanwhile(root: Path) -> None:
    class Edited(RunAll):
        def _end(self, address: str) -> None:
            pipeline = json.loads((root / "dvc.yaml").read_text())
            own = {"cmd": "cp data/tok/test.txt own.txt", "deps": ["data/tok"], "outs": ["own.txt"]}
            pipeline["stages"] |= {"own": own}
            pipeline["stages"]["cmp"]["deps"].append("own.txt")
            (root / "dvc.yaml").write_text(json.dumps(pipeline))
            super()._end(address)

    edit_params(root, lambda values: values["variants"]["lora"].update(r=9))
    whole = Edited(root, 1, False, only=["adapter@lora", "cmp"], pipeline=small_pipeline.PIPELINE)
    assert {address: one.outcome for address, one in whole.run().items()} == {"adapter@lora": "run", "cmp": "failed"}
    whole = RunAll(root, 1, False, only=["own", "cmp"], pipeline=small_pipeline.PIPELINE)
    assert {address: one.outcome for address, one in whole.run().items()} == {"own": "run", "cmp": "run"}


def test_an_output_of_which_several_parts_changed_is_one_reason() -> None:
    """`aligned` reads two folders in data/splits."""
    inputs = tuple(Input("splits", "data/splits", "new", "old") for _ in range(2))
    given = {"recorded": True, "inputs": inputs, "definition_changes": ()}
    assert StageState(**{**dict.fromkeys(StageState.__dataclass_fields__), **given}).changed == ["data/splits changed"]
