"""What a process and a project use, measured again and again during a long run."""

from __future__ import annotations

import csv
from pathlib import Path

import psutil

HOME = ".dagster"
COLUMNS = (
    "seconds",
    "steps",
    "runs",
    "memory_mb",
    "open_files",
    "processes",
    "event_log_mb",
    "dvc_state_mb",
    "temporary_files",
)


def size(folder: Path) -> int:
    """Bytes of the files in a folder; 0 for one that does not exist. Files that disappear meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


class Growth:
    """Writes a row per measurement to a CSV file, and compares the first with the last of one project."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)

    def measure(self, root: Path, seconds: float, steps: int, runs: int) -> None:
        """Measure this process and the project in a folder.

        Args:
            runs: how many runs Dagster's event log has, so that its size per run can be told.
        """
        me = psutil.Process()
        scratch = [path for path in (root / ".dvc/tmp").rglob("*") if path.is_file() and ".tmp" in path.name]
        row = {
            "seconds": round(seconds),
            "steps": steps,
            "runs": runs,
            "memory_mb": round(me.memory_info().rss / 1e6, 1),
            "open_files": me.num_fds(),
            "processes": len(me.children(recursive=True)),
            "event_log_mb": round(size(root / HOME) / 1e6, 2),
            "dvc_state_mb": round((size(root / ".dvc") - size(root / ".dvc/cache")) / 1e6, 2),
            "temporary_files": len(scratch),
        }
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)

    def text(self) -> str:
        """The last measurement in a line."""
        last = self.rows[-1]
        per_run = f" ({1000 * last['event_log_mb'] / last['runs']:.0f} kB a run)" if last["runs"] else ""
        return (
            f"memory {last['memory_mb']:,.0f} MB, {last['open_files']} open files, {last['processes']} child processes,"
            f" event log {last['event_log_mb']:.1f} MB{per_run}, DVC's state {last['dvc_state_mb']:.1f} MB,"
            f" {last['temporary_files']} temporary files"
        )
