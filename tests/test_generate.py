"""Batched answers in float32 are those of one plain `model.generate` per prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dagster_project.evaluation.generate import generate

TOKENS = 12
QUESTIONS = ["Where is my parcel?", "No", "I was charged twice, please help", "Hi there", "My login fails and I have no idea why", "Thanks"]
SYSTEM = "Answer as briefly as you can: "
"""More than 16 tokens, so that it is shared."""


def one_by_one(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        answers.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("prefix", ["", SYSTEM], ids=["nothing shared", "shared prefix"])
@pytest.mark.parametrize("batch_size", [1, 4, 40])
def test_batch_size_and_shared_prefix_change_no_answer(model: Any, tiny_tokenizer: Any, prefix: str, batch_size: int) -> None:
    prompts = [tiny_tokenizer.encode(prefix + question) for question in QUESTIONS]
    wanted = one_by_one(model, tiny_tokenizer, prompts)
    assert len(set(wanted)) == len(prompts), "prompts have the same answer, so nothing is shown"
    assert generate(model, tiny_tokenizer, prompts, TOKENS, batch_size, "test") == wanted


def test_order_of_the_prompts_changes_no_answer(model: Any, tiny_tokenizer: Any) -> None:
    prompts = [tiny_tokenizer.encode(SYSTEM + question) for question in QUESTIONS]
    forwards = generate(model, tiny_tokenizer, prompts, TOKENS, 4, "test")
    assert generate(model, tiny_tokenizer, prompts[::-1], TOKENS, 4, "test") == forwards[::-1]


def test_equal_prompts_and_a_prompt_that_begins_another_are_answered(model: Any, tiny_tokenizer: Any) -> None:
    prompts = [tiny_tokenizer.encode(SYSTEM + question) for question in ("Hi", "Hi", "Hi there")]
    assert generate(model, tiny_tokenizer, prompts, TOKENS, 2, "test") == one_by_one(model, tiny_tokenizer, prompts)


def test_an_answer_ends_at_the_end_of_turn_however_long_its_neighbours_are(model: Any, tiny_tokenizer: Any) -> None:
    import copy

    prompts = [tiny_tokenizer.encode(SYSTEM + question) for question in QUESTIONS]
    unended = one_by_one(model, tiny_tokenizer, prompts)
    ending = copy.deepcopy(tiny_tokenizer)
    ending.eos_token = next(c for c in unended[0][2:] if c.isascii() and c.isprintable())
    ended = one_by_one(model, ending, prompts)
    assert min(map(len, ended)) < max(map(len, ended)) and ended[0] != unended[0]
    assert generate(model, ending, prompts, TOKENS, 6, "test") == ended


def test_no_prompts_have_no_answers(model: Any, tiny_tokenizer: Any) -> None:
    assert generate(model, tiny_tokenizer, [], TOKENS, 4, "test") == []
