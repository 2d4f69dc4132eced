"""tokenized + base_model -> adapter@X. One variant tuned by its entry in params.yaml, with the evidence of what learnt and from what."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from shutil import copyfile
from typing import Any

from dagster_project.errors import InputError
from dagster_project.params import Compute
from dagster_project.records import CheckResult, Report, read_table, remove, write_json, write_table, write_text
from dagster_project.training import auto, memory, proof
from dagster_project.training.checkpoint import Checkpoints, code_of, refuse_full_disk, sha256_of, sha256_of_text
from dagster_project.training.curve import live_writer, write_curve
from dagster_project.training.hardware import prepare
from dagster_project.training.head import cut
from dagster_project.training.methods import CANNOT_CHECKPOINT, Quantization, Tunable, build
from dagster_project.training.page import page
from dagster_project.training.processes import claim_gpus, together
from dagster_project.training.sft import (
    AUTO,
    OPTIMIZER_MEMORY,
    Course,
    Diverged,
    Recipe,
    advice_on_memory,
    refuse_mistakes,
    steps,
    train,
    warmup,
)

log = logging.getLogger("pedigree")

TRUTHS = {
    "learned": "Every loss and every trained weight is finite, and the validation loss fell.",
    "trained_what_it_should": "Every group of trainable weights moved, and no frozen weight did.",
}

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "safetensors")
"""Whose versions decide what a run computes."""


class Params(Recipe):
    method: str = "lora"
    """One of PEFT's methods by its name, a short name (qlora, dora, rslora, layernorm, ...), full, bitfit or feature_extraction."""
    peft: dict[str, Any] = {}
    """The method's own keys, as PEFT names them (r, lora_alpha, target_modules, ...). `r: auto` for lora and its short names."""
    quantization: Quantization | None = None
    """What the base model's weights are held in while the method trains against them: none or nf4. null: nf4 for qlora and qdora, else none."""
    merge: bool = True
    """Make a stand-alone model of base and adapter; false passes the adapter on, and evaluation loads both."""


@dataclass(frozen=True)
class _Material:
    """What a training reads."""

    tokenizer: Any
    rows: dict[str, Any]
    """Split -> `datasets.Dataset` of packed rows."""
    category: dict[str, str]
    """By example, where categories are what is learnt."""

    @classmethod
    def read(cls, method: str, tokenized: Path, base_model: Path) -> _Material:
        from datasets import Dataset
        from transformers import AutoTokenizer

        columns = ["example_ids", "input_ids", "labels", "weights", "lengths"]
        rows = {split: Dataset.from_list(read_table(tokenized / f"{split}.parquet", columns)) for split in ("train", "validation")}
        if not len(rows["train"]):
            raise InputError("adapter: the training split is empty", "name more examples in raw_examples.sources")
        tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
        for template in tokenized.glob("chat_template.jinja"):
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        labelled = read_table(tokenized / "categories.parquet") if method.lower() == "feature_extraction" else []
        return cls(tokenizer, rows, {line["example_id"]: line["category"] for line in labelled})

    def model(self, variant: str, params: Params, compute: Compute, base_model: Path, total: int) -> Tunable:
        """A model that has learnt nothing, the same each time."""
        device, dtype = prepare(compute)
        learnt = {self.category[identity] for row in self.rows["train"]["example_ids"] for identity in row if identity in self.category}
        where = f"adapter.{variant}"
        tunable = build(
            params.method, params.peft, base_model, device, dtype, where, params.quantization, params.merge, total, sorted(learnt)
        )
        _refuse_clashes(tunable, params, where)
        return tunable

    def train(
        self, tunable: Tunable, params: Params, compute: Compute, checkpoints: Checkpoints | None = None, live: Path | None = None
    ) -> Course:
        return train(tunable, self.tokenizer, self.rows["train"], self.rows["validation"], params, compute, checkpoints, live)


def run(
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
) -> Report:
    """Args:
    checkpoints: a folder of this variant's own that outlives a killed run. It is removed once nothing blocks.
    live: folder for the curve so far, for whoever watches. None for nobody, and then memory is not predicted either.
    pages: folder for the page that shows the training.
    """
    gpus = claim_gpus(compute.processes)
    device, dtype = prepare(compute)
    runtime = memory.resident() if live and device.type == "cpu" else 0  # before the model is loaded
    material = _Material.read(params.method, tokenized, base_model)
    rows, tokenizer = material.rows, material.tokenizer
    where, example_ids, validates = f"adapter.{variant}", rows["train"]["example_ids"], len(rows["validation"]) > 0
    settled = auto.settle(params, sum(map(len, example_ids)), len(example_ids), validates, compute.processes)
    params, chosen = settled.params, settled.chosen
    refuse_mistakes(params, where, rows["train"]["lengths"], validates)
    way = partial(_way, base_model=base_model, rows=rows["train"], dtype=dtype, device=device.type, runtime=runtime, where=where)
    predicted = _predicted(way(params)) if live else None
    free = memory.available(device.type, compute.processes)
    if params.gradient_checkpointing == AUTO:
        needed = predicted.total - runtime if predicted else 0
        on = needed > free and params.method.lower() not in CANNOT_CHECKPOINT
        params = params.model_copy(update={"gradient_checkpointing": on})
        if on:
            log.info(
                f"training {variant}: with gradient checkpointing: {needed / 1e6:,.0f} MB would be needed without, and {free / 1e6:,.0f} MB are free"
            )
            predicted = _predicted(way(params))
    advised = partial(advice_on_memory, lambda: _remedy(way(params, runtime=0), free))
    libraries = (*LIBRARIES, *(["liger-kernel"] if params.use_liger_kernel else []))
    identity = {
        "tokenized data": sha256_of([tokenized / f"{split}.parquet" for split in rows]),
        "chat template": sha256_of_text(json.dumps(tokenizer.chat_template)),
        "tokenizer": sha256_of(sorted(base_model.glob("tokenizer*")) + sorted(base_model.glob("special_tokens*"))),
        "base model": sha256_of(sorted([*base_model.glob("*.safetensors"), base_model / "config.json"])),
        "code": sha256_of(code_of(Path(__file__), Path(__file__).parents[1])),
        "threads": str(compute.threads),
        "processes": str(compute.processes),
        "dtype": str(dtype),
        "device": device.type,
        "library versions": json.dumps(proof.versions(libraries)),
    }
    trials: dict[float, float] = {}
    if settled.trial:
        trial = settled.trial.model_copy(update={"gradient_checkpointing": params.gradient_checkpointing})

        def learn(trial: Params) -> Course:
            return material.train(material.model(variant, trial, compute, base_model, steps(len(example_ids), trial)), trial, compute)

        with advised():
            trials = auto.sweep(trial, learn, checkpoints / "sweep.json", identity | _settings(trial, compute))
        chosen["learning_rate"] = auto.best(trials, trial)
        params = auto.put(params, chosen)
    for name, choice in chosen.items():
        log.info(f"training {variant}: {name} {choice.value}: {choice.why}")
    total = steps(len(example_ids), params, compute.processes)
    with advised():
        tunable = material.model(variant, params, compute, base_model, total)
    model, before = tunable.model, checkpoints / "before.safetensors"
    refuse_full_disk(_disk(tunable, params, checkpoints, out), where)
    proof.before_training(model, before)
    frozen = proof.sha256_of_tensors(proof.frozen(model))
    tokens = sum(map(sum, rows["train"]["lengths"]))
    log.info(
        f"training {variant}: {tunable.trainable:,} of {tunable.total:,} parameters ({100 * tunable.trainable / tunable.total:.2f} %),"
        f" {tokens:,} tokens an epoch, {str(dtype).removeprefix('torch.')} on {device}"
        + (f", {compute.processes} processes" if compute.processes > 1 else "")
    )
    identity |= _settings(params, compute) | {"weights at the start": sha256_of([before]), "attention": tunable.attention}
    kept_at = Checkpoints(checkpoints, identity, params.save_total_limit)
    try:
        if tunable.fit:
            with advised():
                course, example_ids = _fit(tunable, rows, material.category, live)
        else:
            with together(gpus, partial(_accompany, variant, params, compute, tokenized, base_model, checkpoints)), advised():
                course = material.train(tunable, params, compute, kept_at, live)
    except Diverged as diverged:
        return _diverged(diverged, example_ids)
    tunable.save(out)
    for template in tokenized.glob("chat_template.jinja"):  # what it learnt to answer in; it goes on with the weights
        copyfile(template, out / template.name)
    write_curve(curve_file, course.curve)
    write_table(out / "examples.parquet", proof.seen_examples(course.seen, example_ids), proof.seen_schema())
    groups, ranks = proof.movement(model, before), proof.ranks(model)
    after = proof.sha256_of_tensors(proof.frozen(model))
    settings = params.model_dump(exclude=SIDELONG) | {"warmup_steps": warmup(total, params), "optim": tunable.optim or params.optim}
    points = [{"learning_rate": rate, "validation_loss": loss if math.isfinite(loss) else None} for rate, loss in trials.items()]
    document = {
        "trained": groups,
        "frozen": {"tensors": len(proof.frozen(model)), "sha256_before": frozen, "sha256_after": after},
        **({"ranks": ranks} if ranks else {}),
        "steps": course.step,
        "planned_steps": total,
        **({"best_step": course.best_step} if params.load_best_model_at_end else {}),
        "tokens": course.tokens,
        "trained_tokens": course.trained_tokens,
        "loss": {"first": course.losses[0], "last": course.losses[-1]},
        "validation": [{"step": step, "validation_loss": loss} for step, loss in course.watched],
        "settings": settings,
        **({"chosen": {name: vars(choice) for name, choice in chosen.items()}} if chosen else {}),
        **({"sweep": points} if points else {}),
        "seed": compute.seed,
        "threads": compute.threads,
        "processes": compute.processes,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "attention": tunable.attention,
        "versions": proof.versions(libraries),
    }
    write_json(out / "training.json", document)
    measured = _measured(course, predicted, device.type)
    log.info(f"training {variant}: {_told(measured)}")
    if pages:
        audit = tokenized / "audit.json"
        examples = json.loads(audit.read_text(encoding="utf-8"))["examples"] if audit.is_file() else []
        write_text(pages / "training.html", page(variant, document, course.curve, measured, predicted, examples))

    unmoved, kept = proof.unmoved(groups), after == frozen
    report = Report(
        metrics={
            "method": params.method,
            "trainable_parameters": tunable.trainable,
            "trainable_percent": round(100 * tunable.trainable / tunable.total, 4),
            "steps": course.step,
            "tokens_per_epoch": tokens,
            "tokens": course.tokens,
            "trained_tokens": course.trained_tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "loss": round(course.losses[-1], 4),
            "environment": {**proof.versions(()), **{name: version(name) for name in ("torch", "transformers", "trl", "peft")}},
            "validation_loss": [round(loss, 4) for _, loss in course.watched],
            **({"best_step": course.best_step} if params.load_best_model_at_end else {}),
            **({"chosen": {name: choice.value for name, choice in chosen.items()}} if chosen else {}),
        },
        checks=[
            _learned(course, all(bool(weight.isfinite().all()) for weight in proof.trainable(model).values())),
            CheckResult(
                "trained_what_it_should",
                passed=not unmoved and kept,
                blocking=True,
                count=len(unmoved) + (not kept),
                note="; ".join(
                    [*([f"did not move: {', '.join(unmoved)}"] if unmoved else []), *([] if kept else ["a frozen weight changed"])]
                )
                or ", ".join(f"{kind}: {group['moved']} of {group['tensors']} moved" for kind, group in groups.items()),
            ),
        ],
        measured=measured,
    )
    if not report.failures:
        remove(checkpoints)
    return report


def _accompany(variant: str, params: Params, compute: Compute, tokenized: Path, base_model: Path, checkpoints: Path) -> None:
    """What the other processes of a training do: the same training, of which nothing is written."""
    material = _Material.read(params.method, tokenized, base_model)
    total = steps(len(material.rows["train"]), params, compute.processes)
    with suppress(Diverged), advice_on_memory():  # the first says it
        tunable = material.model(variant, params, compute, base_model, total)
        material.train(tunable, params.model_copy(update={"report_to": "none"}), compute, Checkpoints(checkpoints, {}))


def _settings(params: Params, compute: Compute) -> dict[str, str]:
    """The part of a training's identity that params.yaml and the choices make."""
    return {"parameters": sha256_of_text(json.dumps({**params.model_dump(exclude=SIDELONG), "seed": compute.seed}, sort_keys=True))}


SIDELONG = {"report_to", "gradient_checkpointing", "save_strategy", "save_steps", "save_total_limit"}
"""Parameters that change nothing in what is learnt."""


def _refuse_clashes(tunable: Tunable, params: Params, where: str) -> None:
    """Raises:
    InputError: settings that the method cannot stand.
    """
    wrong = []
    if params.neftune_noise_alpha and not tunable.packs:
        wrong.append(f"params.yaml: {where}.neftune_noise_alpha: not with {params.method}, which learns no embeddings of words")
    if wrong:
        raise InputError("\n".join(wrong), "leave it out")


def _way(params: Params, base_model: Path, rows: Any, dtype: Any, device: str, runtime: int, where: str) -> memory.Way:
    """What the memory of the training depends on."""
    lengths, counted = memory.largest_row(rows["lengths"], rows["labels"], params.method)
    return memory.Way(
        device, dtype, runtime, base_model, params.method, params.peft, params.quantization,
        min(params.per_device_train_batch_size, len(rows)), lengths, counted, params.gradient_checkpointing is True,
        params.gradient_accumulation_steps, params.optim, where,
    )  # fmt: skip


def _predicted(way: memory.Way) -> memory.Memory | None:
    """Peak memory by part, from the configuration alone; None for a method that cannot be built without its weights."""
    try:
        return way.predict().memory
    except memory.Unpredictable:
        log.info(f"{way.where}: no prediction of memory for {way.method}")
        return None


def _remedy(way: memory.Way, free: int) -> str:
    """What to change where memory ran out, by the plan; "" where it cannot tell.

    Args:
        way: without the runtime, which is there already.
        free: bytes that were free before training.
    """
    try:
        needed = way.predict().memory.total
        told = f"{memory.size_text(needed)} were predicted, and {memory.size_text(free)} were free"
        return f"{told}; {way.remedy(needed, min(needed, free) - 1)}"
    except (InputError, ValueError, RuntimeError, MemoryError):
        return ""


def _measured(course: Course, predicted: memory.Memory | None, device: str) -> dict[str, float]:
    """What the run took beside what was predicted."""
    peak = memory.peak(device)
    found: dict[str, float] = {"peak_memory_bytes": peak}
    if predicted:
        found |= {"predicted_memory_bytes": predicted.total, "prediction_error_percent": round(100 * (predicted.total / peak - 1), 1)}
    if course.seconds:
        found |= {"training_seconds": round(course.seconds, 1), "tokens_per_second": round(course.tokens / course.seconds, 1)}
    return found


def _told(measured: Mapping[str, float]) -> str:
    said = f"memory {measured['peak_memory_bytes'] / 1e6:,.0f} MB at its peak"
    if "predicted_memory_bytes" in measured:
        said += f", {measured['predicted_memory_bytes'] / 1e6:,.0f} MB predicted ({measured['prediction_error_percent']:+} %)"
    if "tokens_per_second" in measured:
        said += f"; {measured['training_seconds']:,.0f} s, {measured['tokens_per_second']:,.0f} tokens/s"
    return said


def _fit(tunable: Tunable, rows: dict[str, Any], category: dict[str, str], live: Path | None) -> tuple[Course, list[list[str]]]:
    """The course of what is not trained by optimizer steps over rows: every iteration sees all that is read. And the examples of each row
    that are read: those with a category."""
    assert tunable.fit
    train, validation = (
        [{**row, "categories": [category.get(identity) for identity in row["example_ids"]]} for row in rows[split]]
        for split in ("train", "validation")
    )
    curve = [
        {"learning_rate": 0.0, "grad_norm": 0.0, "tokens": 0, **point} if "loss" in point else point
        for point in tunable.fit(train, validation)
    ]
    if live:
        live_writer(live)(curve, now=True)
    prompts, _, places = cut(train)
    read: list[list[str]] = [[] for _ in train]
    for row, place in places:
        read[row].append(train[row]["example_ids"][place])
    return Course(curve=curve, seen=[(1, 1, row) for row in range(len(train))], tokens=sum(map(len, prompts))), read


def _learned(course: Course, finite: bool) -> CheckResult:
    """Judged by the weights that are kept: the last ones, or the best."""
    watched = course.watched
    kept = next((loss for step, loss in watched if step == course.best_step), watched[-1][1] if watched else math.nan)
    return CheckResult(
        "learned",
        passed=finite and all(map(math.isfinite, course.losses)) and (len(watched) < 2 or kept < watched[0][1]),
        note=f"validation loss {watched[0][1]:.3f} -> {kept:.3f}" if watched else "no validation split",
    )


def _diverged(diverged: Diverged, example_ids: list[list[str]]) -> Report:
    """The report of a training that stopped at a number that is none: it blocks, and names the examples of the step."""
    examples = [identity for row in diverged.rows for identity in example_ids[row]]
    note = f"{diverged}; lower learning_rate or max_grad_norm, and look at the examples of that step"
    return Report(
        checks=[
            CheckResult("learned", passed=False, blocking=True, count=len(examples), rows=examples[:20], note=note),
            CheckResult("trained_what_it_should", passed=False, blocking=True, note="not looked at: training did not end"),
        ]
    )


def _disk(tunable: Tunable, params: Params, checkpoints: Path, out: Path) -> dict[Path, int]:
    """Folder -> bytes that training will write into it: one checkpoint more than are kept, the weights as they were, and the output."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in proof.trainable(tunable.model).values())
    memory = int(tunable.trainable * 4 * OPTIMIZER_MEMORY[params.optim])
    one = weights * (2 if params.load_best_model_at_end else 1) + memory
    return {checkpoints: weights + one * (params.save_total_limit + 1), out: 2 * weights}
