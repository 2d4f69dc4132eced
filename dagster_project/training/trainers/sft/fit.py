"""Fit one adapter: resolve `auto`, sweep the learning rate, build, train, and compare the weights before and after."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_files, sha256_of_text
from dagster_project.core.params import Compute
from dagster_project.core.records import read_table
from dagster_project.training.methods.attention import attention_for
from dagster_project.training.methods.build import PreparedModel, build, causal, refuse_unmatched
from dagster_project.training.methods.feature_extraction import split_prompts
from dagster_project.training.methods.hardware import prepare
from dagster_project.training.methods.isolation import refuse_mixing
from dagster_project.training.methods.load import load_tokenizer
from dagster_project.training.methods.options import quantization_of
from dagster_project.training.trainers.harness import weight_audit
from dagster_project.training.trainers.harness.checkpoint import Checkpoints, code_of, params_identity, refuse_full_disk
from dagster_project.training.trainers.harness.curve import live_writer
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.launch import (
    is_first_host,
    portable,
    refuse_differences,
    settings_document,
    start_others,
)
from dagster_project.training.trainers.harness.params import OPTIMIZER_MEMORY, AdapterParams
from dagster_project.training.trainers.harness.session import Diverged, Interrupted, advice_on_memory
from dagster_project.training.trainers.harness.weight_audit import WeightAudit, WeightChange
from dagster_project.training.trainers.sft import auto
from dagster_project.training.trainers.sft.sft import steps, train

log = logging.getLogger("pedigree")

Advised = Callable[[], AbstractContextManager[None]]
"""Opens a context that turns running out of memory into a message with advice."""


@dataclass(frozen=True)
class TrainingData:
    """Data of a training, and how to build its model."""

    name: str
    """Of the variant."""
    compute: Compute
    tokenized: Path
    base_model: Path
    tokenizer: Any
    rows: dict[str, Any]
    """Split -> `datasets.Dataset` of packed rows."""
    category: dict[str, str]
    """Example -> category, if categories are predicted."""

    @classmethod
    def read(cls, name: str, method: str, compute: Compute, tokenized: Path, base_model: Path) -> TrainingData:
        from datasets import Dataset

        columns = ["example_ids", "input_ids", "labels", "weights", "lengths"]
        files = {split: tokenized / f"{split}.parquet" for split in ("train", "validation")}
        rows = {split: Dataset.from_list(read_table(file, columns)) for split, file in files.items()}
        if not len(rows["train"]):
            raise InputError("adapter: the training split is empty", "add sources to raw_examples.sources")
        tokenizer = load_tokenizer(base_model, tokenized)
        labeled = read_table(tokenized / "categories.parquet") if method.lower() == "feature_extraction" else []
        category = {line["example_id"]: line["category"] for line in labeled}
        return cls(name, compute, tokenized, base_model, tokenizer, rows, category)

    @property
    def where(self) -> str:
        """Path of the entry in params.yaml."""
        return f"adapter.{self.name}"

    @property
    def example_ids(self) -> list[list[str]]:
        """The examples in each row of the training split."""
        return list(self.rows["train"]["example_ids"])

    def steps(self, params: AdapterParams, processes: int = 1) -> int:
        return steps(len(self.rows["train"]), params, processes)

    def identity(self) -> dict[str, str]:
        """The part of a training's identity that its inputs determine."""
        base = self.base_model
        tokenizer = sorted(base.glob("tokenizer*")) + sorted(base.glob("special_tokens*"))
        return {
            "tokenized data": sha256_of_files([self.tokenized / f"{split}.parquet" for split in self.rows]),
            "chat template": sha256_of_text(json.dumps(self.tokenizer.chat_template)),
            "tokenizer": sha256_of_files(tokenizer),
            "base model": sha256_of_files(sorted([*base.glob("*.safetensors"), base / "config.json"])),
        }

    def model(self, params: AdapterParams, total: int) -> PreparedModel:
        """An untrained model, the same each time.

        Args:
            total: optimizer steps of the training.
        """
        computing, dtype = prepare(self.compute)
        device = computing
        if params.sharding and quantization_of(params.method, params.quantization) == "none":
            import torch

            device = torch.device("cpu")  # the whole model is never on one GPU
        labels = {self.category[identity] for row in self.example_ids for identity in row if identity in self.category}
        prepared = build(
            params.method, params.peft, self.base_model, device, dtype, self.where, params.quantization, params.merge,
            total, sorted(labels),
        )  # fmt: skip
        if hasattr(prepared.model, "named_modules"):  # a classifier's head has none
            refuse_unmatched(prepared.model, params.peft, self.where)
        if params.neftune_noise_alpha and not prepared.packs:
            problem = f"{params.method} does not train word embeddings"
            raise InputError(f"params.yaml: {self.where}.neftune_noise_alpha: {problem}", "leave it out")
        if device != computing:
            causal(prepared.model).set_attn_implementation(attention_for(computing, dtype))
        if prepared.packs and not params.sharding:
            lengths = [row for rows in self.rows.values() if len(rows) for row in rows["lengths"]]
            several = int(params.per_device_train_batch_size) > 1 or any(len(row) > 1 for row in lengths)
            hint = "set tokenized.packing: false and per_device_train_batch_size: 1"
            refuse_mixing(prepared.model, prepared.hidden_states, several, hint)
        # the paged optimizer has no sharded state
        return replace(prepared, optim=None) if params.sharding else prepared

    def train(
        self,
        prepared: PreparedModel,
        params: AdapterParams,
        checkpoints: Checkpoints | None = None,
        live: Path | None = None,
    ) -> TrainingHistory:
        rows, validation_rows = self.rows["train"], self.rows["validation"]
        return train(prepared, self.tokenizer, rows, validation_rows, params, self.compute, checkpoints, live)


@dataclass(frozen=True)
class FitResult:
    """A trained adapter."""

    prepared: PreparedModel
    params: AdapterParams
    """The entry with a number for each `auto`."""
    chosen: dict[str, auto.Choice]
    """The value of each `auto` and its reason, by its name in the entry."""
    trials: dict[float, float]
    """Learning rate -> validation loss of the sweep."""
    total: int
    """Planned optimizer steps."""
    history: TrainingHistory
    example_ids: list[list[str]]
    """The examples in each row of `history.seen`."""
    change: WeightChange


def fit(
    data: TrainingData,
    settled: auto.ResolvedParams[AdapterParams],
    identity: dict[str, str],
    checkpoints: Path,
    out: Path,
    live: Path | None,
    advised: Advised,
) -> FitResult:
    """Train an adapter, from its newest checkpoint if it has one.

    Args:
        settled: the entry without `auto`, except for a learning rate that is still to be swept.
        identity: what must be equal to resume from a checkpoint, in addition to the parameters.
        checkpoints: folder that survives a killed run.
        out: only the free space of its disk is checked.
    Raises:
        Diverged: a loss or a gradient is not finite.
        InputError, PedigreeError: bad settings; out of memory or disk; interrupted.
    """
    params, chosen, trials = settled.params, dict(settled.chosen), dict[float, float]()
    if settled.trial:
        trial = settled.trial.model_copy(update={"gradient_checkpointing": params.gradient_checkpointing})
        same = identity | params_identity(trial, data.compute)

        def learn(one: AdapterParams) -> TrainingHistory:
            return data.train(data.model(one, data.steps(one)), one)

        with advised():
            trials = auto.sweep(trial, learn, checkpoints / "sweep.json", same)
        chosen["learning_rate"] = auto.best(trials, trial)
        params = auto.put(params, chosen)
    for name, choice in chosen.items():
        log.info(f"training {data.name}: {name} {choice.value}: {choice.why}")
    total = data.steps(params, data.compute.processes)
    with advised():
        prepared = data.model(params, total)
    refuse_full_disk(_disk(prepared, params, checkpoints, out), data.where)
    audit = WeightAudit(prepared.model, checkpoints)
    _log_start(data, prepared)
    whole = identity | params_identity(params, data.compute)
    whole |= {"weights at the start": sha256_of_files([audit.before]), "attention": prepared.attention}
    kept = Checkpoints(checkpoints, whole, params.save_total_limit, sharded=params.sharding is not None)
    example_ids = data.example_ids
    if prepared.fit:
        with advised():
            history, example_ids = _fit_without_steps(data, prepared, live)
    else:
        of_others = identity | {"code of the trainer": code_of_trainer()}
        start_others({**_shared(data, params, checkpoints), "identity": of_others}, __name__)
        with advised():
            history = data.train(prepared, params, kept, live)
    return FitResult(prepared, params, chosen, trials, total, history, example_ids, audit.change())


def _shared(data: TrainingData, params: AdapterParams, checkpoints: Path) -> dict[str, Any]:
    """What the other processes need for the same training."""
    return {
        "name": data.name,
        **settings_document(params, data.compute),
        "tokenized": portable(data.tokenized),
        "base_model": portable(data.base_model),
        "checkpoints": portable(checkpoints),
    }


def other_process(work: Mapping[str, Any]) -> None:
    """Work of the other processes: the same training, without writing anything.

    Args:
        work: of `_shared`.
    """
    params, compute = AdapterParams.model_validate(work["params"]), Compute.model_validate(work["compute"])
    data = TrainingData.read(work["name"], params.method, compute, Path(work["tokenized"]), Path(work["base_model"]))
    if not is_first_host():
        refuse_other_inputs(data, work["identity"])
    total = data.steps(params, compute.processes)
    with suppress(Diverged, Interrupted), advice_on_memory():  # the first process reports it
        prepared = data.model(params, total)
        silent = params.model_copy(update={"report_to": "none"})
        data.train(prepared, silent, Checkpoints(Path(work["checkpoints"]), {}))


def refuse_other_inputs(data: TrainingData, expected: Mapping[str, str]) -> None:
    """Raise InputError if data, code or versions on this host differ from those of the first one."""
    device, dtype = prepare(data.compute)
    names = json.loads(expected["library versions"])
    here = data.identity() | {
        "dtype": str(dtype),
        "device": device.type,
        "library versions": json.dumps(weight_audit.versions(name for name in names if name != "python")),
        "code of the trainer": code_of_trainer(),
    }
    refuse_differences(here, expected)


def code_of_trainer() -> str:
    """sha256 of this module and of all that it imports from the package."""
    return sha256_of_files(code_of(Path(__file__), Path(__file__).parents[3]))


def _log_start(data: TrainingData, prepared: PreparedModel) -> None:
    device, dtype = prepare(data.compute)
    processes = f", {data.compute.processes} processes" if data.compute.processes > 1 else ""
    tokens = sum(map(sum, data.rows["train"]["lengths"]))
    log.info(
        f"training {data.name}: {prepared.trainable:,} of {prepared.total:,} parameters"
        f" ({100 * prepared.trainable / prepared.total:.2f} %), {tokens:,} tokens per epoch,"
        f" {str(dtype).removeprefix('torch.')} on {device}{processes}"
    )


def _fit_without_steps(
    data: TrainingData, prepared: PreparedModel, live: Path | None
) -> tuple[TrainingHistory, list[list[str]]]:
    """The history of a method without optimizer steps, because each of its iterations uses all rows.

    Returns:
        The history, and the used examples of each row: those with a category.
    """
    assert prepared.fit

    def with_categories(row: Mapping[str, Any]) -> dict[str, Any]:
        return {**row, "categories": [data.category.get(identity) for identity in row["example_ids"]]}

    train_rows, validation_rows = (list(map(with_categories, data.rows[split])) for split in ("train", "validation"))
    fixed = {"learning_rate": 0.0, "grad_norm": 0.0, "tokens": 0}
    points = prepared.fit(train_rows, validation_rows)
    curve = [{**fixed, **point} if "loss" in point else point for point in points]
    if live:
        live_writer(live)(curve, now=True)
    prompts, _, places = split_prompts(train_rows)
    read: list[list[str]] = [[] for _ in train_rows]
    for row, place in places:
        read[row].append(train_rows[row]["example_ids"][place])
    seen = [(1, 1, row) for row in range(len(train_rows))]
    return TrainingHistory(curve=curve, seen=seen, tokens=sum(map(len, prompts))), read


def _disk(prepared: PreparedModel, params: AdapterParams, checkpoints: Path, out: Path) -> dict[Path, int]:
    """Folder -> bytes that training will write into it: initial weights, output, one checkpoint more than are kept."""
    trained = weight_audit.trainable(prepared.model).values()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    state = int(prepared.trainable * 4 * OPTIMIZER_MEMORY[params.optim])
    one = weights * (2 if params.load_best_model_at_end else 1) + state
    return {checkpoints: weights + one * (params.save_total_limit + 1), out: 2 * weights}
