"""Croissant 1.1 with the terms of its extension for responsible AI: the checked data sets of a model as tables that a
program can read, each record with its source row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from typing import Any

from dagster_project.curation.sources.declarations import UNKNOWN, declared_of
from dagster_project.lineage.export.data_sets import LIST, described
from dagster_project.lineage.export.responsible import collection, responsible_ai
from dagster_project.lineage.export.summary import identity

ANY_STAGE = True
DATA_SETS = True
FILE = "croissant.json"
SHOWS = "the checked records and splits by file and md5, and the source row of each record"
SHOWS_NOT = "the records themselves: readers need the data"

CROISSANT, RAI, PROV = (
    "http://mlcommons.org/croissant/",
    "http://mlcommons.org/croissant/RAI/",
    "http://www.w3.org/ns/prov#",
)
TERMS = (
    "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field", "fileProperty",
    "fileObject", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5", "parentField",
    "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "separator", "source",
    "subField", "transform", "annotation",
)  # fmt: skip
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": CROISSANT,
    "rai": RAI,
    "dct": "http://purl.org/dc/terms/",
    "prov": PROV,
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "description": {"@container": "@language"},
    **{term: f"cr:{term}" for term in TERMS},
}
"""Of the specification, with the prefixes of the other vocabularies in use."""
PARQUET = "application/x-parquet"
TYPES = {"text": "sc:Text", "integer": "sc:Integer", "float": "sc:Float"}
COUNT = "http://www.wikidata.org/entity/Q4049983"
"""Cardinality: the data type of a number of records."""
COLUMNS = {
    "example_id": "Content hash of everything in the record that can change what is trained.",
    "source": "The file that the record came from, by its path in the project.",
    "source_row": "Row in that file, from 0.",
    "source_id": "Content hash of the row as it was read; null where it is the same.",
    "outcome": "What became of the row: kept, dropped by a check, or the split that it is in.",
    "why": "Reason for the outcome.",
    "repaired": "Checks that the row was repaired for; null where it was not.",
    "group_id": "Records with nearly the same text share it.",
    "category": "Label of the source; null where it has none.",
    "meta": "Other fields of the source row, as JSON.",
    "split": "The split that the record is in.",
    "tools": "Functions that the assistant may call, as JSON; null for none.",
    "margin": "How much better the chosen answer is, in the unit of the source.",
}


def croissant(summary: Mapping[str, Any], issued: date) -> str:
    """The document as JSON. Paths of files are those in the project: a program
    that reads the tables needs the document in its folder.

    Raises:
        InputError: nothing in the lineage is a checked data set.
    """
    model, sets = summary["model"], described(summary, "croissant")
    name, provider = ", ".join(sets), summary["provider"]
    document = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "@id": f"urn:uuid:{identity('croissant', sets, summary['sources'])}",
        "conformsTo": [f"{CROISSANT}1.1", f"{RAI}1.0"],
        "name": f"{name} of {model['stage']}",
        "description": _description(summary),
        "datePublished": issued.isoformat(),
        "creator": {"@type": "sc:Organization", "name": provider.get("legal_name", UNKNOWN)},
        "license": _licenses(summary),
        "prov:wasDerivedFrom": [_source(path, facts) for path, facts in summary["sources"].items()],
        "prov:wasGeneratedBy": [
            _activity(address, summary)
            for address in summary["stages"]
            if address in {*sets, "raw_examples", "raw_preferences"}
        ],
        **responsible_ai(summary),
        "distribution": [one for address, found in sets.items() for one in _distribution(address, found)],
        "recordSet": [
            _record_set(address, table, found) for address, found in sets.items() for table in found["tables"]
        ],
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _description(summary: Mapping[str, Any]) -> str:
    sizes = [
        f"{address}: "
        + ", ".join(f"{table} {facts['rows']}" for table, facts in found["tables"].items() if table != "ledger")
        for address, found in summary["data_sets"].items()
    ]
    return (
        f"Checked records for fine-tuning, from {len(summary['sources'])} sources. Records by table:"
        f" {'; '.join(sizes)}."
    )


def _licenses(summary: Mapping[str, Any]) -> list[str]:
    """The licenses of the sources, each once: as the address in SPDX's list if it is in it."""
    from cyclonedx.spdx import fixup_id, is_supported_id

    found = dict.fromkeys(facts.get("license") or UNKNOWN for facts in summary["sources"].values())
    known = {license: fixup_id(license) if not is_supported_id(license) else license for license in found}
    return [f"https://spdx.org/licenses/{known[license]}.html" if known[license] else license for license in found]


def _source(path: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "@type": "prov:Entity",
        "@id": f"source:{_id(path)}",
        "name": path,
        "sha256": facts["sha256"],
        "license": facts.get("license") or UNKNOWN,
        "description": f"{facts['rows']} rows, layout {facts['format']}; {collection(declared_of(facts, path))}",
    }


def _activity(address: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The run of a stage. Its output is named by DVC's hash, which `pedigree audit` finds."""
    stage = summary["stages"][address]
    rows = f"{stage['rows_in']} rows in, {stage['rows_out']} out" if "rows_in" in stage else "report unknown"
    commit = f"commit {stage['commit']}" if stage.get("commit") else "not committed"
    return {
        "@type": "prov:Activity",
        "@id": f"stage:{address}",
        "name": address,
        "description": f"{rows}; output md5 {stage['md5']}; {commit}",
    }


def _id(text: str) -> str:
    """As part of an `@id`, which has no white space."""
    return "".join(char if char.isalnum() or char in "/._-@" else f"%{ord(char):02X}" for char in text)


def _distribution(address: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every file with its hash; and for a table of several files the set of them, which readers read."""
    objects = [
        {
            "@type": "cr:FileObject",
            "@id": _id(f"{found['path']}/{name}"),
            "name": f"{found['path']}/{name}",
            "contentUrl": f"{found['path']}/{name}",
            "encodingFormat": PARQUET,
            "md5": md5,
            "prov:wasGeneratedBy": {"@id": f"stage:{address}"},
        }
        for facts in found["tables"].values()
        for name, md5 in facts["files"].items()
    ]
    sets = [
        {
            "@type": "cr:FileSet",
            "@id": f"{address}-{table}-files",
            "name": f"{address}-{table}-files",
            "encodingFormat": PARQUET,
            "includes": [f"{found['path']}/{name}" for name in facts["files"]],
        }
        for table, facts in found["tables"].items()
        if len(facts["files"]) > 1
    ]
    return [*objects, *sets]


def _record_set(address: str, table: str, found: Mapping[str, Any]) -> dict[str, Any]:
    facts, ref = found["tables"][table], f"{address}-{table}"
    name, *others = facts["files"]
    origin = {"fileSet": {"@id": f"{ref}-files"}} if others else {"fileObject": {"@id": _id(f"{found['path']}/{name}")}}
    keyed = {} if table == "ledger" else {"key": {"@id": f"{ref}/example_id"}}
    about = (
        "What became of every row of the sources, with the record that was made from it."
        if table == "ledger"
        else f"Records of {table}."
    )
    return {
        "@type": "cr:RecordSet",
        "@id": ref,
        "name": ref,
        "description": about if table != "records" else "All checked records.",
        **keyed,
        "field": [_field(f"{ref}/{column}", column, kind, origin) for column, kind in facts["columns"].items()],
        "annotation": {
            "@type": "cr:Field",
            "@id": f"{ref}/count",
            "name": "count",
            "dataType": ["sc:Integer", COUNT],
            "value": facts["rows"],
        },
    }


def _type(kind: Any) -> str:
    return TYPES.get(kind.replace(LIST, ""), TYPES["text"]) if isinstance(kind, str) else TYPES["text"]


def _field(ref: str, column: str, kind: Any, origin: Mapping[str, Any]) -> dict[str, Any]:
    about = COLUMNS.get(column) or ("Turns of the conversation." if isinstance(kind, Mapping) else None)
    field = {"@type": "cr:Field", "@id": ref, "name": column, **({"description": about} if about else {})}
    if isinstance(kind, Mapping):
        return {
            **field,
            "isArray": True,
            "arrayShape": "-1",
            "subField": [
                {
                    "@type": "cr:Field",
                    "@id": f"{ref}/{name}",
                    "name": name,
                    "dataType": _type(inner),
                    "source": {**origin, "extract": {"column": column}, "transform": {"jsonPath": name}},
                }
                for name, inner in kind.items()
            ],
        }
    array = {"isArray": True, "arrayShape": "-1"} if kind.endswith(LIST) else {}
    split = ["cr:Split"] if column == "split" else []
    derived = {"equivalentProperty": "prov:wasDerivedFrom"} if column in {"source", "source_id"} else {}
    return {
        **field,
        **array,
        **derived,
        "dataType": [_type(kind), *split] if split else _type(kind),
        "source": {**origin, "extract": {"column": column}},
    }
