"""CPU seconds (user + system) until commands, definitions, stages and the UI
begin their work, of one or more versions side by side.

usage: python benchmarks/start.py PROJECT [PROJECT ...] [--repeat N] [--only commands,stages,ui]

Each PROJECT is a folder in which the whole pipeline has run, with the version of `dagster_project` to measure; give the
earlier version first. The small project of the tests (fixture `finished`) serves: what is computed does not matter
here. Each round measures each project once, in turn, and medians are printed. The stages are run again in their project
(`dvc repro --force`); their outputs do not change.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

HOOK = Path(__file__).parent / "start_hook"
ROWS = '{"instruction": "Name a color.", "output": "Green is a color."}\n'
COMMANDS = {
    "interpreter alone": ["-c", "pass"],
    "pedigree --help": ["-m", "dagster_project", "--help"],
    "pedigree check, ten rows": ["-m", "dagster_project", "check", "{rows}"],
    "import of dagster and dvc": ["-c", "import dagster, dvc.repo"],
    "definitions": ["-c", "import dagster_project.definitions"],
    "DVC's own call, nothing to do": ["-c", "from dvc.repo import Repo; Repo('.').reproduce()"],
    "dvc repro, nothing to do": ["-m", "dvc", "repro", "-q"],
    "pedigree sync, nothing to do": ["-m", "dagster_project", "sync"],
    "pedigree impact --text": ["-m", "dagster_project", "impact", "--text", "my parcel has not come"],
}


def environment(root: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}}
    home = {"DAGSTER_HOME": str(root / ".dagster"), "PEDIGREE_PROJECT": str(root)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **kept,
        "PATH": path,
        "HF_HUB_OFFLINE": "1",
        "DVC_NO_ANALYTICS": "1",
        "OMP_NUM_THREADS": "1",
        **home,
        **variables,
    }


def cpu_seconds(arguments: list[str], root: Path, **variables: str) -> float:
    """CPU seconds of a Python process and the children that it waited for."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=root,
        env=environment(root, **variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    usage = os.wait4(process.pid, 0)[2]
    return usage.ru_utime + usage.ru_stime


def commands(roots: list[Path], repeat: int, rows: Path) -> Iterator[tuple[str, list[float]]]:
    for root in roots:  # syncs that report, one that has nothing to report, and one that reads the same files again
        for _ in range(4):
            cpu_seconds(COMMANDS["pedigree sync, nothing to do"], root)
        cpu_seconds(COMMANDS["pedigree impact --text"], root)  # makes the index
    for name, arguments in COMMANDS.items():
        words = [word.replace("{rows}", str(rows)) for word in arguments]
        yield name, medians([[cpu_seconds(words, root) for root in roots] for _ in range(repeat)])


def stages(roots: list[Path], repeat: int, log: Path) -> Iterator[tuple[str, list[float]]]:
    """For each stage: CPU seconds until its `run` and of the imports in it."""
    rounds = []
    for _ in range(repeat):
        found = []
        for root in roots:
            log.unlink(missing_ok=True)
            cpu_seconds(["-m", "dvc", "repro", "--force", "-q"], root, PYTHONPATH=str(HOOK), START_LOG=str(log))
            entries = map(json.loads, log.read_text().splitlines())
            found.append({entry["stage"]: entry["began"] + entry["imports_in_run"] for entry in entries})
        rounds.append(found)
    for stage in rounds[0][0]:
        yield stage, medians([[found[stage] for found in row] for row in rounds])
    yield "all stages", medians([[sum(found.values()) for found in row] for row in rounds])


def ui(roots: list[Path], repeat: int) -> Iterator[tuple[str, list[float]]]:
    yield (
        "UI until its first page with all assets",
        medians([[ui_seconds(root) for root in roots] for _ in range(repeat)]),
    )


def ui_seconds(root: Path) -> float:
    """CPU seconds of `pedigree ui` and its children until the web server answers a query for all assets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    query = json.dumps({"query": "{ assetNodes { assetKey { path } } }"}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/graphql", query, {"Content-Type": "application/json"})
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    arguments = [sys.executable, "-m", "dagster_project", "ui", "--port", str(port)]
    process = subprocess.Popen(arguments, cwd=root, env=environment(root), start_new_session=True, **quiet)
    try:
        while process.poll() is None:
            try:
                answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
                continue
            if answer.get("data", {}).get("assetNodes"):
                parts = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                return sum(
                    sum(part.cpu_times()[:4]) if part.pid == process.pid else sum(part.cpu_times()[:2])
                    for part in parts
                )
        raise SystemExit(f"{root}: `pedigree ui` ended")
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()


def medians(rounds: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("projects", nargs="+", type=lambda name: Path(name).resolve())
    parser.add_argument("--repeat", type=int, default=3, help="rounds; medians are printed (default: %(default)s)")
    parser.add_argument("--only", default="commands,stages,ui", help="parts to measure (default: %(default)s)")
    options = parser.parse_args()
    names = " | ".join(project.name for project in options.projects)
    print(f"| CPU seconds | {names} |\n| --- |{' ---: |' * len(options.projects)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        rows.write_text("".join(ROWS.replace("Green", f"Green {n}") for n in range(10)))
        parts = {
            "commands": lambda: commands(options.projects, options.repeat, rows),
            "stages": lambda: stages(options.projects, options.repeat, Path(folder, "log")),
            "ui": lambda: ui(options.projects, options.repeat),
        }
        for part in options.only.split(","):
            for name, seconds in parts[part]():
                print(f"| {name} | {' | '.join(f'{one:.2f}' for one in seconds)} |", flush=True)


if __name__ == "__main__":
    main()
