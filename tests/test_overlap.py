"""Near-copies are found whatever was edited around them; texts that only sound alike are not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.curation.overlap import RARE, Pair, clusters, near_pairs, words

TEXT = "The kite we ordered for the birthday went to the pub on Mill Row"
OTHER = "Please add a button that reminds me to buy coffee filters every month"

vocabulary = st.sampled_from(["kite", "pub", "row", "mail", "code", "card", "bank", "Plus"])
texts = st.lists(st.lists(vocabulary, max_size=14).map(" ".join), max_size=6)
calm = settings(deadline=None, max_examples=60)


def pairs(*rows: str) -> list[tuple[int, int]]:
    return [(pair.left, pair.right) for pair in near_pairs(rows)]


def test_one_edited_word_is_still_a_near_copy() -> None:
    assert pairs(TEXT, OTHER, TEXT.replace("ordered", "bought")) == [(0, 2)]


def test_a_text_quoted_inside_a_longer_one_is_found() -> None:
    longer = f"{OTHER}. Besides, my sister wrote to you before: {TEXT}. {OTHER[::-1]}"
    assert pairs(TEXT, longer) == [(0, 1)]


def test_unrelated_texts_are_no_pair() -> None:
    assert pairs(TEXT, OTHER) == []


def test_a_shared_opening_alone_is_no_near_copy() -> None:
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
    text, edited, unrelated = (
        "我的生日风筝被送到了隔壁的酒吧请帮我找回来",
        "我的生日风筝被送到了对面的酒吧请帮我找回来",
        "请增加每月提醒购买咖啡滤纸的按钮谢谢",
    )
    assert words("风筝kite") == ("风", "筝", "kite")
    assert pairs(text, unrelated, edited) == [(0, 2)]


def test_boilerplate_that_stands_in_many_texts_proves_nothing() -> None:
    footer = "sent from my phone please excuse the many typing errors"
    mails = [f"{footer} topic {i} word{i}" for i in range(RARE + 1)]
    assert pairs(*mails[:2]) == [(0, 1)]
    assert pairs(*mails) == []


def test_a_copy_is_found_however_many_there_are() -> None:
    assert len(pairs(*[TEXT] * (RARE + 2))) == (RARE + 2) * (RARE + 1) // 2


def test_two_lists_are_compared_across_and_never_within() -> None:
    assert [(pair.left, pair.right) for pair in near_pairs([OTHER, TEXT, TEXT], ["something else", TEXT])] == [(1, 1), (2, 1)]


def test_clusters_are_transitive() -> None:
    assert clusters(6, [Pair(3, 4, 1.0), Pair(1, 3, 0.4), Pair(2, 5, 0.4)]) == [0, 1, 2, 1, 1, 2]


@given(links=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=12))
@calm
def test_a_cluster_is_named_by_its_smallest_row_and_linked_rows_share_it(links: list[tuple[int, int]]) -> None:
    found = clusters(12, [Pair(*link, 1.0) for link in links])
    assert all(found[left] == found[right] for left, right in links)
    assert all(name == found.index(name) for name in found)
    assert found == clusters(12, [Pair(right, left, 1.0) for left, right in reversed(links)])


@given(rows=texts)
@calm
def test_the_order_of_texts_does_not_matter(rows: list[str]) -> None:
    last = len(rows) - 1
    turned = {(last - pair.right, last - pair.left, pair.similarity) for pair in near_pairs(rows[::-1])}
    assert turned == {(pair.left, pair.right, pair.similarity) for pair in near_pairs(rows)}


@given(rows=texts, against=texts)
@calm
def test_left_and_right_do_not_matter(rows: list[str], against: list[str]) -> None:
    there = {(pair.left, pair.right, pair.similarity) for pair in near_pairs(rows, against)}
    assert there == {(pair.right, pair.left, pair.similarity) for pair in near_pairs(against, rows)}


@given(text=st.text().filter(words), rows=st.lists(st.text(), max_size=4))
@calm
def test_identical_texts_always_pair(text: str, rows: list[str]) -> None:
    assert Pair(0, len(rows) + 1, 1.0) in near_pairs([text, *rows, text])
