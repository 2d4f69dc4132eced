"""The answer of `pedigree impact` as text for the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from dagster_project.core.text import listed, many
from dagster_project.lineage.impact.undecided import NOTHING_RECORDED
from dagster_project.lineage.unfinished_erasure import NOTE
from dagster_project.views.texts import text

SHOWN = 12
"""Most steps, records and missing outputs shown; `--json` lists all."""


def as_text(result: Mapping[str, Any]) -> str:
    """The result as text for the terminal."""
    from dagster_project.views.lineage import versions_text

    ((kind, value),) = result["asked"].items()
    optional: dict[str, Any] = {
        "published": None,
        "erased": None,
        "read_by": [],
        "matches": [],
        "near": [],
        "watched": [],
    }
    return text(
        "impact",
        **{**optional, **result},
        kind=kind,
        value=value,
        not_read=[
            name
            if name.startswith(("run cache", "the history", "the pipeline"))
            else f"the dvc.lock of {name if ' ' in name else name[:12]}"
            for name in result["unreadable"]
        ],
        groups=_by_command(result["unknown"]),
        head=partial(_model_line, shallow=result["shallow"]),
        seen=_exposure_text,
        versions_text=versions_text,
        shown=SHOWN,
        unfinished=NOTE,
        nothing_recorded=NOTHING_RECORDED,
    )


def _by_command(unknown: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[str]]]:
    """Each command that fetches what is missing, the models that cannot be decided without it, and what it is."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for model in unknown:
        groups[model["fetch"]].append(model)
    found = []
    for command, models in groups.items():
        absent = dict.fromkeys([output["path"] for model in models for output in model["missing"]])
        absent |= dict.fromkeys(path for model in models for path in model.get("unexplained", ()))
        found.append((command, [f"{model['stage']} {model['md5'][:12]}" for model in models], [*absent]))
    return found


def _model_line(model: Mapping[str, Any], shallow: bool) -> str:
    aliases = f", also called {', '.join(model['also_called'])}" if model["also_called"] else ""
    return f"{model['stage']}  md5 {model['md5'][:12]}  {_where(model, shallow)}{aliases}"


def _where(model: Mapping[str, Any], shallow: bool) -> str:
    """Where a model is recorded."""
    if model["found_in"] == "commit":
        return f"commit {model['commit'][:12]}"
    if model["found_in"] == "reflog":
        return f"commit {model['commit'][:12]}, in no branch or tag but in the reflog"
    if model["found_in"] == "workspace":
        return "uncommitted"
    return f"{'in no commit of this shallow clone' if shallow else 'never committed'}, in DVC's {model['found_in']}"


def _exposure_text(seen: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    through = f" through {seen['by']} {seen['md5'][:12]}" if seen["md5"] != model["md5"] else ""
    if not through and seen["by"] in model.get("also_called", ()):  # the same bytes, trained under another name
        through = f" as {seen['by']}"
    splits = ", ".join(f"{split} {n}" for split, n in seen["splits"].items())
    if seen.get("distilled"):
        return f"distilled from it{through}"
    if not splits:
        return f"derived from it{through}" if through else "is this model"
    if "steps" in seen:
        steps = seen["steps"]
        if "train" not in seen["splits"]:
            steps_text = _not_learned(seen)
        elif steps is None:
            steps_text = "at steps unknown"
        elif not steps:
            steps_text = "in no step"
        else:
            steps_text = f"step {listed(steps, SHOWN)}"
    elif seen["learnt"] is None:
        steps_text = "at steps unknown"
    else:
        training = seen["learnt"]
        first, last = training["first_step"], training["last_step"]
        within = f"step {first}" if first == last else f"steps {first} to {last}"
        steps_text = f"{many(training['records'], 'record')} in {within}" if training["records"] else _not_learned(seen)
    return f"{splits}; {steps_text}{through}"


def _not_learned(seen: Mapping[str, Any]) -> str:
    """What a model did with records that it was not trained on, as far as the lineage is known."""
    if "measured" not in seen:
        return "not trained on"
    if seen["measured"] is None:
        return "not trained on; whether answers to it were measured before and after training is unknown"
    return (
        "not trained on, but among the tasks whose answers are measured before and after training"
        " (the first `samples` of the split)"
    )
