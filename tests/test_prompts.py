"""Prompt identity: tools are context, a shared template is not a leak, and only
prompts that ask the same are reported."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
from conftest import SHARED_DATA

from dagster_project.core.records import example_id, prompt_text, response_text
from dagster_project.curation.check_files import load
from dagster_project.curation.checks.checks import Judgement, Rules, judge
from dagster_project.curation.checks.findings import document
from dagster_project.curation.checks.overlaps import GROUPED
from dagster_project.curation.similarity.overlap import compare
from dagster_project.curation.similarity.wording import (
    content_words,
    is_instruction_only,
    is_near_duplicate,
    leak_severity,
)
from dagster_project.curation.sources.benchmarks import Item

BOOK = "Can you please book a flight for me from New York to London?"
MAIL, LOAN = [{"name": "check_mail"}], [{"name": "loan", "parameters": {"rate": "number", "years": "number"}}]


def row(prompt: str, answer: str = "On its way.", *more: str, **meta: Any) -> dict[str, Any]:
    turns = [prompt, answer, *more]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {
        "example_id": example_id(messages),
        "messages": messages,
        "category": None,
        "group_id": None,
        "meta": json.dumps(meta),
    }


def judged(rows: Sequence[dict[str, Any]], held_out: Sequence[Item] = (), **rules: Any) -> Judgement:
    placed = [{"source": "rows.jsonl", "source_row": i, **one} for i, one in enumerate(rows)]
    kind = "preferences" if any("rejected" in one for one in rows) else "examples"
    return judge(placed, held_out, Rules(**rules), kind=kind)  # type: ignore[arg-type]


def leaks(prompts: Sequence[str], *questions: str) -> dict[int, str]:
    """Row -> severity of the overlap with a held-out question."""
    found = judged(
        [row(prompt) for prompt in prompts], [Item(f"quiz.jsonl:{i}", question) for i, question in enumerate(questions)]
    )
    links = found.overlaps.links["benchmark_leakage"]
    return {link.row: "warn" if link.partial else "error" for link in reversed(links)}


def real(name: str) -> str:
    if not (SHARED_DATA / name).is_file():
        pytest.skip(f"no real data at {SHARED_DATA / name}")
    return str(SHARED_DATA / name)


# --- tools


def test_rows_that_differ_in_their_tools_are_not_identical_but_share_a_group() -> None:
    found = judged([row(BOOK, tools=MAIL), row(BOOK, tools=LOAN), row(BOOK), row(BOOK, tools=MAIL)])
    assert found.broken["exact_duplicates"] == [3]
    assert list(found.cluster) == [0, 0, 0, 0]
    assert "conflicting_responses" not in found.broken


def test_different_answers_under_different_tools_are_not_a_conflict() -> None:
    rows = [row(BOOK, "I can only check mail.", tools=MAIL), row(BOOK, "I can only plan loans.", tools=LOAN)]
    assert "conflicting_responses" not in judged(rows).broken
    assert judged([*rows, row(BOOK, "Which day?", tools=LOAN)]).overlaps.links["conflicting_responses"][0].other == 1


def test_opposite_preferences_under_different_tools_are_not_a_conflict() -> None:
    def pair(chosen: str, rejected: str, tools: Any) -> dict[str, Any]:
        said = [{"role": "assistant", "content": rejected}]
        made = row(BOOK, chosen, tools=tools)
        return {
            **made,
            "example_id": example_id([*made["messages"], *said]),
            "asked": 1,
            "rejected": said,
            "margin": None,
        }

    first = pair("Yes, booked.", "No, sorry.", MAIL)
    same = pair("No, sorry.", "Yes, booked.", MAIL)
    other = pair("No, sorry.", "Yes, booked.", LOAN)
    assert judged([first, same]).broken["conflicting_responses"] == [1]
    assert "conflicting_responses" not in judged([first, other]).broken


@pytest.mark.parametrize(
    "tools", [json.dumps(LOAN), [{"parameters": {"years": "number", "rate": "number"}, "name": "loan"}]]
)
def test_tools_are_the_same_in_any_spelling(tools: Any) -> None:
    assert judged([row(BOOK, tools=LOAN), row(BOOK, tools=tools)]).broken["exact_duplicates"] == [1]


@pytest.mark.parametrize("tools", ["", "[]", [], None, " "])
def test_an_empty_list_of_tools_counts_as_no_tools(tools: Any) -> None:
    assert judged([row(BOOK), row(BOOK, tools=tools)]).broken["exact_duplicates"] == [1]


def test_exact_repeats_of_real_tool_calls_are_those_of_the_raw_rows() -> None:
    path = real("glaive_toolcall_en_demo.json")
    with open(path, encoding="utf-8") as stream:  # noqa: PTH123
        raw = json.load(stream)
    first: dict[str, int] = {}
    repeats = [i for i, one in enumerate(raw) if first.setdefault(json.dumps(one, sort_keys=True), i) != i]
    found = judge(load([path]).records, [], Rules())
    assert len(repeats) == 35
    assert found.broken["exact_duplicates"] == repeats
    answers = defaultdict(set)
    for one in raw:
        answers[json.dumps([one["conversations"][:-1], one["tools"]])].add(one["conversations"][-1]["value"])
    for link in found.overlaps.links["conflicting_responses"]:
        assert len(answers[json.dumps([raw[link.row]["conversations"][:-1], raw[link.row]["tools"]])]) > 1
    assert found.broken["conflicting_responses"] == [
        164
    ]  # two refusals to order a pizza, of one assistant with one tool


# --- leakage

FRAMES = (
    "Which of the following is true of {}?",
    "Which of the following statements about {} is correct?",
    "Which of the following best describes {}?",
    "Which of the following is an example of {}?",
    "Which of the following is not a characteristic of {}?",
    "What is the most common cause of {}?",
    "Which one of the following is the best definition of {}?",
    "What is the main function of {}?",
    "All of the following are true of {} EXCEPT",
)
SUBJECTS = tuple(
    """
    mitosis, photosynthesis, monopolistic competition, the Treaty of Versailles, utilitarianism, operant
    conditioning, covalent bonds, the federal funds rate, type 2 diabetes, judicial review, plate tectonics, a hash
    table, the central limit theorem, cognitive dissonance, opportunity cost, the Doppler effect, iron deficiency
    anaemia, confirmation bias, the Krebs cycle, comparative advantage, enzyme inhibition, natural selection, the
    categorical imperative, a binary search tree, renal failure, inelastic demand, attachment theory, ionic
    compounds, the Cuban missile crisis, stare decisis
    """.replace("\n", " ")
    .strip()
    .split(", ")
)
TWINS = (
    ("What is the capital of France?", "What is the capital of Spain?"),
    ("What is the boiling point of water at sea level?", "What is the boiling point of ethanol at sea level?"),
    ("What is the chemical symbol for gold?", "What is the chemical symbol for silver?"),
    ("In what year did the First World War begin?", "In what year did the Second World War begin?"),
    ("What is the square root of 144?", "What is the square root of 169?"),
    ("Which hormone regulates blood glucose levels?", "Which hormone regulates blood calcium levels?"),
    ("What is the SI unit of electrical resistance?", "What is the SI unit of electrical capacitance?"),
    ("According to Kant, moral requirements are", "According to Hobbes, moral requirements are"),
    (
        "Find the degree for the given field extension Q(sqrt(2)) over Q.",
        "Find the degree for the given field extension Q(sqrt(2), sqrt(3)) over Q.",
    ),
    ("What is the derivative of sin x with respect to x?", "What is the derivative of cos x with respect to x?"),
)
"""Questions that differ in the word they are about."""
ONLY_FRAMES = (
    "Which of the following is true?",
    "Which of the following statements is not correct?",
    "Choose the best answer to the question.",
)


def quiz() -> tuple[list[str], list[str], set[tuple[int, int]]]:
    """Prompts, held-out questions in the manner of MMLU, and which prompts repeat which question.

    Half of the subjects are held out, in every frame; the prompts ask the same
    of the other half, and the twins of what is held out.
    """
    mine, theirs = SUBJECTS[::2], SUBJECTS[1::2]
    held = [
        *(frame.format(subject) for frame, subject in product(FRAMES, theirs)),
        *(a for a, _ in TWINS),
        *ONLY_FRAMES,
    ]
    prompts = [
        *(frame.format(subject) for frame, subject in product(FRAMES, mine)),
        *(b for _, b in TWINS),
        *ONLY_FRAMES,
    ]
    planted = set()
    for i, question in enumerate(held[: -len(ONLY_FRAMES) : 4]):
        copies = (
            question,
            question.upper(),
            f"Answer with one letter. {question}\nA. this\nB. that",
            f"Please tell me: {question}",
        )
        planted.add((len(prompts), 4 * i))
        prompts.append(copies[i % len(copies)])
    return prompts, held, planted


def test_copies_of_short_questions_are_leaks_and_shared_templates_are_not() -> None:
    prompts, held, planted = quiz()
    compared = compare(prompts, held, count_words=True)
    severity = {
        (p.left, p.right): leak_severity(prompts[p.left], held[p.right], p.rule, p.similarity, compared.frequency)
        for p in compared.pairs
    }
    found = {pair for pair, one in severity.items() if one}
    assert len(severity) > 500  # pairs that share runs of words
    assert planted <= found
    assert {(prompts[a], held[b]) for a, b in found - planted} == set()


@pytest.mark.parametrize(
    "frame", ["以下哪一项最能描述{}的过程？", "关于{}，下列说法正确的是哪一项？", "请简要说明{}的主要特点和作用。"]
)
def test_chinese_questions_that_share_only_a_frame_are_not_leaks(frame: str) -> None:
    mine, theirs = (
        [frame.format(subject) for subject in subjects.split()]
        for subjects in ("光合作用 细胞分裂 火山喷发", "消化食物 冰川移动 选举投票")
    )
    held = theirs[0]
    assert leaks(mine, held) == {}
    copies = [held, f"老师问：{held}", held.replace("？", "").replace("。", "") + "请回答"]
    assert [leaks([*mine, copy], held) for copy in copies] == [{3: "error"}] * 3


@pytest.mark.parametrize(("left", "right"), TWINS)
def test_questions_with_different_subjects_are_not_a_leak(left: str, right: str) -> None:
    assert (leaks([left], right), leaks([right], left)) == ({}, {})


@pytest.mark.parametrize(
    ("prompt", "severity"),
    [
        ("Which planet do people sometimes call the red planet?", "error"),
        ("Settle this for us please: which planet do people sometimes call the red planet? Gran says Venus.", "error"),
        ("Which planet do folk sometimes call the red planet?", "warn"),
        ("Which planet do people sometimes call the ringed planet?", None),
        ("Which planet do people never call the red planet?", None),
    ],
)
def test_the_severity_of_a_leak_follows_what_is_copied(prompt: str, severity: str | None) -> None:
    assert leaks([prompt], "Which planet do people sometimes call the red planet?").get(0) == severity


def test_most_of_a_long_text_is_an_error_and_part_of_it_a_warning() -> None:
    text = (
        "Bella bought eleven snowflake stamps at the post office, nine more truck stamps than snowflake stamps, and"
        " thirteen fewer rose stamps"
    )
    edited = text.replace("Bella", "Max")
    other = (
        text.replace("Bella", "Max").replace("eleven", "sixteen").replace("nine", "three").replace("thirteen", "seven")
    )
    assert leaks([edited, other], text) == {0: "error", 1: "warn"}


def test_a_changed_number_makes_another_question_in_short_texts_only() -> None:
    assert leaks(["What is the square root of 25?"], "What is the square root of 16?") == {}


def test_rare_words_that_are_shared_outweigh_a_common_one_that_was_changed() -> None:
    asked, edited = "How do I fold the zeppelin brochure quickly?", "How do I fold the zeppelin brochure neatly?"
    assert leaks([edited], asked) == {}  # nothing tells which word matters
    others = [f"How {word} does the number {i} bus leave?" for i, word in enumerate(["quickly", "neatly"] * 5)]
    assert leaks([edited, *others], asked) == {0: "warn"}


def test_partial_overlaps_alone_make_the_finding_a_warning() -> None:
    held_out = [Item("quiz.jsonl:0", "Which planet do people sometimes call the red planet?")]
    partly, whole = row("Which planet do folk sometimes call the red planet?"), row(held_out[0].question)
    assert judged([partly], held_out).verdicts["benchmark_leakage"].severity == "warn"
    assert judged([partly, whole], held_out).verdicts["benchmark_leakage"].severity == "error"
    assert (
        "1 row copies held-out text, 1 overlaps it in part"
        in judged([partly, whole], held_out).verdicts["benchmark_leakage"].note
    )
    assert (
        judged([partly], held_out, severity={"benchmark_leakage": "error"}).verdicts["benchmark_leakage"].severity
        == "error"
    )
    assert (
        judged([partly], held_out, policy={"benchmark_leakage": "fail"}).verdicts["benchmark_leakage"].severity
        == "error"
    )


def test_a_question_that_is_an_instruction_alone_leaks_with_its_choices_only() -> None:
    item = Item(
        "quiz.jsonl:0",
        "Which of the following is true?",
        ("Mitosis yields four cells.", "Meiosis yields four gametes.", "Neither."),
        1,
    )
    alone, with_choices = row(item.question), row("Which of the following is true?\n" + "\n".join(item.choices))
    found = judged([alone, with_choices], [item])
    assert found.reason == [None, "benchmark_leakage"]
    shown = next(
        one for one in document("set", "messages", found, [item])["findings"] if one["check"] == "benchmark_leakage"
    )
    assert "meiosis" in shown["matches"][0]["other_text"].lower()


def test_a_question_that_several_items_ask_with_other_choices_leaks_with_its_choices_only() -> None:
    items = [
        Item(f"quiz.jsonl:{i}", "Which animal is a mammal?", choices)
        for i, choices in enumerate([("the whale", "the shark"), ("the bat", "the wren")])
    ]
    assert judged([row("Which animal is a mammal?")], items).reason == [None]
    assert judged([row("Which animal is a mammal?")], items[:1]).reason == ["benchmark_leakage"]


@pytest.mark.parametrize("before", ["", "-" * 400 + "\n", "é" * 400 + " "], ids=["nothing", "a rule", "a long word"])
def test_a_held_out_answer_leaks_whatever_is_before_it(before: str) -> None:
    answer = "The committee rejected the harbour because dredging endangered the spawning grounds of local herring"
    held_out = [Item("quiz.jsonl:0", "Why was it refused?", text=answer)]
    assert judged([row("Tell me why", before + answer)], held_out).reason == ["benchmark_leakage"]


def test_pairs_that_share_only_a_frame_are_counted_in_the_note() -> None:
    found = judged([row("What is the capital of Spain?")], [Item("quiz.jsonl:0", "What is the capital of France?")])
    assert found.verdicts["benchmark_leakage"].note == "1 pair shares only a common phrase and is not a leak"


def test_of_real_arithmetic_problems_no_test_question_is_copied_and_few_overlap_in_part() -> None:
    train, test = load([real("gsm8k_train.jsonl")]).records, load([real("gsm8k_test.jsonl")]).records
    items = [
        Item(f"test:{i}", prompt_text(r["messages"]), text=response_text(r["messages"])) for i, r in enumerate(test)
    ]
    links = judge(train, items, Rules()).overlaps.links["benchmark_leakage"]
    assert {(link.row, link.other) for link in links} == {  # each the same problem with other numbers, things and names
        (1314, "test:602"), (5162, "test:602"), (20, "test:632"), (3726, "test:824"), (1781, "test:448"),
    }  # fmt: skip
    assert all(link.partial for link in links)


def test_of_two_halves_of_a_real_set_the_repeats_are_the_leaks() -> None:
    prompts = [prompt_text(r["messages"]) for r in load([real("alpaca_en_demo.json")]).records]
    mine, theirs = prompts[:500], prompts[500:]
    found = leaks(mine, *theirs)
    assert found == {i: "error" for i, prompt in enumerate(mine) if prompt in set(theirs)}


# --- near-duplicates

EMAIL = (
    "Write an email to my boss that says the project is on track and will be done by the end of this week, with regards"
    " from the team in Leeds"
)


def test_near_duplicates_are_reported_from_the_parameter_on_and_grouped_below_it() -> None:
    less = (
        EMAIL.replace("Write an", "Draft me an")
        .replace("is on track", "goes well")
        .replace("regards", "greetings")
        .replace("done", "ready")
    )
    rows = [row(EMAIL), row(EMAIL.replace("week", "month")), row(less)]
    found = judged(rows)
    assert found.broken["near_duplicates"] == [1]
    assert list(found.cluster) == [0, 0, 0]
    assert {(link.row, link.other) for link in found.overlaps.links[GROUPED]} == {(2, 0), (2, 1)}
    assert "2 pairs are less similar, or have another question" in found.verdicts["near_duplicates"].note
    assert judged(rows, near_duplicate_similarity=0.3).broken["near_duplicates"] == [1, 2]
    assert judged(rows, near_duplicate_similarity=1.0).broken.get("near_duplicates", []) == []


def test_equal_prompts_are_reported_at_any_similarity() -> None:
    assert judged([row(EMAIL, "Done."), row(EMAIL, "Sent it.")], near_duplicate_similarity=1.0).broken[
        "near_duplicates"
    ] == [1]


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (
            "Can you book a flight for me from New York to London?",
            "Can you please book a flight for me from New York to London?",
            True,
        ),
        (
            "Can you book a flight for me from New York to London?",
            "Can you book a flight for me from New York to Boston?",
            False,
        ),
        ("What is the price of the 12 inch kite?", "What is the price of the 14 inch kite?", False),
        ("Which of these are symptoms of flu in adults?", "Which of these are not symptoms of flu in adults?", False),
        ("How are you all doing today?", "How are you doing today?", True),
        ("Hi there", "Thanks to you", True),
    ],
)
def test_prompts_that_differ_in_what_they_are_about_are_not_near_duplicates(left: str, right: str, same: bool) -> None:
    assert is_near_duplicate(left, right, {}) == is_near_duplicate(right, left, {}) == same


def test_conversations_that_end_in_different_questions_are_grouped_and_not_reported() -> None:
    found = judged(
        [
            row(EMAIL, "Done.", "Who made the law?", "He."),
            row(EMAIL, "Done.", "Why is that so?", "So."),
            row(EMAIL, "Sent.", "Who made this law?", "I."),
        ]
    )
    assert found.broken["near_duplicates"] == [2]
    assert [(link.row, link.other) for link in found.overlaps.links["near_duplicates"]] == [(2, 0)]
    assert list(found.cluster) == [0, 0, 0]


def test_a_prompt_inside_a_longer_one_is_grouped_and_not_reported() -> None:
    longer = f"{EMAIL}. {' '.join(f'and{i} then{i} more{i}' for i in range(40))}"
    found = judged([row(EMAIL), row(longer)])
    assert "near_duplicates" not in found.broken
    assert list(found.cluster) == [0, 0]


def test_low_diversity_still_counts_all_near_copies() -> None:
    rows = [row(f"Can you book flight {i} for me from New York to London on Monday morning?") for i in range(30)]
    found = judged(rows, min_distinct_2=0, max_opening_share=1, max_template_share=1, max_response_share=1)
    assert "near_duplicates" not in found.broken
    assert not found.verdicts["low_diversity"].passed


def test_rows_that_a_later_row_links_share_its_group() -> None:
    """Of three rows in a group, two have an earlier one in it, although only
    the last one is nearly the same as others."""
    halves = [
        " ".join(f"{name}{chr(97 + i)}{chr(97 + k)}" for k in range(12)) for name in ("sun", "sea") for i in range(20)
    ]
    found = judged([row(text) for text in (*halves, *map(" ".join, zip(halves[:20], halves[20:], strict=True)))])
    assert len(set(found.cluster)) == 20
    assert "40 prompts (67%) are nearly those of earlier rows" in found.verdicts["low_diversity"].note
    assert not found.verdicts["low_diversity"].passed


@pytest.mark.parametrize("name", ["glaive_toolcall_en_demo.json", "gsm8k_train.jsonl"])
def test_reported_near_duplicates_of_real_sets_are_similar_in_all_they_ask(name: str) -> None:
    found = judge(load([real(name)]).records, [], Rules())
    pairs = [link for link in found.overlaps.links["near_duplicates"] if link.rule != "equal"]
    assert Counter(link.rule for link in pairs) == {"jaccard": len(pairs)}
    assert len(pairs) >= (1 if name.startswith("gsm8k") else 9)
    for link in pairs:
        mine, theirs = (content_words(prompt_text(found.records[int(i)]["messages"])) for i in (link.row, link.other))
        assert 2 * len(mine & theirs) >= max(len(mine), len(theirs))


@pytest.mark.parametrize("text", [*ONLY_FRAMES, "Explain the following.", "Which of these is an example?", ""])
def test_a_question_without_a_subject_is_an_instruction(text: str) -> None:
    assert is_instruction_only(text)


def test_word_counts_are_those_of_different_texts() -> None:
    texts = [EMAIL, EMAIL.replace("week", "month"), EMAIL, "The week of the Team, the café TEAM"]
    counted = compare(texts, count_words=True).frequency
    assert (counted["week"], counted["month"], counted["team"], counted["boss"]) == (2, 1, 3, 2)
    assert compare(texts).frequency == {}
