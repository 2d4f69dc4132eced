"""Forgetting through tuning: figures of lm-evaluation-harness, paired, and a warning only if they support it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.files import jsonl

from dagster_project.core.errors import InputError
from dagster_project.evaluation.retention import accuracies, ask, forgot, read_benchmarks, retained

WORDS = ["red", "blue", "a green one", "grey", "it is yellow", "no colour at all"]

FILES: dict[str, tuple[list[dict[str, Any]], str, str, str]] = {
    # benchmark: (rows, and how lm-eval's task is to read them: doc_to_text, doc_to_choice, doc_to_target)
    "colours": (
        [
            {
                "question": f"Which is number {n}? ",
                "choices": WORDS[n % 3 : n % 3 + 2 + n % 2],
                "answer": n % 2,
                "subject": "ab"[n % 2],
            }
            for n in range(9)
        ],
        "Question: {{question}}\nAnswer:",
        "{{choices}}",
        "{{answer}}",
    ),
    "hellaswag_like": (
        [
            {
                "ctx": f"She takes {n} and",
                "endings": WORDS[n % 2 : n % 2 + 4],
                "label": str(n % 4),
                "activity_label": "Art",
            }
            for n in range(7)
        ],
        "{{ctx}}",
        "{{endings}}",
        "{{label}}",
    ),
    "piqa_like": (
        [
            {"goal": f"Paint wall {n}", "sol1": WORDS[n % 6], "sol2": WORDS[(n + 2) % 6], "label": n % 2}
            for n in range(7)
        ],
        "Question: {{goal}}\nAnswer:",
        "{{[sol1, sol2]}}",
        "{{label}}",
    ),
    "arc_like": (
        [
            {
                "question": f"Sky {n}?",
                "choices": {"text": WORDS[:3], "label": ["A", "B", "C"]},
                "answerKey": "ABC"[n % 3],
            }
            for n in range(7)
        ],
        "Question: {{question}}\nAnswer:",
        "{{choices.text}}",
        "{{choices.label.index(answerKey)}}",
    ),
}


@pytest.fixture
def questions(tmp_path: Path) -> Any:
    for name, (rows, *_) in FILES.items():
        jsonl(tmp_path / f"{name}.jsonl", *rows)
    return read_benchmarks(tmp_path, [f"{name}.jsonl" for name in FILES])


@pytest.mark.long
def test_accuracies_and_likelihoods_are_those_of_lm_evals_command_line(
    questions: Any, model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    for name, (_, text, choice, target) in FILES.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": text,
            "doc_to_choice": choice,
            "doc_to_target": target,
        }
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(task))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lm_eval",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={tmp_path / 'model'},dtype=float32,softmax_dtype=float32",
            "--tasks",
            ",".join(FILES),
            "--include_path",
            str(tmp_path / "tasks"),
            "--device",
            "cpu",
            "--batch_size",
            "3",
            "--log_samples",
            "--output_path",
            str(tmp_path / "out"),
        ],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [results] = (tmp_path / "out").rglob("results_*.json")
    theirs = {name: found["acc,none"] for name, found in json.loads(results.read_text())["results"].items()}
    ours = ask(model, tiny_tokenizer, questions, 16, "test")
    assert accuracies(ours) == {name: round(theirs[name], 4) for name in FILES}
    assert len({0.0, 1.0, *theirs.values()}) > 3, "the model is always right or always wrong, so little is shown"
    for name in FILES:
        [samples] = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        gold = {
            s["doc_id"]: float(s["filtered_resps"][int(s["target"])][0])
            for s in map(json.loads, samples.read_text().splitlines())
        }
        assert {r["question"]: r["gold_logprob"] for r in ours if r["benchmark"] == name} == pytest.approx(
            gold, abs=1e-4
        )


def test_batch_size_changes_no_answer(questions: Any, model: Any, tiny_tokenizer: Any) -> None:
    one, many = (ask(model, tiny_tokenizer, questions, n, "test") for n in (1, 16))
    assert one == [row | {"gold_logprob": pytest.approx(row["gold_logprob"], abs=1e-4)} for row in many]
    assert len({row["gold_logprob"] for row in one}) > 20
    assert many == ask(model, tiny_tokenizer, questions, 16, "test"), "a second run is the same to the last bit"


def test_untied_weights_stay_untied(questions: Any, model: Any, tiny_tokenizer: Any) -> None:
    head = model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 2)
    ask(model, tiny_tokenizer, questions, 16, "test")
    assert model.lm_head.weight is head and head is not model.get_input_embeddings().weight


def test_two_benchmarks_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "colours.jsonl", *FILES["colours"][0])
    with pytest.raises(InputError, match="two files are named colours"):
        read_benchmarks(tmp_path, ["a/colours.jsonl", "b/colours.jsonl"])


def rows(correct: str, nats: float, subjects: str = "aabb") -> list[dict[str, Any]]:
    """A row for each letter: y where the answer is right."""
    return [
        {
            "benchmark": "quiz",
            "question": n,
            "subject": subjects[n % 4],
            "gold_logprob": nats - n,
            "correct": letter == "y",
        }
        for n, letter in enumerate(correct)
    ]


def test_base_and_tuned_are_paired_by_question_and_reported_by_subject() -> None:
    found = retained(rows("yyyn", -2.0), rows("yynn", -2.5)[::-1])
    assert {name: (f["accuracy"]["base"], f["accuracy"]["tuned"], f["questions"]) for name, f in found.items()} == {
        "overall": (0.75, 0.5, 4), "a": (1.0, 1.0, 2), "b": (0.5, 0.0, 2),
    }  # fmt: skip
    assert all(f["gold_log_likelihood"] == {"difference": -0.5, "interval": [-0.5, -0.5]} for f in found.values()), (
        "questions differ, pairs do not"
    )
    assert found["overall"]["accuracy"]["difference"] == -0.25 and found["a"]["accuracy"]["interval"] == [0, 0]


def test_models_with_different_questions_are_not_compared() -> None:
    assert retained([], []) == retained(rows("y", 0), []) == {} and forgot("head", {}, 0.05) == []


def test_one_question_is_not_written_in_the_plural() -> None:
    assert forgot("lora", retained(rows("y", -2), rows("n", -9)), 0.05)[0].startswith(
        "lora forgot: on 1 benchmark question accuracy"
    )


@pytest.mark.parametrize(
    ("base", "tuned", "signs"),
    [
        (rows("y" * 20, -2), rows("y" * 19 + "n", -2), []),  # 5 points, the threshold itself
        (rows("y" * 20, -2), rows("y" * 18 + "nn", -2), ["accuracy fell from 100.0 % to 90.0 %"]),
        (rows("y" * 20, -2), rows("y" * 20, -2.6), []),  # surely less likely, not half as likely
        (
            rows("y" * 20, -2),
            rows("y" * 20, -2 - math.log(4)),
            ["the right answers are 0.25 times as likely as before"],
        ),
        (
            rows("y" * 20, -2),
            rows("n" * 20, -9),
            ["accuracy fell from 100.0 % to 0.0 %", "the right answers are 0.00 times"],
        ),
        (rows("n" * 20, -9), rows("y" * 20, -2), []),
        # half as likely by one question alone: not sure
        (rows("y" * 20, -2), [*rows("y" * 19, -2), rows("y" * 20, -40)[19]], []),
    ],
    ids=["at the threshold", "less accurate", "a little less likely", "less likely", "both", "learnt", "one outlier"],
)
def test_forgetting_is_a_warning_with_remedies(base: Any, tuned: Any, signs: list[str]) -> None:
    words = forgot("lora", retained(base, tuned), 0.05)
    assert len(words) == bool(signs)
    for word in words:
        assert word.startswith("lora forgot: on 20 benchmark questions ") and all(sign in word for sign in signs)
        assert all(remedy in word for remedy in ("learning_rate", "num_train_epochs", "tokenized.replay", "peft.r"))
