"""Tool calls, tool definitions, traces, weights and content parts of every
layout -> canonical messages; nothing of them is dropped silently."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from builders.files import FILE_WRITERS, jsonl
from builders.sources import to_pairs, to_records
from conftest import SHARED_DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.core.errors import InputError
from dagster_project.core.messages import calls
from dagster_project.curation.check_files import check_paths
from dagster_project.curation.checks.checks import Rules, judge
from dagster_project.curation.sources.files import Row, read_rows
from dagster_project.curation.sources.formats import as_record, pairs_of, records_of
from dagster_project.curation.sources.python_values import json_type, python_calls, python_value

ASKED = {"role": "user", "content": "Is it cold in Oslo?"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(name: str = "weather", arguments: Any = None, identity: str | None = None) -> dict[str, Any]:
    """A canonical call."""
    given = {"city": "Oslo"} if arguments is None else arguments
    return {
        "type": "function",
        **({"id": identity} if identity else {}),
        "function": {"name": name, "arguments": given},
    }


def answer(content: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Reads rows as examples."""

    def read(*rows: Any, **options: Any) -> list[dict[str, Any]]:
        return to_records(jsonl(tmp_path / "a.jsonl", *rows), "a.jsonl", **options)[1]

    return read


@pytest.fixture
def one(read: Callable[..., list[dict[str, Any]]]) -> Callable[..., list[dict[str, Any]]]:
    """The messages of a conversation in OpenAI's layout, after the user's question."""
    return lambda *messages, **row: read({"messages": [ASKED, *messages], **row})[0]["messages"][1:]


def problem(record: dict[str, Any]) -> str:
    return str(json.loads(record["meta"]).get("problem", "")).partition(" (line ")[0]


# Calls


@pytest.mark.parametrize(
    "source",
    [
        {
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
            ]
        },
        {"tool_calls": [{"id": "c1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}], "content": ""},
        {"tool_calls": [{"id": "c1", "name": "weather", "arguments": {"city": "Oslo"}}], "function_call": None},
        {"tool_calls": '[{"id": "c1", "name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}]'},
        {"tool_calls": [{"id": "c1", "name": "weather", "args": {"city": "Oslo"}, "type": "tool_call"}]},
        {"tool_calls": [{"id": "c1", "name": "weather", "input": {"city": "Oslo"}}]},
        {"tool_calls": [{"id": "c1", "name": "weather", "arguments": None, "parameters": {"city": "Oslo"}}]},
    ],
)
def test_a_call_has_one_canonical_form_for_all_spellings(source: dict[str, Any], one: Callable[..., Any]) -> None:
    assert one({"role": "assistant", **source}) == [answer(tool_calls=[call(identity="c1")])]


def test_text_next_to_a_call_and_parallel_calls_are_kept_in_order(one: Callable[..., Any]) -> None:
    source = [{"id": i, "function": {"name": "weather", "arguments": json.dumps({"city": i})}} for i in ("a", "b")]
    assert one(answer("Wait.", tool_calls=source)) == [
        answer("Wait.", tool_calls=[call(arguments={"city": i}, identity=i) for i in ("a", "b")])
    ]


def test_the_older_function_call_and_the_role_function_are_a_call_and_a_tool_result(one: Callable[..., Any]) -> None:
    source = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    assert one(source, {"role": "function", "name": "weather", "content": "-3"}) == [
        answer(tool_calls=[call()]),
        {"role": "tool", "content": "-3", "name": "weather"},
    ]


def test_a_tool_result_keeps_its_id_its_name_and_an_object_as_json(one: Callable[..., Any]) -> None:
    result = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": {"degrees": -3}}
    assert one(result) == [{"role": "tool", "content": '{"degrees": -3}', "tool_call_id": "c1", "name": "weather"}]


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (None, {}),
        ("", {}),
        ("{}", {}),
        ("not JSON", "not JSON"),
        ("[1]", "[1]"),
        ([1], "[1]"),
        (3, "3"),
        ('{"a": NaN}', '{"a": NaN}'),
        ('{"a": 1, "a": 2}', '{"a": 1, "a": 2}'),
        ('{"a": "\\ud83d"}', '{"a": "\\ud83d"}'),
        ("[" * 5000, "[" * 5000),
    ],
)
def test_arguments_that_are_no_object_are_kept_as_text(arguments: Any, kept: Any, one: Callable[..., Any]) -> None:
    (said,) = one(answer(tool_calls=[{"name": "weather", "arguments": arguments}]))
    assert said["tool_calls"] == [call(arguments=kept)]


def test_a_result_without_a_call_and_a_call_without_an_id_are_kept(read: Callable[..., Any]) -> None:
    rows = [
        {"messages": [ASKED, {"role": "tool", "content": "x", "tool_call_id": "c9"}, answer("So.")]},
        {"messages": [ASKED, answer(tool_calls=[call()])]},
    ]
    assert [problem(record) for record in read(*rows)] == ["", ""]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (answer(tool_calls={"a": [[]]}), "a tool call has no name"),
        (answer(tool_calls=[3]), "a tool call must be an object, found int"),
        (answer(tool_calls=3), "expected tool calls, found int"),
        (answer(tool_calls="weather, please"), "a tool call is text that is not JSON"),
        (answer(tool_calls=[{"function": {"arguments": "{}"}}]), "a tool call has no name"),
        (answer(tool_calls=[call(identity="a") | {"id": [1]}]), "the id of a tool call must be text, found list"),
        (answer(tool_calls=[call()], function_call={"name": "weather"}), "both tool_calls and function_call"),
        ({**ASKED, "tool_calls": [call()]}, "tool calls in a message that is not the assistant's"),
    ],
)
def test_a_call_that_cannot_be_read_makes_its_row_malformed(
    message: dict[str, Any], reason: str, read: Callable[..., Any]
) -> None:
    assert problem(read({"messages": [ASKED, message]})[0]) == reason


# Tools


@pytest.mark.parametrize(
    "tools",
    [
        [WEATHER],
        [WEATHER["function"]],
        json.dumps([WEATHER]),
        json.dumps(WEATHER["function"]),
        [json.dumps(WEATHER)],
        WEATHER,
        [{"type": "function", **WEATHER["function"]}],
        [{("input_schema" if key == "parameters" else key): value for key, value in WEATHER["function"].items()}],
        [{("inputSchema" if key == "parameters" else key): value for key, value in WEATHER["function"].items()}],
        [{"name": "weather", "parameters": json.dumps(WEATHER["function"]["parameters"])}],
    ],
)
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_definitions_have_one_canonical_form_for_all_spellings(key: str, tools: Any, read: Callable[..., Any]) -> None:
    (record,) = read({"messages": [ASKED, answer("Yes.")], key: tools})
    assert (record["tools"], record["meta"]) == ([WEATHER], "{}")


@pytest.mark.parametrize("tools", [None, "", " ", "[]", [], "null", {}])
def test_no_tools_are_no_tools_in_any_spelling(tools: Any, read: Callable[..., Any]) -> None:
    plain, record = read({"messages": [ASKED, answer("Yes.")]}, {"messages": [ASKED, answer("Yes.")], "tools": tools})
    assert "tools" not in record and record["example_id"] == plain["example_id"]


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("a hammer", "tools is text that is not JSON"),
        (3, "tools must be a list of functions, found int"),
        ([3], "each of tools must be an object, found int"),
        (["hammer"], "tools holds text that is not JSON"),
        ([{"type": "code_interpreter"}], "tools holds a tool that is not a function"),
        ([{"description": "nameless"}], "tools holds a function without a name"),
    ],
)
def test_tools_that_cannot_be_read_make_a_conversation_malformed(
    tools: Any, reason: str, read: Callable[..., Any]
) -> None:
    assert problem(read({"messages": [ASKED, answer("Yes.")], "tools": tools})[0]) == reason


def test_a_column_named_tools_that_defines_none_stays_in_meta_where_rows_are_no_conversations(
    read: Callable[..., Any],
) -> None:
    (record,) = read({"question": "How?", "answer": "Gently.", "tools": "a hammer"})
    assert (problem(record), json.loads(record["meta"]), record["ignored"]) == ("", {"tools": "a hammer"}, ["tools"])


def test_records_that_differ_in_their_tools_have_different_ids(read: Callable[..., Any]) -> None:
    rows = [
        {"messages": [ASKED, answer("Yes.")], **more}
        for more in ({}, {"tools": [WEATHER]}, {"tools": [{"name": "clock"}]})
    ]
    assert len({record["example_id"] for record in read(*rows)}) == 3


# Layouts of function calling


def test_sharegpt_calls_and_observations(read: Callable[..., Any]) -> None:
    said = [
        ("human", "Is it cold?"),
        ("function_call", '{"name": "weather", "arguments": {"city": "Oslo"}}'),
        ("function_call", '[{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}]'),
        ("observation", "-3"),
        ("gpt", "Yes."),
    ]
    (record,) = read(
        {
            "conversations": [{"from": who, "value": text} for who, text in said],
            "tools": json.dumps([WEATHER["function"]]),
        }
    )
    assert record["tools"] == [WEATHER]
    assert record["messages"] == [
        {"role": "user", "content": "Is it cold?"},
        answer(tool_calls=[call(), call(arguments={"city": "Rome"})]),
        {"role": "tool", "content": "-3"},
        answer("Yes."),
    ]


HERMES = """You are a function calling AI model. \
You are provided with function signatures within <tools> </tools> XML tags. \
You may call one or more functions.
<tools>
%s
</tools>
For each function call return a JSON object:
<tool_call>
{'arguments': <args-dict>, 'name': <function-name>}
</tool_call>"""


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\r"])
def test_a_line_end_of_unicode_inside_a_definition_does_not_divide_it(end: str, read: Callable[..., Any]) -> None:
    """A tool a line, as JSON."""
    tools = [{"name": name, "description": f"one{end}two"} for name in ("f", "g")]
    lines = "\r\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    (record,) = read({"messages": [{"role": "system", "content": HERMES % lines}, ASKED, answer("Yes.")]})
    assert [tool["function"] for tool in record["tools"]] == tools


@pytest.mark.parametrize(
    "written", [json.dumps([WEATHER]), json.dumps(WEATHER), f"{json.dumps(WEATHER)}\n", repr([WEATHER])]
)
@pytest.mark.parametrize("layout", ["sharegpt", "messages"])
def test_hermes(written: str, layout: str, read: Callable[..., Any]) -> None:
    said = [
        ("system", f"Be brief.\n\n{HERMES % written}"),
        ("user", "Is it cold?"),
        (
            "assistant",
            "I look.\n<tool_call>\n{'arguments': {'city': 'Oslo'}, 'name':"
            " 'weather'}\n</tool_call>\n<tool_call>\n"
            '{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        ),
        ("tool", "<tool_response>\n-3\n</tool_response>\n<tool_response>\n20\n</tool_response>"),
        ("assistant", "Yes."),
    ]
    names = {"user": "human", "assistant": "gpt"}
    turns = (
        {"messages": [{"role": who, "content": text} for who, text in said]}
        if layout == "messages"
        else {"conversations": [{"from": names.get(who, who), "value": text} for who, text in said]}
    )
    (record,) = read(turns)
    assert record["tools"] == [WEATHER]
    assert record["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it cold?"},
        answer("I look.", tool_calls=[call(), call(arguments={"city": "Rome"})]),
        {"role": "tool", "content": "-3"},
        {"role": "tool", "content": "20"},
        answer("Yes."),
    ]
    assert json.loads(record["meta"]) == {"system_prompt": said[0][1]}, "the prompt is kept as it was"


def test_a_text_about_tags_is_text(read: Callable[..., Any]) -> None:
    said = "Write <tool_call>your call</tool_call> or <tools>...</tools>."
    assert read({"messages": [ASKED, answer(said)]})[0]["messages"] == [ASKED, answer(said)]
    reason = problem(read({"messages": [ASKED, answer(said)], "tools": [WEATHER]})[0])
    assert reason == "a tool call is text that is not JSON", "where the conversation has tools, it is a call"


@pytest.mark.parametrize(
    "quoted", ["the <tool_call> tag", f"or <tool_call>{json.dumps({'name': 'weather'})}</tool_call>"]
)
def test_a_call_that_a_trace_quotes_is_part_of_the_trace(quoted: str, tmp_path: Path, read: Callable[..., Any]) -> None:
    called, said = (answer(f"<think>\n{quoted}\n</think>\n\n{rest}") for rest in (f"I look.\n{CALLING}", "Yes."))
    expected = [
        answer("I look.", reasoning_content=quoted, tool_calls=[call()]),
        answer("Yes.", reasoning_content=quoted),
    ]
    records = read(*({"messages": [ASKED, one], "tools": [WEATHER]} for one in (called, said)))
    assert [record["messages"][1] for record in records] == expected and not any(
        "ignored" in record for record in records
    )
    pair = pair_of(tmp_path, {"prompt": [ASKED], "chosen": [called], "rejected": [said], "tools": [WEATHER]})
    assert [*pair["chosen"], *pair["rejected"]] == expected


def test_text_around_a_result_and_a_call_that_is_not_closed_are_not_lost(read: Callable[..., Any]) -> None:
    result = {"role": "tool", "content": "Note: <tool_response>-3</tool_response>"}
    broken = answer('<tool_call>{"name": "weather"}</tool_call> <tool_call>{"name": "weather"')
    kept, malformed, text = read(
        {"messages": [ASKED, result], "tools": [WEATHER]},
        {"messages": [ASKED, broken], "tools": [WEATHER]},
        {"messages": [ASKED, broken]},
    )
    assert kept["messages"] == [ASKED, result] and text["messages"] == [ASKED, broken]
    assert problem(malformed) == "a tool call that is not closed"


TOOLACE = """You are an expert in composing functions. You are given a question.
Here is a list of functions in JSON format that you can invoke:
[{"name": "Market Trends API", "parameters": {"type": "dict", \
"properties": {"n": {"type": "float"}, "xs": {"type": "list"}}, "required": null}}].
Should you decide to return the function call(s).
NO other text MUST be included. """


def test_toolace(read: Callable[..., Any]) -> None:
    said = [
        ("user", "Trends?"),
        ("assistant", """[Market Trends API(n=-2.5, xs=["a, (b", true, None]), Market Trends API()]"""),
        ("tool", '[{"name": "Market Trends API", "results": {}}]'),
        ("assistant", "[Note] They rise."),
    ]
    (record,) = read({"system": TOOLACE, "conversations": [{"from": who, "value": text} for who, text in said]})
    parameters = {"type": "object", "properties": {"n": {"type": "number"}, "xs": {"type": "array"}}}
    assert record["tools"] == [
        {"type": "function", "function": {"name": "Market Trends API", "parameters": parameters}}
    ]
    assert [
        [(one.name, one.arguments) for one in calls(m)] for m in record["messages"] if m["role"] == "assistant"
    ] == [
        [("Market Trends API", {"n": -2.5, "xs": ["a, (b", True, None]}), ("Market Trends API", {})],
        [],
    ]
    assert [m["role"] for m in record["messages"]] == ["user", "assistant", "tool", "assistant"]
    broken = {
        "system": TOOLACE,
        "conversations": [
            {"from": "user", "value": "x"},
            {"from": "assistant", "value": "[Market Trends API(n=__import__('os'))]"},
        ],
    }
    assert problem(read(broken)[0]) == "a tool call cannot be parsed: not a literal that JSON can hold"


def test_xlam_has_calls_and_json_schemas(read: Callable[..., Any]) -> None:
    parameters = {
        "n": {"type": "int", "description": "How many."},
        "tags": {"type": "List[str], optional"},
        "at": {"type": "Union[int, float]", "default": 1},
    }
    row = {
        "id": 7,
        "query": "Is it cold?",
        "tools": json.dumps([{"name": "weather", "description": "Now.", "parameters": parameters}]),
        "answers": json.dumps([{"name": "weather", "arguments": {"n": 1}}, {"name": "weather", "arguments": {"n": 2}}]),
    }
    (record,) = read(row, layout="auto")
    assert record["messages"] == [
        {"role": "user", "content": "Is it cold?"},
        answer(tool_calls=[call(arguments={"n": 1}), call(arguments={"n": 2})]),
    ]
    assert record["tools"][0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "description": "How many."},
            "tags": {"type": "array", "items": {"type": "string"}},
            "at": {"anyOf": [{"type": "integer"}, {"type": "number"}], "default": 1},
        },
        "required": ["n"],
    }
    assert json.loads(record["meta"]) == {"id": 7}


def test_a_mapping_reads_tools_calls_and_reasoning_of_a_table(tmp_path: Path) -> None:
    rows = [
        {
            "q": "Is it cold?",
            "t": json.dumps([WEATHER]),
            "calls": json.dumps([{"name": "weather", "arguments": {"city": "Oslo"}}]),
            "why": "Look.",
            "a": "",
        },
        {"q": "Hi", "t": "", "calls": "", "why": "", "a": "Hello"},
    ]
    FILE_WRITERS[".csv"](tmp_path / "a.csv", rows)
    mapping = {"prompt": "q", "response": "a", "tools": "t", "tool_calls": "calls", "reasoning": "why"}
    first, second = to_records(tmp_path / "a.csv", "a.csv", mapping=mapping)[1]
    assert (first["messages"][-1], first["tools"]) == (
        answer(reasoning_content="Look.", tool_calls=[call()]),
        [WEATHER],
    )
    assert (second["messages"][-1], "tools" in second) == (answer("Hello"), False)
    only_calls = to_records(tmp_path / "a.csv", "a.csv", mapping={"prompt": "q", "tool_calls": "calls"})[1]
    assert [record["messages"][-1] for record in only_calls] == [answer(tool_calls=[call()]), answer("")]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_keys_that_a_table_adds_to_objects_are_not_there(suffix: str, tmp_path: Path) -> None:
    """In a table every object of a column has the keys of all objects."""
    clock = {
        "type": "function",
        "function": {"name": "clock", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}},
    }
    said = [call(), call("clock", {"zone": "UTC"})]
    rows = [
        {"messages": [ASKED, answer(tool_calls=[one])], "tools": [tool]}
        for one, tool in zip(said, [WEATHER, clock], strict=True)
    ]  # fmt: skip
    FILE_WRITERS[suffix](tmp_path / f"a{suffix}", rows)
    records = to_records(tmp_path / f"a{suffix}", "a")[1]
    assert [record["messages"] for record in records] == [[ASKED, answer(tool_calls=[one])] for one in said]
    assert [record["tools"] for record in records] == [[WEATHER], [clock]]


def test_keys_that_a_table_adds_to_objects_of_mapped_columns_are_not_there(tmp_path: Path) -> None:
    clock = {"name": "clock", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}
    made = [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "clock", "arguments": {"zone": "UTC"}}]
    FILE_WRITERS[".parquet"](
        tmp_path / "a.parquet", [{"q": "Cold?", "known": [WEATHER["function"], clock], "made": made}]
    )
    mapping = {"prompt": "q", "tools": "known", "tool_calls": "made"}
    ((record,),) = to_records(tmp_path / "a.parquet", "a", mapping=mapping)[1:]
    assert record["tools"] == [WEATHER, {"type": "function", "function": clock}]
    assert [one.arguments for one in calls(record["messages"][-1])] == [{"city": "Oslo"}, {"zone": "UTC"}]


# Python's notation

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.from_regex(r"\A[A-Za-z][A-Za-z0-9_. /-]{0,8}[a-z]\Z"),
            st.dictionaries(st.from_regex(r"\A[a-z_]{1,6}\Z"), JSON_VALUES, max_size=3),
        ),
        max_size=3,
    )
)
def test_calls_written_in_pythons_notation_are_read_back_equal(said: list[tuple[str, dict[str, Any]]]) -> None:
    written = ", ".join(
        f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in said
    )
    assert python_calls(f"[{written}]") == said


@pytest.mark.parametrize(
    "text",
    [
        "f(1)",
        "__import__('os')",
        "1e999",
        "b'x'",
        "...",
        "1j",
        "{1: 2}",
        "'\\ud83d'",
        "[",
        "x",
        "(" * 500,
        "1" * 5000,
        "\0",
        "f'{x}'",
    ],
)
def test_nothing_but_a_literal_that_json_can_hold_is_a_value(text: str) -> None:
    with pytest.raises(ValueError):
        python_value(text)


@pytest.mark.parametrize(
    "text",
    [
        "weather()",
        "[weather]",
        "[weather(1)]",
        "[weather(a=1, a=2)]",
        "[weather(a='x)]",
        "[weather(a=1]",
        "[(a=1)]",
        "[weather(a=)]",
    ],
)
def test_anything_but_a_list_of_calls_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        python_calls(text)


@pytest.mark.parametrize(
    ("text", "schema", "optional"),
    [
        ("str", {"type": "string"}, False),
        ("int, optional", {"type": "integer"}, True),
        ("Optional[float]", {"type": "number"}, True),
        (
            "typing.List[Union[int, None]]",
            {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]}},
            False,
        ),
        ("Any", {}, False),
        ("List[Any], optional", {"type": "array"}, True),
    ],
)
def test_types_of_python_are_those_of_json_schema(text: str, schema: dict[str, Any], optional: bool) -> None:
    assert json_type(text) == (schema, optional)


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("List[Dict[str, int]]", {"type": "array", "items": {"type": "object"}}),
        ("Tuple[int, str]", {"type": "array"}),
        ("Tuple[int, int]", {"type": "array", "items": {"type": "integer"}}),
        ("Set[int]", {"type": "array", "items": {"type": "integer"}}),
        ("set", {"type": "array"}),
        ("Dict[str, List[int]]", {"type": "object"}),
        ("Callable[[float], float]", {}),
        ("np.ndarray", {}),
        ("Customer", {}),
        ("Optional[Customer]", {}),
        ("List[Customer]", {"type": "array"}),
        ("Union[int, Customer]", {"anyOf": [{"type": "integer"}, {}]}),
        ("str, default: 'cm'", {"type": "string"}),
        ("str, ISO 8601, optional", {"type": "string"}),
        ("", {}),
    ],
)
def test_type_annotations_beyond_json_schema_are_kept_unchanged(text: str, schema: dict[str, Any]) -> None:
    assert json_type(text)[0] == {**schema, "x-type": text}


@pytest.mark.parametrize("style", ["xlam", "toolace"])
def test_a_type_that_json_schema_does_not_have_is_not_lost(style: str, read: Callable[..., Any]) -> None:
    parameters = {
        "who": {"type": "Customer", "description": "Who."},
        "x": {"type": "np.ndarray", "required": "if known"},
    }
    if style == "xlam":
        row = {
            "query": "Hi",
            "tools": [{"name": "f", "parameters": parameters}],
            "answers": [{"name": "f", "arguments": {"who": 1, "x": []}}],
        }
    else:
        del parameters["x"]["required"]
        definition = json.dumps([{"name": "f", "parameters": {"type": "dict", "properties": parameters}}])
        system = (
            f"Here is a list of functions in JSON format that you can invoke:\n{definition}. NO other text MUST be"
            " included."
        )
        row = {
            "system": system,
            "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "[f(who=1, x=[])]"}],
        }
    (record,) = read(row)
    properties = record["tools"][0]["function"]["parameters"]["properties"]
    odd = {"x-required": "if known"} if style == "xlam" else {}
    assert properties == {"who": {"x-type": "Customer", "description": "Who."}, "x": {"x-type": "np.ndarray", **odd}}
    assert judge([record], [], Rules()).reason == [None], "arguments of such a type are not judged"


# Reasoning


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_under_one_key(key: str, one: Callable[..., Any]) -> None:
    assert one(answer("Four", **{key: "Two and two."})) == [answer("Four", reasoning_content="Two and two.")]
    assert one(answer("Four", **{key: None})) == one(answer("Four", **{key: ""})) == [answer("Four")]


@pytest.mark.parametrize(
    "said",
    [
        "<think>\nTwo and two.\n</think>\n\nFour",
        "\n<think>Two and two.</think>Four",
        (
            "<|begin_of_thought|>\n\nTwo and"
            " two.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nFour\n\n<|end_of_solution|>"
        ),
    ],
)
@pytest.mark.parametrize(
    "row",
    [
        lambda said: {"messages": [ASKED, answer(said)]},
        lambda said: {"conversations": [{"from": "human", "value": "How much?"}, {"from": "gpt", "value": said}]},
        lambda said: {"instruction": "How much?", "output": said},
        lambda said: {"prompt": "How much?", "completion": said},
    ],
)
def test_a_trace_at_the_beginning_of_an_answer_is_reasoning(
    row: Callable[[str], Any], said: str, read: Callable[..., Any]
) -> None:
    assert read(row(said))[0]["messages"][-1] == answer("Four", reasoning_content="Two and two.")
    assert read(row(said), think="keep")[0]["messages"][-1] == answer(said)


@pytest.mark.parametrize(
    "said", ["Say <think>x</think>.", "<think>never closed", "x</think>y", "<thinking>x</thinking>y"]
)
def test_other_tags_are_text(said: str, one: Callable[..., Any]) -> None:
    assert one(answer(said)) == [answer(said)]


def test_a_trace_without_its_opening_tag_is_split_on_request(read: Callable[..., Any]) -> None:
    row = {"messages": [{**ASKED, "content": "x</think>y"}, answer("Two and two.\n</think>\n\nFour")]}
    assert read(row, think="split")[0]["messages"] == [
        row["messages"][0],
        answer("Four", reasoning_content="Two and two."),
    ]


def test_two_traces_that_differ_are_malformed_and_equal_ones_are_one(
    read: Callable[..., Any], one: Callable[..., Any]
) -> None:
    assert one(answer("Four", reasoning="a", reasoning_content="a")) == [answer("Four", reasoning_content="a")]
    assert (
        problem(read({"messages": [ASKED, answer("Four", reasoning="a", thinking="b")]})[0])
        == "two different traces of reasoning in one message"
    )


@pytest.mark.parametrize("said", ["<think>\nHm.\n</think>\n\nFour", "<think>\n\n</think>\n\nFour"])
def test_a_trace_in_a_key_and_in_the_text_is_one(said: str, read: Callable[..., Any], one: Callable[..., Any]) -> None:
    assert one(answer(said, reasoning_content="Hm.")) == [answer("Four", reasoning_content="Hm.")]
    other = read({"messages": [ASKED, answer("<think>Well.</think>Four", reasoning_content="Hm.")]})[0]
    assert problem(other) == "two different traces of reasoning in one message"


def test_plain_text_keeps_its_tags(read: Callable[..., Any]) -> None:
    assert read({"text": "<think>a</think>b"})[0]["messages"] == [answer("<think>a</think>b")]


# Loss per message


@pytest.mark.parametrize("key", ["weight", "train", "training", "train_on_turn", "loss"])
@pytest.mark.parametrize(
    ("value", "trained"), [(0, False), (0.0, False), (False, False), (1, True), (1.0, True), (True, True), (None, True)]
)
def test_a_message_that_is_not_trained_on_has_weight_zero(
    key: str, value: Any, trained: bool, one: Callable[..., Any]
) -> None:
    assert one(answer("Yes.", **{key: value})) == [answer("Yes.") if trained else answer("Yes.", weight=0.0)]


def test_a_sharegpt_turn_has_a_weight_as_well(read: Callable[..., Any]) -> None:
    turns = [
        {"from": "human", "value": "Hi", "train": False},
        {"from": "gpt", "value": "Yo", "train": False},
        {"from": "gpt", "value": "Hello", "train": True},
    ]
    (record,) = read({"conversations": turns})
    assert (
        record["messages"] == [{"role": "user", "content": "Hi"}, answer("Yo", weight=0.0), answer("Hello")]
        and "ignored" not in record
    )


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"weight": "yes"}, "weight must be 0 or 1, found str"),
        ({"weight": 2}, "weight must be 0 or 1, found 2"),
        ({"weight": 0.5}, "weight must be 0 or 1, found 0.5"),
        ({"weight": 10**400}, "weight must be 0 or 1"),
        ({"train": [0]}, "train must be 0 or 1, found list"),
        ({"loss": False, "weight": 1}, "keys that say both that a message is trained on and that it is not"),
    ],
)
def test_a_weight_that_is_neither_zero_nor_one_makes_its_row_malformed(
    given: dict[str, Any], reason: str, read: Callable[..., Any]
) -> None:
    assert problem(read({"messages": [ASKED, answer("Yes.", **given)]})[0]) == reason


def test_a_nonzero_weight_of_a_question_is_reported(read: Callable[..., Any]) -> None:
    rows = [{"messages": [{**ASKED, "weight": weight}, answer("Yes.")]} for weight in (0, 1)]
    assert [record.get("ignored") for record in read(*rows)] == [None, ["messages[].weight"]]


# Content parts


def test_text_parts_are_joined_as_a_template_joins_them(one: Callable[..., Any]) -> None:
    parts = [{"type": "text", "text": "It is "}, {"type": "output_text", "text": "cold."}, "!"]
    assert one(answer(parts)) == [answer("It is cold.!")]  # type: ignore[arg-type]


def test_a_part_with_reasoning_is_reasoning(one: Callable[..., Any]) -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Yes."}]
    assert one(answer(parts)) == [answer("Yes.", reasoning_content="Hm.")]  # type: ignore[arg-type]


MEDIA = {
    "image": [{"type": "image_url", "image_url": {"url": "x"}}],
    "audio": [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}],
    "video": [{"type": "video"}],
    "file": [{"type": "file", "file": {"file_id": "f"}}],
}


@pytest.mark.parametrize("kind", MEDIA)
def test_content_that_is_not_text_is_refused_by_row_with_a_reason(kind: str, read: Callable[..., Any]) -> None:
    row = {"messages": [{"role": "user", "content": MEDIA[kind]}, answer("Yes.")]}
    records = read({"messages": [ASKED, answer("Yes.")]}, row)
    judged = judge(records, [], Rules())
    assert judged.reason == [None, "unsupported_content"]
    assert judged.verdicts["unsupported_content"].severity == "error" and not judged.verdicts["malformed_row"].broken
    assert judged.facts["unsupported_content"][1] == f"{kind} in a message (line 2)"
    assert json.loads(records[1]["meta"])["row"] == row, "the row is kept as it was read"


@pytest.mark.parametrize("more", [{"audio": {"id": "a"}}, {"images": ["x"]}])
def test_a_message_with_sound_or_images_beside_its_text_is_refused_as_well(
    more: dict[str, Any], read: Callable[..., Any]
) -> None:
    assert judge(read({"messages": [ASKED, answer("Yes.", **more)]}), [], Rules()).reason == ["unsupported_content"]


def test_of_several_kinds_of_content_the_first_is_the_reason_in_every_process() -> None:
    media = {"images": "image", "audio": "audio", "videos": "video", "files": "file"}
    for order in permutations(media):
        rows = [Row(0, {"messages": [{**ASKED, **{key: ["x"] for key in order}}, answer("Yes.")]})]
        meta = json.loads(records_of(rows, "a.jsonl", "a.jsonl")[1][0]["meta"])
        assert meta["problem"] == f"{media[order[0]]} in a message"


@pytest.mark.parametrize(
    "parts",
    [
        [3],
        [{"type": "tool_use"}],
        [{"type": "text", "text": [{"type": "text", "text": "x"}]}],
        [{"type": "text"}],
        [[]],
        {"type": "text"},
    ],
)
def test_other_parts_make_a_row_malformed(parts: Any, read: Callable[..., Any]) -> None:
    assert judge(read({"messages": [{"role": "user", "content": parts}, answer("Yes.")]}), [], Rules()).reason == [
        "malformed_row"
    ]


def test_a_refusal_is_content_if_there_is_no_other(one: Callable[..., Any]) -> None:
    assert one({"role": "assistant", "content": None, "refusal": "I can't."}) == [answer("I can't.")]
    assert one(answer("Yes.", refusal=None)) == [answer("Yes.")]


# Preferences


def pair_of(path: Path, *rows: Any, **options: Any) -> dict[str, Any]:
    (pair,) = to_pairs(jsonl(path / "a.jsonl", *rows), "a.jsonl", **options)[1]
    return pair


CALLS = answer(tool_calls=[{"name": "weather", "arguments": '{"city": "Oslo"}'}])
THINKS = "<think>\nHm.\n</think>\n\nNo."
PAIRS: dict[str, list[dict[str, Any]]] = {
    "preference": [{"prompt": [ASKED], "chosen": [CALLS], "rejected": [answer(THINKS)]}],
    "transcripts": [{"chosen": [ASKED, CALLS], "rejected": [ASKED, answer(THINKS)]}],
    "sharegpt": [
        {
            "conversations": [{"from": "human", "value": ASKED["content"]}],
            "chosen": {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            "rejected": {"from": "gpt", "value": THINKS},
        }
    ],
    "kto": [{"messages": [ASKED, CALLS], "label": True}, {"messages": [ASKED, answer(THINKS)], "label": False}],
}


@pytest.mark.parametrize("layout", PAIRS)
def test_answers_with_calls_and_traces_are_pairs_with_tools(layout: str, tmp_path: Path) -> None:
    rows = [{**row, "tools": json.dumps([WEATHER])} for row in PAIRS[layout]]
    pair = pair_of(tmp_path, *rows)
    assert [pair[side] for side in ("prompt", "chosen", "rejected")] == [
        [ASKED],
        [answer(tool_calls=[call()])],
        [answer("No.", reasoning_content="Hm.")],
    ]
    assert (pair["tools"], as_record(pair)["tools"]) == ([WEATHER], [WEATHER])
    assert pair["example_id"] != pair_of(tmp_path, *PAIRS[layout])["example_id"], "tools are part of the identity"


def test_answers_under_different_tools_are_not_paired(tmp_path: Path) -> None:
    good, bad = PAIRS["kto"]
    pairs = to_pairs(jsonl(tmp_path / "a.jsonl", {**good, "tools": [WEATHER]}, bad), "a.jsonl")[1]
    assert [pair["source_rows"] for pair in pairs] == [[0], [1]]


def test_answers_under_tools_whose_keys_are_in_another_order_are_paired(tmp_path: Path) -> None:
    good, bad = PAIRS["kto"]
    reordered = {**WEATHER, "function": dict(reversed(WEATHER["function"].items()))}
    assert reordered == WEATHER and json.dumps(reordered) != json.dumps(WEATHER)
    pairs = to_pairs(
        jsonl(tmp_path / "a.jsonl", {**good, "tools": [WEATHER]}, {**bad, "tools": [reordered]}), "a.jsonl"
    )[1]
    assert [pair["source_rows"] for pair in pairs] == [[0, 1]]


def test_a_common_beginning_may_end_with_a_tool_result(tmp_path: Path) -> None:
    begin = [ASKED, CALLS, {"role": "tool", "content": "-3"}]
    pair = pair_of(tmp_path, {"chosen": [*begin, answer("Yes.")], "rejected": [*begin, answer("No.")]})
    assert ([m["role"] for m in pair["prompt"]], pair["chosen"], pair["rejected"]) == (
        ["user", "assistant", "tool"],
        [answer("Yes.")],
        [answer("No.")],
    )


def test_a_mapping_of_pairs_reads_tools(tmp_path: Path) -> None:
    row = {"q": "Hi", "good": "Hello", "bad": "What?", "t": [WEATHER]}
    assert pair_of(tmp_path, row, mapping={"prompt": "q", "chosen": "good", "rejected": "bad", "tools": "t"})[
        "tools"
    ] == [WEATHER]


def test_a_response_may_be_left_out_of_a_mapping_only_for_calls(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column for response"):
        to_records(
            jsonl(tmp_path / "a.jsonl", {"q": "Hi", "t": "[]"}), "a.jsonl", mapping={"prompt": "q", "tools": "t"}
        )


# Identity

FIELDS = st.fixed_dictionaries(
    {"content": st.sampled_from(["", "Yes."])},
    optional={
        "reasoning_content": st.sampled_from(["Hm.", "Ah."]),
        "tool_calls": st.sampled_from(
            [[call()], [call(identity="a")], [call(arguments={})], [call(), call()], [call("clock", {})]]
        ),
        "name": st.sampled_from(["a", "b"]),
        "weight": st.just(0.0),
    },
)
ROWS = st.tuples(
    FIELDS, st.sampled_from([None, [WEATHER]]), st.sampled_from([{}, {"tool_call_id": "a"}, {"name": "weather"}])
)


def test_two_rows_that_differ_in_any_field_never_share_an_id(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("ids") / "a.jsonl"

    @settings(max_examples=150, deadline=None)
    @given(st.tuples(ROWS, ROWS))
    def holds(drawn: Any) -> None:
        rows = [
            {
                "messages": [ASKED, {"role": "tool", "content": "x", **result}, {"role": "assistant", **said}],
                **({"tools": tools} if tools else {}),
            }
            for said, tools, result in drawn
        ]
        first, second = to_records(jsonl(path, *rows), "a.jsonl")[1]
        assert (first["example_id"] == second["example_id"]) == (rows[0] == rows[1])
        assert first["messages"] == rows[0]["messages"], "what is canonical is read as it is"

    holds()


def test_rows_that_check_writes_are_read_back_equal(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                ASKED,
                answer("I look.", reasoning="Hm.", tool_calls=[call(identity="a")]),
                {"role": "tool", "content": "-3", "tool_call_id": "a"},
                answer("Yes.", weight=0),
            ],
            "tools": [WEATHER],
        },
        {
            "messages": [
                {**ASKED, "content": "And in Rome, is it as cold there?"},
                answer("It is warm in Rome today.", name="ann"),
            ]
        },
    ]
    out = tmp_path / "out.jsonl"
    check_paths(
        [str(jsonl(tmp_path / "a.jsonl", *rows))], rules=Rules(policy={"unanswered_tool_call": "warn"}), out=out
    )
    records, again = (to_records(path, "a")[1] for path in (tmp_path / "a.jsonl", out))
    assert [record["example_id"] for record in again] == [record["example_id"] for record in records] and len(
        records
    ) == 2
    pairs = jsonl(tmp_path / "p.jsonl", {**PAIRS["preference"][0], "tools": [WEATHER]})
    check_paths([str(pairs)], out=out)
    assert [pair["example_id"] for pair in to_pairs(out, "a")[1]] == [
        pair["example_id"] for pair in to_pairs(pairs, "a")[1]
    ]


# Data that nobody here wrote


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="../shared/data, the real data sets, is missing")
def test_every_call_of_a_real_file_is_a_call_to_one_of_its_tools() -> None:
    rows = json.loads((SHARED_DATA / "glaive_toolcall_en_demo.json").read_text())
    layout, records = to_records(SHARED_DATA / "glaive_toolcall_en_demo.json", "glaive")
    assert (layout, len(records), len(rows)) == ("sharegpt", 300, 300)
    for row, record in zip(rows, records, strict=True):
        written = [json.loads(turn["value"]) for turn in row["conversations"] if turn["from"] == "function_call"]
        found = [one for message in record["messages"] for one in calls(message)]
        assert [(one.name, one.arguments) for one in found] == [(one["name"], one["arguments"]) for one in written]
        defined = json.loads(row["tools"] or "[]")
        assert [tool["function"] for tool in record.get("tools", [])] == defined
        assert len(record["messages"]) == len(row["conversations"]) and record["meta"] == "{}"


# Nothing of a row disappears


def hermes(*calls: str) -> dict[str, Any]:
    said = "".join(f"<tool_call>{call}</tool_call>" for call in calls)
    system = {"role": "system", "content": f"<tools>[{json.dumps(WEATHER)}]</tools>"}
    return {"messages": [system, ASKED, answer(said)]}


@pytest.mark.parametrize(
    ("row", "ignored"),
    [
        (hermes('{"name": "weather", "arguments": {}, "thought": "x"}'), "messages[].tool_calls[].thought"),
        (
            {"messages": [ASKED, answer(tool_calls=[{"type": "custom", "name": "weather"}])]},
            "messages[].tool_calls[].type",
        ),
        (
            {"messages": [ASKED, answer(tool_calls=[{"function": "other", "name": "weather"}])]},
            "messages[].tool_calls[].function",
        ),
        (
            {"messages": [ASKED, answer([{"type": "text", "text": "x", "thinking": "y"}])]},
            "messages[].content[].thinking",
        ),
        (
            {"messages": [ASKED, answer([{"type": "thinking", "thinking": "y", "text": "x"}])]},
            "messages[].content[].text",
        ),
        ({"messages": [ASKED, answer("x")], "system": 7}, "system"),
        ({"messages": [{"role": "system", "content": "x"}, ASKED, answer("y")], "system": "z"}, "system"),
        ({"instruction": "x", "output": "y", "history": [["a", "b", "c"]]}, "history"),
        ({"instruction": "x", "output": "y", "history": "a"}, "history"),
    ],
)
def test_what_is_not_used_is_reported(row: dict[str, Any], ignored: str, read: Callable[..., Any]) -> None:
    assert read(row)[0]["ignored"] == [ignored]


def bedrock_asked(definitions: list[Any]) -> dict[str, Any]:
    """A row of the layout `bedrock` that holds more than the definitions of its tools."""
    turns = [{"role": role, "content": [{"text": "x"}]} for role in ("user", "assistant")]
    config = {"tools": definitions, "toolChoice": {"auto": {}}}
    return {"schemaVersion": "bedrock-conversation-2024", "toolConfig": config, "messages": turns}


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ({"messages": [ASKED, answer("x")], "system": "z"}, []),
        ({"messages": [{"role": "system", "content": "x"}, ASKED, answer("y")], "system": "z"}, ["system"]),
        ({"instruction": "x", "output": "y", "history": [["a", "b"]]}, []),
        ({"instruction": "x", "output": "y", "history": "a"}, ["history"]),
        ({"instruction": "x", "output": "y", "history": ""}, []),
        ({"text": "x", "label": 1, "label_text": ""}, []),
        ({"text": "x", "label": 1, "label_text": "y"}, ["label"]),
        (bedrock_asked([{"toolSpec": {"name": "clock", "inputSchema": {"json": {}}}}]), []),
        (bedrock_asked([]), ["toolConfig"]),
    ],
)
def test_a_field_that_its_layout_does_not_read_in_a_row_counts_as_kept(row: dict[str, Any], kept: list[str]) -> None:
    [record] = records_of([Row(0, row)], "a.jsonl", "a")[1]
    (counted,) = record["fields"]
    assert [*counted.kept] == kept and counted.used.keys() >= row.keys() - set(kept)
    assert {name: row[name] for name in kept}.items() <= json.loads(record["meta"]).items()


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [
                {"role": "user", "content": [{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "y"}]},
                answer("z"),
            ],
            "a part with reasoning in a message that is not the assistant's",
        ),
        (
            [ASKED, answer([{"type": "text", "text": "x"}, {"type": "thinking", "thinking": "y"}])],
            "a part with reasoning after text",
        ),
        (
            [ASKED, answer(tool_calls="[{'name': 'weather', 'arguments': {'a': 1, 'a': 2}}]")],
            "a tool call is text that is not JSON",
        ),
    ],
)
def test_what_a_canonical_message_cannot_hold_makes_its_row_malformed(
    messages: list[Any], reason: str, read: Callable[..., Any]
) -> None:
    assert problem(read({"messages": messages})[0]) == reason


@pytest.mark.parametrize(
    ("role", "canonical"),
    [
        ("developer", "system"),
        ("human", "user"),
        ("model", "assistant"),
        ("bot", "assistant"),
        ("ai", "assistant"),
        ("function", "tool"),
        ("narrator", "narrator"),
    ],
)
def test_roles_of_other_tools_have_their_canonical_names(
    role: str, canonical: str, read: Callable[..., Any], one: Callable[..., Any]
) -> None:
    more = {"name": "x"}
    assert one({"role": role, "content": "Hi"}) == one({"role": canonical, "content": "Hi"})
    assert one({"role": role, "content": "Hi", **more}) == one({"role": canonical, "content": "Hi", **more})
    turns = [read({"conversations": [{"from": name, "value": "Hi", **more}]}) for name in (role, canonical)]
    assert turns[0] == turns[1] == read({"conversations": [{"role": canonical, "content": "Hi", **more}]})


@pytest.mark.parametrize("who", ["gpt", "chatgpt", "bing", "bard"])
def test_assistants_of_sharegpt_are_the_assistant(who: str, read: Callable[..., Any]) -> None:
    assert read({"conversations": [{"from": who, "value": "Hi"}]})[0]["messages"] == [answer("Hi")]


def test_weights_of_a_model_and_calls_of_a_bot_are_those_of_the_assistant(one: Callable[..., Any]) -> None:
    assert one({"role": "model", "content": "x", "weight": 0}) == [answer("x", weight=0.0)]
    assert one({"role": "bot", "content": None, "tool_calls": [call()]}) == [answer(tool_calls=[call()])]


def test_reasoning_inside_reasoning_is_part_of_the_trace(one: Callable[..., Any]) -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "thinking", "thinking": "x"}]}, {"type": "text", "text": "y"}]
    assert one(answer(parts)) == [answer("y", reasoning_content="x")]


def test_a_call_in_toolaces_notation_does_not_replace_other_calls(read: Callable[..., Any]) -> None:
    system = {"role": "system", "content": f"list of functions in JSON format [{json.dumps(WEATHER)}]"}
    said = answer("[weather(city='Oslo')]", tool_calls=[call(arguments={"city": "Rome"})])
    assert read({"messages": [system, ASKED, said]})[0]["messages"][-1] == said


def test_calls_of_a_column_that_have_unused_keys_are_kept_as_they_were(
    read: Callable[..., Any], tmp_path: Path
) -> None:
    made = [{"name": "f", "arguments": {}, "result": "42"}]
    assert json.loads(read({"query": "x", "tools": "[]", "answers": made})[0]["meta"]) == {"answers": made}
    FILE_WRITERS[".csv"](tmp_path / "a.csv", [{"q": "x", "calls": json.dumps(made)}])
    record = to_records(tmp_path / "a.csv", "a.csv", mapping={"prompt": "q", "tool_calls": "calls"})[1][0]
    assert json.loads(record["meta"]) == {"calls": json.dumps(made)}


def test_calls_beside_those_of_a_sharegpt_turn_are_reported_as_ignored(read: Callable[..., Any]) -> None:
    calling = {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "tool_calls": [call()]}
    (record,) = read({"conversations": [{"from": "human", "value": "x"}, calling]})
    assert record["messages"][1] == answer(tool_calls=[call("f", {})]) and record["ignored"] == [
        "conversations[].tool_calls"
    ]


def test_turns_that_only_call_and_differ_in_their_name_are_not_joined(read: Callable[..., Any]) -> None:
    calling = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    turns = [{"from": "human", "value": "x"}, {**calling, "name": "A"}, {**calling, "name": "B"}]
    assert [message.get("name") for message in read({"conversations": turns})[0]["messages"]] == [None, "A", "B"]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "x", "input": 0, "output": "y"},
        {"instruction": "x", "output": "y", "system": 0},
        {"instruction": "x", "context": False, "response": "y"},
    ],
)
def test_zero_and_false_are_not_empty(row: dict[str, Any], read: Callable[..., Any]) -> None:
    assert problem(read(row)[0]).startswith("expected text, found")


def test_zero_is_a_name_of_a_label(read: Callable[..., Any]) -> None:
    assert read({"text": "x", "label": 1, "label_text": 0})[0]["messages"][-1] == answer("0")


def test_a_column_named_row_is_kept_beside_values_that_others_replace(read: Callable[..., Any]) -> None:
    meta = json.loads(read({"messages": [ASKED, answer("x")], "split": "other", "row": 7}, split="train")[0]["meta"])
    assert meta == {"split": "train", "row": {"split": "other", "row": 7}}
    meta = json.loads(
        read({"instruction": "x", "instances": [{"input": "", "output": "y", "z": 1}], "z": 2, "row": 7})[0]["meta"]
    )
    assert meta == {"instance": 0, "z": 1, "row": {"z": 2, "row": 7}}


def test_values_of_a_pair_that_others_replace_are_kept(tmp_path: Path) -> None:
    system = {"role": "system", "content": f"<tools>[{json.dumps(WEATHER)}]</tools>"}
    row = {"prompt": [system, ASKED], "chosen": "x", "rejected": "y", "system_prompt": "own", "split": "dev"}
    meta = json.loads(to_pairs(jsonl(tmp_path / "a.jsonl", row), "a.jsonl", split="test")[1][0]["meta"])
    assert (
        meta["row"] == {"split": "validation", "row": {"system_prompt": "own"}}
        and meta["system_prompt"] == system["content"]
    )


def test_the_category_of_the_second_row_of_a_pair_is_kept(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "completion": side, "label": side == "a", "category": side} for side in "ab"]
    (pair,) = to_pairs(jsonl(tmp_path / "a.jsonl", *rows), "a.jsonl")[1]
    assert pair["category"] == "a" and json.loads(pair["meta"])["rejected"] == {"category": "b"}


def openai_preference(**more: Any) -> dict[str, Any]:
    """A row of OpenAI's file for preference fine-tuning, whose better answer calls a tool."""
    context = [ASKED, answer("Hm.", weight=0), {"role": "user", "content": "Well?"}]
    return {
        "input": {"messages": context, "tools": [WEATHER], "parallel_tool_calls": True},
        "preferred_output": [answer(None, tool_calls=[call(identity="c1")])],
        "non_preferred_output": [answer("No.", refusal=None)],
        **more,
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_openais_preferences_keep_tools_calls_weights_and_further_fields(suffix: str, tmp_path: Path) -> None:
    FILE_WRITERS[suffix](tmp_path / f"a{suffix}", [openai_preference(note=7)])
    (layout, (pair,)), (_, (same,)) = (
        to_pairs(tmp_path / f"a{suffix}", "a", layout) for layout in ("auto", "openai_dpo")
    )
    assert (layout, pair["tools"], same["example_id"]) == ("openai_dpo", [WEATHER], pair["example_id"])
    assert pair["prompt"] == [ASKED, answer("Hm.", weight=0), {"role": "user", "content": "Well?"}]
    assert (pair["chosen"], pair["rejected"]) == ([answer(tool_calls=[call(identity="c1")])], [answer("No.")])
    assert json.loads(pair["meta"]) == {"input.parallel_tool_calls": True, "note": 7}


def test_every_field_of_openais_preferences_is_counted_once(tmp_path: Path) -> None:
    (pair,) = pairs_of(read_rows(jsonl(tmp_path / "a.jsonl", openai_preference(note=7))), "a.jsonl", "a")[1]
    (counted,) = pair["fields"]
    roles = {f"{key}[].role": 1 for key in ("preferred_output", "non_preferred_output")} | {"input.messages[].role": 3}
    contents = {name.replace("role", "content"): times for name, times in roles.items()}
    keys = dict.fromkeys(("input.messages", "input.tools", "preferred_output", "non_preferred_output"), 1)
    others = {"input.messages[].weight": 1, "preferred_output[].tool_calls": 1}
    assert counted.used == keys | roles | contents | others
    assert (counted.kept, counted.ignored) == (
        {"input.parallel_tool_calls": 1, "note": 1},
        {"non_preferred_output[].refusal": 1},
    )
    assert "ignored" not in pair, "the refusal is null"


def test_a_field_beside_openais_input_does_not_replace_one_in_it(tmp_path: Path) -> None:
    (pair,) = to_pairs(jsonl(tmp_path / "a.jsonl", {"input.messages": 1, **openai_preference()}), "a")[1]
    assert pair["prompt"][0] == ASKED and json.loads(pair["meta"])["row"] == {"input.messages": 1}


@pytest.mark.parametrize("given", [3, [], "Hi", {}, {"messages": 3}, {"messages": []}])
def test_openais_preferences_without_a_prompt_are_malformed_and_kept_as_they_were(given: Any, tmp_path: Path) -> None:
    row = openai_preference(input=given)
    pair, _ = to_pairs(jsonl(tmp_path / "a.jsonl", row, openai_preference()), "a")[1]
    assert problem(pair) and not pair["prompt"] and json.loads(pair["meta"])["row"] == row


# Glaive

GLAIVE_WEATHER = json.dumps(WEATHER["function"], indent=4)
GLAIVE_CLOCK = json.dumps({"name": "clock", "parameters": {}}, indent=4)
GLAIVE_SYSTEM = "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
GLAIVE_CHAT = [
    "USER: Is it cold in Oslo?",
    """ASSISTANT: I look. <functioncall> {"name": "weather", "arguments": '{"city": "Oslo"}'} <|endoftext|>""",
    'FUNCTION RESPONSE: {"degrees": -3}',
    "ASSISTANT: Yes, -3. <|endoftext|>",
]


@pytest.mark.parametrize("between", ["\n\n\n", " "])
def test_glaives_transcripts(between: str, read: Callable[..., Any]) -> None:
    row = {"system": f"{GLAIVE_SYSTEM}{GLAIVE_WEATHER}\n\n{GLAIVE_CLOCK}\n", "chat": between.join([*GLAIVE_CHAT, ""])}
    (record,) = read(row)
    clock = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    assert record["tools"] == [WEATHER, clock]
    assert record["messages"] == [
        ASKED,
        answer("I look.", tool_calls=[call()]),
        {"role": "tool", "content": '{"degrees": -3}'},
        answer("Yes, -3."),
    ]
    assert json.loads(record["meta"]) == {"system_prompt": row["system"].removeprefix("SYSTEM: ").strip()}, (
        "the prompt is kept as it was"
    )
    assert record.get("ignored") is None
    assert dict(records_of([Row(0, row)], "a.jsonl", "a")[1][0]["fields"][0].used) == {"system": 1, "chat": 1}
    assert read(row, layout="glaive")[0]["example_id"] == record["example_id"]


def test_glaives_conversations_are_read_identically_in_other_layouts(read: Callable[..., Any]) -> None:
    system = f"Be brief. {GLAIVE_SYSTEM.removeprefix('SYSTEM: ')}{GLAIVE_WEATHER}"
    called = GLAIVE_CHAT[1].removeprefix("ASSISTANT: ")
    turns = [("system", system), ("user", ASKED["content"]), ("assistant", called)]
    (record,) = read({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert record["tools"] == [WEATHER]
    assert record["messages"] == [
        {"role": "system", "content": "Be brief."},
        ASKED,
        answer("I look.", tool_calls=[call()]),
    ]


@pytest.mark.parametrize(
    ("arguments", "read_as"),
    [
        ("""'{"city": "L'Aquila"}'""", {"city": "L'Aquila"}),
        (r"""'{"city": "L\'Aquila"}'""", {"city": "L'Aquila"}),
        (r"""'{"city": "a\nb \"c\""}'""", {"city": 'a\nb "c"'}),
        ("""{"city": "Oslo"}""", {"city": "Oslo"}),
        ("''", {}),
        ("'Oslo'", "Oslo"),
    ],
)
def test_arguments_of_glaive_are_json_in_single_quotes(arguments: str, read_as: Any, read: Callable[..., Any]) -> None:
    chat = f'USER: Cold?\n\n\nASSISTANT: <functioncall> {{"name": "weather", "arguments": {arguments}}} <|endoftext|>'
    (record,) = read({"system": GLAIVE_SYSTEM + GLAIVE_WEATHER, "chat": chat})
    assert [one.arguments for one in calls(record["messages"][-1])] == [read_as]


def test_glaives_rows_without_functions_and_lines_that_quote_a_role(read: Callable[..., Any]) -> None:
    system = "You are a helpful assistant, with no access to external functions."
    (record,) = read(
        {
            "system": f"SYSTEM: {system}\n",
            "chat": "USER: What is ASSISTANT: here?\n\n\nASSISTANT: A role, like USER: too.",
        }
    )
    said = ["What is ASSISTANT: here?", "A role, like USER: too."]
    assert [m["content"] for m in record["messages"]] == [system, *said] and "tools" not in record


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"system": "", "chat": "Hi"}, "expected a chat that begins with `USER:` or `ASSISTANT:`"),
        ({"system": "", "chat": ""}, "expected a chat that begins with `USER:` or `ASSISTANT:`"),
        ({"system": "", "chat": [{"from": "human", "value": "Hi"}]}, "expected text, found list"),
        ({"system": 0, "chat": "USER: Hi"}, "expected text, found int"),
        (
            {"system": GLAIVE_SYSTEM + GLAIVE_WEATHER, "chat": "USER: Hi\n\nASSISTANT: <functioncall> weather, please"},
            "a tool call is text that is not JSON",
        ),
    ],
)
def test_a_transcript_that_cannot_be_read_is_malformed(
    row: dict[str, Any], reason: str, read: Callable[..., Any]
) -> None:
    assert problem(read(row, layout="glaive")[0]) == reason


# What has no field of its own


def test_the_name_of_a_system_prompt_that_held_only_tools_is_kept(read: Callable[..., Any], tmp_path: Path) -> None:
    system = {"role": "system", "name": "desk", "content": HERMES % json.dumps([WEATHER])}
    (record,) = read({"messages": [system, ASKED, answer("Yes.")]})
    assert record["messages"] == [ASKED, answer("Yes.")]
    assert json.loads(record["meta"]) == {"system_prompt": system["content"], "system_name": "desk"}
    (pair,) = to_pairs(
        jsonl(tmp_path / "p.jsonl", {"prompt": [system, ASKED], "chosen": "Yes.", "rejected": "No."}), "p"
    )[1]
    assert json.loads(pair["meta"])["system_name"] == "desk"
    rest = {**system, "content": f"Be brief. {system['content']}"}
    (record,) = read({"messages": [rest, ASKED, answer("Yes.")]})
    assert (
        record["messages"][0] == {"role": "system", "content": "Be brief.", "name": "desk"}
        and "system_name" not in record["meta"]
    )


CALLING = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


@pytest.mark.parametrize(
    ("said", "content", "moved"),
    [
        (f"I look. {CALLING}\n", "I look.", False),
        (f"{CALLING}\n{CALLING}", "", False),
        (f"{CALLING} It is cold.", "It is cold.", True),
        (f"First.{CALLING}Then.{CALLING}", "First.\nThen.", True),
        (f"<think>\nHm.\n</think>\n{CALLING}", "", False),
    ],
)
def test_text_after_a_call_in_text_is_reported_because_it_is_rendered_before(
    said: str, content: str, moved: bool, tmp_path: Path, read: Callable[..., Any]
) -> None:
    row = {"messages": [ASKED, answer(said)], "tools": [WEATHER]}
    (record,) = read(row)
    assert record["messages"][1]["content"] == content and calls(record["messages"][1])
    assert record.get("ignored") == (["messages[].order of text and calls"] if moved else None)
    path = jsonl(tmp_path / "b.jsonl", row, {"messages": [ASKED, answer("Yes.")]})
    found = {one["check"]: one for one in check_paths([str(path)])["findings"]}.get("ignored_fields")
    assert (found and (found["severity"], found["count"], found["note"])) == (
        ("warn", 1, "messages[].order of text and calls 1") if moved else None
    )


@pytest.mark.parametrize(
    "message",
    [
        answer("Yes.", reasoning_content=""),
        answer("Yes.", reasoning="\n \n"),
        answer("<think></think>Yes."),
        answer("<think>\n\n</think>\n\nYes."),
        answer([{"type": "thinking", "thinking": ""}, {"type": "text", "text": "Yes."}]),
    ],
)
def test_an_empty_trace_is_none(message: dict[str, Any], read: Callable[..., Any]) -> None:
    plain, empty, thought = read(
        *({"messages": [ASKED, one]} for one in (answer("Yes."), message, answer("Yes.", reasoning="Hm.")))
    )
    assert (empty["messages"], empty["example_id"]) == (plain["messages"], plain["example_id"])
    judged = judge(
        [plain, {**empty, "messages": [ASKED, answer("No.")], "source_row": 1}, {**thought, "source_row": 2}],
        [],
        Rules(),
    )
    assert judged.facts["missing_reasoning"] == {2: "reasoning"}


def test_real_conversations_written_as_glaives_transcripts_are_read_back_equal(tmp_path: Path) -> None:
    """The 300 rows of LLaMA-Factory come from that set; here they get its form
    again, with arguments in single quotes."""
    source = SHARED_DATA / "glaive_toolcall_en_demo.json"
    if not source.is_file():
        pytest.skip("no ../shared/data")
    rows = json.loads(source.read_text(encoding="utf-8"))
    names = {"human": "USER", "gpt": "ASSISTANT", "function_call": "ASSISTANT", "observation": "FUNCTION RESPONSE"}

    def written(turn: dict[str, str]) -> str:
        text = turn["value"]
        if turn["from"] == "function_call":
            made = json.loads(text)
            text = (
                f'<functioncall> {{"name": "{made["name"]}", "arguments": \'{json.dumps(made["arguments"])}\'}}'
                " <|endoftext|>"
            )
        return f"{names[turn['from']]}: {text}"

    def transcript(row: dict[str, Any]) -> dict[str, str]:
        tools = "\n\n".join(json.dumps(tool, indent=4) for tool in json.loads(row["tools"] or "[]"))
        return {
            "system": GLAIVE_SYSTEM + tools if tools else "",
            "chat": "\n\n\n".join(map(written, row["conversations"])),
        }

    read, expected = to_records(jsonl(tmp_path / "a.jsonl", *map(transcript, rows)), "a")[1], to_records(source, "b")[1]
    assert [record.get("tools") for record in read] == [record.get("tools") for record in expected]
    for one, other in zip(read, expected, strict=True):
        assert one["messages"] == [{**message, "content": message["content"].strip()} for message in other["messages"]]


# Gemini, Amazon Bedrock and Anthropic

PLAIN: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Is it cold in Oslo and Rome?"},
        answer(
            "Wait.",
            reasoning_content="I need both.",
            tool_calls=[call(identity="c1"), call("weather", {"city": "Rome"}, "c2")],
        ),
        {"role": "tool", "content": '{"celsius": -3}', "tool_call_id": "c1"},
        {"role": "tool", "content": "mild", "tool_call_id": "c2"},
        {"role": "user", "content": "And now?"},
        answer("Only in Oslo."),
    ],
    "tools": [WEATHER, {"type": "function", "function": {"name": "clock", "description": "The time."}}],
}
"""A conversation in OpenAI's form."""


def test_a_gemini_conversation_is_that_of_openais_form(read: Callable[..., Any]) -> None:
    city = {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}, "required": ["city"]}
    row = {
        "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}, {"text": "Be kind."}]},
        "contents": [
            {"parts": {"text": "Is it cold in Oslo and Rome?"}},
            {
                "role": "model",
                "parts": [
                    {"text": "I need ", "thought": True},
                    {"text": "both.", "thought": True},
                    {"text": "Wait."},
                    {"functionCall": {"id": "c1", "name": "weather", "args": {"city": "Oslo"}}},
                    {"functionCall": {"id": "c2", "name": "weather", "args": {"city": "Rome"}}},
                ],
            },
            {
                "role": "user",
                "parts": [
                    {"functionResponse": {"id": "c1", "response": {"celsius": -3}}},
                    {"functionResponse": {"id": "c2", "response": "mild"}},
                    {"text": "And "},
                    {"text": "now?"},
                ],
            },
            {"role": "model", "parts": [{"text": "Only in Oslo."}]},
        ],
        "tools": [
            {"functionDeclarations": [{"name": "weather", "parameters": city}]},
            {"functionDeclarations": [{"name": "clock", "description": "The time."}], "googleSearch": None},
        ],
    }
    snake = json.dumps(row)
    for name in ("systemInstruction", "functionCall", "functionResponse", "functionDeclarations"):
        snake = snake.replace(name, re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", name))
    assert "function_call" in snake and read(row) == read(json.loads(snake)) == read(PLAIN)
    assert set(read(row)[0]) == set(read(PLAIN)[0]), "no field is ignored"


def test_a_bedrock_conversation_is_that_of_openais_form(read: Callable[..., Any]) -> None:
    weather = {"name": "weather", "inputSchema": {"json": WEATHER["function"]["parameters"]}}
    row = {
        "schemaVersion": "bedrock-conversation-2024",
        "system": [{"text": "Be brief."}, {"text": "Be kind."}],
        "toolConfig": {
            "tools": [{"toolSpec": weather}, {"toolSpec": {"name": "clock", "description": "The time."}}],
        },
        "messages": [
            {"role": "user", "content": [{"text": "Is it cold in "}, {"text": "Oslo and Rome?"}]},
            {
                "role": "assistant",
                "content": [
                    {"reasoningContent": {"reasoningText": {"text": "I need both."}}},
                    {"text": "Wait."},
                    {"toolUse": {"toolUseId": "c1", "name": "weather", "input": {"city": "Oslo"}}},
                    {"toolUse": {"toolUseId": "c2", "name": "weather", "input": {"city": "Rome"}}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"toolResult": {"toolUseId": "c1", "content": [{"json": {"celsius": -3}}]}},
                    {"toolResult": {"toolUseId": "c2", "content": [{"text": "mi"}, {"text": "ld"}]}},
                    {"text": "And now?"},
                ],
            },
            {"role": "assistant", "content": [{"text": "Only in Oslo."}]},
        ],
    }
    assert read(row) == read(PLAIN)
    chosen = {**row, "toolConfig": {**row["toolConfig"], "toolChoice": {"auto": {}}}}
    (record,) = read(chosen)
    assert record["tools"] == read(PLAIN)[0]["tools"]
    assert json.loads(record["meta"]) == {"toolConfig": chosen["toolConfig"]}, "what is not a tool is kept"


def test_an_anthropic_conversation_is_that_of_openais_form(read: Callable[..., Any]) -> None:
    weather = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}
    row = {
        "system": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
        "tools": [weather, {"name": "clock", "description": "The time."}],
        "messages": [
            {"role": "user", "content": "Is it cold in Oslo and Rome?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I need both."},
                    {"type": "text", "text": "Wait."},
                    {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}},
                    {"type": "tool_use", "id": "c2", "name": "weather", "input": {"city": "Rome"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": '{"celsius": -3}', "is_error": False},
                    {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "mild"}]},
                    {"type": "text", "text": "And now?"},
                ],
            },
            {"role": "assistant", "content": "Only in Oslo."},
        ],
    }
    assert read(row) == read(PLAIN) == read({**row, "system": "Be brief.\n\nBe kind."})
    own = {"messages": PLAIN["messages"], "tools": PLAIN["tools"]}
    assert read({**own, "system": "Be brief.\n\nBe kind."}) == read({**own, "system": None}) == read(PLAIN)
    (record,) = read({**own, "system": "Be long."})
    assert (record["messages"], json.loads(record["meta"])) == (PLAIN["messages"], {"system": "Be long."})


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_parts_of_a_table_have_all_keys_and_only_those_with_a_value_count(suffix: str, tmp_path: Path) -> None:
    rows = [
        {
            "contents": [
                {"role": "user", "parts": [{"text": "Hi"}]},
                {"role": "model", "parts": [{"functionCall": {"name": name, "args": {key: 1}}}]},
                {"role": "user", "parts": [{"functionResponse": {"name": name, "response": {key: 2}}}]},
            ]
        }
        for name, key in (("f", "a"), ("g", "b"))
    ]
    FILE_WRITERS[suffix](tmp_path / f"a{suffix}", rows)
    found = to_records(tmp_path / f"a{suffix}", "a")
    assert found == to_records(jsonl(tmp_path / "a.jsonl", *rows), "a")
    assert [record["messages"][1]["tool_calls"] for record in found[1]] == [
        [call("f", {"a": 1})],
        [call("g", {"b": 1})],
    ]


GEMINI_HI = {"role": "user", "parts": [{"text": "Hi"}]}
BEDROCK: dict[str, Any] = {"schemaVersion": "bedrock-conversation-2024"}
BEDROCK_HI = {"role": "user", "content": [{"text": "Hi"}]}


def gemini(*parts: Any, role: str = "model", **more: Any) -> dict[str, Any]:
    return {"contents": [GEMINI_HI, {"role": role, "parts": [*parts], **more}]}


def bedrock(*blocks: Any, role: str = "assistant", **row: Any) -> dict[str, Any]:
    return {**BEDROCK, "messages": [BEDROCK_HI, {"role": role, "content": [*blocks]}], **row}


@pytest.mark.parametrize(
    ("row", "ignored"),
    [
        (gemini({"text": "x", "thoughtSignature": "s"}), "contents[].parts[].thoughtSignature"),
        (gemini({"functionCall": {"name": "f", "willContinue": True}}), "contents[].parts[].functionCall.willContinue"),
        (gemini({"functionCall": {"name": "f"}}, {"text": "y"}), "contents[].parts[].order of text and calls"),
        (gemini({"text": "x"}, finishReason="STOP"), "contents[].finishReason"),
        (gemini({"text": "x"}, content="y"), "contents[].content"),
        (
            {**gemini({"text": "x"}), "systemInstruction": {"parts": [{"text": "y"}], "etag": "z"}},
            "systemInstruction[].etag",
        ),
        (bedrock({"text": "x"}, {"cachePoint": {"type": "default"}}), "messages[].content[].cachePoint"),
        (bedrock({"text": "x"}, system=[{"text": "y"}, {"cachePoint": {"type": "default"}}]), "system[].cachePoint"),
        (
            bedrock({"reasoningContent": {"reasoningText": {"text": "x", "signature": "y"}}}, {"text": "z"}),
            "messages[].content[].reasoningContent.signature",
        ),
        (
            {"system": "", "messages": [ASKED, answer([{"type": "tool_use", "name": "f", "cache_control": {"a": 1}}])]},
            "messages[].content[].cache_control",
        ),
        (
            {"system": "", "messages": [ASKED, answer([{"type": "redacted_thinking", "data": "x"}])]},
            "messages[].content[].data",
        ),
        (
            {"system": [{"type": "text", "text": "x", "cache_control": {"a": 1}}], "messages": [ASKED]},
            "system[].cache_control",
        ),
        (
            bedrock({"toolResult": {"toolUseId": "c1", "content": [{"text": "x"}], "status": "error"}}, role="user"),
            "messages[].content[].toolResult.status",
        ),
    ],
)
def test_what_is_not_used_of_parts_is_reported(row: dict[str, Any], ignored: str, read: Callable[..., Any]) -> None:
    (record,) = read(row)
    assert record["messages"] and record["ignored"] == [ignored]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (gemini({"inlineData": {"mimeType": "image/png", "data": "x"}}, role="user"), "image in a message"),
        (gemini({"file_data": {"mime_type": "application/pdf", "file_uri": "x"}}, role="user"), "file in a message"),
        (gemini({"executableCode": {"code": "1"}}), "a content part that is neither text nor reasoning"),
        (
            gemini({"text": "x", "functionCall": {"name": "f"}}),
            "a content part with several contents: text, functionCall",
        ),
        (gemini({"text": "x"}, {"text": "y", "thought": True}), "a part with reasoning after text"),
        (gemini({"functionCall": {"args": {}}}), "a tool call has no name"),
        (gemini({"functionCall": {"name": "f"}}, role="user"), "tool calls in a message that is not the assistant's"),
        (gemini({"functionResponse": {"name": "f"}}), "the result of a tool in a message of the assistant"),
        (gemini("x"), "expected a content part, found str"),
        ({"contents": [{"role": "user", "parts": 1}]}, "parts must be a list of parts, found int"),
        ({"contents": "Hi"}, "`contents` must be a list with at least one message"),
        (
            {**gemini({"text": "x"}), "systemInstruction": "a", "system_instruction": "b"},
            "both systemInstruction and system_instruction",
        ),
        (bedrock({"image": {"format": "png"}}, role="user"), "image in a message"),
        (bedrock({"guardContent": {}}), "a content part that is neither text nor reasoning"),
        (bedrock({"toolResult": {"content": [{"image": {}}]}}, role="user"), "image in a message"),
        (bedrock({"text": "x"}, system=7), "expected a system prompt, found int"),
        (bedrock({"text": "x"}, toolConfig={"tools": [{"cachePoint": {}}]}), "tools holds a function without a name"),
    ],
)
def test_parts_that_cannot_be_read_make_their_row_malformed(
    row: dict[str, Any], reason: str, read: Callable[..., Any]
) -> None:
    assert (
        problem(read(row, gemini({"text": "x"}), layout="bedrock" if "schemaVersion" in row else "gemini")[0]) == reason
    )


def test_completions_of_gemini_need_a_better_one(tmp_path: Path) -> None:
    said = [{"score": score, "completion": {"role": "model", "parts": [{"text": "x"}]}} for score in (1, 1, 0)]
    rows = [{"contents": [GEMINI_HI], "completions": said[:2]}, {"contents": [GEMINI_HI], "completions": said}]
    pairs = to_pairs(jsonl(tmp_path / "a.jsonl", *rows), "a.jsonl")[1]
    assert {problem(pair) for pair in pairs} == {"completions must be two, with different scores"}
