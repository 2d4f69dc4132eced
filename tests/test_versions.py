"""A library outside the supported range is refused with a message that names the fix."""

import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dagster_project.core.versions import require_version
from dagster_project.orchestration.private_api import SUPPORTED


def test_an_installed_version_within_the_range_is_accepted() -> None:
    require_version("packaging", ">=1", "packaging._structures")


def test_a_version_outside_the_range_is_refused_by_name() -> None:
    with pytest.raises(
        AssertionError,
        match=r"_structures is not a documented part of packaging: .* written for >=999, found .*\nhint: ",
    ):
        require_version("packaging", ">=999", "packaging._structures")


def test_private_modules_are_used_only_in_versions_that_the_project_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for library, supported in SUPPORTED.items():
        required = next(
            one for one in map(Requirement, project["optional-dependencies"]["pipeline"]) if one.name == library
        )
        assert supported.partition(",")[2] in str(required.specifier)
        assert all(
            version in SpecifierSet(supported)
            for version in (one.version for one in required.specifier if one.operator == ">=")
        )
