"""Train by one of TRL's trainers on rows that are already tokenized."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain, islice, takewhile, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.hashing import sha256_of_files
from dagster_project.core.params import Compute
from dagster_project.training.methods.build import causal
from dagster_project.training.trainers.alignment.trl_trainers import shared_prompts
from dagster_project.training.trainers.alignment.trl_trainers.pair_attention import attending_by_pair
from dagster_project.training.trainers.harness import distributed
from dagster_project.training.trainers.harness.checkpoint import Checkpoints, params_identity, run_identity
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.params import PreferenceParams
from dagster_project.training.trainers.harness.session import (
    Diverged,
    ResumableTrainer,
    Session,
    advice_on_memory,
    monitor,
    run_session,
    stop_on_request,
    training_arguments,
)
from dagster_project.training.trainers.harness.sharding import ShardedModel
from dagster_project.training.trainers.harness.weight_audit import LIBRARIES, WeightChange, trainable, versions

if TYPE_CHECKING:
    import torch

    from dagster_project.training.trainers.alignment.sampled_answers import SampledAnswers


@dataclass(frozen=True)
class TrainerSpec:
    """Which of TRL's trainers to use, and how."""

    name: str
    """For progress lines, e.g. "dpo"."""
    trainer: type
    """TRL's class."""
    config: type
    """The class of its arguments."""
    arguments: Mapping[str, Any]
    """Arguments beyond those of `training_arguments`."""
    metrics: Mapping[str, str]
    """Metric as TRL logs it -> its name in our curve, e.g. {"rewards/margins": "margin"}."""
    constructor: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the trainer's constructor, e.g. reward functions."""
    outputs: Callable[..., Any] | None = None
    """Of trainers on pairs: the output of the model for a batch of `shared_prompts.collate_pairs`, as the trainer's
    loss reads it."""
    has_reference: bool = False
    """Whether the loss of pairs reads log-probabilities under the reference, which are computed once."""
    trains_prompts: bool = False
    """Whether `outputs` also needs the log-probabilities of the tokens of prompts, before the chosen answers."""
    answers_in_groups: bool = False
    """Whether the trainer is one of `answer_groups.group_trainer`."""
    sampled: SampledAnswers | None = None
    """The answers that the policy samples and learns from."""
    keep: Callable[[int, Sequence[int], Sequence[Sequence[int]], Sequence[Sequence[int]]], None] | None = None
    """Adds answers without rewards to `sampled`: (step, numbers of their rows, token ids of prompts and of answers)."""


class TrlSession(Session):
    """A training by one of TRL's trainers. Several processes share its steps if the model is divided among them."""

    def __init__(
        self,
        spec: TrainerSpec,
        model: Any,
        tokenizer: Any,
        params: PreferenceParams,
        compute: Compute,
        checkpoints: Checkpoints | None,
        live: Path | None,
    ) -> None:
        metrics = (*spec.metrics.values(), "loss", "validation_loss", "learning_rate", "grad_norm")
        super().__init__(spec.name, model, params, compute, checkpoints, live, metrics)
        self.metrics, self.tokenizer, self.sampled, self.keep = spec.metrics, tokenizer, spec.sampled, spec.keep
        self.answers_in_use: tuple[int, Any] = (0, None)
        """Of methods that compare answers: passes so far, and the batch of answers that further ones learn from, as TRL
        buffers it."""
        if self.sampled and self.saved:
            self.sampled.restore(self.state["answers"])
            self.answers_in_use = self.state["answers_in_use"]
        reads_once = shared_prompts.reads_prompts_once(model, self.device.type)
        pads = shared_prompts.has_router(model) and (spec.has_reference or spec.answers_in_groups)
        self.outputs = spec.outputs if reads_once and not pads else None
        """As in the specification; None if the model cannot read pairs so, or there are none."""
        self.trains_prompts = spec.trains_prompts
        self.reads_groups = spec.answers_in_groups and reads_once and not pads
        """Whether a pass reads the answers to a prompt as a group."""
        self.reference: dict[int, tuple[float, float]] = {}
        """Log-probabilities of the chosen and the rejected answer of each row under the reference; validation rows have
        negative numbers."""
        self.rows_validated: list[tuple[int, int, int]] = []
        """Rows, chosen and rejected answers of each pass of the current validation, those of all processes."""

    def method_state(self) -> dict[str, Any]:
        return {"answers": self.sampled.state(), "answers_in_use": self.answers_in_use} if self.sampled else {}

    def is_complete(self) -> bool:
        return super().is_complete() or (self.saved is not None and self.stalls())

    def stalls(self) -> bool:
        """Whether rewards have not differed for so long that training stops."""
        return self.sampled is not None and self.sampled.is_stalled()

    def step_point(self, step: int, logs: Mapping[str, float]) -> tuple[dict[str, float], str]:
        self.history.tokens = int(logs.get("num_tokens", 0))
        metrics = {ours: float(logs[theirs]) for theirs, ours in self.metrics.items() if theirs in logs}
        plain = {name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm")}
        note = ", ".join(f"{name} {value:.3g}" for name, value in {"loss": logs["loss"], **metrics}.items())
        return {"step": step, **plain, "tokens": self.history.tokens, **metrics}, note

    def validation_point(self, step: int, logs: Mapping[str, float]) -> dict[str, float]:
        point = {"step": step, "validation_loss": logs["eval_loss"]}
        for theirs, ours in self.metrics.items():
            if f"eval_{theirs}" in logs:
                point[f"validation_{ours}"] = logs[f"eval_{theirs}"]
        return point


@cache
def _trainer_class(base: type) -> type:
    import torch

    class RowTrainer(ResumableTrainer, base):
        """TRL's trainer on tokenized rows; notes which rows each step was trained on."""

        session: TrlSession
        _metrics: dict[str, Any]
        _total_train_tokens: int

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def create_scheduler(self, num_training_steps: int, *arguments: Any, **named: Any) -> Any:
            if num_training_steps == 1:
                self.args.warmup_steps = 0  # the rate of a single step is not 0
            return super().create_scheduler(num_training_steps, *arguments, **named)

        def training_step(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            session, history = self.session, self.session.history
            step, epoch = self.state.global_step + 1, int(self.state.epoch or 0) + 1
            known = {row for _, _, row in takewhile(lambda seen: seen[0] == step, reversed(history.seen))}
            rows = [row for row in dict.fromkeys(_take_rows(inputs)) if row not in known]
            history.seen += [(step, epoch, row) for row in rows]
            forward_backward = partial(super().training_step, model, inputs, *arguments, **named)
            if session.root is not None:
                return session.share_pass(rows, step, forward_backward, self.accelerator.sync_gradients)
            loss = forward_backward()
            if not torch.isfinite(loss):
                raise Diverged(f"the loss is {float(loss)}", step, history.rows_of(step))
            return loss

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            forward = partial(self.session.outputs, model) if self.session.outputs else model
            loss_of = partial(super().compute_loss, forward, inputs, *arguments, **named)
            compute = partial(self.session.compute_loss, model, loss_of)
            if not self.session.idles:
                return compute()
            metrics, tokens = self._metrics, self._total_train_tokens
            self._metrics = {mode: defaultdict(list) for mode in metrics}
            loss = compute()
            self._metrics, self._total_train_tokens = metrics, tokens
            return loss

        def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            rows = good = bad = len(_take_rows(inputs))
            if "label" in inputs:
                good = int(inputs["label"].sum())
                bad = rows - good
            self.session.rows_validated.append((rows, good, bad))
            if self.session.root is None or self.session.validates_here():
                return super().prediction_step(model, inputs, *arguments, **named)
            self.session.batch = inputs
            return torch.zeros((), device=self.session.device), None, None

        def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
            if self.session.root is not None:
                self._combine_processes(logs)
            if "eval_loss" in logs:
                self._average_over_rows()
            super().log(logs, *arguments, **named)

        def _average_over_rows(self) -> None:
            """Make the metrics of a validation means over rows, as its loss is; TRL's are means over passes."""
            rows, self.session.rows_validated = self.session.rows_validated, []
            for stored in ("_metrics", "_stored_metrics"):
                average_over_rows(getattr(self, stored, {}).get("eval", {}), rows)

        def _combine_processes(self, logs: dict[str, float]) -> None:
            """Make losses and metrics those of the passes of all processes."""
            if "eval_loss" in logs:  # zero for the passes of other processes
                self.session.end_validation(
                    lambda: super(RowTrainer, self).prediction_step(self.model, self.session.batch, True)
                )
                logs["eval_loss"] = float(distributed.summed(torch.tensor(logs["eval_loss"], dtype=torch.float64)))
            before = self.session.history.tokens
            self._total_train_tokens = before + int(distributed.summed(torch.tensor(self._total_train_tokens - before)))
            mode = "train" if self.model.training else "eval"
            combined = _interleaved(distributed.documents(self._metrics[mode]))
            if "num_tokens" in combined:
                combined["num_tokens"] = [self._total_train_tokens]
            self._metrics[mode] = defaultdict(list, combined)

        def _load_rng_state(self, folder: str | None) -> None:
            super()._load_rng_state(folder)
            if self.session.saved:
                self._total_train_tokens = self.session.history.tokens  # TRL 1.16 continues counting from it

    return RowTrainer


@cache
def _stopper_class() -> type:
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):
        """Stops an online method that has nothing to learn. A checkpoint is written, as at the end of an epoch."""

        def __init__(self, session: TrlSession) -> None:
            self.session = session

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.session.stalls():
                control.should_training_stop = True

    return Stopper


def _interleaved(metrics: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """The values of each metric in the order of the passes, given those of each process.

    >>> _interleaved([{"loss": [1, 3]}, {"loss": [2], "kl": [0]}])
    {'loss': [1, 2, 3], 'kl': [0]}
    """
    names = dict.fromkeys(name for of_process in metrics for name in of_process)
    rounds = {name: zip_longest(*(of_process.get(name, ()) for of_process in metrics)) for name in names}
    return {name: [value for values in rounds[name] for value in values if value is not None] for name in names}


def train(
    spec: TrainerSpec,
    model: ShardedModel,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    validation_rows: Sequence[Mapping[str, Any]],
    params: PreferenceParams,
    compute: Compute,
    checkpoints: Checkpoints | None = None,
    live: Path | None = None,
    begin: Callable[[], None] = lambda: None,
) -> TrainingHistory:
    """Train a model in place, from its newest checkpoint if it has one.

    Args:
        model: its trainable weights are trained and saved in checkpoints. It is divided here if it has settings for
            that, and stays so.
        rows: of the training split, with the trainer's columns after tokenization.
        validation_rows: likewise; none: no validation.
        live: folder for the curves so far; None to write none.
        begin: called once the model is divided, before its weights change or those of a checkpoint are read.
    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        Diverged: a loss or a gradient is not finite. The checkpoints are older.
        PedigreeError: out of memory or disk.
    """
    session = TrlSession(spec, model.model, tokenizer, params, compute, checkpoints, live)
    with tempfile.TemporaryDirectory() as scratch, stop_on_request() as session.stop_requested, advice_on_memory():
        with model.kept_in_place():
            trainer = _build_trainer(spec, session, tokenizer, rows, validation_rows, model.device, scratch)
        for weight in trainable(model.model).values():
            distributed.from_first(weight.data)
        model.divide()
        if model.root is not None:
            session.divided(model.root)
        begin()
        with attending_by_pair(causal(model.model)) if session.outputs or session.reads_groups else nullcontext():
            if spec.has_reference and not session.is_complete():
                trainer.precompute_ref_logps = True
                session.reference.update(_reference(session, trainer, len(rows), len(validation_rows)))
            run_session(session, trainer, bool(validation_rows))
    session.history.seconds = session.seconds()
    session.show(session.history.curve, now=True)
    return session.history


def _build_trainer(
    spec: TrainerSpec, session: TrlSession, tokenizer: Any, rows: Sequence[Mapping[str, Any]],
    validation_rows: Sequence[Mapping[str, Any]], device: torch.device, scratch: str,
) -> Any:  # fmt: skip
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    params, model = session.params, session.model
    assert isinstance(params, PreferenceParams)
    arguments = training_arguments(params, session.compute, scratch, device.type, bool(validation_rows))
    arguments |= {
        "report_to": "none",
        "warmup_steps": params.warmup_ratio,
        "max_steps": params.max_steps or -1,
        "gradient_checkpointing": params.gradient_checkpointing,
    }
    if params.sharding:
        arguments["gradient_accumulation_steps"] = params.gradient_accumulation_steps * session.process.size
    validation = [{**row, "row": -1 - number} for number, row in enumerate(validation_rows)]
    whole = {weight: weight.data for weight in trainable(model).values()}
    trainer = _trainer_class(spec.trainer)(
        model=model,
        args=spec.config(**arguments | dict(spec.arguments)),
        train_dataset=Dataset.from_list([{**row, "row": number} for number, row in enumerate(rows)]),
        eval_dataset=Dataset.from_list(validation) if validation else None,
        processing_class=tokenizer,
        callbacks=[monitor(session), _stopper_class()(session)],
        **spec.constructor,
    )
    if getattr(trainer.args, "disable_dropout", False):
        _turn_off_dropout(model)
    # TRL's copy of the adapter: with the adapter off, the model is the reference already
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")
    for weight, data in whole.items():
        if weight.dtype != data.dtype:  # TRL rounds adapters of 4-bit weights to bfloat16
            weight.data = data
    trainer.data_collator = partial(_collate, session, trainer.data_collator)
    return trainer


def _turn_off_dropout(model: Any) -> None:
    """Turn off the dropout that is not a layer, which TRL does not.

    Modules apply it by a rate of their own (GPT-BigCode, BioGPT, Seed-OSS).
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and name.endswith(("dropout", "_pdrop", "layerdrop")):
                setattr(module, name, 0.0)


def _collate(session: TrlSession, collate: Callable[[Any], Any], rows: Sequence[Mapping[str, Any]]) -> Any:
    """The batch of TRL's collator with what the session adds; of an online method it is the list of rows itself.

    These are the numbers of its rows, "rows" (rows) int64, the reference's log-probabilities as far as they are known,
    and the arguments of `session.outputs`.
    """
    import torch

    batch = collate(rows)
    if isinstance(batch, list):
        return batch
    batch, numbers = dict(batch), [row["row"] for row in rows]
    if session.reference:
        chosen, rejected = zip(*(session.reference[number] for number in numbers), strict=True)
        batch |= {"ref_chosen_logps": torch.tensor(chosen), "ref_rejected_logps": torch.tensor(rejected)}
    if session.outputs:
        batch |= shared_prompts.collate_pairs(rows, session.trains_prompts)
    return {**batch, "rows": torch.tensor(numbers)}


def _reference(session: TrlSession, trainer: Any, rows: int, validation_rows: int) -> dict[int, tuple[float, float]]:
    """Log-probabilities of the answers of all rows under the reference, which is the model without its adapter.

    The batches are those of the first epoch, so that rounding is that of the policy's first pass: before the first step
    both are equal. Each process computes its share of them, in all processes equally many passes. The state of random
    generators does not change.
    """
    import torch

    # from the end: validation rows
    found = torch.zeros(rows + validation_rows, 2, dtype=torch.float64, device=session.device)
    model, process = trainer.model.eval(), session.process
    forward = partial(session.outputs, model) if session.outputs else model
    trained = [*trainable(model).values()]
    with torch.random.fork_rng(devices=[]):
        batches = chain(trainer.get_train_dataloader(), trainer.get_eval_dataloader() if validation_rows else ())
        while some := list(islice(batches, process.size)):
            batch = some[min(process.rank, len(some) - 1)]
            taken = _take_rows(batch)
            logs = session.compute_loss(model, partial(trainer.compute_ref_log_probs, forward, batch))
            if process.rank < len(some):
                found[taken] = torch.stack(logs, 1).to(found)
    # off, an adapter is frozen; on again, only gathered weights are thawed, not the parts of `shard_grad_op`
    for weight in trained:
        weight.requires_grad_(True)
    found = distributed.summed(found)
    numbers = [*range(rows), *range(-validation_rows, 0)]
    return {number: (float(found[number, 0]), float(found[number, 1])) for number in numbers}


def average_over_rows(metrics: dict[str, list[float]], passes: Sequence[tuple[int, int, int]]) -> None:
    """Replace the values of passes by their mean over rows; those of chosen or rejected answers by the mean over these.

    Args:
        passes: rows, chosen and rejected answers of each pass. A pass without one of the kinds has no value of it.
    """
    rows, chosen, rejected = map(list, zip(*passes, strict=True))
    for name, values in metrics.items():
        counts = [n for n in {"chosen": chosen, "rejected": rejected}.get(name.rpartition("/")[2], rows) if n]
        if len(values) == len(counts) and len(set(counts)) > 1:
            values[:] = [sum(n * value for n, value in zip(counts, values, strict=True)) / sum(counts)]
    if chosen != rejected and "rewards/margins" in metrics:
        good, bad = metrics["rewards/chosen"], metrics["rewards/rejected"]
        metrics["rewards/margins"][:] = [sum(good) / len(good) - sum(bad) / len(bad)]


def _take_rows(inputs: Any) -> list[int]:
    """Numbers of the rows in a batch, which are removed from it."""
    if isinstance(inputs, list):
        return [row["row"] for row in inputs]
    return [int(row) for row in inputs.pop("rows").tolist()]


def preference_identity(
    params: PreferenceParams,
    compute: Compute,
    device: torch.device,
    dtype: torch.dtype,
    data: Path,
    folders: Mapping[str, Path],
    module: Path,
) -> dict[str, str]:
    """What must be equal for a training to resume from a checkpoint.

    Args:
        data: folder of the pairs.
        folders: models that it reads, by their name in messages.
        module: the stage's own file.
    """
    identity = {"preferences": sha256_of_files(sorted(data.rglob("*.parquet")))}
    for name, folder in folders.items():
        files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".md"]
        identity[name] = sha256_of_files(sorted(files))
    return identity | params_identity(params, compute) | run_identity(module, compute, device, dtype, LIBRARIES)


def document_of(
    history: TrainingHistory,
    change: WeightChange,
    settings: Mapping[str, Any],
    compute: Compute,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """training.json of a training on preferences."""
    return {
        "trained": change.groups,
        "frozen": change.frozen,
        "steps": history.step,
        "tokens": history.tokens,
        "loss": {"first": history.losses[0], "last": history.losses[-1]},
        "validation": [point for point in history.curve if "validation_loss" in point],
        "settings": settings,
        "seed": compute.seed,
        "threads": compute.threads,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "versions": versions(LIBRARIES),
    }
