"""What leaves the project names records by HMACs: whoever guesses a text can show nothing by hashing it."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, dvc, pedigree, tool
from ruamel.yaml import YAML

from dagster_project.core.errors import InputError
from dagster_project.core.published_ids import SAMPLE_SOURCES, is_own, published_table, read_key
from dagster_project.core.records import example_id
from dagster_project.lineage.export.export import export
from dagster_project.lineage.export.registry import formats
from dagster_project.lineage.export.summary import published_parameters

KEY_FILE = "data/keys/record_ids.key"
SAMPLE = bytes.fromhex((ROOT / KEY_FILE).read_text())


def keyed(key: bytes, identity: str) -> str:
    """The oracle: HMAC by its definition (RFC 2104), from hashlib alone."""
    block = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in block) + identity.encode()).digest()
    return hashlib.sha256(bytes(b ^ 0x5C for b in block) + inner).hexdigest()[:32]


def test_ids_are_hmacs_and_everything_else_of_the_evidence_stays() -> None:
    ids = [example_id([{"role": "user", "content": text}]) for text in ("a", "b", "a")]
    table = pa.table(
        {"step": pa.array([1, 1, 2], pa.int32()), "position": pa.array([0, 1, 0], pa.int32()), "example_id": ids}
    )
    table = table.append_column("parent_id", pa.array([ids[1], None, ids[1]]))
    key = bytes(range(32))
    found = published_table(key, pa.concat_tables([table, table.slice(0, 0)]))
    assert found.schema == table.schema and found.drop(["example_id", "parent_id"]) == table.drop(
        ["example_id", "parent_id"]
    )
    assert found["example_id"].to_pylist() == [keyed(key, identity) for identity in ids]
    assert found["parent_id"].to_pylist() == [keyed(key, ids[1]), None, keyed(key, ids[1])]
    assert keyed(key, "x") == hmac.new(key, b"x", "sha256").hexdigest()[:32]
    with pytest.raises(AssertionError, match="texts"):
        published_table(key, table.append_column("texts", pa.array([["a"], [], []])))


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "0" * 63,
        "0" * 65,
        "g" * 64,
        f"{'0' * 32}\n{'0' * 32}",
        "\ufeff" + "0" * 64,
        b"\xff" * 64,
        "\u0660" * 64,
        "key: " + "0" * 64,
    ],
)
def test_a_missing_or_malformed_key_is_one_message_with_the_command_that_creates_one(
    content: Any, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / KEY_FILE).parent.mkdir(parents=True)
        (tmp_path / KEY_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as refused:
        read_key(tmp_path)
    assert "openssl rand -hex 32 > data/keys/record_ids.key" in refused.value.hint
    assert "0" * 32 not in str(refused.value)


@pytest.mark.parametrize("content", ["{}", "{}\n", "{}\r\n", " {} \n"])
def test_a_key_is_read_with_any_ending(content: str, tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).parent.mkdir(parents=True)
    (tmp_path / KEY_FILE).write_bytes(content.format(SAMPLE.hex().upper()).encode())
    assert read_key(tmp_path) == SAMPLE == read_key(ROOT)


def test_the_samples_key_serves_the_samples_own_files_only() -> None:
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    paths = [source["path"] for section in ("raw_examples", "raw_preferences") for source in values[section]["sources"]]
    files = [{"sha256": hashlib.sha256((ROOT / path).read_bytes()).hexdigest()} for path in paths]
    assert {file["sha256"] for file in files} == SAMPLE_SOURCES
    assert is_own(SAMPLE, files) and is_own(SAMPLE, files[:1]) and is_own(SAMPLE, [])
    assert not is_own(SAMPLE, [*files, {"sha256": "0" * 64}]) and not is_own(SAMPLE, [{}])
    assert is_own(bytes(32), [*files, {"sha256": "0" * 64}])


def hashes_of_texts(root: Path) -> tuple[set[str], dict[str, bytes]]:
    """Every id that any stage gave a record, and every hash of a text of one that somebody would try."""
    ids, texts = set[str](), set[str]()
    for path in root.glob("data/*/**/*.parquet"):
        if "release" in path.parts:
            continue
        for row in pq.read_table(path).to_pylist():
            ids |= {value for name, value in row.items() if name.endswith("_id") and isinstance(value, str)}
            ids |= {
                value
                for name, values in row.items()
                if name.endswith("_ids")
                for value in values
                if isinstance(value, str)
            }
            texts |= {
                message["content"]
                for name in ("messages", "prompt", "chosen", "rejected")
                for message in row.get(name) or ()
                if isinstance(message, dict)
            }
    names = ("md5", "sha1", "sha256", "sha512", "blake2b")
    return ids, {
        f"{name} of {text[:20]!r}": hashlib.new(name, text.encode()).hexdigest().encode()
        for text in texts
        for name in names
    }


def test_no_file_of_a_release_nor_an_export_holds_a_hash_of_a_text(finished: Path) -> None:
    tool("spdx_python_model")
    ids, digests = hashes_of_texts(finished)
    assert len(ids) > 150 and len(digests) > 1000
    exports = [
        export(finished, model, form, issued=date(2026, 1, 31)).encode()
        for model in ("release", "merged_aligned@dpo")
        for form in formats()
    ]
    files = [
        path.read_bytes()
        for path in finished.glob("data/release/**/*")
        if path.is_file() and path.suffix != ".safetensors"
    ]
    tables = [
        json.dumps(pq.read_table(path).to_pylist()).encode() for path in finished.glob("data/release/**/*.parquet")
    ]
    assert all(exports) and tables
    whole = b"\0".join([*exports, *files, *tables])
    words = set(re.findall(rb"[0-9a-f]{8,}", whole))
    assert not {identity for identity in ids if identity.encode() in words or identity[:8].encode() in words}
    assert not [name for name, digest in digests.items() if digest in words or digest[:32] in words]
    tables_in_release = {
        path.relative_to(finished / "data/release").as_posix() for path in finished.glob("data/release/**/*.parquet")
    }
    assert tables_in_release == {"audit/adapter_lora/examples.parquet"}
    assert SAMPLE.hex().encode() not in whole


def test_the_evidence_of_a_release_is_that_of_its_training_under_keyed_ids(finished: Path) -> None:
    own, released = (
        pq.read_table(finished / path / "examples.parquet")
        for path in ("data/adapter/lora", "data/release/audit/adapter_lora")
    )
    assert released.schema == own.schema and released.drop(["example_id"]) == own.drop(["example_id"])
    assert released["example_id"].to_pylist() == [keyed(SAMPLE, identity) for identity in own["example_id"].to_pylist()]


def test_the_key_is_in_no_file_but_its_own(finished: Path) -> None:
    secret = (SAMPLE.hex().encode(), SAMPLE.hex().upper().encode(), SAMPLE)
    holders = [
        path.relative_to(finished).as_posix()
        for path in finished.rglob("*")
        if path.is_file()
        and path.relative_to(finished).parts[0] != ".git"
        and any(form in path.read_bytes() for form in secret)
    ]
    assert holders == [KEY_FILE]


@pytest.mark.long
@pytest.mark.usefixtures("warm_small")
def test_the_key_decides_the_bytes_of_a_release_and_of_nothing_else(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.glob("data/release/**/*") if path.is_file()}
    evidence = finished / "data/release/audit/adapter_lora/examples.parquet"
    (finished / KEY_FILE).write_text(f"{'5a' * 32}\n")
    again = dvc(finished, "repro")
    assert again.returncode == 0 and re.findall(r"Running stage '(.*)'", again.stdout) == ["release"], again.stderr
    assert {path for path, content in before.items() if path.read_bytes() != content} == {evidence}
    (finished / KEY_FILE).write_text(SAMPLE.hex())
    assert pedigree(finished, "run", "release").returncode == 0
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.usefixtures("warm_small")
def test_without_a_key_no_stage_starts(finished: Path) -> None:
    (finished / KEY_FILE).unlink()
    for command in (("run", "release"), ("run", "splits"), ("plan",)):
        refused = pedigree(finished, *command)
        assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
        assert "openssl rand -hex 32 > data/keys/record_ids.key" in refused.stderr
    (finished / KEY_FILE).write_text("0" * 10)
    assert (
        refused := pedigree(finished, "run", "release")
    ).returncode == 2 and "must be 64 hexadecimal digits" in refused.stderr


def test_waived_rows_are_published_without_ids() -> None:
    rows = ["data/sources/a.jsonl:3", "5d41402abc4b"]
    waiver = {"check": "pii", "reason": "public", "rows": rows, "pairs": [rows, rows[:1]]}
    found = published_parameters(
        {"instructions": {"waivers": [waiver], "limit": 3}, "splits": {"waivers": []}, "compute.seed": 7}
    )
    [published] = found["instructions"]["waivers"]
    assert published["rows"] == ["data/sources/a.jsonl:3", "a record"]
    assert published["pairs"] == [["data/sources/a.jsonl:3", "a record"], ["data/sources/a.jsonl:3"]]
    assert (published["reason"], found["instructions"]["limit"], found["compute.seed"]) == ("public", 3, 7)
