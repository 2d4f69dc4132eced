"""`pedigree plan`: what training will take, told before it starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dagster_project import params
from dagster_project.errors import InputError
from dagster_project.pipeline import validate
from dagster_project.stages.adapter import Params
from dagster_project.training.sft import steps


def plan_variants(root: Path, variants: Sequence[str]) -> dict[str, Any]:
    """Tokens and optimizer steps per variant.

    Raises:
        InputError: an unknown variant, or the data has not been tokenized yet.
    """
    values = validate(root)
    unknown = [name for name in variants if name not in values["adapter"]]
    if unknown:
        raise InputError(f"params.yaml has no variant {', '.join(unknown)}", f"variants: {', '.join(values['adapter'])}")
    report = root / "data" / "reports" / "tokenized.json"
    if not report.is_file():
        raise InputError("the data has not been tokenized yet", "run `dvc repro tokenized` first")
    train = json.loads(report.read_text())["train"]
    if not train["rows"]:
        raise InputError("the training split is empty", "name more examples in raw_examples.sources")
    found = {}
    for name in variants or list(values["adapter"]):
        recipe = params.parse(Params, values["adapter"][name], f"adapter.{name}")
        n = steps(train["rows"], recipe)
        per_epoch = steps(train["rows"], recipe.model_copy(update={"num_train_epochs": 1, "max_steps": None}))
        found[name] = {
            "examples": train["examples"],
            "epochs": round(n / per_epoch, 3),
            "steps": n,
            "tokens": round(train["tokens"] * n / per_epoch),
            "trained_tokens": round(train["trained_tokens"] * n / per_epoch),
        }
    return {"variants": found}


def as_text(found: dict[str, Any]) -> str:
    return "\n".join(
        f"{name}: {v['examples']} examples x {v['epochs']:g} epochs = {v['tokens']:,} tokens ({v['trained_tokens']:,} trained on) in {v['steps']} steps"
        for name, v in found["variants"].items()
    )
