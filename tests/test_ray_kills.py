"""Random operations on a Ray cluster of two nodes, two stages at once, in which random processes are killed: what is
recorded is what a local run records, and nothing is recorded by a job whose driver is gone.

A second project has the same edits and runs everything locally, so that it records what is true. PEDIGREE_RAY_STEPS is
the number of operations, PEDIGREE_RAY_SEED their seed; `make soak` plays many.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
from builders import small_pipeline
from builders.agreement import agree
from builders.cluster import Cluster, add_remote
from builders.ray_jobs import all_jobs, is_stage_command, stages_on_nodes, until, workers
from builders.s3 import BUCKET, S3Server
from conftest import run, skip_without
from ruamel.yaml import YAML

from dagster_project.orchestration.executors.ray import PROJECT, _project_id

pytestmark = [pytest.mark.cluster, pytest.mark.long]

skip_without("ray", "moto", "dvc_s3")

STEPS, SEED = int(os.environ.get("PEDIGREE_RAY_STEPS", "4")), int(os.environ.get("PEDIGREE_RAY_SEED", "3"))
OPERATIONS = {
    "run --all": ["small_pipeline.py", "run-all", "2"],
    "materialize": ["small_pipeline.py", "materialize-at-once"],
    "dvc repro": ["-m", "dvc", "repro", "-q"],
}
"""What brings everything up to date. The first two run two stages at once."""
REPLACED = ("worker", "stage", "node")
"""Victims on the cluster, whose jobs are replaced."""
LOCAL = ("driver", "DVC", "front end")
"""Victims on this host, whose jobs go on without a driver."""
HANGS = 900
"""Seconds after which what has not ended counts as hanging."""
ADDRESSES = ("raw", "inst", "tok", "adapter@lora", "adapter@dora", "cmp")


def recorded(root: Path) -> dict[str, Any]:
    """The entries of dvc.lock."""
    return json.loads(json.dumps(YAML(typ="safe").load((root / "dvc.lock").read_text())["stages"]))


def outputs(root: Path) -> dict[str, dict[str, bytes]]:
    return {address: small_pipeline.published(root, address) for address in ADDRESSES}


class RandomKills:
    """The same project twice: `root` on Ray, with kills, and `local` without either."""

    def __init__(self, root: Path, local: Path, cluster: Cluster, seed: int) -> None:
        self.root, self.local, self.cluster, self.random = root, local, cluster, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.true: dict[str, list[Any]] = {}
        self.earlier: set[str] = set()
        self.family: set[int] = set()
        """Process ids of the front ends of a step, and of what they started."""
        (root / ".dagster").mkdir()
        (root / ".dagster/dagster.yaml").write_text("telemetry: {enabled: false}\n")
        self.instance = dg.DagsterInstance.from_config(str(root / ".dagster"))
        self.learn()

    def learn(self) -> None:
        """Run everything locally, and note the entries."""
        done = run([sys.executable, "-m", "dvc", "repro", "-q"], self.local, PEDIGREE_EXECUTION="local")
        self.sound = done.returncode == 0
        for address, entry in recorded(self.local).items():
            if entry not in self.true.setdefault(address, []):
                self.true[address].append(entry)

    # ---- edits -------------------------------------------------------------------------------------------------------

    def write(self, path: str, text: str) -> None:
        for project in (self.root, self.local):
            (project / path).unlink(missing_ok=True)  # it may be a link to the cache
            (project / path).write_text(text)

    def edit(self) -> str:
        """A random edit in both projects."""
        what = self.random.choice(["source", "source under DVC", "parameter", "variant", "code", "bad row"])
        number = self.random.randrange(4)
        values = json.loads((self.root / "params.yaml").read_text())
        if what in {"source", "bad row"}:
            self.write("data/sources/g.txt", f"r{number}" + ("\nBAD" if what == "bad row" else ""))
        elif what == "source under DVC":
            self.write("data/sources/d.txt", f"d{number}")
            for project in (self.root, self.local):
                assert run([sys.executable, "-m", "dvc", "add", "-q", "data/sources/d.txt"], project).returncode == 0
        elif what == "parameter":
            values[self.random.choice(["minlen", "testseed"])] = number
            self.write("params.yaml", json.dumps(values))
        elif what == "variant":
            values["variants"][self.random.choice(["lora", "dora"])]["r"] = 2**number
            self.write("params.yaml", json.dumps(values))
        else:
            self.edit_code(self.random.choice(["raw", "inst", "tok", "adapter", "cmp"]))
        return what

    def edit_code(self, stage: str) -> None:
        self.write(f"code/{stage}.py", f"V = {self.counts['steps'] + 3}.{self.random.randrange(10**6)}\n")

    def harm(self) -> None:
        """Delete or tamper with an output on the side of Ray."""
        folder = self.root / "data" / self.random.choice(ADDRESSES).replace("@", "/")
        if self.random.random() < 0.5:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            for file in sorted(folder.glob("*"))[:1]:
                file.unlink()
                file.write_text("tampered")

    # ---- operations --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Some edits, then one or two front ends at once, of which a random process is killed."""
        self.counts["steps"] += 1
        for _ in range(self.random.randrange(2)):
            self.counts[f"edit: {self.edit()}"] += 1
        if self.random.random() < 0.2:
            self.counts["edit: output"] += 1
            self.harm()
        if "BAD" in (self.local / "data/sources/g.txt").read_text() and self.random.random() < 0.7:
            self.write("data/sources/g.txt", "r0")
        stage = self.random.choice(["raw", "tok", "adapter", "adapter", "adapter"])
        self.edit_code(stage)  # so that there is something to do
        self.learn()
        names = [self.random.choice([*OPERATIONS][:2])]
        if self.random.random() < 0.25:
            names.append(self.random.choice([*OPERATIONS]))
        victim = self.random.choice(["nobody", "worker", "worker", "stage", *LOCAL, "interrupt", "node"])
        edited = victim == "nobody" and self.random.random() < 0.5
        what = f"step {self.counts['steps']}: {' and '.join(names)}, {stage}, victim: {victim}"
        print(what, flush=True)
        codes = self.play(names, stage, victim, edited)
        self.verify(what, names, codes, victim, edited)

    def settle(self) -> None:
        """Bring everything up to date without a kill: both projects have the same files."""
        self.write("data/sources/g.txt", "r0")
        self.learn()
        codes = self.play(["run --all"], "", "nobody", False)
        self.verify("at the end", ["run --all"], codes, "nobody", False)

    def play(self, names: list[str], stage: str, victim: str, edited: bool) -> list[int]:
        """Returns the exit codes of the front ends, when their processes have ended."""
        self.earlier, self.family = {job.submission_id for job in self.running_jobs()}, set()
        gate = self.root.parent / f"gate-{self.counts['steps']}"
        at_gate = bool(stage) and (edited or victim == "node" or self.random.random() < 0.6)
        (self.root / "hold.json").write_text(json.dumps({stage: [str(gate)]} if at_gate else {}))
        processes = [self.start(name, number) for number, name in enumerate(names)]
        try:
            if at_gate:
                count = 2 if stage == "adapter" and self.random.random() < 0.7 else 1
                self.wait_for(processes, lambda: self.on_nodes(stage) >= count)
                self.counts["two stages at once"] += self.on_nodes(stage) >= 2
                time.sleep(self.random.uniform(0, 2))
            elif victim != "nobody":
                delay = time.monotonic() + self.random.uniform(0, 25)
                self.wait_for(processes, lambda: time.monotonic() > delay)
            if victim != "nobody":
                self.counts[f"kill: {victim}"] += self.kill(victim, processes)
            if edited:
                self.counts["edit while stages run"] += 1
                self.edit()
                self.learn()
        finally:
            gate.touch()
        self.wait_for(processes, lambda: False)
        until(lambda: not any(map(psutil.pid_exists, self.family)), HANGS)
        return [process.wait() for process in processes]

    def start(self, name: str, number: int) -> subprocess.Popen[bytes]:
        errors = (self.root.parent / f"errors-{number}.txt").open("w")
        return subprocess.Popen(
            [sys.executable, *OPERATIONS[name]], cwd=self.root, stdout=errors, stderr=errors, start_new_session=True
        )

    def wait_for(self, processes: list[subprocess.Popen[bytes]], condition: Any) -> None:
        """Until the condition holds, or all front ends have ended."""
        ends = time.monotonic() + HANGS
        self.family |= {child.pid for process in processes for child in children(process)}
        while not condition() and None in [process.poll() for process in processes]:
            assert time.monotonic() < ends, "a front end hangs"
            self.family |= {child.pid for process in processes for child in children(process)}
            time.sleep(0.5)

    def on_nodes(self, stage: str) -> int:
        """Number of variants of a stage that run on the nodes."""
        found = set()
        for process in stages_on_nodes(self.cluster, stage):
            with suppress(psutil.Error):
                found.add(process.cmdline()[-1])
        return len(found)

    def kill(self, victim: str, processes: list[subprocess.Popen[bytes]]) -> int:
        """Returns whether it was hit."""
        front_end = self.random.choice(processes)
        if victim in {"front end", "interrupt"}:
            running = front_end.poll() is None
            front_end.send_signal(signal.SIGINT if victim == "interrupt" else signal.SIGKILL)
            return int(running)
        if victim == "node":
            self.cluster.kill("second")
            self.cluster.add("second", f"--address=127.0.0.1:{self.cluster.port}")
            return 1
        drivers = [*filter(is_stage_command, children(front_end))]
        candidates = {
            "worker": lambda: [one for address in ADDRESSES for one in workers(self.cluster, address)],
            "stage": lambda: stages_on_nodes(self.cluster),
            "driver": lambda: drivers,
            "DVC": lambda: [parent for one in drivers for parent in [dvc_of(one)] if parent.pid != front_end.pid],
        }[victim]()
        if not candidates:
            return 0
        try:
            self.random.choice(candidates).kill()
        except psutil.NoSuchProcess:
            return 0
        return 1

    # ---- what must hold afterwards -----------------------------------------------------------------------------------

    def running_jobs(self) -> list[Any]:
        project = _project_id(self.root)
        return [
            job for job in all_jobs() if (job.metadata or {}).get(PROJECT) == project and not job.status.is_terminal()
        ]

    def new_jobs(self) -> list[Any]:
        """Those of this step that have not ended. Ray ends one that waits for resources as soon as it has them."""
        return [job for job in self.running_jobs() if job.submission_id not in self.earlier]

    def verify(self, what: str, names: list[str], codes: list[int], victim: str, edited: bool) -> None:
        log = "\n".join(path.read_text() for path in sorted(self.root.parent.glob("errors-*.txt")))
        for address, entry in recorded(self.root).items():
            assert entry in self.true[address], f"{what}: {address} was recorded as {entry}\n{log}"
        orphans = self.running_jobs()
        if victim == "interrupt" and len(names) == 1:
            until(lambda: not [job for job in self.new_jobs() if str(job.status) != "PENDING"], 60)
            orphans = self.running_jobs()
        if orphans and self.random.random() < 0.5:
            self.counts["orphans whose end was waited for"] += len(orphans)
            before = recorded(self.root), outputs(self.root)
            until(lambda: not self.running_jobs(), HANGS)
            assert (recorded(self.root), outputs(self.root)) == before, f"{what}: an orphan wrote into the project"
        elif orphans:
            self.counts["orphans left for the next step"] += len(orphans)
        changed = agree(self.root, self.instance, what)
        if victim in {"nobody", *REPLACED} and self.sound and not edited:
            assert codes[0] == 0 and (codes[-1] == 0 or names[-1] == "dvc repro"), f"{what}: {codes}\n{log}"
            assert not changed, f"{what}: {changed}\n{log}"
            assert recorded(self.root) == recorded(self.local), what
            assert outputs(self.root) == outputs(self.local), what
            self.counts["equal to the local project"] += 1


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def dvc_of(driver: psutil.Process) -> psutil.Process:
    """The process of DVC that started a driver by a shell, or without one."""
    parent = driver.parent()
    return parent.parent() if parent.name() in {"sh", "bash", "dash"} else parent


@pytest.fixture
def days(
    tmp_path: Path, _made: Path, cluster: Cluster, driver: dict[str, str], s3: S3Server, warm_small: None
) -> Iterator[RandomKills]:
    root, local = (
        Path(shutil.copytree(_made, tmp_path / name / "project", symlinks=True)) for name in ("ray", "local")
    )
    add_remote(root, f"s3://{BUCKET}/{tmp_path.name}", s3.endpoint)
    played = RandomKills(root, local, cluster, SEED)
    yield played
    played.instance.dispose()
    print("\n".join(f"{count:6} {what}" for what, count in sorted(played.counts.items())), flush=True)


@pytest.mark.timeout(0)
def test_what_is_recorded_is_true_whatever_is_killed(days: RandomKills) -> None:
    for _ in range(STEPS):
        days.step()
    days.settle()
