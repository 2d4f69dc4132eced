"""Names of a DVC project's stages, definitions and sources in Dagster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dagster as dg


def asset_key(address: str, prefix: Sequence[str] = ()) -> dg.AssetKey:
    """ "train@small" -> train / small."""
    return dg.AssetKey([*prefix, *address.split("@")])


def definition_key(address: str, prefix: Sequence[str] = ()) -> dg.AssetKey:
    """ "train@small" -> def / train / small: command, parameters and code of the stage."""
    return dg.AssetKey([*prefix, "def", *address.split("@")])


def source_key(path: str, prefix: Sequence[str] = ()) -> dg.AssetKey:
    """ "data/raw.csv" -> workspace / data / raw.csv: a file or folder that no stage writes."""
    return dg.AssetKey([*prefix, "workspace", *Path(path).parts])


def address_of(key: dg.AssetKey, prefix: Sequence[str] = ()) -> str:
    """The inverse of `asset_key`."""
    return "@".join(key.path[len(prefix) :])
