"""Coverage of the intervals of `comparison`, on simulated answers. usage: python benchmarks/intervals.py [--sets N]
[--out FILE]

An alternative to tuning and several variants answer the same examples. Whether an answer is right depends on how hard
its example is, with a correlation of CORRELATION between two systems. Variants are either as good as the alternative
(70 % right) or all 10 points better (accuracy alone: of macro-F1 only the difference 0 is known exactly). The table
says in how many test sets all intervals contain the true difference, and in how many equal ones at least one variant
seems to be better. With --out the table replaces the one in docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from tables import show  # noqa: E402

from dagster_project.evaluation.metrics import macro_f1  # noqa: E402
from dagster_project.evaluation.paired.bootstrap import (  # noqa: E402
    Combine,
    difference,
    drawn_differences,
    rate,
    simultaneous_intervals,
)

if TYPE_CHECKING:
    import numpy as np

RIGHT, GAIN, CORRELATION, LABELS = 0.7, 0.1, 0.5, 8
EXAMPLES, VARIANTS = (30, 100, 192), (1, 2, 8)


@dataclass
class Coverage:
    """What was seen in several test sets."""

    all_alone: int = 0
    """Test sets in which each of the intervals at 95 % contains the true difference."""
    all_simultaneous: int = 0
    seems_better: int = 0
    """Test sets in which some simultaneous interval is above 0."""

    def add(
        self, combine: Combine, alternative: np.ndarray, variants: Sequence[np.ndarray], true_difference: float
    ) -> None:
        """Args:
        alternative: contributions of its answers to the sums of the metric, (examples, k); `variants` likewise.
        """
        alone = [difference(combine, variant, alternative)["interval"] for variant in variants]
        drawn = [drawn_differences(combine, variant, alternative) for variant in variants]
        simultaneous = simultaneous_intervals(drawn)
        self.all_alone += all(low <= true_difference <= high for low, high in alone)
        self.all_simultaneous += all(low <= true_difference <= high for low, high in simultaneous)
        self.seems_better += any(low > 0 for low, _ in simultaneous)


def are_right(generator: np.random.Generator, shares: Sequence[float], examples: int) -> list[np.ndarray]:
    """Whether each system answers each example right, (examples,) each."""
    hard = generator.normal(size=examples)
    return [
        CORRELATION**0.5 * hard + (1 - CORRELATION) ** 0.5 * generator.normal(size=examples)
        < NormalDist().inv_cdf(share)
        for share in shares
    ]


def of_accuracy(right: np.ndarray) -> np.ndarray:
    """(examples, 2)."""
    import numpy as np

    return np.stack([right.astype(float), np.ones(len(right))], 1)


def of_macro_f1(generator: np.random.Generator, labels: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether each label is that of the example, that of the answer, and both, (examples, 3 * LABELS), as `macro_f1`
    takes them. A wrong answer is any other label."""
    import numpy as np

    answered = np.where(right, labels, (labels + generator.integers(1, LABELS, len(labels))) % LABELS)
    expected, actual = np.eye(LABELS)[labels], np.eye(LABELS)[answered]
    return np.concatenate([expected, actual, expected * actual], 1)


def measured(metric: str, examples: int, variants: int, gain: float, sets: int) -> Coverage:
    """Simulate test sets."""
    import numpy as np

    generator, found = np.random.default_rng(0), Coverage()
    for _ in range(sets):
        right = are_right(generator, [RIGHT, *[RIGHT + gain] * variants], examples)
        if metric == "accuracy":
            alternative, *others = map(of_accuracy, right)
            found.add(rate, alternative, others, gain)
        else:
            labels = generator.integers(0, LABELS, examples)
            alternative, *others = (of_macro_f1(generator, labels, one) for one in right)
            found.add(macro_f1, alternative, others, gain)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(" usage:")[0])
    parser.add_argument("--sets", type=int, default=1000, help="simulated test sets in each row")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for metric, gain in (("accuracy", 0.0), ("accuracy", GAIN), ("macro-F1", 0.0)):
        for examples in EXAMPLES:
            for variants in VARIANTS:
                found = measured(metric, examples, variants, gain, options.sets)
                cells = (found.all_alone, found.all_simultaneous, found.seems_better)
                shares = [f"{100 * count / options.sets:.1f} %" for count in cells]
                better = "-" if gain else shares[2]
                rows.append(f"| {metric} | {gain:g} | {examples} | {variants} | {shares[0]} | {shares[1]} | {better} |")
                print(rows[-1], file=sys.stderr, flush=True)
    table = "\n".join(
        [
            "| metric | true difference | examples | variants | all contained, each alone | all contained, simultaneous"
            " | some seems better |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            "",
            f"{options.sets} simulated test sets in each row; the share has a standard error of at most"
            f" {100 * (0.25 / options.sets) ** 0.5:.1f} points.",
            "",
        ]
    )
    show(options.out, "intervals", table)


if __name__ == "__main__":
    main()
