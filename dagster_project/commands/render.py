"""`pedigree render`: draws pages again from the documents on disk, without running a stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from dagster_project.core.context import Documents
from dagster_project.core.documents import damage, damaged_report, read_report
from dagster_project.core.errors import InputError
from dagster_project.core.layout import measured_path, pages_of, report_of
from dagster_project.core.text import shortened, visible
from dagster_project.orchestration import dvc
from dagster_project.orchestration.integrity import sha256_of
from dagster_project.pipeline import PEDIGREE
from dagster_project.views.render import PAGES


class OtherVersion(InputError):
    """The documents of a stage are not those that this version draws pages from."""


def render(root: Path, address: str | None = None) -> dict[str, Any]:
    """Draw the pages of one stage, or of all stages that have any.

    Args:
        address: e.g. "comparison" or "adapter@lora"; None for all.
    Returns:
        {"pages": written paths, "skipped": {address: reason}}.
    Raises:
        InputError: the stage does not exist, has no pages, or its documents are those of another version.
    """
    stages = dvc.read_stages(root)
    if address is not None and address not in stages:
        raise InputError(f"{address} is not a stage of dvc.yaml", f"stages: {', '.join(stages)}")
    with_pages = [name for name in stages if name.partition("@")[0] in PAGES]
    if address is not None and address not in with_pages:
        raise InputError(f"{address} has no pages", f"stages with pages: {', '.join(with_pages)}")
    written: list[str] = []
    skipped: dict[str, str] = {}
    if address is not None and (root / report_of(address)).is_file():
        read_report(root, address)
    for name in with_pages if address is None else [address]:
        try:
            reason, paths = _render(root, name, root / stages[name].out)
        except OtherVersion as error:
            if address is not None:
                raise
            reason, paths = error.what, []
        written += paths
        if reason:
            skipped[name] = reason
    return {"pages": written, "skipped": skipped}


def _render(root: Path, address: str, out: Path) -> tuple[str, list[str]]:
    """Why nothing was drawn (empty if something was), and the drawn pages."""
    path, pages = root / report_of(address), pages_of(root, address)
    again = f"run it again: `dvc repro --force --single-item {address}`"  # it may be up to date
    if not path.is_file():
        return "it has not run yet", []
    if why := damaged_report(root, address):
        return why, []
    report = read_report(root, address)
    if not report.get("passed", True):
        return "its latest run failed a blocking check, and its page shows that run", []
    if not out.exists():
        return (
            f"{out.relative_to(root)} is missing: `dvc repro {address}` makes it, `dvc pull {address}` fetches it",
            [],
        )
    published, run = report.get("output_sha256"), measured_path(root, address)
    if published and published != sha256_of(out):
        path = out.relative_to(root)
        return f"its report is of another output than {path}; `dvc checkout --force {path}` restores that", []
    measured = run.read_bytes() if published and run.is_file() else None
    if measured is not None and not damage(measured) and json.loads(measured).get("output_sha256") != published:
        reason = "its latest run on this machine made another output"
        return f"{reason}, and the documents of that run are not of this one: {again}", []
    before = _times(pages)
    try:
        PEDIGREE.draw(Documents(root, address, out, pages, report))
    except (LookupError, TypeError, AttributeError, UndefinedError) as error:  # a field is missing, or has another form
        said = shortened(visible(f"{type(error).__name__}: {error}"))
        raise OtherVersion(
            f"the documents of {address} are not as this version of pedigree-llm writes them ({said})",
            again,
        ) from error
    drawn = [str(page.relative_to(root)) for page, time in _times(pages).items() if before.get(page) != time]
    return ("" if drawn else f"the documents of its latest run are not on this machine: {again}", drawn)


def _times(folder: Path) -> dict[Path, int]:
    """Modification time of each page."""
    return {page: page.stat().st_mtime_ns for page in sorted(folder.glob("*.html"))}


def as_text(result: dict[str, Any]) -> str:
    """The result of `render` as text for the terminal."""
    lines = [*result["pages"], *(f"{address}: not drawn: {reason}" for address, reason in result["skipped"].items())]
    return "\n".join(lines) or "no stage with pages has run yet"
