"""Maps a published id (core/published_ids.py) back to the record, in the project that has the key."""

from __future__ import annotations

import hmac
import re
from pathlib import Path

from dagster_project.core.git import git
from dagster_project.core.layout import RECORD_KEY
from dagster_project.core.published_ids import parse_key
from dagster_project.lineage.history import blobs
from dagster_project.lineage.index import Index


def record_of(index: Index, published: str) -> str | None:
    """The `example_id` of the record that was published under an id; None if no known record gives it with any key of the project.

    Computes the HMAC of every record in history: about two seconds per million.
    """
    if not re.fullmatch(r"[0-9a-f]{32}", published):
        return None
    wanted = bytes.fromhex(published)
    for key in project_keys(index.root):
        for keys in index.record_keys():
            for start in range(0, len(keys), 16):
                identity = keys[start : start + 16].hex()
                if hmac.digest(key, identity.encode(), "sha256")[:16] == wanted:
                    return identity
    return None


def project_keys(root: Path) -> list[bytes]:
    """The key in the workspace, then every other key that a commit holds: earlier releases were published with these."""
    file = root / RECORD_KEY
    commits = (git(root, "log", "--all", "--format=%H", "--", RECORD_KEY) or "").split()
    contents = [file.read_bytes()] if file.is_file() else []
    contents += blobs(root, [f"{commit}:./{RECORD_KEY}" for commit in commits]).values()
    return list(dict.fromkeys(key for content in contents if (key := parse_key(content))))
