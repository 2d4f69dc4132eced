"""Rows from the Hugging Face Hub: `datasets` fetches one commit from a local Hub and reads it again offline."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.hub import NAME, OLD, PAIRS, Hub, card, hub_with_pairs, lines, parquet, serving
from conftest import ROOT

from dagster_project.core.errors import InputError
from dagster_project.curation.sources import hub as reader

NEW = "b" * 40
TOKEN = "hf_" + "x" * 34


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(hub_with_pairs()) as found:
        yield found


READ = """
import json, sys
from dagster_project.curation.sources import hub
from dagster_project.core.errors import InputError
found = []
for source in json.loads(sys.argv[1]):
    try:
        rows = hub.read_split(hub.HubSplit(**source))
        digest = hub.RowsDigest()
        digest.update(rows)
        values, problems = [row.value for row in rows], [row.problem for row in rows]
        found.append({"rows": values, "problems": problems, "sha256": digest.hexdigest()})
    except InputError as error:
        found.append({"what": error.what, "hint": error.hint})
print(json.dumps(found))
"""


def run(hub: Hub, home: Path, code: str, *arguments: Any, **environment: str) -> Any:
    """What a process of its own prints: `datasets` takes the Hub's address from the environment when it is imported."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env = {
        **keep,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "HF_TOKEN": TOKEN,
        **environment,
    }
    command = [sys.executable, "-c", code, *map(json.dumps, arguments)]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout)


def read(hub: Hub, home: Path, *sources: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
    """The rows of each source, or why there are none."""
    wanted = [{"hub": NAME, "revision": OLD, "split": "train", **source} for source in sources or [{}]]
    return run(hub, home, READ, wanted, **environment)


def test_data_sets_of_all_file_types_give_the_same_rows_in_order(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {
        "org/parquet": {
            "data/train-00000-of-00002.parquet": parquet(PAIRS[:3]),
            "data/train-00001-of-00002.parquet": parquet(PAIRS[3:]),
        },
        "org/jsonl": {"train.jsonl": lines(*PAIRS)},
        "org/csv": {
            "train.csv": b"completion,prompt\n" + b"".join(f"Hello,{row['prompt']}\n".encode() for row in PAIRS)
        },
        "org/card": {
            "README.md": card(configs=[{"config_name": "default", "data_files": "x/*.jsonl"}]),
            "x/a.jsonl": lines(*PAIRS),
        },
    }
    hub.repos = {name: {OLD: files} for name, files in hub.repos.items()}
    found = read(hub, tmp_path, *({"hub": name} for name in hub.repos))
    assert [source.get("rows") for source in found] == [PAIRS] * 4
    plain = "".join(json.dumps(row, sort_keys=True, separators=(",", ":")) + "\n" for row in PAIRS)
    assert {source["sha256"] for source in found} == {hashlib.sha256(plain.encode()).hexdigest()}, (
        "whatever file they came in"
    )
    assert not [line for line in hub.asked if OLD not in line and "agent-harnesses" not in line], (
        "only the commit is asked for"
    )


@pytest.mark.long
def test_what_was_fetched_once_is_read_again_without_a_network(hub: Hub, tmp_path: Path) -> None:
    first = read(hub, tmp_path, {}, {"split": "test"})
    hub.asked.clear()
    assert read(hub, tmp_path, {}, {"split": "test"}, HF_HUB_OFFLINE="1") == first
    assert hub.asked == []
    hub.repos = {}
    assert read(hub, tmp_path, {}, {"split": "test"}) == first, "though the data set has been taken off the Hub"
    assert hub.asked == []


def test_a_data_set_name_with_capitals_is_found_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"Org/SetOfPairs": {OLD: {"train.jsonl": lines(*PAIRS)}}}
    twice = read(hub, tmp_path, *[{"hub": "Org/SetOfPairs"}] * 2)
    assert [source["rows"] for source in twice] == [PAIRS] * 2


@pytest.mark.long
def test_offline_another_commit_or_configuration_is_never_taken_instead(hub: Hub, tmp_path: Path) -> None:
    hub.repos[NAME][NEW] = {"train.jsonl": lines({"prompt": "new", "completion": "new"})}
    read(hub, tmp_path, {"revision": NEW})
    for change in ({}, {"revision": NEW, "config": "default"}):
        error = read(hub, tmp_path, change, HF_HUB_OFFLINE="1")[0]
        assert error["what"].startswith("hub:org/name@" + change.get("revision", OLD)[:12])
        assert "offline" in error["what"].lower() and error["hint"] == reader.NEXT
    assert read(hub, tmp_path, {"revision": NEW}, HF_HUB_OFFLINE="1")[0]["rows"] == [
        {"prompt": "new", "completion": "new"}
    ]


def test_each_configuration_has_its_own_rows(hub: Hub, tmp_path: Path) -> None:
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("one", "two")]
    hub.repos[NAME][OLD] = {
        "README.md": card(configs=configs),
        "one.jsonl": lines({"a": 1}),
        "two.jsonl": lines({"a": 2}),
    }
    found = read(hub, tmp_path, {"config": "one"}, {"config": "two"}, {}, {"config": "three"})
    assert [source["rows"] for source in found[:2]] == [[{"a": 1}], [{"a": 2}]]
    assert "Config name is missing" in found[2]["what"]
    assert "three" in found[3]["what"] and "one" in found[3]["what"], "the configurations that there are are named"


def test_values_are_read_unchanged_and_those_without_json_form_make_only_their_row_malformed(
    hub: Hub, tmp_path: Path
) -> None:
    import pyarrow as pa

    mixed = [{"a": 1, "b": {"x": [1]}}, {"a": "x", "b": {"y": 2}}, {"a": None, "b": "t"}]
    table = pa.table({"text": ["a", "b", "c"], "score": [1.0, float("nan"), 2.0], "raw": [b"x", b"x", b"\xff"]})
    labels = [
        {"name": "text", "dtype": "string"},
        {"name": "label", "dtype": {"class_label": {"names": {"0": "bad", "1": "good"}}}},
    ]
    hub.repos = {
        "org/mixed": {OLD: {"train.jsonl": lines(*mixed)}},
        "org/table": {OLD: {"train.parquet": parquet(table)}},
        "org/labels": {
            OLD: {
                "README.md": card(dataset_info={"features": labels}),
                "train.jsonl": lines({"text": "a", "label": 1}, {"text": "b", "label": None}),
            }
        },
    }
    of_json, of_table, labelled = read(hub, tmp_path, *({"hub": name} for name in hub.repos))
    assert of_json["rows"] == mixed
    assert [bool(problem) for problem in of_table["problems"]] == [False, True, True]
    assert labelled["rows"] == [{"text": "a", "label": "good"}, {"text": "b", "label": None}]


def test_a_missing_data_set_is_reported_in_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.refusals = {"org/gated": (403, "GatedRepo"), "org/private": (401, "GatedRepo"), "org/broken": (501, "Broken")}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"hub": "org/none"}, "Dataset 'org/none' doesn't exist on the Hub or cannot be accessed."),
        ({"revision": NEW}, f"Revision '{NEW}' doesn't exist for dataset 'org/name' on the Hub."),
        ({"split": "validation"}, "there is no split 'validation'"),
        ({"split": "all"}, "there is no split 'all'"),
        ({"revision": "main"}, "revision 'main' is not a commit"),
        ({"hub": "org/gated"}, "Dataset 'org/gated' is a gated dataset on the Hub."),
        ({"hub": "org/private"}, "Dataset 'org/private' is a gated dataset on the Hub."),
        (
            {"hub": "org/broken"},
            "LocalEntryNotFoundError: An error happened while trying to locate the file on the Hub",
        ),
    ]
    found = read(hub, tmp_path, *(change for change, _ in cases))
    for (change, message), source in zip(cases, found, strict=True):
        named = {"hub": NAME, "revision": OLD, "split": "train", **change}
        assert source["what"].startswith(f"hub:{named['hub']}@{named['revision'][:12]}/{named['split']}: {message}"), (
            source
        )
        assert "\n" not in source["what"] and source["hint"]
    assert found[2]["hint"] == "splits: train, test"


def test_a_data_set_that_gives_no_rows_of_text_is_refused_in_one_line(hub: Hub, tmp_path: Path) -> None:
    def files_from(place: str) -> dict[str, bytes]:
        return {
            "README.md": card(configs=[{"config_name": "default", "data_files": place}]),
            "a.jsonl": lines({"a": 1}),
        }

    (tmp_path / "secret.jsonl").write_bytes(lines({"a": "secret"}))
    photo = [{"name": "photo", "dtype": "image"}, {"name": "text", "dtype": "string"}]
    cases: dict[str, tuple[dict[str, bytes], str]] = {
        "org/script": (
            {"script.py": b"raise SystemExit(1)"},
            "Dataset scripts are no longer supported, but found script.py",
        ),
        "org/cut": ({"train.jsonl": b'{"a": 1}\n{"a": \n'}, "JSON parse error"),
        "org/empty": ({"train.jsonl": b""}, "the data set is empty, or its first file is"),
        "org/nothing": ({"notes.bin": b"x"}, "No (supported) data files found"),
        "org/local": (files_from(str(tmp_path / "secret.jsonl")), "Data files don't belong to org/local."),
        "org/above": (files_from("../secret.jsonl"), ""),
        "org/elsewhere": (
            files_from(f"{hub.url}/datasets/{NAME}/resolve/{NEW}/x.jsonl"),
            "Data files don't belong to org/elsewhere.",
        ),
        "org/later": (
            files_from(f"hf://datasets/org/later@{NEW}/x.jsonl"),
            f"reads rows from outside its commit: hf://datasets/org/later@{NEW}/x.jsonl",
        ),
        "org/photo": (
            {
                "README.md": card(dataset_info={"features": photo}),
                "a.parquet": parquet([{"photo": {"bytes": b"x", "path": None}, "text": "a"}]),
            },
            "columns without text: photo (Image)",
        ),
    }
    hub.repos = {name: {OLD: files} for name, (files, _) in cases.items()}
    hub.repos[NAME] = {NEW: {"x.jsonl": lines({"a": 1})}}
    hub.repos["org/later"][NEW] = hub.repos[NAME][NEW]
    found = read(hub, tmp_path, *({"hub": name} for name in cases))
    for (name, (_, message)), source in zip(cases.items(), found, strict=True):
        assert source["what"].startswith(f"hub:{name}@aaaaaaaaaaaa/train: ") and message in source["what"], source
        assert "\n" not in source["what"] and source["hint"]


def test_a_lost_connection_is_an_error_and_leaves_nothing_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    hub.cut = {"train-00000-of-00001.parquet"}
    error = read(hub, tmp_path)[0]
    assert error["what"].startswith("hub:org/name@aaaaaaaaaaaa/train: ") and "\n" not in error["what"]
    hub.cut = set()
    assert read(hub, tmp_path)[0]["rows"] == PAIRS


def test_another_commit_from_the_hub_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repos[NAME][NEW] = hub.repos[NAME][OLD]
    hub.says = NEW
    assert read(hub, tmp_path)[0]["what"] == f"hub:org/name@aaaaaaaaaaaa/train: the Hub returned commit {NEW}"


def test_a_folder_of_the_same_name_is_not_taken_for_the_data_set(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    (tmp_path / NAME / "train.jsonl").write_bytes(lines({"a": "local"}))
    assert read(hub, tmp_path)[0]["rows"] == PAIRS


# The stage


STAGE = """
import json, sys
from pathlib import Path
from dagster_project.core.params import parse
from dagster_project.stages import raw_examples
root = Path.cwd()
report = raw_examples.produce(root, parse(raw_examples.Params, json.loads(sys.argv[1]), "raw_examples"), root / "out")
print(json.dumps(report.document()))
"""


def test_splits_of_the_hub_are_sources_like_any_other(hub: Hub, tmp_path: Path) -> None:
    from dagster_project.core.records import read_ledger, read_records

    (tmp_path / "data/sources").mkdir(parents=True)
    (tmp_path / "data/sources/a.jsonl").write_bytes(lines(PAIRS[0]))
    on_hub = {"hub": NAME, "revision": OLD, "license": "MIT"}
    values = {
        "sources": [{**on_hub, "split": "train"}, {"path": "data/sources/a.jsonl"}, {**on_hub, "split": "test"}],
        "limit": 3,
    }
    sources = run(hub, tmp_path, STAGE, values)["sources"]
    train, test = "hub:org/name@aaaaaaaaaaaa/train", "hub:org/name@aaaaaaaaaaaa/test"
    assert list(sources) == [train, "data/sources/a.jsonl", test]
    plain = "".join(json.dumps(row, sort_keys=True, separators=(",", ":")) + "\n" for row in PAIRS[:3])
    assert sources[train] == {
        "format": "prompt_completion",
        "rows": 3,
        "sha256": hashlib.sha256(plain.encode()).hexdigest(),
        "hub": NAME,
        "revision": OLD,
        "split": "train",
        "license": "MIT",
        "fields": {"used": {"completion": 3, "prompt": 3}},
    }
    ledger = [(row["source"], row["source_row"]) for row in read_ledger(tmp_path / "out")]
    assert ledger == [(train, 0), (train, 1), (train, 2), ("data/sources/a.jsonl", 0), (test, 0), (test, 1)]
    labels = [json.loads(record["meta"]).get("split") for record in read_records(tmp_path / "out")]
    assert labels == [None, None, None, None, "test", "test"], "what others held out stays held out"


# Names on the command line


@pytest.mark.parametrize(
    ("spec", "config", "split", "name"),
    [
        (f"hub:org/name@{OLD}:train", None, "train", "hub:org/name@aaaaaaaaaaaa/train"),
        (f"hub:org/name@{OLD}:main:test", "main", "test", "hub:org/name@aaaaaaaaaaaa/main/test"),
    ],
)
def test_a_split_of_the_hub_has_a_name_on_the_command_line(
    spec: str, config: str | None, split: str, name: str
) -> None:
    found = reader.parse_spec(spec)
    assert found == reader.HubSplit(NAME, OLD, split, config)
    assert found.name == name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hub:org/name", "not a split of a data set"),
        (f"hub:org/name@{OLD}", "not a split of a data set"),
        ("hub:org/name@main:train", "revision 'main' is not a commit"),
        (f"hub:name@{OLD}:train", "'name' is not a data set name"),
        (f"hub:org/name@{OLD}:", "split '' is not a split name"),
        (f"hub:org/name@{OLD}:a:b:c", "not a split of a data set"),
    ],
)
def test_an_unknown_split_of_a_commit_is_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        reader.parse_spec(spec)
    assert message in caught.value.what and caught.value.hint == "use hub:org/name@REVISION:split"


@pytest.mark.parametrize("secret", [TOKEN, "a-token-of-another-kind"])
def test_no_token_appears_in_a_message(secret: str) -> None:
    told = reader._error_text(
        OSError(f"\n\nIllegal header b'Bearer {secret}' for https://me:pass@hub.example/x\nmore"), secret
    )
    assert told == "Illegal header b'Bearer [token]' for https://hub.example/x"


INIT = """
import json, sys
from pathlib import Path
from dagster_project.commands.init import init
from dagster_project.core.errors import InputError
from dagster_project.pipeline import validate
document = init(Path("project"), json.loads(sys.argv[1]), None, "auto", "MIT")
values = validate(Path("project"))
try:
    init(Path("other"), json.loads(sys.argv[2]), None, "auto", "MIT")
except InputError as error:
    made = [document["sources"], values["raw_examples"], values["raw_preferences"]]
    print(json.dumps([*made, error.what, Path("other").exists()]))
"""


def test_init_takes_data_sets_of_the_hub_as_sources(hub: Hub, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Hi {i}", "chosen": "Hello", "rejected": "No"} for i in range(3)]
    questions = [{"question": "One?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": "x"}]
    hub.repos |= {
        "org/pairs": {OLD: {"train.jsonl": lines(*pairs)}},
        "org/mmlu": {OLD: {"test.jsonl": lines(*questions)}},
    }
    given = [f"hub:org/name@{OLD}:train", f"hub:org/pairs@{OLD}:train"]
    sources, examples, preferences, refused, exists = run(
        hub, tmp_path, INIT, given, [given[0], f"hub:org/mmlu@{OLD}:test"]
    )
    assert [(one["path"], one["kind"], one["rows"]) for one in sources] == [
        (f"hub:org/name@{OLD[:12]}/train", "examples", 5),
        (f"hub:org/pairs@{OLD[:12]}/train", "preferences", 3),
    ]
    assert examples["sources"] == [{"hub": "org/name", "revision": OLD, "split": "train", "license": "MIT"}]
    assert preferences["sources"] == [{"hub": "org/pairs", "revision": OLD, "split": "train", "license": "MIT"}]
    assert not [
        path for path in (tmp_path / "project/data/sources").rglob("*") if path.is_file() and path.name != ".gitkeep"
    ]
    assert refused == f"--data: hub:org/mmlu@{OLD}:test: benchmark questions are read from files" and not exists
