"""DVC's queue of experiments: trials of a sweep, each run by DVC's workers in a
temporary copy of the workspace, with the usual stage commands."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.git import git
from dagster_project.core.layout import RECORD_KEY
from dagster_project.orchestration import dvc, dvc_run
from dagster_project.orchestration.processes import interrupt_commands_of, is_running

log = logging.getLogger("pedigree")

QUEUED, RUNNING, SUCCESS, FAILED = "Queued", "Running", "Success", "Failed"
"""DVC's names of the states of an experiment in the queue."""
WORKER_FILES = "dvc-exp-worker-*.json"
QUEUE_ERRORS = {
    "dvc.exceptions": "DvcException",
    "dvc_task.exceptions": "DvcTaskError",
    "scmrepo.exceptions": "SCMError",
    "dulwich.file": "FileLocked",
    "celery.exceptions": "BackendError",
    "kombu.exceptions": "KombuError",
    "amqp.exceptions": "AMQPError",
}
"""Module -> what DVC's queue raises, besides errors of files and of
half-written JSON, when a worker changes the queue at the same moment."""
UNREADABLE = 10.0
"""Seconds for which the queue is read again after such an error."""


@dataclass(frozen=True)
class Trial:
    """An experiment in DVC's queue."""

    status: str
    rev: str
    alive: bool
    """Whether its process exists."""
    pid: int = 0
    """Of its process; 0 if unknown."""


def choices(override: str) -> tuple[str, list[Any]]:
    """Key and values of one `-S KEY=VALUE,VALUE`, as DVC (Hydra) reads it.

    Raises:
        InputError: it is malformed.
    """
    parser: Any = import_module("hydra.core.override_parser.overrides_parser").OverridesParser.create()
    quoted: Any = import_module("hydra.core.override_parser.types").QuotedString
    hydra_error: Any = import_module("hydra.errors").HydraException
    hint = "write -S KEY=VALUE or -S KEY=VALUE,VALUE, e.g. -S learning_rate=1e-3,2e-3"
    try:
        parsed = parser.parse_override(override)
        values = list(parsed.sweep_iterator()) if parsed.is_sweep_override() else [parsed.value()]
    except (hydra_error, ValueError) as error:
        raise InputError(f"-S {override}: {str(error).splitlines()[0]}", hint) from None
    plain = not (parsed.is_add() or parsed.is_force_add() or parsed.is_delete() or parsed.package)
    if not plain or not parsed.key_or_group or not override.partition("=")[2]:
        raise InputError(f"-S {override}: not KEY=VALUE", hint)
    return parsed.key_or_group, [value.text if isinstance(value, quoted) else value for value in values]


def refuse_cache_path(root: Path) -> None:
    """Raises:
    InputError: DVC cannot write the path of its cache into the settings of a trial, because it writes them as ASCII.
    """
    with dvc.open_repo(root) as repo:
        folder = str(repo.cache.local_cache_dir)
    if not folder.isascii():
        raise InputError(
            f"DVC cannot run trials with a cache in {folder}: letters of this path are not ASCII",
            "move the project, or its cache (`dvc cache dir --local FOLDER`, and move the files there)",
        )


def _dvc(root: Path, *arguments: str, whole: bool = False) -> str:
    """Standard output of a DVC command.

    Args:
        whole: whether an interrupt waits for its end, because it changes the workspace for a while.
    Raises:
        CheckFailed: it failed.
    """
    environment = {**os.environ, **dvc_run.command_environment({})}
    # files, not pipes: workers that DVC starts keep them open until the queue is empty
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as output,
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=root,
            env=environment,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        _wait(process, whole)
        output.seek(0)
        errors.seek(0)
        written, message = output.read(), errors.read().strip()
    if process.returncode:
        raise CheckFailed(f"dvc {' '.join(arguments[:3])}: {message or written.strip()}", "see DVC's message")
    return written


def _wait(process: subprocess.Popen[bytes], whole: bool) -> None:
    interrupt: BaseException | None = None
    while process.poll() is None:
        try:
            process.wait()
        except BaseException as error:
            if not whole:
                process.kill()
                process.wait()
                raise
            if interrupt is None:
                log.info("interrupted: waiting until DVC has put the files of the workspace back")
            interrupt = error
    if interrupt is not None:
        raise interrupt


def queue(root: Path, name: str, overrides: Collection[str], target: str) -> None:
    """Queue one experiment for each combination of the values: NAME-1, NAME-2, ..., or NAME if there is only one. For
    each, DVC takes what the user edited out of the workspace, edits params.yaml, and puts everything back."""
    settings = [argument for override in overrides for argument in ("-S", override)]
    _dvc(root, "exp", "run", "--queue", "--name", name, *_copied(root), *settings, target, whole=True)


def _copied(root: Path) -> list[str]:
    """The option by which DVC copies the key of record ids to a trial, if git ignores it.

    Stages refuse to run without it.
    """
    if not (root / RECORD_KEY).is_file() or git(root, "check-ignore", "--quiet", RECORD_KEY) is None:
        return []
    folder = Path(RECORD_KEY).parent.as_posix()
    # DVC does not make the folder of a file
    return ["--copy-paths", RECORD_KEY if git(root, "ls-files", "--", folder) else folder]


def start_workers(root: Path, jobs: int) -> None:
    """Start DVC's workers, up to `jobs`. They end by themselves when the queue is empty."""
    _dvc(root, "queue", "start", "--jobs", str(jobs))


def is_temporary(root: Path) -> bool:
    """Whether a project is DVC's copy for one queued experiment, which DVC deletes afterwards."""
    return any(parent.match(".dvc/tmp/exps") for parent in root.resolve().parents)


def workspace_of(root: Path) -> Path:
    """The workspace that DVC copied for a queued experiment; of any other project, the project."""
    return next((parent.parents[2] for parent in root.resolve().parents if parent.match(".dvc/tmp/exps")), root)


def workers_alive(root: Path) -> bool:
    """Whether a worker's process exists."""
    for file in (root / ".dvc" / "tmp" / "exps" / "celery").glob(WORKER_FILES):
        with suppress(OSError, ValueError, KeyError):
            if is_running(json.loads(file.read_bytes())["pid"]):
                return True
    return False


def log_of(root: Path, rev: str) -> Path:
    """File with the output of an experiment."""
    return root / ".dvc" / "tmp" / "exps" / "run" / rev / f"{rev}.out"


def trials(root: Path) -> dict[str, Trial]:
    """All experiments in the queue by name, including those that have ended."""
    until = time.monotonic() + UNREADABLE
    while True:
        try:
            return _trials(root)
        except _raced():
            if time.monotonic() > until:
                raise
        time.sleep(0.3)


def _trials(root: Path) -> dict[str, Trial]:
    with dvc.open_repo(root) as repo:
        found = {}
        for entry in repo.experiments.celery_queue.status():
            process = repo.experiments.celery_queue.proc.get(entry["rev"])
            alive = process is not None and is_running(process.pid)
            found[entry["name"] or entry["rev"][:7]] = Trial(
                entry["status"], entry["rev"], alive, process.pid if alive else 0
            )
        return found


def _raced() -> tuple[type[BaseException], ...]:
    """Exceptions of DVC's queue when a worker changes it at the same moment."""
    return (
        OSError,
        json.JSONDecodeError,
        *(getattr(import_module(module), name) for module, name in QUEUE_ERRORS.items()),
    )


def cancel(root: Path, names: Collection[str], seconds: float) -> None:
    """Remove queued experiments, interrupt the stage commands of running ones, which may have to stop a job on a
    cluster, and kill what still runs; stage commands end with them.

    One that a worker has taken from the queue runs before it has a process: its end is waited for, too.

    Args:
        seconds: for the workers, from the latest interrupt.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = {name: trial for name, trial in trials(root).items() if name in names}
        waiting = [name for name, trial in found.items() if trial.status == QUEUED]
        running = {name: trial for name, trial in found.items() if trial.status == RUNNING}
        alive = {name: trial.pid for name, trial in running.items() if trial.alive}
        if not waiting and not alive and not (running and workers_alive(root)):
            return
        # a worker may start or end one at this moment: try again
        with dvc.open_repo(root) as repo, suppress(*_raced()):
            if waiting:  # before killing: a worker that becomes free would start the next one
                repo.experiments.celery_queue.remove(waiting)
            # again each time: a stage may have started meanwhile, and submit a job
            if alive and interrupt_commands_of(alive.values()):
                until = time.monotonic() + seconds
            elif alive:
                repo.experiments.celery_queue.kill([*alive], force=True)
        time.sleep(0.3)


def shown(root: Path, names: Collection[str], baseline: str) -> dict[str, Mapping[str, Any]]:
    """Parameters and metrics of finished experiments from `dvc exp show`: by name, then by file.

    Failed and queued ones are omitted.

    Args:
        baseline: the commit from which they were queued; DVC shows those of HEAD otherwise.
    """
    found = {}
    for commit in json.loads(_dvc(root, "exp", "show", "--json", "--rev", baseline)):
        for experiment in commit.get("experiments") or []:
            for rev in experiment.get("revs") or []:
                if experiment["name"] in names and not rev.get("error") and rev.get("data"):
                    found[experiment["name"]] = rev["data"]
    return found
