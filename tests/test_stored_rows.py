"""Rows in a scratch file behave as a list of rows; workers of any number give the same results."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import psutil
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from dagster_project.core import workers
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.stored_rows import (
    BLOCK,
    Chained,
    Selected,
    StoredRows,
    Texts,
    decode,
    encode,
    encode_finite,
    encoded,
)
from dagster_project.core.workers import AHEAD, LocalProcesses, ThisProcess

texts = st.text(st.characters(), max_size=20)  # unpaired surrogates included
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
rows = st.lists(st.dictionaries(texts, values, max_size=4), max_size=20)


@given(rows, st.integers(-25, 25), st.integers(-25, 25), st.integers(1, 3))
def test_stored_rows_are_a_list(plain: list[dict[str, object]], start: int, stop: int, step: int) -> None:
    stored = StoredRows(plain)
    assert len(stored) == len(plain) and list(stored) == plain and [stored[i] for i in range(len(plain))] == plain
    assert [list(row) for row in stored] == [list(row) for row in plain], "the order of keys is kept"
    assert stored[start:stop:step] == plain[start:stop:step]
    for i in (start, stop):
        if -len(plain) <= i < len(plain):
            assert stored[i] == plain[i]
        else:
            with pytest.raises(IndexError):
                stored[i]


@given(rows)
def test_rows_are_decoded_as_json_does(plain: list[dict[str, object]]) -> None:
    for row in plain:
        assert repr(decode(encode(row))) == repr(json.loads(json.dumps(row))), "types of numbers included"
        if "Infinity" not in json.dumps(row):
            assert repr(decode(encode_finite(row))) == repr(decode(encode(row)))


paired = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    st.lists(
        st.tuples(st.integers(0, 2**40), paired, paired | st.none(), st.lists(st.tuples(paired, paired), max_size=3)),
        max_size=5,
    )
)
def test_rows_of_a_table_are_encoded_as_their_values(
    given_rows: list[tuple[int, str, str | None, list[tuple[str, str]]]],
) -> None:
    named = [
        {
            "source_row": number,
            "meta": meta,
            "category": category,
            "messages": [{"role": role, "content": text} for role, text in turns],
        }
        for number, meta, category, turns in given_rows
    ]
    message = pl.Struct({"role": pl.String, "content": pl.String})
    schema = {"source_row": pl.Int64, "meta": pl.String, "category": pl.String, "messages": pl.List(message)}
    lines = encoded(pl.DataFrame(named, schema))
    assert [*map(decode, lines)] == named and [list(decode(line)) for line in lines] == [list(row) for row in named]
    plain = [
        i
        for i, row in enumerate(named)
        if encode(row).decode() == json.dumps(row, ensure_ascii=False, separators=(",", ":"))
    ]
    assert [lines[i] for i in plain if b"\\" not in lines[i]] == [
        encode(named[i]) for i in plain if b"\\" not in lines[i]
    ]


def test_rows_can_be_added_between_reads(tmp_path: Path) -> None:
    stored = StoredRows(folder=tmp_path / "scratch")
    for i in range(2 * BLOCK + 1):
        stored.append({"i": i})
        if i % BLOCK < 2:
            assert stored[i] == {"i": i} and stored[0] == {"i": 0}
    assert [row["i"] for row in stored] == list(range(2 * BLOCK + 1))
    assert list((tmp_path / "scratch").iterdir()) == [], "the file has no name"


@given(rows, st.data())
def test_changed_rows_are_those_of_a_changed_list(plain: list[dict[str, object]], data: st.DataObject) -> None:
    changes = data.draw(
        st.dictionaries(st.integers(0, len(plain) - 1), st.dictionaries(texts, values, max_size=2))
        if plain
        else st.just({})
    )
    before = StoredRows(plain)
    after = before.with_changes((i, encode(row)) for i, row in changes.items())
    assert list(before) == plain and list(after) == [changes.get(i, row) for i, row in enumerate(plain)]
    assert [after[i] for i in range(len(plain))] == list(after) == after[:]


@given(rows, st.data())
def test_selected_rows_and_texts_are_those_of_a_list(plain: list[dict[str, object]], data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(plain) - 1), max_size=10) if plain else st.just([]))
    stored = StoredRows(plain)
    assert list(Selected(stored, indices)) == [plain[i] for i in indices]
    assert list(Selected(stored, indices, lambda i, row: {**row, "i": i})) == [{**plain[i], "i": i} for i in indices]
    chained = Chained(Texts(stored, indices, repr), ["x"], [], Texts(stored, range(len(plain)), str))
    expected = [*(repr(plain[i]) for i in indices), "x", *map(str, plain)]
    assert list(chained) == expected == [chained[i] for i in range(len(chained))] and chained[1:3] == expected[1:3]


def _scaled(factor: int, item: int) -> tuple[int, int]:
    return factor * item, os.getpid()


def test_any_number_of_processes_gives_the_same_results_in_order() -> None:
    items = random.Random(1).sample(range(1000), 30)
    expected = [3 * item for item in items]
    assert [value for value, _ in ThisProcess().map(_scaled, 3, items)] == expected
    found = [*LocalProcesses(2).map(_scaled, 3, items)]
    assert [value for value, _ in found] == expected
    assert os.getpid() not in {process for _, process in found}


def test_items_are_read_only_as_far_as_processes_are_free() -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for number in range(1, 101):
            read = number
            yield number

    results = LocalProcesses(2).map(_scaled, 1, items())
    next(results)
    assert read <= 2 * AHEAD + 1
    results.close()  # type: ignore[attr-defined]


def test_started_processes_serve_several_calls() -> None:
    with workers.using(LocalProcesses(2)):
        two = workers.current()
        first, second = ([*two.map(_scaled, factor, range(8))] for factor in (3, 5))
        assert two.count == 2
    assert [value for value, _ in first + second] == [factor * item for factor in (3, 5) for item in range(8)]
    processes = {process for _, process in first + second}
    assert len(processes) <= 2 and os.getpid() not in processes


def _end(_: None, code: int) -> None:
    os._exit(code)


def test_a_process_that_ends_is_one_message() -> None:
    with pytest.raises(PedigreeError) as refusal:
        list(LocalProcesses(2).map(_end, None, [1, 1]))
    assert "ended" in str(refusal.value) and "workers" in str(refusal.value)
    with pytest.raises(PedigreeError, match="ended"), LocalProcesses(1).started() as one:
        list(one.map(_end, None, range(1, 9)))


def _refuse(hint: str, item: int) -> None:
    raise InputError(f"row {item}", hint)


@pytest.mark.parametrize("hint", ["", "correct it"])
def test_an_error_of_another_process_has_its_message_and_hint_apart(hint: str) -> None:
    with pytest.raises(InputError) as refusal:
        list(LocalProcesses(1).map(_refuse, hint, [7]))
    assert (refusal.value.what, refusal.value.hint) == ("row 7", hint)
    assert str(refusal.value) == ("row 7\nhint: correct it" if hint else "row 7")


def test_ctrl_c_ends_all_processes_and_only_the_first_reports_it(tmp_path: Path) -> None:
    script = tmp_path / "wait.py"
    script.write_text(
        "import signal, sys, time\n"
        "from dagster_project.core import workers\n"
        "def wait(_, seconds):\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(seconds)\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    with workers.using(workers.LocalProcesses(2)):\n"
        "        list(workers.current().map(wait, None, [1, 1, 2, 2, 2, 2]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in errors and process.returncode != 0
    assert "spawn_main" not in errors, errors


def test_workers_end_when_their_stage_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "wait.py"
    script.write_text(
        "import os, time\n"
        "from dagster_project.core import workers\n"
        "def tell(_, item):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(item)\n"
        "if __name__ == '__main__':\n"
        "    for _ in workers.LocalProcesses(1).map(tell, None, [0, 0, 0]):\n"
        "        time.sleep(600)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )
    assert process.stdout
    worker = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    worker.wait(60)


def test_rows_in_order_are_read_once_although_some_were_replaced() -> None:
    rows = StoredRows({"i": i, "text": "x" * 1000} for i in range(5000))
    changed = rows.with_changes((i, encode({"i": i})) for i in range(0, 5000, 10))
    read = 0
    scratch = changed._lines
    inner = scratch._read

    def counted(start: int, size: int, needed: int) -> bytes:
        nonlocal read
        read += len(part := inner(start, size, needed))
        return part

    scratch._read = counted  # type: ignore[method-assign]
    assert [row["i"] for row in changed] == list(range(5000))
    assert read < 2 * 5000 * 1030


def test_workers_are_those_of_the_innermost_context() -> None:
    assert isinstance(workers.current(), ThisProcess)
    with workers.using(LocalProcesses(2)):
        assert workers.current().count == 2
        with workers.using(workers.THIS_PROCESS):
            assert isinstance(workers.current(), ThisProcess)
    assert isinstance(workers.current(), ThisProcess)
