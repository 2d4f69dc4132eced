"""A library outside the supported range is refused with a message that says what to do."""

import pytest

from dagster_project.core.versions import require_version


def test_an_installed_version_within_the_range_is_accepted() -> None:
    require_version("packaging", ">=1", "packaging._structures")


def test_a_version_outside_the_range_is_refused_by_name() -> None:
    with pytest.raises(AssertionError, match=r"_structures is not a documented part of packaging: .* written for >=999, found .*\nhint: "):
        require_version("packaging", ">=999", "packaging._structures")
