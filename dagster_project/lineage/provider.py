"""Section `provider` of params.yaml: what only a person can know of who publishes a model.

Exports print it; no stage reads it, and a change makes nothing stale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from dagster_project.core import params
from dagster_project.core.errors import InputError
from dagster_project.core.params import Section
from dagster_project.curation.sources.declarations import Date
from dagster_project.lineage.history import Revision


class Provider(Section):
    """Who publishes a model, and facts that no record of the project contains.
    `pedigree export` prints these values as they are, and missing ones as missing.
    No stage reads them, and a change makes no stage stale. See docs/exports.md."""

    legal_name: str | None = Field(default=None, min_length=1)
    """Legal name of the provider."""
    contact: str | None = Field(default=None, min_length=1)
    """Contact details: address, e-mail or web page."""
    representative: str | None = Field(default=None, min_length=1)
    """Authorized representative in the European Union with contact details, or that there is none."""
    model_name: str | None = Field(default=None, min_length=1)
    """Name and version under which the model is published."""
    download_url: str | None = Field(default=None, pattern=r"^https?://\S+$")
    """Where the model can be downloaded."""
    base_model_summary: str | None = Field(default=None, min_length=1)
    """Where the public summary of the base model's training content is."""
    placed_on_market: Date | None = None
    """Date on which the model was placed on the market of the European Union, in quotes: `"2026-09-01"`."""
    continuous_training: bool | None = None
    """Whether the model is trained on new data continuously."""
    code_of_practice: bool | None = None
    """Whether the provider has signed the European Union's Code of Practice for general-purpose AI models."""
    rights_reservations: str | None = Field(default=None, min_length=1)
    """Measures to respect reservations of rights from text and data mining."""
    illegal_content: str | None = Field(default=None, min_length=1)
    """Measures to remove illegal content from the training data."""
    crawlers: str | None = Field(default=None, min_length=1)
    """Crawlers used for sources of category `crawled`: names, purposes, behavior, and sites."""
    user_services: str | None = Field(default=None, min_length=1)
    """Services or products from which sources of category `user` were collected."""


def provider(root: Path, rev: str | None) -> dict[str, Any]:
    """The values given in the section: in the workspace, or at a revision.

    They are statements about the publication, not part of the lineage.

    Raises:
        InputError: params.yaml cannot be read, or the section is invalid.
    """
    return params.parse(Provider, _values(root, rev).get("provider"), "provider").model_dump(
        mode="json", exclude_none=True
    )


def _values(root: Path, rev: str | None) -> dict[str, Any]:
    if rev is None:
        return params.read(root) if (root / "params.yaml").is_file() else {}
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe").load(Revision(root, rev).text("params.yaml") or "")
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"params.yaml at {rev} is not valid YAML: {why}", "name another revision with --rev") from None
    return values if isinstance(values, dict) else {}
