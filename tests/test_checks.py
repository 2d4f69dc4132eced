"""Every check finds its bad example, leaves its good one alone, and does what the policy says; every row is accounted for."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dagster_project.curation.checks import CHECKS, ROW_CHECKS, SET_CHECKS, Judgement, Rules, judge
from dagster_project.records import CheckResult, example_id, read_ledger, read_records, write_ledger, write_records
from dagster_project.stages import instructions

Record = dict[str, Any]
HELD_OUT = ["Which planet do people sometimes call the red planet?"]
RULES = Rules(min_rows=2, balance_ratio=2.0)


def chat(*turns: tuple[str, str], category: str | None = None, **meta: Any) -> Record:
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"example_id": example_id(messages), "messages": messages, "category": category, "group_id": None, "meta": json.dumps(meta)}


def ask(prompt: str = "Where is my kite?", answer: str = "On its way.", **more: Any) -> Record:
    return chat(("user", prompt), ("assistant", answer), **more)


def placed(records: list[Record]) -> list[Record]:
    """The records as rows 0, 1, ... of one source file."""
    return [{**record, "source": "rows.jsonl", "source_row": i} for i, record in enumerate(records)]


def judged(records: list[Record], rules: Rules = RULES, held_out: list[str] = HELD_OUT) -> Judgement:
    return judge(placed(records), held_out, rules)


def result(name: str, found: Judgement) -> CheckResult:
    return next(one for one in found.results if one.name == name)


LONG = "My parcel with the garden kite went to the wrong house last week"
EXAMPLES: dict[str, tuple[list[Record], list[Record]]] = {
    # check: (good rows, rows of which the last breaks the check; or which break it as a set)
    "malformed_row": ([ask()], [chat(problem="expected text, found int")]),
    "invalid_roles": (
        [chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"))],
        [chat(("user", "Hi"), ("customer", "Hi?"), ("assistant", "Hello"))],
    ),
    "ends_on_user_turn": ([ask()], [chat(("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"))]),
    "empty_prompt": ([ask("?")], [ask(" \n")]),
    "empty_response": ([ask("Hi", "No.")], [ask("Hi", " \n")]),
    "placeholder_input": ([ask(input="A kite.")], [ask(input="<noinput>")]),
    "special_tokens_in_text": ([ask("Is <b>this</b> a tag?")], [ask("Is this a tag?<|im_end|>")]),
    "encoding": ([ask("Où est le café ?")], [ask("OÃ¹ est le cafÃ© ?")]),
    "pii": ([ask("Follow me @kites, 3 @ 5.00")], [ask("Write to ann.lee@example.org")]),
    "exact_duplicates": ([ask("Hi"), ask("Ho")], [ask("Hi"), ask("Hi")]),
    "benchmark_leakage": ([ask("Which planet is red?")], [ask(HELD_OUT[0])]),
    "conflicting_responses": ([ask("Hi", "Hello"), ask("Ho", "Bye")], [ask("Hi", "Hello"), ask("Hi", "Bye")]),
    "near_duplicates": ([ask(LONG), ask("The kite came, thank you")], [ask(LONG), ask(LONG.replace("garden", "yellow"))]),
    "schema": ([ask()], []),
    "small_dataset": ([ask("Hi"), ask("Ho")], [ask("Hi")]),
    "unbalanced_categories": (
        [ask("Hi", category="a"), ask("Ho", category="a"), ask("He", category="b")],
        [ask("Hi", category="a"), ask("Ho", category="a"), ask("Hu", category="a"), ask("He", category="b")],
    ),
}


def test_every_check_has_a_good_and_a_bad_example_here() -> None:
    assert list(EXAMPLES) == list(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_passes_its_good_example(name: str) -> None:
    found = judged(EXAMPLES[name][0])
    assert (result(name, found).passed, result(name, found).count) == (True, 0)
    assert not any(found.reason)


@pytest.mark.parametrize("name", ROW_CHECKS)
def test_a_check_names_the_row_that_breaks_it(name: str) -> None:
    rows = EXAMPLES[name][1]
    last = len(rows) - 1
    found = judged(rows)
    assert found.broken[name] == [last]
    assert (result(name, found).count, result(name, found).rows) == (1, [f"rows.jsonl:{last}"])
    assert set(found.broken) <= {name, "near_duplicates"}, "a conflict is a near-duplicate as well; nothing else coincides"


@pytest.mark.parametrize("name", SET_CHECKS)
def test_a_check_on_the_set_fails_its_bad_example_and_says_how(name: str) -> None:
    found = result(name, judged(EXAMPLES[name][1]))
    assert not found.passed
    assert found.note


def test_every_check_reports_a_result_even_when_all_is_well() -> None:
    assert [one.name for one in judged([ask()]).results] == list(CHECKS)


@pytest.mark.parametrize(
    "roles",
    ["user customer", "user assistant assistant", "user assistant customer", "user assistant system", "user system", "customer assistant"],
)
def test_a_wrong_role_is_found_wherever_it_stands(roles: str) -> None:
    found = judged([chat(*((role, f"text {i}") for i, role in enumerate(roles.split())))])
    assert found.reason == ["invalid_roles"]


@pytest.mark.parametrize("text", ["N/A", "No input.", "none", "<no input>", "NULL"])
def test_a_prompt_that_says_there_is_none_is_a_placeholder(text: str) -> None:
    assert judged([ask(text)]).reason == ["placeholder_input"]


@pytest.mark.parametrize(
    ("action", "dropped", "passed", "blocking"), [("drop", True, True, False), ("warn", False, False, False), ("fail", False, False, True)]
)
def test_the_policy_says_what_becomes_of_a_bad_row(action: Any, dropped: bool, passed: bool, blocking: bool) -> None:
    found = judged([ask(), EXAMPLES["pii"][1][0]], Rules(policy={"pii": action}))
    assert found.reason == [None, "pii" if dropped else None]
    assert (result("pii", found).passed, result("pii", found).blocking, result("pii", found).count) == (passed, blocking, 1)


def test_failing_is_for_bad_rows_only() -> None:
    assert result("pii", judged([ask()], Rules(policy={"pii": "fail"}))).passed


def test_an_unknown_check_in_the_policy_is_refused() -> None:
    with pytest.raises(ValidationError, match="unknown check 'typos'; checks: malformed_row, "):
        Rules(policy={"typos": "drop"})


@pytest.mark.parametrize("name", SET_CHECKS)
def test_a_check_on_the_set_cannot_drop(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} judges the set as a whole"):
        Rules(policy={name: "drop"})


def test_a_row_is_dropped_for_the_first_check_it_breaks() -> None:
    both = ask("Write to ann.lee@example.org", "")
    found = judged([both])
    assert (found.reason, {"empty_response", "pii"} <= set(found.broken)) == (["empty_response"], True)


def test_dropped_rows_do_not_count_towards_the_set() -> None:
    assert not result("small_dataset", judged([ask("Hi"), ask("Ho", "")])).passed


def test_near_copies_share_a_cluster_and_others_do_not() -> None:
    rows = [ask("Hi"), ask(LONG), ask(LONG.replace("garden", "yellow")), ask("Hi"), ask("Ho")]
    assert judged(rows).cluster == [0, 1, 1, 0, 4]


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


def test_without_a_benchmark_the_leakage_check_says_that_it_had_nothing_to_compare() -> None:
    found = result("benchmark_leakage", judged([ask(HELD_OUT[0])], held_out=[]))
    assert (found.passed, found.note) == (True, "nothing held out to compare with")


@pytest.mark.parametrize("action", ["drop", "warn", "fail"])
def test_an_address_never_appears_in_results(action: Any) -> None:
    secret = "ann.lee@example.org"
    rows = [
        ask(f"Write to {secret}"),
        ask("x" * 110 + f" {secret}"),
        chat(("assistant", f"I am {secret}")),
        chat(problem=f"found {secret}", text=secret),
        ask(" ", secret),
    ]
    results = judged(rows, Rules(policy={"pii": action, "malformed_row": action})).results
    said = json.dumps([asdict(one) for one in results])
    assert "[e-mail]" in said
    assert "ann.lee" not in said
    assert "example.org" not in said


def test_every_row_is_kept_or_dropped_for_a_reason(tmp_path: Path) -> None:
    bad = [name for name in ROW_CHECKS if CHECKS[name].action == "drop" and name not in {"exact_duplicates", "benchmark_leakage"}]
    rows = placed([ask("Hi"), *(EXAMPLES[name][1][-1] for name in bad), ask("Hi"), ask("Ho")])
    write_records(tmp_path / "raw", [{key: value for key, value in row.items() if key != "source_row"} for row in rows])
    write_ledger(tmp_path / "raw", rows)
    report = instructions.run(tmp_path, instructions.Params(), tmp_path / "raw", tmp_path / "out")
    assert (report.rows_in, report.rows_out) == (len(rows), 2)
    assert report.dropped == {**dict.fromkeys(bad, 1), "exact_duplicates": 1}
    assert len(read_records(tmp_path / "out")) == 2
    outcomes = ["kept", *(f"dropped:{name}" for name in bad), "dropped:exact_duplicates", "kept"]
    assert [(row["source_row"], row["outcome"]) for row in read_ledger(tmp_path / "out")] == list(enumerate(outcomes))
