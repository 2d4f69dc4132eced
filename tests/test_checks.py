"""Every check finds its bad example, passes its good one, and follows the policy; every row is accounted for."""

from __future__ import annotations

import json
import unicodedata
from datetime import date
from typing import Any

import pytest
from builders.records import CHECK_EXAMPLES, HELD_OUT, KEY, LONG, Record, ask, chat, pair, placed
from pydantic import ValidationError

from dagster_project.curation.checks.checks import CHECKS, SET_CHECKS, Judgement, Rules, Verdict, checks_of, judge
from dagster_project.curation.checks.findings import document
from dagster_project.curation.checks.review import REVIEWED, Decision, Waiver
from dagster_project.curation.checks.row_checks import ROW_CHECKS
from dagster_project.curation.checks.token_counts import ESTIMATED, Tokens
from dagster_project.curation.sources.benchmarks import Item

RULES = Rules(min_rows=2, balance_ratio=2.0, max_tokens=200)
FITS = Tokens(
    ESTIMATED.count,
    lambda messages, tools: "roles must alternate" if any(m["content"] == "found" for m in messages) else None,
)


def judged(
    records: list[Record],
    rules: Rules = RULES,
    held_out: list[Item] = HELD_OUT,
    decisions: list[Decision] | None = None,
) -> Judgement:
    kind = (
        "preferences"
        if any("rejected" in r for r in records)
        else "benchmark"
        if any("labelled" in r for r in records)
        else "examples"
    )
    return judge(placed(records), held_out, rules, FITS, decisions or [], kind)  # type: ignore[arg-type]


def result(name: str, found: Judgement) -> Verdict:
    return found.verdicts[name]


COINCIDE = {"near_duplicates", "exact_duplicates"}
"""A conflict, or a row in two splits, is a near-duplicate as well."""


def test_every_check_has_a_good_and_a_bad_example_here() -> None:
    assert list(CHECK_EXAMPLES) == list(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_passes_its_good_example(name: str) -> None:
    found = judged(CHECK_EXAMPLES[name][0])
    assert (result(name, found).passed, result(name, found).broken) == (True, [])
    assert not any(found.reason)


@pytest.mark.parametrize("name", ROW_CHECKS)
def test_a_check_names_the_row_that_violates_it(name: str) -> None:
    rows = CHECK_EXAMPLES[name][1]
    last = len(rows) - 1
    found = judged(rows)
    assert found.broken[name] == [last]
    shown = next(one for one in document("set", "messages", found, HELD_OUT)["findings"] if one["check"] == name)
    assert (shown["count"], shown["rows"], shown["places"]) == (1, [last], [f"rows.jsonl:{last}"])
    assert set(found.broken) <= {name} | COINCIDE


NEAR = [LONG, LONG.replace("garden", "yellow"), LONG.replace("garden", "purple")]
"""Texts that are near-copies of each other."""


@pytest.mark.parametrize("first", ["validation", "test"])
def test_split_leakage_names_the_validation_row_of_a_validation_and_a_test_row(first: str) -> None:
    second = {"validation": "test", "test": "validation"}[first]
    found = judged([ask(NEAR[0], split=first), ask(NEAR[1], split=second)])
    assert found.broken["split_leakage"] == [0 if first == "validation" else 1]


@pytest.mark.parametrize("action", ["warn", "drop"])
def test_split_leakage_does_not_name_a_row_if_its_copies_in_other_splits_are_dropped(action: Any) -> None:
    rules = RULES.model_copy(update={"policy": {"split_leakage": action}})
    gone, train = ask(NEAR[0], "", split="test"), ask(NEAR[1], split="train")
    found = judged([gone, train], rules)
    assert found.reason == ["empty_response", None]
    assert "split_leakage" not in found.broken and result("split_leakage", found).passed
    found = judged([gone, train, ask(NEAR[2], split="validation")], rules)
    assert found.broken["split_leakage"] == [1]
    assert found.reason == ["empty_response", "split_leakage" if action == "drop" else None, None]


@pytest.mark.parametrize("name", SET_CHECKS)
def test_a_check_on_the_set_fails_its_bad_example_with_a_note(name: str) -> None:
    found = result(name, judged(CHECK_EXAMPLES[name][1]))
    assert not found.passed
    assert found.note


def test_every_check_reports_a_result_even_without_findings() -> None:
    assert set(judged([ask()]).verdicts) == checks_of("examples").keys()
    assert set(judged([pair()]).verdicts) == checks_of("preferences").keys()


@pytest.mark.parametrize(
    "roles",
    [
        "user customer",
        "user assistant assistant",
        "user assistant customer",
        "user assistant system",
        "user system",
        "customer assistant",
    ],
)
def test_a_wrong_role_is_found_at_any_position(roles: str) -> None:
    found = judged([chat(*((role, f"text {i}") for i, role in enumerate(roles.split())))])
    assert found.reason == ["invalid_roles"]


@pytest.mark.parametrize("text", ["N/A", "No input.", "none", "<no input>", "NULL"])
def test_a_prompt_that_marks_an_absent_one_is_a_placeholder(text: str) -> None:
    assert judged([ask(text)]).reason == ["placeholder_input"]


@pytest.mark.parametrize("text", ["None", "N/A", "no input needed"])
def test_a_reply_of_the_user_is_no_placeholder(text: str) -> None:
    said = [
        ("user", "A table for two."),
        ("assistant", "Any allergies?"),
        ("user", text),
        ("assistant", "It is booked."),
    ]
    assert judged([chat(*said)]).reason == [None]
    assert judged([chat(("user", text), *said[1:2], *said[:1], *said[3:])]).reason == ["placeholder_input"]


@pytest.mark.parametrize(
    ("action", "dropped", "passed", "blocking"),
    [("drop", True, True, False), ("warn", False, False, False), ("fail", False, False, True)],
)
def test_the_policy_decides_what_happens_to_a_bad_row(action: Any, dropped: bool, passed: bool, blocking: bool) -> None:
    found = judged([ask(), CHECK_EXAMPLES["pii"][1][0]], Rules(policy={"pii": action}))
    assert found.reason == [None, "pii" if dropped else None]
    assert (result("pii", found).passed, result("pii", found).action == "fail", result("pii", found).broken) == (
        passed,
        blocking,
        [1],
    )


def test_the_action_fail_passes_a_set_without_bad_rows() -> None:
    assert result("pii", judged([ask()], Rules(policy={"pii": "fail"}))).passed


def test_an_unknown_check_in_the_policy_is_refused() -> None:
    with pytest.raises(ValidationError, match="unknown check 'typos'; checks: malformed_row, "):
        Rules(policy={"typos": "drop"})


@pytest.mark.parametrize("name", SET_CHECKS)
def test_a_check_on_the_set_cannot_drop(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} applies to the set as a whole"):
        Rules(policy={name: "drop"})


def test_a_row_is_dropped_by_the_first_check_that_it_violates() -> None:
    both = ask("Write to ann.lee@kites.co.uk", "")
    found = judged([both])
    assert (found.reason, {"empty_response", "pii"} <= set(found.broken)) == (["empty_response"], True)


def test_dropped_rows_do_not_count_towards_the_set() -> None:
    assert not result("small_dataset", judged([ask("Hi"), ask("Ho", "")])).passed


def test_near_copies_share_a_cluster_and_others_do_not() -> None:
    rows = [ask("Hi"), ask(LONG), ask(LONG.replace("garden", "yellow")), ask("Hi"), ask("Ho")]
    assert list(judged(rows).cluster) == [0, 1, 1, 0, 4]


@pytest.mark.parametrize(
    ("prompt", "leaks"),
    [
        ("Which planet do folk sometimes call the red planet?", True),
        ("Settle this for us please: which planet do people sometimes call the red planet? Gran says Venus.", True),
        ("Which planet has the most moons of all of them?", False),
        ("People sometimes call me about the red kite.", False),
    ],
)
def test_a_near_copy_of_a_held_out_question_leaks(prompt: str, leaks: bool) -> None:
    assert judged([ask(prompt)]).reason == (["benchmark_leakage"] if leaks else [None])


def test_without_a_benchmark_the_leakage_check_notes_that_nothing_was_compared() -> None:
    found = result("benchmark_leakage", judged([ask(HELD_OUT[0].question)], held_out=[]))
    assert (found.passed, found.note) == (True, "nothing held out to compare with")


@pytest.mark.parametrize("action", ["drop", "warn", "fail"])
@pytest.mark.parametrize("secret", ["ann.lee@kites.co.uk", KEY])
def test_a_secret_never_appears_in_findings(action: Any, secret: str) -> None:
    rows = [
        ask(f"Write to {secret} about {LONG}"),
        ask(f"Write to {secret} about {LONG} please"),
        ask("x" * 110 + f" {secret}"),
        chat(("assistant", f"I am {secret}")),
        chat(problem=f"found {secret}", text=secret),
        ask(" ", secret),
    ]
    found = judged(rows, Rules(policy={"pii": action, "secrets": action, "malformed_row": action}))
    shown = document("set", "messages", found, HELD_OUT)
    said = json.dumps(shown)
    assert any(one["matches"] for one in shown["findings"])
    assert "[" in said
    assert secret not in said and secret[:8] not in said


def waiver(check: str, *rows: str, pairs: list[list[str]] | None = None) -> Rules:
    return Rules(
        min_rows=1,
        waivers=[Waiver(check=check, rows=list(rows), pairs=pairs or [], reason="agreed", expires=date(2100, 1, 1))],
    )


@pytest.mark.parametrize(
    "name",
    [
        "rows.jsonl:1",
        ask("Write to ann.lee@kites.co.uk")["example_id"],
        ask("Write to ann.lee@kites.co.uk")["example_id"][:8],
    ],
)
def test_a_waived_row_is_kept_and_counted(name: str) -> None:
    found = judged([ask(), ask("Write to ann.lee@kites.co.uk")], waiver("pii", name))
    assert (found.reason, result("pii", found).waived, result("pii", found).passed) == ([None, None], 1, True)
    assert found.said == {1: "waived for pii: agreed"}


def test_a_waiver_covers_only_its_check() -> None:
    assert judged([ask("Write to ann.lee@kites.co.uk")], waiver("encoding", "rows.jsonl:0")).reason == ["pii"]


@pytest.mark.parametrize("pair_", [["rows.jsonl:1", "rows.jsonl:0"], ["rows.jsonl:0", "rows.jsonl:1"]])
def test_a_waived_pair_is_not_reported_but_another_near_duplicate_is(pair_: list[str]) -> None:
    rows = [
        ask(LONG),
        ask(LONG + " again"),
        ask(OTHER := "Please add a button that reminds me to buy filters"),
        ask(OTHER + " soon"),
    ]
    found = judged(rows, waiver("near_duplicates", pairs=[pair_]))
    assert (found.broken["near_duplicates"], found.verdicts["near_duplicates"].waived) == ([3], 1)


def test_a_waived_error_is_not_an_error() -> None:
    found = document(
        "set", "messages", judged([ask(f"My key is {KEY} I think")], waiver("secrets", "rows.jsonl:0")), HELD_OUT
    )
    assert [(one["check"], one["severity"], one["count"], one["waived"]) for one in found["findings"]] == [
        ("secrets", "info", 0, 1)
    ]


def test_a_secret_is_shown_by_the_words_around_it() -> None:
    (one,) = [
        f
        for f in document("set", "messages", judged([ask("Hi", f"Use {KEY} for the bucket")]), HELD_OUT)["findings"]
        if f["check"] == "secrets"
    ]
    assert one["examples"] == ["aws key: Hi Use [aws key] for the bucket"]


def test_an_overlap_with_a_benchmark_can_be_waived_by_the_items_name() -> None:
    found = judged([ask(HELD_OUT[0].question)], waiver("benchmark_leakage", pairs=[["rows.jsonl:0", "quiz.jsonl:7"]]))
    assert found.reason == [None]


def test_of_equal_rows_the_one_in_an_upstream_test_split_is_kept() -> None:
    assert judged([ask("Hi", split="train"), ask("Hi", split="test"), ask("Hi")]).reason == [
        "exact_duplicates",
        None,
        "exact_duplicates",
    ]


def test_a_waiver_for_a_missing_row_is_reported() -> None:
    assert "ffffffff" in result("schema", judged([ask()], waiver("pii", "ffffffff"))).note


@pytest.mark.parametrize("decision", ["drop", "edit", "accept"])
def test_a_decision_on_a_row_that_is_not_in_the_set_is_reported(decision: Any) -> None:
    rows = [ask("Hi"), ask("The kite came")]
    known, unknown = (
        Decision(name, "pii", decision, "wrong", new_response="Hello.") for name in (rows[0]["example_id"], "f" * 32)
    )
    assert "f" * 32 in result("schema", judged(rows, decisions=[known, unknown])).note
    assert result("schema", judged(rows, decisions=[known])).note == ""


def test_a_leak_through_the_answer_is_found() -> None:
    found = judged([ask("Tell me something", HELD_OUT[0].text)])
    assert found.reason == ["benchmark_leakage"]
    assert [(link.part, link.other, link.rule) for link in found.overlaps.links["benchmark_leakage"]] == [
        ("response", "quiz.jsonl:7", "equal")
    ]


@pytest.mark.parametrize("action", ["drop", "review"])
def test_a_row_that_repeats_only_a_dropped_row_is_kept(action: Any) -> None:
    question = "Where does the parcel with the blue kite stand this morning?"
    again = question + " Please tell me."
    rules = Rules(policy=dict.fromkeys(["conflicting_responses", "near_duplicates"], action), max_tokens=200)
    near = judged([ask(question, ""), ask(again, "In the depot.")], rules)
    assert (near.reason, near.waiting, result("near_duplicates", near).broken) == (["empty_response", None], [], [])
    conflict = judged([ask(question, ""), ask(question, "In the depot."), ask(question, "On its way.")], rules)
    last = "conflicting_responses" if action == "drop" else None
    assert (conflict.reason, result("conflicting_responses", conflict).broken) == (["empty_response", None, last], [2])


def test_a_copy_of_a_row_that_another_check_drops_is_kept() -> None:
    tied, rated = pair() | {"margin": 0.0}, pair() | {"margin": 2.0}
    assert judged([tied, rated, rated]).reason == ["tied_pair", None, "exact_duplicates"]
    row = ask("Where is Ann?", "At ann@mail.org, as she says.")
    waiver = Waiver(check="pii", rows=["rows.jsonl:1"], reason="public", expires=date(2999, 1, 1))
    assert judged([row, row], Rules(waivers=[waiver])).reason == ["pii", None]
    assert judged([row, row]).reason == ["pii", "pii"]


def test_the_same_words_in_another_form_are_no_conflict() -> None:
    answer = "We close at five.\nThe Café opens at six."
    forms = [f"{answer}\n", answer.replace("\n", " \r\n"), answer.replace(" ", "\u00a0"), answer.replace("at ", "at  ")]
    rules = Rules(policy={"unicode_form": "warn"}, max_tokens=200)
    assert (
        result(
            "conflicting_responses", judged([ask("Hours?", answer), *(ask("Hours?", form) for form in forms)], rules)
        ).broken
        == []
    )
    decomposed = ask("Hours?", unicodedata.normalize("NFD", answer))
    assert result("conflicting_responses", judged([ask("Hours?", answer), decomposed], rules)).broken == []
    chosen = pair(chosen=answer, rejected="No idea.")
    swapped = pair(chosen="No idea. ", rejected=f"{answer} ")
    assert result("conflicting_responses", judged([chosen, swapped], rules)).broken == [1]
    code = "if a:\n    b()\n    c()"
    others = [answer.lower(), answer.replace("five", "six"), code, code.replace("\n    c", "\nc")]
    different = judged([ask("Hours?", answer), *(ask("Hours?", text) for text in others)], rules)
    assert result("conflicting_responses", different).broken == [1, 2, 3, 4]


def test_a_conflict_is_queued_for_review_and_decisions_are_applied() -> None:
    rows = CHECK_EXAMPLES["conflicting_responses"][1]
    first, second = (row["example_id"] for row in rows)
    assert judged(rows).waiting == [(1, "conflicting_responses")]
    assert judged(rows).reason == [None, None]
    assert judged(rows, decisions=[Decision(second, "conflicting_responses", "drop", "wrong")]).reason == [
        None,
        "conflicting_responses",
    ]
    decided = judged(rows, decisions=[Decision(first, "conflicting_responses", "drop", "wrong")])
    assert (decided.reason, decided.waiting) == (["conflicting_responses", None], [])
    assert result("conflicting_responses", decided).passed
    accepted = judged(rows, decisions=[Decision(second, "conflicting_responses", "accept", "both are right")])
    assert (accepted.waiting, accepted.reason, result("conflicting_responses", accepted).passed) == (
        [],
        [None, None],
        True,
    )
    changed = judged(
        rows, decisions=[Decision(second, "conflicting_responses", "edit", "clearer", new_prompt="Leaving?")]
    )
    assert [m["content"] for m in changed.records[1]["messages"]] == ["Leaving?", "Bye you"]
    assert (changed.waiting, changed.said) == ([], {1: "edited: clearer"})


def test_an_edited_prompt_of_a_pair_replaces_no_question_in_its_answers() -> None:
    row = pair()
    more = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Soon."}]
    row |= {
        "messages": row["messages"] + more,
        "rejected": [*row["rejected"], more[0], {"role": "assistant", "content": "Never."}],
    }
    edit = Decision(row["example_id"], REVIEWED, "edit", "clearer", new_prompt="Where is the kite?")
    [changed] = judged([row], decisions=[edit]).records
    assert [m["content"] for m in changed["messages"]] == ["Where is the kite?", "On its way.", "And now?", "Soon."]


def test_an_edited_label_is_the_category_too() -> None:
    rows = [
        ask("It fell on my roof", "bug", category="bug"),
        ask("It cost too much", "A refund is due.", category="bug"),
    ]
    edits = [Decision(row["example_id"], REVIEWED, "edit", "wrong", new_response="billing") for row in rows]
    assert [record["category"] for record in judged(rows, decisions=edits).records] == ["billing", "bug"]
    asked = Decision(rows[0]["example_id"], REVIEWED, "edit", "clearer", new_prompt="The kite fell on my roof")
    assert judged(rows, decisions=[asked]).records[0]["category"] == "bug"


def test_the_document_accounts_for_every_row() -> None:
    rows = [row for name, check in ROW_CHECKS.items() if check.kind is None for row in CHECK_EXAMPLES[name][1]]
    found = document("set", "messages", judged(rows), HELD_OUT)
    assert found["rows"] == len(rows) == found["kept"] + sum(found["dropped"].values())
    assert sum(one["dropped"] for one in found["findings"]) == sum(found["dropped"].values())
