"""The release gate: a model that is not better, forgot, was tested on training data or does not load needs a waiver."""

from __future__ import annotations

import hmac
import json
import shutil
from collections.abc import Callable
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, edit_params
from huggingface_hub import ModelCard

from dagster_project import pipeline
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.core.records import Report, read_table, write_json, write_table
from dagster_project.lineage.export.summary import chain
from dagster_project.stages import release
from dagster_project.stages.release import Params, Waiver
from dagster_project.training.trainers.harness.weight_audit import seen_schema

KEY = bytes(range(32))
Change = Callable[[dict[str, Any]], Any]


def board() -> dict[str, Any]:
    """What `comparison` says of a variant that nothing speaks against."""
    against = {"few_shot": {"macro_f1": {"difference": 0.2, "interval": [0.1, 0.3]}}}
    return {
        "test": {"examples": 90, "answered": 90, "seen": 0},
        "shown": ["macro_f1", "accuracy"],
        "scores": {"lora": {"n": 90, "macro_f1": 0.8, "accuracy": 0.9}},
        "costs": {"lora": {"bytes": 7}},
        "compared": {
            "lora": {"to": against, "retention": {"overall": {"questions": 60, "accuracy": {"difference": -0.01}}}}
        },
        "recommended": {"variant": "lora", "sure": True, "instead": "few_shot", "why": "It is better."},
    }


def promote(tmp_path: Path, model: Path, change: Change = lambda found: None, params: Params | None = None) -> Report:
    found = board()
    change(found)
    write_json(tmp_path / "comparison" / "comparison.json", found)
    return release.produce(
        params or Params(),
        Compute(threads=1),
        tmp_path / "comparison",
        {"lora": model},
        {},
        {},
        KEY,
        tmp_path / "release",
    )


def worse(found: dict[str, Any]) -> None:
    found["compared"]["lora"]["to"]["few_shot"]["macro_f1"]["interval"] = [-0.01, 0.3]


def test_a_release_is_the_merged_model_file_by_file_with_its_record(tiny_model: Path, tmp_path: Path) -> None:
    report = promote(tmp_path, tiny_model)
    assert {check.name: check.passed for check in report.checks} == dict.fromkeys(
        release.CHECK_DESCRIPTIONS, True
    ) and not report.failures
    record = json.loads((tmp_path / "release/release.json").read_text())
    assert record["files"] == {
        path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(tiny_model.iterdir())
    }
    assert all(
        (tmp_path / "release" / name).read_bytes() == (tiny_model / name).read_bytes() for name in record["files"]
    )
    assert (record["variant"], record["scores"]["macro_f1"], record["waivers"]) == ("lora", 0.8, [])
    assert report.checks[-3].note == "the same greedy tokens as merged"


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        (
            "better_than_baselines",
            worse,
            "not surely better: +20.0 points of macro-F1 over the best alternative, base model, worked examples",
        ),
        ("better_than_baselines", lambda b: b["compared"]["lora"].pop("to"), "nothing was compared"),
        (
            "better_than_baselines",
            lambda b: b["compared"]["lora"].update(failed_checks=["answers_are_not_empty of evaluation@lora"]),
            "its checks failed: answers_are_not_empty of evaluation@lora; +20.0 points",
        ),
        (
            "better_than_baselines",
            lambda b: b["test"].update(answered=29),
            "nothing can be concluded from 29 test examples, 30 are needed",
        ),
        (
            "kept_its_knowledge",
            lambda b: b["compared"]["lora"]["retention"]["overall"]["accuracy"].update(difference=-0.06),
            "-6.0 points on 60 benchmark questions, and at most 5.0",
        ),
        (
            "kept_its_knowledge",
            lambda b: b["compared"]["lora"].pop("retention"),
            "not measured; name a benchmark in evaluation.benchmarks, or waive the check in release.waivers",
        ),
        (
            "test_is_unseen",
            lambda b: b["test"].update(seen=2),
            "2 of 90 test examples have a near-copy in what was trained on",
        ),
        ("test_is_unseen", lambda b: b["test"].update(examples=0), "0 of 0 test examples"),
    ],
)
def test_a_failed_check_blocks_unless_it_is_waived_with_a_reason(
    name: str, change: Change, why: str, tiny_model: Path, tmp_path: Path
) -> None:
    [failed] = promote(tmp_path / "a", tiny_model, change).failures
    assert failed.name == name and failed.note.startswith(why)
    waiver = Waiver(check=name, reason="agreed with the owner", expires="2999-01-01")  # type: ignore[arg-type]
    report = promote(tmp_path / "b", tiny_model, change, Params(waivers=[waiver]))
    [waived] = [check for check in report.checks if not check.passed]
    assert not report.failures and report.metrics["waived"] == [name]
    assert (waived.severity, waived.waived) == ("warn", 1) and waived.note.endswith(
        "; waived until 2999-01-01: agreed with the owner"
    )
    record = json.loads((tmp_path / "b/release/release.json").read_text())
    assert record["waivers"] == [{"check": name, "reason": "agreed with the owner", "expires": "2999-01-01"}]
    assert not record["checks"][name]["passed"]


def test_a_release_contains_the_card_and_audit_of_its_own_variant_only(tiny_model: Path, tmp_path: Path) -> None:
    trained = {name: tmp_path / name for name in ("adapter@lora", "adapter@dora")}
    for name, folder in trained.items():
        folder.mkdir()
        (folder / "training.json").write_text(json.dumps({"stage": name}))
    reports: dict[str, dict[str, Any]] = {
        "base_model": {"origin": "org/base", "license": "Apache-2.0"},
        "raw_examples": {
            "sources": {"data/sources/a.jsonl": {"rows": 9, "format": "messages", "licence": "MIT", "sha256": "0" * 64}}
        },
        "adapter@lora": {"environment": {"peft": "1"}, "steps": 3, "method": "lora"},
        "adapter@dora": {"environment": {"peft": "1"}, "steps": 5, "method": "dora"},
        "raw_preferences": {},
        "evaluation@lora": {"macro_f1": 0.8, "macro_f1_interval": [0.7, 0.9], "test_examples": 9},
        "evaluation@dora": {"macro_f1": 0.6, "macro_f1_interval": [0.5, 0.7], "test_examples": 9},
        "comparison": {"advice": ["It is worth it."]},
    }
    write_json(tmp_path / "comparison" / "comparison.json", board())
    release.produce(
        Params(),
        Compute(threads=1),
        tmp_path / "comparison",
        {"lora": tiny_model},
        trained,
        reports,
        KEY,
        tmp_path / "release",
    )
    card = ModelCard((tmp_path / "release/README.md").read_text())
    assert [(one.metric_type, one.metric_value) for one in card.data.eval_results] == [("macro_f1", 0.8)]
    assert (
        card.data.tags == ["lora", "pedigree"]
        and "| data/sources/a.jsonl | 9 | messages | MIT |" in card.text
        and "It is worth it." in card.text
    )
    found = json.loads((tmp_path / "release/audit/audit.json").read_text())
    assert list(found["stages"]) == ["base_model", "raw_examples", "adapter@lora"] and found["training"]["steps"] == 3
    assert [path.parent.name for path in (tmp_path / "release/audit").rglob("training.json")] == ["adapter_lora"]


def test_a_standalone_model_is_released_without_its_tables_of_records(tiny_model: Path, tmp_path: Path) -> None:
    """Full fine-tuning: the merged model is the folder of the training, with
    its evidence and, if aligned, samples of texts."""
    full = tmp_path / "full"
    shutil.copytree(tiny_model, full)
    rows = [{"step": 1, "epoch": 1, "position": 0, "example_id": "5d41402abc4b2a76b9719d911017c592"}]
    write_table(full / "examples.parquet", rows, seen_schema())
    (full / "samples.parquet").write_bytes(b"texts")
    (full / "training.json").write_text("{}")
    found = board()
    write_json(tmp_path / "comparison" / "comparison.json", found)
    reports: dict[str, dict[str, Any]] = {"base_model": {}, "adapter@lora": {"environment": {}}}
    trained = {"adapter@lora": full}
    release.produce(
        Params(),
        Compute(threads=1),
        tmp_path / "comparison",
        {"lora": full},
        trained,
        reports,
        KEY,
        tmp_path / "release",
    )
    released = {path.relative_to(tmp_path / "release").as_posix() for path in (tmp_path / "release").rglob("*.*")}
    assert released >= {path.name for path in tiny_model.iterdir()} | {"training.json"}
    assert {name for name in released if name.endswith(".parquet")} == {"audit/adapter_lora/examples.parquet"}
    [row] = read_table(tmp_path / "release/audit/adapter_lora/examples.parquet")
    assert row == {**rows[0], "example_id": hmac.new(KEY, rows[0]["example_id"].encode(), "sha256").hexdigest()[:32]}


def test_the_samples_key_is_a_warning_with_other_data_and_never_stops_a_release(
    tiny_model: Path, tmp_path: Path
) -> None:
    sample = bytes.fromhex((ROOT / "data/keys/record_ids.key").read_text())
    write_json(tmp_path / "comparison" / "comparison.json", board())
    mine = {"rows": 1, "format": "messages", "license": "MIT", "sha256": "0" * 64}
    theirs = {**mine, "sha256": sha256((ROOT / "data/sources/triage_alpaca.json").read_bytes()).hexdigest()}
    for i, (key, source, passed) in enumerate(
        [(sample, mine, False), (sample, theirs, True), (KEY, mine, True), (KEY, theirs, True)]
    ):
        reports: dict[str, dict[str, Any]] = {
            "base_model": {},
            "raw_examples": {"sources": {"data/sources/a.jsonl": source}},
        }
        out = tmp_path / str(i)
        report = release.produce(
            Params(), Compute(threads=1), tmp_path / "comparison", {"lora": tiny_model}, {}, reports, key, out
        )
        [check] = [check for check in report.checks if check.name == "own_key"]
        assert (check.passed, check.severity, check.blocking, report.failures) == (passed, "warn", False, [])
        assert passed or "openssl rand -hex 32 > data/keys/record_ids.key" in check.note
        assert key.hex() not in json.dumps(report.document()) + (out / "release.json").read_text()


def test_an_aligned_variant_is_traced_through_the_variant_it_started_from() -> None:
    names = (
        "tokenized adapter@lora adapter@dora merged@lora preferences reward_model merged_aligned@dpo evaluation@lora"
    )
    reports: dict[str, dict[str, Any]] = {name: {} for name in names.split()}
    assert chain("lora", reports) == ["tokenized", "adapter@lora", "merged@lora", "evaluation@lora"]
    reports["aligned@dpo"] = {"adapter": "lora", "method": "ppo"}
    assert chain("dpo", reports) == [name for name in reports if name not in {"adapter@dora", "evaluation@lora"}]
    reports["aligned@dpo"]["rewards"] = {"distinct": 1.0}  # rules alone
    assert "reward_model" not in chain("dpo", reports)
    reports["aligned@dpo"] = {"adapter": "lora", "method": "dpo"}  # it only measures itself by the reward model
    assert chain("dpo", reports) == [
        name for name in reports if name not in {"adapter@dora", "evaluation@lora", "reward_model"}
    ]


def test_both_versions_of_a_stage_are_traced_where_a_reward_model_is_of_an_earlier_run() -> None:
    """Of the second version of a stage, audits and exports append the hash to the name."""
    names = [
        "adapter@lora",
        "merged@lora",
        "reward_model",
        "adapter@lora 5d41402a",
        "merged@lora 5d41402a",
        "adapter@dora 5d41402a",
    ]
    reports: dict[str, dict[str, Any]] = {name: {} for name in names}
    reports["reward_model"] = {"model": "merged/lora"}
    reports["aligned@ppo"] = {"adapter": "lora", "method": "ppo"}
    assert chain("ppo", reports) == [name for name in reports if name != "adapter@dora 5d41402a"]


def test_forgetting_beyond_the_parameter_blocks_the_release(tiny_model: Path, tmp_path: Path) -> None:
    assert [c.name for c in promote(tmp_path, tiny_model, params=Params(max_forgetting=0.005)).failures] == [
        "kept_its_knowledge"
    ]
    shutil.rmtree(tmp_path / "release")
    assert not promote(tmp_path, tiny_model, params=Params(max_forgetting=0.01)).failures


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda folder: (folder / "config.json").unlink(), "it does not stand alone"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "it does not stand alone"),
        (
            lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
            "weights in another format than safetensors: pytorch_model.bin",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "transformers does not load it: "),
    ],
    ids=["no config", "adapter", "pickle", "no weights"],
)
def test_a_folder_that_plain_transformers_does_not_load_is_not_released(
    spoil: Callable[[Path], Any], why: str, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "merged")
    spoil(tmp_path / "merged")
    [failed] = promote(tmp_path, tmp_path / "merged").failures
    assert failed.name == "loads_in_transformers" and failed.note.startswith(why)


@pytest.mark.parametrize("template", [None, "{{ raise_exception('Name the tools.') }}"], ids=["none", "refuses"])
def test_a_model_is_released_whose_template_writes_no_question_alone(
    template: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = tmp_path / "merged", AutoTokenizer.from_pretrained(tiny_model)
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("chat_template.jinja"))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    assert not promote(tmp_path, model).failures


def test_without_a_recommended_variant_the_gate_names_the_alternative_and_waives_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    def none(found: dict[str, Any]) -> None:
        found["recommended"] = {"variant": None, "sure": False, "instead": "few_shot", "why": "Use few-shot."}

    waiver = Waiver(check="better_than_baselines", reason="it must go out", expires=date(2999, 1, 1))
    report = promote(tmp_path, tiny_model, none, Params(waivers=[waiver]))
    assert [check.note for check in report.failures] == [
        "comparison recommends no variant: Use few-shot. To release one anyway, name it in release.variant"
    ]
    assert promote(tmp_path, tiny_model, none, Params(variant="lora")).failures == [], (
        "one that is named is judged by the figures alone"
    )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"variant": "dora"}, "params.yaml: release.variant: no variant 'dora'"),
        (
            {"waivers": [{"check": "better_than_baselines", "expires": "2999-01-01"}]},
            "release.waivers.0.reason: missing",
        ),
        (
            {"waivers": [{"check": "better", "reason": "x", "expires": "2999-01-01"}]},
            "release.waivers.0.check: Input should be ",
        ),
        (
            {"waivers": [{"check": "test_is_unseen", "reason": "x", "expires": "2020-01-01"}]},
            "test_is_unseen expired on 2020-01-01",
        ),
        (
            {"waivers": [{"check": "test_is_unseen", "reason": "x", "expires": "soon"}]},
            "release.waivers.0.expires: Invalid isoformat string",
        ),
        ({"max_forgetting": 2}, "release.max_forgetting: Input should be"),
    ],
)
def test_a_mistake_in_the_section_is_one_message(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    project(tmp_path, lambda values: values.update(release=section))
    with pytest.raises(InputError, match=message.replace("[", r"\[")) as refused:
        pipeline.validate(tmp_path)
    assert refused.value.hint


def test_an_unquoted_date_is_reported_before_dvc_fails(tmp_path: Path) -> None:
    project(tmp_path)
    waivers = "waivers: [{check: test_is_unseen, reason: x, expires: 2999-01-01}]"
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("max_forgetting: 0.05", waivers))
    with pytest.raises(InputError, match=r"release\.waivers\.0\.expires: DVC cannot parse YAML dates") as refused:
        pipeline.validate(tmp_path)
    assert refused.value.hint == 'quote the value: "2999-01-01"'


def project(folder: Path, change: Change = lambda values: None) -> None:
    """The parameters of the project and the files that they name."""
    shutil.copy(ROOT / "params.yaml", folder)
    for name in ("sources", "expectations", "keys"):
        shutil.copytree(ROOT / "data" / name, folder / "data" / name)
    edit_params(folder, change)
