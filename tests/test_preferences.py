"""Sources -> raw_preferences -> preferences: every pair is kept or dropped for
a reason, and no held-out prompt is trained on."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.files import jsonl
from builders.layouts import PAIR_ROWS
from builders.records import LONG, ask, pair, placed
from conftest import SHARED_DATA, draw_pages

from dagster_project.core.errors import InputError
from dagster_project.core.frames import read_pairs
from dagster_project.core.params import parse
from dagster_project.core.records import (
    Report,
    pair_id,
    pair_schema,
    read_ledger,
    read_preferences,
    read_table,
    write_records,
)
from dagster_project.core.rendering import render
from dagster_project.core.strings import StringIndex
from dagster_project.curation.checks.checks import Rules, judge
from dagster_project.curation.checks.quotes import MISSING
from dagster_project.curation.sources import reading
from dagster_project.curation.sources.files import Block, Row, as_parsed
from dagster_project.curation.sources.formats import as_record, pairs_of
from dagster_project.curation.splitting.split import find_copies, verify_splits
from dagster_project.stages import preferences, raw_preferences

Fields = dict[str, Any]
OTHERS = [
    "Where is my kite?",
    "Can I still change the address?",
    "Do the wellington boots come in half sizes?",
    "The login page shows a blank screen",
    "Please cancel the hedge trimmer",
    "Is the greenhouse heater safe overnight?",
]
"""Prompts without a run of words in common."""


def better(
    prompt: str = "Where is my kite?", chosen: str = "On its way.", rejected: str = "No idea.", **more: Any
) -> Fields:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def read(root: Path, *rows: Any, source: Fields | None = None, **section: Any) -> Report:
    """Rows of one file through `raw_preferences`, into `root`/raw."""
    jsonl(root / "data/sources/p.jsonl", *rows)
    values = {"sources": [{"path": "data/sources/p.jsonl", **(source or {})}], **section}
    return raw_preferences.produce(
        root, parse(raw_preferences.Params, values, "raw_preferences"), root / "data/raw_preferences"
    )


def run(
    root: Path,
    model: Path,
    rows: list[Any],
    examples: list[Fields] | None = None,
    previous: Path | None = None,
    **section: Any,
) -> Report:
    """Rows through both stages, into `root`/out and `root`/pages.

    Args:
        examples: the test split of the instructions.
    """
    held_out = [{**row, "source": "e.jsonl", "group_id": row["example_id"]} for row in examples or []]
    write_records(root / "data/splits/test", held_out)
    read(root, *rows) if rows else raw_preferences.produce(
        root, raw_preferences.Params(), root / "data/raw_preferences"
    )
    params = parse(preferences.Params, {"test": 0.0, "validation": 0.0, **section}, "preferences")
    before = {path.relative_to(previous).as_posix(): path for path in previous.rglob("*.*")} if previous else {}
    report = preferences.produce(
        root,
        params,
        7,
        root / "data/raw_preferences",
        root / "data/splits",
        model,
        root / "out",
        root / "pages",
        before,
    )
    draw_pages("preferences", report, root / "out", root / "pages")
    return report


def prompts(root: Path) -> dict[str, set[str]]:
    """Split -> what is asked in it."""
    return {
        name: {pair["prompt"][-1]["content"] for pair in read_preferences(root / "out" / name)}
        for name in ("train", "validation", "test")
    }


# raw_preferences


@pytest.mark.parametrize("layout", PAIR_ROWS)
def test_a_pair_in_any_layout_becomes_one_canonical_pair(layout: str, tmp_path: Path) -> None:
    report = read(tmp_path, *PAIR_ROWS[layout])
    (pair,) = read_pairs(tmp_path / "data/raw_preferences")
    sides = [
        [{"role": role, "content": said}]
        for role, said in (("user", "Hi"), ("assistant", "Hello"), ("assistant", "What?"))
    ]
    assert [pair["prompt"], pair["chosen"], pair["rejected"]] == sides and pair["example_id"] == pair_id(*sides)
    assert pair["source_rows"] == [*range(len(PAIR_ROWS[layout]))]
    found = report.metrics["sources"]["data/sources/p.jsonl"]
    assert (found["format"], found["rows"], found["pairs"]) == (layout, len(PAIR_ROWS[layout]), 1)


def test_answers_without_any_counterpart_are_pairs_with_one_side(tmp_path: Path) -> None:
    read(
        tmp_path,
        {"prompt": "Hi", "completion": "Hello", "label": True},
        {"prompt": "Ho", "completion": "What?", "label": False},
    )
    first, second = read_pairs(tmp_path / "data/raw_preferences")
    assert (first["rejected"], second["chosen"]) == ([], []) and first["example_id"] != second["example_id"]
    assert json.loads(first["meta"])["problem"] == "no rejected completion of the same prompt"


def test_every_source_row_has_a_line_for_each_pair_it_is_in(tmp_path: Path) -> None:
    labels = [("Hi", "a", True), ("Ho", "b", False), ("Hi", "c", False)]
    read(tmp_path, *({"prompt": prompt, "completion": text, "label": label} for prompt, text, label in labels))
    lines = [(line["source_row"], line["outcome"]) for line in read_ledger(tmp_path / "data/raw_preferences")]
    assert lines == [(0, "read"), (2, "joined"), (1, "read")]
    assert [pair["source_rows"] for pair in read_pairs(tmp_path / "data/raw_preferences")] == [[0, 2], [1]]


def test_nothing_is_dropped_and_an_unreadable_row_keeps_its_number(tmp_path: Path) -> None:
    report = read(tmp_path, better(), "broken", better("Ho"), better(chosen=3))
    pairs = read_pairs(tmp_path / "data/raw_preferences")
    assert (report.rows_in, report.rows_out, len(pairs)) == (4, 4, 4)
    assert [pair["source_row"] for pair in pairs if not pair["prompt"]] == [1, 3]
    assert len({pair["example_id"] for pair in pairs}) == 4


def test_a_source_that_is_mostly_unreadable_is_refused_in_the_name_of_its_section(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 of 3 rows cannot be read") as caught:
        read(tmp_path, better(), "broken", better(chosen=3))
    assert "raw_preferences.max_malformed (0.5)" in caught.value.hint


def test_the_end_of_the_prompt_is_part_of_a_pairs_identity() -> None:
    a, b, c = ([{"role": role, "content": role}] for role in ("user", "assistant", "user"))
    assert pair_id([*a, *b, *c], b, b) != pair_id(a, [*b, *c, *b], b)


def test_completions_in_different_splits_are_not_paired(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "completion": text, "label": label, "split": split}
        for text, label, split in [("a", True, "train"), ("b", False, "dev")]
    ]
    read(tmp_path, *rows, {**rows[0], "completion": "c", "label": False})
    pairs = read_pairs(tmp_path / "data/raw_preferences")
    assert [(pair["source_rows"], json.loads(pair["meta"])["split"]) for pair in pairs] == [
        ([0, 2], "train"),
        ([1], "validation"),
    ]


def test_a_mapping_may_name_the_category(tmp_path: Path) -> None:
    mapping = {"prompt": "q", "chosen": "good", "rejected": "bad", "category": "kind"}
    read(
        tmp_path, {"q": "Hi", "good": "Hello", "bad": "What?", "kind": "tone", "stars": 4}, source={"mapping": mapping}
    )
    (pair,) = read_pairs(tmp_path / "data/raw_preferences")
    assert (pair["category"], json.loads(pair["meta"])) == ("tone", {"stars": 4})


def test_fields_of_both_rows_of_a_pair_that_are_not_used_reach_the_checks(tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said, name: 7}]
        for said, name in (("A", "id"), ("B", "audio_id"))
    ]
    report = read(tmp_path, *({"messages": one, "label": good} for one, good in zip(turns, (True, False), strict=True)))
    assert report.metrics["sources"]["data/sources/p.jsonl"]["fields"]["ignored"] == {
        "messages[].audio_id": 1,
        "messages[].id": 1,
    }
    assert [pair["ignored"] for pair in read_pairs(tmp_path / "data/raw_preferences")] == [
        ["messages[].id", "messages[].audio_id"]
    ]
    assert report.checks[0].count == 1


def test_a_mapping_of_examples_is_refused_for_pairs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown field 'response'; fields: prompt, chosen, rejected, category"):
        read(tmp_path, better(), source={"mapping": {"prompt": "q", "response": "a"}})


def test_a_split_of_the_hub_is_read_as_pairs_and_keeps_its_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(i, better(text)) for i, text in enumerate(OTHERS)]
    monkeypatch.setattr(reading, "split_blocks", lambda named: iter([Block(as_parsed, rows)]))
    source = {"hub": "org/name", "revision": "0123456789" * 4, "split": "test"}
    params = parse(raw_preferences.Params, {"sources": [source], "limit": 2}, "raw_preferences")
    found = raw_preferences.produce(tmp_path, params, tmp_path / "data/raw_preferences").metrics["sources"][
        "hub:org/name@012345678901/test"
    ]
    assert (found["rows"], found["pairs"], found["revision"]) == (2, 2, source["revision"])
    assert {json.loads(pair["meta"])["split"] for pair in read_pairs(tmp_path / "data/raw_preferences")} == {"test"}


def test_messages_of_a_tree_that_are_in_no_pair_are_ignored_with_all_fields(tmp_path: Path) -> None:
    def turn(text: str, *replies: dict[str, Any], role: str = "assistant", **more: Any) -> dict[str, Any]:
        return {"role": role, "text": text, "replies": list(replies), **more}

    asked = turn("Why?", turn("So.", rank=0), role="prompter")
    answers = turn("Hello", rank=0), turn("What?", asked, rank=1), turn("Hm.", rank=None)
    report = read(tmp_path, json.dumps({"message_tree_id": "t", "prompt": turn("Hi", *answers, role="prompter")}))
    found = report.metrics["sources"]["data/sources/p.jsonl"]["fields"]
    assert found["used"] == {"prompt": 1, "prompt[].rank": 3, **dict.fromkeys(TREE_TURN, 3)}
    left_out = {f"{name} (left out)": 3 for name in TREE_TURN}
    assert found["ignored"] == {"prompt[].rank (left out)": 1, **left_out}


TREE_TURN = ("prompt[].replies", "prompt[].role", "prompt[].text")


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real files lie beside the project, not in it")
def test_ranked_siblings_of_real_trees_are_pairs(tmp_path: Path) -> None:
    trees = (SHARED_DATA / "oasst_en_100_tree.jsonl").read_text(encoding="utf-8").splitlines()
    report = read(tmp_path, *trees)
    facts = report.metrics["sources"]["data/sources/p.jsonl"]
    used, ignored = (facts["fields"][place] for place in ("used", "ignored"))
    assert used["prompt[].text"] + ignored["prompt[].text (left out)"] == 1167, "each message of each tree, once"
    assert {key: value for key, value in facts.items() if key != "fields"} | {"sha256": ""} == {
        "format": "oasst", "rows": 100, "pairs": 429, "license": "unknown", "sha256": ""
    }  # fmt: skip
    assert all(pair["margin"] >= 1 for pair in read_pairs(tmp_path / "data/raw_preferences") if pair["chosen"])


# preferences


def test_every_pair_is_kept_or_dropped_for_a_reason(tmp_path: Path, tiny_model: Path) -> None:
    mismatch = [{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "Hey"}]
    bad = {
        "malformed_row": better(OTHERS[1], chosen=3),
        "prompt_mismatch": better(OTHERS[2], mismatch, mismatch),
        "identical_pair": better(OTHERS[3], "Yes indeed.", "Yes indeed."),
        "tied_pair": better(OTHERS[4], margin=0),
        "too_long": better(OTHERS[5], rejected="word " * 300),
        "exact_duplicates": better(),
    }
    report = run(tmp_path, tiny_model, [better(), *bad.values(), better("Ho")])
    assert (report.rows_in, report.rows_out, report.dropped) == (8, 2, dict.fromkeys(report.dropped, 1))
    assert report.dropped.keys() == bad.keys()
    outcomes = ["train", *(f"dropped:{name}" for name in bad), "train"]
    assert [(line["source_row"], line["outcome"]) for line in read_ledger(tmp_path / "out")] == list(
        enumerate(outcomes)
    )
    found = json.loads((tmp_path / "out/findings.json").read_text())
    assert (found["rows"], found["kept"], found["dropped"]) == (8, 2, report.dropped)


def test_sides_of_different_length_are_not_identical_though_they_end_alike() -> None:
    def say(*texts: str) -> list[Fields]:
        return [{"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(texts)]

    row = Row(0, better(chosen=say("Which kite?", "The red one.", "On its way."), rejected=say("On its way.")))  # type: ignore[arg-type]
    pairs = pairs_of([row], "p.jsonl", "p.jsonl")[1]
    assert judge([as_record(pair) for pair in pairs], [], Rules(), kind="preferences").broken.keys() == {
        "prompt_mismatch"
    }


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        (["user"], "invalid_roles"),
        (["assistant", "user", "user"], "invalid_roles"),
        (["assistant", "user", "customer"], "invalid_roles"),
        (["assistant", "user"], "ends_on_user_turn"),
        (["assistant", "user", "assistant"], None),
    ],
)
def test_the_rejected_side_takes_turns_and_ends_with_an_answer(rejected: list[str], reason: str | None) -> None:
    """Otherwise its last answer is an earlier one, of the prompt or of both sides, which training would reject."""

    def say(*roles: str) -> list[Fields]:
        return [{"role": role, "content": f"Text {i}."} for i, role in enumerate(roles)]

    turns = [{"role": "user", "content": "Where is my kite?"}, *say("assistant", "user")]
    messages = [*turns, *say("assistant", "user", "assistant")]
    said = [*say(*rejected)[:-1], {"role": rejected[-1], "content": "No idea."}]
    record = {**pair(), "messages": messages, "asked": len(turns), "rejected": said}
    assert judge(placed([record]), [], Rules(), kind="preferences").reason[0] == reason


@pytest.mark.parametrize(
    "rows", [[better()], [better(rejected="On its way.")], []], ids=["a pair is kept", "none is", "there is none"]
)
def test_every_check_is_always_reported(rows: list[Fields], tmp_path: Path, tiny_model: Path) -> None:
    assert {check.name for check in run(tmp_path, tiny_model, rows).checks} == preferences.CHECK_DESCRIPTIONS.keys()


def test_a_project_without_preferences_has_an_empty_set_and_no_error(tmp_path: Path, tiny_model: Path) -> None:
    report = run(tmp_path, tiny_model, [], examples=[ask()])
    assert (report.rows_in, report.rows_out) == (0, 0) and all(check.passed for check in report.checks)
    assert {check.note for check in report.checks} == {"raw_preferences.sources names none"}
    assert prompts(tmp_path) == {"train": set(), "validation": set(), "test": set()}


def test_a_set_without_remaining_pairs_stops_the_stage(tmp_path: Path, tiny_model: Path) -> None:
    assert [check.name for check in run(tmp_path, tiny_model, [better(rejected="On its way.")]).failures] == ["schema"]


def test_a_requested_split_without_pairs_stops_the_stage(tmp_path: Path, tiny_model: Path) -> None:
    (failed,) = run(tmp_path, tiny_model, [better(split="train"), better("Ho", split="test")], validation=0.1).failures
    assert (failed.name, failed.note) == ("schema", "no pairs in: validation")


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_length_is_that_of_the_longer_side_as_the_template_writes_it(
    side: str, tmp_path: Path, tiny_model: Path, tiny_tokenizer: Any
) -> None:
    said = "I have looked into it, and the kite is with the carrier. " * 3
    turns = [{"role": "user", "content": "Where is my kite?"}, {"role": "assistant", "content": said.strip()}]
    length = len(tiny_tokenizer(render(tiny_tokenizer, turns), add_special_tokens=False)["input_ids"])
    for limit, dropped in ((length, {}), (length - 1, {"too_long": 1})):
        report = run(tmp_path, tiny_model, [better(), better(**{side: said.strip()})], max_length=limit)
        assert report.dropped == dropped


def test_no_pair_is_longer_than_the_context_of_the_base_model(tmp_path: Path, tiny_model: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 60}))
    assert run(tmp_path, model, [better(), better(chosen="On its way. " * 3)]).dropped == {"too_long": 1}


def test_pairs_of_nearly_the_same_prompt_stay_in_one_split(tmp_path: Path, tiny_model: Path) -> None:
    rows = [
        better(f"{LONG} {word}", f"Sorry about {word}.", category="late") for word in ("", "again", "please", "now")
    ]
    rows += [better(text, category="late") for text in OTHERS]
    report = run(tmp_path, tiny_model, rows, test=0.4, validation=0.2)
    assert {name: len(asked) for name, asked in prompts(tmp_path).items()} == {"train": 4, "validation": 2, "test": 4}
    assert sum(any(LONG in asked for asked in found) for found in prompts(tmp_path).values()) == 1
    assert report.metrics["prompt_groups"] == 7


def test_answers_to_one_prompt_have_one_group(tmp_path: Path, tiny_model: Path) -> None:
    run(tmp_path, tiny_model, [better("Hi", "Hello there."), better("Hi", "Good day."), better("Ho")])
    groups = [pair["group_id"] for pair in read_preferences(tmp_path / "out/train")]
    assert groups[0] == groups[1] != groups[2]


def test_the_split_of_a_row_is_kept_and_a_missing_one_is_assigned_from_train(tmp_path: Path, tiny_model: Path) -> None:
    rows = [better(text, split="test" if i < 2 else "train") for i, text in enumerate(OTHERS)]
    run(tmp_path, tiny_model, rows, test=0.5, validation=0.25)
    found = prompts(tmp_path)
    assert found["test"] == set(OTHERS[:2]) and len(found["validation"]) == 1 and len(found["train"]) == 3
    said = {(line["outcome"], line["why"]) for line in read_ledger(tmp_path / "out")}
    assert said == {("test", "label of the source"), ("train", "label of the source"), ("validation", "")}


def test_no_pair_is_trained_on_whose_prompt_the_instructions_hold_out(tmp_path: Path, tiny_model: Path) -> None:
    near = LONG.replace("garden", "yellow")
    rows = [
        better(near, split="train"),
        better(OTHERS[1], split="train"),
        better(OTHERS[2], split="test"),
        better(OTHERS[3]),
    ]
    report = run(tmp_path, tiny_model, rows, examples=[ask(LONG), ask(OTHERS[2]), ask(OTHERS[3])])
    assert prompts(tmp_path) == {"train": {OTHERS[1]}, "validation": set(), "test": {OTHERS[2], OTHERS[3]}}
    assert report.dropped == {"split_leakage": 1}
    check = next(check for check in report.checks if check.name == "split_leakage")
    assert (check.passed, check.count, check.rows, check.dropped) == (True, 1, ["data/sources/p.jsonl:0"], 1)
    (match,) = check.matches
    place = f"data/splits/test:{ask(LONG)['example_id']}"
    assert match["other"] == place and not {"text", "other_text"} & match.keys()
    page = re.sub("<[^>]+>", "", (tmp_path / "pages/report.html").read_text(encoding="utf-8"))
    assert near in page and LONG in page and MISSING not in page
    assert (
        read_ledger(tmp_path / "out")[0]["why"]
        == f"train by the label of its source, but belongs to {place}, which is test"
    )
    assert [(row["check"], row["other"]) for row in read_table(tmp_path / "out/overlaps.parquet")] == [
        ("split_leakage", place)
    ]


def test_the_finished_splits_are_verified_against_the_test_examples(tmp_path: Path) -> None:
    """Whatever dealt them out: the shards themselves are read."""
    said = [{"role": "user", "content": LONG}]
    pair = {
        "example_id": "p",
        "source": "p.jsonl",
        "prompt": said,
        "chosen": [],
        "rejected": [],
        "group_id": "p",
        "meta": "{}",
    }
    for name in ("train", "validation", "test"):
        write_records(tmp_path / "out" / name, [pair] if name == "train" else [], pair_schema())
    write_records(tmp_path / "held", [{**ask(LONG), "source": "e.jsonl", "group_id": "e"}])
    identity = ask(LONG)["example_id"]
    proof = verify_splits(tmp_path / "out", find_copies([LONG]), StringIndex(["p", identity]), tmp_path / "held")
    assert [(leak.place, leak.other) for leak in proof.leaks] == [(f"test/{identity}", "train/p")]
    assert not verify_splits(tmp_path / "out", find_copies([LONG]), StringIndex(["p"])).leaks


def test_of_leaking_upstream_pairs_the_less_strictly_held_out_is_dropped(tmp_path: Path, tiny_model: Path) -> None:
    rows = [better(LONG, split="train"), better(f"{LONG} please", split="test"), better(OTHERS[0], split="train")]
    report = run(tmp_path, tiny_model, rows)
    assert report.dropped == {"split_leakage": 1} and prompts(tmp_path)["test"] == {f"{LONG} please"}


def test_the_check_passes_where_the_leaking_pairs_of_the_source_were_dropped(tmp_path: Path, tiny_model: Path) -> None:
    rows = [better(LONG, split="validation"), better(f"{LONG} please", split="test"), better(OTHERS[0], split="train")]
    report = run(tmp_path, tiny_model, rows)
    check = next(check for check in report.checks if check.name == "split_leakage")
    assert (check.passed, check.count, check.rows, check.dropped) == (True, 1, ["data/sources/p.jsonl:0"], 1)
    assert prompts(tmp_path)["test"] == {f"{LONG} please"}


def test_a_pair_that_repeats_a_benchmark_is_dropped(tmp_path: Path, tiny_model: Path) -> None:
    question = {
        "question": "Which planet do people sometimes call the red planet?",
        "choices": ["Mars", "Venus"],
        "answer": 0,
    }
    jsonl(tmp_path / "data/sources/benchmarks/b.jsonl", question)
    rows = [better(question["question"]), better()]
    report = run(tmp_path, tiny_model, rows, benchmarks=["data/sources/benchmarks/b.jsonl"])
    assert (report.dropped, report.metrics["held_out_questions"]) == ({"benchmark_leakage": 1}, 1)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_pair_with_an_answer_that_quotes_a_benchmark_is_dropped(tmp_path: Path, tiny_model: Path, side: str) -> None:
    quoted = "Which planet do people sometimes call the red planet, and why do they?"
    question = {"question": quoted, "choices": ["Mars", "Venus"], "answer": 0}
    jsonl(tmp_path / "data/sources/benchmarks/b.jsonl", question)
    sides = {"chosen": "A good answer", "rejected": "A bad one", side: f"You could ask: {quoted}"}
    rows = [better(OTHERS[1], sides["chosen"], sides["rejected"]), better()]
    report = run(tmp_path, tiny_model, rows, benchmarks=["data/sources/benchmarks/b.jsonl"])
    assert report.dropped == {"benchmark_leakage": 1}
    [leak] = read_table(tmp_path / "out/overlaps.parquet")
    assert (leak["check"], leak["part"]) == ("benchmark_leakage", {"chosen": "response"}.get(side, side))


def test_length_bias_is_reported_for_the_kept_pairs(tmp_path: Path, tiny_model: Path) -> None:
    sides = [("long answer", "short"), ("long answer", "short"), ("short", "long answer"), ("equal", "alike")]
    rows = [better(text, *both) for text, both in zip(OTHERS, sides, strict=False)]
    rows += [better("Ho", "much the longest", "much the longest"), better(LONG, "a leak", "no", split="train")]
    report = run(tmp_path, tiny_model, rows, examples=[ask(LONG)], max_longer_share=0.6)
    assert report.dropped == {"identical_pair": 1, "split_leakage": 1}
    assert (report.metrics["chosen_longer_share"], report.metrics["length_rule_accuracy"]) == (0.5, 0.625)
    check = next(check for check in report.checks if check.name == "length_bias")
    assert not check.passed and "chosen is longer in 50% of pairs" in check.note
    assert check.note.endswith("would be right in 62%, counting half of those of equal length")


def test_length_bias_is_reported_where_the_shorter_answer_wins(tmp_path: Path, tiny_model: Path) -> None:
    sides = [("short", "long answer"), ("short", "long answer"), ("long answer", "short"), ("equal", "alike")]
    rows = [better(text, *both) for text, both in zip(OTHERS, sides, strict=False)]
    report = run(tmp_path, tiny_model, rows, max_longer_share=0.6)
    assert (report.metrics["chosen_longer_share"], report.metrics["length_rule_accuracy"]) == (0.25, 0.375)
    check = next(check for check in report.checks if check.name == "length_bias")
    assert not check.passed
    assert check.note == (
        'chosen is shorter in 50% of pairs, so "the shorter one wins" would be right in 62%,'
        " counting half of those of equal length"
    )
    assert all(check.passed for check in run(tmp_path, tiny_model, rows, max_longer_share=0.63).checks[-1:])


def test_a_decision_in_the_review_file_is_applied_on_the_next_run(tmp_path: Path, tiny_model: Path) -> None:
    rows = [better("Hi", "Hello you", "Bye you"), better("Hi", "Bye you", "Hello you")]
    assert run(tmp_path, tiny_model, rows).metrics["waiting_for_review"] == 1
    with (tmp_path / "pages/review.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["place"], line["check"]) == ("data/sources/p.jsonl:1", "conflicting_responses")
    for decision, kept in (
        ({"decision": "drop"}, ["Hello you"]),
        ({"decision": "edit", "new_response": "Good day"}, ["Hello you", "Good day"]),
    ):
        with (tmp_path / "decided.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, line)
            writer.writeheader()
            writer.writerow({**line, **decision, "reason": "rude"})
        run(tmp_path, tiny_model, rows, review="decided.csv")
        pairs = read_preferences(tmp_path / "out/train")
        assert [pair["chosen"][0]["content"] for pair in pairs] == kept
        assert [pair["example_id"] for pair in pairs] == [
            pair_id(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs
        ]


def test_the_same_pairs_give_the_same_bytes_and_only_the_page_shows_changes(tmp_path: Path, tiny_model: Path) -> None:
    rows = [better(text) for text in OTHERS]
    run(tmp_path / "a", tiny_model, rows, validation=0.2)
    run(tmp_path / "b", tiny_model, rows, validation=0.2, previous=tmp_path / "a/out")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a/out").rglob("*.*"))
    assert [
        path for path in files if (tmp_path / "a" / path).read_bytes() != (tmp_path / "b" / path).read_bytes()
    ] == []
    run(
        tmp_path / "b",
        tiny_model,
        [*rows[:-1], better("Ho"), better("Hey")],
        validation=0.2,
        previous=tmp_path / "a/out",
    )
    page = (tmp_path / "b/pages/report.html").read_text()
    assert "1 of 1 row changed" in page and "1 of 1 row added" in page
    assert "the version recorded before" not in (tmp_path / "a/pages/report.html").read_text()


def test_a_pair_that_moves_to_another_file_row_is_the_same_pair(tmp_path: Path, tiny_model: Path) -> None:
    run(tmp_path / "a", tiny_model, [better(text) for text in OTHERS], test=0.3)
    run(tmp_path / "b", tiny_model, [better(text) for text in reversed(OTHERS)], test=0.3)
    assert prompts(tmp_path / "a") == prompts(tmp_path / "b")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"max_tokens": 100}, "preferences.max_tokens: unknown key"),
        ({"test": 0.6, "validation": 0.4}, "leave nothing to train on"),
        ({"policy": {"length": "warn"}}, "unknown check 'length'"),
    ],
)
def test_invalid_settings_are_refused(section: Fields, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse(preferences.Params, section, "preferences")
    assert "max_tokens" not in caught.value.hint and ("unknown key" not in message or "max_length" in caught.value.hint)
