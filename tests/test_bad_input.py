"""Bad input gives exit code 2 and one message with place and next step, and changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from builders.servers import free_ports
from conftest import dvc, edit_params, pedigree, run

from dagster_project.__main__ import main
from dagster_project.orchestration.dagster.assets import build_definitions
from dagster_project.orchestration.dagster_dvc.keys import asset_key

forked = pytest.mark.usefixtures("warm_small")
"""For tests of what changes in a project. What a command prints is also tested with processes that are started."""


def fingerprint(root: Path) -> dict[str, str]:
    """Every artifact, dvc.lock and the reports, by content."""
    paths = [p for p in (root / "data").rglob("*") if p.is_file() and "sources" not in p.parts] + [root / "dvc.lock"]
    return {str(path): hashlib.md5(path.read_bytes()).hexdigest() for path in paths}


def source(name: str):
    return lambda v: v["raw_examples"].update(sources=[{"path": name}])


CASES = {
    "missing source file": (source("data/sources/nowhere.json"), "data/sources/nowhere.json does not exist"),
    "source outside the project": (source("../elsewhere.json"), "is outside the project"),
    "source where DVC does not look": (source("params.yaml"), "is not inside data/sources/"),
    "unknown format": (lambda v: v["raw_examples"]["sources"][0].update(format="csvish"), "unknown format 'csvish'"),
    "unknown key": (lambda v: v["splits"].update(tset=0.1), "splits.tset: unknown key"),
    "unknown section": (lambda v: v.update(spilts={}), "spilts: unknown section"),
    "wrong type": (lambda v: v["splits"].update(test="a fifth"), "splits.test"),
    "unknown method": (lambda v: v["adapter"]["lora"].update(method="lroa"), "unknown method 'lroa'"),
    "misspelt method key": (
        lambda v: v["adapter"]["lora"]["peft"].update(rank=4),
        "adapter.lora.peft.rank: unknown key of lora",
    ),
}


def stage_of(case: str) -> str:
    """The stage that reads the bad parameter."""
    return "adapter@lora" if "method" in case else "splits" if "splits" in CASES[case][1] else "raw_examples"


@pytest.mark.parametrize("case", CASES)
def test_bad_parameters_change_nothing(finished: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = CASES[case]
    before = fingerprint(finished)
    edit_params(finished, change)
    assert main(["run", stage_of(case), "--project", str(finished)]) == 2
    said = capsys.readouterr().err
    assert message in said and "hint: " in said
    assert fingerprint(finished) == before


@pytest.mark.parametrize(
    ("front_end", "case"),
    [
        *(("dvc repro", case) for case in ("missing source file", "wrong type", "unknown method")),
        ("pedigree run", "unknown key"),
    ],
)
def test_a_command_with_bad_parameters_changes_nothing(finished: Path, case: str, front_end: str) -> None:
    """A stage of each kind, and each front end; with the other parameters the same commands run."""
    change, message = CASES[case]
    before = fingerprint(finished)
    edit_params(finished, change)
    stage = stage_of(case)
    done = (
        pedigree(finished, "run", stage)
        if front_end == "pedigree run"
        else dvc(finished, "repro", "--single-item", "--force", stage)
    )
    assert done.returncode == 2 if front_end == "pedigree run" else done.returncode != 0
    assert message in done.stderr and "hint: " in done.stderr and "Traceback" not in done.stderr
    assert fingerprint(finished) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file has no rows"),
        ("instruction,output\n", "not JSON"),
        ("[]", "the list is empty"),
        ('[{"a": 1}]', "unknown format"),
    ],
)
def test_a_source_that_cannot_be_read_changes_nothing(
    finished: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "data/sources/mine.json").write_text(content)
    edit_params(finished, source("data/sources/mine.json"))
    before = fingerprint(finished)
    assert main(["run", "raw_examples", "--project", str(finished)]) == 2
    said = capsys.readouterr().err
    assert message in said and "mine.json" in said
    assert fingerprint(finished) == before


@forked
def test_dvc_repro_of_a_source_that_cannot_be_read_changes_nothing(finished: Path) -> None:
    (finished / "data/sources/mine.json").write_text("[]")
    edit_params(finished, source("data/sources/mine.json"))
    before = fingerprint(finished)
    done = dvc(finished, "repro", "raw_examples")
    assert done.returncode != 0
    assert "the list is empty" in done.stderr and "mine.json" in done.stderr and "Traceback" not in done.stderr
    assert fingerprint(finished) == before


@forked
def test_bad_parameters_leave_dagsters_event_log_without_a_materialization(
    finished: Path, synced_finished: dg.DagsterInstance
) -> None:
    instance = synced_finished
    definitions = build_definitions(finished)
    edit_params(finished, lambda v: v["splits"].update(tset=0.1))
    before = fingerprint(finished), instance.get_latest_materialization_event(asset_key("splits"))
    result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance, asset_selection=[asset_key("splits")], raise_on_error=False
    )
    assert not result.success
    failure = next(e for e in result.all_events if e.event_type_value == "STEP_FAILURE")
    assert "splits.tset: unknown key" in failure.event_specific_data.user_failure_data.description
    assert (fingerprint(finished), instance.get_latest_materialization_event(asset_key("splits"))) == before


@forked
def test_a_base_model_with_another_sha256_is_refused_and_the_old_one_stays(finished: Path) -> None:
    edit_params(finished, lambda v: v["base_model"].update(sha256={"model.safetensors": "0" * 64}))
    before = fingerprint(finished)
    done = dvc(finished, "repro", "base_model")
    assert done.returncode != 0
    assert "sha256 of model.safetensors is" in done.stderr
    assert fingerprint(finished) == before


@forked
def test_an_input_that_its_producer_did_not_record_is_refused(finished: Path) -> None:
    (finished / "data/instructions/records-00000.parquet").unlink()
    done = pedigree(finished, "run", "splits")
    assert done.returncode == 1
    assert "data/instructions is not what instructions recorded in dvc.lock" in done.stderr


def test_a_dagster_home_that_cannot_be_written_is_named(finished: Path) -> None:
    (finished / "file").write_text("")
    done = run(
        [sys.executable, "-m", "dagster_project", "sync"], finished, DAGSTER_HOME=str(finished / "file" / "home")
    )
    assert done.returncode == 2
    assert "is not writable" in done.stderr and "DAGSTER_HOME" in done.stderr


def test_a_taken_port_is_named(finished: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = pedigree(finished, "ui", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "cannot listen on 127.0.0.1:" in done.stderr and "--port" in done.stderr


def test_a_ui_that_is_refused_prints_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("dvc.yaml", "file"):
        (tmp_path / name).write_text("")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "file" / "home"))
    ports = [str(port) for port in free_ports(2)]
    arguments = ["--port", ports[0], "--pages-port", ports[1], "--project", str(tmp_path)]
    assert main(["ui", "--json", *arguments]) == 2
    assert "is not writable" in json.loads(capfd.readouterr().out)["error"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "nostage"],
        ["run", "adapter"],
        ["run", "splits@lora"],
        ["audit", "nothing"],
        ["plan", "ghost"],
        ["check", "none.json"],
    ],
)
def test_wrong_usage_gets_a_hint_and_exit_code_2(
    finished: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--project", str(finished)]) == 2
    said = capfd.readouterr()
    assert said.out == "" and "hint: " in said.err


def test_a_command_outside_a_project_is_refused(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "dagster_project", "audit", "x"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "no dvc.yaml in" in done.stderr


@pytest.mark.long
@forked
def test_json_output_is_exactly_one_document(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The file descriptor of stdout is read, so what libraries print counts too."""
    for arguments in (["audit", "merged@lora"], ["plan"], ["check", str(finished / "data/sources/triage_alpaca.json")]):
        main([*arguments, "--json", "--project", str(finished)])
        assert isinstance(json.loads(capfd.readouterr().out), dict), arguments
    for arguments in (["sync"], ["run", "splits"]):
        done = pedigree(finished, *arguments, "--json")
        assert isinstance(json.loads(done.stdout), dict), arguments
