"""Supervised fine-tuning: TRL's SFTTrainer over rows that are already tokenized, labelled and packed."""

from __future__ import annotations

import logging
import math
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from dagster_project.chat import IGNORE
from dagster_project.params import Compute, Section
from dagster_project.progress import Progress

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pedigree")


class Recipe(Section):
    """How to train: the names are those of transformers' TrainingArguments."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak rate. Small models want more: 1e-3 suits 135M parameters."""
    lr_scheduler_type: str = "cosine"
    """Shape of the rate after warm-up, one of transformers' schedules."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the rate rises to its peak."""
    num_train_epochs: int = Field(default=2, ge=1)
    """Passes over the training split."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps after which to stop whatever the epochs say; null for no such limit."""
    per_device_train_batch_size: int = Field(default=1, ge=1)
    """Packed rows per forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = False
    """Trade a third more time for memory that no longer grows with depth."""


def steps(rows: int, recipe: Recipe) -> int:
    """Optimizer steps of a run over `rows` packed rows."""
    per_step = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    planned = math.ceil(rows / per_step) * recipe.num_train_epochs
    return min(planned, recipe.max_steps or planned)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Packed rows to one batch without padding: input_ids, labels, position_ids (1, tokens) int64, weights (1, tokens) float32, and the
    examples' bounds `cu_seq_lens_q` (examples + 1) int32, named as flash attention names them.

    Positions start at 0 for each example and no attention mask is given, from which every attention knows that examples are strangers.
    An example's first token has nothing to be predicted from, so it is no label:

        lengths [2] and [1], ids [5, 6] and [7]  ->  position_ids [0, 1, 0], cu_seq_lens_q [0, 2, 3], labels [-100, 6, -100]
    """
    import torch

    positions = [p for row in rows for length in row["lengths"] for p in range(length)]
    labels = [label for row in rows for label in row["labels"]]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": torch.tensor([[label if p else IGNORE for label, p in zip(labels, positions, strict=True)]]),
        "weights": torch.tensor([[weight for row in rows for weight in row["weights"]]]),
        "position_ids": torch.tensor([positions]),
        "cu_seq_lens_q": torch.tensor([0, *accumulate(length for row in rows for length in row["lengths"])], dtype=torch.int32),
    }


def attention_for(device: torch.device) -> str:
    """Which attention to load a model with for training on packed rows.

    On a CPU each example attends by itself: a block-diagonal mask over a whole row computes mostly what it then throws away
    (a third of a training step at 512 tokens a row). On a GPU one masked call is faster than many small ones.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("by_example", _attend_by_example)
    AttentionMaskInterface.register("by_example", lambda *_, **__: None)
    return "by_example" if device.type == "cpu" else "sdpa"


def _attend_by_example(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example. query (1, heads, tokens, size), key and value with fewer heads -> (1, tokens, heads, size)."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import repeat_kv

    lengths = cu_seq_lens_q.diff().tolist()
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    found = [scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling) for q, k, v in parts]
    return torch.cat(found, 2).transpose(1, 2).contiguous(), None


def train(model: Any, tokenizer: Any, train_rows: Any, validation_rows: Any, recipe: Recipe, compute: Compute) -> list[dict[str, float]]:
    """Train `model` in place.

    Args:
        model: a causal language model, or a PeftModel over one, loaded with the attention that `attention_for` names.
        train_rows, validation_rows: `datasets.Dataset` with input_ids, labels, weights and lengths, each row a packed row.
    Returns:
        The curve: {"step", "loss", "learning_rate"} at every step and {"step", "validation_loss"} before the first step and after each epoch.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class PackedTrainer(SFTTrainer):
        """TRL's trainer with logits only where a label counts (with a large vocabulary the rest is much work in vain), weighted.

        The loss is the weighted mean over a forward pass, and its plain mean per token in evaluation.
        """

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            causal = model.get_base_model() if hasattr(model, "get_base_model") else model
            hidden = causal.base_model(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                cu_seq_lens_q=inputs["cu_seq_lens_q"],
                use_cache=False,
            ).last_hidden_state
            labels = inputs["labels"][:, 1:]
            counted = labels != IGNORE
            losses = cross_entropy(causal.get_output_embeddings()(hidden[:, :-1][counted]).float(), labels[counted], reduction="none")
            weights = inputs["weights"][:, 1:][counted] if model.training else torch.ones_like(losses)
            loss = (losses * weights).sum() / weights.sum()
            if not model.training:
                watched["nats"] += float(losses.double().sum())
                watched["tokens"] += len(losses)
            return (loss, None) if return_outputs else loss

    curve: list[dict[str, float]] = []
    watched = {"nats": 0.0, "tokens": 0}  # of the evaluation under way: the Trainer would average over rows, however few tokens they hold
    total = steps(len(train_rows), recipe)
    progress = Progress("training", total, "step")

    class Curve(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            logs = logs or {}
            if "loss" in logs:
                curve.append({"step": state.global_step, "loss": logs["loss"], "learning_rate": logs["learning_rate"]})
                progress.advance(note=f"loss {logs['loss']:.3f}")
            if "eval_loss" in logs:
                loss = watched["nats"] / watched["tokens"]
                watched.update(nats=0.0, tokens=0)
                curve.append({"step": state.global_step, "validation_loss": loss})
                log.info(f"training: step {state.global_step}, validation loss {loss:.3f}")

    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=scratch,
            seed=compute.seed,
            data_seed=compute.seed,
            report_to="none",
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
            learning_rate=recipe.learning_rate,
            lr_scheduler_type=recipe.lr_scheduler_type,
            warmup_steps=math.ceil(total * recipe.warmup_ratio),
            num_train_epochs=recipe.num_train_epochs,
            max_steps=total,
            weight_decay=recipe.weight_decay,
            per_device_train_batch_size=recipe.per_device_train_batch_size,
            per_device_eval_batch_size=recipe.per_device_train_batch_size,
            gradient_accumulation_steps=recipe.gradient_accumulation_steps,
            max_grad_norm=recipe.max_grad_norm,
            gradient_checkpointing=recipe.gradient_checkpointing,
        )
        trainer = PackedTrainer(
            model=model,
            args=config,
            train_dataset=train_rows,
            eval_dataset=validation_rows or None,
            processing_class=tokenizer,
            data_collator=collate,
            callbacks=[Curve()],
        )
        trainer.model_accepts_loss_kwargs = False  # our loss is a mean already: let the Trainer average over accumulation steps
        for printer in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
            trainer.remove_callback(printer)
        if validation_rows:
            trainer.evaluate()
        trainer.train()
    return curve


def write_curve(path: Path, curve: list[dict[str, float]]) -> None:
    """The training loss as CSV (step, loss) for `dvc plots`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("step,loss\n" + "".join(f"{point['step']},{point['loss']:.6g}\n" for point in curve if "loss" in point))
