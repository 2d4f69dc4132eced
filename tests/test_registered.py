"""Registered versions of models: tags that GTO writes, in the answers of
impact, audit and compare, in Dagster, and fetched by DVC."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders.history import Project, identity
from builders.small_pipeline import git
from conftest import pedigree
from ruamel.yaml import YAML

from dagster_project.core.params import read
from dagster_project.lineage.impact.question import impact
from dagster_project.lineage.impact.text import as_text
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import as_text as audit_text
from dagster_project.lineage.lineage import audit, document, find
from dagster_project.lineage.registered import registered, table_rows
from dagster_project.orchestration.dagster.project import PedigreeProject

FAQ = "data/sources/faq.jsonl"
ROWS = [("cats", "train", FAQ), ("dogs", "train", FAQ), ("birds", "validation", FAQ)]
DVC_YAML = """\
artifacts:
  merged-lora: {path: data/merged/lora, type: model, labels: [supervised]}
stages:
  adapter:
    foreach: {lora: 1}
    do: {cmd: x, outs: ["data/adapter/${key}"], meta: {kinds: [safetensors]}}
  merged:
    foreach: {lora: 1}
    do: {cmd: x, deps: ["data/adapter/${key}"], outs: ["data/merged/${key}"], meta: {kinds: [safetensors]}}
"""


def run(root: Path, tool: str, *arguments: str) -> str:
    """Run a tool of this environment."""
    command = [str(Path(sys.executable).parent / tool), *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, str, str]:
    """A project with two versions of a model: v1.0.0, and v2.0.0 in production,
    which saw "frogs"; and their commits."""
    project = Project(tmp_path_factory.mktemp("registered") / "project")
    (project.root / "dvc.yaml").write_text(DVC_YAML)
    first = project.commit(project.lock(ROWS))
    run(project.root, "gto", "register", "merged-lora", "--version", "v1.0.0")
    run(project.root, "gto", "assign", "merged-lora", "--version", "v1.0.0", "--stage", "production")
    second = project.commit(project.lock([*ROWS, ("frogs", "train", FAQ)]))
    run(project.root, "gto", "register", "merged-lora", "--version", "v2.0.0")
    run(project.root, "gto", "assign", "merged-lora", "--version", "v2.0.0", "--stage", "production")
    return project, first, second


def test_impact_names_the_registered_versions_of_a_model_and_where_they_are_in_use(
    made: tuple[Project, str, str],
) -> None:
    project, first, second = made
    found = impact(project.root, record=identity("cats"))
    versions = {(model["stage"], model["commit"]): model.get("registered") for model in found["models"]}
    assert versions == {
        ("adapter@lora", first): None,
        ("merged@lora", first): [{"artifact": "merged-lora", "version": "v1.0.0", "stages": [], "commit": first}],
        ("adapter@lora", second): None,
        ("merged@lora", second): [
            {"artifact": "merged-lora", "version": "v2.0.0", "stages": ["production"], "commit": second}
        ],
    }
    assert "  in production: merged-lora v2.0.0" in as_text(found) and "  registered: merged-lora v1.0.0" in as_text(
        found
    )
    assert "v1.0.0" not in as_text(impact(project.root, record=identity("frogs")))


@pytest.mark.usefixtures("warm_small")
def test_audit_states_the_versions_and_what_is_published_does_not(made: tuple[Project, str, str]) -> None:
    project, first, _ = made
    audited = audit(project.root, "merged@lora", first)
    assert [one["version"] for one in audited["registered"]] == ["v1.0.0"]
    assert "version    registered: merged-lora v1.0.0" in audit_text(audited)
    assert "registered" not in document(
        find(Index(project.root), "merged@lora", first)
    )  # exports give the same text after a version is registered
    printed = pedigree(project.root, "audit", "merged@lora")
    assert "version    in production: merged-lora v2.0.0" in printed.stdout


@pytest.mark.usefixtures("warm_small")
def test_compare_lists_every_version(made: tuple[Project, str, str]) -> None:
    project, first, second = made
    folder = project.root / "data/comparison"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text("{}")
    (folder / "board.md").write_text("| system | score |\n| --- | --- |\n")
    printed = pedigree(project.root, "compare").stdout
    assert f"| merged-lora | v2.0.0 | production | merged@lora | {model(project, second)} | {second[:12]} |" in printed
    listed = json.loads(pedigree(project.root, "compare", "--json").stdout)["registered"]
    assert {(one["version"], one["in use as"], one["commit"]) for one in listed} == {
        ("v1.0.0", "-", first[:12]),
        ("v2.0.0", "production", second[:12]),
    }


def model(project: Project, commit: str) -> str:
    """First digits of the hash of the merged model at a commit, from its dvc.lock."""
    stages = YAML(typ="safe").load(git(project.root, "show", f"{commit}:dvc.lock"))["stages"]
    return str(stages["merged@lora"]["outs"][0]["md5"][:12])


def test_dagster_shows_the_versions_of_an_asset(made: tuple[Project, str, str]) -> None:
    project, _, second = made
    dagster = PedigreeProject(project.root)
    assert f"| merged-lora | v2.0.0 | production | merged@lora | {model(project, second)} | {second[:12]} |" in str(
        dagster.definition_metadata("merged@lora")["registered_versions"].value
    )
    assert not dagster.definition_metadata("adapter@lora")


def test_a_version_that_was_deregistered_and_a_tag_that_names_no_artifact_are_not_shown(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    (project.root / "dvc.yaml").write_text(DVC_YAML)
    project.commit(project.lock(ROWS))
    assert registered(project.root) == {}
    run(project.root, "gto", "register", "merged-lora", "--version", "v1.0.0")
    run(project.root, "gto", "register", "something-else")
    assert [row[:3] for row in table_rows(registered(project.root))] == [("merged-lora", "v1.0.0", "-")]
    run(project.root, "gto", "assign", "merged-lora", "--version", "v1.0.0", "--stage", "production")
    run(project.root, "gto", "deprecate", "merged-lora", "v1.0.0", "production")
    assert [row[:3] for row in table_rows(registered(project.root))] == [("merged-lora", "v1.0.0", "-")]
    run(project.root, "gto", "deprecate", "merged-lora", "v1.0.0")
    assert registered(project.root) == {}


def test_versions_at_commits_that_cannot_be_read_or_that_have_no_model_stop_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = Project(tmp_path / "project")
    bare = project.commit({}, "nothing ran")
    before = project.commit(project.lock(ROWS))  # before the artifact was declared
    for text in ("artifacts: [", "x: 2001-99-99", "x: !!float abc"):
        (project.root / "dvc.yaml").write_text(text)
        git(project.root, "commit", "-qam", text)
        run(project.root, "gto", "register", "merged-lora")
    (project.root / "dvc.yaml").write_text(DVC_YAML.replace("path: data/", "path: ./data/"))
    git(project.root, "commit", "-qam", "declared")
    run(project.root, "gto", "register", "merged-lora", before, "--version", "v7.0.0")
    run(project.root, "gto", "register", "merged-lora", bare, "--version", "v8.0.0")
    run(project.root, "gto", "assign", "merged-lora", "--version", "v7.0.0", "--stage", "production")
    rows = {row[1]: row[2] for row in table_rows(registered(project.root))}
    assert (
        rows["v7.0.0"] == "production" and len(rows) == 4
    )  # and the three of damaged files, whose dvc.lock can be read
    assert (
        f"a version of merged-lora at commit {bare[:12]} is not shown: its dvc.lock records no data/merged/lora"
        in caplog.text
    )
    blob = git(project.root, "rev-parse", "HEAD:dvc.yaml").strip()
    git(project.root, "tag", "-a", "-m", "x", "key@v1.0.0", blob)
    assert registered(project.root) == {} and "GTO cannot read the tags" in caplog.text


def test_a_version_of_a_model_at_a_path_beyond_ascii_is_found(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    (project.root / "dvc.yaml").write_text("artifacts:\n  big: {path: data/gr\u00f6\u00dfe}\nstages: {}\n")
    lock = project.lock(ROWS)
    made = project.commit(
        {"gr\u00f6\u00dfe": {**lock["adapter@lora"], "outs": [{"path": "data/gr\u00f6\u00dfe", "md5": "1" * 32}]}}
    )
    run(project.root, "gto", "register", "big", "--version", "v1.0.0")
    assert table_rows(registered(project.root)) == [("big", "v1.0.0", "-", "gr\u00f6\u00dfe", "1" * 12, made[:12])]


def test_a_commit_that_is_in_use_without_a_version_is_called_by_its_first_digits(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    (project.root / "dvc.yaml").write_text(DVC_YAML)
    commit = project.commit(project.lock(ROWS))
    run(project.root, "gto", "assign", "merged-lora", "--stage", "production", "--skip-registration")
    assert [row[:3] for row in table_rows(registered(project.root))] == [("merged-lora", commit[:7], "production")]
    assert "in production: merged-lora" in as_text(impact(project.root, record=identity("cats")))


def test_a_project_in_a_folder_of_a_repository_has_its_own_versions(tmp_path: Path) -> None:
    project = Project(tmp_path / "repository/project")
    git(project.root.parent, "init", "-q", "-b", "main")
    subprocess.run(["rm", "-rf", str(project.root / ".git")], check=True)
    (project.root / "dvc.yaml").write_text(DVC_YAML)
    project.commit(project.lock(ROWS))
    run(project.root.parent, "gto", "register", "project:merged-lora", "--version", "v1.0.0")
    run(project.root.parent, "gto", "register", "other:merged-lora")
    assert [row[:2] for row in table_rows(registered(project.root))] == [("merged-lora", "v1.0.0")]


def test_a_registered_version_is_fetched_into_another_repository_where_audit_finds_it_by_its_bytes(
    made: tuple[Project, str, str], tmp_path: Path
) -> None:
    project, first, _ = made
    run(project.root, "dvc", "remote", "add", "-d", "here", str(tmp_path / "remote"))
    git(project.root, "commit", "-qam", "remote")
    run(project.root, "dvc", "push", "-q", "--all-commits")
    consumer = tmp_path / "consumer"
    consumer.mkdir()
    git(consumer, "init", "-q")
    (consumer / ".dvc").mkdir()
    (consumer / ".dvc/config").write_text(f"['remote \"here\"']\n    url = {tmp_path / 'remote'}\n")
    run(
        consumer,
        "dvc",
        "artifacts",
        "get",
        str(project.root),
        "merged-lora",
        "--rev",
        "v1.0.0",
        "-o",
        "model",
        "--remote",
        "here",
    )
    found = audit(project.root, str(consumer / "model"))
    assert (found["model"]["stage"], found["code"]["commit"]) == ("merged@lora", first)
    assert [one["version"] for one in found["registered"]] == ["v1.0.0"]


def test_every_model_of_the_project_is_an_artifact() -> None:
    root = Path(__file__).parents[1]
    artifacts = YAML(typ="safe").load((root / "dvc.yaml").read_text())["artifacts"]
    values = read(root)
    stages = {
        "adapter": values["adapter"],
        "merged": values["adapter"],
        "aligned": values["aligned"],
        "merged_aligned": values["aligned"],
    }
    models = {f"data/{stage}/{variant}" for stage, variants in stages.items() for variant in variants} | {
        "data/reward_model",
        "data/release",
    }
    assert {one["path"] for one in artifacts.values()} == models
    assert all({"type", "desc", "labels"} <= one.keys() for one in artifacts.values())
