"""From files to the comparison table: a set with tool calls and one with traces
tune the tiny model, which learns both by heart.

The stages run in this process, in the order of the pipeline; what is asserted is in the files that they leave.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from builders.tool_calls import call

from dagster_project.core.chat import IGNORE
from dagster_project.core.context import StageContext
from dagster_project.core.layout import report_of
from dagster_project.core.records import read_ledger, read_records, read_table, write_json
from dagster_project.pipeline import PEDIGREE, module_of

ADDRESSES = (
    "base_model", "raw_examples", "instructions", "splits", "tokenized", "adapter@lora", "merged@lora", "baselines",
    "evaluation@lora", "comparison",
)  # fmt: skip
WORDS = (
    "bridge", "candle", "copper", "dragon", "engine", "forest", "garden", "guitar", "hammer", "harbor", "island",
    "jacket", "kettle", "ladder", "marble", "needle", "pepper", "quartz",
)  # fmt: skip
"""Of one length, so that the tiny model need not learn to count."""
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 5}}\n</tool_call><|im_end|>'
ANSWER, TRACE = "Yes.<|im_end|>", "3 + 4 = 7"
END = "<|im_end|>"


def question(seed: int) -> str:
    """Words that no other question has in this order: nothing is a near-copy."""
    return " ".join(random.Random(seed).sample(WORDS, 9)) + "?"


def conversation(seed: int, arguments: Any = '{"a": 5}', **answer: Any) -> dict[str, Any]:
    """A row in OpenAI's form: a question, a call, its result and an answer."""
    return {
        "tools": [ADD],
        "messages": [
            {"role": "user", "content": question(seed)},
            {"role": "assistant", "content": None, "tool_calls": [call("add", arguments, "c1")]},
            {"role": "tool", "tool_call_id": "c1", "content": "8"},
            {"role": "assistant", "content": "Yes.", **answer},
        ],
    }


def reasoned(seed: int, trace: str | None = TRACE) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "7"} | ({"reasoning_content": trace} if trace else {})
    return {"messages": [{"role": "user", "content": question(seed)}, answer]}


def run_pipeline(root: Path, model: Path, rows: list[dict[str, Any]], steps: int, **sections: Any) -> dict[str, Any]:
    """Every stage up to the comparison, on rows of a JSONL file. Returns the reports by stage."""
    shutil.copytree(model, root / "models" / "tiny")
    (root / "data" / "sources").mkdir(parents=True)
    (root / "data" / "sources" / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "compute": {"seed": 7, "threads": 2, "dtype": "float32"},
        "base_model": {"folder": "models/tiny", "license": "MIT", "dtype": "float32", "chat_template": "hermes"},
        "raw_examples": {"sources": [{"path": "data/sources/mine.jsonl", "license": "MIT"}]},
        "instructions": {},
        "splits": {"test": 0.25, "validation": 0.1},
        "adapter": {
            "lora": {
                "method": "full",
                "learning_rate": 4e-3,
                "num_train_epochs": 100,
                "max_steps": steps,
                "save_strategy": "no",
            }
        },
        "aligned": {},
        "baselines": {"few_shot": 1, "retrieved": 1, "thinking_tokens": 2},
    } | sections
    (root / "params.yaml").write_text(json.dumps(values))
    reports = {}
    for address in ADDRESSES:
        stage, _, variant = address.partition("@")
        # outputs are written to their place: `scratch` is the project itself
        ctx = StageContext(
            root,
            stage,
            variant or None,
            root,
            values,
            PEDIGREE.variants_of,
            earlier=ADDRESSES[: ADDRESSES.index(address)],
        )
        ctx.out.mkdir(parents=True)
        report = reports[stage] = module_of(stage).run(ctx)
        assert not report.failures, (address, report.failures)
        (root / report_of(address)).parent.mkdir(parents=True, exist_ok=True)
        write_json(root / report_of(address), report.document())
    return {stage: report.document() for stage, report in reports.items()}


def trained_texts(root: Path, tokenizer: Any) -> dict[str, list[str]]:
    """What the loss counts in the training split, by example: the text of each run of labels."""
    found: dict[str, list[str]] = {}
    for row in read_table(root / "data" / "tokenized" / "train.parquet"):
        start = 0
        for identity, length in zip(row["example_ids"], row["lengths"], strict=True):
            labels, runs = row["labels"][start : start + length], [[]]
            for token in labels:
                runs[-1].append(token) if token != IGNORE else runs.append([])
            assert all(a in (IGNORE, b) for a, b in zip(labels, row["input_ids"][start : start + length], strict=True))
            found.setdefault(identity, []).extend(tokenizer.decode(run) for run in runs if run)
            start += length
    return found


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_model_learns_to_call_a_tool(tmp_path: Path, tiny_model: Path, tiny_tokenizer: Any) -> None:
    rows = [conversation(seed) for seed in range(24)]
    rows += [conversation(100, '{"a": "five"}'), conversation(101, "not JSON")]
    rows += [conversation(102, weight=0), conversation(0)]
    rows[3]["messages"][2] = {"role": "user", "content": "Well?"}  # instead of the call's result
    reports = run_pipeline(
        tmp_path,
        tiny_model,
        rows,
        200,
        tokenized={"max_length": 700},
        evaluation={"max_new_tokens": 90, "batch_size": 16},
    )

    ledger = read_ledger(tmp_path / "data" / "instructions")
    assert Counter(line["outcome"] for line in ledger) == {
        "kept": 24, "dropped:invalid_tool_call": 2, "dropped:unanswered_tool_call": 1, "dropped:exact_duplicates": 1,
    }  # fmt: skip
    assert [(line["source_row"], line["outcome"]) for line in ledger if line["outcome"] != "kept"] == [
        (3, "dropped:unanswered_tool_call"),
        (24, "dropped:invalid_tool_call"),
        (25, "dropped:invalid_tool_call"),
        (27, "dropped:exact_duplicates"),
    ]

    train = {record["example_id"]: record for record in read_records(tmp_path / "data" / "splits" / "train")}
    assert trained_texts(tmp_path, tiny_tokenizer) == {
        name: [CALL] if record["messages"][-1].get("weight") == 0 else [CALL, ANSWER] for name, record in train.items()
    }

    tuned, base = reports["evaluation"], reports["baselines"]["zero_shot"]
    test = read_records(tmp_path / "data" / "splits" / "test")
    assert (tuned["n_calls"], tuned["n_text"]) == (
        len(test),
        sum(record["messages"][-1].get("weight") != 0 for record in test),
    )
    names = ("tool_call_valid", "tool_name_accuracy", "tool_arguments_exact")
    assert [tuned[name] for name in names] == [1.0, 1.0, 1.0], "every call is learned by heart"
    assert [base[name] for name in names] == [0.0, 0.0, 0.0], "the untuned model is random"
    assert tuned["exact_match"] == 1.0, "after the result of the call it answers in text"
    answered = [
        row for row in read_table(tmp_path / "data" / "evaluation" / "lora" / "results.parquet") if row["tool_calls"]
    ]
    assert [json.loads(row["tool_calls"]) for row in answered] == [[call("add", {"a": 5})]] * len(test)
    assert "perplexity_to_base" in reports["comparison"]["compared"]["lora"]
    assert "| same calls |" in (tmp_path / "data" / "comparison" / "board.md").read_text()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_model_learns_to_reason_before_it_answers(tmp_path: Path, tiny_model: Path, tiny_tokenizer: Any) -> None:
    rows = [reasoned(seed) for seed in range(24)] + [reasoned(0, "4 + 3 = 7"), reasoned(0)]
    reports = run_pipeline(
        tmp_path, tiny_model, rows, 120, base_model={"folder": "models/tiny", "license": "MIT", "dtype": "float32"},
        tokenized={"max_length": 700, "reasoning": "keep", "chat_template": "hermes"},
        evaluation={"task": {"final_answer": "number"}, "max_new_tokens": 60, "batch_size": 16},
    )  # fmt: skip

    ledger = read_ledger(tmp_path / "data" / "instructions")
    assert [line["source_row"] for line in ledger if line["outcome"] == "dropped:exact_duplicates"] == [25], (
        "another trace is another row"
    )
    assert len({line["example_id"] for line in ledger}) == 25
    train = {record["example_id"]: record for record in read_records(tmp_path / "data" / "splits" / "train")}
    assert trained_texts(tmp_path, tiny_tokenizer) == {
        name: [f"<think>\n{record['messages'][-1]['reasoning_content']}\n</think>\n\n7{END}"]
        for name, record in train.items()
    }

    tuned, base = reports["evaluation"], reports["baselines"]["zero_shot"]
    assert tuned["accuracy"] == 1.0 and tuned["no_final_answer"] == 0.0
    assert base["accuracy"] == 0.0
    answered = [
        row
        for row in read_table(tmp_path / "data" / "evaluation" / "lora" / "results.parquet")
        if row["answer"] is not None
    ]
    assert {(row["answer"], row["label"]) for row in answered} == {("7", "7")}
    assert all(TRACE in row["reasoning"] or "4 + 3 = 7" in row["reasoning"] for row in answered), (
        "the trace is kept apart from the answer"
    )
    assert "perplexity_to_base" not in reports["comparison"]["compared"]["lora"], (
        "the base model's own template leaves out the traces"
    )
