"""How the process of a command ends: by Ctrl-C, with a closed pipe, or with an error of the operating system."""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from dagster_project.commands.extras import missing_extra
from dagster_project.core import faults
from dagster_project.core.errors import InputError, Interrupted, PedigreeError
from dagster_project.orchestration.dagster_home import home_of

INTERRUPTED = "interrupted; nothing was recorded"
ELSEWHERE = {"mlflow", "push", "share", "sync"}
"""Commands that write to other places, step by step: MLflow, the Hub, DVC's remote, Dagster's event log."""
EXIT_CODE = 130
"""128 + SIGINT, as shells report it."""
REPEATED = 2.0
"""Seconds after an interrupt in which another one is ignored: pressed twice,
Ctrl-C would end the removal of scratch copies of data."""

ENDED_OTHERWISE = {"run", "serve", "ui"}
"""Commands in which stages and servers decide what SIGTERM does."""

_NO_MEMORY = re.compile("can't allocate memory|memory allocation of|ThreadPoolBuildError")
"""What PyTorch and libraries in Rust say; a thread needs memory for its stack."""
_STARTS_OF_COMPILED_MODULES = (ExtensionFileLoader.create_module.__code__, ExtensionFileLoader.exec_module.__code__)
TABLES = ("dagster_project.core.frames", "dagster_project.core.records")
"""Modules that read tables."""
DAMAGED = {11, 26}
"""SQLITE_CORRUPT, SQLITE_NOTADB"""
_LACKING = re.compile("^no such (table|column)|has no column named")
"""What SQLite says of an older database; it has no code for that."""
UNDEFINED = {"42P01", "42703"}
"""Codes of Postgres for that."""


def _end_at_once(*_: Any) -> None:
    os._exit(EXIT_CODE)


def _interrupt_later() -> None:
    # also wakes a thread that waits
    later = threading.Timer(0.02, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    later.daemon = True
    later.start()


def _starts_compiled_module(frame: FrameType | None) -> bool:
    """Whether the frame runs inside the initialization of a module in C or Rust.

    Some crash if the Python code that they call raises.
    """
    while frame is not None:
        if frame.f_code in _STARTS_OF_COMPILED_MODULES:
            return True
        frame = frame.f_back
    return False


class Interrupts:
    """Handles SIGINT, and notes that it was received: a library that is interrupted
    while it is imported may raise any other exception instead of KeyboardInterrupt."""

    came = False
    counted = False
    """Whether each one counts: in `chat` it ends an answer, not the command."""
    raised = -REPEATED
    """Time at which one was raised."""

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if not self.counted and time.monotonic() - self.raised < REPEATED:  # temporary folders are being removed
            return
        # it logs the traceback of an interrupt that it raises again
        logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
        if not _starts_compiled_module(frame):
            self.raised = time.monotonic()
            raise KeyboardInterrupt
        _interrupt_later()

    def _note_unraisable(self, unraisable: Any) -> None:
        # it came in a callback of the garbage collector, which cannot end anything
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            self.raised = -REPEATED
            _interrupt_later()
        else:
            sys.__unraisablehook__(unraisable)


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """While open, SIGINT raises KeyboardInterrupt and is noted.

    Afterwards, if one came, another ends the process without a message.

    A process that was started with SIGINT ignored, as by `&` of a script, goes on ignoring it.
    """
    found = Interrupts()
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield found
        return
    hook, sys.unraisablehook = sys.unraisablehook, found._note_unraisable
    signal.signal(signal.SIGINT, found._interrupt)
    try:
        yield found
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, _end_at_once if found.came else signal.default_int_handler)


@contextmanager
def terminating(found: Interrupts, command: str) -> Iterator[None]:
    """While open, SIGTERM and the end of the terminal end the command as Ctrl-C does, so
    that its temporary folders are removed: a scratch copy has data, and the key of
    record ids. Not if the process was started with the signal ignored, as by `nohup`."""
    found.counted = command == "chat"
    if command in ENDED_OTHERWISE or threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, found._interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes log lines to stderr, and drops them once the reader has closed the pipe."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            discard(self.stream)
        else:
            super().handleError(record)


def discard(stream: TextIO) -> None:
    """Redirect a stream to the null device: its reader, e.g. `head`, closed the pipe."""
    with suppress(OSError, ValueError):  # it has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def replace_closed_streams() -> None:
    """Give stdout and stderr to the null device where they were closed before the process started (`>&-`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 until the process ends


def flush() -> None:
    """Write out stdout and stderr now: at the end of the process, Python reports a closed pipe as an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            discard(stream)


def forget_unhandled() -> None:
    """Let the process end with the exit code of its command after an interrupt that was handled.

    With `python -m`, CPython ends a process by SIGINT if an interrupt ever left the code of an `exec` or `eval` of a
    string, as `dataclasses` runs it, also where it was caught later. Another such code resets what it remembers.
    """
    exec("")


def explained(error: BaseException, interrupts: Interrupts, command: str, project: Path) -> PedigreeError | None:
    """The message to the user about an exception; None if it is a defect of this program."""
    if isinstance(error, Interrupted):  # a training stopped where it can resume
        return error
    if interrupts.came or isinstance(error, KeyboardInterrupt):
        return _interrupted(command, project)
    if isinstance(error, PedigreeError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return missing_extra(error, command)
    return (
        faults.explained(error, project)
        or _memory_ended(error)
        or _pattern_gave_up(error)
        or _mlflow_failed(error)
        or _path_not_utf8(error, project)
        or _home_damaged(error, project)
        or _home_outdated(error, project)
        or _table_damaged(error, project)
    )


def _interrupted(command: str, project: Path) -> Interrupted:
    if command in ELSEWHERE:
        return Interrupted("interrupted; a part may have been written", "run the same command again")
    if command == "erase":
        from dagster_project.lineage.unfinished_erasure import is_unfinished

        if is_unfinished(project):
            return Interrupted(
                "interrupted; the erasure is unfinished, and places that it has not reached still hold the records",
                "`pedigree erase --resume` goes on; give --key and --verify again",
            )
    return Interrupted(INTERRUPTED)


def _memory_ended(error: BaseException) -> PedigreeError | None:
    names_it = isinstance(error, RuntimeError) or _is_panic(error)
    no_mapping = isinstance(error, OSError) and error.errno == errno.ENOMEM  # a file cannot be mapped into memory
    if isinstance(error, MemoryError) or no_mapping or (names_it and _NO_MEMORY.search(str(error))):
        return PedigreeError(
            "out of memory", "end other programs, or raise the limit (`ulimit -v`), then run the same command again"
        )
    return None


def _is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust ended: PyO3's class cannot be imported."""
    return type(error).__name__ == "PanicException"


def _pattern_gave_up(error: BaseException) -> InputError | None:
    """A regular expression of tokenizer.json needs too many steps for a text,
    which its library does not raise as an Exception."""
    if not (_is_panic(error) and "Regex search error" in str(error)):
        return None
    return InputError(
        f"a regular expression of the tokenizer cannot read a text: {error}",
        "use a model with another tokenizer, or leave out the longest texts",
    )


def _mlflow_failed(error: BaseException) -> PedigreeError | None:
    """A database of MLflow's failed, to which a training reports (`report_to: mlflow`)."""
    if not _is_of_sqlalchemy(error) or not any(name.startswith("mlflow.") for name in _modules(error)):
        return None
    return PedigreeError(
        f"MLflow: {' '.join(str(error).split())[:300]}",
        "see that MLFLOW_TRACKING_URI names a server or database that can be used",
    )


def _path_not_utf8(error: BaseException, project: Path) -> InputError | None:
    """DVC and pyarrow encode paths in UTF-8 in every locale."""
    try:
        str(project.absolute()).encode()
    except UnicodeEncodeError:
        if isinstance(error, UnicodeEncodeError):
            return InputError(
                f"{str(project.absolute())!r}: the path of the project is not UTF-8, or the locale is not",
                "rename the folder, or set a locale with UTF-8, for example `export LC_ALL=C.UTF-8`",
            )
    return None


def _home_damaged(error: BaseException, project: Path) -> InputError | None:
    """A file of Dagster's home is not, or not any more, a database, or Dagster cannot read a record in it."""
    if not (_is_of_a_damaged_database(error) or _is_of_a_damaged_record(error)):
        return None
    return InputError(
        f"Dagster's home {home_of(project)}: a database is damaged",
        "delete that folder: `pedigree sync` makes it again, without the logs of runs",
    )


def _home_outdated(error: BaseException, project: Path) -> InputError | None:
    """Dagster's database lacks a table or a column: an older version of Dagster made it."""
    cause = getattr(error, "orig", None)
    is_lacking = getattr(cause, "pgcode", None) in UNDEFINED or _LACKING.search(str(cause)) is not None
    if not (is_lacking and _is_of_sqlalchemy(error) and any(name.startswith("dagster.") for name in _modules(error))):
        return None
    home, reason = home_of(project), str(cause).strip().partition("\n")[0]
    return InputError(
        f"Dagster's home {home}: its database is that of an older version of Dagster ({reason})",
        f"stop Dagster, copy the database, then run `DAGSTER_HOME={shlex.quote(str(home))} dagster instance migrate`",
    )


def _table_damaged(error: BaseException, project: Path) -> InputError | None:
    """A table of an output cannot be read.

    Stages compare the hashes of what they read; other commands, such as `ballots` and `chat`, do not.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_globals.get("__name__") in TABLES]
    paths = [
        path for frame in frames if isinstance(path := frame.f_locals.get("path"), Path) and path.suffix == ".parquet"
    ]
    if not paths or not isinstance(error, ValueError | OSError):  # pyarrow raises both
        return None
    shown = paths[-1].relative_to(project) if paths[-1].is_relative_to(project) else paths[-1]
    reason = " ".join(str(error).split())[:200]
    hint = f"`dvc checkout --force {shlex.quote(str(shown))}` restores it"
    again = "; if another version of Pedigree wrote it, `dvc repro` makes it again"
    return InputError(f"{shown} is damaged: {reason}", hint + again)


def _is_of_a_damaged_database(error: BaseException) -> bool:
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    return _is_of_sqlalchemy(error) and code is not None and code & 0xFF in DAMAGED


def _is_of_sqlalchemy(error: BaseException) -> bool:
    """Dagster and MLflow use it."""
    return type(error).__module__.startswith("sqlalchemy")


def _modules(error: BaseException) -> list[str]:
    """Names of the modules that an exception came through, the innermost last."""
    return [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]


def _is_of_a_damaged_record(error: BaseException) -> bool:
    """Whether Dagster's storage failed to deserialize what it had read."""
    modules = _modules(error)
    stored = [number for number, name in enumerate(modules) if name.startswith("dagster._core.storage.")]
    return bool(stored) and any(name.startswith("dagster_shared.serdes") for name in modules[stored[-1] :])
