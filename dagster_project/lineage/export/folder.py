"""All exports of a model, with the document of a page that lists them."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from dagster_project.core.hashing import sha256_of_text
from dagster_project.lineage.export import registry
from dagster_project.lineage.export.data_sets import data_sets
from dagster_project.lineage.export.export import issue_date, refuse, summarize
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import find
from dagster_project.lineage.provider import provider

PAGE = "exports.html"
FOLDER = "exports"
"""Folder of the exports, next to the page."""


def all_formats(
    root: Path, model: str, rev: str | None = None, issued: date | None = None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Every format of a model.

    Args:
        issued: default: the date of the first commit that recorded the model.
    Returns:
        (file -> text, {"model", "issued", "commit": commit or None, "exports": [{"format", "file", "sha256", "shows",
        "shows_not"}], "missing": [{"name": format, "why", "next", "package": library that is not installed}]}). A
        format is missing if it describes checked records and there are none, or if its library is not installed.
    Raises:
        InputError: as `export`.
    """
    subject = find(Index(root), model, rev)
    refuse(subject, model)
    day = issued or issue_date(subject)
    summary = summarize(subject) | {"data_sets": data_sets(subject), "provider": provider(root, subject.rev)}
    texts, listed, missing = dict[str, str](), [], list[dict[str, str]]()
    for form in registry.formats():
        chosen = registry.find(form)
        if chosen.data_sets and chosen.any_stage and not summary["data_sets"]:
            why = "the model was made from no checked data set, and this format describes those"
            missing.append(
                {"name": form, "why": why, "next": "run the pipeline with the stages instructions and splits"}
            )
            continue
        try:
            text = chosen.write(summary, day)
        except ModuleNotFoundError as error:
            package = error.name or ""
            if not package or package.startswith("dagster_project"):
                raise
            why = f"it requires {package}, which is not installed"
            missing.append({"name": form, "why": why, "next": f"install {package}", "package": package})
            continue
        file = f"{FOLDER}/{chosen.file}"
        texts[file] = text
        facts = {"file": file, "sha256": sha256_of_text(text), "shows": chosen.shows, "shows_not": chosen.shows_not}
        listed.append({"format": form, **facts})
    commit = summary["code"].get("lineage_at")
    document = {
        "model": summary["model"],
        "issued": day.isoformat(),
        "commit": commit,
        "exports": listed,
        "missing": missing,
    }
    return texts, document
