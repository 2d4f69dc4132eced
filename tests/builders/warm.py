"""Commands of the project in forked processes: the libraries are imported once,
and each command is a real process that can really be killed.

A command runs `pedigree` or `dvc` by its own main function. The stage command
that DVC starts is forked, too, instead of started by a shell.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import multiprocessing
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

PRELOAD = [
    "dvc.cli",
    "dvc.commands.repro",
    "dvc.commands.status",
    "dvc.commands.checkout",
    "dvc.repo.reproduce",
    "dvc.repo.status",
    "dvc.stage.run",
    "dagster",
    "dagster_project.__main__",
    "dagster_project.cli.parser",
    "dagster_project.orchestration.dagster.sync",
    "dagster_project.orchestration.run_stage",
    "dagster_project.stages",
]
CPU_SECONDS = 120
"""CPU time after which a command counts as hanging."""
SECONDS = 600
"""Time after which a command that waits without computing counts as hanging."""
STAGE_COMMANDS = (["python", "-m", "dagster_project", "run"], ["python", "small_pipeline.py", "run"])
"""How commands of stages begin, by which DVC starts them: of the whole
pipeline, and of tests/builders/small_pipeline.py."""

Fault = Callable[[], None]
"""Called in the process that shall have the fault, before its command begins."""


@dataclass
class Outcome:
    """What the user sees of a command that has ended."""

    command: Sequence[str]
    code: int
    """Exit code; negative: the signal that ended it."""
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass
class Command:
    """A command that is running."""

    words: Sequence[str]
    pid: int
    out: Path
    err: Path
    code: int | None = None
    seconds: float = 0.0
    """CPU time, once it has ended."""

    def poll(self) -> int | None:
        if self.code is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.seconds = usage.ru_utime + usage.ru_stime
        return self.code

    def wait(self, seconds: float = SECONDS) -> Outcome:
        until, pause = time.monotonic() + seconds, 0.002
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill_group()
                os.waitpid(self.pid, 0)
                self.code = -signal.SIGALRM
                break
            time.sleep(pause)
            pause = min(pause * 1.3, 0.05)
        assert self.code is not None
        texts = [path.read_text(errors="replace") for path in (self.out, self.err)]
        return Outcome(self.words, self.code, *texts)

    def kill_group(self) -> None:
        """Kill the command and all processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


@dataclass
class Place:
    """Where commands run: a project, and folders of its own for everything that a command may write elsewhere."""

    root: Path
    around: Path
    faults: Mapping[str, Fault] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PEDIGREE_", "DVC_", "DAGSTER_", "AWS_"))
        }
        folders = {
            "HOME": "home",
            "TMPDIR": "tmp",
            "DVC_SITE_CACHE_DIR": "site",
            "DVC_GLOBAL_CONFIG_DIR": "home",
            "HF_HOME": "hub",
        }
        return {
            **kept,
            **{name: str(self.around / folder) for name, folder in folders.items()},
            "DAGSTER_HOME": str(self.root / ".dagster"),
            "DVC_NO_ANALYTICS": "1",
            "DAGSTER_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "PEDIGREE_PROJECT": str(self.root),
            "COLUMNS": "120",
            "SHELL": "/bin/sh",
        }


def start(
    place: Place,
    words: Sequence[str],
    fault: Fault | None = None,
    in_stage: Fault | None = None,
    environment: Mapping[str, str] | None = None,
) -> Command:
    """Start `pedigree ...` or `dvc ...` in a project, in a session of its own.

    Args:
        fault: called in the process of the command before it begins.
        in_stage: called in each stage command that DVC starts below it, before that begins.
    """
    number = len(list(place.around.glob("*.out")))
    out, err = place.around / f"{number}.out", place.around / f"{number}.err"
    out.touch()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        end(_in_child, place, words, out, err, fault, in_stage, environment or {})
    return Command(words, pid, out, err)


def run(place: Place, *words: str, **faults: Any) -> Outcome:
    return start(place, words, **faults).wait()


def _in_child(
    place: Place,
    words: Sequence[str],
    out: Path,
    err: Path,
    fault: Fault | None,
    in_stage: Fault | None,
    environment: Mapping[str, str],
) -> int:
    os.setsid()
    os.chdir(place.root)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update({**place.environment(), **environment})
    forget_temporary_folder()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    fork_instead_of_starting(in_stage)
    if fault is not None:
        fault()
    return main_of(words)


def forget_temporary_folder() -> None:
    import tempfile

    tempfile.tempdir = None


def main_of(words: Sequence[str]) -> int:
    sys.argv = [*words]
    logging.getLogger("pedigree").handlers.clear()  # of the process that this one was forked from
    if words[0] == "dvc":
        from dvc.cli import main as dvc_main

        return int(dvc_main([*words[1:]]) or 0)
    if words[0] == "materialize":
        return _materialize(words[1:])
    if words[0] == "small_pipeline.py":
        from builders.small_pipeline import main as small_main

        return small_main()
    from dagster_project.__main__ import main

    return main([*words[1:]])


def _materialize(addresses: Sequence[str]) -> int:
    """Run the assets of these stages in this process, as Dagster's process of a run does."""
    from dagster_project.orchestration.dagster.assets import build_definitions, open_instance
    from dagster_project.orchestration.dagster_dvc.keys import asset_key

    root = Path.cwd()
    with open_instance(root) as instance:
        job = build_definitions(root, whole_location=True).resolve_implicit_global_asset_job_def()
        keys = [asset_key(address) for address in addresses]
        return 0 if job.execute_in_process(instance=instance, asset_selection=keys, raise_on_error=False).success else 1


def end(function: Callable[..., int], *arguments: Any) -> NoReturn:
    """End this forked process with what the function returns, as an interpreter
    would, without unwinding the frames of the parent."""
    code = 1
    try:
        code = function(*arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  as an interpreter that ends
        traceback.print_exc()
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


class ForkedStage:
    """What DVC uses of subprocess.Popen: a stage command, forked from DVC's process."""

    def __init__(self, words: Sequence[str], in_stage: Fault | None, cwd: str, env: Mapping[str, str]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            end(self._run, words, in_stage, cwd, env)

    @staticmethod
    def _run(words: Sequence[str], in_stage: Fault | None, cwd: str, env: Mapping[str, str]) -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        if in_stage is not None:
            in_stage()
        return main_of(words)

    def communicate(self) -> tuple[None, None]:
        while self.returncode is None:
            with suppress(InterruptedError):
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return None, None


def words_of_stage(command: str, folder: str | Path) -> list[str] | None:
    """What `main_of` gets for the command of a stage in a project's folder;
    None for a command that is to be started."""
    words = shlex.split(command)
    if not any(words[: len(start)] == start for start in STAGE_COMMANDS):
        return None
    if words[1] == "-m":
        return ["pedigree", *words[3:]]
    return words[1:] if has_small_pipeline(folder) else None


def has_small_pipeline(folder: str | Path) -> bool:
    """Whether a project's script is the one that `main_of` runs. Some tests edit the script of a project."""
    script = Path(folder, "small_pipeline.py")
    return script.is_file() and script.read_bytes() == Path(__file__).with_name("small_pipeline.py").read_bytes()


def start_stages_by(start: Callable[[Sequence[str], str, Mapping[str, str]], Any]) -> None:
    """From now on DVC in this process starts the command of a stage by a function of what `main_of` gets, a folder and
    an environment. It returns what DVC uses of subprocess.Popen."""
    import dvc.stage.run as module

    class Subprocess:
        def __getattr__(self, name: str) -> Any:
            return getattr(subprocess, name)

        def Popen(self, arguments: Any, **options: Any) -> Any:
            if isinstance(arguments, list) and (words := words_of_stage(arguments[-1], options["cwd"])):
                return start(words, options["cwd"], options["env"])
            return subprocess.Popen(arguments, **options)

    module.subprocess = Subprocess()  # type: ignore[attr-defined]


def start_stages_by_subprocess() -> None:
    """From now on DVC in this process starts the commands of stages as it does itself."""
    import dvc.stage.run as module

    module.subprocess = subprocess  # type: ignore[attr-defined]


def fork_instead_of_starting(in_stage: Fault | None) -> None:
    """From now on DVC in this process, a forked one, forks the commands of stages."""
    start_stages_by(lambda words, cwd, env: ForkedStage(words, in_stage, cwd, env))
    whole = multiprocessing.get_context
    # misc]
    multiprocessing.get_context = lambda method=None: whole("fork" if method == "forkserver" else method)  # type: ignore[assignment,


def preload(names: Sequence[str] = ()) -> None:
    """Import modules in this process. Those that cannot be imported alone are left out."""
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # it would start a thread
    for name in [
        *PRELOAD,
        *(name for name in names if name != "dagster_project.definitions"),
    ]:  # that one reads a project
        with suppress(Exception):
            importlib.import_module(name)
    assert threading.active_count() == 1, "a forked process would wait for a thread that it does not have"


@contextmanager
def modules_noted(path: Path) -> Iterator[Fault]:
    """A fault that does nothing but append the names of a process's modules to a file when the process ends."""

    def note() -> None:
        def write() -> None:
            with path.open("a") as file:
                file.writelines(f"{name}\n" for name in list(sys.modules))

        atexit.register(write)

    yield note
