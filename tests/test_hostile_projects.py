"""Names and repositories of other people lead to no file outside the folder that they are about."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

import pytest

from dagster_project.__main__ import main
from dagster_project.cli.output import print_result
from dagster_project.core.errors import InputError
from dagster_project.lineage.files_at import files_at
from dagster_project.lineage.lineage import audit
from dagster_project.orchestration import integrity
from dagster_project.orchestration.run_stage import run_stage


def git(folder: Path, *arguments: str, given: bytes = b"") -> str:
    who = {
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@example.org",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@example.org",
    }
    return subprocess.run(
        ["git", *arguments], cwd=folder, input=given, env={**os.environ, **who}, check=True, capture_output=True
    ).stdout.decode().strip()  # fmt: skip


@pytest.mark.parametrize(
    "address", ["adapter@x/../../../params.yaml", "adapter@../x", "adapter@/etc/passwd", "adapter@a b"]
)
def test_the_name_of_a_variant_is_no_path(address: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("precious: 1\n")
    with pytest.raises(InputError, match="a variant's name may contain letters, digits, - and _"):
        run_stage(tmp_path, address)
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
    assert (tmp_path / "params.yaml").read_text() == "precious: 1\n"


def test_a_revision_is_no_option_of_git(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").touch()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    before = sorted(path.name for path in tmp_path.iterdir())
    for ask in (lambda rev: integrity.examine(tmp_path, rev), lambda rev: audit(tmp_path, "adapter@lora", rev)):
        with pytest.raises(InputError, match="is not a git revision"):
            ask("--output=written")
    with pytest.raises(InputError, match="no such revision in git"):
        files_at("--output=written", [tmp_path], tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("order", [("link", "folder"), ("folder", "link")])
def test_no_file_of_an_earlier_revision_is_written_through_a_link(
    order: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, outside, copies = (tmp_path / name for name in ("project", "outside", "copies"))
    for folder in (project / "data", outside, copies):
        folder.mkdir(parents=True)
    git(project, "init", "-q")
    blob = git(project, "hash-object", "-w", "--stdin", given=b'{"prompt": "a", "response": "b"}\n')
    link = git(project, "hash-object", "-w", "--stdin", given=os.fsencode(outside))
    inner = git(project, "mktree", given=f"100644 blob {blob}\tstolen.jsonl\n".encode())
    modes = {"link": f"120000 blob {link}", "folder": f"040000 tree {inner}"}
    raw = b"".join(
        modes[kind].split()[0].lstrip("0").encode() + b" same\0" + bytes.fromhex(modes[kind].split()[2])
        for kind in order
    )  # `git mktree` would drop one of two entries with the same name
    tree = git(project, "hash-object", "-w", "--literally", "-t", "tree", "--stdin", given=raw)
    top = git(project, "mktree", given=f"040000 tree {tree}\tdata\n".encode())
    commit = git(project, "commit-tree", top, "-m", "x")
    git(project, "update-ref", "refs/heads/evil", commit)
    monkeypatch.chdir(project)
    [copy] = files_at("evil", [Path("data")], copies)
    assert not list(outside.iterdir())
    assert (copy / "same" / "stolen.jsonl").is_file()


HOSTILE = "a\x1b]52;c;eA==\x07b\x9b2Jc\u202ed\r"


@pytest.mark.parametrize("as_json", [False, True])
def test_no_control_character_of_the_data_reaches_the_terminal(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {"name": HOSTILE, HOSTILE: ["keeps\nlines\tand tabs", "ä"]}
    print_result(argparse.Namespace(json=as_json), document, lambda found: f"{found['name']}\n{found[HOSTILE][1]}")
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\x9b\u202e\r") and "ä" in out
    if as_json:
        assert json.loads(out) == document
    else:
        assert out == "a\\x1b]52;c;eA==\\x07b\\x9b2Jc\\u202ed\\r\nä\n"


def test_a_command_prints_the_names_of_a_project_without_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    assert main(["run", "--project", str(tmp_path), f"adapter@{HOSTILE}"]) == 2
    said = "".join(capsys.readouterr())
    assert not set(said) & set("\x1b\x07\x9b\u202e\r"), said


def test_a_revision_is_not_said_to_be_missing_where_git_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    for ask in (
        lambda: files_at("HEAD", [tmp_path], tmp_path / "copy"),
        lambda: audit(tmp_path, "adapter@lora", "HEAD"),
    ):
        with pytest.raises(InputError, match="git is not installed"):
            ask()


def test_no_program_that_a_repository_names_is_run(tmp_path: Path) -> None:
    """Its configuration comes with a folder that was copied or unpacked, though not with a clone."""
    from dagster_project.core.git import git as ask
    from dagster_project.lineage.history import history

    git(tmp_path, "init", "-q")
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    (tmp_path / ".gitattributes").write_text("* filter=evil\n")
    program = tmp_path / "evil.sh"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\ncat\n")
    program.chmod(0o755)
    git(tmp_path, "config", "core.fsmonitor", str(program))
    git(tmp_path, "config", "filter.evil.clean", str(program))
    found = history(tmp_path)
    assert (
        ask(tmp_path, "ls-files", "--others")
        and found.workspace == git(tmp_path, "hash-object", "--no-filters", "dvc.lock").strip()
    )
    assert not (tmp_path / "ran").exists()
