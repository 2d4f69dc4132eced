"""Sources -> raw_examples: every row is accounted for, none is read twice or
held out, and a mostly unreadable source is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from builders.files import jsonl
from builders.layouts import LAYOUT_ROWS

from dagster_project.core import frames
from dagster_project.core.errors import InputError
from dagster_project.core.params import parse
from dagster_project.core.records import Report, read_ledger, read_records
from dagster_project.curation.check_files import check_paths
from dagster_project.curation.sources import fields, formats, row_reading
from dagster_project.curation.sources.formats import LAYOUTS
from dagster_project.stages import raw_examples

PAIR = {"prompt": "Hi", "completion": "Hello"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with a file, a folder of two files, and a benchmark."""
    sources = tmp_path / "data/sources"
    jsonl(sources / "a.jsonl", PAIR, {**PAIR, "prompt": "Ho"})
    jsonl(sources / "mine/train.jsonl", PAIR)
    jsonl(
        sources / "mine/more/test.jsonl", {"question": "Hi?", "answer": "Hello"}, {"question": "Ho?", "answer": "Hey"}
    )
    jsonl(sources / "benchmarks/b.jsonl", {"question": "?", "choices": ["a", "b"], "answer": 0})
    return tmp_path


def read(root: Path, *sources: Any, **section: Any) -> Report:
    values = {"sources": [{"path": source} if isinstance(source, str) else source for source in sources], **section}
    return raw_examples.produce(root, parse(raw_examples.Params, values, "raw_examples"), root / "out")


def refusal(root: Path, *sources: Any, **section: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read(root, *sources, **section)
    assert not (root / "out").exists() and caught.value.hint
    return caught.value


def test_every_row_is_a_record_and_a_line_of_the_ledger_in_the_same_order(root: Path) -> None:
    jsonl(root / "data/sources/a.jsonl", PAIR, "broken", {**PAIR, "prompt": "Ho"})
    report = read(root, "data/sources/a.jsonl", "data/sources/mine")
    records, ledger = read_records(root / "out"), read_ledger(root / "out")
    assert (report.rows_in, report.rows_out, len(records)) == (6, 6, 6)
    assert [(row["source"], row["source_row"]) for row in ledger] == [
        *(("data/sources/a.jsonl", row) for row in range(3)),
        ("data/sources/mine/more/test.jsonl", 0),
        ("data/sources/mine/more/test.jsonl", 1),
        ("data/sources/mine/train.jsonl", 0),
    ]
    assert [(row["source"], row["example_id"]) for row in ledger] == [
        (record["source"], record["example_id"]) for record in records
    ]
    assert {row["outcome"] for row in ledger} == {"read"}


def test_the_report_describes_each_source(root: Path) -> None:
    report = read(root, {"path": "data/sources/a.jsonl", "license": "MIT", "origin": "a friend"})
    digest = hashlib.sha256((root / "data/sources/a.jsonl").read_bytes()).hexdigest()
    fields = {"used": {"completion": 2, "prompt": 2}}
    facts = {
        "format": "prompt_completion",
        "rows": 2,
        "sha256": digest,
        "license": "MIT",
        "origin": "a friend",
        "fields": fields,
    }
    assert report.metrics["sources"] == {"data/sources/a.jsonl": facts}


def test_the_digest_of_a_folder_is_that_of_the_list_that_sha256sum_prints(root: Path) -> None:
    (root / "data/sources/mine/README.md").write_text("no examples")
    report = read(root, "data/sources/mine/")
    found = report.metrics["sources"]["data/sources/mine/"]
    command = "sha256sum more/test.jsonl train.jsonl | sha256sum"
    printed = subprocess.run(
        command, shell=True, cwd=root / "data/sources/mine", capture_output=True, text=True, check=True
    ).stdout
    assert (found["sha256"], found["rows"]) == (printed.split()[0], 3)
    assert {name: file["rows"] for name, file in found["files"].items()} == {"more/test.jsonl": 2, "train.jsonl": 1}


def test_files_of_a_folder_that_are_not_read_are_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "not_read" not in read(root, "data/sources/mine").metrics["sources"]["data/sources/mine"]
    for name in ("more/train-2.jsonl.zst", "b.csv.gz", ".DS_Store", "more/test.jsonl.dvc"):
        (root / "data/sources/mine" / name).write_bytes(b"...")
    found = read(root, "data/sources/mine").metrics["sources"]["data/sources/mine"]
    assert found["not_read"] == {"files": 2, "names": ["b.csv.gz", "more/train-2.jsonl.zst"]}
    check_paths([str(root / "data/sources/mine")])
    assert caplog.messages == ["mine: not read, because of their types: b.csv.gz, more/train-2.jsonl.zst"] * 2


def test_a_source_has_one_name_however_its_path_is_spelled(root: Path) -> None:
    for spelling in ("./data/sources/a.jsonl", "data//sources/./a.jsonl", "data/sources/mine/../a.jsonl"):
        assert [*read(root, spelling).metrics["sources"]] == ["data/sources/a.jsonl"]
        assert {row["source"] for row in read_ledger(root / "out")} == {"data/sources/a.jsonl"}
    with pytest.raises(InputError, match=r"data/sources/a.jsonl is named twice"):
        read(root, "data/sources/a.jsonl", "./data/sources/a.jsonl")


def test_hidden_files_of_a_folder_are_not_read_and_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = read(root, "data/sources/mine").metrics["sources"]["data/sources/mine"]
    jsonl(root / "data/sources/mine/.ipynb_checkpoints/train-checkpoint.jsonl", {**PAIR, "prompt": "Ho"})
    (root / "data/sources/mine/more/._test.jsonl").write_bytes(b"\x00\x05\x16\x07")
    (root / "data/sources/mine/.git/objects").mkdir(parents=True)
    (root / "data/sources/mine/.git/HEAD").write_text("ref: refs/heads/main")
    found = read(root, "data/sources/mine").metrics["sources"]["data/sources/mine"]
    hidden = [".ipynb_checkpoints/train-checkpoint.jsonl", "more/._test.jsonl"]
    assert found == {**before, "not_read": {"files": 2, "names": hidden}}
    assert caplog.messages == [f"mine: not read, because they are hidden: {', '.join(hidden)}"]


def test_a_data_set_that_datasets_saved_has_the_rows_that_it_loads(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from datasets import Dataset, DatasetDict, load_from_disk

    place = root / "data/sources/saved"
    rows = [{**PAIR, "prompt": f"Question {i}?"} for i in range(6)]
    splits = {"train": Dataset.from_list(rows[:4]), "test": Dataset.from_list(rows[4:])}
    DatasetDict(splits).save_to_disk(place, num_shards={"train": 2, "test": 1})
    (place / "train/data-00000-of-00003.arrow").write_bytes(b"of an earlier save")
    (place / "train/cache-0123456789abcdef.arrow").write_bytes((place / "train/data-00000-of-00002.arrow").read_bytes())
    report = read(root, {"path": "data/sources/saved", "split": "from_file_names"})
    loaded = [(name, row["prompt"]) for name in ("test", "train") for row in load_from_disk(str(place))[name]]
    records = read_records(root / "out")
    assert [(json.loads(one["meta"])["split"], one["messages"][0]["content"]) for one in records] == loaded
    assert {one["source"] for one in records} == {
        f"data/sources/saved/{name}.arrow"
        for name in ("test/data-00000-of-00001", "train/data-00000-of-00002", "train/data-00001-of-00002")
    }
    left = report.metrics["sources"]["data/sources/saved"]["not_read"]["names"]
    assert left == [
        "dataset_dict.json",
        *(f"test/{name}" for name in ("dataset_info.json", "state.json")),
        *(f"train/{name}" for name in ("cache-0123456789abcdef.arrow", "data-00000-of-00003.arrow")),
        *(f"train/{name}" for name in ("dataset_info.json", "state.json")),
    ]
    assert caplog.messages == [f"saved: not read, because they are not data of the saved data set: {', '.join(left)}"]
    (place / "train/data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match=r"train/state\.json names data-00001-of-00002\.arrow, which is not"):
        read(root, "data/sources/saved")


def test_files_named_like_those_of_a_saved_data_set_are_read_if_they_are_none(root: Path) -> None:
    for name in ("state.json", "dataset_info.json", "dataset_dict.json"):
        (root / "data/sources/mine" / name).write_text(json.dumps([PAIR]))
    assert read(root, "data/sources/mine").metrics["sources"]["data/sources/mine"]["rows"] == 6


def test_renaming_or_editing_a_file_of_a_folder_changes_its_digest(root: Path) -> None:
    digests = [read(root, "data/sources/mine").metrics["sources"]["data/sources/mine"]["sha256"]]
    (root / "data/sources/mine/train.jsonl").rename(root / "data/sources/mine/training.jsonl")
    digests.append(read(root, "data/sources/mine").metrics["sources"]["data/sources/mine"]["sha256"])
    jsonl(root / "data/sources/mine/training.jsonl", {**PAIR, "prompt": "Ho"})
    digests.append(read(root, "data/sources/mine").metrics["sources"]["data/sources/mine"]["sha256"])
    assert len(set(digests)) == 3


def test_the_same_sources_give_the_same_bytes(root: Path) -> None:
    def written() -> dict[str, bytes]:
        read(root, "data/sources/mine", "data/sources/a.jsonl")
        return {file.name: file.read_bytes() for file in (root / "out").iterdir()}

    assert written() == written()


def test_a_limit_applies_to_each_source(root: Path) -> None:
    report = read(root, "data/sources/a.jsonl", "data/sources/mine", limit=1)
    assert [source["rows"] for source in report.metrics["sources"].values()] == [1, 1]


def test_columns_of_a_set_are_those_that_its_rows_within_the_limit_need(root: Path) -> None:
    traced = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho", "reasoning_content": "Hm."},
        ]
    }
    jsonl(
        root / "data/sources/a.jsonl",
        {"messages": traced["messages"][:1]},
        {**traced, "weight": 2},
        {"messages": [], "source_row": 7},
    )
    columns = []
    for limit in (1, 2, 3):
        read(root, "data/sources/a.jsonl", limit=limit, max_malformed=1.0)
        columns.append("tools" in frames.read_schema(root / "out/records-00000.parquet"))
    assert columns == [False, True, True]
    assert [row["source_row"] for row in read_ledger(root / "out")] == [0, 1, 2]
    assert [row["why"] for row in read_ledger(root / "out")] == ["", "ignored: weight", ""]


def test_the_split_of_a_source_labels_its_rows(root: Path) -> None:
    read(
        root,
        {"path": "data/sources/a.jsonl", "split": "test"},
        {"path": "data/sources/mine", "split": "from_file_names"},
    )
    assert [json.loads(record["meta"])["split"] for record in read_records(root / "out")] == [
        "test",
        "test",
        "test",
        "test",
        "train",
    ]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["data/sources"], "data/sources is a folder that contains the held-out benchmarks"),
        (["data/sources/benchmarks"], "data/sources/benchmarks is held out, because it is in data/sources/benchmarks/"),
        (
            ["data/sources/benchmarks/b.jsonl"],
            "data/sources/benchmarks/b.jsonl is held out, because it is in data/sources/benchmarks/",
        ),
        (
            ["data/sources/mine", "data/sources/mine/train.jsonl"],
            "data/sources/mine/train.jsonl is in data/sources/mine and would be read twice",
        ),
        (
            ["data/sources/mine/more", "data/sources/mine"],
            "data/sources/mine/more is in data/sources/mine and would be read twice",
        ),
        (
            ["data/sources/link.jsonl", "data/sources/a.jsonl"],
            "data/sources/a.jsonl is in data/sources/link.jsonl and would be read twice",
        ),
        (["data"], "data is not inside data/sources/"),
        (["data/sources/none"], "data/sources/none does not exist"),
    ],
)
def test_sources_that_overlap_each_other_or_the_benchmarks_are_refused(
    sources: list[str], message: str, root: Path
) -> None:
    (root / "data/sources/link.jsonl").symlink_to("a.jsonl")
    assert refusal(root, *sources).what == f"params.yaml: raw_examples.sources: {message}"


def test_a_folder_that_merely_begins_with_the_same_name_does_not_overlap(root: Path) -> None:
    jsonl(root / "data/sources/mine2/a.jsonl", PAIR)
    jsonl(root / "data/sources/benchmarks2/a.jsonl", PAIR)
    assert read(root, "data/sources/mine", "data/sources/mine2", "data/sources/benchmarks2").rows_out == 5


COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "set either path or hub"),
        ({"path": "data/sources/a.jsonl", "hub": "org/name"}, "set either path or hub"),
        ({"hub": "org/name", "split": "train"}, "hub requires `revision` (the commit, 40 hex digits) and `split`"),
        ({"hub": "org/name", "revision": COMMIT}, "hub requires `revision` (the commit, 40 hex digits) and `split`"),
        (
            {"hub": "org/name", "revision": "main", "split": "train"},
            "revision 'main' is not a commit: 40 hex digits are required",
        ),
        ({"hub": "org/name", "revision": COMMIT[:12], "split": "train"}, "revision '012345678901' is not a commit"),
        ({"hub": "org/name", "revision": COMMIT + "\n", "split": "train"}, "is not a commit"),
        ({"hub": "name", "revision": COMMIT, "split": "train"}, "'name' is not a data set name: use org/name"),
        ({"hub": "../name", "revision": COMMIT, "split": "train"}, "'../name' is not a data set name"),
        ({"hub": "org/name", "revision": COMMIT, "split": "train[:5]"}, "split 'train[:5]' is not a split name"),
        (
            {"hub": "org/name", "revision": COMMIT, "split": "train", "config": "../x"},
            "config '../x' is not a configuration name",
        ),
        (
            {"path": "data/sources/a.jsonl", "revision": COMMIT},
            "revision and config belong to a hub data set, not to a path",
        ),
        (
            {"path": "data/sources/a.jsonl", "split": "dev"},
            "split 'dev' of a path must be train, validation, test or from_file_names",
        ),
    ],
)
def test_a_source_without_exactly_one_fixed_origin_is_refused(source: dict[str, Any], message: str, root: Path) -> None:
    what = refusal(root, source).what
    assert what.startswith("params.yaml: raw_examples.sources.0: ") and message in what


def test_the_same_split_of_a_data_set_named_twice_is_refused(root: Path) -> None:
    source = {"hub": "org/name", "revision": COMMIT, "split": "train"}
    assert "hub:org/name@012345678901/train is named twice" in refusal(root, source, source).what


# Rows that cannot be read


def test_a_source_that_is_mostly_unreadable_is_refused_with_its_first_problems(root: Path) -> None:
    jsonl(root / "data/sources/a.jsonl", PAIR, "", {"prompt": "Hi"}, "{broken", {"prompt": "Hi", "completion": 3}, {})
    error = refusal(root, "data/sources/a.jsonl")
    assert error.what.splitlines() == [
        "data/sources/a.jsonl: 4 of 5 rows cannot be read (prompt_completion); the first:",
        "  data/sources/a.jsonl:1: no key 'completion' (line 3)",
        (
            "  data/sources/a.jsonl:2: line is not JSON: Expecting property name enclosed in double quotes: column 2"
            " (line 4)"
        ),
        "  data/sources/a.jsonl:3: expected text, found int (line 5)",
    ]
    assert (
        error.hint
        == "fix them, or set the right format; raw_examples.max_malformed (0.5) is the share that may be unreadable"
    )


@pytest.mark.parametrize(
    ("bad", "most", "refused"), [(2, 0.5, False), (3, 0.5, True), (3, 0.8, False), (1, 0.0, True), (0, 0.0, False)]
)
def test_the_share_that_may_be_unreadable_is_a_parameter(bad: int, most: float, refused: bool, root: Path) -> None:
    jsonl(root / "data/sources/a.jsonl", *[PAIR] * 2, *["broken"] * bad)
    if refused:
        assert (
            f"{bad} of {bad + 2} rows cannot be read" in refusal(root, "data/sources/a.jsonl", max_malformed=most).what
        )
    else:
        assert read(root, "data/sources/a.jsonl", max_malformed=most).rows_out == bad + 2


def test_the_share_is_that_of_each_source(root: Path) -> None:
    jsonl(root / "data/sources/b.jsonl", PAIR, "broken", "broken")
    assert "data/sources/b.jsonl: 2 of 3 rows" in refusal(root, "data/sources/a.jsonl", "data/sources/b.jsonl").what


def test_a_source_without_a_readable_row_is_always_refused(root: Path) -> None:
    jsonl(root / "data/sources/a.jsonl", {"prompt": 1, "completion": 2})
    assert "1 of 1 rows cannot be read" in refusal(root, "data/sources/a.jsonl", max_malformed=1.0).what


def test_a_refusal_never_quotes_row_contents(root: Path) -> None:
    jsonl(
        root / "data/sources/a.jsonl",
        {"prompt": ["jane@example.org"], "completion": "x"},
        '{"prompt": "jane@example.org',
    )
    assert "jane" not in str(refusal(root, "data/sources/a.jsonl"))


# Fields


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def fields_of(report: Report, source: str = "data/sources/a.jsonl") -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = report.metrics["sources"][source]["fields"]
    return found


def count(rows: list[Any]) -> int:
    """Fields of rows and of the messages in them, counted without looking at layouts. An object with `parts` is a
    message, too."""
    values = [value for row in rows for value in row.values()]
    lists = [[value] if isinstance(value, dict) and "parts" in value else value for value in values]
    turns = [turn for value in lists if isinstance(value, list) for turn in value if isinstance(turn, dict)]
    return sum(map(len, rows)) + sum(map(len, turns))


def test_every_field_is_used_kept_or_ignored_and_counted_once(root: Path) -> None:
    asked, said = CHAT["messages"]
    rows = [
        {"messages": [asked, {**said, "weight": 0, "id": 7}], "category": "x", "stars": 4},
        {"messages": [{**asked, "id": 8}, {**said, "reasoning": "Hm."}], "category": 3.5, "parallel_tool_calls": False},
        {"messages": [asked, said, {**asked, "id": None}]},
        {"messages": [asked, {**said, "weight": 2}], "stars": 5},
    ]
    jsonl(root / "data/sources/a.jsonl", *rows)
    found = fields_of(read(root, "data/sources/a.jsonl"))
    assert found == {
        "used": {
            "category": 1,
            "messages": 3,
            "messages[].content": 7,
            "messages[].reasoning": 1,
            "messages[].role": 7,
            "messages[].weight": 1,
        },
        "kept": {"category": 1, "messages": 1, "parallel_tool_calls": 1, "stars": 2},
        "ignored": {"messages[].id": 3},
    }
    malformed = sum(map(len, rows[3]["messages"]))  # of a malformed row the messages are kept as they are
    assert sum(sum(place.values()) for place in found.values()) == count(rows) - malformed


@pytest.mark.parametrize("layout", [*LAYOUT_ROWS, "sharegpt with role"])
def test_the_fields_of_a_row_add_up_in_every_layout(layout: str, root: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "name": "a", "id": 1}]
    row = {**LAYOUT_ROWS[layout][0], "stars": 4} if layout in LAYOUT_ROWS else {"conversations": turns, "stars": 4}
    jsonl(root / "data/sources/a.jsonl", row)
    source = {"path": "data/sources/a.jsonl", **({"format": layout} if layout in LAYOUTS else {})}
    found = fields_of(read(root, source))
    assert found["kept"]["stars"] == 1
    if layout not in {"instances", "oasst", "xlam"}:  # whose fields are nested in other ways
        assert sum(sum(place.values()) for place in found.values()) == count([row])


def turn(text: str, *replies: dict[str, Any], role: str = "assistant", **more: Any) -> dict[str, Any]:
    """A message of a tree."""
    return {"role": role, "text": text, "replies": list(replies), **more}


def test_messages_of_a_tree_that_are_in_no_example_are_ignored_with_all_fields(root: Path) -> None:
    said = turn("Hello", turn("Bye", role="prompter", rank=0, lang="en"), rank=0, labels={"humor": 0.5})
    other = turn("What?", turn("Why?", role="prompter"), rank=1, deleted=False)
    tree = turn("Hi", said, other, turn("Spam", deleted=True, rank=0), role="prompter", rank=None)
    jsonl(root / "data/sources/a.jsonl", {"message_tree_id": "t", "prompt": tree})
    found = fields_of(read(root, "data/sources/a.jsonl"))
    assert found["kept"] == {"message_tree_id": 1}
    compared = {"prompt[].deleted": 2, "prompt[].rank": 2}
    assert found["used"] == {"prompt": 1, **dict.fromkeys([f"prompt[].{key}" for key in TURN_KEYS], 2), **compared}
    assert found["ignored"] == {
        "prompt[].labels": 1,
        "prompt[].lang (left out)": 1,
        "prompt[].rank": 1,
        "prompt[].rank (left out)": 2,
        **dict.fromkeys([f"prompt[].{key} (left out)" for key in TURN_KEYS], 4),
    }
    [line] = read_ledger(root / "out")
    assert "prompt[].text (left out)" in line["why"] and "prompt[].labels" in line["why"]


TURN_KEYS = ("replies", "role", "text")


@pytest.mark.parametrize("replies", [3, ["Hm."], [{"content": "Hm."}]])
def test_a_message_may_have_a_field_replies_as_trees_have(replies: Any, root: Path) -> None:
    asked, said = CHAT["messages"]
    jsonl(root / "data/sources/a.jsonl", {"prompt": {**asked, "replies": replies}, "completion": said})
    assert fields_of(read(root, "data/sources/a.jsonl"))["ignored"] == {"prompt[].replies": 1}


def test_a_field_that_a_layout_loses_stops_the_stage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(root / "data/sources/a.jsonl", {**CHAT, "stars": 4})
    with monkeypatch.context() as patch:
        patch.setattr(formats, "kept_of", lambda *_: {})
        with pytest.raises(AssertionError, match="field stars is neither used nor kept"):
            read(root, "data/sources/a.jsonl")
    monkeypatch.setattr(
        row_reading, "read_turns", lambda row, turns: fields.read_turns({"messages": row["messages"][1:]}, turns)
    )
    with pytest.raises(AssertionError, match="a row has 6 fields, of which 4 are accounted for"):
        read(root, "data/sources/a.jsonl")


def test_fields_that_are_not_used_are_a_check_a_line_of_the_ledger_and_a_finding(root: Path) -> None:
    asked, said = CHAT["messages"]
    jsonl(
        root / "data/sources/a.jsonl",
        CHAT,
        {"messages": [asked, {**said, "id": 7, "note": None}]},
        {**CHAT, "loss": 0.3, "images": []},
    )
    report = read(root, "data/sources/a.jsonl")
    check = report.checks[0]
    assert (check.name, check.passed, check.severity, check.count, check.blocking) == (
        "ignored_fields",
        False,
        "warn",
        2,
        False,
    )
    assert (check.rows, check.note) == (["data/sources/a.jsonl:1", "data/sources/a.jsonl:2"], "messages[].id 1, loss 1")
    assert [row["why"] for row in read_ledger(root / "out")] == ["", "ignored: messages[].id", "ignored: loss"]
    for place in (root / "out", root / "data/sources/a.jsonl"):
        document = check_paths([str(place)])
        (found,) = [finding for finding in document["findings"] if finding["check"] == "ignored_fields"]
        assert (found["severity"], found["rows"], found["note"]) == ("warn", [1, 2], "messages[].id 1, loss 1")
        assert document.get("fields", fields_of(report)) == fields_of(report)
    jsonl(root / "data/sources/a.jsonl", {"messages": [asked, {**said, "id": 7}]})
    assert read(root, "data/sources/a.jsonl").checks[0].severity == "info", "an id changes nothing that is trained"


def test_names_of_fields_in_a_report_are_few_and_short(root: Path) -> None:
    jsonl(root / "data/sources/a.jsonl", {**PAIR, **{f"k{i}": i for i in range(1000)}, "k" * 5000: 1})
    found = fields_of(read(root, "data/sources/a.jsonl"))["kept"]
    assert (len(found), sum(found.values())) == (201, 1001) and max(map(len, found)) <= 80


def test_a_set_of_images_is_read_if_some_rows_are_text_and_refused_with_the_reason_if_none_is(root: Path) -> None:
    picture = {
        "messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "A cat."}]
    }
    jsonl(root / "data/sources/a.jsonl", CHAT, *[picture] * 9)
    assert read(root, "data/sources/a.jsonl").rows_out == 10
    jsonl(root / "data/sources/a.jsonl", picture)
    with pytest.raises(InputError, match="image in a message"):
        read(root, "data/sources/a.jsonl")


def test_a_source_may_keep_traces_in_the_text(root: Path) -> None:
    jsonl(root / "data/sources/a.jsonl", {**PAIR, "completion": "<think>\nHm.\n</think>\n\nHello"})
    read(root, "data/sources/a.jsonl")
    assert read_records(root / "out")[0]["messages"][-1] == {
        "role": "assistant",
        "content": "Hello",
        "reasoning_content": "Hm.",
    }
    read(root, {"path": "data/sources/a.jsonl", "think": "keep"})
    assert read_records(root / "out")[0]["messages"][-1]["content"].startswith("<think>")
    assert "raw_examples.sources.0.think" in refusal_of(root, "sometimes")


def refusal_of(root: Path, think: str) -> str:
    with pytest.raises(InputError) as caught:
        read(root, {"path": "data/sources/a.jsonl", "think": think})
    return caught.value.what
