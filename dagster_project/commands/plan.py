"""`pedigree plan`: predicted tokens, steps, memory and time of training, before it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dagster_project.core import params
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.core.records import read_preferences, read_table, write_json
from dagster_project.pipeline import validate
from dagster_project.stages import aligned
from dagster_project.stages.adapter import Params
from dagster_project.training.methods.build import CANNOT_CHECKPOINT
from dagster_project.training.methods.hardware import available_memory, prepare
from dagster_project.training.planning import layerwise, memory
from dagster_project.training.planning.memory import size_text
from dagster_project.training.planning.timing import Operations
from dagster_project.training.planning.torch_internals import replaced
from dagster_project.training.tokens.preference_pairs import both
from dagster_project.training.trainers.alignment.reward_model import tokenizer_of
from dagster_project.training.trainers.harness.params import AUTO
from dagster_project.training.trainers.sft import auto
from dagster_project.training.trainers.sft.sft import refuse_mistakes, steps

MARGIN = (0.9, 1.4)
"""A step takes from this much of its operations at their fastest to this much of them in new memory: caches, and Python between them (docs/memory.md)."""

USUAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("lora", "dora", "rslora", "qlora", "qdora"), memory.LORA),
    "adalora": {"target_modules": "all-linear"},
    **{name: {"num_virtual_tokens": 20} for name in ("prefix_tuning", "prompt_tuning", "p_tuning")},
}
"""Keys of a method where it is planned for a model without a params.yaml. Other methods: PEFT's own defaults."""

PUBLISHED = {"full": "60-80", "lora": "16-20", "qlora": "6-8"}
"""GB of a GPU that guides state for a 7B model in 16 bits. LoRA's and QLoRA's are met at 2,048 tokens a pass with gradient checkpointing.
Full training's counts weights and gradients in 16 bits; here what learns is float32, and takes 16 bytes a parameter with AdamW."""


GPU_SIZES = (24, 40, 80)
"""GB of the GPUs that `plan --model` compares with, of 10^9 bytes. A card sold as 24 GB has 24 x 2^30: the 7 % between them are left to
what a prediction leaves out, kernels' scratch and what the allocator holds."""


class Machine:
    """The device that training is planned for: what it has, and how fast it is.

    Args:
        compute: threads and dtype.
        device: "cpu", "cuda", or None for the one that training would use here.
        notes: file to keep `runtime` in, by versions of the libraries and number of processors; None keeps none.
    """

    def __init__(self, compute: Compute, device: str | None, notes: Path | None) -> None:
        import torch

        here, self.dtype = prepare(compute)
        self.device = device or here.type
        if self.device not in ("cpu", "cuda"):
            raise InputError(f"--device {self.device}: unknown", "use cpu or cuda")
        self.is_here = self.device == "cpu" or torch.cuda.is_available()
        if not self.is_here and compute.dtype == "auto":
            self.dtype = torch.bfloat16
        self.threads, self.processes = compute.threads, compute.processes
        self._notes = notes
        self._times: dict[Any, tuple[float, float]] = {}

    @property
    def available(self) -> int | None:
        """Bytes that are free now for each process; None for a GPU that is not here."""
        if not self.is_here:
            return None
        return available_memory(self.device, self.processes)

    @cached_property
    def runtime(self) -> int:
        """Bytes that a training process uses in addition to its tensors."""
        if self.device == "cuda":
            return memory.CUDA_RUNTIME
        code = "from dagster_project.training.planning.memory import resident; print(resident())"

        def measure() -> int:
            env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, check=True)
            return int(done.stdout.split()[-1])

        return int(self._noted("runtime", measure))

    def seconds(self, step: Operations) -> tuple[float, float] | None:
        """Least and most seconds of a step; None for a GPU that is not on this machine. Takes a second or two for an operation that is new."""
        import torch

        if not self.is_here:
            return None
        least, most = step.seconds(torch.device(self.device), self._times)
        return MARGIN[0] * least, MARGIN[1] * most

    def _noted(self, name: str, measure: Any) -> Any:
        """A measurement from the file, or measured now and written there."""
        versions = " ".join(f"{library} {version(library)}" for library in ("torch", "transformers", "trl", "peft"))
        machine = f"{os.cpu_count()} processors, {versions}"
        try:
            notes = json.loads(self._notes.read_text()) if self._notes else {}
        except (OSError, ValueError):
            notes = {}
        if name not in notes.get(machine, {}):
            notes.setdefault(machine, {})[name] = measure()
            if self._notes:
                self._notes.parent.mkdir(parents=True, exist_ok=True)
                scratch = self._notes.with_suffix(f".{os.getpid()}")
                write_json(scratch, notes)
                scratch.replace(self._notes)
        return notes[machine][name]


def plan_variants(root: Path, variants: Sequence[str]) -> dict[str, Any]:
    """Tokens, optimizer steps, parameters, peak memory and time per variant of params.yaml.

    Raises:
        InputError: an unknown variant, or the data has not been tokenized yet, or the base model is not here.
    """
    values = validate(root)
    known = [*values["adapter"], *values["aligned"]]
    if unknown := [name for name in variants if name not in known]:
        raise InputError(f"params.yaml has no variant {', '.join(unknown)}", f"variants: {', '.join(known)}")
    report = root / "data" / "reports" / "tokenized.json"
    if not report.is_file():
        raise InputError("the data has not been tokenized yet", "run `dvc repro tokenized` first")
    tokenized = json.loads(report.read_text())
    train = tokenized["train"]
    if not train["rows"]:
        raise InputError("the training split is empty", "name more examples in raw_examples.sources")
    base_model = root / "data" / "base_model"
    if not (base_model / "config.json").is_file():
        raise InputError("data/base_model is not here", "run `dvc repro base_model` or `dvc pull base_model` first")
    machine = Machine(params.parse(Compute, values.get("compute"), "compute"), None, _notes(root))
    found = {}
    for name in variants or known:
        if name in values["aligned"]:
            if variants or (root / "data" / "preferences" / "train").is_dir():
                found[name] = _aligned(root, values["aligned"][name], name, base_model, machine)
            continue
        entry = params.parse(Params, values["adapter"][name], f"adapter.{name}")
        validates = tokenized["validation"]["rows"] > 0
        settled = auto.settle(entry, train["examples"], train["rows"], validates, machine.processes)
        recipe = settled.params
        refuse_mistakes(recipe, f"adapter.{name}", [[1]] * train["rows"], validates)
        n = steps(train["rows"], recipe, machine.processes)
        per_epoch = steps(train["rows"], recipe.model_copy(update={"num_train_epochs": 1, "max_steps": None}), machine.processes)
        rows = min(recipe.per_device_train_batch_size, train["rows"])
        lengths, counted = _largest_row(root, values, train, recipe.method)
        way = memory.TrainingSpec(
            machine.device, machine.dtype, machine.runtime, base_model, recipe.method, recipe.peft, recipe.quantization, rows, lengths, counted,
            recipe.gradient_checkpointing is True, recipe.gradient_accumulation_steps, recipe.optim, f"adapter.{name}",
        )  # fmt: skip
        if recipe.gradient_checkpointing == AUTO and recipe.method.lower() not in CANNOT_CHECKPOINT and machine.available is not None:
            way = replace(way, gradient_checkpointing=way.predict().memory.total > machine.available)
        all_tokens = round(train["tokens"] * n / per_epoch)
        most = auto.MOST_TRIALS * steps(train["rows"], settled.trial) if settled.trial else 0
        found[name] = {
            "examples": train["examples"],
            "epochs": round(n / per_epoch, 3),
            "steps": n,
            "tokens": all_tokens,
            "trained_tokens": round(train["trained_tokens"] * n / per_epoch),
            "gradient_checkpointing": way.gradient_checkpointing,
            **({"chosen": {key: asdict(choice) for key, choice in settled.chosen.items()}} if settled.chosen else {}),
            **({"sweep": {"trials_at_most": auto.MOST_TRIALS, "steps_at_most": most}} if most else {}),
            **_requirements(way, machine, round(all_tokens * (n + most * machine.processes) / n)),
        }
    return {"variants": found, "machine": _machine_summary(machine)}


def _aligned(root: Path, recipe: Any, name: str, base_model: Path, machine: Machine) -> dict[str, Any]:
    """What an aligned variant takes. An answer of an online method is planned as long as it may be; the time for sampling it is not predicted."""
    entry = params.parse(aligned.Params, recipe, f"aligned.{name}")
    method = entry.parsed_method(f"aligned.{name}")
    pairs = read_preferences(root / "data" / "preferences" / "train")
    if not pairs:
        raise InputError("there are no preferences to learn from yet", "run `dvc repro preferences` first")
    ids = both(tokenizer_of(base_model), pairs)
    sequences = [method.sequence_lengths(len(prompt), [len(answer) for answer in answers]) for prompt, *answers in ids]
    lengths = [length for pair in sequences for length, _ in pair]
    per_pass, passes = method.passes(entry)
    batch = per_pass * len(sequences[0])
    n = method.steps(len(pairs), entry)
    per_step = batch * passes * sum(lengths) / len(lengths)
    way = memory.TrainingSpec(
        machine.device, machine.dtype, machine.runtime, base_model, "lora", entry.peft, None, 1, [max(lengths)] * batch,
        batch * max(answer for pair in sequences for _, answer in pair), entry.gradient_checkpointing, passes, entry.optim, f"aligned.{name}",
    )  # fmt: skip
    # beside forward and backward pass, the reference's forward pass
    took = _requirements(way, machine, round(n * per_step * 4 / 3))
    return {
        "pairs": len(pairs),
        "epochs": entry.num_train_epochs,
        "steps": n,
        "tokens": round(n * per_step),
        **took,
        **({"time": None} if method.learns_from_rewards else {}),
    }


def plan_model(
    model: Path,
    methods: Sequence[str],
    *,
    tokens: int,
    rows: int,
    checkpointing: bool,
    compute: Compute,
    device: str,
) -> dict[str, Any]:
    """Parameters, peak memory and time per 1,000 passes of each method, from a model's configuration alone: no weights, no data.

    Args:
        model: folder with a config.json, or such a file.
        methods: names as in params.yaml, with the keys of USUAL.
        tokens: of a row, all of which count in the loss.
        rows: in a forward pass.
        device: "cpu" or "cuda"; it need not be here.
    Raises:
        InputError: no configuration, or a method that is unknown or does not suit the model.
    """
    if tokens < 2 or rows < 1:
        raise InputError(f"--tokens-per-row {tokens} --batch {rows}: nothing to train on", "give at least 2 tokens and 1 row")
    if device == "cuda":
        _import_bitsandbytes()
    from huggingface_hub.errors import StrictDataclassError

    machine = Machine(compute, device, None)
    found, sizes = {}, {}
    try:
        copies = layerwise.SmallCopies(model)
        for method in methods:
            way = memory.TrainingSpec(
                machine.device, machine.dtype, machine.runtime, model, method, USUAL.get(method, {}), None, rows, [tokens], tokens,
                checkpointing and method.lower() not in CANNOT_CHECKPOINT, 1, "adamw_torch_fused", f"--method {method}",
                timed=machine.is_here, trace=copies.trace,
            )  # fmt: skip
            found[method] = {"tokens": 1000 * rows * tokens, **_requirements(way, machine, 1000 * rows * tokens)}
            if machine.device == "cuda":
                sizes[method] = _on_gpus(way, found[method]["memory"]["total"])
                if method in PUBLISHED and 6.5e9 < found[method]["total_parameters"] < 7.5e9:
                    found[method]["published_gb"] = PUBLISHED[method]
    except (StrictDataclassError, ValueError, TypeError) as error:  # of the configuration's own checks, or of building from it
        raise InputError(f"{model}: no model can be made of it: {' '.join(str(error).split())}", "correct the configuration") from None
    assumptions = {
        "sequence_length": tokens,
        "batch_size": rows,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": checkpointing,
        "dtype": _machine_summary(machine)["dtype"],
        "examples": 1000 * rows,
        "methods": {name: {"peft": USUAL.get(name, {}), "optimizer": found[name].pop("optimizer_name")} for name in methods},
    }
    return {
        "model": _model(model, copies),
        "assumptions": assumptions,
        "variants": found,
        "gpus": sizes,
        "machine": _machine_summary(machine),
    }


def _import_bitsandbytes() -> None:
    """Import it without torch's compiler, a third of the imports' time: it wraps kernels for a CPU in torch.compile, and none of them runs here."""
    import torch

    if find_spec("bitsandbytes"):
        with replaced(torch, "compile", lambda function, **_: function):
            import bitsandbytes  # noqa: F401


def _model(path: Path, copies: layerwise.SmallCopies) -> dict[str, Any]:
    """Name (of the configuration, else of its folder), architecture and size of a model."""
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    values = json.loads((folder / "config.json" if path.is_dir() else path).read_text())
    file = folder.name if path.is_dir() or path.stem == "config" else path.stem
    return {
        "name": values.get("_name_or_path") or file,
        "architecture": (values.get("architectures") or [values.get("model_type")])[0],
        "layers": copies.layers,
        "parameters": sum(parameter.numel() for parameter in copies.skeleton.parameters()),
    }


def _on_gpus(way: memory.TrainingSpec, total: int) -> list[dict[str, Any]]:
    """Peak memory with and without gradient checkpointing, and on which GPUs it fits; `total` is that of `way` as it is."""
    can = way.method.lower() not in CANNOT_CHECKPOINT
    rows = []
    for checkpointing in (False, True) if can else (False,):
        as_is = checkpointing == way.gradient_checkpointing
        peak = total if as_is else replace(way, gradient_checkpointing=checkpointing, timed=False).predict().memory.total
        fits = {str(size): peak <= size * 10**9 for size in GPU_SIZES}
        rows.append({"gradient_checkpointing": checkpointing, "peak": peak, "fits": fits})
    return rows


def _notes(root: Path) -> Path | None:
    return root / ".dvc" / "tmp" / "pedigree" / "speed.json" if (root / ".dvc").is_dir() else None


def _machine_summary(machine: Machine) -> dict[str, Any]:
    dtype = str(machine.dtype).removeprefix("torch.")
    return {
        "device": machine.device,
        "dtype": dtype,
        "threads": machine.threads,
        "processes": machine.processes,
        "available_bytes": machine.available,
    }


def _largest_row(root: Path, values: dict[str, Any], train: dict[str, Any], method: str) -> tuple[list[int], int]:
    """`memory.largest_row` of the training split. Where the rows are not here: a full row with the usual share of positions that count."""
    path = root / "data" / "tokenized" / "train.parquet"
    if path.is_file():
        rows = read_table(path, ["lengths", "labels"])
        return memory.largest_row([row["lengths"] for row in rows], [row["labels"] for row in rows], method)
    section = values.get("tokenized") or {}
    tokens = section.get("packed_length") or section.get("max_length") or 512
    return [tokens], -(-tokens * train["trained_tokens"] // train["tokens"])


def _requirements(way: memory.TrainingSpec, machine: Machine, tokens: int) -> dict[str, Any]:
    """Parameters, peak memory and time of a training on `tokens` tokens in total."""
    took = way.predict()
    available = machine.available
    fits = None if available is None else took.memory.total <= available
    advice = []
    if available is not None and not fits:
        place = "of the GPU are" if way.device == "cuda" else "are"
        advice = [
            f"needs {size_text(took.memory.total)}, but {size_text(available)} {place} free",
            way.remedy(took.memory.total, available),
        ]
    step = machine.seconds(took.step)
    steps_of_all = tokens / (sum(way.lengths) * way.rows * way.gradient_accumulation_steps * machine.processes)
    return {
        "optimizer_name": took.optim,
        "trainable_parameters": took.trainable,
        "total_parameters": took.total,
        "memory": {**asdict(took.memory), "total": took.memory.total},
        "fits": fits,
        "advice": advice,
        "time": None if step is None else {"from_seconds": round(step[0] * steps_of_all), "to_seconds": round(step[1] * steps_of_all)},
    }


def as_text(found: dict[str, Any]) -> str:
    machine, lines = found["machine"], _assumed(found) if "assumptions" in found else []
    for name, v in found["variants"].items():
        if "pairs" in v:
            lines.append(f"{name}: {v['pairs']} pairs, {v['tokens']:,} tokens in {v['steps']} steps")
        elif "steps" in v:
            lines.append(
                f"{name}: {v['examples']} examples x {v['epochs']:g} epochs = {v['tokens']:,} tokens ({v['trained_tokens']:,} trained on) in {v['steps']} steps"
            )
        else:
            lines.append(f"{name}:")
        lines += [f"  {key} {choice['value']}: {choice['why']}" for key, choice in v.get("chosen", {}).items()]
        if v.get("gradient_checkpointing"):
            lines.append("  with gradient checkpointing")
        if "sweep" in v:
            lines.append(
                f"  a sweep on the validation loss will correct learning_rate: at most {v['sweep']['trials_at_most']} trials,"
                f" {v['sweep']['steps_at_most']} steps more"
            )
        share = 100 * v["trainable_parameters"] / v["total_parameters"]
        lines.append(f"  {v['trainable_parameters']:,} of {v['total_parameters']:,} parameters learn ({share:.3g} %)")
        parts = ", ".join(f"{part} {size_text(size)}" for part, size in v["memory"].items() if part != "total" and size >= 5e5)
        beside = f"; published for 7B: {v['published_gb']} GB" if "published_gb" in v else ""
        free = "" if machine["available_bytes"] is None else f" of {size_text(machine['available_bytes'])} free"
        lines.append(f"  memory {size_text(v['memory']['total'])}{free} ({parts}){beside}")
        if v["time"]:
            per = "" if "steps" in v else f" for {v['tokens']:,} tokens"
            lines.append(f"  time {_time(v['time']['from_seconds'])} to {_time(v['time']['to_seconds'])}{per}")
        if v["advice"]:
            lines += [f"  does not fit: {v['advice'][0]}", *(f"  hint: {text}" for text in v["advice"][1:])]
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    if any("published_gb" in v for v in found["variants"].values()):
        lines.append(
            "published figures hold for 2,048 tokens a pass with gradient checkpointing; full: for weights that learn in 16 bits, here in 32"
        )
    table = _gpu_table(found["gpus"]) if found.get("gpus") else []
    return "\n".join([*lines, f"on {machine['device']} in {machine['dtype']}{threads}", *table])


def _assumed(found: dict[str, Any]) -> list[str]:
    """The model, and what its plan assumes."""
    model, given = found["model"], found["assumptions"]
    rows = "1 row" if given["batch_size"] == 1 else f"{given['batch_size']} rows"
    on = "on" if given["gradient_checkpointing"] else "off"
    lines = [
        f"model: {model['name']} ({model['architecture']}), {model['parameters']:,} parameters in {model['layers']} layers",
        f"assumes: {rows} of {given['sequence_length']:,} tokens in a forward pass, every token counted in the loss; no gradient accumulation;"
        f" {given['dtype']}; gradient checkpointing {on}; a time, where one is given, is for {given['examples']:,} such rows (no data is read)",
    ]
    for name, one in given["methods"].items():
        keys = "".join(f", {key} {value}" for key, value in one["peft"].items())
        lines.append(f"  {name}: optimizer {one['optimizer']}{keys}")
    return [*lines, "change them with --tokens-per-row, --batch, --method, --dtype, --no-gradient-checkpointing", ""]


def _gpu_table(gpus: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Which method fits on which GPU."""
    wide = max(map(len, [*gpus, "method"]))
    lines = ["", f"{'method':{wide}}  checkpointing        peak" + "".join(f"{f'{size} GB':>8}" for size in GPU_SIZES)]
    for name, rows in gpus.items():
        for row in rows:
            on = "on" if row["gradient_checkpointing"] else "off"
            fits = "".join(f"{'fits' if row['fits'][str(size)] else 'no':>8}" for size in GPU_SIZES)
            lines.append(f"{name:{wide}}  {on:<13}  {size_text(row['peak']):>10}{fits}")
    return [*lines, "fits: the predicted peak is at most that many GB of 10^9 bytes, on one GPU"]


def _time(seconds: int) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds} s"
