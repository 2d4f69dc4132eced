"""Work that silently did nothing is reported: no tokens, no answers, one answer
to everything, one score for everything, nothing to hash.

Alarms with a test elsewhere: unreadable and empty sources (test_raw_examples), empty splits and no pairs (test_splits,
test_preferences), constant rewards of PPO (test_ppo), weights that a trainer
did not move (test_sft, test_own_trainer), no verdicts (test_judge).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.ballots import make_answered_project
from builders.records import ask, placed, said, stored, user
from builders.small_pipeline import make_project

from dagster_project.__main__ import main
from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.messages import Call
from dagster_project.core.records import CheckResult, write_json, write_ledger, write_records
from dagster_project.core.stored_rows import StoredRows
from dagster_project.curation.checks.checks import Rules, judge
from dagster_project.curation.checks.findings import check_result
from dagster_project.curation.checks.token_counts import ESTIMATED
from dagster_project.evaluation.alarms import answers_are_not_empty, answers_differ, scored_something, scores_differ
from dagster_project.evaluation.comparison import recommended
from dagster_project.evaluation.judge import _alarm_of_rewards, by_reward, by_reward_text
from dagster_project.evaluation.paired.pairwise import Match, Pair
from dagster_project.lineage.impact.question import impact
from dagster_project.orchestration.integrity import examine
from dagster_project.stages import raw_examples, reward_model, splits, tokenized
from dagster_project.training.inference.answers import Answer
from dagster_project.training.trainers.alignment.reward_model import failed_checks, write_quality
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.weight_audit import WeightAudit, WeightChange

EMPTY, CALL = Answer(" \n"), Answer("", "", (Call("weather", {"city": "Oslo"}, None),))


def record(number: int, answer: str = "Yes.") -> dict[str, Any]:
    return stored(user(f"question {number}"), said(answer))


def named(checks: list[CheckResult], name: str) -> CheckResult:
    return next(check for check in checks if check.name == name)


@pytest.mark.parametrize(("answers", "tokens", "passes"), [([], 0, False), ([EMPTY], 0, True), ([], 3, True)])
def test_an_evaluation_without_any_result_is_stopped(answers: list[Answer], tokens: int, passes: bool) -> None:
    found = scored_something(answers, [(1.0, tokens)])
    assert (found.passed, found.blocking) == (passes, True)


@pytest.mark.parametrize(
    ("answers", "passes"),
    [
        ([], True),
        ([EMPTY, EMPTY], False),
        ([EMPTY, Answer("x")], True),
        ([EMPTY, CALL], True),
        ([Answer("", "a trace")], False),
    ],
)
def test_only_empty_answers_are_an_error(answers: list[Answer], passes: bool) -> None:
    found = answers_are_not_empty({"lora": answers, "other": [Answer("x")]}, "error")
    assert (found.passed, found.severity, "lora" in found.note, "other" in found.note) == (
        passes,
        "error",
        not passes,
        False,
    )


def test_a_variant_with_only_empty_answers_is_never_called_a_gain() -> None:
    gain = {"difference": 0.5, "interval": [0.4, 0.6]}
    compared = {
        "lora": {
            "to": {"few_shot": {"accuracy": gain}},
            "failed_checks": ["answers_are_not_empty of evaluation@lora: all"],
        }
    }
    scores = {name: {"accuracy": 0.5} for name in ("lora", "few_shot")}
    test = {"examples": 99, "answered": 99, "seen": 0}
    assert not recommended("accuracy", scores, compared, {}, test)["sure"]
    del compared["lora"]["failed_checks"]
    assert recommended("accuracy", scores, compared, {}, test)["sure"]


A, B = Answer("a"), Answer("b")


@pytest.mark.parametrize(
    ("references", "answers", "passes"),
    [
        ([A, B], [A, A], False),
        ([A, B], [CALL, CALL], False),
        ([A, B], [EMPTY, EMPTY], True),  # the alarm of empty answers
        ([A, B], [A, CALL], True),
        ([A, A], [A, A], True),
        ([A], [A], True),
        ([], [], True),
    ],
)
def test_one_answer_to_different_questions_is_a_warning(
    references: list[Answer], answers: list[Answer], passes: bool
) -> None:
    found = answers_differ(references, answers)
    assert (found.passed, found.blocking, found.severity) == (passes, False, "warn")


def scored(*values: float) -> np.ndarray:
    return np.array([(value, 1) for value in values])


@pytest.mark.parametrize(
    ("systems", "passes"),
    [
        ([scored(0, 0), scored(0, 0)], False),
        ([scored(1, 1), scored(1, 1)], False),
        ([scored(1, 1), scored(0, 0)], True),
        ([scored(0, 1)], True),
        ([scored(1)], True),
    ],
)
def test_a_measure_with_one_value_for_all_answers_of_all_systems_is_a_warning(
    systems: list[np.ndarray], passes: bool
) -> None:
    found = scores_differ({"mine": systems, "other": [scored(0, 1)]})
    assert (found.passed, found.blocking, found.severity) == (passes, False, "warn")
    assert ("mine is the same" in found.note, "other" in found.note.split(";")[0]) == (not passes, False)


def test_a_source_file_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data/sources").mkdir(parents=True)
    params = raw_examples.Params(sources=[{"path": "data/sources/a.jsonl", "license": "CC0-1.0"}])  # type: ignore[list-item]
    for content in ("", "\n\n"):
        (tmp_path / "data/sources/a.jsonl").write_text(content)
        with pytest.raises(InputError, match="the file has no rows"):
            raw_examples.produce(tmp_path, params, tmp_path / "out")


@pytest.mark.parametrize(
    ("train", "validation", "max_length", "outcome"),
    [
        ([record(1)], [record(2)], 512, (True, True)),
        ([record(1)], [], 512, (True, True)),
        ([record(1, "long " * 99)], [record(2)], 128, (False, True)),
        ([record(1)], [record(2, "long " * 99)], 128, (False, False)),
        ([], [record(2)], 512, (False, True)),
    ],
)
def test_a_training_split_without_trained_tokens_stops_the_stage(
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    max_length: int,
    outcome: tuple[bool, bool],
    tmp_path: Path,
    tiny_model: Path,
) -> None:
    for name, rows in (("train", train), ("validation", validation)):
        write_records(tmp_path / "splits" / name, rows)
    lines = [
        {"source": r["source"], "example_id": r["example_id"], "source_row": i}
        for i, r in enumerate([*train, *validation])
    ]
    write_ledger(tmp_path / "splits", lines)
    report = tokenized.produce(
        tmp_path, tokenized.Params(max_length=max_length), 1, tmp_path / "splits", tiny_model, tmp_path / "out"
    )
    found = named(report.checks, "trained_tokens")
    assert (found.passed, found.blocking) == outcome, found.note


def test_an_augmentation_that_adds_nothing_is_a_warning(tmp_path: Path) -> None:
    rows = [record(i, f"answer {i}") for i in range(20)]
    write_records(tmp_path / "in", rows)
    write_ledger(
        tmp_path / "in", [{**row, "source_row": i, "outcome": "kept", "why": ""} for i, row in enumerate(rows)]
    )
    (tmp_path / "data/sources/paraphrases").mkdir(parents=True)
    path = "data/sources/paraphrases/p.jsonl"
    (tmp_path / path).write_text(json.dumps({"prompt": "no row asks this", "paraphrase": "and nobody this"}) + "\n")
    params = splits.Params.model_validate({"augment": {"paraphrases": path, "license": "CC0-1.0"}})
    found = named(splits.produce(tmp_path, params, 1, tmp_path / "in", tmp_path / "out").checks, "augmented_rows")
    assert (found.passed, found.blocking, found.severity) == (False, False, "warn") and "no row was added" in found.note
    found = named(
        splits.produce(tmp_path, splits.Params(), 1, tmp_path / "in", tmp_path / "plain").checks, "augmented_rows"
    )
    assert (found.passed, found.blocking) == (True, True)


def test_an_examination_that_hashed_nothing_is_refused(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project")
    (root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    (root / "data/sources/d.txt.dvc").unlink()
    with pytest.raises(InputError, match="there is nothing to hash"):
        examine(root)


@pytest.mark.parametrize(
    "asked", [{"text": "Why?"}, {"containing": "Why"}, {"record": "0" * 32}, {"text": "Why?", "near": True}]
)
def test_an_impact_of_nothing_is_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    root = make_project(tmp_path / "project")
    with pytest.raises(InputError, match="nothing has been run here"):
        impact(root, **asked)
    (root / "dvc.lock").mkdir()  # damaged before it was ever committed
    with pytest.raises(InputError, match="nothing has been run here"):
        impact(root, **asked)


def test_a_set_without_a_kept_row_stops_the_stage() -> None:
    found = judge(StoredRows(placed([ask(" "), ask("\n")])), [], Rules(), ESTIMATED, [])
    result = check_result(found.verdicts["schema"], found, [])
    assert (result.passed, result.blocking, result.note) == (False, True, "no rows are left")


@pytest.mark.parametrize(("rate", "passes"), [(1e-30, False), (1e-2, True)])
def test_a_learning_rate_that_moves_nothing_stops_the_stage(rate: float, passes: bool, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    audit, optimizer = WeightAudit(model, tmp_path), torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    found = audit.change().check()
    assert (found.passed, found.blocking) == (passes, True)


@pytest.fixture(scope="module")
def constant(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model whose output layer is zero."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("constant")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    with torch.no_grad():
        model.score.weight.zero_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    write_quality(folder, [])
    return folder


def test_a_reward_model_without_pairs_is_not_promised_by_another_run(tmp_path: Path) -> None:
    judged = Match("m", ("ours", "theirs"), 0, [], identical=0)
    with pytest.raises(InputError, match="no reward model yet"):
        by_reward(judged, 1, tmp_path)
    write_json(tmp_path / "training.json", {"pairs": 0})
    with pytest.raises(InputError, match="no preference pairs") as refused:
        by_reward(judged, 1, tmp_path)
    assert "raw_preferences.sources" in refused.value.hint


def test_a_reward_model_that_scores_all_answers_equally_is_an_alarm(constant: Path) -> None:
    asked = [{"role": "user", "content": "Why?"}]
    pairs = [Pair(str(i), asked, None, (f"good {i}", f"bad {i}"), swapped=False) for i in range(2)]
    found = by_reward(Match("m", ("ours", "theirs"), 0, pairs, identical=0), 2, constant)
    assert "all 4 answers have the same reward" in found["alarm"] and "nothing can be concluded" in by_reward_text(
        found
    )
    assert by_reward(Match("m", ("ours", "theirs"), 0, pairs, identical=0), 1, constant)["alarm"] is None, (
        "one pair shows nothing"
    )


def with_output_layer(constant: Path, folder: Path, value: float) -> Path:
    """The reward model with other weights of its output layer."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(constant, folder)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"].fill_(value)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rewards_that_are_not_finite_numbers_are_not_ties(constant: Path, tmp_path: Path, value: float) -> None:
    pairs = [Pair("0", [{"role": "user", "content": "Why?"}], None, ("good", "bad"), swapped=False)]
    with pytest.raises(CheckFailed, match="2 of 2 rewards not finite"):
        by_reward(
            Match("m", ("ours", "theirs"), 0, pairs, identical=0), 1, with_output_layer(constant, tmp_path / "m", value)
        )


def test_rewards_that_depend_on_the_prompts_alone_are_an_alarm() -> None:
    assert _alarm_of_rewards([0.5, 0.5, -2.0, -2.0]) == (
        "the answers of each pair have the same reward: the rewards do not depend on the answers"
    )
    assert _alarm_of_rewards([0.5, 0.5, -2.0, -2.1]) is None
    assert _alarm_of_rewards([0.5, 0.5]) is None, "one pair shows nothing"


def test_the_verdict_of_a_reward_model_comes_without_a_progress_bar(
    constant: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as hf_logging

    make_answered_project(tmp_path)
    with (tmp_path / "params.yaml").open("a") as file:
        file.write("reward_model: {}\n")
    (tmp_path / "data/reward_model").symlink_to(constant)
    hf_logging.enable_progress_bar()
    assert main(["judge", "lora", "few_shot", "--reward-model", "--n", "2", "--project", str(tmp_path)]) == 1
    said = capfd.readouterr()
    assert "have the same reward" in said.out and "%|" not in said.err


@pytest.mark.parametrize(("spread", "passes"), [(0.0, False), (0.0001, True)])
def test_equal_rewards_of_all_held_out_answers_keep_a_reward_model_from_online_methods(
    spread: float, passes: bool, tmp_path: Path
) -> None:
    history = TrainingHistory()
    history.curve.append({"step": 1, "loss": 0.7})
    change = WeightChange(
        {"score": {"tensors": 1, "moved": 1, "norm_of_change": 1.0}}, {"sha256_before": "a", "sha256_after": "a"}
    )
    quality = {
        "accuracy": 0.5,
        "accuracy_interval": [0.4, 0.6],
        "length_rule": 0.3,
        "length_rule_says": "longer",
        "reward": {"spread": spread},
    }
    checks = reward_model._checks(
        history, change, quality, 10, reward_model.Params(model="base_model", min_accuracy=0.0)
    )
    write_quality(tmp_path, checks)
    assert set(failed_checks(tmp_path)) == (set() if passes else {"rewards_differ"})
