"""JSON that commands write for themselves, such as caches, and of which a missing or damaged file is no error."""

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
