"""Repeats a training to store its checkpoints.

Nothing is stored unless the final weights equal those of the adapter byte for byte.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.params import Compute
from dagster_project.core.records import remove
from dagster_project.lineage.attribution.points import POINTS, Point, second_moments
from dagster_project.training.trainers.harness.checkpoint import MARKER, SavedCheckpoint
from dagster_project.training.trainers.harness.params import AUTO, AdapterParams

if TYPE_CHECKING:
    import torch

    from dagster_project.training.trainers.sft.fit import FitResult

log = logging.getLogger("pedigree")

WITH_MOMENTS = ("adamw_torch", "adamw_torch_fused")
"""Optimizers that have a second moment for each element of a weight, in float32."""
SPARE = 3
"""Checkpoints to keep beyond the stored ones: each interruption writes one."""


class ParamsWithCheckpoints(AdapterParams):
    """An entry whose training writes a checkpoint at some steps.

    They are part of its identity, so a training interrupted with others is not resumed.
    """

    checkpoint_steps: tuple[int, ...] = ()

    def saves_at(self, step: int) -> bool:
        return step in self.checkpoint_steps

    def saves_after_epoch(self, step: int, last: bool) -> bool:
        return step in self.checkpoint_steps


@dataclass(frozen=True)
class Retraining:
    """A finished supervised training."""

    variant: str
    entry: AdapterParams
    """As it was trained, with the value that was chosen for each `auto`."""
    compute: Compute
    training: Mapping[str, Any]
    """training.json of the adapter."""
    adapter: Path
    """Folder of the trained adapter."""
    tokenized: Path
    base_model: Path

    @property
    def address(self) -> str:
        return f"adapter@{self.variant}"

    @property
    def _optimizer_name(self) -> str:
        return str(self.training["settings"]["optim"])

    def refuse_unsupported(self, scaled: bool) -> None:
        """Args:
            scaled: whether second moments are needed.
        Raises:
            InputError: the training has no such checkpoints.
        """
        where, optim = self.address, self._optimizer_name
        if self.compute.processes > 1 or self.entry.sharding is not None:
            raise InputError(
                f"{where} was trained in several processes, whose checkpoints are not supported",
                "ask about the end alone",
            )
        if self.entry.method.lower() == "adalora":
            raise InputError(
                f"{where}: checkpoints of adalora do not contain the weights that it saves", "ask about the end alone"
            )
        if scaled and optim not in WITH_MOMENTS:
            raise InputError(
                f"--second-moments: {optim}, the optimizer of {where},"
                f" is not supported: {' and '.join(WITH_MOMENTS)} are",
                "leave it out",
            )

    def write_points(self, points: Sequence[Point]) -> None:
        """Train again, and write weights and, where the optimizer has them, second moments of some steps.

        Raises:
            InputError: as `refuse_unsupported`.
            CheckFailed: the final weights differ.
        """
        self.refuse_unsupported(any(point.scaled for point in points))
        scratch = points[0].model_store / POINTS / ".training"  # it survives an interruption
        steps = [point.step for point in points]
        fitted = self._train(steps, scratch)
        if any(_verified(scratch, step) is None for step in steps):  # damaged, or removed after many interruptions
            remove(scratch)
            fitted = self._train(steps, scratch)
        names = optimizer_order(fitted.prepared.model)
        for point in points:
            saved = _verified(scratch, point.step)
            assert saved is not None, point.step
            weights = saved.tensors("weights")
            moments = (
                second_moments(_optimizer(saved), weights, names) if self._optimizer_name in WITH_MOMENTS else None
            )
            point.write(weights, moments)
        remove(scratch)

    def _train(self, steps: Sequence[int], scratch: Path) -> FitResult:
        from dagster_project.training.methods.hardware import prepare
        from dagster_project.training.trainers.harness.checkpoint import run_identity
        from dagster_project.training.trainers.harness.distributed import claim_gpu
        from dagster_project.training.trainers.harness.session import Diverged, advice_on_memory
        from dagster_project.training.trainers.harness.weight_audit import LIBRARIES
        from dagster_project.training.trainers.sft.auto import ResolvedParams
        from dagster_project.training.trainers.sft.fit import TrainingData, fit

        log.info(f"why: training {self.address} again, for checkpoints of steps {', '.join(map(str, steps))}")
        remove(scratch / "adapter")
        claim_gpu()
        device, dtype = prepare(self.compute)
        entry = self._entry(steps, (device, dtype))
        data = TrainingData.read(self.variant, entry.method, self.compute, self.tokenized, self.base_model)
        identity = data.identity() | run_identity(Path(__file__), self.compute, device, dtype, LIBRARIES)
        try:
            fitted = fit(
                data,
                ResolvedParams(entry, {}, None),
                identity,
                scratch / "checkpoints",
                scratch,
                None,
                advice_on_memory,
            )
        except Diverged as diverged:
            raise CheckFailed(
                f"{self.address}: the repeated training diverged: {diverged}", "see the log above"
            ) from None
        fitted.prepared.save(scratch / "adapter")
        if not same_weights(scratch / "adapter", self.adapter):
            remove(scratch)
            raise CheckFailed(
                f"{self.address}: the repeated training ended with other weights, so no checkpoints were stored",
                "run this on the machine and with the code that trained it, or ask about the end alone",
            )
        return fitted

    def _entry(self, steps: Sequence[int], target: tuple[Any, Any]) -> ParamsWithCheckpoints:
        checkpointing = self.entry.gradient_checkpointing
        if checkpointing == AUTO:  # decided for each run, by the free memory
            from dagster_project.training.planning.hints import forecast_training

            where = f"adapter.{self.variant}"
            checkpointing = forecast_training(
                self.entry, self.tokenized, self.base_model, 1, target, where
            ).hints.gradient_checkpointing
        values = self.entry.model_dump(warnings=False) | {"report_to": "none", "gradient_checkpointing": checkpointing}
        return ParamsWithCheckpoints.model_validate(
            values | {"checkpoint_steps": tuple(steps), "save_total_limit": len(steps) + SPARE}
        )


def optimizer_order(model: torch.nn.Module) -> list[str]:
    """Names of the trained weights in the order of the optimizer's state.

    First those with weight decay, as transformers groups them.
    """
    from transformers import Trainer

    decayed = {*Trainer.get_decay_parameter_names(None, model)}
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return sorted(names, key=lambda name: name not in decayed)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders have the same files of weights, byte for byte."""
    files = [{path.name: sha256_of_file(path) for path in folder.glob("*.safetensors")} for folder in (one, other)]
    return files[0] == files[1] and bool(files[0])


def _verified(scratch: Path, step: int) -> SavedCheckpoint | None:
    """The checkpoint of a step; None if it is missing, incomplete or damaged."""
    folder = scratch / "checkpoints" / f"step-{step:08d}"
    try:
        files = json.loads((folder / MARKER).read_text())["files"]
        intact = all(sha256_of_file(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return None
    return SavedCheckpoint(folder, step) if intact else None


def _optimizer(saved: SavedCheckpoint) -> Mapping[str, Any]:
    import torch

    found: Mapping[str, Any] = saved.state(torch.device("cpu"))["optimizer"]
    return found
