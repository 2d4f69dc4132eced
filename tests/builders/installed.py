"""A copy of the package outside any project, as an installation would have it, and projects that run with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, run


def install(site: Path, version: str) -> Path:
    """A folder for PYTHONPATH with this version of the package."""
    shutil.copytree(ROOT / "dagster_project", site / "dagster_project", ignore=shutil.ignore_patterns("__pycache__"))
    set_version(site, version)
    return site


def set_version(site: Path, version: str) -> None:
    module = site / "dagster_project" / "__init__.py"
    module.write_text(re.sub(r'(?m)^__version__ = ".*"$', f'__version__ = "{version}"', module.read_text()))


def edit(site: Path, module: str) -> None:
    """Change a file of the installed package without changing what it does."""
    path = site / "dagster_project" / module
    path.write_text(path.read_text() + "\n# edited\n")


def installed(site: Path, folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND...` with the installed package in a folder, which
    also a stage command that DVC starts then imports."""
    variables = {name: value for name, value in os.environ.items() if name not in {"PEDIGREE_PROJECT", "DAGSTER_HOME"}}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**variables, "PYTHONPATH": str(site), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def pedigree_in(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return installed(site, folder, "-m", "dagster_project", *arguments)


def pretend_to_run(folder: Path) -> None:
    """Write a small file for each output of every stage, and record all as up to date."""
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        for stage in repo.index.stages:
            for out in stage.outs:
                path = Path(out.fs_path)
                path = path if path.suffix else path / "file.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("{}" if path.suffix == ".json" else f"step,loss\n{len(stage.name)},1\n")
    done = run([sys.executable, "-m", "dvc", "commit", "-q", "-f"], folder)
    assert done.returncode == 0, done.stderr
