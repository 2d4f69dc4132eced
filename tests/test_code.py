"""The code behind an output is listed file by file, although dvc.lock has one hash per folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from builders.small_pipeline import commit, git
from dvc.repo import Repo

from dagster_project.lineage.code import code_in
from dagster_project.lineage.working_folders import from_project

FOLDER = "dagster_project/core"


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def recorded(root: Path) -> dict[str, dict]:
    """What DVC itself records of the folder and a module, as an entry of dvc.lock."""
    (root / "dvc.yaml").write_text(f"stages: {{s: {{cmd: 'true', deps: [{FOLDER}, dagster_project/stages/s.py]}}}}\n")
    (dep, module) = Repo(root).stage.collect("s")[0].deps
    return {"s": {"deps": [{"path": one.def_path, "md5": one.get_hash().value} for one in (dep, module)]}}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # DVC looks up a stage in the working folder
    for name in ("a.py", "inner/b.py", "__pycache__/a.pyc", "__pycache__/a.nbi"):
        (tmp_path / FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / FOLDER / name).write_text(name)
    (tmp_path / "dagster_project/stages").mkdir()
    (tmp_path / "dagster_project/stages/s.py").write_text("s")
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    (tmp_path / ".dvcignore").write_text("__pycache__\n")
    git(tmp_path, "init", "-q")
    Repo.init().close()
    return tmp_path


def test_committed_code_is_listed_file_by_file(root: Path) -> None:
    stages, sha = recorded(root), commit(root)
    expected = {
        name: md5(root / name) for name in (f"{FOLDER}/a.py", f"{FOLDER}/inner/b.py", "dagster_project/stages/s.py")
    }
    assert code_in(root, sha, stages)["s"] == (expected, [])
    (root / FOLDER / "a.py").write_text("edited since")  # the workspace does not matter for what is committed
    assert code_in(root, sha, stages)["s"] == (expected, [])


def test_uncommitted_code_is_named_by_the_files_that_differ(root: Path) -> None:
    sha = commit(root)
    (root / FOLDER / "a.py").write_text("edited")
    (root / FOLDER / "new.py").write_text("new")
    (root / FOLDER / "inner/b.py").unlink()
    stages = recorded(root)
    files, differs = code_in(root, sha, stages)["s"]
    assert files == {
        name: md5(root / name) for name in (f"{FOLDER}/a.py", f"{FOLDER}/new.py", "dagster_project/stages/s.py")
    }
    assert differs == [f"{FOLDER}/a.py", f"{FOLDER}/inner/b.py", f"{FOLDER}/new.py"]
    assert code_in(root, None, stages)["s"] == (files, [])


def test_code_that_cannot_be_found_is_named_by_its_folder(root: Path) -> None:
    sha = commit(root)
    (root / FOLDER / "a.py").write_text("edited")
    stages = recorded(root)
    (root / FOLDER / "a.py").write_text("edited again")
    files, differs = code_in(root, sha, stages)["s"]
    assert files[FOLDER].endswith(".dir") and FOLDER in differs


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("params.yaml", "lr: {{max: {}}}\n"),
        ("own.yaml", "lr: {{max: {}}}\n"),
        ("own.json", '{{"lr": {{"max": {}}}}}'),
        ("own.toml", "[lr]\nmax = {}\n"),
    ],
)
def test_a_commit_with_another_value_in_any_file_of_parameters_is_named(root: Path, file: str, text: str) -> None:
    stages = {"s": {"params": {file: {"lr.max": 0.5}}}}
    (root / file).write_text(text.format(0.5))
    same = commit(root)
    (root / file).write_text(text.format(0.7))
    other = commit(root)
    (root / file).write_text("[")
    broken = commit(root)
    assert [code_in(root, one, stages)["s"] for one in (same, other, broken)] == [({}, []), ({}, [file]), ({}, [file])]


def test_parameters_of_a_stage_with_wdir_are_those_of_its_folder() -> None:
    entry = {"cmd": "x", "deps": [{"path": "../a"}], "params": {"params.yaml": {"x": 1}, "../b.yaml": {"y": 2}}}
    found = from_project("mine", entry, {"mine": "own"})
    assert found == {
        "cmd": "x", "deps": [{"path": "a"}], "params": {"own/params.yaml": {"x": 1}, "b.yaml": {"y": 2}},
    }  # fmt: skip
