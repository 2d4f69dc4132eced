"""Settings that choose themselves: a number for each `auto` of an adapter's entry, from the size of the data; the rate then by trial.

| examples to train on | num_train_epochs | learning_rate | r | examples a step |
| --- | --- | --- | --- | --- |
| under 1,000 | 10 to 5 | 1e-4 | 8 | 4 to 8 |
| 1,000 to 10,000 | 5 to 3 | 2e-4 | 16 | 8 to 16 |
| over 10,000 | 3 to 1 | 3e-4 | 32 to 64 | 16 to 32 |

Source: the guideline by data size that fine-tuning guides agree on, made for models of some billion parameters. Within a band a value moves evenly
with the logarithm of the size, from 100 to 1,000, on to 10,000 and to 100,000, where it stays. Small models want a higher rate than the
guideline's, which is why the validation loss corrects it: it is a start, and the sweep finds what this model and this data want.
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
from dagster_project.training.methods.build import ALIASES
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.params import AUTO, SftParams
from dagster_project.training.trainers.harness.session import Diverged, Interrupted
from dagster_project.training.trainers.sft.sft import steps, warmup

R = TypeVar("R", bound=SftParams)

MOST_TRIALS = 6
"""Of a sweep. From the guideline's rate they reach a factor of 300 up, or of 100 down."""

LEAST_STEPS = 20
"""Of a trial, which else takes a tenth of the training's steps."""

ENOUGH = 0.9
"""Share of the greatest fall of the validation loss in a trial. The lowest rate that reaches it is taken, and not the one with the greatest fall:
what a few steps gain most from is more than a long training bears."""

PATIENCE = 2
"""Epochs without a lower validation loss after which a training stops whose number of epochs was chosen here."""


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
    """What stands in for an `auto`, or follows from one."""

    value: float | int | bool
    why: str


@dataclass(frozen=True)
class Settled(Generic[R]):
    """An entry without `auto`."""

    params: R
    chosen: dict[str, Choice]
    """By the name in the entry, e.g. "peft.r"."""
    trial: R | None
    """How to train a trial of the sweep that corrects `learning_rate`; None: there is none."""


def settle(params: R, examples: int, rows: int, validates: bool, processes: int = 1) -> Settled[R]:
    """Put a number in place of each `auto`. The same for the training and for the plan of it.

    Args:
        params: an adapter's entry.
        examples, rows: of the training split, a row being a packed row.
        validates: there is a validation split.
        processes: that share the passes of a step. A trial makes all of them in one.
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
                chosen[name] = Choice(value, "guards against more epochs than the data bears")
    if peft.get("r") == AUTO and ALIASES.get(method.lower(), (method.lower(), {}))[0] == "lora":
        r = 8 * round(of.at(examples, of.r) / 8)
        chosen["peft.r"] = Choice(r, f"guideline for {size}")
        if "lora_alpha" not in peft:
            chosen["peft.lora_alpha"] = Choice(2 * r, "twice peft.r")
    if entry["per_device_train_batch_size"] == AUTO:
        wanted, together = of.at(examples, of.examples_per_step), examples / rows * passes
        n = min(max(round(wanted / together), 1), rows)
        chosen["per_device_train_batch_size"] = Choice(
            n, f"{n * together:.3g} examples a step, a packed row holding {examples / rows:.3g}; guideline {wanted:.3g} for {size}"
        )
    by_steps = method.lower() != "feature_extraction"
    sweeps = entry["learning_rate"] == AUTO and validates and by_steps
    if entry["learning_rate"] == AUTO:
        alone = "" if sweeps else "; no validation split to correct it by" if by_steps else f"; {method} takes no optimizer steps"
        chosen["learning_rate"] = Choice(of.learning_rate, f"guideline for {size}{alone}")
    settled = put(params, chosen)
    return Settled(settled, chosen, _trial(settled, steps(rows, settled, processes), passes) if sweeps else None)


def put(params: R, chosen: Mapping[str, Choice]) -> R:
    """An entry with what was chosen in it."""
    values = params.model_dump(warnings=False)
    for name, choice in chosen.items():
        *section, key = name.split(".")
        (values[section[0]] if section else values)[key] = choice.value
    return type(params).model_validate(values)


def _trial(params: R, total: int, passes: int) -> R:
    """The training in short, with a warm-up and a decay of its own."""
    n = min(total, max(LEAST_STEPS, total // 10))
    changed = {"max_steps": n, "warmup_steps": math.ceil(warmup(total, params) * n / total), "save_strategy": "no", "report_to": "none"}
    changed |= {"gradient_accumulation_steps": passes}
    return params.model_copy(update=changed | {"early_stopping_patience": None, "load_best_model_at_end": False})


def rate_at(start: float, place: int) -> float:
    """A rate so many steps of sqrt(10) from the first, to three digits."""
    return float(f"{start * 10 ** (place / 2):.3g}")


def climb(loss: Callable[[int], float], most: int = MOST_TRIALS) -> dict[int, float]:
    """Look for the lowest loss from place 0: up while it falls, and down where up was no better.

    Args:
        loss: of a place; infinite where training diverged, and then only down can be better.
        most: places to try.
    Returns:
        Place -> loss, in the order tried.
    """
    found = {0: loss(0)}
    for way in (1, -1):
        place = way
        while len(found) < most and min(found.values()) == found[place - way] and not (way > 0 and math.isinf(found[place - way])):
            found[place] = loss(place)
            place += way
    return found


def sweep(trial: R, learn: Callable[[R], TrainingHistory], notes: Path, identity: Mapping[str, str]) -> dict[float, float]:
    """Short trainings at rates around the trial's own.

    Args:
        learn: trains a fresh model.
        notes: file to keep losses in, from which a sweep that was killed goes on.
        identity: what must be the same for them to count.
    Returns:
        Rate -> validation loss, in the order tried; first, as rate 0, the loss before training.
    """
    try:
        noted = json.loads(notes.read_text())
    except (OSError, ValueError):  # none yet, or cut short
        noted = {}
    losses: dict[str, list[float]] = noted["losses"] if noted.get("identity") == identity else {}
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
    """The validation losses that a trial begins and ends with, infinite where they are no number."""
    try:
        watched = learn(trial).validation
    except Diverged:
        return [math.inf, math.inf]
    except Interrupted:
        raise Interrupted("interrupted in the sweep of learning_rate; trials that ended are kept", "run the same command again") from None
    finally:
        gc.collect()  # a Trainer holds itself and its model in circles, and the next model needs the room
    return [loss if math.isfinite(loss) else math.inf for _, loss in (watched[0], watched[-1])]


def best(trials: Mapping[float, float], trial: SftParams) -> Choice:
    """The lowest rate with nearly the greatest fall of the loss; where every trial diverged, the lowest rate.

    Args:
        trials: as `sweep` found them.
    """
    losses = {rate: loss for rate, loss in trials.items() if rate}
    how = f"of {len(losses)} trials of {trial.max_steps} steps, from the guideline's {trial.learning_rate:g}"
    lowest = min(losses.values())
    if math.isinf(lowest):
        return Choice(min(losses), f"every trial diverged; the lowest {how}")
    near = lowest + (1 - ENOUGH) * max(trials[0.0] - lowest, 0)
    rate = min(rate for rate, loss in losses.items() if loss <= near)
    return Choice(rate, f"the lowest rate within {1 - ENOUGH:.0%} of the greatest fall of the validation loss {how}")
