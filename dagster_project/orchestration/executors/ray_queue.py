"""What a job that waits for resources has ahead of it on its Ray cluster, and when it could begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.core.progress import clock
from dagster_project.core.text import finite_number, listed, many, shortened, visible
from dagster_project.orchestration import durations

STAGE, PROJECT, RESOURCES = "pedigree/stage", "pedigree/project", "pedigree/resources"
"""Metadata of a job."""
SECONDS = "pedigree/seconds"
"""Metadata of a job: how long its stage took the last time on a cluster, by its driver's record; absent if unknown."""
SHOWN = 5
"""Jobs that a line lists."""


@dataclass(frozen=True)
class JobAhead:
    """A job of Pedigree that runs, or that was submitted earlier and waits."""

    name: str
    resources: str
    seconds: float | None
    """How long its stage took the last time; None if unknown."""
    elapsed: float | None
    """Seconds that it has run, or 0 if its beginning is unknown; None if it waits."""
    is_exact: bool = True
    """Whether `elapsed` is known: Ray has only the time at which a job was submitted, so of a job of another workspace
    it is not."""

    @property
    def left(self) -> float | None:
        return None if self.seconds is None else max(0.0, self.seconds - (self.elapsed or 0.0))

    @property
    def text(self) -> str:
        if self.left is None:
            time_left = "how long it takes is unknown"
        elif self.elapsed is None:
            time_left = f"took {clock(self.left)} the last time"
        elif not self.left:
            time_left = "runs longer than the last time"
        else:
            time_left = f"{'about' if self.is_exact else 'at most about'} {clock(self.left)} left"
        return f"{self.name} ({self.resources}{', waits' if self.elapsed is None else ''}; {time_left})"


def jobs_ahead(jobs: Sequence[Any], own: str, root: Path, now: float) -> str:
    """What runs or waits before a job, as a part of a log line.

    Args:
        jobs: Ray's details of all jobs of the cluster.
        own: id of the job that waits.
        root: its workspace.
        now: time in seconds.
    """
    details = next((job for job in jobs if job.submission_id == own), None)
    project = (details.metadata or {}).get(PROJECT) if details else None
    submitted = details.start_time if details and details.start_time else now * 1000
    before = [
        job
        for job in jobs
        if job.submission_id != own
        and not job.status.is_terminal()
        and (str(job.status) == "RUNNING" or (job.start_time or 0) < submitted)
    ]
    began = {one.get("job"): one.get("began") for one in durations.jobs(root)}
    ran = {name: now - at for name, at in began.items() if at is not None}
    found = [_ahead(job, project, ran.get(job.submission_id)) for job in before if STAGE in (job.metadata or {})]
    if not before:
        return "no other job is ahead of it"
    others = len(before) - len(found)
    named = [one.text for one in found] + ([f"{many(others, 'job')} of other programs"] if others else [])
    text = f"ahead of it: {listed(named, SHOWN)}"
    estimate = "" if others else _estimate(found)
    return f"{text}; estimate: {estimate}" if estimate else text


def _ahead(job: Any, project: str | None, ran: float | None) -> JobAhead:
    metadata = job.metadata
    name = _plain(metadata[STAGE]) + ("" if metadata.get(PROJECT) == project else " of another workspace")
    resources = _plain(metadata.get(RESOURCES, "")) or "resources unknown"
    seconds = None
    with suppress(KeyError, ValueError):
        seconds = max(0.0, finite_number(metadata[SECONDS]))
    if str(job.status) != "RUNNING":
        return JobAhead(name, resources, seconds, None)
    return JobAhead(name, resources, seconds, max(0.0, ran or 0.0), is_exact=ran is not None)


def has_too_few_nodes(url: str, needed: Mapping[str, float], nodes: int = 1, image: str | None = None) -> bool:
    """Whether fewer nodes of a cluster than a job needs have these resources, even when they are idle. False if the
    resources of some nodes are unknown.

    Args:
        url: of the cluster's dashboard.
        needed: name of a resource, as Ray writes it ("CPU", "memory" in bytes, "trainer") -> amount, on each node.
        nodes: of the job.
        image: label that they must have; None if any may be used.
    """
    from ray.util.state import list_nodes
    from ray.util.state.common import RAY_MAX_LIMIT_FROM_API_SERVER
    from ray.util.state.exception import RayStateApiException

    try:
        found = list_nodes(url, filters=[("state", "=", "ALIVE")], limit=RAY_MAX_LIMIT_FROM_API_SERVER)
    except (RayStateApiException, RuntimeError, OSError):
        return False
    if not found or not all(node.resources_total for node in found):
        return False
    usable = [node.resources_total for node in found if not image or (node.labels or {}).get("image") == image]
    return sum(all(total.get(name, 0) >= amount for name, amount in needed.items()) for total in usable) < nodes


def _plain(text: str) -> str:
    """Text from the metadata of a job, which anyone with access to the cluster can write."""
    return shortened(visible(" ".join(text.split())), 100)


def _estimate(found: Sequence[JobAhead]) -> str:
    """When the resources could be free; empty if the time left of a job that runs is unknown."""
    running = {str(i): one for i, one in enumerate(found) if one.elapsed is not None}
    waiting = {str(i): one for i, one in enumerate(found) if one.elapsed is None}
    left = [one.left for one in running.values() if one.left is not None]
    if not left or len(left) < len(running):
        return ""
    how = "about" if all(one.is_exact for one in running.values()) else "at most about"
    text = f"it could begin {_after(min(left), how)}"
    seconds = {name: one.seconds for name, one in {**running, **waiting}.items() if one.seconds is not None}
    if len(found) > 1:
        text += ", when the first of them ends"
        if len(seconds) == len(found):
            ran = {name: one.elapsed or 0.0 for name, one in running.items()}
            last = durations.remaining({}, ran, waiting, seconds, lambda at_work, _: len(at_work) < len(running))
            text += f", or {_after(last, how)}, when all have ended"
    return f"{text}, if they hold what it needs and take as long as the last time"


def _after(seconds: float, how: str) -> str:
    return f"in {how} {clock(seconds)}" if seconds else "at any moment"
