"""Groups stay together, labels and shares are kept, finished splits are verified, and only content and seed decide."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from builders.records import said, stored, user
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dagster_project.core.errors import InputError
from dagster_project.core.records import Report, read_ledger, read_records, write_ledger, write_records
from dagster_project.core.strings import StringIndex
from dagster_project.curation.similarity.overlap import near_pairs
from dagster_project.curation.splitting.split import (
    DROPPED,
    ROUNDING,
    SPLITS,
    assign,
    assign_splits,
    find_copies,
    keep_labels,
    straddling,
    units,
    verify_splits,
)
from dagster_project.stages import splits

SHARES = {"test": 0.25, "validation": 0.1}

rows_of_groups = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("xy")), min_size=1, max_size=40)
shares = st.tuples(st.integers(0, 50), st.integers(0, 49)).map(
    lambda percent: {"test": percent[0] / 100, "validation": percent[1] / 100}
)
seeds = st.integers(0, 1000)
calm = settings(deadline=None, max_examples=80)


@given(rows=rows_of_groups, shares=shares, seed=seeds)
@calm
def test_groups_are_never_divided_between_splits(
    rows: list[tuple[str, str]], shares: dict[str, float], seed: int
) -> None:
    groups, strata = zip(*rows, strict=True)
    dealt = assign(groups, strata, shares, seed)
    assert len(set(zip(groups, dealt, strict=True))) == len(set(groups))


@given(strata=st.lists(st.sampled_from("xyz"), min_size=1, max_size=80), shares=shares, seed=seeds)
@calm
def test_each_stratum_gives_its_exact_share(strata: list[str], shares: dict[str, float], seed: int) -> None:
    dealt = assign([f"group {i}" for i in range(len(strata))], strata, shares, seed)
    counted = Counter(zip(strata, dealt, strict=True))
    rows = Counter(strata)
    expected = {(stratum, name): round(n * share) for stratum, n in rows.items() for name, share in shares.items()}
    empty = {
        name
        for name, share in shares.items()
        if round(len(strata) * share) and not any(expected[one, name] for one in rows)
    }
    assert {key: counted[key] for key in expected if key[1] not in empty} == {
        key: n for key, n in expected.items() if key[1] not in empty
    }
    assert all(any(counted[one, name] for one in rows) for name in empty)


@pytest.mark.parametrize(("strata", "size"), [(100, 2), (50, 3), (20, 1), (30, 5), (40, 4)])
def test_many_small_strata_give_the_share_of_all_rows(strata: int, size: int) -> None:
    """Not round(0.4) = 0 or round(0.6) = 1 rows of each. None gives more than one row above its share."""
    rows = [f"kind {i // size}" for i in range(strata * size)]
    shares = {"test": 0.2, "validation": 0.1}
    dealt = assign([f"group {i}" for i in range(len(rows))], rows, shares, 7)
    assert Counter(dealt) == {"train": len(rows) * 7 // 10, "test": len(rows) // 5, "validation": len(rows) // 10}
    counted = Counter(zip(rows, dealt, strict=True))
    assert all(counted[kind, name] <= int(size * share) + 1 for kind in rows for name, share in shares.items())


@given(rows=rows_of_groups, seed=seeds)
@calm
def test_no_split_gets_more_than_its_share_for_any_groups(rows: list[tuple[str, str]], seed: int) -> None:
    groups = [group for group, _ in rows]
    dealt = Counter(assign(groups, [""] * len(rows), SHARES, seed))
    assert all(dealt[name] <= round(len(rows) * share) for name, share in SHARES.items())


@given(
    units=st.lists(st.tuples(st.integers(1, 6), st.sampled_from("abcdefghijkl")), min_size=1, max_size=80),
    shares=shares,
    seed=seeds,
)
@calm
def test_a_split_is_short_of_its_share_only_if_every_unit_left_in_train_is_larger_than_what_is_missing(
    units: list[tuple[int, str]], shares: dict[str, float], seed: int
) -> None:
    rows = [(str(number), stratum) for number, (size, stratum) in enumerate(units) for _ in range(size)]
    groups, strata = zip(*rows, strict=True)
    dealt = assign(groups, strata, shares, seed)
    left = Counter(group for group, split in zip(groups, dealt, strict=True) if split == "train")
    for name, share in shares.items():
        missing = round(len(rows) * share) - dealt.count(name)
        assert missing <= max(ROUNDING, len(rows) // 100) or missing < min(left.values())


@given(strata=st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=80), shares=shares, seed=seeds)
@calm
def test_single_rows_give_the_share_of_all_rows(strata: list[str], shares: dict[str, float], seed: int) -> None:
    dealt = Counter(assign([f"group {i}" for i in range(len(strata))], strata, shares, seed))
    assert all(abs(dealt[name] - round(len(strata) * share)) <= ROUNDING for name, share in shares.items())


def test_validation_gets_its_share_where_test_leaves_few_rows_of_small_strata() -> None:
    strata = [f"one {i}" for i in range(20)] + [f"two {i // 2}" for i in range(20)]
    shares = {"test": 0.5, "validation": 0.3}
    dealt = Counter(assign([f"group {i}" for i in range(40)], strata, shares, 7))
    assert dealt == {"test": 20, "validation": 12, "train": 8}


@given(rows=rows_of_groups, seed=seeds, data=st.data())
@calm
def test_the_order_of_rows_does_not_matter(rows: list[tuple[str, str]], seed: int, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(rows))

    def by_id(of: list[tuple[str, str]]) -> dict[str, str]:
        groups, strata = zip(*of, strict=True)
        return dict(zip(groups, assign(groups, strata, SHARES, seed), strict=True))

    assert by_id(rows) == by_id(shuffled)


def test_another_seed_gives_other_splits() -> None:
    groups = [f"group {i}" for i in range(40)]
    assert assign(groups, [""] * 40, SHARES, 1) != assign(groups, [""] * 40, SHARES, 2)


def test_a_new_row_changes_the_split_of_few_others() -> None:
    groups = [f"group {i}" for i in range(201)]
    before, after = (assign(groups[:n], [""] * n, SHARES, 7) for n in (200, 201))
    assert sum(old != new for old, new in zip(before, after, strict=False)) <= 4


def test_a_planted_leak_between_splits_is_found() -> None:
    groups = ["a", "a", "b", "b", "c"]
    assert straddling(groups, ["train", "train", "test", "test", "train"]) == []
    assert straddling(groups, ["train", "train", "train", "test", "train"]) == ["b"]
    assert straddling(groups, ["test", "train", "train", "test", "train"]) == ["a", "b"]


def test_an_empty_set_has_no_leak() -> None:
    assert straddling([], []) == []


# --- keys and labels

wholes = st.lists(
    st.tuples(
        st.sampled_from("abcdef"),  # group
        st.sampled_from(["1", "2", "3", None]),  # key
        st.sampled_from([None, *SPLITS]),  # label of an upstream split
        st.sampled_from("xy"),  # stratum
    ),
    min_size=1,
    max_size=30,
)


def dealt_out(rows: Sequence[tuple[str, str | None, str | None, str]], seed: int = 7) -> list[str]:
    groups, keys, labels, strata = zip(*rows, strict=True)
    return assign_splits(groups, keys, labels, strata, SHARES, seed).splits


@given(rows=wholes, seed=seeds)
@calm
def test_rows_with_a_common_group_or_key_are_in_one_split(
    rows: list[tuple[str, str | None, str | None, str]], seed: int
) -> None:
    kept = [(row, split) for row, split in zip(rows, dealt_out(rows, seed), strict=True) if split != DROPPED]
    for at in (0, 1):
        pairs = {(row[at], split) for row, split in kept if row[at] is not None}
        assert len(pairs) == len({value for value, _ in pairs})


@given(rows=wholes, seed=seeds)
@calm
def test_every_row_is_in_one_split_or_dropped_for_a_more_strictly_held_out_row(
    rows: list[tuple[str, str | None, str | None, str]], seed: int
) -> None:
    groups, keys, labels, strata = zip(*rows, strict=True)
    found = assign_splits(groups, keys, labels, strata, SHARES, seed)
    assert set(found.splits) <= {*SPLITS, DROPPED}
    assert set(found.because) == {i for i, split in enumerate(found.splits) if split == DROPPED}
    for i, keeper in found.because.items():
        assert groups[i] == groups[keeper] or keys[i] == keys[keeper] is not None
        assert SPLITS.index(found.splits[keeper]) > SPLITS.index(labels[i])


@given(rows=wholes, seed=seeds)
@calm
def test_a_label_is_kept_unless_the_row_is_dropped_or_a_split_without_labels_is_taken_from_train(
    rows: list[tuple[str, str | None, str | None, str]], seed: int
) -> None:
    dealt = dealt_out(rows, seed)
    named = set(keep_labels(*list(zip(*rows, strict=True))[:3])[0])
    for (_, _, label, _), split in zip(rows, dealt, strict=True):
        if label == "test":
            assert split == "test"
        elif label == "validation":
            assert split in {"validation", DROPPED}
        elif label == "train":
            assert split in {"train", DROPPED} or split not in named


@given(rows=wholes, seed=seeds, data=st.data())
@calm
def test_the_order_of_rows_does_not_matter_with_keys_and_labels(
    rows: list[tuple[str, str | None, str | None, str]], seed: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    dealt = dealt_out(rows, seed)
    assert dealt_out([rows[i] for i in order], seed) == [dealt[i] for i in order]


@given(rows=st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["1", "2", "3", None])), max_size=20))
@calm
def test_units_are_the_connected_components_of_groups_and_keys(rows: list[tuple[str, str | None]]) -> None:
    groups, keys = [group for group, _ in rows], [key for _, key in rows]
    reach = [{i} for i in range(len(rows))]
    for _ in rows:
        for i in range(len(rows)):
            for j in range(len(rows)):
                if groups[i] == groups[j] or (keys[i] is not None and keys[i] == keys[j]):
                    reach[i] |= reach[j]
    assert list(units(groups, keys)) == [min(groups[j] for j in reached) for reached in reach]


def test_a_train_row_that_is_dropped_takes_no_other_with_it() -> None:
    groups, keys = ["a", "b", "b", "c"], ["one", "two", "one", "two"]
    fate, because = keep_labels(groups, keys, ["test", "train", "train", "train"])
    assert fate == ["test", "train", DROPPED, "train"]  # the third row is customer one's; its near-copy is not
    assert because == {2: 0}


def test_a_row_without_a_label_follows_the_labelled_row_it_belongs_to_and_links_others_to_it() -> None:
    fate, because = keep_labels(["a", "a", "b", "c"], [None, "one", "one", None], ["test", None, "train", None])
    assert (fate, because) == (["test", "test", DROPPED, ""], {2: 1})


def test_a_validation_row_is_dropped_for_test_and_a_train_row_for_validation() -> None:
    fate, _ = keep_labels(["a", "a", "b", "b"], [None] * 4, ["validation", "test", "train", "validation"])
    assert fate == [DROPPED, "test", DROPPED, "validation"]


def test_a_split_without_labels_is_assigned_from_train() -> None:
    groups = [f"group {i}" for i in range(200)]
    labels = ["train"] * 150 + ["test"] * 50
    found = assign_splits(groups, [None] * 200, labels, [""] * 200, {"test": 0.2, "validation": 0.1}, 7)
    assert Counter(zip(labels, found.splits, strict=True)) == {
        ("train", "train"): 135,
        ("train", "validation"): 15,
        ("test", "test"): 50,
    }


def test_a_split_whose_labelled_rows_are_all_dropped_is_assigned_from_train() -> None:
    groups, labels = [f"group {i}" for i in range(100)], ["train"] * 80 + ["test"] * 20
    found = assign_splits(
        [*groups, "group 99"], [None] * 101, [*labels, "validation"], [""] * 101, {"test": 0.2, "validation": 0.1}, 7
    )
    assert found.because == {100: 99}
    assert Counter(found.splits[:80]) == {"train": 72, "validation": 8}
    assert found.labelled == {i for i, split in enumerate(found.splits) if split in {"train", "test"}}


def test_rows_without_a_label_are_assigned_by_their_own_shares() -> None:
    labels = [*(["train"] * 50 + ["validation"] * 20 + ["test"] * 30), *[None] * 100]
    found = assign_splits(
        [f"group {i}" for i in range(200)], [None] * 200, labels, [""] * 200, {"test": 0.2, "validation": 0.1}, 7
    )
    assert found.splits[:100] == labels[:100]
    assert Counter(found.splits[100:]) == {"train": 70, "validation": 10, "test": 20}
    assert found.labelled == set(range(100))


def test_large_units_fill_the_shares_as_far_as_they_can() -> None:
    keys = [f"customer {i // 50}" for i in range(1000)]
    found = assign_splits(
        [f"group {i}" for i in range(1000)],
        keys,
        [None] * 1000,
        [str(i // 50 % 8) for i in range(1000)],
        {"test": 0.2, "validation": 0.1},
        7,
    )
    assert Counter(found.splits) == {"train": 700, "validation": 100, "test": 200}


def test_a_requested_split_gets_the_unit_nearest_in_size_if_none_is_small_enough() -> None:
    keys = ["big"] * 60 + ["middle"] * 30 + ["small"] * 10
    found = assign_splits(
        [f"group {i}" for i in range(100)], keys, [None] * 100, [""] * 100, {"test": 0.2, "validation": 0.05}, 7
    )
    assert dict(zip(keys, found.splits, strict=True)) == {"big": "train", "middle": "validation", "small": "test"}


@pytest.mark.parametrize(("rows", "size", "found"), [(60, 5, (45, 5, 10)), (200, 9, (144, 18, 38)), (12, 4, (4, 4, 4))])
def test_groups_of_near_copies_that_are_larger_than_the_share_of_each_stratum_leave_no_split_empty(
    rows: int, size: int, found: tuple[int, int, int]
) -> None:
    strata = [str(i * 3 // rows) for i in range(rows)] if rows > 12 else [""] * rows
    groups = [f"{strata[i]} {i // size}" for i in range(rows)]
    given = [None] * rows
    assigned = Counter(assign_splits(groups, given, given, strata, {"test": 0.2, "validation": 0.1}, 7).splits)
    assert (assigned["train"], assigned["validation"], assigned["test"]) == found


# --- verification of finished splits

COPY = "Where does the parcel with the blue kite for the birthday stand this morning"
NEARLY = "Where does the parcel with the blue kite for the wedding stand this morning"
OTHERS = [
    "My card was charged twice for one order of tea",
    "The app closes as soon as I open the wish list",
    "Please delete my account and all that is in it",
]


def record(
    prompt: str,
    group: str = "",
    category: str | None = None,
    meta: str = "{}",
    source: str = "rows.jsonl",
    answer: str = "Yes.",
) -> dict[str, Any]:
    fields = {"source": source, "category": category, "meta": meta, **({"group_id": group} if group else {})}
    return stored(user(prompt), said(answer), **fields)


def finished(path: Path, **rows: list[dict[str, Any]]) -> Path:
    for name in SPLITS:
        write_records(path / name, rows.get(name, []))
    return path


def verified(path: Path, all_rows: Sequence[dict[str, Any]] | None = None, **rows: list[dict[str, Any]]) -> Any:
    """Verification of finished splits with these rows; `all_rows`: the assigned rows, by default the same."""
    held = all_rows or [row for name in rows.values() for row in name]
    return verify_splits(
        finished(path, **rows),
        find_copies([row["messages"][0]["content"] for row in held]),
        StringIndex(row["example_id"] for row in held),
    )


def test_near_copies_in_two_splits_are_found_despite_different_groups(tmp_path: Path) -> None:
    a, b = record(COPY, group="one"), record(NEARLY, group="another")
    found = verified(tmp_path, train=[b, record(OTHERS[0])], test=[a, record(OTHERS[1])])
    assert [(leak.place, leak.other, leak.why) for leak in found.leaks] == [
        (f"test/{a['example_id']}", f"train/{b['example_id']}", "near-copies")
    ]
    assert (found.leaking, found.rows) == (2, {"train": 2, "validation": 0, "test": 2})


@pytest.mark.parametrize(("held_out", "watched"), [("test", "train"), ("test", "validation"), ("validation", "train")])
def test_each_two_splits_are_compared(tmp_path: Path, held_out: str, watched: str) -> None:
    found = verified(tmp_path, **{held_out: [record(COPY)], watched: [record(NEARLY)]})
    assert [(leak.place.split("/")[0], leak.other.split("/")[0]) for leak in found.leaks] == [(held_out, watched)]


def test_the_same_prompt_with_another_answer_is_found(tmp_path: Path) -> None:
    for k, prompt in enumerate((COPY, "Hi", "???")):
        assert verified(tmp_path / str(k), train=[record(prompt)], test=[record(prompt, answer="No.")]).leaking == 2


def test_a_group_or_an_example_in_two_splits_is_found(tmp_path: Path) -> None:
    found = verified(tmp_path / "group", train=[record(OTHERS[0], group="g")], test=[record(OTHERS[1], group="g")])
    assert [leak.why for leak in found.leaks] == ["the same group"]
    assert {"the same example"} <= {
        leak.why for leak in verified(tmp_path / "id", train=[record(COPY)], validation=[record(COPY)]).leaks
    }


def test_unrelated_rows_leak_nothing(tmp_path: Path) -> None:
    found = verified(
        tmp_path, train=[record(COPY), record(NEARLY)], validation=[record(OTHERS[0])], test=[record(OTHERS[1])]
    )
    assert (found.leaks, found.leaking, found.unexpected) == ([], 0, [])


def test_verification_counts_rare_runs_over_all_rows_as_splitting_does(tmp_path: Path) -> None:
    """A template in 52 texts is boilerplate; among the 42 of train and test
    alone it would look rare, and all of them like copies."""
    rows = [
        record(
            f"Please sort the following message into its one right bin {'abcdefghijklmnopqrstuvwxyz'[i % 26] * 3}{i}"
        )
        for i in range(52)
    ]
    train, validation, test = rows[:32], rows[32:42], rows[42:]

    def said(of: list[dict[str, Any]]) -> list[str]:
        return [row["messages"][0]["content"] for row in of]

    assert list(near_pairs(said(test), said(train)))
    assert verified(tmp_path, train=train, validation=validation, test=test).leaks == []


def test_held_out_rows_outside_the_set_are_found(tmp_path: Path) -> None:
    rows = [record(text) for text in OTHERS]
    found = verified(tmp_path, rows[:2], train=[rows[0]], test=[rows[1], rows[2]])
    assert found.unexpected == [f"test/{rows[2]['example_id']}"]


def test_a_row_added_to_train_that_nearly_repeats_a_test_row_is_found(tmp_path: Path) -> None:
    rows, added = [record(COPY), record(OTHERS[0])], record(NEARLY)
    found = verified(tmp_path, rows, train=[rows[1], added], test=[rows[0]])
    assert [(leak.place, leak.other) for leak in found.leaks] == [
        (f"test/{rows[0]['example_id']}", f"train/{added['example_id']}")
    ]


# --- the stage


def written(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    write_records(path, rows)
    lost = {"source": "rows.jsonl", "source_row": 0, "example_id": "", "outcome": "dropped:empty_prompt", "why": ""}
    write_ledger(
        path, [lost, *({**row, "source_row": i, "outcome": "kept", "why": ""} for i, row in enumerate(rows, 1))]
    )
    return path


def folder_of(path: Path, n: int) -> Path:
    """A set of n rows in two categories, in which rows 2k and 2k + 1 are of one group."""
    return written(
        path, [record(f"question {i}", f"group {i // 2}", "ab"[i // 2 % 2], answer=f"answer {i}") for i in range(n)]
    )


def run(params: splits.Params, source: Path, out: Path, seed: int = 7) -> Report:
    return splits.produce(source.parent, params, seed, source, out)


def standing(out: Path) -> dict[str, str]:
    """example_id -> split, by the shards."""
    return {row["example_id"]: name for name in SPLITS for row in read_records(out / name)}


def test_the_stage_writes_every_row_to_one_of_three_folders(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 80)
    report = run(splits.Params(test=0.2, validation=0.1), source, tmp_path / "out")
    dealt = {name: read_records(tmp_path / "out" / name) for name in ("train", "validation", "test")}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "ledger.parquet",
        "test",
        "train",
        "validation",
    ]
    assert (
        {name: len(rows) for name, rows in dealt.items()}
        == {"train": 56, "validation": 8, "test": 16}
        == report.metrics
    )
    assert all(row["split"] == name for name, rows in dealt.items() for row in rows)
    assert Counter(row["category"] for row in dealt["test"]) == {"a": 8, "b": 8}
    assert sorted(row["example_id"] for rows in dealt.values() for row in rows) == sorted(
        row["example_id"] for row in read_records(source)
    )
    assert (report.rows_in, report.rows_out, report.failures) == (80, 80, [])


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 20)
    for name in ("one", "two"):
        run(splits.Params(), source, tmp_path / name)
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.parquet")}
        for name in ("one", "two")
    )
    assert len(one) == 4
    assert one == two


def test_a_requested_split_without_rows_stops_the_stage(tmp_path: Path) -> None:
    report = run(splits.Params(test=0.2, validation=0.1), folder_of(tmp_path / "in", 2), tmp_path / "out")
    assert [(check.name, check.note) for check in report.failures] == [
        ("schema", "no rows in: validation, test; the largest group of near-copies has 2 rows and is not divided")
    ]


def test_without_a_test_split_a_warning_names_the_stages_that_need_one(tmp_path: Path) -> None:
    report = run(splits.Params(test=0.0, validation=0.0), folder_of(tmp_path / "in", 20), tmp_path / "out")
    (warning,) = (check for check in report.checks if not check.passed)
    assert (warning.name, warning.severity, warning.blocking, warning.count) == ("schema", "warn", False, 1)
    assert warning.note.startswith("no row is held out (`test: 0`)") and "`evaluation`" in warning.note


def test_a_set_that_is_too_small_for_a_share_is_named_as_the_reason(tmp_path: Path) -> None:
    rows = [
        {**row, "group_id": row["example_id"], "category": kind}
        for row, kind in zip(read_records(folder_of(tmp_path / "in", 2)), "ab", strict=True)
    ]
    report = run(splits.Params(test=0.2, validation=0), written(tmp_path / "set", rows), tmp_path / "out")
    assert [check.note for check in report.failures] == [
        "no rows in: test; there are 2 rows of 2 kinds by `stratify_by: category`"
    ]


def test_a_split_with_share_0_may_be_empty(tmp_path: Path) -> None:
    report = run(splits.Params(test=0.5, validation=0.0), folder_of(tmp_path / "in", 8), tmp_path / "out")
    assert report.failures == []
    assert read_records(tmp_path / "out" / "validation") == []


def test_shares_that_leave_nothing_to_train_on_are_refused() -> None:
    assert splits.Params(test=0.5, validation=0.4).test == 0.5
    with pytest.raises(ValidationError, match=r"test 0\.5 and validation 0\.5 leave nothing to train on"):
        splits.Params(test=0.5, validation=0.5)


def test_near_copies_with_wrong_groups_are_kept_in_one_split_and_reported(tmp_path: Path) -> None:
    rows = [record(f"{COPY} number {i} {i}", group=f"wrong {i}") for i in range(6)] + [
        record(f"topic{i} word{i} thing{i} item{i} case{i}") for i in range(44)
    ]
    report = run(splits.Params(), written(tmp_path / "in", rows), tmp_path / "out")
    assert len({standing(tmp_path / "out")[row["example_id"]] for row in rows[:6]}) == 1
    assert report.failures == []
    assert report.checks[0].note == "6 rows have near-copies in a group of another group_id; they were kept together"


def test_splits_by_wrong_groups_do_not_pass_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [record(f"{COPY} number {i} {i} written to ann{i}@example.org", group=f"wrong {i}") for i in range(40)]
    monkeypatch.setattr(splits, "joined", lambda links: {})
    (failed,) = run(splits.Params(), written(tmp_path / "in", rows), tmp_path / "out").failures
    assert (failed.name, failed.count) == ("split_leakage", 40)
    assert failed.rows[0].startswith(("validation/", "test/")) and failed.rows[0].endswith(": near-copies")
    assert "ann" not in json.dumps(asdict(failed))


def labeled_row(label: str | None, prompt: str, group: str = "") -> dict[str, Any]:
    return record(prompt, group=group, meta=json.dumps({"split": label}) if label else "{}")


def some(n: int, start: int = 0) -> list[str]:
    return [f"topic{i} word{i} thing{i} item{i} case{i}" for i in range(start, start + n)]


def test_labels_are_kept_and_near_copies_of_test_rows_dropped_from_train(tmp_path: Path) -> None:
    prompts = some(12)
    rows = [labeled_row(("train", "train", "validation", "test")[i % 4], prompt) for i, prompt in enumerate(prompts)]
    test, train = labeled_row("test", COPY), labeled_row("train", NEARLY)
    source = written(tmp_path / "in", [*rows, train, test])
    report = run(splits.Params(test=0.5, validation=0.2), source, tmp_path / "out")
    assert standing(tmp_path / "out") == {row["example_id"]: json.loads(row["meta"])["split"] for row in [*rows, test]}
    assert (report.rows_in, report.rows_out, report.dropped) == (14, 13, {"split_leakage": 1})
    leakage, schema, _ = report.checks
    assert leakage.passed and leakage.count == 1
    assert leakage.rows == [f"train/{train['example_id']} belongs to test/{test['example_id']}: dropped"]
    assert leakage.note.startswith("the labels of the source leak: 1 dropped from train")
    assert schema.note == "14 of 14 rows have a split in their source"
    line = next(line for line in read_ledger(tmp_path / "out") if line["example_id"] == train["example_id"])
    assert (line["source_row"], line["outcome"], line["why"]) == (
        13,
        "dropped:split_leakage",
        f"belongs to test/{test['example_id']}",
    )


def test_labels_of_some_rows_are_kept_and_the_others_assigned(tmp_path: Path) -> None:
    rows = [
        labeled_row(("train", "validation", "test")[i % 3] if i < 9 else None, prompt)
        for i, prompt in enumerate(some(49))
    ]
    report = run(splits.Params(test=0.2, validation=0.1), written(tmp_path / "in", rows), tmp_path / "out")
    assert report.metrics == {"train": 3 + 28, "validation": 3 + 4, "test": 3 + 8}
    assert report.checks[1].note == "9 of 49 rows have a split in their source; the other 40 were assigned by share"
    few = [labeled_row(label, prompt) for label, prompt in zip(("train", None), some(2), strict=True)]
    report = run(splits.Params(test=0, validation=0), written(tmp_path / "few", few), tmp_path / "other")
    assert report.checks[1].note.endswith("1 of 2 rows has a split in its source; the other 1 was assigned by share")


def test_labels_are_not_kept_if_turned_off(tmp_path: Path) -> None:
    rows = [labeled_row("train", prompt) for prompt in some(40)]
    report = run(splits.Params(keep_labels=False), written(tmp_path / "in", rows), tmp_path / "out")
    assert report.metrics == {"train": 28, "validation": 4, "test": 8}


def test_a_single_upstream_train_split_is_divided_with_a_note(tmp_path: Path) -> None:
    rows = [labeled_row("train", prompt) for prompt in some(40)]
    report = run(splits.Params(), written(tmp_path / "in", rows), tmp_path / "out")
    assert report.metrics == {"train": 28, "validation": 4, "test": 8}
    assert report.checks[1].note.endswith("the source names no validation or test: taken from train")


def test_a_source_is_never_divided_if_splits_are_by_source(tmp_path: Path) -> None:
    rows = [record(prompt, source=f"{'abc'[i % 3]}.jsonl") for i, prompt in enumerate(some(30))]
    report = run(splits.Params(by="source"), written(tmp_path / "in", rows), tmp_path / "out")
    where = standing(tmp_path / "out")
    assert len({(row["source"], where[row["example_id"]]) for row in rows}) == 3
    assert (
        report.checks[1].note
        == "validation has 10 of 30 rows (33.3%) instead of 10.0%; test has 10 of 30 rows (33.3%) instead of 20.0%; "
        "the largest source, with all that belongs to it, has 10 rows and is not divided"
    )


def test_two_sources_cannot_fill_three_splits(tmp_path: Path) -> None:
    rows = [record(prompt, source=f"{'ab'[i % 2]}.jsonl") for i, prompt in enumerate(some(30))]
    (failed,) = run(splits.Params(by="source"), written(tmp_path / "in", rows), tmp_path / "out").failures
    assert failed.note.startswith("no rows in: validation") and "the largest source" in failed.note


def test_a_category_is_never_divided_if_splits_are_by_category(tmp_path: Path) -> None:
    rows = [record(prompt, category="abcdefghij"[i % 10]) for i, prompt in enumerate(some(50))]
    report = run(splits.Params(by="category"), written(tmp_path / "in", rows), tmp_path / "out")
    where = standing(tmp_path / "out")
    assert len({(row["category"], where[row["example_id"]]) for row in rows}) == 10
    assert report.metrics == {"train": 35, "validation": 5, "test": 10}


def test_rows_of_one_customer_stay_together_whether_the_number_is_text_or_not(tmp_path: Path) -> None:
    spellings = ["{}", '"{}"', "{}.0", '"{}.0"']  # a table writes a column of whole numbers with gaps as floats
    values = [f'{{"customer_id": {spellings[i % 4].format(i % 9)}}}' for i in range(45)]
    rows = [
        record(prompt, meta=meta)
        for prompt, meta in zip(
            some(50), [*values, "{}", '{"customer_id": null}', '{"customer_id": ""}', "{}", "{}"], strict=True
        )
    ]
    run(splits.Params(by="key", key="customer_id"), written(tmp_path / "in", rows), tmp_path / "out")
    where = standing(tmp_path / "out")
    assert len({(i % 9, where[row["example_id"]]) for i, row in enumerate(rows[:45])}) == 9


@pytest.mark.parametrize("empty", ["null", '""', "[]", "{}"])
def test_rows_whose_key_is_empty_do_not_stay_together(empty: str, tmp_path: Path) -> None:
    rows = [record(prompt, meta=f'{{"tags": {empty if i else [1]}}}') for i, prompt in enumerate(some(50))]
    report = run(splits.Params(by="key", key="tags"), written(tmp_path / "in", rows), tmp_path / "out")
    assert report.metrics == {"train": 35, "validation": 5, "test": 10}


def test_a_key_that_no_row_has_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "in", [record(prompt, meta='{"client": 4}') for prompt in some(3)])
    with pytest.raises(InputError) as refused:
        run(splits.Params(by="key", key="customer_id"), source, tmp_path / "out")
    assert (
        str(refused.value)
        == "params.yaml: splits.key: no row has a field 'customer_id'\nhint: fields that rows have: client; use one"
        " that identifies rows that must stay together"
    )
    with pytest.raises(InputError, match=r"splits\.by: no row has a category"):
        run(splits.Params(by="category"), source, tmp_path / "out")


def test_a_key_that_a_repair_has_masked_is_refused(tmp_path: Path) -> None:
    """Of the rows of one customer, only those with personal data in their text have a placeholder."""
    keys = ["[EMAIL]", "ann@mail.example", "[EMAIL]", "bob@mail.example", "[VIP] 7"]
    rows = [record(prompt, meta=json.dumps({"who": key})) for prompt, key in zip(some(5), keys, strict=True)]
    source = written(tmp_path / "in", rows)
    lines = [{**row, "source_row": i, "outcome": "kept", "why": ""} for i, row in enumerate(rows)]
    for i, checks in ((0, ["pii"]), (2, ["unicode_form", "secrets"]), (3, ["unicode_form"])):
        lines[i] |= {"source_id": "0" * 64, "repaired": checks}
    write_ledger(source, lines)
    with pytest.raises(InputError, match=r"splits\.by: 'who' is masked in 2 rows \(\[EMAIL\]\)") as refused:
        run(splits.Params(by="key", key="who"), source, tmp_path / "out")
    assert "hash" in refused.value.hint
    assert run(splits.Params(), source, tmp_path / "out").rows_in == 5


def test_by_key_and_key_need_each_other() -> None:
    with pytest.raises(ValidationError, match="`by: key` requires `key`"):
        splits.Params(by="key")
    with pytest.raises(ValidationError, match="`key` requires `by: key`"):
        splits.Params(key="customer_id")


def test_the_ledger_records_the_split_of_each_row(tmp_path: Path) -> None:
    rows = [labeled_row("test" if i == 0 else None, prompt) for i, prompt in enumerate(some(20))]
    run(splits.Params(), written(tmp_path / "in", rows), tmp_path / "out")
    lines = read_ledger(tmp_path / "out")
    where = standing(tmp_path / "out")
    assert [(line["source_row"], line["outcome"]) for line in lines] == [
        (i, where[row["example_id"]]) for i, row in enumerate(rows, 1)
    ]
    assert [line["why"] for line in lines] == ["label of the source"] + [""] * 19


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([COPY, NEARLY, *OTHERS]),
            st.integers(0, 30),
            st.sampled_from([None, *SPLITS]),
            st.integers(0, 4),
        ),
        min_size=1,
        max_size=25,
    ),
    by=st.sampled_from(["group", "source", "key"]),
)
@settings(deadline=None, max_examples=25)
def test_for_any_rows_none_is_lost_and_the_splits_do_not_overlap(
    rows: list[tuple[str, int, str | None, int]], by: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    held = {
        row["example_id"]: row
        for prompt, n, label, key in rows
        for row in [record(f"{prompt} {n}", source=f"{key % 2}.jsonl", meta=json.dumps({"k": key, "split": label}))]
    }
    folder = tmp_path_factory.mktemp("any")
    source = written(folder / "in", list(held.values()))
    report = run(splits.Params(by=by, key="k" if by == "key" else None), source, folder / "out")  # type: ignore[arg-type]
    where = standing(folder / "out")
    assert report.rows_in == len(held) == len(where) + sum(report.dropped.values())
    assert [check.name for check in report.failures] in ([], ["schema"])
    texts = [held[name]["messages"][0]["content"] for name in where]
    assert all(where[list(where)[p.left]] == where[list(where)[p.right]] for p in near_pairs(texts))
