"""Ready-made rewards: what each gives for an answer, which options are refused,
and that records without a target are named."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from builders.tool_calls import WEATHER, call
from conftest import ROOT

from dagster_project.core.errors import InputError
from dagster_project.evaluation.final_answers import FinalAnswer
from dagster_project.training.inference.numbers import number_in
from dagster_project.training.trainers.alignment.ready_rewards import READY, parse_ready, refuse_missing_targets
from dagster_project.training.trainers.alignment.rewards import Rewards, check, reads_files

WHERE = "aligned.x.rewards"


def said(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def record(chosen: dict[str, Any], tools: Any = None) -> dict[str, Any]:
    return {
        "example_id": "id7",
        "prompt": [{"role": "user", "content": "?"}],
        "chosen": [chosen],
        "rejected": [said("no")],
        "tools": tools,
    }


def score(
    name: str,
    answer: dict[str, Any],
    target: dict[str, Any] | None = None,
    tools: Any = None,
    root: Path = ROOT,
    **options: Any,
) -> float:
    rewards = {name: {"weight": 1.0, **options}}
    check(rewards, WHERE, root)
    [total], components = Rewards(rewards, None, root=root)([record(target or said("yes"), tools)], [answer])
    assert components == {name: [total]} and 0 <= total <= 1
    return total


@pytest.mark.parametrize(
    ("answer", "target", "reward"),
    [
        ("Four\n apples ", "Four apples", 1),
        ("four apples", "Four apples", 0),
        ("", "Four", 0),
        ("Four apples.", "Four apples", 0),
    ],
)
def test_exact_match_ignores_white_space_alone(answer: str, target: str, reward: float) -> None:
    assert score("exact_match", said(answer), said(target)) == reward
    assert score("exact_match", said(answer, reasoning_content="Hm."), said(target, reasoning_content="Ah.")) == reward


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72", "72"),  # a solution as in GSM8K
        ("#### 1,200\nThat is 3 boxes.", "1200"),
        ("#### $-5.50", "-5.5"),
        ("It is -$1,234,567.80.", "-1234567.8"),
        ("10 - 3 leaves 5-3", "3"),
        ("minus \u22124", "-4"),
        ("+7 or .5", "0.5"),
        ("1,2345", None),
        ("first 1, then 2, so 3.", "3"),
        ("#### none, though 5", "5"),
        ("8 #### none", "8"),
        ("#### 7 #### 8", "8"),
        ("#### Result\n3 + 4 = 7", "7"),
        ("1e3", "1000"),
        ("= - 5", "-5"),
        ("-\u20ac5", "-5"),
        ("#### 3/4", "0.75"),
        ("#### -1 1/2 cups of 3", "-1.5"),
        ("It is $1/4, or \u22122/8.", "-0.25"),
        ("one half (1/2)", "0.5"),
        ("1/0", None),
        ("on 5/12/2024", None),
        ("1.5/2", "0.75"),
        ("48/2=24", "24"),
        ("none", None),
        ("", None),
    ],
)
def test_a_number_is_extracted_as_in_gsm8k(text: str, number: str | None) -> None:
    assert number_in(text) == (None if number is None else Decimal(number))
    read = FinalAnswer(final_answer="number").extract(text)  # scores read as rewards do
    assert (None if read is None else Decimal(read)) == number_in(text)


def test_numbers_are_compared_as_numbers() -> None:
    assert score("number_match", said("So 1,000.0"), said("thus\n#### 1000")) == 1
    assert (
        score("number_match", said("So 1,000.01"), said("thus\n#### 1000"))
        == score("number_match", said("So"), said("#### 1"))
        == 0
    )
    long = "1" * 5000
    assert (
        score("number_match", said(long), said(long)) == 1 and score("number_match", said(long + "1"), said(long)) == 0
    )


def test_a_pattern_is_searched_in_content_and_calls_in_linear_time() -> None:
    assert (
        score("regex", said("Dear Ms. Lee,\nbye"), pattern=r"^Dear \w+") == 1
        and score("regex", said("dear"), pattern="^Dear") == 0
    )
    assert score("regex", said("", tool_calls=[call("weather", {"city": "Oslo"})]), pattern='"city":"Oslo"') == 1
    assert score("regex", said("a" * 50_000 + "!"), pattern="^(a+)+$") == 0  # exponential in Python's engine


@pytest.mark.parametrize(
    ("content", "reward"),
    [
        ('{"n": 3}', 1),
        ('{"n": "3"}', 0),
        ("{}", 0),
        ("n: 3", 0),
        ('{"n": NaN}', 0),
        ('{"n": 1e999}', 0),
        ("[" * 100_000, 0),
        ('{"n": 3} ok', 0),
    ],
)
def test_json_fits_a_schema_that_is_inline_or_in_a_file(content: str, reward: float, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"]}
    (tmp_path / "data/rewards").mkdir(parents=True)
    (tmp_path / "data/rewards/n.json").write_text(json.dumps(schema))
    assert score("json_schema", said(content), schema=schema) == reward
    assert score("json_schema", said(content), root=tmp_path, file="data/rewards/n.json") == reward
    assert reads_files({"json_schema": {"file": "data/rewards/n.json"}}) and not reads_files(
        {"json_schema": {"schema": schema}, "brief": 1.0}
    )


OSLO, BERGEN = call("weather", {"city": "Oslo"}), call("weather", {"city": "Bergen"})


@pytest.mark.parametrize(
    ("made", "wanted", "reward"),
    [
        ([OSLO], [OSLO], 1),
        ([BERGEN], [OSLO], 0),
        ([OSLO, BERGEN], [BERGEN, OSLO], 1),
        ([OSLO, OSLO], [OSLO], 0),
        ([], [OSLO], 0),
        ([], [], 1),
        ([OSLO], [], 0),
        ([call("weather", '{"city": "Oslo"')], [OSLO], 0),
    ],
)
def test_calls_equal_those_of_the_target_in_any_order(made: list[Any], wanted: list[Any], reward: float) -> None:
    answer, target = (said("", **({"tool_calls": calls} if calls else {})) for calls in (made, wanted))
    assert score("tool_call", answer, target, [WEATHER]) == reward


def test_a_call_that_equals_the_target_but_does_not_fit_the_tools_gives_nothing() -> None:
    wrong = call("weather", {"town": "Oslo", "city": 3})
    assert score("tool_call", said("", tool_calls=[wrong]), said("", tool_calls=[wrong]), [WEATHER]) == 0
    with pytest.raises(InputError, match="tool_call needs tools, and a chosen answer whose calls fit them"):
        refuse("tool_call", record(said("", tool_calls=[wrong]), [WEATHER]))


def test_the_format_of_reasoning_is_a_closed_trace_and_then_content() -> None:
    assert score("reasoning_format", said("4", reasoning_content="2 + 2")) == 1
    assert score("reasoning_format", said("", reasoning_content="2 + 2", tool_calls=[OSLO])) == 1
    for answer in (
        said("4"),
        said(" ", reasoning_content="2 + 2"),
        said("<think>2 + 2"),
        said("4", reasoning_content=" "),
    ):
        assert score("reasoning_format", answer) == 0


def test_a_length_window_falls_off_in_proportion() -> None:
    found = [score("length_window", said("word " * count), min_words=4, max_words=10) for count in (0, 1, 4, 10, 20)]
    assert found == [0, 0.25, 1, 1, 0.5]
    assert (
        score("length_window", said(""), max_words=5) == 1 and score("length_window", said("one"), min_words=2) == 0.5
    )
    assert score("length_window", said("请重启路由器" * 2), max_words=6) == 0.5, "characters in scripts without spaces"


def refuse(name: str, *records: dict[str, Any]) -> None:
    refuse_missing_targets({name: parse_ready(name, 1.0, WHERE, ROOT)}, records, WHERE)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("exact_match", record(said(" ", tool_calls=[OSLO]))),
        ("number_match", record(said("four"))),
        ("tool_call", record(said("", tool_calls=[OSLO]))),
    ],
)
def test_records_without_a_target_are_counted_and_the_first_is_named(name: str, bad: dict[str, Any]) -> None:
    good = {**record(said("4", tool_calls=[OSLO]), [WEATHER]), "example_id": "good"}
    refuse(name, good, good)
    with pytest.raises(
        InputError, match=rf"{WHERE}\.{name} needs .* 2 of 3 training pairs do not have; the first is example id7"
    ):
        refuse(name, good, bad, bad)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"regex": 1.0}, r"regex\.pattern: missing"),
        ({"regex": {"pattern": "(?=a)"}}, r"regex\.pattern: not a regular expression: .*look-ahead"),
        ({"regex": {"pattern": "("}}, r"regex\.pattern: not a regular expression"),
        ({"regex": {"pattern": "a", "patern": "b"}}, r"regex\.patern: unknown key"),
        ({"regex": {"pattern": "a", "weight": "high"}}, r"regex\.weight: Input should be a valid number"),
        ({"json_schema": {}}, "requires either schema or file"),
        ({"json_schema": {"schema": {"type": "thing"}}}, "not a JSON Schema"),
        ({"json_schema": {"file": "data/rewards/none.json"}}, "does not exist"),
        ({"json_schema": {"file": "data/rewards"}}, "cannot be read: Is a directory"),
        ({"json_schema": {"file": ""}}, r"json_schema\.file: "),
        ({"json_schema": {"file": "params.yaml"}}, "is not in data/rewards/"),
        ({"json_schema": {"file": "data/rewards/README.md"}}, "is not JSON"),
        ({"length_window": 1.0}, "requires min_words, max_words or both"),
        ({"length_window": {"min_words": 9, "max_words": 3}}, "3 is below min_words 9"),
        ({"brief": {"weight": 1.0}}, r"brief: it has no options"),
        ({"reward_model": {"weight": 0.0}}, r"reward_model: it has no options"),
        ({"exact_mach": 1.0}, r"unknown: exact_mach\nhint: did you mean exact_match\?"),
        ({"exact_match": {"weight": 0.0}}, "there is no reward"),
    ],
)
def test_a_wrong_entry_is_refused(rewards: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){WHERE}.*{message}"):
        check(rewards, WHERE, ROOT)


def test_a_plain_number_is_the_weight() -> None:
    pairs, answers = [record(said("4"))] * 2, [said("4"), said("5")]
    entries: list[dict[str, Any]] = [{"exact_match": 2, "brief": 1.0}, {"exact_match": {"weight": 2.0}, "brief": 1.0}]
    assert [Rewards(entry, None)(pairs, answers)[0] for entry in entries] == [[2.99, 0.99]] * 2


def test_every_ready_made_reward_is_described_with_its_options() -> None:
    page = (ROOT / "docs/alignment.md").read_text()
    for name, kind in READY.items():
        [line] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        options = {field.alias or key for key, field in kind.model_fields.items()} - {"weight"}
        assert " ".join((kind.__doc__ or "").split()) in line and all(f"`{option}`" in line for option in options)
