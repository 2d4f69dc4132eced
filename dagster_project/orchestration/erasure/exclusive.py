"""Keeps other processes out while `pedigree erase` changes a project.

A second erasure is refused, and stages wait until a step has ended.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dagster_project.core.errors import Busy
from dagster_project.lineage import scratch_folder
from dagster_project.orchestration import dvc, locks, rwlock

log = logging.getLogger("pedigree")

LOCK = "erase"
COMMAND = "pedigree erase"
"""How locks describe the process: its command line can hold the text that is erased."""


@contextmanager
def one_erasure(root: Path) -> Iterator[None]:
    """Hold the lock of erasures, for a whole command.

    Raises:
        Busy: another erasure runs, a stage does, or a command has copies of data.
    """

    def refuse(holder: str) -> None:
        raise Busy(f"another erasure is carried out by {holder}", "wait for it to end, or stop it")

    with locks.hold(root, LOCK, refuse, COMMAND):
        states = dvc.read_stages(root)
        if writer := rwlock.writer_of(root, [out for state in states.values() for out in state.outs]):
            raise Busy(f"a stage is being run by {writer}", "wait for it to end, or stop it")
        if scratch_folder.is_in_use(root):
            raise Busy(
                "another command, such as `verify` or `bisect`, works on copies of the data",
                "wait for it to end, or stop it",
            )
        # DVC writes it to its table of locked paths, which a kill leaves behind
        given, sys.argv = sys.argv, COMMAND.split()
        try:
            yield
        finally:
            sys.argv = given


@contextmanager
def no_stage_runs(root: Path, addresses: Iterable[str], waits: bool) -> Iterator[None]:
    """Hold the locks of all stages: one that another process starts waits if DVC started it, and is refused otherwise.

    Args:
        waits: whether to wait for stages that are running.
    Raises:
        Busy: a stage is being run, and `waits` is False.
    """
    with ExitStack() as held:
        for address in addresses:

            def wait_or_refuse(holder: str, address: str = address) -> None:
                if not waits:
                    raise Busy(f"{address} is being run by {holder}", "wait for it to end, or stop it")
                log.info(f"erase: waiting for {address}, which is being run by {holder}")

            held.enter_context(locks.hold(root, address, wait_or_refuse, COMMAND))
        yield
