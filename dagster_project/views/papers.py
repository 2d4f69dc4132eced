"""The papers of one model -> one HTML page that lists them, with what each
shows and does not show, how it is checked, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from dagster_project.core.text import number
from dagster_project.views.html import render

Paper = tuple[str, str, list[tuple[str, str]]]
"""File, its kind, and what the page says about it."""

RELEASE: Mapping[str, tuple[str, str, str]] = {
    "README.md": (
        "model card",
        "how the model was made, measured and checked, as people read it",
        "the commit and the date: papers/README.md has them",
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


def papers_page(document: Mapping[str, Any]) -> str:
    """The page.

    Args:
        document: of `commands/papers.py`.
    """
    model, key = document["model"], (document.get("signature") or {}).get("key")
    facts = [
        ("content", f"md5 {model['md5']}"),
        ("sha256", model.get("sha256") or "unknown"),
        ("issued", document["issued"]),
        ("commit", document["commit"] or "none is known that contains all code and parameters that ran"),
        ("signed by", f"key sha256 {key}" if key else "not signed when this page was written"),
    ]
    release = document.get("release", [])
    sections: dict[str, Any] = {
        "Missing": [(one["paper"], one["why"], one["next"]) for one in document["missing"]],
        "Signature": _signature(document),
        "Release": _release(release),
        "Exports": [
            (
                one["file"],
                one["format"],
                _facts(one["shows"], one["shows_not"], one["compared"], [("sha256", one["sha256"])]),
            )
            for one in document["exports"]
        ],
        "Checks": True,
    }
    listed = {file for file, _, _ in sections["Release"]}
    weights = len([one for one in release if one["file"] not in listed])
    return render(
        "papers.jinja",
        f"Papers of {model['stage']}",
        sections,
        stage=model["stage"],
        facts=facts,
        weights=weights,
        signed=bool(key),
    )


def _facts(
    shows: str, shows_not: str, compared: str, more: list[tuple[str, str]] | None = None
) -> list[tuple[str, str]]:
    checked = "nothing but its own hash, if the folder is signed"
    if compared:
        checked = f"{compared}, with files and other papers"
    return [("shows", shows), ("does not show", shows_not), ("compared", checked), *(more or [])]


def _release(files: list[Mapping[str, str]]) -> list[Paper]:
    found = [(one, text) for pattern, text in RELEASE.items() for one in files if fnmatch(one["file"], pattern)]
    return [(one["file"], kind, _facts(shows, shows_not, one["compared"])) for one, (kind, shows, shows_not) in found]


def _signature(document: Mapping[str, Any]) -> list[Paper]:
    """The signature, the attestations and the public key, where there are any."""
    signed, attested = document.get("signature"), document.get("attestations")
    if not signed or not attested:
        return []
    stages = attested["stages"]
    remade = "that these commands give these bytes: nobody made the model again before this was signed"
    if attested["remade"]:
        remade = f"made again from the sources before it was signed: {attested['remade']}"
    return [
        (
            signed["file"],
            "OpenSSF Model Signing 1.0",
            [
                (
                    "shows",
                    "that the holder of the key signed all files of this folder: one that was changed, added or"
                    " removed is found",
                ),
                ("does not show", "who holds the key, and that what the files state is true"),
                ("compared", "the sha256 of every file in this folder"),
            ],
        ),
        (
            attested["file"],
            "in-toto, SLSA Provenance 1",
            [
                (
                    "shows",
                    f"that the holder of the key states how each of {number(len(stages))} stages ran: command,"
                    f" parameters, and all files it read and made, by hash",
                ),
                *([("shows also", remade)] if attested["remade"] else []),
                ("does not show", "that the statements are true" if attested["remade"] else remade),
                (
                    "compared",
                    "the files of the model, what stages read with what the stages before them made, and"
                    " hashes in the other papers",
                ),
                ("sha256", attested["sha256"]),
            ],
        ),
        (
            signed["public_key"],
            "public key",
            [
                ("shows", f"the key, with sha256 {signed['key']}"),
                (
                    "does not show",
                    "whose key it is: obtain it from the signer through another channel, and give that one with --key",
                ),
            ],
        ),
    ]
