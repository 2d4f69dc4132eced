"""Trains an adapter by the user's own command, and measures what it did: docs/own-trainer.md.

The command only reads and writes files. That its weights moved, that the base model did not, and the validation loss
are measured here.
"""

from __future__ import annotations

import logging
import math
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dagster_project.core.chat import IGNORE
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file, sha256_of_files
from dagster_project.core.params import Compute
from dagster_project.core.records import CheckResult, Report, read_table, remove, write_json, write_table, write_text
from dagster_project.training.methods.build import PreparedModel, causal
from dagster_project.training.methods.hardware import prepare
from dagster_project.training.methods.logits import logits_of
from dagster_project.training.tokens.collators import collate_packed, collate_padded
from dagster_project.training.trainers.command import claims
from dagster_project.training.trainers.command.entry import given, source_of, words_of
from dagster_project.training.trainers.command.process import environment, run_command
from dagster_project.training.trainers.command.result import Candidate, Comparison, Weights, read_weights
from dagster_project.training.trainers.command.workspace import Workspace, make_workspace
from dagster_project.training.trainers.harness import weight_audit
from dagster_project.training.trainers.harness.params import AdapterParams
from dagster_project.training.trainers.harness.weight_audit import WeightChange

log = logging.getLogger("pedigree")

ORDER_UNKNOWN = "order_unknown.json"
"""Written in place of examples.parquet if the command did not record the order of the examples."""


@dataclass(frozen=True)
class Folders:
    """Files and folders of one training."""

    root: Path
    """The project."""
    tokenized: Path
    base_model: Path
    work: Path
    """Of the command; removed by the runner."""
    checkpoints: Path
    """Of the variant, which survives a killed run."""
    out: Path
    curve_file: Path
    pages: Path


@dataclass(frozen=True)
class Measured:
    """The result of a command, as measured here."""

    comparison: Comparison
    change: WeightChange
    validation: list[dict[str, float]]
    """{"step", "validation_loss"} before and after training; empty without a validation split."""
    order: list[dict[str, Any]] | None
    curve: list[dict[str, float]]
    steps: int | None
    """None if unknown."""


def train_by_command(name: str, params: AdapterParams, compute: Compute, folders: Folders) -> Report:
    """Run the command of an entry, check what it wrote, and write the outputs of the stage.

    Raises:
        InputError: the command fails, or its files are not what docs/own-trainer.md says.
    """
    where = f"adapter.{name}"
    device, dtype = prepare(compute)
    target = {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    workspace = make_workspace(
        folders.work, params, compute, folders.root, folders.tokenized, folders.base_model, where, target,
        folders.checkpoints,
    )  # fmt: skip
    if not workspace.examples:
        raise InputError("adapter: the training split is empty", "add sources to raw_examples.sources")
    base_before, started = _base(folders.base_model), time.monotonic()
    words = words_of(str(params.command), f"{where}.command")
    variables = environment(compute.threads, compute.seed, workspace.inputs)
    run_command(words, workspace.folder, variables, f"{where}.command")
    seconds = time.monotonic() - started
    if _base(folders.base_model) != base_before:
        hint = "run `dvc checkout --force data/base_model`, and save to output/ only"
        raise InputError(f"{where}: the command changed the base model", hint)
    weights = read_weights(workspace.output, where)
    if broken := weights.not_finite():
        return _refused(f"NaN or infinity in {len(broken)} trained weights, first in {broken[0]}", len(broken))
    measured = _measure(weights, params, compute, workspace, folders, where)
    if not all(math.isfinite(point["validation_loss"]) for point in measured.validation):
        return _refused("the validation loss of the trained model is not finite", 1)
    measured.comparison.prepared.save(folders.out)
    document = _document(measured, params, compute, workspace, folders, target, where)
    _write(measured, document, workspace, folders)
    report = _report(measured, document, workspace)
    report.measured |= _resources(seconds, document.get("tokens"))
    if not report.failures:
        remove(folders.checkpoints)
    return report


def _base(base_model: Path) -> str:
    return sha256_of_files(sorted([*base_model.glob("*.safetensors"), base_model / "config.json"]))


def _measure(
    weights: Weights, params: AdapterParams, compute: Compute, workspace: Workspace, folders: Folders, where: str
) -> Measured:
    order = claims.read_order(workspace.output, workspace.examples, where)
    curve = claims.read_curve(workspace.output, where)
    candidate = Candidate(weights, params, folders.base_model, *prepare(compute), where, compute.seed)
    rows = read_table(folders.tokenized / "validation.parquet", ["input_ids", "labels", "weights", "lengths"])
    before = validation_loss(candidate.prepared, rows)
    comparison = candidate.filled()
    known = [int(point["step"]) for point in [*(order or ()), *curve]]
    after = {"step": max([*known, 1]), "validation_loss": validation_loss(candidate.prepared, rows)}
    validation = [{"step": 0, "validation_loss": before}, after] if rows else []
    return Measured(comparison, comparison.change(), validation, order, curve, max(known) if known else None)


def validation_loss(prepared: PreparedModel, rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean loss per labeled token in nats, as Pedigree's own trainer measures it; NaN without rows.

    Args:
        rows: packed rows with input_ids, labels, weights and lengths.
    """
    import torch
    from torch.nn.functional import cross_entropy

    nats, tokens = 0.0, 0
    prepared.model.eval()
    with torch.no_grad():
        for row in rows:
            batch = collate_packed([row]) if prepared.packs else collate_padded([row])
            batch |= {key: value.to(prepared.model.device) for key, value in batch.items() if hasattr(value, "to")}
            labels = batch["labels"][:, 1:]
            counted = labels != IGNORE
            hidden = prepared.hidden_states(batch)[:, :-1][counted]
            logits = logits_of(causal(prepared.model), hidden).float()
            nats += float(cross_entropy(logits, labels[counted], reduction="none").double().sum())
            tokens += int(counted.sum())
    return nats / tokens if tokens else math.nan


def _document(
    measured: Measured,
    params: AdapterParams,
    compute: Compute,
    workspace: Workspace,
    folders: Folders,
    target: Mapping[str, str],
    where: str,
) -> dict[str, Any]:
    """training.json. What the command did not record is left out."""
    losses = [point["loss"] for point in measured.curve if math.isfinite(point.get("loss", math.nan))]
    prepared, unknown = measured.comparison.prepared, measured.comparison.unknown()
    return {
        "trained": measured.change.groups,
        **({"start_unknown": unknown} if unknown else {}),
        "frozen": measured.change.frozen,
        **({"steps": measured.steps} if measured.steps else {}),
        **(claims.tokens_of(measured.order, workspace.examples) if measured.order else {}),
        **({"loss": {"first": losses[0], "last": losses[-1]}} if losses else {}),
        "validation": measured.validation,
        "order": "recorded by the command" if measured.order else "unknown",
        "command": params.command,
        "files": {path: sha256_of_file(source_of(folders.root, path, f"{where}.files")) for path in params.files},
        "settings": given(params),
        "seed": compute.seed,
        "threads": compute.threads,
        "processes": compute.processes,
        **target,
        "attention": prepared.attention,
        "versions": weight_audit.versions(weight_audit.LIBRARIES),
    }


def _write(measured: Measured, document: Mapping[str, Any], workspace: Workspace, folders: Folders) -> None:
    for template in workspace.folder.glob("chat_template.jinja"):  # the template of the data is stored with the weights
        shutil.copyfile(template, folders.out / template.name)
    if measured.order:
        rows = [{name: one[name] for name in ("step", "epoch", "position", "example_id")} for one in measured.order]
        write_table(folders.out / "examples.parquet", rows, weight_audit.seen_schema())
    else:
        why = f"the command wrote no {' or '.join(claims.ORDER)}"
        examples = len({identity for identity, _, _ in workspace.examples})
        write_json(folders.out / ORDER_UNKNOWN, {"given": examples, "why": why})
    write_json(folders.out / "training.json", document)
    write_json(folders.pages / "history.json", {"curve": [*measured.curve, *measured.validation]})
    points = [point for point in measured.curve if "loss" in point]
    columns = [name for name in claims.COLUMNS if name == "loss" or (points and all(name in point for point in points))]
    lines = [",".join([str(point["step"]), *(f"{point[name]:.6g}" for name in columns)]) for point in points]
    write_text(folders.curve_file, "\n".join([f"step,{','.join(columns)}", *lines]) + "\n")


def _report(measured: Measured, document: Mapping[str, Any], workspace: Workspace) -> Report:
    prepared, names = measured.comparison.prepared, ("steps", "tokens", "trained_tokens", "dtype", "device")
    metrics = {
        "method": document["settings"]["method"],
        "trained_by": document["command"],
        "order": document["order"],
        "trainable_parameters": prepared.trainable,
        "trainable_percent": round(100 * prepared.trainable / prepared.total, 4),
        "tokens_per_epoch": sum(tokens for _, tokens, _ in workspace.examples),
        **{name: document[name] for name in names if name in document},
        **({"loss": round(document["loss"]["last"], 4)} if "loss" in document else {}),
        "environment": weight_audit.versions(weight_audit.REPORTED),
        "validation_loss": [round(point["validation_loss"], 4) for point in measured.validation],
    }
    return Report(metrics=metrics, checks=[_learned(measured), _moved(measured)])


def _learned(measured: Measured) -> CheckResult:
    losses = [point["loss"] for point in measured.curve if "loss" in point]
    before, after = [point["validation_loss"] for point in measured.validation] or (math.nan, math.nan)
    fell = not measured.validation or after < before
    note = f"validation loss {before:.3f} -> {after:.3f}" if measured.validation else "no validation split"
    return CheckResult("learned", passed=all(map(math.isfinite, losses)) and fell, note=note)


def _moved(measured: Measured) -> CheckResult:
    found, unknown = measured.change.check(), measured.comparison.unknown()
    if not unknown:
        return found
    more = f"not compared, because they start at random: {', '.join(unknown)}"
    return replace(found, note=f"{found.note}; {more}")


def _refused(what: str, count: int) -> Report:
    """Failing report of a model that cannot be used."""
    note, unchecked = f"{what}; lower the learning rate, and look at the examples", "the result is not finite"
    learned = CheckResult("learned", passed=False, blocking=True, count=count, note=note)
    moved = CheckResult("trained_what_it_should", passed=False, blocking=True, note=f"not checked: {unchecked}")
    return Report(checks=[learned, moved])


def _resources(seconds: float, tokens: int | None) -> dict[str, float]:
    """Time of the command, and the peak resident memory of its largest process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    speed = {"tokens_per_second": round(tokens / seconds, 1)} if tokens else {}
    return {"peak_memory_bytes": peak, "training_seconds": round(seconds, 1), **speed}
