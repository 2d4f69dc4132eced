"""Full disks and read-only folders: one message with path, reason and next step, and nothing unfinished stays."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from builders import small_pipeline
from builders.full_disk import WRITERS, failure, write_safetensors, write_text, write_zip
from builders.history import Project, identity
from conftest import pedigree

from dagster_project.core import faults
from dagster_project.core.context import StageContext
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.lineage.database import INDEX_FILE
from dagster_project.orchestration.run_stage import _move_to_place, _share_as_their_folders, run_stage


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small file system in memory: `mount(kilobytes)`."""
    made: list[Path] = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if os.getuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root can mount a small file system")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    (disk / "filler").write_bytes(b"\0" * shutil.disk_usage(disk).free)
    assert shutil.disk_usage(disk).free == 0


def in_a_process(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, which may limit itself."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_or_read_only_disk_is_one_message_for_every_library_that_writes(
    writer: Callable[[Path], None], mount: Any
) -> None:
    disk = mount(64)
    found = failure(writer, disk)
    assert (
        str(disk) in found.what
        and os.strerror(errno.ENOSPC) in found.what
        and "free some space" in found.hint
        and found.exit_code == 1
    )
    shutil.rmtree(disk, ignore_errors=True)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    found = failure(writer, disk)
    assert str(disk) in found.what and found.exit_code == 2 and isinstance(found, InputError)
    assert any(os.strerror(code) in found.what for code in (errno.EROFS, errno.EACCES))


@pytest.mark.parametrize("writer", [write_text, write_zip, write_safetensors])
def test_a_limit_on_the_size_of_a_file_is_one_message(writer: Callable[[Path], None], tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; import builders.full_disk as t; from dagster_project.core"
        " import faults\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000,"
        f" 50_000))\nprint(t.failure(t.{writer.__name__}, Path(sys.argv[1])))"
    )
    done = in_a_process(code, tmp_path)
    assert f"{tmp_path}: {os.strerror(errno.EFBIG)}" in done.stdout and "ulimit -f" in done.stdout, done.stderr
    assert writer is not write_text or not [*tmp_path.iterdir()]  # write_text leaves no scratch file


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        KeyError("a"),
        FileNotFoundError("x"),
        sqlite3.OperationalError("no such table"),
        AssertionError("(os error 28)"),
    ],
)
def test_a_defect_of_the_program_is_not_explained_away(error: Exception, tmp_path: Path) -> None:
    assert faults.explained(error, tmp_path) is None


def test_a_program_that_is_missing_is_not_a_file_to_restore(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        subprocess.run(["no-such-program"], check=False)
    assert faults.explained(error.value, tmp_path) is None


def test_the_cause_of_an_error_is_explained(tmp_path: Path) -> None:
    error = RuntimeError("a library failed")
    error.__cause__ = PermissionError(errno.EACCES, "denied", str(tmp_path / "a"))
    found = faults.explained(error, tmp_path)
    assert found is not None and found.what == f"{tmp_path / 'a'}: Permission denied" and "ls -ld" in found.hint


def test_a_database_that_sqlite_cannot_open_is_not_called_a_missing_permission(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError) as error:
        sqlite3.connect(tmp_path / "missing" / "a.db")
    assert error.value.sqlite_errorcode == sqlite3.SQLITE_CANTOPEN
    found = faults.explained(error.value, tmp_path)
    assert found is not None and found.what.startswith(f"{tmp_path}: SQLite cannot open a database: it or its folder")
    assert "Permission denied" not in str(found)
    assert all(said in str(found) for said in ("is missing", "disk is full", "too many files are open", "ulimit -n"))


def test_too_many_open_files_are_the_reason_that_sqlite_cannot_open_a_database(tmp_path: Path) -> None:
    code = (
        "import os, resource, sqlite3, sys; from pathlib import Path; from dagster_project.core import faults\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30)); held = []\n"
        "try:\n    while True: held.append(os.open(os.devnull, os.O_RDONLY))\nexcept OSError: pass\n"
        "try: sqlite3.connect(Path(sys.argv[1], 'a.db'))\n"
        "except sqlite3.OperationalError as error:\n"
        "    found = faults.explained(error, Path(sys.argv[1]))\n"
        "    for one in held: os.close(one)\n"
        "    print(found.exit_code, found)\n"
    )
    done = in_a_process(code, tmp_path)
    said = f"1 {tmp_path}: SQLite cannot open a database: {os.strerror(errno.EMFILE)}\nhint: raise the limit on open"
    assert done.stdout.startswith(said), done.stdout + done.stderr


def test_a_full_disk_is_the_reason_that_sqlite_cannot_open_a_database(mount: Any) -> None:
    disk = mount(64)
    fill(disk)
    with pytest.raises(sqlite3.OperationalError) as error:
        sqlite3.connect(disk / "missing" / "a.db")
    found = faults.explained(error.value, disk)
    assert found is not None and found.exit_code == 1 and "free some space" in found.hint
    assert found.what == f"{disk}: SQLite cannot open a database: {os.strerror(errno.ENOSPC)}"


def test_a_checkpoint_that_does_not_fit_is_removed_and_the_earlier_one_stays(mount: Any) -> None:
    import torch

    from dagster_project.training.trainers.harness.checkpoint import Checkpoints

    disk = mount(300)
    checkpoints = Checkpoints(disk / "checkpoints", {"code": "x"})
    checkpoints.save(1, {"step": 1}, {"weights": {"a": torch.zeros(10_000)}}, {})
    with pytest.raises(PedigreeError, match="the checkpoint of step 2 does not fit into") as raised:
        checkpoints.save(2, {"step": 2}, {"weights": {"a": torch.zeros(100_000)}}, {})
    assert "resumes from the previous checkpoint" in raised.value.hint
    assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step-00000001"]
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 1


def test_a_stage_on_a_full_disk_is_one_message_and_leaves_what_was_there(root: Path, mount: Any) -> None:
    disk = mount(6000)
    project = disk / "project"
    shutil.copytree(root, project, symlinks=True)
    before = small_pipeline.published(project, "tok")
    fill(disk)
    with pytest.raises(PedigreeError, match="No space left on device") as raised:
        run_stage(project, "tok", small_pipeline.PIPELINE)
    assert str(project) in raised.value.what and "free some space" in raised.value.hint
    assert (
        small_pipeline.published(project, "tok") == before and not (project / ".dvc/tmp/pedigree/scratch/tok").exists()
    )
    (disk / "filler").unlink()
    run_stage(project, "tok", small_pipeline.PIPELINE)
    assert small_pipeline.published(project, "tok") == before


@pytest.mark.parametrize("command", ["audit tok", "verify --integrity", "sync"])
def test_commands_on_a_full_or_read_only_disk_answer_or_say_so(root: Path, mount: Any, command: str) -> None:
    disk = mount(6000)
    project = disk / "project"
    shutil.copytree(root, project, symlinks=True)
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
    arguments = [sys.executable, "-m", "dagster_project", *command.split()]
    fill(disk)
    for _ in range(2):
        done = subprocess.run(arguments, cwd=project, env=environment, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        assert done.returncode == 0 or (
            "hint: " in done.stderr and str(project) in done.stderr and done.returncode in {1, 2}
        ), done.stderr
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def test_audits_of_a_read_only_project_answer_also_if_another_process_uses_its_index(
    tmp_path: Path, mount: Any
) -> None:
    made, disk = Project(tmp_path / "project"), mount(6000)
    made.commit(made.lock([("cats", "train", "data/sources/faq.jsonl")]))
    commands = (("audit", "merged@lora"), ("impact", "--record", identity("cats")))
    before = [pedigree(made.root, *command) for command in commands]
    with closing(sqlite3.connect(made.root / INDEX_FILE)) as used:
        used.execute("PRAGMA user_version").fetchone()
        shutil.copytree(made.root, disk / "project", symlinks=True)
    assert (disk / "project" / f"{INDEX_FILE}-shm").is_file()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for command, answer in zip(commands, before, strict=True):
        done = pedigree(disk / "project", *command)
        assert (done.returncode, done.stdout) == (answer.returncode, answer.stdout) and done.stdout, done.stderr


def test_an_output_is_moved_to_another_file_system(tmp_path: Path) -> None:
    """`data/adapter` may be a link to a larger disk."""
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    scratch = tmp_path / ".work"
    context = StageContext(tmp_path, "adapter", "lora", scratch, {})
    (context.out / "deep").mkdir(parents=True)
    (context.out / "deep" / "weights.txt").write_text("1 2 3")
    (tmp_path / "data").mkdir()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (tmp_path / "data/adapter").symlink_to(elsewhere)
        (tmp_path / "data/adapter/lora").mkdir()
        (tmp_path / "data/adapter/lora/old").touch()
        _move_to_place(tmp_path, context, context.out)
        assert [path.name for path in (tmp_path / "data/adapter/lora").rglob("*")] == ["deep", "weights.txt"]
        assert (tmp_path / "data/adapter/lora/deep/weights.txt").read_text() == "1 2 3" and not context.out.exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_weights_can_be_read_by_those_who_can_read_their_folder(umask: int, mode: int, tmp_path: Path) -> None:
    """A server of models, or a colleague, is another user than the one whose stage made the model."""
    before = os.umask(umask)
    try:
        (tmp_path / "out" / "deep").mkdir(parents=True)
        (tmp_path / "out" / "config.json").touch()
        write_safetensors(tmp_path / "out" / "deep")
        (tmp_path / "out" / "deep" / "owners.bin").touch(0o600)
        _share_as_their_folders(tmp_path / "out")
    finally:
        os.umask(before)
    found = {file.suffix: file.stat().st_mode & 0o777 for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert found == {".json": mode, ".safetensors": mode, ".bin": mode}
