"""A variant that is merged of two others, in a project: made after them,
evaluated, compared, released, audited and made again like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders.small_pipeline import commit
from conftest import dvc, edit_params, pedigree
from ruamel.yaml import YAML

SOUP = {"merge_of": {"lora": 0.6, "other": 0.4}, "method": "dare_ties", "peft": {"density": 0.5}}


def add_variants(values: dict[str, Any]) -> None:
    values["adapter"]["other"] = {**values["adapter"]["lora"], "learning_rate": 2e-3}
    values["adapter"]["soup"] = SOUP
    values["release"]["variant"] = "soup"


def answer(project: Path, *arguments: str) -> dict[str, Any]:
    done = pedigree(project, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def stages_that_changed(project: Path) -> set[str]:
    return {*json.loads(dvc(project, "status", "--json").stdout)}


@pytest.mark.long
@pytest.mark.usefixtures("warm")
def test_a_merged_variant_is_a_variant_like_any_other(finished: Path) -> None:
    assert stages_that_changed(finished) == set()
    edit_params(finished, add_variants)
    refused = pedigree(finished, "run", "adapter@soup")
    assert refused.returncode == 2
    assert (
        "dvc.yaml: adapter@soup does not read data/adapter/lora, data/adapter/other" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    assert answer(finished, "pipeline")["adapters"]["soup"] == [
        "data/base_model",
        "data/adapter/lora",
        "data/adapter/other",
    ]
    assert not {"adapter@lora", "merged@lora", "evaluation@lora", "aligned@dpo"} & stages_that_changed(finished)

    made = dvc(finished, "repro", "release")
    assert made.returncode == 0, made.stderr + made.stdout
    assert "adapter@lora" not in "".join(line for line in made.stdout.splitlines() if line.startswith("Running stage"))
    assert stages_that_changed(finished) == set()
    lock = YAML(typ="safe").load((finished / "dvc.lock").read_text())["stages"]
    read = {dep["path"]: dep["md5"] for dep in lock["adapter@soup"]["deps"] if dep["path"].startswith("data/")}
    assert read == {
        one["outs"][0]["path"]: one["outs"][0]["md5"]
        for name in ("base_model", "adapter@lora", "adapter@other")
        for one in [lock[name]]
    }
    assert (
        not (finished / "data/pages/adapter/soup/training.html").exists()
        and (finished / "data/pages/adapter/other/training.html").is_file()
    )

    board = json.loads((finished / "data/comparison/comparison.json").read_text())
    assert {"lora", "other", "soup"} <= board["compared"].keys()
    taken = {name: board["costs"][name]["steps"] for name in ("lora", "other", "soup")}
    assert taken["soup"] == taken["lora"] + taken["other"]
    assert json.loads((finished / "data/release/release.json").read_text())["variant"] == "soup"
    assert "- merge of: lora 0.6, other 0.4" in (finished / "data/release/README.md").read_text()
    evidence = {
        path.relative_to(finished / "data/release/audit").as_posix()
        for path in (finished / "data/release/audit").rglob("*.*")
    }
    kept = {f"adapter_{name}/{file}" for name in ("lora", "other") for file in ("training.json", "examples.parquet")}
    assert evidence == {"audit.json", "adapter_soup/training.json", *kept}

    audited = answer(finished, "audit", "release")
    parts = [answer(finished, "audit", f"adapter@{name}") for name in ("lora", "other")]
    assert {one["stage"] for one in audited["parents"]} == {
        "base_model",
        "adapter@lora",
        "adapter@other",
        "adapter@soup",
        "merged@soup",
    }
    seen = {(one["model"], one["example_id"]) for part in parts for one in part["records"]["list"]}
    assert {(one["model"], one["example_id"]) for one in audited["records"]["list"]} == seen and seen
    assert audited["parameters"]["adapter.soup"] == SOUP
    impact = answer(finished, "impact", "--source", "data/sources/triage_messages.jsonl")
    models = {one["stage"] for one in impact["models"]}
    assert {"adapter@lora", "adapter@other", "adapter@soup", "merged@soup", "release"} <= models

    commit(finished)
    verified = pedigree(finished, "verify", "adapter@soup")
    assert verified.returncode == 0 and "adapter@soup: identical" in verified.stdout, verified.stdout + verified.stderr

    edit_params(finished, lambda values: values["adapter"]["soup"]["merge_of"].update(lora=0.5))
    changed = stages_that_changed(finished)
    assert "adapter@soup" in changed and not {"adapter@lora", "adapter@other"} & changed
