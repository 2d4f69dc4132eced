"""Labels cover the assistant's tokens and nothing else; prompts have the token ids of training."""

from __future__ import annotations

import copy
import hashlib
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from builders.files import jsonl
from builders.sources import to_records
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dagster_project.core.chat import (
    IGNORE,
    encode,
    encode_pieces,
    encode_prompt,
    encode_record,
    examples_of,
    is_text,
    loss_weights,
    pack,
    pieces,
)
from dagster_project.core.errors import InputError
from dagster_project.core.records import content_id
from dagster_project.core.rendering import render
from dagster_project.curation.checks.checks import Rules, judge

ONE_TURN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
TWO_TURNS = [
    {"role": "system", "content": "Be kind."},
    *ONE_TURN,
    {"role": "user", "content": "Yes?"},
    {"role": "assistant", "content": "Grüße!"},
]
TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def with_template(tokenizer: Any, turn: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + HEADER
    return changed


def trained_spans(tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    """The decoded text of each unbroken run of labels."""
    _, labels = encode(tokenizer, messages)
    runs = groupby(labels, key=lambda label: label != IGNORE)
    return [tokenizer.decode(list(run)) for trained, run in runs if trained]


def last_answer_starts(labels: list[int]) -> int:
    return max(i for i in range(1, len(labels)) if labels[i] != IGNORE and labels[i - 1] == IGNORE)


def test_only_the_answer_and_its_end_of_turn_are_trained_on(tiny_tokenizer: Any) -> None:
    assert trained_spans(tiny_tokenizer, ONE_TURN) == ["Yes?<|im_end|>"]


def test_every_answer_of_a_conversation_is_trained_on(tiny_tokenizer: Any) -> None:
    assert trained_spans(tiny_tokenizer, TWO_TURNS) == ["Yes?<|im_end|>", "Grüße!<|im_end|>"]


def test_labels_equal_the_ids_where_trained_on_and_the_ids_are_the_whole_conversation(tiny_tokenizer: Any) -> None:
    ids, labels = encode(tiny_tokenizer, TWO_TURNS)
    assert tiny_tokenizer.decode(ids) == tiny_tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))


def test_an_answer_that_quotes_the_end_of_turn_token_is_trained_on_to_its_real_end(tiny_tokenizer: Any) -> None:
    messages = [ONE_TURN[0], {"role": "assistant", "content": "It is <|im_end|>, I think."}]
    assert trained_spans(tiny_tokenizer, messages) == ["It is <|im_end|>, I think.<|im_end|>"]


@pytest.mark.parametrize("messages", [ONE_TURN, TWO_TURNS], ids=["one turn", "two turns"])
def test_a_prompt_has_the_ids_it_was_trained_with(tiny_tokenizer: Any, messages: list[dict[str, str]]) -> None:
    ids, labels = encode(tiny_tokenizer, messages)
    assert encode_prompt(tiny_tokenizer, messages[:-1]) == ids[: last_answer_starts(labels)]


def test_a_prompt_has_the_ids_it_was_trained_with_where_tokens_would_merge_over_the_cut(newline_merging_tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": "\nYes"}
    messages = [ONE_TURN[0], answer, ONE_TURN[0], answer]
    ids, labels = encode(newline_merging_tokenizer, messages)
    whole = newline_merging_tokenizer.apply_chat_template(messages, tokenize=False)
    assert ids != newline_merging_tokenizer.encode(whole, add_special_tokens=False), "the cut does not matter, so nothing is shown"
    assert encode_prompt(newline_merging_tokenizer, messages[:-1]) == ids[: last_answer_starts(labels)]


@pytest.mark.parametrize(
    ("turn", "complaint"),
    [
        (TURN.replace("<|im_end|>", ""), "does not end the assistant's turn with '<|im_end|>'"),
        (TURN.replace("{{ m['content'] }}", "..."), "leaves out what the system says in turn 1"),
        (TURN.replace("m['content']", "m['content'] if loop.last else '...'"), "leaves out what the system says in turn 1"),
    ],
    ids=["drops the end of turn", "drops the answer", "drops earlier turns"],
)
def test_a_template_on_which_labels_cannot_be_placed_is_refused(tiny_tokenizer: Any, turn: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as refusal:
        encode(with_template(tiny_tokenizer, turn), TWO_TURNS)
    assert "use another chat template" in refusal.value.hint


def test_a_prompt_by_a_template_that_drops_earlier_turns_is_refused(tiny_tokenizer: Any) -> None:
    forgetful = with_template(tiny_tokenizer, TURN.replace("m['content']", "m['content'] if loop.last else '...'"))
    with pytest.raises(InputError, match="leaves out what the system says in turn 1"):
        encode_prompt(forgetful, TWO_TURNS[:-1])


def weighted_text(tokenizer: Any, messages: list[dict[str, str]], fields: dict[str, float], weight: float) -> str:
    """The decoded tokens that have exactly this weight."""
    ids, labels = encode(tokenizer, messages)
    weights = loss_weights(tokenizer, labels, messages[-1]["content"], fields, per_example=False)
    return tokenizer.decode([token for token, found in zip(ids, weights, strict=True) if found == weight])


@pytest.mark.parametrize("value", ["login", "Grüße", r"a \"b\" c"], ids=["plain", "many bytes", "escaped quotes"])
def test_the_tokens_of_a_weighted_field_value_count_its_weight(tiny_tokenizer: Any, value: str) -> None:
    answer = f'{{"summary": "cannot get in", "category": "{value}", "priority": "low"}}'
    messages = [ONE_TURN[0], {"role": "assistant", "content": answer}]
    assert weighted_text(tiny_tokenizer, messages, {"category": 8.0, "priority": 4.0}, 8.0) == value
    assert weighted_text(tiny_tokenizer, messages, {"category": 8.0, "priority": 4.0}, 4.0) == "low"
    rest = answer.replace(f'"{value}"', '""').replace('"low"', '""') + "<|im_end|>"
    assert weighted_text(tiny_tokenizer, messages, {"category": 8.0, "priority": 4.0}, 1.0) == rest


def test_weighted_tokens_are_the_same_if_the_template_trims_the_answer(tiny_tokenizer: Any) -> None:
    trimming = with_template(tiny_tokenizer, TURN.replace("m['content']", "m['content'] | trim"))
    messages = [ONE_TURN[0], {"role": "assistant", "content": ' {"category": "login"}\n'}]
    assert weighted_text(trimming, messages, {"category": 8.0}, 8.0) == "login"


def test_field_weights_do_not_affect_earlier_answers(tiny_tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": '{"category": "login"}'}
    assert weighted_text(tiny_tokenizer, [ONE_TURN[0], answer, ONE_TURN[0], answer], {"category": 8.0}, 8.0) == "login"


def test_an_answer_without_the_field_weighs_one_per_trained_token(tiny_tokenizer: Any) -> None:
    _, labels = encode(tiny_tokenizer, TWO_TURNS)
    weights = loss_weights(tiny_tokenizer, labels, "Grüße!", {"category": 8.0}, per_example=False)
    assert weights == [float(label != IGNORE) for label in labels]


def test_per_example_weights_sum_to_one_and_keep_their_proportions(tiny_tokenizer: Any) -> None:
    answer = '{"category": "login"}'
    _, labels = encode(tiny_tokenizer, [ONE_TURN[0], {"role": "assistant", "content": answer}])
    by_token = loss_weights(tiny_tokenizer, labels, answer, {"category": 8.0}, per_example=False)
    by_example = loss_weights(tiny_tokenizer, labels, answer, {"category": 8.0}, per_example=True)
    assert sum(by_example) == pytest.approx(1)
    assert by_example == pytest.approx([weight / sum(by_token) for weight in by_token])


@given(st.lists(st.integers(1, 200)), st.integers(50, 120))
def test_packing_keeps_every_example_once_and_only_one_long_example_may_exceed_a_row(lengths: list[int], room: int) -> None:
    rows = pack(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= room or len(row) == 1 for row in rows)


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(50, 120))
def test_packing_leaves_at_most_one_row_half_empty(lengths: list[int], room: int) -> None:
    assert sum(2 * sum(lengths[i] for i in row) <= room for row in pack(lengths, room)) <= 1


def first_fit(lengths: list[int], room: int) -> list[list[int]]:
    """First fit as it is defined: the first row with room enough, else a new one."""
    rows: list[list[int]] = []
    for i, length in enumerate(lengths):
        fitting = (row for row in rows if sum(lengths[k] for k in row) + length <= room)
        row = next(fitting, None)
        if row is None:
            rows.append(row := [])
        row.append(i)
    return rows


@given(st.lists(st.integers(1, 130), max_size=40), st.integers(50, 120))
def test_packing_is_first_fit(lengths: list[int], room: int) -> None:
    assert pack(lengths, room) == first_fit(lengths, room)


def test_packing_two_hundred_thousand_examples_takes_seconds() -> None:
    import random
    import time

    lengths = random.Random(0).choices(range(20, 400), k=200_000)
    start = time.process_time()
    pack(lengths, 2048)
    assert time.process_time() - start < 10


turns = st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(turns, min_size=1, max_size=4))
def test_batched_tokenization_gives_the_ids_of_single_calls(
    newline_merging_tokenizer: Any, conversations: list[list[tuple[str, str]]]
) -> None:
    tokenizer = newline_merging_tokenizer
    cuts = [
        pieces(tokenizer, [m for user, said in found for m in ({"role": "user", "content": user}, {"role": "assistant", "content": said})])
        for found in conversations
    ]
    assert encode_pieces(tokenizer, cuts) == [[tokenizer.encode(text, add_special_tokens=False) for text, _ in cut] for cut in cuts]


def test_no_pieces_have_no_ids(tiny_tokenizer: Any) -> None:
    assert encode_pieces(tiny_tokenizer, [[], []]) == [[], []]


def test_tool_turns_are_context_and_every_call_and_answer_is_trained_on(tiny_tokenizer: Any) -> None:
    messages = [ONE_TURN[0], {"role": "assistant", "content": "sum(1, 2)"}, {"role": "tool", "content": "3"}, ONE_TURN[1]]
    assert trained_spans(tiny_tokenizer, messages) == ["sum(1, 2)<|im_end|>", "Yes?<|im_end|>"]


def test_a_conversation_that_the_assistant_begins_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="the assistant speaks first"):
        encode(tiny_tokenizer, [ONE_TURN[1]])


@pytest.mark.parametrize("trick", ["{{ raise_exception('no tools here') }}", "{{ 1 / 0 }}", "{{ none.foo.bar }}", "{{ m.content + 1 }}"])
def test_a_template_that_fails_on_a_conversation_refuses_it(tiny_tokenizer: Any, trick: str) -> None:
    with pytest.raises(InputError, match="the chat template refuses it: "):
        encode(with_template(tiny_tokenizer, trick + TURN), ONE_TURN)


def text_record(text: str, meta: str = '{"kind": "text"}') -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": text}], "meta": meta}


def test_plain_text_is_trained_on_unchanged_and_ends_with_the_end_of_text_token(tiny_tokenizer: Any) -> None:
    [(ids, labels)] = encode_record(tiny_tokenizer, text_record("Once upon"))
    assert labels == ids
    assert tiny_tokenizer.decode(ids) == "Once upon<|im_end|>"


def test_plain_text_begins_with_the_bos_token_of_the_tokenizer(tiny_tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    beginning = copy.deepcopy(tiny_tokenizer)
    beginning.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    assert examples_of(beginning, text_record("Once")) == [[("<|im_start|>", False), ("Once<|im_end|>", True)]]


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (text_record("x"), True),
        (text_record("x", '{"kind": "tale", "of": "text"}'), False),
        (text_record("x", "{}"), False),
        ({"messages": ONE_TURN, "meta": '{"kind": "text"}'}, False),
    ],
)
def test_plain_text_is_one_message_of_kind_text(record: dict[str, Any], wanted: bool) -> None:
    assert is_text(record) is wanted


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>{{ m['reasoning_content'] or '' }}</think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Writes a trace in the last answer only, so every further turn rewrites the one before."""


def thinking(tokenizer: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = THINKING
    return changed


def traced(*traces: str) -> dict[str, Any]:
    turns = [[ONE_TURN[0], {"role": "assistant", "content": f"Answer {i}", "reasoning_content": trace}] for i, trace in enumerate(traces)]
    return {"messages": [message for turn in turns for message in turn]}


def test_a_template_that_rewrites_earlier_turns_gives_one_example_per_answer_as_served(tiny_tokenizer: Any) -> None:
    tokenizer, record = thinking(tiny_tokenizer), traced("One.", "Two.")
    examples = examples_of(tokenizer, record)
    assert [[text for text, trained in parts if trained] for parts in examples] == [
        ["<think>One.</think>Answer 0<|im_end|>"],
        ["<think>Two.</think>Answer 1<|im_end|>"],
    ]
    for parts, end in zip(examples, (1, 3), strict=True):
        served = tokenizer.apply_chat_template(record["messages"][:end], tokenize=False, add_generation_prompt=True)
        assert parts[0] == (served, False)
        assert encode_prompt(tokenizer, record["messages"][:end]) == tokenizer.encode(served, add_special_tokens=False)


@pytest.mark.parametrize(
    ("policy", "trained"),
    [("template", ["One.", "Two."]), ("keep", ["One.", "Two."]), ("strip", ["", ""]), ("last", ["", "Two."])],
)
def test_the_policy_decides_which_traces_are_trained_on(tiny_tokenizer: Any, policy: Any, trained: list[str]) -> None:
    examples = examples_of(thinking(tiny_tokenizer), traced("One.", "Two."), policy)
    assert [parts[1][0] for parts in examples] == [f"<think>{trace}</think>Answer {i}<|im_end|>" for i, trace in enumerate(trained)]


def test_a_trace_to_keep_that_the_template_leaves_out_is_refused(tiny_tokenizer: Any) -> None:
    assert examples_of(tiny_tokenizer, traced("One."))
    with pytest.raises(InputError, match="leaves out a trace"):
        examples_of(tiny_tokenizer, traced("One."), "keep")


def test_an_answer_of_weight_0_is_context_and_not_trained_on(tiny_tokenizer: Any) -> None:
    messages = [ONE_TURN[0], {**ONE_TURN[1], "weight": 0.0}, ONE_TURN[0], ONE_TURN[1]]
    assert trained_spans(tiny_tokenizer, messages) == ["Yes?<|im_end|>"]
    ids, labels = encode(tiny_tokenizer, messages)
    assert ids == encode(tiny_tokenizer, ONE_TURN * 2)[0] and last_answer_starts(labels) > len(ids) / 2


def test_calls_and_tools_that_a_template_does_not_write_are_refused(tiny_tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    with pytest.raises(InputError, match="does not write the definitions of tools"):
        examples_of(tiny_tokenizer, {"messages": ONE_TURN, "tools": [tool]})
    with pytest.raises(InputError, match="does not write tool calls"):
        examples_of(tiny_tokenizer, {"messages": [ONE_TURN[0], call]})


def test_the_date_of_a_template_is_constant(tiny_tokenizer: Any) -> None:
    dated = copy.deepcopy(tiny_tokenizer)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + tiny_tokenizer.chat_template
    assert render(dated, ONE_TURN).startswith("01 Jan 2026")


def test_a_turn_ends_with_a_token_at_which_generation_stops(tiny_tokenizer: Any, tmp_path: Any) -> None:
    """As in GLM, whose template writes no end of a turn: the next one begins with the token at which the model stops."""
    tiny_tokenizer = copy.deepcopy(tiny_tokenizer)
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|im_start|>' }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    tiny_tokenizer.save_pretrained(tmp_path)
    tokenizer = type(tiny_tokenizer).from_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not end the assistant's turn"):
        pieces(tokenizer, ONE_TURN)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.convert_tokens_to_ids("<|user|>")]}))
    assert trained_spans(tokenizer, TWO_TURNS[1:]) == ["Yes?<|user|>", "Grüße!<|user|>"]


def test_a_trace_to_keep_is_missed_though_the_answer_has_the_same_words(tiny_tokenizer: Any) -> None:
    record = {"messages": [ONE_TURN[0], {"role": "assistant", "content": "Yes, I think.", "reasoning_content": "Yes"}]}
    with pytest.raises(InputError, match="leaves out a trace"):
        examples_of(with_template(tiny_tokenizer, TURN), record, "keep")
    wordless = {"messages": [ONE_TURN[0], {"role": "assistant", "content": "", "reasoning_content": "Yes"}]}
    with pytest.raises(InputError, match="leaves out a trace"):
        examples_of(with_template(tiny_tokenizer, TURN), wordless, "keep")


def test_a_message_that_a_template_leaves_out_is_missed_though_another_says_the_same(tiny_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Yes?"}, {"role": "system", "content": "Yes?"}, ONE_TURN[1]]
    dropping = with_template(tiny_tokenizer, "{% if m['role'] != 'system' %}" + TURN + "{% endif %}")
    with pytest.raises(InputError, match="leaves out what the system says in turn 2"):
        pieces(dropping, messages)


def test_a_template_may_write_messages_in_another_order(tiny_tokenizer: Any) -> None:
    system_last = with_template(tiny_tokenizer, "")
    users, systems = (
        f"{{% for m in messages if {test} %}}{TURN}{{% endfor %}}" for test in ("m['role'] == 'user'", "m['role'] == 'system'")
    )
    answers = f"{{% for m in messages if m['role'] == 'assistant' %}}{TURN}{{% endfor %}}"
    system_last.chat_template = users + systems + answers + HEADER
    assert pieces(system_last, TWO_TURNS[:3])[1] == ("Yes?<|im_end|>", True)


@pytest.mark.parametrize("asked_again", [False, True])
def test_an_empty_trace_and_no_trace_are_rendered_identically_by_qwen3(asked_again: bool, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """So they are the same example, and have the same id."""
    import trl

    template = (Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text(encoding="utf-8")
    qwen3 = copy.deepcopy(tiny_tokenizer)
    qwen3.chat_template = template
    more = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}] if asked_again else []
    said = {"role": "assistant", "content": "Yes."}
    spellings = [said, {**said, "reasoning_content": ""}, {**said, "reasoning": "\n"}, {**said, "content": "<think>\n\n</think>\n\nYes."}]
    rows = [{"messages": [{"role": "user", "content": "Hi"}, answer, *more]} for answer in spellings]
    given = [{**row, "meta": "{}"} for row in rows[:2]]  # as they are, not as they are read
    assert encode_record(qwen3, given[0]) == encode_record(qwen3, given[1])
    read = to_records(jsonl(tmp_path / "a.jsonl", *rows), "a.jsonl")[1]
    assert len({record["example_id"] for record in read}) == 1
    assert [encode_record(qwen3, record) for record in read] == [encode_record(qwen3, given[0])] * 4
    assert next(text for parts in examples_of(qwen3, read[0]) for text, is_trained in parts if is_trained).endswith("Yes.<|im_end|>")


def test_plain_text_and_a_conversation_with_the_same_message_are_different_examples(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """One is trained on, the other has no prompt and is refused. A repeated text is a repetition; nothing is dropped for the other kind."""
    text, lone = {"text": "Once upon"}, {"messages": [{"role": "assistant", "content": "Once upon"}]}
    texts = to_records(jsonl(tmp_path / "a.jsonl", text, text), "a.jsonl")[1]
    (conversation,) = to_records(jsonl(tmp_path / "b.jsonl", lone), "b.jsonl")[1]
    assert texts[0]["messages"] == conversation["messages"]
    assert texts[0]["example_id"] == hashlib.sha256(b'[["assistant","Once upon"]]').hexdigest()[:32] == texts[1]["example_id"]
    assert conversation["example_id"] == content_id(conversation) != content_id(texts[0])
    assert encode_record(tiny_tokenizer, texts[0])
    with pytest.raises(InputError, match="the assistant speaks first"):
        encode_record(tiny_tokenizer, conversation)
    assert judge([conversation, *texts], [], Rules()).reason == ["invalid_roles", None, "exact_duplicates"]
