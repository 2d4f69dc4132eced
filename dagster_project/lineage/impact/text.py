"""The answer of `pedigree impact` as text for the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from dagster_project.core.text import listed, many, visible
from dagster_project.lineage.impact.undecided import NOTHING_RECORDED
from dagster_project.lineage.unfinished_erasure import NOTE

SHOWN = 12
"""Most steps, records and missing outputs shown; `--json` lists all."""


def as_text(result: Mapping[str, Any]) -> str:
    """The result as text for the terminal."""
    ((kind, value),) = result["asked"].items()
    versions = len(result["models"])
    lines = [f"{kind} {visible(value)}"]
    if "published" in result:
        lines.append(f"published id of record {result['published']['record']}")
    if "read_by" in result:
        lines.append(f"named by {', '.join(result['read_by'])}, but not as a source of rows that are trained on")
    if result["records"] and result["records"] != [value]:
        lines.append(f"records {listed(result['records'], SHOWN)}")
    for match in result.get("matches", [])[:SHOWN]:
        lines.append(f"match   {match['example_id']}  {match['role']}, {match['field']}  {visible(match['excerpt'])}")
    for copy in result.get("near", [])[:SHOWN]:
        lines.append(
            f"near    {copy['example_id']}  {copy['part']}, {copy['rule']} {copy['similarity']:.2f}"
            f"  {visible(' '.join(copy['text'].split())[:80])}"
        )
    for name in ("matches", "near"):
        if (more := len(result.get(name, ())) - SHOWN) > 0:
            lines.append(f"{name:7} {more} more, which --json lists")
    lines.append("")
    for model in result["models"]:
        lines.append(_model_line(model, result["shallow"]))
        if "registered" in model:
            from dagster_project.views.lineage import versions_text

            lines.append(f"  {versions_text(model['registered'])}")
        lines += [f"  {_exposure_text(seen, model)}" for seen in model["seen"]]
        if missing := model.get("missing"):
            lines.append(
                f"  perhaps more: {', '.join(output['path'] for output in missing)} could not be looked at;"
                f" fetch: {model['fetch']}"
            )
    lines += [""] if versions else []
    lines += _watched_text(result.get("watched", []), result["shallow"])
    seen = result["looked_at"]
    answers = {
        "yes": f"{many(versions, 'model version')} saw it",
        "no": "no model saw it",
        "cannot tell": "no model is known to have seen it, but not everything could be looked at",
    }
    forgotten = "erased" in result and result["verdict"] == "no"
    lines.append("no model is known any more to have seen it" if forgotten else answers[result["verdict"]])
    if "erased" in result:
        lines.append(
            f"it was erased on {result['erased']}:"
            " data/erasures lists the models that had seen it, and which of them were deleted"
            if result["erasure"] == "done"
            else f"it was taken out of the sources on {result['erased']}, but {NOTE}"
        )
    lines.append(
        f"looked at {seen['models']} models and {seen['data_sets']} data sets ({seen['rows']:,} rows)"
        f" in {seen['commits']} commits with a dvc.lock, {seen['commits_in_reflog']} more in the reflog,"
        f" the workspace and {seen['cached_runs']} entries of DVC's run cache"
    )
    if unknown := result["unknown"]:
        lines.append(
            f"unknown for {len(unknown)}, because upstream outputs are not in the cache or nothing records them:"
        )
        groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for model in unknown:
            groups[model["fetch"]].append(model)
        for command, models in list(groups.items())[:SHOWN]:
            lines.append("  " + listed([f"{model['stage']} {model['md5'][:12]}" for model in models], SHOWN))
            absent = dict.fromkeys([output["path"] for model in models for output in model["missing"]])
            absent |= dict.fromkeys(path for model in models for path in model.get("unexplained", ()))
            missing = f"missing: {', '.join(absent)}; fetch: "
            lines.append(f"    {'' if command == NOTHING_RECORDED else missing}{command}")
    if result["unreadable"]:
        names = [
            name
            if name.startswith(("run cache", "the history"))
            else f"the dvc.lock of {name if ' ' in name else name[:12]}"
            for name in result["unreadable"]
        ]
        lines.append(f"cannot be read: {listed(names, SHOWN)}")
    if result["shallow"]:
        lines.append(
            "this clone is shallow: models before its first commit are unknown (`git fetch --unshallow` brings them)"
        )
    return "\n".join(lines)


def _watched_text(models: Sequence[Mapping[str, Any]], shallow: bool) -> list[str]:
    """Models that only were measured by one that saw the record."""
    if not models:
        return []
    lines = ["watched by a model that saw it, and not trained on it:"]
    for model in models:
        lines.append(_model_line(model, shallow))
        for one in model["watched_by"]:
            training = f" during {one['training']}" if one["training"] != model["stage"] else ""
            lines += [
                f"  watched by {one['by']} {one['md5'][:12]}{training}: {_exposure_text(seen, one)}"
                for seen in one["seen"]
            ]
    return [*lines, ""]


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
        steps_text = (
            f"{training['records']} records in steps {training['first_step']} to {training['last_step']}"
            if training["records"]
            else _not_learned(seen)
        )
    return f"{splits}; {steps_text}{through}"


def _not_learned(seen: Mapping[str, Any]) -> str:
    """What a model did with records that it was not trained on, as far as lineage knows."""
    if "measured" not in seen:
        return "not trained on"
    if seen["measured"] is None:
        return "not trained on; whether answers to it were measured before and after training is unknown"
    return (
        "not trained on, but among the tasks whose answers are measured before and after training"
        " (the first `samples` of the split)"
    )
