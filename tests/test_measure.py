"""Every system answers the same examples, as a task or in free text, and custom
metrics are reported with the others."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.records import said, stored, user
from conftest import ROOT, evaluate
from pydantic import ValidationError

from dagster_project.commands.elsewhere import BOUNDS, judge
from dagster_project.core.context import ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute, parse
from dagster_project.core.records import read_table, write_records
from dagster_project.core.words import split_words
from dagster_project.evaluation.alarms import scores_differ
from dagster_project.evaluation.baselines import prompted
from dagster_project.evaluation.custom_metrics import custom_measures
from dagster_project.evaluation.evaluator import (
    EvaluatedModel,
    Settings,
    result_rows,
    select_questions,
    slices,
    thirds,
    turn_key,
)
from dagster_project.evaluation.final_answers import FinalAnswer
from dagster_project.evaluation.metrics import Task, perplexity, perplexity_interval
from dagster_project.evaluation.paired.bootstrap import difference, rate, ratio
from dagster_project.evaluation.scoring import Offer, Scoring
from dagster_project.lineage.tolerance import Deviation
from dagster_project.stages import baselines, comparison, evaluation
from dagster_project.training.inference.answers import Answer

TASK = Task(fields={"category": ["login", "billing"]}, score="category")
COMPUTE = Compute(dtype="float32", threads=1)
TONE = "def polite(reference, answer):\n    return 'please' in reference\n"


def record(question: str, answer: str, category: str | None = None, meta: str | None = None) -> dict[str, Any]:
    asked = [user(question)] if question else []
    return stored(*asked, said(answer), category=category, meta=meta)


FREE = [record(f"question {i} {'about it ' * (i % 5)}", f"answer {i}, please", "ab"[i % 2]) for i in range(12)]
JSON = [record(f"{kind} number {i}", json.dumps({"category": kind})) for i in range(6) for kind in ("login", "billing")]


def test_the_examples_asked_are_chosen_by_content_and_answers_to_the_task_go_first() -> None:
    few = Settings(max_examples=5)
    task, chosen = select_questions(FREE, few)
    assert (
        task is None
        and [r["example_id"] for r in chosen] == [r["example_id"] for r in FREE if r in chosen]
        and len(chosen) == 5
    )
    assert {r["example_id"] for r in select_questions(FREE[::-1], few)[1]} == {r["example_id"] for r in chosen}
    assert select_questions([*FREE, *JSON], Settings(task=TASK)) == (TASK, JSON)
    assert select_questions(FREE, Settings(task=TASK)) == (None, FREE)


def test_plain_text_gives_no_questions() -> None:
    text = record("", "Once upon a time", meta='{"kind": "text"}')
    assert select_questions([text, *FREE], Settings()) == (None, FREE)


def test_texts_without_a_prompt_are_no_questions_of_a_task() -> None:
    task = FinalAnswer(final_answer="number")
    text = record("", "It was 1999.", meta='{"kind": "text"}')
    unprompted = record("", "It was 1999.") | {
        "messages": [{"role": "system", "content": "Count."}, {"role": "assistant", "content": "3"}]
    }
    assert select_questions([text, unprompted, *FREE], Settings(task=task)) == (task, FREE)
    assert select_questions([text], Settings(task=task)) == (None, [])


def test_slices_add_up_to_the_whole() -> None:
    likelihoods = [(float(i), 2) for i in range(12)]
    found = slices(FREE, likelihoods, "rouge_l", {r["example_id"]: float(i % 2) for i, r in enumerate(FREE[:9])})
    assert found["by_category"]["a"] == {
        "n": 6,
        "perplexity": pytest.approx(2.7183**2.5, abs=1e-2),
        "answered": 5,
        "rouge_l": 0.0,
    }
    assert found["by_category"]["b"]["rouge_l"] == 1.0
    for grouping in found.values():
        assert (sum(s["n"] for s in grouping.values()), sum(s["answered"] for s in grouping.values())) == (12, 9)


def test_a_slice_without_tokens_has_no_perplexity() -> None:
    likelihoods = [(3.0 * (i % 2), i % 2) for i in range(12)]  # category a has no tokens
    found = slices(FREE, likelihoods, "rouge_l", {})["by_category"]
    assert found == {"a": {"n": 6}, "b": {"n": 6, "perplexity": pytest.approx(20.0855, abs=1e-4)}}


def results(*likelihoods: tuple[float | None, int | None]) -> dict[tuple[str, int], dict[str, Any]]:
    return {turn_key(row): row for row in result_rows("one", FREE[: len(likelihoods)], None, likelihoods=likelihoods)}


def test_the_perplexity_of_a_variant_is_compared_where_both_read_the_same_tokens() -> None:
    def compare(
        ours: dict[tuple[str, int], dict[str, Any]], theirs: dict[tuple[str, int], dict[str, Any]], units: int = 99
    ) -> dict[str, Any] | None:
        rows = [record | {"group_id": str(i % units)} for i, record in enumerate(FREE[: len(theirs)])]
        found = comparison._likelihoods(ours, theirs, rows)
        return found and ratio(perplexity, *found)

    ours, theirs = [(1.0, 2), (4.0, 6)], [(3.0, 2), (6.0, 6)]
    found = compare(results(*ours), results(*theirs))
    assert found and found["ratio"] == pytest.approx(math.exp(-4 / 8), abs=1e-4)
    assert compare(results(*ours, *[(0.0, 0)] * 9), results(*theirs, *[(0.0, 0)] * 9)) == found
    assert compare(results((0.0, 0)), results((0.0, 0))) is None
    assert compare(results((1.0, 2)), results((1.0, 3))) is None
    assert compare(results((None, None)), results((1.0, 3))) is None
    assert compare(results(*ours * 3), results(*theirs * 3), units=2) == found, "near-copies add nothing"


def test_each_pair_of_three_variants_has_one_simultaneous_interval_seen_from_both_sides() -> None:
    references = [record["messages"][-1]["content"] for record in FREE]
    right = {"few_shot": 3, "one": 2, "two": 4, "three": 5}  # each of so many answers is wrong
    answers = {
        name: [Answer("x" if i % every == 0 else text) for i, text in enumerate(references)]
        for name, every in right.items()
    }
    scoring, writes = Scoring(FREE, None, {}), dict.fromkeys(answers, True)
    compared: dict[str, Any] = {
        name: {"to": {o: comparison._differences(scoring, answers, writes, name, o) for o in answers if o != name}}
        for name in ("one", "two", "three")
    }
    comparison._add_simultaneous_intervals("rouge_l", scoring, answers, writes, compared, {})
    for name, other in (("one", "two"), ("one", "three"), ("two", "three")):
        ours, theirs = compared[name]["to"][other]["rouge_l"], compared[other]["to"][name]["rouge_l"]
        low, high = ours["simultaneous_interval"]
        assert theirs["simultaneous_interval"] == [-high, -low]
        assert low <= ours["interval"][0] <= ours["interval"][1] <= high
    for found in compared.values():
        assert found["to"]["few_shot"]["rouge_l"].keys() == {"difference", "interval", "simultaneous_interval"}
        assert found["to"]["few_shot"]["exact_match"].keys() == {"difference", "interval"}, "it decides nothing"


def test_near_copies_narrow_no_interval() -> None:
    """Four near-copies of each question, answered alike, say as much as one."""
    answers = [Answer(record["messages"][-1]["content"] if i % 3 else "x") for i, record in enumerate(FREE)]
    one = Scoring(FREE, None, {})
    grouped = [
        record | {"example_id": f"{record['example_id']}{k}", "group_id": record["example_id"]}
        for record in FREE
        for k in range(4)
    ]
    four = Scoring(grouped, None, {})
    repeated = [answer for answer in answers for _ in range(4)]
    assert four.score(repeated) == one.score(answers) | {"n": 4 * len(FREE)}
    ours, theirs = (four.statistics("rouge_l", found) for found in (repeated, four.references))
    same = difference(rate, one.statistics("rouge_l", answers), one.statistics("rouge_l", one.references))
    assert difference(rate, ours, theirs) == same
    likelihoods = [(float(i), 2) for i in range(12)]
    apart = perplexity_interval(likelihoods, [str(i) for i in range(12)])
    assert (
        perplexity_interval(
            [one for one in likelihoods for _ in range(4)], [str(i) for i in range(12) for _ in range(4)]
        )
        == apart
    )


def test_a_constant_measure_is_found_where_examples_have_several_near_copies() -> None:
    grouped = [record | {"group_id": str(i // 5)} for i, record in enumerate(FREE)]
    scoring = Scoring(grouped, None, {})
    values = comparison._values(scoring, {"one": scoring.references}, {"one": True})
    assert "rouge_l is the same for all 12 answers" in scores_differ(values).note


def test_rare_categories_share_one_slice() -> None:
    rows = [record(f"q{i}", "a", f"c{i:02}") for i in range(30)] + [record("q", "b", "c29")]
    found = slices(rows, [], "accuracy", {})["by_category"]
    assert len(found) == 21 and found["(others)"] == {"n": 10} and found["c29"] == {"n": 2}


def test_lengths_are_named_with_the_edges_of_their_third() -> None:
    assert thirds([9, 1, 2, 3, 5, 4]) == [
        "long, 5 and more",
        "short, up to 2",
        "short, up to 2",
        "medium, 3 to 4",
        "long, 5 and more",
        "medium, 3 to 4",
    ]
    assert set(thirds([7, 7, 7])) == {"short, up to 7"}


def test_prompts_in_scripts_without_spaces_have_lengths_in_characters() -> None:
    rows = [record("重启" * n, "a", "c") for n in (1, 2, 30)]
    assert list(slices(rows, [], "accuracy", {})["by_prompt_words"]) == [
        "long, 5 and more",
        "medium, 3 to 4",
        "short, up to 2",
    ]
    assert [
        len(split_words(text)) for text in ("Where is it, now?\n", "설정을 바꾸세요", "รีเซ็ต", "在 Linux 上", "")
    ] == [4, 2, 6, 3, 0]


def put(root: Path, content: str) -> Path:
    (root / "data/metrics").mkdir(parents=True, exist_ok=True)
    (root / "data/metrics/tone.py").write_text(content)
    return root


def test_a_custom_metric_is_the_mean_of_its_function(tmp_path: Path) -> None:
    measure = custom_measures(put(tmp_path, TONE), ["tone.polite"])["tone.polite"]
    statistics = measure.statistics(["please", "no", "no"], ["", "", ""])
    assert measure.combine(statistics.sum(0)) == pytest.approx(1 / 3)
    assert [path.name for path in (tmp_path / "data/metrics").iterdir()] == ["tone.py"], "DVC watches the folder"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tone.polite",
            "import nothing_like_it",
            "data/metrics/tone.py fails: ModuleNotFoundError: No module named 'nothing_like_it'",
        ),
        ("tone.polite", "raise SystemExit(0)", "data/metrics/tone.py fails: SystemExit: 0"),
        ("tone.polite", "def polite(:", "data/metrics/tone.py fails: SyntaxError"),
        ("tone.polte", TONE, "data/metrics/tone.py has no function 'polte'"),
        ("tune.polite", TONE, "data/metrics/tune.py does not exist"),
        ("polite", TONE, "'polite' is not of the form file.function"),
        ("../tone.polite", TONE, "'../tone.polite' is not of the form file.function"),
        (
            "tone.polite",
            "def polite(r, a): return 'very'",
            "tone.polite returns 'very', which is not a finite number; for the answer 'said'",
        ),
        (
            "tone.polite",
            "def polite(r, a): return float('nan')",
            "tone.polite returns nan, which is not a finite number",
        ),
        (
            "tone.polite",
            "def polite(r, a): return -1e308",  # the sum of two is not finite
            "tone.polite returns -1e+308, which is too large",
        ),
        (
            "tone.polite",
            "def polite(r, a): return 10**400",
            "tone.polite fails: OverflowError: int too large to convert to float",
        ),
        (
            "tone.polite",
            "def polite(r, a): return 1 / 0",
            "tone.polite fails: ZeroDivisionError: division by zero; for the answer 'said'",
        ),
    ],
)
def test_a_custom_metric_that_fails_to_load_is_one_message(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        custom_measures(put(tmp_path, content), [name])[name].statistics(["wanted"], ["said"])
    assert message in caught.value.what and caught.value.hint


COUNTING = """
calls = []

def polite(reference, answer):
    calls.append(answer)
    return len(calls) if answer == "varies" else len(answer)
"""


def test_a_custom_metric_is_called_once_for_each_answer_and_twice_for_the_first(tmp_path: Path) -> None:
    measure = custom_measures(put(tmp_path, COUNTING), ["tone.polite"])["tone.polite"]
    assert measure.statistics(["r"] * 3, ["a", "bb", "varies"]).tolist() == [[1, 1], [2, 1], [4, 1]]
    assert measure.statistics(["r"] * 2, ["varies", "a"]).tolist() == [[4, 1], [1, 1]], "the value that was scored"
    varying = custom_measures(tmp_path, ["tone.polite"])["tone.polite"]
    with pytest.raises(InputError, match=r"tone.polite returns 1.0 and then 2.0 for the same answer 'varies'"):
        varying.statistics(["r"], ["varies"])


@pytest.mark.parametrize("measure", ["accuracy", "precision", "token_f1"])
def test_a_custom_metric_with_the_name_of_a_metric_of_the_task_is_refused(measure: str) -> None:
    task = Task(fields={"category": ["login", "billing"], "summary": []}, score="category")
    Settings(task=task, metrics=[f"tone.{measure}"])
    field, other = ("summary", "category") if measure == "token_f1" else ("category", "summary")
    Settings(task=task, metrics=[f"{other}.{measure}"])
    with pytest.raises(ValidationError, match=rf"metrics: '{field}.{measure}' is the name of a measure of"):
        Settings(task=task, metrics=[f"{field}.{measure}"])


@pytest.mark.parametrize("name", ["rouge_l", "perplexity_interval", "test_examples", "by_category"])
def test_a_benchmark_with_the_name_of_another_figure_is_refused(name: str, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write_records(tmp_path / split, FREE[:1] if split == "test" else [])
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": "?", "choices": ["a", "b"], "answer": 0}) + "\n")
    settings, nowhere, out = Settings(benchmarks=[f"{name}.jsonl"]), tmp_path / "no model", tmp_path / "out"
    with pytest.raises(InputError, match=f"benchmarks: {name} is the name of another figure in the report"):
        evaluation.produce(tmp_path, "one", settings, COMPUTE, nowhere, nowhere, tmp_path, out, tmp_path / "one.csv")


def test_the_tokens_of_a_prompt_are_those_that_the_model_reads(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tiny_model / "tokenizer_config.json").read_text())
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 60}))
    model = EvaluatedModel(tmp_path / "model", COMPUTE, Settings(max_new_tokens=20))
    prompts = [[{"role": "user", "content": text}] for text in ("Hi", "word " * 50)]
    short, cut = model.prompt_tokens(prompts) or ()
    assert short < cut == 40 and model.prompt_tokens(prompts, thinking_tokens=10) == [min(30, short), 30]
    model.answer(prompts, "few_shot")
    assert "few_shot: answers: 1 of 2 prompts exceed 40 tokens and lose their beginning" in caplog.text
    model.answer(prompts, "x", thinking_tokens=39)
    message = r"max_new_tokens: 20 and baselines.thinking_tokens: 40: answers of 60 tokens leave no room .* of 60"
    with pytest.raises(InputError, match=message):
        model.answer(prompts, "x", thinking_tokens=40)


def test_each_of_several_equal_test_examples_counts() -> None:
    """They are kept with `policy: {exact_duplicates: warn}`."""
    test, ours, theirs = FREE[:2] + FREE[1:2] * 2, results((1.0, 2), (4.0, 6)), results((3.0, 2), (6.0, 6))
    sums = comparison._likelihoods(ours, theirs, test)
    assert sums and [one.tolist() for one in sums] == [[[1, 2], [12, 18]], [[3, 2], [18, 18]]]
    assert ratio(perplexity, *sums)["ratio"] == pytest.approx(math.exp(-8 / 20), abs=1e-4)
    scoring = Scoring(select_questions(test, Settings())[1], None, {})
    counts = comparison._test_counts(test, scoring, 4, "rouge_l", ())
    assert counts == {"examples": 4, "answered": 4, "decided": 2, "independent": 2, "seen": 0}


def test_a_variant_that_was_not_merged_costs_the_base_model_too(tmp_path: Path) -> None:
    for name, files in {
        "base": ["config.json"],
        "whole": ["config.json"],
        "lora": ["adapter_config.json"],
        "head": [],
    }.items():
        (tmp_path / name).mkdir()
        for file in [*files, "model.safetensors"]:
            (tmp_path / name / file).write_text("x" * (100 if name in ("base", "whole") else 1))
    (tmp_path / "training.json").write_text("{}")
    variants = {
        name: comparison.Variant(tmp_path / "-", tmp_path / name, tmp_path / "training.json")
        for name in ("whole", "lora", "head")
    }
    sizes = {name: comparison._cost(name, {}, tmp_path / "base", variants)["bytes"] for name in variants}
    assert sizes == {"whole": 200, "lora": 202, "head": 201}


@pytest.mark.parametrize("name", ["tune.polite", "polite"])
def test_a_custom_metric_without_a_file_is_refused_before_anything_is_trained(name: str, tmp_path: Path) -> None:
    ctx = ValidationContext(put(tmp_path, "raise SystemExit"), {"adapter": {}}, "evaluation")
    evaluation.validate(Settings(metrics=["tone.polite"]), ctx)
    with pytest.raises(InputError, match=r"params.yaml: evaluation.metrics: "):
        evaluation.validate(Settings(metrics=[name]), ctx)


def test_a_custom_metric_outside_the_project_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "project", TONE)
    (tmp_path / "far.py").write_text(TONE)
    (tmp_path / "project/data/metrics/far.py").symlink_to(tmp_path / "far.py")
    with pytest.raises(InputError, match="is outside the project"):
        custom_measures(tmp_path / "project", ["far.polite"])


def digests(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_free_text_is_answered_scored_and_compared_and_two_runs_are_the_same_bytes(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = Settings(
        max_new_tokens=3, batch_size=4, metrics=["tone.polite"], max_examples=4, benchmarks=["sums.jsonl"]
    )
    runs = [put(tmp_path / name, TONE) for name in ("a", "b")]
    for root in runs:
        rows = [
            {
                "question": f"{n} and {n}?",
                "choices": [str(n), str(2 * n)],
                "answer": 1,
                "subject": "even" if n % 2 else "odd",
            }
            for n in range(1, 5)
        ]
        (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [evaluate(root, tiny_model, settings, FREE[:6], FREE[6:]) for root in runs]
    measured = {name for name in found[0]["one"] if f"{name}_interval" in found[0]["one"]}
    others = found[0]["one"].keys() - measured - {f"{name}_interval" for name in measured}
    assert others <= {*evaluation.FIGURES, *(Path(path).stem for path in settings.benchmarks)}
    assert found[0] == found[1] and digests(runs[0]) == digests(runs[1])
    report = found[0]
    assert list(report["baselines"]) == ["base", "zero_shot", "few_shot", "retrieved"]
    assert (report["one"]["n"], report["one"]["test_examples"], report["one"]["tone.polite"]) == (4, 6, 1.0)
    assert {"rouge_l", "exact_match", "bleu", "chrf", "perplexity_interval"} < report["one"].keys()
    assert report["compared"]["one"]["to"].keys() == {"zero_shot", "few_shot", "retrieved", "two"}
    assert report["compared"]["one"]["to"]["zero_shot"].keys() == {"rouge_l", "exact_match", "chrf", "tone.polite"}
    assert report["compared"]["one"]["to"]["zero_shot"]["chrf"] == {"difference": 0, "interval": [0, 0]}, (
        "it is the same model"
    )
    to = {name: report["compared"][name]["to"] for name in ("one", "two")}
    assert "simultaneous_interval" not in to["one"]["two"]["rouge_l"], "two variants are compared once with each other"
    assert sorted(name for name in to["one"] if "simultaneous_interval" in to["one"][name]["rouge_l"]) == ["zero_shot"]
    assert report["board"].startswith("| 4 test examples | ROUGE-L | 95 % interval | exact match | prompt tokens |")
    assert (
        "Nothing can be concluded from 4 test examples" in report["board"]
        and "Tuning one shows no sure gain: " in report["board"]
    )
    kept = report["compared"]["one"]["retention"]
    assert {name: (found["questions"], found["gold_log_likelihood"]["difference"]) for name, found in kept.items()} == {
        "overall": (4, 0), "even": (2, 0), "odd": (2, 0),
    }  # fmt: skip
    assert kept["overall"]["accuracy"]["tuned"] == report["one"]["sums"] == report["baselines"]["base"]["sums"]


def test_a_task_has_every_baseline_and_batches_change_no_score(tiny_model: Path, tmp_path: Path) -> None:
    [one, five] = [
        evaluate(tmp_path / str(n), tiny_model, Settings(task=TASK, max_new_tokens=3, batch_size=n), JSON[:5], JSON[5:])
        for n in (1, 5)
    ]
    assert one["baselines"].keys() == {
        "base", "zero_shot", "system_prompt", "chain_of_thought", "few_shot", "retrieved", "tfidf_logistic",
    }  # fmt: skip
    assert one["compared"]["one"]["to"]["few_shot"].keys() == {"macro_f1", "accuracy"}
    for stage in ("one", "baselines", "compared"):
        assert flat(one[stage]) == pytest.approx(flat(five[stage]), rel=1e-3, abs=1e-3)
    rows = read_table(tmp_path / "1/baselines/results.parquet")
    longest = {name: max(r["prompt_tokens"] or 0 for r in rows if r["system"] == name) for name in one["baselines"]}
    assert longest["tfidf_logistic"] == 0 < longest["zero_shot"] < longest["system_prompt"] < longest["few_shot"]


def test_models_are_scored_in_the_format_of_the_evaluation_or_else_of_the_computation(tiny_model: Path) -> None:
    other = COMPUTE.model_copy(update={"dtype": "bfloat16"})
    found = [
        EvaluatedModel(tiny_model, other, Settings(dtype=dtype)).model.dtype for dtype in (None, "bfloat16", "float32")
    ]
    assert found == [torch.bfloat16, torch.bfloat16, torch.float32]
    with pytest.raises(InputError, match=r"evaluation\.dtype"):
        parse(Settings, {"dtype": "float16"}, "evaluation")
    settings = {"compute": {"dtype": "auto"}, "evaluation": {"dtype": "float32"}}
    [on_another_machine], _ = judge("evaluation", settings, [Deviation("results.parquet", "answers", 0.1, "answer")])
    assert on_another_machine["bound"] == BOUNDS["evaluation", "float32"]["answers"]


def test_a_baseline_whose_prompts_the_template_refuses_is_left_out(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = EvaluatedModel(tiny_model, COMPUTE, Settings())
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    model.tokenizer.chat_template = refusal + model.tokenizer.chat_template  # as Gemma 2
    prompts = prompted(None, TASK, JSON[:2], JSON[2:3], [JSON[3:4]] * 2)
    left_out = [name for name, messages in prompts.items() if model.refuses(messages, [Offer()] * 2, name)]
    assert left_out == ["system_prompt", "chain_of_thought", "few_shot", "retrieved"]
    assert "few_shot is left out: the chat template refuses it: System role not supported" in caplog.text


@pytest.mark.parametrize("entries", [{"adapter": {"base": {}}}, {"adapter": {"lora": {}}, "aligned": {"few_shot": {}}}])
def test_a_variant_has_no_name_of_the_base_model_s_scores(entries: dict[str, Any], tmp_path: Path) -> None:
    ctx = ValidationContext(tmp_path, entries, "evaluation")
    with pytest.raises(InputError, match=r"(adapter\.base|aligned\.few_shot): the base model's scores have this name"):
        evaluation.validate(Settings(), ctx)
    evaluation.validate(Settings(), ValidationContext(tmp_path, {"adapter": {"based": {}}}, "evaluation"))


def test_a_benchmark_without_its_answers_is_refused_before_a_model_is_read(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write_records(tmp_path / split, FREE[:1] if split == "test" else [])
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "?", "choices": ["a", "b"], "answer": -1}) + "\n")
    settings, nowhere = Settings(benchmarks=["b.jsonl"]), tmp_path / "no model"
    with pytest.raises(InputError, match=r"b\.jsonl:0 is unlabelled"):
        baselines.produce(tmp_path, baselines.Params(), settings, COMPUTE, nowhere, tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match=r"b\.jsonl:0 is unlabelled"):
        evaluation.produce(
            tmp_path, "one", settings, COMPUTE, nowhere, nowhere, tmp_path, tmp_path / "out", tmp_path / "one.csv"
        )


def test_an_empty_test_split_gives_empty_baselines(tiny_model: Path, tmp_path: Path) -> None:
    for split, rows in (("train", JSON), ("test", [])):
        write_records(tmp_path / split, rows)
    found = baselines.produce(
        tmp_path, baselines.Params(), Settings(task=TASK), COMPUTE, tiny_model, tmp_path, tmp_path / "out"
    )
    assert found.metrics == {"base": {}} and read_table(tmp_path / "out/results.parquet") == []


def flat(found: Any, place: str = "") -> dict[str, float]:
    if isinstance(found, dict | list):
        inside = found.items() if isinstance(found, dict) else enumerate(found)
        return {key: value for name, each in inside for key, value in flat(each, f"{place}.{name}").items()}
    return {place: found}


def test_every_stage_with_custom_metrics_depends_on_their_folder() -> None:
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    watching = [name for name, body in stages.items() if "data/metrics" in body.get("do", body)["deps"]]
    assert watching == ["baselines", "evaluation", "evaluation_aligned", "comparison"]
