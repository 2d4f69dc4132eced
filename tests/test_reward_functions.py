"""Custom rewards: what a function gets, what it may return, and that a bad one is one message with its place."""

from __future__ import annotations

import ast
import os
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from dagster_project.core.errors import InputError
from dagster_project.training.trainers.alignment import reward_functions
from dagster_project.training.trainers.alignment.reward_functions import (
    FOLDER,
    RewardFunction,
    check,
    sha256_of_functions,
    started,
)
from dagster_project.training.trainers.alignment.rewards import Rewards
from dagster_project.training.trainers.alignment.rewards import check as check_rewards

PAIRS = [
    {
        "example_id": f"id{number}",
        "prompt": [{"role": "user", "content": f"{number} + 1?"}],
        "chosen": [{"role": "assistant", "content": f"{number + 1}"}],
    }
    for number in range(3)
]
ANSWERS = [{"role": "assistant", "content": text} for text in ("1", "5", "3")]
EXACT = """
def correct(prompts, answers, records):
    assert [prompt[0]["content"] for prompt in prompts] == [record["prompt"][0]["content"] for record in records]
    return [answer == record["chosen"][0]["content"] for answer, record in zip(answers, records)]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / FOLDER).mkdir(parents=True)
    return tmp_path / FOLDER


def scores(folder: Path, content: str, name: str = "correct", seconds: float = 60.0) -> list[float]:
    (folder / "own.py").write_text(content)
    check(folder.parents[1], f"{FOLDER}/own.py:{name}", "aligned.x.rewards")
    function = RewardFunction(folder, f"{FOLDER}/own.py:{name}", seconds, "aligned.x.rewards")
    return Rewards({function.name: 2.0, "brief": 1.0}, None, [function])(PAIRS, ANSWERS)[0]


def test_a_process_without_answers_calls_no_function(folder: Path) -> None:
    (folder / "best.py").write_text(
        "def best(prompts, answers, records):\n    return [len(answers[0]) / max(map(len, answers))]\n"
    )
    function = RewardFunction(folder, f"{FOLDER}/best.py:best", 20, "aligned.x.rewards")
    assert (function([], [], []), function([[]], ["abc"], PAIRS[:1])) == ([], [1.0])


def test_a_function_scores_answers_and_its_weight_counts_beside_that_of_a_rule(folder: Path) -> None:
    assert scores(folder, EXACT) == pytest.approx([2.99, 0.99, 2.99])
    assert [path.name for path in folder.iterdir()] == ["own.py"], "DVC watches the folder"


def test_a_function_gets_the_whole_answer_and_may_import_its_neighbors(folder: Path) -> None:
    (folder / "words.py").write_text("GOOD = 'think'")
    traced = [{**answer, "reasoning_content": "I think"} for answer in ANSWERS]
    (folder / "own.py").write_text(
        "import words\ndef f(p, a, r): return [words.GOOD in one['answer']['reasoning_content'] for one in r]"
    )
    function = RewardFunction(folder, f"{FOLDER}/own.py:f", 60.0, "aligned.x.rewards")
    assert Rewards({function.name: 1.0}, None, [function])(PAIRS, traced)[0] == [1.0] * 3


def test_what_it_prints_and_its_forks_do_not_reach_the_scores(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noisy = (
        "import os, sys\nprint('loading')\ndef correct(p, a, r):\n    print('[9.0]')\n    os.fork()\n    return [1.0] *"
        " len(a)\n"
    )
    assert scores(folder, noisy) == pytest.approx([2.99] * 3)
    assert "loading" in (said := capfd.readouterr()).err and not said.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def other(): pass", r"own\.py has no function 'correct'"),
        ("def correct(:", r"own\.py is not Python: .*line 1"),
        (
            "import nothing_like_it\ndef correct(): pass",
            r"own\.py fails: ModuleNotFoundError: No module named"
            r" 'nothing_like_it'",
        ),
        ("raise SystemExit(0)\ndef correct(): pass", r"own\.py fails: SystemExit: 0"),
        ("correct = 1", r"own\.py has no function 'correct'"),
        (
            "def correct(p, a, r): return [1 / (len(x) - 1 + (x != '5')) for x in a]",
            r"fails: ZeroDivisionError.*; for"
            r" the answer to example id1",
        ),
        ("def correct(p, a, r): return [1.0]", "returns 1 numbers for 3 answers"),
        ("def correct(p, a, r): return None", "fails: TypeError"),
        (
            "def correct(p, a, r): return [0, float('nan'), 1]",
            "returns nan, which is not a finite number; for the answer to example id1",
        ),
        ("def correct(p, a, r): return ['high'] * 3", "fails: ValueError.*for the answer to example id0"),
        (
            "import random\ndef correct(p, a, r): return [random.random() for x in a]",
            "and then .* for the same answer; for the answer to example id0",
        ),
        ("import os\ndef correct(p, a, r): os._exit(3)", r"ended its process \(exit code 3\)"),
    ],
)
def test_a_bad_function_is_one_message_with_the_place(folder: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        scores(folder, content)


@pytest.mark.parametrize(
    "content", ["while True: pass\ndef correct(): pass", "import time\ndef correct(p, a, r): time.sleep(1000)"]
)
def test_a_function_that_takes_too_long_is_ended(folder: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"own\.py:correct took longer than 0\.5 s for (its file|3 answers).*"):
        scores(folder, content, seconds=0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{FOLDER}/none.py:f", "does not exist"),
        (f"{FOLDER}/../../params.py:f", "is not a reward"),
        (f"{FOLDER}/own.py:f.g", "is not a reward"),
        ("elsewhere/own.py:f", "is not a reward"),
        (f"{FOLDER}/far.py:f", "is outside the project"),
        ("validjson", r"unknown: validjson.*"),
    ],
)
def test_a_name_is_refused_before_anything_runs(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, name: str, message: str
) -> None:
    far = tmp_path_factory.mktemp("far") / "far.py"
    far.write_text("def f(): pass")
    (folder / "far.py").symlink_to(far)
    (folder / "own.py").write_text("raise RuntimeError('a check of parameters runs no code')")
    with pytest.raises(InputError, match=message):
        check_rewards({name: 1.0}, "aligned.x.rewards", folder.parents[1])


def test_every_file_of_the_folder_but_notes_is_part_of_the_identity(folder: Path) -> None:
    found = {sha256_of_functions(folder)}
    for name, counts in (
        ("own.py", True),
        ("more/words.txt", True),
        ("README.md", False),
        ("__pycache__/own.pyc", False),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
        before, now = len(found), sha256_of_functions(folder)
        found.add(now)
        assert (len(found) > before) is counts, name


def test_the_time_between_calls_does_not_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own.py").write_text(EXACT)
    process = Path(reward_functions.reward_process.__file__).read_text().replace("GRACE = 5.0", "GRACE = 0.0")
    assert "GRACE = 0.0" in process
    (folder.parent / "process.py").write_text(process)
    monkeypatch.setattr(reward_functions.reward_process, "__file__", str(folder.parent / "process.py"))
    function = RewardFunction(folder, f"{FOLDER}/own.py:correct", 2.0, "aligned.x.rewards")
    rewards = Rewards({function.name: 1.0}, None, [function])
    for _ in range(2):
        time.sleep(2.2)
        assert rewards(PAIRS, ANSWERS)[0] == [1.0, 0.0, 1.0]


def test_a_process_ends_with_the_training(folder: Path) -> None:
    (folder / "own.py").write_text(EXACT)
    functions = started(
        folder, {f"{FOLDER}/own.py:correct": 1.0, f"{FOLDER}/own.py:none": 0.0, "brief": 1.0}, 60.0, "aligned.x.rewards"
    )
    process = functions[0].process
    assert len(functions) == 1 and process.poll() is None
    functions.clear()
    assert process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_the_function_in_the_documentation_works(folder: Path) -> None:
    blocks: list[Any] = []
    for page in (ROOT / "docs/alignment.md", ROOT / FOLDER / "README.md"):
        blocks += [block.partition("```")[0] for block in page.read_text().split("```python\n")[1:]]
    assert len(blocks) == 2 and blocks[0] == blocks[1]
    assert ast.parse(blocks[0]) and scores(folder, blocks[0]) == pytest.approx([2.99, 0.99, 2.99])
