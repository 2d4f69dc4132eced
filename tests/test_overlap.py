"""Near-copies are found whatever was edited around them; texts that only look similar are not."""

from __future__ import annotations

import difflib
import importlib.util
import subprocess
import sys
from typing import Any
from unittest import mock

import numpy as np
import pytest
from builders.near_copies import by_definition
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.curation.similarity import _overlap_numba as compiled
from dagster_project.curation.similarity import _overlap_python as plain
from dagster_project.curation.similarity import overlap, rounds
from dagster_project.curation.similarity.overlap import (
    RARE,
    Pair,
    clusters,
    near_pairs,
    shared_span,
    thirteen_gram_pairs,
    words,
)

TEXT = "The kite we ordered for the birthday went to the pub on Mill Row"
OTHER = "Please add a button that reminds me to buy coffee filters every month"

vocabulary = st.sampled_from(["kite", "pub", "row", "mail", "code", "card", "bank", "Plus"])
texts = st.lists(st.lists(vocabulary, max_size=14).map(" ".join), max_size=6)
calm = settings(deadline=None, max_examples=60)


@st.composite
def corpora(draw: st.DrawFn) -> list[str]:
    """Texts and edited copies of them: a piece of one with words inserted, changed or left out."""
    rows = draw(st.lists(st.lists(vocabulary, max_size=20), min_size=1, max_size=5))
    for _ in range(draw(st.integers(0, 8))):
        copy = list(draw(st.sampled_from(rows)))
        for _ in range(draw(st.integers(0, 3))):
            at = draw(st.integers(0, len(copy)))
            copy[at : at + draw(st.integers(0, 2))] = draw(st.lists(vocabulary, max_size=2))
        rows.append(copy)
    return [" ".join(row) for row in rows]


def pairs(*rows: str) -> list[tuple[int, int]]:
    return [(pair.left, pair.right) for pair in near_pairs(rows)]


def test_one_edited_word_is_still_a_near_copy() -> None:
    assert pairs(TEXT, OTHER, TEXT.replace("ordered", "bought")) == [(0, 2)]


def test_a_text_quoted_inside_a_longer_one_is_found() -> None:
    longer = f"{OTHER}. Besides, my sister wrote to you before: {TEXT}. {OTHER[::-1]}"
    assert pairs(TEXT, longer) == [(0, 1)]


def test_unrelated_texts_are_not_a_pair() -> None:
    assert pairs(TEXT, OTHER) == []


def test_a_shared_opening_alone_is_not_a_near_copy() -> None:
    opening = "I would like to know"
    assert pairs(f"{opening} {TEXT} and nobody told us about it", f"{opening} {OTHER} without logging in") == []


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("Where is it?", "where is IT", True),
        ("Where is it?", "Where is he?", False),
        ("Thank you", "Thank you very much", False),
        ("Thank you", "Thank you. " + TEXT, False),
        ("", "", False),
        ("!!!", "???", False),
    ],
)
def test_short_texts_match_only_when_all_their_words_are_the_same(left: str, right: str, same: bool) -> None:
    assert pairs(left, right) == ([(0, 1)] if same else [])


def test_case_punctuation_and_width_do_not_matter() -> None:
    assert words("Café, ＣＡＦÉ!") == ("café", "café")
    assert next(near_pairs([TEXT, TEXT.upper() + "!!"])) == Pair(0, 1, 1.0)


def test_text_without_spaces_is_compared_by_character() -> None:
    text = "我的生日风筝被送到了隔壁的酒吧请帮我找回来"
    edited = "我的生日风筝被送到了对面的酒吧请帮我找回来"
    unrelated = "请增加每月提醒购买咖啡滤纸的按钮谢谢"
    assert words("风筝kite") == ("风", "筝", "kite")
    assert pairs(text, unrelated, edited) == [(0, 2)]


def test_letters_and_figures_before_text_without_spaces_are_words_of_their_own() -> None:
    assert words("请用Python3写一个程序") == ("请", "用", "python3", *"写一个程序")
    assert pairs("2023年我的生日风筝被送到了隔壁的酒吧", "2023年我的生日风筝被送到了对面的酒吧") == [(0, 1)]


def test_marks_are_part_of_a_word_where_spaces_separate_words() -> None:
    assert words("दिन दान की कि") == ("दिन", "दान", "की", "कि")
    assert words("שָׁלוֹם x\u0304 1\ufe0f\u20e3") == ("שָׁלוֹם", "x\u0304", "1")
    assert pairs("सबसे बड़ा दान", "सबसे बड़ा दिन") == []


@pytest.mark.parametrize("at", range(7))
@pytest.mark.parametrize("size", [5, 6, 7])
def test_one_changed_word_in_a_short_text_is_found_at_any_position(size: int, at: int) -> None:
    text = ["where", "did", "my", "birthday", "kite", "go", "today"][:size]
    edited = [*text[:at], "really", *text[at + 1 :]]
    assert pairs(" ".join(text), OTHER, " ".join(edited)) == [(0, 2)]
    assert pairs(" ".join(text), " ".join([*text[:at], *text[at + 1 :]])) == (
        [(0, 1)] if size > 5 or at >= size else []
    )


def test_two_changed_words_in_a_short_text_are_not_a_near_copy() -> None:
    assert pairs("where did my birthday kite go", "where can my birthday mail go") == []


def test_short_questions_from_one_template_are_not_pairs_if_many_share_it() -> None:
    assert pairs(*[f"please tell me about {topic}{i}" for i in range(RARE + 1) for topic in ("bank", "card")]) == []


@pytest.mark.parametrize(
    ("small", "limit"), [(overlap.SMALL, -1), (-1, rounds.IN_MEMORY), (-1, -1)], ids=["plain", "in memory", "in rounds"]
)
@given(rows=corpora(), against=st.none() | corpora(), rare=st.sampled_from([2, 3, RARE]))
@settings(deadline=None, max_examples=300)
def test_the_pairs_are_those_of_the_definition_in_order(
    small: int, limit: int, rows: list[str], against: list[str] | None, rare: int
) -> None:
    with (
        mock.patch.multiple(overlap, RARE=rare, SMALL=small),
        mock.patch.multiple(rounds, IN_MEMORY=limit, BLOCK=100, PARTITION=50),
    ):
        assert list(near_pairs(rows, against)) == list(by_definition(rows, against))


def test_texts_without_words_are_in_no_pair() -> None:
    assert (
        list(near_pairs([]))
        == list(near_pairs([], [TEXT]))
        == list(near_pairs([TEXT], []))
        == list(near_pairs(["", "!", ""], [""]))
        == []
    )
    assert list(near_pairs(["kite", "", "Kite!"])) == [Pair(0, 2, 1.0)]


def test_equal_hashes_make_no_pair() -> None:
    rows = [
        TEXT,
        OTHER,
        "kite",
        "pub",
        TEXT.replace("ordered", "bought"),
        "where did my birthday kite go",
        "when did my birthday kite go",
    ]
    expected = list(near_pairs(rows))
    with (
        mock.patch.object(overlap, "SMALL", -1),
        mock.patch.object(compiled, "hash_spans", lambda values, starts, lengths: np.zeros(len(starts), np.uint64)),
    ):
        assert list(near_pairs(rows)) == expected
    assert [(pair.left, pair.right, pair.rule) for pair in expected] == [(0, 4, "jaccard"), (5, 6, "jaccard")]


@pytest.fixture(scope="module")
def planted() -> tuple[Any, list[str], dict[str, list[tuple[int, int]]], list[Pair]]:
    """The benchmark, a small run of it, and the pairs found in that."""
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmarks" / "curation.py")
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec.loader.exec_module(benchmark)
    texts, by_class = benchmark.plant(6000, 20)
    return benchmark, texts, by_class, list(near_pairs(texts))


def test_every_class_of_planted_pairs_is_found_and_little_else(planted: Any) -> None:
    _, _, by_class, found = planted
    ours = {(pair.left, pair.right) for pair in found}
    recall = {name: len(ours & set(there)) / len(there) for name, there in by_class.items()}
    assert recall.pop("20 % edited") >= 0.5
    assert {name: share for name, share in recall.items() if share < 0.99} == {}
    assert len(ours & set().union(*by_class.values())) / len(ours) >= 0.95


def test_the_number_of_threads_does_not_matter(planted: Any) -> None:
    _, texts, _, found = planted
    assert len(texts) > 5 * 1024  # more than one thread has work
    for threads in (1, 2, 5):
        with mock.patch.object(compiled, "THREADS", threads):
            assert list(near_pairs(texts)) == found


def test_importing_the_module_loads_no_library() -> None:
    code = (
        "import sys, dagster_project.curation.similarity.overlap; print({'numba', 'numpy', 'pyarrow'} &"
        " set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )


def test_without_a_writable_cache_folder_compiled_code_is_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert compiled.compiled(lambda x: x + 1)(1) == 2


def test_the_shared_span_is_the_longest_common_run_in_the_characters_of_both_texts() -> None:
    left, right = "He said: “Good   MORNING, dear ﬁnn!” Good day.", "A good-morning Dear Finn to you; good day"
    (a, a_end), (b, b_end) = shared_span(left, right)
    assert (left[a:a_end], right[b:b_end]) == ("Good   MORNING, dear ﬁnn", "good-morning Dear Finn")
    assert shared_span("He said: Good Morning!", "good morning, Ann") == ((9, 21), (0, 12))
    assert shared_span("我的风筝在哪里", "你的风筝呢") == ((1, 4), (1, 4))
    assert shared_span("cafe\u0301 au lait", "CAFÉ AU LAIT") == ((0, 13), (0, 12))
    assert shared_span("kite", "pub") == shared_span("", "kite") == ((0, 0), (0, 0))


@given(text=st.text() | st.text(alphabet="e\u0301\u0323 दि\u0304ﾊﾟｶﾞ\u1112\u1161\u11ab가ﬁßΣ字Ａ.", max_size=12))
@settings(deadline=None, max_examples=500)
def test_spans_hold_exactly_the_words_of_the_text(text: str) -> None:
    spans = overlap._spans(text)
    assert tuple(word for word, _, _ in spans) == words(text)
    assert all(0 <= start < end <= len(text) for _, start, end in spans)


def test_thirteen_gram_mode_pairs_any_shared_run_of_thirteen_words_and_nothing_shorter() -> None:
    run = [f"w{i}" for i in range(13)]
    rows = [" ".join(["a", *run, "b"]), " ".join(run[:12]), "kite"]
    assert list(thirteen_gram_pairs(rows, ["pub", " ".join(["c", *run]), " ".join(run[1:])])) == [(0, 1)]


def test_boilerplate_does_not_make_two_texts_copies() -> None:
    footer = "sent from my phone please excuse the many typing errors"
    mails = [f"{footer} topic {i} word{i}" for i in range(RARE + 1)]
    assert pairs(*mails[:2]) == [(0, 1)]
    assert pairs(*mails) == []


def test_a_copy_is_found_however_many_there_are() -> None:
    assert len(pairs(*[TEXT] * (RARE + 2))) == (RARE + 2) * (RARE + 1) // 2


def test_two_lists_are_compared_across_and_never_within() -> None:
    assert [(pair.left, pair.right) for pair in near_pairs([OTHER, TEXT, TEXT], ["something else", TEXT])] == [
        (1, 1),
        (2, 1),
    ]


def test_clusters_are_transitive() -> None:
    assert list(clusters(6, [Pair(3, 4, 1.0), Pair(1, 3, 0.4), Pair(2, 5, 0.4)])) == [0, 1, 2, 1, 1, 2]


@given(links=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=30))
@calm
def test_a_cluster_is_named_by_its_smallest_row_and_linked_rows_share_it(links: list[tuple[int, int]]) -> None:
    found = clusters(30, [Pair(*link, 1.0) for link in links])
    smallest = list(range(30))
    for _ in smallest:  # the smallest row over one more link
        for left, right in links:
            smallest[left] = smallest[right] = min(smallest[left], smallest[right])
    assert list(found) == smallest
    assert found == clusters(30, [Pair(right, left, 1.0) for left, right in reversed(links)])


@given(rows=texts)
@calm
def test_the_order_of_texts_does_not_matter(rows: list[str]) -> None:
    last = len(rows) - 1
    turned = {(last - pair.right, last - pair.left, pair.similarity) for pair in near_pairs(rows[::-1])}
    assert turned == {(pair.left, pair.right, pair.similarity) for pair in near_pairs(rows)}


@given(rows=texts, against=texts)
@calm
def test_the_order_of_the_two_lists_does_not_matter(rows: list[str], against: list[str]) -> None:
    there = {(pair.left, pair.right, pair.similarity) for pair in near_pairs(rows, against)}
    assert there == {(pair.right, pair.left, pair.similarity) for pair in near_pairs(against, rows)}


@given(text=st.text().filter(words), rows=st.lists(st.text(), max_size=4))
@calm
def test_identical_texts_always_pair(text: str, rows: list[str]) -> None:
    assert Pair(0, len(rows) + 1, 1.0) in near_pairs([text, *rows, text])


@given(left=st.lists(st.sampled_from("ab c"), max_size=12), right=st.lists(st.sampled_from("ab c"), max_size=12))
@settings(deadline=None, max_examples=300)
def test_the_shared_run_is_the_first_of_the_longest(left: list[str], right: list[str]) -> None:
    run = difflib.SequenceMatcher(None, left, right, autojunk=False).find_longest_match()
    assert overlap._longest_run(left, right) == ((run.a, run.b, run.size) if run.size else (0, 0, 0))


@given(st.lists(st.sampled_from("abcd"), min_size=1), st.lists(st.sampled_from("abcd"), min_size=1))
def test_words_in_the_same_order_are_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    lengths = {(i, j): 0 for i in range(len(one) + 1) for j in range(len(other) + 1)}
    for i, left in enumerate(one, 1):
        for j, right in enumerate(other, 1):
            lengths[i, j] = lengths[i - 1, j - 1] + 1 if left == right else max(lengths[i - 1, j], lengths[i, j - 1])
    assert plain._in_order(tuple(one), tuple(other)) == lengths[len(one), len(other)] / min(len(one), len(other))
