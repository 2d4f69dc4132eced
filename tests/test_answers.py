"""Answers are parsed into text, trace and tool calls as each family writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_DATA
from hypothesis import given
from hypothesis import strategies as st

from dagster_project.core.errors import InputError
from dagster_project.core.messages import Call
from dagster_project.core.named_templates import NAMED
from dagster_project.core.records import read_table
from dagster_project.core.rendering import render
from dagster_project.evaluation.evaluator import result_rows, write_results
from dagster_project.training.inference.answers import (
    Answer,
    of_message,
    of_row,
    parse,
    read_answer,
    reader,
    split_trace,
)
from dagster_project.training.inference.call_forms import FORMS, find_calls

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "A city."},
                    "days": {"type": "integer", "description": "Days."},
                    "warm": {"type": "boolean", "description": "Whether it must be warm."},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "ping", "description": "Ping.", "parameters": {"type": "object", "properties": {}}},
    },
]
OSLO = Call("weather", {"city": "Oslo", "days": 3}, None)
PING = Call("ping", {}, None)
TWO = '[{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}, {"name": "ping", "arguments": {}}]'
DEEPSEEK = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"

WRITTEN: dict[str, tuple[str, list[Call]]] = {
    "Hermes": ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>', [OSLO]),
    "Hermes, parallel": (
        '<tool_call>{"name": "weather", "arguments": {"days": 3, "city": "Oslo"}}</tool_call>\n<tool_call>{"name":'
        ' "ping", "arguments": {}}</tool_call>',
        [OSLO, PING],
    ),
    "arguments as JSON text": (
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\", \\"days\\": 3}"}</tool_call>',
        [OSLO],
    ),
    "Llama 3.1": ('{"name": "weather", "parameters": {"city": "Oslo", "days": 3}}', [OSLO]),
    "Llama 3.1, parallel": (
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo", "days": 3}}; {"name":'
        ' "ping", "parameters": {}}',
        [OSLO, PING],
    ),
    "Mistral": (f"[TOOL_CALLS] {TWO}", [OSLO, PING]),
    "Mistral, named": ('[TOOL_CALLS]weather[ARGS]{"city": "Oslo", "days": 3}[TOOL_CALLS]ping[ARGS]{}', [OSLO, PING]),
    "Mistral, with ids": (
        '[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Oslo", "days": 3}',
        [OSLO._replace(identity="abcdefghi")],
    ),
    "Qwen3.5": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n<"
        "/parameter>\n</function>\n</tool_call>",
        [OSLO],
    ),
    "GLM-4": (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days<"
        "/arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        [OSLO],
    ),
    "LFM2": ("<|tool_call_start|>[weather(city='Oslo', days=3), ping()]<|tool_call_end|>", [OSLO, PING]),
    "ToolACE": ('[weather(city="Oslo", days=3), ping()]', [OSLO, PING]),
    "gpt-oss": (
        '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo", "days": 3}<|call|>',
        [OSLO],
    ),
    "gpt-oss, as trained": (
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo", "days": 3}<|call|>',
        [OSLO],
    ),
    "DeepSeek": (
        "<｜tool▁calls▁begin｜>"
        + DEEPSEEK.format("weather", '{"city": "Oslo", "days": 3}')
        + "\n"
        + DEEPSEEK.format("ping", "{}")
        + "<｜tool▁calls▁end｜>",
        [OSLO, PING],
    ),
    "DeepSeek 3.1": (
        '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo", "days": 3}<｜tool▁call▁end｜>',
        [OSLO],
    ),
    "Cohere": (
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": "Oslo", "days":'
        " 3}}]<|END_ACTION|>",
        [OSLO._replace(identity="0")],
    ),
    "Granite, Phi-4": (f"<|tool_call|>{TWO}<|/tool_call|>", [OSLO, PING]),
    "JSON list": (TWO, [OSLO, PING]),
    "Gemma 4": ('<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>', [OSLO]),
    "invoke tags": (
        '<function_calls>\n<invoke name="weather">\n<parameter name="city">Oslo</parameter>\n<parameter'
        ' name="days">3</parameter>\n</invoke>\n</function_calls>',
        [OSLO],
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_calls_of_a_family_are_read(name: str) -> None:
    text, wanted = WRITTEN[name]
    found = find_calls(text, TOOLS)
    assert found is not None and found.calls == wanted
    assert find_calls(text, None) is None, "without tools nothing is a call"


@pytest.mark.parametrize(
    "text",
    [
        "It is cold in Oslo.",
        '{"summary": "late parcel", "category": "login"}',
        '{"name": "Ada", "age": 36}',
        "[1, 2, 3]",
        "[see the note (page 3)]",
        "Use weather(city) to look it up.",
        "",
    ],
)
def test_other_text_is_not_a_call(text: str) -> None:
    assert find_calls(text, TOOLS) is None


@pytest.mark.parametrize(
    ("text", "call"),
    [
        (
            '<tool_call>{"name": "weather", "arguments": {"city": "Os',
            Call("", '{"name": "weather", "arguments": {"city": "Os', None),
        ),
        ("<tool_call>{weather}</tool_call>", Call("", "{weather}", None)),
        ('<tool_call>{"name": "weather", "arguments": "Oslo"}</tool_call>', Call("weather", "Oslo", None)),
        ("<tool_call><function=weather><parameter=city>Oslo", Call("weather", "<parameter=city>Oslo", None)),
        ("[weather('Oslo')]", Call("weather", "weather('Oslo')", None)),
        ("[weather(city=__import__('os').getcwd())]", Call("weather", "weather(city=__import__('os').getcwd())", None)),
        ("[TOOL_CALLS] oops", Call("", "oops", None)),
    ],
)
def test_a_call_that_cannot_be_read_keeps_its_text_and_counts_as_a_call(text: str, call: Call) -> None:
    found = find_calls(text, TOOLS)
    assert found is not None and found.calls == [call]


def test_python_calls_take_the_literals_of_python_and_json_and_names_with_spaces() -> None:
    tools = [{"name": "Market Trends API", "parameters": {}}]
    found = find_calls(
        '[Market Trends API(country="us", top=[1, {"a": true}], flag=False, none=null, low=-1.5)]', tools
    )
    assert found is not None
    assert found.calls == [
        Call(
            "Market Trends API",
            {"country": "us", "top": [1, {"a": True}], "flag": False, "none": None, "low": -1.5},
            None,
        )
    ]


def test_null_is_read_as_python_gemma_and_tags_write_it() -> None:
    found = find_calls("[weather(city='Oslo', days=None)]", TOOLS)
    assert found is not None and found.calls == [Call("weather", {"city": "Oslo", "days": None}, None)]
    found = find_calls(
        '<|tool_call>call:weather{city:<|"|>[None]<|"|>,days:None,more:[None,{x:None}]}<tool_call|>', TOOLS
    )
    assert found is not None and found.calls == [
        Call("weather", {"city": "[None]", "days": None, "more": [None, {"x": None}]}, None)
    ]


@pytest.mark.parametrize(
    "schema",
    [{"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}, {"oneOf": [{"type": "string"}]}],
)
def test_an_optional_text_in_tags_is_text_or_null(schema: dict[str, Any]) -> None:
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}]
    nothing = "null" if "oneOf" in schema else None
    for written, value in (("7", "7"), ("true", "true"), ("null", nothing), ("x", "x")):
        found = find_calls(
            f"<tool_call><function=f><parameter=a>\n{written}\n</parameter></function></tool_call>", tools
        )
        assert found is not None and found.calls == [Call("f", {"a": value}, None)]


@given(st.text(max_size=60), st.sampled_from([text for text, _ in WRITTEN.values()]), st.integers(0, 200))
def test_no_text_raises_an_exception_in_a_form(noise: str, written: str, cut: int) -> None:
    for text in (noise, written[:cut], written[:cut] + noise, noise + written):
        for name in FORMS:
            found = FORMS[name](text, TOOLS)
            assert found is None or found.calls


@pytest.mark.parametrize(
    ("prompt", "text", "trace", "rest"),
    [
        ("", "<think>\nHm.\n</think>\n\n42", "Hm.", "\n\n42"),
        ("<|im_start|>assistant\n<think>\n", "Hm.\n</think>42", "Hm.", "42"),
        ("", "Hm.</think>42", "Hm.", "42"),
        ("", "<think>never ends", "never ends", ""),
        ("assistant<think>", "never ends", "never ends", ""),
        ("", "<think></think>42", "", "42"),
        ("", "plain", "", "plain"),
        ("", "The tag <think> opens a trace.", "", "The tag <think> opens a trace."),
        ("", "[THINK]a[/THINK]b", "a", "b"),
        ("", "<|START_THINKING|>a<|END_THINKING|>b", "a", "b"),
        (
            "<|start|>assistant",
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
            "a",
            "<|channel|>final<|message|>b<|return|>",
        ),
    ],
)
def test_the_trace_is_split_off(prompt: str, text: str, trace: str, rest: str) -> None:
    assert split_trace(prompt, text) == (trace, rest)


@pytest.fixture
def hermes(tiny_tokenizer: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = NAMED["hermes"]
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_generated_tokens_give_an_answer_and_its_message(hermes: Any) -> None:
    text = (
        'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days":'
        " 3}}\n</tool_call><|im_end|>"
    )
    prompt = encode(hermes, "<|im_start|>assistant\n")
    answer = read_answer(hermes, prompt, encode(hermes, f"<think>Cold?</think>{text}"), TOOLS)
    assert answer == Answer("Let me look.", "Cold?", (OSLO,))
    assert of_message(answer.message) == answer == of_row(answer.columns)
    assert answer.message["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 3}}}
    ]


@pytest.mark.parametrize(
    ("text", "content", "trace"),
    [
        ("<|channel|>final<|message|>Because.<|im_end|>", "Because.", ""),
        (" to=user<|message|>Because.<|im_end|>", "Because.", ""),
        (" to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>Because.<|im_end|>", "Because.", "Hm."),
        ("Write to=user<|message|>.<|im_end|>", "Write to=user<|message|>.", ""),
    ],
)
def test_the_header_of_a_channel_is_not_part_of_an_answer(text: str, content: str, trace: str, hermes: Any) -> None:
    assert read_answer(hermes, encode(hermes, "<|start|>assistant"), encode(hermes, text)) == Answer(content, trace)


@pytest.mark.parametrize("trace", ["", "Hm."])
def test_content_beside_a_call_of_glm_is_read(trace: str, tiny_tokenizer: Any) -> None:
    import copy

    import trl

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates/glm4moe.jinja").read_text(encoding="utf-8")
    tokenizer.eos_token = "<|observation|>"
    text = f"\n<think>{trace}</think>\nLet me look.\n{WRITTEN['GLM-4'][0]}<|observation|>"
    assert parse(tokenizer, "<|assistant|>", text, TOOLS) == Answer("Let me look.", trace, (OSLO,))


@pytest.mark.parametrize(
    "text", ["It is cold.<|im_end|>", " 42 ", "", '{"name": "weather", "arguments": {}}<|im_end|>', "<|im_end|>"]
)
def test_without_tools_an_answer_is_its_text(hermes: Any, text: str) -> None:
    ids = encode(hermes, text)
    assert read_answer(hermes, [], ids) == Answer(hermes.decode(ids, skip_special_tokens=True).strip())


@pytest.mark.parametrize(
    ("arguments", "stored"),
    [
        ('{"city": "\\ud83d Oslo"}', {"city": "\ufffd Oslo"}),
        ('{"city": "\\ud83d\\ude00"}', {"city": "\U0001f600"}),
        ('{"days": NaN}', '{"days":NaN}'),
        ('{"days": [1e999]}', '{"days":[Infinity]}'),
    ],
)
def test_a_call_can_be_stored_as_json_in_utf_8(arguments: str, stored: Any, hermes: Any, tmp_path: Path) -> None:
    text = f'<tool_call>{{"name": "weather", "arguments": {arguments}}}</tool_call>'
    answer = read_answer(hermes, [], encode(hermes, text), TOOLS)
    assert answer.calls == (Call("weather", stored, None),)
    write_results(tmp_path / "results.parquet", result_rows("lora", [{"example_id": "1"}], None, [answer]))
    [row] = read_table(tmp_path / "results.parquet")
    assert of_row(row) == answer


def test_only_the_form_that_the_chat_template_writes_is_a_call(hermes: Any, tiny_tokenizer: Any) -> None:
    assert reader(hermes) == (None, ("tool_call with JSON",))
    assert reader(tiny_tokenizer) == (None, ()), "a template without calls"
    llama = WRITTEN["Llama 3.1"][0]
    assert parse(hermes, "", llama, TOOLS) is None
    assert parse(tiny_tokenizer, "", llama, TOOLS) == Answer("", calls=(OSLO,))


@pytest.mark.parametrize("header", ["<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"])
def test_a_trace_before_calls_is_split_off_with_a_response_template_of_trl(header: str, tiny_tokenizer: Any) -> None:
    import copy

    import trl

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text(encoding="utf-8")
    assert reader(tokenizer).library is not None
    for opener in ("",) if "think" in header else ("", "<think>"):
        text = f"{opener}Cold?</think>\n\nLet me look.\n{WRITTEN['Hermes'][0]}<|im_end|>"
        assert parse(tokenizer, header, text, TOOLS) == Answer("Let me look.", "Cold?", (OSLO,))
    cut = f"{'' if 'think' in header else '<think>'}Cold? {WRITTEN['Hermes'][0]}"
    assert parse(tokenizer, header, cut, TOOLS) == Answer("", f"Cold? {WRITTEN['Hermes'][0]}"), (
        "a trace that does not end calls nothing"
    )


WRITE_NO_CALLS = {
    "cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "idefics3", "lfm2", "llama3", "llava_next", "phi3",
    "phi3_5", "qwen2_5_vl", "smolvlm",
}  # fmt: skip
"""Templates that refuse calls or leave them out."""
LOSSY = {"lfm2_2_5", "lfm2_2_5_v2"}
"""Templates that write an apostrophe in quotes without escaping it."""
FIRST_ONLY = {"gptoss"}
"""Templates that write only the first of parallel calls."""
CASES = {
    "one call": [Call("weather", {"city": "Oslo", "days": 3, "warm": False}, None)],
    "hard text": [Call("weather", {"city": 'Oslo, [now] {x} "it\'s", é'}, None)],
    "line break at the end": [Call("weather", {"city": "  Oslo\n"}, None)],
    "parallel": [Call("weather", {"city": "Oslo"}, None), Call("ping", {}, None), Call("weather", {"city": "3"}, None)],
}
ENDS = {
    "llama3": "<|eot_id|>",
    "gptoss": "<|return|>",
    "glm": "<|user|>",
    "gemma4": "<turn|>",
    "diffusion": "<turn|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "muse": "<|eot|>",
}


def families() -> list[str]:
    import trl

    return sorted(
        path.stem
        for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
        if "training" not in path.stem
    )


@pytest.mark.parametrize("family", families())
def test_the_calls_that_a_template_of_trl_renders_are_read_back(family: str, tiny_tokenizer: Any) -> None:
    import copy

    import trl

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text(
        encoding="utf-8"
    )
    tokenizer.eos_token = next((end for start, end in ENDS.items() if family.startswith(start)), "<|im_end|>")
    read = 0
    for name, wanted in CASES.items():
        if (family in LOSSY and name == "hard text") or (family in FIRST_ONLY and name == "parallel"):
            continue
        prompt = [{"role": "user", "content": "How cold is it?"}]
        calls = Answer("", calls=tuple(call._replace(identity=f"call0000{i}") for i, call in enumerate(wanted)))
        try:
            header = render(tokenizer, prompt, True, TOOLS)
            whole = render(tokenizer, [*prompt, calls.message], False, TOOLS)
        except InputError:
            continue  # the template refuses it
        if "weather" not in whole.rpartition("How cold is it?")[2]:
            continue  # the template does not write calls
        begun = header if whole.startswith(header) else ""
        answer = parse(
            tokenizer, begun, whole.removeprefix(begun) if begun else whole.rpartition("How cold is it?")[2], TOOLS
        )
        assert answer is not None and [(call.name, call.arguments) for call in answer.calls] == [
            (c.name, c.arguments) for c in wanted
        ]
        assert not answer.content or not begun
        read += 1
    assert (read == 0) == (family in WRITE_NO_CALLS)


def test_the_calls_of_glaive_are_read_back_from_a_rendered_answer(hermes: Any) -> None:
    source = SHARED_DATA / "glaive_toolcall_en_demo.json"
    if not source.is_file():
        pytest.skip(f"{source} is missing")
    read = 0
    for row in json.loads(source.read_text(encoding="utf-8")):
        tools = [{"type": "function", "function": tool} for tool in json.loads(row["tools"])] if row["tools"] else []
        for turn in row["conversations"]:
            if turn["from"] != "function_call":
                continue
            made = json.loads(turn["value"])
            wanted = [Call(one["name"], one["arguments"], None) for one in (made if isinstance(made, list) else [made])]
            prompt = [{"role": "user", "content": "Go on."}]
            header = render(hermes, prompt, True, tools)
            whole = render(hermes, [*prompt, Answer("", calls=tuple(wanted)).message], False, tools)
            ids = encode(hermes, whole.removeprefix(header))
            assert read_answer(hermes, encode(hermes, header), ids, tools) == Answer("", calls=tuple(wanted))
            read += 1
    assert read == 211
