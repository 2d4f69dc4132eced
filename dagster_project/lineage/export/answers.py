"""Answers of documents that people read: numbers of the lineage, values of `provider`, what sources declare; and
`missing` where nothing records an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dagster_project.core.text import markdown
from dagster_project.curation.sources.declarations import DECLARED, UNKNOWN
from dagster_project.lineage.index import PARAPHRASED, PARAPHRASES
from dagster_project.lineage.rows import AUGMENTED

MISSING = "*missing*"
NAMED = 3
"""Sources that an answer names."""
CATEGORIES = ("public", "licensed", "third_party", "crawled", "user", "synthetic")


def missing(where: str = "") -> str:
    """Args:
    where: what would answer it, as a key of params.yaml; empty: nothing in the project would.
    """
    return f"{MISSING}: `{where}` in params.yaml" if where else f"{MISSING}: nothing records it"


def given(provider: Mapping[str, Any], key: str) -> str:
    """A value of the section `provider`, or that it is missing."""
    value = provider.get(key)
    if value is None:
        return missing(f"provider.{key}")
    return "yes" if value is True else "no" if value is False else markdown(str(value))


def declared(sources: Mapping[str, Mapping[str, Any]], key: str) -> tuple[dict[str, Any], list[str]]:
    """(source -> what it declares, sources that do not declare it)."""
    values = {path: facts.get(DECLARED, {}).get(key, UNKNOWN) for path, facts in sources.items()}
    return {path: value for path, value in values.items() if value != UNKNOWN}, [
        path for path, value in values.items() if value == UNKNOWN
    ]


def lacking(key: str, paths: Sequence[str]) -> str:
    """That sources do not declare a key. The first of them are named."""
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return f"{MISSING}: `{key}` of {', '.join(map(markdown, paths[:NAMED]))}{more}"


def uses_category(sources: Mapping[str, Mapping[str, Any]], category: str) -> tuple[str, list[str]]:
    """Whether data of a category was used, and the sources that declare it.
    "No" needs a declaration for every source."""
    found, unknown = declared(sources, "category")
    paths = [path for path, one in found.items() if one == category]
    if category == "synthetic":  # a source with a generator is synthetic, whatever its category
        made = {*paths, *declared(sources, "generator")[0]}
        paths, unknown = [path for path in sources if path in made], [path for path in unknown if path not in made]
    if paths:
        return (
            f"yes: {', '.join(map(markdown, paths))}" + (f" ({lacking('category', unknown)})" if unknown else ""),
            paths,
        )
    if not sources:
        return missing(), []
    return (lacking("category", unknown) if unknown else "no"), []


def period(value: Any) -> str:
    """A period of collection, `{from, to}`, either of which may be missing."""
    return f"{value.get('from') or MISSING} to {value.get('to') or MISSING}"


def latest_collection(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """The last day of collection of all sources."""
    ends = {path: value["to"] for path, value in declared(sources, "collected")[0].items() if value.get("to")}
    unknown = [path for path in sources if path not in ends]
    if not ends:
        return lacking("collected", unknown) if unknown else missing()
    return max(ends.values()) + (f" among those that declare it ({lacking('collected', unknown)})" if unknown else "")


def training_records(summary: Mapping[str, Any]) -> dict[str, int]:
    """Source -> the records in training splits that were made from its rows, augmented copies included. Of several
    versions of a data set, the one with most of them counts."""
    found, rewritten = {}, 0
    for path, outcomes in summary["outcomes"].items():
        split = max(_versions(outcomes, "splits"), key=_trained_on)
        found[path] = _trained_on(split) + max(counts["train"] for counts in _versions(outcomes, "preferences"))
        rewritten += split[AUGMENTED + PARAPHRASED]
    return found | {path: rewritten for path, facts in summary["sources"].items() if facts.get("format") == PARAPHRASES}


def _versions(outcomes: Mapping[str, Mapping[str, int]], stage: str) -> list[Counter[str]]:
    """The outcomes in each version of a stage, whose names are the stage's, or
    that with a hash ("splits 5d41402a"); without one, an empty count."""
    return [Counter(counts) for name, counts in outcomes.items() if name.partition(" ")[0] == stage] or [Counter()]


def _trained_on(counts: Counter[str]) -> int:
    return counts["train"] + sum(n for outcome, n in counts.items() if outcome.startswith(AUGMENTED))


def scripts(summary: Mapping[str, Any]) -> list[str]:
    """One line for each data set whose stage counted its records by script."""
    return [
        f"{stage}: main script of the letters:"
        f" {', '.join(f'{markdown(name)} {n}' for name, n in found['profile']['scripts'].items())} records. Scripts are"
        " counted, languages are not."
        for stage, found in summary["data_sets"].items()
        if found["profile"].get("scripts")
    ]
