"""Rows of sources that nobody can edit from here, on the Hub and in S3: an erased one
is left out at each reading, counted with a reason of its own, and the certificate
names the source that still holds it. A row of a file is refused as before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders.erasure_oracle import traces
from builders.files import jsonl
from builders.hub import NAME, OLD, PAIRS, hub_with_pairs, lines, parquet, serving
from builders.project_data import messages as ticket
from builders.s3 import BUCKET, S3Server
from builders.small_pipeline import git
from conftest import ROOT, dvc, edit_params, pedigree, skip_without

from dagster_project.commands.erase import as_text, dry_run, dry_run_text, erase, exit_code
from dagster_project.core.errors import InputError
from dagster_project.core.frames import placed_records, read_pairs
from dagster_project.core.params import parse
from dagster_project.core.records import Report, example_id, read_ledger, read_records, read_table
from dagster_project.curation.sources import erased
from dagster_project.lineage.erasure.records import Found, Raw, Request
from dagster_project.lineage.erasure.tombstones import add
from dagster_project.lineage.lineage import audit
from dagster_project.orchestration.erasure.plan import refuse_empty
from dagster_project.pipeline import validate
from dagster_project.stages import raw_examples, raw_preferences

skip_without("s3fs", "moto")

KEY = "5f" * 32
PROMPT, ANSWER = "Zephyrine Okonkwo asks where the cobalt lantern of order 8817 is.", "It left our house on Monday."
WORDS = ["zephyrine", "okonkwo", "cobalt lantern"]


OTHERS = [
    ticket(f"Ticket {i} asks where parcel number {i * 37} went after Monday.", f"Parcel {i} is in house {i * 3}.")
    for i in range(8)
]
TOOL = {
    "tools": [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}],
    **ticket("Find the kite of Mr. Abara.", "It is in the attic."),
}


def upload(bucket: S3Server, **files: bytes) -> dict[str, Any]:
    """Objects under a new prefix, as a source that pins them."""
    prefix = f"rows-{uuid.uuid4().hex[:8]}"
    for name, content in files.items():
        bucket.write(f"{prefix}/{name}.jsonl", content)
    return {"path": f"s3://{BUCKET}/{prefix}", "license": "MIT", "revision": bucket.revision(prefix)}


def read(root: Path, *sources: dict[str, Any], out: str = "out", pairs: bool = False) -> Report:
    shutil.rmtree(root / out, ignore_errors=True)
    stage: Any = raw_preferences if pairs else raw_examples
    report: Report = stage.produce(root, parse(stage.Params, {"sources": [*sources]}, "sources"), root / out)
    return report


def erase_by_tombstone(root: Path, record: dict[str, Any], pair: bool = False) -> None:
    key = bytes.fromhex(KEY)
    identity = "0" * 32 if pair else example_id(record["messages"], record.get("tools"))
    stone = {"record": erased.record_mark(key, identity), "texts": erased.text_marks(key, record)}
    add(root, [stone], {"key": erased.key_id(key), "date": "2026-01-01"})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data/keys").mkdir(parents=True)
    (tmp_path / "data/sources").mkdir()
    (tmp_path / "data/keys/record_ids.key").write_text(KEY)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_row_in_s3_is_left_out_and_all_others_are_as_if_it_had_never_been_there(root: Path, bucket: S3Server) -> None:
    jsonl(root / "data/sources/a.jsonl", OTHERS[7])
    local = {"path": "data/sources/a.jsonl", "license": "MIT"}
    source = upload(
        bucket,
        a=lines(*OTHERS[:2], ticket(PROMPT, ANSWER), OTHERS[2]),
        b=lines(ticket(PROMPT.upper(), ANSWER), OTHERS[3]),
    )
    before = read(root, source, local, out="before")
    erase_by_tombstone(root, ticket("Nobody asked this.", "Nor answered it."))
    assert read(root, source, local).document() == before.document() and files(root / "out") == files(
        root / "before"
    ), "other tombstones change nothing"

    erase_by_tombstone(root, ticket(PROMPT, ANSWER))
    report = read(root, source, local)
    assert (report.rows_in, report.rows_out, report.dropped, report.failures) == (7, 5, {"erased": 2}, [])
    check = next(check for check in report.checks if check.name == "erased_record")
    assert (check.passed, check.count, check.dropped) == (True, 2, 2)
    assert check.rows == [
        f"{source['path']}/a.jsonl:2",
        f"{source['path']}/b.jsonl:0",
    ], "also the one with other capitals"
    gone = read_table(root / "out/left_out.parquet")
    assert [(one["source"], one["source_row"], one["outcome"], one["example_id"]) for one in gone] == [
        (f"{source['path']}/a.jsonl", 2, "erased", ""), (f"{source['path']}/b.jsonl", 0, "erased", "")
    ]  # fmt: skip
    expected = [
        record
        for record in read_records(root / "before")
        if "Okonkwo" not in json.dumps(record) and "OKONKWO" not in json.dumps(record)
    ]
    assert read_records(root / "out") == expected and len(expected) == 5
    kept = {record["example_id"] for record in expected}
    assert read_ledger(root / "out") == [line for line in read_ledger(root / "before") if line["example_id"] in kept], (
        "rows keep their numbers"
    )
    assert len([*placed_records(root / "out")]) == 5, "the next stage reads it"
    assert traces(root / "out", WORDS, [example_id(ticket(PROMPT, ANSWER)["messages"])]) == []
    facts = report.document()["sources"][source["path"]]
    assert facts["rows"] == 6 and facts == before.document()["sources"][source["path"]], "the source still has them"


def test_a_row_of_a_file_is_refused_as_before_also_if_one_in_s3_is_left_out(root: Path, bucket: S3Server) -> None:
    jsonl(root / "data/sources/a.jsonl", OTHERS[0], ticket(PROMPT, ANSWER))
    source = upload(bucket, a=lines(ticket(PROMPT, ANSWER), OTHERS[1]))
    erase_by_tombstone(root, ticket(PROMPT, ANSWER))
    failures = read(root, source, {"path": "data/sources/a.jsonl"}).failures
    assert [(check.name, check.count, check.rows) for check in failures] == [
        ("erased_record", 1, ["data/sources/a.jsonl:1"])
    ]


def test_columns_that_only_an_erased_row_needed_go_with_it(root: Path, bucket: S3Server) -> None:
    plain = upload(bucket, a=lines(*OTHERS[:3]))
    read(root, plain, out="plain")
    rich = upload(bucket, a=lines(*OTHERS[:3], TOOL))
    erase_by_tombstone(root, TOOL)
    assert read(root, rich).dropped == {"erased": 1}
    strip = [{**record, "source": ""} for record in read_records(root / "out")]
    assert strip == [{**record, "source": ""} for record in read_records(root / "plain")]
    assert (
        files(root / "out")["records-00000.parquet"] != b""
        and "tools" not in read_table(root / "out/records-00000.parquet")[0]
    )


def test_pairs_are_left_out_with_all_their_rows(root: Path, bucket: S3Server) -> None:
    halves = [{"prompt": PROMPT, "completion": one, "label": one == ANSWER} for one in (ANSWER, "No.")]
    whole = [{"prompt": f"Hi {i}", "chosen": "Yes?", "rejected": "What?"} for i in range(3)]
    for rows, gone in (
        ([*whole[:1], {"prompt": PROMPT, "chosen": ANSWER, "rejected": "No."}, *whole[1:]], [1]),
        (halves, None),
    ):
        (root / erased.TOMBSTONES).unlink(missing_ok=True)
        source = upload(bucket, a=lines(*rows))
        before = read(root, source, pairs=True, out="before")
        [record] = (
            [pair for pair in read_pairs(root / "before") if "Okonkwo" in json.dumps(pair)]
            if gone
            else read_pairs(root / "before")[:1]
        )
        erase_by_tombstone(root, record, pair=True)
        report = read(root, source, pairs=True)
        assert before.rows_in == report.rows_in == report.rows_out + sum(report.dropped.values())
        left = read_table(root / "out/left_out.parquet")
        assert sorted(line["source_row"] for line in left) == sorted(gone or record["source_rows"])
        assert [pair["example_id"] for pair in read_pairs(root / "out")] == [
            pair["example_id"] for pair in read_pairs(root / "before") if pair["example_id"] != record["example_id"]
        ]
        assert traces(root / "out", WORDS, []) == []


STAGE = """
import json, sys
from pathlib import Path
from dagster_project.core.params import parse
from dagster_project.stages import raw_examples
params = parse(raw_examples.Params, json.loads(sys.argv[1]), "raw_examples")
print(json.dumps(raw_examples.produce(Path("."), params, Path("out")).document()))
"""


def test_a_row_on_the_hub_is_left_out(root: Path) -> None:
    record = {
        "messages": [
            {"role": "user", "content": PAIRS[3]["prompt"]},
            {"role": "assistant", "content": PAIRS[3]["completion"]},
        ]
    }
    erase_by_tombstone(root, record)
    with serving(hub_with_pairs()) as hub:
        keep = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env = {**keep, "HF_ENDPOINT": hub.url, "HF_HOME": str(root / "home"), "PYTHONPATH": str(ROOT)}
        values = json.dumps({"sources": [{"hub": NAME, "revision": OLD, "split": "train"}]})
        done = subprocess.run(
            [sys.executable, "-c", STAGE, values],
            env=env,
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["rows_in"], report["rows_out"], report["dropped"]) == (5, 4, {"erased": 1})
    assert report["checks"]["erased_record"]["rows"] == ["hub:org/name@aaaaaaaaaaaa/train:3"]
    assert [line["source_row"] for line in read_ledger(root / "out")] == [0, 1, 2, 4]


# --- `pedigree erase`


def test_a_request_that_leaves_a_raw_data_set_without_rows_is_refused() -> None:
    """Otherwise the erasure would stop half-way, at the next stage. A row that
    stays may be in another source, but must be of the same data set and current."""
    meant = [Raw("raw_examples", f"s3://b/{name}.jsonl", (0,), {"example_id": name}, True) for name in "ab"]
    pair = Raw("raw_preferences", "hub:o/n@0/train", (0,), {"example_id": "p"}, True)
    before, kept = (
        Raw("raw_examples", "s3://b/a.jsonl", (1,), {"example_id": "c"}, current) for current in (False, True)
    )
    with pytest.raises(InputError, match="raw_examples: no row would be left"):
        refuse_empty([*meant, pair, before], Found(meant=meant))
    with pytest.raises(InputError, match="raw_preferences: no row would be left"):
        refuse_empty([*meant, pair, kept], Found(meant=[*meant, pair]))
    refuse_empty([*meant, pair, kept], Found(meant=meant))


@pytest.fixture
def made(project: Path, bucket: S3Server) -> tuple[Path, dict[str, Any]]:
    """A project whose data stages have run on a file and on objects in S3, which hold the record and a copy of it."""
    for name in ("tests", "docs", "benchmarks", "examples", "deploy"):  # this file quotes the record
        shutil.rmtree(project / name)
    (project / "data/keys/record_ids.key").write_text(KEY)
    jsonl(project / "data/sources/mine.jsonl", *OTHERS[:4], ticket(PROMPT, ANSWER))
    source = upload(
        bucket, a=lines(*OTHERS[4:6], ticket(PROMPT, ANSWER)), b=lines(ticket(PROMPT.upper(), ANSWER), *OTHERS[6:])
    )
    pairs = upload(
        bucket, pairs=lines(*({"prompt": f"Hi {i}", "chosen": "Yes?", "rejected": "What?"} for i in range(3)))
    )

    def change(values: dict[str, Any]) -> None:
        values["raw_examples"] = {"sources": [{"path": "data/sources/mine.jsonl", "license": "MIT"}, source]}
        values["raw_preferences"] = {"sources": [pairs]}
        values["instructions"] |= {"expectations": None}
        values["splits"] = {"test": 0.0, "validation": 0.1}

    edit_params(project, change)
    done = dvc(project, "repro", "splits", "raw_preferences")
    assert done.returncode == 0, done.stderr + done.stdout
    git(project, "add", "-A", ":!data/sources/mine.jsonl")  # so that its history holds nothing of it
    git(project, "commit", "-qm", "ran")
    return project, source


@pytest.mark.long
def test_rows_in_s3_are_erased_with_those_of_files_and_the_certificate_names_what_still_holds_them(
    made: tuple[Path, dict[str, Any]], bucket: S3Server
) -> None:
    root, source = made
    first, second = f"{source['path']}/a.jsonl", f"{source['path']}/b.jsonl"
    objects = {name: bucket.read(name) for name in bucket.names(source["path"].rpartition("/")[2])}
    identity = example_id(ticket(PROMPT, ANSWER)["messages"])
    request = Request(records=(identity,))
    plan = dry_run(root, request, [], [], "")
    assert {path: one["rows"] for path, one in plan["sources"].items()} == {"data/sources/mine.jsonl": [4]}
    assert plan["remote"] == {
        first: {"rows": [2], "revision": source["revision"]},
        second: {"rows": [0], "revision": source["revision"]},
    }
    assert f"{first}: 1 row, left out from now on" in dry_run_text(plan)
    with pytest.raises(InputError, match="a row that stays has the same text"):
        dry_run(root, Request(sources=(f"{first}:2",)), [], ["copies"], "")
    pairs = yaml.safe_load((root / "params.yaml").read_text())["raw_preferences"]["sources"][0]["path"]
    with pytest.raises(InputError, match="raw_preferences: no row would be left"):
        dry_run(root, Request(sources=(pairs,)), [], [], "")
    assert not (root / erased.TOMBSTONES).exists(), "before anything is changed"

    document = erase(root, request, [], [], "request 9", None, validate, False)
    assert exit_code(document) == 0 and document["impact"] == "no" and not {*document["left"]} - {"git history"}
    assert document["erased"]["rows"] == {"data/sources/mine.jsonl": 1}
    assert document["erased"]["rows left out at reading"] == {first: 1, second: 1}
    for name in (first, second):
        assert f"{name} at revision {source['revision']}, which still holds 1 row of them" in document["not reached"]
        assert f"{name}: 1 row, left out at each reading" in as_text(document)
    assert traces(root, WORDS, [identity]) == [] and {name: bucket.read(name) for name in objects} == objects

    report = json.loads((root / "data/reports/raw_examples.json").read_text())
    assert (report["rows_in"], report["rows_out"], report["dropped"]) == (10, 8, {"erased": 2}) and report["passed"]
    assert report["checks"]["erased_record"]["dropped"] == 2
    instructions = json.loads((root / "data/reports/instructions.json").read_text())
    assert instructions["rows_in"] == 8 == instructions["rows_out"] + sum(instructions["dropped"].values())
    facts = audit(root, "splits")["sources"][source["path"]]
    assert facts["rows"] == 6 and facts["outcomes"]["raw_examples"] == {"read": 4, "erased": 2}
    ran = {"raw_examples", "instructions", "splits", "raw_preferences"}
    assert not ran & json.loads(dvc(root, "status", "--json").stdout).keys()
    assert pedigree(root, "run", "raw_examples").returncode == 0 and traces(root, WORDS, [identity]) == []
    assert not ran & json.loads(dvc(root, "status", "--json").stdout).keys(), "read again, it gives the same bytes"


@pytest.mark.long
def test_a_row_on_the_hub_is_erased_and_stays_left_out_when_the_hub_is_read_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole erasure, as the command does it; the Hub answers on loopback and keeps its row."""
    root, row = project, {"prompt": PROMPT, "completion": ANSWER}
    for name in ("tests", "docs", "benchmarks", "examples", "deploy"):  # this file quotes the record
        shutil.rmtree(root / name)
    (root / "data/keys/record_ids.key").write_text(KEY)
    jsonl(root / "data/sources/mine.jsonl", *OTHERS, ticket(PROMPT, ANSWER))

    def change(values: dict[str, Any]) -> None:
        local = {"path": "data/sources/mine.jsonl", "license": "MIT"}
        values["raw_examples"] = {
            "sources": [local, {"hub": NAME, "revision": OLD, "split": "train", "license": "MIT"}]
        }
        values["instructions"] |= {"expectations": None}
        values["splits"] = {"test": 0.0, "validation": 0.1}

    edit_params(root, change)
    rows = [
        {"prompt": f"Crate {i} of dock {i * 7} is late.", "completion": f"Crate {i} arrives at {i + 8}."}
        for i in range(5)
    ]
    hub, file = hub_with_pairs(), "data/train-00000-of-00001.parquet"
    hub.repos[NAME][OLD][file] = parquet([*rows[:3], row, *rows[3:]])
    source, identity = f"hub:{NAME}@{OLD[:12]}/train", example_id(ticket(PROMPT, ANSWER)["messages"])
    with serving(hub):
        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(root.parent / "home"),
            "HF_HUB_OFFLINE": "0",
        }.items():
            monkeypatch.setenv(name, value)
        done = dvc(root, "repro", "splits", "raw_preferences")
        assert done.returncode == 0, done.stderr + done.stdout
        git(root, "add", "-A", ":!data/sources/mine.jsonl")
        git(root, "commit", "-qm", "ran")
        done = pedigree(root, "erase", "--record", identity, "--reason", "request 10", "--json")
        assert done.returncode == 0, done.stderr + done.stdout
        document = json.loads(done.stdout)
        assert document["impact"] == "no" and not {*document["left"]} - {"git history"}
        assert document["erased"]["rows"] == {"data/sources/mine.jsonl": 1}
        assert document["erased"]["rows left out at reading"] == {source: 1}
        assert any(source in one and "still holds 1 row of them" in one for one in document["not reached"])
        assert traces(root, WORDS, [identity]) == [] and hub.repos[NAME][OLD][file] == parquet(
            [*rows[:3], row, *rows[3:]]
        )
        hub.asked.clear()
        shutil.rmtree(root.parent / "home")  # what the libraries of the Hub keep
        assert pedigree(root, "run", "raw_examples").returncode == 0 and any(one.endswith(file) for one in hub.asked)
        assert traces(root, WORDS, [identity]) == []
    report = json.loads((root / "data/reports/raw_examples.json").read_text())
    assert (report["rows_in"], report["rows_out"], report["dropped"]) == (14, 13, {"erased": 1})
    assert not {"raw_examples", "instructions", "splits"} & json.loads(dvc(root, "status", "--json").stdout).keys()
