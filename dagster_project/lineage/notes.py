"""Files that may be missing or damaged without an error, such as those that commands write for themselves."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_note(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing, damaged or something else."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def parsed_yaml(content: str | bytes) -> dict[str, Any] | None:
    """A mapping in YAML; None if it is invalid or something else."""
    from ruamel.yaml import YAML, YAMLError

    try:
        found = YAML(typ="safe").load(content)
    except (YAMLError, ValueError, TypeError, RecursionError):  # also an invalid date or an unhashable key
        return None
    return found if isinstance(found, dict) else None
