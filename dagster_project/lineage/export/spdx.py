"""SPDX 3.0.1 with the AI and Dataset profiles: the model, its base, sources and data sets as packages with hashes and
licenses, and how they depend on each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from typing import Any

from dagster_project import __version__
from dagster_project.core.hashing import sha256_of_text
from dagster_project.curation.sources.declarations import UNKNOWN, declared_of
from dagster_project.lineage.export.cyclonedx import SUM
from dagster_project.lineage.export.responsible import collection, processing
from dagster_project.lineage.export.summary import REWARD_MODEL, identity, limits, results, rows_written

FILE = "model.spdx.json"
SHOWS = "the model, its base, sources and data sets as packages, with hashes and how they depend on each other"
SHOWS_NOT = "a license of the model: none was concluded"
SPEC = "3.0.1"
NO_ASSERTION = "https://spdx.org/rdf/3.0.1/terms/Core/NoAssertionElement"
NO_LICENSE = "https://spdx.org/rdf/3.0.1/terms/ExpandedLicensing/NoAssertionLicense"
MISSING_SUPPLIER = "missing: provider.legal_name in params.yaml"
BUILT = "builtTime is the date of the commit that recorded it, or else the issue date: runs record no times"
DISTILLED = " was distilled from it."
"""After the name of a training, in the comment on its teacher."""
INPUTS = ("splits", "preferences")
"""Stages whose records models are trained and tested on."""


def spdx(summary: Mapping[str, Any], issued: date) -> str:
    """The document as JSON-LD."""
    graph = _Graph(summary, datetime.combine(issued, time(), UTC))
    model, base = graph.model(), graph.base_model()
    packages = {f"source:{path}": graph.source(path, facts) for path, facts in summary["sources"].items()}
    packages |= {
        f"stage:{name}": graph.data_set(name, stage) for name, stage in summary["stages"].items() if "rows_in" in stage
    }
    libraries = [graph.library(name, version) for name, version in summary["environment"].items()]
    trained = [packages[f"stage:{name}"] for name in INPUTS if f"stage:{name}" in packages]
    graph.relate(model, "trainedOn", trained)
    tested = "stage:preferences" if summary["model"]["stage"] == REWARD_MODEL else "stage:splits"
    graph.relate(model, "testedOn", [packages[tested]] if summary["metrics"] and tested in packages else [])
    graph.relate(model, "descendantOf", [*([base] if base else []), *map(graph.teacher, summary.get("teachers", ()))])
    graph.relate(model, "dependsOn", libraries)
    for name, stage in summary["stages"].items():
        if "rows_in" in stage:
            parents = [packages[f"stage:{one}"] for one in stage.get("made_from", ()) if f"stage:{one}" in packages]
            graph.relate(
                packages[f"stage:{name}"],
                "descendantOf",
                [*parents, *(packages[f"source:{path}"] for path in stage.get("sources", ()))],
            )
    return graph.text(model)


@dataclass
class _Graph:
    """The elements of a document."""

    summary: Mapping[str, Any]
    released: datetime
    elements: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        from spdx_python_model import v3_0_1

        self.types = v3_0_1
        self.info = self.types.CreationInfo(specVersion=SPEC, created=self.released)
        name = self.summary["provider"].get("legal_name")
        kind = self.types.Organization if name else self.types.Agent
        self.provider = self.add(kind, "agent", "provider", name or UNKNOWN, comment=None if name else MISSING_SUPPLIER)
        self.unknown = self.add(self.types.Agent, "agent", UNKNOWN, UNKNOWN, comment="nothing records who made it")
        self.info.createdBy.append(self.provider)
        self.info.createdUsing.append(self.add(self.types.Tool, "tool", __version__, f"pedigree {__version__}"))

    def add(self, kind: Any, group: str, ref: str, name: str | None, **facts: Any) -> Any:
        """An element with an id that depends on the model and on `group` and `ref` alone."""
        ref = f"urn:uuid:{identity('spdx', self.summary['model'].get('md5'), group, ref)}"
        values = {key: value for key, value in facts.items() if value not in (None, [], "")}
        element = kind(spdxId=ref, creationInfo=self.info, **({"name": name} if name else {}), **values)
        self.elements.append(element)
        return element

    def hashes(self, whole: str | None = None, md5: str | None = None, file: str | None = None) -> list[Any]:
        """Args:
        whole: sha256 over all files of a folder.
        md5: DVC's hash.
        file: sha256 of a single file.
        """
        algorithm, made = self.types.HashAlgorithm, []
        if file:
            made.append(self.types.Hash(algorithm=algorithm.sha256, hashValue=file))
        if whole:
            made.append(self.types.Hash(algorithm=algorithm.other, hashValue=whole, comment=SUM))
        if md5:
            made.append(
                self.types.Hash(
                    algorithm=algorithm.md5,
                    hashValue=md5.removesuffix(".dir"),
                    comment="as in dvc.lock; of a folder over DVC's listing",
                )
            )
        return made

    def entries(self, values: Mapping[str, Any]) -> list[Any]:
        return [
            self.types.DictionaryEntry(key=key, value=value if isinstance(value, str) else json.dumps(value))
            for key, value in values.items()
        ]

    def model(self) -> Any:
        summary, types = self.summary, self.types
        model, provider, training = summary["model"], summary["provider"], summary["training"]
        url = provider.get("download_url")
        element = self.add(
            types.ai_AIPackage,
            "model",
            model["stage"],
            provider.get("model_name") or model["stage"],
            comment=None if url else "downloadLocation is missing: provider.download_url in params.yaml",
            suppliedBy=self.provider,
            releaseTime=self.released,
            software_downloadLocation=url or NO_ASSERTION,
            software_packageVersion=model["md5"],
            software_primaryPurpose=types.software_SoftwarePurpose.model,
            verifiedUsing=self.hashes(model.get("sha256"), model["md5"]),
            ai_typeOfModel=[training["method"]] if "method" in training else [],
            ai_hyperparameter=self.entries(summary["parameters"]),
            ai_metric=self.entries(
                {
                    one["name"]: f"{one['value']} (95 % interval {one['low']} to {one['high']})"
                    for one in results(summary)
                }
            ),
            ai_informationAboutTraining="; ".join(
                f"{key.replace('_', ' ')}: {json.dumps(value)}" for key, value in training.items()
            ),
            ai_limitation=" ".join(limits(summary)),
            ai_modelDataPreprocessing=processing(summary),
            ai_useSensitivePersonalInformation=types.PresenceType.noAssertion,
            ai_autonomyType=types.PresenceType.noAssertion,
        )
        self.license(element, None)
        return element

    def base_model(self) -> Any:
        base = self.summary["base_model"]
        if not base:
            return None
        origin = base.get("origin", UNKNOWN)
        name, _, revision = origin.partition("@")
        return self.origin(
            "base_model",
            origin,
            name,
            revision,
            base,
            comment="releaseTime is the issue date of this document: nothing records that of the base model",
            ai_informationAboutApplication=f"{base['parameters']} parameters" if "parameters" in base else None,
        )

    def teacher(self, facts: Mapping[str, Any]) -> Any:
        comment = f"{facts['training']}{DISTILLED} releaseTime is the issue date of this document"
        return self.origin("teacher", facts["training"], facts["folder"], "", facts, comment=comment)

    def origin(
        self, group: str, ref: str, name: str, revision: str, facts: Mapping[str, Any], comment: str, **more: Any
    ) -> Any:
        """A model of others that the model is derived from."""
        weights = [digest for path, digest in facts.get("sha256", {}).items() if path.endswith(".safetensors")]
        element = self.add(
            self.types.ai_AIPackage,
            group,
            ref,
            name,
            suppliedBy=self.unknown,
            releaseTime=self.released,
            comment=comment,
            software_downloadLocation=NO_ASSERTION,
            software_packageVersion=revision or (weights[0] if weights else UNKNOWN),
            software_primaryPurpose=self.types.software_SoftwarePurpose.model,
            verifiedUsing=[one for digest in weights for one in self.hashes(file=digest)],
            **more,
        )
        self.license(element, facts.get("license"))
        return element

    def source(self, path: str, facts: Mapping[str, Any]) -> Any:
        declared = declared_of(facts, path)
        element = self.package(
            f"source:{path}",
            path,
            self.released,
            self.unknown,
            facts["rows"],
            self.hashes(file=facts["sha256"]),
            dataset_dataCollectionProcess=collection(declared),
            summary=f"layout {facts['format']}",
            dataset_intendedUse=f"declared purposes: {declared.shown['purposes']}",
            software_sourceInfo=f"written by: {declared.shown['generator']}",
        )
        self.license(element, facts.get("license"))
        return element

    def data_set(self, name: str, stage: Mapping[str, Any]) -> Any:
        built = datetime.combine(date.fromisoformat(stage["date"]), time(), UTC) if stage.get("date") else self.released
        element = self.package(
            f"stage:{name}", name, built, self.provider, rows_written(stage) or 0,
            self.hashes(stage["sha256"], stage["md5"]),
            dataset_dataPreprocessing=[line for line in processing(self.summary) if line.startswith(f"{name}:")],
        )  # fmt: skip
        self.license(element, None)
        return element

    def package(
        self, ref: str, name: str, built: datetime, by: Any, rows: int, hashes: Sequence[Any], **facts: Any
    ) -> Any:
        types = self.types
        return self.add(
            types.dataset_DatasetPackage,
            "data",
            ref,
            name,
            comment=f"datasetSize counts rows. {BUILT}",
            builtTime=built,
            releaseTime=self.released,
            originatedBy=[by],
            software_downloadLocation=NO_ASSERTION,
            software_primaryPurpose=types.software_SoftwarePurpose.data,
            verifiedUsing=list(hashes),
            dataset_datasetType=[types.dataset_DatasetType.text],
            dataset_datasetSize=rows,
            dataset_hasSensitivePersonalInformation=types.PresenceType.noAssertion,
            **facts,
        )

    def library(self, name: str, version: str) -> Any:
        return self.add(self.types.software_Package, "library", name, name, software_packageVersion=version)

    def license(self, package: Any, name: str | None) -> None:
        """The declared license, and that none was concluded. Names that are not in SPDX's list become a LicenseRef."""
        from cyclonedx.spdx import fixup_id, is_expression

        declared: Any = NO_LICENSE
        if name and name.lower() != UNKNOWN:
            expression = fixup_id(name) or (
                name
                if is_expression(name)
                else f"LicenseRef-{re.sub('[^A-Za-z0-9.]+', '-', name).strip('-') or 'unnamed'}"
            )
            known = self._license_elements()
            if (
                expression in known and expression.startswith("LicenseRef-") and known[expression].name != name
            ):  # of another license
                expression = f"{expression}-{sha256_of_text(name)[:8]}"
            declared = known.get(expression) or self.add(
                self.types.simplelicensing_LicenseExpression,
                "license",
                expression,
                name,
                simplelicensing_licenseExpression=expression,
            )
        self.relate(package, "hasDeclaredLicense", [declared])
        self.relate(package, "hasConcludedLicense", [NO_LICENSE])

    def _license_elements(self) -> dict[str, Any]:
        kind = self.types.simplelicensing_LicenseExpression
        return {one.simplelicensing_licenseExpression: one for one in self.elements if isinstance(one, kind)}

    def relate(self, element: Any, how: str, others: Iterable[Any]) -> None:
        if others := list(others):
            kind = getattr(self.types.RelationshipType, how)
            self.add(self.types.Relationship, how, element._id, None, from_=element, relationshipType=kind, to=others)

    def text(self, root: Any) -> str:
        """The document: all elements, in an order that does not depend on the process."""
        profile = self.types.ProfileIdentifierType
        members = list(self.elements)
        self.add(
            self.types.SpdxDocument, "document", "", f"{root.name}.spdx", rootElement=[root], element=members,
            profileConformance=[profile.core, profile.software, profile.simpleLicensing, profile.ai, profile.dataset],
        )  # fmt: skip
        objects = self.types.SHACLObjectSet()
        for element in self.elements:
            objects.add(element)
        document = self.types.JSONLDSerializer().serialize_data(objects, force_at_graph=True)
        document["@graph"].sort(key=lambda one: (one["type"] != "CreationInfo", one["type"], one.get("spdxId", "")))
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
