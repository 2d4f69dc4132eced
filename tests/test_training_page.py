"""The curves of a training: every value is visible, every line is named, and one sentence interprets them."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from dagster_project.training.trainers.harness.curve import Point
from dagster_project.views import html
from dagster_project.views.training import (
    RISE,
    _key_figures,
    axis,
    curve_figure,
    diagnosis,
    overfitting_since,
    smoothed,
)


def course(validation: dict[int, float], losses: list[float]) -> list[Point]:
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)] + [
        {"step": step, "validation_loss": loss} for step, loss in validation.items()
    ]


def plot(title: str, note: str, curve: list[Point], names: list[str]) -> str:
    return str(html.ENVIRONMENT.get_template("macros.jinja").module.figure(curve_figure(title, note, curve, names)))


FALLING = [2.0 - i / 20 for i in range(30)]


def heights(html: str) -> list[float]:
    return [
        float(place.split(",")[1])
        for line in re.findall('polyline class="[^"]*" points="([^"]*)"', html)
        for place in line.split()
    ]


def test_a_single_validation_loss_is_not_called_missing() -> None:
    """A training command may report one."""
    assert diagnosis(course({4: 1.0}, [2.0] * 4)).startswith("The validation loss was measured once")
    assert diagnosis(course({}, [2.0] * 4)).startswith("There is no validation loss")


def test_the_validation_loss_is_that_of_the_kept_weights() -> None:
    validation = [{"step": step, "validation_loss": loss} for step, loss in ((0, 3.0), (4, 1.5), (8, 2.0))]
    training = {"validation": validation, "steps": 8}
    for best, shown in (({}, "2.000"), ({"best_step": 4}, "1.500"), ({"best_step": None}, "2.000")):
        figures = _key_figures({**training, **best}, {"peak_memory_bytes": 1e9})
        assert ("validation loss", shown, "from 3.000") in figures


@pytest.mark.parametrize(
    "values", [[-3.0, 1.0], [-9.0, -1.0], [-5.0, -4.5], [0.0, -2.0], [-1e-3, 5e3], [2.0], [-2.0], [0.0, 0.0]]
)
def test_negative_values_are_inside_the_plot(values: list[float]) -> None:
    found = heights(plot("Reward", "", [{"step": i, "reward": value} for i, value in enumerate(values)], ["reward"]))
    assert len(found) == len(values) and all(0 <= y <= 186 for y in found)
    low, high = axis(values)
    assert low <= min(values) and max(values) <= high and low < high
    assert [a < b for a, b in pairwise(found)] == [a > b for a, b in pairwise(values)]


def test_an_axis_that_crosses_0_shows_where_0_is() -> None:
    shown = plot("Reward", "", [{"step": 1, "reward": -3.0}, {"step": 9, "reward": 1.0}], ["reward"])
    assert 'class="grid zero"' in shown and ">-3<" in shown
    assert 'class="grid zero"' not in plot("Loss", "", [{"step": 1, "loss": 3.0}, {"step": 9, "loss": 1.0}], ["loss"])


def test_limits_that_differ_little_have_different_labels() -> None:
    curve = [{"step": 0, "loss": 0.693147}, {"step": 6, "loss": 0.692899}]
    assert re.findall(r'text-anchor="end"[^>]*>([^<]+)</text>', plot("Loss", "", curve, ["loss"]))[:3] == [
        "0.6929",
        "0.693",
        "0.6931",
    ]


def test_large_negative_numbers_are_short_on_an_axis() -> None:
    assert [html.brief(value) for value in (-1200, -3e6, -0.25, 800)] == ["-1.2k", "-3M", "-0.25", "800"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (100_000, "100k"),
        (123_456, "123k"),
        (-250_000, "-250k"),
        (999_999, "1M"),
        (2.5e9, "2,500M"),
        (999.7, "1k"),
        (999, "999"),
        (99_400, "99k"),
    ],
)
def test_numbers_on_an_axis_have_no_exponent(value: float, shown: str) -> None:
    assert html.brief(value) == shown


@pytest.mark.parametrize("last", [1, 2, 3, 5, 420])
def test_the_steps_below_a_curve_are_at_their_places(last: int) -> None:
    shown = plot("Loss", "", [{"step": step, "loss": 1.0 + step} for step in range(last + 1)], ["loss"])
    ticks = re.findall(r'<text class="tick" x="([\d.]+)%" y="196"[^>]*>(\d+)<', shown)
    assert len(ticks) == min(3, last + 1)
    assert [float(x) for x, _ in ticks] == pytest.approx([12 + 88 * int(step) / last for _, step in ticks], abs=0.01)


def test_values_that_are_not_finite_are_counted_and_do_not_bend_the_axis() -> None:
    shown = plot("KL", "of it", [{"step": 1, "kl": 1.0}, {"step": 2, "kl": math.inf}, {"step": 3, "kl": 2.0}], ["kl"])
    assert len(heights(shown)) == 2 and "of it; 1 value not finite, not drawn" in shown


def test_a_single_point_is_visible() -> None:
    assert "<circle" in plot("Loss", "", [{"step": 1, "loss": 1.0}], ["loss"])


def test_several_lines_have_a_legend_and_one_has_none() -> None:
    curve = course({0: 2.0, 30: 1.0}, FALLING)
    legend = re.findall(
        '<li class="[^"]*">([^<]*)</li>',
        plot("Loss", "", [*curve, *smoothed(curve)], ["loss", "smoothed_loss", "validation_loss"]),
    )
    assert legend == ["training loss of a step", "training loss, smoothed", "validation loss"]
    assert "legend" not in plot("Loss", "", curve, ["loss"])


def test_the_smoothed_loss_is_a_mean_of_the_losses_so_far() -> None:
    found = [point["smoothed_loss"] for point in smoothed(course({}, [4.0, 4.0, 4.0]))]
    assert found == pytest.approx([4.0, 4.0, 4.0])
    noisy = [point["smoothed_loss"] for point in smoothed(course({}, [1.0, 3.0] * 40))]
    assert max(noisy[40:]) - min(noisy[40:]) < 0.25


@pytest.mark.parametrize(
    ("validation", "losses", "since"),
    [
        ({0: 3.0, 10: 1.0, 20: 1.2, 30: 1.4}, FALLING, 10),
        ({0: 3.0, 10: 1.0, 20: 1.4, 30: 1.0}, FALLING, None),
        ({0: 3.0, 10: 1.0, 30: 1.0 + RISE}, FALLING, None),
        ({0: 3.0, 10: 1.0, 30: 1.0 + 2 * RISE}, FALLING, 10),
        ({0: 3.0, 10: 1.0, 30: 1.5}, FALLING[::-1], None),
        ({0: 1.0, 30: 1.5}, FALLING, 0),
        ({0: 3.0, 30: 1.0}, FALLING, None),
        ({}, FALLING, None),
        ({0: 1.0, 30: 2.0}, [], None),
    ],
    ids=[
        "since the lowest",
        "back down",
        "within noise",
        "beyond noise",
        "training rose too",
        "from the start",
        "falls",
        "none",
        "no step",
    ],
)
def test_overfitting_is_a_validation_loss_that_rose_while_the_training_loss_fell(
    validation: dict[int, float], losses: list[float], since: int | None
) -> None:
    assert overfitting_since(course(validation, losses)) == since
    assert diagnosis(course(validation, losses)).startswith("Overfitting since step") == (since is not None)


def test_overfitting_needs_no_change_if_the_best_weights_were_kept() -> None:
    curve = course({0: 3.0, 10: 1.0, 30: 1.5}, FALLING)
    assert "load_best_model_at_end" in diagnosis(curve) and diagnosis(curve, 10).endswith(
        "The weights of step 10 were kept."
    )


@pytest.mark.parametrize(
    ("validation", "losses", "words"),
    [
        ({}, FALLING, "set splits.validation above 0"),
        (
            {0: 3.0, 10: 2.0, 30: 1.0},
            FALLING,
            "No overfitting: the validation loss fell from 3.000 to 1.000, and it was still falling",
        ),
        ({0: 3.0, 10: 1.001, 30: 1.0}, FALLING, "and it has converged"),
        ({0: 3.0, 10: 1.0, 30: 1.5}, FALLING[::-1], "Unstable: the validation loss was lowest at step 10"),
        ({0: 1.0, 30: 2.0}, FALLING[::-1], "Not learning: the validation loss rose from 1.000 to 2.000"),
        ({0: 1.0, 30: 1.0}, FALLING, "No change: the validation loss is 1.000 at the beginning and at the end."),
        (
            {0: 1.0, 15: 0.9999, 30: 1.0001},
            FALLING,
            "No change: the validation loss is 1.000 at the beginning and at the end.",
        ),
    ],
)
def test_the_page_interprets_the_curves_in_words(validation: dict[int, float], losses: list[float], words: str) -> None:
    assert words in diagnosis(course(validation, losses))
