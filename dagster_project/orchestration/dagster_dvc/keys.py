"""Names of a DVC project's stages in Dagster."""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg


def asset_key(address: str, prefix: Sequence[str] = ()) -> dg.AssetKey:
    """ "train@small" -> train / small."""
    return dg.AssetKey([*prefix, *address.split("@")])
