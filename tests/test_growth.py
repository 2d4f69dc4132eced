"""The benchmark of growth finds the exponent that costs were made with, whatever starting costs."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from growth import exponent, table


@pytest.mark.parametrize("power", [0.5, 1.0, 1.15, 2.0])
def test_the_exponent_is_that_of_the_costs_above_those_of_starting(power: float) -> None:
    costs = {1: 3.0, **{size: 3.0 + 0.01 * (size - 1) ** power for size in (101, 1_001, 10_001, 100_001)}}
    assert exponent(costs) == pytest.approx(power)


def test_costs_that_do_not_grow_have_no_exponent() -> None:
    assert exponent({1: 3.0, 100: 3.01, 1_000: 2.99}) is None
    assert exponent({1: 3.0, 1_000: 30.0}) is None  # two sizes are no trend


def test_a_table_names_every_size_and_leaves_out_memory_that_was_not_measured() -> None:
    written = table({"impact": {1: (0.2, float("nan")), 11: (0.3, float("nan")), 101: (1.2, float("nan"))}}, "versions")
    assert written.splitlines()[-1] == "| impact | 0.20 | 0.30 | 1.20 | 1.00 |  |"
