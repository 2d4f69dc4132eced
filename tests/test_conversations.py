"""Rows with tools, calls, reasoning and weights are shown by role; what they
hold is masked, shortened and in the check document."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from builders.tool_calls import WEATHER, call, record, weather
from conftest import SHARED_DATA

from dagster_project.curation.checks import findings
from dagster_project.curation.checks.checks import Rules, judge
from dagster_project.curation.checks.conversations import MESSAGES, WIDTH, chosen, shown
from dagster_project.views import html
from dagster_project.views.conversations import conversation
from dagster_project.views.data_quality import data_quality_page


class Words(HTMLParser):
    """The text of a page without style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.inside, self.words = "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside not in {"style", "script"}:
            self.words += f" {data}"


def drawn(found: dict[str, Any]) -> str:
    """The text of the macro `conversation`."""
    page = str(html.ENVIRONMENT.get_template("macros.jinja").module.conversation(conversation(found)))  # type: ignore[attr-defined]
    return re.sub(r"\s+", " ", Words(page).words).strip()


def test_a_conversation_is_shown_by_role_with_tools_reasoning_calls_and_weights() -> None:
    definition = (
        '{ "type": "function", "function": { "name": "weather", "description": "Temperature of a city in °C.",'
        ' "parameters": { '
    )
    definition += '"type": "object", "properties": { "city": { "type": "string" } }, "required": [ "city" ] } } }'
    assert (
        drawn({"messages": weather(), "tools": [WEATHER]})
        == "system, user, assistant (not in the loss), user, assistant (reasoning, 1 call), tool, assistant; 1 tool "
        f"tools 1 tool: weather {definition} "
        "system Be brief. "
        "user Hello, who are you? "
        "assistant not in the loss (weight 0) A bot. "
        "user Is it cold in Oslo? "
        'assistant reasoning, 29 characters I need the temperature first. calls weather as call_1 {"city": "Oslo"} '
        'tool weather answers call_1 {"celsius": -3} '
        "assistant Yes, it is three degrees below zero."
    )


def test_a_pair_is_shown_with_both_answers() -> None:
    said = [{"role": "assistant", "content": "", "tool_calls": [call("weather", "{city", None)]}]
    pair = {
        **record([{"role": "user", "content": "Cold?"}, *said]),
        "asked": 1,
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    assert (
        drawn(shown(pair))
        == "user, assistant (1 call), assistant user Cold? assistant chosen calls weather {city assistant rejected No."
    )


def test_secrets_and_personal_data_are_masked_in_every_field() -> None:
    address = "ann.smith@mailbox.org"
    tool = {"type": "function", "function": {"name": "mail", "description": f"Mails {address}."}}
    messages = [
        {"role": "user", "content": f"Write to {address}", "name": address},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": f"That is {address}.",
            "tool_calls": [call("mail", {"to": [address]}, address)],
        },
        {"role": "tool", "content": f"sent to {address}", "tool_call_id": address},
    ]
    found = shown(record(messages, [tool]))
    assert address not in str(found) and str(found).count("[e-mail]") == 8


def test_long_texts_and_conversations_are_cut_and_the_cut_is_visible() -> None:
    found = shown(record([{"role": "user", "content": "word " * WIDTH}, *weather() * 10], [WEATHER]))
    assert len(found["messages"]) == MESSAGES and found["left_out"] == 71 - MESSAGES
    assert len(found["messages"][0]["content"]) == WIDTH + 2 and found["messages"][0]["content"].endswith(" …")
    assert drawn(found).endswith(f"{71 - MESSAGES} more messages not shown")


def test_calls_reasoning_and_weights_are_each_among_the_shown_rows_if_any_row_has_them() -> None:
    tools_only = [
        record([{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hi"}], [WEATHER], row=i)
        for i in range(9)
    ]
    rich = record(weather(), [WEATHER], row=9)
    assert [one["source_row"] for one in chosen([*tools_only, rich])] == [0, 1, 2, 3, 9]


def test_the_document_has_conversations_only_where_rows_are_more_than_text() -> None:
    plain = [record([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "."}], row=0)]
    found = findings.document("a", "records", judge(plain, [], Rules()), [])
    assert "conversations" not in found and not any("conversations" in finding for finding in found["findings"])
    found = findings.document("a", "records", judge([*plain, record(weather(), [WEATHER], row=1)], [], Rules()), [])
    assert [one["place"] for one in found["conversations"]] == ["a.jsonl:1"]
    page = Words(data_quality_page(found)).words
    assert "I need the temperature first." in page and "not in the loss (weight 0)" in page


def test_a_finding_shows_the_row_that_it_is_about() -> None:
    twice = [record(weather(), [WEATHER], row=row) for row in (0, 1)]
    found = findings.document("a", "records", judge(twice, [], Rules()), [])
    [duplicates] = [finding for finding in found["findings"] if finding["check"] == "exact_duplicates"]
    assert (
        duplicates["places"] == ["a.jsonl:1"]
        and duplicates["conversations"][0]["messages"][4]["reasoning_content"] == "I need the temperature first."
    )


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets are not there")
def test_real_rows_with_calls_are_shown() -> None:
    from builders.tool_calls import glaive

    rows = glaive(SHARED_DATA / "glaive_toolcall_en_demo.json", 20)
    found = findings.document("a", "records", judge(rows, [], Rules()), [])
    page = Words(data_quality_page(found)).words
    assert len(found["conversations"]) == 5 and "calls search_recipes" in page and "1 tool: search_recipes" in page
