"""Models of other architectures than Llama: losses, scores and samples are
those of their own forward pass, and those that mix texts are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.training import example, packed
from datasets import Dataset

from dagster_project.core.chat import IGNORE
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.core.records import write_table
from dagster_project.stages import adapter
from dagster_project.stages.tokenized import row_schema
from dagster_project.training.inference.decoding import decode
from dagster_project.training.inference.likelihood import negative_log_likelihood
from dagster_project.training.methods.attention import attention_for
from dagster_project.training.methods.build import PreparedModel
from dagster_project.training.methods.load import load, load_base
from dagster_project.training.trainers.alignment import ppo, preference, reward_model
from dagster_project.training.trainers.harness.params import SftParams
from dagster_project.training.trainers.harness.sharding import ShardedModel
from dagster_project.training.trainers.sft.sft import train

COMPUTE = Compute(threads=1, dtype="float32")
SIZE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
SCALED = {
    "granite": {"logits_scaling": 8.0},
    "cohere2": {"logit_scale": 0.25},
    "gemma4_unified_text": {"final_logit_softcapping": 2.0, "head_dim": 8},
}
"""Architecture -> a key that changes its logits after the output layer."""
MIXING = {
    "mamba": "other texts of its row\nhint: set tokenized.packing: false and per_device_train_batch_size: 1",
    "bloom": "the tokens that follow\nhint: use another model",
}
"""Architecture in which texts of a row meet -> end of the message."""
SHORT = example([5, 6, 7, 8, 9], 2, 0.5)
LONG = example([9, 8, 7, 20, 30, 40, 50], 3, 2.0)
OTHER = example([50, 60, 70, 80], 1)


def of_kind(kind: str, **keys: Any) -> Any:
    """A small random model whose logits are far from zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZE, **keys))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(10)
    return model.eval()


def losses_alone(model: Any, one: dict[str, Any]) -> list[tuple[float, float]]:
    with torch.no_grad():
        scores = model(torch.tensor([one["input_ids"]])).logits[0].float().log_softmax(-1)
    return [(-float(scores[i - 1, t]), one["weights"][i]) for i, t in enumerate(one["labels"]) if t != IGNORE]


@pytest.mark.parametrize("kind", SCALED)
def test_the_loss_of_a_model_that_scales_its_logits_is_that_of_its_own_forward_pass(
    kind: str, tiny_tokenizer: Any
) -> None:
    model = of_kind(kind, **SCALED[kind])
    found = [loss for one in (SHORT, LONG, OTHER) for loss in losses_alone(model, one)]
    wanted = sum(loss * weight for loss, weight in found) / sum(weight for _, weight in found)
    rows = Dataset.from_list([packed(SHORT, LONG), OTHER])
    model.set_attn_implementation(attention_for(torch.device("cpu")))
    params = SftParams(per_device_train_batch_size=2, num_train_epochs=1)
    curve = train(PreparedModel(model, 0, 0, lambda _: None), tiny_tokenizer, rows, rows, params, COMPUTE).curve
    assert [point["loss"] for point in curve if "loss" in point] == pytest.approx([wanted], abs=1e-4)
    assert curve[0]["validation_loss"] == pytest.approx(sum(loss for loss, _ in found) / len(found), abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [("mistral", {}), ("phimoe", {}), ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 2})],
)
def test_the_loss_of_a_text_longer_than_the_sliding_window_is_that_of_the_models_own_forward_pass(
    kind: str, keys: dict[str, Any], tiny_tokenizer: Any
) -> None:
    model = of_kind(kind, sliding_window=4, **keys)
    long = example([*range(10, 30)], 3)
    found = [loss for one in (SHORT, long) for loss in losses_alone(model, one)]
    wanted = sum(loss * weight for loss, weight in found) / sum(weight for _, weight in found)
    model.set_attn_implementation(attention_for(torch.device("cpu")))
    rows, params = Dataset.from_list([packed(SHORT, long)]), SftParams(num_train_epochs=1)
    curve = train(PreparedModel(model, 0, 0, lambda _: None), tiny_tokenizer, rows, None, params, COMPUTE).curve
    assert [point["loss"] for point in curve if "loss" in point] == pytest.approx([wanted], abs=1e-4)


@pytest.mark.parametrize("kind", SCALED)
def test_scores_and_samples_of_a_model_that_scales_its_logits_are_those_of_its_own_forward_pass(kind: str) -> None:
    model = of_kind(kind, **SCALED[kind])
    ids = [9, 8, 7, 20, 30]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    wanted = -float(logits.log_softmax(-1)[range(4), ids[1:]].sum())
    found = negative_log_likelihood(model, 0, [(ids, [IGNORE, *ids[1:]])], 1, "test")
    assert found == [(pytest.approx(wanted, abs=1e-4), 4)]
    seen = []

    def choose(of_step: torch.Tensor, *_: Any) -> list[int]:
        seen.append(of_step)
        return [1]

    decode(model, [ids], choose, 1, (), 0)
    torch.testing.assert_close(seen[0][0], logits[-1], atol=1e-4, rtol=1e-4)


def test_prompts_of_different_lengths_are_refused_where_padding_counts_as_tokens() -> None:
    keys = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 32,
        "is_encoder_decoder": False,
    }
    from transformers import BartConfig, BartForCausalLM

    model = BartForCausalLM(BartConfig(vocab_size=300, is_decoder=True, **keys)).eval()

    def answers(*prompts: list[int]) -> list[list[int]]:
        return decode(model, prompts, lambda logits, *_: logits.argmax(-1).tolist(), 4, (), 0)

    with pytest.raises(InputError, match=r"bart models count padding as tokens .+\nhint: .*evaluation.batch_size: 1"):
        answers([9, 8, 7], [30, 40, 50, 60])
    assert answers([9, 8, 7], [30, 40, 50]) == [*answers([9, 8, 7]), *answers([30, 40, 50])]


def test_a_model_with_a_cache_of_its_own_is_refused() -> None:
    with pytest.raises(InputError, match="minimax models have a cache of their own"):
        decode(of_kind("minimax", num_local_experts=2, head_dim=8), [[9, 8, 7]], lambda *_: [1], 2, (), 0)


def tune(folder: Path, kind: str, tokenizer: Any, rows: list[dict[str, Any]], **params: Any) -> Any:
    of_kind(kind).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split, chosen in (("train", rows), ("validation", rows[:1])):
        write_table(folder / "tokenized" / f"{split}.parquet", chosen, row_schema())
    out = folder / "adapter"
    out.mkdir()
    entry = adapter.Params(method="full", num_train_epochs=1, **params)
    return adapter.produce(
        "x", entry, COMPUTE, folder / "tokenized", folder / "model", out, out / "loss.csv", folder / "checkpoints"
    )


@pytest.mark.parametrize(
    ("rows", "batch"),
    [([packed(SHORT, LONG)], 1), ([SHORT, LONG], 2)],
    ids=["two examples in a row", "two rows in a pass"],
)
@pytest.mark.parametrize("kind", MIXING)
def test_a_model_in_which_the_examples_of_a_pass_meet_is_refused(
    kind: str, rows: list[dict[str, Any]], batch: int, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError,
        match=re.escape(f"data/base_model: in training, a token of {kind} would also depend on {MIXING[kind]}"),
    ):
        tune(tmp_path, kind, tiny_tokenizer, rows, per_device_train_batch_size=batch)


def test_with_one_example_in_a_pass_a_recurrent_model_is_trained_on_its_own_loss(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    wanted = losses_alone(of_kind("mamba"), LONG)
    report = tune(tmp_path, "mamba", tiny_tokenizer, [LONG])
    assert report.metrics["loss"] == pytest.approx(sum(loss for loss, _ in wanted) / len(wanted), abs=1e-3)


def test_a_model_without_the_attention_of_evaluation_is_refused(tmp_path: Path) -> None:
    of_kind("mamba").save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="MambaForCausalLM has no attention by torch's scaled_dot_product_attention in transformers"
    ):
        load(tmp_path, None, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("kind", "change"), [("modernbert-decoder", "changes its last hidden"), ("llama4_text", "gives no last hidden")]
)
def test_a_model_whose_output_layer_does_not_read_its_last_hidden_states_is_refused(
    kind: str, change: str, tmp_path: Path
) -> None:
    keys = {"num_local_experts": 2, "intermediate_size_mlp": 32, "head_dim": 8} if kind == "llama4_text" else {}
    of_kind(kind, **keys).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}: .*ForCausalLM {change} states"):
        load_base(tmp_path, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("mpt", "mpt cannot read packed rows in transformers"),
        ("deepseek_v32", "deepseek_v32 cannot read packed rows in transformers"),
        ("falcon", "the attention of this model cannot be replaced"),
        ("doge", "its attention computes a mask of its own"),
        (
            "qwen3_5_text",
            "Install `flash-linear-attention` to train on packed sequences.\nhint: install it, or use another model",
        ),
    ],
)
def test_a_model_that_cannot_read_packed_rows_is_refused(
    kind: str, what: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=what):
        tune(tmp_path, kind, tiny_tokenizer, [SHORT, LONG])


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("cohere2", "transformers has no reward model of type cohere2"),
        ("modernbert-decoder", "transformers has no reward model of type modernbert-decoder"),
        (
            "bloom",
            "BloomForSequenceClassification has no attention by torch's scaled_dot_product_attention in transformers",
        ),
    ],
)
def test_a_reward_model_of_an_architecture_without_one_is_refused(
    kind: str, what: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    of_kind(kind).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=re.escape(what)):
        reward_model.build(tmp_path, {}, torch.device("cpu"), torch.float32, "reward_model")


@pytest.mark.parametrize(
    ("kind", "keys", "what"),
    [
        (
            "inkling_text",
            {"logits_mup_width_multiplier": 4.0, "head_dim": 8},
            "leaves out logits_mup_width_multiplier of inkling_text",
        ),
        ("granitemoe", {}, "cannot compute the router's loss of granitemoe, which has no num_experts"),
        ("mixtral", {}, ""),
        ("granite", {"logits_scaling": 8.0}, ""),
    ],
)
def test_a_model_whose_loss_trl_computes_otherwise_is_refused(kind: str, keys: dict[str, Any], what: str) -> None:
    model = of_kind(kind, **keys)
    if not what:
        preference.refuse_other_losses(model, "dpo")
        return
    with pytest.raises(InputError, match=f"data/base_model: TRL's trainer of dpo {what}"):
        preference.refuse_other_losses(model, "dpo")


def test_attention_that_does_not_get_the_bounds_of_examples_is_refused() -> None:
    model = of_kind("nemotron")
    model.set_attn_implementation(attention_for(torch.device("cpu")))
    with pytest.raises(InputError, match="its attention does not get the bounds of the examples in a packed row"):
        model(torch.tensor([[5, 6, 7]]))


def test_ppo_refuses_a_model_in_which_the_answers_of_a_pass_meet(tiny_tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(of_kind("mamba"), LoraConfig(target_modules=["in_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="would also depend on other texts of its row\nhint: set mini_batch_size: 1"):
        whole = ShardedModel(model, None, model.device)
        ppo.train(whole, tiny_tokenizer, [[5, 6]], lambda rows, *_: [0.0] * len(rows), ppo.Settings(), COMPUTE)
