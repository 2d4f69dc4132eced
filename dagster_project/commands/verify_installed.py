"""`pedigree verify --install`: the recorded version of the package verifies a
stage, in a scratch environment that is removed afterwards.

The environment is a venv with this version and no copy of its libraries: behind its own
packages are those of the current environment, as far as the version and the records of
trainings accept them. Everything else is installed (docs/verify.md, "Another version").
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from dagster_project.commands.installer import install, paths_of_packages
from dagster_project.commands.outputs import ancestors
from dagster_project.commands.requirements import Wheel, versions_in
from dagster_project.core.documents import restoring
from dagster_project.core.errors import INNER, InputError
from dagster_project.core.layout import report_of
from dagster_project.lineage import code_lock
from dagster_project.lineage.history import Revision, report_at, resolve
from dagster_project.lineage.scratch_folder import scratch_folder
from dagster_project.orchestration.processes import ended_with_its_children

log = logging.getLogger("pedigree")

NOT_INHERITED = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"}
"""Environment variables that would change what the scratch environment imports."""
LIBRARY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Build:
    """What dvc.lock and reports record of the code and the libraries of some stages."""

    version: str
    code: Mapping[str, str]
    """Stage -> sha256 of its code."""
    libraries: Mapping[str, str]
    """Library -> version, of trainings; with "python"."""


def verify_installed(root: Path, stage: str, rev: str | None, deep: bool, as_json: bool) -> int | None:
    """Verify a stage by the version of the package that made it. Its document goes to standard output.

    Args:
        stage, rev, deep: as for `verify.verify`.
        as_json: print JSON.
    Returns:
        The exit code of that version; None if the installed code is the
        recorded one, or the project is a clone: then nothing was done.
    Raises:
        InputError: the recorded version is unknown, cannot be installed, or has
            other code than recorded. Nothing of it was run.
    """
    build = _recorded(Revision(root, rev), stage, deep)
    if build is None:
        return None
    with scratch_folder(root) as folder:
        python = _environment(folder, build)
        command = ["verify", "--project", str(root), *(["--rev", rev] if rev else []), *(["--deep"] if deep else [])]
        command += [*(["--json"] if as_json else []), "--", stage]
        log.info(f"{code_lock.DISTRIBUTION} {build.version} verifies {stage}")
        scratch = folder / "tmp"  # for its copies of data, which it cannot remove if it is killed
        scratch.mkdir()
        variables = _variables(folder) | {"TMPDIR": str(scratch)}
        started = subprocess.Popen([python, "-P", "-m", "dagster_project", *command], env=variables)
        with ended_with_its_children(started) as process:
            code = process.wait()
    return code if code >= 0 else 128 - code


def _recorded(at: Revision, stage: str, deep: bool) -> Build | None:
    """The build that made a stage, with `deep` also all stages before it; None if it is the installed one.

    Raises:
        InputError: no recorded version has the code of all of these stages, or their trainings had different libraries.
    """
    lock = at.lock()
    address = resolve(lock, stage)
    names = [*ancestors(at, lock, address), address] if deep else [address]
    entries = [entry for name in names for entry in code_lock.recorded_in(lock[name]).items()]
    now = code_lock.installed()
    if all(now.get(one) == value for one, value in entries):
        return None
    code = dict(entries)
    several = f"{', '.join(names)}: made by several versions" if deep else f"{address}: made by an unknown version"
    version = code_lock.version_with(at.root, code, at.text(code_lock.FILE)) if len(code) == len(set(entries)) else None
    if version is None or not _is_version(version):
        hint = "install the build that made it, in a separate environment, and verify there"
        raise InputError(
            f"{several} of {code_lock.DISTRIBUTION}: no {code_lock.FILE} in the git history has this code",
            "verify each stage without --deep" if deep else hint,
        )
    return Build(version, code, _libraries(at, names))


def _is_version(text: str) -> bool:
    """Whether a version in code.lock.yaml is one, and not other words for an installer."""
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def _libraries(at: Revision, names: Iterable[str]) -> dict[str, str]:
    """Versions that the reports of trainings record.

    Raises:
        InputError: two of these stages were made with different versions.
    """
    found: dict[str, str] = {}
    for name in names:
        for library, version in report_at(at, name).get("environment", {}).items():
            if not LIBRARY.fullmatch(library) or not _is_version(str(version)):
                raise InputError(
                    f"{report_of(name)}: environment: {library} {version} is not a version of a library",
                    restoring(name),
                )
            if found.setdefault(library, version) != version:
                raise InputError(
                    f"{', '.join(names)}: made with {library} {found[library]} and {version}",
                    "verify each stage without --deep",
                )
    return found


def _environment(folder: Path, build: Build) -> str:
    """Make the environment of a build in an empty folder. Nothing of the build is run.

    Returns:
        Path of its Python.
    Raises:
        InputError: something cannot be installed, or the installed code is not the recorded one.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    python = str(folder / "bin" / "python")
    packages = paths_of_packages(folder)
    here = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    # a .pth file is code: `addsitedir` appends a folder, with the .pth files of packages that are installed as editable
    (packages / "pedigree_base.pth").write_text(
        "import site; " + "; ".join(f"site.addsitedir({path!r})" for path in here) + "\n"
    )
    log.info(f"installing {code_lock.DISTRIBUTION} {build.version} in a scratch environment")
    install(python, ["--no-deps", f"{code_lock.DISTRIBUTION}=={build.version}"])
    _refuse_other_code(packages / "dagster_project", build)
    wheel, present = Wheel.read(packages, code_lock.DISTRIBUTION), versions_in(here)
    recorded = {name: version for name, version in build.libraries.items() if name != "python"}
    if needed := wheel.needed(present, recorded):
        log.info(f"installing {', '.join(needed)}")
        constraints = folder / "constraints.txt"
        constraints.write_text("".join(f"{line}\n" for line in wheel.constraints(present, needed)))
        install(python, ["--constraint", str(constraints), *needed])
    _refuse_other_place(python, folder)
    if (version := build.libraries.get("python", sys.version.split()[0])) != sys.version.split()[0]:
        log.warning(f"made with Python {version}; the scratch environment has {sys.version.split()[0]}")
    return python


def _refuse_other_code(package: Path, build: Build) -> None:
    """Check the hashes of an installed package, without importing it.

    Raises:
        InputError: they are not the recorded ones.
    """
    try:
        found = code_lock.installed(build.code.keys() & code_lock.code_of_stages(package).keys(), package)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # also templates of another shape
        found = {}
    if differing := [name for name, value in build.code.items() if found.get(name) != value]:
        raise InputError(
            f"{code_lock.DISTRIBUTION} {build.version} from the package index has other code"
            f" for {', '.join(differing)} than the records of this project; it was not run",
            "name an index that has the build that made it (docs/verify.md)",
        )


def _refuse_other_place(python: str, folder: Path) -> None:
    """Check that the environment imports its own copy, which was compared, and
    not one that a .pth file of the current environment puts first."""
    code = "import importlib.util; print(importlib.util.find_spec('dagster_project').origin)"
    done = subprocess.run(
        [python, "-P", "-c", code], env=_variables(folder), capture_output=True, text=True, check=False
    )
    if not Path(done.stdout.strip()).is_relative_to(folder):
        raise InputError(
            f"the scratch environment imports dagster_project from {done.stdout.strip() or 'nowhere'}",
            "remove the .pth file or import hook of this environment that puts it first",
        )


def _variables(folder: Path) -> dict[str, str]:
    """Environment variables of a process in the scratch environment.

    Programs of the current one are found after its own.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return inherited | {"PATH": path, INNER: "1"}
