"""`pedigree ...` and `dvc ...` for tests that are not about how a process starts: the libraries are loaded once, and
each command is a real process, forked from the one that has loaded them (tests/builders/warm.py). The code is that of
this working tree, whatever package the project holds; the script of a small pipeline that a test has edited is started.
All commands have one seed of hashes of strings, so they iterate over sets in one order.

As a module it is the process that has loaded them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from builders import warm
from builders.training import exit_code, ready_to_fork

TESTS = Path(__file__).resolve().parents[1]
PROGRAMS = {"dagster_project": "pedigree", "dvc": "dvc"}
READ_ONCE = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "GOMP_", "MKL_", "PYTHONHASHSEED", "PYTHONUTF8")
"""Variables, by how they begin, that Python and the libraries read only when they start or are imported."""

active: list[WarmServer] = []
"""The server that runs commands now, if any."""


class ServedStage:
    """What DVC uses of subprocess.Popen: a stage command that a server has run.
    For DVC in a process that cannot be forked, because it has threads."""

    def __init__(self, server: WarmServer, words: Sequence[str], folder: str, environment: Mapping[str, str]) -> None:
        done = server.run(words, Path(folder), environment)
        self.returncode = done.returncode
        for number, text in ((1, done.stdout), (2, done.stderr)):
            os.write(number, text.encode())

    def communicate(self) -> tuple[None, None]:
        return None, None


class WarmServer:
    """A process that forks commands."""

    def __init__(self, modules: Iterable[str]) -> None:
        self.modules = sorted(modules)
        self.process: subprocess.Popen[str] | None = None
        self.read: dict[str, str] = {}
        """Variables that its process has read, or will read, once."""

    def run(
        self, words: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a folder, and wait for it. The libraries are loaded
        again if variables differ that they read only then."""
        if self.read != (read := _read_once(environment)):
            self.end()
            self.read = read
        process = self.process = self.process or self._started()
        assert process.stdout
        with tempfile.TemporaryDirectory() as scratch:
            out, err = Path(scratch, "out"), Path(scratch, "err")
            for file in (out, err):
                file.touch()  # a command can be killed before it opens them
            try:
                _send(process, [[*words], str(folder), str(out), str(err), dict(environment)])
                code = int(process.stdout.readline())
            except BaseException:  # e.g. the test took too long: what is answered later is for no other command
                self.end()
                raise
            return subprocess.CompletedProcess([*words], code, out.read_text(), err.read_text())

    def end(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # also a command that still runs, and its stages
            self.process.wait()
            self.process = None

    def _started(self) -> subprocess.Popen[str]:
        environment = {**os.environ, **self.read, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
        command = [sys.executable, "-P", "-m", "builders.warm_server"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        _send(process, self.modules)
        return process


def _read_once(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_ONCE)}


def _send(process: subprocess.Popen[str], document: object) -> None:
    assert process.stdin
    print(json.dumps(document), file=process.stdin, flush=True)


@contextmanager
def running_commands(server: WarmServer) -> Iterator[None]:
    """While open, `conftest.run` lets this process run `python -m dvc ...`, `python -m dagster_project ...` and
    `python small_pipeline.py ...`."""
    active.append(server)
    try:
        yield
    finally:
        active.remove(server)


@contextmanager
def running_stages(server: WarmServer) -> Iterator[None]:
    """While open, DVC in the process of the test lets this process run the commands of stages."""
    warm.start_stages_by(lambda words, folder, environment: ServedStage(server, words, folder, environment))
    try:
        yield
    finally:
        warm.start_stages_by_subprocess()


def words_of(arguments: Sequence[str], folder: Path) -> list[str] | None:
    """The command in a project's folder as a user types it, if a server is active and can run it."""
    if not active or arguments[0] not in {sys.executable, "python"}:
        return None
    if arguments[1] == "small_pipeline.py" and warm.has_small_pipeline(folder):
        return [*arguments[1:]]
    return [PROGRAMS[arguments[2]], *arguments[3:]] if arguments[1] == "-m" and arguments[2] in PROGRAMS else None


def carry_out(words: Sequence[str], folder: str, out: str, err: str, environment: Mapping[str, str]) -> int:
    """Be the process of a command."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    os.environ.clear()
    os.environ.update(environment)
    warm.forget_temporary_folder()
    warm.fork_instead_of_starting(None)
    return warm.main_of(words)


def main() -> None:
    """Fork a child for each line of standard input, a command, and print its exit code."""
    from dagster_project.core.imports import lean_imports

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with lean_imports("bitsandbytes", "boto3"):
        warm.preload(json.loads(sys.stdin.readline()))
    ready_to_fork()
    for line in sys.stdin:
        request = json.loads(line)
        if not (child := os.fork()):
            warm.end(carry_out, *request)
        print(exit_code(child), file=answers, flush=True)


if __name__ == "__main__":
    main()
