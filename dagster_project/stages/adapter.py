"""tokenized + base_model -> adapter@X.

One variant trained by its entry in params.yaml, with a record of which weights changed and which examples were used; or
merged of other variants.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any

from dagster_project.core.context import ExecutionHints, StageContext, ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.layout import pages_of
from dagster_project.core.params import Compute
from dagster_project.core.records import CheckResult, Report, remove, write_json, write_table
from dagster_project.training.methods import options as methods
from dagster_project.training.methods.hardware import peak_memory, prepare
from dagster_project.training.trainers.command.entry import check_command
from dagster_project.training.trainers.command.train import Folders, train_by_command
from dagster_project.training.trainers.harness import sharding, weight_audit
from dagster_project.training.trainers.harness.checkpoint import run_identity
from dagster_project.training.trainers.harness.curve import write_curve
from dagster_project.training.trainers.harness.distributed import claim_gpu, place
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.launch import report_document, report_of_group
from dagster_project.training.trainers.harness.params import AUTO, AdapterParams, refuse_warmup
from dagster_project.training.trainers.harness.session import Diverged, OutOfMemory, advice_on_memory
from dagster_project.training.trainers.harness.weight_audit import LIBRARIES
from dagster_project.training.trainers.merging import merge as merging
from dagster_project.training.trainers.merging.entry import check_merge
from dagster_project.training.trainers.merging.reads import refuse_other_reads
from dagster_project.training.trainers.sft import auto
from dagster_project.training.trainers.sft.fit import FitResult, TrainingData, fit
from dagster_project.training.trainers.sft.sft import refuse_mistakes, steps, unreached_rate, warmup

log = logging.getLogger("pedigree")

CHECK_DESCRIPTIONS = {
    "learned": "Every loss and every trained weight is finite, and the validation loss fell.",
    "trained_what_it_should": "Every group of trainable weights moved, and no frozen weight did.",
    merging.CHECK: merging.DESCRIPTION,
}

Params = AdapterParams
NO_HINTS = ExecutionHints()


def validate(params: Params, ctx: ValidationContext) -> None:
    if params.merge_of is not None:
        check_merge(params, ctx.values["adapter"], ctx.section)
    refuse_other_reads(ctx.root, ctx.section.partition(".")[2], ctx.values["adapter"])
    if params.merge_of is not None:
        return
    check_command(params, ctx.compute, ctx.section, ctx.root)
    if params.command is not None:
        return
    refuse_warmup(params, ctx.section)
    entry = auto.settle(params, examples=1, rows=1, validates=False).params
    methods.refuse_untrained(entry.peft, ctx.section)
    checkpointed = entry.gradient_checkpointing is True
    methods.check(entry.method, entry.peft, entry.quantization, entry.merge, ctx.section, checkpointed)
    sharding.check(entry, ctx.compute, ctx.section, entry.method)
    if ctx.compute.processes > 1 and entry.method.lower() == "feature_extraction":
        problem = f"{ctx.section} uses feature_extraction, which has no optimizer steps to share"
        raise InputError(f"params.yaml: compute.processes: {problem}", "set it to 1")


def run(ctx: StageContext) -> Report:
    variant, params, compute = str(ctx.variant), ctx.variant_params("adapter", Params), ctx.compute
    tokenized, base_model = ctx.output_of("tokenized"), ctx.output_of("base_model")
    out, curve_file = ctx.out, ctx.plot("loss")
    if params.merge_of is not None:
        pages = pages_of(ctx.root, ctx.address)
        for earlier in (ctx.live, pages / "training.html", pages / "history.json"):  # of a training under this name
            remove(earlier)
        adapters = ctx.outputs_of("adapter")
        return merging.merge_adapters(variant, params, compute, adapters, base_model, out, curve_file)
    if params.command is not None:
        remove(ctx.live)  # the curves of an earlier training
        work = ctx.scratch / "command"
        folders = Folders(ctx.root, tokenized, base_model, work, ctx.checkpoints, out, curve_file, ctx.pages)
        return train_by_command(variant, params, compute, folders)
    kept = ctx.checkpoints, ctx.live, ctx.pages
    return produce(variant, params, compute, tokenized, base_model, out, curve_file, *kept, ctx.hints)


def produce(
    variant: str,
    params: Params,
    compute: Compute,
    tokenized: Path,
    base_model: Path,
    out: Path,
    curve_file: Path,
    checkpoints: Path,
    live: Path | None = None,
    pages: Path | None = None,
    hints: ExecutionHints = NO_HINTS,
) -> Report:
    """Train one variant, in several processes if the parameters say so.

    Args:
        checkpoints: the variant's folder, which survives a killed run. It is removed once no check blocks.
        live: folder for the curves so far; None to write none.
        pages: folder for the documents that its page is drawn from.
    """
    if compute.processes > 1 and place().size == 1:
        written = {"out": out, "curve_file": curve_file, "checkpoints": checkpoints, "live": live, "pages": pages}
        folders = {"tokenized": tokenized, "base_model": base_model, **written}
        return _produce_in_processes(variant, params, compute, folders, hints)
    claim_gpu()
    device, dtype = prepare(compute)
    data = TrainingData.read(variant, params.method, compute, tokenized, base_model)
    rows = data.rows["train"]
    validates = len(data.rows["validation"]) > 0
    settled = auto.settle(params, sum(map(len, data.example_ids)), len(rows), validates, compute.processes)
    refuse_mistakes(settled.params, data.where, rows["lengths"], validates)
    if warning := unreached_rate(steps(len(rows), settled.params, compute.processes), settled.params):
        log.warning(f"params.yaml: {data.where}.{warning}")
    if settled.params.gradient_checkpointing == AUTO:
        decided = {"gradient_checkpointing": hints.gradient_checkpointing}
        settled = replace(settled, params=settled.params.model_copy(update=decided))
    libraries = (*LIBRARIES, *(["liger-kernel"] if settled.params.use_liger_kernel else []))
    identity = data.identity() | run_identity(Path(__file__), compute, device, dtype, libraries)
    advised = partial(advice_on_memory, hints.advice)
    try:
        fitted = fit(data, settled, identity, checkpoints, out, live, advised)
    except Diverged as diverged:
        return _diverged(diverged, data.example_ids)

    fitted.prepared.save(out)
    for template in tokenized.glob("chat_template.jinja"):  # the template used in training is stored with the weights
        copyfile(template, out / template.name)
    write_curve(curve_file, fitted.history.curve)
    seen = weight_audit.seen_examples(fitted.history.seen, fitted.example_ids)
    write_table(out / "examples.parquet", seen, weight_audit.seen_schema())
    document = _document(fitted, compute, dtype, device.type, libraries)
    write_json(out / "training.json", document)
    if pages:
        write_json(pages / "history.json", {"curve": fitted.history.curve})
    report = _report(fitted, sum(map(sum, rows["lengths"])), document, _measured(fitted.history, device.type))
    if not report.failures:
        remove(checkpoints)
    return report


def _produce_in_processes(
    variant: str, params: Params, compute: Compute, folders: Mapping[str, Path | None], hints: ExecutionHints
) -> Report:
    """`produce` in the first process of a group, with the others taking part in the training."""
    more = {"variant": variant, "gradient_checkpointing": hints.gradient_checkpointing}
    try:
        return report_of_group(__name__, params, compute, folders, **more)
    except OutOfMemory as error:
        raise OutOfMemory(error.what, hints.advice() or error.hint) from None


def first_process(work: Mapping[str, Any]) -> dict[str, Any]:
    """Work of the first process of a group: all of the stage.

    Args:
        work: of `_produce_in_processes`.
    """
    params, compute = Params.model_validate(work["params"]), Compute.model_validate(work["compute"])
    folders = {name: Path(path) for name, path in work["folders"].items()}
    hints = ExecutionHints(gradient_checkpointing=work["gradient_checkpointing"])
    return report_document(produce(work["variant"], params, compute, **folders, hints=hints))


def _document(
    fitted: FitResult, compute: Compute, dtype: Any, device: str, libraries: tuple[str, ...]
) -> dict[str, Any]:
    """training.json: the trained parameters, the settings, and the first and last losses."""
    params, history, prepared = fitted.params, fitted.history, fitted.prepared
    ranks = weight_audit.ranks(prepared.model)
    trials = {rate: loss if math.isfinite(loss) else None for rate, loss in fitted.trials.items()}
    points = [{"learning_rate": rate, "validation_loss": loss} for rate, loss in trials.items()]
    taken = {"warmup_steps": warmup(fitted.total, params), "optim": prepared.optim or params.optim}
    return {
        "trained": fitted.change.groups,
        "frozen": fitted.change.frozen,
        **({"ranks": ranks} if ranks else {}),
        "steps": history.step,
        "planned_steps": fitted.total,
        **({"best_step": history.best_step} if params.load_best_model_at_end else {}),
        "tokens": history.tokens,
        "trained_tokens": history.trained_tokens,
        "loss": {"first": history.losses[0], "last": history.losses[-1]},
        "validation": [{"step": step, "validation_loss": loss} for step, loss in history.validation],
        "settings": params.settings() | taken,
        **({"chosen": {name: vars(choice) for name, choice in fitted.chosen.items()}} if fitted.chosen else {}),
        **({"sweep": points} if points else {}),
        "seed": compute.seed,
        "threads": compute.threads,
        "processes": compute.processes,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "attention": prepared.attention,
        "versions": weight_audit.versions(libraries),
    }


def _report(
    fitted: FitResult, tokens_per_epoch: int, document: Mapping[str, Any], measured: dict[str, float]
) -> Report:
    history, prepared = fitted.history, fitted.prepared
    finite = all(bool(weight.isfinite().all()) for weight in weight_audit.trainable(prepared.model).values())
    metrics = {
        "method": fitted.params.method,
        "trainable_parameters": prepared.trainable,
        "trainable_percent": round(100 * prepared.trainable / prepared.total, 4),
        "steps": history.step,
        "tokens_per_epoch": tokens_per_epoch,
        "tokens": history.tokens,
        "trained_tokens": history.trained_tokens,
        "dtype": document["dtype"],
        "device": document["device"],
        "loss": round(history.losses[-1], 4),
        "environment": weight_audit.versions(weight_audit.REPORTED),
        "validation_loss": [round(loss, 4) for _, loss in history.validation],
        **({"best_step": history.best_step} if fitted.params.load_best_model_at_end else {}),
        **({"chosen": {name: choice.value for name, choice in fitted.chosen.items()}} if fitted.chosen else {}),
    }
    checks = [_learned(history, finite), _moved(fitted.change, history)]
    return Report(metrics=metrics, checks=checks, measured=measured)


def _measured(history: TrainingHistory, device: str) -> dict[str, float]:
    """Memory and time of this run."""
    measured: dict[str, float] = {"peak_memory_bytes": peak_memory(device)}
    if history.seconds:
        measured["training_seconds"] = round(history.seconds, 1)
        measured["tokens_per_second"] = round(history.tokens / history.seconds, 1)
    return measured


def _learned(history: TrainingHistory, finite: bool) -> CheckResult:
    """Evaluates the weights that are kept: the last ones, or the best ones."""
    finite = finite and all(map(math.isfinite, history.losses))
    if not history.validation:
        return CheckResult("learned", passed=finite, note="no validation split")
    first, last = history.validation[0][1], history.validation[-1][1]
    kept = next((loss for step, loss in history.validation if step == history.best_step), last)
    fell = len(history.validation) < 2 or kept < first
    return CheckResult("learned", passed=finite and fell, note=f"validation loss {first:.3f} -> {kept:.3f}")


def _moved(change: weight_audit.WeightChange, history: TrainingHistory) -> CheckResult:
    """`trained_what_it_should`. If weights did not move because too few steps could move them, the note says so."""
    check = change.check()
    acting = sum("loss" in point and point["learning_rate"] > 0 for point in history.curve)
    if not weight_audit.unmoved(change.groups) or acting > 1:
        return check
    reason = (
        f"{acting} of {history.step} steps had a learning rate above 0, which the first step of a warm-up has not,"
        " and weights that begin at zero, such as lora_B, keep others from moving in the first such step;"
        " train for more steps"
    )
    return replace(check, note=f"{check.note}; {reason}")


def _diverged(diverged: Diverged, example_ids: list[list[str]]) -> Report:
    """Failing report of a training that diverged (NaN or infinity); lists the examples of that step."""
    examples = [identity for row in diverged.rows for identity in example_ids[row]]
    note = f"{diverged}; lower learning_rate or max_grad_norm, and look at the examples of that step"
    unchecked = "not checked: the training did not end"
    learned = CheckResult("learned", passed=False, blocking=True, count=len(examples), rows=examples[:20], note=note)
    moved = CheckResult("trained_what_it_should", passed=False, blocking=True, note=unchecked)
    return Report(checks=[learned, moved])
