"""Near-duplicates in rounds: the same result as in memory, for any blocks,
partitions and workers, from texts that are not in memory."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.core import workers
from dagster_project.core.errors import InputError
from dagster_project.core.workers import LocalProcesses, ThisProcess
from dagster_project.curation.similarity import _overlap_numba as compiled
from dagster_project.curation.similarity import overlap, rounds
from dagster_project.curation.similarity.overlap import RARE, Comparison, compare
from dagster_project.curation.similarity.shuffle import Column

WORDS = [
    "kite",
    "pub",
    "Row",
    "MAIL",
    "code",
    "card",
    "風",
    "箏",
    "ﬁn",
    "Straße",
    "e\u0301a",
    "ＣＡＦÉ",
    "\ud800",
    "a_b",
    "-",
]
FOOTER = "sent from my phone please excuse the typing errors"


class Distant:
    """Workers on another host: arguments and results are copied, and as in a
    Ray task the arguments cannot be changed."""

    count = 2

    def map(self, work: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            there = [pickle.loads(pickle.dumps(value)) for value in (work, shared, item)]
            _freeze(there)
            yield pickle.loads(pickle.dumps(there[0](*there[1:])))


def _freeze(value: Any) -> None:
    if isinstance(value, np.ndarray):
        value.flags.writeable = False
    elif isinstance(value, list | tuple):
        for part in value:
            _freeze(part)


@st.composite
def corpora(draw: st.DrawFn) -> list[str]:
    """Texts, edited and equal copies of them, and some with a common footer."""
    words = st.sampled_from(WORDS)
    rows = draw(st.lists(st.lists(words, max_size=20), min_size=1, max_size=6))
    for _ in range(draw(st.integers(0, 12))):
        copy = list(draw(st.sampled_from(rows)))
        for _ in range(draw(st.integers(0, 2))):
            at = draw(st.integers(0, len(copy)))
            copy[at : at + draw(st.integers(0, 2))] = draw(st.lists(words, max_size=2))
        rows.append([*copy, FOOTER] if draw(st.booleans()) else copy)
    return [" ".join(row) for row in rows]


def in_memory(texts: Sequence[str], against: Sequence[str] | None = None, count_words: bool = False) -> Comparison:
    with mock.patch.object(overlap, "SMALL", -1), mock.patch.multiple(rounds, IN_MEMORY=10**18, SEVERAL=10**18):
        return compare(texts, against, count_words)


def in_rounds(
    texts: Sequence[str], against: Sequence[str] | None = None, count_words: bool = False, **sizes: int
) -> Comparison:
    with mock.patch.object(overlap, "SMALL", -1), mock.patch.multiple(rounds, IN_MEMORY=-1, SEVERAL=-1, **sizes):
        return compare(texts, against, count_words)


def in_python(texts: Sequence[str], against: Sequence[str] | None = None, count_words: bool = False) -> Comparison:
    with mock.patch.object(overlap, "SMALL", 10**18):
        return compare(texts, against, count_words)


sizes = st.fixed_dictionaries(
    {
        "BLOCK": st.sampled_from([1, 60, 400, 10**6]),
        "PARTITION": st.sampled_from([1, 20, 200, 10**6]),
        "MOST_PARTITIONS": st.sampled_from([3, 1024]),
        "PAIRS": st.sampled_from([1, 60, 10**6]),
        "BUCKET": st.sampled_from([1, 3, 10**6]),
    }
)


@pytest.mark.long
@given(
    texts=corpora(),
    against=st.none() | corpora(),
    count_words=st.booleans(),
    rare=st.sampled_from([1, 2, 3, RARE]),
    sizes=sizes,
    kind=st.sampled_from([ThisProcess(), Distant()]),
)
@settings(deadline=None, max_examples=200)
def test_sizes_and_workers_do_not_change_the_comparison(
    texts: list[str],
    against: list[str] | None,
    count_words: bool,
    rare: int,
    sizes: dict[str, int],
    kind: workers.Workers,
) -> None:
    with mock.patch.object(overlap, "RARE", rare):
        expected = in_memory(texts, against, count_words)
        with workers.using(kind):
            found = in_rounds(texts, against, count_words, **sizes)
    assert found == expected
    assert list(found.frequency) == list(expected.frequency)


@given(texts=corpora(), against=st.none() | corpora(), rare=st.sampled_from([1, 2, 3, RARE]))
@settings(deadline=None, max_examples=400)
def test_plain_python_makes_the_same_comparison(texts: list[str], against: list[str] | None, rare: int) -> None:
    with mock.patch.object(overlap, "RARE", rare):
        expected, found = in_memory(texts, against, True), in_python(texts, against, True)
    assert found == expected
    assert list(found.frequency) == list(expected.frequency)


@pytest.fixture(scope="module")
def planted() -> list[str]:
    """20,000 texts of the benchmark, with boilerplate, repeated and edited texts."""
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmarks" / "curation.py")
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
        spec.loader.exec_module(benchmark)
    texts: list[str] = benchmark.plant(20_000, 20)[0]
    return texts


def test_twenty_thousand_texts_on_two_processes_of_this_host(planted: list[str]) -> None:
    expected = in_memory(planted, count_words=True)
    with workers.using(LocalProcesses(2)):
        found = in_rounds(planted, count_words=True, BLOCK=1_000_000, PARTITION=100_000)
    assert found == expected
    assert (
        len(found.pairs) > 700
        and len(found.boilerplate) == 10
        and sum(map(sum, found.scores)) > 700
        and found.frequency
    )


def test_as_many_texts_as_are_compared_in_plain_python(planted: list[str]) -> None:
    texts, against = planted[:2500], planted[1500:4000]
    assert sum(map(len, texts)) > overlap.SMALL
    assert in_python(texts, None, True) == in_memory(texts, None, True)
    assert in_python(texts, against, True) == in_memory(texts, against, True)


@pytest.mark.parametrize(("count", "split"), [(4_000, 1), (20_000, 6_000), (4_000, 3_999)])
def test_thousands_of_texts_as_two_lists(planted: list[str], count: int, split: int) -> None:
    texts, against = planted[:split], planted[split - 1 : count]  # one text is in both
    expected = in_memory(texts, against, count_words=True)
    found = in_rounds(texts, against, True, BLOCK=300_000, PARTITION=70_000, PAIRS=20_000, BUCKET=999)
    assert found == expected and found.pairs


def test_without_texts_or_words_there_is_nothing() -> None:
    for texts, against in (([], None), ([], ["kite"]), (["kite"], []), (["", "!"], None), (["", "!"], [""])):
        assert in_rounds(texts, against, True) == in_memory(texts, against, True)


def test_more_words_than_one_process_can_number(planted: list[str]) -> None:
    texts = planted[:2000]
    expected = in_memory(texts)
    with mock.patch.object(compiled, "MOST", 4000):
        with pytest.raises(InputError, match="at most 4000"):
            in_memory(texts)
        assert in_rounds(texts, BLOCK=10_000, PARTITION=1000, PAIRS=2000) == expected


class Decoded(str):
    """A text that was read, counted as long as it exists."""

    alive = most = 0

    def __del__(self) -> None:
        Decoded.alive -= 1


class Stored(Sequence[str]):
    """Texts that are decoded each time they are read."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._lines, self.read = [text.encode() for text in texts], 0

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        text = Decoded(self._lines[index].decode())
        self.read += 1
        Decoded.alive += 1
        Decoded.most = max(Decoded.most, Decoded.alive)
        return text


def test_texts_are_read_once_and_a_block_of_them_is_in_memory(planted: list[str]) -> None:
    texts, against = planted[:4000], planted[4000:8000]
    stored, others = Stored(texts), Stored(against)
    assert in_rounds(stored, others, BLOCK=20_000) == in_memory(texts, against)
    assert Decoded.most < 400, "texts in memory, of 8,000; a block has about 120"
    assert stored.read + others.read < 8000 + 2 * 1001 + 20, (
        "all once, a sample for their length, and those with a passage"
    )


def test_short_texts_are_compared_in_memory_and_several_workers_pay_earlier() -> None:
    def engine(texts: Sequence[str]) -> str:
        with mock.patch.object(rounds, "search", side_effect=StopIteration):
            try:
                compare(texts)
            except StopIteration:
                return "rounds"
        return "memory"

    with mock.patch.object(overlap, "SMALL", -1), mock.patch.multiple(rounds, IN_MEMORY=2000, SEVERAL=1000):
        assert [engine(["kite " * length] * 10) for length in (10, 30, 50)] == ["memory", "memory", "rounds"]
        with workers.using(Distant()):
            assert [engine(["kite " * length] * 10) for length in (10, 30, 50)] == ["memory", "rounds", "rounds"]


def test_scratch_files_are_closed_at_the_end() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    in_rounds(["where did my birthday kite go today"] * 3, BLOCK=1)
    assert set(Path("/proc/self/fd").iterdir()) == before


@given(
    values=st.lists(st.integers(0, 255), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=12),
    gap=st.sampled_from([0, 5, 100]),
    span=st.sampled_from([1, 16, 2**24]),
)
@settings(deadline=None)
def test_spans_of_a_column_are_those_of_the_array(values: list[int], cuts: list[int], gap: int, span: int) -> None:
    column, whole = Column(np.int32), np.array(values, np.int32)
    column.append(whole[:20])
    column.append(whole[20:])
    ends = sorted(min(cut, len(values)) for cut in cuts)
    low, high = (np.array(ends[start : len(ends) // 2 * 2 : 2], np.int64) for start in (0, 1))
    expected = [value for start, stop in zip(low, high, strict=True) for value in values[start:stop]]
    with mock.patch.multiple("dagster_project.curation.similarity.shuffle", GAP=gap, SPAN=span):
        assert column.spans(low, high).tolist() == expected


def test_the_benchmark_prints_the_same_digest_for_each_engine() -> None:
    command = [sys.executable, "benchmarks/scaling.py", "--rows", "500", "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    _, *digests = next(line for line in done.stdout.splitlines() if line.startswith("digest")).split()
    assert len(digests) == 3 and len(set(digests)) == 1
