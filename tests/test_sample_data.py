"""The sample data matches the README: original messages, balanced sets, and exactly the planted defects."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from dagster_project.core.records import Report, read_ledger, read_records
from dagster_project.curation.sources.benchmarks import read_multiple_choice
from dagster_project.stages import instructions, raw_examples

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "data" / "sources"
BENCHMARK = "data/sources/benchmarks/general_knowledge.jsonl"
CATEGORIES = ["login", "billing", "delivery", "returns", "bug", "question", "idea", "security"]

Cured = tuple[Report, list[dict[str, Any]], list[dict[str, Any]]]


def jsonl(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SOURCES / name).read_text(encoding="utf-8").splitlines()]


def customer_messages() -> dict[str, str]:
    """ "file:row" -> what the customer wrote."""
    alpaca = json.loads((SOURCES / "triage_alpaca.json").read_text(encoding="utf-8"))
    found = {f"triage_alpaca:{i}": row["instruction"] for i, row in enumerate(alpaca)}
    for name, key in {"triage_messages": "messages", "replies_messages": "messages", "preferences": "prompt"}.items():
        for i, row in enumerate(jsonl(f"{name}.jsonl")):
            found[f"{name}:{i}"] = "\n".join(message["content"] for message in row[key] if message["role"] == "user")
    return found


@pytest.fixture(scope="module")
def cured(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Cured:
    """The report, the records kept and the ledger of the sample data after `instructions`."""
    folder = tmp_path_factory.mktemp("cured")
    names = ("triage_alpaca.json", "triage_messages.jsonl", "replies_messages.jsonl")
    sources = [raw_examples.Source(path=f"data/sources/{name}") for name in names]
    raw_examples.produce(ROOT, raw_examples.Params(sources=sources), folder / "raw")
    params = instructions.Params(benchmarks=[BENCHMARK])
    report = instructions.produce(ROOT, params, folder / "raw", tiny_model, folder / "out", folder / "pages", {})
    return report, read_records(folder / "out"), read_ledger(folder / "out")


def triage(cured: Cured) -> list[dict[str, Any]]:
    return [record for record in cured[1] if record["source"].startswith("data/sources/triage_")]


def test_only_the_planted_messages_share_six_words_in_a_row() -> None:
    holders: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for place, text in customer_messages().items():
        words = re.findall(r"[a-z0-9']+", text.lower())
        for i in range(len(words) - 5):
            holders[tuple(words[i : i + 6])].add(place)
    assert {tuple(sorted(places)) for places in holders.values() if len(places) > 1} == {
        ("triage_alpaca:10", "triage_alpaca:240"),  # exact repeat in one file
        ("triage_alpaca:241", "triage_messages:5"),  # exact repeat across files
        ("triage_alpaca:20", "triage_alpaca:242"),  # near-duplicate
    }


def test_exactly_the_planted_rows_are_dropped(cured: Cured) -> None:
    report, kept, ledger = cured
    assert report.dropped == {
        "invalid_roles": 1,
        "empty_response": 1,
        "placeholder_input": 1,
        "pii": 1,
        "exact_duplicates": 2,
        "benchmark_leakage": 1,
    }
    assert len(kept) == len(ledger) - 7
    dropped = {
        f"{row['source'].split('/')[-1]}:{row['source_row']}": row["outcome"]
        for row in ledger
        if row["outcome"] != "kept"
    }
    assert dropped == {
        "triage_alpaca.json:240": "dropped:exact_duplicates",
        "triage_messages.jsonl:5": "dropped:exact_duplicates",
        "triage_alpaca.json:243": "dropped:empty_response",
        "triage_alpaca.json:244": "dropped:placeholder_input",
        "triage_messages.jsonl:240": "dropped:invalid_roles",
        "triage_messages.jsonl:241": "dropped:pii",
        "replies_messages.jsonl:128": "dropped:benchmark_leakage",
    }


def test_the_broken_role_is_a_customer() -> None:
    roles = Counter(message["role"] for row in jsonl("triage_messages.jsonl") for message in row["messages"])
    assert roles["customer"] == 1


def test_the_near_duplicate_is_kept_and_reported(cured: Cured) -> None:
    near = next(check for check in cured[0].checks if check.name == "near_duplicates")
    assert near.rows == ["data/sources/triage_alpaca.json:242"]


def test_every_category_has_sixty_rows_and_one_has_the_near_duplicate_too(cured: Cured) -> None:
    rows = triage(cured)
    assert len(rows) >= 400
    assert Counter(record["category"] for record in rows) == {**dict.fromkeys(CATEGORIES, 60), "delivery": 61}


def test_every_triage_answer_has_the_three_fields_with_known_values(cured: Cured) -> None:
    for record in triage(cured):
        answer = json.loads(record["messages"][-1]["content"])
        assert list(answer) == ["summary", "category", "priority"]
        assert answer["summary"].strip()
        assert answer["category"] == record["category"]
        assert answer["priority"] in {"high", "normal", "low"}


def test_security_is_always_high_and_an_idea_always_low(cured: Cured) -> None:
    seen = defaultdict(set)
    for record in triage(cured):
        seen[record["category"]].add(json.loads(record["messages"][-1]["content"])["priority"])
    assert (seen["security"], seen["idea"]) == ({"high"}, {"low"})


def test_there_are_enough_replies(cured: Cured) -> None:
    assert sum(record["source"].endswith("replies_messages.jsonl") for record in cured[1]) >= 120


def test_there_are_enough_preference_pairs_with_a_test_split() -> None:
    pairs = jsonl("preferences.jsonl")
    assert len(pairs) >= 320
    assert {name: n for name, n in Counter(pair["split"] for pair in pairs).items() if name != "train"} == {"test": 96}
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)


@pytest.mark.parametrize("parts", [("train", "test"), ("test",)])
def test_length_does_not_predict_the_chosen_reply(parts: tuple[str, ...]) -> None:
    pairs = [pair for pair in jsonl("preferences.jsonl") if pair["split"] in parts]
    longer = sum(len(pair["chosen"][-1]["content"]) > len(pair["rejected"][-1]["content"]) for pair in pairs)
    assert 0.45 <= longer / len(pairs) <= 0.55


def test_the_benchmark_has_sixty_different_labeled_questions() -> None:
    questions = list(read_multiple_choice(ROOT / BENCHMARK))
    assert len(questions) == len({question.question for question in questions}) == 60
    assert all(len(set(question.choices)) == len(question.choices) for question in questions)
