"""DVC's settings, cache and remote: which file a message names, folders with
odd names, a cache on another file system, and what a push copies."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from builders.small_pipeline import git

from dagster_project.core.errors import Busy, InputError
from dagster_project.orchestration import dvc_cache
from dagster_project.orchestration.dvc import open_repo, read_stages
from dagster_project.orchestration.dvc_remote import push
from dagster_project.orchestration.dvc_run import reproduce

STAGES = """\
stages:
  copy:
    cmd: cat source > copied
    deps: [source]
    outs: [copied]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A DVC project of one stage, without git."""
    from dvc.repo import Repo

    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "source").write_text("1\n")
    with chdir(tmp_path):
        Repo.init(no_scm=True).close()
    return tmp_path


def run(root: Path) -> None:
    assert reproduce(root, "copy", False, {}, on_wait=pytest.fail)


def set_locally(root: Path, text: str) -> Path:
    path = root / ".dvc/config.local"
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", ["[core\n", "[cache]\n type = nope\n"], ids=["syntax", "value"])
def test_the_message_names_the_file_of_settings_that_is_wrong(root: Path, text: str) -> None:
    path = set_locally(root, text)
    with pytest.raises(InputError) as error:
        read_stages(root)
    assert error.value.what.startswith(f"{path}: ") and error.value.hint == "correct it"
    path.unlink()
    (root / ".dvc/config").write_text(text)
    with pytest.raises(InputError) as error:
        read_stages(root)
    assert (
        error.value.what.startswith(f"{root / '.dvc/config'}: ") and "git checkout HEAD .dvc/config" in error.value.hint
    )


def test_an_index_of_git_that_is_locked_is_one_message_and_the_stage_is_recorded(root: Path) -> None:
    git(root, "init", "-q")
    set_locally(root, "[core]\n no_scm = false\n autostage = true\n")
    (root / ".git/index.lock").touch()
    with pytest.raises(Busy, match=rf"copy is done, but {root}/.git/index.lock exists: another program"):
        run(root)
    (root / ".git/index.lock").unlink()
    assert not reproduce(root, "copy", False, {}, on_wait=pytest.fail), "it is up to date"


@pytest.mark.parametrize("name", ["a, b #c", 'a "b"'])
def test_a_copy_of_a_project_can_be_in_a_folder_of_any_name(name: str, tmp_path: Path) -> None:
    root = tmp_path / name / "project"
    root.mkdir(parents=True)
    (root / "dvc.yaml").write_text(STAGES)
    (root / "source").write_text("1\n")
    dvc_cache.isolate_project(root, tmp_path / name / "cache", {"url": str(tmp_path / name / "remote")})
    run(root)
    assert push(root).objects == 1
    for folder in ("cache/files/md5/b0", "remote/files/md5/b0"):  # md5 of "1\n" is b026...
        assert (tmp_path / name / folder).is_dir()
    assert (root / ".dvc/site").is_dir()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    place = Path("/dev/shm")
    if not place.is_dir() or place.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    folder = Path(tempfile.mkdtemp(dir=place))
    yield folder
    shutil.rmtree(folder)


def test_an_output_is_set_aside_although_the_cache_is_on_another_file_system(root: Path, elsewhere: Path) -> None:
    set_locally(root, f"[cache]\n dir = {elsewhere}\n")
    run(root)
    [found] = (path for path in elsewhere.rglob("*") if path.is_file() and path.read_text() == "1\n")
    for _ in range(2):  # the second time another one is there already
        found.chmod(0o644)
        found.write_text("tampered")
        found.chmod(0o444)  # DVC trusts it
        assert dvc_cache.set_aside(root, "copy", lambda path: True, locked=False) == [found.parent.name + found.name]
        assert not found.exists() and not (root / "copied").exists()
        aside = root / ".dvc/tmp/pedigree/set_aside"
        assert {path.name: path.read_text() for path in aside.iterdir()} == {
            found.parent.name + found.name: "tampered",
            "copy": "1\n",
        }
        run(root)


def with_remote(root: Path) -> Path:
    remote = root.with_name(f"{root.name}.remote")
    set_locally(root, f"[core]\n remote = team\n['remote \"team\"']\n url = {remote}\n")
    return remote


def test_a_push_copies_the_past_runs_whose_outputs_it_has(root: Path) -> None:
    run(root)
    [gone] = (path for path in (root / ".dvc/cache/files").rglob("*") if path.is_file())
    (root / "source").write_text("2\n")
    run(root)
    gone.unlink()
    remote = with_remote(root)
    pushed = push(root)
    entries = [path for path in (remote / "runs").rglob("*") if path.is_file()]
    assert (pushed.runs, pushed.objects) == (1, 1) and len(entries) == 1
    with open_repo(root) as repo:
        assert (
            repo.stage_cache._load_cache(entries[0].parent.name, entries[0].name)["outs"][0]["md5"]
            != gone.parent.name + gone.name
        )
    assert entries[0].read_bytes() == (root / ".dvc/cache" / os.path.relpath(entries[0], remote)).read_bytes()


def test_a_push_whose_past_runs_do_not_arrive_fails(root: Path) -> None:
    run(root)
    remote = with_remote(root)
    remote.mkdir()
    (remote / "runs").write_text("a file in the place of the folder")
    with pytest.raises(InputError, match=r"cannot push to the DVC remote team: .*runs"):
        push(root)
