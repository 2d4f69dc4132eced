"""A Dagster home: which project's assets have no key prefix in it, and its settings. Does not import Dagster."""

from __future__ import annotations

import os
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dagster_project.core.errors import InputError

OWNER = "pedigree_project"
"""File in Dagster's home with the path of that project."""


def home_of(root: Path) -> Path:
    """DAGSTER_HOME, as Dagster reads it, or .dagster in the project."""
    return Path(os.path.expanduser(os.environ.get("DAGSTER_HOME") or root / ".dagster")).absolute()  # noqa: PTH111


def refuses_freshness(root: Path) -> bool:
    """Whether dagster.yaml in Dagster's home turns freshness policies off.

    Dagster would show an asset with a policy as never materialized then.
    """
    try:
        settings = YAML(typ="safe", pure=True).load((home_of(root) / "dagster.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError):
        return False
    freshness = settings.get("freshness") if isinstance(settings, dict) else None
    return isinstance(freshness, dict) and freshness.get("enabled") is False


def claim(folder: Path, root: Path, unclaimed: Path | None = None) -> None:
    """Record that the assets of a project have no key prefix in a Dagster home.

    Another project without one would report its files under the same asset keys.

    Args:
        unclaimed: the project of a home in which none is recorded; default: this one.
    Raises:
        InputError: those of another project have none there.
        OSError: it is not writable.
    """
    owner = folder / OWNER
    other = Path(os.fsdecode(owner.read_bytes().strip())) if owner.is_file() else unclaimed or root
    real = root.resolve()  # a path of the same folder can lead through a link
    is_own = other.resolve() == real or folder.resolve().is_relative_to(real)
    if not is_own and (other / "dvc.yaml").is_file():
        raise InputError(
            f"Dagster's home {folder} belongs to the project in {other}",
            f"unset DAGSTER_HOME, or set it to a folder of this project, e.g. {root / '.dagster'};"
            " or give this project a key_prefix (docs/dagster-dvc.md)",
        )
    if not owner.is_file() or other.resolve() != real:
        owner.write_bytes(os.fsencode(root) + b"\n")
