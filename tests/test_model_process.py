"""A question of `pedigree why` whose model another process loads: the answer of one process, its errors, and no process
is left. In real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders.commands import document

from dagster_project.__main__ import main
from dagster_project.commands.model_process import started

QUESTION = ("why", "adapter@x", "--prompt", "Where is my hat?")
ANSWER = ("--answer", "In the blue box.", "--span", "blue")


@pytest.fixture(scope="module")
def trained(_trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(_trained, tmp_path_factory.mktemp("why") / "project", symlinks=True))


def start(root: Path, *arguments: str, nohup: bool = False) -> subprocess.Popen[str]:
    """A question in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "dagster_project", *QUESTION, *arguments], cwd=root, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL),
    )  # fmt: skip


def model_process(command: subprocess.Popen[str]) -> psutil.Process:
    """The process that loads the model, which has just been started."""
    while not (found := psutil.Process(command.pid).children()):
        assert command.poll() is None
        time.sleep(0.005)
    return found[0]


def asked(root: Path, *arguments: str) -> Any:
    command = start(root, *arguments, "--json")
    shown, error = command.communicate(timeout=120)
    assert "Traceback" not in error
    return command.returncode, json.loads(shown), error


def asked_here(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The same question, in this process alone."""
    with started("why", root) as process:
        assert process is None, "it has threads"
    code = main([*QUESTION, *arguments, "--json", "--project", str(root)])
    return code, document(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        (*ANSWER, "--top", "28"),
        ("--answer", "In the red box.", "--system", "Be brief."),
        (*ANSWER, "--checkpoints", "3"),
        (*ANSWER[:3], "purple"),  # not in the answer
        ("--answer", "long " * 2000),  # longer than the model's context
        (),  # this random model ends its answers at once, so there is nothing to ask about
    ],
)
def test_two_processes_say_the_same_as_one(
    trained: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, found, error = asked(trained, *arguments)
    assert (code, found) == asked_here(trained, capsys, *arguments)
    if code:
        assert code == 2 and f"error: {found['error']}\nhint: {found['hint']}" in error


def test_a_killed_process_is_named(trained: Path) -> None:
    command = start(trained, *ANSWER)
    model_process(command).kill()
    shown, error = command.communicate(timeout=120)
    assert command.returncode == 1 and not shown and "Traceback" not in error
    assert "the process that loads the model ended without a result (exit code -9)" in error and "hint: " in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("seconds", [0.0, 1.5])
def test_an_interrupt_of_both_is_one_line_and_ends_both(trained: Path, number: int, seconds: float) -> None:
    command = start(trained, *ANSWER)
    other = model_process(command)
    time.sleep(seconds)
    os.killpg(command.pid, number)
    shown, error = command.communicate(timeout=120)
    assert command.returncode == 130 and not shown and not other.is_running()
    assert error.splitlines()[-1] == "interrupted; nothing was recorded" and "Traceback" not in error


def test_both_outlive_the_terminal_with_nohup(trained: Path) -> None:
    command = start(trained, *ANSWER, nohup=True)
    model_process(command)
    os.killpg(command.pid, signal.SIGHUP)
    shown, error = command.communicate(timeout=120)
    assert command.returncode == 0 and "Where is my hat?" in shown, error


def test_it_ends_with_the_command_that_is_killed(trained: Path) -> None:
    command = start(trained, *ANSWER)
    other = model_process(command)
    command.kill()
    command.communicate(timeout=120)
    assert not psutil.wait_procs([other], timeout=120)[1]
