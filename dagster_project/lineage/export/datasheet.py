"""A datasheet for data sets: the questions of Gebru et al. (2021), answered from ledgers and reports. Questions that
only a person can answer are printed as missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from typing import Any

from dagster_project.core.text import many, markdown
from dagster_project.lineage.export.answers import (
    declared,
    given,
    lacking,
    missing,
    period,
    scripts,
    training_records,
    uses_category,
)
from dagster_project.lineage.export.data_sets import described
from dagster_project.lineage.export.licenses import summarize_licenses
from dagster_project.lineage.export.responsible import failed_checks, missing_data, personal_data, processing, uses
from dagster_project.lineage.export.tables import table

ANY_STAGE = True
DATA_SETS = True
FILE = "datasheet.md"
SHOWS = "the questions of a datasheet with the answers that records give; what is missing is marked"
SHOWS_NOT = "that declarations of sources are true"

Answer = Callable[[Mapping[str, Any]], str]


def datasheet(summary: Mapping[str, Any], issued: date) -> str:
    """The datasheet in Markdown.

    Raises:
        InputError: nothing in the lineage is a checked data set.
    """
    sets, model = described(summary, "a datasheet"), summary["model"]
    parts = [
        f"# Datasheet: {markdown(', '.join(sets))}",
        (
            f"The data of {markdown(model['stage'])} (md5 {model['md5']}), issued {issued.isoformat()}. Numbers are"
            " those of its ledgers and reports; *missing* is what nothing records."
        ),
    ]
    for section, questions in SECTIONS.items():
        parts.append(f"## {section}")
        parts += [f"**{question}**\n\n{answer(summary)}" for question, answer in questions.items()]
    return "\n\n".join(parts) + "\n"


def _nobody(summary: Mapping[str, Any]) -> str:
    return missing()


def _provider(key: str) -> Answer:
    return lambda summary: given(summary["provider"], key)


def _of_sources(key: str) -> Answer:
    """What each source declares."""

    def answer(summary: Mapping[str, Any]) -> str:
        found, unknown = declared(summary["sources"], key)
        lines = [f"{markdown(path)}: {_shown(key, value)}" for path, value in found.items()]
        return _listed([*lines, *([lacking(key, unknown)] if unknown else [])])

    return answer


def _shown(key: str, value: Any) -> str:
    if key == "collected":
        return period(value)
    return ", ".join(markdown(str(one)) for one in value) if isinstance(value, list | tuple) else markdown(str(value))


def _listed(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) if len(lines) > 1 else lines[0] if lines else missing()


def _escaped(lines: list[str]) -> str:
    return _listed([markdown(line) for line in lines])


def _kinds(summary: Mapping[str, Any]) -> str:
    lines = []
    for stage, found in summary["data_sets"].items():
        pairs = any("chosen" in facts["columns"] for facts in found["tables"].values())
        lines.append(
            f"{stage}:"
            f" {'prompts with a chosen and a rejected answer' if pairs else 'conversations or texts to learn from'}"
        )
    return _escaped([*lines, *scripts(summary)])


def _numbers(summary: Mapping[str, Any]) -> str:
    rows = [
        [stage, name, facts["rows"]]
        for stage, found in summary["data_sets"].items()
        for name, facts in found["tables"].items()
        if name != "ledger"
    ]
    return table(["data set", "table", "records"], rows)


def _sample(summary: Mapping[str, Any]) -> str:
    limits = [
        f"{section}.limit is {values['limit']}: only the first rows of each source were read"
        for section, values in summary["parameters"].items()
        if isinstance(values, dict) and values.get("limit")
    ]
    rows = sum(facts["rows"] for facts in summary["sources"].values())
    read = f"{rows} rows were read from the sources; the section on preprocessing says which were dropped"
    return _listed([read, *map(markdown, limits), f"What the sources are a sample of: {missing()}"])


def _columns(summary: Mapping[str, Any]) -> str:
    lines = [
        f"{stage}, {name}: {', '.join(facts['columns'])}"
        for stage, found in summary["data_sets"].items()
        for name, facts in found["tables"].items()
    ]
    return _escaped(lines)


def _labels(summary: Mapping[str, Any]) -> str:
    lines = [
        f"{stage}: {', '.join(f'{name} {n}' for name, n in found['profile']['categories'].items())}"
        for stage, found in summary["data_sets"].items()
        if found["profile"].get("categories", {}).keys() - {"(none)"}
    ]
    known = any("categories" in found["profile"] for found in summary["data_sets"].values())
    labels = "no record has a category" if known and not lines else "the column category holds labels of the source"
    return _escaped([f"The assistant's turns are what a model learns; {labels}.", *lines])


def _checks(*names: str) -> Answer:
    """Results of checks, in each stage that ran them."""

    def answer(summary: Mapping[str, Any]) -> str:
        return _escaped(
            [
                f"{stage}, check {name}: {'passed' if facts.get('passed') else 'did not pass'},"
                f" {many(facts['count'], 'finding') if 'count' in facts else 'findings unknown'}"
                + (f", {facts['dropped']} rows dropped" if facts.get("dropped") else "")
                for stage, checks in summary["checks"].items()
                for name, facts in checks.items()
                if name in names
            ]
        )

    return answer


def _splits(summary: Mapping[str, Any]) -> str:
    return f"{_escaped(uses(summary))}\n\n{_checks('split_leakage')(summary)}"


def _errors(summary: Mapping[str, Any]) -> str:
    failed = _escaped(failed_checks(summary) or ["every check of the data passed"])
    return f"{failed}\n\n{_checks('exact_duplicates', 'near_duplicates')(summary)}"


def _sources(summary: Mapping[str, Any]) -> str:
    training = training_records(summary)
    rows = [
        [markdown(path), facts["rows"], training.get(path, 0), f"`{facts['sha256']}`"]
        for path, facts in summary["sources"].items()
    ]
    return "The sources are recorded by their hashes.\n\n" + table(
        ["source", "rows", "in training splits", "sha256"], rows
    )


def _code(summary: Mapping[str, Any]) -> str:
    code = summary["code"]
    if code.get("lineage_at"):
        return f"The project at commit {code['lineage_at']}."
    if not code.get("commit"):
        return f"No commit contains the run: {missing()}"
    return (
        f"Commit {code['commit']} recorded the run; no commit is known that contains all code and parameters that ran."
    )


def _used_for(summary: Mapping[str, Any]) -> str:
    address = summary["model"]["stage"]
    own = f"fine-tuning of {markdown(address)}; " if summary["training"] else ""
    return f"{own}other uses: {missing()}"


def _licenses(summary: Mapping[str, Any]) -> str:
    found = summarize_licenses({}, summary["sources"])
    return _escaped(
        [*(f"{entry['license']}: {', '.join(entry['of'])}" for entry in found["listed"]), *found["problems"]]
    )


def _creators(summary: Mapping[str, Any]) -> str:
    return f"The checked data set: {given(summary['provider'], 'legal_name')}. The sources: {missing()}"


def _generators(summary: Mapping[str, Any]) -> str:
    answer, paths = uses_category(summary["sources"], "synthetic")
    return (
        _of_sources("generator")({"sources": {path: summary["sources"][path] for path in paths}}) if paths else answer
    )


def _mechanisms(summary: Mapping[str, Any]) -> str:
    return given(summary["provider"], "crawlers") if summary["provider"].get("crawlers") else missing()


def _versions(summary: Mapping[str, Any]) -> str:
    hashes = ", ".join(f"{stage} {found['md5']}" for stage, found in summary["data_sets"].items())
    return (
        f"Versions are named by content hash ({markdown(hashes)}) and found in the history by `pedigree audit`, while"
        " DVC's cache or a remote has them."
    )


SECTIONS: dict[str, dict[str, Answer]] = {
    "Motivation": {
        "For what purpose was the data set created?": _of_sources("purposes"),
        "Who created it, and on behalf of which entity?": _creators,
        "Who funded its creation?": _nobody,
    },
    "Composition": {
        "What do the instances represent?": _kinds,
        "How many instances are there?": _numbers,
        "Does it contain all possible instances or a sample?": _sample,
        "What data does each instance consist of?": _columns,
        "Is there a label or target?": _labels,
        "Is information missing from instances?": lambda summary: markdown(missing_data(summary)),
        "Are relationships between instances explicit?": lambda _: (
            "Records with nearly the same text share a group_id; the ledger names the source row of each record."
        ),
        "Are there recommended splits?": _splits,
        "Are there errors, noise or redundancies?": _errors,
        "Is it self-contained?": lambda _: (
            "Records hold their texts. Whether texts refer to outside resources was not looked for."
        ),
        "Does it contain confidential data?": _checks("secrets"),
        "Does it contain data that might be offensive or cause anxiety?": lambda _: (
            f"{missing()}; no check looks for it"
        ),
        "Does it identify subpopulations?": _nobody,
        "Can individuals be identified?": lambda summary: _escaped(personal_data(summary)),
        "Does it contain data that might be considered sensitive?": lambda _: f"{missing()}; no check looks for it",
    },
    "Collection process": {
        "How was the data acquired?": _of_sources("category"),
        "What mechanisms were used to collect it?": _mechanisms,
        "What was the sampling strategy?": _nobody,
        "Who was involved, and how were they compensated?": _nobody,
        "Over what time was it collected?": _of_sources("collected"),
        "Were ethical reviews conducted?": _nobody,
        "Were individuals notified, and did they consent?": _of_sources("permission"),
        "Can consent be revoked?": _nobody,
        "Was the impact on data subjects analyzed?": _nobody,
    },
    "Preprocessing, cleaning, labeling": {
        "Was preprocessing, cleaning or labeling done?": lambda summary: _escaped(processing(summary)),
        "Which models generated or rewrote data?": _generators,
        "Was the raw data saved?": _sources,
        "Is the software available?": _code,
    },
    "Uses": {
        "What was it used for?": _used_for,
        "Is there a list of papers or systems that use it?": _nobody,
        "What else could it be used for?": _nobody,
        "What in its composition might affect future uses?": _errors,
        "Are there tasks for which it should not be used?": _nobody,
    },
    "Distribution": {
        "Will it be distributed to third parties?": _nobody,
        "How and when will it be distributed?": _nobody,
        "Under which licenses?": _licenses,
        "Do third parties restrict its use?": _of_sources("permission"),
        "Do export controls apply?": _nobody,
    },
    "Maintenance": {
        "Who maintains it?": _provider("legal_name"),
        "How can they be contacted?": _provider("contact"),
        "Is there an erratum?": _nobody,
        "Will it be updated?": _nobody,
        "Are there limits on retention?": _of_sources("retain_until"),
        "Are older versions available?": _versions,
        "Can others extend it?": _nobody,
    },
}
"""Section -> question -> its answer. The questions in short form."""
