"""Croissant, SPDX, the formulation in CycloneDX, the public summary of training content and the datasheet: other
libraries read them, every number is that of the files, and what nobody recorded stays unknown."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import small_pipeline
from builders.files import contents, flip
from builders.history import Project, entry, out
from builders.keys import write_keys
from conftest import edit_params, tool

from dagster_project.__main__ import main
from dagster_project.commands.sign import sign
from dagster_project.commands.verify_signatures import verify_signatures
from dagster_project.core.errors import InputError
from dagster_project.curation.sources.declarations import NAMES, Declared, declared_sources
from dagster_project.lineage.export import eu_summary as eu_summary_module
from dagster_project.lineage.export.answers import training_records, uses_category
from dagster_project.lineage.export.croissant import croissant
from dagster_project.lineage.export.cyclonedx import cyclonedx
from dagster_project.lineage.export.data_sets import data_sets
from dagster_project.lineage.export.datasheet import SECTIONS, datasheet
from dagster_project.lineage.export.eu_summary import eu_summary
from dagster_project.lineage.export.export import export, summarize
from dagster_project.lineage.export.openlineage import openlineage
from dagster_project.lineage.export.registry import formats
from dagster_project.lineage.export.spdx import spdx
from dagster_project.lineage.export.summary import from_reports
from dagster_project.lineage.history import Objects
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import find
from dagster_project.lineage.provider import Provider, provider
from dagster_project.lineage.runs import part_of
from dagster_project.orchestration import dvc

ISSUED = date(2026, 1, 31)
MODEL = "merged_aligned@dpo"
SPLITS = ("train", "validation", "test")
SOURCES = ["triage_alpaca.json", "triage_messages.jsonl", "replies_messages.jsonl", "preferences.jsonl"]


def summary_of(root: Path, address: str) -> dict[str, Any]:
    """What formats receive, without a provider."""
    subject = find(Index(root), address)
    return summarize(subject) | {"data_sets": data_sets(subject), "provider": {}}


def rows(root: Path, pattern: str) -> list[dict[str, Any]]:
    """Rows of tables, read with pyarrow."""
    return [row for path in sorted((root / "data").glob(pattern)) for row in pq.read_table(path).to_pylist()]


def tables(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Table as Croissant names it -> its rows."""
    found = {"instructions-records": rows(root, "instructions/records-*.parquet")}
    found |= {
        f"{stage}-{split}": rows(root, f"{stage}/{split}/*.parquet")
        for stage in ("splits", "preferences")
        for split in SPLITS
    }
    return found | {
        f"{stage}-ledger": rows(root, f"{stage}/ledger.parquet") for stage in ("instructions", "splits", "preferences")
    }


def read(folder: Path, text: str) -> tuple[Any, dict[str, list[dict[str, Any]]]]:
    """The document and its tables as mlcroissant reads them."""
    mlcroissant = tool("mlcroissant")
    (folder / "croissant.json").write_text(text)
    document = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
    return document, {
        one.id: [plain(row, one.id) for row in document.records(one.id)] for one in document.metadata.record_sets
    }


def plain(value: Any, table: str) -> Any:
    """A value that mlcroissant read, with text as str and columns by their own names."""
    if isinstance(value, dict):
        return {key.split("/")[-1]: plain(one, table) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one, table) for one in value]
    return value.decode() if isinstance(value, bytes) else value


# --- Croissant


def test_croissant_is_valid_and_gives_the_rows_of_the_files(finished: Path) -> None:
    document, found = read(finished, export(finished, MODEL, "croissant", issued=ISSUED))
    assert not document.metadata.ctx.issues.errors and document.metadata.ctx.is_v1_1()
    assert set(found) == set(tables(finished))
    for name, expected in tables(finished).items():
        assert expected and found[name] == expected, name


def test_each_record_of_croissant_leads_to_the_row_of_its_source(finished: Path) -> None:
    _, found = read(finished, export(finished, "splits", "croissant", issued=ISSUED))
    assert {name.partition("-")[0] for name in found} == {"instructions", "splits"}
    record = {one["example_id"]: one for split in SPLITS for one in found[f"splits-{split}"]}
    lines = {
        name: [json.loads(line) for line in (finished / "data/sources" / name).read_text().splitlines()]
        for name in SOURCES[1:3]
    }
    checked = 0
    for row in found["splits-ledger"]:
        name = Path(row["source"]).name
        if name in lines:
            origin = lines[name][row["source_row"]]["messages"]
            assert [one["content"] for one in record[row["example_id"]]["messages"]] == [
                one["content"] for one in origin
            ]
            checked += 1
    assert checked == 80


def test_croissant_states_counts_hashes_and_responsible_use_from_the_files(finished: Path) -> None:
    document, _ = read(finished, export(finished, MODEL, "croissant", issued=ISSUED))
    written = json.loads((finished / "croissant.json").read_text())
    counts = {one["@id"]: one["annotation"]["value"] for one in written["recordSet"]}
    assert counts == {name: len(found) for name, found in tables(finished).items()}
    metadata = document.metadata
    for name in SOURCES:
        digest = hashlib.sha256((finished / "data/sources" / name).read_bytes()).hexdigest()
        read_rows = Counter(row["source"] for row in rows(finished, "raw_*/ledger.parquet"))[f"data/sources/{name}"]
        assert re.search(
            rf"data/sources/{re.escape(name)}: {read_rows} rows, layout \w+, sha256 {digest}",
            metadata.data_collection_raw_data,
        )
    assert metadata.data_collection_type == [f"data/sources/{name}: unknown" for name in SOURCES]
    assert metadata.data_biases == ["unknown: biases were not measured"] and metadata.data_collection_timeframe is None
    assert metadata.creators[0].name == "unknown"
    assert f"splits, train: {len(tables(finished)['splits-train'])} records for training" in metadata.data_use_cases


def test_mlcroissant_refuses_a_table_that_was_changed_since(finished: Path) -> None:
    read(finished, export(finished, "splits", "croissant", issued=ISSUED))
    shard = finished / "data/splits/test/records-00000.parquet"
    shard.chmod(0o644)
    pq.write_table(pq.read_table(shard).slice(1), shard)
    with pytest.raises(Exception, match=r"Download\(data/splits/test") as error:
        list(tool("mlcroissant").Dataset(jsonld=str(finished / "croissant.json")).records("splits-test"))
    assert "not identical" in str(error.value.__cause__)


def test_a_table_of_several_files_is_read_whole(tmp_path: Path) -> None:
    names = [f"train/records-{number:05d}.parquet" for number in range(3)]
    for number, name in enumerate(names):
        path = tmp_path / "data/splits" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.table({"example_id": [f"{number}{row}" for row in range(4)], "repaired": [["pii", "encoding"]] * 4}),
            path,
        )
    columns = {"example_id": "text", "repaired": "text[]"}
    found = {
        "path": "data/splits",
        "md5": "0.dir",
        "profile": {},
        "tables": {"train": {"files": dict.fromkeys(names, "0" * 32), "columns": columns, "rows": 12}},
    }
    summary = {
        "model": {"stage": "splits"},
        "sources": {},
        "stages": {},
        "checks": {},
        "provider": {},
        "data_sets": {"splits": found},
    }
    _, read_rows = read(tmp_path, croissant(summary, ISSUED))
    assert [row["example_id"] for row in read_rows["splits-train"]] == [
        f"{number}{row}" for number in range(3) for row in range(4)
    ]
    assert read_rows["splits-train"][0]["repaired"] == ["pii", "encoding"]


@pytest.mark.parametrize("form", ["croissant", "datasheet"])
def test_a_stage_without_checked_records_is_refused_with_a_next_step(finished: Path, form: str) -> None:
    with pytest.raises(InputError, match="base_model was made from no checked data set") as error:
        export(finished, "base_model", form, issued=ISSUED)
    assert error.value.hint.startswith("name instructions")


def test_a_data_set_that_is_gone_is_refused_with_the_command_that_fetches_it(finished: Path) -> None:
    shutil.rmtree(finished / "data/splits")
    shutil.rmtree(finished / ".dvc/cache")
    shutil.rmtree(finished / ".dvc/tmp", ignore_errors=True)
    with pytest.raises(InputError, match=r"data/splits .* is not available") as error:
        export(finished, "splits", "croissant", issued=ISSUED)
    assert "dvc pull splits" in error.value.hint


# --- SPDX


def elements(text: str) -> tuple[Any, dict[str, list[Any]]]:
    """The library's types for the version of a document, and its elements by type, read by the library."""
    model, objects = tool("spdx_python_model").load_data(json.loads(text))
    assert not objects.link(), "references to elements that are not in the document"
    found: dict[str, list[Any]] = {}
    for one in objects.foreach():
        found.setdefault(type(one).__name__, []).append(one)
    return model, found


def targets(found: dict[str, list[Any]], kind: str) -> dict[str, list[Any]]:
    """Id of an element -> what its relationships of a type point to."""
    links: dict[str, list[Any]] = {}
    for one in found["Relationship"]:
        if one.relationshipType.endswith(f"/{kind}"):
            links.setdefault(one.from_._id, []).extend(one.to)
    return links


def test_spdx_is_read_by_its_library_and_names_every_source_with_hash_and_license(finished: Path) -> None:
    tool("spdx_python_model")
    _, found = elements(export(finished, MODEL, "spdx", issued=ISSUED))
    data = {one.name: one for one in found["dataset_DatasetPackage"]}
    sizes = {
        name: len(json.loads(text)) if name.endswith(".json") else len(text.splitlines())
        for name in SOURCES
        for text in [(finished / "data/sources" / name).read_text()]
    }
    declared = targets(found, "hasDeclaredLicense")
    for name in SOURCES:
        package = data[f"data/sources/{name}"]
        assert package.dataset_datasetSize == min(sizes[name], 140 if name == "preferences.jsonl" else 40)
        [digest] = package.verifiedUsing
        assert digest.hashValue == hashlib.sha256((finished / "data/sources" / name).read_bytes()).hexdigest()
        assert [one.simplelicensing_licenseExpression for one in declared[package._id]] == ["Apache-2.0"]
    assert data["splits"].dataset_datasetSize == sum(len(tables(finished)[f"splits-{split}"]) for split in SPLITS)
    [model] = [one for one in found["ai_AIPackage"] if one.name == MODEL]
    trained = {one.name for one in targets(found, "trainedOn")[model._id]}
    assert trained == {"splits", "preferences"}


def test_spdx_has_what_its_ai_and_dataset_profiles_require(finished: Path) -> None:
    tool("spdx_python_model")
    _, found = elements(export(finished, MODEL, "spdx", issued=ISSUED))
    [document] = found["SpdxDocument"]
    assert {one.rpartition("/")[2] for one in document.profileConformance} >= {"core", "software", "ai", "dataset"}
    required = {
        "ai_AIPackage": (
            "suppliedBy",
            "software_downloadLocation",
            "software_packageVersion",
            "software_primaryPurpose",
            "releaseTime",
        ),
        "dataset_DatasetPackage": (
            "builtTime",
            "originatedBy",
            "releaseTime",
            "software_downloadLocation",
            "software_primaryPurpose",
            "dataset_datasetType",
        ),
    }
    for kind, names in required.items():
        assert len(found[kind]) >= 2
        for package in found[kind]:
            assert all(getattr(package, name) for name in names), package.name
            for link in ("hasDeclaredLicense", "hasConcludedLicense"):
                assert len(targets(found, link)[package._id]) == 1
    assert set(map(id, document.element)) >= {id(one) for kind in required for one in found[kind]}


def test_spdx_asserts_nothing_that_nobody_stated(finished: Path) -> None:
    summary = summary_of(finished, MODEL)
    first = next(iter(summary["sources"]))
    summary["sources"][first] = {**summary["sources"][first], "license": "unknown"}
    second = list(summary["sources"])[1]
    summary["sources"][second] = {**summary["sources"][second], "license": "House rules 2"}
    tool("spdx_python_model")
    _, found = elements(spdx(summary, ISSUED))
    by_name = {one.name: one._id for one in found["dataset_DatasetPackage"]}
    declared = targets(found, "hasDeclaredLicense")
    assert [str(one) for one in declared[by_name[first]]] == [
        "https://spdx.org/rdf/3.0.1/terms/ExpandedLicensing/NoAssertionLicense"
    ]
    assert [one.simplelicensing_licenseExpression for one in declared[by_name[second]]] == ["LicenseRef-House-rules-2"]
    assert {str(one) for to in targets(found, "hasConcludedLicense").values() for one in to} == {
        "https://spdx.org/rdf/3.0.1/terms/ExpandedLicensing/NoAssertionLicense"
    }
    [model] = [one for one in found["ai_AIPackage"] if one.name == MODEL]
    assert model.suppliedBy.name == "unknown" and model.software_downloadLocation.endswith("NoAssertionElement")
    assert "provider.legal_name" in model.suppliedBy.comment and "provider.download_url" in model.comment
    assert all(
        one.dataset_hasSensitivePersonalInformation.endswith("noAssertion") for one in found["dataset_DatasetPackage"]
    )


def test_without_its_library_spdx_is_one_message_that_names_the_extra(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "spdx_python_model", None)
    assert main(["export", MODEL, "--format", "spdx", "--issued", "2026-01-31", "--project", str(finished)]) == 2
    error = capsys.readouterr().err
    assert "requires spdx_python_model" in error and "pedigree-llm[trust]" in error and "Traceback" not in error


# --- CycloneDX


def test_the_formulation_has_a_task_for_each_stage_and_citations_point_to_components(finished: Path) -> None:
    document = json.loads(export(finished, MODEL, "cyclonedx", issued=ISSUED))
    [workflow] = document["formulation"][0]["workflows"]
    lock = (finished / "dvc.lock").read_text()
    for task in workflow["tasks"]:
        assert f"cmd: {task['steps'][0]['commands'][0]['executed']}\n" in lock and task["uid"] in lock
    assert len(workflow["tasks"]) == len(summarize(find(Index(finished), MODEL))["stages"])
    refs = (
        {"model"}
        | {part["bom-ref"] for part in document["components"]}
        | {task["bom-ref"] for task in workflow["tasks"]}
    )
    named = re.findall(r'"(?:ref|process)": "([^"]+)"', json.dumps([document["formulation"], document["citations"]]))
    assert set(named) <= refs and len(named) > 20
    parts = {}
    for citation in document["citations"]:
        [pointer] = citation["pointers"]
        place: Any = document
        for step in pointer.split("/")[1:]:
            place = place[int(step)] if isinstance(place, list) else place[step]
        parts[citation["process"]] = place
    assert parts["task:splits"]["name"] == "splits" and parts["task:base_model"]["bom-ref"] == "base_model"


def test_parts_of_outputs_and_folders_of_outputs_lead_to_the_stages_that_made_them(tmp_path: Path) -> None:
    project = Project(tmp_path)
    lock = project.trained(project.curated([("cats", "train", "data/sources/faq.jsonl")]), ["cats"])
    lock |= project.splits([("mice", "train", "data/sources/pairs.jsonl")], "preferences")
    lock["preferences"]["deps"].append(
        {"path": "data/splits", "hash": "md5", "md5": out(lock, "splits")}
    )  # compared with alone
    train = part_of(Objects(tmp_path).listing(out(lock, "splits")) or {}, "train") or ""
    reads = {
        "data/splits/train": train,
        "data/merged/lora": out(lock, "merged@lora"),
        "data/preferences": out(lock, "preferences"),
    }
    for name, settings in (("grpo", {"method": "grpo", "reward_target": "response"}), ("dpo", {"method": "dpo"})):
        lock[f"aligned@{name}"] = entry(
            f"aligned@{name}", reads, project.put({"adapter_model.safetensors": name.encode()})
        )
        lock[f"aligned@{name}"]["params"] = {"params.yaml": {f"aligned.{name}": {"adapter": "lora", **settings}}}
    released = {"data/merged": project.folder({"lora": out(lock, "merged@lora")})}
    lock["release"] = entry(
        "release",
        released,
        project.put({"README.md": b"card", "model.safetensors": out(lock, "adapter@lora").encode()}),
    )
    project.commit(lock)
    expected = {
        "aligned@grpo": {"merged@lora", "splits"},
        "aligned@dpo": {"merged@lora", "preferences"},
        "release": {"merged@lora"},
    }
    for name, parents in expected.items():
        summary = summarize(find(Index(tmp_path), name)) | {"provider": {}, "data_sets": {}}
        [workflow] = json.loads(cyclonedx(summary, ISSUED))["formulation"][0]["workflows"]
        [depends] = [one["dependsOn"] for one in workflow["taskDependencies"] if one["ref"] == f"task:{name}"]
        assert set(depends) == {f"task:{one}" for one in parents}
        outputs = {f"data/{one.replace('@', '/')}" for one in parents}
        events = [json.loads(line) for line in openlineage(summary, ISSUED).splitlines()]
        assert all(
            outputs <= {one["name"] for one in event["inputs"]} for event in events if event["job"]["name"] == name
        )
        assert summary["stages"].get("preferences", {}).get("made_from", []) == []


def test_counts_of_rows_include_augmented_copies(finished: Path) -> None:
    tool("spdx_python_model")
    summary = summarize(find(Index(finished), MODEL)) | {"provider": {}, "data_sets": {}}
    splits = summary["stages"]["splits"]
    summary["stages"]["splits"] = splits | {"augmented": {"typos": 3, "paraphrase": 1}}
    rows = splits["rows_out"] + 4
    events = [json.loads(line) for line in openlineage(summary, ISSUED).splitlines()]
    (output,) = [one for event in events if event["job"]["name"] == "splits" for one in event["outputs"]]
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == rows
    (data,) = [one for one in elements(spdx(summary, ISSUED))[1]["dataset_DatasetPackage"] if one.name == "splits"]
    assert data.dataset_datasetSize == rows


# --- public summary and datasheet

TEMPLATE = [
    "1. General information", "1.1. Provider identification", "1.2. Model identification",
    "1.3. Modalities, overall training data size and other characteristics", "2. List of data sources",
    "2.1. Publicly available datasets", "2.2. Private non-publicly available datasets obtained from third parties",
    "2.2.1. Datasets commercially licensed by rightsholders or their representatives",
    "2.2.2. Private datasets obtained from other third parties", "2.3. Data crawled and scraped from online sources",
    "2.4. User data", "2.5. Synthetic data", "2.6. Other sources of data", "3. Data processing aspects",
    "3.1. Respect of reservation of rights from text and data mining exception or limitation",
    "3.2. Removal of illegal content", "3.3. Other information (optional)",
]  # fmt: skip
"""Headings of the Commission's template, in its order."""


def test_the_summary_has_the_headings_of_the_template_and_the_numbers_of_the_files(finished: Path) -> None:
    text = export(finished, "merged@lora", "eu-summary", issued=ISSUED)
    assert re.findall(r"(?m)^#{2,4} (.+)$", text) == TEMPLATE
    tokens = sum(
        sum(lengths) for lengths in pq.read_table(finished / "data/tokenized/train.parquet")["lengths"].to_pylist()
    )
    train = tables(finished)["splits-train"]
    assert (
        f"| text | less than 1 billion tokens; splits: {len(train)} training records; tokenized: {len(train)} examples"
        f" with {tokens:,} tokens" in text
    )
    counted = Counter(row["source"] for row in train)
    for name in SOURCES[:3]:
        assert f"| data/sources/{name} | 40 | {counted[f'data/sources/{name}']} | Apache-2.0 |" in text
    used = pq.read_table(finished / "data/adapter/lora/examples.parquet")["example_id"].to_pylist()
    assert f"adapter@lora: {len(set(used))} records, {len(used)} times" in text
    assert "preferences" not in text and f"Latin {len(tables(finished)['instructions-records'])} records" in text


def test_nothing_is_answered_that_nobody_declared(finished: Path) -> None:
    text = export(finished, "merged@lora", "eu-summary", issued=ISSUED)
    answers = re.findall(r"(?m)^- \*\*(.+?):\*\* (.+)$", text)
    assert not [answer for _, answer in answers if answer.startswith(("yes", "no"))]
    keys = set(re.findall(r"`provider\.(\w+)` in params", text))
    assert keys == set(Provider.model_fields) - {"download_url", "crawlers", "user_services"}
    assert text.count("*missing*: `category`") == 7 and "*missing*: `collected`" in text


def declare(facts: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**facts, **Declared(**values).given}


def test_declarations_answer_the_questions_about_sources(finished: Path) -> None:
    summary = summary_of(finished, "merged@lora")
    first, second, third = summary["sources"]
    sources = summary["sources"]
    sources[first] = declare(sources[first], category="public", collected={"from": "2024-01-01", "to": "2024-06-30"})
    sources[second] = declare(sources[second], category="user", collected={"to": "2025-02-03"})
    partly = eu_summary(summary, ISSUED)
    assert (
        f"*missing*: `category` of {third}" in partly and f"yes: {first} (*missing*: `category` of {third})" in partly
    )
    sources[third] = declare(
        sources[third], category="licensed", generator="Model 9", collected={"from": "2024-02-02", "to": "2024-03-03"}
    )
    whole = eu_summary(summary, ISSUED)
    answers = dict(re.findall(r"(?m)^#{3,4} (2\.\S+) .*\n\n- \*\*Used:\*\* (.+)$", whole))
    assert answers == {
        "2.1.": f"yes: {first}",
        "2.2.1.": f"yes: {third}",
        "2.2.2.": "no",
        "2.3.": "no",
        "2.4.": f"yes: {second}",
        "2.5.": f"yes: {third}",
        "2.6.": "no",
    }
    assert (
        "**Latest date of data acquisition/collection for model training:** 2025-02-03\n" in whole
        and f"Model 9 for {third}" in whole
    )
    assert (
        f"({sources[second]['rows']} rows, collected *missing* to 2025-02-03)" in whole
        and "`provider.user_services`" in whole
    )
    assert "`provider.crawlers`" not in whole


@pytest.mark.parametrize(
    "sampled, count", [({"sampled": {"answers": 256}}, "256"), ({}, "*missing*")], ids=["counted", "not counted"]
)
def test_a_model_that_learned_from_its_own_answers_used_synthetic_data(
    finished: Path, sampled: dict[str, Any], count: str
) -> None:
    reports = {
        name: json.loads((finished / f"data/reports/{name}.json").read_text())
        for name in ("base_model", "raw_examples")
    }
    for source in reports["raw_examples"]["sources"].values():
        source["category"] = "user"

    def synthetic(method: str) -> str:
        aligned = {"method": method, "output_sha256": "0" * 64, **sampled}
        known = from_reports("aligned@it", reports | {"aligned@it": aligned})
        text = eu_summary(
            summary_of(finished, "merged@lora")
            | {key: known[key] for key in ("sources", "own_answers") if key in known},
            ISSUED,
        )
        return text[text.index("### 2.5") : text.index("### 2.6")]

    online, offline = synthetic("rloo"), synthetic("dpo")
    assert (
        "- **Used:** yes" in online
        and f"aligned@it (rloo) learned from {count} answers that it wrote during training" in online
    )
    assert "**Used:** yes" not in offline and "learned from" not in offline
    assert (f"aligned@it (gkd) learned from {count} answers" in synthetic("gkd")) == bool(sampled), (
        "a distillation samples, or does not"
    )


@pytest.mark.parametrize(
    "declared, used",
    [
        ([{"category": "synthetic"}, {}], "yes: s0 (*missing*: `category` of s1)"),
        ([{"category": "synthetic"}, {"category": "user"}], "yes: s0"),
        ([{}, {"category": "user"}], "yes (*missing*: `category` of s0)"),
        ([{"category": "user"}, {"category": "user"}], "yes"),
    ],
    ids=["one of two declared", "all declared", "one not declared", "none synthetic"],
)
def test_own_answers_hide_nothing_that_is_said_of_sources(declared: list[dict[str, Any]], used: str) -> None:
    sources = {f"s{i}": declare({"rows": 1, "sha256": "0" * 64}, **given) for i, given in enumerate(declared)}
    online = [{"training": "aligned@it", "method": "rloo", "answers": 8}]
    summary = {"sources": sources, "provider": {}, "outcomes": {}, "own_answers": online}
    text = "\n".join(eu_summary_module._sources(summary))
    section = text[text.index("### 2.5") : text.index("### 2.6")]
    assert f"- **Used:** {used}\n" in section and "learned from 8 answers" in section


def test_labels_that_examples_and_pairs_share_are_added_up() -> None:
    counted = {"instructions": {"refund": 5, "(none)": 1}, "preferences": {"refund": 2, "other": 1}}
    summary = {
        "sources": {"a": {"format": "messages"}},
        "data_sets": {name: {"profile": {"categories": found}} for name, found in counted.items()},
    }
    assert eu_summary_module._content(summary).endswith(
        "; labels of all checked records, those of test splits included: refund 7, other 1"
    )


def test_a_category_is_denied_only_if_every_source_declares_another() -> None:
    assert uses_category({}, "public")[0].startswith("*missing*")
    assert uses_category({"a": declare({}, category="user")}, "public")[0] == "no"
    assert uses_category({"a": declare({}, category="user"), "b": {}}, "public")[0] == "*missing*: `category` of b"
    assert uses_category({"a": {"format": "paraphrases"}}, "synthetic")[0] == "*missing*: `category` of a"
    many = {f"s{number}": {} for number in range(10)}
    assert uses_category(many, "public")[0] == "*missing*: `category` of s0, s1, s2 and 7 more"


def test_augmented_copies_count_for_the_source_of_their_prompt_and_for_the_file_of_paraphrases() -> None:
    outcomes = {
        "a": {"splits": {"train": 5, "test": 2, "augmented:typos": 3, "augmented:paraphrase": 1}},
        "b": {"preferences": {"train": 4}},
        "p": {},
    }
    summary = {
        "outcomes": outcomes,
        "sources": {"a": {"format": "messages"}, "b": {"format": "pairs"}, "p": {"format": "paraphrases"}},
    }
    assert training_records(summary) == {"a": 9, "b": 4, "p": 1}


def test_the_datasheet_answers_every_question_once_and_counts_the_files(finished: Path) -> None:
    text = export(finished, MODEL, "datasheet", issued=ISSUED)
    found = re.findall(r"(?m)^\*\*(.+)\*\*$", text)
    assert (
        found == [question for questions in SECTIONS.values() for question in questions]
        and len(found) == len(set(found)) > 45
    )
    answers = [part.partition("**\n\n")[2].strip() for part in re.split(r"(?m)^\*\*(?=[A-Z])", text)[1:]]
    assert all(answers) and len([one for one in answers if one.startswith("*missing*")]) >= 20
    for name, expected in tables(finished).items():
        stage, _, table = name.partition("-")
        if table != "ledger":
            assert f"| {stage} | {table} | {len(expected)} |" in text
    assert "no check looks for it" in text and "raw_examples.limit is 40" in text.replace("\\", "")


def test_texts_of_people_are_text_in_markdown() -> None:
    hostile = "<script>alert(1)</script> [x](http://x.y) | `a`"
    summary = {
        "model": {"stage": "splits", "md5": "0.dir"},
        "sources": {f"data/{hostile}": {"rows": 1, "format": "messages", "sha256": "0", "license": hostile}},
        "stages": {},
        "checks": {},
        "parameters": {},
        "training": {},
        "records": None,
        "code": {"commit": None},
        "metrics": {},
        "base_model": {"origin": hostile},
        "provider": {"legal_name": hostile},
        "outcomes": {},
        "licenses": {"listed": [], "problems": []},
        "data_sets": {
            "splits": {
                "path": "data/splits",
                "md5": "0",
                "tables": {},
                "profile": {"scripts": {hostile: 1}, "categories": {hostile: 1}},
            }
        },
    }
    for text in (eu_summary(summary, ISSUED), datasheet(summary, ISSUED)):
        assert "alert" in text and not re.search(r"(?<!\\)(<script|\]\(|`a)", text)


# --- provider


def definitions(root: Path) -> dict[str, Any]:
    """Stage -> the command and parameters that DVC compares with what ran."""
    return {name: state.definition_now for name, state in dvc.read_stages(root).items()}


def test_the_provider_is_printed_and_makes_nothing_stale(finished: Path) -> None:
    before = definitions(finished)
    given = {
        "legal_name": "Larkfield Ltd",
        "contact": "models@larkfield.example",
        "placed_on_market": "2026-09-01",
        "code_of_practice": False,
    }
    edit_params(finished, lambda values: values.update(provider=given))
    assert definitions(finished) == before
    text = export(finished, "merged@lora", "eu-summary", issued=ISSUED)
    assert "**Provider name:** Larkfield Ltd" in text and "Code of Practice for general-purpose AI models:** no" in text
    assert "Union market:** 2026-09-01" in text and "`provider.representative`" in text
    assert "Larkfield Ltd" in export(finished, "merged@lora", "croissant", issued=ISSUED)
    assert "Larkfield Ltd" in export(finished, "splits", "datasheet", issued=ISSUED)
    edit_params(finished, lambda values: values["splits"].update(test=0.3))
    assert definitions(finished)["splits"] != before["splits"], "otherwise the comparison above shows nothing"


def test_the_provider_of_a_revision_is_that_of_its_params(finished: Path) -> None:
    edit_params(finished, lambda values: values.update(provider={"legal_name": "Then Ltd"}))
    small_pipeline.commit(finished, "made")
    edit_params(finished, lambda values: values.update(provider={"legal_name": "Now Ltd"}))
    assert provider(finished, None) == {"legal_name": "Now Ltd"} and provider(finished, "HEAD") == {
        "legal_name": "Then Ltd"
    }
    (finished / "params.yaml").write_text("? [{a: 1}]\n: 2\n")  # ruamel.yaml raises a TypeError
    small_pipeline.commit(finished, "broken")
    with pytest.raises(InputError, match=r"^params\.yaml at HEAD is not valid YAML"):
        provider(finished, "HEAD")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "x"}, "provider.name: unknown key"),
        ({"placed_on_market": "soon"}, "provider.placed_on_market"),
        ({"download_url": "larkfield"}, "provider.download_url"),
        ({"legal_name": ""}, "provider.legal_name"),
        ({"code_of_practice": "no"}, "provider.code_of_practice"),
        ([1], "provider"),
    ],
)
def test_a_wrong_provider_is_one_message(
    finished: Path, section: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_params(finished, lambda values: values.update(provider=section))
    out = finished / "out.md"
    given = ["--issued", "2026-01-31", "--out", str(out), "--project", str(finished)]
    assert main(["export", "merged@lora", "--format", "eu-summary", *given]) == 2
    error = capsys.readouterr().err
    assert f"params.yaml: {message}" in error and "Traceback" not in error and not out.exists()


def test_each_declared_field_is_in_the_datasheet(finished: Path) -> None:
    summary = summary_of(finished, "splits")
    values = {
        "category": "synthetic",
        "collected": {"from": "2024-01-01"},
        "generator": "Model 9",
        "permission": "form 3",
        "retain_until": "2027-12-31",
        "purposes": ["support"],
    }
    assert set(values) == set(NAMES)
    first = next(iter(summary["sources"]))
    summary["sources"][first] = declare(summary["sources"][first], **values)
    text = datasheet(summary, ISSUED)
    for shown in ("synthetic", "2024-01-01 to *missing*", "Model 9", "form 3", "2027-12-31", "support"):
        assert f"{first}: {shown}" in text
    assert "support" in croissant(summary, ISSUED) and declared_sources(summary)[first].category == "synthetic"


def test_the_datasheet_counts_findings_and_names_labels_only_where_there_are_some(finished: Path) -> None:
    summary = summary_of(finished, "splits")
    assert "holds labels of the source" in datasheet(summary, ISSUED)
    for found in summary["data_sets"].values():
        found["profile"]["categories"] = {"(none)": 3}
    checks = {"small_dataset": {"passed": False, "count": 0}, "refusal": {"passed": False, "count": 2}}
    summary["checks"]["instructions"] = {**checks, "exact_duplicates": {"passed": True, "count": 1}}
    text = datasheet(summary, ISSUED)
    assert "no record has a category" in text and "holds labels" not in text and "(none)" not in text
    assert "- instructions: check small_dataset did not pass\n" in text
    assert "- instructions: check refusal did not pass (2 findings)\n" in text
    assert "exact_duplicates: passed, 1 finding\n" in text


# --- all together


def test_all_exports_are_in_one_folder_with_a_page_that_names_each_by_its_hash(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool("spdx_python_model")
    folder = finished.parent / "exports"
    arguments = ["export", MODEL, "--all", str(folder), "--issued", "2026-01-31", "--project", str(finished)]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    files = contents(folder)
    page = files.pop("exports.html").decode()
    assert {one["format"] for one in document["exports"]} == set(formats()) and set(files) == {
        one["file"] for one in document["exports"]
    }
    assert document["missing"] == [] and 'id="missing"' not in page and 'id="release"' not in page
    for one in document["exports"]:
        assert one["sha256"] == hashlib.sha256(files[one["file"]]).hexdigest() and one["sha256"] in page
        assert (
            files[one["file"]].decode() == export(finished, MODEL, one["format"], issued=ISSUED)
            and one["shows"]
            and one["shows_not"]
        )
    assert "http" not in page.replace("http-equiv", "") and str(finished) not in page
    assert main(arguments) == 0 and (folder / "exports.html").read_text() == page
    assert main([*arguments, "--out", "x"]) == 2 and "--out cannot be combined" in capsys.readouterr().err


def test_a_stranger_verifies_a_signed_folder_of_exports_alone(finished: Path) -> None:
    tool("spdx_python_model")
    folder, (key, public) = finished.parent / "exports", write_keys(finished.parent, "ed25519")
    assert main(["export", MODEL, "--all", str(folder), "--issued", "2026-01-31", "--project", str(finished)]) == 0
    sign(finished, str(folder), key)
    elsewhere = Path(shutil.move(folder, finished.parent / "stranger"))
    shutil.rmtree(finished)
    document = verify_signatures(elsewhere, str(elsewhere), str(public))
    assert (
        document["verdict"] == "verified"
        and document["compared"]["documents"] == len(formats()) + 1
        and document["compared"]["values"] > 90
    )
    flip(elsewhere / "exports/training-content.md")
    found = verify_signatures(elsewhere, str(elsewhere), str(public))
    assert found["verdict"] == "altered" and "training-content.md" in json.dumps(found)
