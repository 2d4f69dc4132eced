"""From a model to the exact sources, rows, parameters and code that made it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace as Of
from typing import Any, BinaryIO

import polars as pl
import pytest
from builders import small_pipeline
from builders.history import Project
from conftest import edit_params, pedigree, run
from ruamel.yaml import YAML

from dagster_project.__main__ import main
from dagster_project.core.errors import InputError
from dagster_project.core.records import read_records, read_table
from dagster_project.lineage.diff import diff
from dagster_project.lineage.impact.question import impact
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import _metrics, audit, find, trained_on, write_trained_on
from dagster_project.lineage.lineage import as_text as audit_text


def test_an_audit_names_every_source_with_its_hash_and_every_stage_before_the_model(finished: Path) -> None:
    found = audit(finished, "merged@lora")
    lock = YAML(typ="safe").load((finished / "dvc.lock").read_text())["stages"]
    assert list(found["stages"]) == [
        "base_model",
        "raw_examples",
        "instructions",
        "splits",
        "tokenized",
        "adapter@lora",
        "merged@lora",
    ]
    for path, source in found["sources"].items():
        assert source["sha256"] == hashlib.sha256((finished / path).read_bytes()).hexdigest()
        assert source["license"] == "Apache-2.0"
    assert found["model"]["md5"] in {out["md5"] for out in lock["merged@lora"]["outs"]}
    assert found["stages"]["merged@lora"]["parents"] == ["base_model", "adapter@lora"]
    assert found["parameters"]["adapter.lora"]["max_steps"] == 8
    assert "perplexity" in found["metrics"]["evaluation@lora"]


def test_rows_are_accounted_for_at_every_stage(finished: Path) -> None:
    for stage in audit(finished, "tokenized")["stages"].values():
        if "rows_in" in stage:
            assert stage["rows_in"] == stage["rows_out"] + sum(stage["dropped"].values())


def test_a_model_is_found_by_name_by_path_and_by_hash(finished: Path) -> None:
    by_name = audit(finished, "adapter@lora")
    assert audit(finished, "data/adapter/lora/") == by_name
    assert (
        audit(finished, by_name["model"]["md5"][:10])
        == by_name
        == audit(finished, by_name["model"]["md5"].removesuffix(".dir").upper())
    )


def test_one_file_of_a_release_is_that_of_the_model_of_which_the_release_is_a_copy(
    finished: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "anything.safetensors"
    weights.write_bytes((finished / "data/release/model.safetensors").read_bytes())
    assert audit(finished, str(weights)) == audit(finished, "merged@lora")


@pytest.mark.long
def test_the_diff_names_a_changed_record_and_the_audit_of_the_earlier_model_does_not_change(finished: Path) -> None:
    commit = small_pipeline.commit(finished)
    before = audit(finished, "adapter@lora")
    assert before["code"] == {**before["code"], "commit": commit, "clean": True}
    file = finished / "data/sources/triage_alpaca.json"
    rows = json.loads(file.read_text())
    rows[3]["input"] += " It has been so since Tuesday."
    file.write_text(json.dumps(rows))
    edit_params(finished, lambda v: v["adapter"]["lora"].update(learning_rate=2e-3))
    done = run(["python", "-m", "dvc", "repro", "adapter@lora"], finished)
    assert done.returncode == 0, done.stderr
    after = audit(finished, "adapter@lora")
    assert after["parameters"]["adapter.lora"]["learning_rate"] == 2e-3
    assert after["code"]["commit"] is None and after["code"]["after"] == commit and not after["code"]["clean"]
    assert audit(finished, "adapter@lora", rev="HEAD") == before
    found = diff(finished, "adapter@lora", "adapter@lora", rev="HEAD")
    (changed,) = found["records"]["changed"]
    assert changed["before"]["rows"] == changed["after"]["rows"] == ["data/sources/triage_alpaca.json:3"]
    assert changed["before"]["example_id"] != changed["after"]["example_id"]
    assert not found["records"]["added"] and not found["records"]["removed"]
    assert found["parameters"]["adapter.lora.learning_rate"] == [1e-3, 2e-3] and found["code"] == {}
    assert list(found["sources"]) == ["data/sources/triage_alpaca.json"] and found["metrics"]["adapter.loss"]
    models = {
        (one["stage"], one["commit"])
        for part in ("before", "after")
        for one in impact(finished, record=changed[part]["example_id"])["models"]
    }
    started_from_it = {(stage, commit) for stage in ("merged@lora", "aligned@dpo", "merged_aligned@dpo", "release")}
    assert models == {("adapter@lora", commit), ("adapter@lora", None), *started_from_it}


def test_a_source_is_found_by_hash_and_by_name_with_the_same_models(finished: Path) -> None:
    def models(**asked: str) -> list[tuple[str, object]]:
        return [(model["stage"], model["seen"]) for model in impact(finished, **asked)["models"]]

    for path, stage in {"triage_alpaca.json": "raw_examples", "preferences.jsonl": "raw_preferences"}.items():
        by_name = models(source=f"data/sources/{path}")
        content = (finished / "data" / "sources" / path).read_bytes()
        assert by_name and models(content=hashlib.sha256(content).hexdigest()) == by_name
        read = audit(finished, stage)["model"]["md5"]
        assert [stage for stage, _ in models(content=read)] == [stage for stage, _ in by_name]
    assert {stage for stage, _ in models(source="data/sources/triage_alpaca.json")} >= {
        "adapter@lora",
        "aligned@dpo",
        "release",
    }
    assert "adapter@lora" not in {stage for stage, _ in models(source="data/sources/preferences.jsonl")}


def test_the_records_of_a_model_are_those_it_was_trained_on(finished: Path) -> None:
    subject = find(Index(finished), "merged@lora")
    seen, missing = trained_on(subject)
    written = read_table(finished / "data/adapter/lora/examples.parquet")
    assert [(row["example_id"], row["step"], row["epoch"]) for row in seen.rows(named=True)] == [
        (row["example_id"], row["step"], row["epoch"]) for row in written
    ]
    assert not missing and all(row["source"] and row["source_row"] is not None for row in seen.rows(named=True))
    records = {record["example_id"]: record for record in read_records(finished / "data/splits/train")}
    assert {row["example_id"] for row in seen.rows(named=True)} <= records.keys()


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_records_that_do_not_fit_on_the_disk_leave_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, link = tmp_path / name, tmp_path / f"link{Path(name).suffix}"
    link.symlink_to(name)
    records = pl.DataFrame({"example_id": ["a"]})
    write_trained_on(records, link)
    before = path.read_bytes()

    def half(self: pl.DataFrame, file: BinaryIO, **options: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(pl.DataFrame, "write_csv", half)
        patch.setattr(pl.DataFrame, "write_parquet", half)
        for file in (link, tmp_path / f"new{path.suffix}"):
            with pytest.raises(InputError, match="No space left on device"):
                write_trained_on(records, file)
    assert path.read_bytes() == before and link.is_symlink()
    assert {file.name for file in tmp_path.iterdir()} == {path.name, link.name}


FAQ = "data/sources/faq.jsonl"


def test_the_files_that_were_written_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Project(tmp_path / "project")
    lock = made.curated([("cats", "train", FAQ), ("fish", "train", FAQ)])
    made.commit(made.trained(lock, ["cats", "fish", "cats"]))
    page, rows = tmp_path / "audit.html", tmp_path / "rows.csv"
    asked = ["audit", "merged@lora", "--project", str(made.root), "--html", str(page), "--records", str(rows)]
    assert main(asked) == 0
    assert capsys.readouterr().err == f"records: {rows}, 2 records\npage: {page}\n" and page.is_file()
    assert len(rows.read_text().splitlines()) == 1 + 3, "a line for each time that a record was seen"


@pytest.mark.usefixtures("warm_small")
def test_audit_gives_the_same_content_as_text_and_json(finished: Path) -> None:
    text = pedigree(finished, "audit", "merged@lora")
    document = json.loads(pedigree(finished, "audit", "merged@lora", "--json").stdout)
    assert text.returncode == 0
    for path, source in document["sources"].items():
        assert path in text.stdout and source["sha256"][:16] in text.stdout
    document["metrics"]["comparison"] = {"compared": {f"lora to {i}": 0.5 for i in range(1000)}}
    assert max(map(len, audit_text(document).splitlines())) < 400, "the terminal is not filled by one figure"


@pytest.mark.timeout(60)
def test_a_model_with_the_files_of_the_model_that_it_reads_is_followed_once() -> None:
    """As if merging had changed nothing."""
    adapter = Of(address="adapter@lora", md5="1", inputs=[], is_model=True)
    merged = Of(address="merged@lora", md5="1", inputs=[("adapter@lora", "data/adapter/lora", "1")], is_model=True)
    evaluation = Of(
        address="evaluation@lora", md5="2", inputs=[("merged@lora", "data/merged/lora", "1")], is_model=False
    )
    lock = {run.address: run for run in (adapter, merged, evaluation)}
    subject = Of(run=adapter, lock=lock, index=Of(report=lambda run: {"score": 1}, is_copy=lambda run: False))
    assert _metrics(subject, {}) == {"adapter@lora": {}, "evaluation@lora": {"score": 1}}
