"""The recipes in examples/ are valid parameters of a project, and do what they state."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from dagster_project.__main__ import main
from dagster_project.commands.docs import params_schema
from dagster_project.commands.init import init
from dagster_project.commands.init_params import SAMPLE_MODEL
from dagster_project.orchestration import dvc
from dagster_project.pipeline import UNREAD, sections, validate

EXAMPLES = ROOT / "examples"
RECIPES = sorted(path.parent.name for path in EXAMPLES.glob("*/params.yaml"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A new project with the files that recipes name."""
    init(tmp_path / "project", [], None, "auto", "unknown")
    for name in ("mine.jsonl", "pairs.jsonl"):
        (tmp_path / "project/data/sources" / name).touch()
    return tmp_path / "project"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_the_validation_of_every_stage(name: str, project: Path) -> None:
    shutil.copy(EXAMPLES / name / "params.yaml", project)
    values = validate(project)
    assert not list(Draft202012Validator(params_schema()).iter_errors(values))
    assert set(values) == set(sections()) - set(UNREAD)
    if "package" in values["base_model"]:
        assert values["base_model"] | SAMPLE_MODEL == values["base_model"]
    states = dvc.read_stages(project)
    expected = {
        f"{stage}@{variant}" for section in ("adapter", "aligned") for variant in values[section] for stage in [section]
    }
    assert expected <= set(states), "dvc.yaml resolves with these parameters"


def test_the_recipes_are_listed_and_introduced() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert len(RECIPES) >= 8
    for name in RECIPES:
        assert f"[{name}]({name}/params.yaml)" in listed
        prose = [
            line
            for line in (EXAMPLES / name / "params.yaml").read_text().split("\n\n")[0].splitlines()
            if line.startswith("# ")
        ]
        assert len(prose) == 2


def test_qlora_of_eight_billion_parameters_is_planned_to_fit_the_stated_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = EXAMPLES / "qlora-8b"
    command = (
        next(line for line in (folder / "params.yaml").read_text().splitlines() if "pedigree plan" in line)
        .split("`")[1]
        .split()[1:]
    )
    command[command.index("--model") + 1] = str(folder / "config.json")
    assert main([*command, "--json"]) == 0
    [plan] = json.loads(capsys.readouterr().out)["variants"].values()
    assert YAML(typ="safe").load((folder / "params.yaml").read_text())["tokenized"]["max_length"] == 2048
    assert round(plan["memory"]["total"] / 1e9) == 13
