"""The wheel of the package, and an environment outside the clone in which it is
installed on top of the libraries that run the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def environment() -> dict[str, str]:
    """Without PYTHONPATH: a clone on it counts as installed."""
    return {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}}


def installed(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], cwd="/", env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def build_wheel(source: Path) -> None:
    """Build it in source/dist from a copy of the package, because setuptools writes into the folder that it builds."""
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "dagster_project", source / "dagster_project", ignore=shutil.ignore_patterns("__pycache__"))
    installed(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist", source)


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel."""

    folder: Path

    def command(self, *command: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """A command of this environment in a folder, as after `source bin/activate`."""
        variables = {
            name: value for name, value in environment().items() if name not in {"PEDIGREE_PROJECT", "DAGSTER_HOME"}
        }
        path = f"{self.folder / 'bin'}{os.pathsep}{variables['PATH']}"
        return subprocess.run(
            [self.folder / "bin" / command[0], *command[1:]],
            cwd=folder, env={**variables, "PATH": path}, capture_output=True, text=True, check=False,
        )  # fmt: skip


def environment_with(wheel: Path, folder: Path) -> Environment:
    """An environment with the wheel alone, which also imports what is installed where the tests run."""
    installed(sys.executable, "-m", "venv", "--without-pip", folder)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(
        sysconfig.get_paths()["purelib"] + "\n"
    )  # a .pth file there, as of the clone, is not read
    installed(
        *PIP, "--python", folder / "bin" / "python", "install", "--no-index", "--no-deps", "--ignore-installed", wheel
    )
    return Environment(folder)
