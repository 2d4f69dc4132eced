"""A project in which three systems have answered the test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders.records import said, stored, user
from dagster_project.core.records import write_json, write_records, write_table
from dagster_project.evaluation.evaluator import result_rows, result_schema
from dagster_project.training.inference.answers import Answer

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u202e"
ANSWERS = 24


def record(i: int) -> dict[str, Any]:
    category = ["login", "billing", None][i % 3]
    return stored(user(f"Question {i}?"), said(f"Reference {i}."), source="a", category=category, group_id=None)


def make_answered_project(folder: Path) -> None:
    """Test examples that three systems answered: a variant, and two baselines.
    Every fourth answer of `lora` and `few_shot` is the same."""
    (folder / "dvc.yaml").touch()
    (folder / "params.yaml").write_text("compute: {seed: 7}\nadapter: {lora: {}, twin: {}}\n")
    records = [record(i) for i in range(ANSWERS)]
    write_records(folder / "data/splits/test", records)
    answers = {
        "few_shot": [f"Same {i}." if i % 4 == 0 else f"Weak {i}." for i in range(ANSWERS)],
        "tfidf_logistic": [f"Label {i}" for i in range(ANSWERS)],
        "lora": [f" Same {i}.\n" if i % 4 == 0 else f"Strong {i}. {HOSTILE}" for i in range(ANSWERS)],
    }
    rows = {name: result_rows(name, records, None, [Answer(text) for text in said]) for name, said in answers.items()}
    base = result_rows("base", records, None, likelihoods=[(1.0, 1)] * ANSWERS)
    write_table(
        folder / "data/baselines/results.parquet", base + rows["few_shot"] + rows["tfidf_logistic"], result_schema()
    )
    write_table(folder / "data/evaluation/lora/results.parquet", rows["lora"], result_schema())
    against = {"few_shot": {"macro_f1": {"difference": 0.5}}, "tfidf_logistic": {"macro_f1": {"difference": 0.1}}}
    write_json(folder / "data/comparison/comparison.json", {"scores": {}, "compared": {"lora": {"to": against}}})
