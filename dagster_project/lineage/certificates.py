"""Certificates of the project's erasures (commands/erase_certificate.py writes them)."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

CERTIFICATES = "data/erasures"
"""Folder of the certificates of erasures."""


def data_deleted_of(root: Path) -> dict[str, str]:
    """Hash of each version of a model that certificates name -> the erasure that deleted its data."""
    found: dict[str, str] = {}
    for path in sorted((root / CERTIFICATES).glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # another document, or a damaged one
            document = json.loads(path.read_bytes())
            name = f"the erasure of {document['date']} ({path.relative_to(root).as_posix()})"
            models = [one for versions in document["models"].values() for one in versions]
            found |= {one["before"]: name for one in models if "before" in one}
    return found
