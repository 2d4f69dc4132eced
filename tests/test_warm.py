"""The fixture `warm`: a command that is forked has the folder, output, exit code and environment of one that is
started, and leaves nothing for the next."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders import small_pipeline
from builders.warm import words_of_stage
from builders.warm_server import WarmServer, running_commands, running_stages, words_of
from conftest import run

from dagster_project.core.errors import CheckFailed
from dagster_project.orchestration import dvc_run

VERSION = ["python", "-m", "dvc", "version"]


@pytest.fixture(scope="module")
def server() -> Iterator[WarmServer]:
    server = WarmServer([])
    yield server
    server.end()


def test_a_forked_command_gives_what_a_started_one_gives(server: WarmServer, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": ""}]')
    for words in (["check", "rows.json", "--json"], ["check", "none.json"], ["check"], ["--help"]):
        command = [sys.executable, "-m", "dagster_project", *words]
        started = run(command, tmp_path)
        for _ in range(2):
            with running_commands(server):
                forked = run(command, tmp_path)
            assert (forked.returncode, forked.stdout, forked.stderr) == (
                started.returncode,
                started.stdout,
                started.stderr,
            ), words


def test_a_stage_that_dvc_in_the_process_of_a_test_forks_does_what_a_started_one_does(
    server: WarmServer, root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(source: str) -> tuple[list[str], str, dict[str, bytes]]:
        (root / "data/sources/g.txt").write_text(source)
        capfd.readouterr()
        failures = []
        for address in ("raw", "inst"):
            try:
                assert dvc_run.reproduce(root, address, True, {}, on_wait=pytest.fail)
            except CheckFailed as failed:
                failures.append(str(failed))
        return failures, capfd.readouterr().err, small_pipeline.published(root, "inst")

    def start(*_: Any, **__: Any) -> None:
        pytest.fail("a process was started")

    started = {source: outcome(source) for source in ("r1", "BAD")}
    assert (len(started["r1"][0]), len(started["BAD"][0])) == (0, 1) and "no_bad_rows" in started["BAD"][1]
    with running_commands(server), running_stages(server):
        assert run(VERSION, root).returncode == 0
        monkeypatch.setattr(subprocess, "Popen", start)
        assert {source: outcome(source) for source in started} == started


def test_a_script_that_a_test_has_edited_is_started(server: WarmServer, root: Path) -> None:
    """A forked process would run the unedited one."""
    words = ["small_pipeline.py", "run", "raw"]
    with running_commands(server):
        assert words_of_stage("python small_pipeline.py run raw", root) == words == words_of(["python", *words], root)
        with (root / "small_pipeline.py").open("a") as script:
            script.write("# edited\n")
        assert words_of_stage("python small_pipeline.py run raw", root) is words_of(["python", *words], root) is None


def test_libraries_are_loaded_again_for_a_command_with_other_variables_that_they_read_when_they_load(
    server: WarmServer, tmp_path: Path
) -> None:
    with running_commands(server):
        assert run(VERSION, tmp_path).returncode == 0 and server.process
        first = server.process
        assert run(VERSION, tmp_path, TMPDIR=str(tmp_path)).returncode == 0 and server.process is first
        assert run(VERSION, tmp_path, HF_HOME=str(tmp_path)).returncode == 0 and server.process is not first
        assert (
            psutil.Process(server.process.pid).environ()["HF_HOME"] == str(tmp_path)
            and first.returncode == -signal.SIGKILL
        )


def test_a_killed_command_has_the_signal_as_its_exit_code_and_the_next_one_runs(
    server: WarmServer, tmp_path: Path
) -> None:
    ended = threading.Event()

    def kill() -> None:
        assert server.process
        while not ended.is_set():
            for child in psutil.Process(server.process.pid).children():
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            time.sleep(0.001)

    def killed_or_not() -> int:
        ended.clear()
        killer = threading.Thread(target=kill)
        killer.start()
        code = run(VERSION, tmp_path).returncode
        ended.set()
        killer.join()
        return code

    with running_commands(server):
        assert run(VERSION, tmp_path).returncode == 0
        codes = [killed_or_not()]
        while codes[-1] == 0 and len(codes) < 30:  # it ended before it was killed
            codes.append(killed_or_not())
        assert codes[-1] == -signal.SIGKILL
        assert run(VERSION, tmp_path).returncode == 0
