"""The README is correct: its commands run, and what it lists exists."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run
from packaging.requirements import Requirement
from ruamel.yaml import YAML

from dagster_project.cli.parser import parser

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def commands() -> list[str]:
    """Every line of the README's console blocks that starts with `$ `."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


MAKE = [c for c in commands() if c.startswith("make ")]
OWN_PROJECT = [c for c in commands() if c.startswith("pip ") or "my-project" in c]
OTHERS = [c for c in commands() if c not in {*MAKE, *OWN_PROJECT}]


def test_the_tour_has_commands() -> None:
    assert {c.split()[1] for c in OTHERS if c.startswith("pedigree")} == {
        "check",
        "plan",
        "audit",
        "impact",
        "verify",
        "sync",
    }


@pytest.mark.long
def test_the_readmes_commands_run_on_the_quick_override(finished: Path) -> None:
    for command in OTHERS:
        words = shlex.split(command.split(" | ")[0])
        program = {"pedigree": [sys.executable, "-m", "dagster_project"], "dvc": [sys.executable, "-m", "dvc"]}.get(
            words[0], words[:1]
        )
        done = run([*program, *words[1:]], finished)
        finds_planted_defects = words[:2] == ["pedigree", "check"]
        assert done.returncode == (1 if finds_planted_defects else 0), (command, done.stderr)


def test_the_figures_and_hashes_of_the_tour_are_those_of_the_recorded_run() -> None:
    lock = YAML(typ="safe").load((ROOT / "dvc.lock").read_text())["stages"]
    recorded = {address: {out["path"]: out["md5"] for out in stage["outs"]} for address, stage in lock.items()}
    model = re.search(r"^merged@lora  data/merged/lora  md5 (\S+)$", README, re.MULTILINE).group(1)
    if model != recorded["merged@lora"]["data/merged/lora"]:
        pytest.skip("the pipeline ran again in this clone")
    shown = re.findall(r"^  (\S+) +([0-9a-f]{12})  \S", README, re.MULTILINE)
    assert len(shown) > 5
    assert all(recorded[address][f"data/{address.replace('@', '/')}"].startswith(md5) for address, md5 in shown)

    def report(name: str) -> dict[str, Any]:
        return json.loads((ROOT / f"data/reports/{name}.json").read_text())

    def points(share: float) -> str:
        return f"{100 * share:+.1f}"

    for variant, address in {"lora": "evaluation/lora", "dpo": "evaluation_aligned/dpo"}.items():
        scores = report(address)
        low, high = scores["macro_f1_interval"]
        row = (
            f"| **{variant}**, tuned | {scores['macro_f1']:.3f} | {low:.3f} to {high:.3f} | {scores['accuracy']:.3f} |"
        )
        assert row in README
    systems = {f"{one['macro_f1']:.3f} | {one['accuracy']:.3f}" for one in report("comparison")["scores"].values()}
    table = re.findall(r"^\| .* \| (\d\.\d{3}) \| \d\.\d{3} to \d\.\d{3} \| (\d\.\d{3}) \|", README, re.MULTILINE)
    assert {" | ".join(row) for row in table} == systems and len(table) == len(report("comparison")["scores"])
    reward, aligned = report("reward_model"), report("aligned/dpo")
    accuracy, gain = aligned["preference"]["accuracy"], aligned["watch"]["reward"]
    assert f"accuracy {reward['accuracy']:.3f} on {reward['pairs']['test']} held-out pairs" in README
    assert f"from {accuracy['sft']:.3f} to {accuracy['aligned']:.3f} ({points(accuracy['difference'])} points" in README
    assert f"by {gain['difference']:.2f} ({gain['interval'][0]:.2f} to {gain['interval'][1]:.2f})" in README


def test_the_package_that_the_readme_installs_is_this_one() -> None:
    requirement = Requirement(shlex.split(OWN_PROJECT[0])[2])
    assert requirement.name == PROJECT["name"] and requirement.extras <= set(PROJECT["optional-dependencies"])


def test_the_commands_for_an_own_project_fit_the_command_line() -> None:
    _, init, run_all = OWN_PROJECT
    for command in (init, run_all.removeprefix("cd my-project && ")):
        program, *words = shlex.split(command)
        assert program in PROJECT["scripts"] and parser().parse_args(words).command == words[0]


def test_the_rows_shown_in_docs_are_those_that_the_command_prints(tmp_path: Path) -> None:
    example = re.search(
        r"```console\n\$ (pedigree check .* --show .*)\n\.\.\.\n(.*?)```",
        (ROOT / "docs/checks.md").read_text(),
        re.DOTALL,
    )
    assert example
    shutil.copytree(
        ROOT / "data/sources", tmp_path / "data/sources"
    )  # with a base model, the command also counts tokens
    done = run([sys.executable, "-m", "dagster_project", *shlex.split(example[1])[1:]], tmp_path, PYTHONPATH=str(ROOT))
    assert example[2] in done.stdout and done.returncode == 1  # the sample has planted defects


def test_make_has_every_target_the_readme_names() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {c.split()[1] for c in MAKE} <= targets and {"run", "test"} <= {c.split()[1] for c in MAKE}
    for target in {c.split()[1] for c in MAKE}:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    "page", ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]
)
def test_links_have_existing_targets(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_table_lists_every_command() -> None:
    commands = parser()._subparsers._group_actions[0].choices
    listed = re.findall(r"^\| `pedigree (\w+)", README, re.MULTILINE)
    assert set(listed) == set(commands)
    assert set(re.findall(r"pedigree ballots (\w+)", README)) == set(
        commands["ballots"]._subparsers._group_actions[0].choices
    )


def test_the_file_tree_lists_what_is_there() -> None:
    tree = re.search(r"```text\n(dagster_project/.*?)```", README, re.DOTALL).group(1)
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines()[1:] if line.startswith("  ")}
    present = {p.name for p in (ROOT / "dagster_project").iterdir() if p.name not in {"__pycache__", "__init__.py"}}
    assert listed == present
