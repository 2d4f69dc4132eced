"""DAGSTER_HOME of a project: creates it with its settings and records its owner. Does not import Dagster."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dagster_project.core import faults
from dagster_project.core.errors import InputError
from dagster_project.orchestration.dagster_home import claim, home_of

DAGSTER_YAML = """\
telemetry: {enabled: false}
nux: {enabled: false}
# true: an asset is shown as overdue `stale_after_days` (dvc.yaml) after its last materialization
freshness: {enabled: false}
"""


def home(root: Path, shared: bool = False) -> Path:
    """Dagster's home: DAGSTER_HOME, or .dagster in the project.

    Args:
        shared: whether it may have assets of other projects, because those of this one have a key prefix.
    Raises:
        InputError: it is not writable, or belongs to another project.
    """
    folder = home_of(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if not (folder / "dagster.yaml").exists():
            (folder / "dagster.yaml").write_text(DAGSTER_YAML)
        if shared:
            return folder
        claim(folder, root, folder.parent if (folder.parent / "dvc.yaml").is_file() else None)
    except OSError as error:
        if faults.is_full(error):
            raise
        raise InputError(
            f"Dagster's home {folder} is not writable: {error.strerror}",
            "fix its permissions, or set DAGSTER_HOME to another folder",
        ) from None
    return folder
