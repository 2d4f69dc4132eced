"""How long stages took, and by that the time left of those that run and those that are queued.

Of each stage only the latest run counts, by the place where it ran. Waits for a cluster are not part of a duration:
they depend on what else runs there.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dagster_project.core.context import measured
from dagster_project.core.progress import clock
from dagster_project.core.records import remove, write_json

SECONDS = Path(".dvc") / "tmp" / "pedigree" / "seconds"
"""Folder with the duration of each stage's latest run, in a folder for each place."""
JOBS = Path(".dvc") / "tmp" / "pedigree" / "jobs"
"""Folder with the job of each stage that is on a cluster now."""
LOCAL, RAY = "local", "ray"
"""Places where a stage runs, as in `execution` of params.yaml."""


def record(root: Path, address: str, seconds: float) -> None:
    """Record the duration of a run that was just published.

    Of one on a cluster, only the time of the job with the result counts, not its wait, nor jobs that were lost.
    """
    execution = _execution(root, address)
    place = execution.get("on", LOCAL)
    found = seconds if place == LOCAL else _on_cluster(execution)
    with suppress(OSError):  # the run itself has succeeded
        if found is not None:
            write_json(root / SECONDS / place / f"{address}.json", {"seconds": round(found, 1)})


def last(root: Path, address: str, place: str | None = None) -> float | None:
    """Duration of the stage's latest run in this place, or else of its training; None if unknown.

    Args:
        place: None: wherever it ran last.
    """
    for path in [root / SECONDS / place / f"{address}.json"] if place else _latest_first(root, address):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads(path.read_bytes())["seconds"])
    execution = _execution(root, address)
    if place not in {None, execution.get("on", LOCAL)}:
        return None
    value = _on_cluster(execution) if execution else measured(root, address).get("training_seconds")
    return float(value) if value else None


def known(root: Path, addresses: Iterable[str], on_cluster: Collection[str]) -> dict[str, float]:
    """Duration of each stage's latest run in the place where it would run now, where known.

    Args:
        on_cluster: those of the stages that run on Ray.
    """
    found = {address: last(root, address, RAY if address in on_cluster else LOCAL) for address in addresses}
    return {address: seconds for address, seconds in found.items() if seconds is not None}


def _latest_first(root: Path, address: str) -> list[Path]:
    return sorted((root / SECONDS).glob(f"*/{address}.json"), key=lambda path: path.lstat().st_mtime_ns, reverse=True)


def _execution(root: Path, address: str) -> Mapping[str, Any]:
    """Where the run of the present output ran; empty if on this machine."""
    found: Any = measured(root, address).get("execution")
    return found if isinstance(found, Mapping) else {}


def _on_cluster(execution: Mapping[str, Any]) -> float | None:
    seconds = [execution.get(name) for name in ("compute_seconds", "transfer_seconds")]
    return sum(map(float, filter(None, seconds))) if seconds[0] is not None else None


def write_job(root: Path, address: str, job: str, began: float | None) -> None:
    """Note the job of a stage on a cluster, for other processes of this workspace.

    Args:
        began: time at which its worker began; None while it waits.
    """
    with suppress(OSError):  # it is only for progress
        write_json(root / JOBS / f"{address}.json", {"job": job, "began": began, "written": time.time()})


def jobs(root: Path) -> list[Mapping[str, Any]]:
    """What `write_job` noted of each stage that is on a cluster now, or was when its driver was killed."""
    return [one for path in (root / JOBS).glob("*.json") if (one := _job(path))]


def _job(path: Path) -> Mapping[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, Mapping) else {}
    return {}


def remove_job(root: Path, address: str) -> None:
    with suppress(OSError):
        remove(root / JOBS / f"{address}.json")


def elapsed(root: Path, address: str, since: float, now: float) -> float | None:
    """Seconds that a stage has run which was started at the time `since`; None while its job waits on a cluster."""
    job = _job(root / JOBS / f"{address}.json")
    if job.get("written", 0.0) < since:
        return now - since
    return None if job["began"] is None else max(0.0, now - job["began"])


def expected(
    addresses: Iterable[str],
    above: Mapping[str, Collection[str]],
    running: Iterable[str],
    is_up_to_date: Callable[[str], bool],
) -> list[str]:
    """Those of some queued stages, in flow order, that are not up to date, or that read one which runs or is expected.

    DVC may restore some of them, or find that what they read has not changed after all: that is known when they start.
    """
    found = {*running}
    queued = []
    for address in addresses:
        if not is_up_to_date(address) or found & {*above[address]}:
            found.add(address)
            queued.append(address)
    return queued


def remaining(
    above: Mapping[str, Collection[str]],
    running: Mapping[str, float],
    queued: Iterable[str],
    seconds: Mapping[str, float],
    has_room: Callable[[Collection[str], str], bool],
) -> float:
    """Seconds until all of these stages are done, if each takes as long as the last time; infinite if some never start.

    A stage without a known duration counts as 0.

    Args:
        above: stages that each stage reads.
        running: seconds that each running stage has run.
        has_room: whether a stage may start while others are at work.
    """
    at_work = {address: max(0.0, seconds.get(address, 0.0) - ran) for address, ran in running.items()}
    left, total = list(queued), 0.0
    while at_work or left:
        for address in list(left):
            if not {*above.get(address, ())} & {*at_work, *left} and has_room(at_work, address):
                at_work[address] = seconds.get(address, 0.0)
                left.remove(address)
        if not at_work:
            return math.inf
        step = min(at_work.values())
        total += step
        at_work = {address: rest - step for address, rest in at_work.items() if rest > step}
    return total


def time_left(
    above: Mapping[str, Collection[str]],
    running: Mapping[str, float | None],
    queued: Sequence[str],
    seconds: Mapping[str, float],
    on_cluster: Collection[str],
    has_room: Callable[[Collection[str], str], bool],
) -> str:
    """How many stages run and are queued, and an estimate of the time left, with what it leaves out.

    Args:
        running: seconds that each running stage has run (`elapsed`).
        seconds: those of the latest run of each stage, where known.
        on_cluster: those of the stages that run on a cluster.
    """
    waiting = sum(ran is None for ran in running.values())
    text = f"{len(running) - waiting} running, {len(queued)} queued"
    if waiting:
        text = f"{len(running) - waiting} running, {waiting} waiting on the cluster, {len(queued)} queued"
    known = [address for address in [*running, *queued] if address in seconds]
    if not known:
        return f"{text}, time left unknown: no run of them was measured here"
    left = remaining(above, {address: ran or 0.0 for address, ran in running.items()}, queued, seconds, has_room)
    if math.isinf(left):
        return f"{text}, time left unknown: some cannot start"
    how = "at least" if len(known) < len(running) + len(queued) else "about"
    text += f", {how} {clock(left)} left{' if all run' if queued else ''}, by the last runs"
    waits = waiting or {*on_cluster} & {*running, *queued}  # one that runs may have to wait again, if its job is lost
    return f"{text}; waits on the cluster are not included" if waits else text
