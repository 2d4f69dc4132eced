"""The terms of Croissant's extension for responsible AI, from ledgers and
reports. What nothing records is `unknown`, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster_project.core.text import many
from dagster_project.curation.sources.declarations import UNKNOWN, Declared, declared_sources


def responsible_ai(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Term -> its value."""
    sources, declared = summary["sources"], declared_sources(summary)
    raw = [
        f"{path}: {facts['rows']} rows, layout {facts['format']}, sha256 {facts['sha256']}"
        for path, facts in sources.items()
    ]
    days = sorted(
        {
            str(day)
            for one in declared.values()
            if one.collected
            for day in (one.collected.start, one.collected.end)
            if day
        }
    )
    return {
        "rai:dataCollection": "; ".join(f"{path}: {collection(one)}" for path, one in declared.items()) or UNKNOWN,
        "rai:dataCollectionType": [f"{path}: {one.shown['category']}" for path, one in declared.items()] or [UNKNOWN],
        "rai:dataCollectionRawData": "; ".join(raw) or UNKNOWN,
        **({"rai:dataCollectionTimeFrame": [days[0], *days[1:][-1:]]} if days else {}),
        "rai:dataCollectionMissingData": missing_data(summary),
        "rai:dataPreprocessingProtocol": processing(summary),
        "rai:dataAnnotationProtocol": f"{UNKNOWN}: nothing records who wrote answers and labels",
        "rai:machineAnnotationTools": (
            [f"{path}: written by {one.shown['generator']}" for path, one in declared.items()] or [UNKNOWN]
        ),
        "rai:personalSensitiveInformation": personal_data(summary),
        "rai:dataBiases": f"{UNKNOWN}: biases were not measured",
        "rai:dataLimitations": failed_checks(summary) or ["Every check of the data passed."],
        "rai:dataUseCases": [
            *uses(summary),
            *(f"{path}: declared purposes: {one.shown['purposes']}" for path, one in declared.items()),
        ],
        "rai:dataSocialImpact": f"{UNKNOWN}: nothing records it",
        "rai:dataReleaseMaintenancePlan": f"{UNKNOWN}: nothing records it",
    }


def collection(declared: Declared) -> str:
    """What is declared about how a source was collected. It is not verified."""
    shown = declared.shown
    return (
        f"declared, not verified: category {shown['category']}, collected {shown['collected']}, permission"
        f" {shown['permission']}, retain until {shown['retain_until']}"
    )


def processing(summary: Mapping[str, Any]) -> list[str]:
    """One line for each stage that read rows: what it dropped, repaired and added."""
    return [
        f"{name}: {stage['rows_in']} rows in, {stage['rows_out']} out; dropped: {_counts(stage.get('dropped'))};"
        f" repaired: {_counts(fixed(summary, name))}"
        + (f"; copies added to train: {_counts(stage['augmented'])}" if stage.get("augmented") else "")
        for name, stage in summary["stages"].items()
        if "rows_in" in stage
    ]


def fixed(summary: Mapping[str, Any], name: str) -> dict[str, int]:
    """Check -> rows that it repaired, masking included."""
    return {check: facts["fixed"] for check, facts in summary["checks"].get(name, {}).items() if facts.get("fixed")}


def _counts(counts: Mapping[str, int] | None) -> str:
    return ", ".join(f"{name} {n}" for name, n in (counts or {}).items()) or "none"


def missing_data(summary: Mapping[str, Any]) -> str:
    """Rows and fields of the sources that are in no record."""
    dropped: dict[str, int] = {}
    for stage in summary["stages"].values():
        for why, n in (stage.get("dropped") or {}).items():
            dropped[why] = dropped.get(why, 0) + n
    ignored = {
        path: sorted(facts["fields"]["ignored"])
        for path, facts in summary["sources"].items()
        if facts.get("fields", {}).get("ignored")
    }
    fields = "; ".join(f"{path}: {', '.join(names)}" for path, names in ignored.items())
    return f"Rows dropped: {_counts(dropped)}. Fields that are not used: {fields or 'none'}."


PERSONAL = {"pii": "personal data by pattern", "secrets": "keys and passwords by pattern"}


def personal_data(summary: Mapping[str, Any]) -> list[str]:
    """One line for each check for personal data that ran, in the stages that ran it, and what was not looked for."""
    lines = []
    for stage, checks in summary["checks"].items():
        for name, what in PERSONAL.items():
            if name in checks:
                facts = checks[name]
                rows = many(facts["count"], "row") if "count" in facts else f"{UNKNOWN} rows"
                dropped, masked = facts.get("dropped", 0), facts.get("fixed", 0)
                lines.append(f"{stage}, {what}: found in {rows}; dropped {dropped}, masked {masked}")
    return [
        *(lines or [f"{UNKNOWN}: no check looked for personal data"]),
        "Other personal data, such as names in texts: not looked for.",
    ]


def failed_checks(summary: Mapping[str, Any]) -> list[str]:
    """Checks of stages with rows that did not pass, with the number of
    findings; those of a whole set have none. Notes are left out: some quote texts."""
    return [
        f"{stage}: check {name} did not pass" + (f" ({many(facts['count'], 'finding')})" if facts.get("count") else "")
        for stage, checks in summary["checks"].items()
        if "rows_in" in summary["stages"].get(stage, {})
        for name, facts in checks.items()
        if not facts.get("passed")
    ]


def uses(summary: Mapping[str, Any]) -> list[str]:
    """What each split is for."""
    purpose = {"train": "training", "validation": "measuring during training", "test": "measuring the model"}
    return [
        f"{address}, {table}: {facts['rows']} records for {purpose[table]}"
        for address, found in summary["data_sets"].items()
        for table, facts in found["tables"].items()
        if table in purpose
    ] or [f"{UNKNOWN}: the data set is not split"]
