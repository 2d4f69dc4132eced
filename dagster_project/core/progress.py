"""Progress of long-running work as log lines, with an estimate of the remaining time."""

from __future__ import annotations

import logging
import time

log = logging.getLogger("pedigree")


def clock(seconds: float) -> str:
    """A duration as minutes and seconds, e.g. 3:10; with hours if there are any, e.g. 1:03:10."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Counts towards a known total and logs at most every few seconds.

    >>> bar = Progress("training", total=90, unit="step")
    >>> bar.advance(note="loss 1.93")        # training: 1/90 steps, about 3:10 left, loss 1.93
    """

    def __init__(self, what: str, total: int, unit: str, every: float = 5.0) -> None:
        """Args:
        every: seconds between two lines; the first and the last step always get one.
        """
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.done, self.start, self.last_logged = 0, time.monotonic(), float("-inf")

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        if self.done < self.total and now - self.last_logged < self.every:
            return
        self.last_logged = now
        left = (now - self.start) / self.done * (self.total - self.done)
        state = f"about {clock(left)} left" if self.done < self.total else f"done in {now - self.start:.0f} s"
        log.info(f"{self.what}: {self.done}/{self.total} {self.unit}s, {state}" + (f", {note}" if note else ""))
