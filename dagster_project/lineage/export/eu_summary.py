"""The public summary of training content that Article 53(1)(d) of the European Union's AI Act asks for, in the order of
the Commission's template, for a modification of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import date
from typing import Any

from dagster_project.core.text import markdown
from dagster_project.curation.sources.declarations import UNKNOWN
from dagster_project.lineage.export.answers import (
    CATEGORIES,
    MISSING,
    declared,
    given,
    lacking,
    latest_collection,
    missing,
    period,
    scripts,
    training_records,
    uses_category,
)
from dagster_project.lineage.export.responsible import personal_data, processing
from dagster_project.lineage.export.summary import identity
from dagster_project.lineage.export.tables import table

DATA_SETS = True
FILE = "training-content.md"
SHOWS = "what the modification was trained on, in the order of the Commission's template; what is missing is marked"
SHOWS_NOT = "compliance with the AI Act, or what the base model was trained on"
BILLION = 1_000_000_000
SIZES = ((BILLION, "less than 1 billion tokens"), (10_000 * BILLION, "1 billion to 10 trillion tokens"))


def eu_summary(summary: Mapping[str, Any], issued: date) -> str:
    """The summary in Markdown. Every number is one of the lineage; what nothing
    records is printed as missing, never guessed."""
    parts = [
        "# Public summary of training content",
        (
            "For a general-purpose AI model, according to Article 53(1)(d) of Regulation (EU) 2024/1689. It describes"
            " the modification of a base model, and not the training content of that model."
        ),
        _lines(
            {
                "Version of the summary": str(identity("eu-summary", summary["model"].get("md5"), summary["provider"])),
                "Last update": issued.isoformat(),
            }
        ),
        *_general(summary),
        *_sources(summary),
        *_processing(summary),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _lines(answers: Mapping[str, str]) -> str:
    return "\n".join(f"- **{question}:** {answer}" for question, answer in answers.items())


def _general(summary: Mapping[str, Any]) -> list[str]:
    provider, model, base = summary["provider"], summary["model"], summary["base_model"]
    name = (
        given(provider, "model_name")
        if provider.get("model_name")
        else f"{markdown(model['stage'])} (a name for publication is {missing('provider.model_name')})"
    )
    origin = (
        f"{markdown(base['origin'])}, license {markdown(base.get('license') or 'unknown')}"
        if base.get("origin")
        else missing()
    )
    return [
        "## 1. General information",
        "### 1.1. Provider identification",
        _lines(
            {
                "Provider name": given(provider, "legal_name"),
                "Contact details": given(provider, "contact"),
                "Authorized representative name and contact details": given(provider, "representative"),
            }
        ),
        "### 1.2. Model identification",
        _lines(
            {
                "Versioned model name(s)": f"{name}; content md5 {model['md5']}",
                "Model dependencies": "; ".join([f"modification of {origin}", *_taught(summary)]),
                "Summary of the base model": given(provider, "base_model_summary"),
                "Date of placement of the model on the Union market": given(provider, "placed_on_market"),
            }
        ),
        "### 1.3. Modalities, overall training data size and other characteristics",
        table(
            ["modality", "training data size", "types of content"],
            [["text", "; ".join(_sizes(summary)), _content(summary)]],
        ),
        _lines(
            {
                "Latest date of data acquisition/collection for model training": latest_collection(summary["sources"]),
                "Trained on new data continuously": given(provider, "continuous_training"),
                "Linguistic characteristics": " ".join(scripts(summary)) or missing(),
                "Other relevant characteristics": _used(summary),
                **_watched_by(summary),
            }
        ),
    ]


def _sizes(summary: Mapping[str, Any]) -> list[str]:
    """The range of the template where all tokens are counted, the records of
    each training split, and what `tokenized` made of them."""
    tokenized = summary["stages"].get("tokenized", {}).get("train")
    lines = [
        f"{stage}: {found['tables']['train']['rows']:,} training records"
        for stage, found in summary["data_sets"].items()
        if "train" in found["tables"]
    ]
    if isinstance(tokenized, Mapping) and "tokens" in tokenized:
        tokens = tokenized["tokens"]
        lines.append(
            f"tokenized: {tokenized.get('examples', MISSING)} examples with {tokens:,} tokens of the base model's"
            " tokenizer"
        )
        if "preferences" not in summary["data_sets"]:
            lines.insert(0, next((label for limit, label in SIZES if tokens < limit), "more than 10 trillion tokens"))
    return lines or [missing()]


def _content(summary: Mapping[str, Any]) -> str:
    layouts = dict.fromkeys(markdown(facts["format"]) for facts in summary["sources"].values())
    categories: Counter[str] = Counter()
    for found in summary["data_sets"].values():
        categories.update({name: n for name, n in found["profile"].get("categories", {}).items() if name != "(none)"})
    named = ", ".join(f"{markdown(name)} {n}" for name, n in categories.items())
    labels = f"; labels of all checked records, those of test splits included: {named}" if categories else ""
    return f"records for fine-tuning, layouts of the sources: {', '.join(layouts)}{labels}"


def _used(summary: Mapping[str, Any]) -> str:
    """How much of the training splits the training steps saw, where that is recorded."""
    records = summary["records"]
    if records is None:
        return f"{MISSING}: nothing records which records the training steps used"
    parts = [
        f"{model}: {part['records']:,} records, {part['views']:,} times in {part['steps']:,} steps"
        for model, part in records["learnt_by"].items()
    ]
    return f"used by training steps: {'; '.join(parts)}"


def _watched_by(summary: Mapping[str, Any]) -> dict[str, str]:
    """Models that measured a training: what they were trained on is not listed among its data."""
    names = [
        f"{markdown(one['stage'])} (content md5 {one['md5']}) during {markdown(one['training'])}"
        for one in summary.get("watched_by", ())
    ]
    return (
        {"Watched by, not trained on": f"{'; '.join(names)}: its training data are not part of this summary"}
        if names
        else {}
    )


def _sources(summary: Mapping[str, Any]) -> list[str]:
    sources, provider = summary["sources"], summary["provider"]
    answers = {category: uses_category(sources, category) for category in CATEGORIES}

    def section(category: str, **more: str) -> str:
        """Whether data of the category was used; if so, which and `more`."""
        answer, paths = answers[category]
        return _lines({"Used": answer, **(more | _details(sources, paths) if paths else {})})

    undeclared = declared(sources, "category")[1]
    training = training_records(summary)
    return [
        "## 2. List of data sources",
        table(
            ["source", "rows", "in training splits", "license", "category", "collected", "sha256"],
            [_row(path, facts, training) for path, facts in sources.items()],
        ),
        "### 2.1. Publicly available datasets",
        section("public"),
        "### 2.2. Private non-publicly available datasets obtained from third parties",
        "#### 2.2.1. Datasets commercially licensed by rightsholders or their representatives",
        section("licensed"),
        "#### 2.2.2. Private datasets obtained from other third parties",
        section("third_party"),
        "### 2.3. Data crawled and scraped from online sources",
        section("crawled", **{"Crawlers, their behavior, and sites": given(provider, "crawlers")}),
        "### 2.4. User data",
        section("user", **{"Services and products": given(provider, "user_services")}),
        "### 2.5. Synthetic data",
        _lines(_with_own_answers(_synthetic(sources, _taught(summary)), summary)),
        "### 2.6. Other sources of data",
        _lines({"Used": lacking("category", undeclared) if undeclared or not sources else "no"}),
    ]


def _row(path: str, facts: Mapping[str, Any], training: Mapping[str, int]) -> list[Any]:
    own = {key: found.get(path) for key in ("category", "collected") for found, _ in [declared({path: facts}, key)]}
    license = facts.get("license") or UNKNOWN
    return [
        markdown(path),
        facts["rows"],
        training.get(path, 0),
        MISSING if license == UNKNOWN else markdown(license),
        markdown(own["category"]) if own["category"] else MISSING,
        period(own["collected"]) if own["collected"] else MISSING,
        f"`{facts['sha256']}`",
    ]


def _details(sources: Mapping[str, Mapping[str, Any]], paths: list[str]) -> dict[str, str]:
    """Of the sources of one category: modality, size and period."""
    periods = declared(sources, "collected")[0]
    shown = [
        f"{markdown(path)} ({sources[path]['rows']} rows, collected {period(periods.get(path, {}))})" for path in paths
    ]
    return {"Modality": "text", "Datasets": "; ".join(shown)}


def _taught(summary: Mapping[str, Any]) -> list[str]:
    """The larger models that a training learned from."""
    return [
        f"distillation by {markdown(one['training'])} from {markdown(one['folder'])}, license"
        f" {markdown(one['license'])}, sha256 of "
        + ", ".join(
            f"{markdown(name)} `{digest}`" for name, digest in one["sha256"].items() if name.endswith(".safetensors")
        )
        for one in summary.get("teachers", ())
    ]


def _with_own_answers(lines: dict[str, str], summary: Mapping[str, Any]) -> dict[str, str]:
    """Adds the answers of the model itself, from which it learned: the template
    counts what alignment generates among synthetic data."""
    online = [
        f"{markdown(one['training'])} ({markdown(one['method'])}) learned from"
        f" {MISSING if one['answers'] is None else one['answers']} answers that it wrote during training"
        for one in summary.get("own_answers", ())
    ]
    if not online:
        return lines
    of_sources = lines["Used"]
    used = of_sources if of_sources.startswith("yes") else "yes" if of_sources == "no" else f"yes ({of_sources})"
    return {**lines, "Used": used, "Answers of the model itself": "; ".join(online)}


def _synthetic(sources: Mapping[str, Mapping[str, Any]], taught: list[str]) -> dict[str, str]:
    """Which data a model wrote, and which model; the template counts model distillation among them."""
    answer, paths = uses_category(sources, "synthetic")
    if taught:
        known = _synthetic(sources, []) if paths else {}
        return {**known, "Used": answer if paths else "yes", "Models that were distilled": "; ".join(taught)}
    if not paths:
        return {"Used": answer}
    generators = declared(sources, "generator")[0]
    unknown = [path for path in paths if path not in generators]
    named = [f"{markdown(generators[path])} for {markdown(path)}" for path in paths if path in generators]
    models = "; ".join([*named, *([lacking("generator", unknown)] if unknown else [])])
    return {"Used": answer, "Models that generated it": models, **_details(sources, paths)}


def _processing(summary: Mapping[str, Any]) -> list[str]:
    provider = summary["provider"]
    return [
        "## 3. Data processing aspects",
        "### 3.1. Respect of reservation of rights from text and data mining exception or limitation",
        _lines(
            {
                "Signatory of the Code of Practice for general-purpose AI models": given(provider, "code_of_practice"),
                "Measures": given(provider, "rights_reservations"),
            }
        ),
        "### 3.2. Removal of illegal content",
        _lines({"Measures": given(provider, "illegal_content")}),
        "### 3.3. Other information (optional)",
        "\n".join(f"- {markdown(line)}" for line in [*processing(summary), *personal_data(summary)]),
    ]
