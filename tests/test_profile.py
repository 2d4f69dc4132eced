"""The profile of a set matches hand computations on tiny ones, and each check on its shares fails where it should."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pandera.polars as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.core.records import example_id
from dagster_project.curation.checks.profile import (
    Limits,
    _masked,
    failures,
    notes,
    opening,
    profile,
    response_opening,
    set_schema,
    shares,
)
from dagster_project.curation.checks.references import Reference

Record = dict[str, Any]
LIMITS = Limits(min_rows=1)


def chat(*turns: tuple[str, str], category: str | None = None, source: str = "rows.jsonl") -> Record:
    messages = [{"role": role, "content": content} for role, content in turns]
    row = {"source": source, "source_row": 0, "messages": messages, "category": category, "meta": "{}"}
    return {"example_id": example_id(messages), **row}


def ask(prompt: str, answer: str = "Yes.", **more: Any) -> Record:
    return chat(("user", prompt), ("assistant", answer), **more)


NOUNS = ["kite", "harbour", "violin", "pepper", "glacier", "engine", "lantern", "orchard", "puzzle", "sparrow"]
RANDOM = random.Random(7)
WORDS = ["".join(RANDOM.choices("aeioulnrst", k=6)) for _ in range(2000)]


def varied(size: int) -> list[Record]:
    """Prompts that have little in common, each with a response of its own."""
    draw = random.Random(7)
    return [ask(" ".join(draw.choices(WORDS, k=12)), f"Answer {i}") for i in range(size)]


# Balance


def test_categories_come_most_frequent_first_and_ties_by_name() -> None:
    found = profile([ask("Hi", category=name) for name in ("b", "c", "a", "c", None)])
    assert list(found["categories"].items()) == [("c", 2), ("(none)", 1), ("a", 1), ("b", 1)]
    assert (found["category_count"], found["singletons"], found["rarest"]) == (3, 2, {"a": 1, "b": 1, "c": 2})


def test_entropy_is_that_of_the_categories_without_the_uncategorised_rows() -> None:
    found = profile([ask("Hi", category=name) for name in ("a", "a", "b", "c", None)])
    assert (found["entropy"], found["effective_categories"]) == (1.5, 2.8284)


def test_four_equal_categories_are_effectively_four() -> None:
    found = profile([ask("Hi", category=name) for name in "abcd"])
    assert (found["entropy"], found["effective_categories"]) == (2.0, 4.0)


def test_a_set_without_categories_counts_as_one_category() -> None:
    found = profile([ask("Hi"), ask("Ho", category=" ")])
    assert (found["categories"], found["category_count"], found["singletons"], found["rarest"]) == (
        {"(none)": 2},
        0,
        0,
        {},
    )
    assert (found["entropy"], found["effective_categories"]) == (0.0, 1.0)


def test_categories_beyond_fifty_are_summed_up() -> None:
    found = profile([ask("Hi", category=f"c{i:02}") for i in range(60)])
    assert (len(found["categories"]), found["categories"]["(others)"], found["category_count"]) == (51, 10, 60)


def test_an_address_as_category_is_masked() -> None:
    found = profile(
        [
            ask("Hi", category="ann.lee@example.org"),
            ask("Ho", "Write to ann.lee@example.org"),
            ask("Hu", "Write to ann.lee@example.org"),
        ]
    )
    assert found["categories"] == {"(none)": 2, "[e-mail]": 1}
    assert "ann.lee" not in json.dumps(found)


def test_categories_that_are_masked_alike_are_counted_apart() -> None:
    names = [*["ann@shop.com"] * 95, *["bob@shop.com"] * 5, *["login"] * 20]
    found = profile([ask(f"Hi {i}", category=name) for i, name in enumerate(names)])
    assert found["categories"] == {"[e-mail]": 95, "login": 20, "[e-mail] 2": 5}
    assert found["rarest"] == {"[e-mail] 2": 5, "login": 20, "[e-mail]": 95}
    assert _masked(["[e-mail] 2", "a@b.de", "c@d.de"]) == {
        "[e-mail] 2": "[e-mail] 2",
        "a@b.de": "[e-mail]",
        "c@d.de": "[e-mail] 3",
    }
    assert shares(found, Limits())["category_ratio"].to_list() == [19.0]


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Where is my kite?", "Latin"),
        ("Où est le café ?", "Latin"),
        ("“Kite”, she said", "Latin"),
        ("请写一首关于风筝的诗", "Han"),
        ("凧について詩を書いて", "Kana"),
        ("연에 대한 시를 써 줘", "Hangul"),
        ("Где мой воздушный змей, Bob?", "Cyrillic"),
        ("أين طائرتي الورقية؟", "Arabic"),
        ("איפה העפיפון שלי?", "Hebrew"),
        ("मेरी पतंग कहाँ है?", "Devanagari"),
        ("Πού είναι ο χαρταετός;", "Greek"),
        ("ว่าวของฉันอยู่ที่ไหน", "Thai"),
        ("2 + 2 = ?", "(none)"),
        ("— ½ …", "(none)"),
        ("ᚠᚢᚦᚨᚱᚲ", "other"),
        ("", "(none)"),
    ],
)
def test_the_script_of_a_prompt_is_that_of_most_of_its_letters(text: str, script: str) -> None:
    assert profile([ask(text)])["scripts"] == {script: 1}


@pytest.mark.parametrize(
    ("roles", "shape"),
    [
        ("user assistant", "user assistant"),
        ("system user assistant", "system user assistant"),
        ("system user assistant user assistant", "system user assistant ... (4 turns)"),
        ("user assistant user", "user assistant ... (3 turns)"),
        ("user customer assistant", "user customer assistant"),
        ("", "(none)"),
    ],
)
def test_a_conversations_shape_is_its_roles_with_repeats_folded(roles: str, shape: str) -> None:
    assert profile([chat(*((role, "Hi") for role in roles.split()))])["roles"] == {shape: 1}


# Lengths


def test_lengths_are_words_in_bins_that_double() -> None:
    found = profile([ask("one two three", "don't"), ask("one two three four five", ""), ask("请写诗", "1 2 3 4")])[
        "lengths"
    ]
    assert found["prompt"] == {
        "unit": "words", "total": 11, "median": 3, "p95": 4.8, "max": 5,
        "histogram": [{"from": 2, "to": 4, "rows": 2}, {"from": 4, "to": 8, "rows": 1}],
    }  # fmt: skip
    assert [(b["from"], b["to"], b["rows"]) for b in found["response"]["histogram"]] == [
        (0, 1, 1),
        (1, 2, 1),
        (2, 4, 0),
        (4, 8, 1),
    ]
    assert "tokens" not in found


def test_token_counts_are_shown_where_they_are_known() -> None:
    found = profile([ask("Hi"), ask("Ho")], lengths=[10, 30])["lengths"]["tokens"]
    assert (found["unit"], found["total"], found["median"], found["max"]) == ("tokens", 40, 20, 30)


# Diversity


def test_distinct_n_is_different_words_and_pairs_over_all() -> None:
    found = profile([ask("Write a poem"), ask("write a song")])["diversity"]
    assert (found["sampled_words"], found["distinct_1"], found["distinct_2"]) == (6, 0.6667, 0.75)
    # write and a stand for a third each, poem and song for a sixth
    entropy = 2 / 3 * math.log2(3) + 1 / 3 * math.log2(6)
    assert found["effective_words"] == round(2**entropy, 4) == 3.7798


def test_pairs_of_words_do_not_reach_from_one_prompt_into_the_next() -> None:
    assert profile([ask("one"), ask("two")])["diversity"]["distinct_2"] == 0.0


def test_the_template_share_counts_pairs_that_many_prompts_have() -> None:
    rows = [ask(f"tell me of {noun}") for noun in NOUNS[:4]]
    assert profile(rows)["diversity"]["template_share"] == 0.6667, "tell me, me of; not of kite"
    assert profile(rows[:2])["diversity"]["template_share"] == 0.0, "two prompts prove no template"


def test_more_of_the_same_moves_the_vocabulary_little_once_the_sample_is_full() -> None:
    draw = random.Random(1)
    rows = [ask(" ".join(draw.choices(WORDS[:150], k=12))) for _ in range(12_000)]
    small, large = (profile(rows[:n])["diversity"] for n in (2_000, 12_000))
    assert (small["sampled_words"], large["sampled_words"]) == (20_004, 20_004), "whole prompts"
    assert large["distinct_2"] == pytest.approx(small["distinct_2"], abs=0.02)


def test_openings_are_the_first_two_words_of_the_last_question() -> None:
    rows = [
        ask("Write a poem"),
        ask("'WRITE, a song"),
        chat(("user", "Hello there"), ("assistant", "Hi"), ("user", "What's the time?"), ("assistant", "Nine")),
        ask("请写诗"),
        ask("?"),
    ]
    found = profile(rows)["diversity"]
    assert (found["openings"], found["top_opening_share"]) == (3, 0.4)
    first = min(rows[:2], key=lambda row: row["example_id"])
    assert found["top_openings"] == [{**Reference.of(first)._asdict(), "rows": 2}] and opening(first) == "write a"
    assert found["opening_entropy"] == 1.5


def test_numbers_in_openings_are_replaced() -> None:
    rows = [ask("555-0100 is mine"), ask("555-0199 is hers")]
    assert [one["rows"] for one in profile(rows)["diversity"]["top_openings"]] == [2] and opening(rows[0]) == "# #"


def test_repeated_responses_are_named_but_only_long_ones_have_a_share() -> None:
    refusal = "I am sorry, but I do not know the answer."
    rows = [
        *(ask(f"{i}?", refusal) for i in range(2)),
        *(ask(f"{i}!", "positive") for i in range(7)),
        ask("Hi", "Hello"),
    ]
    found = profile(rows)["diversity"]
    assert (found["repeated_responses"], found["top_response_share"]) == (2, 0.2)
    first = [min(some, key=lambda row: row["example_id"]) for some in (rows[2:9], rows[:2])]
    assert found["top_responses"] == [
        {**Reference.of(row)._asdict(), "rows": n} for row, n in zip(first, (7, 2), strict=True)
    ]
    assert [response_opening(row) for row in first] == ["positive", refusal]


# Readability


def test_reading_ease_is_fleschs_formula() -> None:
    found = profile([ask("The cat sat on the mat and it was very happy.")])["readability"]
    # 11 words in one sentence, 13 syllables: ve-ry, hap-py
    assert (found["rows"], found["median"]) == (1, round(206.835 - 1.015 * 11 - 84.6 * 13 / 11, 4))
    assert found["share_hard"] == 0.0
    assert found["histogram"][9] == {"from": 90, "to": 100, "rows": 1}


def test_sentences_end_at_stops_and_lines_but_not_within_numbers() -> None:
    found = profile([ask("Cats sat. Dogs ran!\nThe sum was 3.5 or so?\n\nFine")])["readability"]
    # Cats sat | Dogs ran | The sum was 3.5 or so | Fine: 4 sentences, 12 words (3.5 is two), one syllable each
    assert found["median"] == round(206.835 - 1.015 * 12 / 4 - 84.6, 4)


@pytest.mark.parametrize(
    ("word", "syllables"),
    [
        ("the", 1),
        ("make", 1),
        ("whole", 1),
        ("walked", 1),
        ("times", 1),
        ("table", 2),
        ("wanted", 2),
        ("houses", 2),
        ("Mr", 1),
        ("x7", 1),
        ("don't", 1),
        ("happy", 2),
        ("photograph", 3),
        ("café", 2),
        ("tree", 1),
        ("little", 2),
    ],
)
def test_syllables_are_groups_of_vowels_without_the_silent_ones(word: str, syllables: int) -> None:
    assert profile([ask(" ".join([word] * 10))])["readability"]["median"] == round(
        206.835 - 1.015 * 10 - 84.6 * syllables, 4
    )


def test_short_prompts_and_other_scripts_are_not_scored() -> None:
    found = profile(
        [ask("Hi there"), ask("Где мой воздушный змей и где мой старый добрый конь, друг?"), ask("请" * 20)]
    )
    assert (found["readability"]["rows"], "median" in found["readability"]) == (0, False)


# The whole


def test_an_empty_set_has_a_profile() -> None:
    found = profile([])
    assert (found["rows"], found["entropy"], found["effective_categories"], found["diversity"]["openings"]) == (
        0,
        0.0,
        0.0,
        0,
    )
    assert failures(found, Limits()) == {
        "small_dataset": "0 rows, 0 words: teaches form more than knowledge; a prompt or retrieval may do"
    }


def test_a_row_that_could_not_be_read_counts_as_one_without_anything() -> None:
    found = profile([chat(), ask("Hi")])
    assert (found["rows"], found["roles"], found["scripts"]) == (
        2,
        {"(none)": 1, "user assistant": 1},
        {"(none)": 1, "Latin": 1},
    )


texts = st.sampled_from(
    [
        "",
        "Hi",
        "Write a poem",
        "Write a song about the sea and all of its many ships",
        "请写诗",
        "I am sorry, but I do not know that at all.",
    ]
)
some = st.lists(
    st.builds(ask, texts, texts, category=st.sampled_from([None, "a", "b"]), source=st.sampled_from(["x", "y"])),
    max_size=30,
)


@settings(max_examples=50, deadline=None)
@given(some)
def test_every_breakdown_accounts_for_every_row(rows: list[Record]) -> None:
    found = profile(rows)
    assert {sum(found[part].values()) for part in ("categories", "sources", "scripts", "roles")} == {len(rows)}
    assert {sum(b["rows"] for b in found["lengths"][side]["histogram"]) for side in ("prompt", "response")} == {
        len(rows)
    }
    assert found["readability"]["rows"] == sum(b["rows"] for b in found["readability"].get("histogram", []))


@settings(max_examples=50, deadline=None)
@given(some, st.randoms())
def test_the_order_of_rows_does_not_matter(rows: list[Record], shuffled: Any) -> None:
    mixed = shuffled.sample(rows, len(rows))
    assert json.dumps(profile(mixed)) == json.dumps(profile(rows))


def test_chunking_does_not_change_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*varied(30), ask("请写诗"), chat()]
    whole = profile(rows)
    monkeypatch.setattr("dagster_project.core.stored_rows.BLOCK", 7)
    assert profile(rows) == whole


# The checks


@pytest.mark.parametrize(
    ("rows", "words", "says"),
    [(99, 198, "teaches form"), (99, 1_089, "one narrow task"), (99, 19_899, "enough to teach a task")],
)
def test_a_small_set_fails_and_the_note_gives_the_recommended_use(rows: int, words: int, says: str) -> None:
    found = profile([ask(" ".join(["word"] * (words // rows - 1)), "Yes") for _ in range(rows)])
    assert failures(found, Limits())["small_dataset"].startswith(f"{rows} rows, {words:,} words: ")
    assert says in failures(found, Limits())["small_dataset"]
    assert says in notes(found, Limits(min_rows=99))["small_dataset"]


def test_categories_are_unbalanced_beyond_the_ratio() -> None:
    five = profile([ask("Hi", category="a") for _ in range(10)] + [ask("Ho", category="b"), ask("Ho", category="b")])
    six = profile([ask("Hi", category="a") for _ in range(6)] + [ask("Ho", category="b")])
    assert "unbalanced_categories" not in failures(five, LIMITS)
    assert failures(six, LIMITS) == {
        "unbalanced_categories": "2 categories (effectively 1.5); a 6 rows (86%), b 1; 1 with one row: b",
    }


def test_a_category_with_one_row_has_one_row() -> None:
    found = profile([ask("Hi", category="a"), ask("Ho", category="b")])
    assert "; a 1 row (50%), as every other" in notes(found, LIMITS)["unbalanced_categories"]


def test_uncategorised_rows_are_not_a_category_if_there_are_others() -> None:
    found = profile([ask("Hi") for _ in range(50)] + [ask("Ho", category="a"), ask("Ho", category="b")])
    assert "unbalanced_categories" not in failures(found, LIMITS)
    assert notes(found, LIMITS)["unbalanced_categories"].endswith("50 rows without")
    found = profile([ask("Hi"), ask("Ho", category="a"), ask("Ho", category="a")])
    assert notes(found, LIMITS)["unbalanced_categories"].endswith("; 1 row without")


def test_the_note_on_scripts_counts_those_that_it_leaves_out() -> None:
    prompts = ["Why?", "Who?", "Почему?", "Γιατί;", "なぜですか", "왜요?"]
    note = notes(profile([ask(prompt) for prompt in prompts]), LIMITS)["unbalanced_categories"]
    assert note == "no categories; scripts: Latin 2, Cyrillic 1, Greek 1 and 2 more"


def test_the_rarest_category_counts_even_beyond_the_fifty_that_are_shown() -> None:
    rows = [ask("Hi", category=f"c{i:02}") for i in range(60) for _ in range(9)] + [ask("Hi", category="rare")]
    assert failures(profile(rows), LIMITS)["unbalanced_categories"].endswith("1 with one row: rare")


def test_one_source_may_dominate_unless_the_policy_limits_it() -> None:
    found = profile([ask("Hi", source="a.json") for _ in range(3)] + [ask("Ho", source="b.json")])
    assert notes(found, LIMITS)["unbalanced_categories"] == "no categories; a.json holds 75% of the rows"
    assert failures(found, Limits(min_rows=1, max_source_share=0.7)) == {
        "unbalanced_categories": "a.json holds 75% of the rows"
    }


def test_a_varied_set_is_diverse() -> None:
    found = profile(varied(500))
    assert failures(found, LIMITS, near_copies=3) == {}
    assert "3 prompts (1%) are nearly those of earlier rows" in notes(found, LIMITS, near_copies=3)["low_diversity"]
    (one,) = [note for note in notes(found, LIMITS, near_copies=1)["low_diversity"].split("; ") if "nearly" in note]
    assert one.startswith("1 prompt (below 1%) is nearly that of an earlier row")
    assert "nearly" not in notes(found, LIMITS)["low_diversity"], "nobody looked"


def short_gaps(i: int) -> str:
    return ["Write a short poem about {}.", "Translate the word {} into French.", "What is the meaning of {}?"][
        i % 3
    ].format(f"thing{i}")


def long_gaps(i: int) -> str:
    gap, other = f"red{i} kite{i}", f"old{i} harbour{i}"
    return [
        f"Write a short story about {gap} and {other}.",
        f"Compare {gap} with {other} in detail, please.",
        f"What would happen if {gap} met {other}?",
    ][i % 3]


@pytest.mark.parametrize("template", [short_gaps, long_gaps])
def test_filled_in_templates_are_not_diverse(template: Any) -> None:
    found = failures(profile([ask(template(i), f"Answer {i}") for i in range(500)]), LIMITS)["low_diversity"]
    assert "occur in more than 5% of the prompts each" in found


def test_few_distinct_pairs_of_words_are_not_diverse_even_if_no_pair_is_in_many_prompts() -> None:
    draw = random.Random(1)
    tasks = [" ".join(draw.choices(WORDS, k=12)) for _ in range(40)]
    found = profile([ask(tasks[i % 40], f"Answer {i}") for i in range(400)])
    assert found["diversity"]["template_share"] < 0.01
    assert failures(found, LIMITS) == {
        "low_diversity": "10% of the pairs of words in 4,800 words of prompts are distinct"
    }


def test_one_long_response_in_half_of_the_rows_is_not_diverse() -> None:
    rows = varied(200)
    same = "I am sorry, but I do not know the answer."
    for row in rows[::2]:
        row["messages"][-1]["content"] = same
    assert failures(profile(rows), LIMITS) == {"low_diversity": "50% of the rows have the same long response"}


def test_one_label_in_half_of_the_rows_is_fine() -> None:
    rows = varied(200)
    for row in rows[::2]:
        row["messages"][-1]["content"] = '{"category": "bug", "priority": "high"}'
    assert failures(profile(rows), LIMITS) == {}


def test_one_opening_in_most_prompts_is_not_diverse() -> None:
    rows = varied(200)
    for row in rows[:130]:
        row["messages"][0]["content"] = f"Please now {row['messages'][0]['content']}"
    assert failures(profile(rows), LIMITS) == {
        "low_diversity": "71 openings, 65% of the prompts open with the same words"
    }
    assert failures(profile(rows[20:]), LIMITS) != {}
    assert failures(profile(rows[20:]), Limits(max_opening_share=0.7)) == {}


def test_mostly_near_copies_are_not_diverse() -> None:
    assert failures(profile(varied(200)), LIMITS, near_copies=101) == {
        "low_diversity": "101 prompts (50%) are nearly those of earlier rows"
    }
    assert failures(profile(varied(200)), LIMITS, near_copies=100) == {}


def test_tiny_sets_are_not_checked_for_diversity() -> None:
    same = [ask("Write a poem", "Roses are red and violets are blue, you know.") for _ in range(20)]
    assert "low_diversity" in failures(profile(same), LIMITS)
    assert failures(profile(same[:19]), LIMITS, near_copies=18) == {}
    assert notes(profile(same[:19]), LIMITS)["low_diversity"] == "not checked below 20 rows"


@given(some, st.one_of(st.none(), st.just(0)))
@settings(max_examples=50, deadline=None)
def test_each_check_on_the_set_either_fails_or_has_a_note(rows: list[Record], near: int | None) -> None:
    found = profile(rows)
    failed, noted = failures(found, Limits(), near), notes(found, Limits(), near)
    assert sorted([*failed, *noted]) == ["low_diversity", "small_dataset", "unbalanced_categories"]
    assert all([*failed.values(), *noted.values()])


def test_the_schema_runs_on_the_table_of_shares_and_names_the_measure() -> None:
    table = shares(profile([ask("Hi")]), Limits())
    assert table.columns == list(set_schema(Limits()).columns)
    with pytest.raises(pa.errors.SchemaErrors) as caught:
        set_schema(Limits()).validate(table, lazy=True)
    assert caught.value.failure_cases.select("column", "check").rows() == [("rows", "small_dataset")]


def test_counts_of_a_single_record_are_numbers() -> None:
    tool = {"type": "function", "function": {"name": "find", "parameters": {}}}
    answer = {"role": "assistant", "content": "Ann.", "reasoning_content": "Who was it?"}
    found = profile([{**ask("Who?"), "messages": [{"role": "user", "content": "Who?"}, answer], "tools": [tool]}])
    assert (
        json.dumps([found["tool_calls"]["rows_with_tools"], found["tool_calls"]["rows"], found["reasoning"]["rows"]])
        == "[1, 0, 1]"
    )
