"""Every parameter is described once, beneath its field; docs and the JSON
Schema of params.yaml equal the output of `make docs`."""

from __future__ import annotations

import copy
import doctest
import re
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from dagster_project.commands import docs
from dagster_project.core.params import Section
from dagster_project.pipeline import sections

SCHEMA = docs.params_schema()
SAMPLE = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
OPTIONS = [model for _, by_method in docs.METHOD_KEYS.values() for model in by_method.values()]
EXAMPLES = [
    path for path in sorted((ROOT / "dagster_project").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")
]
PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md")))]


def classes(annotation: Any) -> Iterator[type[Section]]:
    """The sections in a type, nested ones too."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
        for field in annotation.model_fields.values():
            yield from classes(field.annotation)
    for inner in get_args(annotation):
        yield from classes(inner)


def mistakes(values: Any, schema: dict[str, Any] = SCHEMA) -> list[str]:
    from jsonschema import Draft202012Validator  # slow to import

    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(values)]


def changed(**entries: Any) -> dict[str, Any]:
    """The default params.yaml with other values, by dotted names with __ for the dots."""
    values = copy.deepcopy(SAMPLE)
    for name, value in entries.items():
        *path, key = name.split("__")
        place = values
        for step in path:
            place = place[step]
        place[key] = value
    return values


@pytest.mark.parametrize(
    "model", dict.fromkeys(one for top in [*sections().values(), *OPTIONS] for one in classes(top))
)
def test_every_field_has_one_description_beneath_it(model: type[Section]) -> None:
    assert [name for name, field in model.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("path", docs.generated(ROOT), ids=lambda path: path.name)
def test_generated_files_are_up_to_date(path: Any) -> None:
    assert path.read_text(encoding="utf-8") == docs.generated(ROOT)[path], "run `make docs`"


def test_the_schema_is_valid_and_editors_find_it() -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(SCHEMA)
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", (ROOT / "params.yaml").read_text())
    assert named and (ROOT / named[1]).is_file()


def test_the_default_parameters_are_valid() -> None:
    assert mistakes(SAMPLE) == []


@pytest.mark.parametrize("page", PAGES)
def test_parameters_shown_in_docs_are_valid(page: str) -> None:
    """A block may show some sections, or some keys of a section, only."""
    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        values = YAML(typ="safe").load(re.sub(r"<?(40|64) hex digits>?", lambda digits: "a" * int(digits[1]), block))
        if isinstance(values, dict) and set(values) <= set(SAMPLE):
            assert [one for one in mistakes(values) if "is a required property" not in one] == []


@pytest.mark.parametrize(
    "entries",
    [
        {"splits": None},
        {"aligned": {}},
        {"adapter__lora__learning_rate": "auto", "adapter__lora__num_train_epochs": "auto"},
        {"adapter__top": {"method": "full", "peft": {"trainable": ["lm_head"]}}},
        {"aligned__kto": {"method": "kto", "adapter": "lora", "options": {"desirable_weight": 1.5}}},
        {"evaluation__task": {"labels": "auto"}},
        {"preferences__max_length": 512},
        {"release__waivers": [{"check": "test_is_unseen", "reason": "why", "expires": "2027-06-30"}]},
    ],
)  # fmt: skip
def test_the_schema_accepts(entries: dict[str, Any]) -> None:
    assert mistakes(changed(**entries)) == []


@pytest.mark.parametrize(
    ("entries", "where"),
    [
        ({"split": {}}, "$"),
        ({"splits__tset": 0.1}, "$.splits"),
        ({"adapter": {}}, "$.adapter"),
        ({"adapter__a b": {"method": "lora"}}, "$.adapter"),
        ({"adapter__lora__learning_rate": "high"}, "$.adapter.lora.learning_rate"),
        ({"adapter__lora__learning_rat": 1e-3}, "$.adapter.lora"),
        ({"adapter__top": {"method": "full", "peft": {"r": 8}}}, "$.adapter.top.peft"),
        (
            {"aligned__kto": {"method": "kto", "adapter": "lora", "options": {"loss_type": "ipo"}}},
            "$.aligned.kto.options",
        ),
        ({"preferences__max_tokens": 512}, "$.preferences"),
    ],
)
def test_the_schema_refuses(entries: dict[str, Any], where: str) -> None:
    assert [one for one in mistakes(changed(**entries)) if one.startswith(f"{where}: ")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_in_docstrings_are_true(path: Path) -> None:
    results = doctest.testmod(import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)))
    assert results.attempted and not results.failed


def test_no_file_contains_the_markers_of_a_merge_conflict() -> None:
    found = subprocess.run(
        ["git", "grep", "-lE", "^(<<<<<<<|>>>>>>>) "], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.stdout == "" and found.returncode == 1
