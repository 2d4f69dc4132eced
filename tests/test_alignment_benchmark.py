"""The benchmark of alignment methods: one table has their settings, which the
pipeline accepts, and a result is that of its own settings only."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.preferences import write_letters
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import alignment
from measurements import Measurements, content

from dagster_project.core.params import Compute
from dagster_project.stages import aligned, reward_model
from dagster_project.training.trainers.alignment import ppo, preference


def parsed(method: str, answers: int) -> tuple[aligned.Params, Any]:
    entry = aligned.Params(**{"method": method, "adapter": "lora", **alignment.METHODS[method].limited(answers)})
    return entry, entry.parsed_method(f"aligned.{method}")


def test_every_method_is_compared_or_has_a_reason() -> None:
    assert {*alignment.METHODS, *alignment.WITHOUT_SETTINGS} == {*preference.METHODS}
    assert not {*alignment.METHODS} & {*alignment.WITHOUT_SETTINGS}
    for name, compared in alignment.METHODS.items():
        online = preference.METHODS[name].learns_from_rewards
        assert (compared.learns == "online", "reward model" in compared.phases) == (online, online), name
        assert parsed(name, 256)[1].name == name


def test_online_methods_learn_from_equally_many_answers() -> None:
    for name, compared in alignment.METHODS.items():
        if compared.learns == "offline":
            assert compared.limited(8) == compared.limited(256)
            continue
        entry, method = parsed(name, 256)
        if name == "ppo":
            assert ppo.iterations(method) * method.batch_size == 256
        else:
            assert entry.max_steps is not None and entry.max_steps * math.prod(method.passes(entry)) == 256
            assert 256 // method.num_generations == {"rloo": 64, "grpo": 64, "online_dpo": 128}[name]


@pytest.mark.parametrize(("method", "said"), [("gkd", "larger model"), ("dpp", "unknown method")])
def test_a_method_without_settings_is_refused_before_anything_is_read(
    method: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["alignment.py", "dpo", method, "--project", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as refused:
        alignment.main()
    shown = capsys.readouterr()
    assert refused.value.code == 2 and not shown.out
    assert (
        shown.err.startswith(f"{method}: ")
        and said in shown.err
        and "online_dpo" in shown.err
        and len(shown.err.splitlines()) == 1
    )


def test_a_result_is_found_only_for_what_it_was_measured_of(tmp_path: Path) -> None:
    kept = Measurements(tmp_path / "new" / "measured.jsonl")
    assert kept.find({"method": "dpo", "seed": 1}) is None
    kept.add({"method": "dpo", "seed": 1, "sizes": (1, 2)}, {"reward": 1.0, "by_seed": {1: 2.0}})
    assert kept.find({"seed": 1, "sizes": [1, 2], "method": "dpo"}) == {"reward": 1.0, "by_seed": {"1": 2.0}}
    for other in (
        {"method": "dpo", "seed": 2, "sizes": [1, 2]},
        {"method": "dpo", "seed": 1, "sizes": [1, 3]},
        {"method": "dpo", "seed": 1},
    ):
        assert kept.find(other) is None
    assert kept.add({"method": "kto"}, {"by_seed": {1: 2.0}}) == kept.find({"method": "kto"}) == {"by_seed": {"1": 2.0}}
    kept.add({"method": "kto"}, {"newer": True})
    assert kept.find({"method": "kto"}) == {"newer": True}


def test_a_line_that_was_cut_off_and_results_without_settings_are_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "measured.jsonl"
    kept = Measurements(file)
    kept.add({"seed": 1}, {"reward": 1.0})
    file.write_text('[{"method": "dpo", "seed": 1}]\n' + file.read_text() + file.read_text()[:-9])
    kept.add({"seed": 2}, {"reward": 2.0})
    assert (kept.find({"seed": 1}), kept.find({"seed": 2})) == ({"reward": 1.0}, {"reward": 2.0})
    assert (
        "line 1 is not used" in (said := capsys.readouterr().err)
        and "line 3 is not used" in said
        and "line 2" not in said
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A project with an SFT model, preferences of a over z, and a reward model of them."""
    root = tmp_path_factory.mktemp("project")
    data = root / "data"
    (root / "params.yaml").write_text("compute: {dtype: float32}\n")
    (data / "merged").mkdir(parents=True)
    (data / "merged" / "lora").symlink_to(tiny_model)
    write_letters(data / "preferences", train=range(16), validation=range(20, 22), test=range(30, 38))
    scratch = root / "scratch"
    scratch.mkdir()
    report = reward_model.produce(
        reward_model.Params(model="base_model", learning_rate=2e-2, num_train_epochs=4),
        Compute(seed=3, threads=1, dtype="float32"),
        data / "preferences",
        tiny_model,
        data / "reward_model",
        scratch / "curve.csv",
        scratch / "calibration.csv",
        scratch / "checkpoints",
    )
    assert not report.failures
    return root


def given(project: Path, measured: Path, *methods: str, **changed: Any) -> argparse.Namespace:
    values = {
        "methods": methods,
        "seeds": 2,
        "episodes": 16,
        "threads": 1,
        "adapter": "lora",
        "project": project,
        "measured": measured,
    }
    return argparse.Namespace(**values | changed)


def test_an_interrupted_benchmark_goes_on_and_other_settings_are_measured_again(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int, int]] = []
    stops_at: list[int] = [2]

    def measure(run: dict[str, Any]) -> dict[str, Any]:
        if len(made) in stops_at:
            raise KeyboardInterrupt
        made.append((run["method"], run["seed"], run["episodes"]))
        return {"method": run["method"], "seed": run["seed"], "number": len(made)}

    monkeypatch.setattr(alignment, "measure", measure)
    measured = tmp_path / "measured.jsonl"
    with pytest.raises(KeyboardInterrupt):
        alignment.runs_of(given(project, measured, "dpo", "rloo"))
    stops_at.clear()
    runs = alignment.runs_of(given(project, measured, "dpo", "rloo"))
    assert made == [("dpo", 1, 16), ("rloo", 1, 16), ("dpo", 2, 16), ("rloo", 2, 16)]
    assert [run["number"] for run in runs] == [1, 2, 3, 4]
    alignment.runs_of(given(project, measured, "rloo", "dpo", "online_dpo", seeds=1))
    assert made[4:] == [("online_dpo", 1, 16)]
    alignment.runs_of(given(project, measured, "dpo", "rloo", seeds=1, episodes=8))  # which only an online method reads
    assert made[5:] == [("rloo", 1, 8)]
    monkeypatch.setitem(alignment.METHODS, "dpo", replace(alignment.METHODS["dpo"], entry={"learning_rate": 1e-4}))
    alignment.runs_of(given(project, measured, "dpo", "rloo", seeds=1))
    assert made[6:] == [("dpo", 1, 16)]
    alignment.runs_of(given(project, measured, "rloo", seeds=1, threads=2))
    assert made[7:] == [("rloo", 1, 16)]


def test_a_training_that_ended_with_an_error_is_tried_again(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        alignment, "measure", lambda run: {"method": run["method"], "seed": run["seed"], "error": "killed"}
    )
    options = given(project, tmp_path / "measured.jsonl", "dpo", seeds=1)
    [failed] = alignment.runs_of(options)
    assert "| dpo | SFT, DPO | failed: killed |" in alignment.table([failed], None, "here")
    monkeypatch.setattr(
        alignment, "measure", lambda run: {"method": run["method"], "seed": run["seed"], "failed": ["learned: a | b"]}
    )
    [failed] = alignment.runs_of(options)
    assert "failed: learned: a / b |" in alignment.table([failed], None, "here")


def test_content_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = content(tmp_path / "a")
    (tmp_path / "a" / "x").write_text("2")
    assert len({first, content(tmp_path / "a"), content(tmp_path / "none")}) == 3
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert first != content(tmp_path / "a")


def test_a_training_is_that_of_the_pipeline(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model: the answers that it learned from are those asked for,
    and a gain is of the same held-out prompts."""
    short = {
        "learning_rate": 1e-2,
        "options": {"max_completion_length": 6},
        "samples": 6,
        "max_new_tokens": 6,
        "warmup_ratio": 0.0,
    }
    monkeypatch.setitem(alignment.METHODS, "online_dpo", replace(alignment.METHODS["online_dpo"], entry=short))
    runs = [alignment.one("online_dpo", seed, "lora", 16, 1, project, score=False) for seed in (1, 2)]
    for run in runs:
        assert "failed" not in run, run["failed"]
        assert run["sampled"]["answers"] == 16 and run["steps"] == 2 and run["cpu_seconds"] > 0
        assert {*run["rewards"]["sft"]} == {*run["rewards"]["aligned"]} and len(run["rewards"]["sft"]) == 6
    assert runs[0]["rewards"]["sft"] == pytest.approx(runs[1]["rewards"]["sft"])
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in alignment.table(runs, None, "here").splitlines()
        if line.startswith("| ")
    ]
    assert rows[2][:5] == ["online_dpo", "SFT, reward model, Online DPO", "online", "16", "2 of 2"]
    mean = sum(sum(run["rewards"]["aligned"].values()) - sum(run["rewards"]["sft"].values()) for run in runs) / 12
    assert rows[2][6].startswith(f"{mean:+.2f} (")
    assert all(len(row) == len(rows[0]) for row in rows)
