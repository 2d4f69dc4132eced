"""Processes that compute parts of a data set. How many there are, and on which machine, never changes a result."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from multiprocessing import resource_tracker
from typing import Any, Protocol, TypeVar

from dagster_project.core.errors import PedigreeError

A = TypeVar("A")
B = TypeVar("B")
S = TypeVar("S")

AHEAD = 2
"""Items given to each process in advance. Only these and their results are in memory."""


class Workers(Protocol):
    """One kind of processes: this one, others on this host, or tasks on a Ray cluster."""

    @property
    def count(self) -> int:
        """Number of items that are computed at once."""
        ...

    def map(self, work: Callable[[S, A], B], shared: S, items: Iterable[A]) -> Iterator[B]:
        """`work(shared, item)` of each item, in order.

        Args:
            work: a function of a module. Its result depends on its arguments only.
            shared: what all items have in common. It is sent with each of them, so large values should be cheap to load
                again.
            items: read only as far as there are free processes.
        """
        ...


class ThisProcess:
    """Everything in the calling process."""

    count = 1

    def map(self, work: Callable[[S, A], B], shared: S, items: Iterable[A]) -> Iterator[B]:
        return (work(shared, item) for item in items)


THIS_PROCESS = ThisProcess()


class LocalProcesses:
    """Processes on this host."""

    def __init__(self, count: int) -> None:
        self.count = count

    def map(self, work: Callable[[S, A], B], shared: S, items: Iterable[A]) -> Iterator[B]:
        with self.started() as processes:
            yield from processes.map(work, shared, items)

    @contextmanager
    def started(self) -> Iterator[Workers]:
        """The same processes for several calls of `map`. They start as far as there are items."""
        resource_tracker.ensure_running()  # when it starts, it unblocks SIGINT
        # spawned, because a fork of a process with threads (Arrow, polars) may hang
        with ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
            yield _Started(pool, self.count)


class _Started:
    def __init__(self, pool: ProcessPoolExecutor, count: int) -> None:
        self._pool, self.count = pool, count

    def map(self, work: Callable[[S, A], B], shared: S, items: Iterable[A]) -> Iterator[B]:
        waiting: deque[Future[B]] = deque()
        try:
            for item in items:
                waiting.append(self._submit(work, shared, item))
                if len(waiting) > AHEAD * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            what = "a process of the stage ended, for example because it used too much memory"
            raise PedigreeError(what, "use fewer `workers` in `execution`") from None
        finally:
            for future in waiting:
                future.cancel()

    def _submit(self, function: Callable[..., B], *arguments: Any) -> Future[B]:
        # Ctrl-C signals the whole process group. Workers inherit the blocked signal, finish their item and end.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """End this process when the one that started it is gone.

    If that one is killed, it cannot end its workers, and they would wait for items forever.
    """
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_current: ContextVar[Workers] = ContextVar("workers", default=THIS_PROCESS)


def current() -> Workers:
    """The processes of the stage that runs."""
    return _current.get()


@contextmanager
def using(workers: Workers) -> Iterator[None]:
    """While open, `workers` are the processes of the stage that runs. Those of this host are started once."""
    with ExitStack() as stack:
        if isinstance(workers, LocalProcesses):
            workers = stack.enter_context(workers.started())
        token = _current.set(workers)
        try:
            yield
        finally:
            _current.reset(token)
