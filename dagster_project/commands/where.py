"""`pedigree audit --where`: where each stage ran, the times of queue, transfer and computation, and the cost.

Recorded on the driver's machine only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dagster_project.core.context import measured
from dagster_project.core.hashing import md5_of_file
from dagster_project.core.layout import report_of
from dagster_project.lineage.history import workspace_lock


def where(root: Path, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Execution of each stage that ran on a cluster, by address.

    Args:
        stages: of the audit document. Those whose output is not the current one are omitted, because only the latest
            run is recorded: on a branch without dvc.lock all of them. So are those of which the report on disk, to
            which the measurements belong, is not the one that DVC recorded.
    """
    current = {
        address: {out.get("md5") for out in stage.get("outs", [])} for address, stage in workspace_lock(root).items()
    }
    executions: dict[str, Any] = {
        address: dict(measured(root, address)).get("execution")
        for address, stage in stages.items()
        if stage["md5"] in current.get(address, ())
        and (report := root / report_of(address)).is_file()
        and md5_of_file(report) in current[address]
    }
    return {address: execution for address, execution in executions.items() if execution}
