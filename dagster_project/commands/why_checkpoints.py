"""`pedigree why --checkpoints` and `--second-moments`: the model at several points of its training (docs/why.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dagster_project.commands import why_calibration
from dagster_project.commands.why_model import DerivedTarget, Target
from dagster_project.commands.why_pairs import PairTarget
from dagster_project.core.errors import InputError
from dagster_project.lineage.attribution.gradients import TrainedModel
from dagster_project.lineage.attribution.points import END_ONLY, Point, PointSelection, steps_of
from dagster_project.lineage.attribution.retraining import Retraining
from dagster_project.lineage.attribution.store import GradientStore


@dataclass(frozen=True)
class EarlierTarget(DerivedTarget):
    """A trained adapter at a point of its training."""

    point: Point

    @cached_property
    def store(self) -> GradientStore:
        return GradientStore(
            self.point.store, {**self.original.store.identity, **self.point.identity()}, len(self.records)
        )

    @cached_property
    def model(self) -> TrainedModel:
        """The loaded model, which belongs to this point alone: its weights are replaced in memory."""
        return self.load().at(self.point.weights(), self.point.scales()).weakened()


def index(found: Target, selection: PointSelection) -> dict[str, Any]:
    """Compute what is missing at each point.

    Returns:
        {"folder", "records", "computed", "bytes", "questions"} as `why_calibration.index`; "folder" is that of the
        model, "computed" and "bytes" are totals over all points. "steps" is absent for the end alone.
    Raises:
        InputError, CheckFailed: as `Retraining.write_points`.
    """
    points = _points(found, selection)
    # for all points: an erasure in between would remove those that are stored
    with found.alone("pedigree why --index"):
        if not all(point.is_complete() for point in points if point.needed):
            retraining = Retraining(
                found.variant,
                found.entry,
                found.compute,
                found.training,
                found.folder,
                found.tokenized,
                found.base_model,
            )
            retraining.refuse_unsupported(selection.scaled)  # before stores of earlier versions are deleted
            found.claim_store()
            retraining.write_points(points)
        indexed = [why_calibration.index(target) for target in _targets(found, points)]
    totals = {name: sum(one[name] for one in indexed) for name in ("computed", "bytes")}
    if selection == END_ONLY:
        return indexed[-1] | totals
    totals["bytes"] += sum(path.stat().st_size for point in points for path in point.folder.glob("*.safetensors"))
    folder = found.store.folder.relative_to(found.root).as_posix()
    return indexed[-1] | totals | {"folder": folder, "steps": [point.step for point in points]}


def at_points(found: Target, selection: PointSelection) -> Iterator[Target]:
    """The model at each point, in the order of the training; by default only the saved adapter.

    Models are loaded on first use: drop each before taking the next.

    Raises:
        InputError: a checkpoint is missing.
    """
    points = _points(found, selection)
    if not all(point.is_complete() for point in points):
        raise InputError(
            f"the checkpoints of {found.run.address} are missing or damaged",
            "add --index to train again and store them",
        )
    yield from _targets(found, points)


def steps_at(found: Target, selection: PointSelection) -> list[int]:
    return [point.step for point in _points(found, selection)]


def _targets(found: Target, points: list[Point]) -> Iterator[Target]:
    for point in points:
        if point.needed:
            yield EarlierTarget(found.root, found.asked, found.subject, found.run, found.place, found, point)
        else:
            yield found


def _points(found: Target, selection: PointSelection) -> list[Point]:
    if selection == END_ONLY:
        return [Point(found.store.folder, 0, at_end=True, scaled=False)]
    if isinstance(found, PairTarget):
        raise InputError(
            f"{found.run.address} was trained on pairs, and only supervised trainings are repeated",
            "leave out --checkpoints and --second-moments",
        )
    _ = found.entry  # refuses a training by a command
    last = found.training.get("best_step") or found.training["steps"]  # the step whose weights were saved
    steps = steps_of(last, selection.count)
    return [Point(found.store.folder, step, step == last, selection.scaled) for step in steps]
