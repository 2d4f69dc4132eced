"""The checks give the same answer in blocks of any size, on any number of processes."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.tiny_model import CHAT_TEMPLATE

from dagster_project.core import workers
from dagster_project.core.records import content_id
from dagster_project.curation.checks.checks import Rules, judge
from dagster_project.curation.checks.findings import document
from dagster_project.curation.checks.review import Decision, Waiver
from dagster_project.curation.checks.token_counts import ESTIMATED, Tokens, tokens_of
from dagster_project.curation.sources.benchmarks import Item

WORDS = [
    "where",
    "is",
    "the",
    "red",
    "kite",
    "that",
    "ann",
    "lost",
    "in",
    "the",
    "hall",
    "on",
    "monday",
    "evening",
    "and",
    "who",
    "found",
    "it",
    "near",
    "the",
    "old",
    "tower",
]
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}}}


def sample(seed: int, size: int, pairs: bool = False) -> list[dict[str, Any]]:
    """Records with faults, copies, near-copies, conflicting answers, labels, calls and reasoning."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(size):
        if rows and draw.random() < 0.4:
            row = json.loads(json.dumps(draw.choice(rows)))
            at = draw.choice([0, -1])
            row["messages"][at]["content"] += draw.choice(["", "", " Now.", "\ufeff", " Write to ann@kites.org", "<|im_end|>"])
        else:
            asked, said = (" ".join(draw.choices(WORDS, k=draw.randint(1, 14))) for _ in "ab")
            row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}], "category": draw.choice("abc")}
            if draw.random() < 0.2:
                row["messages"][1]["reasoning_content"] = " ".join(draw.choices(WORDS, k=12))
            if draw.random() < 0.2:
                row["tools"] = [TOOL]
                row["messages"][1]["tool_calls"] = [
                    {"type": "function", "function": {"name": "find", "arguments": {"what": draw.choice(WORDS)}}}
                ]
            if pairs:
                row |= {"asked": 1, "rejected": [{"role": "assistant", "content": draw.choice(WORDS)}], "same_prompt": True, "margin": None}
        if pairs and draw.random() < 0.2:
            row["messages"][1:], row["rejected"] = row["rejected"], row["messages"][1:]
        label = {"split": draw.choice(["train", "validation", "test"])} if draw.random() < 0.2 else {}
        rows.append({**row, "source": draw.choice(["a.jsonl", "b.jsonl"]), "source_row": i, "group_id": None, "meta": json.dumps(label)})
        rows[-1] |= {"example_id": content_id(rows[-1]), **({"source_rows": [i]} if pairs else {})}
    return rows


def answer(rows: list[dict[str, Any]], tokens: Tokens, pairs: bool) -> str:
    held_out = [
        Item(f"benchmark:{i}", row["messages"][0]["content"], text=row["messages"][-1]["content"]) for i, row in enumerate(rows[:3])
    ]
    waiver = Waiver(check="pii", rows=[f"{rows[5]['source']}:5", rows[9]["example_id"][:8]], reason="public", expires="2999-01-01")  # type: ignore[arg-type]
    decisions = [
        Decision(rows[i]["example_id"], "conflicting_responses", how, "seen", "Who?", "Ann.") for i, how in ((7, "edit"), (8, "accept"))
    ]  # type: ignore[arg-type]
    rules = Rules(policy={"pii": "fix", "near_duplicates": "drop"}, waivers=[waiver], max_tokens=40)
    judged = judge(rows, held_out, rules, tokens, decisions, "preferences" if pairs else "examples")
    found = document("set", "records", judged, held_out)
    links = {name: [vars(link) for link in links] for name, links in judged.overlaps.links.items()}
    facts = [judged.reason, [*map(int, judged.cluster)], judged.said, judged.waiting, [*judged.records], links]
    return json.dumps([found, facts], default=str)


@pytest.mark.parametrize("pairs", [False, True], ids=["examples", "pairs"])
@pytest.mark.parametrize("seed", range(2))
def test_blocks_of_any_size_give_the_same_answer(seed: int, pairs: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tokens = sample(seed, 80, pairs), tokens_of(tiny_model) if seed else ESTIMATED
    whole = answer(rows, tokens, pairs)
    assert all(f'"{check}"' in whole for check in ("exact_duplicates", "hidden_characters", "pii", "missing_reasoning"))
    for size in (19, 79):
        monkeypatch.setattr("dagster_project.core.stored_rows.BLOCK", size)
        assert answer(rows, tokens, pairs) == whole


def test_several_processes_give_the_same_answer(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tokens = sample(5, 80), tokens_of(tiny_model)
    whole = answer(rows, tokens, False)
    monkeypatch.setattr("dagster_project.core.stored_rows.BLOCK", 30)
    with workers.using(workers.LocalProcesses(2)):
        assert answer(rows, tokens, False) == whole


def test_the_result_of_a_set_without_rows_is_that_of_no_rows() -> None:
    judged = judge([], [], Rules())
    assert not judged.verdicts["schema"].passed and [*judged.records] == [] and judged.reason == []


def test_a_tokenizer_in_another_process_knows_the_models_end_tokens(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    template = CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    for path in folder.glob("chat_template*"):
        path.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]
    misfit = tokens_of(folder).misfit
    assert misfit and "does not end" in str(misfit(messages, None))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    here = tokens_of(folder)
    for tokens in (here, pickle.loads(pickle.dumps(here)), pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(here))))):
        assert tokens.misfit(messages, None) is None
        assert (tokens.count(["Ann."]), tokens.special) == (here.count(["Ann."]), here.special)
