"""A project without a reward model: no stage, no section. Methods that learn
from pairs run, and only their answers are watched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.layouts import LAYOUT_ROWS, PAIR_ROWS
from conftest import dvc, edit_params, run
from ruamel.yaml import YAML

from dagster_project.commands.init import init
from dagster_project.commands.pipeline_file import pipeline_text
from dagster_project.commands.plan import plan_variants
from dagster_project.commands.upgrade import as_text, upgrade
from dagster_project.core.errors import InputError
from dagster_project.orchestration.dagster.assets import build_definitions
from dagster_project.orchestration.dagster_dvc.keys import asset_key
from dagster_project.orchestration.dvc import read_stages
from dagster_project.pipeline import validate


def without_section(values: dict[str, Any]) -> None:
    del values["reward_model"]


def without_stage(root: Path) -> None:
    """What docs/alignment.md says for a clone."""
    document = YAML(typ="safe").load((root / "dvc.yaml").read_text())
    del document["stages"]["reward_model"], document["artifacts"]["reward-model"]
    document["stages"]["aligned"]["do"]["deps"].remove("data/reward_model")
    document["stages"]["release"]["deps"].remove("data/reports/reward_model.json")
    (root / "dvc.yaml").write_text(json.dumps(document))


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A project of an installed package, with pairs."""
    for name, rows in (("examples", [LAYOUT_ROWS["messages"][0]]), ("pairs", PAIR_ROWS["preference"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    init(tmp_path / "project", [str(tmp_path / "examples.json"), str(tmp_path / "pairs.json")], None, "auto", "MIT")
    return tmp_path / "project"


def test_an_upgrade_writes_a_pipeline_without_the_stage_that_params_leave_out(new: Path) -> None:
    whole = (new / "dvc.yaml").read_text()
    edit_params(new, without_section)
    with pytest.raises(
        InputError,
        match=r"params\.yaml has no section reward_model, but dvc\.yaml has the stage\nhint: .*pedigree upgrade",
    ):
        validate(new)
    assert upgrade(new)["edited"] == []
    assert "reward_model" not in (new / "dvc.yaml").read_text()
    assert "aligned" in validate(new)
    states = read_stages(new)
    assert set(states) > {"aligned@dpo", "release"} and "reward_model" not in states
    assert "data/reward_model" not in {one.path for state in states.values() for one in state.inputs}
    keys = {spec.key for spec in build_definitions(new).resolve_all_asset_specs()}
    assert asset_key("aligned@dpo") in keys and asset_key("reward_model") not in keys

    edit_params(new, lambda values: values.update(reward_model={"model": "base_model"}))
    with pytest.raises(InputError, match=r"params\.yaml: reward_model: dvc\.yaml has no such stage"):
        validate(new)
    upgrade(new)
    assert (new / "dvc.yaml").read_text() == whole == pipeline_text()


def test_an_upgrade_names_the_files_that_it_changed_and_no_others(new: Path) -> None:
    def contents() -> dict[str, bytes]:
        files = (new / name for name in ("dvc.yaml", "code.lock.yaml", ".dvcignore"))
        return {file.name: file.read_bytes() if file.exists() else b"" for file in files}

    assert upgrade(new)["written"] == [] and as_text(upgrade(new)).endswith("\nno file was changed")
    for change, expected in (
        (lambda: edit_params(new, without_section), ["code.lock.yaml", "dvc.yaml"]),
        (lambda: (new / ".dvcignore").write_text("*.swp\n"), [".dvcignore"]),
        (lambda: (new / "code.lock.yaml").unlink(), ["code.lock.yaml"]),
    ):
        change()
        before = contents()
        document = upgrade(new)
        assert (
            document["written"]
            == expected
            == sorted(name for name, content in contents().items() if content != before[name])
        )
        assert as_text(document).endswith(f"\ncommit with the results of the next run: {', '.join(expected)}")


def test_an_upgrade_does_not_call_a_frozen_stage_stale_which_dvc_does_not_run(new: Path) -> None:
    document = YAML(typ="safe").load((new / "dvc.yaml").read_text())
    document["stages"]["raw_examples"]["frozen"] = True
    (new / "dvc.yaml").write_text(json.dumps(document))
    (new / "code.lock.yaml").unlink()
    found = upgrade(new)
    assert "raw_examples" in found["current"] and "instructions" in found["stale"]


def test_a_reward_model_that_was_left_behind_judges_nothing(new: Path) -> None:
    edit_params(new, without_section)
    without_stage(new)
    (new / "data/reward_model").mkdir(parents=True, exist_ok=True)
    (new / "data/reward_model/config.json").write_text("{}")
    for name in ("ours", "theirs"):
        (new / f"{name}.jsonl").write_text('{"id": "1", "prompt": "a", "answer": "b"}\n')
    done = run(["python", "-m", "dagster_project", "judge", "ours.jsonl", "theirs.jsonl", "--reward-model"], new)
    assert done.returncode == 2 and "params.yaml has no section reward_model" in done.stderr, done.stderr


def test_the_rest_of_the_pipeline_is_the_same_without_the_stage() -> None:
    whole, less = (YAML(typ="safe").load(text) for text in (pipeline_text(), pipeline_text(["reward_model"])))
    del whole["stages"]["reward_model"], whole["artifacts"]["reward-model"]
    whole["stages"]["aligned"]["do"]["deps"].remove("data/reward_model")
    whole["stages"]["release"]["deps"].remove("data/reports/reward_model.json")
    assert whole == less


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"method": "dpo"}, ""),
        ({"method": "kto"}, ""),
        ({"method": "rloo", "rewards": {"brief": 1.0}, "options": {"num_generations": 2}}, ""),
        ({"method": "rloo", "rewards": {"brief": 1.0, "reward_model": 0.0}, "options": {"num_generations": 2}}, ""),
        ({"method": "ppo"}, r"aligned\.x\.rewards: ppo learns from reward_model, and there is no such section"),
        ({"method": "grpo", "rewards": {"brief": 1.0, "reward_model": 0.5}}, r"rewards: grpo learns from reward_model"),
    ],
)
def test_only_methods_that_learn_from_its_scores_need_it(new: Path, entry: dict[str, Any], message: str) -> None:
    def change(values: dict[str, Any]) -> None:
        without_section(values)
        values["aligned"] = {
            "x": (
                {"adapter": "lora", "per_device_train_batch_size": 8, **entry}
                if entry["method"] != "ppo"
                else {"adapter": "lora", **entry}
            )
        }

    edit_params(new, change)
    without_stage(new)
    if message:
        with pytest.raises(InputError, match=message):
            validate(new)
    else:
        validate(new)
        assert "reward_model" not in read_stages(new)
    with pytest.raises(InputError, match=r"no variant reward_model|learns from reward_model"):
        plan_variants(new, ["reward_model"])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("warm")
def test_the_pipeline_runs_to_a_release_and_nobody_is_said_to_have_watched(project: Path, _finished: Path) -> None:
    """DVC restores the stages before the alignment, which are those of the finished project."""
    shutil.copytree(_finished / ".dvc/cache", project / ".dvc/cache")
    edit_params(project, without_section)
    without_stage(project)
    stray = project / "data/reward_model"  # of an earlier pipeline: nothing records it, so nothing reads it
    stray.mkdir()
    (stray / "config.json").write_text("{}")
    done = dvc(project, "repro")
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads((project / "data/reports/aligned/dpo.json").read_text())
    assert report["reward_model"] == "none" and {"tokens", "distinct", "unfinished"} < report["watch"].keys()
    assert not {"reward", "win_rate"} & report["watch"].keys() and "reward_model_is_reliable" not in report["checks"]
    assert (
        "There is no reward model: only the answers themselves are watched."
        in (project / "data/pages/aligned/dpo/alignment.html").read_text()
    )
    audit = run(["python", "-m", "dagster_project", "audit", "merged_aligned@dpo", "--json"], project)
    assert audit.returncode == 0, audit.stderr
    found = json.loads(audit.stdout)
    assert "watched_by" not in found and "reward_model" not in {*found["stages"], *found["watched"]["stages"]}
    record = found["sources"].keys() & {"data/sources/preferences.jsonl"}
    assert record == {"data/sources/preferences.jsonl"}
    verified = run(["python", "-m", "dagster_project", "verify", "aligned@dpo"], project)
    assert verified.returncode == 0, verified.stdout + verified.stderr


@pytest.mark.parametrize(
    "section, said",
    [
        ("reward_model", "params.yaml has no section reward_model, but dvc.yaml has the stage"),
        ("aligned", "params.yaml: aligned: must be a mapping of variants"),
    ],
)
def test_a_stage_that_is_run_by_itself_says_which_section_params_lack(new: Path, section: str, said: str) -> None:
    edit_params(new, lambda values: values.pop(section))
    done = run(["python", "-m", "dagster_project", "run", "raw_examples"], new)
    assert done.returncode == 2 and f"error: {said}" in done.stderr and "not restored" not in done.stderr, done.stderr
    done = run(["python", "-m", "dagster_project", "sync"], new)
    assert done.returncode == 2 and f"dvc.yaml reads {section}" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        (
            "baselines",
            None,
            r"params\.yaml has no baselines, which dvc\.yaml names under baselines\nhint: add `baselines: \{\}`",
        ),
        ("release", None, r"params\.yaml has no release, which dvc\.yaml names under release"),
        (
            "compute",
            "seed",
            r"params\.yaml has no compute\.seed, which dvc\.yaml names under splits\nhint: add it with its default",
        ),
    ],
)
def test_a_section_or_key_that_dvc_requires_is_missed_before_anything_runs(
    new: Path, section: str, key: str | None, message: str
) -> None:
    edit_params(new, lambda values: values.pop(section) if key is None else values[section].pop(key))
    with pytest.raises(InputError, match=message):
        validate(new)
    edit_params(new, lambda values: values.setdefault(section, {}).update({key: 7} if key else {}))
    validate(new)
