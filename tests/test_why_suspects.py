"""`pedigree why --suspects`: records that do not fit their group come first,
and people decide: nothing is dropped by itself."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders.commands import document

from dagster_project.__main__ import main
from dagster_project.commands import why_calibration
from dagster_project.commands.why import excerpt
from dagster_project.commands.why_model import at_end, target
from dagster_project.commands.why_suspects import _own_groups
from dagster_project.core.context import Documents
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.records import example_id, write_json, write_ledger, write_records
from dagster_project.curation.checks import findings
from dagster_project.curation.checks.checks import CHECKS, Rules, judge
from dagster_project.curation.checks.review import read_decisions
from dagster_project.lineage.attribution import suspects as module
from dagster_project.lineage.attribution.suspects import (
    LEAST,
    Group,
    Suspicion,
    agreement,
    chosen_groups,
    form_of,
    harm,
    members,
    opposition,
)
from dagster_project.views.data_quality import draw_data_quality
from dagster_project.views.suspects import suspects_page

MODEL = "adapter@x"


# ---- groups


@pytest.mark.parametrize(
    ("message", "form"),
    [
        ({"content": '{"b": 1, "a": [2]}'}, "JSON with a, b"),
        ({"content": "[1, 2]"}, "JSON"),
        ({"content": "3"}, "text"),
        ({"content": "Yes."}, "text"),
        ({"content": "", "tool_calls": [{"type": "function"}]}, "calls"),
        ({"content": None}, "text"),
        ({"content": "[" * 100_000}, "text"),
    ],
)
def test_the_form_of_an_answer_is_how_it_is_built(message: dict[str, Any], form: str) -> None:
    assert form_of({"role": "assistant", **message}) == form


def test_the_form_of_a_record_is_that_of_its_last_answer_although_other_turns_follow() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    turns = [
        [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": '{"celsius": 1}'}],
        [{"role": "assistant", "content": '{"category": "bug"}'}, {"role": "user", "content": "Thanks!"}],
    ]
    known = {f"{i}": {"messages": one, "source": "a.jsonl", "category": None} for i, one in enumerate(turns)}
    found: Any = SimpleNamespace(records=[SimpleNamespace(example_id=name) for name in known])
    texts: Any = SimpleNamespace(known=known)
    assert [one.form for one in _own_groups(found, texts)] == ["calls", "JSON with category"]


def test_a_record_of_a_small_group_is_compared_with_a_wider_one() -> None:
    narrow = [Group("a.jsonl", "idea", "text")] * LEAST
    few = [Group("b.jsonl", "idea", "text")] * (LEAST - 1)
    alone = [Group("c.jsonl", "bug", "calls")]
    own = [*narrow, *few, *alone]
    chosen = chosen_groups(own)
    assert chosen == [*narrow, *[Group(None, "idea", "text")] * (LEAST - 1), Group()]
    inside = members(own, chosen)
    assert inside[0].tolist() == [*range(LEAST)]
    assert inside[LEAST].tolist() == [*range(2 * LEAST - 1)], "the wider group has the records of the narrow one too"
    assert inside[-1].tolist() == [*range(len(own))]


def test_keys_of_an_answer_in_the_name_of_its_group_are_cut_and_masked() -> None:
    answers = [{"anna@example.org": 1, "bert@example.org": 2}, {f"key{i}": i for i in range(1000)}]
    known = {
        str(i): {"source": "a", "category": None, "messages": [{"role": "assistant", "content": json.dumps(answer)}]}
        for i, answer in enumerate(answers)
    }
    names = [SimpleNamespace(example_id=name) for name in (*known, "unknown")]
    own = _own_groups(SimpleNamespace(records=names), SimpleNamespace(known=known))  # type: ignore[arg-type]
    assert (
        own[0].form == "JSON with [e-mail], [e-mail]"
        and own[1].form.startswith("JSON with key0, key1, ")
        and len(own[1].form) < 140
    )
    assert own[2] == Group()


@pytest.mark.parametrize("secret", ["anna.example@example.org", "AKIAIOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9])
def test_a_secret_after_much_white_space_is_masked_as_a_whole(secret: str) -> None:
    """Of a long text only the beginning is masked, which can end within a value."""
    known = excerpt(f"ring {secret} now")
    for before in range(5970, 6001):
        assert excerpt("ring" + " " * before + f"{secret} now") == known and secret[:8] not in known
    assert excerpt("x " * 2990 + secret)[:300] == "x " * 150


# ---- scores


def random_units(count: int, width: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def test_agreement_is_the_cosine_with_the_mean_of_the_others() -> None:
    units = random_units(40, 25)
    own = [Group(f"{i % 3}.jsonl", "x" if i < 30 else "y", "text") for i in range(40)]
    chosen = chosen_groups(own)
    found = agreement(units, own, chosen)
    for i, group in enumerate(chosen):
        others = [k for k in range(40) if k != i and group in own[k].wider()]
        mean = units[others].astype(np.float64).mean(0)
        expected = units[i].astype(np.float64) @ mean / np.linalg.norm(mean)
        assert found[i] == pytest.approx(expected, abs=1e-5)


def test_a_record_without_others_or_without_a_gradient_has_no_agreement() -> None:
    units = random_units(3, 8)
    assert agreement(units[:1], [Group()], [Group()]).tolist() == [0.0]
    units[1] = 0
    assert agreement(units, [Group()] * 3, [Group()] * 3)[1] == 0.0


def test_records_that_oppose_their_group_come_first_in_any_order() -> None:
    """Two groups with directions of their own; four records of each point the
    other way, and are no longer than the others."""
    dice = np.random.default_rng(1)
    directions = dice.normal(size=(2, 50))
    rows = np.stack([directions[i % 2] * (-1 if i < 8 else 1) + 0.4 * dice.normal(size=50) for i in range(100)])
    lengths = np.linalg.norm(rows, axis=1).astype(np.float32)
    units = (rows / lengths[:, None]).astype(np.float16)
    own = [Group(f"{i % 2}.jsonl") for i in range(100)]
    score = agreement(units, own, own)
    assert {*np.argsort(score)[:8].tolist()} == {*range(8)}
    shuffled = dice.permutation(100)
    again = agreement(units[shuffled], [own[i] for i in shuffled], [own[i] for i in shuffled])
    assert np.allclose(again, score[shuffled], atol=1e-5)


def test_opposition_is_the_sum_of_the_negative_products_with_the_others() -> None:
    units, lengths = random_units(30, 6), np.random.default_rng(2).uniform(0.5, 3.0, 30).astype(np.float32)
    whole = units.astype(np.float64) * lengths[:, None]
    expected = [sum(max(0.0, -float(whole[i] @ whole[k])) for k in range(30) if k != i) for i in range(30)]
    assert opposition(units, lengths) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_of_many_records_a_sample_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OTHERS", 400)
    units, lengths = random_units(800, 6), np.ones(800, np.float32)
    whole = units.astype(np.float64)
    exact = np.maximum(0.0, -(whole @ whole.T)).sum(1)
    found = opposition(units, lengths)
    assert np.corrcoef(found, exact)[0, 1] > 0.3 and found.mean() == pytest.approx(exact.mean() / 2, rel=0.05)
    assert (found == opposition(units, lengths)).all()


def test_a_label_that_others_contradict_comes_first() -> None:
    """Inputs of three kinds, each with its label; four records of the first kind
    have the label of the second. A gradient is the outer product of what was read
    and of how far the label's probability is from 1, as in a linear model."""
    dice = np.random.default_rng(3)
    kinds = np.arange(120) % 3
    labels = np.where(np.arange(120) < 12, np.where(kinds == 0, 1, kinds), kinds)
    inputs = np.eye(3)[kinds] + 0.2 * dice.normal(size=(120, 3))
    missing = np.where(labels == kinds, 0.3, 0.9)
    outputs = (
        -np.eye(3)[labels] * missing[:, None]
        + (np.eye(3)[kinds] - np.eye(3)[labels]) * missing[:, None] * (labels != kinds)[:, None]
    )
    rows = (inputs[:, :, None] * outputs[:, None, :]).reshape(120, 9)
    lengths = np.linalg.norm(rows, axis=1).astype(np.float32)
    found = Suspicion.of(opposition((rows / lengths[:, None]).astype(np.float16), lengths), lengths)
    assert {*found.order()[:4]} == {0, 3, 6, 9}


def test_both_ranks_count_for_the_score() -> None:
    found = Suspicion.of(np.array([0.1, 5.0, 2.0, 3.0]), np.array([1.0, 5.0, 9.0, 2.0]))
    assert found.opposition_rank.tolist() == [4, 1, 3, 2] and found.length_rank.tolist() == [4, 2, 1, 3]
    assert found.order()[0] == 1 and found.order()[-1] == 0
    assert found.score.tolist() == pytest.approx([2 / 64, 1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62 + 1 / 63])
    assert found.harm is None and found.harm_rank is None
    found = Suspicion.of(
        np.array([0.1, 5.0, 2.0, 3.0]), np.array([1.0, 5.0, 9.0, 2.0]), np.array([-1.0, -2.0, 3.0, 0.5])
    )
    assert (
        found.harm_rank is not None
        and found.harm_rank.tolist() == [3, 4, 1, 2]
        and found.length_rank.tolist() == [4, 2, 1, 3]
    )
    assert found.score.tolist() == pytest.approx(
        [1 / 64 + 1 / 63, 1 / 61 + 1 / 64, 1 / 63 + 1 / 61, 1 / 62 + 1 / 62]
    ), "length does not count"


def test_harm_is_the_first_order_change_of_the_log_probability_of_validation_answers() -> None:
    """A step on a record of a logistic regression changes the losses of the
    validation examples by its inner products with their gradients."""
    dice = np.random.default_rng(5)
    weights, inputs, labels = dice.normal(size=4), dice.normal(size=(30, 4)), dice.integers(0, 2, size=30)

    def loss(at: np.ndarray, i: int) -> float:
        return float(np.log1p(np.exp(-(2 * labels[i] - 1) * (inputs[i] @ at))))

    def gradient(i: int) -> np.ndarray:
        return -(2 * labels[i] - 1) * inputs[i] / (1 + np.exp((2 * labels[i] - 1) * (inputs[i] @ weights)))

    rows = np.stack([gradient(i) for i in range(30)])
    lengths = np.linalg.norm(rows, axis=1)
    found = harm((rows[20:] @ rows[:20].T) / lengths[20:, None] / lengths[:20], lengths[:20])
    step = 1e-5
    change = [
        sum((loss(weights - step * rows[i], j) - loss(weights, j)) / lengths[j] for j in range(20, 30)) / step
        for i in range(20)
    ]
    assert found == pytest.approx(change, abs=1e-3)


# ---- the command


def record(i: int, label: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"Ticket {i}: <b>where</b> is it? Ring anna@example.org."},
        {"role": "assistant", "content": json.dumps({"category": label})},
    ]
    return {
        "example_id": f"train{i // 4}.{i % 4}",
        "source": f"{i % 2}.jsonl",
        "messages": messages,
        "category": label,
        "meta": "{}",
    }


RECORDS = [record(i, "bug" if i % 4 < 2 else "idea") for i in range(28)]
"""Texts for the records of `training_pipeline`, whose own are random tokens."""


@pytest.fixture
def root(_trained: Path, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(_trained, tmp_path / "project", symlinks=True))
    write_records(root / "data/splits/train", RECORDS)
    assert why_calibration.index(at_end(target(root, MODEL)))["computed"] == 28
    return root


def suspects(root: Path, *arguments: str) -> int:
    return main(["why", MODEL, "--suspects", *arguments, "--project", str(root)])


def add_instructions(root: Path, names: list[str]) -> None:
    """The set that people review, with some of the records."""
    kept = [
        {"source": "a.jsonl", "source_row": 7 + i, "example_id": name, "outcome": "kept", "why": ""}
        for i, name in enumerate(names)
    ]
    write_ledger(root / "data/instructions", kept)
    write_json(root / "data/instructions/findings.json", {"findings": []})


def test_the_list_has_ranks_groups_and_texts_and_claims_nothing(
    root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "suspects.html"
    assert suspects(root, "--top", "6", "--json", "--html", str(page)) == 0
    found = document(capsys)
    assert found["records"] == 28 and [one["rank"] for one in found["suspects"]] == [*range(1, 7)]
    assert found["queue"] is None and "no review queue was written" in found["notes"][-1]
    scores = [one["score"] for one in found["suspects"]]
    assert scores == sorted(scores, reverse=True)
    by_id = {one["example_id"]: one for one in RECORDS}
    for one in found["suspects"]:
        source, label = (by_id[one["example_id"]][name] for name in ("source", "category"))
        cosine = one["group"].pop("cosine")
        assert -1 <= cosine <= 1 and one["group"] == {
            "name": f"{source}, {label}, JSON with category",
            "source": source,
            "category": label,
            "form": "JSON with category",
            "records": 7,
        }
        assert "anna@example.org" not in one["prompt"] and label in one["answer"]
    html = page.read_text()
    assert (
        "&lt;b&gt;where" in html
        and "<b>where" not in html
        and "Content-Security-Policy" in html
        and "http:" not in html
        and "https:" not in html
    )
    assert suspects(root, "--top", "6") == 0
    shown = capsys.readouterr().out
    assert all(one["example_id"] in shown for one in found["suspects"])
    for text in (shown, html, json.dumps(found)):
        assert "influence" not in text.lower() and "caused" not in text.lower()


def test_the_cosines_and_lengths_are_those_of_the_store(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file

    assert suspects(root, "--top", "28", "--json") == 0
    listed = {one["example_id"]: one for one in document(capsys)["suspects"]}
    [shard] = (root / ".dvc/tmp/pedigree/gradients").glob("*/end/gradients-*.safetensors")
    stored, names = load_file(shard), sorted(listed)
    lengths = stored["lengths"]
    assert [listed[name]["length"]["value"] for name in names] == pytest.approx(lengths.tolist(), rel=1e-3)
    assert sorted(names, key=lambda name: listed[name]["length"]["rank"])[0] == names[int(lengths.argmax())]
    alike = [k for k, name in enumerate(names) if listed[name]["group"]["name"] == listed[names[0]]["group"]["name"]]
    whole = stored["gradients"].astype(np.float64)
    mean = whole[[k for k in alike if k]].mean(0)
    assert listed[names[0]]["group"]["cosine"] == pytest.approx(whole[0] @ mean / np.linalg.norm(mean), abs=1e-3)


def test_people_decide_on_the_queue_and_nothing_is_dropped_before(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_instructions(root, [one["example_id"] for one in RECORDS[:20]])
    before = {path: path.read_bytes() for path in sorted((root / "data").rglob("*")) if path.is_file()}
    assert suspects(root, "--top", "28", "--json") == 0
    found = document(capsys)
    assert found["queue"] == {
        "file": "data/pages/instructions/suspects.csv",
        "records": 20,
    }, "this project has no stage `instructions`"
    assert "8 of these records are not rows of data/instructions" in found["notes"][-1]
    assert (
        before.items()
        <= {path: path.read_bytes() for path in sorted((root / "data").rglob("*")) if path.is_file()}.items()
    )
    file = root / found["queue"]["file"]
    assert read_decisions(file, CHECKS) == []
    rows = list(csv.DictReader(io.StringIO(file.read_text(), newline="")))
    listed = [one["example_id"] for one in found["suspects"] if int(one["example_id"][5:].split(".")[0]) < 5]
    assert [row["example_id"] for row in rows] == listed and all(row["decision"] == "" for row in rows)
    assert {row["place"] for row in rows} == {f"a.jsonl:{7 + i}" for i in range(20)}


def test_a_row_that_a_person_drops_is_counted_in_the_report(
    root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The queue names a check that the report knows; otherwise rows in and out would not add up."""
    rows = [
        one | {"example_id": example_id(one["messages"]), "source_row": i, "group_id": None}
        for i, one in enumerate(RECORDS)
    ]
    add_instructions(root, [one["example_id"] for one in RECORDS])
    assert suspects(root, "--top", "1", "--json") == 0
    [suspect] = document(capsys)["suspects"]
    [line] = csv.DictReader(io.StringIO((root / "data/pages/instructions/suspects.csv").read_text(), newline=""))
    at = [one["example_id"] for one in RECORDS].index(suspect["example_id"])
    decided = tmp_path / "decided.csv"
    with decided.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(line))
        writer.writeheader()
        writer.writerow(line | {"example_id": rows[at]["example_id"], "decision": "drop", "reason": "wrong label"})
    judged = judge(rows, [], Rules(policy={"pii": "warn"}), decisions=read_decisions(decided, CHECKS))
    assert [i for i, reason in enumerate(judged.reason) if reason] == [at]
    assert judged.dropped == {"reviewed": 1}
    assert not any(judge(rows, [], Rules(policy={"pii": "warn"})).reason)


def test_the_page_of_data_quality_shows_the_queue_of_its_own_rows_only(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [one | {"source_row": i, "group_id": None} for i, one in enumerate(RECORDS)]
    add_instructions(root, [one["example_id"] for one in RECORDS])
    out, pages = root / "data/instructions", root / "data/pages/instructions"
    write_json(
        out / "findings.json", findings.document("instructions", "canonical records", judge(rows, [], Rules()), [])
    )
    assert suspects(root, "--top", "2", "--json") == 0
    listed = document(capsys)["suspects"]
    assert json.loads((pages / "suspects.json").read_text())["of"] == sha256_of_file(out / "findings.json")

    def drawn() -> str:
        draw_data_quality(Documents(root, "instructions", out, pages, {}))
        return (pages / "report.html").read_text()

    page = drawn()
    assert 'id="suspects"' in page and all(one["example_id"][:8] in page for one in listed)
    write_json(out / "findings.json", json.loads((out / "findings.json").read_text()) | {"rows": 29})
    assert 'id="suspects"' not in drawn(), "the rows were checked again: the queue is of other ones"


@pytest.mark.parametrize("other", ["--prompt", "--answer", "--span", "--system"])
def test_a_question_is_not_combined_with_the_list(root: Path, capsys: pytest.CaptureFixture[str], other: str) -> None:
    assert suspects(root, other, "x") == 2
    assert f"not with {other}" in capsys.readouterr().err


def test_without_gradients_the_next_step_is_named_and_no_file_is_written(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / ".dvc/tmp/pedigree/gradients")
    add_instructions(root, [])
    assert suspects(root) == 2
    assert "add --index" in capsys.readouterr().err and not (root / "data/pages/instructions").exists()
    assert suspects(root, "--html", "page.txt") == 2
    assert suspects(root, "--index", "--json", "--top", "1") == 0
    assert document(capsys)["index"]["computed"] == 28


def test_records_are_compared_with_the_answers_of_the_validation_split(
    root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "suspects.html"
    assert suspects(root, "--top", "28", "--json") == 0
    found = document(capsys)
    assert "length alone" in found["notes"][1] and "harm" not in found["suspects"][0]
    write_records(root / "data/splits/validation", [record(100 + i, f"label {i}") for i in range(24)])
    assert suspects(root, "--index", "--top", "28", "--json", "--html", str(page)) == 0
    found = document(capsys)
    assert found["index"]["questions"] == 24 and not any("length alone" in note for note in found["notes"])
    listed = found["suspects"]
    assert sorted(one["harm"]["rank"] for one in listed) == [*range(1, 29)]
    values = [one["harm"]["value"] for one in sorted(listed, key=lambda one: int(one["harm"]["rank"]))]
    assert values == sorted(values, reverse=True)
    scores = [1 / (60 + one["opposition"]["rank"]) + 1 / (60 + one["harm"]["rank"]) for one in listed]
    assert [one["score"] for one in listed] == pytest.approx(scores, abs=1e-5) and scores == sorted(
        scores, reverse=True
    )
    assert "harm to validation answers" in page.read_text()
    assert suspects(root) == 0 and "harm to validation answers" in capsys.readouterr().out


def test_the_page_escapes_texts_of_other_groups() -> None:
    one = {
        "rank": 1,
        "score": 0.03,
        "example_id": "0" * 32,
        "source": "<i>a",
        "source_row": None,
        "steps": [],
        "prompt": "<u>",
        "answer": "&",
        "group": {"name": "<s>", "source": None, "category": None, "form": None, "records": 9, "cosine": -0.5},
        "opposition": {"rank": 1, "value": 2.0},
        "length": {"rank": 2, "value": 3.0},
    }
    page = suspects_page(
        {"model": {"stage": MODEL, "md5": "0" * 32}, "records": 9, "suspects": [one], "queue": None, "notes": []}
    )
    assert "<u>" not in page and "<i>a" not in page and "8 others: &lt;s&gt;" in page
