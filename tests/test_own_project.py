"""Other data than the sample set: no default comes from it, leftovers of it are
named, and `make run` in a clone prints the next steps."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run
from pydantic import BaseModel
from ruamel.yaml import YAML

from dagster_project.commands.init_data import Found
from dagster_project.commands.init_params import SAMPLE_MODEL, params_text
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute, parse
from dagster_project.core.records import write_records
from dagster_project.curation.checks import expectations
from dagster_project.evaluation.evaluator import Settings, select_questions
from dagster_project.evaluation.metrics import Task
from dagster_project.pipeline import validate
from dagster_project.stages import (
    adapter,
    aligned,
    base_model,
    baselines,
    instructions,
    preferences,
    raw_examples,
    raw_preferences,
    release,
    reward_model,
    splits,
    tokenized,
)

MINIMAL = params_text(Found(), SAMPLE_MODEL, "Apache-2.0")
"""params.yaml of a new project without data."""
SAMPLE = YAML(typ="safe").load((ROOT / "params.yaml").read_text())


def test_the_parameters_of_a_new_project_name_every_section_and_are_valid(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(MINIMAL)
    (tmp_path / "data/sources").mkdir(parents=True)
    (tmp_path / "data/sources/mine.jsonl").touch()
    shutil.copytree(ROOT / "data/keys", tmp_path / "data/keys")
    assert set(validate(tmp_path)) == set(SAMPLE)


def test_the_parameters_of_a_new_project_have_every_key_that_dvc_tracks_by_name() -> None:
    values = YAML(typ="safe").load(MINIMAL)
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"].values()
    tracked = {name for stage in stages for name in stage.get("do", stage).get("params", []) if "$" not in name}
    assert {"compute.seed", "splits"} <= tracked
    for name in tracked:
        section, _, key = name.partition(".")
        assert section in values and (not key or key in values[section]), (
            f"DVC would stop: {name} is missing from params.yaml"
        )


def values_of(value: Any) -> list[Any]:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict):
        return [one for key, inner in value.items() for one in [key, *values_of(inner)]]
    return [one for inner in value for one in values_of(inner)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize(
    "model",
    [
        Compute,
        Settings,
        adapter.Params,
        aligned.Params,
        base_model.Params,
        baselines.Params,
        instructions.Params,
        preferences.Params,
        raw_examples.Params,
        raw_preferences.Params,
        release.Params,
        reward_model.Params,
        splits.Params,
        tokenized.Params,
    ],
    ids=lambda model: f"{model.__module__.rpartition('.')[2]}.{model.__name__}",
)
def test_no_default_depends_on_the_sample_set(model: type[BaseModel]) -> None:
    task = SAMPLE["evaluation"]["task"]["fields"]
    of_the_sample = {"summary", *task["category"], *task["priority"], "base_model"} | {
        source["path"] for source in SAMPLE["raw_examples"]["sources"]
    }
    defaults = [
        field.get_default(call_default_factory=True) for field in model.model_fields.values() if not field.is_required()
    ]
    found = [value for value in values_of(defaults) if isinstance(value, str)]
    assert not of_the_sample & set(found)
    assert not [value for value in found if "data/" in value or "smollm" in value.lower()]


def kept(category: str | None, n: int = 20) -> list[dict[str, Any]]:
    return [
        {
            "source": "data/sources/mine.json",
            "category": category,
            "group_id": str(i),
            "messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}],
        }
        for i in range(n)
    ]


def test_expectations_of_the_sample_set_are_named_as_such_on_other_data() -> None:
    suite = ROOT / "data/expectations/instructions.json"
    name = "data/expectations/instructions.json"
    check = expectations.check(expectations.run(expectations.table(kept(None)), suite, name=name))
    assert not check.passed
    assert f"the suite names 8 categories that no row has: {name} was written for other data" in check.note
    assert "leave out instructions.expectations" in check.note
    fits = expectations.check(expectations.run(expectations.table(kept("bug")), suite, name=name))
    assert "categories that no row has" not in fits.note


def test_weights_of_a_field_that_no_answer_has_are_refused(tmp_path: Path) -> None:
    params = parse(tokenized.Params, {"field_weights": {"category": 16}}, "tokenized")
    write_records(tmp_path / "none", kept(None))
    with pytest.raises(
        InputError,
        match=r"field_weights: in no answer of the training split, as a JSON object, is the value of category",
    ):
        tokenized._check_field_weights(params, tmp_path / "none")
    answers = kept(None)
    answers[3]["messages"][1]["content"] = '{"category": "bug"}'
    answers[3]["messages"] += kept(None, 1)[0]["messages"]
    write_records(tmp_path / "some", answers)
    tokenized._check_field_weights(params, tmp_path / "some")
    tokenized._check_field_weights(params, tmp_path / "empty")


@pytest.mark.parametrize("value", ['["bug", "login"]', '{"name": "bug"}', "[]"])
def test_weights_of_a_field_whose_values_are_lists_or_objects_are_refused(value: str, tmp_path: Path) -> None:
    params = parse(tokenized.Params, {"field_weights": {"category": 16}}, "tokenized")
    answers = kept(None)
    for answer in answers:
        answer["messages"][1]["content"] = f'{{"category": {value}}}'
    write_records(tmp_path / "lists", answers)
    with pytest.raises(InputError, match="is the value of category a text, a number, true, false or null"):
        tokenized._check_field_weights(params, tmp_path / "lists")
    answers[3]["messages"][1]["content"] = '{"category": null}'
    write_records(tmp_path / "some", answers)
    tokenized._check_field_weights(params, tmp_path / "some")


def test_a_task_without_a_matching_answer_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    records = [{**record, "example_id": str(i)} for i, record in enumerate(kept(None))]
    task, questions = select_questions(records, Settings(task=Task.model_validate(SAMPLE["evaluation"]["task"])))
    assert task is None and len(questions) == 20
    said = caplog.text
    assert (
        "evaluation.task: none of 20 test answers is a JSON object with the fields summary, category, priority" in said
    )
    caplog.clear()
    assert select_questions(records, Settings())[0] is None and not caplog.text


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder in which `make run` finds tools that do nothing."""
    (tmp_path / "data/comparison").mkdir(parents=True)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".dvc").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "requirements.lock", ".dvc/config", ".venv/ok", "data/comparison/board.md"):
        (tmp_path / name).touch()
    for tool in ("dvc", "pedigree"):
        (tmp_path / ".venv/bin" / tool).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / ".venv/bin" / tool).chmod(0o755)
    run(["git", "init", "-q"], tmp_path)
    return tmp_path


def test_make_run_ends_with_time_disk_model_question_and_what_to_commit(made: Path) -> None:
    done = run(["make", "run"], made)
    assert done.returncode == 0, done.stderr
    for line in (
        r"^took +0 min \d+ s",
        r"^disk used +\S+ by data and DVC's cache, \S+ by .venv",
        r"^the model +data/release$",
    ):
        assert re.search(line, done.stdout, re.MULTILINE), line
    assert "git add params.yaml dvc.lock data/sources data/reports && git commit" in done.stdout
    code = re.search(r"query it +.venv/bin/python -c '(.*?)'$", done.stdout, re.DOTALL | re.MULTILINE)[1]
    compile(code, "make run", "exec")
    assert "data/release" in code


def test_a_failed_make_run_prints_the_next_step(made: Path) -> None:
    (made / ".venv/bin/dvc").write_text("#!/bin/sh\nexit 1\n")
    done = run(["make", "run"], made)
    assert done.returncode != 0 and "took" not in done.stdout
    assert "run `make run` again" in done.stderr and "Everything up to the comparison is made" not in done.stdout


def test_a_run_that_stops_after_the_comparison_shows_its_table(made: Path) -> None:
    (made / ".venv/bin/dvc").write_text("#!/bin/sh\n[ $1 != repro ]\n")
    (made / "data/comparison/board.md").write_text("the table\n")
    done = run(["make", "run"], made)
    assert done.returncode != 0 and "took" not in done.stdout and "run `make run` again" in done.stderr
    assert "the table\n\nEverything up to the comparison is made." in done.stdout
