"""Brings all stages up to date, several at once: one process for each, which reproduces that stage by DVC.

Starts stages as soon as all that they read is done.

A process for each, because DVC's table of locked paths takes two threads of one
process for the same owner (docs/decisions/025).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

from dagster_project.core import faults, params
from dagster_project.core.errors import InputError
from dagster_project.core.layout import is_report
from dagster_project.core.progress import clock
from dagster_project.execution import placement
from dagster_project.lineage import code_lock
from dagster_project.orchestration import durations, dvc, dvc_run, integrity, processes, rwlock
from dagster_project.orchestration.dvc import StageState
from dagster_project.orchestration.leftovers import remove_leftovers
from dagster_project.pipeline import PEDIGREE, Pipeline
from dagster_project.views.texts import text

log = logging.getLogger("pedigree")

RUN = "run"
RESTORED = "restored"
UP_TO_DATE = "up to date"
FAILED = "failed"
INTERRUPTED = "interrupted"
NOT_STARTED = "not started"
"""Outcomes of a stage."""
PROGRESS_INTERVAL = 60.0
"""Seconds between two log lines about running stages."""


@dataclass
class Running:
    """A stage that is running, and its process."""

    process: Any
    result: Connection
    reader: threading.Thread
    began: float
    why: list[str]
    """Why it runs."""


@dataclass
class Outcome:
    outcome: str
    why: list[str] = field(default_factory=list)
    """Why the stage was not up to date."""
    seconds: float | None = None
    error: str = ""

    def document(self) -> dict[str, Any]:
        optional = {"why": self.why, "seconds": self.seconds, "error": self.error}
        return {"outcome": self.outcome, **{name: value for name, value in optional.items() if value}}


def parents(states: Mapping[str, StageState]) -> dict[str, set[str]]:
    """The stages whose output or report each stage reads."""
    found = {address: {i.producer for i in state.inputs if i.producer} for address, state in states.items()}
    for address, state in states.items():
        reports = [path for path in state.code if is_report(path)]
        for name, other in states.items():
            if other.report and any(dvc.overlap(path, other.report) for path in reports):
                found[address].add(name)
    return found


class RunAll:
    """One `pedigree run --all`."""

    def __init__(
        self,
        root: Path,
        jobs: int,
        force: bool,
        only: Collection[str] | None = None,
        pipeline: Pipeline = PEDIGREE,
    ) -> None:
        """Args:
        only: addresses of the stages to bring up to date; None: all.
        pipeline: its stages are those that may run on a cluster.
        """
        self.root, self.jobs, self.force, self.only, self.pipeline = root, jobs, force, only, pipeline
        self.known: Mapping[str, StageState] = {}
        """All stages of dvc.yaml, also those that it got or lost meanwhile."""
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict[str, Running] = {}
        self.waiting: set[str] = set()
        self.interrupted = False
        self.unreadable = False
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__, *dvc_run.PRELOAD])

    def run(self) -> dict[str, Outcome]:
        """Outcome of every stage, in flow order. An interrupt ends the running ones.

        Raises:
            InputError: dvc.yaml has no stages, or a source is missing.
        """
        remove_leftovers(self.root)
        self._record_sources()
        if not (states := self._read()):
            raise InputError("dvc.yaml has no stages", "restore it with `git checkout HEAD dvc.yaml`")
        self.known = states
        self.states = {address: state for address, state in states.items() if self.only is None or address in self.only}
        self.above = {address: above & self.states.keys() for address, above in parents(self.states).items()}
        self.on_cluster = on_cluster(self.root, self.states, self.pipeline)
        self.seconds = durations.known(self.root, self.states, self.on_cluster)
        try:
            while True:
                self._start_ready()
                if not self.running and (self._stopped or not self._queued):
                    break
                self._wait()
        except KeyboardInterrupt:
            self._interrupt()
        for address in self._queued:
            self.outcomes[address] = Outcome(NOT_STARTED)
        return {address: self.outcomes[address] for address in self.states}

    @property
    def _stopped(self) -> bool:
        return self.unreadable or any(one.outcome in {FAILED, INTERRUPTED} for one in self.outcomes.values())

    @property
    def _queued(self) -> list[str]:
        return [address for address in self.states if address not in self.outcomes and address not in self.running]

    def _is_up_to_date(self, state: StageState) -> bool:
        return state.as_recorded and (state.frozen or not (state.changed or self.force))

    def _read(self) -> dict[str, StageState]:
        states = dvc.read_stages(self.root)
        if lines := integrity.set_tampered_aside(self.root, states.values()):
            for line in lines:
                log.warning(line)
            states = dvc.read_stages(self.root)
        return states

    def _record_sources(self) -> None:
        """Record edited sources in their .dvc files, as `dvc repro` does.

        Raises:
            InputError: a source is missing.
        """
        changed, stale = dvc.changed_sources(self.root)
        for problem in changed.values():  # before any is recorded
            what, _, hint = problem.partition("; ")
            if what.endswith(" is missing"):
                raise InputError(what, hint)
        for file in changed:
            with redirect_stdout(sys.stderr):
                dvc_run.reproduce(self.root, file, False, {}, on_wait=lambda holder: log.info(f"waiting: {holder}"))
            log.info(f"{file}: recorded the edited source")
        if stale:
            log.warning(f"not up to date, and only `dvc repro` runs them: {', '.join(stale)}")

    def _start_ready(self) -> None:
        """Start stages until `jobs` run, in flow order; those that are up to date end at once."""
        for address in self._queued:
            if self._stopped or len(self.running) >= self.jobs:
                return
            if not all(above in self.outcomes for above in self.above[address]):
                continue
            state = self.states[address]
            if self._is_up_to_date(state):
                self.outcomes[address] = Outcome(UP_TO_DATE)
            elif state.frozen_problem:
                log.error(state.frozen_problem)
                self.outcomes[address] = Outcome(FAILED, state.changed, error=state.frozen_problem)
            elif writer := rwlock.writer_of(
                self.root, [self.known[above].out for above in dvc.ancestors(self.known, address)]
            ):
                if address not in self.waiting:
                    log.info(f"{address} is waiting: {writer} is writing its inputs")
                    self.waiting.add(address)
            else:
                self._start(address)

    def _start(self, address: str) -> None:
        receive_log, send_log = self.context.Pipe(duplex=False)
        receive, send = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=reproduce_one,
            args=(self.root, address, self.force, os.getpid(), time.time(), {**os.environ}, send_log, send),
        )
        process.start()
        self.waiting.discard(address)
        send_log.close()
        send.close()
        prefix = f"{address} | " if self.jobs > 1 else ""
        reader = threading.Thread(target=_pass_on, args=(receive_log, prefix), daemon=True)
        reader.start()
        why = self.states[address].changed or ["forced"]
        self.running[address] = Running(process, receive, reader, time.monotonic(), why)
        log.info(f"{address}: started ({', '.join(why)}). {self._progress()}")

    def _progress(self) -> str:
        running = {address: self._elapsed(address) for address in self.running}
        # also others are queued while as many stages run as may
        queued = durations.expected(
            self._queued, self.above, running, lambda address: self._is_up_to_date(self.states[address])
        )
        return durations.time_left(
            self.above, running, queued, self.seconds, self.on_cluster, lambda at_work, _: len(at_work) < self.jobs
        )

    def _elapsed(self, address: str) -> float | None:
        ran, now = time.monotonic() - self.running[address].began, time.time()
        return durations.elapsed(self.root, address, now - ran, now)

    def _wait(self) -> None:
        """Wait until a stage ends, and record its outcome."""
        since = time.monotonic()
        ended: list[str] = []
        while not ended:
            if not self.running:  # every ready stage is waiting for another process
                time.sleep(0.5)
                break
            wait_for_any(
                [one.process.sentinel for one in self.running.values()],
                timeout=0.5 if self.waiting else PROGRESS_INTERVAL,
            )
            ended = [address for address, one in self.running.items() if not one.process.is_alive()]
            if not ended and self.waiting:
                break
            if not ended and time.monotonic() - since >= PROGRESS_INTERVAL:
                times = [
                    f"{address} waits on the cluster" if (ran := self._elapsed(address)) is None
                    else f"{address} {clock(ran)}"
                    for address in self.running
                ]  # fmt: skip
                log.info(f"running: {', '.join(times)}. {self._progress()}")
                since = time.monotonic()
        for address in ended:
            self._end(address)
        if ended or self.waiting:
            self._read_again()
        self.waiting -= {*ended}

    def _read_again(self) -> None:
        """Raises:
        InputError: a file was made invalid meanwhile, and no stage is running.
        """
        try:
            now = self._read()
        except InputError as error:
            if not self.running:
                raise
            if not self.unreadable:
                log.error(f"{error}\nno other stage is started until this is corrected; running ones finish")
            self.unreadable = True
            return
        self.unreadable = False
        self.known = {**self.known, **now}
        self.states = {address: now.get(address, state) for address, state in self.states.items()}

    def _end(self, address: str) -> None:
        one = self.running.pop(address)
        seconds = round(time.monotonic() - one.began, 1)
        one.process.join()
        one.reader.join(5)
        answer: dict[str, Any] = {}
        with suppress(EOFError, OSError):
            answer = one.result.recv() if one.result.poll() else {}
        one.result.close()
        outcome = answer.get("outcome") or (INTERRUPTED if self.interrupted else FAILED)
        error = answer.get("error", "") or ("its process ended without a result" if outcome == FAILED else "")
        self.outcomes[address] = Outcome(outcome, one.why, seconds, error)
        if outcome == RUN:
            durations.record(self.root, address, seconds)
        if outcome == FAILED:
            log.error(f"{address}: {error}")
        text = f"{address}: {outcome} after {clock(seconds)}"
        if outcome in {FAILED, INTERRUPTED} and not self.interrupted and (self.running or self._queued):
            text += "; no other stage is started" + (", running ones finish" if self.running else "")
        log.info(text)

    def _interrupt(self) -> None:
        """End the running stages.

        Interrupt each, and kill it if it has not ended after the time that its command has for that.
        """
        self.interrupted = True
        log.info(f"interrupted: ending {', '.join(self.running) or 'nothing'}; finished stages are kept")
        with suppress(KeyboardInterrupt):  # a second one kills
            for one in self.running.values():
                with suppress(ProcessLookupError):
                    os.kill(one.process.pid, signal.SIGINT)
            until = time.monotonic() + processes.CLEAN_UP + 1
            while any(one.process.is_alive() for one in self.running.values()) and time.monotonic() < until:
                time.sleep(0.1)
        for one in self.running.values():
            one.process.kill()  # its command ends with it
        for address in list(self.running):
            self._end(address)


def reproduce_one(
    root: Path,
    address: str,
    force: bool,
    parent: int,
    since: float,
    environment: Mapping[str, str],
    output: Connection,
    result: Connection,
) -> None:
    """Main function of the process of one stage: reproduce it by DVC, and send the outcome.

    Args:
        parent: process that ends this one when it ends.
        since: time at which the parent was running.
        environment: of the parent. The fork server has that of the time when it was started.
        output: receives everything that DVC and the stage's command print.
    """
    os.environ.clear()
    os.environ.update(environment)
    os.setsid()  # Ctrl-C goes to the parent alone, which interrupts each stage once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    processes.end_with(parent, since)
    try:
        result.send({"outcome": _reproduce(root, address, force)})
    except Exception as error:
        if (known := faults.explained(error, root)) is None:
            raise
        result.send({"outcome": FAILED, "error": str(known)})
    except KeyboardInterrupt:
        result.send({"outcome": INTERRUPTED})


def _reproduce(root: Path, address: str, force: bool) -> str:
    done = False
    with dvc_run.commands_started() as started:
        for _ in range(2):  # an output restored from a tampered object is set aside, then the stage runs
            done |= dvc_run.reproduce(
                root,
                address,
                force,
                {"PYTHONUNBUFFERED": "1"},
                on_wait=lambda holder: print(f"{address} is waiting: {holder}", flush=True),
            )
            state = dvc.read_stages(root)[address]
            if not integrity.set_tampered_aside(root, [state]):
                break
    return RUN if started else RESTORED if done else UP_TO_DATE


def _pass_on(output: Connection, prefix: str) -> None:
    with os.fdopen(os.dup(output.fileno()), encoding="utf-8", errors="replace") as lines:
        output.close()
        for line in lines:
            if text := line.rstrip():
                log.info(f"{prefix}{text}")


def as_text(document: Mapping[str, Any]) -> str:
    """One line for each stage that was not up to date, and a summary."""
    by_outcome: dict[str, list[str]] = {}
    for address, stage in document["stages"].items():
        by_outcome.setdefault(stage["outcome"], []).append(address)
    return text("run_all", **document, by_outcome=by_outcome)


def on_cluster(root: Path, addresses: Iterable[str], pipeline: Pipeline) -> set[str]:
    """Those of the stages that the section `execution` places on a cluster."""
    with suppress(InputError):  # an invalid section: the stage reports it when it runs
        values = params.read(root)
        return {
            address
            for address in addresses
            if address.partition("@")[0] in pipeline.stages  # not the user's own
            and placement(values, address, pipeline.stages, pipeline.variants_of)[1].on != durations.LOCAL
        }
    return set()


def run_all(
    root: Path,
    jobs: int,
    force: bool,
    validate: Callable[[Path], Any],
    only: Collection[str] | None = None,
    pipeline: Pipeline = PEDIGREE,
) -> dict[str, Any]:
    """Bring all stages up to date by DVC, up to `jobs` independent ones at once.

    After a failure no other stage is started; running ones finish.

    Args:
        validate: refuses bad parameters before anything runs.
        only, pipeline: as for `RunAll`.
    Returns:
        Document with the outcome of every stage.
    """
    began = time.monotonic()
    code_lock.refuse_other_code(root)
    validate(root)
    whole = RunAll(root, jobs, force, only, pipeline)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the stages as Ctrl-C does
    try:
        outcomes = whole.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    return {
        "passed": all(one.outcome in {RUN, RESTORED, UP_TO_DATE} for one in outcomes.values()),
        "interrupted": whole.interrupted,
        "jobs": jobs,
        "seconds": round(time.monotonic() - began, 1),
        "stages": {address: one.document() for address, one in outcomes.items()},
    }
