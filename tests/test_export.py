"""Exports of a model are valid for the libraries that read them, match the lineage, and are deterministic."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from builders import small_pipeline
from builders.commands import exit_code
from conftest import ROOT, dvc, pedigree, tool
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard, ModelCardData

from dagster_project.core.errors import InputError
from dagster_project.lineage.export.export import export, summarize
from dagster_project.lineage.export.model_card import model_card
from dagster_project.lineage.export.registry import formats
from dagster_project.lineage.export.summary import from_reports, limits
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import audit, find

ISSUED = date(2026, 1, 31)
FORMATS = ["croissant", "cyclonedx", "datasheet", "eu-summary", "model-card", "openlineage", "spdx"]


def needed(form: str) -> None:
    """Skip the test where a format's library is not installed."""
    if form == "spdx":
        tool("spdx_python_model")


def reports_of(root: Path, names: list[str]) -> dict[str, Any]:
    return {name: json.loads((root / f"data/reports/{name.replace('@', '/')}.json").read_text()) for name in names}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_card_is_read_by_huggingface_hub_and_matches_the_reports(finished: Path) -> None:
    text = export(finished, "merged@lora", "model-card", issued=ISSUED)
    data = ModelCard(text).data
    assert ModelCardData(**data.to_dict()).to_dict() == data.to_dict()
    assert (data.license, data.library_name, data.tags) == ("apache-2.0", "transformers", ["lora", "pedigree"])
    report = reports_of(finished, ["evaluation@lora"])["evaluation@lora"]
    found = {
        result.metric_type: (result.metric_value, [result.metric_args["low"], result.metric_args["high"]])
        for result in data.eval_results
    }
    assert (
        found == {name: (report[name], report[f"{name}_interval"]) for name in report if f"{name}_interval" in report}
        and found
    )
    for path in ("triage_alpaca.json", "triage_messages.jsonl", "replies_messages.jsonl"):
        assert f"`{sha256(finished / 'data/sources' / path)}`" in text
    assert "pedigree verify merged@lora --deep" in text and "issued: 2026-01-31" in text
    assert ModelCard(export(finished, "adapter@lora", "model-card", issued=ISSUED)).data.library_name == "peft"


def test_a_stage_can_write_the_card_from_reports_alone(finished: Path) -> None:
    above = list(summarize(find(Index(finished), "merged@lora"))["stages"])
    reports = reports_of(finished, [*above, "baselines", "evaluation@lora", "comparison"])
    card = model_card(from_reports("merged@lora", reports))
    whole = export(finished, "merged@lora", "model-card", issued=ISSUED)
    assert ModelCard(card).data.to_dict() == ModelCard(whole).data.to_dict()
    assert not set(card.splitlines()) - set(whole.splitlines())
    assert "commit" not in card and "issued" not in card


def test_a_release_carries_its_card_and_the_record_that_its_export_names(finished: Path) -> None:
    folder = finished / "data" / "release"
    card, whole = (folder / "README.md").read_text(), export(finished, "release", "model-card", issued=ISSUED)
    assert ModelCard(card).data.to_dict() == ModelCard(whole).data.to_dict()
    assert {one.metric_type for one in ModelCard(card).data.eval_results} >= {
        "perplexity"
    } and "`reward_model`" not in card
    for path in ("triage_alpaca.json", "triage_messages.jsonl", "replies_messages.jsonl"):
        assert f"`{sha256(finished / 'data/sources' / path)}`" in card
    found = json.loads((folder / "audit" / "audit.json").read_text())
    assert list(found["stages"]) == [
        "base_model",
        "raw_examples",
        "instructions",
        "splits",
        "tokenized",
        "adapter@lora",
        "merged@lora",
    ]
    assert (folder / "audit/adapter_lora/training.json").read_bytes() == (
        finished / "data/adapter/lora/training.json"
    ).read_bytes()


def test_exports_of_an_aligned_model_name_its_preferences_and_the_inputs_of_every_run(finished: Path) -> None:
    source = "data/sources/preferences.jsonl"
    card = export(finished, "merged_aligned@dpo", "model-card", issued=ISSUED)
    assert f"| {source} |" in card
    divided = [line for line in card.splitlines() if line.startswith("Train ")]
    assert ["examples; " in line for line in divided] == [True, False] and "pairs; " in divided[1]
    assert f"source:{source}" in export(finished, "merged_aligned@dpo", "cyclonedx", issued=ISSUED)
    assert source not in export(finished, "merged@lora", "model-card", issued=ISSUED)
    events = [
        json.loads(line) for line in export(finished, "merged_aligned@dpo", "openlineage", issued=ISSUED).splitlines()
    ]
    read = {event["job"]["name"]: {one["name"] for one in event["inputs"]} for event in events}
    assert source in read["raw_preferences"] and source not in read["raw_examples"]


def test_a_reward_model_is_described_as_what_scores_answers_with_what_was_measured(finished: Path) -> None:
    report, source = reports_of(finished, ["reward_model"])["reward_model"], "data/sources/preferences.jsonl"
    text = export(finished, "reward_model", "model-card", issued=ISSUED)
    data = ModelCard(text).data
    assert (data.pipeline_tag, data.library_name) == ("text-classification", "transformers")
    [result] = data.eval_results
    assert (result.task_type, result.dataset_type, result.metric_type) == (
        "text-classification",
        "preferences",
        "accuracy",
    )
    assert [result.metric_value, result.metric_args["low"], result.metric_args["high"]] == [
        report["accuracy"],
        *report["accuracy_interval"],
    ]
    assert (
        f"{report['pairs']['test']} held-out pairs" in text
        and "not evaluated" not in text
        and "Tuning " not in text
        and f"| {source} |" in text
    )
    bill = json.loads(export(finished, "reward_model", "cyclonedx", issued=ISSUED))["metadata"]["component"][
        "modelCard"
    ]
    assert bill["modelParameters"]["task"] == "text-classification"
    assert [one["value"] for one in bill["quantitativeAnalysis"]["performanceMetrics"]] == [str(report["accuracy"])]


def test_a_release_is_described_by_its_own_training_in_whatever_order_the_adapters_are_listed() -> None:
    soup = {"environment": {}, "method": "cat", "merge_of": {"faq": 0.5, "triage": 0.5}}
    reports = {
        "adapter@soup": soup,
        **{f"adapter@{name}": {"environment": {}, "method": "lora"} for name in ("faq", "triage")},
    }
    for merged, library in ((True, "transformers"), (False, "peft")):
        summary = from_reports("release", {**reports, "merged@soup": {"merged": merged}}, "soup")
        assert summary["training"]["merge_of"] == soup["merge_of"]
        assert ModelCard(model_card(summary)).data.library_name == library, "a release may be an adapter, by a waiver"


@pytest.mark.parametrize(
    ("method", "library", "task"),
    [
        ("full", "transformers", "text-generation"),
        ("BitFit", "transformers", "text-generation"),
        ("dora", "peft", "text-generation"),
        ("feature_extraction", None, "text-classification"),
    ],
)
def test_a_card_names_the_library_that_loads_what_the_method_trained(
    method: str, library: str | None, task: str
) -> None:
    card = ModelCard(model_card(from_reports("adapter@x", {"adapter@x": {"method": method, "environment": {}}})))
    assert (card.data.library_name, card.data.pipeline_tag) == (library, task)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("data/tok", "it is data/tok, an output of tok"),
        ("data/tok/lineage.jsonl", "it lies in data/tok, an output of tok"),
        ("data/sources/g.txt", "it is data/sources/g.txt, which raw reads"),
        (".dvc/config", "it lies in .dvc, which is not for exports"),
        ("dvc.lock", "it is dvc.lock, which is not for exports"),
        ("params.yaml", "it is params.yaml"),
    ],
)
def test_an_export_does_not_replace_what_dvc_records(
    root: Path, out: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (root / out).read_bytes() if (root / out).is_file() else sorted((root / "data/tok").iterdir())
    assert exit_code("export", "tok", "--format", "openlineage", "--project", str(root), "--out", str(root / out)) == 2
    assert said in capsys.readouterr().err
    assert before == ((root / out).read_bytes() if (root / out).is_file() else sorted((root / "data/tok").iterdir()))
    assert (
        exit_code(
            "export",
            "tok",
            "--format",
            "openlineage",
            "--project",
            str(root),
            "--out",
            str(root / "docs/lineage.jsonl"),
        )
        == 0
    )
    assert capsys.readouterr().out == "", "the file has the text"


def test_hub_sources_are_linked_and_a_custom_license_is_named(finished: Path) -> None:
    reports = reports_of(finished, ["base_model", "raw_examples", "adapter@lora"])
    reports["base_model"] |= {"origin": f"org/base@{'0' * 40}", "license": "House rules 2"}
    reports["raw_examples"]["sources"]["org/set"] = {
        "rows": 1,
        "format": "messages",
        "license": "MIT",
        "sha256": "0",
        "hub": "org/set",
    }
    data = ModelCard(model_card(from_reports("adapter@lora", reports))).data
    assert (data.base_model, data.datasets, data.license, data.license_name) == (
        "org/base",
        ["org/set"],
        "other",
        "House rules 2",
    )
    assert data.eval_results is None and "It was not evaluated." in model_card(from_reports("adapter@lora", reports))


def test_a_bill_of_materials_is_valid_and_names_every_source_and_weight_by_its_hash(finished: Path) -> None:
    text = export(finished, "merged@lora", "cyclonedx", issued=ISSUED)
    assert JsonStrictValidator(SchemaVersion.V1_7).validate_str(text) is None
    document = json.loads(text)
    parts = {part["bom-ref"]: part for part in document["components"]}
    assert parts["base_model"]["hashes"][0]["content"] == sha256(finished / "data/base_model/model.safetensors")
    for name, part in parts.items():
        if name.startswith("source:"):
            assert part["hashes"][0]["content"] == sha256(finished / name.removeprefix("source:"))
            assert part["licenses"] == [{"license": {"id": "Apache-2.0"}}] and part["data"][0]["type"] == "dataset"
    card = document["metadata"]["component"]["modelCard"]
    assert {one["ref"] for one in card["modelParameters"]["datasets"]} < set(parts)
    assert {one["type"] for one in card["quantitativeAnalysis"]["performanceMetrics"]} >= {"perplexity", "rouge_l"}
    [dependencies] = [one["dependsOn"] for one in document["dependencies"] if one["ref"] == "model"]
    assert set(dependencies) == set(parts)


def test_every_stage_has_a_start_and_a_complete_event_with_its_inputs(finished: Path) -> None:
    events = [json.loads(line) for line in export(finished, "merged@lora", "openlineage", issued=ISSUED).splitlines()]
    stages = ["base_model", "raw_examples", "instructions", "splits", "tokenized", "adapter@lora", "merged@lora"]
    assert [(event["job"]["name"], event["eventType"]) for event in events] == [
        (name, kind) for name in stages for kind in ("START", "COMPLETE")
    ]
    made: dict[str, str] = {}
    for event in events[1::2]:
        for read in event["inputs"]:
            if not read["name"].startswith(
                ("data/sources", "data/expectations", "data/templates", "data/trainers", "data/rewards")
            ):
                assert read["facets"]["contentHash"]["md5"] == made[read["name"]]
        [out] = event["outputs"]
        made[out["name"]] = out["facets"]["contentHash"]["md5"]
        assert out["facets"]["contentHash"]["sha256"] and event["eventTime"] == "2026-01-31T00:00:00Z"
    assert len({event["run"]["runId"] for event in events}) == len(stages)


@pytest.mark.parametrize("form", FORMATS)
def test_exports_are_deterministic_and_only_their_date_is_an_argument(finished: Path, form: str) -> None:
    needed(form)
    with pytest.raises(InputError, match="not committed"):
        export(finished, "merged@lora", form)
    small_pipeline.git(finished, "add", "-A")
    small_pipeline.git(finished, "commit", "-qm", "made", "--date=2020-02-02T00:00:00Z")
    committed = small_pipeline.git(finished, "log", "-1", "--format=%cs").strip()
    text = export(finished, "merged@lora", form)
    assert (
        text
        == export(finished, "merged@lora", form, rev="HEAD")
        == export(finished, "merged@lora", form, issued=date.fromisoformat(committed))
    )
    other = export(finished, "merged@lora", form, issued=ISSUED)
    assert other != text and str(finished) not in text
    if form == "model-card":
        assert other.replace("2026-01-31", committed) == text


def test_every_format_is_documented() -> None:
    text = (ROOT / "docs" / "exports.md").read_text()
    assert FORMATS == formats() == sorted(re.findall(r"(?m)^\| `([a-z-]+)` \|", text))


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"perplexity": 4.2, "n": 120}, ": perplexity on all of them, scores on 120 answers"),
        ({"perplexity": 4.2}, ": perplexity on all of them"),
        ({"n": 152}, ": scores on 152 answers"),
        ({"perplexity": None, "n": 152}, ": scores on 152 answers"),  # a likelihood was not finite
        ({}, ""),
    ],
)
def test_limits_say_on_how_much_each_measure_rests(figures: dict[str, Any], words: str) -> None:
    summary = {
        "metrics": {"evaluation@lora": {"test_examples": 152, **figures}},
        "untuned": {},
        "stages": {},
        "licenses": {"problems": []},
    }
    assert (
        limits(summary)[0]
        == f"Measured on 152 test examples from the same sources as the training data{words}. On other data: unknown."
    )


def test_the_card_of_an_aligned_model_states_the_training_before_it() -> None:
    sft = {"method": "lora", "steps": 384, "tokens": 89058, "environment": {}}
    reports = {
        "base_model": {"origin": "models/tiny", "sha256": {}},
        "adapter@lora": sft,
        "merged@lora": {},
        "aligned@dpo": {"method": "dpo", "adapter": "lora", "steps": 27, "tokens": 42293, "environment": {}},
    }
    card = model_card(from_reports("merged_aligned@dpo", reports))
    assert "- steps: 27\n- tokens: 42,293\n- started from: adapter@lora, whose training is not counted here:" in card
    assert "method lora, steps 384, tokens 89,058\n" in card
    supervised = {name: reports[name] for name in ("base_model", "adapter@lora")}
    assert "started from" not in model_card(from_reports("merged@lora", supervised))


def test_examples_without_a_category_are_not_the_weakest_one() -> None:
    figures = {"(none)": 0.25, "(others)": 0.1, "login": 0.5, "bug": 0.75}
    for named, said in ((("login", "bug"), ["Weakest category: login, accuracy 0.500 on 4 answers."]), ((), [])):
        groups = {name: {"accuracy": figures[name], "answered": 4} for name in ("(none)", "(others)", *named)}
        summary = {
            "metrics": {"evaluation@lora": {"by_category": groups}},
            "untuned": {},
            "stages": {},
            "licenses": {"problems": []},
        }
        assert [line for line in limits(summary) if "category" in line] == said


def test_checks_of_its_evaluation_that_did_not_pass_are_limits_of_a_model() -> None:
    passed = {"passed": True, "severity": "error", "count": 0}
    seen = {"passed": False, "severity": "error", "count": 2, "note": "2 test examples were trained on"}
    reports = {
        "base_model": {"origin": "models/tiny", "sha256": {}},
        "merged@lora": {"checks": {"equal_logits": passed}},
        "evaluation@lora": {"test_examples": 9, "checks": {"test_is_unseen": seen, "answers_differ": passed}},
    }
    summary = from_reports("merged@lora", reports)
    assert [line for line in limits(summary) if line.startswith("Check ")] == [
        "Check that did not pass: test_is_unseen (evaluation@lora): 2 test examples were trained on"
    ]
    assert "1 of 1 checks passed, and 1 of 2 of its evaluation." in model_card(summary)
    reports["evaluation@lora"]["checks"] = {"test_is_unseen": passed}
    assert "\n1 of 1 checks passed.\n" in model_card(from_reports("merged@lora", reports))


@pytest.mark.usefixtures("warm_small")
def test_a_stage_that_is_not_a_model_has_no_card(finished: Path) -> None:
    done = pedigree(finished, "export", "splits", "--format", "model-card", "--issued", "2026-01-31")
    assert (
        done.returncode == 2
        and "splits is not a model" in done.stderr
        and "model-card cannot describe it" in done.stderr
    )
    assert "or use --format with one of croissant, datasheet, openlineage" in done.stderr
    done = pedigree(finished, "export", "splits", "--all", "all", "--issued", "2026-01-31")
    assert done.returncode == 2 and "--all needs a model" in done.stderr and not (finished / "all").exists()
    done = pedigree(
        finished,
        "export",
        "merged@lora",
        "--format",
        "cyclonedx",
        "--issued",
        "2026-01-31",
        "--out",
        "bom.json",
        "--json",
    )
    assert done.returncode == 0 and json.loads(done.stdout)["text"] == (finished / "bom.json").read_text()


@pytest.mark.long
@pytest.mark.usefixtures("warm_small")
def test_exports_state_what_the_models_own_lock_records_also_after_the_data_ran_again(finished: Path) -> None:
    needed("spdx")
    small_pipeline.commit(finished, "made")
    assert audit(finished, "merged@lora")["code"]["clean"]
    before = {form: export(finished, "adapter@lora", form) for form in formats()}
    file = finished / "data/sources/triage_alpaca.json"
    old = sha256(file)
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([{**row, "input": f"{row['input']} Thanks."} for row in rows]))
    done = dvc(finished, "repro", "tokenized")
    assert done.returncode == 0, done.stderr
    after = {form: export(finished, "adapter@lora", form, issued=ISSUED) for form in formats()}
    assert all(old in text and sha256(file) not in text for text in after.values())
    small_pipeline.commit(finished, "other data")
    assert {form: export(finished, "adapter@lora", form) for form in formats()} == before
    events = [json.loads(line) for line in before["openlineage"].splitlines()]
    tags = {
        event["job"]["name"]: {tag["key"]: tag["value"] for tag in event["run"]["facets"]["tags"]["tags"]}
        for event in events
    }
    commit = small_pipeline.git(finished, "rev-parse", "HEAD~1").strip()
    assert {tag["commit"] for tag in tags.values()} == {commit} and {tag["clean"] for tag in tags.values()} == {"True"}
