"""Both front ends at once: four processes, two per front end, repeatedly bring one pipeline up to date."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from builders import small_pipeline

from dagster_project.orchestration.dagster.sync import sync
from dagster_project.orchestration.dvc import read_stages

ROUNDS = 2
BUSY = ("is busy, it is being blocked by", "Unable to acquire lock")


def by_dvc(root: Path) -> None:
    """`dvc repro`; DVC does not wait for a busy stage but says so, and a user tries again."""
    for _ in range(200):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "repro"], cwd=root, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return
        assert any(sign in done.stderr for sign in BUSY), done.stderr + done.stdout
        time.sleep(1)
    raise AssertionError("busy for ever")


def by_dagster(root: Path, instance: Any) -> None:
    result = small_pipeline.materialize(root, instance)
    assert result.success, [event.message for event in result.all_events if event.is_failure]


def work(root: Path, front_end: str, barrier: Any, failures: Any) -> None:
    import dagster as dg

    try:
        with dg.DagsterInstance.from_config(str(root / ".dagster")) as instance:
            for _ in range(ROUNDS):
                barrier.wait(120)
                by_dvc(root) if front_end == "dvc" else by_dagster(root, instance)
                barrier.wait(120)
    except BaseException:
        failures.put(traceback.format_exc())
        barrier.abort()
        raise


@pytest.mark.long
@pytest.mark.slow
def test_four_concurrent_processes_lose_nothing_run_nothing_twice_and_do_not_fail(tmp_path: Path) -> None:
    import dagster as dg

    root = small_pipeline.make_project(tmp_path / "project")
    (root / ".dagster").mkdir()
    (root / ".dagster" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    context = multiprocessing.get_context("spawn")
    barrier, failures = context.Barrier(5), context.Queue()
    workers = [
        context.Process(target=work, args=(root, front_end, barrier, failures))
        for front_end in ("dvc", "dagster", "dvc", "dagster")
    ]
    with dg.DagsterInstance.from_config(str(root / ".dagster")) as instance:
        for worker in workers:
            worker.start()
        try:
            for number in range(ROUNDS):
                (root / "data/sources/g.txt").write_text(f"round {number}")
                log = root / small_pipeline.LOG
                before = len(log.read_text().splitlines()) if log.exists() else 0
                barrier.wait(120)
                barrier.wait(120)
                ran = Counter(json.loads(line)["stage"] for line in log.read_text().splitlines()[before:])
                assert ran == Counter(dict.fromkeys(read_stages(root), 1)), f"round {number}: {ran}"
                assert not any(state.changed for state in read_stages(root).values()), f"round {number}"
                sync(root, instance, small_pipeline.PIPELINE)
                assert small_pipeline.changed_in_dvc(root) == small_pipeline.not_fresh(root, instance) == set()
                assert sync(root, instance, small_pipeline.PIPELINE) == []
        except BaseException:
            while not failures.empty():
                print(failures.get(), file=sys.stderr)
            raise
        finally:
            barrier.abort() if any(worker.is_alive() for worker in workers) and sys.exc_info()[0] else None
            for worker in workers:
                worker.join(30)
                if worker.is_alive():
                    os.kill(worker.pid or 0, 9)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
