"""The benchmark of verifiable rewards: its data have one right answer each and
no note twice, and its trainings and intervals are what the table says."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import parcel_notes
import verifiable
from seeds import gain, spread

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
CITY = "|".join(parcel_notes.CITIES)
DESTINATIONS = (  # how a reader finds where a parcel goes
    rf"\bto ({CITY})",
    rf"({CITY}) receives",
    rf"for ({CITY})",
    rf"ships it to ({CITY})",
    rf"ordered by ({CITY})",
    rf"({CITY}) waits",
    rf"dropped off in ({CITY})",
    rf"({CITY}) gets",
)


def asked(row: dict[str, Any]) -> tuple[str, str, str]:
    """Note, field and answer."""
    system, user, assistant = row["messages"]
    assert (system["role"], user["role"], assistant["role"]) == ("system", "user", "assistant")
    note, _, field = user["content"].partition("\n")
    return note, field.removesuffix("?"), assistant["content"]


def read(note: str) -> dict[str, str]:
    """The values of a note, read from its text."""
    days = sorted((day for day in DAYS if day in note), key=DAYS.index)
    [boxes], [kilograms] = re.findall(r"\b\d\b", note), re.findall(r"\b\d\d\b", note)
    found = {match for pattern in DESTINATIONS for match in re.findall(pattern, note)}
    [destination] = found
    [origin] = {*re.findall(CITY, note)} - found
    return {
        "origin": origin,
        "destination": destination,
        "sent": days[0],
        "due": days[1],
        "boxes": boxes,
        "kilograms": kilograms,
    }


def test_every_answer_is_the_value_that_the_note_has() -> None:
    for rows in parcel_notes.records(5).values():
        for row in rows:
            note, field, answer = asked(row)
            assert read(note)[field] == answer, note
            assert row["category"] == field


def test_no_note_is_in_two_files_and_each_field_is_asked_as_often() -> None:
    files = parcel_notes.records(0)
    notes = [asked(row)[0] for rows in files.values() for row in rows]
    assert len({*notes}) == len(notes) == sum(parcel_notes.SIZES.values())
    for name, rows in files.items():
        counts = [sum(row["category"] == field for row in rows) for field in parcel_notes.FIELDS]
        assert max(counts) - min(counts) <= 1 and sum(counts) == parcel_notes.SIZES[name]


def test_the_seed_decides_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parcel_notes.records(1) == parcel_notes.records(1) != parcel_notes.records(2)
    for folder in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["parcel_notes.py", str(tmp_path / folder)])
        assert parcel_notes.main() == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert {*written} == {"few.jsonl", "train.jsonl", "validation.jsonl"}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}


def test_a_gain_is_of_the_mean_over_seeds_with_an_interval_over_records() -> None:
    dice = np.random.default_rng(3)
    names = [f"r{i}" for i in range(120)]
    before = {seed: dict(zip(names, dice.integers(0, 2, 120).tolist(), strict=True)) for seed in (1, 2, 3)}
    after = {
        seed: {name: max(value, int(dice.random() < 0.3)) for name, value in before[seed].items()} for seed in (1, 2, 3)
    }
    found = gain(after, before)
    of_records = np.array([[after[seed][name] - before[seed][name] for seed in (1, 2, 3)] for name in names]).mean(1)
    assert found["difference"] == pytest.approx(of_records.mean(), abs=1e-4)
    error = of_records.std(ddof=1) / 120**0.5
    assert found["interval"] == pytest.approx(
        [of_records.mean() - 1.96 * error, of_records.mean() + 1.96 * error], abs=0.006
    )
    assert gain({2: before[2]}, before)["interval"] == [0.0, 0.0]


def test_a_table_has_the_gain_over_the_model_of_the_same_seed() -> None:
    def run(training: str, seed: int, solved: int) -> dict[str, Any]:
        scores = {f"r{i}": float(i < solved) for i in range(10)}
        return {"training": training, "seed": seed, "solved": scores, "cpu_seconds": 10.0 * seed, "steps": 4}

    written = verifiable.table(
        [run("sft", 1, 5), run("sft", 2, 3), run("grpo", 1, 8) | {"answers": 64}, run("grpo", 2, 5) | {"answers": 64}]
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["SFT on 32 records", "then GRPO, rewarded on 256 others"]
    assert rows[2][1:4] == ["2", "40.0 (30.0 to 50.0) %", ""]
    assert rows[3][1:3] == ["2", "65.0 (50.0 to 80.0) %"] and rows[3][3].startswith("+25.0 (") and rows[3][4:] == [
        "+30.0, +20.0", "4", "64", "15 (10 to 20)",
    ]  # fmt: skip
    assert spread([2.0, 2.0], 1) == "2.0"


def test_the_trainings_are_those_of_the_pipeline(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny model and easier rewards: the online method begins with the
    supervised model of its seed, and its rewards before are that model's."""
    monkeypatch.setattr(parcel_notes, "SIZES", {"few": 6, "train": 8, "validation": 5})
    monkeypatch.setattr(verifiable, "TOKENIZED", {"max_length": 512, "packed_length": 512})
    monkeypatch.setattr(verifiable, "STEPS", {"sft": 3, "sft_more": 4})
    rewards = {"regex": {"pattern": "[a-mA-M]"}, "length_window": {"weight": 0.1, "max_words": 1}}
    monkeypatch.setattr(
        verifiable, "REWARDED", {**verifiable.REWARDED, "rewards": rewards, "per_device_train_batch_size": 8}
    )
    project, work = tmp_path / "project", tmp_path / "work"
    shutil.copytree(tiny_model, project / "data/base_model")
    sft, more, rloo = (
        verifiable.child(training, 3, 7, project, work / training, work / "sft")
        for training in ("sft", "sft_more", "rloo")
    )
    held_out = {row["example_id"] for row in verifiable.read_held_out(tmp_path / "held_out", 7)}
    assert {*sft["solved"]} == {*more["solved"]} == {*rloo["solved"]} == held_out and len(held_out) == 5
    assert rloo["before"] == pytest.approx(sft["solved"], abs=1e-4)
    assert (sft["steps"], more["steps"], rloo["steps"], rloo["answers"]) == (3, 4, 4, 32)
    assert 0 < rloo["cpu_seconds"] < rloo["all_cpu_seconds"]


def test_the_model_that_online_methods_start_from_is_always_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert verifiable.with_starts(["grpo"]) == ["sft", "grpo"] and verifiable.with_starts(["sft_more", "sft"]) == [
        "sft",
        "sft_more",
    ]
    with pytest.raises(SystemExit) as refused:
        verifiable.with_starts(["grpo", "dpo"])
    assert (
        refused.value.code == 2
        and capsys.readouterr().err == "dpo: unknown training; name some of sft, grpo, rloo, sft_more\n"
    )


def test_an_interrupted_benchmark_goes_on_and_other_settings_are_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training starts from the supervised model of its own settings, also
    when settings are changed and changed back."""
    made: list[tuple[str, str, str]] = []
    stops_at = [1]

    def measure(given: dict[str, Any]) -> dict[str, Any]:
        if len(made) in stops_at:
            raise KeyboardInterrupt
        made.append((given["training"], Path(given["folder"]).name, Path(given["sft"]).name))
        (merged := Path(given["folder"]) / "merged").mkdir(parents=True)
        (merged / "config.json").write_text("{}")
        return {"training": given["training"], "seed": given["seed"], "number": len(made)}

    def numbers() -> list[int]:
        return [
            verifiable.run_of(training, 1, 0, tmp_path / "project", tmp_path / "work")["number"]
            for training in ("sft", "grpo")
        ]

    monkeypatch.setattr(verifiable, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        numbers()
    stops_at.clear()
    assert numbers() == numbers() == [1, 2] and [run[0] for run in made] == ["sft", "grpo"] and made[1][2] == made[0][1]
    before = dict(verifiable.STEPS)
    monkeypatch.setattr(verifiable, "STEPS", before | {"sft": 25})
    assert numbers() == [3, 4] and made[3][2] == made[2][1] != made[0][1]
    monkeypatch.setattr(verifiable, "STEPS", before)
    monkeypatch.setattr(verifiable, "REWARDED", verifiable.REWARDED | {"learning_rate": 1e-4})
    assert numbers() == [1, 5] and made[4][2] == made[0][1] and made[4][1] != made[1][1]
    monkeypatch.setattr(parcel_notes, "SYSTEM", "Answer.")
    assert numbers() == [6, 7]
    shutil.rmtree(tmp_path / "work" / "0-1" / made[5][1])  # the model is gone: it is trained again
    assert numbers() == [8, 7]


def test_what_an_interrupted_training_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint would make the next one look faster than it was."""
    (tmp_path / "rloo" / "checkpoints").mkdir(parents=True)

    def online(method: str, folder: Path, *_: Any) -> dict[str, Any]:
        return {"is_new": not folder.exists()}

    monkeypatch.setattr(verifiable, "online", online)
    assert verifiable.child("rloo", 1, 0, tmp_path, tmp_path / "rloo", tmp_path / "sft")["is_new"]
