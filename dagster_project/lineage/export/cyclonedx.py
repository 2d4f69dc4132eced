"""CycloneDX 1.7, a bill of materials for machine learning: the model with its
card, its training data and the libraries in use, and how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, date, datetime, time
from typing import Any

from dagster_project.lineage.export.formulation import citations, formulation
from dagster_project.lineage.export.summary import identity, limits, results, task_of

FILE = "bom.cdx.json"
SHOWS = "all parts with hashes and licenses, the command of each stage, and which run states each part"
SHOWS_NOT = "that the parts are safe, or their licenses valid"
SUM = "sha256 over the lines '<sha256 of file> <path>' of all its files"


def cyclonedx(summary: Mapping[str, Any], issued: date) -> str:
    """The document as JSON, validated against the official schema.

    The library has no classes for `modelCard`, `data`, `formulation` and
    `citations` yet, so these are added to its JSON.
    """
    from cyclonedx.factory.license import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot7
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    def licenses(name: str | None) -> list[Any]:
        return [LicenseFactory().make_from_string(name)] if name else []

    def component(
        kind: ComponentType, ref: str, name: str, sha256: str | None, license: str | None = None, **facts: Any
    ) -> Component:
        properties = [
            Property(name=f"pedigree:{key}", value=str(value)) for key, value in facts.items() if value is not None
        ]
        sums = [HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else []
        return Component(
            type=kind, bom_ref=ref, name=name, hashes=sums, licenses=licenses(license), properties=properties
        )

    model, base = summary["model"], summary["base_model"]
    whole = component(
        ComponentType.MACHINE_LEARNING_MODEL, "model", model["stage"], model["sha256"],
        sha256_is=SUM, md5=model.get("md5"), commit=summary["code"]["commit"], clean=summary["code"]["clean"],
        watched_by=", ".join(f"{one['stage']} {one['md5']}" for one in summary.get("watched_by", ())) or None,
        licenses=json.dumps(summary["licenses"]["listed"]),
    )  # fmt: skip
    weights = [digest for name, digest in base.get("sha256", {}).items() if name.endswith(".safetensors")]
    parts = [
        component(
            ComponentType.MACHINE_LEARNING_MODEL,
            "base_model",
            base.get("origin", "unknown"),
            weights[0] if len(weights) == 1 else None,
            base.get("license"),
            parameters=base.get("parameters"),
            **{f"sha256:{name}": digest for name, digest in base.get("sha256", {}).items()},
        ),
        *(
            component(
                ComponentType.MACHINE_LEARNING_MODEL,
                f"teacher:{one['training']}",
                one["folder"],
                None,
                one["license"],
                **{f"sha256:{name}": digest for name, digest in one["sha256"].items()},
            )
            for one in summary.get("teachers", ())
        ),
        *(
            component(
                ComponentType.DATA,
                f"source:{path}",
                path,
                s["sha256"],
                s["license"],
                rows=s["rows"],
                format=s["format"],
            )
            for path, s in summary["sources"].items()
        ),
        *(
            component(ComponentType.DATA, f"stage:{name}", name, s["sha256"], sha256_is=SUM, md5=s["md5"])
            for name, s in _data(summary).items()
        ),
    ]
    for library, number in summary["environment"].items():
        kind = ComponentType.PLATFORM if library == "python" else ComponentType.LIBRARY
        part = component(kind, f"library:{library}", library, None)
        part.version = number
        parts.append(part)
    document = Bom(
        serial_number=identity("cyclonedx", model, issued.isoformat()),
        metadata=BomMetaData(component=whole, timestamp=datetime.combine(issued, time(), UTC)),
        components=parts,
    )
    document.register_dependency(whole, parts)
    written = json.loads(JsonV1Dot7(document).output_as_string())
    written["metadata"]["component"]["modelCard"] = _card(summary)
    for part in written["components"]:
        if part["type"] == "data":
            part["data"] = [
                {"type": "dataset", "name": part["name"], "description": _description(summary, part["bom-ref"])}
            ]
    written["formulation"] = formulation(summary, {part["bom-ref"] for part in written["components"]})
    written["citations"] = citations(written, summary, issued)
    text = json.dumps(written, indent=1, ensure_ascii=False) + "\n"
    if (error := JsonStrictValidator(SchemaVersion.V1_7).validate_str(text)) is not None:
        raise AssertionError(f"not CycloneDX 1.7: {error}")
    return text


def _data(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The stages whose outputs are data sets."""
    return {name: stage for name, stage in summary["stages"].items() if "rows_in" in stage}


def _description(summary: Mapping[str, Any], ref: str) -> str:
    kind, _, name = ref.partition(":")
    if kind == "source":
        return f"{summary['sources'][name]['rows']} rows, layout {summary['sources'][name]['format']}"
    stage = summary["stages"][name]
    dropped = ", ".join(f"{why} {n}" for why, n in stage.get("dropped", {}).items())
    return f"{stage['rows_in']} rows in, {stage['rows_out']} out; dropped: {dropped or 'none'}"


def _card(summary: Mapping[str, Any]) -> dict[str, Any]:
    training = summary["training"]
    data = [{"ref": f"source:{path}"} for path in summary["sources"]] + [
        {"ref": f"stage:{name}"} for name in _data(summary)
    ]
    # the reports of an aligned model do not name the kind of learning
    approach = (
        {} if any(name.startswith("aligned") for name in summary["stages"]) else {"approach": {"type": "supervised"}}
    )
    measured = [
        {
            "type": one["name"],
            "value": str(one["value"]),
            "slice": "test",
            "confidenceInterval": {"lowerBound": str(one["low"]), "upperBound": str(one["high"])},
        }
        for one in results(summary)
    ]
    return {
        "modelParameters": {**approach, "task": task_of(summary), "datasets": data},
        **({"quantitativeAnalysis": {"performanceMetrics": measured}} if measured else {}),
        "considerations": {"technicalLimitations": limits(summary)},
        "properties": [
            {"name": f"pedigree:{key}", "value": json.dumps(value)}
            for key, value in {**training, **summary["parameters"]}.items()
        ],
    }
