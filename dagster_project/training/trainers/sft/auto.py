"""Automatic settings: a number for each `auto` of an entry by the size of the data, then the learning rate by trials.

| examples to train on | num_train_epochs | learning_rate | r | examples a step |
| --- | --- | --- | --- | --- |
| under 1,000 | 10 to 5 | 1e-4 | 8 | 4 to 8 |
| 1,000 to 10,000 | 5 to 3 | 2e-4 | 16 | 8 to 16 |
| over 10,000 | 3 to 1 | 3e-4 | 32 to 64 | 16 to 32 |

Source: guidelines by data size in fine-tuning guides, for models of a few billion parameters. Within a band a value is
interpolated by the logarithm of the size, from 100 to 1,000, 10,000 and 100,000 examples, and constant above. Small
models need a higher rate than the guideline, so a sweep on the validation loss corrects it.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dagster_project.core.progress import Progress
from dagster_project.core.records import write_json
from dagster_project.training.methods.options import ALIASES
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.params import AUTO, SftParams
from dagster_project.training.trainers.harness.session import Diverged, Interrupted
from dagster_project.training.trainers.sft.sft import steps, warmup

R = TypeVar("R", bound=SftParams)

MOST_TRIALS = 6
"""Trials of a sweep. From the guideline's rate they cover a factor of 300 upwards, or of 100 downwards."""

LEAST_STEPS = 20
"""Limits of the steps of a trial, by default a tenth of the training's steps."""

ENOUGH = 0.9
"""Share of the greatest decrease of the validation loss in a trial. The sweep chooses the lowest rate that reaches it,
because the best rate for a few steps is too high for a long training."""

PATIENCE = 2
"""With an automatic number of epochs: epochs without a lower validation loss after which training stops."""


STEPS_OF_SCHEDULES = {"num_decay_steps", "num_stable_steps", "timescale"}
"""Keys of schedules that are numbers of steps, which a trial shortens."""


@dataclass(frozen=True)
class Band:
    """The guideline for one range of sizes. Pairs are the values at its two ends."""

    name: str
    sizes: tuple[int, int]
    epochs: tuple[int, int]
    learning_rate: float
    r: tuple[int, int]
    examples_per_step: tuple[int, int]

    def at(self, examples: int, ends: tuple[int, int]) -> float:
        low, high = self.sizes
        share = min(max(math.log(examples / low) / math.log(high / low), 0), 1)
        return ends[0] + share * (ends[1] - ends[0])


GUIDELINE = (
    Band("under 1,000", (100, 1_000), (10, 5), 1e-4, (8, 8), (4, 8)),
    Band("1,000 to 10,000", (1_000, 10_000), (5, 3), 2e-4, (16, 16), (8, 16)),
    Band("over 10,000", (10_000, 100_000), (3, 1), 3e-4, (32, 64), (16, 32)),
)


def band(examples: int) -> Band:
    return GUIDELINE[0 if examples < 1_000 else 1 if examples <= 10_000 else 2]


@dataclass(frozen=True)
class Choice:
    """A value for an `auto`, or a setting that follows from one."""

    value: float | int | bool
    why: str


@dataclass(frozen=True)
class ResolvedParams(Generic[R]):
    """An entry without `auto`."""

    params: R
    chosen: dict[str, Choice]
    """By the name in the entry, e.g. "peft.r"."""
    trial: R | None
    """Entry of the trials of the sweep that corrects `learning_rate`; None without a sweep."""


def settle(params: R, examples: int, rows: int, validates: bool, processes: int = 1) -> ResolvedParams[R]:
    """Replace each `auto` by a number, for training and for `pedigree plan`.

    Args:
        params: an adapter's entry.
        examples, rows: of the training split; rows are packed rows.
        validates: whether there is a validation split.
        processes: number of processes that share the passes of a step. A trial uses a single one.
    """
    passes = params.gradient_accumulation_steps * processes
    entry: dict[str, Any] = params.model_dump(warnings=False)
    method, peft = entry["method"], entry["peft"]
    of, chosen = band(examples), dict[str, Choice]()
    size = f"{examples:,} examples ({of.name})"
    if entry["num_train_epochs"] == AUTO:
        chosen["num_train_epochs"] = Choice(round(of.at(examples, of.epochs)), f"guideline for {size}")
        for name, value in (("load_best_model_at_end", True), ("early_stopping_patience", PATIENCE)):
            if validates and name not in params.model_fields_set:
                chosen[name] = Choice(value, "stops before the model overfits")
    if peft.get("r") == AUTO and ALIASES.get(method.lower(), (method.lower(), {}))[0] == "lora":
        r = 8 * round(of.at(examples, of.r) / 8)
        chosen["peft.r"] = Choice(r, f"guideline for {size}")
        if "lora_alpha" not in peft:
            chosen["peft.lora_alpha"] = Choice(2 * r, "twice peft.r")
    if entry["per_device_train_batch_size"] == AUTO:
        per_row = examples / rows
        wanted, together = of.at(examples, of.examples_per_step), per_row * passes
        n = min(max(round(wanted / together), 1), rows)
        found = f"{n * together:.3g} examples a step, a packed row holding {per_row:.3g}"
        chosen["per_device_train_batch_size"] = Choice(n, f"{found}; guideline {wanted:.3g} for {size}")
    sweeps = False
    if entry["learning_rate"] == AUTO:
        why = f"guideline for {size}"
        if method.lower() == "feature_extraction":
            why += f"; {method} takes no optimizer steps"
        elif not validates:
            why += "; no validation split to correct it by"
        else:
            sweeps = True
        chosen["learning_rate"] = Choice(of.learning_rate, why)
    settled = put(params, chosen)
    return ResolvedParams(settled, chosen, _trial(settled, steps(rows, settled, processes), passes) if sweeps else None)


def put(params: R, chosen: Mapping[str, Choice]) -> R:
    """The entry with the automatic values."""
    values = params.model_dump(warnings=False)
    for name, choice in chosen.items():
        *section, key = name.split(".")
        (values[section[0]] if section else values)[key] = choice.value
    return type(params).model_validate(values)


def _trial(params: R, total: int, passes: int) -> R:
    """A shortened training, with its own warm-up and decay."""
    n = min(total, max(LEAST_STEPS, total // 10))
    keys = dict(params.lr_scheduler_kwargs)
    for name in STEPS_OF_SCHEDULES & keys.keys():
        if isinstance(keys[name], int | float):
            keys[name] = math.ceil(keys[name] * n / total)
    changed = {
        "max_steps": n,
        "warmup_steps": math.ceil(warmup(total, params) * n / total),
        "lr_scheduler_kwargs": keys,
        "gradient_accumulation_steps": passes,
        "save_strategy": "no",
        "report_to": "none",
        "early_stopping_patience": None,
        "load_best_model_at_end": False,
    }
    return params.model_copy(update=changed)


def rate_at(start: float, place: int) -> float:
    """The first rate times a power of sqrt(10), to three digits."""
    return float(f"{start * 10 ** (place / 2):.3g}")


def climb(loss: Callable[[int], float]) -> dict[int, float]:
    """Search for the lowest loss from position 0: upwards while it decreases, else downwards; MOST_TRIALS at most.

    Args:
        loss: loss at a position; infinite if training diverged, and then only lower positions are tried.
    Returns:
        Position -> loss, in the order tried.
    """
    found = {0: loss(0)}
    for way in (1, -1):
        place = 0
        while len(found) < MOST_TRIALS and min(found.values()) == found[place]:
            if way > 0 and math.isinf(found[place]):
                break
            place += way
            found[place] = loss(place)
    return found


def sweep(
    trial: R, learn: Callable[[R], TrainingHistory], notes: Path, identity: Mapping[str, str]
) -> dict[float, float]:
    """Short trainings at rates around the trial's rate.

    Args:
        learn: trains a fresh model.
        notes: file with the losses, from which a killed sweep resumes.
        identity: what must be equal to use them.
    Returns:
        Rate -> validation loss, in the order tried; first, as rate 0, the loss before training.
    """
    try:
        noted = json.loads(notes.read_text())
    except (OSError, ValueError):  # missing, or truncated
        noted = {}
    known = noted["losses"] if noted.get("identity") == identity else {}
    losses = {name: [math.inf if loss is None else loss for loss in found] for name, found in known.items()}
    progress = Progress("sweep of learning_rate", MOST_TRIALS, "trial", every=0)

    def loss(place: int) -> float:
        rate, name = rate_at(trial.learning_rate, place), str(place)
        if name not in losses:
            losses[name] = _losses_of(trial.model_copy(update={"learning_rate": rate}), learn)
            write_json(notes, {"identity": identity, "losses": losses})
        ended = f"validation loss {losses[name][1]:.3f}" if math.isfinite(losses[name][1]) else "diverged"
        progress.advance(note=f"learning_rate {rate:g}: {ended}")
        return losses[name][1]

    found = {rate_at(trial.learning_rate, place): value for place, value in climb(loss).items()}
    return {0.0: min(before for before, _ in losses.values()), **found}


def _losses_of(trial: R, learn: Callable[[R], TrainingHistory]) -> list[float]:
    """The validation losses at the beginning and end of a trial; infinite if NaN."""
    try:
        watched = learn(trial).validation
    except Diverged:
        return [math.inf, math.inf]
    except Interrupted:
        problem = "interrupted in the sweep of learning_rate; finished trials are kept"
        raise Interrupted(problem, "run the same command again") from None
    finally:
        gc.collect()  # a Trainer and its model are in reference cycles, and the next model needs the memory
    return [loss if math.isfinite(loss) else math.inf for _, loss in (watched[0], watched[-1])]


def best(trials: Mapping[float, float], trial: SftParams) -> Choice:
    """The lowest rate with nearly the greatest decrease of the loss; the lowest rate if every trial diverged.

    Args:
        trials: result of `sweep`.
    """
    losses = {rate: loss for rate, loss in trials.items() if rate}
    how = f"of {len(losses)} trials of {trial.max_steps} steps, from the guideline's {trial.learning_rate:g}"
    lowest = min(losses.values())
    if math.isinf(lowest):
        return Choice(min(losses), f"every trial diverged; the lowest {how}")
    near = lowest + (1 - ENOUGH) * max(trials[0.0] - lowest, 0)
    rate = min(rate for rate, loss in losses.items() if loss <= near)
    decrease = "the greatest decrease of the validation loss"
    return Choice(rate, f"the lowest rate within {1 - ENOUGH:.0%} of {decrease} {how}")
