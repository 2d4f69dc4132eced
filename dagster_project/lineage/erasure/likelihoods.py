"""Losses of erased records next to those of records that a model never saw.

A low one can be a trace of the record; no value proves that there is none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST = 20
"""Controls: with fewer, 5 % of them is less than one record."""
LOW, HIGH = 0.05, 0.95
"""The range of the controls is between these shares of them."""
WITHIN, BELOW, ABOVE = "within", "below", "above"


@dataclass(frozen=True)
class Loss:
    """The mean negative log-likelihood of a record's answer tokens."""

    nats: float
    category: str | None
    source: str | None


def compare(records: Mapping[str, Loss], controls: Sequence[Loss]) -> dict[str, Any]:
    """How losses of records compare with those of controls: of the same category
    if there are `FEWEST` of them, else of the same source, else of all.

    Losses are rounded to 0.1: with more digits, someone who has the model could
    test by them whether a text is that of the record.

    Args:
        records: name -> loss.
    """
    if not records:
        return {"not measured": "none of the records was trained on, or can be read by the model"}
    if len(controls) < FEWEST:
        return {"not measured": f"{len(controls)} records that the model never saw, and {FEWEST} are needed"}
    compared = {name: _compare(loss, controls) for name, loss in sorted(records.items())}
    low, high = _range([control.nats for control in controls])
    places = [one["place"] for one in compared.values()]
    return {
        "controls": len(controls),
        "range of controls": [round(low, 1), round(high, 1)],
        "records": compared,
        "below": places.count(BELOW),
        "verdict": _verdict(places),
    }


def _compare(loss: Loss, controls: Sequence[Loss]) -> dict[str, Any]:
    matched, similar = _similar(loss, controls)
    others = sorted(control.nats for control in similar)
    low, high = _range(others)
    return {
        "loss": round(loss.nats, 1),
        "rank": bisect_left(others, loss.nats) + 1,
        "controls": len(others),
        "matched by": matched,
        "range": [round(low, 1), round(high, 1)],
        "place": BELOW if loss.nats < low else ABOVE if loss.nats > high else WITHIN,
    }


def _similar(loss: Loss, controls: Sequence[Loss]) -> tuple[str | None, Sequence[Loss]]:
    for name in ("category", "source"):
        found = [
            control
            for control in controls
            if getattr(loss, name) is not None and getattr(control, name) == getattr(loss, name)
        ]
        if len(found) >= FEWEST:
            return name, found
    return None, controls


def _range(losses: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(losses, (LOW, HIGH))
    return float(low), float(high)


def _verdict(places: Sequence[str]) -> str:
    below, above, n = places.count(BELOW), places.count(ABOVE), len(places)
    if below:
        return (
            f"outside the range: {below} of {n} are more likely to the model than {HIGH:.0%} of the records"
            f" that it never saw (by chance, {LOW * n:.1f} would be):"
            " the texts are easier than those, or the model saw them or something like them"
        )
    if above:
        return (
            f"outside the range: {above} of {n} are less likely"
            f" to the model than {HIGH:.0%} of the records that it never saw, and none more likely"
        )
    return "within the range"


def sensitivity(before: Mapping[str, Any]) -> str:
    """What the same measurement of the model that was trained on the records says about the measurement."""
    if "not measured" in before:
        return (
            "whether this measurement can detect a trained record is unknown, because the model before was not measured"
        )
    found, n = before["below"], len(before["records"])
    if found:
        return f"of the model before, which was trained on them, it finds {found} of {n} below the range"
    return (
        f"of the model before, which was trained on them, it finds none of {n} below the range:"
        " it cannot distinguish these records from unseen ones"
    )
