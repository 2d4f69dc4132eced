"""DVC experiments run the pipeline's own commands, with their own parameters
and metrics, and rerun only what they change."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from builders import small_pipeline
from conftest import dvc
from dvc.repo.experiments.exceptions import UnresolvedExpNamesError
from kombu.exceptions import ChannelError
from ruamel.yaml import YAML
from scmrepo.exceptions import SCMError

from dagster_project.__main__ import main
from dagster_project.commands.sweep import _refuse_untracked
from dagster_project.core.errors import InputError
from dagster_project.core.layout import RECORD_KEY
from dagster_project.orchestration import experiments
from dagster_project.orchestration.dvc import read_stages
from dagster_project.orchestration.experiments import Trial, choices, is_temporary, trials


def ran(root: Path) -> list[str]:
    return [json.loads(line)["stage"] for line in (root / small_pipeline.LOG).read_text().splitlines()]


@pytest.mark.long
@pytest.mark.usefixtures("warm_small")
def test_two_experiments_show_parameters_and_metrics_and_rerun_only_their_variant(tmp_path: Path) -> None:
    root = small_pipeline.make_project(tmp_path / "project")
    assert dvc(root, "repro", "-q").returncode == 0
    small_pipeline.commit(root, "run")
    before, board = len(ran(root)), (root / "data/cmp/board.txt").read_text()
    for point in (["--temp", "-S", "variants.lora.r=2"], ["-S", "variants.lora.r=4"]):
        done = dvc(root, "exp", "run", *point)
        assert done.returncode == 0, done.stderr + done.stdout
        if "--temp" in point:
            assert (len(ran(root)), (root / "data/cmp/board.txt").read_text()) == (
                before,
                board,
            ), "it leaves the workspace alone"
    assert ran(root)[before:] == ["adapter@lora", "cmp"]
    assert dvc(root, "status", "-q").returncode == 0

    _, head = json.loads(dvc(root, "exp", "show", "--json").stdout)
    shown: list[dict[str, Any]] = [head["data"], *(experiment["revs"][0]["data"] for experiment in head["experiments"])]
    points = [
        (
            one["params"]["params.yaml"]["data"]["variants"]["lora"]["r"],
            one["metrics"]["data/reports/adapter/lora.json"]["data"]["loss"],
        )
        for one in shown
    ]
    assert points[0] == (8, 1 / 8) and set(points) == {(8, 1 / 8), (4, 1 / 4), (2, 1 / 2)}
    assert {one["params"]["params.yaml"]["data"]["variants"]["dora"]["r"] for one in shown} == {16}


def sweep(root: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "small_pipeline.py", "sweep", *arguments],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.long
@pytest.mark.usefixtures("warm_small")
def test_a_sweep_runs_every_combination_and_its_table_is_that_of_dvc_exp_show(root: Path) -> None:
    before = len(ran(root))
    state = (root / "params.yaml").read_text(), (root / "dvc.lock").read_text(), small_pipeline.changed_in_dvc(root)
    output, errors = sweep(root, "variants.lora", "2", "r=2,4,0").communicate(timeout=300)
    document = json.loads(output)
    assert not document["passed"] and document["target"] == "adapter@lora"
    found = {trial["params"]["r"]: (trial["status"], trial["metrics"].get("loss")) for trial in document["trials"]}
    assert found == {2: ("success", 1 / 2), 4: ("success", 1 / 4), 0: ("failed", None)}, errors
    assert "ZeroDivisionError" in errors, "the log of a failed trial is shown"
    state_after = (
        (root / "params.yaml").read_text(),
        (root / "dvc.lock").read_text(),
        small_pipeline.changed_in_dvc(root),
    )
    assert (len(ran(root)), state_after) == (before, state), "it leaves the workspace alone"
    _, head = json.loads(dvc(root, "exp", "show", "--json").stdout)
    shown = {one["name"]: one["revs"][0] for one in head["experiments"]}
    for trial in document["trials"]:
        data = shown[trial["name"]]["data"]
        assert data["params"]["params.yaml"]["data"]["variants"]["lora"]["r"] == trial["params"]["r"]
        if trial["status"] == "success":
            assert data["metrics"]["data/reports/adapter/lora.json"]["data"]["loss"] == trial["metrics"]["loss"]
    best = min((trial for trial in document["trials"] if trial["metrics"]), key=lambda trial: trial["metrics"]["loss"])
    assert dvc(root, "exp", "apply", best["name"]).returncode == 0
    assert YAML(typ="safe").load((root / "params.yaml").read_text())["variants"]["lora"]["r"] == 4
    assert "adapter@lora" not in small_pipeline.changed_in_dvc(root)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_sweep_ends_its_trials_and_empties_the_queue(number: signal.Signals, root: Path) -> None:
    os.environ["SLOW"] = "adapter"
    try:
        process = sweep(root, "variants.lora", "2", "r=2,3,4")
    finally:
        del os.environ["SLOW"]
    commands: set[int] = set()
    until = time.monotonic() + 120
    while len(commands) < 2 and time.monotonic() < until and process.poll() is None:
        commands = {
            entry["pid"]
            for log in root.glob(".dvc/tmp/exps/tmp*/runs.log")
            for entry in map(json.loads, log.read_text().splitlines())
            if psutil.pid_exists(entry["pid"])
        }
        time.sleep(0.2)
    assert len(commands) == 2, "two trials run at once"
    assert not is_temporary(root) and all(is_temporary(log.parent) for log in root.glob(".dvc/tmp/exps/tmp*/runs.log"))
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    until = time.monotonic() + 60
    while any(map(psutil.pid_exists, commands)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not any(map(psutil.pid_exists, commands))
    logs = [path.read_text() for path in root.glob(".dvc/tmp/exps/run/*/*.out")]
    assert len([text for text in logs if "KeyboardInterrupt" in text]) == 2, (
        "a driver that is killed could not stop its job on a cluster"
    )
    document = json.loads(output)
    assert document["interrupted"] and {trial["status"] for trial in document["trials"]} == {"canceled"}, errors
    assert not [trial for trial in trials(root).values() if trial.status in {"Queued", "Running"} and trial.alive]


@pytest.mark.long
@pytest.mark.parametrize(
    "tracked", ["data/keys/.gitkeep", "README.md"], ids=["its folder is in git", "its folder is not"]
)
def test_a_trial_has_the_key_that_git_ignores(root: Path, tracked: str) -> None:
    (root / RECORD_KEY).parent.mkdir(parents=True)
    (root / RECORD_KEY).write_text("secret")
    (root / tracked).touch()
    with (root / ".gitignore").open("a") as file:
        file.write(f"\n/{RECORD_KEY}\n")
    pipeline = json.loads((root / "dvc.yaml").read_text())
    pipeline["stages"]["needs_key"] = {
        "cmd": f"grep secret {RECORD_KEY} > found.txt",
        "params": ["testseed"],
        "outs": ["found.txt"],
    }
    (root / "dvc.yaml").write_text(json.dumps(pipeline))
    small_pipeline.commit(root, "a key")
    experiments.queue(root, "one", ["testseed=77"], "needs_key")
    experiments.start_workers(root, 1)
    until = time.monotonic() + 120
    while trials(root)["one"].status not in {"Success", "Failed"} and time.monotonic() < until:
        time.sleep(1)
    assert trials(root)["one"].status == "Success"
    assert RECORD_KEY not in small_pipeline.git(
        root, "ls-tree", "-r", "--name-only", experiments.trials(root)["one"].rev
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapter.lora", "-S", "learning_rte=1e-3,2e-3"], "adapter.lora.learning_rte"),
        (["adapter.lora", "-S", "learning_rate=1e-3,fast"], "adapter.lora.learning_rate"),
        (["adapter.lora", "-S", "peft.r=8,-1"], "adapter.lora.peft.r"),
        (["adapter.lora", "-S", "learning_rate"], "write -S KEY=VALUE"),
        (["adapter.lora", "-S", "learning_rate=[1,2"], "-S learning_rate=[1,2"),
        (["adapter.lora"], "no parameter to vary"),
        (["adapter.nobody", "-S", "learning_rate=1e-3"], "params.yaml has no adapter.nobody"),
        (["adapter.nobody", "-S", "learning_rate=1e-3"], "hint: variants: adapter.lora, aligned.dpo; other sections: "),
        (["adapter.lora", "-S", "learning_rate=1e-3", "--to", "nowhere"], "nowhere is not a stage"),
        (["compute", "-S", "seed=1,2"], "compute is not a stage"),
        (["adapter.lora", "-S", "learning_rate=1e-3,1e-3"], "a value is given twice"),
        (["adapter.lora", "-S", "learning_rate=1e-3", "-S", "learning_rate=2e-3"], "given twice"),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_is_queued(
    project: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *arguments, "--project", str(project), "--json"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and json.loads(captured.out)["error"] in captured.err
    assert not (project / ".dvc/tmp/exps").exists()


@pytest.mark.usefixtures("warm_small")
def test_an_occupied_queue_is_refused(root: Path) -> None:
    assert dvc(root, "exp", "run", "--queue", "--name", "mine", "-S", "variants.lora.r=9").returncode == 0
    process = sweep(root, "variants.lora", "1", "r=2")
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and not output and "not empty: mine" in errors


@pytest.mark.usefixtures("warm_small")
def test_a_sweep_is_refused_where_dvc_cannot_write_the_path_of_its_cache(root: Path) -> None:
    elsewhere = root.rename(root.with_name("größe"))
    process = sweep(elsewhere, "variants.lora", "1", "r=2")
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and not output and "größe/.dvc/cache: letters of this path are not ASCII" in errors
    assert not (elsewhere / ".dvc/tmp/exps").exists()
    assert dvc(elsewhere, "cache", "dir", "--local", str(root.with_name("cache"))).returncode == 0
    experiments.refuse_cache_path(elsewhere)


@pytest.mark.usefixtures("warm_small")
def test_a_sweep_is_refused_where_git_does_not_track_what_its_trials_would_read(root: Path) -> None:
    text = json.loads((root / "dvc.yaml").read_text())
    text["stages"]["raw"]["deps"] += ["data/sources/new.txt", "data/sources/large.txt"]
    text["stages"]["cmp"]["deps"].append("data/sources/later.txt")
    (root / "dvc.yaml").write_text(json.dumps(text))
    for name in ("new", "large", "later"):
        (root / f"data/sources/{name}.txt").write_text(name)
    assert dvc(root, "add", "-q", "data/sources/large.txt").returncode == 0
    states = read_stages(root)
    with pytest.raises(
        InputError, match=r"git does not track data/sources/large.txt.dvc, data/sources/new.txt: trials"
    ):
        _refuse_untracked(root, [states[name] for name in ("raw", "inst", "tok")])
    small_pipeline.git(root, "add", "data/sources/new.txt", "data/sources/large.txt.dvc")
    _refuse_untracked(root, [states[name] for name in ("raw", "inst", "tok")])
    with pytest.raises(InputError, match=r"git does not track data/sources/later.txt: trials"):
        _refuse_untracked(root, [states["cmp"]])


@pytest.mark.usefixtures("warm_small")
def test_a_sweep_is_refused_where_git_ignores_what_its_trials_would_read_and_dvc_does_not_have_it(root: Path) -> None:
    """The key of record ids and files under DVC travel, and neither DVC nor a stage reads what .dvcignore names."""
    text = json.loads((root / "dvc.yaml").read_text())
    text["stages"]["raw"]["deps"] = ["code/raw.py", "data/sources", "data/keys"]
    text["stages"]["inst"]["deps"].append("data/gone")
    (root / "dvc.yaml").write_text(json.dumps(text))
    with (root / "dvc.lock").open("a") as file:  # a stage that dvc.yaml no longer has
        file.write(
            "  gone:\n    cmd: none\n    outs:\n    - path: data/gone\n      hash: md5\n      md5:"
            " 11a287b8f00c0491239dd0d7897f7a61.dir\n"
        )
    (root / ".dvcignore").write_text(".DS_Store\n")
    for name in (
        RECORD_KEY,
        "data/gone/old.txt",
        "data/sources/large/a.txt",
        "data/sources/.DS_Store",
        "data/sources/private/b.jsonl",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    assert dvc(root, "add", "-q", "data/sources/large").returncode == 0
    with (root / ".gitignore").open("a") as file:
        file.write(f"\n/{RECORD_KEY}\n/data/gone\n.DS_Store\n*.jsonl\n")
    small_pipeline.commit(root, "more sources")
    states = read_stages(root)
    with pytest.raises(InputError, match=r"git ignores data/sources/private/b.jsonl: trials"):
        _refuse_untracked(root, [states[name] for name in ("raw", "inst")])
    small_pipeline.git(root, "add", "--force", "data/sources/private/b.jsonl")
    _refuse_untracked(root, [states[name] for name in ("raw", "inst")])


def test_a_metric_with_the_name_of_a_parameter_is_marked_in_the_table() -> None:
    from dagster_project.commands.sweep import as_text

    shares = [0.2, 0.3]
    trials = [
        {"name": f"t{share}", "status": "success", "params": {"test": share}, "metrics": {"test": round(50 * share)}}
        for share in shares
    ]
    header = as_text({"trials": trials, "target": "splits", "seconds": 1, "jobs": 1}).splitlines()[0]
    assert header.split("  ") == ["trial", "test", "test (report)", "status"]


@pytest.mark.long
@pytest.mark.usefixtures("warm_small")
def test_a_sweep_shows_its_metrics_also_if_there_is_one_trial_and_the_user_commits_meanwhile(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster_project.commands import sweep as module

    start = experiments.start_workers

    def commit_and_start(*arguments: Any) -> None:
        small_pipeline.git(root, "commit", "-q", "--allow-empty", "-m", "meanwhile")
        start(*arguments)

    monkeypatch.setattr(experiments, "start_workers", commit_and_start)
    document = module.sweep(
        root, "variants.lora", ["r=2"], 1, None, small_pipeline.PIPELINE.variants_of, lambda *_: None
    )
    [trial] = document["trials"]
    assert (trial["status"], trial["metrics"]) == ("success", {"loss": 0.5})
    assert f"{trial['name']}: loss 0.5" in module.as_text(document)


def test_an_interrupt_while_dvc_fills_its_queue_empties_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dagster_project.commands import sweep as module

    fill = experiments.queue

    def interrupted(*arguments: Any) -> None:
        fill(*arguments)
        assert len(trials(root)) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "queue", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.sweep(root, "variants.lora", ["r=2,3"], 1, None, small_pipeline.PIPELINE.variants_of, lambda *_: None)
    assert not trials(root)


class Queue:
    """DVC's queue with one waiting experiment, of which the first removals fail."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.waiting = [*errors], True

    def remove(self, names: list[str]) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.waiting = False


def test_an_error_of_a_program_ends_a_cancellation_and_a_change_of_the_queue_at_this_moment_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cancel(queue: Queue) -> None:
        repo = SimpleNamespace(experiments=SimpleNamespace(celery_queue=queue))
        monkeypatch.setattr(experiments.dvc, "open_repo", lambda root: nullcontext(repo))
        monkeypatch.setattr(
            experiments, "trials", lambda root: {"a": Trial("Queued", "0", False)} if queue.waiting else {}
        )
        experiments.cancel(tmp_path, ["a"], 20)

    raced = Queue(
        UnresolvedExpNamesError(["a"]), SCMError("no such entry"), FileNotFoundError("message"), ChannelError("message")
    )
    cancel(raced)
    assert not raced.waiting
    with pytest.raises(TypeError, match="wrong"):
        cancel(Queue(TypeError("wrong")))


STAGE = """
import pathlib, sys, time
file = pathlib.Path(sys.argv[1])
try:
    file.write_text("runs")
    time.sleep(100)
except KeyboardInterrupt:
    file.write_text("interrupted")
"""
TWO_STAGES = """
import os, subprocess, sys, time
for name in ("first", "second"):
    subprocess.run([sys.executable, "stage.py", name], env={**os.environ, "DVC_STAGE": name})
time.sleep(100)
"""


def test_a_trial_that_a_worker_prepares_is_interrupted_when_its_stage_command_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker copies the workspace before the process of the trial exists. That process is killed only when none of
    its stage commands runs, which may have submitted a job, also not one that starts after the first interrupt."""
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "trial.py").write_text(TWO_STAGES)
    preparing, process, killed = [1, 2, 3], list[subprocess.Popen[bytes]](), list[str]()

    def state_of(stage: str) -> str:
        return (tmp_path / stage).read_text() if (tmp_path / stage).is_file() else ""

    def found(root: Path) -> dict[str, Trial]:
        if preparing:
            preparing.pop()
            return {"a": Trial("Running", "0", False)}
        if not process:
            process.append(subprocess.Popen([sys.executable, "trial.py"], cwd=tmp_path))
        until = time.monotonic() + 60
        while not state_of("second" if state_of("first") == "interrupted" else "first"):
            assert time.monotonic() < until
            time.sleep(0.05)
        return {} if killed else {"a": Trial("Running", "0", True, process[0].pid)}

    queue = SimpleNamespace(kill=lambda names, force: killed.extend(names))
    repo = SimpleNamespace(experiments=SimpleNamespace(celery_queue=queue))
    monkeypatch.setattr(experiments.dvc, "open_repo", lambda root: nullcontext(repo))
    monkeypatch.setattr(experiments, "trials", found)
    monkeypatch.setattr(experiments, "workers_alive", lambda root: True)
    try:
        experiments.cancel(tmp_path, ["a"], 60)
        assert killed == ["a"] and state_of("first") == state_of("second") == "interrupted"
    finally:
        process[0].kill()


def test_what_dvc_starts_in_the_background_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nsleep 300 &\necho $!\n")
    program.chmod(0o755)
    monkeypatch.setattr(experiments, "sys", SimpleNamespace(executable=str(program)))
    worker = int(experiments._dvc(tmp_path, "queue", "start"))
    assert psutil.pid_exists(worker), "it still runs, with the output of the command that started it"
    os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("whole", [True, False])
def test_dvc_puts_the_workspace_back_before_an_interrupt_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whole: bool
) -> None:
    """While DVC fills its queue, params.yaml has the values of a trial, and edits of the user are stashed."""
    code = (
        "import os, pathlib, signal, time; file = pathlib.Path('params.yaml'); file.write_text('trial')\n"
        "for _ in range(2): os.kill(os.getppid(), signal.SIGINT); time.sleep(0.7)\n"
        "file.write_text('mine')"
    )
    program = subprocess.Popen
    monkeypatch.setattr(
        experiments.subprocess, "Popen", lambda command, **options: program([sys.executable, "-c", code], **options)
    )
    with pytest.raises(KeyboardInterrupt):
        experiments._dvc(tmp_path, "exp", "run", "--queue", whole=whole)
    assert (tmp_path / "params.yaml").read_text() == ("mine" if whole else "trial")


def test_an_interrupted_sweep_keeps_the_trials_that_finished_unseen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dagster_project.commands.sweep import Trials

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "start_workers", interrupted)
    monkeypatch.setattr(experiments, "cancel", lambda *_: None)
    monkeypatch.setattr(
        experiments, "trials", lambda _: {"a": Trial("Success", "0", False), "b": Trial("Failed", "1", False)}
    )
    sweep = Trials(tmp_path, {"a": {}, "b": {}, "c": {}}, 1)
    assert sweep.run()["interrupted"]
    assert sweep.status == {"a": "Success", "b": "Canceled", "c": "Canceled"}


def test_a_trial_that_has_not_ended_has_no_metrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DVC shows those of the commit from which it started."""
    from dagster_project.commands.sweep import Trials

    shown = {"params": {"params.yaml": {"data": {"a": {"r": 2}}}}, "metrics": {"report.json": {"data": {"loss": 0.1}}}}
    monkeypatch.setattr(experiments, "shown", lambda *_: {"done": shown, "running": shown})
    sweep = Trials(tmp_path, {"done": {"r": 2}, "running": {"r": 2}}, 1)
    sweep.status = {"done": "Success", "running": "Canceled"}
    rows = {row["name"]: row["metrics"] for row in sweep.table("a", "report.json", "0")}
    assert rows == {"done": {"loss": 0.1}, "running": {}}


def test_the_queue_is_read_again_if_a_worker_changes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outcomes: list[Any] = [FileNotFoundError("message"), ChannelError("message"), {"a": Trial("Running", "0", True)}]

    def read(_: Path) -> Any:
        if isinstance(outcome := outcomes.pop(0), Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(experiments, "_trials", read)
    assert trials(tmp_path) == {"a": Trial("Running", "0", True)}


def test_values_are_read_as_dvc_reads_them() -> None:
    assert choices("learning_rate=1e-3,2e-3") == ("learning_rate", [1e-3, 2e-3])
    assert choices("peft.target_modules=[a,b],all-linear") == ("peft.target_modules", [["a", "b"], "all-linear"])
    assert choices("method='x,y'") == ("method", ["x,y"])
    assert choices("bias=null") == ("bias", [None])
    for other in ("++r=4,8", "+r=4", "~r=4", "r@x=4,8"):  # DVC refuses them within a section
        with pytest.raises(InputError, match=f"-S {re.escape(other)}: not KEY=VALUE"):
            choices(other)
