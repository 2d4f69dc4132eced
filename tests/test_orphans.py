"""A stage command whose starter, DVC or `pedigree verify`, was killed: it ends, and no orphan goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dagster_project.core.errors import INNER

COMMAND = """
import os, sys, time
from pathlib import Path
from dagster_project.orchestration.processes import end_with_starter
folder, waits, dvc = Path(sys.argv[1]), sys.argv[2] == "waits", os.getppid()
(folder / "began").write_text(str(os.getpid()))
while waits and os.getppid() == dvc:
    time.sleep(0.01)
end_with_starter()
(folder / "went on").touch()
"""
DVC = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
"""Starts a command as DVC does, in its own session."""


@pytest.mark.parametrize("variable", ["DVC_STAGE", INNER])
@pytest.mark.parametrize(("waits", "goes_on"), [("waits", False), ("", True)], ids=["DVC is killed first", "DVC runs"])
def test_a_command_goes_on_only_while_its_starter_runs(
    tmp_path: Path, waits: str, goes_on: bool, variable: str
) -> None:
    environment = {**os.environ, variable: "tok"}
    dvc = subprocess.Popen(
        [sys.executable, "-c", DVC, COMMAND, str(tmp_path), waits], env=environment, start_new_session=True
    )
    while not (tmp_path / "began").is_file() or not (tmp_path / "began").read_text():
        assert dvc.poll() is None
        time.sleep(0.01)
    if waits:
        dvc.send_signal(signal.SIGKILL)
    dvc.wait()
    with suppress(psutil.NoSuchProcess):  # it has ended
        psutil.wait_procs([psutil.Process(int((tmp_path / "began").read_text()))])
    assert (tmp_path / "went on").exists() == goes_on


LONG_COMMAND = """
import time
from dagster_project.orchestration.processes import end_with_starter
end_with_starter()
print("began", flush=True)
time.sleep(600)
"""


def test_a_command_of_a_shell_ends_when_verify_is_killed() -> None:
    verify = "import subprocess, sys; subprocess.run(f'{sys.executable} -c \"$COMMAND\"; true', shell=True)"
    environment = {**os.environ, INNER: "1", "COMMAND": LONG_COMMAND}
    starter = subprocess.Popen(
        [sys.executable, "-c", verify], env=environment, start_new_session=True, stdout=subprocess.PIPE
    )
    assert starter.stdout is not None
    with starter.stdout:
        assert starter.stdout.readline() == b"began\n"
        below = psutil.Process(starter.pid).children(recursive=True)
        starter.kill()
        starter.wait()
        assert len(below) == 2 and not psutil.wait_procs(below, timeout=300)[1]
