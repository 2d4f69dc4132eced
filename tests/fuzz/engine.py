"""Plays cases in worker processes under limits of CPU time and memory. A worker
that hangs or dies is a finding; the run goes on with another one."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
CPU_SECONDS = 60
"""Most CPU time of a case, with the imports of a new worker: 30 on a slow machine."""
WALL_SECONDS = 900
"""Most time of a case that waits for something that does not come; far above
what a busy machine takes for 60 seconds of CPU."""
MEMORY_BYTES = 3 << 30
"""Most memory of a worker."""
PAGE = resource.getpagesize()
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Tally:
    """What was played of one surface."""

    surface: str
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Place of a failure -> the number of each case that failed there, with its message."""
    cpu_seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, -1)
    """CPU seconds and number of the slowest case."""

    @property
    def played(self) -> int:
        return self.outcomes.total()

    @property
    def failed(self) -> int:
        return sum(map(len, self.findings.values()))


class Worker:
    """A process that plays cases of one surface."""

    def __init__(self, surface: str, folder: Path) -> None:
        self.log = (folder / "worker.log").open("w+b")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "POLARS_MAX_THREADS": "1",
            "DVC_NO_ANALYTICS": "1",
            "DAGSTER_DISABLE_TELEMETRY": "1",
            "TMPDIR": str(folder / "tmp"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CEILING_DIRECTORIES": "/",
        }
        for name in ("home", "tmp"):
            (folder / name).mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.engine", surface, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )

    def play(self, request: dict[str, Any], most: float = CPU_SECONDS) -> dict[str, Any]:
        """Play one case. The answer has `outcome`, or `place` and `message` of a finding.

        Args:
            most: CPU seconds after which the process is ended.
        """
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        began, before = time.monotonic(), self._usage()[0]
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not selector.select(0.2):
                cpu, memory = self._usage()
                if cpu - before > most:
                    return self.end(f"more than {most:g} CPU seconds")
                if memory > MEMORY_BYTES:
                    return self.end(f"more than {MEMORY_BYTES >> 30} GiB of memory")
                if time.monotonic() - began > WALL_SECONDS:
                    return self.end(f"no answer in {WALL_SECONDS} seconds")
        line = self.process.stdout.readline()
        return dict(json.loads(line)) if line else self.end("the process died")

    def _usage(self) -> tuple[float, int]:
        """CPU seconds, with those of ended children, and resident memory in bytes."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0, 0
        return sum(map(int, fields[11:15])) / TICKS, int(fields[21]) * PAGE

    def end(self, message: str) -> dict[str, Any]:
        """End the process, after it has written where it is."""
        if self.process.poll() is None and message:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(1)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.log.seek(0)
        said = self.log.read().decode(errors="replace")[-6000:]
        frames = [line.strip() for line in said.splitlines() if "/dagster_project/" in line and "File " in line]
        place = frames[0].partition("dagster_project/")[2] if frames else "unknown place"
        return {"place": f"{message} ({place})", "message": f"exit code {code}\n{said}", "dead": True}


def play_all(
    surface: str, seed: int, numbers: Iterable[int], cases: dict[int, Any] | None = None, tick: IO[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Play cases by number, or the given ones. Yields the answer to each.

    Args:
        cases: number -> case, for those that are not drawn.
        tick: stream for a line of progress a minute.
    """
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a disk would wait for every commit of an index
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as scratch:
        folder, worker, shown = Path(scratch), None, time.monotonic()
        for number in numbers:
            worker = worker or Worker(surface, folder)
            request = {"seed": seed, "number": number} | ({"case": cases[number]} if cases else {})
            answer = worker.play(request)
            yield number, answer
            if answer.get("dead"):
                worker = None
            if tick and time.monotonic() - shown > 60:
                print(f"{surface}: case {number}", file=tick, flush=True)
                shown = time.monotonic()
        if worker:
            worker.end("")


def tally(surface: str, answers: Iterable[tuple[int, dict[str, Any]]]) -> Tally:
    """Count the answers. Ctrl-C ends the counting, not the report."""
    found = Tally(surface)
    with suppress(KeyboardInterrupt):
        _count(found, answers)
    return found


def _count(found: Tally, answers: Iterable[tuple[int, dict[str, Any]]]) -> None:
    for number, answer in answers:
        if "place" in answer:
            found.findings.setdefault(answer["place"], []).append((number, answer["message"]))
        found.outcomes[answer.get("outcome", "finding")] += 1
        seconds = answer.get("cpu", 0.0)
        found.cpu_seconds += seconds
        found.slowest = max(found.slowest, (seconds, number))


def _serve(surface_name: str, scratch: Path) -> None:
    """The loop of a worker: one line of JSON per case in, one out."""
    from fuzz.surface import drawn, inside, surface

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    played = surface(surface_name)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.process_time()
        folder = scratch / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            case = request.get("case") or drawn(played, request["seed"], request["number"])
            with inside(folder):
                answer = {"outcome": played.play(case, folder)}
        except BaseException as error:  # noqa: BLE001 whatever leaves the project is a finding
            answer = _finding(error)
        answer["cpu"] = round(time.process_time() - began, 3)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _finding(error: BaseException) -> dict[str, Any]:
    """Place (innermost frame of the project, or of the oracle) and message of an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/dagster_project/" in frame.filename] or list(frames)
    last = own[-1]
    text = "".join(traceback.format_exception(error)).encode(errors="backslashreplace").decode()
    oracle = isinstance(error, AssertionError) and "/fuzz/" in frames[-1].filename
    said = (
        f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}: {str(error)[:60]}"
        if oracle
        else type(error).__name__
    )
    name = said if oracle else f"{said} at {last.filename.rpartition('dagster_project/')[2]}:{last.lineno}"
    return {"place": name.encode(errors="backslashreplace").decode(), "message": text[-6000:]}


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
