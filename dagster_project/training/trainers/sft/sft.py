"""tokenized -> adapter: supervised fine-tuning by TRL's SFTTrainer, on rows that are tokenized, labeled and packed."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.chat import IGNORE
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.core.torch_imports import load_compiler
from dagster_project.training.methods.attention import leave_uncompiled
from dagster_project.training.methods.build import PreparedModel, causal, decoder_layers
from dagster_project.training.methods.hardware import memory_trimmer
from dagster_project.training.methods.logits import logits_of
from dagster_project.training.tokens.collators import SIZES, collate_packed, collate_padded
from dagster_project.training.trainers.harness import distributed, sharding
from dagster_project.training.trainers.harness.checkpoint import Checkpoints
from dagster_project.training.trainers.harness.curve import LIVE
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.params import AdapterParams, SftParams
from dagster_project.training.trainers.harness.session import (
    Interrupted,
    ResumableTrainer,
    Session,
    monitor,
    put,
    run_session,
    stop_on_request,
    training_arguments,
)
from dagster_project.training.trainers.harness.weight_audit import trainable

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pedigree")


def steps(rows: int, params: SftParams, processes: int = 1) -> int:
    """Optimizer steps of a run over `rows` packed rows, with steps shared by `processes`."""
    planned = steps_per_epoch(rows, params, processes) * params.num_train_epochs
    return min(planned, params.max_steps or planned)


def steps_per_epoch(rows: int, params: SftParams, processes: int = 1) -> int:
    return math.ceil(rows / (params.per_device_train_batch_size * params.gradient_accumulation_steps * processes))


def warmup(total: int, params: SftParams) -> int:
    """Steps over which the rate rises, of `total`."""
    if params.lr_scheduler_type == "constant":
        return 0
    if params.warmup_steps is not None:
        return params.warmup_steps
    return min(math.ceil(total * params.warmup_ratio), total - 1)  # the rate of a single step is not 0


def unreached_rate(total: int, params: SftParams) -> str:
    """What a warm-up that does not end within `total` steps means; empty if it does."""
    rises = warmup(total, params)
    if rises < total:
        return ""
    reached = f"the rate reaches {(total - 1) / rises:.0%} of learning_rate"
    return f"warmup_steps: the warm-up of {rises} steps does not end in a training of {total}; {reached}"


def refuse_mistakes(params: SftParams, where: str, lengths: Sequence[Sequence[int]], validates: bool) -> None:
    """Find faults before a model is loaded that would otherwise fail late.

    Args:
        where: dotted path in params.yaml, for messages.
        lengths: tokens of each example in each row of the training split.
        validates: whether there is a validation split.
    Raises:
        InputError: all such mistakes at once.
    """
    import torch

    wrong: list[tuple[str, str]] = []
    if mistake := _schedule_mistake(params, steps(len(lengths), params)):
        hint = f"use the keys of transformers' {params.lr_scheduler_type} schedule"
        wrong.append((f"{where}.lr_scheduler_kwargs: {mistake}", hint))
    for key in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(params, key) and not validates:
            wrong.append((f"{where}.{key}: requires a validation split", "set splits.validation"))
    if params.group_by_length and any(len(row) > 1 for row in lengths):
        wrong.append((f"{where}.group_by_length: rows hold several examples", "set tokenized.packing: false"))
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow", "mlflow_skinny")}
    for name in params.trackers:
        if not any(map(find_spec, packages.get(name, (name,)))):
            wrong.append((f"{where}.report_to: {name} is not installed", f"pip install {name}, or set report_to: none"))
    if params.use_liger_kernel and not find_spec("liger_kernel"):
        wrong.append((f"{where}.use_liger_kernel: Liger is not installed", "pip install 'pedigree-llm[gpu]'"))
    elif params.use_liger_kernel and not torch.cuda.is_available():
        wrong.append((f"{where}.use_liger_kernel: Liger's kernels run on a GPU, and there is none", "leave it out"))
    if wrong:
        raise InputError("\n".join(f"params.yaml: {what}" for what, _ in wrong), "; ".join(hint for _, hint in wrong))


def _schedule_mistake(params: SftParams, total: int) -> str:
    """What is wrong with the schedule's own keys in a training of `total` steps; "" if nothing is."""
    import torch
    from transformers import get_scheduler

    kind, keys, rises = params.lr_scheduler_type, params.lr_scheduler_kwargs, warmup(total, params)
    if keys and kind in {"constant", "constant_with_warmup"}:
        return f"{kind} has no keys"
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=params.learning_rate)
    try:
        schedule = get_scheduler(kind, optimizer, rises, total, keys)
        if kind == "warmup_stable_decay" and keys["num_decay_steps"] > total - rises:
            follow = f"{max(total - rises, 0)} of {total} steps follow the warm-up"
            return f"num_decay_steps: {keys['num_decay_steps']}, and {follow}"
        factors = [schedule.lr_lambdas[0](step) for step in (*range(0, total, -(-total // 1000)), total)]
        stays = all(0 <= factor <= 1 + 1e-9 for factor in factors)
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        return str(error)
    return "" if stays else "the rate would not stay between 0 and learning_rate"


class SftSession(Session):
    """A supervised training; several processes may share its steps."""

    def __init__(
        self,
        prepared: PreparedModel,
        params: SftParams,
        compute: Compute,
        rows: Any,
        checkpoints: Checkpoints | None,
        live: Path | None,
    ) -> None:

        super().__init__("training", prepared.model, params, compute, checkpoints, live, LIVE)
        self.prepared, self.sft = prepared, params
        self.lengths = [sum(row) for row in rows["lengths"]]
        self.total = steps(len(rows), params, self.process.size)
        self.per_epoch = steps_per_epoch(len(rows), params, self.process.size)
        self.progress.total = self.total
        self.best_weights: dict[str, torch.Tensor] = self.saved.tensors("best") if self.saved else {}
        self._validation = {"nats": 0.0, "tokens": 0}  # summed here: the Trainer would average over rows of any length
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)
        self._step: tuple[torch.Tensor, int] | None = None

    def prepare_step(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """Sum the weights of a step, of all its passes in all processes, before the first of them."""
        if batches:
            self._step = sum(counted_weights(batch).to(device).sum() for batch in batches), len(batches)

    def loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """A pass's part of the weighted mean over its step; in validation the plain mean per token.

        Logits are computed only for positions with labels: with a large vocabulary the others would be most of the
        work.
        """
        self.batch.update(inputs)
        loss: torch.Tensor = self.compute_loss(model, partial(self._loss, model, inputs))
        return loss

    def _loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        from torch.nn.functional import cross_entropy

        labels = inputs["labels"][:, 1:]
        counted = labels != IGNORE
        hidden = self.prepared.hidden_states(inputs)
        logits = logits_of(causal(model), hidden[:, :-1][counted]).float()
        smoothing = self.sft.label_smoothing_factor if model.training else 0.0
        losses = cross_entropy(logits, labels[counted], reduction="none", label_smoothing=smoothing)
        if not model.training:
            if not self.idles:
                self._validation["nats"] += float(losses.double().sum())
                self._validation["tokens"] += len(losses)
            return losses.mean()
        assert self._step
        whole, passes = self._step
        loss = (losses * counted_weights(inputs)).sum() / whole
        more = self.prepared.extra_loss(model)
        return loss if more is None else loss + more / passes

    def training_pass(
        self, inputs: dict[str, Any], step: int, forward_backward: Callable[[], torch.Tensor], last: bool
    ) -> torch.Tensor:
        """One forward and backward pass, see `share_pass`."""
        rows = inputs["rows"].tolist()
        self.history.seen += [(step, (step - 1) // self.per_epoch + 1, row) for row in rows]
        self.history.tokens += sum(self.lengths[row] for row in rows)
        self.history.trained_tokens += int((inputs["labels"][:, 1:] != IGNORE).sum())
        return self.share_pass(rows, step, forward_backward, last)

    def sampler(self) -> Any:
        """Rows of similar length together, for `group_by_length`."""
        together = self.sft.per_device_train_batch_size * self.sft.gradient_accumulation_steps * self.process.size
        return _length_sampler_class()(self.lengths, together, self.compute.seed)

    def step_begins(self) -> None:
        if not self._recent:
            self._recent.append((time.monotonic(), self.history.tokens))

    def step_point(self, step: int, logs: Mapping[str, float]) -> tuple[dict[str, float], str]:
        point = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm")}
        self._recent.append((time.monotonic(), self.history.tokens))
        since, tokens = self._recent[0]
        speed = (self.history.tokens - tokens) / (self._recent[-1][0] - since)
        note = "loss {loss:.3f}, rate {learning_rate:.2g}, gradient {grad_norm:.2g}".format(**point)
        note += f", {speed:.0f} tokens/s"
        return {"step": step, **point, "tokens": self.history.tokens, "tokens_per_second": speed}, note

    def validation_point(self, step: int, logs: Mapping[str, float]) -> dict[str, float]:
        import torch

        self.end_validation(lambda: self.loss(self.model, self.batch))
        counts = torch.tensor([*self._validation.values()], dtype=torch.float64, device=self.device)
        nats, tokens = distributed.summed(counts).tolist()
        self._validation.update(nats=0.0, tokens=0)
        return {"step": step, "validation_loss": nats / tokens}

    def validation_pass(self, step: int) -> None:
        # sharded, the processes are at different passes here, so they cannot ask each other
        if not step and self.root is None and self.stop_requested():
            raise Interrupted("interrupted before the first step", "run again to start over")

    def validated(self, control: Any) -> None:
        if self.sft.load_best_model_at_end and self.history.best() == self.history.validation[-1]:
            self.best_weights.clear()
            for name, weight in trainable(self.model).items():
                kept = weight.detach() if self.root is not None else weight.detach().cpu()
                self.best_weights[name] = kept.clone()
            self.history.best_step = self.history.validation[-1][0]
        if self.history.stalled(self.sft.early_stopping_patience):
            control.should_training_stop = True

    def method_state(self) -> dict[str, Any]:
        return {"method": self.prepared.state()}

    def method_tensors(self) -> dict[str, Mapping[str, torch.Tensor]]:
        return {"best": self.best_weights} if self.best_weights else {}

    def restore_method(self) -> None:
        self.prepared.restore(self.state["method"])
        if self.root is not None and self.saved and self.history.best_step is not None:
            self.best_weights.update({name: weight.detach().clone() for name, weight in trainable(self.model).items()})
            self.read_parts("best", self.best_weights)

    def is_complete(self) -> bool:
        if self.saved is None:
            return False
        return self.saved.step >= self.total or self.history.stalled(self.sft.early_stopping_patience)


def counted_weights(batch: Mapping[str, Any]) -> torch.Tensor:
    """Weights of the tokens of a batch that have labels, (tokens); the first token of a row has no context."""
    weights: torch.Tensor = batch["weights"][:, 1:][batch["labels"][:, 1:] != IGNORE]
    return weights


@cache
def _trainer_class() -> type:
    import torch
    from trl import SFTTrainer

    class PackedTrainer(ResumableTrainer, SFTTrainer):
        """TRL's trainer with the loss and the passes of an `SftSession`."""

        session: SftSession
        loss_is_scaled_for_ga = True  # the loss of a pass is its part of that of the step

        def get_batch_samples(self, iterator: Any, passes: int, device: torch.device) -> tuple[list[Any], None]:
            """The batches of a step."""
            batches, _ = super().get_batch_samples(iterator, passes, device)
            self.session.prepare_step(batches, device)
            return batches, None

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss = self.session.loss(model, inputs)
            return (loss, None) if return_outputs else loss

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            forward_backward = partial(super().training_step, model, inputs, num_items_in_batch)
            step, last = self.state.global_step + 1, self.accelerator.sync_gradients
            return self.session.training_pass(inputs, step, forward_backward, last)

        def prediction_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
            if self.session.validates_here():
                return super().prediction_step(model, inputs, *arguments, **named)
            self.session.batch.update(self._prepare_inputs(inputs))
            return torch.zeros((), device=self.session.device), None, None

        def _get_train_sampler(self, *arguments: Any) -> Any:
            if self.session.sft.group_by_length:
                return self.session.sampler()
            return super()._get_train_sampler(*arguments)

    return PackedTrainer


@cache
def _length_sampler_class() -> type:
    import torch
    from torch.utils.data import Sampler
    from transformers.trainer_pt_utils import get_length_grouped_indices

    class LengthSampler(Sampler):
        """Rows of similar length together, shuffled; the order of an epoch depends only on the seed and the epoch."""

        def __init__(self, lengths: Sequence[int], together: int, seed: int) -> None:
            self.lengths, self.together, self.seed, self.epoch = list(lengths), together, seed, 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(self.lengths)

        def __iter__(self) -> Iterator[int]:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            return iter(get_length_grouped_indices(self.lengths, self.together, generator=generator))

    return LengthSampler


def train(
    prepared: PreparedModel,
    tokenizer: Any,
    train_rows: Any,
    validation_rows: Any,
    params: SftParams,
    compute: Compute,
    checkpoints: Checkpoints | None = None,
    live: Path | None = None,
) -> TrainingHistory:
    """Train a model in place, from its newest checkpoint if it has one.

    Args:
        prepared: as `build` makes it.
        train_rows, validation_rows: `datasets.Dataset` with input_ids, labels, weights and lengths, each row a packed
            row.
        checkpoints: where to keep them; None to keep none.
        live: folder for the curves so far; None to write none.
    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint has been written.
        Diverged: a loss or a gradient is not finite. The checkpoints are from before.
        PedigreeError: the disk is full.
    """
    session = SftSession(prepared, params, compute, train_rows, checkpoints, live)
    with tempfile.TemporaryDirectory() as scratch, stop_on_request() as session.stop_requested:
        _name_tensorboard_folder(params, session.checkpoints)
        for weight in trainable(session.model).values():
            distributed.from_first(weight.data)
        if isinstance(params, AdapterParams) and params.sharding:
            session.divided(sharding.shard(session.model, params.sharding, session.device))
        trainer = _build_trainer(session, tokenizer, train_rows, validation_rows, scratch)
        with _accelerated(session):
            run_session(session, trainer, bool(validation_rows))
        if params.load_best_model_at_end:
            put(session.model, session.best_weights)
            log.info(f"training: keeping the weights of step {session.history.best_step}")
        if session.root is not None:
            sharding.unshard(session.model)
    session.history.seconds = session.seconds()
    session.show(session.history.curve, now=True)
    return session.history


def _name_tensorboard_folder(params: SftParams, checkpoints: Checkpoints | None) -> None:
    if checkpoints and "tensorboard" in params.trackers:
        folder = checkpoints.folder
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.parent.parent / "tensorboard" / folder.name))


def _build_trainer(session: SftSession, tokenizer: Any, train_rows: Any, validation_rows: Any, scratch: str) -> Any:
    from trl import SFTConfig

    params, prepared, model = session.sft, session.prepared, session.model
    arguments = training_arguments(params, session.compute, scratch, model.device.type, bool(validation_rows))
    arguments |= {
        "report_to": params.trackers or "none",
        "run_name": session.checkpoints.folder.name if session.checkpoints else None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "optim": prepared.optim or params.optim,
        "lr_scheduler_kwargs": params.lr_scheduler_kwargs,
        "warmup_steps": warmup(session.total, params),
        "max_steps": session.total,
        "gradient_accumulation_steps": params.gradient_accumulation_steps * session.process.size,
        "gradient_checkpointing": params.gradient_checkpointing is True,
    }
    whole = {weight: weight.data for weight in trainable(model).values()}
    with _plain_output_layer(model):
        trainer = _trainer_class()(
            model=model,
            args=SFTConfig(**arguments),
            train_dataset=train_rows.add_column("row", list(range(len(train_rows)))),
            eval_dataset=validation_rows or None,
            processing_class=tokenizer,
            data_collator=partial(collate_packed, multiple=SIZES) if prepared.packs else collate_padded,
            callbacks=[*prepared.callbacks, monitor(session)],
        )
    # TRL has rounded adapters of 4-bit weights to bfloat16, which represents no step below 1/256 of a weight
    for weight, data in whole.items():
        weight.data = data
    return trainer


@contextmanager
def _plain_output_layer(model: Any) -> Iterator[None]:
    """While open, a model shows its output layer without an adapter, which TRL 1.16 refuses because of its loss."""
    layer = model.get_output_embeddings()
    if not hasattr(layer, "base_layer"):
        yield
        return
    model.get_output_embeddings = lambda: layer.base_layer
    try:
        yield
    finally:
        del model.get_output_embeddings


@contextmanager
def _accelerated(session: SftSession) -> Iterator[None]:
    """Set up the kernels, compilation and hooks of the parameters. The hooks are removed at the end."""
    params, model, hooks = session.sft, session.model, []
    if params.use_liger_kernel:
        use_liger_kernels(causal(model))
    if params.compile == "layers":
        compile_layers(model)
    # a checkpointed layer frees nearly all of its tensors, and glibc would keep their memory besides the next layer's
    if params.gradient_checkpointing is True and model.device.type == "cpu" and params.compile == "none":
        give_back = memory_trimmer()
        hooks += [layer.register_forward_hook(give_back) for layer in decoder_layers(model)]
    if params.neftune_noise_alpha:
        hooks.append(add_noise(causal(model).get_input_embeddings(), params.neftune_noise_alpha, session.batch))
    yield
    for hook in hooks:
        hook.remove()


def compile_layers(model: Any) -> None:
    """Compile each decoder layer separately, for rows of any length. The names of the weights do not change."""
    import torch

    load_compiler()
    from dagster_project.training.methods import compiled_lora  # noqa: F401 registers an operation

    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # sets it in the compiler, too
    leave_uncompiled()
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def use_liger_kernels(model: Any) -> None:
    """Apply Liger's kernels to the existing norms, rotary embeddings and gated MLPs of a model.

    The loss is not computed by Liger.

    Raises:
        InputError: Liger has no kernels for this model.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        problem = f"params.yaml: use_liger_kernel: Liger has no kernels for {model.config.model_type}"
        raise InputError(problem, "leave it out to train without them")
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def add_noise(embeddings: Any, alpha: float, batch: dict[str, Any]) -> Any:
    """Uniform noise of alpha / sqrt(length x width) on each token's embedding (NEFTune, arXiv:2310.05914, section 2).

    The length is that of the token's example. transformers' own hook uses the row's length, which would make the noise
    of packed rows too weak.

    Args:
        batch: contains the `cu_seq_lens_q` of the current batch.
    Returns:
        A handle; its `remove()` removes the noise.
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
