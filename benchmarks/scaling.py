"""Near-duplicates in memory and in rounds, side by side. usage: python
benchmarks/scaling.py [--rows N ...] [--workers N]

The texts of curation.py are read from a file, one by one, and compared with `count_words`, as by
the stage `instructions`: in memory, in rounds in one process, and in rounds on `--workers`
processes of this host. Each engine runs in its own process after a first call that compiles or
loads its loops; both write the digest of their result, which must be equal. CPU seconds include all
processes and their start; compare these, not the rows per second, if the machine has other work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))
from children import result_of
from curation import plant

ENGINES = ("in memory", "in rounds", "on workers")


class Lines(Sequence[str]):
    """Texts of a file with a JSON string in each line, decoded each time they are read."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._starts = array("q", [0])
        for line in self._file:
            self._starts.append(self._starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self._starts[index : index + 2]
        text: str = json.loads(os.pread(self._file.fileno(), stop - start, start))
        return text


def measure(engine: str, file: Path, count: int) -> dict[str, float | str]:
    """One run in this process: rows/s, CPU seconds, peak memory in MB, and a digest of the result."""
    from dagster_project.core import workers
    from dagster_project.curation.similarity import overlap, rounds
    from dagster_project.curation.similarity.overlap import compare
    from dagster_project.curation.similarity.shuffle import Column

    written, append = 0, Column.append

    def count_bytes(column: Column, values: Any) -> None:
        nonlocal written
        written += values.nbytes
        append(column, values)

    limit = 10**18 if engine == "in memory" else -1
    kind = workers.LocalProcesses(count) if engine == "on workers" else workers.ThisProcess()
    texts = Lines(file)
    with mock.patch.object(overlap, "SMALL", -1), mock.patch.multiple(rounds, IN_MEMORY=limit, SEVERAL=limit):
        compare(["where did my birthday kite go today"] * 2, count_words=True)
        loaded, used, start = _peak(), _cpu(), time.perf_counter()
        with workers.using(kind), mock.patch.object(Column, "append", count_bytes):
            found = compare(texts, count_words=True)
    digest = hashlib.sha256(
        repr((found.pairs, found.scores, found.boilerplate, sorted(found.frequency.items()))).encode()
    ).hexdigest()
    return {
        "rows/s": len(texts) / (time.perf_counter() - start),
        "CPU seconds": _cpu() - used,
        "peak MB": _peak(),
        "of it libraries": loaded,
        "peak MB of a worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000,
        "scratch MB written": written / 1e6,
        "pairs": len(found.pairs),
        "digest": digest[:10],
    }


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _peak() -> float:
    """In MB. ru_maxrss of a process is at least that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[100_000, 1_000_000],
        help="numbers of texts (default: 100,000 and 1,000,000)",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--measure", nargs=2, metavar=("ENGINE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]), args.workers)))
        return
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "texts.jsonl"
            texts = plant(rows, max(1, rows // 1000))[0]
            file.write_text("".join(json.dumps(text) + "\n" for text in texts))
            del texts
            print(f"{rows:,} rows, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
            runs = {}
            for engine in ENGINES:
                runs[engine] = result_of(
                    __file__, "--workers", str(args.workers), "--measure", engine, str(file), variables={}
                )
        print(f"{'':22}" + "".join(f"{engine:>12}" for engine in runs))
        for key in runs["in memory"]:
            values = [run[key] for run in runs.values()]
            print(
                f"{key:22}"
                + "".join(f"{value:>12}" if isinstance(value, str) else f"{value:12,.1f}" for value in values)
            )
        if len({run["digest"] for run in runs.values()}) > 1:
            raise SystemExit("the results differ")


if __name__ == "__main__":
    main()
