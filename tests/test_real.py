"""The embedded model on real data. Slow, bounded, and skipped without the data folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, copy_project, dvc, edit_params

REAL = ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"


@pytest.mark.slow
@pytest.mark.timeout(2400)  # in float32, on a CPU without fast bfloat16, a step of DPO takes a minute
def test_two_hundred_real_rows_run_through_to_an_evaluated_adapter(tmp_path: Path) -> None:
    if not REAL.is_file():
        pytest.skip(f"no real data at {REAL}")
    project = copy_project(tmp_path / "project")
    (project / "data/sources/alpaca_en_demo.json").write_bytes(REAL.read_bytes())

    def change(values: dict) -> None:
        values["raw_examples"] = {
            "sources": [{"path": "data/sources/alpaca_en_demo.json", "license": "Apache-2.0"}],
            "limit": 200,
        }
        del values["tokenized"]["field_weights"]  # these answers are plain text
        values["adapter"]["lora"]["max_steps"] = 10
        values["evaluation"] |= {"max_new_tokens": 16, "max_examples": 20}

    edit_params(project, change)
    done = dvc(project, "repro", "evaluation@lora", "baselines")
    assert done.returncode == 0, done.stderr
    report = json.loads((project / "data/reports/instructions.json").read_text())
    assert report["rows_in"] == 200 == report["rows_out"] + sum(report["dropped"].values())
    evaluation = json.loads((project / "data/reports/evaluation/lora.json").read_text())
    base = json.loads((project / "data/reports/baselines.json").read_text())["base"]
    assert evaluation["perplexity"] < base["perplexity"]
    assert 0.7 <= base["general_knowledge"] <= 0.9
