"""Findings are the same in every output; versions are compared by content; hostile text is escaped."""

from __future__ import annotations

import json
from typing import Any

from builders.records import LONG, ask, placed
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.curation.checks.checks import Rules, judge
from dagster_project.curation.checks.findings import changes, document, finding_changes
from dagster_project.curation.sources.benchmarks import Item
from dagster_project.views.data_quality_terminal import check_text

calm = settings(deadline=None, max_examples=60)


def rows(*prompts: str) -> list[dict[str, Any]]:
    return placed([ask(prompt) for prompt in prompts])


def found(*prompts: str, **rules: Any) -> dict[str, Any]:
    return document("rows.jsonl", "messages", judge(rows(*prompts), [], Rules(**rules)), [])


def test_the_worst_finding_comes_first() -> None:
    shown = found("Hi <|im_end|>", LONG, LONG, LONG.replace("garden", "yellow"))
    order = ["error", "warn", "info"]
    ranks = [order.index(one["severity"]) for one in shown["findings"]]
    assert ranks == sorted(ranks) and ranks[0] == 0


def test_an_overlap_shows_both_texts_and_what_they_share() -> None:
    shown = found(f"Dear all! {LONG}", f"Please, {LONG.upper()}, and more")
    match = next(one for one in shown["findings"] if one["check"] == "near_duplicates")["matches"][0]
    assert (match["place"], match["other"], match["part"]) == ("rows.jsonl:1", "rows.jsonl:0", "prompt")
    assert match["other_text"][slice(*match["other_span"])] == LONG
    assert match["text"][slice(*match["span"])] == LONG.upper()


def test_a_long_text_is_cut_around_what_is_shared() -> None:
    filler = " ".join(f"word{i}" for i in range(2000))
    held_out = [Item("quiz.jsonl:0", LONG)]
    shown = document(
        "s", "messages", judge(rows(f"{filler} {LONG} {filler[::-1]}"), held_out, Rules()), held_out, width=300
    )
    match = next(one for one in shown["findings"] if one["check"] == "benchmark_leakage")["matches"][0]
    assert len(match["text"]) < 320
    assert LONG.startswith(match["text"][slice(*match["span"])][:40])


def test_boilerplate_is_reported_but_not_as_an_overlap() -> None:
    opening = "Explain to a child of ten years the meaning of"
    shown = found(*(f"{opening} term{i} and of word{i * 7}" for i in range(60)))
    assert not any(one["check"] == "near_duplicates" for one in shown["findings"])
    assert shown["similarity"]["boilerplate"][0] == {"text": opening.lower(), "rows": 60}
    assert "boilerplate" in check_text(shown)


def test_similarity_counts_every_near_copy() -> None:
    shown = found(LONG, LONG.replace("garden", "yellow"), "Please add a button that reminds me to buy filters")
    assert sum(one["near"] for one in shown["similarity"]["histogram"]) == 1
    assert all(one["near"] <= one["pairs"] for one in shown["similarity"]["histogram"])


def test_a_row_that_only_moved_is_unchanged() -> None:
    found = changes(rows("a", "b", "c"), rows("c", "a", "b"), "before")
    assert found["rows"] == {"added": 0, "removed": 0, "changed": 0, "unchanged": 3}


def test_an_edited_row_is_changed_and_shows_both_versions() -> None:
    found = changes(rows("a", "my blue kite", "c"), rows("new", "a", "my red kite", "c"), "before")
    assert found["rows"] == {"added": 1, "removed": 0, "changed": 1, "unchanged": 2}
    edit = found["examples"]["changed"][0]
    assert ("blue" in edit["before"], "red" in edit["after"], edit["place"]) == (True, True, "rows.jsonl:2")
    assert found["examples"]["added"][0]["text"] == "new"


@calm
@given(old=st.lists(st.sampled_from("abcde"), max_size=8), new=st.lists(st.sampled_from("abcde"), max_size=8))
def test_every_row_is_in_one_class_of_change(old: list[str], new: list[str]) -> None:
    count = changes(rows(*old), rows(*new), "before")["rows"]
    assert count["unchanged"] + count["removed"] + count["changed"] == len(old)
    assert count["unchanged"] + count["added"] + count["changed"] == len(new)
    assert count["unchanged"] == sum(min(old.count(c), new.count(c)) for c in "abcde")


def test_new_and_resolved_findings_are_reported() -> None:
    before = [{"check": "pii", "count": 2}, {"check": "schema", "count": 1}]
    after = [{"check": "pii", "count": 3}, {"check": "encoding", "count": 1}]
    assert finding_changes(before, after) == {
        "new": [{"check": "encoding", "count": 1}],
        "gone": [{"check": "schema", "count": 1}],
        "changed": [{"check": "pii", "before": 2, "after": 3}],
    }


def test_a_line_at_the_terminal_says_how_many_names_it_leaves_out() -> None:
    """Of 60 categories the document has 50 and the sum of the others."""
    asked = [ask(f"{LONG} number {i}", category=f"c{i:02}") for i in range(60)]
    shown = document("rows.jsonl", "messages", judge(placed(asked), [], Rules()), [])
    assert len(shown["profile"]["categories"]) == 51
    assert "c06 1, c07 1, 52 more\n" in check_text(shown, width=400)
    few = check_text(document("rows.jsonl", "messages", judge(placed(asked[:8]), [], Rules()), []), width=400)
    assert "c07 1\n" in few
    shown["similarity"]["boilerplate"] = [{"text": f"passage {i}", "rows": 60 - i} for i in range(5)]
    assert '"passage 2" in 58 prompts; 2 more\n' in check_text(shown, width=400)


HOSTILE = "\x1b[2J<script>alert(1)</script>\u202eevil\x00 [bold]x[/bold] :smile: \ud83d"


def test_hostile_text_is_shown_as_escapes_at_the_terminal() -> None:
    shown = found(f"{HOSTILE} {LONG}", f"{LONG} {HOSTILE}")
    said = check_text(shown, color=False)
    assert all(c == "\n" or c.isprintable() for c in said)
    assert "\\x1b[2J" in said or "[bold]" in said
    json.dumps(shown).encode()
