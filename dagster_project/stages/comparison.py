"""baselines + evaluation@* -> comparison. One board over all variants, and advice: was tuning worth it?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dagster_project.evaluation.bootstrap import difference, ratio
from dagster_project.evaluation.compare import NAMES, advice, board
from dagster_project.evaluation.measure import Settings, asked
from dagster_project.evaluation.metrics import measures, perplexity, score
from dagster_project.evaluation.own import own_measures
from dagster_project.evaluation.retention import forgot, retained
from dagster_project.records import Report, read_records, read_table, response_text, write_json


def run(root: Path, settings: Settings, variants: list[str], splits: Path, baselines: Path, evaluation: Path, out: Path) -> Report:
    """Args:
    variants: the variants to compare; what else lies in `evaluation` is of variants that are gone.
    """
    import numpy as np

    task, questions = asked(read_records(splits / "test"), settings)
    references, own = [response_text(record["messages"]) for record in questions], own_measures(root, settings.metrics)
    rows = [row for folder in (baselines, *(evaluation / name for name in variants)) for row in read_table(folder / "results.parquet")]
    of: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        of.setdefault(row["system"], {})[row["example_id"]] = row

    tables, answers, scores = {}, {}, {}
    for name in (*NAMES, *variants):
        found = [of[name][record["example_id"]] for record in questions] if name in of else []
        if found and all(row["answer"] is not None for row in found):
            lengths = [row["prompt_tokens"] for row in found]
            writes = None not in lengths
            tables[name], answers[name] = measures(task, own, writes), [row["answer"] for row in found]
            cost = {"prompt_tokens": round(sum(lengths) / len(lengths), 1)} if writes else {}
            scores[name] = score(tables[name], references, answers[name]) | cost

    compared: dict[str, Any] = {}
    for name in variants:
        nats, base = (
            np.array([(system[i]["nll"], system[i]["tokens"]) for i in of["base"]], dtype=float) for system in (of[name], of["base"])
        )
        compared[name] = {} if np.isnan(nats).any() else {"perplexity_to_base": ratio(perplexity, nats, base)}  # a classifier has none
        if name in scores:
            compared[name]["to"] = {
                other: {
                    key: difference(m.combine, *(m.statistics(references, answers[system]) for system in (name, other)))
                    for key, m in tables[name].items()
                    if m.paired and key in tables[other]
                }
                for other in scores
                if other != name
            }
        if kept := retained(*(read_table(folder / "retention.parquet") for folder in (baselines, evaluation / name))):
            compared[name]["retention"] = kept
    first, second, *_ = measures(task, own)
    lines, words = board([first, second], scores, compared), advice(first, scores, compared)
    words += [line for name in compared for line in forgot(name, compared[name].get("retention", {}), settings.forgetting)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "board.md").write_text("\n".join([*lines, "", *words]) + "\n")
    write_json(out / "comparison.json", {"scores": scores, "compared": compared})
    return Report(metrics={"compared": compared, "advice": words})
