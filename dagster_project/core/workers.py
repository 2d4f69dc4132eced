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

Submit = Callable[..., Future[Any]]

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
            shared: sent to each process once.
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
    """Processes on this host. They are started for each call of `map`, and end with it."""

    def __init__(self, count: int) -> None:
        self.count = count

    def map(self, work: Callable[[S, A], B], shared: S, items: Iterable[A]) -> Iterator[B]:
        with _processes(self.count, shared) as submit:
            yield from _in_order((submit(_with_shared, work, item) for item in items), self.count)

    @contextmanager
    def started(self) -> Iterator[Workers]:
        """The same processes for several calls of `map`, which get what is shared with each item."""
        with _processes(self.count) as submit:
            yield _Started(submit, self.count)


class _Started:
    """Processes that have been started."""

    def __init__(self, submit: Submit, count: int) -> None:
        self._submit, self.count = submit, count

    def map(self, work: Callable[[S, A], B], shared: S, items: Iterable[A]) -> Iterator[B]:
        return _in_order((self._submit(work, shared, item) for item in items), self.count)


def _in_order(futures: Iterator[Future[B]], count: int) -> Iterator[B]:
    """The results of `futures`, which are created only as far as needed."""
    waiting: deque[Future[B]] = deque()
    try:
        for future in futures:
            waiting.append(future)
            if len(waiting) > AHEAD * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise PedigreeError(
            "a process of the stage ended, for example because it used too much memory", "use fewer `workers` in `execution`"
        ) from None
    finally:
        for future in waiting:
            future.cancel()


_shared: Any = None
"""In a process of `LocalProcesses`: what its items have in common."""


@contextmanager
def _processes(count: int, shared: Any = None) -> Iterator[Submit]:
    """Processes on this host; they start as far as there are items."""
    resource_tracker.ensure_running()  # when it starts, it unblocks SIGINT
    # spawned, because a fork of a process with threads (Arrow, polars) may hang
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_keep_shared, initargs=(shared,)) as pool:

        def submit(work: Callable[..., B], *arguments: Any) -> Future[B]:
            # Ctrl-C signals the whole process group. Workers inherit the blocked signal, finish their item and end.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return pool.submit(work, *arguments)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

        yield submit


def _keep_shared(shared: Any) -> None:
    global _shared
    _shared = shared
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed stage cannot end its workers, and they would wait for items forever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _with_shared(work: Callable[[Any, A], B], item: A) -> B:
    return work(_shared, item)


_current: ContextVar[Workers] = ContextVar("workers", default=THIS_PROCESS)


def current() -> Workers:
    """The processes of the stage that runs."""
    return _current.get()


@contextmanager
def started() -> Iterator[Workers]:
    """The processes of the stage that runs, for several calls of `map`: those of this host are started once."""
    with ExitStack() as stack:
        found = current()
        yield stack.enter_context(found.started()) if isinstance(found, LocalProcesses) else found


@contextmanager
def using(workers: Workers) -> Iterator[None]:
    token = _current.set(workers)
    try:
        yield
    finally:
        _current.reset(token)
