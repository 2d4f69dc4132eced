"""`pedigree why --checkpoints` and `--second-moments`: the training is run again, must end in the adapter's very bytes, and its checkpoints are kept beside the
gradients of the model (docs/why.md)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dagster_project.commands import why_calibration
from dagster_project.commands.why_model import Target
from dagster_project.commands.why_pairs import PairTarget
from dagster_project.core.errors import InputError
from dagster_project.lineage.attribution.points import END, Point, Where, steps_of
from dagster_project.lineage.attribution.remake import Retraining


def index(found: Target, where: Where) -> dict[str, Any]:
    """Compute what is missing at each point.

    Returns:
        {"folder", "records", "computed", "bytes", "questions"} as `why_calibration.index`, in sum over the points, and "steps", if there are others than the
        end of the training.
    Raises:
        InputError, CheckFailed: as `keep_checkpoints`.
    """
    keep_checkpoints(found, where)
    indexed = [why_calibration.index(target) for target in at_points(found, where)]
    sums = {name: sum(one[name] for one in indexed) for name in ("computed", "bytes")}
    steps = {} if where == END else {"steps": steps_of(found.training["steps"], where.checkpoints)}
    return indexed[-1] | sums | steps


def keep_checkpoints(found: Target, where: Where) -> None:
    """Train again, if checkpoints are needed that are not kept.

    Raises:
        InputError, CheckFailed: as `Retraining.keep`.
    """
    needed = [target.point for target in _at(found, where) if target.point]
    if not all(point.is_kept() for point in needed):
        with found.alone("pedigree why --index"):
            found.own()
            variant, steps = found.variant, found.training["steps"]
            Retraining(variant, found.entry, found.compute, steps, found.folder, found.tokenized, found.base_model).keep(needed)


def at_points(found: Target, where: Where) -> list[Target]:
    """The model at each point, in the order of the training; the end as it was saved alone by default.

    Raises:
        InputError: a checkpoint is missing.
    """
    targets = _at(found, where)
    if any(target.point and not target.point.is_kept() for target in targets):
        raise InputError(f"the checkpoints of {found.run.address} are missing or damaged", "add --index to train again and keep them")
    return targets


def _at(found: Target, where: Where) -> list[Target]:
    if where == END:
        return [found]
    if isinstance(found, PairTarget):
        raise InputError(
            f"{found.run.address} was trained on pairs, and only supervised trainings are run again", "leave out --checkpoints"
        )
    steps = steps_of(found.training["steps"], where.checkpoints)
    points = [Point(found.store.folder, step, step == steps[-1], where.second_moments) for step in steps]
    return [found if point.at_end and not point.scaled else replace(found, point=point) for point in points]
