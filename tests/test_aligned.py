"""The reward model and the alignment methods train on pairs, start from the SFT model, and resume to the same bytes."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.files import contents
from builders.preferences import preference_row, write_letters, write_pairs
from conftest import draw_pages

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.params import Compute
from dagster_project.core.progress import Progress
from dagster_project.core.records import Report, read_table
from dagster_project.evaluation.paired.alignment import Policies, gamed, paired, samples
from dagster_project.pipeline import validate
from dagster_project.stages import aligned, reward_model
from dagster_project.training.tokens.preference_pairs import answered, both
from dagster_project.training.trainers.alignment import preference, teacher
from dagster_project.training.trainers.alignment import reward_model as reward
from dagster_project.training.trainers.alignment.rewards import Rewards
from dagster_project.training.trainers.harness import launch, weight_audit
from dagster_project.training.trainers.harness.checkpoint import Checkpoints
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.session import Diverged, Interrupted

COMPUTE = Compute(seed=3, threads=1, dtype="float32")


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    write_letters(folder, train=range(16), validation=range(20, 22), test=range(30, 38))
    return folder


def train_reward(folder: Path, preferences: Path, model: Path, **settings: Any) -> Report:
    params = reward_model.Params(**{"model": "base_model", "learning_rate": 2e-2, "num_train_epochs": 4, **settings})
    return reward_model.produce(
        params,
        COMPUTE,
        preferences,
        model,
        folder / "reward_model",
        folder / "reward_model.csv",
        folder / "calibration.csv",
        folder / "checkpoints",
    )


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, preferences: Path, tiny_model: Path) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("judge")
    return folder / "reward_model", train_reward(folder, preferences, tiny_model)


def larger_than(model: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A teacher: a model with the same tokens and other weights, and its entry in params.yaml."""
    from safetensors.torch import load_file, save_file

    if not folder.exists():
        shutil.copytree(model, folder)
        weights = load_file(folder / "model.safetensors")
        dice = torch.Generator().manual_seed(7)
        noisy = {
            name: weight + 0.1 * torch.randn(weight.shape, generator=dice).to(weight.dtype)
            for name, weight in weights.items()
        }
        save_file(noisy, folder / "model.safetensors", {"format": "pt"})
    return folder, {
        "folder": "models/large",
        "sha256": {name: sha256_of_file(folder / name) for name in teacher.files_of(folder)},
    }


def align_it(
    folder: Path,
    preferences: Path,
    judge: Path | None,
    sft: Path,
    compute: Compute = COMPUTE,
    functions: Path | None = None,
    **settings: Any,
) -> Report:
    larger = None
    if settings.get("method") == "gkd":
        larger, given = larger_than(sft, folder.with_name(f"{folder.name}-large"))
        settings["options"] = {**settings.get("options", {}), "teacher": given}
    params = aligned.Params(
        **{
            "adapter": "lora",
            "learning_rate": 1e-2,
            "num_train_epochs": 2,
            "samples": 4,
            "max_new_tokens": 6,
            "per_device_train_batch_size": 4,
        }
        | settings
    )
    report = aligned.produce(
        "mine",
        params,
        compute,
        aligned.Sources(preferences, judge, sft, functions, larger),
        *(folder / name for name in ("out", "curve.csv", "checkpoints", "live", "pages")),
    )
    draw_pages("aligned@mine", report, folder / "out", folder / "pages")
    return report


def read_answers(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((out / "answers").iterdir()) for row in read_table(path)]


def test_answer_tokens_begin_after_the_prompt_and_include_the_end_of_turn(tiny_tokenizer: Any) -> None:
    ((prompt, answer),) = answered(
        tiny_tokenizer, [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]]
    )
    assert (
        tiny_tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
        and tiny_tokenizer.decode(answer) == "Yes<|im_end|>"
    )


class Canned(Policies):
    """Policies that give the same token ids as the answers to every prompt."""

    def __init__(self, tokenizer: Any, answers: list[list[int]]) -> None:
        self.tokenizer, self.answers = tokenizer, answers

    def answer(self, who: str, pairs: Any, *_: Any) -> Any:
        return [self._read(pair, [1], ids) for pair, ids in zip(pairs, self.answers, strict=True)]

    def divergence(self, examples: Any) -> float:
        return 0.0


def test_an_answer_is_unfinished_without_an_end_of_turn_whatever_its_text(tiny_tokenizer: Any) -> None:
    def ids(text: str) -> list[int]:
        return list(tiny_tokenizer.encode(text, add_special_tokens=False))

    answers = {
        "cut off in spaces": ids("Yes" + 20 * "\n"),
        "cut off": ids("Yes, so"),
        "whole": ids("Yes<|im_end|>"),
        "empty": ids("<|im_end|>"),
    }
    pairs = [{"example_id": name, "prompt": [{"role": "user", "content": "Hi"}]} for name in answers]
    rows, found = samples(Canned(tiny_tokenizer, [*answers.values()]), pairs, None, max(map(len, answers.values())))
    assert [row["sft_unfinished"] for row in rows] == [True, True, False, True] and found["unfinished"]["sft"] == 0.75


def test_the_win_rate_compares_rewards_before_they_are_rounded_and_equal_answers_are_ties(tiny_tokenizer: Any) -> None:
    """The same answer in another batch can get another reward by rounding."""
    said = {"sft": ["Yes", "Oh", "No", "Hm"], "aligned": ["Yes", "Ah", "Well", "Hm"]}
    rewards = {"sft": [0.1, 0.12343, 0.5, -1.0], "aligned": [0.1 + 1e-7, 0.12344, 0.50001, -1.0 - 1e-7]}
    asked: list[list[str]] = []

    class Two(Canned):
        def answer(self, who: str, pairs: Any, *_: Any) -> Any:
            self.answers = [list(tiny_tokenizer.encode(f"{text}<|im_end|>")) for text in said[who]]
            return super().answer(who, pairs)

    class Judge:
        def of_answers(self, pairs: Any, messages: Any) -> list[float]:
            asked.append([message["content"] for message in messages])
            return rewards["aligned" if len(asked) == 2 else "sft"]

    pairs = [{"example_id": str(n), "prompt": [{"role": "user", "content": "Hi"}]} for n in range(4)]
    rows, found = samples(Two(tiny_tokenizer, []), pairs, Judge(), 9)  # type: ignore[arg-type]
    assert asked == [*said.values()]
    assert all(row["aligned_reward"] == row["sft_reward"] for row in rows)
    assert found["win_rate"]["value"] == (0.5 + 1 + 1 + 0.5) / 4


def test_the_reward_model_prefers_the_chosen_answers_of_unseen_pairs(judged: tuple[Path, Report]) -> None:
    folder, report = judged
    assert not report.failures
    assert report.metrics["accuracy"] == 1.0 and report.metrics["accuracy_interval"] == [
        pytest.approx(0.676, abs=1e-3),
        1.0,
    ]  # Wilson, 8 of 8
    assert report.metrics["by_category"] == {"even": {"accuracy": 1.0, "pairs": 4}}
    assert (folder / "model.safetensors").is_file() and not (folder / "adapter_config.json").exists()


def test_the_reward_of_an_answer_does_not_depend_on_its_batch(judged: tuple[Path, Report], preferences: Path) -> None:
    model = reward.RewardModel(judged[0], torch.device("cpu"), torch.float32)
    texts = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}] for text in ("a", "zz" * 9, "hello")
    ]
    alone = [model([text])[0] for text in texts]
    assert model(texts, batch_size=3) == pytest.approx(alone, abs=1e-5)
    assert alone[0] > alone[1]


def test_a_reward_model_reads_turns_that_end_with_another_token_than_the_tokenizers(
    tmp_path: Path, tiny_model: Path
) -> None:
    """As those of Gemma, Phi-3 and gpt-oss, whose end of a turn is in generation_config.json."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    for file, changed in (
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>", "pad_token": "<|im_start|>"}),
        ("generation_config.json", {"eos_token_id": [0, 2]}),
    ):
        (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | changed))
    for split, numbers in {"train": range(4), "validation": range(0), "test": range(10, 14)}.items():
        write_pairs(tmp_path / "pairs" / split, [preference_row(i, "ab", "abcd") for i in numbers])
    report = train_reward(tmp_path, tmp_path / "pairs", base, max_steps=1, min_accuracy=0.0)
    assert report.metrics["pairs"]["test"] == 4
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    encoded = [answered(reward.tokenizer_of(folder), [turns], None) for folder in (base, tmp_path / "reward_model")]
    assert encoded[0] == encoded[1] and encoded[0][0][1][-1] == 2
    refused = {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    assert reward._generated(reward.tokenizer_of(base), {"prompt": turns[:1]}, refused)[1][-1] == 2, (
        "also of an answer that the template refuses"
    )


def test_the_length_rule_is_fitted_on_train_and_reported_with_the_accuracy(tmp_path: Path, tiny_model: Path) -> None:
    for split, numbers in {"train": range(4), "validation": range(0), "test": range(10, 14)}.items():
        write_pairs(tmp_path / "pairs" / split, [preference_row(i, "ab", "abcd" if i != 13 else "a") for i in numbers])
    report = train_reward(tmp_path, tmp_path / "pairs", tiny_model, max_steps=1, min_accuracy=0.0)
    assert (report.metrics["length_rule"], report.metrics["length_rule_says"]) == (0.75, "shorter")


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory, preferences: Path, tiny_model: Path) -> tuple[Path, Report]:
    """A reward model that learned nothing, and misses its gate."""
    folder = tmp_path_factory.mktemp("weak")
    settings = {"max_steps": 3, "learning_rate": 1e-6, "min_accuracy": 1.0}
    return folder / "reward_model", train_reward(folder, preferences, tiny_model, **settings)


def test_a_reward_model_below_the_required_accuracy_is_reported_and_does_not_block(weak: tuple[Path, Report]) -> None:
    folder, report = weak
    [failed] = [check for check in report.checks if not check.passed and check.severity == "error"]
    assert failed.name == "prefers_as_people_do" and not report.failures
    assert "reward_model.min_accuracy is 1.0" in failed.note
    assert (
        reward.failed_checks(folder) == {"prefers_as_people_do": failed.note}
        and (folder / "model.safetensors").is_file()
    )


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_methods_that_train_on_pairs_accept_a_failed_reward_model_and_report_it(
    method: str, tmp_path: Path, preferences: Path, weak: tuple[Path, Report], tiny_model: Path
) -> None:
    report = align_it(tmp_path, preferences, weak[0], tiny_model, method=method)
    assert not report.failures and "reward" in report.metrics["watch"]
    [told] = [check for check in report.checks if check.name == "reward_model_is_reliable"]
    assert (told.passed, told.severity, told.blocking) == (False, "warn", False) and "prefers_as_people_do" in told.note
    assert "The reward model is not reliable." in (tmp_path / "pages" / "alignment.html").read_text()


@pytest.mark.parametrize(
    "settings",
    [{"method": "dpo"}, {"method": "kto"}, {"method": "rloo", "rewards": {"brief": 1.0}}],
    ids=lambda one: one["method"],
)
def test_without_a_reward_model_only_the_answers_are_watched(
    settings: dict[str, Any], tmp_path: Path, preferences: Path, tiny_model: Path
) -> None:
    report = align_it(tmp_path, preferences, None, tiny_model, **{**METHODS[settings["method"]], **settings})
    assert not report.failures and report.metrics["reward_model"] == "none"
    assert not {"reward", "win_rate"} & set(report.metrics["watch"]) and {"tokens", "distinct", "unfinished"} < set(
        report.metrics["watch"]
    )
    found = {check.name: check for check in report.checks}
    assert "reward_model_is_reliable" not in found
    gamed_ = found["reward_is_not_gamed"]
    assert (
        gamed_.passed is False
        or gamed_.note == "no reward model watches: length, repetition and unfinished answers were compared"
    )
    page = (tmp_path / "pages" / "alignment.html").read_text()
    assert "There is no reward model: only the answers themselves are watched." in page and "not reliable" not in page


@pytest.mark.parametrize("method", ["rloo", "grpo", "online_dpo", "ppo"])
def test_methods_that_train_on_rewards_refuse_a_failed_reward_model_before_loading_a_model(
    method: str,
    tmp_path: Path,
    preferences: Path,
    weak: tuple[Path, Report],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preference, "policy", lambda *_, **__: pytest.fail("a model was loaded"))
    report = align_it(tmp_path, preferences, weak[0], tiny_model, **METHODS[method] | {"method": method})
    [failed] = report.failures
    assert failed.name == "reward_model_is_reliable" and failed.severity == "error"
    assert "reward_model.min_accuracy" in failed.note and "aligned.mine.rewards" in failed.note
    assert not (tmp_path / "out").exists() and not (tmp_path / "checkpoints").exists()


def test_a_method_with_rule_rewards_only_needs_no_reward_model(
    tmp_path: Path, preferences: Path, weak: tuple[Path, Report], tiny_model: Path
) -> None:
    settings = {**METHODS["rloo"], "rewards": {"brief": 1.0, "reward_model": 0.0}}
    report = align_it(tmp_path, preferences, weak[0], tiny_model, method="rloo", **settings)
    [told] = [check for check in report.checks if check.name == "reward_model_is_reliable"]
    assert report.metrics["steps"] == 3 and not told.blocking and "does not learn from the reward model" in told.note


@pytest.mark.parametrize("diverges", ["at a step", "in the weights"])
def test_a_diverged_reward_model_records_the_reason_and_dpo_runs_without_rewards(
    diverges: str, tmp_path: Path, preferences: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(spec: Any, model: Any, *_: Any) -> TrainingHistory:
        if diverges == "at a step":
            raise Diverged("the loss is nan", 2, [0])
        next(weight for weight in model.model.parameters() if weight.requires_grad).data.fill_(math.nan)
        return TrainingHistory(curve=[{"step": 1, "loss": 1.0}])

    with monkeypatch.context() as patched:
        patched.setattr(reward_model, "train", diverge)
        report = train_reward(tmp_path, preferences, tiny_model)
    judge = tmp_path / "reward_model"
    assert [check.name for check in report.checks if not check.passed] == ["learned"] and not report.failures
    assert list(reward.failed_checks(judge)) == ["learned"] and not list(judge.glob("*.safetensors"))
    assert (tmp_path / "reward_model.csv").is_file() and (tmp_path / "calibration.csv").is_file()  # dvc.yaml names them

    report = align_it(tmp_path, preferences, judge, tiny_model, method="dpo")
    assert not report.failures and not {"reward", "win_rate"} & set(report.metrics["watch"])
    assert {row["sft_reward"] for row in read_table(tmp_path / "out" / "samples.parquet")} == {None}
    page = (tmp_path / "pages" / "alignment.html").read_text()
    assert "No reward was measured." in page and "win rate" not in page
    [failed] = align_it(tmp_path, preferences, judge, tiny_model, method="rloo").failures
    assert "learned" in failed.note and "aligned.mine.rewards" in failed.note and "min_accuracy" not in failed.note


def test_a_reward_model_without_recorded_checks_is_refused(
    tmp_path: Path, preferences: Path, judged: tuple[Path, Report], tiny_model: Path
) -> None:
    shutil.copytree(judged[0], tmp_path / "judge")
    (tmp_path / "judge" / reward.QUALITY).unlink()
    [failed] = align_it(tmp_path, preferences, tmp_path / "judge", tiny_model, method="rloo").failures
    assert "dvc repro reward_model" in failed.note


def test_without_preferences_the_reward_model_stage_writes_nothing_and_passes(tmp_path: Path, tiny_model: Path) -> None:
    for split in ("train", "validation", "test"):
        write_pairs(tmp_path / "pairs" / split, [])
    report = train_reward(tmp_path, tmp_path / "pairs", tiny_model)
    assert not report.failures and report.metrics == {"pairs": 0}
    with pytest.raises(InputError, match="no pair in the train split"):
        align_it(tmp_path, tmp_path / "pairs", tmp_path / "reward_model", tiny_model, method="dpo")


def test_margins_require_a_margin_in_every_pair(tmp_path: Path, preferences: Path, tiny_model: Path) -> None:
    with pytest.raises(InputError, match="26 pairs have no margin"):
        train_reward(tmp_path, preferences, tiny_model, margins=True)


def test_a_margin_by_which_the_rejected_answer_is_better_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    """-log sigmoid(difference - margin) would let the chosen answer be the worse one."""
    for split in ("train", "validation", "test"):
        pairs = [preference_row(i, "aaa", "zzz", 1.0 if i else -0.5) for i in range(4)]
        write_pairs(tmp_path / "pairs" / split, pairs)
    with pytest.raises(InputError, match="margins: 3 pairs have a margin below 0"):
        train_reward(tmp_path, tmp_path / "pairs", tiny_model, margins=True)


def test_keys_that_peft_refuses_for_a_reward_model_are_named(tiny_model: Path) -> None:
    with pytest.raises(
        InputError, match=re.escape("params.yaml: reward_model.peft: No modules were targeted for adaptation")
    ):
        reward.build(tiny_model, {"target_modules": ["query"]}, torch.device("cpu"), torch.float32, "reward_model")


def test_patterns_whose_order_would_matter_are_refused_for_a_reward_model(tiny_model: Path) -> None:
    peft = {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2, ".*proj": 8}}
    with pytest.raises(InputError, match=r"reward_model\.peft\.rank_pattern: 'q_proj' and '\.\*proj' match"):
        reward.build(tiny_model, peft, torch.device("cpu"), torch.float32, "reward_model")


def test_the_output_layer_of_a_reward_model_is_trained_with_the_modules_that_the_entry_names(tiny_model: Path) -> None:
    peft = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    model = reward.build(tiny_model, peft, torch.device("cpu"), torch.float32, "reward_model")
    assert {name.split(".")[-4] for name in weight_audit.trainable(model) if "lora" not in name} == {
        "embed_tokens",
        "score",
    }


def test_full_fine_tuning_of_a_reward_model_respects_margins(tmp_path: Path, tiny_model: Path) -> None:
    for split in ("train", "validation", "test"):
        write_pairs(tmp_path / "pairs" / split, [preference_row(i, "aaa", "zzz", 1.0) for i in range(4)])
    settings = {"method": "full", "learning_rate": 1e-3, "margins": True, "center_rewards_coefficient": 0.01}
    report = train_reward(tmp_path, tmp_path / "pairs", tiny_model, **settings)
    assert not report.failures and report.metrics["accuracy"] == 1.0


METHODS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "kto": {},
    "orpo": {},
    "simpo": {},
    "cpo": {},
    "gkd": {"options": {"max_new_tokens": 6}},
    "rloo": {"options": {"num_generations": 2, "max_completion_length": 6}, "max_steps": 3},
    "grpo": {
        "options": {"num_generations": 2, "max_completion_length": 6},
        "max_steps": 3,
        "rewards": {"reward_model": 1.0, "brief": 0.5},
    },
    "online_dpo": {"options": {"max_completion_length": 6}, "max_steps": 3},
    "ppo": {
        "options": {
            "total_episodes": 24,
            "batch_size": 12,
            "response_length": 6,
            "learning_rate": 1e-2,
            "missing_eos_penalty": 0.0,
        }
    },
}


@pytest.mark.parametrize("method", ["dpo", "rloo", "reward_model"])
def test_max_steps_is_the_number_of_steps_also_past_the_epochs(
    method: str, tmp_path: Path, preferences: Path, tiny_model: Path
) -> None:
    """`pedigree plan` predicts this number."""
    if method == "reward_model":
        report = train_reward(tmp_path, preferences, tiny_model, num_train_epochs=1, max_steps=3)
    else:
        settings = {**METHODS[method], **({"rewards": {"brief": 1.0}} if method == "rloo" else {}), "max_steps": 10}
        report = align_it(tmp_path, preferences, None, tiny_model, method=method, **settings | {"num_train_epochs": 1})
    assert report.metrics["steps"] == (3 if method == "reward_model" else 10), "of 16 pairs an epoch has 2, 4 or 8"


OFFLINE = {"dpo", "kto", "orpo", "simpo", "cpo", "gkd"}
REFERENCE_FREE = {"orpo", "simpo", "cpo", "gkd"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_the_sft_model_and_records_the_examples_used(
    method: str, tmp_path: Path, preferences: Path, judged: tuple[Path, Report], tiny_model: Path
) -> None:
    report = align_it(tmp_path, preferences, judged[0], tiny_model, method=method, **METHODS[method])
    assert not report.failures, [check.note for check in report.failures]
    learnt = {**dict.fromkeys(OFFLINE), "grpo": {"reward_model": 1.0, "brief": 0.5}}
    assert report.metrics.get("rewards") == learnt.get(method, {"reward_model": 1.0})
    document = json.loads((tmp_path / "out" / "training.json").read_text())
    if method in REFERENCE_FREE:
        assert "step_0" not in document and document["reference"] is None and report.metrics["reference"] is None
        assert "implicit_reward_accuracy" not in report.metrics["preference"]
    else:
        assert document["step_0"] == {"largest_log_probability_difference": 0.0, "kl_per_token": 0.0}
        assert "reference" not in document and "implicit_reward_accuracy" in report.metrics["preference"]
    assert document["settings"]["options"].get("teacher") == report.metrics.get("teacher") and (
        "teacher" in report.metrics
    ) == (method == "gkd")
    assert ("starts_as_the_reference" in {check.name for check in report.checks}) == (method not in REFERENCE_FREE)
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "data/merged/lora"
    )
    seen = read_table(tmp_path / "out" / "examples.parquet")
    known = {row["example_id"] for row in read_table(preferences / "train" / "records-00000.parquet")}
    assert seen and {row["example_id"] for row in seen} <= known
    assert len(read_table(tmp_path / "out" / "samples.parquet")) == 4
    assert (tmp_path / "out" / "answers").exists() == ("sampled" in report.metrics) == (method not in OFFLINE - {"gkd"})
    page = (tmp_path / "pages" / "alignment.html").read_text()
    assert "<script" not in page and any((tmp_path / "live").glob("*.csv"))
    kl = {**dict.fromkeys(("rloo", "grpo", "online_dpo"), "token"), **dict.fromkeys(("kto", "ppo"), "answer")}
    assert [unit for unit in ("token", "answer") if f"divergence from the reference, in nats per {unit}" in page] == [
        *filter(None, [kl.get(method)])
    ]


@pytest.mark.parametrize("method", ["rloo", "grpo", "online_dpo", "ppo"])
def test_every_sampled_answer_is_kept_with_its_rewards_by_component(
    method: str, tmp_path: Path, preferences: Path, judged: tuple[Path, Report], tiny_model: Path
) -> None:
    settings = {
        **METHODS[method],
        "rewards": {"reward_model": 2.0, "brief": 0.5, "distinct": 0.0},
        "gradient_accumulation_steps": 2,
    }
    if method == "ppo":
        del settings["gradient_accumulation_steps"]
    report = align_it(tmp_path, preferences, judged[0], tiny_model, method=method, **settings)
    rows = read_answers(tmp_path / "out")
    assert [*rows[0]] == [
        "step",
        "example_id",
        "answer",
        "reasoning",
        "reward",
        "brief",
        "reward_model",
        "tokens",
        "unfinished",
    ]
    assert len(rows) == 24 and report.metrics["sampled"] == {
        "answers": 24,
        "records": len({row["example_id"] for row in rows}),
    }
    seen = {(row["step"], row["example_id"]) for row in read_table(tmp_path / "out" / "examples.parquet")}
    assert {(row["step"], row["example_id"]) for row in rows} == seen
    pairs = {row["example_id"]: row for row in read_table(preferences / "train" / "records-00000.parquet")}
    texts = [[*pairs[row["example_id"]]["prompt"], {"role": "assistant", "content": row["answer"]}] for row in rows]
    assert [row["reward_model"] for row in rows] == pytest.approx(
        reward.RewardModel(judged[0], torch.device("cpu"), torch.float32)(texts), abs=1e-4
    )
    assert [row["brief"] for row in rows] == [max(0, 1 - len(row["answer"].split()) / 100) for row in rows]
    assert [row["reward"] for row in rows] == pytest.approx(
        [2 * row["reward_model"] + 0.5 * row["brief"] for row in rows]
    )
    columns = {
        "reward": "reward",
        "response_length": "tokens",
        "unfinished": "unfinished",
        "brief": "brief",
        "reward_model": "reward_model",
    }
    curve = json.loads((tmp_path / "pages" / "history.json").read_text())["curve"]
    for point in curve:  # as TRL and ppo measured them
        of_step = [row for row in rows if row["step"] == point["step"]]
        means = {ours: sum(row[column] for row in of_step) / len(of_step) for ours, column in columns.items()}
        unfinished = means.pop("unfinished")
        assert {name: point[name] for name in means} == pytest.approx(means, rel=1e-5)
        assert point["unfinished"] <= unfinished and (
            method != "ppo" or point["unfinished"] == pytest.approx(unfinished)
        )  # TRL takes padding for an end
    lines = [line.split(",") for line in (tmp_path / "curve.csv").read_text().splitlines()]
    assert lines[0][-3:] == ["brief", "reward_model", "tokens"] and [line[0] for line in lines[1:]] == [
        str(point["step"]) for point in curve
    ]


@pytest.mark.parametrize("lmbda", [1.0, 0.0])
def test_answers_that_a_distillation_samples_are_kept_without_rewards(
    lmbda: float, tmp_path: Path, preferences: Path, tiny_model: Path
) -> None:
    settings = {"options": {"max_new_tokens": 6, "lmbda": lmbda}, "gradient_accumulation_steps": 2}
    report = align_it(tmp_path, preferences, None, tiny_model, method="gkd", **settings)
    assert not report.failures, [check.note for check in report.failures]
    curve = [
        point for point in json.loads((tmp_path / "pages" / "history.json").read_text())["curve"] if "loss" in point
    ]
    assert {point["on_policy"] for point in curve} == {lmbda}
    page = (tmp_path / "pages" / "alignment.html").read_text()
    if not lmbda:
        assert (
            not (tmp_path / "out" / "answers").exists()
            and "sampled" not in report.metrics
            and "of its own answers" not in page
        )
        return
    rows = read_answers(tmp_path / "out")
    assert [*rows[0]] == ["step", "example_id", "answer", "reasoning", "reward", "tokens", "unfinished"]
    seen = [(row["step"], row["example_id"]) for row in read_table(tmp_path / "out" / "examples.parquet")]
    assert sorted((row["step"], row["example_id"]) for row in rows) == sorted(seen) and len(rows) == 2 * 16
    assert report.metrics["sampled"] == {"answers": 32, "records": 16} and {row["reward"] for row in rows} == {None}
    for point in curve:
        tokens = [row["tokens"] for row in rows if row["step"] == point["step"]]
        assert point["response_length"] == pytest.approx(sum(tokens) / len(tokens))
    assert len({row["answer"] for row in rows}) > 8 and "rewards_differ" not in {check.name for check in report.checks}
    shortest, *_, longest = sorted((row for row in rows if row["step"] == 1), key=lambda row: row["tokens"])
    assert "The policy learned from 32 of its own answers. The shortest and the longest of 3 steps" in page
    for row in (shortest, longest):
        end = ", unfinished" if row["unfinished"] else ""
        assert f"<span>{row['tokens']} tokens{end}:</span>" in page and f"record {row['example_id']}" in page
    shutil.rmtree(tmp_path / "out" / "answers")  # of a version that did not keep them
    del report.metrics["sampled"]
    draw_pages("aligned@mine", report, tmp_path / "out", tmp_path / "pages")
    assert "of its own answers" not in (tmp_path / "pages" / "alignment.html").read_text()


SCORES = {
    "always 1": ("1.0", "data/rewards/own.py:score was always 1"),
    "by prompt": (
        "float(len(record['example_id'].strip('0')))",
        "data/rewards/own.py:score did not distinguish the answers to a prompt",
    ),
}
"""Scores from which an answer cannot be told from another to the same prompt."""


def scored_by(folder: Path, score: str) -> dict[str, Any]:
    functions = folder / "project/data/rewards"
    functions.mkdir(parents=True)
    (functions / "own.py").write_text(
        f"def score(prompts, answers, records):\n    return [{score} for answer, record in zip(answers, records)]\n"
    )
    return {"rewards": {"data/rewards/own.py:score": 1.0}, "functions": functions}


@pytest.mark.parametrize(("method", "case"), [("rloo", "by prompt"), ("grpo", "always 1")])
def test_a_reward_that_distinguishes_no_answers_stops_the_training_and_blocks(
    method: str, case: str, tmp_path: Path, preferences: Path, weak: tuple[Path, Report], tiny_model: Path
) -> None:
    score, note = SCORES[case]
    settings = {**METHODS[method], **scored_by(tmp_path, score), "max_steps": 9, "constant_reward_steps": 2}
    report = align_it(tmp_path, preferences, weak[0], tiny_model, method=method, **settings)
    [failed] = report.failures
    assert (failed.name, failed.severity, failed.count) == ("rewards_differ", "error", 8)
    assert (
        failed.note.startswith("8 answers to 4 records")
        and note in failed.note
        and "aligned.mine.rewards" in failed.note
    )
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("method", ["rloo", "ppo"])
def test_a_training_whose_rewards_no_longer_differ_stops_with_its_weights_and_resumes_to_the_same_bytes(
    method: str,
    tmp_path: Path,
    preferences: Path,
    weak: tuple[Path, Report],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from contextlib import contextmanager

    from dagster_project.training.trainers.alignment import ppo
    from dagster_project.training.trainers.alignment.trl_trainers import training

    sizes = (
        {"options": {**METHODS["ppo"]["options"], "batch_size": 2, "mini_batch_size": 2}}
        if method == "ppo"
        else {"max_steps": 16}
    )
    settings = {**METHODS[method], **sizes, "constant_reward_steps": 1, "method": method}
    score = "float(sum(map(ord, answer)) if int(record['example_id'], 16) % 2 else 0.5)"
    settings |= scored_by(tmp_path, score)
    report = align_it(tmp_path / "whole", preferences, weak[0], tiny_model, **settings)
    by_name = {check.name: check for check in report.checks}
    steps = report.metrics["steps"]
    rows = read_answers(tmp_path / "whole" / "out")
    assert not report.failures and 1 < steps < (12 if method == "ppo" else 16) and rows[-1]["step"] == steps
    assert {row["reward"] for row in rows if row["step"] == steps} == {0.5}
    assert (
        not by_name["rewards_differ"].passed
        and not by_name["learned"].passed
        and not by_name["rewards_differ"].blocking
    )
    assert (
        by_name["rewards_differ"].note.startswith("in the last step ")
        and "in the last step " in report.metrics["stopped"]
    )
    before, kept = iter([*[False] * (steps - 1), *[True] * 9]), []

    @contextmanager
    def stop() -> Any:
        yield lambda: next(before)

    with monkeypatch.context() as patched:
        patched.setattr(ppo if method == "ppo" else training, "stop_on_request", stop)
        patched.setattr(aligned, "_agreement", lambda *_: kept.append(1) or pytest.skip("killed"))
        with pytest.raises((Interrupted, pytest.skip.Exception)):
            align_it(tmp_path / "again", preferences, weak[0], tiny_model, **settings)
    assert list((tmp_path / "again" / "checkpoints").glob("step-*"))
    align_it(tmp_path / "again", preferences, weak[0], tiny_model, **settings)
    assert contents(tmp_path / "whole" / "out") == contents(tmp_path / "again" / "out")


def test_a_policy_learns_from_a_function_of_the_project_whose_code_is_part_of_its_checkpoints(
    tmp_path: Path, preferences: Path, weak: tuple[Path, Report], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = tmp_path / "project/data/rewards"
    functions.mkdir(parents=True)
    (functions / "own.py").write_text(
        "def short(prompts, answers, records):\n    return [-float(len(answer)) for answer in answers]\n"
    )
    settings = {
        **METHODS["grpo"],
        "method": "grpo",
        "rewards": {"data/rewards/own.py:short": 1.0},
        "functions": functions,
    }
    settings["trl"] = {"adam_beta1": 0.8}
    report = align_it(tmp_path, preferences, weak[0], tiny_model, **settings)
    assert not report.failures, [check.note for check in report.failures]
    assert (report.metrics["rewards"], report.metrics["loss_type"]) == ({"data/rewards/own.py:short": 1.0}, "dapo")
    assert all(point["reward"] < 0 for point in json.loads((tmp_path / "pages/history.json").read_text())["curve"])
    assert "grpo, loss dapo, on lora, adam_beta1 0.8" in (tmp_path / "pages/alignment.html").read_text()
    stored = json.loads((tmp_path / "out/training.json").read_text())["settings"]
    assert report.metrics["trl"] == stored["trl"] == {"adam_beta1": 0.8} and stored["constant_reward_steps"] == 10
    found: list[dict[str, str]] = []
    monkeypatch.setattr(
        aligned,
        "Checkpoints",
        lambda folder, identity, *_, **__: found.append(identity) or Checkpoints(folder, identity),
    )
    for content in ("    return [1.0] * 9\n", "    return [1.0]\n"):
        (functions / "own.py").write_text(f"def short(prompts, answers, records):\n{content}")
        with pytest.raises(
            InputError, match=r"aligned\.mine\.rewards: data/rewards/own\.py:short returns \d numbers for \d answers"
        ):
            align_it(tmp_path, preferences, weak[0], tiny_model, **settings)
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"reward functions"}


def test_dpo_starts_at_a_loss_of_ln_2_and_learns_the_preferences(
    tmp_path: Path, preferences: Path, judged: tuple[Path, Report], tiny_model: Path
) -> None:
    report = align_it(tmp_path, preferences, judged[0], tiny_model, method="dpo", num_train_epochs=4)
    document = json.loads((tmp_path / "out" / "training.json").read_text())
    assert document["loss"]["first"] == pytest.approx(math.log(2), abs=1e-6)
    assert document["validation"][0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-6)
    told = report.metrics["preference"]
    assert told["accuracy"]["aligned"] == 1.0 and told["implicit_reward_accuracy"]["value"] == 1.0
    assert told["log_ratio"]["chosen"] > told["log_ratio"]["rejected"]


def test_dpo_of_a_model_with_a_router_adds_its_loss_to_ln_2(
    tmp_path: Path, preferences: Path, tiny_model: Path
) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("config.json", "model*"))
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = MixtralConfig(vocab_size=259, num_local_experts=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    report = align_it(
        tmp_path / "run",
        preferences,
        None,
        tmp_path / "model",
        method="dpo",
        peft={"target_modules": ["q_proj", "v_proj"]},
    )
    [begins] = [check for check in report.checks if check.name == "starts_as_the_reference"]
    first = json.loads((tmp_path / "run" / "out" / "training.json").read_text())["validation"][0]
    assert begins.passed and not report.failures and first["validation_margin"] == 0
    assert 1e-3 < first["validation_loss"] - math.log(2) < 1e-2, "router_aux_loss_coef of 0.001, times at least 1"


def test_a_teacher_that_was_changed_is_refused_before_a_model_is_loaded(
    tmp_path: Path, preferences: Path, judged: tuple[Path, Report], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preference, "policy", lambda *_, **__: pytest.fail("a model was loaded"))
    folder, given = larger_than(tiny_model, tmp_path / "large")
    (folder / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    params = aligned.Params(method="gkd", adapter="lora", options={"teacher": given})
    paths = [tmp_path / name for name in ("out", "curve.csv", "checkpoints")]
    with pytest.raises(
        InputError, match=r"(?s)models/large/model\.safetensors has sha256 .*aligned\.mine\.options\.teacher\.sha256"
    ):
        aligned.produce(
            "mine", params, COMPUTE, aligned.Sources(preferences, judged[0], tiny_model, larger=folder), *paths
        )
    assert not any(path.exists() for path in paths)


def test_a_pass_over_more_prompts_than_there_are_is_refused_before_a_model_is_loaded(
    tmp_path: Path, preferences: Path, judged: tuple[Path, Report], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preference, "policy", lambda *_, **__: pytest.fail("a model was loaded"))
    params = aligned.Params(method="rloo", adapter="lora", per_device_train_batch_size=4096)
    paths = [tmp_path / name for name in ("out", "curve.csv", "checkpoints")]
    with pytest.raises(
        InputError, match=r"aligned\.mine\.per_device_train_batch_size: a forward pass takes answers to 1024 prompts"
    ):
        aligned.produce("mine", params, COMPUTE, aligned.Sources(preferences, judged[0], tiny_model), *paths)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A model that has positions for 64 tokens, and no more."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("narrow")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    return folder


def test_prompts_of_held_out_answers_are_truncated_to_the_context(
    tmp_path: Path, preferences: Path, narrow: Path
) -> None:
    report = align_it(
        tmp_path,
        preferences,
        None,
        narrow,
        method="dpo",
        max_new_tokens=60,
        max_steps=2,
        peft={"target_modules": ["c_attn"]},
    )
    assert report.metrics["watch"]["prompts"] == 4


def test_texts_longer_than_the_context_are_rewarded_by_their_end(judged: tuple[Path, Report]) -> None:
    model = reward.RewardModel(judged[0], torch.device("cpu"), torch.float32)
    model.tokenizer.model_max_length = 16
    short, long = ([{"role": "user", "content": "q" * n}, {"role": "assistant", "content": "yes"}] for n in (40, 80))
    assert model([short]) == pytest.approx(model([long]))


@pytest.mark.parametrize(("method", "key"), [("grpo", "max_completion_length"), ("gkd", "max_new_tokens")])
def test_prompts_that_leave_no_room_for_an_answer_are_refused(
    method: str, key: str, tmp_path: Path, preferences: Path, narrow: Path
) -> None:
    settings = {"options": {key: 60}, "peft": {"target_modules": ["c_attn"]}, "rewards": {"brief": 1.0}}
    with pytest.raises(
        InputError,
        match=rf"{method}: 16 of 16 prompts leave no room for 60 tokens in a context of 64 .*\n.*lower {key}",
    ):
        align_it(tmp_path, preferences, None, narrow, method=method, **settings)


@pytest.mark.parametrize("method", ["dpo", "orpo", "simpo", "gkd", "rloo", "online_dpo", "ppo"])
def test_a_resumed_training_ends_in_the_same_bytes(
    method: str,
    tmp_path: Path,
    preferences: Path,
    judged: tuple[Path, Report],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = {} if method == "ppo" else {"max_steps": 3, "save_steps": 1}
    settings = {"method": method, **METHODS[method], **steps}
    align_it(tmp_path / "whole", preferences, judged[0], tiny_model, **settings)
    from contextlib import contextmanager

    from dagster_project.training.trainers.alignment import ppo
    from dagster_project.training.trainers.alignment.trl_trainers import training

    asked = iter([*[False] * (0 if method == "ppo" else 3), *[True] * 20])

    @contextmanager
    def stop() -> Any:
        yield lambda: next(asked)

    with monkeypatch.context() as patched:
        patched.setattr(ppo if method == "ppo" else training, "stop_on_request", stop)
        with pytest.raises(Interrupted, match="interrupted at"):
            align_it(tmp_path / "stopped", preferences, judged[0], tiny_model, **settings)
    assert list((tmp_path / "stopped" / "checkpoints").glob("step-*"))
    align_it(tmp_path / "stopped", preferences, judged[0], tiny_model, **settings)
    assert contents(tmp_path / "whole" / "out") == contents(tmp_path / "stopped" / "out")
    assert (tmp_path / "whole" / "out" / "answers").exists() == (method not in OFFLINE - {"gkd"})


def test_resuming_from_any_step_gives_the_same_bytes_and_number_of_measurements(
    tmp_path: Path, preferences: Path, judged: tuple[Path, Report], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    from dagster_project.training.trainers.alignment.trl_trainers import training
    from dagster_project.training.trainers.harness import session as harness

    align_it(tmp_path / "whole", preferences, judged[0], tiny_model, method="dpo")  # four steps an epoch, two epochs
    assert [
        point["step"] for point in json.loads((tmp_path / "whole" / "out" / "training.json").read_text())["validation"]
    ] == [0, 4, 8]
    made: list[Progress] = []

    def counted(*arguments: Any) -> Progress:
        made.append(Progress(*arguments))
        return made[-1]

    for step in (1, 4, 8):  # the last two end an epoch

        @contextmanager
        def stop(step: int = step) -> Any:
            yield lambda: made[-1].done >= step - 1  # it advances when a step has been logged, after it has ended

        with monkeypatch.context() as patched:
            patched.setattr(harness, "Progress", counted)
            patched.setattr(training, "stop_on_request", stop)
            with pytest.raises(Interrupted, match=f"interrupted at step {step};"):
                align_it(tmp_path / str(step), preferences, judged[0], tiny_model, method="dpo")
        align_it(tmp_path / str(step), preferences, judged[0], tiny_model, method="dpo")
        assert contents(tmp_path / "whole" / "out") == contents(tmp_path / str(step) / "out"), step


@pytest.mark.long
def test_ppo_in_two_processes_shares_the_work_and_reports_it(
    tmp_path: Path, preferences: Path, judged: tuple[Path, Report], tiny_model: Path
) -> None:
    shared = COMPUTE.model_copy(update={"processes": 2})
    for name, compute in {"alone": COMPUTE, "shared": shared}.items():
        report = align_it(tmp_path / name, preferences, judged[0], tiny_model, compute, method="ppo", **METHODS["ppo"])
        assert not report.failures, [check.note for check in report.failures]
    alone, both_ = (json.loads((tmp_path / name / "out" / "training.json").read_text()) for name in ("alone", "shared"))
    assert both_["processes"] == 2 and "processes" not in alone
    kept = [
        [{**row, "reward": 0, "reward_model": 0} for row in read_answers(tmp_path / name / "out") if row["step"] == 1]
        for name in ("alone", "shared")
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 12
    found = [
        [row["reward"] for row in read_answers(tmp_path / name / "out") if row["step"] == 1]
        for name in ("alone", "shared")
    ]
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert both_["tokens"] == alone["tokens"] and both_["loss"]["first"] == pytest.approx(
        alone["loss"]["first"], rel=1e-2, abs=1e-3
    )


class Reached(Exception):
    """The process is past the checks."""


def test_a_host_whose_inputs_differ_from_those_of_the_first_is_refused(
    tmp_path: Path, preferences: Path, judged: tuple[Path, Report], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[str, Any] = {}

    def stop(*work: Any, **_: Any) -> None:
        first.update(work[0] if isinstance(work[0], dict) else {})
        raise Reached

    copies = {name: tmp_path / name for name in ("preferences", "reward_model", "sft")}
    for name, folder in {"preferences": preferences, "reward_model": judged[0], "sft": tiny_model}.items():
        shutil.copytree(folder, copies[name])
    monkeypatch.setattr(aligned, "start_others", stop)
    with pytest.raises(Reached):
        align_it(
            tmp_path / "first",
            copies["preferences"],
            copies["reward_model"],
            copies["sft"],
            method="ppo",
            **METHODS["ppo"],
        )
    monkeypatch.setattr(launch, "_elsewhere", True)
    monkeypatch.setattr(preference, "policy", stop)
    with pytest.raises(Reached):
        aligned.other_process(json.loads(json.dumps(first)))
    changes = {
        "preferences": copies["preferences"] / "train" / "records-00000.parquet",
        "reward model": copies["reward_model"] / "config.json",
        "SFT model": copies["sft"] / "config.json",
    }
    for name, file in changes.items():
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        with pytest.raises(InputError, match=f"this host differs from the first one: {name}\n"):
            aligned.other_process(json.loads(json.dumps(first)))
        file.write_bytes(before)
    shutil.rmtree(copies["sft"])
    with pytest.raises(InputError, match=r"this host has no \S+/sft\nhint: fetch it with `dvc pull`"):
        aligned.other_process(json.loads(json.dumps(first)))


def test_online_methods_refuse_a_reward_model_with_another_tokenizer(
    tmp_path: Path, preferences: Path, judged: tuple[Path, Report], tiny_model: Path
) -> None:
    other = tmp_path / "judge"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="the reward model has another tokenizer than lora"):
        align_it(tmp_path, preferences, other, tiny_model, method="rloo")
    report = align_it(tmp_path, preferences, other, tiny_model, method="dpo")
    assert not report.failures and "reward" not in report.metrics["watch"]
    assert "another tokenizer than lora" in next(
        check.note for check in report.checks if check.name == "reward_model_is_reliable"
    )


def test_a_reward_without_a_model_is_the_weighted_sum_of_its_rules() -> None:
    rewards = Rewards({"valid_json": 2.0, "distinct": 1.0}, None)
    texts = ('{"a": 1}', "no no no no", '{"a": NaN}')
    answers = [{"role": "assistant", "content": text} for text in texts]
    assert rewards([{}] * 3, answers)[0] == [3.0, 0.5, 1.0]


def test_rewards_do_not_depend_on_the_order_of_their_keys_which_dvc_does_not_compare() -> None:
    weights = {"valid_json": 1e16, "distinct": -1e16, "brief": 1.0}
    answer = [{"role": "assistant", "content": "{}"}]  # of which each rule gives about 1
    (one, of_one), (other, of_other) = (
        Rewards(dict(entries), None)([{}], answer) for entries in (weights.items(), reversed(weights.items()))
    )
    assert (one, [*of_one.items()]) == (other, [*of_other.items()])


def test_rules_count_characters_in_scripts_without_spaces() -> None:
    rewards = Rewards({"distinct": 1.0, "brief": 1.0}, None)
    repeated, short = rewards([{}, {}], [{"role": "assistant", "content": text} for text in ("哈" * 100, "好的。")])[0]
    assert (repeated, short) == (pytest.approx(1 / 98), pytest.approx(1.97))


@pytest.mark.parametrize(
    ("watch", "sign"),
    [
        ({}, ""),
        ({"tokens": (10, 16)}, "answers grew from 10 to 16 tokens"),
        ({"distinct": (0.9, 0.7)}, "not repeated fell from 0.90 to 0.70"),
        ({"unfinished": (0.0, 0.5)}, "unfinished answers went from 0% to 50%"),
        ({"unfinished": (0.0, 0.5), "reward": (1.0, 0.5)}, ""),
        ({"tokens": (10, 16), "reward": None}, "answers grew from 10 to 16 tokens"),
    ],
)
def test_reward_hacking_is_reported(watch: dict[str, tuple[float, float] | None], sign: str) -> None:
    found = {"reward": (1.0, 2.0), "tokens": (10, 15), "distinct": (0.9, 0.85), "unfinished": (0.1, 0.15)} | watch
    signs = gamed(
        {
            name: {"sft": ends[0], "aligned": ends[1], "difference": ends[1] - ends[0]}
            for name, ends in found.items()
            if ends
        }
    )
    assert len(signs) == bool(sign) and sign in "".join(signs)


def test_the_page_does_not_call_equal_answers_better() -> None:
    from dagster_project.views.alignment import _key_figures

    same = {"sft": 1.0, "aligned": 1.0}
    watch = {"reward": same, "win_rate": {"value": 0.5}, "tokens": same, "distinct": same, "kl_per_token": 0.0}
    assert ("win rate", "50.0 %", "over the SFT model, by the reward model; a tie counts half") in _key_figures(
        {"watch": watch}
    )
    nearly = {"accuracy": {"sft": 0.004, "aligned": 0.9961}}
    assert ("agreement", "99.6 %", "of held-out pairs, from 0.4 %") in _key_figures(
        {"watch": watch, "preference": nearly}
    ), "neither all nor none"


def test_paired_means_have_a_paired_interval() -> None:
    assert paired([0, 1, 0, 1], [1, 2, 1, 2], "abcd") == {
        "sft": 0.5,
        "aligned": 1.5,
        "difference": 1.0,
        "interval": [1.0, 1.0],
    }


def test_near_copies_among_held_out_pairs_count_as_one_in_intervals(tmp_path: Path) -> None:
    before, after, names = [1, 1, 0, 0, 0], [0, 1, 1, 1, 1], "abcde"
    alone, copied = paired(before, after, names), paired(before * 4, after * 4, names * 4)
    assert copied == alone and copied != paired(before * 4, after * 4, [str(i) for i in range(20)])
    pairs = [preference_row(i, "yes", "no") for i in range(4)]

    def evaluated(test: list[dict[str, Any]], times: int) -> dict[str, Any]:
        rewards = [0.0, 1.0, 1.0, 1.0] * times + [0.5, 0.0, 0.0, 0.0] * times
        return reward_model._evaluate(lambda *_, **__: rewards, {"train": pairs, "test": test}, tmp_path / "c.csv")  # type: ignore[arg-type]

    assert evaluated(pairs * 4, 4) == evaluated(pairs, 1) | {"by_category": {"even": {"accuracy": 1.0, "pairs": 8}}}


def test_validation_figures_are_means_over_the_answers_that_they_are_about() -> None:
    from dagster_project.training.trainers.alignment.trl_trainers.training import average_over_rows

    good, bad = [1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 8.0, 0.0, 8.0, 1.0]  # alternating, in passes of three, the last of one
    means = {
        "rewards/chosen": [1.5, 3.0, 4.5],
        "rewards/rejected": [0.0, 4.0, 8.0, 1.0],
        "rewards/margins": [1.5, -1.0, -3.5],
    }
    metrics = {name: [*values] for name, values in means.items()} | {"kl": [1.0, 2.0, 3.0, 5.0]}
    average_over_rows(metrics, [(3, 2, 1), (3, 1, 2), (3, 2, 1), (1, 0, 1)])
    expected = [sum(good) / 5, sum(bad) / 5, (sum(good) - sum(bad)) / 5, (3 * (1 + 2 + 3) + 5) / 10]
    assert [value for [value] in metrics.values()] == pytest.approx(expected)
    pairs = {"rewards/chosen": [1.0, 4.0], "rewards/margins": [2.0, 5.0]}
    average_over_rows(pairs, [(2, 2, 2), (1, 1, 1)])
    assert pairs == {"rewards/chosen": [2.0], "rewards/margins": [3.0]}


def test_kto_estimates_kl_on_answers_to_another_prompt(tiny_tokenizer: Any) -> None:
    pairs = [preference_row(i, f"good{i}", f"bad{i}") for i in range(3)]
    rows = preference.Kto().rows(tiny_tokenizer, pairs)
    own = {i: {tuple(good), tuple(bad)} for i, (_, good, bad) in enumerate(both(tiny_tokenizer, pairs))}
    assert [row["label"] for row in rows] == [True, False] * 3
    assert all(tuple(row["KL_completion_ids"]) not in own[row["pair"]] for row in rows)
    ranked = [
        preference_row(0, "other", "bad"),
        *({**preference_row(1, "best", bad), "prompt": pairs[1]["prompt"]} for bad in ("worse", "worst")),
    ]
    good = [row for row in preference.Kto().rows(tiny_tokenizer, ranked) if row["label"]]
    assert good[2]["KL_completion_ids"] == good[1]["KL_completion_ids"] == good[0]["completion_ids"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"aligned": {"x": {"method": "dpo", "adapter": "lora", "options": {"beta": 0}}}},
            "aligned.x.options.beta: Input should be greater than 0",
        ),
        ({"aligned": {"x": {"method": "dpo", "adapter": "gone"}}}, "aligned.x.adapter: there is no adapter.gone"),
        ({"aligned": {"lora": {"method": "dpo", "adapter": "lora"}}}, "aligned.lora: adapter.lora has the same name"),
        (
            {"aligned": {"x": {"method": "dpo", "adapter": "lora", "options": {"bata": 1}}}},
            "aligned.x.options.bata: unknown key",
        ),
        (
            {"aligned": {"x": {"method": "dpo", "adapter": "lora", "options": {"loss_type": "exo_pair"}}}},
            "exo_pair needs it above 0",
        ),
        (
            {"aligned": {"x": {"method": "kto", "adapter": "lora", "per_device_train_batch_size": 1}}},
            "aligned.x.per_device_train_batch_size: kto estimates KL on the answers of a forward pass",
        ),
        (
            {
                "aligned": {
                    "x": {"method": "dpo", "adapter": "lora", "options": {"loss_type": "hinge", "label_smoothing": 0.1}}
                }
            },
            "aligned.x.options.label_smoothing: has no effect on the loss hinge",
        ),
        (
            {
                "aligned": {
                    "x": {"method": "dpo", "adapter": "lora", "lr_scheduler_type": "constant", "warmup_ratio": 0.2}
                }
            },
            "aligned.x.warmup_ratio: has no effect on the schedule constant",
        ),
        (
            {"adapter": {"lora": {"lr_scheduler_type": "constant", "warmup_steps": 3}}},
            "adapter.lora.warmup_steps: has no effect on the schedule constant",
        ),
        (
            {"aligned": {"x": {"method": "rloo", "adapter": "lora", "per_device_train_batch_size": 6}}},
            "cannot be divided into groups of 4",
        ),
        (
            {"aligned": {"x": {"method": "grpo", "adapter": "lora", "rewards": {"pretty": 1.0}}}},
            "aligned.x.rewards: unknown: pretty",
        ),
        (
            {"aligned": {"x": {"method": "grpo", "adapter": "lora", "rewards": {"data/rewards/none.py:f": 1.0}}}},
            "aligned.x.rewards: data/rewards/none.py does not exist",
        ),
        (
            {
                "aligned": {
                    "x": {"method": "grpo", "adapter": "lora", "options": {"importance_sampling_level": "sequence"}}
                }
            },
            "with ratios of whole answers, dapo would weight each answer by its length",
        ),
        (
            {"aligned": {"x": {"method": "grpo", "adapter": "lora", "options": {"loss_type": "cispo"}}}},
            (
                "aligned.x.options.epsilon_high: with cispo it is the largest ratio of probabilities itself, and must"
                " be above 1"
            ),
        ),
        (
            {"aligned": {"x": {"method": "grpo", "adapter": "lora", "options": {"loss_type": "sapo", "epsilon": 0.1}}}},
            "aligned.x.options.epsilon: has no effect on the loss sapo",
        ),
        (
            {"aligned": {"x": {"method": "grpo", "adapter": "lora", "options": {"loss_type": "luspo"}}}},
            "importance_sampling_level: luspo is defined for ratios of a sequence",
        ),
        (
            {"aligned": {"x": {"method": "simpo", "adapter": "lora", "options": {"simpo_gamma": 1}}}},
            "aligned.x.options.simpo_gamma: unknown key",
        ),
        (
            {
                "aligned": {
                    "x": {"method": "cpo", "adapter": "lora", "options": {"loss_type": "ipo", "label_smoothing": 0.1}}
                }
            },
            "aligned.x.options.label_smoothing: has no effect on the loss ipo",
        ),
        (
            {"aligned": {"x": {"method": "orpo", "adapter": "lora", "rewards": {"brief": 1.0}}}},
            "orpo learns from pairs alone",
        ),
        (
            {"reward_model": {"model": "base_model", "method": "full", "peft": {"r": 8}}},
            "reward_model.peft: full trains every weight",
        ),
        *(
            (
                {"aligned": {"x": {"method": method, "adapter": "lora", "peft": {key: value}}}},
                f"aligned.x.peft.{key}: {value}",
            )
            for method, key, value in (
                ("kto", "bias", "all"),
                ("orpo", "bias", "lora_only"),
                ("simpo", "init_lora_weights", "pissa"),
                ("cpo", "init_lora_weights", False),
                ("dpo", "init_lora_weights", "orthogonal"),
            )
        ),
        (
            {"reward_model": {"model": "base_model", "peft": {"init_lora_weights": "eva"}}},
            "reward_model.peft.init_lora_weights: eva is not supported: it needs a pass over the data",
        ),
        ({"aligned": {"x": {"method": "gkd", "adapter": "lora"}}}, "aligned.x.options.teacher: missing"),
        (
            {
                "aligned": {
                    "x": {
                        "method": "gkd",
                        "adapter": "lora",
                        "options": {"teacher": {"folder": "models/x", "sha256": {}}},
                    }
                }
            },
            "aligned.x.options.teacher.folder: models/x does not exist",
        ),
        (
            {
                "aligned": {
                    "x": {
                        "method": "gkd",
                        "adapter": "lora",
                        "options": {"teacher": {"folder": "models/x", "sha256": {}}},
                        "peft": {"target_modules": ["q_proj", "lm_head"]},
                    }
                }
            },
            "aligned.x.peft.target_modules: TRL's trainer of gkd does not train lm_head",
        ),
        (
            {
                "aligned": {
                    "x": {"method": "grpo", "adapter": "lora", "peft": {"target_modules": ["q_proj", "lm_head"]}}
                }
            },
            "aligned.x.peft.target_modules: TRL's trainer of grpo does not train lm_head",
        ),
        (
            {
                "compute": {"processes": 2},
                "aligned": {"x": {"method": "simpo", "adapter": "lora", "sharding": {"fsdp": "full_shard"}}},
            },
            "aligned.x.sharding: simpo does not support it",
        ),
        (
            {"aligned": {"x": {"method": "kto", "adapter": "lora", "reward_seconds": 9}}},
            "aligned.x.reward_seconds: kto learns from pairs alone",
        ),
        (
            {"aligned": {"x": {"method": "kto", "adapter": "lora", "constant_reward_steps": 9}}},
            "aligned.x.constant_reward_steps: kto learns from pairs alone",
        ),
        (
            {"aligned": {"x": {"method": "grpo", "adapter": "lora", "rewards": {"regex": 1.0}}}},
            "aligned.x.rewards.regex.pattern: missing",
        ),
        (
            {"aligned": {"x": {"method": "dpo", "adapter": "lora", "trl": {"report_to": "wandb"}}}},
            "aligned.x.trl.report_to: Pedigree decides it",
        ),
        (
            {"aligned": {"x": {"method": "dpo", "adapter": "lora", "rewards": {"brief": 1.0}}}},
            "aligned.x.rewards: dpo learns from pairs alone",
        ),
        (
            {"aligned": {"x": {"method": "dpo", "adapter": "lora", "peft": {"rank": 4}}}},
            "aligned.x.peft.rank: unknown key of lora",
        ),
        (
            {"aligned": {"x": {"method": "ppo", "adapter": "lora", "learning_rate": 1e-3}}},
            "aligned.x: learning_rate: ppo sets its steps in its options",
        ),
        (
            {"aligned": {"x": {"method": "ppo", "adapter": "lora", "options": {"target_kl": 6.0, "horizon": 12}}}},
            "aligned.x.options.horizon: 12 would move beta below zero at 64 answers",
        ),
        ({"aligned": None}, "aligned: must be a mapping"),
        *(
            (
                {"aligned": {"x": {"method": method, "adapter": "lora", "peft": {"lora_dropout": 0.1}}}},
                f"has no effect, {method} trains without",
            )
            for method in ("dpo", "kto", "orpo", "ppo")
        ),
        (
            {"reward_model": {"model": "base_model", "peft": {"lora_dropout": 0.1}}},
            "reward_model.peft.lora_dropout: has no effect",
        ),
        ({"reward_model": {"model": "merged/gone"}}, "reward_model.model: there is no adapter.gone"),
        ({"reward_model": {"model": "elsewhere"}}, "reward_model.model"),
        (
            {"adapter": {"lora": {"method": "prompt_tuning", "merge": False}}},
            "adapter.lora does not produce a merged model",
        ),
    ],
)
def test_an_impossible_entry_is_refused_with_a_message(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    from conftest import ROOT
    from ruamel.yaml import YAML

    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text()) | change
    (tmp_path / "params.yaml").write_text(json.dumps(values))
    for folder in ("sources", "expectations", "keys"):
        shutil.copytree(ROOT / "data" / folder, tmp_path / "data" / folder)
    with pytest.raises(InputError) as error:
        validate(tmp_path)
    assert said in str(error.value)


def test_the_reward_model_compares_two_systems(judged: tuple[Path, Report]) -> None:
    from dagster_project.evaluation.judge import by_reward, by_reward_text
    from dagster_project.evaluation.paired.pairwise import Match, Pair

    asked = [{"role": "user", "content": "q"}]
    pairs = [Pair(str(i), asked, None, ("aaa", "zzz") if i else ("zzz", "aaa"), swapped=False) for i in range(4)]
    found = by_reward(Match("m", ("ours", "theirs"), 0, pairs, identical=0), 4, judged[0])
    assert (found["wins"], found["losses"], found["win_rate"]) == (3, 1, 0.75)
    assert found["mean_reward"]["ours"] > found["mean_reward"]["theirs"] and "mean reward: ours" in by_reward_text(
        found
    )
