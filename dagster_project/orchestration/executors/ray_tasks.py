"""Workers of a stage that runs as a Ray job: tasks of one CPU each, on any node of the cluster."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

from dagster_project.core.errors import PedigreeError
from dagster_project.core.imports import lean_imports
from dagster_project.core.workers import AHEAD
from dagster_project.orchestration.executors.messages import refuse_other_versions, versions

A = TypeVar("A")
B = TypeVar("B")
S = TypeVar("S")

log = logging.getLogger("pedigree")
WAITING = 60.0
"""Interval of log lines about a task that has not ended, in seconds."""


class RayTasks:
    """Tasks get the project's files with the job (its runtime environment).

    A task whose node is lost is run again by Ray.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def map(self, work: Callable[[S, A], B], shared: S, items: Iterable[A]) -> Iterator[B]:
        with lean_imports("rfc3987_syntax"):  # as in ray.py
            import ray
            from ray.exceptions import RayError, RayTaskError

        if not ray.is_initialized():
            try:
                ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
            except ConnectionError as error:
                reason = " ".join(str(error).split())[:300]
                raise PedigreeError(
                    f"the stage's workers: no Ray cluster answers on this node: {reason}", "run the stage again"
                ) from None
        task: Any = ray.remote(num_cpus=1)(_call)
        kept, waiting = ray.put((versions(), shared)), deque[Any]()
        try:
            for item in items:
                waiting.append(task.remote(work, kept, item))
                if len(waiting) > AHEAD * self.count:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        except RayTaskError as error:  # of `work` itself; Ray's error would show its traceback
            if isinstance(error.cause, PedigreeError):
                raise error.cause from None
            raise
        except RayError as error:
            raise PedigreeError(
                f"a Ray task of the stage was lost: {' '.join(str(error).split())[:300]}", "run the stage again"
            ) from None
        finally:
            for reference in waiting:
                ray.cancel(reference)


def _call(work: Callable[[Any, A], B], kept: tuple[Mapping[str, str], Any], item: A) -> B:
    """One task, with the versions and the shared value of the job.

    Raises:
        InputError: the node has other versions than that of the job, which are the driver's.
    """
    expected, shared = kept
    _refuse_once(tuple(expected.items()))
    return work(shared, item)


@cache
def _refuse_once(expected: tuple[tuple[str, str], ...]) -> None:
    refuse_other_versions(dict(expected))


def _result(reference: Any) -> Any:
    import ray

    while not ray.wait([reference], timeout=WAITING)[0]:
        log.info("waiting for a task of the stage; each needs a CPU that no job of the cluster has reserved")
    return ray.get(reference)
