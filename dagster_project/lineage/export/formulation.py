"""How the parts of a bill of materials were made (`formulation`), and which run
states each of them (`citations`), in the JSON of CycloneDX 1.7."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, date, datetime, time
from typing import Any

Json = dict[str, Any]
TYPED = "The license is the one that params.yaml declares; the other values were computed by this run."


def formulation(summary: Mapping[str, Any], refs: set[str]) -> list[Json]:
    """One workflow, with a task for the run of each stage.

    Args:
        refs: `bom-ref` of the components.
    """
    model, stages = summary["model"], summary["stages"]
    dependencies = [
        {"ref": _task_ref(name), "dependsOn": [_task_ref(one) for one in parents_of(name, stages)]} for name in stages
    ]
    workflow = {
        "bom-ref": "workflow",
        "uid": model.get("md5") or model["stage"],
        "name": model["stage"],
        "description": "Recorded in dvc.lock. Times are not recorded.",
        "taskTypes": ["build"],
        "tasks": [_task(name, summary, refs) for name in stages],
        "taskDependencies": [one for one in dependencies if one["dependsOn"]],
    }
    return [{"bom-ref": "formula", "workflows": [workflow]}]


def parents_of(name: str, stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The stages whose outputs a stage read: as a whole, parts of them, or in folders of outputs."""
    return [one for one in stages[name].get("parents", ()) if one in stages]


def _task_ref(name: str) -> str:
    return f"task:{name}"


def _task(name: str, summary: Mapping[str, Any], refs: set[str]) -> Json:
    stage = summary["stages"][name]
    read = [_component(one, refs) or _output(summary["stages"][one]) for one in parents_of(name, summary["stages"])]
    read += [{"ref": f"source:{path}"} for path in stage.get("sources", ())]
    read += [{"ref": f"teacher:{name}"}] if f"teacher:{name}" in refs else []
    values = [{"name": key, "value": json.dumps(value)} for key, value in stage.get("parameters", {}).items()]
    made = {"ref": "model"} if name == summary["model"]["stage"] else _component(name, refs) or _output(stage)
    return {
        "bom-ref": _task_ref(name),
        "uid": stage["md5"],
        "name": name,
        "taskTypes": ["build"],
        **({"steps": [{"commands": [{"executed": stage["cmd"]}]}]} if stage.get("cmd") else {}),
        "inputs": [*({"resource": one} for one in read), *([{"parameters": values}] if values else [])],
        "outputs": [{"type": "artifact", "resource": made}],
    }


def _component(name: str, refs: set[str]) -> Json | None:
    found = name if name in refs else f"stage:{name}"
    return {"ref": found} if found in refs else None


def _output(stage: Mapping[str, Any]) -> Json:
    """An output that is not a component, by DVC's hash."""
    hashes = [{"alg": "MD5", "content": stage["md5"].removesuffix(".dir")}]
    return {
        "externalReference": {
            "type": "other",
            "url": stage["output"],
            "hashes": hashes,
            "comment": "md5 as in dvc.lock",
        }
    }


def citations(document: Mapping[str, Any], summary: Mapping[str, Any], issued: date) -> list[Json]:
    """For each component that a run made or read, the run whose report states its values."""
    readers = {path: name for name, stage in summary["stages"].items() for path in stage.get("sources", ())}
    found = []
    for position, part in enumerate(document["components"]):
        kind, _, name = part["bom-ref"].partition(":")
        run = {"stage": name, "source": readers.get(name), "base_model": kind}.get(kind)
        if run is not None and run in summary["stages"]:
            found.append(_citation(f"/components/{position}", run, issued, TYPED if "licenses" in part else ""))
    hashed = "hashes" in document["metadata"]["component"] and summary["model"]["stage"] in summary["stages"]
    return [
        *found,
        *([_citation("/metadata/component/hashes", summary["model"]["stage"], issued, "")] if hashed else []),
    ]


def _citation(pointer: str, run: str, issued: date, note: str) -> Json:
    return {
        "pointers": [pointer],
        "timestamp": datetime.combine(issued, time(), UTC).isoformat(),
        "process": _task_ref(run),
        **({"note": note} if note else {}),
    }
