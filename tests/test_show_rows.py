"""`pedigree check --show`: rows as the chat template renders them, with what would be trained on highlighted."""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from builders.commands import Check
from builders.files import jsonl
from builders.layouts import BENCHMARK_ROWS
from builders.tool_calls import WEATHER, record, weather, write_data_set

from dagster_project.views.rendered_terminal import rendered_text


def chat(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def text_of(row: dict[str, Any]) -> str:
    [example] = row["examples"]
    return "".join(piece["text"] for piece in example["pieces"])


def test_the_first_rows_are_printed_with_what_is_trained_on_in_brackets(check: Check) -> None:
    jsonl(Path("a.jsonl"), chat("Hi", "Hello.", "Bye", "So\nlong ⟦x⟧"), {"messages": 7}, chat("Why?", "Because."))
    done = check("a.jsonl", "--show", 2, "--template", "chatml")
    assert (
        done.rendered == "as rendered by --template chatml; what is trained on is in ⟦ ⟧\n\nrow 0 "
        " a.jsonl:0\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start"
        "|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦So\nlong"
        " \\u27e6x\\u27e7<|im_end|>⟧\n\nrow 1  a.jsonl:1  would be dropped: malformed_row\ncannot be rendered: it"
        ' cannot be read: `messages` must be a list with at least one message (line 2) {"messages": 7}\n'
    )
    assert done.code == 1 and done.out.startswith("3 rows (messages)"), (
        "the findings come first, and decide on the exit code"
    )


def test_a_terminal_shows_colors_line_by_line_and_no_hidden_character() -> None:
    pieces = [{"text": "user\x1b[2J\n", "trained": False}, {"text": "one\n\ntwo\u202e", "trained": True}]
    shown = rendered_text(
        [{"row": 3, "place": "a:3", "template": "t", "outcome": "kept", "examples": [{"pieces": pieces}]}], color=True
    )
    assert shown.split("\n") == [
        "as rendered by t; what is trained on is highlighted", "", "\x1b[2mrow 3  a:3\x1b[0m", "user\\x1b[2J",
        "\x1b[30;42mone\x1b[0m", "", "\x1b[30;42mtwo\\u202e\x1b[0m",
    ]  # fmt: skip


def test_the_document_has_the_rows_as_the_base_models_tokenizer_renders_and_counts_them(
    check: Check, tiny_model: Path, tiny_tokenizer: Any
) -> None:
    rows = [chat("Hi", "Hello.", "Bye", "Good bye."), chat("Why?", "Because é.")]
    jsonl(Path("a.jsonl"), *rows)
    shown = check("a.jsonl", "--show", 9, "--json", "--base-model", tiny_model).rows
    for row, found in zip(rows, shown, strict=True):
        assert text_of(found) == tiny_tokenizer.apply_chat_template(row["messages"], tokenize=False)
        [example] = found["examples"]
        trained = [piece["text"] for piece in example["pieces"] if piece["trained"]]
        assert trained == [
            f"{message['content']}<|im_end|>" for message in row["messages"] if message["role"] == "assistant"
        ]
        assert example["tokens"] == len(tiny_tokenizer(text_of(found), add_special_tokens=False)["input_ids"])
        assert example["trained_tokens"] == sum(
            len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in trained
        )
    assert [(one["row"], one["place"], one["outcome"]) for one in shown] == [
        (0, "a.jsonl:0", "kept"),
        (1, "a.jsonl:1", "kept"),
    ]


def test_rows_are_named_by_the_numbers_of_the_findings_across_files(check: Check) -> None:
    jsonl(Path("a.jsonl"), chat("One?", "Yes one."), chat("Two?", "Yes two."))
    jsonl(Path("b.jsonl"), chat("Three?", "Yes three."), chat("Three?", "Yes three."))
    done = check("a.jsonl", "b.jsonl", "--show-rows", "3, 1", "--template", "chatml", "--json")
    assert [(one["row"], one["place"], one["outcome"]) for one in done.rows] == [
        (3, "b.jsonl:1", "dropped:exact_duplicates"), (1, "a.jsonl:1", "kept"),
    ]  # fmt: skip


def test_a_row_is_shown_as_it_would_be_trained_on_repaired_and_unmasked(check: Check) -> None:
    jsonl(Path("a.jsonl"), chat("Who is it?", "It is ann.smith@mailbox.org\ufeff"))
    [row] = check("a.jsonl", "--show", 1, "--template", "chatml", "--json").rows
    assert text_of(row).endswith("It is ann.smith@mailbox.org<|im_end|>\n")


def test_tools_calls_traces_and_weights_are_shown_as_the_template_writes_them(check: Check, tmp_path: Path) -> None:
    folder = write_data_set(tmp_path / "set", [record(weather(), [WEATHER])])
    template = tmp_path / "qwen3.jinja"
    template.write_text(files("trl").joinpath("chat_templates", "qwen3.jinja").read_text(encoding="utf-8"))
    [row] = check(folder, "--show", 1, "--template", template, "--json").rows
    trained = [[piece["text"] for piece in example["pieces"] if piece["trained"]] for example in row["examples"]]
    assert trained == [
        [
            '<think>\nI need the temperature first.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city":'
            ' "Oslo"}}\n</tool_call><|im_end|>'
        ],
        ["<think>\n\n</think>\n\nYes, it is three degrees below zero.<|im_end|>"],
    ]
    shown = check(folder, "--show", 1, "--template", template).rendered
    assert re.findall("row 0 .*", shown) == ["row 0  a.jsonl:0  example 1 of 2", "row 0  a.jsonl:0  example 2 of 2"]
    assert "A bot.<|im_end|>" in shown and "⟦A bot." not in shown, "its weight is 0"
    shown = check(folder, "--show", 1, "--template", "chatml").rendered
    assert "cannot be rendered: the chat template does not write the definitions of tools" in shown
    shown = check(folder, "--show", 1, "--template", "hermes").rendered
    assert (
        '<think>\nI need the temperature first.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city":'
        ' "Oslo"}}\n' in shown
    )
    assert "⟦Yes, it is three degrees below zero.<|im_end|>⟧" in shown


def test_both_answers_of_a_pair_are_shown_and_only_the_last_answer_is_trained_on(check: Check) -> None:
    pair = {"prompt": chat("Hi", "Hello.", "Bye")["messages"], "chosen": "Good bye.", "rejected": "Go."}
    pair |= {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
    jsonl(Path("a.jsonl"), pair)
    [row] = check("a.jsonl", "--show", 1, "--template", "chatml", "--json").rows
    assert [(e["side"], [piece["text"] for piece in e["pieces"] if piece["trained"]]) for e in row["examples"]] == [
        ("chosen", ["Good bye.<|im_end|>"]), ("rejected", ["Go.<|im_end|>"]),
    ]  # fmt: skip


def test_the_template_and_the_traces_are_those_that_the_project_trains_with(
    check: Check, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "data/base_model")
    jsonl(Path("a.jsonl"), chat("Hi", "Hello."))
    assert check("a.jsonl", "--show", 1).rendered.startswith("as rendered by data/base_model;")
    (tmp_path / "data/templates").mkdir()
    own = (
        "{% for m in messages %}[{{ m.role }}{% if m.reasoning_content %} {{ m.reasoning_content }}{% endif %}] {{"
        " m.content }}<|im_end|>{% endfor %}"
    )
    own += "{% if add_generation_prompt %}[assistant{% endif %}"
    (tmp_path / "data/templates/own.jinja").write_text(own)
    for name, opening in (("alpaca", "Below is an instruction"), ("data/templates/own.jinja", "[user] Hi")):
        (tmp_path / "params.yaml").write_text(json.dumps({"tokenized": {"chat_template": name, "reasoning": "strip"}}))
        [row] = check("a.jsonl", "--show", 1, "--json").rows
        assert text_of(row).startswith(opening) and row["template"] == f"tokenized.chat_template {name}"
    thinking = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello.", "reasoning_content": "Greet."},
    ]
    folder = write_data_set(tmp_path / "set", [record(thinking)])
    [row] = check(folder, "--show", 1, "--json").rows
    assert text_of(row) == "[user] Hi<|im_end|>[assistant] Hello.<|im_end|>"
    [row] = check(folder, "--show", 1, "--json", "--template", "data/templates/own.jinja").rows
    assert text_of(row) == "[user] Hi<|im_end|>[assistant Greet.] Hello.<|im_end|>"


def test_the_end_of_a_turn_is_found_in_templates_that_come_without_a_tokenizer(check: Check, tmp_path: Path) -> None:
    jsonl(Path("a.jsonl"), chat("Hi", "Hello."))
    ends = {
        "llama3": "<|eot_id|>",
        "gemma": "<end_of_turn>",
        "gptoss": "<|return|>",
        "qwen2_5": "<|im_end|>",
        "llava_next": "</s>",
    }
    for name, end in ends.items():
        source = files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")
        (tmp_path / "template.jinja").write_text(source)
        [row] = check("a.jsonl", "--show", 1, "--json", "--template", "template.jinja").rows
        [trained] = [piece["text"] for piece in row["examples"][0]["pieces"] if piece["trained"]]
        assert trained.endswith(f"Hello.{end}"), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--show", "0"], "'0' is not a whole number from 1"),
        (["--show", "x"], "'x' is not a whole number from 1"),
        (["--show", "-1"], "argument --show"),
        (["--show-rows", "1,x"], "'1,x' is not a list of row numbers such as 3,17"),
        (["--show-rows", "", "--template", "chatml"], "'' is not a list of row numbers"),
        (["--show-rows", "0,2", "--template", "chatml"], "there is no row 2"),
        (["--show", "1", "--show-rows", "1"], "not allowed with argument"),
        (["--show", "1"], "there is no data/base_model, so rows cannot be rendered"),
        (["--template", "chatml"], "--template requires --show"),
        (["--show", "1", "--template", "nothing"], "--template nothing: No such file"),
        (["--show", "1", "--template", "."], "--template .: Is a directory"),
        (["--show", "1", "--template", "latin.jinja"], "latin.jinja: is not UTF-8 text"),
        (["--show", "1", "--template", "broken.jinja"], "broken.jinja: line 1: "),
        (["--show", "1", "--template", "private.jinja"], "accesses the private attribute `__class__`"),
        (["--show", "1", "--template", "silent.jinja"], "--template silent.jinja: "),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused_in_one_message(check: Check, arguments: list[str], message: str) -> None:
    jsonl(Path("a.jsonl"), chat("Hi", "Hello."), chat("Why?", "Because."))
    sources = {"broken": b"{% for %}", "latin": b"\xe9", "private": b"{{ messages.__class__ }}", "silent": b"nothing"}
    for name, source in sources.items():
        Path(f"{name}.jinja").write_bytes(source)
    done = check("a.jsonl", *arguments)
    assert done.code == 2 and done.out == "" and message in done.err and "Traceback" not in done.err
    assert done.err.count("error: ") == 1 and done.err.count("hint: ") == 1


def test_more_rows_than_there_are_shows_all_and_benchmarks_are_refused(check: Check) -> None:
    jsonl(Path("a.jsonl"), chat("Hi", "Hello."))
    assert len(check("a.jsonl", "--show", 10**20, "--template", "chatml", "--json").rows) == 1
    jsonl(Path("b.jsonl"), next(iter(BENCHMARK_ROWS.values()))[0])
    done = check(
        "b.jsonl", "--show", 1, "--template", "chatml", "--format", next(iter(BENCHMARK_ROWS)).partition(",")[0]
    )
    assert done.code == 2 and "--show renders examples and preference pairs" in done.err
