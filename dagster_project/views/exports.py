"""The exports of one model -> one HTML page that lists them, with what each shows and does not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster_project.views.html import render


def exports_page(document: Mapping[str, Any]) -> str:
    """The page.

    Args:
        document: of `folder.all_formats`.
    """
    model = document["model"]
    facts = [
        ("content", f"md5 {model['md5']}"),
        ("sha256", model.get("sha256") or "unknown"),
        ("issued", document["issued"]),
        ("commit", document["commit"] or "none is known that contains all code and parameters that ran"),
    ]
    exports = [
        (one["file"], one["format"], [("shows", one["shows"]), ("does not show", one["shows_not"]), ("sha256", one["sha256"])])
        for one in document["exports"]
    ]
    return render("exports.jinja", f"Exports of {model['stage']}", {"Exports": exports, "Checks": True}, stage=model["stage"], facts=facts)
