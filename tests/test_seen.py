"""Live curves are shown in both front ends during a training and affect no version, status or tracked byte."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from builders import small_pipeline
from builders.training import example
from conftest import dvc

from dagster_project.core.curves import thinned
from dagster_project.core.records import write_text
from dagster_project.orchestration.dagster.metadata import describe
from dagster_project.orchestration.dagster.sync import sync
from dagster_project.orchestration.dagster_dvc.keys import asset_key
from dagster_project.orchestration.dvc import read_stages
from dagster_project.training.trainers.harness.curve import LIVE, live_writer

LORA = asset_key("adapter@lora")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return small_pipeline.make_project(tmp_path / "pipeline")


def point(step: int) -> dict[str, float]:
    return {
        "step": step,
        "loss": 1 / step,
        "learning_rate": 1e-3,
        "grad_norm": 2.0,
        "tokens": 10 * step,
        "tokens_per_second": 99.5,
    }


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_live_table_is_whole_whenever_it_is_read(tmp_path: Path) -> None:
    curve, stop, lengths = [{"step": 0, "validation_loss": 3.5}, *map(point, range(1, 500))], threading.Event(), set()
    show = live_writer(tmp_path / "live", every=0)
    show(curve)

    def write() -> None:
        for end in range(100, 500, 8):
            show(curve[:end])
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        for name in LIVE:
            rows = read(tmp_path / "live" / f"{name}.csv")
            assert [list(row) for row in rows] == [["step", name]] * len(rows)
            assert all(float(row[name]) > 0 and int(row["step"]) >= 0 for row in rows)
            if name == "loss":
                assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
                lengths.add(len(rows))
    writer.join()
    assert len(lengths) > 1, "it was never read while it grew, so nothing is shown"
    assert sorted(path.name for path in (tmp_path / "live").iterdir()) == sorted(f"{name}.csv" for name in LIVE)


def test_a_live_table_is_throttled_completed_at_the_end_and_never_mixed_with_an_earlier_training(
    tmp_path: Path,
) -> None:
    live_writer(tmp_path)([{"step": 1, "validation_loss": 1.0}], now=True)
    show = live_writer(tmp_path, every=60)
    assert not tmp_path.exists()
    for end in (1, 2, 3):
        show([point(step) for step in range(1, end + 1)], now=end == 3)
        assert len(read(tmp_path / "loss.csv")) == (1 if end < 3 else 3)
    assert not (tmp_path / "validation_loss.csv").exists()


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    for length in (1, 999, 1000, 1001, 2500, 123_456):
        steps = [int(p["step"]) for p in thinned([{"step": step} for step in range(length)])]
        assert (steps[0], steps[-1]) == (0, length - 1)
        assert len(steps) <= 1001 and len({b - a for a, b in pairwise(steps[:-1])}) <= 1, "evenly"


def observations(instance: dg.DagsterInstance) -> list[dict[str, Any]]:
    records = instance.fetch_observations(LORA, limit=100).records
    return [
        {name: value.value for name, value in record.asset_observation.metadata.items()} for record in reversed(records)
    ]


def live_of(root: Path) -> Path:
    return root / "data/live/adapter/lora"


@pytest.mark.long
def test_live_data_is_shown_in_both_front_ends_and_changes_no_status(
    root: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dagster_project.orchestration.dvc_run.PROGRESS_INTERVAL", 0.2)
    monkeypatch.setenv("STEPS", "3")
    write_text(live_of(root) / "loss.csv", "step,loss\n9,9.0\n")  # of an earlier run
    done = small_pipeline.materialize(root, instance, ["raw", "inst", "tok", "adapter@lora"])
    assert done.success
    seen = observations(instance)
    assert {"step": 1, "loss": 1.0, "tokens_per_second": 100.0} in seen
    assert not any(a == b for a, b in pairwise(seen)), "nothing is told twice"
    assert all(o["step"] != 9 for o in seen)
    state = read_stages(root)["adapter@lora"]
    [event] = done.asset_materializations_for_node("adapter__lora")
    assert event.tags["dagster/data_version"] == state.version
    measured = json.loads((root / "data/pages/adapter/lora/measured.json").read_text())
    assert event.metadata["tokens_per_second"].value == measured["tokens_per_second"]
    assert "tokens_per_second" not in (root / state.report).read_text()
    (root / "data/pages/adapter/lora/measured.json").write_text(
        json.dumps({**measured, "output_sha256": "of another version"})
    )
    assert "tokens_per_second" not in describe(root, state)
    sync(root, instance, small_pipeline.PIPELINE)
    assert sync(root, instance, small_pipeline.PIPELINE) == []
    changed = small_pipeline.changed_in_dvc(root)
    assert small_pipeline.not_fresh(root, instance) == changed == {"adapter@dora", "cmp"}

    # the other front end, and a kill in the middle
    values = json.loads((root / "params.yaml").read_text())
    values["variants"]["lora"]["r"] = 9
    (root / "params.yaml").write_text(json.dumps(values))
    before = small_pipeline.changed_in_dvc(root)
    monkeypatch.setenv("STEPS", "100")
    shutil.rmtree(live_of(root))
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "-q", "-s", "adapter@lora"], cwd=root, start_new_session=True
    )
    while not (live_of(root) / "tokens_per_second.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)
    shown = json.loads(dvc(root, "plots", "show", "--json", "--split").stdout)["data"]
    assert process.poll() is None, "it was to be shown while the stage runs"
    assert {Path(name).name for name in shown} == {"loss.csv", "tokens_per_second.csv"}
    assert '"loss": "' in json.dumps(shown["data/live/adapter/lora/loss.csv"])
    process.kill()
    process.wait(30)
    assert small_pipeline.changed_in_dvc(root) == before


def test_the_page_shows_curves_weights_memory_spans_and_settings_and_hostile_text_is_harmless(
    tiny_model: Path, tmp_path: Path
) -> None:
    from dagster_project.core.context import StageContext
    from dagster_project.core.params import Compute
    from dagster_project.core.records import write_table
    from dagster_project.orchestration.executors.local import run_with_pages
    from dagster_project.pipeline import PEDIGREE
    from dagster_project.stages import adapter
    from dagster_project.stages.tokenized import row_schema

    for split in ("train", "validation"):
        write_table(tmp_path / "data/tokenized" / f"{split}.parquet", [example([5, 6, 7, 8], 1)], row_schema())
    said = "<script>alert(1)</script> ⟦its answer⟧"
    (tmp_path / "data/tokenized/audit.json").write_text(
        json.dumps({"examples": [{"source": "faq.jsonl", "text": said}]})
    )
    params = adapter.Params(peft={"r": 4, "target_modules": "all-linear"}, num_train_epochs=3, learning_rate=1e-2)
    compute = Compute(threads=1, dtype="float32")
    shutil.copytree(tiny_model, tmp_path / "data/base_model")
    values = {"adapter": {"mine": params.model_dump(exclude_unset=True)}, "compute": compute.model_dump()}
    ctx = StageContext(tmp_path, "adapter", "mine", tmp_path / "scratch", values, {"adapter": "adapter"})
    report = run_with_pages(ctx, PEDIGREE)
    names = {
        "peak_memory_bytes",
        "predicted_memory_bytes",
        "prediction_error_percent",
        "training_seconds",
        "tokens_per_second",
    }
    assert set(report.measured) == names and not names & set(report.document())
    predicted, peak = report.measured["predicted_memory_bytes"], report.measured["peak_memory_bytes"]
    assert report.measured["prediction_error_percent"] == pytest.approx(100 * (predicted - peak) / peak, abs=0.1)
    page = (ctx.pages / "training.html").read_text()
    for text in (
        "lora_A",
        "learning_rate",
        f"{predicted / 1e6:,.0f} MB",
        f"{peak / 1e6:,.0f} MB",
        "all-linear",
        ">its answer</mark>",
        "faq.jsonl",
    ):
        assert text in page, text
    assert page.count('<polyline class="line') == 6, "loss, smoothed and validation loss, rate, gradient norm, speed"
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert {path.stem for path in ctx.live.iterdir()} == set(LIVE)


def test_a_method_whose_memory_depends_on_weights_has_no_prediction(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    from dagster_project.core.records import write_table
    from dagster_project.stages import adapter
    from dagster_project.stages.tokenized import row_schema
    from dagster_project.training.planning.hints import forecast_training

    params = adapter.Params(method="waveft", peft={"n_frequency": 100})
    for split in ("train", "validation"):
        write_table(tmp_path / f"{split}.parquet", [example([5, 6, 7, 8], 1)], row_schema())
    forecast = forecast_training(params, tmp_path, tiny_model, 1, (torch.device("cpu"), torch.float32), "adapter.x")
    assert forecast.memory is None
    assert forecast.hints.advice() == "", "then the message gives the general advice"
