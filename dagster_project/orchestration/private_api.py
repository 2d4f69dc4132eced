"""Access to undocumented modules of Dagster and DVC, limited to the versions that this code was written for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dagster_project.core.versions import require_version

SUPPORTED = {"dagster": ">=1.13,<1.14", "dagster-webserver": ">=1.13,<1.14", "dvc": ">=3.67,<3.68"}
"""Library -> the versions whose undocumented modules are used. pyproject.toml has the same upper bounds."""


def private_module(name: str) -> Any:
    """An undocumented module, e.g. "dvc.lock".

    Raises:
        AssertionError: another version of the library is installed.
    """
    library = name.partition(".")[0].replace("_", "-")
    require_version(library, SUPPORTED[library], name)
    return import_module(name)
