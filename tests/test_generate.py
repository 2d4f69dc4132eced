"""Batched answers in float32 equal those of one plain `model.generate` per prompt."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.records import said, stored, user
from conftest import ROOT

from dagster_project.core.records import write_records
from dagster_project.training.inference import decoding, packed_weights
from dagster_project.training.inference.generate import generate_ids

TOKENS = 12
QUESTIONS = [
    "Where is my parcel?",
    "No",
    "I was charged twice, please help",
    "Hi there",
    "My login fails and I have no idea why",
    "Thanks",
]
SYSTEM = "Answer as briefly as you can: "
"""More than 16 tokens, so that it is shared."""


def generate(model: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int) -> list[str]:
    answers = generate_ids(model, tokenizer, prompts, TOKENS, batch_size, "test")
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]


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


@pytest.fixture(params=[1024, 40], ids=["read at once", "read a few at a time"])
def tokens_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decoding.TOKENS_AT_ONCE, "cpu", request.param)


@pytest.mark.usefixtures("tokens_at_once")
@pytest.mark.parametrize("prefix", ["", SYSTEM], ids=["nothing shared", "shared prefix"])
@pytest.mark.parametrize("batch_size", [1, 4, 40])
def test_batch_size_and_shared_prefix_change_no_answer(
    model: Any, tiny_tokenizer: Any, prefix: str, batch_size: int
) -> None:
    prompts = [tiny_tokenizer.encode(prefix + question) for question in QUESTIONS]
    wanted = one_by_one(model, tiny_tokenizer, prompts)
    assert len(set(wanted)) == len(prompts), "prompts have the same answer, so nothing is shown"
    assert generate(model, tiny_tokenizer, prompts, batch_size) == wanted


def test_order_of_the_prompts_changes_no_answer(model: Any, tiny_tokenizer: Any) -> None:
    prompts = [tiny_tokenizer.encode(SYSTEM + question) for question in QUESTIONS]
    forwards = generate(model, tiny_tokenizer, prompts, 4)
    assert generate(model, tiny_tokenizer, prompts[::-1], 4) == forwards[::-1]


def test_equal_prompts_and_a_prompt_that_begins_another_are_answered(model: Any, tiny_tokenizer: Any) -> None:
    prompts = [tiny_tokenizer.encode(SYSTEM + question) for question in ("Hi", "Hi", "Hi there")]
    assert generate(model, tiny_tokenizer, prompts, 2) == one_by_one(model, tiny_tokenizer, prompts)


def test_an_answer_ends_at_the_end_of_turn_whatever_its_batch(model: Any, tiny_tokenizer: Any) -> None:
    prompts = [tiny_tokenizer.encode(SYSTEM + question) for question in QUESTIONS]
    unended = one_by_one(model, tiny_tokenizer, prompts)
    ending = copy.deepcopy(tiny_tokenizer)
    ending.eos_token = next(c for c in unended[0][2:] if c.isascii() and c.isprintable())
    ended = one_by_one(model, ending, prompts)
    assert min(map(len, ended)) < max(map(len, ended)) and ended[0] != unended[0]
    assert generate(model, ending, prompts, 6) == ended


@pytest.mark.usefixtures("tokens_at_once")
@pytest.mark.parametrize(
    "kind", ["a window in every other layer", "convolutions in every other layer", "layers that run twice"]
)
@pytest.mark.parametrize("prefix", ["", SYSTEM], ids=["nothing shared", "shared prefix"])
def test_models_with_other_caches_give_the_same_answers_in_batches(tiny_tokenizer: Any, kind: str, prefix: str) -> None:
    from transformers import (
        DoryConfig,
        DoryForCausalLM,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        Lfm2Config,
        Lfm2ForCausalLM,
    )

    torch.manual_seed(3)
    size = {
        "vocab_size": len(tiny_tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    other: Any
    if "window" in kind:
        kinds = ["sliding_attention", "full_attention"] * 2
        other = Gemma3ForCausalLM(
            Gemma3TextConfig(**size, num_key_value_heads=2, head_dim=8, sliding_window=7, layer_types=kinds)
        )
    elif "twice" in kind:
        twice = {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "sliding_window": 7}
        other = DoryForCausalLM(DoryConfig(**size, **twice, num_key_value_heads=2, head_dim=8))
    else:
        other = Lfm2ForCausalLM(Lfm2Config(**size, num_key_value_heads=2, layer_types=["conv", "full_attention"] * 2))
    for weight in other.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    other.eval()
    prompts = [tiny_tokenizer.encode(prefix + question) for question in QUESTIONS]
    wanted = one_by_one(other, tiny_tokenizer, prompts)
    assert len(set(wanted)) > 1, "prompts have the same answer, so nothing is shown"
    assert generate(other, tiny_tokenizer, prompts, 4) == wanted
    ending = copy.deepcopy(tiny_tokenizer)
    ending.eos_token_id = tiny_tokenizer.encode(wanted[0])[1]  # so that an answer leaves the batch early
    assert generate(other, ending, prompts, 4) == one_by_one(other, ending, prompts)


def test_batches_are_small_and_of_similar_lengths() -> None:
    lengths = [5, 30, 1, 30, 2000, 500, 524]
    assert list(decoding.groups(lengths, 3, "cpu")) == [[2, 0, 1], [3, 5], [6], [4]]
    assert list(decoding.groups(lengths, 9, "cuda")) == [[2, 0, 1, 3, 5, 6, 4]]
    assert list(decoding.groups([], 3, "cpu")) == []


def test_no_prompts_have_no_answers(model: Any, tiny_tokenizer: Any) -> None:
    assert generate(model, tiny_tokenizer, [], 4) == []


def test_prepared_weights_give_the_same_bits_and_leave_no_trace(tiny_model: Path) -> None:
    from dagster_project.training.methods.build import causal
    from dagster_project.training.trainers.alignment import preference

    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.5}
    whole = preference.policy(
        tiny_model, settings, torch.device("cpu"), torch.bfloat16, "aligned.mine", "lora"
    ).model.eval()
    for weight in whole.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    policy = causal(whole)

    def logits(rows: int, seq: int) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = policy(torch.arange(rows * seq).view(rows, seq) % 250).logits
        return found

    shapes = [(1, 1), (3, 1), (8, 1), (33, 1), (2, 40)]
    plain = [logits(*shape) for shape in shapes]
    before = {name: vars(module).get("forward") for name, module in policy.named_modules()}
    with packed_weights.packed_weights(policy):
        changed = {name for name, module in policy.named_modules() if vars(module).get("forward") != before[name]}
        assert all(torch.equal(logits(*shape), one) for shape, one in zip(shapes, plain, strict=True))
    assert {name: vars(module).get("forward") for name, module in policy.named_modules()} == before
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert {
            "lm_head",
            "model.layers.0.mlp.up_proj",
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.q_proj.base_layer",
        } <= changed
    whole.train()
    with packed_weights.packed_weights(policy):  # dropout stays on
        assert vars(policy.model.layers[0].self_attn.q_proj)["forward"] == before["model.layers.0.self_attn.q_proj"]
    with packed_weights.packed_weights(policy.float()):
        assert "forward" not in vars(policy.lm_head)


def test_the_benchmark_gives_all_implementations_the_same_prompts(
    model: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (model, tiny_tokenizer):
        part.save_pretrained(tmp_path / "data/base_model")
    (tmp_path / "params.yaml").write_text(
        "{baselines: {few_shot: 2, retrieved: 1}, evaluation: {batch_size: 4}, compute: {dtype: float32, threads: 1}}"
    )
    for split in ("train", "test"):
        records = [stored(user(question), said(split), group_id=None, meta=None) for question in QUESTIONS]
        write_records(tmp_path / "data/splits" / split, records)
    given = {"--project": tmp_path, "--rows": 6, "--rounds": 1, "--max-new-tokens": 3, "--out": tmp_path / "table.md"}
    monkeypatch.setattr("sys.argv", ["answers.py", *(str(word) for pair in given.items() for word in pair)])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    runpy.run_path(str(ROOT / "benchmarks/answers.py"), run_name="__main__")
    begin, text, _, _, _, *rows, _, shares, _, _, _, first, second, third, end = (
        (tmp_path / "table.md").read_text().splitlines()
    )
    assert (begin, end) == ("<!-- answers: begin -->", "<!-- answers: end -->")
    assert text.startswith("6 prompts, at most 3 new tokens each, float32, batches of 4, 1 thread(s), ")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["`zero_shot`", "`few_shot`", "`retrieved`"]
    assert all(row[-1] == "100 %" for row in cells), "in float32 they answer alike"
    assert float(cells[0][1]) < float(cells[2][1]) < float(cells[1][1]), "worked examples make prompts longer"
    assert shares == "Share of 6 prompts with the same answer in batches of 1 and of 16:"
    assert all(row.endswith("| 100 % |") for row in (first, second, third)), "in float32 the batch changes no answer"
