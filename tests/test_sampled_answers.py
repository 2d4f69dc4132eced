"""The answers that an online method learns from: their table, when there is
nothing to learn, the page and the audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders.history import Project, entry, identity, table

from dagster_project.core.records import read_table, write_table
from dagster_project.lineage.lineage import as_text, audit
from dagster_project.lineage.rows import ANSWER_COLUMNS, ANSWERS
from dagster_project.training.trainers.alignment import sampled_answers
from dagster_project.training.trainers.alignment.sampled_answers import FOLDER, SampledAnswers, schema

END = frozenset({7})
NAMES = ["brief", "data/rewards/own.py:correct"]


def filled(*steps: dict[str, list[float]], ids: list[int] | None = None, **settings: Any) -> SampledAnswers:
    """Answers of some steps: record -> the reward of each answer to it."""
    sampled = SampledAnswers(**settings)
    for step, rewards in enumerate(steps, 1):
        sampled.step = step
        for record, values in rewards.items():
            count = len(values)
            parts = {NAMES[0]: [0.5] * count, NAMES[1]: [value - 0.5 for value in values]}
            answers = [{"role": "assistant", "content": f"{record} {value}"} for value in values]
            sampled.add([{"example_id": record}] * count, answers, parts, values, [ids or [1, 7]] * count, END)
    return sampled


def test_the_table_has_every_answer_in_order_and_a_restored_one_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled_answers, "SHARD", 3)
    sampled = filled({"aa": [0.1, 1 / 3], "bb": [1.0, 2.0]}, {"aa": [0.25, 1e-9]})
    sampled.write(tmp_path / "whole", NAMES)
    again = SampledAnswers()
    again.restore(json.loads(json.dumps(sampled.state())))
    again.write(tmp_path / "again", NAMES)
    files = sorted((tmp_path / "whole").iterdir())
    assert [path.name for path in files] == ["answers-00000.parquet", "answers-00001.parquet"]
    assert [path.read_bytes() for path in files] == [(tmp_path / "again" / path.name).read_bytes() for path in files]
    rows = [row for path in files for row in read_table(path)]
    assert [(row["step"], row["example_id"], row["reward"]) for row in rows] == [
        (1, "aa", 0.1), (1, "aa", 1 / 3), (1, "bb", 1.0), (1, "bb", 2.0), (2, "aa", 0.25), (2, "aa", 1e-9),
    ]  # fmt: skip
    assert all(row["reward"] == pytest.approx(sum(row[name] for name in NAMES)) for row in rows)


def test_an_answer_has_its_calls_its_trace_and_its_end(tmp_path: Path) -> None:
    called = {"function": {"name": "weather", "arguments": {"city": "Os\ud800lo"}}}
    long = {"role": "assistant", "content": "x" * 20_000, "reasoning_content": "I\ud800 think"}
    sampled = SampledAnswers()
    answers = [{"role": "assistant", "content": "", "tool_calls": [called]}, long]
    sampled.add([{"example_id": "aa"}] * 2, answers, {}, [0.0, 0.0], [[1, 2], [7]], END)
    sampled.write(tmp_path, [])
    first, second = read_table(tmp_path / "answers-00000.parquet")
    assert (
        "weather" in first["answer"]
        and "lo" in first["answer"]
        and (first["reasoning"], first["tokens"], first["unfinished"]) == (None, 2, True)
    )
    assert (
        second["answer"] == "x" * sampled_answers.LONGEST
        and second["reasoning"] == "I\\ud800 think"
        and not second["unfinished"]
    )


@pytest.mark.parametrize(
    ("rewards", "by_record", "teaches"),
    [
        ({"aa": [1, 1], "bb": [1, 1]}, True, False),
        ({"aa": [1, 1], "bb": [2, 2]}, True, False),  # a group is compared with itself
        ({"aa": [1, 1], "bb": [2, 2]}, False, True),  # ppo compares all answers
        ({"aa": [1, 1], "bb": [1, 1 + 1e-12]}, True, True),
        ({"aa": [1], "bb": [1]}, False, False),
    ],
)
def test_there_is_something_to_learn_if_answers_that_are_compared_have_different_rewards(
    rewards: dict[str, list[float]], by_record: bool, teaches: bool
) -> None:
    assert filled(rewards, by_record=by_record).ever_teaches() is teaches


def test_the_end_of_an_answer_is_something_to_learn_where_it_is_rewarded() -> None:
    for ends_count in (True, False):
        sampled = filled({"aa": [1.0]}, by_record=False, ends_count=ends_count)
        sampled.add(
            [{"example_id": "bb"}],
            [{"role": "assistant", "content": ""}],
            {name: [0.5] for name in NAMES},
            [1.0],
            [[1, 2]],
            END,
        )
        assert sampled.ever_teaches() is ends_count


def test_only_steps_in_a_row_count_as_stalled() -> None:
    same, different = {"aa": [1.0, 1.0]}, {"aa": [1.0, 2.0]}
    assert not filled(same, same, different, same, patience=2).is_stalled()
    assert filled(different, same, same, patience=2).is_stalled() and not filled(same, same).is_stalled()
    assert not filled(same, patience=2).is_stalled() and not SampledAnswers(1).is_stalled()


def test_means_of_components_follow_the_answers_that_a_step_learned_from() -> None:
    sampled = filled({"aa": [1.0, 2.0]}, {"aa": [3.0, 3.0]})
    sampled.rows = [
        row | {"step": 2 * row["step"] - 1} for row in sampled.rows
    ]  # each batch of answers is used in two steps
    points = sampled.with_components(
        [{"step": step, "loss": 0.0} for step in (1, 2, 3, 4)] + [{"step": 4, "validation_loss": 0.0}], NAMES
    )
    assert [point.get(NAMES[1]) for point in points] == [1.0, 1.0, 2.5, 2.5, None]
    assert len({(point["reward"], point["response_length"], point["unfinished"]) for point in points[:2]}) == 1, (
        "of the same answers"
    )
    [own] = sampled.with_components([{"step": 1, "loss": 0.0, "reward": 9.0}], NAMES)
    assert own["reward"] == 9.0


@pytest.mark.parametrize("names", [NAMES, []], ids=["rewarded", "of a distillation"])
def test_an_audit_counts_the_answers_and_names_their_rewards(names: list[str], tmp_path: Path) -> None:
    assert f"{FOLDER}/" == ANSWERS and set(ANSWER_COLUMNS) == set(schema([]).names)
    project = Project(tmp_path / "project")
    lock = project.lock([("cats", "train", "data/sources/faq.jsonl"), ("dogs", "train", "data/sources/faq.jsonl")])
    sampled = filled({identity("cats"): [1.0, 2.0]}, {identity("dogs"): [0.0, 0.0, 1.0]})
    if not names:
        sampled.rows = [
            {key: value for key, value in row.items() if key not in NAMES} | {"reward": None} for row in sampled.rows
        ]
    files = {"adapter_model.safetensors": b"weights", "examples.parquet": project_evidence(lock, project)}
    for name, part in {"answers-00000": sampled.rows[:3], "answers-00001": sampled.rows[3:]}.items():
        files[f"answers/{name}.parquet"] = table(part, schema(names))
    lock["adapter@lora"] = entry("adapter@lora", {"data/splits": lock["splits"]["outs"][0]["md5"]}, project.put(files))
    lock |= project.merged(lock)
    project.commit(lock)
    audited = audit(project.root, "merged@lora")
    assert audited["answers"] == {"adapter@lora": {"answers": 5, "records": 2, "steps": 2, "rewards": names}}
    how = f"rewarded by {', '.join(NAMES)}" if names else "without rewards"
    assert f"trained on adapter@lora: 5 answers to 2 records, {how}\n" in as_text(audited)


def project_evidence(lock: dict[str, Any], project: Project) -> bytes:
    """The table of records of the adapter as the project has it."""
    from dagster_project.lineage.index import Index

    project.commit(lock)
    path = Index(project.root).file_path(lock["adapter@lora"]["outs"][0]["md5"], "examples.parquet")
    assert path
    return path.read_bytes()


def test_the_page_shows_the_worst_and_best_answers_of_three_steps(tmp_path: Path) -> None:
    from dagster_project.views.alignment import _sampled

    rewards = [{"aa": [step + n / 10 for n in range(6)]} for step in range(1, 6)]
    sampled = filled(*rewards)
    write_table(tmp_path / "answers-00000.parquet", sampled.rows[:7], schema(NAMES))
    write_table(tmp_path / "answers-00001.parquet", sampled.rows[7:], schema(NAMES))
    found = _sampled(sorted(tmp_path.iterdir()), NAMES)
    assert found["answers"] == 30 and [(step, count) for step, count, _ in found["steps"]] == [(1, 6), (3, 6), (5, 6)]
    assert [text for _, text, _ in found["steps"][1][2]] == ["aa 3.0", "aa 3.1", "aa 3.4", "aa 3.5"]
    assert found["steps"][1][2][0] == (f"reward 3 (brief 0.5, {NAMES[1]} 2.5), 2 tokens:", "aa 3.0", "aa")
