"""Displayed severity of a finding, on the data-quality page and in Dagster."""

from __future__ import annotations

from typing import Literal

Shown = Literal["error", "warn", "info"]


def shown(severity: Shown, passed: bool, count: int) -> Shown | None:
    """Displayed severity of a finding.

    A check passes if no row that violates it remains, because all were dropped or repaired. Its findings are still
    shown, errors as warnings.

    Args:
        severity: of the check.
        passed: no remaining row violates it.
        count: rows that violated it, including dropped but not waived ones.
    Returns:
        None if there is no finding.
    """
    if not passed:
        return severity
    if not count:
        return None
    return "warn" if severity == "error" else severity
