"""`auto`: values by data size, a learning-rate sweep by validation loss, and the same choice in every run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.training import make_data

from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute, parse
from dagster_project.stages import adapter
from dagster_project.training.methods import options
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.session import Diverged, Interrupted
from dagster_project.training.trainers.sft import auto

ALL = {
    "num_train_epochs": "auto",
    "learning_rate": "auto",
    "per_device_train_batch_size": "auto",
    "peft": {"r": "auto"},
}


def settled(
    entry: dict[str, Any], examples: int = 500, rows: int = 500, validates: bool = True, processes: int = 1
) -> auto.ResolvedParams[adapter.Params]:
    return auto.settle(adapter.Params(**entry), examples, rows, validates, processes)


@pytest.mark.parametrize(
    ("examples", "epochs", "rate", "r", "batch"),
    [
        (1, 10, 1e-4, 8, 1),
        (100, 10, 1e-4, 8, 4),
        (316, 8, 1e-4, 8, 6),
        (999, 5, 1e-4, 8, 8),
        (1_000, 5, 2e-4, 16, 8),
        (3_162, 4, 2e-4, 16, 12),
        (10_000, 3, 2e-4, 16, 16),
        (10_001, 3, 3e-4, 32, 16),
        (31_623, 2, 3e-4, 48, 24),
        (100_000, 1, 3e-4, 64, 32),
        (5_000_000, 1, 3e-4, 64, 32),
    ],
)
def test_the_guideline_depends_on_the_number_of_examples(
    examples: int, epochs: int, rate: float, r: int, batch: int
) -> None:
    found = settled(ALL, examples, examples).params
    assert (found.num_train_epochs, found.learning_rate, found.per_device_train_batch_size) == (epochs, rate, batch)
    assert found.peft == {"r": r, "lora_alpha": 2 * r}


@pytest.mark.parametrize(
    ("rows", "accumulation", "chosen", "told"),
    [
        (500, 1, 12, "12 examples a step"),
        (500, 4, 3, "12 examples a step"),
        (100, 1, 2, "10 examples a step, a packed row holding 5; guideline 12"),
        (10, 1, 1, "50 examples a step"),
    ],
    ids=["one example a row", "accumulated", "five examples a row", "a row holds more than a step should"],
)
def test_the_batch_counts_examples_and_not_rows(rows: int, accumulation: int, chosen: int, told: str) -> None:
    of = auto.Band("all", (1, 2), (1, 1), 1e-4, (8, 8), (12, 12))
    entry = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": accumulation}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "band", lambda _: of)
        found = settled(entry, 500, rows)
    assert found.params.per_device_train_batch_size == chosen
    assert told in found.chosen["per_device_train_batch_size"].why


def test_processes_share_the_examples_of_a_step_but_a_trial_runs_all_passes() -> None:
    one, four = settled(ALL, 1_000, 1_000), settled(ALL, 1_000, 1_000, processes=4)
    assert (one.params.per_device_train_batch_size, four.params.per_device_train_batch_size) == (8, 2)
    assert one.trial and four.trial
    assert (one.trial.gradient_accumulation_steps, four.trial.gradient_accumulation_steps) == (1, 4)
    assert one.trial.max_steps == four.trial.max_steps


def test_only_values_set_to_auto_are_chosen() -> None:
    plain = {"method": "lora", "peft": {"r": 4}, "learning_rate": 3e-4}
    assert settled(plain) == auto.ResolvedParams(adapter.Params(**plain), {}, None)
    assert settled({"peft": {"r": "auto", "lora_alpha": 5}}).params.peft == {"r": 8, "lora_alpha": 5}


def test_auto_epochs_turn_on_early_stopping_unless_the_entry_sets_it() -> None:
    epochs = {"num_train_epochs": "auto"}
    guarded = settled(epochs)
    free = settled(epochs, validates=False)
    own = settled(epochs | {"early_stopping_patience": None})
    assert (guarded.params.load_best_model_at_end, guarded.params.early_stopping_patience) == (True, auto.PATIENCE)
    assert (free.params.load_best_model_at_end, free.params.early_stopping_patience) == (False, None)
    assert (own.params.load_best_model_at_end, own.params.early_stopping_patience) == (True, None)


def test_a_trial_is_the_training_in_short() -> None:
    trial = settled(ALL | {"warmup_ratio": 0.2, "report_to": "wandb"}, 500, 500).trial
    assert trial is not None
    total = auto.steps(500, settled(ALL, 500, 500).params)
    assert trial.max_steps == total // 10
    assert trial.warmup_steps == pytest.approx(0.2 * trial.max_steps, abs=1)
    assert (trial.early_stopping_patience, trial.load_best_model_at_end, trial.save_strategy, trial.report_to) == (
        None,
        False,
        "no",
        "none",
    )
    tiny = settled(ALL | {"max_steps": 5}).trial
    assert tiny is not None and tiny.max_steps == 5, "no longer than the training itself"


def test_a_trial_shortens_what_its_schedule_counts_in_steps() -> None:
    keys = {"num_decay_steps": 100, "min_lr_ratio": 0.1}
    entry = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": keys, "num_train_epochs": 1}
    trial = settled({**entry, "learning_rate": "auto"}).trial
    assert trial and trial.max_steps == 50 and trial.lr_scheduler_kwargs == {"num_decay_steps": 10, "min_lr_ratio": 0.1}


@pytest.mark.parametrize(
    ("entry", "validates", "why"),
    [
        (
            {"learning_rate": "auto"},
            False,
            "guideline for 500 examples (under 1,000); no validation split to correct it by",
        ),
        (
            {"learning_rate": "auto", "method": "feature_extraction", "merge": False},
            True,
            "guideline for 500 examples (under 1,000); feature_extraction takes no optimizer steps",
        ),
    ],
)
def test_without_a_possible_sweep_the_guideline_applies_and_the_reason_is_given(
    entry: dict[str, Any], validates: bool, why: str
) -> None:
    found = settled(entry, validates=validates)
    assert (found.trial, found.chosen["learning_rate"]) == (None, auto.Choice(1e-4, why))


def bowl(lowest: int, diverges_from: int = 99) -> Callable[[int], float]:
    return lambda place: math.inf if place >= diverges_from else (place - lowest) ** 2 + 1.0


@pytest.mark.parametrize(
    ("loss", "tried"),
    [
        (bowl(0), [0, 1, -1]),
        (bowl(2), [0, 1, 2, 3]),
        (bowl(-2), [0, 1, -1, -2, -3]),
        (bowl(9), [0, 1, 2, 3, 4, 5]),
        (bowl(-9), [0, 1, -1, -2, -3, -4]),
        (bowl(3, diverges_from=2), [0, 1, 2]),
        (bowl(-3, diverges_from=-1), [0, -1, -2, -3, -4]),
        (bowl(0, diverges_from=-50), [0, -1, -2, -3, -4, -5]),
    ],
    ids=[
        "at the guideline",
        "above",
        "below",
        "beyond reach",
        "below reach",
        "a cliff",
        "the guideline diverges",
        "all diverge",
    ],
)
def test_hill_climbing_finds_the_lowest_loss_within_the_trials(loss: Callable[[int], float], tried: list[int]) -> None:
    asked: list[int] = []

    def counted(place: int) -> float:
        asked.append(place)
        return loss(place)

    found = auto.climb(counted)
    assert list(found) == asked == tried
    assert min(found, key=lambda place: (found[place], place)) == min(
        range(min(tried), max(tried) + 1), key=lambda place: (loss(place), place)
    )


TRIAL = adapter.Params(learning_rate=1e-4, max_steps=20)


def ends_with(losses: dict[float, Any], done: list[float]) -> Callable[[adapter.Params], TrainingHistory]:
    """A training that ends with a validation loss by its rate, or raises."""

    def learn(trial: adapter.Params) -> TrainingHistory:
        done.append(trial.learning_rate)
        loss = losses[trial.learning_rate]
        if isinstance(loss, Exception):
            raise loss
        return TrainingHistory(curve=[{"step": 0, "validation_loss": 9.0}, {"step": 20, "validation_loss": loss}])

    return learn


def test_a_sweep_climbs_to_the_rate_beyond_which_trials_diverge(tmp_path: Path) -> None:
    losses = {1e-4: 3.0, 3.16e-4: 2.0, 1e-3: 1.0, 3.16e-3: Diverged("the loss is nan", 3, [])}
    found = auto.sweep(TRIAL, ends_with(losses, []), tmp_path / "sweep.json", {"data": "a"})
    assert found == {0: 9.0, 1e-4: 3.0, 3.16e-4: 2.0, 1e-3: 1.0, 3.16e-3: math.inf}
    how = "of 4 trials of 20 steps, from the guideline's 0.0001"
    assert auto.best(found, TRIAL) == auto.Choice(
        1e-3, f"the lowest rate within 10% of the greatest decrease of the validation loss {how}"
    )


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        ({0.0: 9.0, 1e-4: 3.0, 3.16e-4: 1.81, 1e-3: 1.0}, 1e-3),
        ({0.0: 9.0, 1e-4: 3.0, 3.16e-4: 1.79, 1e-3: 1.0}, 3.16e-4),
        ({0.0: 1.0, 1e-4: 1.2, 3.16e-4: 1.5, 3.16e-5: 1.1, 1e-5: 1.15}, 3.16e-5),
        ({0.0: 9.0, 1e-4: math.inf, 3.16e-5: math.inf}, 3.16e-5),
    ],
    ids=["less than nine tenths of the fall", "more than nine tenths of the fall", "nothing falls", "all diverge"],
)
def test_of_rates_with_nearly_the_greatest_decrease_the_lowest_is_chosen(
    losses: dict[float, float], rate: float
) -> None:
    assert auto.best(losses, TRIAL).value == rate


def test_an_interrupted_sweep_resumes_after_the_finished_trials(tmp_path: Path) -> None:
    losses: dict[float, Any] = {1e-4: math.nan, 3.16e-5: 2.0, 1e-5: Interrupted("interrupted at step 3"), 3.16e-6: 4.0}
    done: list[float] = []
    with pytest.raises(Interrupted, match="interrupted in the sweep of learning_rate; finished trials are kept"):
        auto.sweep(TRIAL, ends_with(losses, done), tmp_path / "sweep.json", {"data": "a"})
    losses[1e-5] = 1.0
    found = auto.sweep(TRIAL, ends_with(losses, done), tmp_path / "sweep.json", {"data": "a"})
    assert found == {0: 9.0, 1e-4: math.inf, 3.16e-5: 2.0, 1e-5: 1.0, 3.16e-6: 4.0}
    assert done == [1e-4, 3.16e-5, 1e-5, 1e-5, 3.16e-6]
    auto.sweep(TRIAL, ends_with(losses, done), tmp_path / "sweep.json", {"data": "b"})
    assert done[5:] == [1e-4, 3.16e-5, 1e-5, 3.16e-6], "notes of other data do not count"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"learning_rate": "automatic"},
            "adapter.x.learning_rate: Input should be a valid number, or auto (got 'automatic')",
        ),
        (
            {"num_train_epochs": 0},
            "adapter.x.num_train_epochs: Input should be greater than or equal to 1, or auto (got 0)",
        ),
        ({"warmup_ratio": "auto"}, "adapter.x.warmup_ratio: Input should be a valid number (got 'auto')"),
        ({"method": "ia3", "peft": {"r": "auto"}}, "adapter.x.peft.r: unknown key of ia3"),
        ({"method": "adalora", "peft": {"r": "auto"}}, "adapter.x.peft.r: must be int (got 'auto')"),
        ({"peft": {"lora_alpha": "auto"}}, "adapter.x.peft.lora_alpha: must be int (got 'auto')"),
    ],
)
def test_invalid_values_are_refused_in_one_line(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        found = auto.settle(parse(adapter.Params, entry, "adapter.x"), 1, 1, False).params
        options.check(found.method, found.peft, found.quantization, found.merge, "adapter.x")
    assert refusal.value.what == f"params.yaml: {message}"


def test_a_stage_with_everything_auto_explains_its_choices_and_repeats_byte_for_byte(
    tiny_model: Path, tmp_path: Path
) -> None:
    make_data(tmp_path)  # 28 examples in 7 rows
    found = []
    for name in ("first", "second"):
        out = tmp_path / name
        report = adapter.produce(
            "x",
            adapter.Params(**ALL | {"max_steps": 4}),
            Compute(threads=1, dtype="float32"),
            tmp_path / "tokenized",
            tiny_model,
            out,
            tmp_path / f"{name}.csv",
            tmp_path / "checkpoints",
        )
        found.append(({file.name: file.read_bytes() for file in out.iterdir()}, report.document()))
    assert found[0] == found[1]
    document, metrics = json.loads((tmp_path / "first" / "training.json").read_text()), found[0][1]
    losses = {point["learning_rate"]: point["validation_loss"] for point in document["sweep"]}
    assert len(losses) > 3 and list(losses)[:2] == [0, 1e-4]
    rate = auto.best({rate: math.inf if loss is None else loss for rate, loss in losses.items()}, TRIAL).value
    assert rate > 1e-4, "a random model learns little in four steps at the guideline's rate"
    wanted = {
        "num_train_epochs": 10,
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
        "peft.r": 8,
        "peft.lora_alpha": 16,
        "per_device_train_batch_size": 1,
        "learning_rate": rate,
    }
    assert metrics["chosen"] == {name: choice["value"] for name, choice in document["chosen"].items()} == wanted
    assert all(choice["why"] for choice in document["chosen"].values())
    assert (
        document["settings"] | {"learning_rate": rate, "num_train_epochs": 10, "peft": {"r": 8, "lora_alpha": 16}}
        == document["settings"]
    )
    assert (tmp_path / "first.csv").read_text().count("\n") == 1 + metrics["steps"] == 5
