"""Groups stay together, categories keep their shares, and the deal depends on nothing but content and seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dagster_project.curation.split import assign, straddling
from dagster_project.records import example_id, read_records, write_records
from dagster_project.stages import splits

SHARES = {"test": 0.25, "validation": 0.1}

rows_of_groups = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("xy")), min_size=1, max_size=40)
shares = st.tuples(st.integers(0, 50), st.integers(0, 49)).map(lambda percent: {"test": percent[0] / 100, "validation": percent[1] / 100})
seeds = st.integers(0, 1000)
calm = settings(deadline=None, max_examples=80)


@given(rows=rows_of_groups, shares=shares, seed=seeds)
@calm
def test_groups_never_straddle(rows: list[tuple[str, str]], shares: dict[str, float], seed: int) -> None:
    groups, strata = zip(*rows, strict=True)
    dealt = assign(groups, strata, shares, seed)
    assert len(set(zip(groups, dealt, strict=True))) == len(set(groups))


@given(strata=st.lists(st.sampled_from("xyz"), min_size=1, max_size=80), shares=shares, seed=seeds)
@calm
def test_each_stratum_gives_its_share_to_the_row(strata: list[str], shares: dict[str, float], seed: int) -> None:
    dealt = assign([f"group {i}" for i in range(len(strata))], strata, shares, seed)
    counted = Counter(zip(strata, dealt, strict=True))
    for stratum, rows in Counter(strata).items():
        expected = {name: round(rows * share) for name, share in shares.items()}
        assert {name: counted[stratum, name] for name in shares} == expected
        assert counted[stratum, "train"] == rows - sum(expected.values())


@given(rows=rows_of_groups, seed=seeds)
@calm
def test_no_split_gets_more_than_its_share_whatever_the_groups(rows: list[tuple[str, str]], seed: int) -> None:
    groups = [group for group, _ in rows]
    dealt = Counter(assign(groups, [""] * len(rows), SHARES, seed))
    assert all(dealt[name] <= round(len(rows) * share) for name, share in SHARES.items())


@given(rows=rows_of_groups, seed=seeds, data=st.data())
@calm
def test_the_order_of_rows_does_not_matter(rows: list[tuple[str, str]], seed: int, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(rows))

    def deal(of: list[tuple[str, str]]) -> dict[str, str]:
        groups, strata = zip(*of, strict=True)
        return dict(zip(groups, assign(groups, strata, SHARES, seed), strict=True))

    assert deal(rows) == deal(shuffled)


def test_another_seed_gives_another_deal() -> None:
    groups = [f"group {i}" for i in range(40)]
    assert assign(groups, [""] * 40, SHARES, 1) != assign(groups, [""] * 40, SHARES, 2)


def test_a_new_row_moves_few_others() -> None:
    groups = [f"group {i}" for i in range(201)]
    before, after = (assign(groups[:n], [""] * n, SHARES, 7) for n in (200, 201))
    assert sum(old != new for old, new in zip(before, after, strict=False)) <= 4


def test_a_planted_straddle_is_found() -> None:
    groups = ["a", "a", "b", "b", "c"]
    assert straddling(groups, ["train", "train", "test", "test", "train"]) == []
    assert straddling(groups, ["train", "train", "train", "test", "train"]) == ["b"]
    assert straddling(groups, ["test", "train", "train", "test", "train"]) == ["a", "b"]


def test_no_rows_straddle_nothing() -> None:
    assert straddling([], []) == []


def folder_of(path: Path, n: int) -> Path:
    """A set of n rows in two categories, in which rows 2k and 2k + 1 are of one group."""
    rows = []
    for i in range(n):
        messages = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]
        rows.append(
            {
                "example_id": example_id(messages), "source": "rows.jsonl", "messages": messages,
                "category": "ab"[i // 2 % 2], "group_id": f"group {i // 2}", "meta": "{}",
            }
        )  # fmt: skip
    write_records(path, rows)
    return path


def test_the_stage_deals_every_row_into_one_of_three_folders(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 80)
    report = splits.run(splits.Params(test=0.2, validation=0.1), 7, source, tmp_path / "out")
    dealt = {name: read_records(tmp_path / "out" / name) for name in ("train", "validation", "test")}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test", "train", "validation"]
    assert {name: len(rows) for name, rows in dealt.items()} == {"train": 56, "validation": 8, "test": 16} == report.metrics
    assert all(row["split"] == name for name, rows in dealt.items() for row in rows)
    assert Counter(row["category"] for row in dealt["test"]) == {"a": 8, "b": 8}
    assert sorted(row["example_id"] for rows in dealt.values() for row in rows) == sorted(row["example_id"] for row in read_records(source))
    assert (report.rows_in, report.rows_out, report.failures) == (80, 80, [])


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 20)
    for name in ("one", "two"):
        splits.run(splits.Params(), 7, source, tmp_path / name)
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.parquet")} for name in ("one", "two")
    )
    assert len(one) == 3
    assert one == two


def test_a_wanted_split_without_rows_stops_the_stage(tmp_path: Path) -> None:
    report = splits.run(splits.Params(test=0.2, validation=0.1), 7, folder_of(tmp_path / "in", 2), tmp_path / "out")
    assert [(check.name, check.note) for check in report.failures] == [("schema", "no rows in: validation, test")]


def test_a_split_nobody_wants_may_be_empty(tmp_path: Path) -> None:
    report = splits.run(splits.Params(test=0.5, validation=0.0), 7, folder_of(tmp_path / "in", 8), tmp_path / "out")
    assert report.failures == []
    assert read_records(tmp_path / "out" / "validation") == []


def test_shares_that_leave_nothing_to_train_on_are_refused() -> None:
    assert splits.Params(test=0.5, validation=0.4).test == 0.5
    with pytest.raises(ValidationError, match=r"test 0\.5 and validation 0\.5 leave nothing to train on"):
        splits.Params(test=0.5, validation=0.5)
