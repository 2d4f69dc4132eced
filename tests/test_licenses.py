"""Exports list the licenses of data and base model, most restrictive first, and name those that do not go together."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dagster_project.lineage.export.cyclonedx import cyclonedx
from dagster_project.lineage.export.licenses import family, summarize_licenses
from dagster_project.lineage.export.model_card import model_card
from dagster_project.lineage.export.spdx import spdx
from dagster_project.lineage.export.summary import from_reports

# by the texts of the licenses, not by the code
ORACLE = {
    "unknown": ["unknown", "", "other", "NOASSERTION"],
    "own terms": [
        "proprietary",
        "House rules 2",
        "LicenseRef-scancode-x",
        "llama3",
        "gemma",
        "openrail",
        "Proprietary AND MIT",
    ],
    "non-commercial": [
        "CC-BY-NC-4.0",
        "cc-by-nc-sa-4.0",
        "CC-BY-NC-ND-3.0",
        "PolyForm-Noncommercial-1.0.0",
        "Non-commercial use only",
        "MIT AND CC-BY-NC-4.0",
    ],
    "no derivatives": ["CC-BY-ND-4.0", "cc-by-nd-3.0"],
    "share-alike": [
        "CC-BY-SA-4.0",
        "cc-by-sa-3.0",
        "GPL-3.0-only",
        "AGPL-3.0-or-later",
        "LGPL-2.1",
        "MPL-2.0",
        "ODbL-1.0",
        "CDLA-Sharing-1.0",
        "GPL-2.0-only WITH Classpath-exception-2.0",
        "gpl",
    ],
    "attribution": [
        "CC-BY-4.0",
        "cc-by-3.0",
        "ODC-By-1.0",
        "OGL-UK-3.0",
        "MIT AND CC-BY-4.0",
        "CC-BY-4.0 OR GPL-3.0-only",
    ],
    "permissive": [
        "MIT",
        "Apache-2.0",
        "apache-2.0",
        "BSD-3-Clause",
        "ISC",
        "CDLA-Permissive-2.0",
        "MIT OR GPL-2.0-only",
        "Apache-2.0 WITH LLVM-exception",
    ],
    "public domain": ["CC0-1.0", "cc0-1.0", "PDDL-1.0", "Unlicense", "0BSD", "public domain", "MIT OR CC0-1.0"],
}


@pytest.mark.parametrize(("expected", "name"), [(one, name) for one, names in ORACLE.items() for name in names])
def test_a_license_has_the_family_of_its_text(expected: str, name: str) -> None:
    assert family(name) == expected


def test_parentheses_are_read_conservatively() -> None:
    assert family("(MIT OR GPL-3.0-only) AND CC-BY-4.0") == "share-alike"


def test_the_most_restrictive_license_is_first_and_names_its_owners() -> None:
    names = ["CC0-1.0", "MIT", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-ND-4.0", "CC-BY-NC-4.0", "House rules", None]
    sources = {f"{i}.jsonl": {"license": name} for i, name in enumerate(names)} | {"more.jsonl": {"license": "MIT"}}
    listed = summarize_licenses({"license": "MIT"}, sources)["listed"]
    assert [one["license"] for one in listed] == [name or "unknown" for name in reversed(names)]
    assert [one["of"] for one in listed if one["license"] == "MIT"] == [["base model", "1.jsonl", "more.jsonl"]]


@pytest.mark.parametrize(
    ("base", "data", "expected"),
    [
        ("Apache-2.0", ["Apache-2.0"], []),
        ("Apache-2.0", ["MIT", "CC-BY-4.0", "CC0-1.0"], []),
        (
            "Apache-2.0",
            ["CC-BY-NC-4.0"],
            [
                "Not compatible: the license of 0.jsonl (CC-BY-NC-4.0) forbids commercial"
                " use, the license of base model (Apache-2.0) allows it."
            ],
        ),
        ("CC-BY-NC-4.0", ["CC-BY-NC-4.0"], []),
        (
            "GPL-3.0-only",
            ["CC-BY-NC-4.0"],
            [
                "Not compatible: the license of 0.jsonl (CC-BY-NC-4.0) forbids commercial"
                " use, the license of base model (GPL-3.0-only) allows it and requires"
                " that adapted versions do, too."
            ],
        ),
        (
            "MIT",
            ["unknown"],
            ["The license of 0.jsonl (unknown) is unknown: whether the model may be used or passed on is not clear."],
        ),
        (
            None,
            ["MIT"],
            [
                "The license of base model (unknown) is unknown: whether the model may be used or passed on"
                " is not clear."
            ],
        ),
        (
            "MIT",
            ["CC-BY-ND-4.0"],
            [
                "The license of 0.jsonl (CC-BY-ND-4.0) does not allow adapted versions to be"
                " passed on, and the model may be one."
            ],
        ),
        (
            "CC-BY-NC-4.0",
            ["CC-BY-NC-ND-4.0"],
            [
                "The license of 0.jsonl (CC-BY-NC-ND-4.0) does not allow adapted"
                " versions to be passed on, and the model may be one."
            ],
        ),
        (
            "llama3",
            ["MIT"],
            [
                "The license of base model (llama3) has terms of its own: read them before the model is"
                " used or passed on."
            ],
        ),
        (
            "GPL-3.0-only",
            ["CC-BY-SA-4.0"],
            [
                "Not compatible: the license of 0.jsonl (CC-BY-SA-4.0) and the license of"
                " base model (GPL-3.0-only) each require adapted versions to keep that"
                " license."
            ],
        ),
        ("CC-BY-SA-4.0", ["cc-by-sa-4.0"], []),
        (
            "MIT",
            ["CC-BY-SA-4.0", "CC-BY-SA-4.0"],
            [
                "The license of 0.jsonl and 1 more (CC-BY-SA-4.0) requires adapted"
                " versions to keep it: MIT alone does not cover the model."
            ],
        ),
    ],
)
def test_what_does_not_go_together_is_named_in_words(base: str | None, data: list[str], expected: list[str]) -> None:
    base_model = {"origin": "org/base", **({"license": base} if base else {})}
    assert (
        summarize_licenses(base_model, {f"{i}.jsonl": {"license": name} for i, name in enumerate(data)})["problems"]
        == expected
    )


def summary(base: str, data: str) -> dict[str, Any]:
    source = {"rows": 1, "format": "messages", "license": data, "sha256": "0" * 64}
    reports: dict[str, dict[str, Any]] = {
        "base_model": {"origin": "org/base", "license": base, "sha256": {}},
        "raw_examples": {"sources": {"data/sources/a.jsonl": source}},
        "adapter@lora": {"environment": {}, "output_sha256": "1" * 64},
    }
    return from_reports("adapter@lora", reports)


@pytest.mark.parametrize(
    ("base", "data", "license", "name"),
    [
        ("Apache-2.0", "Apache-2.0", "apache-2.0", None),
        ("Apache-2.0", "CC-BY-NC-4.0", "cc-by-nc-4.0", None),
        ("CC-BY-SA-4.0", "MIT", "cc-by-sa-4.0", None),
        ("Apache-2.0", "unknown", "other", "unknown"),
        ("Apache-2.0", "proprietary", "other", "proprietary"),
        ("Apache-2.0", "MIT OR CC-BY-4.0", "apache-2.0", None),
        ("CC0-1.0", "MIT AND CC-BY-4.0", "other", "MIT AND CC-BY-4.0"),
        ("Apache-2.0", "ODC-By-1.0", "odc-by", None),
        ("Apache-2.0", "ODbL-1.0", "odbl", None),
        ("Apache-2.0", "GPL-3.0-or-later", "other", "GPL-3.0-or-later"),
        ("Apache-2.0", "CC-BY-SA-2.0", "other", "CC-BY-SA-2.0"),
        ("llama3.1", "MIT", "llama3.1", None),
    ],
)
def test_the_card_names_the_most_restrictive_license(base: str, data: str, license: str, name: str | None) -> None:
    found = summary(base, data)
    card = ModelCard(model_card(found))
    assert (card.data.license, card.data.license_name) == (license, name)
    assert all(f"- {line}" in card.text for line in found["licenses"]["problems"])


def test_a_bill_of_materials_claims_no_license_for_the_whole() -> None:
    found = summary("Apache-2.0", "CC-BY-NC-4.0") | {"code": {"commit": "c" * 40, "clean": True}, "parameters": {}}
    document = json.loads(cyclonedx({**found, "stages": {}}, date(2026, 1, 31)))
    whole = document["metadata"]["component"]
    assert "licenses" not in whole
    [listed] = [json.loads(one["value"]) for one in whole["properties"] if one["name"] == "pedigree:licenses"]
    assert [(one["license"], one["of"]) for one in listed] == [
        ("CC-BY-NC-4.0", ["data/sources/a.jsonl"]),
        ("Apache-2.0", ["base model"]),
    ]
    parts = {part["bom-ref"]: part.get("licenses") for part in document["components"]}
    assert parts["base_model"] == [{"license": {"id": "Apache-2.0"}}]
    assert parts["source:data/sources/a.jsonl"] == [{"license": {"id": "CC-BY-NC-4.0"}}]
    assert any(
        "forbids commercial use" in line for line in whole["modelCard"]["considerations"]["technicalLimitations"]
    )


def test_names_that_give_one_reference_in_spdx_are_two_licenses() -> None:
    names = ["内部数据", "供应商授权", "House rules (1)", "House rules, 1", "内部数据"]
    found = summary("Apache-2.0", names[0])
    sources = {
        f"{i}.jsonl": {**found["sources"]["data/sources/a.jsonl"], "license": name} for i, name in enumerate(names)
    }
    facts = {
        "code": {"commit": "c" * 40, "clean": True},
        "provider": {},
        "parameters": {},
        "checks": {},
        "data_sets": {},
        "stages": {},
    }
    model = {**found["model"], "md5": "1" * 32}
    graph = json.loads(spdx({**found, **facts, "model": model, "sources": sources}, date(2026, 1, 31)))["@graph"]
    named = {one["spdxId"]: one.get("name") for one in graph if "spdxId" in one}
    declared = {named[one["from"]]: one["to"] for one in graph if one.get("relationshipType") == "hasDeclaredLicense"}
    assert [named[declared[f"{i}.jsonl"][0]] for i in range(len(names))] == names
    expressions = [
        one["simplelicensing_licenseExpression"] for one in graph if one["type"] == "simplelicensing_LicenseExpression"
    ]
    assert len({*expressions}) == len(expressions) == 5  # of four names and the base model
