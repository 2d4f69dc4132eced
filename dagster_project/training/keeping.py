"""What a trainer of TRL gets from us, whatever it trains: checkpoints that end in the same bytes, a curve, progress and a clean stop.

`sft.py` has its own, which also shares a step between processes and keeps the best weights.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dagster_project.params import Compute, Section
from dagster_project.progress import Progress
from dagster_project.records import CheckResult
from dagster_project.training import checkpoint, proof
from dagster_project.training.checkpoint import Checkpoints, code_of, sha256_of, sha256_of_text
from dagster_project.training.curve import live_writer
from dagster_project.training.proof import trainable
from dagster_project.training.sft import Course, Diverged, Interrupted, advice_on_memory, put, stop_on_request

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pedigree")

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "safetensors")
"""Whose versions decide what a run computes."""


class Steps(Section):
    """How to take optimizer steps: the names are those of transformers' TrainingArguments."""

    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak rate. Below that of supervised tuning: preferences say little per example."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = "cosine"
    """Shape of the rate after warm-up."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the rate rises to its peak."""
    num_train_epochs: int = Field(default=1, ge=1)
    """Passes over the training split."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps after which to stop whatever the epochs say; null for no such limit."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Pairs, or answers of online methods, per forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adafactor", "rmsprop", "sgd"] = "adamw_torch_fused"
    """The optimizer."""
    weight_decay: float = Field(default=0.0, ge=0)
    """How fast weights shrink towards zero, as a share of the learning rate."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Longest gradient; longer ones are scaled down to it."""
    gradient_checkpointing: bool = False
    """Trade a third more time for memory that no longer grows with depth. It changes no bit of the result."""
    save_steps: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints, from which an interrupted training goes on; null: at the end of each epoch."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints to keep. They are removed when the training is done."""


SIDELONG = {"gradient_checkpointing", "save_steps", "save_total_limit"}
"""Parameters that change nothing in what is learnt."""


@dataclass(frozen=True)
class Lesson:
    """What is learnt, by which of TRL's trainers."""

    name: str
    """For the progress lines, e.g. "dpo"."""
    trainer: type
    """TRL's class."""
    config: type
    """And that of its arguments."""
    arguments: Mapping[str, Any]
    """Arguments beside those that `Steps` stands for."""
    figures: Mapping[str, str]
    """Figure as TRL logs it -> its name in our curve, e.g. {"rewards/margins": "margin"}."""
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else the trainer is made with, e.g. reward functions."""


def learn(
    lesson: Lesson,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    watched: Sequence[Mapping[str, Any]],
    steps: Steps,
    compute: Compute,
    checkpoints: Checkpoints | None = None,
    live: Path | None = None,
) -> Course:
    """Train a model in place, from its newest checkpoint if it has one.

    Args:
        model: what is trainable of it is learnt, and is what a checkpoint keeps.
        rows: of the training split, with the columns that the trainer reads once it has tokenized.
        watched: likewise of the validation split; none: no validation.
        live: folder for the curve so far, for whoever watches; None for nobody.
    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint has been written.
        Diverged: a loss or a gradient is not finite. The checkpoints are from before.
        PedigreeError: memory or disk ran out.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    saved = checkpoints.newest() if checkpoints else None
    state = saved.state(model.device) if saved else {}
    course = (
        Course(**saved.document("course"), seen=[(step, epoch, row) for step, epoch, row in state["seen"].tolist()]) if saved else Course()
    )
    began, earlier = time.monotonic(), course.seconds
    progress = Progress(lesson.name, 1, "step")
    progress.done, progress.start = course.step, progress.start - earlier
    show = live_writer(live, names=(*lesson.figures.values(), "loss", "validation_loss", "learning_rate", "grad_norm")) if live else None

    def point(**figures: float) -> None:
        course.curve.append(figures)
        if show:
            show(course.curve)

    class Kept(lesson.trainer):  # type: ignore[name-defined]
        """TRL's trainer on rows that are tokenized, with checkpoints of ours."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def training_step(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            step, epoch = self.state.global_step + 1, int(self.state.epoch or 0) + 1
            known = {row for _, _, row in takewhile(lambda seen: seen[0] == step, reversed(course.seen))}
            course.seen += [(step, epoch, row) for row in dict.fromkeys(_rows_of(inputs)) if row not in known]
            loss = super().training_step(model, inputs, *arguments, **named)
            if not torch.isfinite(loss):
                raise Diverged(f"the loss is {float(loss)}", step, [row for at, _, row in course.seen if at == step])
            return loss

        def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            _rows_of(inputs)
            return super().prediction_step(model, inputs, *arguments, **named)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            if not checkpoints:
                return
            course.seconds = earlier + time.monotonic() - began
            now = {
                "optimizer": checkpoint.optimizer_state(self.optimizer),
                "schedule": self.lr_scheduler.state_dict(),
                "random": checkpoint.random_state(),
                "seen": torch.tensor(course.seen, dtype=torch.int32),
            }
            checkpoints.save(
                self.state.global_step,
                now,
                {"weights": trainable(model)},
                {
                    "course": {name: value for name, value in dataclasses.asdict(course).items() if name != "seen"},
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

        def _load_rng_state(self, found: str | None) -> None:
            if saved:
                checkpoint.restore_random_state(state["random"])
                self._total_train_tokens = course.tokens

    class Flow(TrainerCallback):
        """Records the curve, and decides when to save and when to stop."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.total = state.max_steps

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            found = logs or {}
            if "loss" in found:
                course.tokens = int(found.get("num_tokens", 0))
                figures = {ours: float(found[theirs]) for theirs, ours in lesson.figures.items() if theirs in found}
                plain = {name: float(found[name]) for name in ("loss", "learning_rate", "grad_norm")}
                point(step=state.global_step, **plain, tokens=course.tokens, **figures)
                progress.advance(note=", ".join(f"{name} {value:.3g}" for name, value in {"loss": found["loss"], **figures}.items()))
                if not math.isfinite(plain["grad_norm"]):
                    step = state.global_step
                    raise Diverged(f"the gradient is {plain['grad_norm']}", step, [row for at, _, row in course.seen if at == step])
            elif "eval_loss" in found:
                figures = {f"validation_{ours}": found[f"eval_{name}"] for name, ours in lesson.figures.items() if f"eval_{name}" in found}
                point(step=state.global_step, validation_loss=found["eval_loss"], **figures)
                log.info(f"{lesson.name}: step {state.global_step}, validation loss {found['eval_loss']:.3f}")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop_asked():
                control.should_training_stop = True
            ends = (
                state.global_step >= state.max_steps or float(state.epoch or 0).is_integer()
            )  # the epoch's end saves, once it is measured
            control.should_save = not ends and (stop_asked() or bool(steps.save_steps and state.global_step % steps.save_steps == 0))

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop_asked():
                raise Interrupted(f"interrupted at step {state.global_step}; the next run goes on from there", "run the same command again")

    with tempfile.TemporaryDirectory() as scratch, stop_on_request() as stop_asked, advice_on_memory():
        trainer = Kept(
            model=model,
            args=lesson.config(
                output_dir=scratch,
                seed=compute.seed,
                data_seed=compute.seed,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                logging_nan_inf_filter=False,
                eval_strategy="epoch" if watched else "no",
                use_cpu=model.device.type == "cpu",
                bf16=False,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                warmup_steps=steps.warmup_ratio,
                max_steps=steps.max_steps or -1,
                per_device_eval_batch_size=steps.per_device_train_batch_size,
                **{
                    name: getattr(steps, name)
                    for name in (
                        "learning_rate", "lr_scheduler_type", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
                        "optim", "weight_decay", "max_grad_norm", "gradient_checkpointing",
                    )
                },
                **lesson.arguments,
            ),
            train_dataset=Dataset.from_list([{**row, "row": number} for number, row in enumerate(rows)]),
            eval_dataset=Dataset.from_list([{**row, "row": -1} for row in watched]) if watched else None,
            processing_class=tokenizer,
            callbacks=[Flow()],
            **lesson.given,
        )  # fmt: skip
        if "ref" in getattr(
            model, "peft_config", {}
        ):  # TRL's copy of the adapter as it is: with the adapter off, the model is that already
            model.delete_adapter("ref")
        collate = trainer.data_collator
        trainer.data_collator = lambda found: _with_rows(collate(found), found)
        for printer in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
            trainer.remove_callback(printer)
        ends = saved is not None and saved.step >= saved.document("trainer_state")["max_steps"]
        if saved:
            log.info(f"{lesson.name}: going on from the checkpoint of step {saved.step}")
        elif watched:
            trainer.evaluate()
        if saved and ends:
            put(model, saved.tensors("weights"))
        else:
            trainer.train(resume_from_checkpoint=str(saved.folder) if saved else None)
    course.seconds = earlier + time.monotonic() - began
    if show:
        show(course.curve, now=True)
    return course


def _with_rows(batch: Any, found: Sequence[Mapping[str, Any]]) -> Any:
    """The batch with the numbers of its rows, "rows" (rows) int64. That of an online method is the list of rows as it is."""
    import torch

    return batch if isinstance(batch, list) else {**batch, "rows": torch.tensor([row["row"] for row in found])}


def _rows_of(inputs: Any) -> list[int]:
    """Numbers of the rows in a batch, which is left as TRL made it."""
    return [row["row"] for row in inputs] if isinstance(inputs, list) else [int(row) for row in inputs.pop("rows").tolist()]


def identity(
    steps: Steps,
    compute: Compute,
    device: torch.device,
    dtype: torch.dtype,
    data: Path,
    folders: Mapping[str, Path],
    module: Path,
) -> dict[str, str]:
    """What must be the same for a training to go on from a checkpoint of it.

    Args:
        data: folder of the pairs.
        folders: models that it reads, by what to call them.
        module: the stage's own file.
    """
    values = {**steps.model_dump(exclude=SIDELONG), "seed": compute.seed}
    return {
        "preferences": sha256_of(sorted(data.rglob("*.parquet"))),
        **{name: sha256_of(sorted(file for file in folder.iterdir() if file.suffix != ".md")) for name, folder in folders.items()},
        "code": sha256_of(code_of(module, Path(__file__).parents[1])),
        "parameters": sha256_of_text(json.dumps(values, sort_keys=True)),
        "threads": str(compute.threads),
        "processes": str(compute.processes),
        "dtype": str(dtype),
        "device": device.type,
        "library versions": json.dumps(proof.versions(LIBRARIES)),
    }


class Evidence:
    """What a training did to the weights, looked at before and after."""

    def __init__(self, model: Any, folder: Path) -> None:
        """Args:
        folder: for the trainable weights as they are now.
        """
        self.model, self.before = model, folder / "before.safetensors"
        proof.before_training(model, self.before)
        self.frozen = proof.sha256_of_tensors(proof.frozen(model))

    def ends(
        self, course: Course, settings: Mapping[str, Any], compute: Compute, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, CheckResult]:
        """The document of training.json, and the check `trained_what_it_should`."""
        groups, after = proof.movement(self.model, self.before), proof.sha256_of_tensors(proof.frozen(self.model))
        unmoved = proof.unmoved(groups)
        document = {
            "trained": groups,
            "frozen": {"tensors": len(proof.frozen(self.model)), "sha256_before": self.frozen, "sha256_after": after},
            "steps": course.step,
            "tokens": course.tokens,
            "loss": {"first": course.losses[0], "last": course.losses[-1]},
            "validation": [point for point in course.curve if "validation_loss" in point],
            "settings": settings,
            "seed": compute.seed,
            "threads": compute.threads,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "versions": proof.versions(LIBRARIES),
        }
        check = CheckResult(
            "trained_what_it_should",
            passed=not unmoved and after == self.frozen,
            blocking=True,
            count=len(unmoved) + (after != self.frozen),
            note="; ".join(
                [
                    *([f"did not move: {', '.join(unmoved)}"] if unmoved else []),
                    *([] if after == self.frozen else ["a frozen weight changed"]),
                ]
            )
            or ", ".join(f"{kind}: {group['moved']} of {group['tensors']} moved" for kind, group in groups.items()),
        )
        return document, check
