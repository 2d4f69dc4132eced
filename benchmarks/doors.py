"""What the two doors cost, as ratios measured side by side in one run. usage: python benchmarks/doors.py [--repeat N]

Run it when the street is up to date (`make run`), or it will be brought up to date first. Medians are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def seconds(code: str, repeat: int) -> float:
    """Median wall time of a fresh interpreter that runs `code` in the project."""
    times = []
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for _ in range(repeat):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="runs of each; medians are compared (default: %(default)s)")
    repeat = parser.parse_args().repeat

    imports = seconds("import dagster, dvc.repo", repeat)
    definitions = seconds("import dagster_project.definitions", repeat)
    print(f"loading the definitions: {definitions:.2f} s, {definitions / imports:.2f} x importing dagster and dvc.repo ({imports:.2f} s)")

    alone = seconds("from dvc.repo import Repo; Repo('.').reproduce()", repeat)
    repro = seconds("import subprocess; subprocess.run(['dvc', 'repro', '-q'], check=True)", repeat)
    print(f"`dvc repro` with nothing to do: {repro:.2f} s, {repro / alone:.2f} x DVC's own call on the same files ({alone:.2f} s)")

    sync = seconds("import sys; from dagster_project.__main__ import main; sys.exit(main(['sync']))", repeat)
    print(f"`pedigree sync` with nothing to report: {sync:.2f} s, process start included")


if __name__ == "__main__":
    main()
