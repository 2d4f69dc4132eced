"""`pedigree why` about models that were trained on pairs: gradients equal those of the loss as its paper writes it, by
plain autograd, and what cannot be attributed is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import alignment_pipeline
from builders.gradients import flat
from builders.preferences import write_letters
from conftest import dvc, pedigree

from dagster_project.__main__ import main
from dagster_project.core.params import Compute
from dagster_project.core.records import read_preferences, read_table
from dagster_project.lineage.attribution.owners import stores_of
from dagster_project.lineage.attribution.pairs import (
    AlignedModel,
    DpoLoss,
    RewardedModel,
    gradients_of_pairs,
    pair_records,
    trained_names,
)
from dagster_project.lineage.attribution.per_record import is_packed
from dagster_project.lineage.attribution.projection import Projection
from dagster_project.lineage.attribution.store import GRADIENTS
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import find

COMPUTE = Compute(threads=1, dtype="float32")
WHOLE = Projection(numbers=4096**2)
"""So large that no side of a gradient is projected."""
ENTRY = {
    "adapter": "lora",
    "learning_rate": 1e-2,
    "num_train_epochs": 2,
    "samples": 4,
    "max_new_tokens": 4,
    "per_device_train_batch_size": 4,
}
VARIANTS = {
    "x": {**ENTRY, "method": "dpo", "options": {"beta": 0.3, "label_smoothing": 0.1}},
    "k": {**ENTRY, "method": "kto"},
}


@pytest.fixture(scope="module")
def root(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which a policy of DPO, one of KTO and a reward model were trained."""
    folder = tmp_path_factory.mktemp("pairs")
    write_letters(folder / "preferences", train=range(12), validation=range(20, 22), test=range(30, 34))
    project = alignment_pipeline.make_project(folder / "project", tiny_model, folder / "preferences", VARIANTS)
    done = dvc(project, "repro", "-q")
    assert done.returncode == 0, done.stderr + done.stdout
    return project


def tokenizer(root: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(root / "data/base_model")


def assert_close(found: np.ndarray, expected: np.ndarray, bound: float = 2e-5) -> None:
    assert np.abs(expected).max() > 0 and np.abs(found - expected).max() < bound * np.abs(expected).max()


def turns(tokenizer: Any, pair: dict[str, Any], side: str) -> tuple[list[int], int]:
    """Ids of a prompt with an answer, as the chat template writes it at once,
    and the number of tokens of the prompt."""
    prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*pair["prompt"], *pair[side]], return_dict=False)
    assert whole[: len(prompt)] == prompt
    end = len(whole) - whole[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    return whole[:end], len(prompt)


def plain_dpo(root: Path, pairs: list[dict[str, Any]]) -> np.ndarray:
    """Full gradient of the loss of each pair: equation 7 of the paper with
    PEFT's layers, transformers' attention and autograd alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, words = AutoModelForCausalLM.from_pretrained(root / "data/merged/lora"), tokenizer(root)
    model = PeftModel.from_pretrained(base, root / "data/aligned/x", is_trainable=True).eval()

    def likely(pair: dict[str, Any], side: str) -> torch.Tensor:
        ids, start = turns(words, pair, side)
        logits = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
        return sum((logits[i - 1, ids[i]] for i in range(start, len(ids))), torch.tensor(0.0))

    found = []
    for pair in pairs:
        model.zero_grad()
        with torch.no_grad(), model.disable_adapter():
            reference = [likely(pair, side) for side in ("chosen", "rejected")]
        ratio = 0.3 * ((likely(pair, "chosen") - reference[0]) - (likely(pair, "rejected") - reference[1]))
        loss = -0.9 * torch.log(torch.sigmoid(ratio)) - 0.1 * torch.log(torch.sigmoid(-ratio))
        loss.backward()
        found.append(
            flat(
                {name: weight.grad.numpy().copy() for name, weight in model.named_parameters() if weight.requires_grad}
            )
        )
    return np.stack(found)


def by_id(root: Path) -> list[dict[str, Any]]:
    return sorted(read_preferences(root / "data/preferences/train"), key=lambda pair: pair["example_id"])


def test_gradients_of_dpo_are_those_of_its_loss(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dagster_project.lineage.attribution import per_record

    records, _ = pair_records(root / "data/aligned/x", root / "data/preferences", tokenizer(root))
    assert [record.example_id for record in records] == [pair["example_id"] for pair in by_id(root)]
    expected = plain_dpo(root, by_id(root)[:6])
    model = AlignedModel.aligned(
        root / "data/aligned/x", root / "data/merged/lora", COMPUTE, "aligned@x", DpoLoss(0.3, 0.1)
    )
    examples = [record.examples for record in records[:6]]
    assert is_packed(model), "otherwise they would not be packed"
    assert_close(gradients_of_pairs(model, WHOLE, examples).numpy(), expected)
    monkeypatch.setattr(per_record, "ROOM", 60)  # several passes
    assert_close(gradients_of_pairs(model, WHOLE, examples).numpy(), expected)
    assert_close(np.stack([flat(model.of_record(pair)) for pair in examples]), expected)
    projected = [gradients_of_pairs(model, Projection(64, seed), examples).numpy() for seed in range(40)]
    products, exact = np.stack([one @ one.T for one in projected]), expected @ expected.T
    error = products.std(0) / len(products) ** 0.5
    assert (np.abs(products.mean(0) - exact) <= 5 * error).all(), (
        "inner products of projected gradients estimate those of the gradients"
    )
    assert error.max() < 0.2 * np.abs(exact).max()


def test_gradients_of_a_reward_model_are_those_of_its_loss_at_the_weights_that_were_trained(root: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = root / "data/reward_model"
    settings = json.loads((folder / "training.json").read_text())["settings"]
    records, _ = pair_records(folder, root / "data/preferences", tokenizer(root))
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    before = AutoModelForSequenceClassification.from_pretrained(root / "data/base_model", num_labels=1).state_dict()
    moved = {name for name, weight in plain.named_parameters() if not torch.equal(weight, before[name])}
    words, margin, center = tokenizer(root), 0.5, 0.01
    given = settings | {"center_rewards_coefficient": center}
    model = RewardedModel.load(
        folder, given, COMPUTE, {record.example_id: margin for record in records}, "reward_model"
    )
    assert model.weights.keys() == moved and "score.weight" in moved, (
        "LoRA and the output layer changed these weights, and no others"
    )
    for record, pair in list(zip(records, by_id(root), strict=True))[:4]:
        plain.zero_grad()
        good, bad = (plain(torch.tensor([turns(words, pair, side)[0]])).logits[0, 0] for side in ("chosen", "rejected"))
        (-torch.log(torch.sigmoid(good - bad - margin)) + center * (good + bad) ** 2).backward()
        assert_close(
            flat(model.of_record(record)),
            flat({name: w.grad.numpy() for name, w in plain.named_parameters() if name in moved}),
        )
        plain.zero_grad()
        (-plain(torch.tensor([turns(words, pair, "chosen")[0]])).logits[0, 0]).backward()
        reward, gradient = model.of_answer(record.examples[0])
        assert reward == pytest.approx(float(good), rel=1e-4)
        assert_close(
            flat(gradient), flat({name: w.grad.numpy() for name, w in plain.named_parameters() if name in moved})
        )


@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", set()), ("lora_only", {"q_proj"}), ("all", {"q_proj", "k_proj", "v_proj", "o_proj"})],
)
def test_biases_that_lora_trained_are_among_the_weights_of_a_reward_model(bias: str, expected: set[str]) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes: dict[str, Any] = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(**sizes, num_labels=1, attention_bias=True)
    found = trained_names(
        LlamaForSequenceClassification(config), {"target_modules": ["q_proj"], "bias": bias}, "reward_model"
    )
    layer = "model.layers.0.self_attn"
    assert found == {"score.weight", f"{layer}.q_proj.weight", *(f"{layer}.{name}.bias" for name in expected)}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"modules_to_save": ["embed_tokens"]}, {"model.embed_tokens.weight"}),
        ({"trainable_token_indices": [3]}, {"model.embed_tokens.weight"}),
        ({"target_parameters": ["experts.down_proj"], "lora_dropout": 0.0}, {"model.layers.0.mlp.experts.down_proj"}),
    ],
)
def test_all_weights_that_an_adapter_trained_are_among_those_of_a_reward_model(
    given: dict[str, Any], expected: set[str]
) -> None:
    from transformers import MixtralConfig, MixtralForSequenceClassification

    config = MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_labels=1,
    )  # fmt: skip
    keys, before = {"target_modules": ["q_proj"], **given}, json.dumps(given)
    found = trained_names(MixtralForSequenceClassification(config), keys, "reward_model")
    assert found == {"score.weight", "model.layers.0.self_attn.q_proj.weight", *expected}
    assert json.dumps(given) == before, "else the store of the gradients gets another identity and is never found again"


def why(root: Path, *arguments: str) -> int:
    return main(["why", *arguments, "--project", str(root)])


def test_the_reward_of_a_question_is_that_by_which_the_model_scores_answers(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from dagster_project.training.trainers.alignment.reward_model import RewardModel

    scorer = RewardModel(root / "data/reward_model", torch.device("cpu"), torch.float32)
    assert why(root, "reward_model", "--prompt", "q3", "--answer", "aaaa", "--index", "--json") == 0
    [expected] = scorer([[{"role": "user", "content": "q3"}, {"role": "assistant", "content": "aaaa"}]])
    assert json.loads(capsys.readouterr().out)["question"]["reward"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model", ["aligned@x", "reward_model"])
def test_a_new_process_answers_a_question_about_pairs(root: Path, model: str) -> None:
    """It imports the libraries in another thread while it hashes files, and needs the tokenizer to read pairs."""
    done = pedigree(root, "why", model, "--prompt", "q3", "--answer", "aaaa", "--index", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["records"] == 12


@pytest.mark.parametrize(("model", "measure"), [("aligned@x", "log_probability"), ("reward_model", "reward")])
def test_a_question_about_a_model_of_pairs_ranks_pairs(
    root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str, measure: str
) -> None:
    page = tmp_path / "why.html"
    asked = (model, "--prompt", "q3", "--answer", "aaaa", "--top", "4")
    shutil.rmtree(root / GRADIENTS, ignore_errors=True)
    assert why(root, *asked, "--index", "--json", "--html", str(page)) == 0
    document = json.loads(capsys.readouterr().out)
    used = {row["example_id"] for row in read_table(root / "data" / model.replace("@", "/") / "examples.parquet")}
    assert (
        document["records"] == len(used) == 12
        and document["index"]["computed"] == 12
        and measure in document["question"]
    )
    pairs = {pair["example_id"]: pair for pair in by_id(root)}
    for hit in document["hits"]:
        pair = pairs[hit["example_id"]]
        assert (hit["prompt"], hit["answer"], hit["rejected"]) == (
            pair["prompt"][0]["content"],
            pair["chosen"][0]["content"],
            pair["rejected"][0]["content"],
        )
    assert "rejected answer" in page.read_text()
    note = (
        "preference pairs; what data/merged/lora was trained on before is not ranked: ask it"
        if "@" in model
        else "preference pairs"
    )
    assert document["notes"][-2] == f"the records are {note}", "nothing before the base model can be asked"
    assert "--prove" not in document["notes"][-1], "it is refused for pairs"
    [judged] = [one for one in document["notes"] if "which is often wrong" in one]
    assert "models of preference pairs" in judged and "--index" not in judged, "it would not help"
    [listed] = [one for one in stores_of(root, find(Index(root), model)) if one["stage"] == model]
    assert (listed["records"], listed["of"]) == (12, 12), "audit lists the store"
    assert why(root, *asked, "--json") == 0 and "index" not in json.loads(capsys.readouterr().out)
    assert why(root, *asked) == 0
    shown = capsys.readouterr().out
    assert "not z" in shown and "preference pairs" in shown


def test_answers_without_text_such_as_calls_are_shown_each_by_its_tokens(root: Path) -> None:
    from dagster_project.commands.why import Texts
    from dagster_project.commands.why_pairs import asked

    found = asked(root, "aligned@x")
    texts, record = Texts(found), found.records[0]
    pair, silent = texts.known[record.example_id], [{"role": "assistant", "content": ""}]
    chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
    texts.known[record.example_id] = {**pair, "messages": [*pair["prompt"], *silent], "rejected": silent}
    assert (texts.of(record)[1], texts.rejected(record)) == (chosen, rejected)


@pytest.mark.parametrize("model", ["aligned@x", "reward_model"])
def test_edited_pairs_and_another_model_to_start_from_are_refused(
    root: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    start = "data/merged/lora" if "@" in model else "data/base_model"
    for path in ("data/preferences/train/extra.parquet", f"{start}/extra.safetensors"):
        (root / path).write_bytes(b"x")
        assert why(root, model, "--prompt", "q3", "--answer", "aaaa", "--index") == 2
        (root / path).unlink()
        shown = capsys.readouterr()
        assert (
            f"{path.rpartition('/')[0].removesuffix('/train')} in the workspace is not the one of this training"
            in shown.err
        )
        assert "Traceback" not in shown.err and not shown.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("aligned@k", "--prompt", "q", "--answer", "a"), "trained by kto"),
        (("aligned@x", "--prompt", "q", "--answer", "a", "--prove"), "only supervised trainings"),
        (("reward_model", "--prompt", "q"), "--answer is required"),
        (("reward_model", "--prompt", "q", "--answer", "ab", "--span", "a"), "--span"),
        (("aligned@x", "--suspects"), "preference pairs"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert why(root, *arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err and not shown.out


def test_other_losses_than_that_of_the_paper_are_refused() -> None:
    from dagster_project.core.errors import InputError

    options = {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "rpo_alpha": 0.0}
    for passed_on in ({}, {"trl": {"adam_beta2": 0.99}}, {"trl": {"f_divergence_type": "reverse_kl"}}):
        assert DpoLoss.of({"options": options, **passed_on}, "aligned@x") == DpoLoss(0.1)
    others: list[dict[str, Any]] = [
        {"options": options | {"loss_type": "ipo"}}, {"options": options | {"rpo_alpha": 1.0}},
        {"options": options, "trl": {"f_divergence_type": "forward_kl"}},
    ]  # fmt: skip
    for settings in others:
        with pytest.raises(InputError, match="gradients are not supported"):
            DpoLoss.of(settings, "aligned@x")
