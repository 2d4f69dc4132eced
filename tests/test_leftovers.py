"""Temporary files of killed processes are removed, and no others."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from dagster_project.orchestration.leftovers import remove_leftovers

RANDOM = "8xB7PKSMjBRCqLw0eSBAqQ"
OF_DVC = [
    f".dvc/cache/files/md5/.{RANDOM}.tmp",
    f".dvc/cache/files/md5/ee/.{RANDOM}.tmp",
    f".dvc/cache/runs/9a/9ada/.{RANDOM}.tmp",
    f"data/reports/.{RANDOM}.tmp",
]
KEPT = [
    ".dvc/cache/files/md5/ee/b34e34d1c9301a13f6103b48eccba0",
    ".dvc/cache/runs/9a/9ada/96f5",
    "data/reports/adapter/.gitkeep",
    f"data/sources/.{RANDOM}.tmp",
    "data/reports/.x.tmp",
    "data/pages/.a.7b",
]


def make(root: Path, *paths: str) -> None:
    for path in (".dvc/tmp/lock", *paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def present(root: Path, paths: list[str]) -> list[str]:
    return [path for path in paths if (root / path).exists()]


def test_temporary_files_of_dvc_are_removed_unless_dvc_is_at_work(tmp_path: Path) -> None:
    make(tmp_path, *OF_DVC, *KEPT)
    with (tmp_path / ".dvc/tmp/lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
        assert present(tmp_path, OF_DVC) == OF_DVC
    remove_leftovers(tmp_path)
    assert present(tmp_path, OF_DVC) == [] and present(tmp_path, KEPT) == KEPT
    make(tmp_path, *OF_DVC)  # after a search, in folders that have changed since
    remove_leftovers(tmp_path)
    assert present(tmp_path, OF_DVC) == []


def test_temporary_files_of_dvc_are_kept_where_it_locks_by_hard_links(tmp_path: Path) -> None:
    """`flock` succeeds there also while DVC holds its lock."""
    make(tmp_path, *OF_DVC)
    (tmp_path / ".dvc/config").write_text("[core]\n hardlink_lock = true\n")
    remove_leftovers(tmp_path)
    assert present(tmp_path, OF_DVC) == OF_DVC


def test_objects_that_a_killed_process_had_fetched_in_part_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    folder = ".dvc/cache/files/md5/ee"
    parts = [f"{folder}/.b34e34d1c9301a13f6103b48eccba0.1a2b3c4d.{pid}" for pid in (ended.pid, os.getpid())]
    make(tmp_path, *parts, *KEPT)
    remove_leftovers(tmp_path)
    assert present(tmp_path, [*parts, *KEPT]) == [parts[1], *KEPT]
    os.utime(tmp_path / folder, (0, 0))  # unchanged for long, when the process that fetches is killed
    (tmp_path / parts[1]).rename(tmp_path / parts[0])
    os.utime(tmp_path / folder, (0, 0))
    remove_leftovers(tmp_path)
    assert present(tmp_path, [*parts, *KEPT]) == KEPT


def test_scratch_files_of_reports_and_pages_are_removed_when_their_process_is_dead(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    names = [
        f"data/reports/.splits.json.{ended.pid}",
        f"data/pages/x/.report.html.{ended.pid}",
        f"data/reports/.tokenized.json.{os.getpid()}",
    ]
    make(tmp_path, *names)
    remove_leftovers(tmp_path)
    assert present(tmp_path, names) == names[2:]


def test_a_folder_without_dvc_has_nothing_to_remove(tmp_path: Path) -> None:
    remove_leftovers(tmp_path)
    assert [*tmp_path.iterdir()] == []
