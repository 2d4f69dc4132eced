"""The history of a training, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainingHistory:
    """Record of a training, in order."""

    curve: list[dict[str, float]] = field(default_factory=list)
    """{"step", "loss", "learning_rate", "grad_norm", "tokens": so far, ...} at every step, {"step", "validation_loss",
    ...} before the first step and after each epoch. "tokens_per_second" is a recent average, for monitoring only."""
    seen: list[tuple[int, int, int]] = field(default_factory=list)
    """(step from 1, epoch from 1, row of the training split) of each trained row."""
    tokens: int = 0
    trained_tokens: int = 0
    """Number of tokens in the loss."""
    best_step: int | None = None
    """The step whose weights were kept, with `load_best_model_at_end`."""
    seconds: float = 0.0
    """Wall time, including earlier parts of an interrupted training. For the log only."""

    @property
    def losses(self) -> list[float]:
        return [point["loss"] for point in self.curve if "loss" in point]

    @property
    def validation(self) -> list[tuple[int, float]]:
        """(step, validation loss)."""
        return [(int(point["step"]), point["validation_loss"]) for point in self.curve if "validation_loss" in point]

    @property
    def step(self) -> int:
        return len(self.losses)

    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss after the first step, the earliest if several are equal."""
        return min((point for point in self.validation if point[0]), key=lambda point: point[1], default=None)

    def stalled(self, patience: int | None) -> bool:
        """Whether the validation loss has not fallen for `patience` epochs."""
        best = self.best()
        if patience is None or best is None:
            return False
        return sum(step > best[0] for step, _ in self.validation) >= patience

    def rows_of(self, step: int) -> list[int]:
        """Rows of one training step."""
        return [row for at, _, row in self.seen if at == step]
