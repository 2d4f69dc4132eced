"""Every chat template that TRL ships is trained on as it is served, or refused with a reason; docs/models.md says which."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import chat_templates  # noqa: E402


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return chat_templates.matrix(tmp_path_factory.mktemp("families"))


def test_no_label_is_wrong_and_every_prompt_is_what_inference_renders(cells: dict[str, dict[str, Any]]) -> None:
    assert len(cells) == 41
    assert {(family, name): cell.problems for family, found in cells.items() for name, cell in found.items() if cell.problems} == {}


def test_at_most_three_families_refuse_a_chat_of_two_turns(cells: dict[str, dict[str, Any]]) -> None:
    assert sum(not found["two turns"].examples for found in cells.values()) <= 3


def test_every_refusal_has_a_reason(cells: dict[str, dict[str, Any]]) -> None:
    assert all(cell.examples or cell.refusal for found in cells.values() for cell in found.values())


def test_the_page_is_up_to_date(cells: dict[str, dict[str, Any]]) -> None:
    assert chat_templates.PAGE.read_text(encoding="utf-8") == chat_templates.page(cells), "run: python benchmarks/chat_templates.py"


@pytest.mark.parametrize("damage", ["label the header", "leave the end unlabeled", "another prompt"])
def test_the_comparison_finds_wrong_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    examples_of = chat_templates.examples_of

    def damaged(tokenizer: Any, record: dict[str, Any]) -> Any:
        [(header, _), (answer, _), *rest] = examples_of(tokenizer, record)[0]
        if damage == "label the header":
            return [[(header[:-1], False), (header[-1] + answer, True), *rest]]
        if damage == "leave the end unlabeled":
            return [[(header, False), (answer[:-3], True), (answer[-3:], False), *rest]]
        return [[(header[1:], False), (answer, True), *rest]]

    tokenizer = chat_templates.stub_tokenizer("qwen3", tmp_path)
    record = chat_templates.CELLS["one turn"]
    assert chat_templates.judge(tokenizer, tmp_path, record).problems == ()
    monkeypatch.setattr(chat_templates, "examples_of", damaged)
    assert chat_templates.judge(tokenizer, tmp_path, record).problems
