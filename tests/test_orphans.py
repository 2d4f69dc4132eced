"""A stage command whose DVC was killed while the command was still starting: it ends, and no orphan goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

COMMAND = """
import os, sys, time
from pathlib import Path
from dagster_project.orchestration.processes import end_with_dvc
folder, waits, dvc = Path(sys.argv[1]), sys.argv[2] == "waits", os.getppid()
(folder / "began").write_text(str(os.getpid()))
while waits and os.getppid() == dvc:
    time.sleep(0.01)
end_with_dvc()
(folder / "went on").touch()
"""
DVC = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
"""Starts a command as DVC does, in its own session."""


@pytest.mark.parametrize(("waits", "goes_on"), [("waits", False), ("", True)], ids=["DVC is killed first", "DVC runs"])
def test_a_command_goes_on_only_while_its_dvc_runs(tmp_path: Path, waits: str, goes_on: bool) -> None:
    environment = {**os.environ, "DVC_STAGE": "tok"}
    dvc = subprocess.Popen([sys.executable, "-c", DVC, COMMAND, str(tmp_path), waits], env=environment, start_new_session=True)
    while not (tmp_path / "began").is_file() or not (tmp_path / "began").read_text():
        assert dvc.poll() is None
        time.sleep(0.01)
    command = psutil.Process(int((tmp_path / "began").read_text()))
    if waits:
        dvc.send_signal(signal.SIGKILL)
    dvc.wait()
    psutil.wait_procs([command])
    assert (tmp_path / "went on").exists() == goes_on
