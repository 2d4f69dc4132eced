"""Sync for the command line and the UI, without Dagster and DVC if nothing changed."""

from __future__ import annotations

from pathlib import Path

from dagster_project.core.imports import lean_imports
from dagster_project.orchestration.last_sync import LastSync


def sync_if_changed(root: Path, key_prefix: tuple[str, ...] = (), wait: bool = True) -> list[str]:
    """Report DVC's state to Dagster. Neither is loaded if nothing changed since the last sync.

    Args:
        key_prefix: of the project's asset keys in an instance with other assets.
        wait: for a command that holds DVC's lock; otherwise nothing is reported then.
    Returns:
        One line for each event.
    """
    last = LastSync.read(root, key_prefix)
    if last.unchanged:
        return []
    with lean_imports():
        from dagster_project.orchestration.dagster.assets import open_instance
        from dagster_project.orchestration.dagster.sync import sync_after
    with open_instance(last.root, shared=bool(key_prefix)) as instance:
        return sync_after(last, instance, wait=wait)
