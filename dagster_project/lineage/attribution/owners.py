"""Which model a store of gradients is of: a file in its folder, so that a
variant has one store at most and an audit can list it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dagster_project.core.records import remove
from dagster_project.lineage.attribution.store import GRADIENTS, MANIFEST, SHARD
from dagster_project.lineage.history import md5_on_disk
from dagster_project.lineage.lineage import Subject
from dagster_project.lineage.notes import read_note

OWNER = "model.json"
END = "end"
"""Folder in that of a store, for gradients at all that the adapter adds."""


def owner_of(file: Path) -> str | None:
    """The stage that a store is of, by its file; None if the file is damaged."""
    return read_note(file).get("stage")


def remove_others(folder: Path, kept: str, stage: str) -> None:
    """Remove what is kept of earlier versions of a stage.

    Args:
        folder: has a folder for each version.
        kept: name of that of this version.
    """
    for file in folder.glob(f"*/{OWNER}"):
        if file.parent.name != kept and owner_of(file) == stage:
            remove(file.parent)


def stores_of(root: Path, subject: Subject) -> list[dict[str, Any]]:
    """The stores of gradients of the trainings behind a model: those of the very files in the workspace.

    Returns:
        {"stage", "folder", "records" (whose gradients are stored), "of" (all
        records of the training), "bytes"} of each.
    """
    found = []
    for run in subject.models:
        folder = root / run.path
        owned = [file.parent for file in sorted((root / GRADIENTS).glob(f"*/{OWNER}")) if owner_of(file) == run.address]
        if not owned or md5_on_disk(folder) != run.md5:
            continue
        # also at all of the adapter, and at points of the training
        for store in (place for home in owned for place in (home, home / END, *sorted(home.glob("step-*")))):
            manifest = _manifest(store)
            if manifest and manifest["identity"].get("adapter") == run.md5:
                total = manifest["records"]
                sizes = {
                    f"gradients-{n:05d}.safetensors": min(SHARD, total - n * SHARD) for n in range(-(-total // SHARD))
                }
                files = [path for path in store.glob("*.safetensors") if path.name in manifest["shards"]]
                found.append(
                    {
                        "stage": run.address,
                        "folder": store.relative_to(root).as_posix(),
                        "records": sum(sizes.get(path.name, 0) for path in files),
                        "of": total,
                        "bytes": sum(path.stat().st_size for path in files),
                    }
                )
    return found


def _manifest(store: Path) -> dict[str, Any] | None:
    """The list of files of a store; None if there is none, or it is damaged."""
    found = read_note(store / MANIFEST)
    shapes = {"identity": dict, "records": int, "shards": dict}
    return found if all(isinstance(found.get(key), shape) for key, shape in shapes.items()) else None
