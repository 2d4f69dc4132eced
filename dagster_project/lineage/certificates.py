"""Certificates of the project's erasures (commands/erase_certificate.py writes them)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dagster_project.lineage.notes import read_note

CERTIFICATES = "data/erasures"
"""Folder of the certificates of erasures."""
DELETED = ("made again", "retired")
"""Outcomes of models that an erasure deletes, unless the one made again is the same."""


def data_deleted_of(root: Path) -> dict[str, str]:
    """Hash of each version of a model that certificates name -> the erasure that deleted its data."""
    return {version["before"]: erasure for erasure, _, version in _versions(root)}


def without_deleted(root: Path, missing: Sequence[Mapping[str, str]], models: Iterable[str]) -> list[dict[str, str]]:
    """Missing outputs, of which those that an erasure deleted have no command that would bring the records back.

    Args:
        missing: outputs with md5 and the commands that fetch them (`fetch`).
        models: hashes of the models that were made from them. An erasure that names one deleted its data.
    """
    data = data_deleted_of(root) if missing else {}
    erasure = next((data[md5] for md5 in models if md5 in data), "")
    deleted = {
        one.get("md5", ""): f"nothing, because {erasure} deleted the data"
        for one in missing
        if erasure and one.get("md5") not in data and "`dvc" in one["fetch"]
    }
    deleted |= {
        version["before"]: f"nothing, because {erasure} deleted it; what brings it back also brings back the records"
        for erasure, outcome, version in (_versions(root) if missing else ())
        if outcome in DELETED and version["before"] != version.get("after")
    }
    return [{**one, "fetch": deleted.get(one.get("md5", ""), one["fetch"])} for one in missing]


def _versions(root: Path) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """(erasure, outcome, version of a model) of every certificate."""
    for path in sorted((root / CERTIFICATES).glob("*.json")):
        certificate, found = read_note(path), []
        with suppress(AttributeError, KeyError, TypeError):  # a signature, or a file of somebody else
            erasure = f"the erasure of {certificate['date']} ({path.relative_to(root).as_posix()})"
            for outcome, versions in certificate["models"].items():
                found += [(erasure, outcome, version) for version in versions if "before" in version]
        yield from found
