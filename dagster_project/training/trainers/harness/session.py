"""What all trainers built on transformers' Trainer share: exact resume, history, progress, clean stop, divergence.

A `Session` holds the state of one training, whose steps several processes may share. `ResumableTrainer` is the mixin
that routes the Trainer's checkpoints through it, `monitor` the callback that records the history and decides when to
save and when to stop, and `run_session` trains.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import Interrupted as Interrupted
from dagster_project.core.errors import PedigreeError
from dagster_project.core.params import Compute
from dagster_project.core.progress import Progress
from dagster_project.training.trainers.harness import checkpoint, distributed, sharding
from dagster_project.training.trainers.harness.checkpoint import Checkpoints, SavedCheckpoint
from dagster_project.training.trainers.harness.curve import live_writer
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.params import TrainingParams
from dagster_project.training.trainers.harness.weight_audit import trainable

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pedigree")


class OutOfMemory(PedigreeError):
    """A library could not allocate memory."""


class Diverged(Exception):
    """The loss or the gradient is NaN or infinite. Internal: the stage reports it with the examples of the step."""

    def __init__(self, what: str, step: int, rows: Sequence[int]) -> None:
        """
        Args:
            what: e.g. "the loss is nan".
            rows: rows of the training split in that step.
        """
        super().__init__(f"{what} at step {step}")
        self.rows = list(rows)


class Session:
    """One training in progress: model, history, checkpoints, progress. Several processes may share it.

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
            name: for progress lines, e.g. "dpo".
            model: its trainable weights are trained and saved in checkpoints.
            checkpoints: where the first process keeps them, and finds the one to resume from for all; None to keep
                none.
            live: folder for the curves so far; None to write none.
            metrics: names of the curves.
        """
        import torch

        self.name, self.model, self.params, self.compute, self.shared = name, model, params, compute, checkpoints
        self.checkpoints, self.saved = newest(checkpoints)
        self.state, self.history = {}, TrainingHistory()
        if self.saved:
            self.state = self.saved.state(model.device)
            seen = [(step, epoch, row) for step, epoch, row in self.state["seen"].tolist()]
            self.history = TrainingHistory(**self.saved.document("course"), seen=seen)
        self._began, self._earlier = time.monotonic(), self.history.seconds
        self.progress = Progress(name, 1, "step")
        self.progress.done, self.progress.start = self.history.step, self.progress.start - self._earlier
        self.show = live_writer(live, names=metrics) if live else lambda curve, now=False: None
        self.stop_requested: Callable[[], bool] = lambda: False
        self.process = distributed.place()
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

    # Methods for trainers to override.

    def step_point(self, step: int, logs: Mapping[str, float]) -> tuple[dict[str, float], str]:
        """The history's point of a step from the Trainer's logs, and a note for the progress line."""
        raise NotImplementedError

    def validation_point(self, step: int, logs: Mapping[str, float]) -> dict[str, float]:
        """The history's point of a validation from the Trainer's logs."""
        raise NotImplementedError

    def method_state(self) -> dict[str, Any]:
        """State of the method beyond weights, optimizer and random generators, for a checkpoint."""
        return {}

    def method_tensors(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """Further tensors of a checkpoint: file name (without suffix) -> name -> tensor."""
        return {}

    def restore_method(self) -> None:
        """Restore `method_state` from the checkpoint."""

    def step_begins(self) -> None:
        """Called before each optimizer step."""

    def validation_pass(self, step: int) -> None:
        """Called after each forward pass of a validation.

        Args:
            step: of the training; 0 before the first.
        """

    def validated(self, control: Any) -> None:
        """Called after each validation except the one before the first step."""

    def is_complete(self) -> bool:
        """Whether the restored checkpoint is that of a finished training."""
        return self.saved is not None and self.saved.step >= self.saved.document("trainer_state")["max_steps"]

    # Methods that the Trainer calls through `ResumableTrainer` and `monitor`.

    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._began

    def record(self, point: dict[str, float]) -> None:
        self.history.curve.append(point)
        self.show(self.history.curve)

    # Passes.

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

    # A divided model.

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

    # Checkpoints.

    def save(self, trainer: Any) -> None:
        """Write a checkpoint of the trainer's state, if checkpoints are kept; of a divided model, all processes do."""
        optimizer = checkpoint.optimizer_state(trainer.optimizer)
        if self.root is None:
            if self.checkpoints:
                self._write(trainer, optimizer)
            return
        assert self.shared
        optimizer, parts = sharding.split_optimizer(optimizer)
        for name, tensors in {"weights": trainable(self.model), **self.method_tensors()}.items():
            parts |= sharding.named(name, tensors)
        first = partial(self._write, trainer, optimizer) if self.checkpoints else None
        sharding.save(parts, self.shared.unfinished(trainer.state.global_step), first)

    def _write(self, trainer: Any, optimizer: Mapping[str, Any], parts: Callable[[Path], None] | None = None) -> None:
        """Write a checkpoint.

        Args:
            parts: writes the parts of all processes into a folder; then weights and further tensors are among them.
        """
        import torch

        assert self.checkpoints
        self.history.seconds = self.seconds()
        state = {
            "optimizer": optimizer,
            "schedule": trainer.lr_scheduler.state_dict(),
            "random": checkpoint.random_state(),
            **self.method_state(),
            "seen": torch.tensor(self.history.seen, dtype=torch.int32),
        }
        tensors = {} if parts else {"weights": trainable(self.model), **self.method_tensors()}
        course = {name: value for name, value in dataclasses.asdict(self.history).items() if name != "seen"}
        trainer_state = dataclasses.replace(trainer.state, log_history=[], stateful_callbacks=None)
        documents = {"course": course, "trainer_state": dataclasses.asdict(trainer_state)}
        self.checkpoints.save(trainer.state.global_step, state, tensors, documents, parts)

    def restore_optimizer(self, optimizer: Any) -> None:
        checkpoint.restore_optimizer(optimizer, self.state["optimizer"])
        if self.root is not None:
            assert self.saved
            sharding.read(self.saved.folder, sharding.join_optimizer(optimizer, self.state["optimizer"]))

    def restore_weights(self) -> None:
        assert self.saved
        if self.root is None:
            put(self.model, self.saved.tensors("weights"))
        else:
            self.read_parts("weights", trainable(self.model))

    def read_parts(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read this process' parts of tensors of the checkpoint into existing ones."""
        assert self.saved
        sharding.read(self.saved.folder, sharding.named(name, tensors))


def newest(checkpoints: Checkpoints | None) -> tuple[Checkpoints | None, SavedCheckpoint | None]:
    """Folder of this process' checkpoints, and the checkpoint to resume from, which the first process finds for all."""
    import torch

    rank = distributed.place().rank
    saved = checkpoints.newest() if checkpoints and not rank else None
    step = int(distributed.from_first(torch.tensor(saved.step if saved else 0)))
    if rank:
        return None, checkpoints.at(step) if checkpoints and step else None
    return checkpoints, saved


class ResumableTrainer:
    """Mixin for transformers' Trainer: its checkpoints are those of the session, and resume to the same bytes.

    Overrides private methods of transformers 5; `run_session` checks that they exist.
    """

    session: Session

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.session.save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.session.restore_weights()

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if self.session.saved:
            self.session.restore_optimizer(self.optimizer)  # type: ignore[attr-defined]
            self.lr_scheduler.load_state_dict(self.session.state["schedule"])  # type: ignore[attr-defined]
            self.session.restore_method()

    def _clip_grad_norm(self, model: Any) -> Any:
        return sharding.norm_value(super()._clip_grad_norm(model))  # type: ignore[misc]

    def _load_rng_state(self, folder: str | None) -> None:
        if self.session.saved:
            checkpoint.restore_random_state(self.session.state["random"])


@cache
def _monitor_class() -> type:
    from transformers import TrainerCallback

    class Monitor(TrainerCallback):
        """Records the history, and decides when to save and when to stop.

        At the end of an epoch a checkpoint is written after the validation, so that resuming from it skips none.
        """

        def __init__(self, session: Session) -> None:
            self.session = session

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.session.progress.total = state.max_steps

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.session.step_begins()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            session, logs, step = self.session, logs or {}, state.global_step
            if "loss" in logs:
                point, note = session.step_point(step, logs)
                session.history.curve.append(point)
                session.progress.advance(note=note)
                session.show(session.history.curve)
                if not math.isfinite(point["grad_norm"]):  # before the step can be saved
                    raise Diverged(f"the gradient is {point['grad_norm']}", step, session.history.rows_of(step))
            elif "eval_loss" in logs:
                point = session.validation_point(step, logs)
                session.record(point)
                log.info(f"{session.name}: step {step}, validation loss {point['validation_loss']:.3f}")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            stop = self.session.stop_requested()
            if stop:
                control.should_training_stop = True
            ends_epoch = state.global_step >= state.max_steps or float(state.epoch or 0).is_integer()
            control.should_save = not ends_epoch and (stop or self.session.params.saves_at(state.global_step))

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            session, step = self.session, state.global_step
            saves = session.stop_requested() or session.params.saves_after_epoch(step, step >= state.max_steps)
            control.should_save = saves

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not state.global_step:
                return
            self.session.validated(control)
            if self.session.stop_requested():
                control.should_training_stop = control.should_save = True

        def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.session.validation_pass(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.session.stop_requested():
                problem = f"interrupted at step {state.global_step}; the next run resumes from there"
                raise Interrupted(problem, "run the same command again")

    return Monitor


def monitor(session: Session) -> Any:
    """The transformers callback of a session."""
    return _monitor_class()(session)


def training_arguments(
    params: TrainingParams, compute: Compute, scratch: str, device: str, validates: bool
) -> dict[str, Any]:
    """Arguments for transformers' TrainingArguments shared by all trainers. The session saves checkpoints.

    From here on, variables of accelerate, which the Trainer would read in addition, are ignored.
    """
    distributed.ignore_accelerate_variables()
    names = (
        "learning_rate", "lr_scheduler_type", "num_train_epochs", "per_device_train_batch_size",
        "gradient_accumulation_steps", "optim", "weight_decay", "max_grad_norm",
    )  # fmt: skip
    return {
        "output_dir": scratch,
        "seed": compute.seed,
        "data_seed": compute.seed,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "epoch" if validates else "no",
        "use_cpu": device == "cpu",
        "bf16": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "per_device_eval_batch_size": params.per_device_train_batch_size,
        **{name: getattr(params, name) for name in names},
    }


def run_session(session: Session, trainer: Any, validates: bool) -> None:
    """Train, from the session's checkpoint if it has one.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        Diverged: a loss or a gradient is not finite. The checkpoints are older.
    """
    check_overrides(type(trainer))
    trainer.session = session
    for printer in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(printer)
    if session.saved:
        total = f" of {session.progress.total}" if session.progress.total > 1 else ""
        log.info(f"{session.name}: resuming from the checkpoint of step {session.saved.step}{total}")
    elif validates:
        trainer.evaluate()
    if session.is_complete():
        session.restore_weights()
        session.restore_method()
    else:
        trainer.train(resume_from_checkpoint=str(session.saved.folder) if session.saved else None)


def check_overrides(trainer: type) -> None:
    """Raise AssertionError if transformers has no such method any more, so that the override would never be called."""
    from transformers import Trainer, __version__

    names = [name for name in vars(ResumableTrainer) if name.startswith("_") and not name.startswith("__")]
    if missing := [f"Trainer.{name}" for name in names if not hasattr(Trainer, name)]:
        raise AssertionError(f"written for transformers 5.24: {__version__} has no {', '.join(missing)}")


@contextmanager
def advice_on_memory(advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn out-of-memory errors of any library into one message.

    Args:
        advice: specific advice, if available; else "" for the general one.
    Raises:
        OutOfMemory: with what to change.
    """
    import torch

    words = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        said = any(word in str(error).lower() for word in words)
        if not said and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        reason = (str(error).splitlines() or [""])[0]
        general = (
            "lower per_device_train_batch_size or set gradient_checkpointing: true;"
            " `pedigree plan` shows what a variant needs"
        )
        what = f"training ran out of memory{f' ({reason})' if reason else ''}"
        raise OutOfMemory(what, (advice and advice()) or general) from None


@contextmanager
def stop_on_request() -> Iterator[Callable[[], bool]]:
    """While open, the first SIGINT or SIGTERM only sets a flag, so that the loop stops where it can resume.

    Another one, at least a second later, interrupts. Only the first of several processes receives the request, from its
    launcher; the others stop with it.
    """
    asked: list[float] = []

    def ask(number: int, _: Any) -> None:
        if asked and time.monotonic() - asked[0] > 1:
            raise KeyboardInterrupt
        if not asked:
            log.warning("training: stopping after this step; interrupt again to stop immediately, without a checkpoint")
        asked.append(time.monotonic())

    if threading.current_thread() is not threading.main_thread() or distributed.place().rank:
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in distributed.stop_signals}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def put(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into the model's trainable parameters, all of them."""
    import torch

    parameters = trainable(model)
    if differing := sorted(set(parameters) ^ set(weights)):
        raise AssertionError(f"weights do not match the trainable parameters: {differing[:5]}")
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
