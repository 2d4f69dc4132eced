"""A process that imports torch, transformers and PEFT while this one reads files, and then computes with a model."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dagster_project.commands import ending
from dagster_project.core import params  # noqa: F401 both processes need it
from dagster_project.core.errors import PedigreeError
from dagster_project.core.imports import lean_imports
from dagster_project.core.workers import end_with_parent

THREADED = ("torch", "polars", "pyarrow")
"""Libraries with threads of their own, with which a fork of this process may hang."""


class ModelProcess:
    """It has begun to import the libraries."""

    def __init__(self, command: str, project: Path) -> None:
        context = multiprocessing.get_context("fork")  # in a tenth of a second less than by `spawn`
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, command, project), daemon=True)
        with _signals_blocked():  # until the process handles them in its own way
            self._process.start()
        other_end.close()

    def start(self, work: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
        """Compute `work(*arguments)` in the process. Returns: what it yields.

        Args:
            work: a function of a module. What it yields can be sent to another process, as `arguments` can.
        """
        with suppress(BrokenPipeError):  # it ended, as `_received` says
            self._pipe.send((work, arguments))
        return self._received()

    def _received(self) -> Iterator[Any]:
        """Raises:
        PedigreeError: the process raised an error, or ended.
        """
        while True:
            try:
                refusal, result = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                raise self._ended() from None
            if refusal:
                raise refusal
            yield result

    def _ended(self) -> PedigreeError:
        self._process.join()
        code = self._process.exitcode or 0
        what = f"the process that loads the model ended without a result (exit code {code})"
        if code < 0:  # by a signal
            return PedigreeError(
                f"{what}, for example because memory was short", "end other programs, then run the same command again"
            )
        return PedigreeError(what, "the lines above say why")

    def end(self) -> None:
        """End the process, whatever it computes, without waiting until its memory is free."""
        self._process.kill()

    def close(self) -> None:
        self.end()
        self._process.join()
        self._pipe.close()


@contextmanager
def started(command: str, project: Path) -> Iterator[ModelProcess | None]:
    """A process for a model, which ends with the block; None if this one has threads.

    Args:
        command, project: of which its errors are.
    """
    if threading.active_count() > 1 or any(name in sys.modules for name in THREADED):
        yield None
        return
    process = ModelProcess(command, project)
    try:
        yield process
    finally:
        process.close()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def _serve(pipe: Connection, command: str, project: Path) -> None:
    """Import the libraries, then compute what is asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is of the whole process group: the command ends this process
    for number in _SIGNALS - {signal.SIGINT}:
        if signal.getsignal(number) != signal.SIG_IGN:  # as by `nohup`
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    end_with_parent()
    try:
        with lean_imports():
            _import()
        work, arguments = pipe.recv()
        for result in work(*arguments):
            pipe.send((None, result))
    except BaseException as error:  # also the end of a library in Rust
        explained = ending.explained(error, ending.Interrupts(), command, project)
        if explained is None:
            raise
        pipe.send((explained, None))


def _import() -> None:
    """Import what a question needs, and start the process that renders it."""
    from dagster_project.training.methods.hardware import import_libraries

    import_libraries()
    from dagster_project.commands import why_question  # noqa: F401
    from dagster_project.core import bounded_templates

    threading.Thread(target=bounded_templates.render, args=("", {}), daemon=True).start()
