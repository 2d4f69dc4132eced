"""Sources in S3: the same rows as from files, pinned by the list of objects,
read in no other version, and made again by `verify`."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from builders.files import FILE_WRITERS, jsonl
from builders.history import Project
from builders.layouts import BENCHMARK_ROWS
from builders.s3 import BUCKET, S3Server
from builders.servers import free_port
from builders.small_pipeline import commit, git
from conftest import dvc, edit_params, pedigree, skip_without

from dagster_project.commands.init import init
from dagster_project.core.errors import InputError
from dagster_project.core.frames import read_pairs
from dagster_project.core.params import parse
from dagster_project.core.records import read_ledger, read_records, write_json
from dagster_project.curation.check_files import check_paths
from dagster_project.curation.sources import files, s3
from dagster_project.lineage.impact.question import impact
from dagster_project.lineage.lineage import audit
from dagster_project.pipeline import validate
from dagster_project.stages import raw_examples, raw_preferences

skip_without("s3fs", "moto")

ROWS = [{"prompt": f"Question {number}", "completion": f"Answer {number}"} for number in range(50)]


@pytest.fixture
def prefix() -> str:
    return f"rows-{uuid.uuid4().hex[:8]}"


def upload(bucket: S3Server, prefix: str, folder: Path) -> str:
    """Copy a folder to the bucket. Returns its address."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            bucket.write(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"s3://{BUCKET}/{prefix}"


def digest(bucket: S3Server, prefix: str, *suffixes: str) -> str:
    """The revision of a prefix, from the server's own list. `suffixes`: types of the files that are read."""
    listed = bucket._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/")["Contents"]
    lines = [[one["Key"].removeprefix(f"{prefix}/"), one["Size"], one["ETag"].strip('"')] for one in listed]
    text = "".join(json.dumps(line) + "\n" for line in sorted(lines) if line[0].endswith(suffixes or ""))
    return hashlib.sha256(text.encode()).hexdigest()


def read(root: Path, out: str, *sources: Any, **section: Any) -> Any:
    params = parse(raw_examples.Params, {"sources": list(sources), **section}, "raw_examples")
    return raw_examples.produce(root, params, root / out)


def refusal(root: Path, *sources: Any, **section: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read(root, "out", *sources, **section)
    assert not (root / "out").exists() and caught.value.hint
    return caught.value


def contents(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "source"} for record in read_records(out)]


def test_objects_give_the_rows_and_the_hash_of_the_same_files(
    tmp_path: Path, bucket: S3Server, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data/sources/mine"
    folder.mkdir(parents=True)
    for suffix, write in FILE_WRITERS.items():
        write(folder / f"a{suffix}", [{"text": "A wren."}] if suffix == ".txt" else ROWS)
    (folder / "deep").mkdir()
    (folder / "deep/test.jsonl.gz").write_bytes(
        gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
    )
    (folder / "README.md").write_text("no examples")
    url = upload(bucket, prefix, folder)
    bucket.write(f"{prefix}2/next.jsonl", b"x")
    revision = digest(bucket, prefix, *files.READERS)
    local = read(tmp_path, "local", {"path": "data/sources/mine", "split": "from_file_names"})
    remote = read(tmp_path, "remote", {"path": url, "revision": revision, "split": "from_file_names"})
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    expected, facts = local.metrics["sources"]["data/sources/mine"], remote.metrics["sources"][url]
    assert expected.pop("not_read") == {
        "files": 1,
        "names": ["README.md"],
    }, "of objects only a message names them: the revision does not pin them"
    assert f"{url}: not read, because of their types: README.md" in caplog.messages
    assert {**facts, "files": {}} == {**expected, "files": {}, "revision": revision}
    assert {name: (one["rows"], one["sha256"]) for name, one in facts["files"].items()} == {
        name: (one["rows"], one["sha256"]) for name, one in expected["files"].items()
    }
    assert {line["source"] for line in read_ledger(tmp_path / "remote")} == {f"{url}/{name}" for name in facts["files"]}
    assert not [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and "sources" not in path.parts and path.parent.parent != tmp_path
    ]


def test_a_data_set_that_datasets_saved_has_the_rows_that_it_has_in_a_folder(
    tmp_path: Path, bucket: S3Server, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    from datasets import Dataset, DatasetDict

    folder = tmp_path / "data/sources/saved"
    splits = {"train": Dataset.from_list(ROWS[:30]), "test": Dataset.from_list(ROWS[30:])}
    DatasetDict(splits).save_to_disk(folder, num_shards={"train": 2, "test": 1})
    (folder / "train/cache-0123456789abcdef.arrow").write_bytes(b"a cache")
    url = upload(bucket, prefix, folder)
    local = read(tmp_path, "local", {"path": "data/sources/saved", "split": "from_file_names"})
    (revision,) = re.findall(r"revision: ([0-9a-f]{64})", refusal(tmp_path, {"path": url}).hint)
    caplog.clear()
    remote = read(tmp_path, "remote", {"path": url, "revision": revision, "split": "from_file_names"})
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    facts = remote.metrics["sources"][url]
    assert facts["sha256"] == local.metrics["sources"]["data/sources/saved"]["sha256"]
    assert [*facts["files"]] == [
        "test/data-00000-of-00001.arrow",
        "train/data-00000-of-00002.arrow",
        "train/data-00001-of-00002.arrow",
    ]
    (said,) = caplog.messages
    assert "because they are not data of the saved data set: dataset_dict.json, test/dataset_info.json" in said
    assert check_paths([url])["rows"] == 50


def test_one_object_is_a_source_with_the_hash_of_its_content(tmp_path: Path, bucket: S3Server, prefix: str) -> None:
    content = jsonl(tmp_path / "a.jsonl", *ROWS).read_bytes()
    bucket.write(f"{prefix}/a.jsonl", content)
    bucket.write(f"{prefix}/a.jsonl.bak", b"other")
    url = f"s3://{BUCKET}/{prefix}/a.jsonl"
    hint = refusal(tmp_path, {"path": url}).hint
    facts = read(tmp_path, "out", {"path": url, "revision": hint.split("`")[1].removeprefix("revision: ")}).metrics[
        "sources"
    ][url]
    assert (facts["rows"], facts["sha256"]) == (50, hashlib.sha256(content).hexdigest())
    assert {record["source"] for record in read_records(tmp_path / "out")} == {url}


def test_preferences_are_read_from_objects(tmp_path: Path, bucket: S3Server, prefix: str) -> None:
    rows = [{**row, "label": good} for row in ROWS for good in (True, False)]
    url = upload(bucket, prefix, jsonl(tmp_path / "set/p.jsonl", *rows).parent)
    values = {"sources": [{"path": url, "revision": digest(bucket, prefix)}]}
    report = raw_preferences.produce(
        tmp_path, parse(raw_preferences.Params, values, "raw_preferences"), tmp_path / "out"
    )
    assert (report.metrics["sources"][url]["rows"], len(read_pairs(tmp_path / "out"))) == (100, 50)


# The pin


def test_objects_without_revision_are_refused_before_any_is_read(
    tmp_path: Path, bucket: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(bucket, prefix, jsonl(tmp_path / "set/a.jsonl", *ROWS).parent)
    jsonl(tmp_path / "data/sources/b.jsonl", *ROWS)
    monkeypatch.setattr(s3.Reader, "open", lambda *_: pytest.fail("an object was read"))
    error = refusal(tmp_path, {"path": "data/sources/b.jsonl"}, {"path": url})
    size = (tmp_path / "set/a.jsonl").stat().st_size
    assert error.what == f"params.yaml: raw_examples.sources: {url} has no revision, and objects can change"
    assert (
        error.hint == f"to use the 1 object ({size} bytes) that is there now, add `revision: {digest(bucket, prefix)}`"
    )


@pytest.fixture
def changed(tmp_path: Path, bucket: S3Server, prefix: str) -> tuple[dict[str, str], dict[str, Any]]:
    """A source whose objects were read, and changed afterwards; and the report of that time."""
    folder = tmp_path / "set"
    for name in ("a", "b", "c"):
        jsonl(folder / f"{name}.jsonl", *ROWS)
    source = {"path": upload(bucket, prefix, folder), "revision": digest(bucket, prefix)}
    report = read(tmp_path, "before", source).document()
    bucket.write(f"{prefix}/a.jsonl", b'{"prompt": "Hi", "completion": "Ho"}\n')
    bucket.write(f"{prefix}/d.jsonl", b'{"prompt": "Hi", "completion": "Ho"}\n')
    bucket._client.delete_object(Bucket=BUCKET, Key=f"{prefix}/b.jsonl")
    return source, report


@pytest.mark.parametrize("where", ["workspace", "commit"])
def test_objects_that_are_not_those_of_the_revision_are_named(
    where: str, changed: tuple[dict[str, str], dict[str, Any]], tmp_path: Path, bucket: S3Server, prefix: str
) -> None:
    source, report = changed
    write_json(tmp_path / "data/reports/raw_examples.json", report)
    if where == "commit":  # DVC removes a stage's outputs before it runs
        for command in (["init", "-q"], ["add", "data"], ["commit", "-qm", "x"]):
            git(tmp_path, *command)
        (tmp_path / "data/reports/raw_examples.json").unlink()
    error = refusal(tmp_path, source)
    assert (
        error.what
        == f"params.yaml: raw_examples.sources: {source['path']}: the objects are not those of the revision in"
        " params.yaml: changed: a.jsonl; new: d.jsonl; missing: b.jsonl"
    )
    assert f"`revision: {digest(bucket, prefix)}`" in error.hint


def test_without_a_report_of_the_revision_the_latest_objects_are_named(
    changed: tuple[dict[str, str], dict[str, Any]], tmp_path: Path, bucket: S3Server, prefix: str
) -> None:
    source, report = changed
    report["sources"][source["path"]]["revision"] = "0" * 64
    write_json(tmp_path / "data/reports/raw_examples.json", report)
    what = refusal(tmp_path, source).what
    assert "which no report lists; modified last: " in what and all(
        name in what for name in ("a.jsonl (20", "d.jsonl (20")
    )
    assert read(tmp_path, "out", {**source, "revision": digest(bucket, prefix)}).rows_out == 52


def test_an_object_that_changes_after_it_was_listed_is_refused(
    tmp_path: Path, bucket: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "READ_AHEAD", 1000)
    monkeypatch.setattr(s3, "MEGABYTE", 500)
    content = jsonl(tmp_path / "set/a.jsonl", *ROWS).read_bytes()
    url = upload(bucket, prefix, tmp_path / "set")
    (one,) = s3.Reader().list(url, tmp_path)
    with one.open("rb") as file:
        assert file.read(300) == content[:300]
        bucket.write(f"{prefix}/a.jsonl", content[::-1])  # of the same size
        with pytest.raises(InputError, match="cannot be read"):
            file.read()
    with pytest.raises(InputError, match="bytes were read"):
        _ = one.sha256
    with pytest.raises(InputError, match="has changed since it was listed"):
        one.open("rb")


def test_memory_holds_a_part_of_an_object(
    tmp_path: Path, bucket: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large object only what was read ahead is requested before its first row is there."""
    monkeypatch.setattr(s3, "READ_AHEAD", 10_000)
    monkeypatch.setattr(s3, "MEGABYTE", 1000)
    monkeypatch.setattr(files, "BLOCK_ROWS", 1)
    jsonl(tmp_path / "set/a.jsonl", *(ROWS * 100))
    (one,) = s3.Reader().list(upload(bucket, prefix, tmp_path / "set"), tmp_path)
    first = next(iter(files.read_blocks(one)))
    assert [row.value for row in first.rows()] == ROWS[:1]
    assert one._content and one._content.bytes < 5000 < one.size


# Bad input


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "s3://"}, "'s3://' is not an address of objects: use s3://BUCKET/PREFIX"),
        ({"path": "s3://key:secret@bucket/a"}, "is not an address of objects"),
        ({"path": "s3://bucket//a"}, "is not an address of objects"),
        ({"path": "s3://bucket/a", "revision": "main"}, "revision 'main' is not the digest of a list of objects"),
        ({"path": "s3://bucket/a", "config": "x"}, "config belongs to a hub data set"),
    ],
)
def test_wrong_addresses_and_revisions_are_refused_without_network(
    source: dict[str, str], message: str, tmp_path: Path
) -> None:
    assert message in refusal(tmp_path, source).what


def test_prefixes_that_contain_each_other_are_refused_without_network(tmp_path: Path) -> None:
    sources = [{"path": f"s3://bucket/{name}", "revision": "0" * 64} for name in ("a/b.jsonl", "a2", "a/")]
    what = refusal(tmp_path, *sources).what
    assert (
        what == "params.yaml: raw_examples.sources: s3://bucket/a/b.jsonl is in s3://bucket/a/ and would be read twice"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"s3://{BUCKET}/none", "no file of examples at this address"),
        ("s3://no-such-bucket/a", "no such bucket or object"),
    ],
)
def test_an_address_without_objects_is_refused(path: str, message: str, tmp_path: Path, bucket: S3Server) -> None:
    assert refusal(tmp_path, {"path": path}).what == f"{path}: {message}"


@pytest.mark.parametrize("layout", ["unknown format", "not JSON", "not Parquet"])
def test_a_bad_object_is_named(layout: str, tmp_path: Path, bucket: S3Server, prefix: str) -> None:
    name, content = {
        "unknown format": ("a.jsonl", b'{"x": 1}\n'),
        "not JSON": ("a.jsonl", b"x\n"),
        "not Parquet": ("a.parquet", b"x" * 100),
    }[layout]
    bucket.write(f"{prefix}/{name}", content)
    source = {"path": f"s3://{BUCKET}/{prefix}", "revision": digest(bucket, prefix)}
    assert refusal(tmp_path, source).what.startswith(f"s3://{BUCKET}/{prefix}/{name}: {layout}")


@pytest.mark.parametrize("broken", ["endpoint", "credentials"])
def test_no_message_contains_credentials(
    broken: str, tmp_path: Path, bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "endpoint":
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    else:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
    error = refusal(tmp_path, {"path": f"s3://{BUCKET}/a"})
    assert "cannot be read" in error.what and "credentials" in error.hint
    assert bucket.key not in str(error) and bucket.secret not in str(error)


def test_an_error_that_quotes_credentials_is_shown_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
    with pytest.raises(InputError) as caught, s3._as_input_error("s3://b/a"):
        raise OSError("signature of topsecret does not match")
    assert caught.value.what == "s3://b/a: cannot be read: signature of [credential] does not match"


def test_without_s3fs_one_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    error = refusal(tmp_path, {"path": "s3://bucket/a"})
    assert "s3fs is not installed" in error.what and "pip install 'pedigree-llm[s3]'" in error.hint


# `pedigree check` and `pedigree init`


def test_check_reads_objects_as_the_same_files(tmp_path: Path, bucket: S3Server, prefix: str) -> None:
    folder = jsonl(tmp_path / "mine/a.jsonl", *ROWS, ROWS[0]).parent
    FILE_WRITERS[".parquet"](folder / "b.parquet", ROWS[:3])
    url = upload(bucket, prefix, folder)
    local, remote = check_paths([str(folder)]), check_paths([url])
    assert json.dumps(remote).replace(url, str(folder)) == json.dumps(local) and local["rows"] == 54
    held_out = str(jsonl(tmp_path / "held.jsonl", ROWS[7]))
    leaks = [check_paths([held_out], against=[place])["findings"] for place in (str(folder), url)]
    assert json.dumps(leaks[1]).replace(url, str(folder)) == json.dumps(leaks[0])
    assert [finding["count"] for finding in leaks[1] if finding["check"] == "benchmark_leakage"] == [1]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://key:secret@bucket/a", "is not an address of objects"),
        (f"s3://{BUCKET}/none", "no file of examples at this address"),
    ],
)
def test_check_refuses_an_address_without_objects(path: str, message: str, bucket: S3Server) -> None:
    with pytest.raises(InputError, match=message):
        check_paths([path])


def test_check_of_objects_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match="s3fs is not installed"):
        check_paths(["s3://bucket/a.jsonl"])


def test_init_pins_the_objects_that_it_read(tmp_path: Path, bucket: S3Server, prefix: str) -> None:
    url, project = upload(bucket, prefix, jsonl(tmp_path / "set/a.jsonl", *ROWS).parent), tmp_path / "project"
    document = init(project, [url], None, "auto", "MIT")
    assert document["sources"] == [{"path": url, "kind": "examples", "layout": "prompt_completion", "rows": 50}]
    section = validate(project)["raw_examples"]
    assert section["sources"] == [{"path": url, "revision": digest(bucket, prefix), "license": "MIT"}]
    assert not [path for path in (project / "data/sources").rglob("*") if path.is_file() and path.name != ".gitkeep"]
    assert read(project, "out", *section["sources"]).rows_out == 50


def test_init_refuses_benchmarks_in_s3_and_a_prefix_that_is_named_twice(
    tmp_path: Path, bucket: S3Server, prefix: str
) -> None:
    url = upload(bucket, prefix, jsonl(tmp_path / "set/a.jsonl", *ROWS).parent)
    questions = upload(bucket, f"{prefix}-q", jsonl(tmp_path / "q/a.jsonl", *BENCHMARK_ROWS["mmlu"]).parent)
    for given, message in (
        ([url, questions], "benchmark questions are read from files"),
        ([url, url], f"{url} is named twice"),
    ):
        with pytest.raises(InputError, match=message):
            init(tmp_path / "project", given, None, "auto", "MIT")
    assert not (tmp_path / "project").exists()


# History


def test_audit_and_impact_name_objects_and_their_prefix(tmp_path: Path) -> None:
    made = Project(tmp_path / "project")
    rows = [
        ("wrens", "train", "s3://bucket/rows/a.jsonl"),
        ("owls", "train", "s3://bucket/rows2/b.jsonl"),
        ("owls", "test", "data/sources/x.jsonl"),
    ]
    made.commit(made.lock(rows), "from S3")
    for asked, count in (
        ("s3://bucket/rows", 1),
        ("s3://bucket/rows/", 1),
        ("s3://bucket/rows/a.jsonl", 1),
        ("s3://bucket/rows2", 1),
        ("s3://bucket", 2),
    ):
        found = impact(made.root, source=asked)
        assert {model["seen"][0]["splits"]["train"] for model in found["models"]} == {count}, asked
    with pytest.raises(InputError, match="no recorded run has read such a file or folder"):
        impact(made.root, source="s3://bucket/row")
    assert set(audit(made.root, "adapter@lora")["sources"]) == {source for _, _, source in rows}


@pytest.mark.long
def test_a_stage_that_read_objects_is_made_again_from_its_record(
    project: Path, bucket: S3Server, prefix: str, tmp_path: Path
) -> None:
    url = upload(bucket, prefix, jsonl(tmp_path / "set/a.jsonl", *ROWS).parent)
    source = {"path": url, "revision": digest(bucket, prefix), "license": "MIT"}
    edit_params(project, lambda values: values.update(raw_examples={"sources": [source]}))
    done = dvc(project, "repro", "raw_examples")
    assert done.returncode == 0, done.stderr
    report = json.loads((project / "data/reports/raw_examples.json").read_text())["sources"][url]
    assert (report["rows"], report["license"], report["revision"]) == (50, "MIT", source["revision"])
    commit(project)
    assert json.loads(pedigree(project, "verify", "raw_examples", "--json").stdout)["verdict"] == "identical"
    assert bucket.secret not in "".join(path.read_text(errors="replace") for path in project.rglob("*.json"))
    bucket.write(f"{prefix}/a.jsonl", b'{"prompt": "Hi", "completion": "Ho"}\n')
    refused = pedigree(project, "verify", "raw_examples", "--json")
    assert refused.returncode == 2 and "changed: a.jsonl" in refused.stderr
