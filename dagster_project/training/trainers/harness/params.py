"""Parameters of training, for every trainer. Names are those of transformers' TrainingArguments."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from dagster_project.core import params
from dagster_project.core.errors import InputError
from dagster_project.core.params import Section
from dagster_project.training.methods.options import Quantization, why_not_merged

Tracker = Literal["tensorboard", "wandb", "mlflow"]

AUTO = "auto"
"""Value that an entry may give instead of a number; trainers/sft/auto.py replaces it before training."""


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
"""Optimizer -> size of its state, as a multiple of the trainable weights in float32."""


SETTINGS_ORDER = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "group_by_length", "optim",
    "weight_decay", "max_grad_norm",
)  # fmt: skip
"""Order of the first settings of supervised tuning in training.json: part of its bytes."""


class TrainingParams(Section):
    """Parameters shared by supervised and preference training. Subclasses override types and defaults."""

    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate."""
    lr_scheduler_type: str = "cosine"
    """Shape of the learning rate after warm-up, by the name of transformers' schedule."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the optimizer steps during which the learning rate rises to its peak."""
    num_train_epochs: int = Field(default=1, ge=1)
    """Passes over the training split."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps after which training stops, regardless of the number of epochs. null: no limit."""
    per_device_train_batch_size: int = Field(default=1, ge=1)
    """Rows per forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""
    optim: str = "adamw_torch_fused"
    """The optimizer."""
    weight_decay: float = Field(default=0.0, ge=0)
    """How fast weights shrink towards zero, as a share of the learning rate."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest gradient norm. A larger gradient is scaled down to it."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints to keep during training. All are deleted when training is complete."""

    def saves_at(self, step: int) -> bool:
        """Whether to write a checkpoint after a step within an epoch."""
        raise NotImplementedError

    def saves_after_epoch(self, step: int, last: bool) -> bool:
        """Whether to write a checkpoint at the end of an epoch.

        Args:
            last: it is also the end of the training.
        """
        raise NotImplementedError


class SftParams(TrainingParams):
    """Supervised fine-tuning."""

    learning_rate: Annotated[float, Field(gt=0), OrAuto] = 2e-4
    """Peak learning rate. Small models need more: 1e-3 suits 135M parameters. `auto` finds it by short trials on the
    validation loss, see docs/methods.md."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
    ] = "cosine"  # fmt: skip
    """Shape of the learning rate after warm-up, by the name of transformers' schedule."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """The schedule's own keys, e.g. `{min_lr_rate: 0.1}` for cosine_with_min_lr."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Optimizer steps during which the learning rate rises. null: by `warmup_ratio`."""
    num_train_epochs: Annotated[int, Field(ge=1), OrAuto] = 2
    """Passes over the training split. `auto` chooses by the number of examples, see docs/methods.md."""
    per_device_train_batch_size: Annotated[int, Field(ge=1), OrAuto] = 1
    """Packed rows per forward pass. `auto` chooses by the number of examples, see docs/methods.md."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step. Every token counts as in one large pass, or every example
    (`tokenized.weigh`)."""
    group_by_length: bool = False
    """Put rows of similar length into one step. For rows of one example each (`tokenized.packing: false`)."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adafactor", "adagrad", "rmsprop", "sgd"] = (
        "adamw_torch_fused"
    )
    """The optimizer. adamw_8bit (bitsandbytes) and adafactor keep a smaller state and need less memory."""
    label_smoothing_factor: float = Field(default=0.0, ge=0, lt=1)
    """Probability that is spread over all tokens in the training target. The validation loss is always computed
    without it."""
    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """Noise added to the embeddings during training (NEFTune); 5 is usual. Scaled by the length of each example, not of
    the packed row. null: no noise."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Training takes about a third longer, and its memory no longer grows with depth. `auto`: on if the predicted
    memory exceeds the free memory, off where no prediction is possible (methods that read the weights when they are
    built). Changes no bit of the result."""
    compile: Literal["none", "layers"] = "none"
    """`layers` compiles each decoder layer with torch.compile: slower to start, faster per step. Requires a C++
    compiler on a CPU."""
    use_liger_kernel: bool = False
    """Use Liger's fused kernels for normalization, rotary embedding and the gated MLP; the loss is computed without
    them. Requires a GPU and `pip install 'pedigree-llm[gpu]'`."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Epochs in a row without a lower validation loss after which training stops. null: train to the end."""
    load_best_model_at_end: bool = False
    """Keep the weights of the epoch with the lowest validation loss instead of the last ones."""
    save_strategy: Literal["epoch", "steps", "no"] = "epoch"
    """When to write a checkpoint from which an interrupted training resumes. With `no`, only when training is stopped
    with Ctrl-C."""
    save_steps: int = Field(default=500, ge=1)
    """Optimizer steps between two checkpoints with `save_strategy: steps`."""
    report_to: Literal["none"] | Tracker | list[Tracker] = "none"
    """Also send the curves to tensorboard, wandb or mlflow (one or a list), if installed. Not part of the result."""

    @property
    def trackers(self) -> list[str]:
        if self.report_to == "none":
            return []
        return [self.report_to] if isinstance(self.report_to, str) else list(self.report_to)

    def settings(self) -> dict[str, Any]:
        """The parameters that determine the weights, in the order that training.json keeps."""
        values = self.model_dump(exclude=set(NON_SEMANTIC_PARAMS))
        return {name: values[name] for name in dict.fromkeys((*SETTINGS_ORDER, *values))}

    def saves_at(self, step: int) -> bool:
        return self.save_strategy == "steps" and step % self.save_steps == 0

    def saves_after_epoch(self, step: int, last: bool) -> bool:
        return self.save_strategy == "epoch" or self.saves_at(step) or (last and self.save_strategy != "no")


class Sharding(Section):
    """Divide weights, gradients and optimizer state among `compute.processes`, for a model that does not fit one GPU.
    See docs/methods.md."""

    fsdp: Literal["full_shard", "shard_grad_op"] = "full_shard"
    """`full_shard` gathers a layer's weights for its forward pass and again for its backward pass; `shard_grad_op`
    keeps them in between, which is faster and needs more memory."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the memory of the CPU; a GPU holds only the current layers. No
    effect without a GPU; refused with 4-bit weights."""


class PreferenceParams(TrainingParams):
    """Parameters of preference training: reward model, DPO and related methods."""

    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate. Lower than in supervised tuning, because a preference carries little information."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = "cosine"
    """Shape of the learning rate after warm-up, by the name of transformers' schedule."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Pairs per forward pass, or answers for online methods."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adafactor", "rmsprop", "sgd"] = (
        "adamw_torch_fused"
    )
    """The optimizer. adamw_8bit (bitsandbytes) and adafactor keep a smaller state and need less memory."""
    gradient_checkpointing: bool = False
    """Training takes about a third longer, and its memory no longer grows with depth. Changes no bit of the result."""
    save_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between two checkpoints from which an interrupted training resumes. null: one at the end of each
    epoch."""
    quantization: Quantization = "none"
    """Format of the frozen weights while LoRA is trained: nf4 is QLoRA. The adapter is merged into unquantized weights.
    """
    sharding: Sharding | None = None
    """Divide the model among `compute.processes`, see docs/methods.md. null: each process holds a whole model."""

    def settings(self, ignored: Collection[str] = ()) -> dict[str, Any]:
        """The parameters that determine the weights, for training.json.

        Args:
            ignored: keys that the method does not use.
        """
        off = {"sharding": None, "quantization": "none"}
        unused = {name for name, value in off.items() if getattr(self, name) == value}
        return self.model_dump(exclude={*NON_SEMANTIC_PARAMS, *ignored, *unused})

    def saves_at(self, step: int) -> bool:
        return bool(self.save_steps and step % self.save_steps == 0)

    def saves_after_epoch(self, step: int, last: bool) -> bool:
        return True


class AdapterParams(SftParams):
    """One entry per variant.

    Its name becomes `adapter@NAME`, `merged@NAME` and `evaluation@NAME`. See docs/methods.md.
    """

    method: str = "lora"
    """lora, rslora, dora, qlora, qdora, adalora, ia3, prefix_tuning, prompt_tuning, p_tuning, layernorm, bitfit, full,
    feature_extraction, or another method of PEFT by its name."""
    peft: dict[str, Any] = {}
    """The method's own keys, as PEFT names them (r, lora_alpha, target_modules, ...). `r` may be `auto` for lora,
    rslora, dora, qlora and qdora; `lora_alpha` is then twice `r` unless it is set."""
    quantization: Quantization | None = None
    """Format of the base model's weights during training. null: nf4 for qlora and qdora, none for the others."""
    sharding: Sharding | None = None
    """Divide the model among `compute.processes`. null: each process holds a whole model."""
    merge: bool = True
    """Make a standalone model of base model and adapter. false: keep the adapter separate, and evaluation loads both;
    required for prefix_tuning, prompt_tuning, p_tuning and feature_extraction."""
    command: str | None = None
    """Train by this command, e.g. `python train.py`, see docs/own-trainer.md. It is split into words as a shell does,
    but not run by a shell. The other keys of the entry that are set are passed on to it. null: Pedigree's own trainer.
    """
    files: list[str] = []
    """Files in data/trainers/ that are copied into the folder where `command` runs."""
    options: dict[str, Any] = {}
    """Keys of your own for `command`, passed on unchanged."""
    merge_of: dict[str, float] | None = None
    """Merge other entries of this section instead of training: name -> weight, e.g. `{faq: 0.6, triage: 0.4}`. `method`
    is then one of PEFT's ways to merge (default: cat), `peft` has its keys. See docs/merging.md. null: train."""

    def settings(self) -> dict[str, Any]:
        unused = {*COMMAND_KEYS, "merge_of", *(["sharding"] if self.sharding is None else [])}
        return {name: value for name, value in super().settings().items() if name not in unused}


COMMAND_KEYS = ("command", "files", "options")
"""Keys of an entry that only a training command uses."""


NON_SEMANTIC_PARAMS = frozenset(
    {"report_to", "gradient_checkpointing", "save_strategy", "save_steps", "save_total_limit"}
)
"""Parameters that do not change the trained weights. They are not part of a checkpoint's identity."""


def refuse_warmup(params: TrainingParams, where: str) -> None:
    """Raise InputError if a warm-up is given for a schedule that has none."""
    given = [name for name in ("warmup_steps", "warmup_ratio") if name in params.model_fields_set]
    used = [name for name in given if getattr(params, name)]
    if params.lr_scheduler_type == "constant" and used:
        problem = f"params.yaml: {where}.{used[0]}: has no effect on the schedule constant"
        raise InputError(problem, "set lr_scheduler_type: constant_with_warmup")


def refuse_unmerged(adapters: Mapping[str, Any], name: str, where: str) -> None:
    """Check that an adapter exists and yields a standalone model.

    Args:
        adapters: section `adapter` of params.yaml.
        where: dotted path of the key that names the adapter, for messages.
    Raises:
        InputError: no such adapter, or it is not merged.
    """
    if name not in adapters:
        raise InputError(f"params.yaml: {where}: there is no adapter.{name}", f"adapters: {', '.join(adapters)}")
    entry = params.parse(AdapterParams, adapters[name], f"adapter.{name}")
    if not entry.merge or why_not_merged(entry.method, entry.peft, entry.quantization):
        problem = f"params.yaml: {where}: adapter.{name} does not produce a merged model"
        raise InputError(problem, "choose a variant that is merged")
