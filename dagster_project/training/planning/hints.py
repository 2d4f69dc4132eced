"""Execution hints from the memory prediction. They are not part of a stage's identity."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dagster_project.core.context import ExecutionHints, StageContext
from dagster_project.core.errors import InputError
from dagster_project.core.records import read_table
from dagster_project.training.methods.build import CANNOT_CHECKPOINT
from dagster_project.training.methods.hardware import available_memory, prepare
from dagster_project.training.planning import memory
from dagster_project.training.trainers.harness.distributed import claim_gpus
from dagster_project.training.trainers.harness.params import AUTO, AdapterParams
from dagster_project.training.trainers.sft import auto

log = logging.getLogger("pedigree")


@dataclass(frozen=True)
class Forecast:
    """Execution hints and predicted memory of one run."""

    hints: ExecutionHints
    memory: memory.Memory | None = None
    """None for stages without a prediction and for methods that cannot be built without weights."""

    def document(self) -> dict[str, Any]:
        """Bytes by part, for pages."""
        return {"memory": asdict(self.memory)} if self.memory else {}

    def compared(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Predicted bytes and the error in percent, given what a run measured; empty without a prediction."""
        if not self.memory or "peak_memory_bytes" not in measured:
            return {}
        error = 100 * (self.memory.total / measured["peak_memory_bytes"] - 1)
        return {"predicted_memory_bytes": self.memory.total, "prediction_error_percent": round(error, 1)}

    def text(self, measured: Mapping[str, float]) -> str:
        """Log line with the measured memory and time of a run, and the predicted memory."""
        text = f"memory {measured['peak_memory_bytes'] / 1e6:,.0f} MB at its peak"
        if "predicted_memory_bytes" in measured:
            text += f", {measured['predicted_memory_bytes'] / 1e6:,.0f} MB predicted ({measured['prediction_error_percent']:+} %)"
        if "tokens_per_second" in measured:
            text += f"; {measured['training_seconds']:,.0f} s, {measured['tokens_per_second']:,.0f} tokens/s"
        return text


def forecast(ctx: StageContext) -> Forecast | None:
    """Predict the memory of a stage that trains an adapter; None for other stages."""
    if ctx.stage != "adapter":
        return None
    params, compute = ctx.variant_params("adapter", AdapterParams), ctx.compute
    return forecast_training(
        params, ctx.output_of("tokenized"), ctx.output_of("base_model"), compute.processes, prepare(compute), f"adapter.{ctx.variant}"
    )


def forecast_training(
    params: AdapterParams, tokenized: Path, base_model: Path, processes: int, target: tuple[Any, Any], where: str
) -> Forecast:
    """Predict the memory of a training, and decide on gradient checkpointing if it is `auto`.

    Args:
        tokenized: output folder of the `tokenized` stage.
        processes: number of training processes.
        target: device and dtype that training will use.
        where: dotted path of the entry in params.yaml.
    """
    claim_gpus(processes)
    device, dtype = target
    columns = ["example_ids", "labels", "lengths"]
    rows = {split: read_table(tokenized / f"{split}.parquet", columns) for split in ("train", "validation")}
    train = rows["train"]
    if not train:
        return Forecast(ExecutionHints())  # the stage reports that there are no rows
    examples = sum(len(row["example_ids"]) for row in train)
    params = auto.settle(params, examples, len(train), bool(rows["validation"]), processes).params
    runtime = memory.resident() if device.type == "cpu" else 0  # before the model is loaded
    free = available_memory(device.type, processes)
    spec = training_spec(params, base_model, train, dtype, device.type, runtime, where)
    predicted = _predicted(spec)
    on = False
    if params.gradient_checkpointing == AUTO:
        needed = predicted.total - runtime if predicted else 0
        on = needed > free and params.method.lower() not in CANNOT_CHECKPOINT
        params = params.model_copy(update={"gradient_checkpointing": on})
    if on:
        log.info(
            f"training {where.removeprefix('adapter.')}: gradient checkpointing is on:"
            f" {needed / 1e6:,.0f} MB predicted without it, {free / 1e6:,.0f} MB free"
        )
        predicted = _predicted(training_spec(params, base_model, train, dtype, device.type, runtime, where))
    without_runtime = training_spec(params, base_model, train, dtype, device.type, 0, where)
    return Forecast(ExecutionHints(on, lambda: _remedy(without_runtime, free)), predicted)


def training_spec(
    params: AdapterParams, base_model: Path, rows: list[dict[str, Any]], dtype: Any, device: str, runtime: int, where: str
) -> memory.TrainingSpec:
    """Build the specification that the prediction takes, for the row that needs the most memory."""
    lengths, counted = memory.largest_row([row["lengths"] for row in rows], [row["labels"] for row in rows], params.method)
    return memory.TrainingSpec(
        device, dtype, runtime, base_model, params.method, params.peft, params.quantization,
        min(params.per_device_train_batch_size, len(rows)), lengths, counted, params.gradient_checkpointing is True,
        params.gradient_accumulation_steps, params.optim, where,
    )  # fmt: skip


def _predicted(spec: memory.TrainingSpec) -> memory.Memory | None:
    """Predicted peak memory by part; None for a method that cannot be built without weights."""
    try:
        return spec.predict().memory
    except memory.Unpredictable:
        log.info(f"{spec.where}: no prediction of memory for {spec.method}")
        return None


def _remedy(spec: memory.TrainingSpec, free: int) -> str:
    """Advice for a run that ran out of memory; "" if there is no prediction.

    Args:
        spec: with runtime 0, because libraries are already in memory.
        free: bytes that were free before training.
    """
    try:
        needed = spec.predict().memory.total
        comparison = f"predicted {memory.size_text(needed)}, free {memory.size_text(free)}"
        return f"{comparison}; {spec.remedy(needed, min(needed, free) - 1)}"
    except (InputError, ValueError, RuntimeError, MemoryError):
        return ""
