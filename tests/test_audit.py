"""From a model to the exact sources, rows, parameters and code that made it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from conftest import edit_params, pedigree, run
from ruamel.yaml import YAML

from dagster_project.audit.lineage import audit


def test_an_audit_names_every_source_with_its_hash_and_every_stage_before_the_model(finished: Path) -> None:
    found = audit(finished, "merged@lora")
    lock = YAML(typ="safe").load((finished / "dvc.lock").read_text())["stages"]
    assert list(found["stages"]) == ["base_model", "raw_examples", "instructions", "splits", "tokenized", "adapter@lora", "merged@lora"]
    for path, source in found["sources"].items():
        assert source["sha256"] == hashlib.sha256((finished / path).read_bytes()).hexdigest()
        assert source["licence"] == "Apache-2.0"
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
    assert audit(finished, by_name["model"]["md5"][:10]) == by_name


def test_an_earlier_revision_is_audited_as_it_was(finished: Path) -> None:
    for command in (["git", "add", "-A"], ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "run"]):
        assert run(command, finished).returncode == 0
    commit = run(["git", "rev-parse", "HEAD"], finished).stdout.strip()
    before = audit(finished, "splits")
    assert before["code"] == {**before["code"], "commit": commit, "clean": True}
    edit_params(finished, lambda v: v["splits"].update(test=0.3))
    assert run(["python", "-m", "dvc", "repro", "splits"], finished).returncode == 0
    assert audit(finished, "splits")["parameters"]["splits"]["test"] == 0.3
    assert not audit(finished, "splits")["code"]["clean"]
    assert audit(finished, "splits", rev="HEAD") == before


def test_the_command_line_says_the_same_in_text_and_json(finished: Path) -> None:
    text = pedigree(finished, "audit", "merged@lora")
    document = json.loads(pedigree(finished, "audit", "merged@lora", "--json").stdout)
    assert text.returncode == 0
    for path, source in document["sources"].items():
        assert path in text.stdout and source["sha256"][:16] in text.stdout
