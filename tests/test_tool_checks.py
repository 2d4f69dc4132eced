"""Checks on tool calls, results, reasoning and weights, and how all other checks and repairs read these fields."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from builders.glaive import glaive
from builders.records import KEY, LONG, Record, ask, call, chat, pair, placed, result, rich, said, tool, user
from conftest import SHARED_DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.core.messages import FIELDS
from dagster_project.core.records import content_id
from dagster_project.core.stored_rows import StoredRows
from dagster_project.core.tool_schemas import arguments_schema
from dagster_project.curation.checks.checks import Judgement, Rules, judge
from dagster_project.curation.checks.findings import document
from dagster_project.curation.checks.overlaps import GROUPED
from dagster_project.curation.checks.repair import REPAIRS, repair
from dagster_project.curation.checks.review import queue
from dagster_project.curation.checks.token_counts import ESTIMATED, Tokens
from dagster_project.curation.checks.tool_checks import unmatched
from dagster_project.curation.sources.benchmarks import Item
from dagster_project.curation.write_checked import write_rows
from dagster_project.views.data_quality_terminal import check_text

calm = settings(deadline=None, max_examples=40)


def judged(
    *records: Record, held_out: Sequence[Item] = (), tokens: Tokens = ESTIMATED, rules: Rules | None = None
) -> Judgement:
    kind = "preferences" if any("rejected" in record for record in records) else "examples"
    return judge(placed(list(records)), held_out, rules or Rules(), tokens, kind=kind)  # type: ignore[arg-type]


def fact(check: str, record: Record) -> Any:
    return judged(record).facts.get(check, {}).get(0)


def turns(*answers: Record) -> list[Record]:
    """A call, its result and the answer for each."""
    return [message for answer in answers for message in (user(), answer, result(), said())]


# --- invalid_tool_call

COUNT = tool("count", start="integer", words="array")


@pytest.mark.parametrize(
    ("given_call", "tools", "kind"),
    [
        (call(), [tool()], None),
        (call({"city": "Oslo", "unit": "C"}), [tool()], None),
        (call(name="wether"), [tool()], "unknown tool: 'wether'"),
        (call(), None, "no tools are defined: 'weather'"),
        (call("city=Oslo"), [tool()], "arguments are not a JSON object: 'city=Oslo'"),
        (call([1]), [tool()], "arguments are not a JSON object: '[1]'"),
        (call({}), [tool()], "arguments do not fit: weather: $: 'city' is a required property"),
        (call({"city": 3}), [tool()], "arguments do not fit: weather: $.city: 3 is not of type 'string'"),
        (call({"start": 1, "words": ["a"]}, "count"), [tool(), COUNT], None),
        (
            call({"start": True, "words": []}, "count"),
            [COUNT],
            "arguments do not fit: count: $.start: True is not of type 'integer'",
        ),
        (
            call(),
            [tool(city="town")],
            "broken schema: weather: $.properties.city.type: 'town' is not valid under any of the given schemas",
        ),
        (call(), [{"type": "function", "function": {"name": "weather"}}], None),
        (call(), [{"type": "function", "function": {"name": "weather", "parameters": {}}}], None),
        (
            call(),
            [{"type": "function", "function": {"name": "weather", "parameters": ["city"]}}],
            "broken schema: weather: expected an object, found list",
        ),
        (
            call(),
            [{"name": "weather", "parameters": {"required": ["town"]}}],
            "arguments do not fit: weather: $: 'town' is a required property",
        ),
        (call(), [tool(city="str")], None),
        (
            call({"city": 1}),
            [tool(city="str, optional")],
            "arguments do not fit: weather: $.city: 1 is not of type 'string'",
        ),
        (call({"city": ["Oslo"]}), [tool(city="List[str]")], None),
        (call({"city": "Oslo"}), [tool(city="Optional[int]")], None),
        (call({"city": {}}), [tool(city="dict")], None),
    ],
)
def test_a_call_must_fit_its_tool(given_call: Record, tools: list[Record] | None, kind: str | None) -> None:
    record = rich(user(), said("", given_call), tools=tools)
    assert fact("invalid_tool_call", record) == kind
    assert judged(record).reason == ["invalid_tool_call" if kind else None]


def test_a_tool_that_the_system_prompt_describes_is_known() -> None:
    system = {"role": "system", "content": "You can call weather(city)."}
    assert fact("invalid_tool_call", rich(system, user(), said("", call()))) is None
    assert (
        fact("invalid_tool_call", rich(system, user(), said("", call("Oslo"))))
        == "arguments are not a JSON object: 'Oslo'"
    )


def test_a_wrong_call_of_weight_0_is_not_a_fault() -> None:
    wrong = said("", call(name="wether"), weight=0.0)
    assert (
        fact("invalid_tool_call", rich(user(), wrong, result("no such tool"), said("", call()), tools=[tool()])) is None
    )
    rejected = {
        **pair(),
        "messages": [user(), said("", call())],
        "rejected": [said("", call(name="wether"))],
        "tools": [tool()],
    }
    assert fact("invalid_tool_call", rejected) is None
    assert (
        fact("invalid_tool_call", {**rejected, "messages": [user(), said("", call(name="wether"))]})
        == "unknown tool: 'wether'"
    )


@pytest.mark.parametrize("where", ["https://schema.invalid/city.json", "#/$defs/missing", "#"])
def test_an_unresolvable_reference_is_a_broken_schema_and_is_not_downloaded(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("urllib.request.urlopen", download)
    monkeypatch.setattr("socket.socket.connect", download)
    referring = {"type": "function", "function": {"name": "weather", "parameters": {"$ref": where}}}
    assert fact("invalid_tool_call", rich(user(), said("", call()), tools=[referring])).startswith(
        "broken schema: weather: "
    )


def test_a_finding_quotes_the_call_with_private_values_masked() -> None:
    shown = fact(
        "invalid_tool_call", rich(user(), said("", call(f"mail ann.lee@kites.co.uk the key {KEY}")), tools=[tool()])
    )
    assert shown == "arguments are not a JSON object: 'mail [e-mail] the key [aws key]'"
    found = judged(rich(user(), said("", call({"city": {"mail": "ann.lee@kites.co.uk"}})), tools=[tool()]))
    assert "ann.lee" not in json.dumps(document("set", "messages", found, []))


def test_the_note_counts_the_kinds_of_fault() -> None:
    rows = [
        rich(user(f"Is it cold in {city}?"), said("", call(name=name)), tools=[tool()])
        for city, name in (("Oslo", "a"), ("Rome", "b"), ("Bonn", "weather"))
    ]
    assert (
        judged(*rows, rich(user(), said("", call({})), tools=[tool()])).verdicts["invalid_tool_call"].note
        == "unknown tool 2, arguments do not fit 1"
    )


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "properties", "required", "items", "$ref", "city", "enum"]), inner, max_size=3
        )
    ),
    max_leaves=10,
)


@given(nested, nested)
@calm
def test_any_definition_and_any_arguments_give_a_finding_or_none(parameters: Any, arguments: Any) -> None:
    definition = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    found = fact("invalid_tool_call", rich(user(), said("", call(arguments)), tools=[definition]))
    if not isinstance(arguments, dict) and arguments is not None:
        assert found.startswith("arguments are not a JSON object: ")
    assert found is None or found.partition(":")[0] in {
        "arguments are not a JSON object",
        "arguments do not fit",
        "broken schema",
    }


def test_values_nested_deeply_are_read() -> None:
    deep: Any = {"city": "Oslo"}
    for _ in range(300):
        deep = {"city": [deep]}
    assert judged(rich(user(), said("", call(deep)), tools=[tool()])).reason == ["invalid_tool_call"]
    assert judged(rich(user(), said("", call(deep)), tools=[tool(city="array")])).reason == [None]


# --- unanswered_tool_call, orphan_tool_result


@pytest.mark.parametrize(
    ("messages", "unanswered", "orphans"),
    [
        (turns(said("", call())), [], []),
        ([user(), said("", call(identity="a"))], [], []),
        ([user(), said("", call()), said()], ["weather"], []),
        ([user(), said("", call()), user(), said()], ["weather"], []),
        (
            [user(), said("", call(identity="a"), call(name="count", identity="b")), result(tool_call_id="b"), said()],
            ["weather"],
            [],
        ),
        ([user(), said("", call(), call(name="count")), result(), said()], ["count"], []),
        (
            [
                user(),
                said("", call(identity="a"), call(identity="b")),
                result(tool_call_id="b"),
                result(tool_call_id="a"),
                said(),
            ],
            [],
            [],
        ),
        ([user(), said("", call(identity="a")), result(tool_call_id="z"), said()], ["weather"], ["id z"]),
        ([user(), said("", call()), result(tool_call_id="z"), said()], [], []),
        ([user(), said("", call(identity="a")), result(), said()], [], []),
        ([user(), said("", call()), result(), result("twice"), said()], [], ["twice"]),
        ([user(), said("Hm."), result("alone"), said()], [], ["alone"]),
        ([user(), said('{"name": "weather"}'), result(), said()], [], []),
        ([user(), said("<tool_call>weather</tool_call>"), result(), said()], [], []),
        ([user(), said("Action: weather[Oslo]"), result(), said()], [], []),
        ([user(), said("", call(identity="a")), user("Hurry"), result(tool_call_id="a"), said()], [], []),
        ([*turns(said("", call(identity="a"))), *turns(said("", call(identity="a")))], [], []),
        ([user(), said("", call()), result()], [], []),
        ([], [], []),
    ],
)
def test_results_are_matched_with_calls_by_id_or_by_position(
    messages: list[Record], unanswered: list[str], orphans: list[str]
) -> None:
    found = unmatched(messages)
    assert (found.calls, found.results) == (unanswered, orphans)


@given(st.data(), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.booleans())
@calm
def test_a_missing_and_an_extra_result_are_found_in_any_conversation(
    data: st.DataObject, sizes: list[int], with_ids: bool
) -> None:
    messages: list[Record] = []
    for turn, size in enumerate(sizes):
        names = [f"c{turn}{i}" if with_ids else None for i in range(size)]
        results = [result(f"{turn} {i}", **({"tool_call_id": name} if name else {})) for i, name in enumerate(names)]
        messages += [
            user(),
            said("", *(call(identity=name) for name in names)),
            *(data.draw(st.permutations(results))),
            said(),
        ]
    assert (unmatched(messages).calls, unmatched(messages).results) == ([], [])
    at = data.draw(st.sampled_from([i for i, message in enumerate(messages) if message["role"] == "tool"]))
    fewer, more = [*messages[:at], *messages[at + 1 :]], [*messages[: at + 1], messages[at], *messages[at + 1 :]]
    assert (len(unmatched(fewer).calls), unmatched(fewer).results) == (1, [])
    assert (unmatched(more).calls, len(unmatched(more).results)) == ([], 1)


# --- missing_reasoning, untrained_example


def test_the_minority_of_rows_with_or_without_reasoning_is_listed_and_kept() -> None:
    with_trace = [
        rich(user(f"Is {city} cold?"), said(reasoning_content="It lies north."))
        for city in ("Oslo", "Bergen", "Narvik")
    ]
    without = [ask(f"Where is {city}?") for city in ("Rome", "Nice", "Bari")]
    assert judged(*with_trace, without[0]).broken["missing_reasoning"] == [3]
    assert judged(with_trace[0], *without).broken["missing_reasoning"] == [0]
    assert judged(*with_trace, *without).broken["missing_reasoning"] == [3, 4, 5]
    found = judged(*with_trace, without[0]).verdicts["missing_reasoning"]
    assert (found.note, found.severity, found.dropped) == ("3 rows have reasoning, 1 has none", "warn", 0)
    for uniform in (with_trace, without):
        assert (
            judged(*uniform).verdicts["missing_reasoning"].passed,
            judged(*uniform).verdicts["missing_reasoning"].note,
        ) == (True, "")


def test_a_trace_in_one_answer_is_enough_and_blank_ones_are_none() -> None:
    last = rich(user(), said(), user("Sure?"), said(reasoning_content="It lies north."))
    blank = rich(user("Is it far?"), said(reasoning_content=" \n"))
    assert judged(last, ask()).broken["missing_reasoning"] == [1]
    assert "missing_reasoning" not in judged(blank, ask()).broken
    assert "missing_reasoning" not in judged(last, chat(("assistant", "Some plain text."), kind="text")).broken


def test_a_conversation_of_which_nothing_is_trained_is_dropped() -> None:
    assert judged(rich(user(), said(weight=0.0), user("Sure?"), said("Yes.", weight=0.0))).reason == [
        "untrained_example"
    ]
    assert judged(rich(user(), said(weight=0.0), user("Sure?"), said("Yes."))).reason == [None]
    untrained_pair = {**pair(), "messages": [user(), said(weight=0.0)]}
    assert judged(untrained_pair).reason == [None]


# --- checks that read plain text too


def test_calls_and_results_in_turn_are_valid_roles_and_a_call_is_a_response() -> None:
    parallel = rich(
        user(),
        said("", call(identity="a"), call({"city": "Rome"}, identity="b")),
        result(tool_call_id="a"),
        result(tool_call_id="b"),
        said(),
        tools=[tool()],
    )
    assert judged(parallel, rich(user("And Rome?"), said("", call()), tools=[tool()])).reason == [None, None]
    assert judged(rich(user(), said("", reasoning_content="It lies north."))).reason == ["empty_response"]


def test_every_answer_that_is_trained_on_has_text() -> None:
    first = [("", {}), ("", {"weight": 0.0}), ("No.", {})]
    found = judged(*(rich(user(), said(text, **more), user("Sure?"), said("Yes.")) for text, more in first))
    assert found.reason == ["empty_response", None, None]
    empty = {**pair(), "messages": [user(), said(""), user("Sure?"), said("Yes.")]}
    assert [judged({**empty, "asked": asked}).broken.get("empty_response") for asked in (1, 3)] == [[0], None]


def test_rows_that_differ_in_tools_calls_or_reasoning_are_not_identical_and_only_other_answers_conflict() -> None:
    base = rich(user(), said("", call(identity="a")), tools=[tool()])
    other_id = rich(user(), said("", call(identity="b")), tools=[tool()])
    other_call = rich(user(), said("", call({"city": "Rome"}, identity="a")), tools=[tool()])
    other_tools = rich(user(), said("", call({"city": "Rome"})), tools=[tool(), COUNT])
    found = judged(base, copy.deepcopy(base), other_id, other_call, other_tools)
    assert found.broken["exact_duplicates"] == [1]
    assert found.broken["conflicting_responses"] == [3]
    traces = [rich(user(), said(reasoning_content=text)) for text in ("It lies north.", "It lies far north.")]
    assert judged(*traces).broken["conflicting_responses"] == [1]
    assert (
        judged(traces[0], rich(user(), said(reasoning_content="It lies north.", weight=1.0))).broken.get(
            "conflicting_responses"
        )
        is None
    )


def test_tools_are_the_same_in_any_order_of_keys() -> None:
    turned = [{"function": {key: tool()["function"][key] for key in ("parameters", "name")}, "type": "function"}]
    found = judged(rich(user(), said("", call()), tools=[tool()]), rich(user(), said("", call()), tools=turned))
    assert found.broken["exact_duplicates"] == [1]


def test_pairs_with_different_calls_or_reasoning_are_not_identical() -> None:
    def both(chosen: Record, rejected: Record) -> Record:
        return {**pair(), "messages": [user(), chosen], "rejected": [rejected], "tools": [tool()]}

    assert judged(both(said("", call()), said("", call({"city": "Rome"})))).reason == [None]
    assert judged(both(said("", call(identity="a")), said("", call(identity="b")))).reason == ["identical_pair"]
    assert judged(both(said(reasoning_content="North."), said(reasoning_content="South."))).reason == [None]
    assert judged(both(said(reasoning_content="North."), said(reasoning_content="north"))).reason == ["identical_pair"]


QUIZ = [
    Item(
        "quiz.jsonl:7",
        "Which planet do people sometimes call the red planet?",
        text="It is Mars, the fourth planet from the sun that we all share.",
    )
]


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (
            said(
                reasoning_content=f"Okay. They ask something else. {QUIZ[0].question} I recall that from a quiz. So it"
                f" is cold, I would say."
            ),
            "reasoning_content",
        ),
        (said(reasoning_content=f"Okay. {QUIZ[0].text} But they ask whether it is cold."), "reasoning_content"),
        (said("", call({"city": {"query": QUIZ[0].question}})), "tool_calls"),
        (said("", call({"city": ["Oslo", QUIZ[0].question]})), "tool_calls"),
    ],
)
def test_held_out_text_is_found_in_reasoning_and_in_arguments(answer: Record, part: str) -> None:
    found = judged(rich(user(), answer), held_out=QUIZ)
    (link,) = found.overlaps.links["benchmark_leakage"]
    assert (link.part, link.other) == (part, "quiz.jsonl:7")
    (shown,) = [
        one["matches"]
        for one in document("set", "messages", found, QUIZ)["findings"]
        if one["check"] == "benchmark_leakage"
    ]
    assert shown[0]["part"] == part
    assert shown[0]["text"][slice(*shown[0]["span"])] in {QUIZ[0].question.rstrip("?"), QUIZ[0].text.rstrip(".")}


def test_held_out_text_late_in_a_long_trace_is_shown() -> None:
    trace = " ".join(f"Step {i} adds {i * 7} to {i * 3}." for i in range(3000))
    found = judged(
        rich(user(), said(reasoning_content=f"{trace} {QUIZ[0].question} {trace[::-1]}")),
        held_out=QUIZ,
        rules=Rules(max_tokens=10**6),
    )
    (shown,) = [
        one["matches"][0]
        for one in document("set", "messages", found, QUIZ, width=240)["findings"]
        if one["check"] == "benchmark_leakage"
    ]
    assert shown["text"][slice(*shown["span"])] == QUIZ[0].question.rstrip("?")


def test_nearly_the_same_reasoning_or_arguments_share_a_group_and_are_reported() -> None:
    trace = (
        "The user wants the number of kites. Each box holds twelve kites and there are seven boxes, so I multiply"
        " twelve by seven and get eighty-four."
    )
    other = trace.replace("boxes, so", "boxes here, so")
    found = judged(
        rich(user("How many kites are there?"), said("84", reasoning_content=trace)),
        rich(user("Zwölf mal sieben?"), said("84", reasoning_content=other)),
        ask(LONG),
    )
    (link,) = found.overlaps.links["near_duplicates"]
    assert (link.row, link.other, link.part) == (1, 0, "reasoning_content")
    assert list(found.cluster) == [0, 0, 2]
    body = "Dear all, the kite festival begins on Monday at nine in the big park."
    calls = [
        rich(
            user(prompt),
            said("", call({"to": to, "body": body}, "mail")),
            tools=[tool("mail", to="string", body="string")],
        )
        for prompt, to in (("Tell them.", "all"), ("Write it out to everyone please", "staff"))
    ]
    sent = judged(*calls)
    assert [(link.part, link.row) for name in ("near_duplicates", GROUPED) for link in sent.overlaps.links[name]] == [
        ("tool_calls", 1)
    ]
    assert list(sent.cluster) == [0, 0]


def test_a_copied_trace_in_two_upstream_splits_is_a_leak() -> None:
    trace = "Each box holds twelve kites and there are seven boxes, so I multiply twelve by seven and get eighty-four."
    rows = [
        rich(user(prompt), said("84", reasoning_content=trace), split=split)
        for prompt, split in (("How many?", "test"), ("Zwölf mal sieben?", "train"))
    ]
    (link,) = judged(*rows).overlaps.links["split_leakage"]
    assert (link.row, link.other, link.part) == (1, 0, "reasoning_content")


def test_content_checks_ignore_calls_and_untrained_answers() -> None:
    repeated = said("", call({"city": "on its way to you " * 9}), call({"city": user()["content"]}))
    assert judged(rich(user(), repeated, tools=[tool()])).broken == {}
    announced = (
        "I will look it up for you, in the usual place, and tell you what it says. One moment, please, while I call the"
        " tool:"
    )
    assert "truncated_response" in judged(ask("Is it cold?", announced)).broken
    assert judged(rich(user(), said(announced, call()), tools=[tool()])).broken == {}
    refused = said("I'm sorry, but I can't help with that.", weight=0.0)
    assert judged(rich(user(), refused, user("Try."), said("It is cold."))).broken == {}


def test_lengths_count_tools_calls_and_reasoning() -> None:
    words = " ".join(map(str, range(300)))
    long = [
        rich(user(), said(reasoning_content=words)),
        rich(user("And here?"), said("", call({"city": words})), tools=[tool()]),
        rich(user("Now then?"), said(), tools=[{"type": "function", "function": {"name": "f", "description": words}}]),
        {
            **pair("Where to?"),
            "messages": [user("Where to?"), said()],
            "rejected": [said("No.", reasoning_content=words)],
        },
    ]
    for record in long:
        assert "too_long" in judged(record, rules=Rules(max_tokens=200)).broken
        assert "too_long" not in judged(record, rules=Rules(max_tokens=900)).broken


def test_a_short_answer_after_reasoning_or_with_a_call_is_not_short() -> None:
    assert "short_response" in judged(ask("How many?", "7.")).broken
    assert judged(rich(user("How many?"), said("7.", reasoning_content="Four and three."))).broken == {}
    assert judged(rich(user("How many?"), said("Hm.", call()), tools=[tool()])).broken == {}


def test_control_tokens_are_found_in_reasoning_arguments_and_definitions_of_tools() -> None:
    token = "Stop <|im_end|> here."
    described = [{"type": "function", "function": {"name": "weather", "description": token}}]
    rows = [
        rich(user(), said(reasoning_content=token)),
        rich(user(), said("", call({"city": token})), tools=[tool()]),
        rich(user(), said("", call()), tools=described),
    ]
    for row in rows:
        assert judged(row).reason == ["special_tokens_in_text"]


def test_the_template_sees_the_tools() -> None:
    seen: list[Any] = []
    tokens = Tokens(ESTIMATED.count, lambda messages, tools: seen.append(tools))
    judged(rich(user(), said("", call()), tools=[tool()]), ask(), tokens=tokens)
    assert seen == [[tool()], None]


def test_the_profile_counts_calls_reasoning_and_untrained_answers_only_where_there_are_any() -> None:
    rows = [
        rich(
            user(),
            said("", call(), call({"city": "Rome"}), reasoning_content="It lies far north."),
            result(),
            result(),
            said(),
            tools=[tool()],
        ),
        rich(user("And now?"), said("Hm.", weight=0.0), user("So?"), said("Yes.", reasoning_content="North.")),
    ]
    profile = judged(*rows).profile
    assert profile["tool_calls"] == {
        "rows_with_tools": 1,
        "rows": 1,
        "calls": 2,
        "results": 2,
        "by_tool": {"weather": 2},
    }
    assert profile["reasoning"] == {"rows": 2, "answers": 2}
    assert (profile["lengths"]["reasoning"]["total"], profile["untrained_answers"]) == (5, 1)
    shown = check_text(document("set", "messages", judged(*rows), []))
    for line in (
        "2 tool calls in 1 row, 2 results; 1 row with tools",
        "reasoning in 2 answers of 2 rows",
        "1 answer with weight 0",
    ):
        assert line in shown
    plain = judged(ask()).profile
    assert not {"tool_calls", "reasoning", "untrained_answers"} & plain.keys() and "reasoning" not in plain["lengths"]


def test_the_review_file_and_findings_show_calls_and_reasoning() -> None:
    rows = [
        rich(user(), said("", call({"city": city}), reasoning_content="Let me see."), tools=[tool()])
        for city in ("Oslo", "Rome")
    ]
    found = judged(*rows)
    assert '""name"":""weather"",""arguments"":{""city"":""Rome""}' in queue(found.records, found.waiting)
    (shown,) = [
        one["matches"][0]
        for one in document("set", "messages", found, [])["findings"]
        if one["check"] == "conflicting_responses"
    ]
    assert (
        '"arguments":{"city":"Rome"}' in shown["text"]
        and '"arguments":{"city":"Oslo"}' in shown["other_text"]
        and "Let me see." in shown["text"]
    )


def test_clean_files_have_every_field(tmp_path: Path) -> None:
    answer = said("", call(identity="a"), call("Rome", identity="b"), reasoning_content="Hm.", weight=0.0)
    rows = [
        rich(
            user(), answer, result(tool_call_id="a", name="weather"), result(tool_call_id="b"), said(), tools=[tool()]
        ),
        ask(),
    ]
    pairs = [
        {
            **pair(),
            "messages": [user(), said("", call())],
            "rejected": [said("", call({"city": "Rome"}))],
            "tools": [tool()],
        }
    ]
    write_rows(judged(*rows, rules=Rules()), tmp_path / "rows.jsonl", None)
    write_rows(judged(*pairs), tmp_path / "pairs.jsonl", None)
    first, second, both = (
        json.loads(line) for name in ("rows", "pairs") for line in (tmp_path / f"{name}.jsonl").open()
    )
    assert first == {"messages": rows[0]["messages"], "tools": [tool()]}
    assert second == {"messages": rows[1]["messages"]}
    assert both == {
        "prompt": [user()],
        "chosen": pairs[0]["messages"][1:],
        "rejected": pairs[0]["rejected"],
        "tools": [tool()],
    }


# --- repairs

FAULTS = (
    "on its way",
    "Write to ann.lee@kites.co.uk",
    f"key {KEY}",
    "cafe\u0301 noir",
    "ki\u200bte",
    "Yes.<|endoftext|>",
    "cafÃ© noir",
    "4111 1111 1111 1111",
)
fault = st.sampled_from(FAULTS)
arguments = (
    st.dictionaries(
        st.sampled_from(["city", "phone", "card"]),
        st.recursive(
            fault | st.sampled_from([3, 4111111111111111, True, None, 2.5]),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
            max_leaves=4,
        ),
        max_size=2,
    )
    | fault
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "reasoning_content": fault,
        "tool_calls": st.lists(
            st.builds(call, arguments, st.sampled_from(["weather", "mail"]), st.none() | st.sampled_from(["a", "b"])),
            min_size=1,
            max_size=2,
        ),
        "name": st.just("weather"),
        "tool_call_id": st.just("a"),
        "weight": st.just(0.0),
    },
)


def shape(value: Any) -> Any:
    """A value without what texts and numbers say."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape(one) for one in value]
    return value if value is None or isinstance(value, bool) else "text or number"


@given(st.lists(st.tuples(fault, fields), min_size=1, max_size=3), st.booleans())
@calm
def test_a_repair_keeps_every_field_and_the_id_is_that_of_the_new_content(
    answers: list[tuple[str, Record]], is_pair: bool
) -> None:
    messages = [
        message for text, more in answers for message in (user(), {"role": "assistant", "content": text, **more})
    ]
    record = {**rich(*messages, tools=[tool()]), "source": "rows.jsonl", "source_row": 0}
    if is_pair:
        record |= {
            "asked": len(messages) - 1,
            "rejected": [said("No.", call({"city": answers[0][0]}), reasoning_content=answers[0][0])],
            "margin": None,
        }
        record["example_id"] = content_id(record)
    before = copy.deepcopy(record)
    (new,) = repair(StoredRows([record]), [*REPAIRS], {}, []).records
    assert record == before
    assert new["tools"] == record["tools"]
    sides = ("messages", "rejected") if is_pair else ("messages",)
    for side in sides:
        assert len(new[side]) == len(record[side])
        for old_message, message in zip(record[side], new[side], strict=True):
            assert [*message] == [*old_message] and shape(message) == shape(old_message)
            for kept in (
                field for field in FIELDS if field not in {"reasoning_content", "tool_calls"} and field in message
            ):
                assert message[kept] == old_message[kept]
            for old_call, new_call in zip(
                old_message.get("tool_calls", ()), message.get("tool_calls", ()), strict=True
            ):
                assert {**old_call, "function": None} == {**new_call, "function": None} and old_call["function"][
                    "name"
                ] == new_call["function"]["name"]
    assert new["example_id"] == content_id(new)
    assert (new["example_id"] != record["example_id"]) == ("repaired" in new)


@pytest.mark.parametrize("text", FAULTS)
@pytest.mark.parametrize("where", ["content", "reasoning", "argument", "text argument"])
def test_a_fault_is_found_and_repaired_wherever_it_is(text: str, where: str) -> None:
    answer = {
        "content": said(text),
        "reasoning": said(reasoning_content=text),
        "argument": said("", call({"city": text})),
        "text argument": said("", call(text)),
    }[where]
    row = rich(user(), answer, tools=[tool()])
    (plain,), (new,) = (
        repair(StoredRows([{**one, "source": "", "source_row": 0}]), [*REPAIRS], {}).records
        for one in (ask(answer=text), row)
    )
    assert new.get("repaired") == plain.get("repaired")
    assert ("repaired" in new) == (text != FAULTS[0])
    assert "repaired" not in new or (
        text not in json.dumps(new, ensure_ascii=False) and new["source_id"] == row["example_id"]
    )


def test_the_name_of_an_argument_identifies_its_value_and_a_masked_number_becomes_text() -> None:
    row = rich(user(), said("", call({"phone": "01511234567", "card": 4111111111111111, "order": "01511234567"})))
    masked = rich(user(), said("", call({"phone": "[PHONE]", "card": "[CARD]", "order": "01511234567"})))
    assert repair(StoredRows([row]), ["pii"], {}).records[0]["messages"] == masked["messages"]


# --- real data


@pytest.fixture(scope="module")
def real_rows() -> list[Record]:
    path: Path = SHARED_DATA / "glaive_toolcall_en_demo.json"
    if not path.is_file():
        pytest.skip(f"no real data at {path}")
    return glaive(path)


def test_of_300_real_rows_one_call_breaks_its_schema_and_all_results_fit(real_rows: list[Record]) -> None:
    found = judge(real_rows, [], Rules())
    assert {
        name: found.broken.get(name)
        for name in (
            "invalid_tool_call",
            "unanswered_tool_call",
            "orphan_tool_result",
            "invalid_roles",
            "empty_response",
        )
    } == {
        "invalid_tool_call": [259],  # a list of numbers where the schema says number
        "unanswered_tool_call": None,
        "orphan_tool_result": None,
        "invalid_roles": None,
        "empty_response": None,
    }
    assert found.profile["tool_calls"]["calls"] == sum(
        "tool_calls" in m for r, why in zip(real_rows, found.reason, strict=True) if not why for m in r["messages"]
    )


def test_each_fault_planted_in_a_real_call_is_found(real_rows: list[Record]) -> None:
    """A wrong name, a required argument left out, text as arguments, a result
    lost, a result repeated: every time, and nothing else."""
    sound = [row for i, row in enumerate(real_rows) if i != 259]
    planted: list[Record] = []
    expected: list[str] = []
    for row in sound:
        for at, message in enumerate(row["messages"]):
            if message["role"] == "tool":
                planted += [
                    {**row, "messages": row["messages"][:at] + row["messages"][at + 1 :]},
                    {**row, "messages": row["messages"][: at + 1] + row["messages"][at:]},
                ]
                expected += ["unanswered_tool_call", "orphan_tool_result"]
            for function in (made["function"] for made in message.get("tool_calls", ())):
                parameters = next(
                    one["function"]["parameters"] for one in row["tools"] if one["function"]["name"] == function["name"]
                )
                wrong = [
                    {**function, "name": function["name"] + "s"},
                    {**function, "arguments": json.dumps(function["arguments"])},
                ]
                wrong += [
                    {**function, "arguments": {k: v for k, v in function["arguments"].items() if k != name}}
                    for name in parameters.get("required", ())
                ]
                for one in wrong:
                    changed = {**message, "tool_calls": [{"type": "function", "function": one}]}
                    planted.append({**row, "messages": [*row["messages"][:at], changed, *row["messages"][at + 1 :]]})
                    expected.append("invalid_tool_call")
    found = judge([{**row, "source_row": i} for i, row in enumerate(planted)], [], Rules())
    names = ("invalid_tool_call", "unanswered_tool_call", "orphan_tool_result")
    assert len(planted) > 1000
    assert {name: found.broken[name] for name in names} == {
        name: [i for i, one in enumerate(expected) if one == name] for name in names
    }


@pytest.mark.parametrize(
    "pattern", ["^(a+)+$", "^(a|a)*$", "a?" * 40 + "a" * 40, "^" + "a+" * 9 + "$", "(a|a)" * 40 + "b"]
)
def test_a_pattern_that_would_take_years_is_not_checked(pattern: str) -> None:
    value = "a" * 39 + "!"
    by_name = {"patternProperties": {pattern: {"type": "integer"}}, "additionalProperties": False}
    for parameters in ({"properties": {"x": {"pattern": pattern}}}, by_name):
        assert arguments_schema({"type": "object", **parameters}).problem({"x": value, value: "1"}) is None


@pytest.mark.parametrize(
    "pattern", [r"^\d{4}-\d{2}-\d{2}$", "^[^@]+@[^@]+$", "^(red|green|blue|black|white|grey)$", "^https?://"]
)
def test_usual_patterns_are_checked(pattern: str) -> None:
    schema = arguments_schema({"type": "object", "properties": {"x": {"pattern": pattern}}})
    found = schema.problem({"x": "a" * 40})
    assert found is not None and "does not match" in found[1]
