"""baselines + evaluation@* -> comparison. One board over all variants, and advice: was tuning worth it?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dagster_project.evaluation.compare import advice, board
from dagster_project.evaluation.measure import Settings, labelled
from dagster_project.evaluation.metrics import label, macro_f1_difference, perplexity_ratio
from dagster_project.records import Report, read_records, read_table, response_text, write_json

BASELINES = ("zero_shot", "few_shot", "retrieved", "tfidf_logistic")


def run(settings: Settings, variants: list[str], splits: Path, baselines: Path, evaluation: Path, out: Path) -> Report:
    """Args:
    variants: the variants to compare; what else lies in `evaluation` is of variants that are gone.
    """
    task, asked = settings.task, labelled(read_records(splits / "test"), settings.task)
    rows = [row for folder in (baselines, *(evaluation / name for name in variants)) for row in read_table(folder / "results.parquet")]
    of: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        of.setdefault(row["system"], {})[row["example_id"]] = row
    base = of["base"]
    true = [label(task, response_text(record["messages"])) for record in asked] if task else []

    def labels(system: str) -> list[str]:
        return [of[system][record["example_id"]]["label"] for record in asked]

    compared: dict[str, Any] = {}
    for name in variants:
        ids = list(base)
        mine, theirs = ([(system[i]["nll"], system[i]["tokens"]) for i in ids] for system in (of[name], base))
        writes = all(nll is not None for nll, _ in mine)  # a classifier has no perplexity
        compared[name] = {"perplexity_to_base": perplexity_ratio(mine, theirs)} if writes else {}
        if task and asked:
            compared[name]["macro_f1_to"] = {
                other: macro_f1_difference(task, true, labels(name), labels(other)) for other in BASELINES if other in of
            }
    lines = board(task, true, {name: labels(name) for name in (*BASELINES, *variants) if name in of} if asked else {}, compared)
    words = advice(compared)
    out.mkdir(parents=True, exist_ok=True)
    (out / "board.md").write_text("\n".join([*lines, "", *words]) + "\n")
    write_json(out / "comparison.json", compared)
    return Report(metrics={"compared": compared, "advice": words})
