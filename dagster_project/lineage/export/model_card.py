"""The model card, as the Hugging Face Hub reads it: a metadata block, then what people read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from dagster_project.core.text import markdown
from dagster_project.curation.sources import use_policy
from dagster_project.curation.sources.declarations import NAMES, declared_sources
from dagster_project.lineage.export.licenses import most_restrictive, name_on_the_hub
from dagster_project.lineage.export.summary import REWARD_MODEL, is_head, limits, results, task_of
from dagster_project.lineage.export.tables import table

FILE = "README.md"
SHOWS = "how the model was made, measured and checked, as people read it"
SHOWS_NOT = "that its numbers are right: that takes making the model again"
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def model_card(summary: Mapping[str, Any], issued: date | None = None) -> str:
    """A README.md for the model.

    Args:
        summary: of `export.summarize`, or of `from_reports` in a stage, which has neither commit nor dvc.lock.
        issued: None leaves the line out.
    """
    return f"---\n{_metadata(summary)}\n---\n\n{_text(summary, issued)}"


def _metadata(summary: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    address, base, training = summary["model"]["stage"], summary["base_model"], summary["training"]
    origin = base.get("origin", "").partition("@")[0]
    data_set = (
        ("preferences", "test split of the project's preferences")
        if address == REWARD_MODEL
        else ("splits", "test split of the project's data")
    )
    evaluated = [
        EvalResult(
            task_type=task_of(summary),
            dataset_type=data_set[0],
            dataset_name=data_set[1],
            dataset_split="test",
            metric_type=one["name"],
            metric_value=one["value"],
            metric_args={"confidence": 0.95, "low": one["low"], "high": one["high"]},
        )
        for one in results(summary)
    ]
    hub = sorted({source["hub"] for source in summary["sources"].values() if "hub" in source})
    license = most_restrictive(summary)
    known = name_on_the_hub(license) if license else None
    data = ModelCardData(
        base_model=origin if HUB_ID.match(origin) and "@" in base.get("origin", "") else None,
        datasets=hub or None,
        library_name="transformers" if summary["model"]["stands_alone"] else None if is_head(summary) else "peft",
        license=None if license is None else known or "other",
        license_name=None if known else license,
        pipeline_tag=task_of(summary),
        tags=sorted({"pedigree", *([training["method"]] if "method" in training else [])}),
        model_name=address,
        eval_results=evaluated or None,
    )
    return data.to_yaml(line_break="\n").strip()


def _text(summary: Mapping[str, Any], issued: date | None) -> str:
    parts = [*_head(summary, issued), *_data(summary)]
    parts += ["## Results", _results(summary), *map(markdown, summary["advice"])]
    parts += ["## Limits", "\n".join(f"- {markdown(line)}" for line in limits(summary))]
    return "\n\n".join(filter(None, [*parts, *_training(summary), *_proof(summary)])) + "\n"


def _head(summary: Mapping[str, Any], issued: date | None) -> list[str]:
    """The paragraphs before the first section: the models that it is made from, and what identifies it."""
    model, base = summary["model"], summary["base_model"]
    weights = ", ".join(
        f"`{name}` {digest}" for name, digest in base.get("sha256", {}).items() if name.endswith(".safetensors")
    )
    parts = [
        f"# {markdown(model['stage'])}",
        (
            f"Tuned from {markdown(base.get('origin', 'a base model that is not recorded'))}, license"
            f" {markdown(base.get('license', 'unknown'))}, {base.get('parameters', 0):,} parameters (sha256 of"
            f" {weights or 'its weights: unknown'})."
        ),
    ]
    for one in summary.get("teachers", ()):
        hashes = ", ".join(
            f"`{markdown(name)}` {digest}" for name, digest in one["sha256"].items() if name.endswith(".safetensors")
        )
        parts.append(
            f"{markdown(one['training'])} is distilled from the larger model {markdown(one['folder'])}, license "
            f"{markdown(one['license'])} (sha256 of {hashes})."
        )
    identity = [
        ("content", f"sha256 {model['sha256']}" if model.get("sha256") else ""),
        ("DVC", model.get("md5", "")),
        ("issued", issued.isoformat() if issued else ""),
    ]
    return [*parts, _lines(identity)]


def _data(summary: Mapping[str, Any]) -> list[str]:
    sources = [
        [markdown(path), s["rows"], s["format"], markdown(s["license"]), f"`{s['sha256']}`"]
        for path, s in summary["sources"].items()
    ]
    parts = ["## Data", table(["source", "rows", "format", "license", "sha256"], sources)]
    if sources:
        parts += ["What the project declares about its sources; it is not verified.", _declarations(summary)]
    if listed := summary["licenses"]["listed"]:
        parts += [
            "The licenses of data and base model, most restrictive first. The metadata name the first.",
            table(
                ["license", "kind", "of"],
                [[markdown(one["license"]), one["family"], markdown(", ".join(one["of"]))] for one in listed],
            ),
        ]
    if policy := use_policy.lines(summary.get(use_policy.NAME)):
        parts += ["The use policy of the project:", "\n".join(f"- {markdown(line)}" for line in policy)]
    rows = [
        [
            name,
            s["rows_in"],
            s["rows_out"],
            ", ".join(f"{why} {n}" for why, n in s.get("dropped", {}).items()) or "none",
            f"`{s['sha256']}`",
        ]
        for name, s in summary["stages"].items()
        if "rows_in" in s
    ]
    parts.append(table(["stage", "rows in", "rows out", "dropped", "sha256"], rows))
    for name, stage in summary["stages"].items():
        if "train" in stage and "test" in stage:
            parts.append(
                f"Train {stage['train']}, validation {stage['validation']} and test {stage['test']}"
                f" {'pairs' if name == 'preferences' else 'examples'}{_copies(stage)}; near-copies never straddle two"
                " of them."
            )
    return parts


def _training(summary: Mapping[str, Any]) -> list[str]:
    """How it was made, in which versions, and what was only compared with it."""
    code = summary.get("code", {})
    settings = [(key.replace("_", " "), markdown(_value(value))) for key, value in summary["training"].items()]
    if before := summary.get("started_from"):
        taken = ", ".join(f"{key} {_value(value)}" for key, value in before.items() if key != "training")
        settings.append(
            ("started from", markdown(f"{before['training']}, whose training is not counted here: {taken}"))
        )
    parts = ["## How it was made", _lines(settings)]
    if summary["environment"]:
        parts.append(f"With {', '.join(f'{name} {version}' for name, version in summary['environment'].items())}.")
    checks = [check["passed"] for stage in summary["stages"].values() for check in stage.get("checks", {}).values()]
    measured = [check["passed"] for checks_of in summary["checks_of_metrics"].values() for check in checks_of.values()]
    more = "" if all(measured) else f", and {sum(measured)} of {len(measured)} of its evaluation"
    parts.append(f"{sum(checks)} of {len(checks)} checks passed{more}.")
    commit = code.get("commit")
    if commit and not code["clean"]:
        differs = ", ".join(markdown(path) for path in code.get("differs", []))
        parts.append(f"Made with code or parameters that commit {commit} does not contain: {differs}.")
    elif code and not commit:
        parts.append("Made with uncommitted work" + (f", after commit {code['after']}." if code.get("after") else "."))
    recorded = [
        [name, f"{s['commit']}{' or earlier' * s.get('or_earlier', False)}", s["date"] or "unknown"]
        for name, s in summary["stages"].items()
        if s.get("commit")
    ]
    if recorded:
        parts += ["The first commit that recorded the run of each stage:", table(["stage", "commit", "date"], recorded)]
    for one in summary.get("watched_by", ()):
        parts.append(
            f"The training of {markdown(one['training'])} was watched by {markdown(one['stage'])}: measured, not"
            " learned from."
        )
    if watched := summary.get("watched"):
        parts.append(
            "Compared with it or only used to measure it, so that nothing was learned from them:"
            f" {markdown(', '.join(watched))}."
        )
    return parts


def _proof(summary: Mapping[str, Any]) -> list[str]:
    stage, commit = summary["model"]["stage"], summary.get("code", {}).get("lineage_at")
    commands = [*([f"git checkout {commit}"] if commit else []), "dvc pull", f"pedigree verify {stage} --deep"]
    return [
        "## Proof",
        "\n".join(["```console", *(f"$ {line}" for line in commands), "```"]),
        (
            f"makes it again from the sources and compares the bytes; `pedigree audit {stage}` names every row and"
            " parameter."
        ),
    ]


def _declarations(summary: Mapping[str, Any]) -> str:
    declared = {path: one.shown for path, one in declared_sources(summary).items()}
    return table(
        ["source", *NAMES.values()],
        [[markdown(path), *map(markdown, shown.values())] for path, shown in declared.items()],
    )


def _copies(stage: Mapping[str, Any]) -> str:
    """The copies that `splits.augment` added to train."""
    added = stage.get("augmented", {})
    return f", and {sum(added.values())} copies of train examples with other prompts ({_value(added)})" if added else ""


def _results(summary: Mapping[str, Any]) -> str:
    rows = [[one["name"], f"{one['value']:.4g}", f"{one['low']:.4g} to {one['high']:.4g}"] for one in results(summary)]
    return table(["measure", "value", "95 % interval"], rows) if rows else "None were measured."


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _lines(pairs: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in pairs if value)
