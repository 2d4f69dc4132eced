"""Pairs with tools, calls and traces: every method trains on the ids that
inference gets, and rewards what the model meant."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.files import jsonl
from builders.tool_calls import WEATHER, call
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from dagster_project.core.errors import InputError
from dagster_project.core.messages import conversation_text
from dagster_project.core.named_templates import HERMES
from dagster_project.core.params import Compute, parse
from dagster_project.core.records import pair_id, pair_schema, read_preferences, read_table, write_records
from dagster_project.evaluation.paired.alignment import Policies
from dagster_project.stages import aligned, preferences, raw_preferences, reward_model
from dagster_project.training.methods import feature_extraction
from dagster_project.training.tokens.preference_pairs import both, prompt_ids
from dagster_project.training.trainers.alignment import ppo, preference
from dagster_project.training.trainers.alignment import reward_model as reward
from dagster_project.training.trainers.alignment.preference import AlignmentRun
from dagster_project.training.trainers.alignment.rewards import Rewards
from dagster_project.training.trainers.alignment.trl_trainers import answer_groups
from dagster_project.training.trainers.harness.checkpoint import Checkpoints

Fields = dict[str, Any]
COMPUTE = Compute(seed=3, threads=1, dtype="float32")
TOOLS = [WEATHER]
OSLO = {"role": "assistant", "content": "", "tool_calls": [call("weather", {"city": "Oslo"})]}
GUESS = {"role": "assistant", "content": "It is cold."}
THOUGHT = {**GUESS, "reasoning_content": "Norway, winter."}


def pair(
    chosen: Fields, rejected: Fields, question: str = "Is it cold in Oslo?", tools: list[Fields] | None = TOOLS
) -> Fields:
    prompt = [{"role": "user", "content": question}]
    return {
        "example_id": pair_id(prompt, [chosen], [rejected], tools),
        "source": "p.jsonl",
        "prompt": prompt,
        "chosen": [chosen],
        "rejected": [rejected],
        "margin": None,
        "category": None,
        "group_id": question,
        "meta": "{}",
        **({"tools": tools} if tools else {}),
    }


PAIRS = [pair(OSLO, GUESS), pair(GUESS, OSLO, "Never mind."), pair(THOUGHT, OSLO, "Guess!")]


def served(
    tokenizer: Any, messages: list[Fields], tools: Any = TOOLS, prompt: bool = True, **variables: Any
) -> list[int]:
    """Ids as inference gets them, by transformers alone."""
    text = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **variables
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.fixture(scope="module")
def hermes_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("hermes") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = HERMES
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hermes(hermes_model: Path) -> Any:
    return reward.tokenizer_of(hermes_model)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    for split in ("train", "validation", "test"):
        write_records(folder / split, PAIRS, pair_schema())
    return folder


@pytest.fixture(scope="module")
def judge(hermes_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    train_reward(folder, data, hermes_model)
    return folder / "reward_model"


def train_reward(folder: Path, data: Path, model: Path) -> Any:
    params = reward_model.Params(model="base_model", max_steps=3, learning_rate=1e-2, min_accuracy=0.0)
    places = [folder / name for name in ("reward_model", "reward.csv", "calibration.csv", "checkpoints")]
    return reward_model.produce(params, COMPUTE, data, model, *places)


# ---- ids
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3))
def test_every_method_trains_on_the_ids_that_inference_gets(number: int, hermes: Any) -> None:
    one = PAIRS[number]
    prompt = served(hermes, one["prompt"])
    chosen, rejected = (
        served(hermes, one["prompt"] + one[side], prompt=False)[:-1] for side in ("chosen", "rejected")
    )  # a line break
    assert (
        chosen[: len(prompt)] == rejected[: len(prompt)] == prompt and chosen[-1] == rejected[-1] == hermes.eos_token_id
    )
    sides = {"prompt_ids": prompt, "chosen_ids": chosen[len(prompt) :], "rejected_ids": rejected[len(prompt) :]}
    [dpo] = preference.Dpo().rows(hermes, [one])
    assert {name: dpo[name] for name in sides} == sides
    kto = preference.Kto().rows(hermes, [one])
    assert [row["prompt_ids"] + row["completion_ids"] for row in kto] == [chosen, rejected]
    assert reward_model._rows(hermes, [one], margins=False) == [{"chosen_ids": chosen, "rejected_ids": rejected}]
    for method in (preference.Rloo(), preference.Grpo()):
        assert [row["prompt"] for row in method.rows(hermes, [one])] == [prompt]
    assert run_on([one], hermes).prompts == [prompt]


@given(st.lists(st.text("ab\n <>", min_size=1, max_size=9).filter(str.strip), min_size=3, max_size=3))
def test_without_tools_ids_are_those_of_the_plain_conversation(tiny_tokenizer: Any, texts: list[str]) -> None:
    question, good, bad = texts
    plain = pair({"role": "assistant", "content": good}, {"role": "assistant", "content": bad}, question, None)
    prompt, end = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
    wanted = [tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, good + end, bad + end)]
    assert [list(ids) for ids in both(tiny_tokenizer, [plain])[0]] == wanted
    assert prompt_ids(tiny_tokenizer, plain) == wanted[0]


FAMILIES = {
    "qwen3": {},
    "gptoss": {},
    "qwen3_5_nothink": {"enable_thinking": True},
    "nemotron_3_nano": {"enable_thinking": True},
}
"""Templates that remove earlier traces; the last two open an answer with a trace in another way than one without."""


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_that_rewrite_earlier_turns_are_rendered_as_served(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from chat_templates import DATE, stub_tokenizer

    tokenizer = stub_tokenizer(family, tmp_path)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        'strftime_now("%Y-%m-%d")', json.dumps(DATE.strftime("%Y-%m-%d"))
    )
    one = pair(THOUGHT, GUESS, tools=None)
    one["prompt"] = [{"role": "user", "content": "A?"}, {**THOUGHT, "content": "B."}, {"role": "user", "content": "C?"}]
    said = [
        {"thinking" if family == "gptoss" and key == "reasoning_content" else key: v for key, v in m.items()}
        for m in one["prompt"]
    ]
    thinking = served(tokenizer, said, None, **FAMILIES[family])
    assert "Norway" not in tokenizer.decode(thinking), "the template keeps the trace, so nothing is shown"
    assert prompt_ids(tokenizer, one) == thinking
    [(prompt, good, bad)] = both(tokenizer, [one])
    assert (prompt + good)[: len(thinking)] == thinking and "Norway" in tokenizer.decode(good)
    silent = served(tokenizer, said, None, **dict.fromkeys(FAMILIES[family], False))
    assert (prompt + bad)[: len(silent)] == silent and "Norway" not in tokenizer.decode(bad)
    assert (
        prompt == thinking[: len(prompt)] == silent[: len(prompt)] and good[0] != bad[0]
    ) or prompt == thinking == silent


# ---- rewards
# ----------------------------------------------------------------------------------------------------------------------


def run_on(pairs: list[Fields], tokenizer: Any, rewards: Any = None) -> AlignmentRun:
    return AlignmentRun(
        None,
        tokenizer,
        {"train": pairs},
        rewards,
        aligned.Params(method="ppo", adapter="x"),
        COMPUTE,
        Checkpoints(Path(), {}),
    )


CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        (f"{CALLED}<|im_end|>", 0, OSLO),
        (f"<think>\nNorway.\n</think>\n\n{CALLED}<|im_end|>", 0, {**OSLO, "reasoning_content": "Norway."}),
        ("It is cold.<|im_end|>", 0, GUESS),
        (
            f" {CALLED}",
            1,
            {"role": "assistant", "content": f" {CALLED}"},
        ),  # without tools it is text, as it was generated
    ],
)
def test_a_generated_answer_is_rewarded_as_the_message_that_it_is(
    text: str, number: int, message: Fields, hermes: Any
) -> None:
    pairs = [PAIRS[0], pair(GUESS, THOUGHT, tools=None)]
    given_to: list[Any] = []
    ids = hermes(text, add_special_tokens=False)["input_ids"]
    run = run_on(pairs, hermes, lambda *given: given_to.append(given) or ([0.0], {"own": [0.0]}))
    run.reward([number], [hermes.decode(ids, skip_special_tokens=True)], [ids])
    [(of_pairs, answers)] = given_to
    assert (
        of_pairs == [pairs[number]]
        and answers == [{key: message[key] for key in answers[0]}]
        and answers[0].keys() == message.keys()
    )


def test_rules_score_content_and_calls_without_the_trace() -> None:
    assert reward.judged_text(THOUGHT) == "It is cold."
    assert json.loads(reward.judged_text(OSLO)) == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert Rewards({"valid_json": 1.0}, None)(PAIRS, [OSLO, {**OSLO, "reasoning_content": "Hm."}, THOUGHT])[0] == [
        1.0,
        1.0,
        0.0,
    ]


def test_the_reward_of_a_generated_answer_is_that_of_the_conversation_with_its_tools(judge: Path) -> None:
    model = reward.RewardModel(judge, torch.device("cpu"), torch.float32)
    [value] = model.of_answers([PAIRS[0]], [OSLO])
    assert [value] == model([[*PAIRS[0]["prompt"], OSLO]], tools=[TOOLS])
    assert [value] == pytest.approx(
        model._score([(served(model.tokenizer, [*PAIRS[0]["prompt"], OSLO], prompt=False)[:-1], [])])
    )
    assert model.of_answers(
        [pair(OSLO, GUESS, tools=[*TOOLS, {"type": "function", "function": {"name": "other"}}])], [OSLO]
    ) != [value]


def test_a_generated_answer_that_the_template_refuses_is_rewarded_as_text(judge: Path) -> None:
    model = reward.RewardModel(judge, torch.device("cpu"), torch.float32)
    broken = {"role": "assistant", "content": "", "tool_calls": [call("weather", "{city")]}
    with pytest.raises(InputError, match="not JSON"):
        model([[*PAIRS[0]["prompt"], broken]], tools=[TOOLS])
    prompt, answer = reward._generated(model.tokenizer, PAIRS[0], broken)
    assert (
        prompt == prompt_ids(model.tokenizer, PAIRS[0])
        and model.tokenizer.decode(answer) == conversation_text([broken]) + "<|im_end|>"
    )
    assert math.isfinite(*model.of_answers([PAIRS[0]], [broken]))


def test_the_reward_model_judges_answers_that_the_template_refuses(judge: Path) -> None:
    from dagster_project.evaluation.judge import by_reward
    from dagster_project.evaluation.paired.pairwise import Match, Pair

    broken = {"role": "assistant", "content": "", "tool_calls": [call("weather", "{city")]}
    asked = Pair("1", PAIRS[0]["prompt"], None, ("", ""), swapped=False, messages=(OSLO, broken), tools=TOOLS)
    assert by_reward(Match("m", ("ours", "theirs"), 0, [asked], identical=0), 1, judge)["pairs"] == 1


PIECES = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "<|im_end|>", "<|im_start|>", CALLED,
    '{"name": "weather", "arguments": ', '{"city": "Oslo"}', '{"name": ', "null", "[1, NaN]", '"\\u0000"', "}", " ",
    "\n", "Yes", "", "<tools>", '"weather"', '{"name": "weather", "arguments": "x"}',
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_whatever_a_policy_writes_can_be_rewarded(hermes: Any, text: str) -> None:
    ids = hermes(text, add_special_tokens=False)["input_ids"]
    encoded: list[Any] = []
    judge = Rewards({"valid_json": 1.0, "distinct": 1.0, "brief": 1.0}, None)
    run = run_on(
        PAIRS,
        hermes,
        lambda pairs, answers: (
            encoded.extend(map(reward._generated, [hermes], pairs, answers)) or judge(pairs, answers)
        ),
    )
    assert run.reward([0], [hermes.decode(ids, skip_special_tokens=True)], [ids])[0] >= 0
    assert encoded[0][0] == run.prompts[0] and encoded[0][1][-1] == hermes.eos_token_id


# ---- the whole way
# ----------------------------------------------------------------------------------------------------------------------

ONLINE: dict[str, Fields] = {
    "rloo": {
        "options": {"num_generations": 2, "max_completion_length": 4},
        "max_steps": 3,
        "per_device_train_batch_size": 2,
    },
    "grpo": {
        "options": {"num_generations": 2, "max_completion_length": 4},
        "max_steps": 3,
        "per_device_train_batch_size": 2,
    },
    "ppo": {"options": {"total_episodes": 12, "batch_size": 4, "response_length": 4, "missing_eos_penalty": 0.0}},
}


def align(folder: Path, data: Path, judge: Path, sft: Path, **settings: Any) -> Any:
    params = aligned.Params(**{"adapter": "lora", "learning_rate": 1e-2, "samples": 3, "max_new_tokens": 4, **settings})
    places = [folder / name for name in ("out", "curve.csv", "checkpoints")]
    return aligned.produce("mine", params, COMPUTE, aligned.Sources(data, judge, sft), *places)


@pytest.mark.parametrize("method", ["dpo", *ONLINE])
def test_pairs_with_tools_and_traces_train_a_reward_model_and_a_policy(
    method: str,
    tmp_path: Path,
    data: Path,
    judge: Path,
    hermes_model: Path,
    hermes: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[int]] = []
    owner, name, place = {
        "rloo": (answer_groups, "decode", 1), "grpo": (answer_groups, "decode", 1), "ppo": (ppo, "roll_out", 3)
    }.get(method, (Policies, "_read", 2))  # fmt: skip
    original = getattr(owner, name)

    def watched(*given: Any, **named: Any) -> Any:
        seen.extend([given[place]] if name == "_read" else given[place])
        return original(*given, **named)

    monkeypatch.setattr(owner, name, watched)
    report = align(tmp_path, data, judge, hermes_model, method=method, **ONLINE.get(method, {"max_steps": 3}))
    assert not report.failures, [check.note for check in report.failures]
    wanted = [served(hermes, one["prompt"]) for one in PAIRS]
    assert seen and all(ids in wanted for ids in seen)
    rows = read_table(tmp_path / "out" / "samples.parquet")
    assert [row["prompt"] for row in rows] == [one["prompt"][-1]["content"] for one in PAIRS]
    assert all(row["aligned_reward"] is not None for row in rows)


def test_a_template_without_tools_is_refused_before_anything_is_trained(
    tmp_path: Path, data: Path, judge: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preference, "policy", lambda *_, **__: pytest.fail("a model was loaded"))
    said = (
        rf"pair {PAIRS[0]['example_id']} \(train\) does not fit the chat template of data/merged/lora: the chat"
        r" template does not write the"
    )
    with pytest.raises(InputError, match=said):
        align(tmp_path, data, judge, tiny_model, method="dpo")
    monkeypatch.setattr(reward, "build", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match="chat template of base_model") as refused:
        train_reward(tmp_path, data, tiny_model)
    assert "base_model.chat_template: hermes" in refused.value.hint


def test_tools_calls_and_traces_are_kept_from_the_source_to_the_splits(tmp_path: Path, hermes_model: Path) -> None:
    rows = [{**{side: one[side] for side in ("prompt", "chosen", "rejected")}, "tools": TOOLS} for one in PAIRS]
    judged(tmp_path, hermes_model, rows)
    pairs = {one["prompt"][0]["content"]: one for one in read_preferences(tmp_path / "out/train")}
    assert len(pairs) == 3
    for one in PAIRS:
        found = pairs[one["prompt"][0]["content"]]
        assert [found[key] for key in ("prompt", "chosen", "rejected", "tools")] == [
            one[key] for key in ("prompt", "chosen", "rejected", "tools")
        ]


def test_a_rejected_answer_that_the_template_does_not_write_is_a_mismatch(tmp_path: Path, tiny_model: Path) -> None:
    rows = [
        {"prompt": one["prompt"], "chosen": one["chosen"], "rejected": one["rejected"]}
        for one in (PAIRS[1], pair(GUESS, THOUGHT))
    ]
    report = judged(tmp_path, tiny_model, rows, policy={"invalid_tool_call": "warn"})
    [mismatch] = [check for check in report.checks if check.name == "template_mismatch"]
    assert (
        mismatch.count == 1
        and mismatch.rows == ["data/sources/p.jsonl:0"]
        and "does not write tool calls" in mismatch.note
    )


def judged(root: Path, model: Path, rows: list[Fields], **section: Any) -> Any:
    """Rows through `raw_preferences` and `preferences`, all into train."""
    jsonl(root / "data/sources/p.jsonl", *rows)
    section_raw = {"sources": [{"path": "data/sources/p.jsonl"}]}
    raw_preferences.produce(root, parse(raw_preferences.Params, section_raw, "raw_preferences"), root / "raw")
    write_records(root / "splits/test", [])
    params = parse(preferences.Params, {"test": 0.0, "validation": 0.0, **section}, "preferences")
    return preferences.produce(root, params, 7, root / "raw", root / "splits", model, root / "out", root / "pages", {})


def test_a_classifier_reads_the_tools_of_a_prompt(hermes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Head:
        base, labels, options = None, ["a"], feature_extraction.Options()

        def score(self, features: Any) -> Any:
            return torch.zeros(len(features), 1)

    seen: list[Any] = []
    monkeypatch.setattr(feature_extraction, "features", lambda _, prompts, *__: seen.extend(prompts) or prompts)
    predictor = feature_extraction.Predictor(Head(), hermes)  # type: ignore[arg-type]
    asked = [one["prompt"] for one in PAIRS]
    assert predictor.predict(asked, tools=[TOOLS, None, TOOLS]) == ["a"] * 3
    assert seen == [
        served(hermes, messages, tools) for messages, tools in zip(asked, (TOOLS, None, TOOLS), strict=True)
    ]
