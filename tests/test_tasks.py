"""Instruction records as tasks of online methods: the response is the target of
rewards that can be verified, and lineage names the records."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.history import Project, entry, identity, out, table
from builders.installed import pretend_to_run
from builders.layouts import LAYOUT_ROWS, PAIR_ROWS
from builders.records import said, stored, user
from builders.small_pipeline import commit
from builders.tool_calls import WEATHER, call
from conftest import draw_pages, edit_params, run
from ruamel.yaml import YAML

from dagster_project.commands.init import init
from dagster_project.commands.plan import plan_variants
from dagster_project.commands.verify import verify
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.core.records import read_table, write_records
from dagster_project.evaluation.paired.alignment import PolicyAnswer, sample_schema
from dagster_project.lineage.export.summary import chain
from dagster_project.lineage.impact.question import impact
from dagster_project.lineage.impact.text import as_text
from dagster_project.lineage.lineage import audit
from dagster_project.lineage.signing.provenance import StageRecord, statement
from dagster_project.orchestration import dvc
from dagster_project.pipeline import validate
from dagster_project.stages import aligned
from dagster_project.training.trainers.alignment.rewards import Rewards, ready
from dagster_project.training.trainers.alignment.tasks import HeldOut, tasks_of
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.weight_audit import WeightChange, seen_schema

COMPUTE = Compute(seed=3, threads=1, dtype="float32")
WHERE = "aligned.mine.rewards"


def row(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    return stored(user(question), said(answer, **fields), group_id=None)


def split(folder: Path, **rows: list[dict[str, Any]]) -> Path:
    """A folder of splits, in which the test split cannot be read."""
    for name in ("train", "validation"):
        write_records(folder / name, rows.get(name, []))
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "records-00000.parquet").write_bytes(b"not read")
    return folder


def test_a_task_is_the_prompt_of_a_record_with_its_response_as_target(tmp_path: Path) -> None:
    turns = [
        {"role": r, "content": c}
        for r, c in (("system", "s"), ("user", "2+2?"), ("assistant", "4"), ("user", "plus 3?"), ("assistant", "7"))
    ]
    long = {**row("", ""), "messages": turns, "example_id": "long"}
    rows = [row("1+1?", "It is 2."), row("Name?", "Wren"), long]
    found, counts = tasks_of(
        split(tmp_path / "splits", train=rows, validation=rows[:2]), ready({"number_match": 1.0}, WHERE, tmp_path)
    )
    assert [(one["example_id"], one["prompt"], one["chosen"]) for one in found["train"]] == [
        (rows[0]["example_id"], rows[0]["messages"][:1], rows[0]["messages"][1:]), ("long", turns[:4], turns[4:]),
    ]  # fmt: skip
    assert [one["example_id"] for one in found["test"]] == [rows[0]["example_id"]] and found["validation"] == []
    assert counts == {
        "train": {"records": 3, "used": 2, "left_out": {"no target of number_match": 1}},
        "validation": {"records": 2, "used": 1, "left_out": {"no target of number_match": 1}},
    }


def test_records_without_unit_tests_are_left_out_and_those_of_the_others_run(tmp_path: Path) -> None:
    rows = [
        row("Add.", "def add(a, b): return a + b") | {"meta": '{"tests": "assert add(1, 2) == 3"}'},
        row("Name?", "Wren"),
    ]
    rewards: dict[str, Any] = {"unit_tests": {"run": "unprotected"}}
    found, counts = tasks_of(split(tmp_path / "splits", train=rows), ready(rewards, WHERE, tmp_path))
    assert counts["train"]["left_out"] == {"no target of unit_tests": 1}
    answers = [{"role": "assistant", "content": f"def add(a, b): return a {sign} b"} for sign in "+-"]
    assert HeldOut(Rewards(rewards, None)).of_answers(found["train"] * 2, answers) == [1.0, 0.0]


def test_records_whose_last_answer_is_not_trained_on_are_no_tasks(tmp_path: Path) -> None:
    rows = [row("a", "b"), row("c", "d", weight=0), {**row("e", "f"), "messages": [{"role": "user", "content": "e"}]}]
    _, counts = tasks_of(split(tmp_path / "splits", train=rows), {})
    assert counts["train"] == {"records": 3, "used": 1, "left_out": {"no prompt and answer": 1, "weight 0": 1}}


def test_each_reward_compares_with_the_response(tmp_path: Path) -> None:
    made = {"role": "assistant", "content": "", "tool_calls": [call("weather", {"city": "Oslo"})]}
    said = [row("1+1?", "so 2"), row("Name?", "Wren 2"), row("Weather in Oslo?", "") | {"tools": [WEATHER]}]
    said[2]["messages"][1] = made
    rewards = {"exact_match": 1.0, "number_match": 2.0, "tool_call": 4.0}
    expected = {"exact_match": [1.0, 0.0], "number_match": [1.0, 1.0]}
    plain, _ = tasks_of(split(tmp_path / "a", train=said[:2]), {})
    scorer = HeldOut(Rewards({name: rewards[name] for name in expected}, None))
    answers = [{"role": "assistant", "content": text} for text in ("so 2", "in 2")]
    assert scorer.of_answers(plain["train"], answers) == [3.0, 2.0]
    assert scorer.components == [{"reward": [3.0, 2.0], **expected}]


SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {"options": {"num_generations": 2, "max_completion_length": 6}, "max_steps": 3},
    "rloo": {"options": {"num_generations": 2, "max_completion_length": 6}, "max_steps": 3},
    "ppo": {
        "options": {
            "total_episodes": 12,
            "batch_size": 6,
            "response_length": 6,
            "learning_rate": 1e-2,
            "missing_eos_penalty": 0.0,
        }
    },
}


def align(folder: Path, splits: Path, sft: Path, **settings: Any) -> Any:
    common = {"adapter": "lora", "learning_rate": 1e-2, "samples": 4, "max_new_tokens": 6, "reward_target": "response"}
    common |= {} if settings["method"] == "ppo" else {"per_device_train_batch_size": 4}
    params = aligned.Params(
        **{
            key: value
            for key, value in (common | settings).items()
            if settings["method"] != "ppo" or key != "learning_rate"
        }
    )
    report = aligned.produce(
        "mine", params, COMPUTE, aligned.Sources(folder / "no preferences", None, sft, splits=splits),
        *(folder / name for name in ("out", "curve.csv", "checkpoints", "live", "pages")),
    )  # fmt: skip
    draw_pages("aligned@mine", report, folder / "out", folder / "pages")
    return report


@pytest.mark.parametrize("method", [*SETTINGS])
def test_training_learns_from_the_training_split_and_is_measured_on_the_validation_split(
    method: str, tmp_path: Path, tiny_model: Path
) -> None:
    train, held_out = [row(f"q{i}", f"a{i}") for i in range(8)], [row(f"v{i}", f"b{i}") for i in range(5)]
    splits = split(tmp_path / "splits", train=train, validation=held_out)
    pattern = "[a-mA-M]"
    rewards = {
        "exact_match": 1.0,
        "regex": {"weight": 0.5, "pattern": pattern},
        "length_window": {"weight": 0.1, "max_words": 1},
    }
    report = align(tmp_path, splits, tiny_model, method=method, rewards=rewards, **SETTINGS[method])
    assert not report.failures, [check.note for check in report.failures]
    seen = {one["example_id"] for one in read_table(tmp_path / "out" / "examples.parquet")}
    answered = {one["example_id"] for path in (tmp_path / "out" / "answers").iterdir() for one in read_table(path)}
    assert seen and answered and seen | answered <= {one["example_id"] for one in train}
    samples = read_table(tmp_path / "out" / "samples.parquet")
    assert [one["example_id"] for one in samples] == [one["example_id"] for one in held_out[:4]]
    for who in ("sft", "aligned"):
        hits = [bool(re.search(pattern, one[f"{who}_answer"])) for one in samples]
        assert report.metrics["held_out"]["regex"][who] == pytest.approx(sum(hits) / 4)
        assert report.metrics["held_out"]["exact_match"][who] == 0.0
        assert report.metrics["held_out"]["reward"][who] == pytest.approx(
            sum(one[f"{who}_reward"] for one in samples) / 4, abs=1e-3
        )
    assert report.metrics["tasks"] == {"train": {"records": 8, "used": 8}, "validation": {"records": 5, "used": 5}}
    assert report.metrics["reward_target"] == "response" and "preference" not in report.metrics
    names = {check.name for check in report.checks}
    assert "solves_more_held_out_tasks" in names and not {"prefers_as_people_do", "reward_model_is_reliable"} & names
    page = (tmp_path / "pages" / "alignment.html").read_text()
    assert "reward regex" in page and "by the rewards" in page and "agreement" not in page
    assert json.loads((tmp_path / "out" / "training.json").read_text())["settings"]["reward_target"] == "response"


def test_too_few_steps_for_every_weight_to_move_are_named(tmp_path: Path, tiny_model: Path) -> None:
    """Of two steps with a warm-up, the first has a rate of 0. One step that
    acts moves lora_B alone, which begins at zero; two move both."""
    rows = [row(f"q{i}", f"a{i}") for i in range(8)]
    splits = split(tmp_path / "splits", train=rows, validation=[row("v", "b")])
    settings = {
        **SETTINGS["rloo"],
        "max_steps": 2,
        "rewards": {"regex": {"pattern": "[a-mA-M]"}, "length_window": {"weight": 0.1, "max_words": 1}},
    }
    warm = align(tmp_path / "warm", splits, tiny_model, method="rloo", **settings)
    [failed] = warm.failures
    assert failed.name == "trained_what_it_should" and failed.note.startswith(
        "did not move: lora_A; 1 of 2 steps could change a weight: "
    )
    report = align(tmp_path / "cold", splits, tiny_model, method="rloo", **settings, warmup_ratio=0.0)
    assert not report.failures, [check.note for check in report.failures]


def test_an_iteration_of_several_updates_is_not_called_one_step_that_could_change_a_weight() -> None:
    """What did not move after an iteration of PPO had a chance in each of its
    updates: too few steps are not the reason."""
    change = WeightChange(
        {"lora_A": {"tensors": 1, "moved": 0, "norm_of_change": 0.0}}, {"sha256_before": "a", "sha256_after": "a"}
    )
    point = {"step": 1, "loss": 0.1, "learning_rate": 1e-3, "grad_norm": 0.5}
    notes = [
        aligned._moved(change, TrainingHistory(curve=[point | updates])).note
        for updates in ({}, {"updates": 1}, {"updates": 8})
    ]
    assert all(note.startswith("did not move: lora_A; 1 of 1 steps could change a weight") for note in notes[:2])
    assert notes[2] == "did not move: lora_A"


def test_the_curve_of_online_dpo_has_a_row_for_each_step_also_where_no_rewards_differ(
    tmp_path: Path, tiny_model: Path
) -> None:
    splits = split(tmp_path / "splits", train=[row(f"q{i}", f"a{i}") for i in range(8)], validation=[row("v", "b")])
    settings = {
        "options": {"max_completion_length": 6},
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "rewards": {"regex": {"pattern": "[a-m]"}},
    }
    align(tmp_path, splits, tiny_model, method="online_dpo", **settings)
    points = [
        point for point in json.loads((tmp_path / "pages" / "history.json").read_text())["curve"] if "loss" in point
    ]
    assert 0 < sum("margin" in point for point in points) < 8, "no step without a pair, so that case is not shown"
    head, *lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert {"loss", "kl", "reward"} <= {*head.split(",")} and [line.split(",")[0] for line in lines] == [
        str(step) for step in range(1, 9)
    ]


class Policies:
    """Answers known by heart: the SFT model solves the first of four tasks, the policy the first three."""

    def answer(self, who: str, tasks: list[dict[str, Any]], *_: Any) -> list[PolicyAnswer]:
        solved = {"sft": 1, "aligned": 3}[who]
        texts = [task["chosen"][0]["content"] if i < solved else "?" for i, task in enumerate(tasks)]
        return [PolicyAnswer({"role": "assistant", "content": text}, text, [1], [2]) for text in texts]

    def divergence(self, _: Any) -> float:
        return 0.0


def test_held_out_rewards_are_those_before_and_after(tmp_path: Path) -> None:
    records = [row(f"v{i}", f"b{i}") for i in range(4)]
    found, _ = tasks_of(split(tmp_path / "splits", validation=records), {})
    scorer = HeldOut(Rewards({"exact_match": 2.0, "length_window": {"weight": 1.0, "max_words": 1}}, None))
    params = aligned.Params(method="rloo", adapter="lora")
    measured = aligned._answers(Policies(), found["test"], scorer, params, tmp_path / "out")  # type: ignore[arg-type]
    means = {name: (one["sft"], one["aligned"], one["difference"]) for name, one in measured["held_out"].items()}
    assert means == {"reward": (1.5, 2.5, 1.0), "exact_match": (0.25, 0.75, 0.5), "length_window": (1.0, 1.0, 0.0)}
    assert measured["watch"]["win_rate"]["value"] == 0.75  # two are better, two are as good
    check = aligned._improved(measured, 4)
    low, high = measured["held_out"]["reward"]["interval"]
    assert (check.name, check.passed) == ("solves_more_held_out_tasks", False) and low <= 1.0 <= high
    assert check.note.startswith("reward 1.500 -> 2.500 on 4 held-out tasks") and "fewer than 30" in check.note


@pytest.mark.parametrize(
    ("prompts", "low", "passed"), [(30, 0.1, True), (30, -0.1, False), (29, 0.1, False), (1, 1.0, False)]
)
def test_few_held_out_tasks_show_no_gain(prompts: int, low: float, passed: bool) -> None:
    measured = {
        "watch": {"prompts": prompts},
        "held_out": {"reward": {"sft": 0.0, "aligned": 1.0, "interval": [low, 1.0]}},
    }
    assert aligned._improved(measured, prompts).passed == passed


def test_near_copies_among_held_out_tasks_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = [
        {"example_id": str(i), "group_id": str(i % 3), "prompt": [{"role": "user", "content": f"{i}"}]}
        for i in range(40)
    ]
    judge = HeldOut(Rewards({"brief": 1.0}, None))
    judge.components = [{"reward": [value] * 40} for value in (0.0, 1.0)]
    monkeypatch.setattr(aligned.alignment, "samples", lambda _, pairs, *__: ([], {"prompts": len(pairs)}))
    params = aligned.Params(method="grpo", adapter="lora")
    measured = aligned._answers(None, held_out, judge, params, tmp_path)  # type: ignore[arg-type]
    check = aligned._improved(measured, 40)
    assert not check.passed and "40 held-out tasks" in check.note and "(3 if near-copies count once)" in check.note


@pytest.mark.parametrize(
    ("rows", "rewards", "message"),
    [
        (
            {"train": [row("a", "b"), row("c", "d")]},
            {"exact_match": 1.0},
            r"aligned\.mine\.reward_target: of 0"
            r" records of the validation split none is"
            r" a task",
        ),
        (
            {"train": [row("a", "b")], "validation": [row("c", "4")]},
            {"number_match": 1.0},
            r"of 1 records of the train split none is a task; left out: no target of number_match 1",
        ),
    ],
)
def test_a_split_without_tasks_is_refused_before_a_model_is_loaded(
    rows: dict[str, Any], rewards: dict[str, Any], message: str, tmp_path: Path, tiny_model: Path
) -> None:
    with pytest.raises(InputError, match=message):
        align(
            tmp_path, split(tmp_path / "splits", **rows), tiny_model, method="rloo", rewards=rewards, **SETTINGS["rloo"]
        )
    assert not (tmp_path / "out").exists()


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A project of an installed package, in which every output is a small file and up to date."""
    for name, rows in (("examples", LAYOUT_ROWS["messages"]), ("pairs", PAIR_ROWS["preference"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows if name == "pairs" else [rows[0]]))
    init(tmp_path / "project", [str(tmp_path / "examples.json"), str(tmp_path / "pairs.json")], None, "auto", "MIT")
    entry = {
        "method": "rloo",
        "adapter": "lora",
        "reward_target": "response",
        "rewards": {"exact_match": 1.0},
        "per_device_train_batch_size": 8,
    }
    edit_params(tmp_path / "project", lambda values: values["aligned"].update(math=entry))
    return tmp_path / "project"


def test_only_online_methods_take_it(new: Path) -> None:
    validate(new)
    edit_params(
        new,
        lambda values: values["aligned"].update(x={"method": "dpo", "adapter": "lora", "reward_target": "response"}),
    )
    with pytest.raises(InputError, match=r"aligned\.x\.reward_target: dpo learns from pairs alone"):
        validate(new)
    edit_params(
        new, lambda values: values["aligned"].update(x={"method": "rloo", "adapter": "lora", "reward_target": "answer"})
    )
    with pytest.raises(InputError, match=r"aligned\.x\.reward_target"):
        validate(new)
    tested = {
        "method": "rloo",
        "adapter": "lora",
        "rewards": {"unit_tests": {"run": "sandbox"}},
        "per_device_train_batch_size": 8,
    }
    edit_params(new, lambda values: values["aligned"].update(x=tested))
    with pytest.raises(
        InputError, match=r"aligned\.x\.rewards\.unit_tests: pairs have no tests\nhint: set reward_target: response"
    ):
        validate(new)
    edit_params(new, lambda values: values["aligned"].update(x={**tested, "reward_target": "response"}))
    validate(new)
    edit_params(new, lambda values: values["aligned"].update(x={**tested, "reward_target": "answer"}))
    with pytest.raises(InputError, match="reward_target"):
        plan_variants(new, ["x"])


def test_another_test_split_makes_no_alignment_stale(new: Path) -> None:
    for name in ("train", "validation", "test"):
        (new / "data/splits" / name).mkdir(parents=True)
        (new / "data/splits" / name / "records-00000.parquet").write_text(name)
    pretend_to_run(new)
    commit(new, "made")

    def stale() -> set[str]:
        return {address for address, state in dvc.read_stages(new).items() if state.changed}

    def conflicts() -> tuple[list[str], set[str]]:
        """What a run of the stage would refuse, and which of its dependencies are hashed before and after."""
        found = dvc.verified_fingerprint(new, "aligned@math", lambda _: None)
        return [what for what, _ in found.conflicts], set(found.now)

    assert not stale()
    refused, hashed = conflicts()
    assert refused == [] and {"data/splits/train", "data/splits/validation"} <= hashed
    (new / "data/splits/test/records-00000.parquet").write_text("other")
    assert {"aligned@math", "aligned@dpo"} & stale() == set() and "evaluation@lora" in stale()
    (new / "data/splits/train/records-00000.parquet").write_text("other")
    assert {"aligned@math", "aligned@dpo"} <= stale()
    assert [what for what in conflicts()[0] if "data/splits" in what], (
        "an input that its producer did not make is refused"
    )


FAQ, PAIRS = "data/sources/faq.jsonl", "data/sources/pairs.jsonl"


def reads(made: Project, lock: dict[str, Any]) -> dict[str, str]:
    """Dependencies of a stage `aligned`: of `splits` only two folders, by their own hashes."""
    listing = json.loads(made.object(out(lock, "splits")).read_bytes())
    parts = {}
    for name in ("train", "validation"):
        files = {
            one["relpath"].removeprefix(f"{name}/"): one["md5"]
            for one in listing
            if one["relpath"].startswith(f"{name}/")
        }
        parts[f"data/splits/{name}"] = made.put({path: made.object(md5).read_bytes() for path, md5 in files.items()})
    return {"data/preferences": out(lock, "preferences"), **parts, "data/merged/lora": out(lock, "merged@lora")}


@pytest.fixture
def made(tmp_path: Path) -> Project:
    project = Project(tmp_path / "project")
    lock = project.lock(
        [("cats", "train", FAQ), ("dogs", "train", FAQ), ("fish", "validation", FAQ), ("newts", "validation", FAQ)],
        trained=["dogs"],
    )
    lock |= project.splits([("mice", "train", PAIRS)], "preferences")
    for name, settings in (
        ("math", {"method": "grpo", "reward_target": "response", "rewards": {"exact_match": 1.0}}),
        ("dpo", {"method": "dpo"}),
    ):
        text = "cats" if name == "math" else "mice"
        seen = [{"step": 5, "epoch": 1, "position": 0, "example_id": identity(text)}]
        files = {"adapter_model.safetensors": name.encode(), "examples.parquet": table(seen, seen_schema())}
        files["samples.parquet"] = table(
            [{"example_id": identity("fish" if name == "math" else "mice"), "prompt": "?"}], sample_schema()
        )
        lock[f"aligned@{name}"] = entry(f"aligned@{name}", reads(project, lock), project.put(files))
        lock[f"aligned@{name}"]["params"] = {"params.yaml": {f"aligned.{name}": settings}}
    project.commit(lock)
    return project


def learned(made: Project, text: str) -> dict[str, list[str]]:
    """Model -> who in its lineage was trained on a record, with the steps."""
    found = impact(made.root, record=identity(text))
    return {
        one["stage"]: [f"{seen['by']} {seen['steps']}" for seen in one["seen"] if seen["steps"]]
        for one in found["models"]
    }


def test_lineage_names_the_records_of_tasks_and_no_pairs(made: Project) -> None:
    assert learned(made, "cats") == {
        "adapter@lora": [],
        "merged@lora": [],
        "aligned@math": ["aligned@math [5]"],
        "aligned@dpo": [],
    }
    assert learned(made, "mice") == {"aligned@dpo": ["aligned@dpo [5]"]}
    by = {
        one["stage"]: [seen["by"] for seen in one["seen"]]
        for one in impact(made.root, record=identity("cats"))["models"]
    }
    assert by["aligned@dpo"] == ["adapter@lora"] and set(by["aligned@math"]) == {"aligned@math", "adapter@lora"}
    found = impact(made.root, record=identity("fish"))
    assert [line.strip() for line in as_text(found).splitlines() if "measured before" in line] == [
        "validation 1; not trained on, but among the tasks whose answers are measured before and after training (the"
        " first `samples` of the split)",
    ]
    assert {seen["by"]: seen.get("measured") for one in found["models"] for seen in one["seen"]} == {
        "adapter@lora": None, "aligned@math": ["validation"],
    }  # fmt: skip
    measured = [one for one in found["models"] if one["stage"] == "aligned@math"]
    assert [
        (seen["by"], seen["splits"], seen["steps"]) for seen in measured[0]["seen"] if seen["by"] == "aligned@math"
    ] == [
        ("aligned@math", {"validation": 1}, []),
    ]
    math, dpo = (audit(made.root, f"aligned@{name}") for name in ("math", "dpo"))
    assert set(math["sources"]) == {FAQ} and set(dpo["sources"]) == {FAQ, PAIRS}
    assert math["records"]["learnt_by"]["aligned@math"]["records"] == 1
    assert "preferences" not in {*math["stages"], *math["watched"]["stages"]}


def test_only_records_whose_answers_were_sampled_are_measured(made: Project) -> None:
    def seen(text: str) -> tuple[dict[str, Any], str]:
        found = impact(made.root, record=identity(text))
        [math] = [
            one for model in found["models"] for one in model["seen"] if one["by"] == model["stage"] == "aligned@math"
        ]
        return math, as_text(found)

    assert seen("fish")[0]["measured"] == ["validation"]
    math, words = seen("newts")
    assert math["splits"] == {"validation": 1} and "measured" not in math and "measured" not in words
    listing = json.loads(made.object(math["md5"]).read_bytes())
    made.object(next(one["md5"] for one in listing if one["relpath"] == "samples.parquet")).unlink()
    math, words = seen("newts")
    assert (
        math["measured"] is None and "whether answers to it were measured before and after training is unknown" in words
    )


def test_the_splits_that_were_read_are_those_of_the_run_and_not_later_ones(made: Project, tmp_path: Path) -> None:
    """The splits ran again, and the alignment did not; then only the run cache has the alignment."""
    lock = YAML(typ="safe").load((made.root / "dvc.lock").read_text())["stages"]
    made.commit({**lock, **made.splits([("bees", "train", FAQ), ("fish", "validation", FAQ)])}, "later")
    assert learned(made, "bees") == {} and learned(made, "cats")["aligned@math"] == ["aligned@math [5]"]

    other = Project(tmp_path / "other")
    first = other.lock([("cats", "train", FAQ), ("fish", "validation", FAQ)], trained=[]) | other.splits(
        [("mice", "train", PAIRS)], "preferences"
    )
    other.commit(first)
    seen = [{"step": 5, "epoch": 1, "position": 0, "example_id": identity("cats")}]
    stage = entry(
        "aligned@math",
        reads(other, first),
        other.put({"a.safetensors": b"x", "examples.parquet": table(seen, seen_schema())}),
    )
    stage["params"] = {
        "params.yaml": {
            "aligned.math": {"method": "grpo", "reward_target": "response", "rewards": {"exact_match": 1.0}}
        }
    }
    other.cache_run(stage)
    assert learned(other, "cats")["aligned@math"] == ["aligned@math [5]"]


def test_statements_and_cards_follow(made: Project) -> None:
    settings = {"method": "grpo", "reward_target": "response", "rewards": {"exact_match": 1.0}}
    folders = ("data/preferences", "data/splits/train", "data/splits/validation", "data/reward_model")
    files = {f"{path}/x": {"md5": "0" * 32, "sha256": "0" * 64} for path in folders}
    deps = [{"path": path.removesuffix("/x")} for path in files]
    for given, unread in (
        (settings, {"data/preferences/x", "data/splits/validation/x", "data/reward_model/x"}),
        ({"method": "dpo"}, {"data/splits/train/x", "data/splits/validation/x", "data/reward_model/x"}),
    ):
        read = {"cmd": "run", "deps": deps, "outs": [], "params": {"params.yaml": {"aligned.a": given}}}
        found = statement(StageRecord("aligned@a", read, "", {}, files, {}))["predicate"]["buildDefinition"][
            "resolvedDependencies"
        ]
        assert {one["name"] for one in found if one.get("annotations") == {"learned_from": False}} == unread
    reports = {
        name: {} for name in ("splits", "adapter@lora", "merged@lora", "raw_preferences", "preferences", "reward_model")
    }
    tasks, pairs = ({**reports, "aligned@a": {"adapter": "lora", **given}} for given in (settings, {"method": "dpo"}))
    assert chain("a", tasks) == ["splits", "adapter@lora", "merged@lora", "aligned@a"]
    assert chain("a", pairs) == ["splits", "adapter@lora", "merged@lora", "raw_preferences", "preferences", "aligned@a"]


def test_verify_refuses_a_training_whose_records_are_others_now(new: Path) -> None:
    for name in ("train", "validation", "test"):
        (new / "data/splits" / name).mkdir(parents=True)
        (new / "data/splits" / name / "records-00000.parquet").write_text(name)
    pretend_to_run(new)
    commit(new, "made")
    (new / "data/splits/train/records-00000.parquet").write_text("other")
    done = run([sys.executable, "-m", "dvc", "commit", "-q", "-f", "splits"], new)
    assert done.returncode == 0, done.stderr
    with pytest.raises(InputError, match=r"aligned@math read another data/splits/train than there is now"):
        verify(new, "aligned@math")
