"""DAGSTER_HOME of a project: creates it with its settings and records its owner. Does not import Dagster."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dagster_project.core import faults
from dagster_project.core.errors import InputError

DAGSTER_YAML = """\
telemetry: {enabled: false}
nux: {enabled: false}
# true: an asset is shown as overdue `stale_after_days` (dvc.yaml) after its last materialization
freshness: {enabled: false}
"""
OWNER = "pedigree_project"
"""File in Dagster's home with the path of its project."""


def home(root: Path, shared: bool = False) -> Path:
    """Dagster's home: DAGSTER_HOME, or .dagster in the project.

    Args:
        shared: whether it may have assets of other projects, because those of this one have a key prefix.
    Raises:
        InputError: it is not writable, or belongs to another project.
    """
    folder = Path(os.environ.get("DAGSTER_HOME") or root / ".dagster").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if not (folder / "dagster.yaml").exists():
            (folder / "dagster.yaml").write_text(DAGSTER_YAML)
        if shared:
            return folder
        owner = folder / OWNER
        unclaimed = folder.parent if (folder.parent / "dvc.yaml").is_file() else root
        other = Path(os.fsdecode(owner.read_bytes().strip())) if owner.is_file() else unclaimed
        real = root.resolve()  # a path of the same folder can lead through a link
        is_own = other.resolve() == real or folder.resolve().is_relative_to(real)
        if not is_own and (other / "dvc.yaml").is_file():
            raise InputError(
                f"Dagster's home {folder} belongs to the project in {other}",
                f"unset DAGSTER_HOME, or set it to a folder of this project, e.g. {root / '.dagster'}",
            )
        if not owner.is_file() or other != root:
            owner.write_bytes(os.fsencode(root) + b"\n")
    except OSError as error:
        if faults.is_full(error):
            raise
        raise InputError(
            f"Dagster's home {folder} is not writable: {error.strerror}",
            "fix its permissions, or set DAGSTER_HOME to another folder",
        ) from None
    return folder
