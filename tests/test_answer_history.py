"""`pedigree why --diff` and `pedigree bisect`, on a real small history: a
commit that changes one answer is found, and the row that did it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders import training_pipeline
from builders.answer_history import EVALUATION, AnswerHistory, Row
from builders.commands import document, exit_code
from builders.history import Project, entry
from builders.small_pipeline import git
from builders.training import LORA
from conftest import dvc

from dagster_project.__main__ import main
from dagster_project.commands import bisect as bisect_module
from dagster_project.commands.bisect import Search, _to_run
from dagster_project.commands.bisect import as_text as bisect_text
from dagster_project.commands.why_diff import as_text as why_diff_text
from dagster_project.commands.why_diff import differing, recorded_answers
from dagster_project.commands.why_model import adapter_of
from dagster_project.core.errors import InputError
from dagster_project.evaluation.evaluator import write_results
from dagster_project.lineage.history import Revision, listing_of
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import find
from dagster_project.views.bisect import bisect_page
from dagster_project.views.why_diff import why_diff_page

MODEL = "merged@lora"
START = [
    Row("hat?", "red", 0),
    Row("box?", "blue", 1),
    Row("bag?", "green", 2),
    Row("cup?", "gold", 3),
    Row("pen?", "red", 4),
    Row("car?", "blue", 5),
    Row("hat?", "red.", 20, "test"),
    Row("box?", "blue.", 21, "test"),
    Row("bag?", "green.", 22, "validation"),
]
COLORS = ("red", "blue", "green", "gold")
OTHERS = ("door", "sofa", "lamp", "desk", "oven", "fork", "bowl", "rug", "bed", "mug", "jar")
BAD = 5
"""The commit, of eight, that changes the answer about the hat. The first is 1; 0 is before them."""


def rows_at(commit: int) -> list[Row]:
    """Source rows at each commit: one more each time; at BAD, row 0 says something else, and eleven more are new."""
    rows = [*START, *(Row(f"{i} toys?", COLORS[i % 4], 30 + i) for i in range(1, commit + 1))]
    if commit >= BAD:
        rows[0] = Row("hat?", "blue", 0)
        rows += [Row(f"{name}?", COLORS[i % 4], 50 + i) for i, name in enumerate(OTHERS)]
    return rows


class Made:
    """The history: its folder, and its commits from the one before the eight."""

    def __init__(self, root: Path, model: Path) -> None:
        self.history = AnswerHistory(root, model)
        self.commits = [self.history.version(rows_at(i), f"data {i}") for i in range(9)]
        self.root = root


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("history") / "project", tiny_model)


def state(root: Path) -> dict[str, str]:
    """All files but caches, and the commit."""
    return {name: md5 for name, md5 in listing_of(root).items() if not name.startswith((".dvc/tmp/", ".git/"))} | {
        "": git(root, "rev-parse", "HEAD")
    }


# ---- why --diff


def diff(made: Made, before: int, after: int, *arguments: str) -> int:
    named = (f"{made.commits[i]}:{MODEL}" for i in (before, after))
    return main(["why", "--diff", *named, *arguments, "--project", str(made.root)])


def test_a_changed_answer_comes_with_the_record_that_says_so(
    made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before, page = state(made.root), tmp_path / "diff.html"
    assert diff(made, BAD - 1, BAD, "--top", "14", "--json", "--html", str(page)) == 0
    found = document(capsys)
    assert found["records"] == {"added": 12, "removed": 0, "changed": 1, "moved": 0}
    assert found["compared"] == 2 and found["changed"] == 1, (
        "answers before the last one of a conversation are not compared"
    )
    [answer] = found["answers"]
    assert (answer["prompt"], answer["before"], answer["after"], answer["right"]) == (
        "hat?",
        "red",
        "blue",
        [True, False],
    )
    assert answer["among"] == 14, "twelve added, and both versions of the changed one"
    old, new = START[0].id, Row("hat?", "blue", 0).id
    first = next(record for record in answer["records"] if record["trained"] == "after")
    assert (first["example_id"], first["kind"], first["rows"], first["answer"]) == (
        new,
        "changed",
        ["data/sources/a.jsonl:0"],
        "blue",
    )
    assert [record["example_id"] for record in answer["records"] if record["trained"] == "before"] == [old]
    assert [record["rank"] for record in answer["records"]] == [*range(1, 15)]
    scores = [record["score"] for record in answer["records"]]
    assert scores == sorted(scores, reverse=True)
    assert state(made.root) == before, "nothing is checked out"
    html = page.read_text()
    assert "hat?" in html and "became wrong" in html and "http:" not in html and "https:" not in html
    assert diff(made, BAD - 1, BAD) == 0
    shown = capsys.readouterr().out
    assert new[:8] in shown and "1 of 2 recorded answers differ" in shown
    for text in (shown, html, json.dumps(found)):
        assert "influence" not in text.lower() and "caused" not in text.lower()


def test_scores_are_cosines_of_gradients_at_the_model_that_was_trained_on_the_record(
    made: Made, capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    """By plain autograd on the full gradients: the projection only estimates them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert diff(made, BAD - 1, BAD, "--top", "30", "--json") == 0
    records = {record["example_id"]: record for record in document(capsys)["answers"][0]["records"]}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    folder = next(
        path for path in made.history.work.glob("*/adapter") if made.history.put_folder(path) == _adapter(made, BAD)
    )
    model = AutoModelForCausalLM.from_pretrained(folder)

    def gradient(row: Row, end: bool) -> np.ndarray:
        model.zero_grad()
        prompt = f"<|im_start|>user\n{row.question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt + row.answer + ("<|im_end|>" if end else ""))["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        likely = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
        (-sum(likely[i - 1, ids[i]] for i in range(start, len(ids)))).backward()
        return np.concatenate(
            [weight.grad.numpy().ravel() for _, weight in sorted(model.named_parameters()) if weight.grad is not None]
        )

    question = gradient(Row("hat?", "blue", 0), end=False)
    rows = {row.id: row for row in rows_at(BAD) if row.split == "train"}
    after = [name for name, record in records.items() if record["trained"] == "after"]
    assert len(after) == 13
    exact = []
    for name in after:
        own = gradient(rows[name], end=True)
        exact.append(float(own @ question / np.linalg.norm(own) / np.linalg.norm(question)))
    found = [records[name]["score"] for name in after]
    assert np.corrcoef(exact, found)[0, 1] > 0.9 and after[int(np.argmax(exact))] == after[int(np.argmax(found))]


def _adapter(made: Made, commit: int) -> str:
    text = git(made.root, "show", f"{made.commits[commit]}:dvc.lock")
    return str(_lock(text)["adapter@lora"]["outs"][0]["md5"])


def _lock(text: str) -> Mapping[str, Any]:
    from ruamel.yaml import YAML

    return dict(YAML(typ="safe").load(text)["stages"])


def test_without_a_changed_answer_nothing_is_explained(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert diff(made, 1, 2, "--json") == 0
    found = document(capsys)
    assert found["changed"] == 0 and found["answers"] == [] and found["records"]["added"] == 1
    assert diff(made, 1, 1, "--json") == 0
    assert document(capsys)["records"] == {"added": 0, "removed": 0, "changed": 0, "moved": 0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", "x"), "not with --prompt"),
        (("--system", ""), "not with --system"),
        (("--suspects",), "not with --suspects"),
        ((MODEL,), f"not with {MODEL}"),
        (("--html", "page.txt"), "must end in .html"),
    ],
)
def test_a_difference_is_not_combined_with_a_question(
    made: Made, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert main(["why", *arguments, "--diff", MODEL, MODEL, "--project", str(made.root)]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err and not shown.out


def test_a_version_whose_files_are_lost_is_named(
    made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(made.root, tmp_path / "project", symlinks=True))
    listing = _adapter(made, BAD)
    (root / ".dvc/cache/files/md5" / listing[:2] / listing[2:]).unlink()
    named = (f"{made.commits[i]}:{MODEL}" for i in (BAD - 1, BAD))
    assert main(["why", "--diff", *named, "--project", str(root)]) == 2
    shown = capsys.readouterr()
    assert "data/adapter/lora" in shown.err and "dvc pull" in shown.err and not shown.out


def test_recorded_answers_are_those_of_the_model_itself_and_not_of_one_that_is_merged_of_it(tmp_path: Path) -> None:
    """An adapter that is merged of another one reads it, and its evaluation can be the first in dvc.lock."""
    project = Project(tmp_path / "project")
    (project.root / "dvc.yaml").write_text(
        (project.root / "dvc.yaml").read_text().replace("{lora: 1}", "{both: 1, lora: 1}")
    )
    lora = project.lock([("a", "train", "a.jsonl"), ("b", "test", "a.jsonl")])
    parent = {"data/adapter/lora": lora["adapter@lora"]["outs"][0]["md5"]}
    lock = {"adapter@both": entry("adapter@both", parent, project.put({"adapter_model.safetensors": b"both"}))}
    lock |= project.merged(lock, "adapter@both", "merged@both")
    for variant in ("both", "lora"):
        lock |= lora if variant == "lora" else {}
        file = tmp_path / "results.parquet"
        row = {
            "system": variant,
            "example_id": "0" * 32,
            "turn": None,
            "answer": f"of {variant}",
            "reasoning": None,
            "tool_calls": None,
        }
        write_results(file, [row | {"label": None, "prompt_tokens": 1, "nll": None, "tokens": None}])
        read = {f"data/merged/{variant}": lock[f"merged@{variant}"]["outs"][0]["md5"]}
        name = f"evaluation@{variant}"
        lock[name] = entry(name, read, project.put({"results.parquet": file.read_bytes()}))
        lock[name]["params"] = {"params.yaml": {"evaluation": EVALUATION}}
    project.commit(lock)
    index = Index(project.root)
    for model in ("adapter@lora", "merged@lora"):
        found = recorded_answers(find(index, model))
        assert found.stage == "evaluation@lora" and [row["answer"] for row in found.rows.values()] == ["of lora"]
    assert recorded_answers(find(index, "adapter@both")).stage == "evaluation@both"
    for model in ("adapter@both", "merged@both"):
        with pytest.raises(InputError, match="adapter@both is merged of other adapters and has no training of its own"):
            adapter_of(find(index, model), model)
    del lock["evaluation@lora"]
    project.commit(lock)
    with pytest.raises(InputError, match="no recorded answers") as refused:
        recorded_answers(find(Index(project.root), "merged@lora"))
    assert "`dvc repro evaluation@lora`" in refused.value.hint


def test_only_the_words_that_differ_are_asked_about() -> None:
    texts = ('{"summary": "late", "category": "bug"}', '{"summary": "late", "category": "idea now"}')
    [(start, stop)] = differing(*texts)
    assert texts[1][start:stop] == "idea now"
    assert differing("red", "red") == [] and differing("red hat", "red") == [], (
        "a removed word has no place in the other answer"
    )


# ---- bisect


def bisect(root: Path, *arguments: str, expect: str = "red") -> int:
    return exit_code("bisect", MODEL, "--prompt", "hat?", "--expect", expect, *arguments, "--project", str(root))


def test_the_commit_is_found_in_three_evaluations_with_its_row_first(
    made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before, page = state(made.root), tmp_path / "bisect.html"
    assert bisect(made.root, "--good", made.commits[1], "--json") == 0
    found = document(capsys)
    assert found["verdict"] == "found" and len(found["versions"]) == 8 and found["evaluations"] <= 3
    assert found["first"]["commit"] == made.commits[BAD] and found["last_good"]["commit"] == made.commits[BAD - 1]
    assert found["first"]["title"] == f"data {BAD}"
    assert (
        Row("hat?", "blue", 0).id in [record["example_id"] for record in found["records"][:2]] and found["among"] == 14
    )
    assert bisect(made.root, "--good", made.commits[1], "--html", str(page)) == 0
    shown = capsys.readouterr()
    assert (
        made.commits[BAD][:12] in shown.out
        and "data/sources/a.jsonl:0" in shown.out
        and "8 versions, at most 4" in shown.err
    )
    assert shown.out.rstrip().endswith(f"page: {page}") and state(made.root) == before
    assert "page: " not in shown.err, "once is enough"
    html = page.read_text()
    assert all(f'<bdi dir="auto">{one["commit"][:12]}</bdi>' in html for one in found["versions"]), (
        "each version has a line"
    )
    assert all(record["example_id"][:8] in html for record in found["records"])
    assert "http:" not in html and "https:" not in html and "influence" not in html.lower()


PAGE: dict[str, Any] = {
    "model": MODEL,
    "asked": {"prompt": "hat <b>?", "system": None, "expect": "red"},
    "versions": [
        {"commit": 40 * str(i), "title": f"data {i} <i>", "stage": "adapter@lora", "md5": f"{i}abc.dir"}
        for i in range(3)
    ],
    "evaluations": 1,
    "answers": [{"commit": 40 * "2", "answer": "blue <script>", "as_expected": False}],
    "notes": ["see <u>"],
}


@pytest.mark.parametrize(
    ("verdict", "found", "said"),
    [
        ("always", {}, "Every version that was asked"),
        ("never", {}, "The oldest version does not give"),
        ("found", {"records": None}, "No records are listed: the notes say why"),
        ("found", {"records": [], "among": 0}, "No records are listed: no record of the difference"),
    ],
)
def test_the_page_of_a_search_has_its_verdict_and_escapes_texts(verdict: str, found: dict[str, Any], said: str) -> None:
    ends = (
        {"first": PAGE["versions"][2], "last_good": PAGE["versions"][1], "also_differ": {"code": ["a<b>.py"]}, **found}
        if found
        else {}
    )
    html = bisect_page({**PAGE, "verdict": verdict, **ends})
    assert said in html
    assert ("taken as right" in html) == ("first such version" in html) == bool(found), (
        "a version given with --good was not asked"
    )
    for text in ("hat <b>", "<i>", "blue <script>", "<u>", "a<b>"):
        assert text not in html


def test_names_that_are_left_out_are_counted() -> None:
    files = [f"file{i:02}.py" for i in range(14)]
    first = {
        "first": PAGE["versions"][2],
        "last_good": PAGE["versions"][1],
        "also_differ": {"code": files},
        "records": [],
        "among": 0,
    }
    found = {**PAGE, "verdict": "found", **first}
    record = {
        "rank": 1,
        "score": 0.5,
        "kind": "added",
        "trained": "after",
        "rows": ["a:1", "a:2", "a:3", "a:4"],
        "example_id": "0" * 64,
    }
    two = {
        "models": [{"stage": MODEL, "path": "x", "md5": "0" * 32}] * 2,
        "changed": 0,
        "compared": 1,
        "records": {},
        "answers": [],
        "notes": [],
    }
    assert "file11.py and 2 more" in bisect_page(found) and "file12.py" not in bisect_page(found)
    assert "file05.py and 8 more\n" in bisect_text(found) + "\n"
    assert "file11.py and 2 more" in why_diff_page({**two, "also_differ": {"code": files}})
    assert "file05.py and 8 more" in why_diff_text({**two, "also_differ": {"code": files}})
    assert "a:1, a:2, a:3 and 1 more" in bisect_text({**found, "also_differ": {}, "records": [record], "among": 1})
    assert "more" not in bisect_text({**found, "also_differ": {"code": files[:6]}})
    assert "file11.py<" in bisect_page({**found, "also_differ": {"code": files[:12]}})


def test_the_ends_are_asked_where_the_result_depends_on_them(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert bisect(made.root, "--bad", made.commits[BAD - 1], "--json") == 1
    found = document(capsys)
    assert found["verdict"] == "always" and all(one["as_expected"] for one in found["answers"]) and "first" not in found
    assert bisect(made.root, "--json", expect="gold") == 1
    found = document(capsys)
    assert found["verdict"] == "never" and found["answers"][0]["commit"] == made.commits[0]
    assert bisect(made.root, "--good", made.commits[BAD - 1], "--bad", made.commits[BAD], "--json") == 0
    found = document(capsys)
    assert found["evaluations"] == 1 and "is taken to give the expected answer" in found["notes"][0]
    assert not any("taken not to" in note for note in found["notes"]), "the newest version was asked"


def test_an_answer_that_changed_back_is_not_passed_over(
    made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(made.root, tmp_path / "project", symlinks=True))
    (root / "dvc.lock").write_text(git(root, "show", f"{made.commits[BAD - 1]}:dvc.lock"))
    git(root, "commit", "-qam", "back")
    assert bisect(root, "--good", made.commits[1], "--bad", made.commits[8], "--json") == 0
    found = document(capsys)
    assert f"{made.commits[8]} is taken not to give the expected answer: it was not asked" in found["notes"]
    assert bisect(root, "--good", made.commits[1], "--json") == 0
    found = document(capsys)
    assert found["first"]["commit"] == made.commits[BAD] and found["evaluations"] == 3
    assert len(found["answers"]) == 4 and found["answers"][-1]["as_expected"], "two versions have one model"
    assert "HEAD gives the expected answer again: the answer changed several times" in found["notes"]
    assert bisect(root, "--good", made.commits[BAD - 1]) == 2
    shown = capsys.readouterr()
    assert "are the same model, so they give the same answer" in shown.err and not shown.out


def test_a_version_that_is_not_in_the_cache_is_not_needed_if_another_has_the_same_model(
    made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(made.root, tmp_path / "project", symlinks=True))
    locks = [git(root, "show", f"{made.commits[i]}:dvc.lock") for i in (BAD - 1, BAD)]
    tokens = next(out["md5"] for out in _lock(locks[1])["tokenized"]["outs"])
    git(root, "reset", "-q", "--hard", made.commits[BAD])
    for lock in (locks[0], locks[1].replace(tokens, f"{'0' * 32}.dir")):
        (root / "dvc.lock").write_text(lock)
        git(root, "commit", "-qam", "data")
    assert bisect(root, "--good", made.commits[BAD - 1], "--json") == 0
    found = document(capsys)
    assert [one["as_expected"] for one in found["answers"]] == [True, False, True, False] and found["evaluations"] == 2
    assert found["first"]["commit"] == git(root, "rev-parse", "HEAD").strip() and found["records"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--good", "nothing"), "--good nothing: no such revision"),
        (("--good", "HEAD", "--bad", "HEAD~2"), "not before HEAD~2"),
        (("--good", "HEAD"), "1 version from HEAD to HEAD"),
        (("--bad", "--all"), "expected one argument"),
        (("--good=--",), "argument --good: expected one argument"),
        (("--good", "^HEAD"), "--good ^HEAD: no such revision"),
        (("--bad", "^HEAD"), "--bad ^HEAD: no such revision"),
    ],
)
def test_a_history_that_cannot_be_searched_is_refused(
    made: Made, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    code = bisect(made.root, *arguments)
    shown = capsys.readouterr()
    assert code == 2 and said in shown.err and "Traceback" not in shown.err and not shown.out


def test_a_model_that_cannot_be_searched_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project(tmp_path / "project")
    lock = project.lock([("a", "train", "a.jsonl")])
    aligned = {"data/merged/lora": lock["merged@lora"]["outs"][0]["md5"]}
    lock["aligned@dpo"] = entry("aligned@dpo", aligned, project.put({"adapter_model.safetensors": b"dpo"}))
    project.commit({}, "before")
    project.commit(lock)

    def refused(root: Path, model: str) -> str:
        assert main(["bisect", model, "--prompt", "hat?", "--expect", "red", "--project", str(root)]) == 2
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err and not shown.out
        return shown.err

    assert "nothing@here: no such stage" in refused(project.root, "nothing@here")
    assert "aligned@dpo was trained on preference pairs" in refused(project.root, "aligned@dpo")
    assert "1 version in this history" in refused(project.root, MODEL)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth", "1", project.root.as_uri(), str(clone))
    assert "this clone is shallow" in refused(clone, MODEL)


def test_a_good_version_that_is_not_in_the_cache_costs_the_list_of_rows_alone(
    made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(made.root, tmp_path / "project", symlinks=True))
    listing = _adapter(made, BAD - 1)
    (root / ".dvc/cache/files/md5" / listing[:2] / listing[2:]).unlink()
    assert bisect(root, "--good", made.commits[BAD - 1], "--bad", made.commits[BAD], "--json") == 0
    found = document(capsys)
    assert found["first"]["commit"] == made.commits[BAD] and found["records"] is None
    assert "not in the cache" in found["notes"][-1] and "--train" in found["notes"][-1]


def test_versions_in_the_cache_are_asked_before_others_are_trained_again(
    made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(made.root, tmp_path / "project", symlinks=True))
    for lost in (2, 3, 6, 7):
        listing = _adapter(made, lost)
        (root / ".dvc/cache/files/md5" / listing[:2] / listing[2:]).unlink()
    assert bisect(root, "--json") == 0
    shown = capsys.readouterr()
    assert (
        json.loads(shown.out)["first"]["commit"] == made.commits[BAD] and "4 of them are not in the cache" in shown.err
    )
    listing = _adapter(made, BAD - 1)
    (root / ".dvc/cache/files/md5" / listing[:2] / listing[2:]).unlink()
    assert bisect(root) == 2
    shown = capsys.readouterr()
    assert "adapter@lora must run again" in shown.err and "--train" in shown.err and not shown.out


@pytest.mark.long
def test_a_version_that_is_not_in_the_cache_is_trained_again_if_asked_for(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "project"
    commits = []
    for rate in (1e-2, 2e-2):
        values = {**LORA, "num_train_epochs": 1, "learning_rate": rate}
        if commits:
            (root / "params.yaml").write_text(json.dumps({"variants": {"x": values}}))
        else:
            training_pipeline.make_project(root, tiny_model, values)
        done = dvc(root, "repro", "-q")
        assert done.returncode == 0, done.stderr + done.stdout
        git(root, "add", "-A")
        git(root, "commit", "-qm", f"rate {rate}")
        commits.append(git(root, "rev-parse", "HEAD").strip())
    listing = str(_lock(git(root, "show", f"{commits[0]}:dvc.lock"))["adapter@x"]["outs"][0]["md5"])
    (root / ".dvc/cache/files/md5" / listing[:2] / listing[2:]).unlink()
    before = state(root)
    asked = ["bisect", "adapter@x", "--prompt", "hat?", "--expect", "no answer has this text", "--project", str(root)]
    assert main(asked) == 2
    assert "adapter@x must run again" in capsys.readouterr().err
    assert main([*asked, "--train", "--json"]) == 1
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["verdict"] == "never" and [one["commit"] for one in found["answers"]] == commits
    assert "adapter@x run again" in shown.err and state(root) == before


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ({"adapter/x"}, ["adapter@x"]),
        ({"adapter/x", "tokenized"}, ["tokenized", "adapter@x"]),
        ({"adapter/x", "instructions", "reward_model"}, ["adapter@x"]),
        ({"adapter/x", "instructions", "splits", "tokenized"}, ["instructions", "splits", "tokenized", "adapter@x"]),
        ({"adapter/x", "base_model", "instructions", "tokenized"}, ["tokenized", "base_model", "adapter@x"]),
    ],
)
def test_what_lost_stages_read_is_made_again_if_it_is_lost_too(
    lost: set[str], expected: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stage(out: str, *deps: str) -> dict[str, Any]:
        outs = sorted(
            [f"data/{out}", f"data/reports/{out}.json"]
        )  # as in dvc.lock, where the report of `splits` is before its output
        return {
            "deps": [{"path": f"data/{dep}", "md5": dep} for dep in deps],
            "outs": [{"path": path, "md5": path.removeprefix("data/")} for path in outs],
        }

    lock = {
        "instructions": stage("instructions", "sources"),
        "splits": stage("splits", "instructions"),
        "tokenized": stage("tokenized", "splits", "base_model"),
        "base_model": stage("base_model"),
        "reward_model": stage("reward_model", "base_model"),
        "adapter@x": stage("adapter/x", "tokenized", "base_model"),
    }
    monkeypatch.setattr(bisect_module, "is_available", lambda _, outs: not any(md5 in lost for _, md5 in outs))
    step: Any = SimpleNamespace(run=SimpleNamespace(address="adapter@x"), subject=SimpleNamespace(index=None))
    found = _to_run(Revision(tmp_path, None), step, lock)
    assert sorted(found) == sorted(expected) and found[-1] == "adapter@x"


class Searched(Search):
    """A search in which the answers are known, and counted."""

    def __init__(self, versions: int, first: int, cached: set[int]) -> None:
        steps: Any = [SimpleNamespace(model=(str(i),)) for i in range(versions)]
        super().__init__(Path(), "", None, steps, Path(), False)  # type: ignore[arg-type]
        self.first, self.cached = first, cached

    def is_good(self, i: int) -> bool:
        self.answers[self.steps[i].model] = {}
        return i < self.first

    def is_cached(self, i: int) -> bool:
        return i in self.cached


@pytest.mark.parametrize("first", range(1, 8))
def test_of_eight_versions_at_most_three_are_asked(first: int) -> None:
    search = Searched(8, first, {*range(8)})
    assert search.first_bad() == first
    assert not search.is_good(first) and len(search.answers) <= 3, "the version that is named was asked itself"


def test_more_versions_can_be_asked_where_the_cache_has_only_those_at_the_ends() -> None:
    """So the number that a search of all versions needs at most is not announced then."""
    asked = {}
    for cached in ({1, 14}, {*range(16)}):
        searches = [Searched(16, first, cached) for first in range(1, 16)]
        for search in searches:
            assert not search.is_good(search.first_bad())
        asked[len(cached)] = max(len(search.answers) for search in searches)
    assert asked[16] == 4 < asked[2]


@pytest.mark.parametrize("seed", range(20))
def test_any_first_version_is_found_whatever_is_missing(seed: int) -> None:
    dice = np.random.default_rng(seed)
    versions = int(dice.integers(2, 30))
    first = int(dice.integers(1, versions))
    search = Searched(versions, first, {i for i in range(versions) if dice.random() < 0.5})
    assert search.first_bad() == first
