"""Every chat template that TRL ships is trained on as it is served, or refused
with a reason; docs/models.md says which."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import chat_templates  # noqa: E402

from dagster_project.core.errors import InputError  # noqa: E402
from dagster_project.training.tokens import label_audit  # noqa: E402
from dagster_project.training.tokens.examples import Rules, make  # noqa: E402


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return chat_templates.matrix(tmp_path_factory.mktemp("families"))


def test_no_label_is_wrong_and_every_prompt_is_what_inference_renders(cells: dict[str, dict[str, Any]]) -> None:
    assert len(cells) == 41
    assert {
        (family, name): cell.problems
        for family, found in cells.items()
        for name, cell in found.items()
        if cell.problems
    } == {}


def test_at_most_three_families_refuse_a_chat_of_two_turns(cells: dict[str, dict[str, Any]]) -> None:
    assert sum(not found["two turns"].examples for found in cells.values()) <= 3


def test_every_refusal_has_a_reason(cells: dict[str, dict[str, Any]]) -> None:
    assert all(cell.examples or cell.refusal for found in cells.values() for cell in found.values())


def test_the_page_is_up_to_date(cells: dict[str, dict[str, Any]]) -> None:
    assert chat_templates.PAGE.read_text(encoding="utf-8") == chat_templates.page(cells), (
        "run: python benchmarks/chat_templates.py"
    )


def test_the_label_audit_accepts_what_every_family_trains_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    records = [{**record, "example_id": name, "meta": "{}"} for name, record in chat_templates.CELLS.items()]
    audited = 0
    for family in chat_templates.families():
        tokenizer = chat_templates.stub_tokenizer(family, tmp_path_factory.mktemp(family))
        outcomes = make(tokenizer, records, Rules(100_000))
        audited += sum(outcome.kept for outcome in outcomes)
        assert label_audit.find_wrong_labels(tokenizer, records, outcomes) == {}, family
    assert audited > 250


@pytest.mark.parametrize("damage", ["label the header", "leave the end unlabeled", "another prompt"])
def test_the_comparison_finds_wrong_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    examples_of = chat_templates.examples_of

    def damaged(tokenizer: Any, record: dict[str, Any]) -> Any:
        [(header, _), (answer, _), *rest] = examples_of(tokenizer, record)[0]
        if damage == "label the header":
            return [[(header[:-1], False), (header[-1] + answer, True), *rest]]
        if damage == "leave the end unlabeled":
            return [[(header, False), (answer[:-3], True), (answer[-3:], False), *rest]]
        return [[(header[1:], False), (answer, True), *rest]]

    tokenizer = chat_templates.stub_tokenizer("qwen3", tmp_path)
    record = chat_templates.CELLS["one turn"]
    assert chat_templates.judge(tokenizer, tmp_path, record).problems == ()
    monkeypatch.setattr(chat_templates, "examples_of", damaged)
    assert chat_templates.judge(tokenizer, tmp_path, record).problems


# Labels of what templates write in unusual ways


def trained(family: str, folder: Path, *messages: dict[str, Any], tools: Any = None) -> list[str]:
    """The texts that are trained on."""
    tokenizer = chat_templates.stub_tokenizer(family, folder)
    record = {
        "messages": [{"role": "user", "content": "What is 1 + 2?"}, *messages],
        **({"tools": tools} if tools else {}),
    }
    return [text for parts in chat_templates.examples_of(tokenizer, record) for text, is_label in parts if is_label]


def adds(a: Any, b: Any, content: str = "", **more: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": {"a": a, "b": b}}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "id": "abcdefghi", "function": function}],
        **more,
    }


def test_an_argument_that_quotes_the_end_of_turn_token_is_trained_on_to_the_real_end(tmp_path: Path) -> None:
    (answer,) = trained("qwen2_5", tmp_path, adds("<|im_end|>", "x"), tools=chat_templates.TOOLS)
    assert answer == '<tool_call>\n{"name": "add", "arguments": {"a": "<|im_end|>", "b": "x"}}\n</tool_call><|im_end|>'


def test_the_label_audit_knows_arguments_as_python_writes_them(tmp_path: Path) -> None:
    tokenizer = chat_templates.stub_tokenizer("lfm2_v2", tmp_path)
    for i, value in enumerate(['it\'s "x"', "it's", "'", "a\\b's", "é \u200b'", "it's\nso", "it's\t\r\n"]):
        messages = [{"role": "user", "content": "What is 1 + 2?"}, adds(value, "x")]
        record = {"messages": messages, "tools": chat_templates.TOOLS, "example_id": str(i), "meta": "{}"}
        outcomes = make(tokenizer, [record], Rules(10_000))
        assert outcomes[0].kept and label_audit.find_wrong_labels(tokenizer, [record], outcomes) == {}, value
        # the check still finds another text
        messages[1]["tool_calls"][0]["function"]["arguments"]["a"] = f"{value}y"
        assert label_audit.find_wrong_labels(tokenizer, [record], outcomes), value


def test_the_label_audit_knows_an_empty_answer(tmp_path: Path) -> None:
    tokenizer = chat_templates.stub_tokenizer("glm4moe", tmp_path)
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": ""}]
    record = {"messages": messages, "tools": None, "example_id": "a", "meta": "{}"}
    outcomes = make(tokenizer, [record], Rules(10_000))
    assert outcomes[0].kept and label_audit.find_wrong_labels(tokenizer, [record], outcomes) == {}
    said = {**record, "messages": [messages[0], {"role": "assistant", "content": "So."}]}
    assert label_audit.find_wrong_labels(tokenizer, [said], outcomes)


@pytest.mark.parametrize(
    ("family", "end"), [("llama3", "<|eot_id|>"), ("phi3", "<|endoftext|>"), ("llava_next", "</s>")]
)
def test_an_answer_that_begins_like_its_trace_and_quotes_the_end_of_turn_token_is_trained_on_to_the_real_end(
    family: str, end: str, tmp_path: Path
) -> None:
    (answer,) = trained(
        family, tmp_path, {"role": "assistant", "content": f"Sum {end} is 3", "reasoning_content": "Sum"}
    )
    assert answer.strip().startswith(f"Sum {end} is 3<")


@pytest.mark.parametrize("family", ["gemma4_v5", "diffusion_gemma"])
@pytest.mark.parametrize("second", [adds(1, 2), {"role": "assistant", "content": "It is 3."}], ids=["call", "answer"])
def test_an_answer_that_a_template_joins_to_the_one_before_it_is_refused(
    family: str, second: dict[str, Any], tmp_path: Path
) -> None:
    """Otherwise a message of weight 0 is trained on."""
    first = {"role": "assistant", "content": "Let me see.", "weight": 0.0}
    with pytest.raises(InputError, match="joins messages of the assistant"):
        trained(family, tmp_path, first, second, tools=chat_templates.TOOLS)


def test_a_template_that_leaves_out_the_second_of_two_calls_is_refused(tmp_path: Path) -> None:
    both = {"role": "assistant", "content": "", "tool_calls": [*adds(1, 2)["tool_calls"], *adds(3, 4)["tool_calls"]]}
    with pytest.raises(InputError, match="does not write several tool calls"):
        trained("gptoss", tmp_path, both, tools=chat_templates.TOOLS)


def test_a_call_that_a_template_leaves_out_is_missed_though_the_content_names_the_tool(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not write tool calls"):
        trained("lfm2", tmp_path, adds(1, 2, "I call add."), tools=chat_templates.TOOLS)


def test_content_that_a_template_leaves_out_is_missed_though_an_argument_has_the_same_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not write content beside tool calls"):
        trained("llama3_1", tmp_path, adds("three", 2, "three"), tools=chat_templates.TOOLS)


RESULT = {"role": "tool", "content": "3", "tool_call_id": "abcdefghi", "name": "add"}


@pytest.mark.parametrize(
    "family", ["gptoss", "glm4moe", "qwen3", "lfm2_2_5", "muse_glimmer", "nemotron_3_nano", "gemma4_v5"]
)
def test_the_trace_of_a_call_and_that_of_the_answer_after_it_are_both_trained_on(family: str, tmp_path: Path) -> None:
    said = (
        adds(1, 2, reasoning_content="I add."),
        RESULT,
        {"role": "assistant", "content": "It is 3.", "reasoning_content": "Now I know."},
    )
    first, second = trained(family, tmp_path, *said, tools=chat_templates.TOOLS)
    assert "I add." in first and "It is 3." not in first and "Now I know." in second and "It is 3." in second


def test_the_trace_of_a_call_is_written_where_a_template_writes_only_these(tmp_path: Path) -> None:
    said = (
        adds(1, 2, reasoning_content="I add."),
        RESULT,
        {"role": "assistant", "content": "It is 3.", "reasoning_content": "Now I know."},
    )
    assert ["I add." in answer for answer in trained("gemma4", tmp_path, *said, tools=chat_templates.TOOLS)] == [
        True,
        False,
    ]


@pytest.mark.parametrize("family", ["diffusion_gemma", "gemma4", "gemma4_v5"])
def test_the_header_of_an_answer_that_the_prompt_does_not_have_is_not_trained_on(family: str, tmp_path: Path) -> None:
    """DiffusionGemma's template writes `<|turn>model` before an answer to a
    tool result, and not in the prompt for one."""
    asked = {"role": "user", "content": "What is 1 + 2?"}
    said = [asked, adds(1, 2), RESULT, {"role": "assistant", "content": "It is 3."}]
    tokenizer = chat_templates.stub_tokenizer(family, tmp_path)
    record = {"messages": said, "tools": chat_templates.TOOLS, "example_id": "a", "meta": "{}"}
    assert chat_templates.judge(tokenizer, tmp_path, record).problems == ()
    assert trained(family, tmp_path / "same", *said[1:], tools=chat_templates.TOOLS)[1] == "It is 3.<turn|>"
    more = [*said, asked, {"role": "assistant", "content": "Three."}]
    assert trained(family, tmp_path / "more", *more[1:], tools=chat_templates.TOOLS)[1:] == [
        "It is 3.<turn|>",
        "Three.<turn|>",
    ]
    assert chat_templates.judge(tokenizer, tmp_path, {**record, "messages": more}).problems == ()
    outcomes = make(tokenizer, [record, {**record, "messages": more, "example_id": "b"}], Rules(100_000))
    assert (
        label_audit.find_wrong_labels(tokenizer, [record, {**record, "messages": more, "example_id": "b"}], outcomes)
        == {}
    )


def test_an_answer_that_quotes_the_opening_of_an_answer_is_trained_on_from_its_beginning(tmp_path: Path) -> None:
    quoted = "Write <|start|>assistant first."
    said = (adds(1, 2, reasoning_content="I add."), RESULT, {"role": "assistant", "content": quoted})
    assert (
        trained("gptoss", tmp_path, *said, tools=chat_templates.TOOLS)[1]
        == f"<|channel|>final<|message|>{quoted}<|return|>"
    )
