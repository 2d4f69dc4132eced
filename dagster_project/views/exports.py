"""The exports of one model -> one HTML page that lists them, with what each
shows and does not show, how it is checked, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from dagster_project.views.html import render

RELEASE: Mapping[str, tuple[str, str, str]] = {
    "README.md": (
        "model card",
        "how the model was made, measured and checked, as people read it",
        "the commit and the date: exports/README.md has them",
    ),
    "release.json": (
        "gate",
        "which checks decided on this release, with their results, scores and waivers",
        "that its numbers are right: that takes measuring the model again",
    ),
    "audit/audit.json": (
        "provenance",
        "sources, base model and stages with hashes, rows, licenses and results of checks",
        "that declarations of sources are true",
    ),
    "audit/*/training.json": (
        "training",
        "the settings of a training, and which weights it changed",
        "that the training gives these weights: that takes running it again",
    ),
    "audit/*/examples.parquet": (
        "training records",
        "every record of a training with the steps that saw it",
        "the records: ids are keyed by a secret of the project",
    ),
}
"""Pattern of a file in a release -> kind, what it shows, what it does not show."""


def exports_page(document: Mapping[str, Any]) -> str:
    """The page.

    Args:
        document: of `commands/export_all.py`.
    """
    model, signed, attested = document["model"], document.get("signature"), document.get("attestations")
    facts = [
        ("content", f"md5 {model['md5']}"),
        ("sha256", model.get("sha256") or "unknown"),
        ("issued", document["issued"]),
        ("commit", document["commit"] or "none is known that contains all code and parameters that ran"),
        ("signed by", f"key sha256 {signed['key']}" if signed else "not signed when this page was written"),
    ]
    files = document.get("release", [])
    release = [(one, text) for pattern, text in RELEASE.items() for one in files if fnmatch(one["file"], pattern)]
    sections: dict[str, Any] = {
        "Missing": document["missing"],
        "Signature": signed and attested and (signed, attested),
        "Release": release,
        "Exports": document["exports"],
        "Checks": True,
    }
    return render(
        "exports.jinja",
        f"Exports of {model['stage']}",
        sections,
        stage=model["stage"],
        facts=facts,
        weights=len(files) - len(release),
        signed=bool(signed),
    )
