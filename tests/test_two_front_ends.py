"""The main property: after any sequence of operations and one sync, Dagster and DVC agree, and both are correct.

Hypothesis plays random sequences of edits, runs with either front end, two operations at once that each run two stages
at once, tampering, checkouts and kills on a small real pipeline (tests/builders/small_pipeline.py) with real DVC and a
real Dagster instance. `make soak` plays thousands of steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import chdir
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
from builders import small_pipeline
from builders.agreement import agree
from builders.growth import Growth
from dvc.cli import main as dvc_main
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from dagster_project.orchestration.dagster.assets import build_definitions
from dagster_project.orchestration.dvc import read_stages

COUNTS: Counter[str] = Counter()
"""What was played, for the soak's summary."""

OPERATIONS = {
    "dvc repro": ["-m", "dvc", "repro", "-q"],
    "run --all": ["small_pipeline.py", "run-all", "2"],
    "materialize": ["small_pipeline.py", "materialize-at-once"],
}
"""What brings everything up to date. The last two run two stages at once."""

HANGS = 900
"""Seconds after which whatever has not ended counts as hanging, far above what
two operations at once take on a busy machine."""

_template: list[Path] = []


def template() -> Path:
    if not _template:
        _template.append(small_pipeline.make_project(Path(tempfile.mkdtemp(prefix="two-front-ends-")) / "project"))
    return _template[0]


def dvc(root: Path, *arguments: str) -> int:
    with chdir(root):
        return int(dvc_main([*arguments, "-q"]))


class TwoFrontEnds(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        os.environ["LOG_INPUTS"] = "1"
        self.folder = Path(tempfile.mkdtemp(prefix="two-front-ends-"))
        self.root = self.folder / "project"
        shutil.copytree(template(), self.root, symlinks=True)
        self.open()
        self.old = build_definitions(self.root, small_pipeline.PIPELINE)
        self.yaml = {"note": "", "with_extra": False, "raw_reads_d": True}
        self.committed = False  # `dvc commit` records what no stage made; after it success proves less

    def open(self) -> None:
        home = self.root / ".dagster"
        home.mkdir(exist_ok=True)
        (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        self.instance = dg.DagsterInstance.from_config(str(home))

    def teardown(self) -> None:
        os.environ.pop("LOG_INPUTS", None)
        if hasattr(self, "folder"):
            self.instance.dispose()
            shutil.rmtree(self.folder, ignore_errors=True)

    # what people do

    @rule(value=st.integers(0, 3), where=st.sampled_from(["g", "d"]), added=st.booleans())
    def edit_source(self, value: int, where: str, added: bool) -> None:
        def act() -> None:
            path = self.root / f"data/sources/{where}.txt"
            path.unlink(missing_ok=True)
            path.write_text(f"r{value}")
            if where == "d" and added:
                dvc(self.root, "add", str(path))

        self.step("edit source", act)

    @rule()
    def spoil_source(self) -> None:
        self.step("spoil source", lambda: (self.root / "data/sources/g.txt").write_text("r0\nBAD"))

    @rule()
    def revert_source(self) -> None:
        self.step("revert source", lambda: small_pipeline.git(self.root, "checkout", "--", "data/sources/g.txt"))

    @rule(name=st.sampled_from(["minlen", "testseed"]), value=st.integers(1, 3))
    def edit_parameter(self, name: str, value: int) -> None:
        self.step("edit parameter", lambda: self.write_values({**self.values(), name: value}))

    @rule(stage=st.sampled_from(small_pipeline.STAGES), value=st.integers(0, 2))
    def edit_code(self, stage: str, value: int) -> None:
        self.step("edit code", lambda: (self.root / f"code/{stage}.py").write_text(f"V = {value}\n"))

    @rule(key=st.sampled_from(["note", "with_extra", "raw_reads_d"]))
    def edit_dvc_yaml(self, key: str) -> None:
        def act() -> None:
            self.yaml[key] = (" --note" if not self.yaml[key] else "") if key == "note" else not self.yaml[key]
            (self.root / "dvc.yaml").write_text(small_pipeline.dvc_yaml(**self.yaml))

        self.step("edit dvc.yaml", act)

    @rule(value=st.integers(1, 3), what=st.sampled_from(["add", "edit", "rename", "remove"]))
    def change_variants(self, value: int, what: str) -> None:
        def act() -> None:
            values = self.values()
            variants = values["variants"]
            if what == "add":
                variants["vera"] = {"r": value}
            elif what == "edit":
                variants[next(iter(variants))] = {"r": value}
            elif what == "rename":
                first = next(iter(variants))
                values["variants"] = {f"v{value}": variants.pop(first), **variants}
            elif len(variants) > 1:
                variants.pop(next(iter(variants)))
            self.write_values(values)

        self.step(f"{what} variant", act)

    @rule(which=st.integers(0, 5), old=st.booleans())
    def materialize_one(self, which: int, old: bool) -> None:
        def act() -> None:
            definitions = self.old if old else build_definitions(self.root, small_pipeline.PIPELINE)
            keys = sorted(definitions.resolve_asset_graph().materializable_asset_keys, key=str)
            small_pipeline.materialize(self.root, self.instance, ["@".join(keys[which % len(keys)].path)], definitions)

        self.step("materialize one" + (" with old definitions" if old else ""), act)

    @rule(old=st.booleans())
    def materialize_all(self, old: bool) -> None:
        results: list[Any] = []
        sound = "BAD" not in (self.root / "data/sources/g.txt").read_text() and self.sources_clean()
        self.step(
            "materialize all" + (" with old definitions" if old else ""),
            lambda: results.append(
                small_pipeline.materialize(self.root, self.instance, None, self.old if old else None)
            ),
        )
        if not old and not self.committed:
            assert results[0].success == sound, [event.message for event in results[0].all_events if event.is_failure]
            assert not results[0].success or not small_pipeline.changed_in_dvc(self.root)

    @rule()
    def reload_definitions(self) -> None:
        self.old = build_definitions(self.root, small_pipeline.PIPELINE)

    @rule(flag=st.sampled_from(["", "", "--keep-going", "--ignore-errors", "-f"]))
    def repro(self, flag: str) -> None:
        codes: list[int] = []
        self.step(
            f"dvc repro {flag}".strip(),
            lambda: codes.append(dvc(self.root, "repro", *filter(None, [flag]))),
            forced=flag == "-f",
        )
        assert codes[0] or self.committed or flag == "--ignore-errors" or not small_pipeline.changed_in_dvc(self.root)

    @rule(which=st.integers(0, 6))
    def repro_single_item(self, which: int) -> None:
        def act() -> None:
            names = list(read_stages(self.root))
            dvc(self.root, "repro", "--single-item", names[which % len(names)])

        self.step("dvc repro --single-item", act)

    @rule(which=st.integers(0, 6), report=st.booleans(), how=st.sampled_from(["delete", "tamper", "spoil"]))
    def harm_output(self, which: int, report: bool, how: str) -> None:
        def act() -> None:
            states = list(read_stages(self.root).values())
            state = states[which % len(states)]
            path = self.root / (state.report or "") if report else self.root / state.out
            if not path.exists():
                return
            if how == "delete":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            else:
                target = path if report else sorted(path.iterdir())[0]
                target.unlink()
                target.write_text("{}" if report else "BAD" if how == "spoil" else "tampered")

        self.step(f"{how} output", act)

    @rule()
    def dvc_commit(self) -> None:
        self.committed = True
        self.step("dvc commit", lambda: dvc(self.root, "commit", "-f"))

    @rule()
    def git_commit(self) -> None:
        def act() -> None:
            small_pipeline.git(self.root, "add", "-A")
            small_pipeline.git(self.root, "commit", "-q", "--allow-empty", "-m", "x")

        self.step("git commit", act)

    @rule(which=st.integers(0, 9), outputs_too=st.booleans())
    def git_checkout(self, which: int, outputs_too: bool) -> None:
        def act() -> None:
            revisions = small_pipeline.git(self.root, "rev-list", "--all").split()
            small_pipeline.git(self.root, "checkout", "-qf", revisions[which % len(revisions)])
            text = (self.root / "dvc.yaml").read_text()
            self.yaml = {
                "note": " --note" if "--note" in text else "",
                "with_extra": '"extra"' in text,
                "raw_reads_d": "d.txt" in text,
            }
            if outputs_too:
                dvc(self.root, "checkout", "-f")

        self.step("git checkout" + (" and dvc checkout" if outputs_too else ""), act)

    @rule()
    def delete_dagster_home(self) -> None:
        def act() -> None:
            self.instance.dispose()
            shutil.rmtree(self.root / ".dagster")
            self.open()

        self.step("delete Dagster's home", act)

    @rule(
        stage=st.sampled_from(["raw", "inst", "tok", "cmp"]),
        front_end=st.sampled_from(["dvc", "dagster"]),
        victim=st.sampled_from(["front end", "stage"]),
    )
    def kill_while_running(self, stage: str, front_end: str, victim: str) -> None:
        self.step(f"kill -9 of a run by {front_end}", lambda: self.kill(stage, front_end, victim))

    def kill(self, stage: str, front_end: str, victim: str) -> None:
        (self.root / f"code/{stage}.py").write_text(f"V = {COUNTS['steps'] + 3}\n")  # so that it has something to do
        command = ["-m", "dvc", "repro", "-q"] if front_end == "dvc" else ["small_pipeline.py", "materialize"]
        ran = len(self.runs())
        # in a session of its own, so that only the killed process gets the signal
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=self.root,
            env={**os.environ, "SLOW": stage, "SLOW_SECONDS": str(2 * HANGS)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        slow = None
        while process.poll() is None and slow is None:
            slow = next((entry for entry in self.runs()[ran:] if entry["stage"] == stage), None)
            time.sleep(0.05)
        if slow is None:
            return  # the stage had nothing to do
        COUNTS["kills that hit"] += 1
        os.kill(process.pid if victim == "front end" else slow["pid"], signal.SIGKILL)
        process.wait(HANGS)
        until = time.monotonic() + HANGS
        while psutil.pid_exists(slow["pid"]):
            assert time.monotonic() < until, f"{stage} (process {slow['pid']}) lives on though its {victim} was killed"
            time.sleep(0.1)

    @rule(
        first=st.sampled_from(["run --all", "materialize"]),
        second=st.sampled_from([*OPERATIONS]),
        stage=st.sampled_from(["raw", "tok", "adapter"]),
        victim=st.sampled_from(["nobody", "nobody", "front end", "worker", "stage"]),
        delay=st.floats(0, 1.5),
    )
    def two_at_once(self, first: str, second: str, stage: str, victim: str, delay: float) -> None:
        codes: list[int] = []
        sound = "BAD" not in (self.root / "data/sources/g.txt").read_text() and self.sources_clean()
        what = f"{first} and {second} at once" + (f", a {victim} killed" if victim != "nobody" else "")
        self.step(what, lambda: codes.extend(self.run_both([first, second], stage, victim, delay)))
        if victim == "nobody" and sound and not self.committed:
            assert codes[0] == 0, f"{what}: {(self.root / 'errors-0.txt').read_text()}"
            assert codes[1] == 0 or second == "dvc repro", f"{what}: {(self.root / 'errors-1.txt').read_text()}"
            assert not small_pipeline.changed_in_dvc(self.root)

    def run_both(self, operations: list[str], stage: str, victim: str, delay: float) -> list[int]:
        """Start both front ends, kill a process of one of them while a stage
        runs, and wait until all are gone. Returns the exit codes."""
        (self.root / f"code/{stage}.py").write_text(f"V = {COUNTS['steps'] + 3}\n")  # so that both have something to do
        ran = len(self.runs())
        processes = [
            subprocess.Popen(
                [sys.executable, *OPERATIONS[name]],
                cwd=self.root,
                env={**os.environ, "SLOW": "adapter", "SLOW_SECONDS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=(self.root / f"errors-{i}.txt").open("w"),
                start_new_session=True,
            )
            for i, name in enumerate(operations)
        ]
        while victim != "nobody" and any(process.poll() is None for process in processes):
            entry = next((entry for entry in self.runs()[ran:] if entry["stage"].startswith(stage)), None)
            if entry is not None:
                time.sleep(delay)
                COUNTS["kills at once that hit"] += self.kill_one(victim, entry["pid"])
                break
            time.sleep(0.05)
        until = time.monotonic() + HANGS
        while None in [
            process.poll() for process in processes
        ]:  # both: to DVC, a killed process that nobody has waited for is alive
            assert time.monotonic() < until, f"{operations} do not end"
            time.sleep(0.1)
        codes = [process.returncode for process in processes]
        both = {entry["pid"] for entry in self.runs()[ran:]}
        until = time.monotonic() + HANGS
        while any(psutil.pid_exists(pid) for pid in both):
            assert time.monotonic() < until, "a stage's command lives on though its front end ended"
            time.sleep(0.1)
        lock = self.root / "dvc.lock"
        if victim != "nobody" and "dvc repro" in operations and lock.exists() and not lock.read_text().strip():
            COUNTS["dvc.lock emptied by a kill of dvc repro"] += 1  # DVC does not replace it in one step
            lock.unlink()  # as the message says
        starts = [entry["stage"] for entry in self.runs()[ran:]]
        COUNTS["runs of both variants in one step"] += {"adapter@lora", "adapter@dora"} <= {*starts}
        return codes

    def kill_one(self, victim: str, pid: int) -> int:
        """Kill the stage's command with this id, the process that runs it by
        DVC (or its front end), or the front end. Returns whether it existed."""
        try:
            chain = [psutil.Process(pid), *psutil.Process(pid).parents()]
            chain = [
                process
                for process in chain
                if any(
                    "small_pipeline" in part or part == "dvc" or "multiprocessing" in part for part in process.cmdline()
                )
            ]
            target = (
                chain[0] if victim == "stage" else chain[min(1, len(chain) - 1)] if victim == "worker" else chain[-1]
            )
            target.kill()
            return 1
        except psutil.Error:
            return 0

    def sources_clean(self) -> bool:
        """Is the source that DVC tracks as its .dvc file says?"""
        return not any(i.problem for state in read_stages(self.root).values() for i in state.inputs)

    # what must hold afterwards

    def step(self, what: str, act: Any, forced: bool = False) -> None:
        COUNTS[what] += 1
        COUNTS["steps"] += 1
        doubted = {address for address, state in read_stages(self.root).items() if state.output_problem}
        ran = len(self.runs())
        act()
        runs = self.runs()[ran:]
        COUNTS["stage commands run"] += len(runs)
        for entry in runs:
            assert forced or entry["inputs_changed"] or entry["stage"] in doubted, (
                f"{what}: {entry['stage']} ran for nothing"
            )
        agree(self.root, self.instance, what)

    def runs(self) -> list[dict[str, Any]]:
        path = self.root / small_pipeline.LOG
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def values(self) -> dict[str, Any]:
        return json.loads((self.root / "params.yaml").read_text())

    def write_values(self, values: dict[str, Any]) -> None:
        (self.root / "params.yaml").write_text(json.dumps(values))


@pytest.mark.long
def test_every_operation_once_with_both_front_ends() -> None:
    day = TwoFrontEnds()
    day.start()
    try:
        day.materialize_all(old=False)
        day.git_commit()
        day.spoil_source()
        day.repro("")
        day.materialize_all(old=False)
        day.materialize_one(which=2, old=False)
        day.repro("--ignore-errors")
        day.revert_source()
        day.edit_source(value=2, where="d", added=False)
        day.materialize_all(old=False)
        day.edit_source(value=3, where="d", added=True)
        day.repro("--keep-going")
        for what in ("add", "rename", "remove", "edit"):
            day.change_variants(value=1, what=what)
        day.materialize_all(old=True)
        day.reload_definitions()
        day.materialize_all(old=False)
        day.edit_parameter("minlen", 3)
        day.edit_code("cmp", 2)
        day.repro_single_item(which=1)
        for key in ("note", "with_extra", "raw_reads_d"):
            day.edit_dvc_yaml(key)
        day.repro("-f")
        day.git_commit()
        for how in ("delete", "tamper", "spoil"):
            day.harm_output(which=1, report=False, how=how)
            day.harm_output(which=2, report=True, how=how)
            day.dvc_commit()
            day.materialize_all(old=False)
        day.delete_dagster_home()
        day.git_checkout(which=9, outputs_too=False)
        day.git_checkout(which=1, outputs_too=True)
        day.edit_parameter("testseed", 1)
        for front_end, victim in (("dvc", "front end"), ("dagster", "stage")):
            day.kill_while_running("tok", front_end, victim)
        day.two_at_once("run --all", "materialize", "tok", "nobody", 0)
        day.two_at_once("materialize", "run --all", "adapter", "worker", 0.5)
        day.materialize_all(old=False)
        day.repro("")
    finally:
        day.teardown()


TestTwoFrontEnds = TwoFrontEnds.TestCase
TestTwoFrontEnds.settings = settings(
    max_examples=2,
    stateful_step_count=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)


class MostlyAtOnce(TwoFrontEnds):
    """The same, in which every third operation is two at once: single runs are replaced."""

    @rule(
        first=st.sampled_from(["run --all", "materialize"]),
        second=st.sampled_from([*OPERATIONS]),
        victim=st.sampled_from(["nobody", "front end", "worker", "stage"]),
        delay=st.floats(0, 3),
    )
    def materialize_one(self, first: str, second: str, victim: str, delay: float) -> None:  # type: ignore[override]
        self.two_at_once(first, second, "adapter", victim, delay)

    @rule(
        first=st.sampled_from(["run --all", "materialize"]),
        second=st.sampled_from([*OPERATIONS]),
        victim=st.sampled_from(["nobody", "front end", "worker", "stage"]),
        delay=st.floats(0, 3),
    )
    def repro_single_item(self, first: str, second: str, victim: str, delay: float) -> None:  # type: ignore[override]
        self.two_at_once(first, second, "raw", victim, delay)


def soak(steps: int, seed: int, machine: type[TwoFrontEnds] = TwoFrontEnds, hours: float = 0) -> None:
    """Play at least so many steps from a seed, at most 20 to a project, and print the counts.

    Args:
        hours: play for so long instead, and record what grows in soak.csv.
    """
    from hypothesis.core import seed as seeded
    from hypothesis.stateful import run_state_machine_as_test

    random.seed(seed)
    began = time.monotonic()
    rounds = settings(
        max_examples=10,
        stateful_step_count=20,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        print_blob=True,
    )
    growth = Growth(Path("soak.csv")) if hours else None
    played = measured(machine, growth, began) if growth else machine
    while time.monotonic() - began < 3600 * hours if hours else COUNTS["steps"] < steps:
        run_state_machine_as_test(seeded(random.randrange(2**32))(type("Soak", (played,), {})), settings=rounds)
        print(f"{COUNTS['steps']} steps in {time.monotonic() - began:.0f} s, no disagreement", flush=True)
        if growth and growth.rows:
            print(f"  {growth.text()}", flush=True)
    for what, count in sorted(COUNTS.items()):
        print(f"{count:6} {what}")


def measured(machine: type[TwoFrontEnds], growth: Growth, began: float) -> type[TwoFrontEnds]:
    """The same, with a measurement after every tenth step."""

    class Measured(machine):  # type: ignore[valid-type, misc]
        def step(self, what: str, act: Any, forced: bool = False) -> None:
            super().step(what, act, forced)
            if COUNTS["steps"] % 10 == 0:
                growth.measure(self.root, time.monotonic() - began, COUNTS["steps"], self.instance.get_runs_count())

    return Measured


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DVC runs `python`
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", type=int, nargs="?", default=2000)
    parser.add_argument("seed", type=int, nargs="?", default=random.randrange(2**32))
    parser.add_argument("--at-once", action="store_true", help="mostly two operations at once")
    parser.add_argument(
        "--hours", type=float, default=0.0, help="play for so long, and write soak.csv: memory, open files, sizes"
    )
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}")
    soak(chosen.steps, chosen.seed, MostlyAtOnce if chosen.at_once else TwoFrontEnds, chosen.hours)
