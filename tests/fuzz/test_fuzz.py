"""Cases that were findings once stay fixed, some new ones of each surface hold,
and the fuzzer sees what it looks for. `make fuzz` plays many more."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from fuzz.__main__ import CORPUS, kept
from fuzz.engine import Worker, play_all
from fuzz.surface import MODULES, drawn, surface

CASES = {
    "data_files": 25,
    "parameters": 30,
    "model_folders": 3,
    "gguf_files": 3,
    "exported_files": 20,
    "histories": 3,
    "endpoints": 12,
}
"""New cases of each surface: the same ones in every run."""


@pytest.mark.long
@pytest.mark.parametrize("name", MODULES)
def test_what_was_found_stays_fixed_and_new_cases_hold(name: str) -> None:
    cases = [*kept(name, CORPUS).values(), *(drawn(surface(name), 1, number) for number in range(CASES[name]))]
    answers = dict(play_all(name, 1, range(len(cases)), dict(enumerate(cases))))
    assert len(answers) == len(cases)
    assert not {number: answer for number, answer in answers.items() if "outcome" not in answer}


def test_every_case_of_the_corpus_names_its_surface() -> None:
    names = {json.loads(path.read_bytes())["surface"] for path in CORPUS.rglob("*.json")}
    assert names and names <= set(MODULES)


def test_a_seed_always_gives_the_same_cases() -> None:
    for name in ("data_files", "parameters", "gguf_files", "histories", "endpoints"):
        assert [json.dumps(drawn(surface(name), 7, number)) for number in range(5)] == [
            json.dumps(drawn(surface(name), 7, number)) for number in range(5)
        ]


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("hang", "more than 1 CPU seconds"),
        ("die", "the process died"),
        ("traceback", "KeyError at"),
        ("lost row", "2 rows were written, 1 are accounted for"),
    ],
)
def test_the_fuzzer_sees_a_failure_and_goes_on(kind: str, place: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker("broken", Path(folder))
        answer = worker.play({"case": {"kind": kind}}, most=1 if kind == "hang" else 20)
        assert place in answer["place"] and "outcome" not in answer
        if not answer.get("dead"):
            assert worker.play({"case": {"kind": "fine"}})["outcome"] == "fine"
            worker.end("")
