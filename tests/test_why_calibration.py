"""Whether records stand out for a question, judged by questions of the
validation split: parts of answers, excess and p-value."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from builders.records import said, stored, user

from dagster_project.commands import why_calibration
from dagster_project.commands.why import as_text
from dagster_project.core.records import write_records
from dagster_project.lineage.attribution import calibration
from dagster_project.lineage.attribution.calibration import ALPHA, LEAST, Calibration, asked_parts, parts_of
from dagster_project.lineage.attribution.records import Example


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ('{"category": "bug", "priority": "high"}', ["bug", "high"]),
        ('{"a": "bug", "b": "bug", "c": 3, "d": null, "e": [1], "f": {"g": 1}, "h": " "}', ["bug", "3", "null"]),
        ('{"a": "caf\\u00e9"}', []),  # written in another way than it reads: no part of the text
        ("[1, 2]", ["[1, 2]"]),
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Version 1.2 is out.", ["Version 1.2 is out."]),
        ("你好。世界！真的？！", ["你好。", "世界！", "真的？！"]),
        ("彼は「はい。」と言った。 次です。", ["彼は「はい。」と言った。", "次です。"]),
        ("नमस्ते। आप कैसे हैं। شكرا؟ نعم.", ["नमस्ते।", "आप कैसे हैं।", "شكرا؟", "نعم."]),
        ("[" * 100_000, ["[" * 100_000]),
    ],
)
def test_parts_of_an_answer_are_values_or_sentences(answer: str, parts: list[str]) -> None:
    assert parts_of(answer) == parts and all(part in answer for part in parts)


def test_few_answers_are_asked_about_whole_and_many_by_a_sample_that_is_always_the_same() -> None:
    few = ["One. Two.", "Three."]
    assert sorted(asked_parts(few)) == [(0, "One."), (0, "Two."), (1, "Three.")]
    many = [f"Answer {i}. It has a second sentence." for i in range(500)]
    asked = asked_parts(many)
    assert len(asked) == calibration.MOST and asked == asked_parts(many) and all(part in many[i] for i, part in asked)
    assert max(i for i, _ in asked) > 250, "not the first ones alone"


def by_hand(questions: np.ndarray, owners: np.ndarray, asked: np.ndarray) -> tuple[float, float]:
    """Excess and p-value in plain loops."""

    def excess(row: np.ndarray, others: list[np.ndarray]) -> float:
        above = [max(0.0, float(row[i]) - max(float(other[i]) for other in others)) for i in range(len(row))]
        return float(sum(value**2 for value in above) ** 0.5)

    own = [
        excess(row, [other for other, who in zip(questions, owners, strict=True) if who != owner])
        for row, owner in zip(questions, owners, strict=True)
    ]
    mine = excess(asked, list(questions))
    return mine, (1 + sum(value >= mine for value in own)) / (1 + len(own))


def test_excess_and_p_value_are_those_of_plain_loops() -> None:
    dice = np.random.default_rng(0)
    for _ in range(20):
        questions, owners = dice.normal(size=(12, 7)).astype(np.float32), np.sort(dice.integers(0, 5, size=12))
        asked = dice.normal(size=7).astype(np.float32)
        known = Calibration(questions, owners)
        assert (known.excess(asked), known.p_value(asked)) == pytest.approx(by_hand(questions, owners, asked), abs=1e-5)


def test_a_record_that_is_like_many_questions_is_no_news() -> None:
    """The same high score stands out at a record that no other question has, and not at one that many have."""
    dice = np.random.default_rng(1)
    questions = 0.02 * dice.normal(size=(60, 300))
    questions[:, 5] = 0.6 + 0.01 * dice.normal(size=60)
    known, asked = Calibration(questions, np.arange(60)), 0.02 * dice.normal(size=300)
    asked[5] = 0.6
    assert known.p_value(asked) > ALPHA
    asked[5], asked[9] = 0.0, 0.6
    assert known.p_value(asked) == 1 / 61


def test_of_questions_that_are_drawn_alike_a_share_of_alpha_stands_out() -> None:
    dice = np.random.default_rng(2)
    clear = []
    for _ in range(600):
        scores = dice.standard_t(3, size=(41, 50))  # heavy tails: a bound for normal scores would be wrong
        clear.append(Calibration(scores[1:], np.arange(40)).p_value(scores[0]) <= ALPHA)
    # the excess of the asked question is beyond one question more than that of the others, so it is a little smaller
    assert 0.04 < np.mean(clear) < ALPHA + 0.03


def test_a_p_value_that_is_just_above_the_limit_is_not_shown_as_the_limit() -> None:
    distribution = {
        "stands_out": False,
        "first": 0.5,
        "median": 0.0,
        "z_of_first": 7.0,
        "z_of_tenth": 3.0,
        "compared": {"questions": 96, "excess": 0.1, "p": round(10 / 97, 4)},
    }
    question = {
        "prompt": "Hat?",
        "answer": "Red.",
        "answered_by": "given",
        "span": None,
        "tokens": 2,
        "log_probability": -1.0,
    }
    model = {"stage": "adapter@lora", "md5": "0" * 32}
    document = {"model": model, "question": question, "records": 427, "hits": [], "notes": []}
    [verdict] = [line for line in as_text({**document, "distribution": distribution}).splitlines() if "p 0." in line]
    assert verdict.startswith("nothing stands out") and "p 0.103 (records stand out up to 0.1)" in verdict


def test_parts_of_the_same_answer_do_not_hide_each_other() -> None:
    """Two questions about one validation record are alike: each is measured against those of the other records."""
    questions = np.zeros((6, 4))
    questions[:2, 0] = 0.9
    found = Calibration(questions, np.array([0, 0, 1, 2, 3, 4])).own_excesses()
    assert found.tolist() == pytest.approx([0.9, 0.9, 0, 0, 0, 0])


def test_near_copies_in_the_validation_split_do_not_hide_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(i: int, group: str) -> dict[str, object]:
        return stored(user(f"Question {i}?"), said(f"Answer {i}."), example_id=f"{i}", group_id=group)

    write_records(tmp_path / why_calibration.VALIDATION, [record(i, f"{i // 2}") for i in range(2 * LEAST)])
    monkeypatch.setattr(why_calibration, "_is_of_another_training", lambda found: False)
    monkeypatch.setattr(why_calibration, "tokenizer_of", lambda found: None)
    example = SimpleNamespace(example=Example((1, 2), (-100, 2), (0.0, 1.0)))
    monkeypatch.setattr(why_calibration, "tokenize", lambda *_: example)
    owners = [owner for owner, _ in why_calibration._asked(SimpleNamespace(place=tmp_path))]  # type: ignore[arg-type]
    assert len(owners) == 2 * LEAST and len(set(owners)) == LEAST
