"""Overhead of the two front ends, as ratios measured in one run. usage: python benchmarks/front_ends.py [--repeat N]

Run it when the pipeline is up to date (`make run`), otherwise it is brought up to date first. Medians are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def seconds(code: str, repeat: int) -> float:
    """Median wall time of a fresh interpreter that runs `code` in the project."""
    times = []
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for _ in range(repeat):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repeat", type=int, default=5, help="runs of each; medians are compared (default: %(default)s)"
    )
    repeat = parser.parse_args().repeat

    imports = seconds("import dagster, dvc.repo", repeat)
    definitions = seconds("import dagster_project.definitions", repeat)
    print(
        f"loading the definitions: {definitions:.2f} s, {definitions / imports:.2f} x importing dagster and dvc.repo"
        f" ({imports:.2f} s)"
    )

    alone = seconds("from dvc.repo import Repo; Repo('.').reproduce()", repeat)
    repro = seconds("import subprocess; subprocess.run(['dvc', 'repro', '-q'], check=True)", repeat)
    print(
        f"`dvc repro` with nothing to do: {repro:.2f} s, {repro / alone:.2f} x DVC's own call on the same files"
        f" ({alone:.2f} s)"
    )

    sync = seconds("import sys; from dagster_project.__main__ import main; sys.exit(main(['sync']))", repeat)
    print(f"`pedigree sync` with nothing to report: {sync:.2f} s, process start included")
    thirty(repeat)


def thirty(repeat: int) -> None:
    """Time of a sync and of materializing thirty fresh stages, compared with thirty empty assets of Dagster."""
    import dagster as dg

    sys.path.insert(0, str(ROOT / "tests"))
    from builders import small_pipeline

    from dagster_project.orchestration.dagster.sync import sync

    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        values = {"minlen": 1, "testseed": 7, "variants": {f"v{n}": {"r": n} for n in range(26)}}
        root = small_pipeline.make_project(Path(folder) / "project", values)
        subprocess.run(["dvc", "repro", "-q"], cwd=root, check=True)
        (root / ".dagster").mkdir()
        (root / ".dagster" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")

        empty = [dg.asset(name=f"empty_{n}")(lambda: None) for n in range(30)]
        quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        with dg.DagsterInstance.from_config(str(root / ".dagster")) as instance:
            sync(root, instance, small_pipeline.PIPELINE)
            synced = median(repeat, lambda: sync(root, instance, small_pipeline.PIPELINE))
            ours = median(repeat, lambda: small_pipeline.materialize(root, instance))
            theirs = median(repeat, lambda: dg.materialize(empty, instance=instance, run_config=quiet))
        print(f"sync of 30 stages with nothing to report: {synced:.2f} s")
        print(
            f"materializing 30 fresh assets: {ours:.2f} s and one process start; 30 empty assets: {theirs:.2f} s; ours"
            f" alone, per asset: {(ours - theirs) / 30:.3f} s"
        )
        inside = {"cwd": root, "check": True, "capture_output": True}
        alone = median(
            repeat,
            lambda: subprocess.run(
                [sys.executable, "-c", "from dvc.repo import Repo; Repo('.').reproduce()"], **inside
            ),
        )
        repro = median(repeat, lambda: subprocess.run(["dvc", "repro", "-q"], **inside))
        print(f"`dvc repro` of 30 fresh stages: {repro:.2f} s, {repro / alone:.2f} x DVC's own call ({alone:.2f} s)")


def median(repeat: int, function: Callable[[], object]) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
