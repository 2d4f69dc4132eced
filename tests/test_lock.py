"""requirements.lock fits pyproject.toml and any index; every library that the
code imports has a place in the core or in an extra."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import distribution, packages_distributions

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import dagster_project
from dagster_project.commands.extras import CORE, PACKAGES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCKED = {canonicalize_name(one.name): one for one in map(Requirement, LINES)}
DECIDES_RESULTS = {
    "torch",
    "accelerate",
    "bitsandbytes",
    "numpy",
    "numba",
    "polars",
    "pyarrow",
    "safetensors",
    "transformers",
    "trl",
    "peft",
    "datasets",
}


def of_extra(name: str) -> Iterator[Requirement]:
    """Requirements of an extra, with those of the extras that it includes."""
    for one in map(Requirement, EXTRAS[name]):
        if one.name == PROJECT["name"]:
            for other in sorted(one.extras):
                yield from of_extra(other)
        else:
            yield one


DIRECT = [*map(Requirement, PROJECT["dependencies"]), *of_extra("dev")]


@pytest.mark.parametrize("required", DIRECT, ids=lambda one: one.name)
def test_each_direct_dependency_is_locked_within_its_bounds(required: Requirement) -> None:
    [pin] = LOCKED[canonicalize_name(required.name)].specifier
    assert required.specifier.contains(pin.version, prereleases=True)


def test_every_line_is_one_exact_version_without_address_index_or_build() -> None:
    for line in LINES:
        assert re.fullmatch(r"[\w.-]+==[\w.]+(?: ; [^#@]+)?", line), line
    assert len(LINES) > 250
    names = Counter(canonicalize_name(line.partition("==")[0]) for line in LINES)
    assert all(";" in line for line in LINES if names[canonicalize_name(line.partition("==")[0])] > 1), (
        "two versions of one Python"
    )
    assert not [name for name in LOCKED if name.startswith(("nvidia", "cuda", "triton"))], (
        "each build of torch requires its own"
    )


def test_libraries_that_decide_results_have_upper_bounds() -> None:
    bounds = {one.name: {part.operator for part in one.specifier} for one in DIRECT}
    assert {name for name in DECIDES_RESULTS if "<" not in bounds[name]} == set()


def test_all_is_every_extra_but_those_for_accelerators_and_developers() -> None:
    [everything] = map(Requirement, EXTRAS["all"])
    [cluster] = [one for one in map(Requirement, EXTRAS["cluster"]) if one.extras]
    assert everything.extras | cluster.extras | {"all", "gpu", "bench", "docs", "dev"} == set(EXTRAS)


def test_the_version_is_stated_once_more_in_the_package() -> None:
    assert PROJECT["version"] == dagster_project.__version__


def imported() -> set[str]:
    """Top-level names of all modules that the code imports."""
    names: set[str] = set()
    for path in (ROOT / "dagster_project").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
    return names - {*sys.stdlib_module_names, "dagster_project"}


def closure(requirements: list[Requirement]) -> set[str]:
    """Distributions that requirements install, directly or not."""
    found: set[str] = set()
    waiting = [(one.name, frozenset(one.extras)) for one in requirements]
    while waiting:
        name, extras = waiting.pop()
        if canonicalize_name(name) in found and not extras:
            continue
        found.add(canonicalize_name(name))
        for one in map(Requirement, distribution(name).requires or ()):
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                waiting.append((one.name, frozenset(one.extras)))
    return found


def test_each_imported_library_is_in_the_core_or_named_with_its_extra() -> None:
    core = closure([*map(Requirement, PROJECT["dependencies"])])
    known = packages_distributions()
    of_core = {name for name in imported() if {canonicalize_name(one) for one in known.get(name, ())} & core}
    named = {package: extra for extra, packages in PACKAGES.items() for package in packages}
    assert imported() - of_core <= set(named)
    assert not of_core & set(named) and of_core - {"dagster_project"} <= CORE


@pytest.mark.parametrize("extra", sorted(set(PACKAGES) - {"gpu"}))
def test_an_extra_installs_the_packages_that_name_it(extra: str) -> None:
    installs, known = closure([*of_extra(extra)]), packages_distributions()
    for package in PACKAGES[extra]:
        assert {canonicalize_name(one) for one in known[package]} & installs, package


def test_no_text_installs_the_other_project_named_pedigree() -> None:
    install = "pip " + "install"
    wrong = re.compile(rf"{install}[^\n]*?(?<![\w/.-])pedigree(?![\w/.-])|(?<![\w/.-])pedigree\[[a-z]")
    assert (
        wrong.search(f"{install} pedigree")
        and wrong.search("'pedigree" + "[gpu]'")
        and not wrong.search(f"{install} 'pedigree-llm[gpu]'")
    )
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in files.splitlines():
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        assert not (found := wrong.search(content.decode(errors="replace"))), f"{name}: {found and found.group()}"


def test_hydra_is_not_final_yet() -> None:
    pin = {name: Version(next(iter(LOCKED[name].specifier)).version) for name in ("hydra-core", "omegaconf")}
    message = (
        "is final: require it in pyproject.toml without `rc`, and see whether DVC and Dagster now agree without the"
        " three lines"
    )
    for name, locked in pin.items():
        for version in (locked, Version(distribution(name).version)):
            assert version.is_prerelease, f"{name} {version} {message}"
