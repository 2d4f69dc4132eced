"""Which objects of DVC's cache an erasure removes: those that hold the record, all files of outputs with one, and all files of retired outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from dagster_project.lineage.history import Objects

NAME = re.compile(r"[0-9a-f]{32}(?:\.dir)?")


def name_of(path: Path) -> str | None:
    """Hash of an object of a cache or remote, by its path; None if it is another file."""
    name = path.parent.name + path.name
    return name if NAME.fullmatch(name) else None


def listings(folder: Path) -> dict[str, frozenset[str]]:
    """Hash of each folder in a cache -> hashes of its files."""
    found: dict[str, frozenset[str]] = {}
    for path in folder.glob("??/*.dir"):
        name = name_of(path)
        try:
            found[name or ""] = frozenset(entry["md5"] for entry in json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError, KeyError):  # damaged: it names nothing
            continue
    found.pop("", None)
    return found


def to_remove(
    folders: Mapping[str, frozenset[str]], holding: Collection[str], retired: Collection[str], needed: Collection[str]
) -> set[str]:
    """Hashes of the objects to remove.

    Args:
        folders: as `listings`.
        holding: objects that hold something of the record.
        retired: outputs that were made from it.
        needed: objects of the workspace, which stay.
    """
    gone = {name for name, files in folders.items() if name not in needed and (name in retired or not files.isdisjoint(holding))}
    kept = {file for name, files in folders.items() if name not in gone for file in files}
    files = {file for name in gone for file in folders[name]}
    return ({*holding} | {*retired} | gone | (files - kept)) - {*needed}


def runs_naming(root: Path, removed: Collection[str]) -> list[Path]:
    """Entries of the run cache that name one of these objects: DVC would restore a run by them."""
    return [path for path in Objects(root).run_cache() if _names(path, removed)]


def files_naming(folder: Path, removed: Collection[str]) -> list[Path]:
    """As `runs_naming`, in the folder of a remote."""
    return sorted(path for path in (folder / "runs").glob("*/*/*") if path.is_file() and _names(path, removed))


def _names(path: Path, removed: Iterable[str]) -> bool:
    return not {*NAME.findall(path.read_text(encoding="utf-8", errors="replace"))}.isdisjoint(removed)
