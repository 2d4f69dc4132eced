"""A clone with only Python and make becomes a working project."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "great_expectations",
    "trl",
    "peft",
    "pandera",
    "sklearn",
    "pyarrow",
    "polars",
    "matplotlib",
)


def test_dagster_selects_assets_by_name_despite_the_older_parser_of_dvc() -> None:
    from dagster import AssetKey, AssetSelection

    from dagster_project.definitions import defs

    graph = defs.resolve_asset_graph()
    assert AssetSelection.from_string('key:"splits"+').resolve(graph) >= {AssetKey("splits"), AssetKey("tokenized")}


def test_freshness_of_the_comparison_is_an_example_that_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster shows an asset as never materialized if it has a policy that is not evaluated."""
    from dagster import AssetKey

    from dagster_project.orchestration.dagster.assets import build_definitions, open_instance

    def policy() -> Any:
        specs = build_definitions(ROOT).resolve_all_asset_specs()
        return next(spec for spec in specs if spec.key == AssetKey("comparison")).freshness_policy

    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    with open_instance(ROOT) as instance:
        assert instance.get_settings("freshness") == {"enabled": False}
    assert policy() is None
    settings = tmp_path / "home" / "dagster.yaml"
    settings.write_text(settings.read_text().replace("freshness: {enabled: false}", "freshness: {enabled: true}"))
    assert policy().fail_window.to_timedelta().days == 7


def test_loading_the_definitions_imports_no_heavy_library() -> None:
    code = (
        f"import sys, json, dagster_project.definitions; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_help_text_imports_no_heavy_library_and_lists_every_command() -> None:
    code = f"""import sys, json
from dagster_project.__main__ import main
try: main(["--help"])
except SystemExit: pass
print(json.dumps([m for m in {(*HEAVY, "dagster", "dvc")!r} if m in sys.modules]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert {"check", "run", "sync", "plan", "audit", "ui"} <= set(re.findall(r"^    (\w+)", done.stdout, re.MULTILINE))


def test_the_top_level_is_the_designs() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {name.split("/")[0] for name in tracked} <= {
        "pyproject.toml", "README.md", "Makefile", "dagster_project", "data", "dvc.yaml", "dvc.lock", "params.yaml",
        "tests", "workspace.yaml", "docs", "deploy", "examples", "benchmarks", ".ci", "CHANGELOG.md", ".dvc",
        ".dvcignore", ".gitattributes", ".gitignore", "LICENSE", "requirements.lock", "CONTRIBUTING.md", "SECURITY.md",
        "CODE_OF_CONDUCT.md", "CITATION.cff", "AGENTS.md", "Dockerfile", ".dockerignore", "mkdocs.yml", ".github",
        ".pre-commit-config.yaml", ".git-blame-ignore-revs",
    }  # fmt: skip


def test_the_workspace_file_loads_the_code_location(tmp_path) -> None:
    done = run(
        [sys.executable, "-m", "dagster", "definitions", "validate", "-w", "workspace.yaml"],
        ROOT,
        DAGSTER_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr


def test_bytes_are_never_unpickled_and_remote_code_never_runs() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "dagster_project").rglob("*.py"))
    assert not re.search(r"trust_remote_code\s*=\s*True|pickle\.load|torch\.load\(|weights_only\s*=\s*False", code)
