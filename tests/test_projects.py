"""Projects of new users: an empty folder, the installed wheel, `pedigree init`,
then a run; one for each layout of examples and each recipe."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from builders.project_data import LAYOUTS, RECIPE_DATA, WITH_PAIRS, Data, layout_data, pairs, write_pairs
from builders.small_pipeline import commit
from builders.wheel import Environment, environment_with
from conftest import ROOT, edit_params

EXAMPLES = ROOT / "examples"
PLANNED_ONLY = {"qlora-8b"}
ENDS = {
    "preferences-dpo": "evaluation_aligned@dpo",
    "grpo-rule-reward": "evaluation_aligned@grpo",
    "several-variants": "comparison",
}
"""Recipe -> the stage at which its subject ends; else the evaluation of its only variant."""


@pytest.fixture(scope="module")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return environment_with(wheel, tmp_path_factory.mktemp("environment") / "env")


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines that are printed at the end."""
    lines: list[str] = []
    yield lines
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n".join(["", f"{'project':20} {'result':7} rows  trained  steps  seconds", *lines]))


@dataclass
class Site:
    """Where a new user works."""

    environment: Environment
    folder: Path
    table: list[str]
    began: float = field(default_factory=time.monotonic)

    @property
    def project(self) -> Path:
        return self.folder / "project"

    def pedigree(self, *arguments: str, folder: Path | None = None) -> str:
        """Standard output of `pedigree ARGUMENTS...`, which must succeed."""
        return self.command("pedigree", *arguments, folder=folder)

    def dvc(self, *arguments: str) -> str:
        return self.command("python", "-m", "dvc", *arguments)

    def command(self, *command: str, folder: Path | None = None) -> str:
        done = self.environment.command(*command, folder=folder or self.project)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    def report(self, name: str) -> dict[str, Any]:
        return json.loads((self.project / f"data/reports/{name}.json").read_text())

    def row(self, name: str, rows: int, trained: int, steps: int) -> None:
        self.table.append(f"{name:20} passed  {rows:4} {trained:8} {steps:6} {time.monotonic() - self.began:8.0f}")


@pytest.fixture
def site(installation: Environment, tmp_path: Path, table: list[str], request: pytest.FixtureRequest) -> Iterator[Site]:
    before = len(table)
    yield Site(installation, tmp_path, table)
    if len(table) == before:
        table.append(f"{request.node.name.partition('[')[2].rstrip(']'):20} FAILED")


def tiny_settings(values: dict[str, Any]) -> None:
    """A tiny base model in float32, adapters of rank 2, one pass over the data,
    few and short answers. A gate that such a model passes."""
    values["compute"] |= {"threads": 1, "dtype": "float32"}
    values["base_model"] |= {"dtype": "float32", "license": "Apache-2.0"}
    for variant in values["adapter"].values():
        variant |= {"learning_rate": 1e-2, "num_train_epochs": 1}
        if variant["method"] in {"lora", "dora"}:
            variant["peft"] = {"r": 2}
    for variant in values["aligned"].values():
        variant |= {"max_steps": 3, "samples": 2, "max_new_tokens": 4}
    values["reward_model"] |= {"max_steps": 3, "min_accuracy": 0.0}
    values["baselines"] = {"few_shot": 1, "retrieved": 1, "thinking_tokens": 2}
    values["evaluation"] |= {"max_new_tokens": 4, "max_examples": 4}
    waived = [
        {"check": name, "reason": "a random model", "expires": "2999-01-01"}
        for name in ("better_than_baselines", "kept_its_knowledge")
    ]
    values["release"] = {"variant": next(iter(values["aligned"] or values["adapter"])), "waivers": waived}


def decoded(project: Path, split: str) -> str:
    """All texts of a tokenized split, decoded by the base model's own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(project / "data/base_model")
    rows = pl.read_parquet(project / f"data/tokenized/{split}.parquet")["input_ids"].to_list()
    return "\n".join(tokenizer.batch_decode(rows))


def check_what_was_trained(site: Site, data: Data, variant: str) -> int:
    """Compare what an adapter was trained on with the file. Returns the number
    of examples that the file has for training."""
    project = site.project
    text = decoded(project, "train")
    found = {question for question in data.questions if question in text}
    seen = pl.read_parquet(project / f"data/adapter/{variant}/examples.parquet")["example_id"].unique()
    if "split" in data.rows[0]:
        assert found == data.questions_in("train")
        test = "".join(json.dumps(row) for row in pl.read_parquet(f"{project}/data/splits/test/*.parquet").to_dicts())
        assert {question for question in data.questions if question in test} == data.questions_in("test")
        expected = len(data.questions_in("train"))
    else:
        shares = {"test": 0.2, "validation": 0.1} | json.loads((project / "params.yaml").read_text()).get("splits", {})
        expected = len(data.questions) - sum(
            round(len(data.questions) * shares[name]) for name in ("test", "validation")
        )
    assert len(found) == len(seen) == expected
    return expected


def check_audit(site: Site, output: str, trained: dict[str, int]) -> None:
    """`pedigree audit` after a commit: this commit, nothing changed since, and
    so many records trained on by each training."""
    sha = commit(site.project, "Results")
    audited = json.loads(site.pedigree("audit", output, "--json"))
    assert audited["code"]["commit"] == sha and audited["code"]["clean"], audited["code"]
    assert audited["code"]["package"]["differs"] == []
    assert {name: part["records"] for name, part in audited["records"]["learnt_by"].items()} == trained


def check_adapter(site: Site, variant: str) -> int:
    """The variant's weights exist, changed, and were evaluated. Returns its training steps."""
    folder = site.project / "data/adapter" / variant
    assert list(folder.glob("*.safetensors"))
    assert site.report(f"evaluation/{variant}")["passed"]
    return int(json.loads((folder / "training.json").read_text())["steps"])


def make_project(site: Site, layout: str, data: Data, model: Path) -> None:
    """What a new user types, then tiny settings."""
    data.write(site.folder / "mine.jsonl")
    arguments = ("init", "project", "--data", "mine.jsonl", "--base-model", str(model), "--license", "MIT", "--json")
    made = json.loads(site.pedigree(*arguments, folder=site.folder))
    assert made["sources"][0]["layout"] == layout and made["kept"] == len(data.questions)
    edit_params(site.project, tiny_settings)
    commit(site.project, "New project")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3600)  # fifteen processes of stages
def test_an_empty_folder_becomes_a_released_model(site: Site, tiny_model: Path) -> None:
    data = layout_data("sharegpt")
    make_project(site, "sharegpt", data, tiny_model)
    site.pedigree("run", "--all")
    steps, trained = check_adapter(site, "lora"), check_what_was_trained(site, data, "lora")
    check_audit(site, "data/release", {"adapter@lora": trained})
    again = json.loads(site.pedigree("run", "--all", "--json"))["stages"].values()
    assert {stage["outcome"] for stage in again} == {"up to date"}
    site.row("run --all", len(data.rows), trained, steps)


@pytest.mark.projects
@pytest.mark.timeout(3600)  # eight processes of stages
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_folder_with_a_file_of_any_layout_becomes_an_evaluated_adapter(
    layout: str, site: Site, tiny_model: Path
) -> None:
    data = layout_data(layout)
    make_project(site, layout, data, tiny_model)
    site.dvc("repro", "evaluation@lora")
    steps, trained = check_adapter(site, "lora"), check_what_was_trained(site, data, "lora")
    check_audit(site, "data/merged/lora", {"adapter@lora": trained})
    site.row(layout, len(data.rows), trained, steps)


def check_aligned(site: Site, variant: str) -> int:
    """The weights of an alignment exist, and were evaluated. Returns its steps."""
    folder = site.project / "data/aligned" / variant
    assert list(folder.glob("*.safetensors"))
    assert site.report(f"evaluation_aligned/{variant}")["passed"]
    return int(json.loads((folder / "training.json").read_text())["steps"])


def check_pairs(site: Site, variant: str) -> int:
    """Compare the pairs that an alignment was trained on with the file. Returns their number."""
    seen = pl.read_parquet(site.project / f"data/aligned/{variant}/examples.parquet")["example_id"].unique().to_list()
    stored = pl.read_parquet(f"{site.project}/data/preferences/train/*.parquet").filter(
        pl.col("example_id").is_in(seen)
    )
    prompts = {row["prompt"] for row in pairs() if row["split"] == "train"}
    assert {row["prompt"][-1]["content"] for row in stored.to_dicts()} <= prompts and len(stored) == len(seen) > 0
    return len(seen)


def recipe_settings(model: str) -> Any:
    def change(values: dict[str, Any]) -> None:
        kept = {key: values["base_model"][key] for key in ("chat_template",) if key in values["base_model"]}
        values["base_model"] = {"folder": model, **kept}
        values["instructions"].pop("max_tokens", None)
        values["tokenized"] |= {"max_length": 1024, "packed_length": 512}
        tiny_settings(values)

    return change


@pytest.mark.projects
@pytest.mark.timeout(3600)  # up to eighteen processes of stages
@pytest.mark.parametrize("name", RECIPE_DATA)
def test_a_recipe_runs_up_to_the_stage_that_it_is_about(name: str, site: Site, tiny_model: Path) -> None:
    data = RECIPE_DATA[name]()
    data.write(site.folder / "mine.jsonl")
    files = ["mine.jsonl"]
    if name in WITH_PAIRS:
        write_pairs(site.folder / "pairs.jsonl")
        files.append("pairs.jsonl")
    site.pedigree("init", "project", "--data", *files, "--base-model", str(tiny_model), folder=site.folder)
    shutil.copy(EXAMPLES / name / "params.yaml", site.project)
    edit_params(site.project, recipe_settings(f"models/{tiny_model.name}"))
    commit(site.project, "New project")
    values = json.loads((site.project / "params.yaml").read_text())
    variant, *others = values["adapter"]
    site.dvc("repro", ENDS.get(name, f"evaluation@{variant}"))
    steps = {one: 0 if values["aligned"] else check_adapter(site, one) for one in values["adapter"]}
    trained = check_what_was_trained(site, data, variant)
    assert all(check_what_was_trained(site, data, other) == trained for other in others)
    if name == "several-variants":
        board = json.loads((site.project / "data/comparison/comparison.json").read_text())
        assert set(values["adapter"]) <= set(board["scores"])
    output, learnt = f"data/merged/{variant}", {f"adapter@{variant}": trained}
    for aligned in values["aligned"]:
        steps[variant] = check_aligned(site, aligned)
        output = f"data/merged_aligned/{aligned}"
        learnt[f"aligned@{aligned}"] = check_pairs(site, aligned)
    check_audit(site, output, learnt)
    site.row(name, len(data.rows), trained, steps[variant])


def test_every_layout_and_every_recipe_is_a_project_here() -> None:
    from dagster_project.curation.sources.formats import LAYOUTS as KNOWN

    assert set(LAYOUTS) == set(KNOWN)
    assert set(RECIPE_DATA) | PLANNED_ONLY == {path.parent.name for path in EXAMPLES.glob("*/params.yaml")}
    assert len(pairs()) == 40
