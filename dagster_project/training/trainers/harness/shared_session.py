"""A training whose steps several processes share, each with a whole model or its part of a divided one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.params import Compute
from dagster_project.training.trainers.harness import checkpoint, distributed, sharding
from dagster_project.training.trainers.harness.checkpoint import Checkpoints, SavedCheckpoint
from dagster_project.training.trainers.harness.params import TrainingParams
from dagster_project.training.trainers.harness.session import Diverged, Session
from dagster_project.training.trainers.harness.weight_audit import trainable

if TYPE_CHECKING:
    import torch


class SharedSession(Session):
    """A training that several processes may share.

    Every process walks through the same batches in the same order, as a single process that accumulates all passes of a
    step. It computes its share of them (process n modulo the number of processes computes pass n), and gradients and
    losses are summed before the optimizer steps. So each row is used exactly once, and all processes have the same
    weights. Dropout in a pass depends only on the seed and the pass. Only the first process writes files, except for
    the parts of a divided model.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        params: TrainingParams,
        compute: Compute,
        checkpoints: Checkpoints | None,
        live: Path | None,
        metrics: Sequence[str],
    ) -> None:
        """
        Args:
            checkpoints: of the first process, which finds the one to resume from for all.
        """
        import torch

        kept, saved = newest(checkpoints)
        super().__init__(name, model, params, kept, saved, live, metrics)
        self.compute, self.process, self.shared = compute, distributed.place(), checkpoints
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.root: Any = None
        """The divided model, see `sharding.shard`; None if each process has a whole one."""
        self.batch: dict[str, Any] = {}
        """The batch of the current forward pass."""
        self.idles = False
        """Whether the current pass only takes part in that of another process."""
        # of the passes of the current step; zero for a pass of another process
        self._step_losses: list[torch.Tensor] = []
        self._step_rows: list[list[int]] = []
        self._validation_passes = 0

    # passes

    def share_pass(
        self, rows: list[int], step: int, forward_backward: Callable[[], torch.Tensor], last: bool
    ) -> torch.Tensor:
        """One forward and backward pass, in its process.

        Args:
            rows: of the training split.
            step: from 1.
            forward_backward: computes the pass and returns its loss, for the log.
            last: the optimizer steps after this pass.
        Returns:
            The loss that the Trainer logs: that of the whole step in its last pass, else 0.
        """
        import torch

        number = len(self._step_rows)
        if self.process.size > 1:
            torch.manual_seed(distributed.seed_of(self.compute.seed, step, number))
        self._step_rows.append(rows)
        zero = torch.zeros((), device=self.device)
        self._step_losses.append(forward_backward() if self.process.does(number) else zero)
        if last and self.root is not None and self._lacks_a_pass(number + 1):
            with self._idle():
                forward_backward()
        if not last:
            return torch.zeros_like(self._step_losses[0])
        losses = distributed.summed(torch.stack(self._step_losses))
        for loss, rows in zip(losses, self._step_rows, strict=True):
            if not torch.isfinite(loss):
                raise Diverged(f"the loss is {float(loss)}", step, rows)
        if self.root is None:
            distributed.sum_gradients(list(trainable(self.model).values()))
        self._step_losses.clear()
        self._step_rows.clear()
        return sum(losses)  # sequentially, as the Trainer would

    def validates_here(self) -> bool:
        """Whether the next validation pass belongs to this process."""
        mine = self.process.does(self._validation_passes)
        self._validation_passes += 1
        return mine

    def end_validation(self, validate: Callable[[], object]) -> None:
        """Take part in the last pass of others, if they have computed one pass more than this process.

        Args:
            validate: computes the loss of a batch.
        """
        import torch

        if self.root is not None and self._lacks_a_pass(self._validation_passes):
            with self._idle(), torch.no_grad():
                validate()
        self._validation_passes = 0

    def _lacks_a_pass(self, passes: int) -> bool:
        """Whether others compute one pass more than this process. Sharded, it must take part in it."""
        return 0 < passes % self.process.size <= self.process.rank

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """While open, passes change neither gradients nor counts."""
        self.idles = True
        try:
            yield
        finally:
            self.idles = False

    # a divided model

    def divided(self, root: Any) -> None:
        """The model is divided now. All processes stop at the same step, because each writes its part of a checkpoint.

        Args:
            root: see `sharding.shard`.
        """
        self.root = root
        self.stop_requested = sharding.asked_first(self.stop_requested)

    def compute_loss(self, model: Any, work: Callable[[], Any]) -> Any:
        """The result of a function that computes a loss, or a tuple that begins with one.

        That of an idle pass is zero.
        """
        if self.root is None:
            return work()
        result = self.root(work)
        if not model.training:
            sharding.free_gathered(self.root)
        if not self.idles:
            return result
        return (result[0] * 0, *result[1:]) if isinstance(result, tuple) else result * 0

    def save(self, trainer: Any) -> None:
        if self.root is None:
            super().save(trainer)
            return
        assert self.shared
        optimizer, parts = sharding.split_optimizer(checkpoint.optimizer_state(trainer.optimizer))
        for name, tensors in {"weights": trainable(self.model), **self.method_tensors()}.items():
            parts |= sharding.named(name, tensors)
        first = partial(self.write, self.checkpoints, trainer, optimizer) if self.checkpoints else None
        sharding.save(parts, self.shared.unfinished(trainer.state.global_step), first)

    def restore_weights(self) -> None:
        if self.root is None:
            super().restore_weights()
            return
        self.read_parts("weights", trainable(self.model))

    def read_parts(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read this process' parts of tensors of the checkpoint into existing ones."""
        assert self.saved
        sharding.read(self.saved.folder, sharding.named(name, tensors))

    def restore_optimizer(self, optimizer: Any) -> None:
        super().restore_optimizer(optimizer)
        if self.root is not None:
            assert self.saved
            sharding.read(self.saved.folder, sharding.join_optimizer(optimizer, self.state["optimizer"]))


def newest(checkpoints: Checkpoints | None) -> tuple[Checkpoints | None, SavedCheckpoint | None]:
    """Folder of this process' checkpoints, and the checkpoint to resume from, which the first process finds for all."""
    import torch

    rank = distributed.place().rank
    saved = checkpoints.newest() if checkpoints and not rank else None
    step = int(distributed.from_first(torch.tensor(saved.step if saved else 0)))
    if rank:
        return None, checkpoints.at(step) if checkpoints and step else None
    return checkpoints, saved
