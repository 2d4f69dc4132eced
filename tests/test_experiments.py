"""DVC experiments run the pipeline's own commands, with their own parameters and metrics, and rerun only what they change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from builders import small_pipeline
from conftest import dvc


def ran(root: Path) -> list[str]:
    return [json.loads(line)["stage"] for line in (root / small_pipeline.LOG).read_text().splitlines()]


def test_two_experiments_show_parameters_and_metrics_and_rerun_only_their_variant(tmp_path: Path) -> None:
    root = small_pipeline.make_project(tmp_path / "project")
    assert dvc(root, "repro", "-q").returncode == 0
    small_pipeline.git(root, "add", "-A")
    small_pipeline.git(root, "commit", "-qm", "run")
    before, board = len(ran(root)), (root / "data/cmp/board.txt").read_text()
    for point in (["--temp", "-S", "variants.lora.r=2"], ["-S", "variants.lora.r=4"]):
        done = dvc(root, "exp", "run", *point)
        assert done.returncode == 0, done.stderr + done.stdout
        if "--temp" in point:
            assert (len(ran(root)), (root / "data/cmp/board.txt").read_text()) == (before, board), "it leaves the workspace alone"
    assert ran(root)[before:] == ["adapter@lora", "cmp"]
    assert dvc(root, "status", "-q").returncode == 0

    _, head = json.loads(dvc(root, "exp", "show", "--json").stdout)
    shown: list[dict[str, Any]] = [head["data"], *(experiment["revs"][0]["data"] for experiment in head["experiments"])]
    points = [
        (one["params"]["params.yaml"]["data"]["variants"]["lora"]["r"], one["metrics"]["data/reports/adapter/lora.json"]["data"]["loss"])
        for one in shown
    ]
    assert points[0] == (8, 1 / 8) and set(points) == {(8, 1 / 8), (4, 1 / 4), (2, 1 / 2)}
    assert {one["params"]["params.yaml"]["data"]["variants"]["dora"]["r"] for one in shown} == {16}
