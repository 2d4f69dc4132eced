"""Classes `clock` and `twice`: a clock that was set back or forward, and two of everything at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from builders.warm import Outcome

from faults import project
from faults.case import Case, Play, Violation
from faults.kills import earlier

OFFSETS = {"10-years-back": "-3650d", "2-days-back": "-2d", "2-days-forward": "+2d", "10-years-forward": "+3650d"}
MOMENTS = {"1970": 1.0, "2001": 1e9, "tomorrow": 86400.0, "2099": 4.07e9}
"""Modification times of all files: what a clock leaves behind that was wrong. Below 1e6: seconds from now."""


def clock(projects: project.Projects, fixed: bool) -> Iterator[Case]:
    for name, at in MOMENTS.items():
        for words in (("dvc", "repro"), ("pedigree", "run", "--all")):
            if not fixed or (name, words[0]) in {("2099", "pedigree"), ("1970", "dvc")}:
                yield Case(f"clock/files-of-{name}/{words[0]}", "instructions", _files_of(at, words))
    library = next((str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), "")
    for name, offset in OFFSETS.items() if library and not fixed else ():
        for stage in ("raw_examples", "instructions"):
            yield Case(
                f"clock/{name}/{stage}",
                earlier(stage),
                _at_another_time(
                    stage, {"LD_PRELOAD": library, "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
                ),
            )


def _files_of(at: float, words: tuple[str, ...]) -> Callable[[Play], None]:
    def play(at_work: Play) -> None:
        moment = time.time() + at if 1 < at < 1e6 else at
        for path in [*at_work.root.rglob("*"), at_work.root]:
            os.utime(path, (moment, moment), follow_symlinks=False)
        at_work.recovers(project.DONE, *words)

    return play


def _at_another_time(stage: str, variables: Mapping[str, str]) -> Callable[[Play], None]:
    """The stage runs at another time of the clock; the next run is back at the right time."""

    def play(at_work: Play) -> None:
        words = (sys.executable, "-m", "dvc", "repro", stage)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**at_work.place.environment(), **variables, "PATH": path}
        done = subprocess.run(words, cwd=at_work.root, env=environment, capture_output=True, text=True, check=False)
        outcome = Outcome(words, done.returncode, done.stdout, done.stderr)
        at_work.outcomes.append(outcome)
        if outcome.code:
            raise Violation(outcome.text)
        at_work.recovers(stage)
        if "didn't change" not in at_work.outcomes[-3].text:
            raise Violation(f"the clock made the stage stale:\n{at_work.outcomes[-3].text}")

    return play


PAIRS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "repro-repro": ("instructions", ("dvc", "repro", "splits"), ("dvc", "repro", "splits")),
    "repro-repro-all": ("splits", ("dvc", "repro"), ("dvc", "repro")),
    "run-run": ("instructions", ("pedigree", "run", "splits"), ("pedigree", "run", "splits")),
    "run-repro": ("instructions", ("pedigree", "run", "splits"), ("dvc", "repro", "splits")),
    "all-all": ("instructions", ("pedigree", "run", "--all"), ("pedigree", "run", "--all")),
    "all-repro": ("instructions", ("pedigree", "run", "--all"), ("dvc", "repro")),
    "all-two-jobs": ("", ("pedigree", "run", "--all", "--jobs", "2"), ("pedigree", "run", "--all", "--jobs", "2")),
    "sync-sync": (project.DONE, ("pedigree", "sync"), ("pedigree", "sync")),
    "sync-repro": ("splits", ("pedigree", "sync"), ("dvc", "repro")),
    "sync-all": ("splits", ("pedigree", "sync"), ("pedigree", "run", "--all")),
    "verify-verify": (project.DONE, ("pedigree", "verify", "--integrity"), ("pedigree", "verify", "--integrity")),
    "verify-all": ("splits", ("pedigree", "verify", "--integrity"), ("pedigree", "run", "--all")),
    "audit-audit": (project.DONE, ("pedigree", "audit", "tokenized"), ("pedigree", "audit", "tokenized")),
    "audit-repro": ("splits", ("pedigree", "audit", "splits"), ("dvc", "repro")),
    "status-repro": ("splits", ("dvc", "status"), ("dvc", "repro")),
    "render-all": ("splits", ("pedigree", "render"), ("pedigree", "run", "--all")),
    "export-export": (
        project.DONE,
        ("pedigree", "export", "tokenized", "--format", "openlineage"),
        ("pedigree", "export", "tokenized", "--format", "openlineage"),
    ),
}
DELAYS = (0.0, 0.15, 0.4)
"""Seconds between the starts of the two."""


def twice(projects: project.Projects, fixed: bool) -> Iterator[Case]:
    for name, (state, *both) in PAIRS.items():
        for delay in DELAYS[:1] if fixed else DELAYS:
            if not fixed or name in ("repro-repro", "all-all", "sync-sync"):
                yield Case(f"twice/{name}/{delay:g}", state, _both(tuple(both), delay))


def _both(both: tuple[tuple[str, ...], ...], delay: float) -> Callable[[Play], None]:
    def play(at_work: Play) -> None:
        first = at_work.start(*both[0])
        time.sleep(delay)
        second = at_work.start(*both[1])
        for command in (first, second):
            at_work.explained(at_work.ended(command))
        goal = "splits" if ("pedigree", "run", "splits") in both or ("dvc", "repro", "splits") in both else project.DONE
        at_work.recovers(goal)

    return play


CLASSES = {"clock": clock, "twice": twice}
