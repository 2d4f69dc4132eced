"""Runs one stage by DVC, in this process.

The environment of stage commands, and whether DVC was asked to run a stage even if nothing changed.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dagster_project.core.errors import Busy, CheckFailed
from dagster_project.orchestration import dvc_lock_file
from dagster_project.orchestration.dvc import open_repo
from dagster_project.orchestration.private_api import private_module
from dagster_project.orchestration.processes import command_of_dvc, interrupt_command, next_step

FORCED = "PEDIGREE_FORCED"
"""Environment variable of a stage command: this process was asked to run the stage even if nothing changed."""
FAILURE = "pedigree_failure"
"""Key of the message of a stage command to the Dagster run that started it: why it failed, and the next step."""
PROGRESS_INTERVAL = 10.0
"""Seconds between two progress reports of a running stage."""
EXIT_CODE = re.compile(r", exited with (-?\d+)$")
"""In DVC's error about a stage command, which has it only in its text."""
PRELOAD = [
    "dvc.repo.reproduce",
    "dvc.parsing",
    "dvc.stage.run",
    "dvc.output",
    "dvc.data_cloud",
    "dvc.cachemgr",
    "dvc.lock",
    "dvc_render.html",
    "scmrepo.git",
    "ruamel.yaml",
]
"""Modules that a fork server imports once for all processes that reproduce a stage. None starts a thread."""


def reproduce(
    root: Path,
    address: str,
    force: bool,
    environment: Mapping[str, str],
    on_wait: Callable[[str], None],
    on_progress: Callable[[], None] = lambda: None,
    before_attempt: Callable[[], None] = lambda: None,
    command: Sequence[str] = (),
) -> bool:
    """Bring one stage up to date by DVC; wait while another process uses the same paths.

    Args:
        on_wait: called once with a description of the process that has locked the paths.
        on_progress: called every `PROGRESS_INTERVAL` while the stage runs; less often if it runs for long.
        before_attempt: called before the stage starts, and twice a second while it waits.
        command: what DVC shows others as the command that locked the paths; empty: that of this process.
    Returns:
        Whether the stage ran or was restored.
    Raises:
        CheckFailed: the stage's command failed.
        Busy: another program changes git's index, to which DVC adds its files with `core.autostage`.
    """
    reproduction_error = private_module("dvc.exceptions").ReproductionError
    lock_error = private_module("dvc.lock").LockError

    def once(stop: Interrupt) -> bool:
        variables = command_environment({**environment, FORCED: "1" if force else ""})
        with _adding_to_git(address), open_repo(root, wait=False) as repo:
            stop.limit_waiting(repo.lock)
            dvc_lock_file.replace_in_one_step(repo)
            return bool(repo.reproduce([address], single_item=True, force=force, run_env=variables))

    notified = False
    while True:
        before_attempt()
        try:
            # DVC resolves targets relative to the current directory
            with _shown_as(command), chdir(root), ThreadPoolExecutor(1) as thread:
                # in a thread: while a command runs, DVC ignores interrupts in the main thread, e.g. Dagster's
                # "terminate"
                stop = Interrupt()
                done = thread.submit(once, stop)
                try:
                    began = time.monotonic()
                    while wait([done], max(PROGRESS_INTERVAL, (time.monotonic() - began) / 100)).not_done:
                        on_progress()
                    return done.result()
                except BaseException:
                    stop.requested = True
                    while not done.done():  # DVC may start the command only now
                        interrupt_command(address)
                        wait([done], 0.2)
                    raise
        except (reproduction_error, lock_error) as error:
            cause = error if isinstance(error, lock_error) else error.__cause__
            if not isinstance(cause, lock_error):
                code = EXIT_CODE.search(str(cause))
                raise CheckFailed(
                    f"{address} failed: {cause or error}",
                    f"{next_step(int(code[1]) if code else 1)}; nothing was recorded",
                ) from None
            if not notified:
                on_wait(str(cause).partition("\n\nIf there are no")[0])
                notified = True
            time.sleep(0.5)


@contextmanager
def _shown_as(command: Sequence[str]) -> Iterator[None]:
    """While open, DVC, which writes `sys.argv` into its table of locked paths, finds another command there."""
    before = sys.argv
    sys.argv = [*command] or before
    try:
        yield
    finally:
        sys.argv = before


@dataclass
class Interrupt:
    """Of one attempt, and until when that waits for DVC's lock, which another process may hold for hours: `dvc push`
    does until it ends."""

    requested: bool = False

    def limit_waiting(self, lock: Any) -> None:
        """Let DVC wait for a lock that was made without `wait`, but give up after an interrupt: before the command, and
        after one that failed. The outputs of one that succeeded are still recorded."""
        acquire, has_begun = lock.lock, False
        lock_error = private_module("dvc.lock").LockError

        def acquire_or_stop() -> None:
            nonlocal has_begun
            failed = sys.exc_info()[0] is not None  # DVC takes the lock again in a `finally` around the command
            while True:
                try:
                    acquire()
                except lock_error:
                    if self.requested and (failed or not has_begun):
                        raise
                else:
                    has_begun = True
                    return

        lock.lock = acquire_or_stop


@contextmanager
def _adding_to_git(address: str) -> Iterator[None]:
    """DVC does so after a stage, with the setting `core.autostage`.

    Raises:
        Busy: another program changes git's index.
    """
    try:
        yield
    except import_module("dulwich.file").FileLocked as error:
        raise Busy(
            f"{address} is done, but {os.fsdecode(error.args[1])} exists: another program changes git's index,"
            " so DVC could not add its files (core.autostage)",
            "wait for it to end, or, if no git runs, remove the file; then run the same command again",
        ) from None


@contextmanager
def commands_started() -> Iterator[list[str]]:
    """While open, collects a line for each stage whose command DVC starts.

    `Repo.reproduce` returns both the stages that ran and those that it restored.
    """
    lines: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        if record.msg.startswith("Running stage"):
            lines.append(record.getMessage())
        return record.levelno >= logging.ERROR

    logger = private_module("dvc.stage.run").logger
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(note)
    try:
        yield lines
    finally:
        logger.removeFilter(note)
        logger.setLevel(before)


def is_forced() -> bool:
    """Whether DVC was asked to run the stage of this command even if nothing changed, or a past run could be restored.

    DVC exports only the name of the stage. So the command line of its process is parsed, by DVC's own parser;
    `reproduce`, which uses its Python API, exports a variable.
    """
    if FORCED in os.environ:
        return bool(os.environ[FORCED])
    words = command_of_dvc()
    at = next((i for i, word in enumerate(words) if Path(word).stem == "dvc"), None)
    if at is None:
        return False
    cli = private_module("dvc.cli")
    try:
        found = cli.parse_args(words[at + 1 :])
    except (cli.DvcParserError, SystemExit):  # it is another program
        return False
    return any(getattr(found, name, False) for name in ("force", "force_downstream", "no_run_cache"))


def environment_in_copy(root: Path, without: Iterable[str], extra: Mapping[str, str]) -> dict[str, str]:
    """Environment of a stage command that runs in a copy of the project, on the code there.

    Args:
        without: variables of this process that it does not get.
    """
    inherited = {
        name: value for name, value in os.environ.items() if name not in {"DVC_ROOT", "DAGSTER_PIPES_CONTEXT", *without}
    }
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return inherited | command_environment({"PYTHONPATH": path, "PEDIGREE_PROJECT": str(root), **extra})


def command_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Environment of a stage command, in which `python` is the current interpreter."""
    return {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}", **extra}
