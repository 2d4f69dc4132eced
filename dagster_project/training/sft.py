"""Supervised fine-tuning: TRL's SFTTrainer over rows that are already tokenized, labelled and packed. A killed run goes on where it was."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from dagster_project.chat import IGNORE
from dagster_project.errors import InputError, PedigreeError
from dagster_project.params import Compute, Section
from dagster_project.progress import Progress
from dagster_project.training import checkpoint, processes
from dagster_project.training.checkpoint import Checkpoints
from dagster_project.training.curve import live_writer
from dagster_project.training.hardware import giving_back
from dagster_project.training.methods import Tunable, apart
from dagster_project.training.proof import trainable

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pedigree")

Tracker = Literal["tensorboard", "wandb", "mlflow"]

AUTO = "auto"
"""What an entry may say instead of a number; training/auto.py puts one in its place before anything is trained."""


def _number_or_auto(value: Any, number: ValidatorFunctionWrapHandler) -> Any:
    if value == AUTO:
        return value
    try:
        return number(value)
    except ValidationError as error:
        raise ValueError(f"{error.errors()[0]['msg']}, or auto") from None


OrAuto = WrapValidator(_number_or_auto)

OPTIMIZER_MEMORY = {
    "adamw_torch": 2.0,
    "adamw_torch_fused": 2.0,
    "adamw_8bit": 0.6,
    "adafactor": 0.1,
    "adagrad": 1.0,
    "rmsprop": 1.0,
    "sgd": 0.0,
}
"""Optimizer -> what it remembers, as a multiple of the trainable weights in float32."""


class Recipe(Section):
    """How to train: the names are those of transformers' TrainingArguments."""

    learning_rate: Annotated[float, Field(gt=0), OrAuto] = 2e-4
    """Peak rate. Small models want more: 1e-3 suits 135M parameters. `auto` finds it by short trials on the validation loss."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr",
        "cosine_warmup_with_min_lr", "warmup_stable_decay",
    ] = "cosine"  # fmt: skip
    """Shape of the rate after warm-up, one of transformers' schedules."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """The schedule's own keys, e.g. {min_lr_rate: 0.1} for cosine_with_min_lr."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the rate rises to its peak."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps over which the rate rises, instead of `warmup_ratio`."""
    num_train_epochs: Annotated[int, Field(ge=1), OrAuto] = 2
    """Passes over the training split, or `auto`."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps after which to stop whatever the epochs say; null for no such limit."""
    per_device_train_batch_size: Annotated[int, Field(ge=1), OrAuto] = 1
    """Packed rows per forward pass, or `auto`."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""
    group_by_length: bool = False
    """Put rows of like length into one step. For rows of one example each (`tokenized.packing: false`)."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adafactor", "adagrad", "rmsprop", "sgd"] = "adamw_torch_fused"
    """The optimizer. adamw_8bit (bitsandbytes) and adafactor remember less and so need less memory."""
    weight_decay: float = Field(default=0.0, ge=0)
    """How fast weights shrink towards zero, as a share of the learning rate."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Longest gradient; longer ones are scaled down to it."""
    label_smoothing_factor: float = Field(default=0.0, ge=0, lt=1)
    """Probability that is spread over all other tokens in the training target. The validation loss is always the plain one."""
    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """Noise on the embeddings while training (NEFTune); 5 is usual. Scaled by the length of each example, not of the packed row."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Trade a third more time for memory that no longer grows with depth. `auto`: where the training would not fit otherwise. It changes no bit of the result."""
    compile: Literal["none", "layers"] = "none"
    """`layers` compiles each decoder layer with torch.compile: slower to start, faster per step. Needs a C++ compiler on a CPU."""
    use_liger_kernel: bool = False
    """Normalization, rotation and the gated MLP by Liger's fused kernels. The loss stays ours. Needs a GPU and `pip install 'pedigree[gpu]'`."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after this many epochs in a row without a lower validation loss; null to train to the end."""
    load_best_model_at_end: bool = False
    """Keep the weights of the epoch with the lowest validation loss instead of the last ones."""
    save_strategy: Literal["epoch", "steps", "no"] = "epoch"
    """When to write a checkpoint that an interrupted training goes on from. With `no`, only when it is stopped with Ctrl-C."""
    save_steps: int = Field(default=500, ge=1)
    """Steps between two checkpoints with `save_strategy: steps`."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints to keep. They are removed when the variant is done."""
    report_to: Literal["none"] | Tracker | list[Tracker] = "none"
    """Also show the curves in tensorboard, wandb or mlflow, if installed. They decide nothing and are no part of the result."""

    @property
    def trackers(self) -> list[str]:
        return [] if self.report_to == "none" else [self.report_to] if isinstance(self.report_to, str) else list(self.report_to)


class Interrupted(PedigreeError):
    """Somebody asked the training to stop."""

    exit_code = 130


class Diverged(Exception):
    """The loss or the gradient is not a number any more. Not for users: the stage says it with the examples."""

    def __init__(self, what: str, step: int, rows: Sequence[int]) -> None:
        """Args:
        what: e.g. "the loss is nan".
        rows: rows of the training split that the step saw.
        """
        super().__init__(f"{what} at step {step}")
        self.rows = list(rows)


@dataclass
class Course:
    """What a training did, in order."""

    curve: list[dict[str, float]] = field(default_factory=list)
    """{"step", "loss", "learning_rate", "grad_norm", "tokens": so far, "tokens_per_second": of late, for those who watch} at every step,
    {"step", "validation_loss"} before the first and after each epoch."""
    seen: list[tuple[int, int, int]] = field(default_factory=list)
    """(step from 1, epoch from 1, row of the training split) of each row that was trained on."""
    tokens: int = 0
    trained_tokens: int = 0
    """Tokens that counted in the loss."""
    best_step: int | None = None
    """The step whose weights were kept, where `load_best_model_at_end` says so."""
    seconds: float = 0.0
    """Time it took, earlier parts of an interrupted training included. For the log only."""

    @property
    def losses(self) -> list[float]:
        return [point["loss"] for point in self.curve if "loss" in point]

    @property
    def watched(self) -> list[tuple[int, float]]:
        """(step, validation loss)."""
        return [(int(point["step"]), point["validation_loss"]) for point in self.curve if "validation_loss" in point]

    @property
    def step(self) -> int:
        return len(self.losses)

    def best(self) -> tuple[int, float] | None:
        """The first of the lowest validation losses since the first step."""
        return min((point for point in self.watched if point[0]), key=lambda point: point[1], default=None)

    def stalled(self, patience: int | None) -> bool:
        """Has the validation loss not fallen for so many epochs?"""
        best = self.best()
        return patience is not None and best is not None and sum(step > best[0] for step, _ in self.watched) >= patience


def steps(rows: int, recipe: Recipe, processes: int = 1) -> int:
    """Optimizer steps of a run over `rows` packed rows, whose steps `processes` share."""
    planned = steps_per_epoch(rows, recipe, processes) * recipe.num_train_epochs
    return min(planned, recipe.max_steps or planned)


def steps_per_epoch(rows: int, recipe: Recipe, processes: int = 1) -> int:
    return math.ceil(rows / (recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * processes))


def warmup(total: int, recipe: Recipe) -> int:
    """Steps over which the rate rises, of `total`."""
    return recipe.warmup_steps if recipe.warmup_steps is not None else math.ceil(total * recipe.warmup_ratio)


SIZES = 16
"""A batch of packed rows has a multiple of so many tokens: kernels are made anew for every size they meet, which takes time and memory."""


def collate(rows: list[dict[str, Any]], multiple: int = 1) -> dict[str, Any]:
    """Packed rows to one batch, of a multiple of so many tokens by an example at its end that counts nowhere: input_ids, labels, position_ids (1, tokens) int64, weights (1, tokens) float32, the
    examples' bounds `cu_seq_lens_q` (examples + 1) int32 and the longest's length `max_length_q`, named as flash attention names them, and the
    rows' numbers `rows` (rows) int64.

    Positions start at 0 for each example and no attention mask is given, from which every attention knows that examples are strangers.
    An example's first token has nothing to be predicted from, so it is no label:

        lengths [2] and [1], ids [5, 6] and [7]  ->  position_ids [0, 1, 0], cu_seq_lens_q [0, 2, 3], labels [-100, 6, -100]
    """
    import torch

    lengths = [length for row in rows for length in row["lengths"]]
    if spare := -sum(lengths) % multiple:
        lengths.append(spare)
    positions = [p for length in lengths for p in range(length)]
    labels = [label for row in rows for label in row["labels"]] + [IGNORE] * spare
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]] + [0] * spare]),
        "labels": torch.tensor([[label if p else IGNORE for label, p in zip(labels, positions, strict=True)]]),
        "weights": torch.tensor([[weight for row in rows for weight in row["weights"]] + [0.0] * spare]),
        "position_ids": torch.tensor([positions]),
        "cu_seq_lens_q": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "max_length_q": max(lengths),
        "rows": torch.tensor([row.get("row", -1) for row in rows]),
    }


def causal(model: Any) -> Any:
    """The language model inside a PeftModel; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def refuse_mistakes(recipe: Recipe, where: str, lengths: Sequence[Sequence[int]], validates: bool) -> None:
    """Find what would fail late, before a model is loaded.

    Args:
        where: dotted place in params.yaml, for messages.
        lengths: tokens of each example in each row of the training split.
        validates: there is a validation split.
    Raises:
        InputError: all such mistakes at once.
    """
    import torch
    from transformers import get_scheduler

    wrong: list[tuple[str, str]] = []
    total = steps(len(lengths), recipe)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate)
    try:
        get_scheduler(recipe.lr_scheduler_type, optimizer, warmup(total, recipe), total, recipe.lr_scheduler_kwargs)
    except (TypeError, ValueError, KeyError) as error:
        wrong.append((f"{where}.lr_scheduler_kwargs: {error}", f"use the keys of transformers' {recipe.lr_scheduler_type} schedule"))
    for key in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(recipe, key) and not validates:
            wrong.append((f"{where}.{key}: there is no validation split to judge by", "set splits.validation"))
    if recipe.group_by_length and any(len(row) > 1 for row in lengths):
        wrong.append((f"{where}.group_by_length: rows hold several examples", "set tokenized.packing: false"))
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow", "mlflow_skinny")}
    for name in recipe.trackers:
        if not any(map(find_spec, packages[name])):
            wrong.append((f"{where}.report_to: {name} is not installed", f"pip install {name}, or set report_to: none"))
    if recipe.use_liger_kernel and not find_spec("liger_kernel"):
        wrong.append((f"{where}.use_liger_kernel: Liger is not installed", "pip install 'pedigree[gpu]'"))
    elif recipe.use_liger_kernel and not torch.cuda.is_available():
        wrong.append((f"{where}.use_liger_kernel: Liger's kernels run on a GPU, and there is none", "leave it out"))
    if wrong:
        raise InputError("\n".join(f"params.yaml: {what}" for what, _ in wrong), "; ".join(hint for _, hint in wrong))


@contextmanager
def advice_on_memory(advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Running out of memory as one message, whichever library says it in whichever words.

    Args:
        advice: says what to change, where more may be known than what helps in general; "" where it is not.
    Raises:
        PedigreeError: with what to change.
    """
    import torch

    words = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)
        if not short:
            raise
        said = (str(error).splitlines() or [""])[0]
        raise PedigreeError(
            f"training ran out of memory{f' ({said})' if said else ''}",
            (advice and advice())
            or "lower per_device_train_batch_size or set gradient_checkpointing: true; `pedigree plan` shows what a variant needs",
        ) from None


@contextmanager
def stop_on_request() -> Iterator[Callable[[], bool]]:
    """While open, the first SIGINT or SIGTERM is only noted, for the loop to stop where it can go on later; another, a second later, interrupts.

    Of several processes the first is asked, and takes the others with it.
    """
    asked: list[float] = []

    def ask(number: int, _: Any) -> None:
        if asked and time.monotonic() - asked[0] > 1:
            raise KeyboardInterrupt
        if not asked:
            log.warning("training: stopping after this step; once more to stop at once, without a checkpoint")
        asked.append(time.monotonic())

    if threading.current_thread() is not threading.main_thread() or processes.place().rank:
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    tunable: Tunable,
    tokenizer: Any,
    train_rows: Any,
    validation_rows: Any,
    recipe: Recipe,
    compute: Compute,
    checkpoints: Checkpoints | None = None,
    live: Path | None = None,
) -> Course:
    """Train a model in place, from its newest checkpoint if it has one.

    With several processes every one walks through the same batches in the same order, as if it were alone and accumulated all of a step's
    passes. It does its share of them (the n-th is that of process n modulo their number), and gradients and losses are summed before the
    optimizer steps. So no row is missing or doubled, whatever the numbers, and all processes hold the same weights. Dropout in a pass depends on
    the seed and the pass alone. The first process alone writes.

    Args:
        tunable: as `methods.build` makes it.
        train_rows, validation_rows: `datasets.Dataset` with input_ids, labels, weights and lengths, each row a packed row.
        checkpoints: where to keep them; None to keep none. All processes go on from what the first has found there.
        live: folder for the curve so far, for whoever watches; None for nobody.
    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint has been written.
        Diverged: a loss or a gradient is not finite. The checkpoints are from before.
        PedigreeError: the disk is full.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.data import Sampler
    from transformers import TrainerCallback
    from transformers.trainer_pt_utils import get_length_grouped_indices
    from trl import SFTConfig, SFTTrainer

    model = tunable.model
    here = processes.place()
    total, per_epoch = steps(len(train_rows), recipe, here.size), steps_per_epoch(len(train_rows), recipe, here.size)
    passes_per_step = recipe.gradient_accumulation_steps * here.size
    lengths = [sum(row) for row in train_rows["lengths"]]
    saved = checkpoints.newest() if checkpoints and not here.rank else None
    went_on_from = int(processes.from_first(torch.tensor(saved.step if saved else 0, device=model.device)))
    if here.rank:
        saved = checkpoints.at(went_on_from) if checkpoints and went_on_from else None
        checkpoints = None
    state = saved.state(model.device) if saved else {}
    course = (
        Course(**saved.document("course"), seen=[(step, epoch, row) for step, epoch, row in state["seen"].tolist()]) if saved else Course()
    )
    best = saved.tensors("best") if saved else {}
    watched = {"nats": 0.0, "tokens": 0, "passes": 0}  # of the evaluation under way: the Trainer would average over rows, however short
    batch: dict[str, Any] = {}  # the one under way
    step_losses: list[torch.Tensor] = []  # of the passes of the step under way; zero where another process does the pass
    step_rows: list[list[int]] = []

    class PackedTrainer(SFTTrainer):
        """TRL's trainer with logits only where a label counts (with a large vocabulary the rest is much work in vain), weighted.

        The loss is the weighted mean over a forward pass, and its plain mean per token in evaluation. Checkpoints are ours.
        """

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            batch.update(inputs)
            hidden = tunable.hidden_states(inputs)
            labels = inputs["labels"][:, 1:]
            counted = labels != IGNORE
            losses = cross_entropy(
                causal(model).get_output_embeddings()(hidden[:, :-1][counted]).float(),
                labels[counted],
                reduction="none",
                label_smoothing=recipe.label_smoothing_factor if model.training else 0.0,
            )
            weights = inputs["weights"][:, 1:][counted] if model.training else torch.ones_like(losses)
            loss = (losses * weights).sum() / weights.sum()
            if model.training:
                more = tunable.extra_loss(model)
                loss = loss if more is None else loss + more
            else:
                watched["nats"] += float(losses.double().sum())
                watched["tokens"] += len(losses)
            return (loss, None) if return_outputs else loss

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            step, rows = self.state.global_step + 1, inputs["rows"].tolist()
            course.seen += [(step, (step - 1) // per_epoch + 1, row) for row in rows]
            course.tokens += sum(lengths[row] for row in rows)
            course.trained_tokens += int((inputs["labels"][:, 1:] != IGNORE).sum())
            if here.size > 1:
                torch.manual_seed(processes.seed_of(compute.seed, step, len(step_rows)))
            mine = here.does(len(step_rows))
            step_rows.append(rows)
            step_losses.append(super().training_step(model, inputs, num_items_in_batch) if mine else torch.zeros((), device=model.device))
            if not self.accelerator.sync_gradients:
                return torch.zeros_like(step_losses[0])
            found = processes.summed(torch.stack(step_losses))
            for loss, rows in zip(found, step_rows, strict=True):
                if not torch.isfinite(loss):
                    processes.refuse_lost()
                    raise Diverged(f"the loss is {float(loss)}", step, rows)
            processes.sum_gradients(list(trainable(model).values()))
            step_losses.clear()
            step_rows.clear()
            return sum(found)  # one after another, as the Trainer would

        def prediction_step(self, *arguments: Any, **named: Any) -> Any:
            mine = here.does(int(watched["passes"]))
            watched["passes"] += 1
            return super().prediction_step(*arguments, **named) if mine else (torch.zeros((), device=self.model.device), None, None)

        def _get_train_sampler(self, *arguments: Any) -> Any:
            return ByLength() if recipe.group_by_length else super()._get_train_sampler(*arguments)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            if checkpoints:
                processes.refuse_lost()
                now = {
                    "optimizer": checkpoint.optimizer_state(self.optimizer),
                    "schedule": self.lr_scheduler.state_dict(),
                    "random": checkpoint.random_state(),
                    "method": tunable.state(),
                    "seen": torch.tensor(course.seen, dtype=torch.int32),
                }
                course.seconds = clock()
                checkpoints.save(
                    self.state.global_step,
                    now,
                    {"weights": trainable(model), **({"best": best} if best else {})},
                    {
                        "course": {k: v for k, v in dataclasses.asdict(course).items() if k != "seen"},
                        "trainer_state": dataclasses.asdict(dataclasses.replace(self.state, log_history=[], stateful_callbacks=None)),
                    },
                )

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            assert saved
            put(model or self.model, saved.tensors("weights"))

        def _load_optimizer_and_scheduler(self, found: str | None) -> None:
            if saved:
                checkpoint.restore_optimizer(self.optimizer, state["optimizer"])
                self.lr_scheduler.load_state_dict(state["schedule"])
                tunable.restore(state["method"])

        def _load_rng_state(self, found: str | None) -> None:
            if saved:
                checkpoint.restore_random_state(state["random"])

    class ByLength(Sampler):
        """Rows of like length together, shuffled; an order for each epoch that depends on nothing but the seed and the epoch."""

        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(lengths)

        def __iter__(self) -> Iterator[int]:
            together = recipe.per_device_train_batch_size * passes_per_step
            dice = torch.Generator().manual_seed(compute.seed + self.epoch)
            return iter(get_length_grouped_indices(lengths, together, generator=dice))

    began, earlier = time.monotonic(), course.seconds

    def clock() -> float:
        return earlier + time.monotonic() - began

    progress = Progress("training", total, "step")
    progress.done, progress.start = course.step, progress.start - earlier
    recent: deque[tuple[float, int]] = deque(maxlen=20)
    show = live_writer(live) if live else lambda curve, now=False: None

    class Flow(TrainerCallback):
        """Records the curve, and decides when to save and when to stop.

        At the end of an epoch a checkpoint is written after the validation, so that going on from it leaves out none.
        """

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not recent:
                recent.append((time.monotonic(), course.tokens))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            logs = logs or {}
            if "loss" in logs:
                point = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm")}
                recent.append((time.monotonic(), course.tokens))
                since, tokens = recent[0]
                speed = (course.tokens - tokens) / (recent[-1][0] - since)
                course.curve.append({"step": state.global_step, **point, "tokens": course.tokens, "tokens_per_second": speed})
                progress.advance(
                    note="loss {loss:.3f}, rate {learning_rate:.2g}, gradient {grad_norm:.2g}".format(**point) + f", {speed:.0f} tokens/s"
                )
                show(course.curve)
            if "eval_loss" in logs:
                counts = torch.tensor([watched["nats"], watched["tokens"]], dtype=torch.float64, device=model.device)
                nats, tokens = processes.summed(counts).tolist()
                loss = nats / tokens
                watched.update(nats=0.0, tokens=0, passes=0)
                course.curve.append({"step": state.global_step, "validation_loss": loss})
                show(course.curve)
                log.info(f"training: step {state.global_step}, validation loss {loss:.3f}")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop_asked():
                control.should_training_stop = True
            if state.global_step % per_epoch and state.global_step < total:
                control.should_save = stop_asked() or self.due(state.global_step)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ended = state.global_step >= total
            control.should_save = (
                stop_asked() or recipe.save_strategy == "epoch" or self.due(state.global_step) or (ended and recipe.save_strategy != "no")
            )

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not state.global_step:
                return
            if recipe.load_best_model_at_end and course.best() == course.watched[-1]:
                best.clear()
                best.update({name: weight.detach().cpu().clone() for name, weight in trainable(model).items()})
                course.best_step = state.global_step
            if stop_asked() or course.stalled(recipe.early_stopping_patience):
                control.should_training_stop = True
            control.should_save = control.should_save or stop_asked()

        def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop_asked() and not state.global_step:
                raise Interrupted("interrupted before the first step", "run again to start anew")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop_asked():
                raise Interrupted(f"interrupted at step {state.global_step}; the next run goes on from there", "run the same command again")

        @staticmethod
        def due(step: int) -> bool:
            return recipe.save_strategy == "steps" and step % recipe.save_steps == 0

    class Sound(TrainerCallback):
        """Stops before a gradient that is not finite can reach a checkpoint. Called once the step is in the curve and before it is saved."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            norm = (logs or {}).get("grad_norm", 0.0)
            if not math.isfinite(norm):
                raise Diverged(
                    f"the gradient is {norm}", state.global_step, [row for step, _, row in course.seen if step == state.global_step]
                )

    with tempfile.TemporaryDirectory() as scratch, stop_on_request() as stop_asked:
        if checkpoints and "tensorboard" in recipe.trackers:
            os.environ.setdefault(
                "TENSORBOARD_LOGGING_DIR", str(checkpoints.folder.parent.parent / "tensorboard" / checkpoints.folder.name)
            )
        config = SFTConfig(
            output_dir=scratch,
            seed=compute.seed,
            data_seed=compute.seed,
            report_to=recipe.trackers or "none",
            run_name=checkpoints.folder.name if checkpoints else None,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            eval_strategy="epoch" if validation_rows else "no",
            use_cpu=model.device.type == "cpu",
            bf16=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            max_length=None,
            dataloader_pin_memory=False,
            optim=tunable.optim or recipe.optim,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type=recipe.lr_scheduler_type,
            lr_scheduler_kwargs=recipe.lr_scheduler_kwargs,
            warmup_steps=warmup(total, recipe),
            num_train_epochs=recipe.num_train_epochs,
            max_steps=total,
            weight_decay=recipe.weight_decay,
            per_device_train_batch_size=recipe.per_device_train_batch_size,
            per_device_eval_batch_size=recipe.per_device_train_batch_size,
            gradient_accumulation_steps=passes_per_step,
            max_grad_norm=recipe.max_grad_norm,
            gradient_checkpointing=recipe.gradient_checkpointing is True,
        )
        whole = {weight: weight.data for weight in trainable(model).values()}
        trainer = PackedTrainer(
            model=model,
            args=config,
            train_dataset=train_rows.add_column("row", list(range(len(train_rows)))),
            eval_dataset=validation_rows or None,
            processing_class=tokenizer,
            data_collator=partial(collate, multiple=SIZES) if tunable.packs else apart,
            callbacks=[*tunable.callbacks, Flow(), Sound()],
        )
        # TRL has rounded adapters of 4-bit weights to bfloat16, which takes no step below its 256th part
        for weight, data in whole.items():
            weight.data = data
        trainer.model_accepts_loss_kwargs = False  # our loss is a mean already: let the Trainer average over accumulation steps
        for printer in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
            trainer.remove_callback(printer)
        if recipe.use_liger_kernel:
            use_liger_kernels(causal(model))
        if recipe.compile == "layers":
            compile_layers(model)
        hooks = []
        # a checkpointed layer frees nearly all that it made, and glibc would keep it beside what the next layer makes
        if recipe.gradient_checkpointing is True and model.device.type == "cpu" and recipe.compile == "none":
            give_back = giving_back()
            hooks += [layer.register_forward_hook(give_back) for layer in decoder_layers(model)]
        if recipe.neftune_noise_alpha:
            hooks.append(add_noise(causal(model).get_input_embeddings(), recipe.neftune_noise_alpha, batch))
        for weight in trainable(model).values():
            processes.from_first(weight.data)
        if saved:
            log.info(f"training: going on from the checkpoint of step {saved.step} of {total}")
        elif validation_rows:
            trainer.evaluate()
        if saved and (saved.step >= total or course.stalled(recipe.early_stopping_patience)):
            put(model, saved.tensors("weights"))
            tunable.restore(state["method"])
        else:
            trainer.train(resume_from_checkpoint=str(saved.folder) if saved else None)
        processes.refuse_lost()
        for hook in hooks:
            hook.remove()
        if recipe.load_best_model_at_end:
            put(model, best)
            log.info(f"training: keeping the weights of step {course.best_step}")
    course.seconds = clock()
    show(course.curve, now=True)
    return course


def put(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Copy weights into the model's trainable parameters, all of them."""
    import torch

    parameters = trainable(model)
    if set(parameters) != set(weights):
        raise AssertionError(f"other weights than the model trains: {sorted(set(parameters) ^ set(weights))[:5]}")
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def decoder_layers(model: Any) -> list[Any]:
    """The blocks that make up a model, as its architecture names them."""
    kinds = set(causal(model)._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def compile_layers(model: Any) -> None:
    """Compile each decoder layer for itself, for rows of any length. What the model's weights are called does not change."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def use_liger_kernels(model: Any) -> None:
    """Liger's kernels for a model's norms, rotation and gated MLPs, those of its layers that are there already. Ours computes the loss.

    Raises:
        InputError: Liger has no kernels for such a model.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(
            f"params.yaml: use_liger_kernel: Liger has no kernels for {model.config.model_type}", "leave it out: other models train without"
        )
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def add_noise(embeddings: Any, alpha: float, batch: dict[str, Any]) -> Any:
    """Uniform noise of alpha / sqrt(length x width) on each token's embedding while training (NEFTune, arXiv:2310.05914, section 2).

    The length is that of the token's example. transformers' own hook takes the row's, which in a packed row would make the noise too faint.

    Args:
        batch: holds the `cu_seq_lens_q` of the batch under way.
    Returns:
        A handle whose `remove()` takes the noise off again.
    """
    import torch

    def hook(module: Any, _: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        lengths = batch["cu_seq_lens_q"].diff()
        per_token = lengths.repeat_interleave(lengths)[:, None]
        scale = alpha / (per_token * embedded.shape[-1]).float().sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * scale.to(embedded.dtype)

    return embeddings.register_forward_hook(hook)
