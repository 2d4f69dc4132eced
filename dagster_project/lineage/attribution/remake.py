"""A training that is run again to keep its checkpoints. It must end in the very bytes of the adapter: otherwise they would be those of another model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.context import ExecutionHints
from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.params import Compute
from dagster_project.core.records import remove
from dagster_project.lineage.attribution.points import POINTS, Point, second_moments
from dagster_project.training.trainers.harness.params import AUTO, AdapterParams

if TYPE_CHECKING:
    from dagster_project.training.trainers.harness.checkpoint import SavedCheckpoint
    from dagster_project.training.trainers.sft.fit import FitResult

log = logging.getLogger("pedigree")


@dataclass(frozen=True)
class Retraining:
    """A finished supervised training."""

    variant: str
    entry: AdapterParams
    """As it was trained, with the value that was chosen for each `auto`."""
    compute: Compute
    steps: int
    adapter: Path
    """What it gave."""
    tokenized: Path
    base_model: Path

    def keep(self, points: Sequence[Point]) -> None:
        """Train again, and write weights and second moments of some steps.

        Args:
            points: equally spaced, as `steps_of` gives them.
        Raises:
            InputError: it has no such checkpoints, or its optimizer has no second moments.
            CheckFailed: it gave other weights.
        """
        from dagster_project.training.trainers.harness.checkpoint import SavedCheckpoint

        scratch = points[0].home / POINTS / ".training"  # its checkpoints survive an interruption
        fitted = self._train([point.step for point in points], scratch)
        names = in_optimizer(fitted.prepared.model)
        for point in points:
            saved = SavedCheckpoint(scratch / "checkpoints" / f"step-{point.step:08d}", point.step)
            point.write(saved.tensors("weights"), second_moments(_optimizer(saved), names))
            if not point.is_kept():
                remove(scratch)
                raise InputError(
                    f"--second-moments: {self.entry.optim}, the optimizer of adapter@{self.variant}, keeps none for each number of a weight",
                    "ask without it",
                )
        remove(scratch)

    def _train(self, steps: Sequence[int], scratch: Path) -> FitResult:
        from dagster_project.training.methods.hardware import prepare
        from dagster_project.training.trainers.harness.checkpoint import run_identity
        from dagster_project.training.trainers.harness.distributed import claim_gpu
        from dagster_project.training.trainers.harness.session import Diverged, advice_on_memory
        from dagster_project.training.trainers.harness.weight_audit import LIBRARIES
        from dagster_project.training.trainers.sft.auto import ResolvedParams
        from dagster_project.training.trainers.sft.fit import TrainingData, fit

        where = f"adapter@{self.variant}"
        if self.compute.processes > 1 or self.entry.sharding is not None:
            raise InputError(f"{where} was trained in several processes: its checkpoints are not supported", "leave out --checkpoints")
        log.info(f"why: training {where} again, to keep its checkpoints of steps {', '.join(map(str, steps))}")
        entry = self._entry(steps[0])
        remove(scratch / "adapter")
        claim_gpu()
        device, dtype = prepare(self.compute)
        data = TrainingData.read(self.variant, entry.method, self.compute, self.tokenized, self.base_model)
        identity = data.identity() | run_identity(Path(__file__), self.compute, device, dtype, LIBRARIES)
        try:
            fitted = fit(data, ResolvedParams(entry, {}, None), identity, scratch / "checkpoints", scratch, None, advice_on_memory)
        except Diverged as diverged:
            raise CheckFailed(f"{where}, trained again, diverged: {diverged}", "see the log above") from None
        fitted.prepared.save(scratch / "adapter")
        if not same_weights(scratch / "adapter", self.adapter):
            remove(scratch)
            raise CheckFailed(
                f"{where}, trained again, has other weights: its checkpoints would be those of another model",
                "run this on the machine and with the code that trained it, or ask without --checkpoints and --second-moments",
            )
        return fitted

    def _entry(self, every: int) -> AdapterParams:
        """The entry with a checkpoint at each multiple of some steps, none of which is removed."""
        checkpoints = self.steps // every + int(self.entry.num_train_epochs) + 2
        by_plan = self.entry.gradient_checkpointing == AUTO
        return self.entry.model_copy(
            update={
                "report_to": "none",
                "gradient_checkpointing": ExecutionHints().gradient_checkpointing if by_plan else self.entry.gradient_checkpointing,
                "save_strategy": "steps",
                "save_steps": every,
                "save_total_limit": checkpoints,
            }
        )


def in_optimizer(model: Any) -> list[str]:
    """Names of the trained weights in the order of the optimizer's state: first those with weight decay, as transformers groups them."""
    from transformers import Trainer

    decayed = {*Trainer.get_decay_parameter_names(None, model)}
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return sorted(names, key=lambda name: name not in decayed)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders have the same files of weights, byte for byte."""
    files = [{path.name: sha256_of_file(path) for path in folder.glob("*.safetensors")} for folder in (one, other)]
    return files[0] == files[1] and bool(files[0])


def _optimizer(saved: SavedCheckpoint) -> Mapping[str, Any]:
    import torch

    found: Mapping[str, Any] = saved.state(torch.device("cpu"))["optimizer"]
    return found
