"""Maps a published id (core/published_ids.py) back to the record, in the project that has the key."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

from dagster_project.core.git import git
from dagster_project.core.hashing import md5_of_bytes, md5_of_folder
from dagster_project.core.layout import RECORD_KEY
from dagster_project.core.published_ids import parse_key
from dagster_project.curation.sources.erased import erased_on
from dagster_project.lineage.history import blobs, is_within, listing_of
from dagster_project.lineage.index import Index
from dagster_project.lineage.runs import PLACEHOLDER

RESTORE = f"restore {RECORD_KEY} from your copy of it: the id may have been published with this key"


def record_of(index: Index, published: str) -> str | None:
    """The `example_id` of the record that was published under an id.

    None if no known record gives it with any key of the project.

    Computes the HMAC of every record in history: about two seconds per million.

    Args:
        published: 32 hexadecimal digits.
    """
    requested = bytes.fromhex(published)
    for key in dict.fromkeys(filter(None, map(parse_key, key_files(index.root)))):
        for keys in index.record_keys():
            for start in range(0, len(keys), 16):
                identity = keys[start : start + 16].hex()
                if hmac.digest(key, identity.encode(), "sha256")[:16] == requested:
                    return identity
    return None


def erasure_of(index: Index, identity: str) -> str | None:
    """The day on which `pedigree erase` removed a record; None if it did not.

    Published ids are not recognized: the record that would map them is gone.
    """
    return erased_on(index.root, filter(None, map(parse_key, key_files(index.root))), identity)


def missing_keys(index: Index) -> list[dict[str, Any]]:
    """The runs that published ids with a key that neither the workspace nor a
    commit has, as entries of `unknown` in lineage/impact/question.py."""
    folder, name = Path(RECORD_KEY).parent, Path(RECORD_KEY).name
    known = set[str]()
    for file in map(md5_of_bytes, key_files(index.root)):
        # what may lie beside the key in its folder, whose hash dvc.lock has; `pedigree init` makes the placeholder
        beside = (dict[str, str](), PLACEHOLDER, listing_of(index.root / folder))
        known |= {file, *(md5_of_folder({**others, name: file}) for others in beside)}
    found: dict[str, dict[str, Any]] = {}
    for run in index.runs.values():
        if missing := [md5 for dep, _, md5 in run.inputs if is_within(RECORD_KEY, dep) and md5 not in known]:
            facts = {"stage": run.address, "md5": run.md5, "commit": run.commit, "found_in": run.place}
            absent = [{"stage": run.address, "path": RECORD_KEY, "md5": md5} for md5 in missing]
            found.setdefault(run.md5, {**facts, "missing": absent, "fetch": RESTORE})
    return list(found.values())


def key_files(root: Path) -> list[bytes]:
    """The key file in the workspace, then every other version of it in git.

    Earlier releases were published with these.
    """
    file = root / RECORD_KEY
    commits = (
        git(root, "log", "--all", "--reflog", "--full-history", "--no-follow", "--format=%H", "--", RECORD_KEY) or ""
    ).split()
    contents = [file.read_bytes()] if file.is_file() else []
    contents += blobs(root, [f"{commit}:./{RECORD_KEY}" for commit in commits]).values()
    return list(dict.fromkeys(contents))
