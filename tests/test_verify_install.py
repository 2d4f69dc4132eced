"""`pedigree verify --install`: the recorded version is installed from wheels, compared with the record before it runs, and gives the answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders.installed import commit, edit, install, installed, pedigree_in, set_version
from builders.servers import free_port
from conftest import ROOT, run

from dagster_project.commands.installer import command_of, explained
from dagster_project.commands.requirements import Wheel, versions_in
from dagster_project.commands.verify_installed import verify_installed
from dagster_project.core.errors import InputError

ROWS = [{"instruction": f"Name number {i}.", "output": f"It is {i}."} for i in range(5)]
STAGE = "stages/raw_examples.py"


def build(source: Path, out: Path, version: str, *requirements: str) -> Path:
    """A wheel of a copy of the package, which requires what pyproject.toml names and more."""
    text = (ROOT / "pyproject.toml").read_text().replace('version = "0.2.0"', f'version = "{version}"', 1)
    more = "".join(f'    "{one}",\n' for one in requirements)
    (source / "pyproject.toml").write_text(text.replace("dependencies = [\n", f"dependencies = [\n{more}", 1))
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    done = run(pip, source)
    assert done.returncode == 0, done.stderr
    return next(out.glob(f"pedigree_llm-{version}-*.whl"))


def tiny_wheel(folder: Path, name: str, version: str, module: str) -> Path:
    """A wheel with one module."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", module)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


@dataclass(frozen=True)
class Made:
    """A project whose raw_examples were made by version 1.0, and upgraded to 2.0, which is installed."""

    project: Path
    site: Path
    """With version 2.0, whose raw_examples gives other bytes."""
    wheels: Path
    """A local index with both versions, and a library that only 1.0 requires."""
    rev: str
    """The commit of 1.0."""

    def verify(self, *options: str, wheels: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels or self.wheels), "PIP_CACHE_DIR": str(self.wheels / "cache"), **environment}
        return installed(self.site, self.project, "-m", "dagster_project", "verify", "raw_examples", "--rev", self.rev, *options, **index)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    base = tmp_path_factory.mktemp("versions")
    old, new, wheels, project = install(base / "old", "1.0"), install(base / "new", "2.0"), base / "wheels", base / "project"
    stage = old / "dagster_project" / STAGE
    stage.write_text("import only_in_one\n" + stage.read_text().replace('{"sources": sources}', '{"sources": sources, "by": only_in_one.NAME}'))
    stage.write_text(stage.read_text().replace("import only_in_one\n", "", 1).replace("\nfrom pathlib", "\nimport only_in_one\nfrom pathlib", 1))
    command = old / "dagster_project/commands/verify.py"
    command.write_text(command.read_text().replace('f"reproducing {name}"', 'f"version 1.0 is reproducing {name}"'))
    tiny_wheel(wheels, "only_in_one", "1.4", 'NAME = "one"\n')
    tiny_wheel(wheels, "only_in_one", "2.0", 'NAME = "two"\n')
    (old / "only_in_one.py").write_text('NAME = "one"\n')
    (base / "mine.json").write_text(json.dumps(ROWS))
    assert pedigree_in(old, base, "init", str(project), "--data", "mine.json", "--license", "MIT").returncode == 0
    done = installed(old, project, "-m", "dvc", "repro", "raw_examples")
    assert done.returncode == 0, done.stderr
    (old / "only_in_one.py").unlink()
    rev = commit(project)
    build(old, wheels, "1.0", "only-in-one<2")
    build(new, wheels, "2.0")
    assert pedigree_in(new, project, "upgrade").returncode == 0
    commit(project, "upgrade")
    return Made(project, new, wheels, rev)


def test_the_recorded_version_and_what_it_requires_are_installed_and_give_the_answer(made: Made, tmp_path: Path) -> None:
    refused = made.verify()
    assert refused.returncode == 2 and "pip install pedigree-llm==1.0`; --install does both" in refused.stderr
    before = run(["git", "status", "--porcelain"], made.project).stdout
    done = made.verify("--install", "--json", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["stage"], document["rev"], document["verdict"]) == ("raw_examples", made.rev, "identical")
    assert json.loads((made.project / "data/reports/raw_examples.json").read_text())["by"] == "one", "2.0 would write another report"
    assert "version 1.0 is reproducing raw_examples" in done.stderr, "1.0 compares, too"
    assert "installing only-in-one<2" in done.stderr and "torch" not in done.stderr
    assert not list(tmp_path.iterdir()), "the environment was removed"
    assert run(["git", "status", "--porcelain"], made.project).stdout == before
    assert run([sys.executable, "-m", "pip", "show", "only-in-one"], made.project).returncode, "this environment has nothing new"
