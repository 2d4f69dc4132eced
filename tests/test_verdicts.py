"""Random reproductions: the verdict of `pedigree verify` is the one that
docs/verify.md defines, with the bounds of its table.

A stage's recorded machine is edited in its report, its weights and numbers are
scaled, and objects of the cache are lost. Nothing runs.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from builders.history import Project, entry, md5
from conftest import ROOT
from safetensors.numpy import save

from dagster_project.commands.outputs import Outputs
from dagster_project.lineage.history import Objects, Revision
from dagster_project.orchestration import dvc_cache

DVC_YAML = """\
stages:
  base_model: {cmd: x, outs: [data/base_model]}
  splits: {cmd: x, outs: [data/splits], metrics: [{data/reports/splits.json: {cache: false}}]}
  adapter: {foreach: {lora: 1}, do: {cmd: x, outs: ["data/adapter/${key}"], \
metrics: [{"data/reports/adapter/${key}.json": {cache: false}}]}}
  merged: {foreach: {lora: 1}, do: {cmd: x, outs: ["data/merged/${key}"], \
metrics: [{"data/reports/merged/${key}.json": {cache: false}}]}}
"""
MACHINE = {
    "cpu": "Xeon",
    "packages": "12ab",
    "architecture": "x86_64",
    "flags": ["avx", "avx2"],
    "threads": 2,
    "instruction_set": {"torch": "AVX2"},
}
EDITS: tuple[dict[str, Any], ...] = (
    {},
    {"cpu": "EPYC"},
    {"packages": "34cd"},
    {"flags": ["avx"]},
    {"threads": 4},
    {"instruction_set": {"torch": "AVX512"}},
    {"cuda": {"driver": "1"}},
)


def documented_bounds() -> dict[tuple[str, str], dict[str, float]]:
    """(stage, format) -> measure -> bound, from the table of docs/verify.md."""
    found = {}
    lines = (ROOT / "docs/verify.md").read_text(encoding="utf-8").splitlines()
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8 and cells[1] in {"float32", "bfloat16"}:
            bounds = {
                name: float(cell.split()[0])
                for name, cell in zip(("update", "weight", "number"), cells[2:5], strict=True)
                if cell
            }
            found |= {(stage, cells[1]): bounds for stage in re.findall(r"`(\w+)`", cells[0])}
    return found


def weights(stage: str, scale: float) -> dict[str, bytes]:
    """The files of a stage: what it learned is scaled."""
    import numpy as np

    some = np.arange(1, 13, dtype=np.float32)
    if stage == "splits":
        return {"rows.txt": f"{float(scale)}".encode()}
    if stage == "adapter":
        pair = {
            "x.lora_A.weight": some.reshape(2, 6),
            "x.lora_B.weight": (some[:6] * np.float32(1 + scale)).reshape(3, 2),
        }
        return {"adapter_model.safetensors": save(pair)}
    return {"model.safetensors": save({"w": 1 + some * np.float32(1 + scale)})}


def measured(stage: str, scale: float) -> dict[str, float]:
    """The measures of docs/verify.md for `weights`."""
    if stage == "adapter":
        return {"update": scale}
    return {"update": scale, "weight": 12 * scale / (1 + 12)}  # base weights are 1


def expected(case: dict[str, Any], bounds: dict[tuple[str, str], dict[str, float]]) -> str:
    """The verdict as docs/verify.md defines it."""
    if not (case["scale"] or case["number"] or case["text"]):
        return "identical"
    recorded, stage = case["recorded"], case["stage"]
    if (
        stage == "splits"
        or recorded is None
        or {**recorded, "cpu": "", "packages": ""} == {**MACHINE, "cpu": "", "packages": ""}
    ):
        return "different"
    if case["text"] or (case["lost"] and case["scale"]):
        return "different"
    allowed = bounds[stage, "float32" if case["dtype"] == "float32" else "bfloat16"]
    found = {**(measured(stage, case["scale"]) if case["scale"] else {}), "number": case["number"] / 2}
    return "elsewhere" if all(value <= allowed[measure] for measure, value in found.items()) else "different"


def reproduced(case: dict[str, Any], folder: Path) -> Outputs:
    """A project that recorded a stage, and a clone in which it was reproduced."""
    made, stage = Project(folder / "project"), case["stage"]
    name, clone = stage if stage == "splits" else f"{stage}@lora", folder / "clone"
    path = name.replace("@", "/")
    report = {
        "loss": 2.0,
        "note": "as it was",
        **({"machine": case["recorded"]} if case["recorded"] is not None else {}),
    }
    base = {"base.safetensors": weights("merged", -1)["model.safetensors"]}
    for root, document in (
        (made.root, report),
        (clone, {"loss": 2.0 + case["number"], "note": case["text"] or "as it was", "machine": MACHINE}),
    ):
        (root / f"data/reports/{path}.json").parent.mkdir(parents=True, exist_ok=True)
        (root / f"data/reports/{path}.json").write_text(json.dumps(document))
    recorded = {"path": f"data/reports/{path}.json", "md5": md5((made.root / f"data/reports/{path}.json").read_bytes())}
    lock = {name: entry(name, {"data/base_model": made.put(base)}, made.put(weights(stage, 0)), recorded)}
    lock[name]["params"] = {"params.yaml": {"compute": {"dtype": case["dtype"]}}}
    made.commit(lock)
    if case["lost"]:
        (content,) = weights(stage, 0).values()
        made.object(md5(content)).unlink()
    for place, files in ((f"data/{path}", weights(stage, case["scale"])), ("data/base_model", base)):
        (clone / place).mkdir(parents=True)
        for file, content in files.items():
            (clone / place / file).write_bytes(content)
    (clone / "dvc.yaml").write_text(DVC_YAML)
    dvc_cache.isolate_project(clone)
    return Outputs(Revision(made.root, None), lock, Objects(made.root), clone)


@pytest.mark.parametrize("seed", range(16))
def test_the_verdict_is_the_documented_one(seed: int, tmp_path: Path) -> None:
    draw, bounds = random.Random(seed), documented_bounds()
    case: dict[str, Any] = {
        "stage": draw.choice(["adapter", "adapter", "merged", "merged", "splits"]),
        "dtype": draw.choice(["float32", "bfloat16", "auto"]),
        "recorded": draw.choice([None, *({**MACHINE, **edit} for edit in EDITS)]),
        "text": draw.choice(["", "", "", "", "another text"]),
        "lost": draw.random() < 0.15,
        "scale": 0.0,
        "number": 0.0,
    }
    if case["stage"] == "splits":
        case["scale"] = draw.choice([0.0, 1.0])
    else:
        allowed = bounds[case["stage"], "float32" if case["dtype"] == "float32" else "bfloat16"]
        smallest = min(allowed[measure] / value for measure, value in measured(case["stage"], 1.0).items())
        case["scale"] = smallest * draw.choice([0, 0.5, 0.8, 1.3, 10])
        case["number"] = 2 * allowed["number"] * draw.choice([0, 0, 0.5, 2])
    outputs = reproduced(case, tmp_path)
    (name,) = outputs.lock
    assert outputs.judge(name, outputs.compare(name)[1]).verdict == expected(case, bounds), case


def test_a_file_that_only_one_of_the_machines_made_is_different(tmp_path: Path) -> None:
    """All that both made is within its bound."""
    case = {
        "stage": "adapter", "dtype": "float32", "recorded": {**MACHINE, "threads": 4}, "text": "", "lost": False,
        "scale": 0.001, "number": 0.0,
    }  # fmt: skip
    outputs, name = reproduced(case, tmp_path), "adapter@lora"
    assert outputs.judge(name, outputs.compare(name)[1]).verdict == "elsewhere"
    file = outputs.root / "data/adapter/lora/more.txt"
    file.write_text("x")
    judged = outputs.judge(name, outputs.compare(name)[1])
    assert judged.verdict == "different"
    assert judged.reasons == ["data/adapter/lora/more.txt: cannot be compared"]
    made = file.with_name("adapter_model.safetensors")
    made.replace(file)
    judged = outputs.judge(name, outputs.compare(name)[1])
    assert judged.verdict == "different" and [reason.partition(":")[0] for reason in judged.reasons] == [
        "data/adapter/lora/adapter_model.safetensors", "data/adapter/lora/more.txt",
    ]  # fmt: skip
