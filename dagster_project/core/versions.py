"""Version guard for the few places that use undocumented parts of a library."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

from packaging.specifiers import SpecifierSet


@cache
def require_version(library: str, supported: str, feature: str) -> None:
    """Check that a library has the version that a piece of code was written for.

    Args:
        library: name of the distribution, e.g. "torch".
        supported: version range as in pyproject.toml, e.g. ">=2.9,<3".
        feature: the undocumented name that is used.
    Raises:
        AssertionError: another version is installed.
    """
    installed = version(library)
    if not SpecifierSet(supported).contains(installed, prereleases=True):
        raise AssertionError(
            f"{feature} is not a documented part of {library}: the code was written for {supported}, found {installed}"
            f"\nhint: install {library}{supported}, or check that {feature} still behaves the same and widen the range"
        )
