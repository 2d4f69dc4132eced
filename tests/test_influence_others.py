"""The comparison of `pedigree why` with other tools: steps that are finished
are not repeated, and tools get a plain PEFT folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import influence
import influence_others
from influence_others import Steps


def test_a_finished_step_is_not_repeated_and_an_interrupted_one_starts_from_nothing(tmp_path: Path) -> None:
    def interrupted(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("x")
        raise KeyboardInterrupt

    def complete(path: Path) -> None:
        path.mkdir()
        (path / "whole").write_text("123")

    with pytest.raises(KeyboardInterrupt):
        Steps(tmp_path).run("index", interrupted)
    assert [one.name for one in Steps(tmp_path).run("index", complete).iterdir()] == ["whole"]
    again = Steps(tmp_path)
    again.run("index", interrupted)  # not called
    assert again.used == ["index"] and again.cost("index")["bytes"] == 3


def test_a_line_counts_a_step_once_and_divides_the_store_by_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(influence_others.importlib.metadata, "version", lambda _: "1.0")
    for name, cost in {
        "index-records": {"seconds": 7.0, "bytes": 61_000},
        "scores": {"seconds": 2.0, "bytes": 1},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(cost))
    (tmp_path / "index-records").mkdir()
    (tmp_path / "index-records" / "gradients.bin").write_bytes(b"x" * 60_000)
    name = "bergson: cosine"
    results = [
        {"kind": kind, "ranks": {name: [1, 2 * count]}} for kind, count in influence.KINDS.items() for _ in range(8)
    ]
    row = influence_others.row_of(name, results, Steps(tmp_path, ["index-records", "index-records", "scores"]), 2)
    assert (row.name, row.cells()) == ("bergson 1.0: cosine", [*["0.50 / 0.50, 8 of 8"] * 4, "9", "0.03"])


def test_the_ranks_are_those_of_the_culprits_of_the_kind_of_the_question() -> None:
    scores = np.array([[0.1, 3.0], [0.9, 2.0], [0.5, 1.0]])
    found = influence_others.ranks_of(
        scores, ["a", "b", "c"], ["flip", "fact"], {"flip": ["a", "c"], "fact": ["b"]}, "x"
    )
    assert found == [{"kind": "flip", "ranks": {"x": [2, 3]}}, {"kind": "fact", "ranks": {"x": [2]}}]


def test_the_adapter_of_a_tool_names_its_base_model_by_path(tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    source.mkdir()
    (source / "adapter_config.json").write_text('{"r": 16, "base_model_name_or_path": "elsewhere"}')
    (source / "adapter_model.safetensors").write_bytes(b"weights")
    copy = influence_others.peft_folder(source, tmp_path / "base", tmp_path / "copy")
    assert json.loads((copy / "adapter_config.json").read_text()) == {
        "r": 16,
        "base_model_name_or_path": str(tmp_path / "base"),
    }
    assert (copy / "adapter_model.safetensors").read_bytes() == b"weights"
