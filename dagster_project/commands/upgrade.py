"""`pedigree upgrade`: records the code of the installed package in
code.lock.yaml, and lists the stages that become stale and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dagster_project.commands.pipeline_file import update_pipeline
from dagster_project.core.errors import InputError
from dagster_project.core.records import write_text
from dagster_project.lineage import code_lock, exports_in_place
from dagster_project.views.texts import text

RESULTS = code_lock.PACKAGE / "results_changelog.md"
"""The parts "Results" of CHANGELOG.md, which `make docs` copies into the package."""
HEADING = re.compile(r"^## \[?(?P<name>[^\]\n]+?)\]?(?: - .*)?$")


def upgrade(root: Path) -> dict[str, Any]:
    """Record the installed code of every stage, write dvc.yaml of this version unless it was edited, and add to
    .dvcignore what it lacks. No stage is run.

    Returns:
        {"from", "to": versions, "changed": stages whose code differs from the recorded one, "stale": {address: why},
        "current": addresses that stay as they are, "results": {version: entries of the changelog}, "edited": stages
        whose definition in an edited dvc.yaml is not that of this version, "ignored": lines that were added to
        .dvcignore, "written": files that are new or changed}.
    Raises:
        InputError: the project is a clone, in which stages depend on files; or
            its dvc.yaml does not name code.lock.yaml.
    """
    from dagster_project.orchestration import dvc
    from dagster_project.orchestration.run_all import parents

    path = root / code_lock.FILE
    if not code_lock.is_used(root) and path.is_file():  # a clone has none
        raise InputError(f"dvc.yaml does not name {code_lock.FILE}", "restore it with `git checkout HEAD dvc.yaml`")
    if not code_lock.is_used(root):
        raise InputError(
            f"{root} is a clone: its stages depend on its own files, not on {code_lock.FILE}",
            "`git pull` upgrades a clone; `dvc status` lists the stages that are stale",
        )
    # without a valid one, as after a merge with conflicts, all of the installed code is recorded
    found = code_lock.parse(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    recorded = found or code_lock.CodeLock("unknown", {})
    update = update_pipeline(root, recorded)
    lock = update.lock
    changed = [name for name, value in lock.stages.items() if recorded.stages.get(name) != value]
    written = [*update.written]
    if lock != recorded:
        write_text(path, lock.text())
        written.append(code_lock.FILE)
    if ignored := exports_in_place.add_lines(root):
        written.append(exports_in_place.IGNORE_FILE)
    states = dvc.read_stages(root)
    above, stale = parents(states), {}
    for address in states:  # in flow order
        if states[address].frozen:  # DVC does not run it
            continue
        if address.partition("@")[0] in changed:
            stale[address] = "its code changed"
        elif address.partition("@")[0] in update.redefined:
            stale[address] = "its definition in dvc.yaml changed"
        elif after := sorted(above[address] & stale.keys()):
            stale[address] = f"it reads {', '.join(after)}"
    return {
        "from": recorded.version,
        "to": lock.version,
        "changed": changed,
        "stale": stale,
        "current": [address for address in states if address not in stale],
        "results": results_since(recorded.version, RESULTS.read_text(encoding="utf-8")) if changed else {},
        "edited": update.edited,
        "ignored": ignored,
        "written": sorted(written),
    }


def results_since(version: str, changelog: str) -> dict[str, list[str]]:
    """Version -> entries under "Results" of the versions after the given one.

    Changes without a version number are always included.

    Args:
        changelog: "## VERSION" and below it its entries, "- ...".
    """
    from packaging.version import InvalidVersion, Version

    def is_later(name: str) -> bool:
        try:
            return name == "Unreleased" or Version(name) > Version(version)
        except InvalidVersion:
            return False

    found: dict[str, list[str]] = {}
    name = ""
    for line in changelog.splitlines():
        if heading := HEADING.match(line):
            name = heading["name"]
        elif line.startswith("- "):
            found.setdefault(name, []).append(line.removeprefix("- "))
        elif line.strip() and name in found:
            found[name][-1] += f" {line.strip()}"
    return {name: entries for name, entries in found.items() if is_later(name)}


def as_text(document: Mapping[str, Any]) -> str:
    """The document of `upgrade` as text for the terminal."""
    return text(
        "upgrade",
        **document,
        before=document["from"],
        distribution=code_lock.DISTRIBUTION,
        ignore_file=exports_in_place.IGNORE_FILE,
    )
