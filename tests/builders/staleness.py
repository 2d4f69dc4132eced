"""What Dagster calls stale."""

from __future__ import annotations

from typing import Any

import dagster as dg


def stale_keys(graph: Any, instance: dg.DagsterInstance) -> set[dg.AssetKey]:
    """The assets with a materialization of their own that Dagster does not call fresh.

    Args:
        graph: the asset graph of a code location.
    """
    from dagster._core.definitions.data_version import CachingStaleStatusResolver
    from dagster._core.loader import LoadingContextForTest
    from dagster._core.storage.event_log.base import AssetRecord

    context = LoadingContextForTest(instance)
    AssetRecord.prepare(context, graph.get_all_asset_keys())  # one query instead of one for each asset
    resolver = CachingStaleStatusResolver(instance, graph, context)
    return {key for key in graph.materializable_asset_keys if resolver.get_status(key).value != "FRESH"}
