"""JSON documents that git tracks or a user may edit: a merge, an editor or a full disk can damage them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.layout import report_of

log = logging.getLogger("pedigree")

CONFLICT = b"<<<<<<< "


def damage(content: bytes) -> str:
    """Why the content of a file is not a JSON object; empty if it is one."""
    if content.startswith(CONFLICT) or b"\n" + CONFLICT in content:
        return "it has an unresolved merge conflict"
    try:
        document = json.loads(content)
    except UnicodeDecodeError:
        return "it is not UTF-8"
    except (ValueError, RecursionError) as error:
        return f"it is cut short or is not JSON ({error})"
    return "" if isinstance(document, dict) else "it is not a JSON object"


def read_document(path: Path, name: str, hint: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        name: of the file, for the message.
        hint: next step if it is damaged.
    Raises:
        InputError: it is damaged.
    """
    content = path.read_bytes()
    if why := damage(content):
        raise InputError(f"{name} cannot be read: {why}", hint)
    return json.loads(content)


def read_report(root: Path, address: str) -> dict[str, Any]:
    """The report of a stage.

    Raises:
        InputError: it is damaged.
    """
    name = report_of(address)
    return read_document(root / name, name, restoring(address))


def restoring(address: str) -> str:
    """Next step for a damaged report."""
    return f"restore it with `git checkout HEAD {report_of(address)}`, or make it again with `dvc repro {address}`"


def damaged_report(root: Path, address: str) -> str:
    """A line that names a damaged report and the next step; empty if it is intact or missing."""
    path = root / report_of(address)
    why = damage(path.read_bytes()) if path.is_file() else ""
    return f"{report_of(address)} cannot be read: {why}; {restoring(address)}" if why else ""


def set_aside(path: Path, why: str, then: str) -> None:
    """Rename a damaged file that is only a cache, and log it.

    Args:
        then: what makes it again.
    """
    aside = path.with_name(f"{path.name}.damaged")
    try:
        path.replace(aside)
        done = f"it is set aside as {aside.name}"
    except OSError:  # another process did, or the folder is read-only
        done = "it is ignored"
    log.warning(f"{path.name} in {path.parent} was damaged: {why}; {done}: {then}")
