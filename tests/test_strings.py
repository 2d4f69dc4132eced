"""Columns of texts in one buffer or in a scratch file behave as lists; an index
numbers different strings as a dictionary does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagster_project.core import stored_rows
from dagster_project.core.stored_rows import Scratch, SelectedTexts, StoredTexts
from dagster_project.core.strings import StringIndex, Strings

texts = st.lists(st.text(st.characters(), max_size=12), max_size=20)  # unpaired surrogates included
few = st.lists(st.one_of(st.none(), st.sampled_from(["", "a", "b", "a\0", "\0", "ä", "\ud800"])), max_size=20)


@given(texts, st.integers(-25, 25), st.integers(-25, 25), st.integers(1, 3))
def test_strings_in_one_buffer_or_in_a_file_are_a_list(plain: list[str], start: int, stop: int, step: int) -> None:
    stored = StoredTexts()
    for text in plain:
        stored.append(text)
    for column in (Strings(plain), stored, SelectedTexts(stored, range(len(plain)))):
        assert len(column) == len(plain) and list(column) == plain and [column[i] for i in range(len(plain))] == plain
        assert column[start:stop:step] == plain[start:stop:step]
    for column in (Strings(plain), stored):
        for i in (start, stop):
            if -len(plain) <= i < len(plain):
                assert column[i] == plain[i]
            else:
                with pytest.raises(IndexError):
                    column[i]


def test_strings_become_an_arrow_array() -> None:
    plain = ["a", "", "äöü", "b"] * 3
    assert Strings(plain).arrow().to_pylist() == plain
    assert Strings().arrow().to_pylist() == []


@given(few, few)
def test_an_index_numbers_different_strings_in_order(strings: list[str | None], wanted: list[str | None]) -> None:
    number: dict[str, int] = {}
    expected = [-1 if one is None else number.setdefault(one, len(number)) for one in strings]
    index = StringIndex(iter(strings))
    assert index.numbers.tolist() == expected and len(index) == len(number)
    assert [strings[i] for i in index.first] == list(number)
    assert all(strings.index(one) == i for one, i in zip(number, index.first.tolist(), strict=True)), (
        "the first of equal strings"
    )
    named = [one for one in wanted if one is not None]
    assert index.find(named).tolist() == [number.get(one, -1) for one in named]
    assert [one in index for one in named] == [one in number for one in named]


@pytest.mark.parametrize("window", [1, 64, 1 << 20])
def test_items_are_read_in_any_order_and_between_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(stored_rows, "WINDOW", window)
    draw, stored, plain = random.Random(3), Scratch(tmp_path / "new"), []
    for n in range(300):
        plain.append(draw.randbytes(draw.choice([0, 1, 5, 40])))
        stored.append(plain[-1])
        if n % 50 == 0:
            assert list(stored.chosen([n, 0])) == [plain[n], plain[0]]
    for order in (range(300), range(299, -1, -1), range(0, 300, 7), draw.choices(range(300), k=500)):
        assert list(stored.chosen(order)) == [plain[i] for i in order]
    assert list((tmp_path / "new").iterdir()) == [], "the file has no name"
