"""Sources are read in parts: any number of parts and processes gives the
records that all rows in memory give, in little memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.files import jsonl
from builders.layouts import LAYOUT_ROWS, PAIR_ROWS
from builders.sources import to_pairs, to_records

from dagster_project.core import workers
from dagster_project.core.errors import InputError
from dagster_project.core.frames import read_pairs
from dagster_project.core.params import parse
from dagster_project.curation.sources import files, streaming
from dagster_project.curation.sources.files import read_rows
from dagster_project.curation.sources.formats import pairs_of, records_of
from dagster_project.stages import raw_examples, raw_preferences

LINES: list[Any] = ["not JSON", "", "   ", "[1]", {"unknown": 1}, {"instruction": "Hi", "output": "Ho", "prompt": None}]


@pytest.fixture(params=[1, 3, 4096])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Number of rows in a part of a file."""
    monkeypatch.setattr(files, "BLOCK_ROWS", request.param)
    return int(request.param)


def without_fields(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "fields"} for record in records]


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("layout", LAYOUT_ROWS)
def test_examples_that_are_read_in_parts_are_those_of_all_rows_in_memory(layout: str, tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        *([LAYOUT_ROWS[layout][0]] * 9),
        *([] if layout == "text" else LINES),
        LAYOUT_ROWS[layout][0],
    )
    found, records = to_records(path, "a.jsonl")
    expected, in_memory = records_of(read_rows(path), "a.jsonl", "a.jsonl")
    assert found == expected == layout
    assert records == without_fields(in_memory)


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("layout", PAIR_ROWS)
def test_preferences_that_are_read_in_parts_are_those_of_all_rows_in_memory(layout: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *(PAIR_ROWS[layout] * 9), *LINES, *PAIR_ROWS[layout])
    found, pairs = to_pairs(path, "a.jsonl")
    expected, in_memory = pairs_of(read_rows(path), "a.jsonl", "a.jsonl")
    assert found == expected == layout
    assert pairs == without_fields(in_memory)


def kto(seed: int) -> list[dict[str, Any]]:
    """Answers to four prompts with random labels, some with a category, a split or a field that is not used."""
    chance = random.Random(seed)
    rows = []
    for number in range(60):
        message = {
            "role": "assistant",
            "content": f"answer {number}",
            **({"id": number} if chance.random() < 0.3 else {}),
        }
        row = {
            "prompt": f"prompt {chance.randrange(4)}",
            "completion": [message],
            "label": chance.random() < 0.5,
            "note": number,
        }
        extra = {"category": f"c{chance.randrange(2)}", "split": chance.choice(["train", "test"])}
        rows.append({**row, **{key: value for key, value in extra.items() if chance.random() < 0.5}})
    return rows


def greedy(rows: list[dict[str, Any]]) -> list[list[int]]:
    """Source rows of each pair: a row joins the earliest row without partner
    that has its prompt and split and the opposite label."""
    pairs: list[list[int]] = []
    for number, row in enumerate(rows):

        def fits(pair: list[int], row: dict[str, Any] = row) -> bool:
            first = rows[pair[0]]
            alike = all(first.get(key) == row.get(key) for key in ("prompt", "split"))
            return len(pair) == 1 and alike and first["label"] != row["label"]

        open_pair = next((pair for pair in pairs if fits(pair)), None)
        if open_pair is None:
            pairs.append([number])
        else:
            open_pair.append(number)
    return pairs


def read_preferences(root: Path, **section: Any) -> Any:
    params = parse(
        raw_preferences.Params, {"sources": [{"path": "data/sources/p.jsonl"}], **section}, "raw_preferences"
    )
    report = raw_preferences.produce(root, params, root / "out")
    return report, read_pairs(root / "out")


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_kto_are_joined_across_parts(seed: int, tmp_path: Path) -> None:
    rows = kto(seed)
    path = jsonl(tmp_path / "data/sources/p.jsonl", *rows)
    report, pairs = read_preferences(tmp_path)
    assert [pair["source_rows"] for pair in pairs] == greedy(rows)
    assert to_pairs(path, "a")[1] == without_fields(pairs_of(read_rows(path), "p.jsonl", "a")[1])
    facts = report.metrics["sources"]["data/sources/p.jsonl"]
    assert (facts["rows"], facts["pairs"], facts["fields"]["used"]["prompt"]) == (60, len(greedy(rows)), 60)


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("limit", [1, 5, 17, 40, 100])
def test_a_limit_of_pairs_counts_pairs_and_the_rows_that_later_join_them(limit: int, tmp_path: Path) -> None:
    rows = kto(9)
    jsonl(tmp_path / "data/sources/p.jsonl", *rows)
    report, pairs = read_preferences(tmp_path, limit=limit)
    expected = greedy(rows)[:limit]
    assert [pair["source_rows"] for pair in pairs] == expected
    facts = report.metrics["sources"]["data/sources/p.jsonl"]
    joined = sum(map(len, expected))
    assert (facts["rows"], facts["pairs"], facts["fields"]["used"]["prompt"]) == (joined, len(expected), joined)


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7, 100])
def test_a_limit_of_examples_may_end_within_a_row(limit: int, tmp_path: Path) -> None:
    row = {"instruction": "Add.", "instances": [{"input": str(n), "output": str(n)} for n in range(3)]}
    jsonl(tmp_path / "data/sources/a/x.jsonl", row, row)
    jsonl(tmp_path / "data/sources/a/y.jsonl", {"prompt": "Hi", "completion": "Hello"})
    params = parse(raw_examples.Params, {"sources": [{"path": "data/sources/a"}], "limit": limit}, "raw_examples")
    report = raw_examples.produce(tmp_path, params, tmp_path / "out")
    facts = report.metrics["sources"]["data/sources/a"]
    rows = {1: (1, 0), 2: (1, 0), 3: (1, 0), 4: (2, 0), 7: (2, 1), 100: (2, 1)}[limit]
    assert report.rows_out == min(limit, 7)
    assert tuple(file["rows"] for file in facts["files"].values()) == rows
    assert facts["format"] == "instances, prompt_completion", (
        "the layout of each file is detected, also beyond the limit"
    )


def outputs(root: Path, out: str) -> dict[str, bytes]:
    params = parse(raw_examples.Params, {"sources": [{"path": "data/sources/mine"}]}, "raw_examples")
    report = raw_examples.produce(root, params, root / out)
    return {
        "report": json.dumps(report.document()).encode(),
        **{file.name: file.read_bytes() for file in (root / out).iterdir()},
    }


def test_two_processes_give_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "data/sources/mine"
    jsonl(folder / "a.jsonl", *([LAYOUT_ROWS["messages"][0]] * 30), *LINES)
    jsonl(folder / "b.jsonl", *([LAYOUT_ROWS["instances"][0]] * 30))
    table = pa.Table.from_pylist([{"prompt": f"p{n}", "response": "r" * n} for n in range(300)])
    pq.write_table(table, folder / "c.parquet")
    dictionary = table.set_column(0, "prompt", table["prompt"].dictionary_encode())
    with pa.ipc.new_file(folder / "d.arrow", table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(folder / "e.arrow", dictionary.schema) as stream:
        stream.write_table(dictionary)
    monkeypatch.setattr(streaming, "SMALL", 0)
    monkeypatch.setattr(files, "BLOCK_ROWS", 20)
    alone = outputs(tmp_path, "alone")
    with workers.using(workers.LocalProcesses(2)):
        assert outputs(tmp_path, "shared") == alone


@pytest.mark.parametrize("count", [1, 2])
def test_the_error_of_the_first_bad_file_is_reported_with_any_number_of_processes(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data/sources/mine"
    jsonl(folder / "a.jsonl", *([LAYOUT_ROWS["messages"][0]] * 30))
    jsonl(folder / "b.jsonl", *([{"unknown": 1}] * 30))
    (folder / "c.parquet").write_bytes(b"not Parquet")
    monkeypatch.setattr(streaming, "SMALL", 0)
    monkeypatch.setattr(files, "BLOCK_ROWS", 4)
    with (
        workers.using(workers.LocalProcesses(2) if count == 2 else workers.THIS_PROCESS),
        pytest.raises(InputError) as caught,
    ):
        outputs(tmp_path, "out")
    assert caught.value.what == "mine/b.jsonl: unknown format (keys of the first row: unknown)"
    assert caught.value.hint


MEASURED = """
import resource, sys
from pathlib import Path
from dagster_project.stages import raw_examples
root = Path(sys.argv[1])
raw_examples.produce(root, raw_examples.Params(sources=[{"path": "data/sources/a.jsonl"}]), root / "out")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    text = "word " * 200

    def peak(rows: int) -> int:
        """Of a process that reads this many rows of 2 kB, in MB."""
        lines = (
            {"messages": [{"role": "user", "content": f"{n} {text}"}, {"role": "assistant", "content": text}]}
            for n in range(rows)
        )
        jsonl(tmp_path / "data/sources/a.jsonl", *lines)
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert peak(54_000) - peak(14_000) < 60, "80 MB of text more"
