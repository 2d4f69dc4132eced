"""The training page marks exactly the tokens that the loss counts, by weight, and shows the row by role."""

from __future__ import annotations

import json
import re
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from builders.tool_calls import WEATHER, record, weather

from dagster_project.core.params import parse
from dagster_project.core.records import read_table, write_ledger, write_records
from dagster_project.stages import tokenized
from dagster_project.views.trained_examples import (
    NO_TOKENIZER,
    NO_TOKENS,
    Piece,
    TrainedExample,
    legend,
    pieces,
    trained_examples,
)
from dagster_project.views.training import training_page


def ask(question: str, answer: str, row: int = 0) -> dict[str, Any]:
    return record([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], row=row)


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path) -> Path:
    """A project folder with a base model."""
    shutil.copytree(tiny_model, tmp_path / "data/base_model")
    return tmp_path


def tokenize(root: Path, *rows: dict[str, Any], **params: Any) -> dict[str, Any]:
    """Run the stage `tokenized` on rows of the train split; its audit."""
    splits, out = root / "data/splits", root / "data/tokenized"
    for split, records in (("train", rows), ("validation", ())):
        write_records(
            splits / split, [{key: value for key, value in one.items() if key != "source_row"} for one in records]
        )
    write_ledger(splits, [{**one, "outcome": "train", "why": ""} for one in rows])
    tokenized.produce(root, parse(tokenized.Params, params, "tokenized"), 7, splits, root / "data/base_model", out=out)
    found: dict[str, Any] = json.loads((out / "audit.json").read_text())
    return found


def marked(example: TrainedExample) -> list[tuple[str, float | None]]:
    return [(piece.text, piece.weight) for piece in example.pieces]


def test_each_token_has_its_weight_in_the_loss(project: Path) -> None:
    answer = '{"summary": "late ⟦kite⟧", "category": "é", "note": "x"}'
    audit = tokenize(project, ask("Where?", answer), weigh="example", field_weights={"category": 16, "note": 0})
    [shown] = trained_examples(project, audit)
    assert marked(shown) == [
        ("<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n", None),
        ('{"summary": "late ⟦kite⟧", "category": "', 1.0),
        ("é", 16.0),
        ('", "note": "', 1.0),
        ("x", 0.0),
        ('"}<|im_end|>', 1.0),
        ("\n", None),
    ]
    trained = len(answer.encode()) + 1
    [packed] = read_table(project / "data/tokenized/train.parquet")
    assert shown.figures == f"{packed['lengths'][0]} tokens, {trained - 1} in the loss"
    assert legend([shown]) == {0.0: ("w0", "×0, not counted"), 1.0: ("w1", "×1"), 16.0: ("w4", "×16")}


def test_the_page_says_what_is_missing_or_is_another_version_in_place_of_a_text(project: Path) -> None:
    audit = tokenize(project, ask("Where?", "Here."))
    expected = [
        ("<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n", None), ("Here.<|im_end|>", 1.0), ("\n", None),
    ]  # fmt: skip
    assert marked(trained_examples(project, audit)[0]) == expected
    shutil.rmtree(project / "data/splits/train")
    [shown] = trained_examples(project, audit)
    assert marked(shown) == expected and shown.by_role is None
    tokenizer = project / "data/base_model/tokenizer.json"
    original = tokenizer.read_text()
    tokenizer.write_text(original + " ")
    assert marked(trained_examples(project, audit)[0]) == [(NO_TOKENIZER, None)]
    tokenizer.unlink()
    assert marked(trained_examples(project, audit)[0]) == [(NO_TOKENIZER, None)]
    tokenizer.write_text(original)
    tokenize(project, ask("Where?", "There."))
    assert marked(trained_examples(project, audit)[0]) == [(NO_TOKENS, None)]
    (project / "data/tokenized/train.parquet").unlink()
    assert marked(trained_examples(project, audit)[0]) == [(NO_TOKENS, None)]


def test_an_audit_of_an_earlier_version_has_its_texts(project: Path, tiny_tokenizer: Any) -> None:
    assert marked(trained_examples(project, {"examples": [{"source": "a", "text": "a ⟦b⟧"}]})[0]) == [
        ("a ", None),
        ("b", 1.0),
    ]
    tokenize(project, ask("Where?", "Here."))
    [packed] = read_table(project / "data/tokenized/train.parquet")
    tokens = {name: packed[name] for name in ("input_ids", "labels")}
    earlier = {
        **tokens,
        "split": "train",
        "source": "a",
        "part": 0,
        "example_id": packed["example_ids"][0],
        "text": "a ⟦b⟧",
    }
    other = {**earlier, "input_ids": [token + 1 for token in packed["input_ids"]]}
    assert (
        pieces(tiny_tokenizer.backend_tokenizer, other, None)
        == pieces(None, earlier, None)
        == [Piece("a ", None), Piece("b", 1.0)]
    )


def test_a_character_of_several_tokens_is_not_torn_and_first_spaces_are_kept() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    spaced = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "?": 2}, unk_token="?"))
    spaced.pre_tokenizer, spaced.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    example = {"input_ids": [0, 1, 0], "labels": [-100, 1, -100], "text": "a⟦b⟧a"}
    assert pieces(spaced, example, None) == [Piece("a", None), Piece(" b", 1.0), Piece(" a", None)]

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ids = bytes_.encode("aé").ids
    example = {"input_ids": ids, "labels": [-100, -100, ids[2]], "text": "a\ufffd⟦\ufffd⟧"}
    assert pieces(bytes_, example, None) == [Piece("a", None), Piece("é", 1.0)]


def test_rows_with_calls_reasoning_and_weights_are_among_the_shown_ones_by_role(project: Path) -> None:
    rows = [ask(f"Where is number {i}?", "Here.", i) for i in range(9)]
    audit = tokenize(project, *rows)
    rich = record(weather(), [WEATHER])
    write_records(
        project / "data/splits/train",
        [{key: value for key, value in one.items() if key != "source_row"} for one in (*rows, rich)],
    )
    audit["examples"].append({**audit["examples"][-1], "example_id": rich["example_id"]})
    shown = trained_examples(project, audit)
    assert len(shown) == 5
    assert [one.by_role.summary for one in shown if one.by_role] == [
        *["user, assistant"] * 4,
        "system, user, assistant (not in the loss), user, assistant (reasoning, 1 call), tool, assistant; 1 tool",
    ]


def test_of_a_row_with_several_examples_the_last_is_shown_before_another_one_of_that_row(project: Path) -> None:
    rewriting = (
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last or m.role == 'user' else '(' ~ m.content ~ ')'"
        " }}<|im_end|>\n{% endfor %}"
    )
    rewriting += "{% if add_generation_prompt %}assistant: {% endif %}"
    (project / "data/templates").mkdir()
    (project / "data/templates/rewriting.jinja").write_text(rewriting)
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(6)]
    audit = tokenize(project, record(turns), ask("Where?", "Here.", 1), chat_template="data/templates/rewriting.jinja")
    shown = trained_examples(project, audit)
    assert [one.place for one in shown] == [
        *(f"a.jsonl, example {i} of its row (train)" for i in (1, 2, 3)),
        "a.jsonl (train)",
    ]
    assert [piece.text for one in shown for piece in one.pieces if piece.weight] == [
        "turn 1<|im_end|>", "turn 3<|im_end|>", "turn 5<|im_end|>", "Here.<|im_end|>",
    ]  # fmt: skip
    many = [record([{**turn, "content": f"{turn['content']} of {i}"} for turn in turns], row=i) for i in range(4)]
    audit = tokenize(project, *many, chat_template="data/templates/rewriting.jinja")
    assert len({one["example_id"] for one in audit["examples"]}) == 3
    shown = trained_examples(project, audit)
    assert [re.findall(r"example (\d)", one.place) for one in shown] == [["1"], ["2"], ["3"], ["3"], ["3"]]


def test_weights_are_found_in_packed_rows_of_many_examples(project: Path) -> None:
    rows = [ask(f"Question {i}?", '{"category": "a"}' if i % 2 else '{"category": "b"}', i) for i in range(300)]
    audit = tokenize(project, *rows, field_weights={"category": 3})
    for shown in trained_examples(project, audit):
        assert [weight for weight, _ in groupby(weight for _, weight in marked(shown))] == [None, 1.0, 3.0, 1.0, None]


def test_the_page_marks_by_weight_and_names_every_weight() -> None:
    document = {
        "loss": {"first": 2.0, "last": 1.0},
        "validation": [],
        "steps": 1,
        "planned_steps": 1,
        "tokens": 1,
        "trained_tokens": 1,
        "settings": {"method": "lora"},
        "dtype": "float32",
        "device": "cpu",
        "seed": 7,
        "threads": 2,
        "versions": {},
        "frozen": {"sha256_before": "a", "sha256_after": "a", "tensors": 2},
        "trained": {},
    }
    example = TrainedExample(
        "a.jsonl", [Piece("asked", None), Piece("answer", 1.0), Piece("label", 16.0), Piece("skipped", 0.0)]
    )
    page = training_page("lora", document, [{"step": 1, "loss": 2.0}], {"peak_memory_bytes": 2e9}, None, [example])
    assert (
        'asked<mark class="w1" title="×1">answer</mark><mark class="w4" title="×16">label</mark><mark class="w0"'
        in page
    )
    assert '<mark class="w0">×0, not counted</mark> <mark class="w1">×1</mark> <mark class="w4">×16</mark>' in page
    assert "mark.w0 { background: none" in page
