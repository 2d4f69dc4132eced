"""The fixed part of the cases of faults, all of which pass; and the frame itself: it finds what it must find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.warm import Outcome, Place
from conftest import ROOT

from faults.__main__ import CLASSES, table
from faults.case import Play, Result, Violation
from faults.project import differences

pytestmark = pytest.mark.faults


@pytest.mark.long
def test_no_case_of_the_fixed_part_fails() -> None:
    """In a process of its own: commands are forked from it, so it must not have threads."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-m", "faults", "--fixed", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.stdout, done.stderr
    results = [Result(**one) for one in json.loads(done.stdout)]
    assert not [one for one in results if one.problem], table(results)
    assert {one.case.partition("/")[0] for one in results} == set(CLASSES)


def play_that_saw(tmp_path: Path, **said: Any) -> tuple[Play, Outcome]:
    outcome = Outcome(**{"command": ("pedigree", "sync"), "code": 2, "out": "", "err": "error: x\nhint: y\n", **said})
    return Play(Place(tmp_path, tmp_path), None), outcome  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"err": "Traceback (most recent call last):\n"}, "traceback"),
        ({"out": '  File "a.py", line 3\n'}, "traceback"),
        ({"code": 134}, "exit code 134"),
        ({"code": -14}, "exit code -14"),
        ({"err": ""}, "0 messages"),
        ({"err": "error: x\n"}, "no next step"),
        ({"err": "error: x\nhint: y\nerror: z\n"}, "2 messages"),
        ({"command": ("dvc", "repro"), "code": 1, "err": "hm"}, "without a message"),
    ],
)
def test_the_frame_finds_what_a_user_must_not_see(tmp_path: Path, said: dict[str, Any], problem: str) -> None:
    play, outcome = play_that_saw(tmp_path, **said)
    with pytest.raises(Violation, match=problem):
        play.explained(play.seen(outcome))


def test_one_message_with_the_next_step_passes(tmp_path: Path) -> None:
    play, outcome = play_that_saw(tmp_path)
    assert play.explained(play.seen(outcome)) is outcome


def test_the_frame_finds_every_file_that_is_left_missing_or_different() -> None:
    expected = {"data/a": "1", "data/b": "2", ".dvc/tmp/lock": "3", "dvc.lock": "4"}
    assert differences(expected, expected) == []
    now = {"data/a": "1", "data/c": "5", ".dvc/tmp/lock": "6", "dvc.lock": "7"}
    assert differences(now, expected) == ["left behind: data/c", "missing: data/b", "other content: dvc.lock"]
    assert differences({**expected, ".dvc/tmp/pedigree/scratch/x": "1"}, expected) == [
        "left behind: .dvc/tmp/pedigree/scratch/x"
    ]


def test_the_table_counts_classes_and_names_the_command_of_a_case_that_failed() -> None:
    shown = table(
        [Result("kill/a", "", []), Result("kill/b", "left behind: x", ["dvc repro"]), Result("disk/a", "", [])]
    )
    assert [line.split() for line in shown.splitlines()[:4]] == [
        ["fault", "cases", "passed", "failed"],
        ["kill", "2", "1", "1"],
        ["disk", "1", "1", "0"],
        ["all", "3", "2", "1"],
    ]
    assert "make faults ONLY=kill/b" in shown and "ran: dvc repro" in shown and "left behind: x" in shown
