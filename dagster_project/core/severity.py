"""How a finding is shown, on the data-quality page and in Dagster alike."""

from __future__ import annotations

from typing import Literal

Shown = Literal["error", "warn", "info"]


def shown(severity: Shown, passed: bool, count: int) -> Shown | None:
    """Severity that a person sees.

    A check passes when no row that breaks it is left: all were dropped or repaired. What was found is still shown, and
    an error as a warning.

    Args:
        severity: of the check.
        passed: no row that is kept breaks it.
        count: rows that broke it, dropped ones included and waived ones not.
    Returns:
        None if there is no finding.
    """
    if not passed:
        return severity
    if not count:
        return None
    return "warn" if severity == "error" else severity
