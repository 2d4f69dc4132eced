"""`python -m faults`: play the cases and print a table, class x passed and
failed, with the commands of the cases that failed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from builders.warm import end

from faults import dagster_runs, damage, kills, limits, network, project, times, trainings
from faults.case import Case, Result, result_of

CLASSES: dict[str, Callable[[project.Projects, bool], Iterator[Case]]] = {
    "kill": kills.cases,
    "damage": damage.cases,
    **limits.CLASSES,
    **times.CLASSES,
    **network.CLASSES,
    **dagster_runs.CLASSES,
    **trainings.CLASSES,
}


def table(results: list[Result]) -> str:
    """Class x passed and failed, and below it each case that failed."""
    counts = Counter((one.case.partition("/")[0], not one.problem) for one in results)
    names = dict.fromkeys(one.case.partition("/")[0] for one in results)
    rows = [("fault", "cases", "passed", "failed")]
    rows += [
        (name, str(counts[name, True] + counts[name, False]), str(counts[name, True]), str(counts[name, False]))
        for name in names
    ]
    failed = [one for one in results if one.problem]
    rows.append(("all", str(len(results)), str(len(results) - len(failed)), str(len(failed))))
    lines = [f"{row[0]:<12}" + "".join(f"{cell:>8}" for cell in row[1:]) for row in rows]
    for one in failed:
        lines += [
            "",
            f"FAILED {one.case}",
            *(f"  ran: {command}" for command in one.commands),
            f"  again: make faults ONLY={one.case}",
        ]
        lines += [f"  {line}" for line in one.problem.splitlines()]
    return "\n".join(lines)


def _share(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    return int(part), int(parts)


def play_all(projects: project.Projects, options: argparse.Namespace, part: int, parts: int) -> list[Result]:
    """Play one in `parts` of the chosen cases, from number `part`."""
    results = []
    for name, make in CLASSES.items():
        if not (options.only.startswith(name) or name.startswith(options.only)):
            continue
        for number, case in enumerate(make(projects, options.fixed)):
            if not case.name.startswith(options.only) or number % parts != part:
                continue
            results.append(result_of(case, projects))
            problem = results[-1].problem
            print(
                f"{'FAILED' if problem else 'passed'} {case.name}{problem and chr(10)}{problem}",
                file=sys.stderr,
                flush=True,
            )
    return results


def play_in_processes(projects: project.Projects, options: argparse.Namespace) -> list[Result]:
    """Play the chosen cases, several at once: in processes that are forked after the libraries were imported."""
    first, parts = options.share
    pids = {}
    for job in range(options.jobs):
        path = projects.base / f"results-{job}.json"

        def play(job: int = job, path: Path = path) -> int:
            projects.name = f"{job}-"
            found = play_all(projects, options, first - 1 + parts * job, parts * options.jobs)
            path.write_text(json.dumps([vars(one) for one in found]))
            return 0

        if not (pid := os.fork()):
            end(play)
        pids[pid] = path
    results = []
    for pid, path in pids.items():
        assert os.waitpid(pid, 0)[1] == 0
        results += [Result(**one) for one in json.loads(path.read_text())]
    return sorted(results, key=lambda one: [*CLASSES].index(one.case.partition("/")[0]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--fixed", action="store_true", help="the fixed part that the test suite plays")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases whose name starts with it: a class, or one case"
    )
    parser.add_argument(
        "--share", type=_share, default=(1, 1), metavar="I/N", help="one in N cases of each class, from the I-th"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that play cases at once")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--keep", metavar="FOLDER", help="make the undisturbed project here, or use the one that is here"
    )
    options = parser.parse_args()
    shared = Path("/dev/shm")
    base = (
        Path(options.keep)
        if options.keep
        else Path(tempfile.mkdtemp(prefix="faults-", dir=shared if shared.is_dir() else None))
    )
    try:
        projects = project.Projects(base)
        projects.make()
        results = play_in_processes(projects, options)
    finally:
        if not options.keep:
            shutil.rmtree(base, ignore_errors=True)
    if options.json:
        print(json.dumps([vars(one) for one in results]))
    else:
        print(table(results))
    return 1 if any(one.problem for one in results) or not results else 0


if __name__ == "__main__":
    sys.exit(main())
