"""A process that reads a project again and again, as Dagster's does, keeps nothing of what DVC wrote to memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fsspec.implementations.memory import MemoryFileSystem

from dagster_project.orchestration import dvc_memory
from dagster_project.orchestration.dvc import open_repo, read_stages


def test_nothing_of_dvc_stays_in_memory_and_files_of_others_do(root: Path) -> None:
    MemoryFileSystem().pipe_file("/of/somebody.tmp", b"else")
    try:
        with open_repo(root) as repo:
            repo.status()
            assert any(map(dvc_memory.OF_DVC.match, MemoryFileSystem.store)), (
                "DVC does not use these files any more: remove this module"
            )
            read_stages(root)
            assert any(map(dvc_memory.OF_DVC.match, MemoryFileSystem.store)), "they are still in use"
        assert [*MemoryFileSystem.store] == ["/of/somebody.tmp"]
    finally:
        MemoryFileSystem().rm_file("/of/somebody.tmp")


def test_threads_that_read_at_the_same_time_do_not_lose_each_others_files(root: Path) -> None:
    expected = read_stages(root)
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(read_stages, [root] * 16)]
    assert all(one == expected for one in found)
    assert not any(map(dvc_memory.OF_DVC.match, MemoryFileSystem.store))
