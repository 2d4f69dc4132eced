"""The files that every repository has agree with each other and with the code."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from ruamel.yaml import YAML

from dagster_project.training.methods.options import CANNOT_MERGE, UNSUPPORTED_METHODS, methods
from dagster_project.training.trainers.alignment.preference import METHODS
from dagster_project.training.trainers.harness import sharding

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
GITHUB = ROOT / ".github"
SUPPORT = (ROOT / "docs/support.md").read_text()


def test_the_license_is_the_one_of_the_package() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text().split()
    assert text[:4] == ["Apache", "License", "Version", "2.0,"] and "END OF TERMS AND CONDITIONS" in " ".join(text)


def test_every_name_that_benchmarks_and_examples_import_exists() -> None:
    files = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").rglob("*.py")]
    imports = [
        (file.name, node.module, alias.name)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dagster_project")
        for alias in node.names
    ]

    def exists(module: str, name: str) -> bool:
        return hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None

    assert len(imports) > 100
    assert [one for one in imports if not exists(*one[1:])] == []


def test_every_name_that_a_benchmark_imports_from_another_one_exists() -> None:
    trees = {file.stem: ast.parse(file.read_text()) for file in (ROOT / "benchmarks").glob("*.py")}

    def names(tree: ast.Module) -> set[str]:
        aliases = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
        defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assigned = [node for one in tree.body if isinstance(one, ast.Assign | ast.AnnAssign) for node in ast.walk(one)]
        return {*defined, *(alias.name for alias in aliases), *(n.id for n in assigned if isinstance(n, ast.Name))}

    known = {name: names(tree) for name, tree in trees.items()}
    imports = [
        (file, node.module, alias.name)
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in known
        for alias in node.names
    ]
    assert len(imports) > 20
    assert [one for one in imports if one[2] not in known[str(one[1])]] == []


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(r"^## (\d\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert (citation["version"], citation["date-released"]) == released
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert citation["authors"] == [{"name": "The Pedigree authors"}]


def test_no_entry_of_the_changelog_is_there_twice() -> None:
    entries = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("- ")]
    assert len(entries) == len(set(entries))


def lint_commands() -> list[str]:
    """The tools that `make lint` runs, with their arguments."""
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe
    return [line.strip().removeprefix("$(BIN)/") for line in recipe[1].splitlines()]


def test_hooks_before_a_commit_are_the_commands_of_make_lint_and_need_no_network() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local" and all(hook["language"] == "system" for hook in repo["hooks"])
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in repo["hooks"]] == lint_commands()


def test_continuous_integration_runs_the_same_script_without_write_permission_or_secrets() -> None:
    text = (GITHUB / "workflows/ci.yml").read_text()
    workflow = YAML(typ="safe").load(text)
    assert workflow["permissions"] == {"contents": "read"} and "secrets." not in text
    suite, packages, long, projects = workflow["jobs"].values()
    assert {"run": "make audit-packages"} in packages["steps"] and {"run": "make sbom"} in packages["steps"]
    assert suite["steps"][-1] == {"run": ".ci/run"} and os.access(ROOT / ".ci/run", os.X_OK)
    assert projects["steps"][-1]["run"] == "make UV= test-projects" and re.search(
        r"^test-projects:", MAKEFILE, re.MULTILINE
    )
    assert long["steps"][-1]["run"] == "make UV= test-long" and re.search(r"^test-long:", MAKEFILE, re.MULTILINE)
    for job in (suite, long, projects):
        python = re.fullmatch(r"python:(3\.\d+)-\w+", job["container"])
        assert python and PROJECT["requires-python"] == f">={python[1]}"


def test_each_of_the_longest_tests_belongs_to_one_part() -> None:
    def names(part: str) -> list[str]:
        said = subprocess.run(
            ["make", "-n", "test-long", f"PART={part}"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return re.findall(r"tests/[\w/]+\.py", said.stdout)

    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"mark\.long", path.read_text())
    }
    parts = [name for number in (1, 2, 3) for name in names(f"{number}/3")]
    assert sorted(parts) == sorted(names("1/1")) == sorted(marked)


@pytest.mark.parametrize("form", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_forms_have_the_keys_that_the_platform_reads(form: Path) -> None:
    values = yaml.safe_load(form.read_text())
    if form.stem == "config":
        assert set(values) <= {"blank_issues_enabled", "contact_links"}
        return
    assert set(values) == {"name", "description", "labels", "body"}
    kinds = {
        "markdown": {"value"},
        "textarea": {"label"},
        "dropdown": {"label", "options"},
        "checkboxes": {"label", "options"},
    }
    for part in values["body"]:
        assert kinds[part["type"]] <= set(part["attributes"]), part
        assert part["type"] == "markdown" or re.fullmatch(r"[\w-]+", part["id"])


def test_the_dockerfile_has_no_warning_of_hadolint() -> None:
    name = str(Path(sys.executable).parent / "hadolint")
    hadolint = name if Path(name).is_file() else shutil.which("hadolint")
    if not hadolint and not os.environ.get("CI"):
        pytest.skip("hadolint is missing: pip install '.[dev]'")
    done = subprocess.run(
        [str(hadolint), "--format", "json", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert json.loads(done.stdout) == [] and done.returncode == 0
    bad = subprocess.run(
        [str(hadolint), "-"], input="FROM python\nRUN cd /x\n", capture_output=True, text=True, check=False
    )
    assert bad.returncode != 0


def test_the_image_runs_as_a_user_without_privileges_and_is_for_a_cpu_by_default() -> None:
    text = (ROOT / "Dockerfile").read_text()
    (user,) = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert int(user) > 0 and text.index("USER") > text.rindex("RUN ")
    assert re.findall(r"^ARG ACCELERATOR=(\w+)$", text, re.MULTILINE) == ["cpu"]
    assert not re.search(r"(?i)(ENV|ARG)\s+\S*(token|password|secret|key)", text)


@pytest.mark.parametrize("page", ["AGENTS.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"])
def test_commands_and_links_of_the_repositorys_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    assert {
        name
        for name in re.findall(r"`make ([a-z]+)`|^(?:\$ )?make ([a-z]+)", text, re.MULTILINE)
        for name in name
        if name
    } <= targets
    for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", text):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:docs|tests|dagster_project|data|\.ci)/[\w/.-]+)`", text):
        assert (ROOT / path).exists() or re.search("NNN|NAME|_X", path), path


def test_notes_for_agents_are_short_and_list_the_layers_in_the_order_of_the_contract() -> None:
    text = (ROOT / "AGENTS.md").read_text()
    assert len(text.splitlines()) <= 80
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    layers = [{part.strip().rsplit(".", 1)[-1] for part in layer.split("|")} for layer in contract]
    chain = re.search(r"Imports run one way\*\*: (.*?)\.", text)
    assert chain and [set(re.findall(r"`(\w+)`", layer)) for layer in chain[1].split("→")] == layers


# --- docs/support.md


def row(start: str) -> str:
    """The first column of the row that begins with a text."""
    return next(line for line in SUPPORT.splitlines() if line.startswith(f"| {start}")).split("|")[1]


def test_the_page_of_supported_methods_lists_those_of_the_code() -> None:
    tested = set(re.findall(r"`(\w+)`", row("`lora`, `rslora`")))
    assert tested <= set(methods())
    assert int(re.findall(r"other methods of PEFT \((\d+):", SUPPORT)[0]) == len(set(methods()) - tested)
    assert set(re.findall(r"`(\w+)`", row("`xlora`"))) == set(UNSUPPORTED_METHODS)
    assert set(re.findall(r"`(\w+)`", row("reward model"))) == set(METHODS)


def test_the_page_of_combinations_agrees_with_what_the_code_refuses() -> None:
    table = {
        cells[1].strip(): cells[2]
        for line in SUPPORT.split("## What does not combine")[1].splitlines()
        if (cells := line.split("|"))[1:]
    }
    assert set(re.findall(r"`(\w+)`", next(key for key, other in table.items() if other.strip() == "`sharding`"))) == {
        name for name, method in METHODS.items() if not method.can_shard
    }
    assert set(re.findall(r"`(\w+)`", table["`sharding`"])) >= {*sharding.METHODS, *sharding.OPTIMIZERS}
    assert set(re.findall(r"`(\w+)`", table["`merge: true` (the default)"])) >= set(CANNOT_MERGE)
