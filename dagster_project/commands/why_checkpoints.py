"""`pedigree why --checkpoints` and `--second-moments`: the training is run again, must end in the adapter's very bytes, and its checkpoints are kept beside the
gradients of the model (docs/why.md)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.commands import why_calibration
from dagster_project.commands.why_model import Target
from dagster_project.commands.why_pairs import PairTarget
from dagster_project.commands.why_prove import same_weights
from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.records import remove
from dagster_project.lineage.attribution.points import END, POINTS, Point, Where, second_moments, steps_of

if TYPE_CHECKING:
    from dagster_project.training.trainers.harness.checkpoint import SavedCheckpoint
    from dagster_project.training.trainers.sft.fit import FitResult

log = logging.getLogger("pedigree")


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
        InputError: the training cannot be run again with checkpoints, or its optimizer has no second moments.
        CheckFailed: it gave other weights.
    """
    needed = [target.point for target in _at(found, where) if target.point]
    if not all(point.is_kept() for point in needed):
        with found.alone("pedigree why --index"):
            found.own()
            _keep(found, needed)


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


def _keep(found: Target, points: list[Point]) -> None:
    """Train again, and keep weights and second moments at some steps."""
    from dagster_project.training.trainers.harness.checkpoint import SavedCheckpoint

    scratch = found.store.folder / POINTS / ".training"  # its checkpoints survive an interruption
    checkpoints = scratch / "checkpoints"
    fitted = _train_again(found, [point.step for point in points], scratch)
    names = _in_optimizer(fitted)
    for point in points:
        saved = SavedCheckpoint(checkpoints / f"step-{point.step:08d}", point.step)
        point.write(saved.tensors("weights"), second_moments(_optimizer(saved), names))
        if point.scaled and not point.is_kept():
            remove(scratch)
            raise InputError(
                f"--second-moments: the optimizer of {found.run.address}, {found.entry.optim}, keeps none for each weight",
                "ask without it, or train with adamw_torch_fused",
            )
    remove(scratch)


def _train_again(found: Target, steps: list[int], scratch: Path) -> FitResult:
    """The training of an adapter, with the same result, and a checkpoint at some steps.

    Raises:
        InputError: it has no such checkpoints.
        CheckFailed: it gave other weights.
    """
    from dagster_project.stages.adapter import NO_HINTS
    from dagster_project.training.methods.hardware import prepare
    from dagster_project.training.trainers.harness.checkpoint import run_identity
    from dagster_project.training.trainers.harness.distributed import claim_gpu
    from dagster_project.training.trainers.harness.params import AUTO
    from dagster_project.training.trainers.harness.session import Diverged, advice_on_memory
    from dagster_project.training.trainers.harness.weight_audit import LIBRARIES
    from dagster_project.training.trainers.sft.auto import ResolvedParams
    from dagster_project.training.trainers.sft.fit import TrainingData, fit

    entry, compute = found.entry, found.compute
    if compute.processes > 1 or entry.sharding is not None:
        raise InputError(
            f"{found.run.address} was trained in several processes: its checkpoints are not supported", "leave out --checkpoints"
        )
    every = steps[0] if len(steps) > 1 else max(steps)
    hints = entry.gradient_checkpointing
    entry = entry.model_copy(
        update={
            "report_to": "none",
            "gradient_checkpointing": NO_HINTS.gradient_checkpointing if hints == AUTO else hints,
            "save_strategy": "steps",
            "save_steps": every,
            "save_total_limit": found.training["steps"] // every + int(entry.num_train_epochs) + 2,
        }
    )
    log.info(f"why: training {found.run.address} again, to keep its checkpoints of steps {', '.join(map(str, steps))}")
    remove(scratch / "adapter")
    claim_gpu()
    device, dtype = prepare(compute)
    data = TrainingData.read(found.variant, entry.method, compute, found.tokenized, found.base_model)
    identity = data.identity() | run_identity(Path(__file__), compute, device, dtype, LIBRARIES)
    try:
        fitted = fit(data, ResolvedParams(entry, {}, None), identity, scratch / "checkpoints", scratch, None, advice_on_memory)
    except Diverged as diverged:
        raise CheckFailed(f"the training diverged: {diverged}", "see the log above") from None
    fitted.prepared.save(scratch / "adapter")
    if not same_weights(scratch / "adapter", found.folder):
        remove(scratch)
        raise CheckFailed(
            f"{found.run.address}, trained again, has other weights: its checkpoints would be those of another model",
            "run this on the machine and with the code that trained it, or ask without --checkpoints and --second-moments",
        )
    return fitted


def _in_optimizer(fitted: FitResult) -> list[str]:
    """Names of the trained weights in the order of the optimizer's state: first those with weight decay, as transformers groups them."""
    from transformers import Trainer

    model = fitted.prepared.model
    decayed = {*Trainer.get_decay_parameter_names(None, model)}
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return sorted(names, key=lambda name: name not in decayed)


def _optimizer(saved: SavedCheckpoint) -> Mapping[str, Any]:
    import torch

    found: Mapping[str, Any] = saved.state(torch.device("cpu"))["optimizer"]
    return found
