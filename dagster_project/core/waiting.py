"""How threads of OpenMP wait for each other: they spin briefly on a quiet machine, and sleep beside other work.

A spinning thread takes the CPU from the thread that it waits for; a sleeping one needs time to wake, thousands of times
in a step. What is computed does not depend on it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

POLICY, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
OURS = "PEDIGREE_WAITING"
"""Names the variable that a process of Pedigree set, and the user did not: processes that it starts decide for
themselves."""
SHORT_SPIN = "3000"
"""About 40 microseconds: as fast as endless spinning if nothing else runs (docs/time.md)."""
STAT = Path("/proc/stat")
INTERVAL = 1.0
"""Seconds between two looks at what else runs."""
CONTENDED, FREE = 0.25, 0.1
"""CPUs that other processes use, of those that our threads need: above the first our threads sleep, up to the second
they spin again."""
NAME = "waiting"


def choose(environment: MutableMapping[str, str], computes: bool, stat: Path = STAT) -> None:
    """Set the variable that OpenMP reads when torch loads it. A setting of the user is kept.

    Args:
        environment: of this process and those that it starts.
        computes: whether this process will call `follow`; otherwise, and where the kernel does not count what runs,
            threads sleep.
    """
    if OURS in environment:
        environment.pop(environment.pop(OURS), None)
    if POLICY in environment or SPINS in environment:
        return
    name, value = (SPINS, SHORT_SPIN) if computes and busy_ticks(_own_cpus(), stat) else (POLICY, "passive")
    environment.update({name: value, OURS: name})


def follow(threads: int) -> None:
    """From now on, let threads wait as suits what else runs.

    Nothing happens if `choose` did not choose to spin, or if this was called before.

    Args:
        threads: that torch uses.
    """
    if os.environ.get(OURS) == SPINS and threads > 1 and NAME not in {thread.name for thread in threading.enumerate()}:
        threading.Thread(target=_follow, args=[threads], name=NAME, daemon=True).start()


def settle(environment: MutableMapping[str, str], threads: int) -> None:
    """Let threads sleep if others use their CPUs now: for a program of the user, which cannot call `follow`."""
    if environment.get(OURS) == SPINS and threads > 1:
        contention = Contention(threads)
        time.sleep(INTERVAL / 10)
        if contention.look():
            del environment[SPINS]
            environment.update({POLICY: "passive", OURS: POLICY})


def _follow(threads: int) -> None:
    contention, sleepers, pause = Contention(threads), Sleepers(threads), INTERVAL / 10
    while True:
        time.sleep(pause)
        sleepers.hold(contention.look())
        pause = INTERVAL


def _own_cpus() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()  # macOS has no such call


def busy_ticks(cpus: set[int], stat: Path = STAT) -> int:
    """Ticks in which these CPUs ran any thread since the machine started (proc_stat(5)); 0: the kernel does not say."""
    with suppress(OSError, ValueError, IndexError):
        lines = [line.split() for line in stat.read_text().splitlines() if line.startswith("cpu")]
        own = [values for name, *values in lines if name[3:].isdigit() and int(name[3:]) in cpus]
        # user, nice, system, idle, iowait, irq, softirq
        return sum(sum(map(int, [*values[:3], *values[5:7]])) for values in own)
    return 0


class Contention:
    """Whether other processes use CPUs that the threads of this one need."""

    def __init__(self, threads: int, stat: Path = STAT) -> None:
        self.cpus, self.stat = _own_cpus(), stat
        self.spare = max(len(self.cpus) - threads, 0)
        self.now = False
        self._last = self._read()

    def _read(self) -> tuple[float, float, float]:
        return time.monotonic(), busy_ticks(self.cpus, self.stat) / os.sysconf("SC_CLK_TCK"), time.process_time()

    def look(self) -> bool:
        """Whether it was so since the last look."""
        before, self._last = self._last, self._read()
        elapsed, busy, ours = (after - value for after, value in zip(self._last, before, strict=True))
        if elapsed > 0:
            self.now = (busy - ours) / elapsed - self.spare > (FREE if self.now else CONTENDED)
        return self.now


class Sleepers:
    """Threads that each keep a team of OpenMP threads, all asleep.

    While a process has more OpenMP threads than CPUs, those that wait spin a thirtieth as long (manual of libgomp,
    GOMP_SPINCOUNT), which is as good as sleeping. Other OpenMP libraries do not change.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.count = max(len(_own_cpus()) - threads, 0) // (threads - 1) + 1
        self._released: threading.Event | None = None

    def hold(self, wanted: bool) -> None:
        if wanted and not self._released:
            self._released = threading.Event()
            for _ in range(self.count):
                threading.Thread(target=self._keep_team, args=[self._released], daemon=True).start()
        elif self._released and not wanted:
            self._released.set()
            self._released = None

    def _keep_team(self, released: threading.Event) -> None:
        import torch

        torch.ones(2**16 * self.threads).add_(1)  # two shares of work for each thread
        released.wait()
