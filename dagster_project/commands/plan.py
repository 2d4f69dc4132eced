"""`pedigree plan`: predicted tokens, steps, memory and time of training, before it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from dagster_project.core import params
from dagster_project.core.documents import read_report
from dagster_project.core.errors import InputError
from dagster_project.core.layout import report_of
from dagster_project.core.params import Compute
from dagster_project.core.records import read_preferences, read_table, write_json
from dagster_project.lineage.notes import read_note
from dagster_project.pipeline import validate
from dagster_project.stages.adapter import Params
from dagster_project.training.methods.hardware import available_memory, prepare
from dagster_project.training.methods.load import load_tokenizer
from dagster_project.training.planning import layerwise, memory
from dagster_project.training.planning.answer_groups import answer_pass, judge_bytes
from dagster_project.training.planning.hints import training_spec
from dagster_project.training.planning.memory import size_text
from dagster_project.training.planning.pairs import Pair, largest_pass, lengths_of, reads_pairs_once
from dagster_project.training.planning.timing import Operations
from dagster_project.training.planning.torch_internals import replaced
from dagster_project.training.trainers.harness.params import AUTO
from dagster_project.training.trainers.merging.entry import method_of
from dagster_project.training.trainers.sft import auto
from dagster_project.training.trainers.sft.sft import refuse_mistakes, steps
from dagster_project.views.texts import text

MARGIN = (0.9, 1.4)
"""Factors from the fastest time of a step's operations, and from their time in new memory, to the least and most time
of a step: caches, and Python in between (docs/memory.md)."""

USUAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("lora", "dora", "rslora", "qlora", "qdora"), memory.LORA),
    "adalora": {"target_modules": "all-linear"},
    **{name: {"num_virtual_tokens": 20} for name in ("prefix_tuning", "prompt_tuning", "p_tuning")},
}
"""Keys of a method when it is planned without a params.yaml. Other methods use PEFT's defaults."""

FORWARD_PASSES = {"kto": 3}
"""Additional forward passes per forward and backward pass: one, of the reference model, for dpo in the first epoch. kto
has two more, of both models on unmatched answers. Methods without a reference have none."""

PUBLISHED = {"full": "60-80", "lora": "16-20", "qlora": "6-8"}
"""GB of GPU memory in published guides for a 7B model in 16 bits. The predictions for LoRA and QLoRA agree at 2,048
tokens in a pass with gradient checkpointing. For full training the guides assume 16-bit weights and gradients; here
trained weights are float32: 16 bytes per parameter with AdamW."""

GPU_SIZES = (24, 40, 80)
"""Sizes of the GPUs in `plan --model`, in GB of 10^9 bytes. A card sold as 24 GB has 24 x 2^30: the difference of 7 %
is the margin for what a prediction excludes, scratch memory of kernels and fragmentation."""
MAX_ROWS, MAX_TOKENS = 1_000_000, 1_000_000_000
"""Of a forward pass in `plan --model`: with more, a prediction takes minutes, and PyTorch's 32-bit sizes overflow."""


class Machine:
    """The device that training is planned for: its memory and its speed.

    Args:
        compute: threads and dtype.
        device: "cpu", "cuda", or None for the one that training would use on this machine.
        notes: file for the measured `runtime`, by versions of the libraries and number of processors; None for no file.
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
        """Free bytes for each process; None for a GPU that is not on this machine."""
        if not self.is_here:
            return None
        return available_memory(self.device, self.processes)

    @cached_property
    def runtime(self) -> int:
        """Bytes that a training process uses in addition to its tensors. Measured once for each set of versions."""
        if self.device == "cuda":
            return memory.CUDA_RUNTIME
        versions = " ".join(f"{library} {version(library)}" for library in ("torch", "transformers", "trl", "peft"))
        machine = f"{os.cpu_count()} processors, {versions}"
        notes = read_note(self._notes) if self._notes else {}
        if machine not in notes:
            code = "from dagster_project.training.planning.memory import resident; print(resident())"
            env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, check=True
            )
            notes[machine] = {"runtime": int(done.stdout.split()[-1])}
            if self._notes:
                write_json(self._notes, notes)
        return int(notes[machine]["runtime"])

    def seconds(self, step: Operations) -> tuple[float, float] | None:
        """Least and most seconds of a step; None for a GPU that is not on this machine.

        Timing a new operation takes a second or two.
        """
        import torch

        if not self.is_here:
            return None
        least, most = step.seconds(torch.device(self.device), self._times)
        return MARGIN[0] * least, MARGIN[1] * most

    def summary(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
            "processes": self.processes,
            "available_bytes": self.available,
        }


def plan_variants(root: Path, variants: Sequence[str]) -> dict[str, Any]:
    """Tokens, optimizer steps, parameters, peak memory and time per variant of params.yaml.

    Args:
        variants: names, or `reward_model`; empty for all variants.
    Returns:
        {"variants": {name: prediction}, "not_planned": variants without data yet -> next step, if any, "machine"}.
    Raises:
        InputError: a variant is unknown, the data has not been tokenized, or the base model is missing.
    """
    values = validate(root)
    known = [*values["adapter"], *values["aligned"]]
    if unknown := [name for name in variants if name not in [*known, *({"reward_model"} & values.keys())]]:
        raise InputError(f"params.yaml has no variant {', '.join(unknown)}", f"variants: {', '.join(known)}")
    if not (root / report_of("tokenized")).is_file():
        raise InputError("the data has not been tokenized yet", "run `dvc repro tokenized` first")
    tokenized = read_report(root, "tokenized")
    if not tokenized["train"]["rows"]:
        raise InputError("the training split is empty", "add examples to raw_examples.sources")
    base_model = root / "data" / "base_model"
    if not (base_model / "config.json").is_file():
        raise InputError("data/base_model is missing", "run `dvc repro base_model` or `dvc pull base_model` first")
    machine = Machine(params.parse(Compute, values.get("compute"), "compute"), None, _notes(root))
    predictions, not_planned = {}, dict[str, str]()
    for name in variants or known:
        if name not in known:
            predictions[name] = _reward_model(root, values["reward_model"], base_model, machine)
        elif name not in values["aligned"]:
            predictions[name] = _adapter(root, values, name, tokenized, base_model, machine)
        elif variants or (root / "data" / _read_by(values["aligned"][name]) / "train").is_dir():
            predictions[name] = _aligned(root, values, name, base_model, machine)
        else:
            not_planned[name] = f"run `dvc repro {_read_by(values['aligned'][name])}` first"
    return {
        "variants": predictions,
        **({"not_planned": not_planned} if not_planned else {}),
        "machine": machine.summary(),
    }


def _adapter(
    root: Path, values: dict[str, Any], name: str, tokenized: dict[str, Any], base_model: Path, machine: Machine
) -> dict[str, Any]:
    """Prediction for a variant of `adapter`.

    Args:
        values: of params.yaml.
        tokenized: report of the stage.
    """
    train, validates = tokenized["train"], tokenized["validation"]["rows"] > 0
    entry = params.parse(Params, values["adapter"][name], f"adapter.{name}")
    if entry.merge_of is not None:
        return {"merge_of": entry.merge_of, "method": method_of(entry), "memory": None, "time": None, "advice": []}
    if entry.command is not None:  # what it will do is its own business
        return {
            "command": entry.command, "examples": train["examples"], "tokens_per_epoch": train["tokens"],
            "memory": None, "time": None, "advice": [],
        }  # fmt: skip
    settled = auto.settle(entry, train["examples"], train["rows"], validates, machine.processes)
    resolved = settled.params
    row_of = [1, 1] if train["examples"] > train["rows"] else [1]  # packed, or not: no length matters
    refuse_mistakes(resolved, f"adapter.{name}", [row_of] * train["rows"], validates)
    n = steps(train["rows"], resolved, machine.processes)
    per_epoch = steps(
        train["rows"], resolved.model_copy(update={"num_train_epochs": 1, "max_steps": None}), machine.processes
    )
    row = _largest_row(root, values, train, resolved.method)
    spec = _spec(resolved, base_model, row, train["rows"], machine, f"adapter.{name}", machine.processes)
    if resolved.gradient_checkpointing == AUTO and machine.available is not None:
        spec = spec.checkpointed_beyond(machine.available)
    per_step = resolved.per_device_train_batch_size * resolved.gradient_accumulation_steps * machine.processes
    passes = _passes_over(n, per_epoch, per_step / train["rows"])
    all_tokens = round(train["tokens"] * passes)
    sweep_steps = auto.MOST_TRIALS * steps(train["rows"], settled.trial) if settled.trial else 0
    return {
        "examples": train["examples"],
        "epochs": round(n / per_epoch, 3),
        "steps": n,
        "tokens": all_tokens,
        "trained_tokens": round(train["trained_tokens"] * passes),
        "gradient_checkpointing": spec.gradient_checkpointing,
        **({"chosen": {key: asdict(choice) for key, choice in settled.chosen.items()}} if settled.chosen else {}),
        **({"sweep": {"trials_at_most": auto.MOST_TRIALS, "steps_at_most": sweep_steps}} if sweep_steps else {}),
        **_requirements(spec, machine, round(all_tokens * (n + sweep_steps * machine.processes) / n)),
    }


def _aligned(root: Path, values: Any, name: str, base_model: Path, machine: Machine) -> dict[str, Any]:
    """Prediction for a variant of `aligned`.

    For methods that sample, answers have the maximum length, and the time is not predicted.

    Args:
        values: of params.yaml.
    Raises:
        InputError: there are no preferences.
    """
    from dagster_project.stages import aligned
    from dagster_project.training.trainers.alignment.preference import AnswerGroups, Gkd
    from dagster_project.training.trainers.alignment.teacher import locate

    entry = params.parse(aligned.Params, values["aligned"][name], f"aligned.{name}")
    method = entry.parsed_method(f"aligned.{name}")
    pairs: Sequence[tuple[list[int], ...]] = (
        _tasks(root, entry, name, base_model)
        if _has_tasks(values["aligned"][name])
        else _training_pairs(root, base_model)
    )
    sequences = [
        method.sequence_lengths(len(prompt), [len(answer) for answer in answers]) for prompt, *answers in pairs
    ]
    method.refuse_few_prompts(len(pairs), entry, f"aligned.{name}")
    lengths = [length for pair in sequences for length, _ in pair]
    per_pass, passes = method.passes(entry)
    batch = per_pass * len(sequences[0]) // method.rows_per_pair
    shared = machine.processes if entry.sharding else 1  # the options of ppo are those of all processes
    rows = -(-len(pairs) * method.rows_per_pair // (1 if method.shares_processes else shared))
    per_epoch = method.steps(rows, entry.model_copy(update={"num_train_epochs": 1, "max_steps": None}))
    n = entry.max_steps or method.steps(rows, entry)  # TRL trains this many steps, also past `num_train_epochs`
    per_step = batch * passes * (1 if method.shares_processes else shared)  # texts
    texts = method.texts_per_epoch(len(lengths), entry)
    all_texts = texts * _passes_over(n, per_epoch, per_step / texts)
    largest_answer = max(answer for pair in sequences for _, answer in pair)
    row = [max(lengths)] * batch, batch * largest_answer
    spec = _spec(entry, base_model, row, 1, machine, f"aligned.{name}", shared)
    spec = replace(spec, method="lora", gradient_accumulation_steps=passes)
    if isinstance(method, Gkd):
        spec = replace(
            spec, teacher=locate(method.teacher, root, f"aligned.{name}.options.teacher"), divergence=method.beta
        )
    predicted = all_texts * sum(lengths) / len(lengths)
    tokens, in_groups = predicted, isinstance(method, AnswerGroups)
    reads_once = (in_groups or method.reads_pairs) and reads_pairs_once(
        base_model, machine.device, entry.peft, method.has_reference
    )
    if isinstance(method, AnswerGroups) and reads_once:
        largest = answer_pass(method, entry, [len(prompt) for prompt, *_ in pairs], n * passes)
        spec = replace(spec, lengths=[largest.tokens], counted=largest.answer_tokens, answers=largest)
    if method.learns_from_rewards and _has_judge(values, name, entry.rewards):
        spec = replace(spec, other_weights=judge_bytes(base_model, machine.dtype))
    if method.reads_pairs and reads_once:
        spec, share = _reading_pairs_once(
            spec, cast("Sequence[Pair]", pairs), per_pass, n * passes, sum(lengths), method.trains_prompts
        )
        tokens *= share
    # a forward and backward pass is 3 units; a forward pass of the reference is one, for dpo of all pairs once, however
    # many steps there are
    reference = tokens / 3 / (all_texts / len(lengths) if method.reads_pairs else 1)
    work = tokens + (FORWARD_PASSES.get(entry.method, 1) * reference if method.has_reference else 0)
    processes = machine.processes if method.shares_processes else shared
    requirements = _requirements(spec, machine, round(work), processes, method.can_shard)
    # from each answer; reports count its tokens once
    updates = getattr(method, "num_iterations", getattr(method, "num_ppo_epochs", 1))
    return {
        "pairs": len(pairs),
        "epochs": round(n / per_epoch, 3),
        "steps": n,
        "tokens": round(predicted / updates),
        **requirements,
        **({"time": None} if method.samples_answers else {}),
    }


def _passes_over(steps: int, per_epoch: int, share: float) -> float:
    """How often a training reads all of its data.

    Args:
        steps: of the training; per_epoch: of an epoch, whose last step may be smaller.
        share: of the data in any other step.

    >>> _passes_over(3, 3, 0.4), _passes_over(4, 3, 0.4)
    (1.0, 1.4)
    """
    epochs, more = divmod(steps, per_epoch)
    return epochs + min(more * share, 1.0)


def _read_by(values: dict[str, Any]) -> str:
    """The stage whose prompts an entry of `aligned` trains on."""
    return "splits" if _has_tasks(values) else "preferences"


def _has_tasks(values: dict[str, Any]) -> bool:
    """Whether the prompts of an entry of `aligned` are those of instruction records."""
    return values.get("reward_target") == "response"


def _has_judge(values: dict[str, Any], name: str, rewards: dict[str, Any]) -> bool:
    """Whether a variant that learns from rewards has a reward model.

    Answers to tasks are measured by the rewards alone.
    """
    return "reward_model" in values and bool(rewards.get("reward_model") or not _has_tasks(values["aligned"][name]))


def _tasks(root: Path, entry: Any, name: str, base_model: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt and response of each task, by the template that the policy is tuned with."""
    from dagster_project.training.tokens.preference_pairs import answered
    from dagster_project.training.trainers.alignment import rewards, tasks

    found, counts = tasks.tasks_of(
        root / "data" / "splits", rewards.ready(entry.rewards, f"aligned.{name}.rewards", root)
    )
    tasks.refuse_without_tasks(counts, f"aligned.{name}")
    conversations = [[*task["prompt"], *task["chosen"]] for task in found["train"]]
    return answered(_tokenizer(root, base_model), conversations, [task["tools"] for task in found["train"]])


def _reward_model(root: Path, values: Any, base_model: Path, machine: Machine) -> dict[str, Any]:
    """Prediction for the reward model: a language model with one position in the loss for each answer.

    Raises:
        InputError: there are no preferences.
    """
    from dagster_project.stages import reward_model

    entry = params.parse(reward_model.Params, values, "reward_model")
    training_pairs = _training_pairs(root, base_model)
    lengths = [len(prompt) + len(answer) for prompt, *answers in training_pairs for answer in answers]
    processes = machine.processes if entry.sharding else 1
    batch, pairs = 2 * entry.per_device_train_batch_size, len(lengths) // 2
    per_step = entry.per_device_train_batch_size * entry.gradient_accumulation_steps * processes
    per_epoch = -(-pairs // per_step)
    n = entry.max_steps or per_epoch * entry.num_train_epochs
    tokens = round(sum(lengths) * _passes_over(n, per_epoch, per_step / pairs))
    row = [max(lengths)] * batch, batch
    spec = _spec(entry, base_model, row, 1, machine, "reward_model", processes)
    work: float = tokens
    if reads_pairs_once(base_model, machine.device, entry.peft):
        spec, share = _reading_pairs_once(
            replace(spec, counted=0),
            training_pairs,
            entry.per_device_train_batch_size,
            n * entry.gradient_accumulation_steps,
            sum(lengths),
        )
        work *= share
    requirements = _requirements(spec, machine, round(work), processes)
    return {"pairs": pairs, "epochs": round(n / per_epoch, 3), "steps": n, "tokens": tokens, **requirements}


def _spec(
    entry: Any, base_model: Path, row: tuple[list[int], int], rows: int, machine: Machine, where: str, processes: int
) -> memory.TrainingSpec:
    """As `training_spec`, on the machine that training is planned for."""
    spec = training_spec(entry, base_model, row, rows, machine.device, machine.dtype, where, processes)
    return replace(spec, runtime=machine.runtime)


def _reading_pairs_once(
    spec: memory.TrainingSpec,
    pairs: Sequence[Pair],
    per_pass: int,
    passes: int,
    tokens: int,
    trains_prompts: bool = False,
) -> tuple[memory.TrainingSpec, float]:
    """The training with the largest pass of one that reads what two texts have
    in common once, and the share of tokens that it reads.

    Args:
        per_pass, passes: pairs in a pass, and passes of the training.
        tokens: of all texts.
        trains_prompts: whether log-probabilities of the tokens of prompts are needed, too.
    """
    sizes = [lengths_of(pair) for pair in pairs]
    read = [sum(size) for size in sizes]
    rows = largest_pass(read, per_pass, passes)
    counted = sum(len(answer) for row in rows for answer in pairs[row][1:]) if spec.counted else 0
    counted += sum(len(pairs[row][0]) - 1 for row in rows) if trains_prompts else 0
    largest = tuple(sizes[row] for row in rows)
    return replace(spec, lengths=[read[row] for row in rows], counted=counted, pair_lengths=largest), sum(read) / tokens


def _training_pairs(root: Path, base_model: Path) -> list[tuple[list[int], list[int], list[int]]]:
    """Token ids of prompt, chosen and rejected answer of each pair, by the template that the policy is tuned with.

    Raises:
        InputError: there are no preferences.
    """
    from dagster_project.training.tokens.preference_pairs import both

    pairs = read_preferences(root / "data" / "preferences" / "train")
    if not pairs:
        raise InputError("there are no preferences to train on yet", "run `dvc repro preferences` first")
    return both(_tokenizer(root, base_model), pairs)


def _tokenizer(root: Path, base_model: Path) -> Any:
    """The tokenizer with the template that the policy is tuned with."""
    return load_tokenizer(base_model, root / "data" / "tokenized")


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
    """Parameters, peak memory and time per 1,000 passes of each method, from a
    model's configuration only: without weights or data.

    Args:
        model: folder with a config.json, or the file itself.
        methods: names as in params.yaml, with the keys of USUAL.
        tokens: per row; all of them count in the loss.
        rows: in a forward pass.
        device: "cpu" or "cuda"; it need not be on this machine.
    Raises:
        InputError: there is no valid configuration, or a method is unknown or unsuitable for the model.
    """
    _refuse_size(tokens, rows)
    _import_libraries(device)
    machine = Machine(compute, device, None)
    predictions, gpus = {}, {}
    with _building(model):
        copies = layerwise.SmallCopies(model)
        for method in methods:
            spec = memory.TrainingSpec(
                machine.device,
                machine.dtype,
                model,
                method,
                USUAL.get(method, {}),
                [tokens],
                tokens,
                rows,
                machine.runtime,
                where=f"--method {method}",
                timed=machine.is_here,
                trace=copies.trace,
            )
            spec = replace(spec, gradient_checkpointing=checkpointing and spec.can_checkpoint)
            prediction = {"tokens": 1000 * rows * tokens, **_requirements(spec, machine, 1000 * rows * tokens)}
            if machine.device == "cuda":
                gpus[method] = _on_gpus(spec)
                if method in PUBLISHED and 6.5e9 < prediction["total_parameters"] < 7.5e9:
                    prediction["published_gb"] = PUBLISHED[method]
            predictions[method] = prediction
    assumptions = {
        "sequence_length": tokens,
        "batch_size": rows,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": checkpointing,
        "dtype": machine.summary()["dtype"],
        "examples": 1000 * rows,
        "methods": {
            name: {"peft": USUAL.get(name, {}), "optimizer": predictions[name].pop("optimizer_name")}
            for name in methods
        },
    }
    return {
        "model": _model(model, copies),
        "assumptions": assumptions,
        "variants": predictions,
        "gpus": gpus,
        "machine": machine.summary(),
    }


def _refuse_size(tokens: int, rows: int) -> None:
    if tokens < 2 or rows < 1:
        raise InputError(
            f"--tokens-per-row {tokens} --batch {rows}: nothing to train on", "give at least 2 tokens and 1 row"
        )
    if rows > MAX_ROWS or rows * tokens > MAX_TOKENS:
        raise InputError(
            f"--tokens-per-row {tokens} --batch {rows}: too much for one forward pass",
            f"give at most {MAX_ROWS:,} rows, and {MAX_TOKENS:,} tokens in all rows",
        )


@contextmanager
def _building(model: Path) -> Iterator[None]:
    """Raises:
    InputError: a wrong value of the configuration, found while it is validated or the model is built.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, RuntimeError) as error:
        if "memory" in str(error):  # of this machine
            raise
        raise InputError(
            f"{model}: cannot build this model: {' '.join(str(error).split())}", "correct the configuration"
        ) from None


def _import_libraries(device: str) -> None:
    """Import transformers without scipy, which only losses of object detection use.

    For a GPU, import bitsandbytes without torch.compile, which is only used for CPU kernels. Together they take a sixth
    of the time.
    """
    import torch

    if device == "cuda" and find_spec("bitsandbytes"):
        with replaced(torch, "compile", lambda function, **_: function):
            import bitsandbytes  # noqa: F401
    from transformers import utils

    with replaced(utils, "is_scipy_available", lambda: False):
        import transformers.modeling_utils  # noqa: F401


def _model(path: Path, copies: layerwise.SmallCopies) -> dict[str, Any]:
    """Name (from the configuration or its folder), architecture and size of a model."""
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    values = json.loads((folder / "config.json" if path.is_dir() else path).read_text())
    file = folder.name if path.is_dir() or path.stem == "config" else path.stem
    return {
        "name": values.get("_name_or_path") or file,
        "architecture": (values.get("architectures") or [values.get("model_type")])[0],
        "layers": copies.layers,
        "parameters": sum(parameter.numel() for parameter in copies.skeleton.parameters()),
    }


def _on_gpus(spec: memory.TrainingSpec) -> list[dict[str, Any]]:
    """Peak memory with and without gradient checkpointing, and the GPUs on which it fits."""
    rows = []
    for checkpointing in (False, True) if spec.can_checkpoint else (False,):
        same = checkpointing == spec.gradient_checkpointing
        variant = spec if same else replace(spec, gradient_checkpointing=checkpointing, timed=False)
        peak = variant.needed
        fits = {str(size): peak <= size * 10**9 for size in GPU_SIZES}
        needed = {str(size): variant.gpus_needed(size * 10**9) for size in GPU_SIZES if peak > size * 10**9}
        rows.append(
            {
                "gradient_checkpointing": checkpointing,
                "peak": peak,
                "fits": fits,
                **({"sharded": needed} if needed else {}),
            }
        )
    return rows


def _notes(root: Path) -> Path | None:
    return root / ".dvc" / "tmp" / "pedigree" / "speed.json" if (root / ".dvc").is_dir() else None


def _largest_row(root: Path, values: dict[str, Any], train: dict[str, Any], method: str) -> tuple[list[int], int]:
    """`memory.largest_row` of the training split.

    If its rows are missing: a full row with the average share of trained tokens.
    """
    path = root / "data" / "tokenized" / "train.parquet"
    if path.is_file():
        return memory.largest_row(read_table(path, ["lengths", "labels"]), method)
    section = values.get("tokenized") or {}
    tokens = section.get("packed_length") or section.get("max_length") or 512
    return [tokens], -(-tokens * train["trained_tokens"] // train["tokens"])


def _requirements(
    spec: memory.TrainingSpec, machine: Machine, tokens: int, processes: int | None = None, can_shard: bool = True
) -> dict[str, Any]:
    """Parameters, peak memory and time of a training on `tokens` tokens in total.

    Args:
        processes: that share the tokens; None: those of the machine.
        can_shard: whether the training supports `sharding`.
    """
    prediction, available = spec.prediction, machine.available
    fits = None if available is None else spec.needed <= available
    advice = []
    if available is not None and not fits:
        place = "of the GPU are" if spec.device == "cuda" else "are"
        advice = [f"needs {size_text(spec.needed)}, but {size_text(available)} {place} free", spec.remedy(available)]
        if can_shard and (gpus := spec.gpus_needed(available)):
            advice.append(
                f"with sharding: {{fsdp: full_shard}} and compute.processes: {gpus} it would fit on {gpus} such GPUs"
            )
    step, time = machine.seconds(prediction.operations), None
    if step is not None:
        per_step = sum(spec.lengths) * spec.rows * spec.gradient_accumulation_steps * (processes or machine.processes)
        steps = tokens / per_step
        time = {"from_seconds": round(step[0] * steps), "to_seconds": round(step[1] * steps)}
    return {
        "optimizer_name": prediction.optim,
        "trainable_parameters": prediction.trainable,
        "total_parameters": prediction.total,
        "memory": {**asdict(prediction.memory), "total": spec.needed},
        "fits": fits,
        **({"sharding": {**spec.sharding.model_dump(), "processes": spec.processes}} if spec.sharding else {}),
        "advice": advice,
        "time": time,
    }


def as_text(document: dict[str, Any]) -> str:
    """The document of `plan_variants` or `plan_model` as text for the terminal."""
    return text(
        "plan",
        **{"not_planned": {}, "gpus": {}, **document},
        size=size_text,
        time=_time,
        gpu_sizes=GPU_SIZES,
    )


def _time(seconds: int) -> str:
    return (
        f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds} s"
    )
