"""Execution hints from the memory prediction. They are not part of a stage's identity."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dagster_project.core.context import ExecutionHints, StageContext
from dagster_project.core.errors import InputError
from dagster_project.core.records import read_table
from dagster_project.core.torch_imports import load_meta_kernels
from dagster_project.training.methods.hardware import available_memory, prepare
from dagster_project.training.planning import memory
from dagster_project.training.trainers.harness.distributed import claim_gpu, gpus_of
from dagster_project.training.trainers.harness.launch import processes_here
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
            predicted, error = measured["predicted_memory_bytes"], measured["prediction_error_percent"]
            text += f", {predicted / 1e6:,.0f} MB predicted ({error:+} %)"
        if "tokens_per_second" in measured:
            text += f"; {measured['training_seconds']:,.0f} s, {measured['tokens_per_second']:,.0f} tokens/s"
        return text


def forecast(ctx: StageContext) -> Forecast | None:
    """Predict the memory of a stage that trains an adapter.

    None for other stages, and for an adapter that is merged of others.
    """
    if ctx.stage != "adapter":
        return None
    params, compute = ctx.variant_params("adapter", AdapterParams), ctx.compute
    if params.merge_of is not None:
        return None
    if params.command is not None:
        return Forecast(ExecutionHints())  # its memory is unknown
    tokenized, base_model, where = ctx.output_of("tokenized"), ctx.output_of("base_model"), f"adapter.{ctx.variant}"
    return forecast_training(params, tokenized, base_model, compute.processes, prepare(compute), where)


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
    here = processes
    if processes == 1:
        claim_gpu()
    elif (known := processes_here(processes)) is not None:
        here = known
        gpus_of(here)  # refuses more processes than GPUs
    device, dtype = target
    columns = ["example_ids", "labels", "lengths"]
    rows = {split: read_table(tokenized / f"{split}.parquet", columns) for split in ("train", "validation")}
    train = rows["train"]
    if not train:
        return Forecast(ExecutionHints())  # the stage reports that there are no rows
    examples = sum(len(row["example_ids"]) for row in train)
    params = auto.settle(params, examples, len(train), bool(rows["validation"]), processes).params
    load_meta_kernels()  # which the prediction needs in this process
    runtime = memory.resident() if device.type == "cpu" else 0  # before the model is loaded
    free = available_memory(device.type, here)
    # without runtime: the libraries are in memory already
    row = memory.largest_row(train, params.method)
    timed = training_spec(params, base_model, row, len(train), device.type, dtype, where, processes)
    without = replace(timed, timed=False)
    try:
        spec = without.checkpointed_beyond(free) if params.gradient_checkpointing == AUTO else without
        predicted = replace(spec.prediction.memory, runtime=runtime)
    except memory.Unpredictable:
        log.info(f"{where}: no prediction of memory for {params.method}")
        return Forecast(ExecutionHints())
    on = spec is not without
    if on:
        log.info(
            f"training {where.removeprefix('adapter.')}: gradient checkpointing is on:"
            f" {without.needed / 1e6:,.0f} MB predicted without it, {free / 1e6:,.0f} MB free"
        )
    # a copy, to free the prediction
    return Forecast(ExecutionHints(on, partial(_remedy, replace(spec), free)), predicted)


def training_spec(
    params: Any,
    base_model: Path,
    row: tuple[list[int], int],
    rows: int,
    device: str,
    dtype: Any,
    where: str,
    processes: int = 1,
) -> memory.TrainingSpec:
    """What the prediction takes for a training, without the runtime.

    Args:
        params: an entry of `adapter` or of `aligned`, or the section `reward_model`.
        row: see `memory.largest_row`.
        rows: number of rows of the training split.
    """
    return memory.TrainingSpec(
        device,
        dtype,
        base_model,
        params.method,
        params.peft,
        *row,
        min(params.per_device_train_batch_size, rows),
        0,
        params.quantization,
        params.gradient_checkpointing is True,
        params.gradient_accumulation_steps,
        params.optim,
        where,
        sharding=params.sharding,
        processes=processes,
    )


def _remedy(spec: memory.TrainingSpec, free: int) -> str:
    """Advice for a run that ran out of memory; "" if there is no prediction.

    Args:
        free: bytes that were free before training.
    """
    try:
        comparison = f"predicted {memory.size_text(spec.needed)}, free {memory.size_text(free)}"
        return f"{comparison}; {spec.remedy(min(spec.needed, free) - 1)}"
    except (InputError, ValueError, RuntimeError, MemoryError):
        return ""
