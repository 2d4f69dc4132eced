"""Training: packed examples are strangers to each other, the loss is the one
that is documented, and runs repeat byte for byte."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from builders.training import example, packed
from conftest import ROOT, tool
from datasets import Dataset
from transformers import PreTrainedModel

from dagster_project.core.chat import IGNORE, encode
from dagster_project.core.context import ExecutionHints
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.params import Compute
from dagster_project.core.progress import Progress, clock
from dagster_project.core.records import read_table, write_table
from dagster_project.stages import adapter
from dagster_project.stages.tokenized import category_schema, row_schema
from dagster_project.training.methods import attention, hardware
from dagster_project.training.methods.attention import attention_for
from dagster_project.training.methods.build import PreparedModel, peft_config, save_adapter
from dagster_project.training.planning import hints as planning_hints
from dagster_project.training.planning.hints import forecast_training
from dagster_project.training.tokens.collators import collate_packed, collate_padded
from dagster_project.training.trainers.harness import checkpoint
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.params import SftParams
from dagster_project.training.trainers.harness.weight_audit import WeightChange
from dagster_project.training.trainers.sft import fit, sft
from dagster_project.training.trainers.sft.sft import add_noise, refuse_mistakes, steps, train, unreached_rate, warmup

COMPUTE = Compute(threads=1, dtype="float32")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj", "down_proj"]}


def tunable(model: Any) -> PreparedModel:
    return PreparedModel(model, 0, 0, lambda folder: None)


def losses_alone(model: Any, one: dict[str, Any]) -> list[tuple[float, float]]:
    """(cross entropy, weight) of each trained token of an example that has a forward pass of its own."""
    with torch.no_grad():
        scores = model(torch.tensor([one["input_ids"]])).logits[0].log_softmax(-1)
    return [(-float(scores[i - 1, t]), one["weights"][i]) for i, t in enumerate(one["labels"]) if t != IGNORE]


def weighted_mean(losses: list[tuple[float, float]]) -> float:
    return sum(loss * weight for loss, weight in losses) / sum(weight for _, weight in losses)


SHORT = example([5, 6, 7, 8, 9], 2, weight=0.5)
LONG = example([9, 8, 7, 20, 30, 40, 50], 3, weight=2.0)
OTHER = example([50, 60, 70, 80], 1)


def test_positions_restart_for_each_example_and_its_first_token_has_no_label() -> None:
    row, other = packed(example([5, 6], 1), example([7], 0)), example([8, 9, 10, 11, 12], 3, weight=2.0)
    batch = collate_packed([row | {"row": 4}, other])
    assert batch.pop("max_length_q") == 5
    assert {name: batch[name].tolist() for name in batch} == {
        "input_ids": [[5, 6, 7, 8, 9, 10, 11, 12]],
        "labels": [[IGNORE, 6, IGNORE, IGNORE, IGNORE, IGNORE, 11, 12]],
        "weights": [[0, 1, 1, 0, 0, 0, 2, 2]],
        "position_ids": [[0, 1, 0, 0, 1, 2, 3, 4]],
        "cu_seq_lens_q": [0, 2, 3, 8],
        "rows": [4, -1],
    }
    assert {name: batch[name].dtype for name in batch} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "weights": torch.float32,
        "position_ids": torch.int64,
        "cu_seq_lens_q": torch.int32,
        "rows": torch.int64,
    }


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What torch's flash attention for rows of several lengths computes, of
    which a CPU has none: (tokens, heads, size), fewer heads in key and value."""
    bounds = cu_seq_q.tolist()
    assert (bounds, max_q) == (cu_seq_k.tolist(), max_k) and max_q == max(b - a for a, b in pairwise(bounds))
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    parts = []
    for a, b in pairwise(bounds):
        q, k, v = (states[a:b].transpose(0, 1).float() for states in (query, key, value))
        k, v = (states.repeat_interleave(len(q) // len(states) if enable_gqa else 1, 0) for states in (k, v))
        behind = torch.arange(b - a)[:, None] - torch.arange(b - a)
        seen = (behind >= -window_size[1]) & ((behind <= window_size[0]) | (window_size[0] < 0))
        parts.append(((q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts).to(query.dtype)


def an_ampere_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 0)) -> None:
    """A GPU is found that is not there."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "chosen"),
    [
        ("cpu", torch.bfloat16, (9, 0), "by_example"),
        ("cuda", torch.bfloat16, (8, 0), "varlen"),
        ("cuda", torch.bfloat16, (12, 0), "varlen"),
        ("cuda", torch.float32, (8, 0), "sdpa"),
        ("cuda", torch.bfloat16, (7, 5), "sdpa"),
        ("cuda", None, (9, 0), "sdpa"),
    ],
)
def test_the_hardware_chooses_the_attention(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype | None, capability: tuple[int, int], chosen: str
) -> None:
    an_ampere_gpu(monkeypatch, capability)
    assert attention_for(torch.device(device), dtype) == chosen


@pytest.mark.parametrize("lacks", ["cuda", "the kernel", "its keys"])
def test_where_torch_lacks_flash_attention_one_call_with_a_mask_is_chosen(
    monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    from torch.nn.attention import varlen

    an_ampere_gpu(monkeypatch)
    if lacks == "cuda":
        monkeypatch.setattr(torch.version, "cuda", None)
    elif lacks == "the kernel":
        monkeypatch.setattr(attention, "find_spec", lambda _: None)
    else:
        monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal: None)
    assert attention_for(torch.device("cuda"), torch.bfloat16) == "sdpa"


def test_flash_attention_gets_the_arguments_of_the_other_implementations(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_ampere_gpu(monkeypatch)
    batch, found = collate_packed([packed(SHORT, LONG), OTHER]), {}
    batch.pop("labels")
    layer = model.model.layers[0].self_attn
    for name, device in (("by_example", "cpu"), ("varlen", "cuda")):
        model.set_attn_implementation(attention_for(torch.device(device), torch.bfloat16))
        assert model.config._attn_implementation == name
        with torch.no_grad():
            hidden = model.model.embed_tokens(batch["input_ids"])
            turned = model.model.rotary_emb(hidden, batch["position_ids"])
            found[name], _ = layer(
                hidden,
                turned,
                None,
                cu_seq_lens_q=batch["cu_seq_lens_q"],
                max_length_q=batch["max_length_q"],
                position_ids=batch["position_ids"],
            )
    size = found["by_example"].abs().max()
    torch.testing.assert_close(found["varlen"] / size, found["by_example"] / size, atol=0.02, rtol=0)
    assert (found["by_example"][0, 5:7] - found["by_example"][0, 0:2]).abs().max() / size > 0.1, (
        "all tokens are alike, so nothing is shown"
    )


def test_flash_attention_respects_the_sliding_window(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn",
        lambda q, *_, window_size, **__: asked.update(window=window_size) or torch.zeros_like(q),
    )
    states = torch.zeros(1, 2, 3, 8)
    for sliding_window, window in ((None, (-1, 0)), (4, (3, 0))):
        attention._attend_at_once(
            None, states, states, states, None, 1.0, torch.tensor([0, 3]), 3, sliding_window=sliding_window
        )
        assert asked == {"window": window}


@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["attention of a CPU", "attention of a GPU"])
def test_packed_examples_never_attend_to_each_other(model: Any, device: str) -> None:
    batch = collate_packed([packed(SHORT, LONG), OTHER])
    with torch.no_grad():
        alone = [model(torch.tensor([one["input_ids"]])).logits[0] for one in (SHORT, LONG, OTHER)]
        leaking = model(input_ids=batch["input_ids"][:, :12], use_cache=False).logits[0, 5:]
        model.set_attn_implementation(attention_for(torch.device(device)))  # the model itself stays on the CPU
        whole = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q")}
        together = model(**whole, use_cache=False).logits[0]
    for found, wanted in zip(together.split([5, 7, 4]), alone, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (leaking - alone[1]).abs().max() > 0.1, "the examples do not affect each other anyway, so nothing is shown"


def test_padded_examples_have_the_logits_of_single_examples(model: Any) -> None:
    batch = collate_padded([packed(SHORT, LONG), OTHER])
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for found, one in zip(together, (SHORT, LONG, OTHER), strict=True):
            alone = model(torch.tensor([one["input_ids"]])).logits[0]
            torch.testing.assert_close(found[: len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_liger_is_refused_on_unsupported_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = SftParams(use_liger_kernel=True)
    with pytest.raises(
        InputError,
        match=re.escape("adapter.x.use_liger_kernel: Liger is not installed\nhint: pip install 'pedigree-llm[gpu]'"),
    ):
        refuse_mistakes(recipe, "adapter.x", [[3]], validates=True)
    monkeypatch.setattr(sft, "find_spec", lambda _: True)
    with pytest.raises(
        InputError, match=re.escape("adapter.x.use_liger_kernel: Liger's kernels run on a GPU, and there is none")
    ):
        refuse_mistakes(recipe, "adapter.x", [[3]], validates=True)


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        ("inverse_sqrt", {"timescale": 0}, "division by zero"),
        ("polynomial", {"power": "2"}, "unsupported operand"),
        ("cosine_with_min_lr", {"min_lr": 1.0}, "the rate would not stay between 0 and learning_rate"),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 100},
            "num_decay_steps: 100, and 18 of 20 steps follow the warm-up",
        ),
        ("constant", {"num_cycles": 2}, "constant has no keys"),
    ],
)
def test_keys_of_a_schedule_that_would_fail_or_mislead_in_the_training_are_refused(
    kind: Any, keys: dict[str, Any], said: str
) -> None:
    recipe = SftParams(lr_scheduler_type=kind, lr_scheduler_kwargs=keys)
    with pytest.raises(InputError, match=re.escape(f"adapter.x.lr_scheduler_kwargs: {said}")):
        refuse_mistakes(recipe, "adapter.x", [[3]] * 10, validates=True)


def test_the_rate_of_a_single_step_is_not_zero() -> None:
    assert [warmup(total, SftParams()) for total in (1, 2, 10, 11)] == [0, 1, 1, 2]


def test_a_constant_schedule_has_no_warm_up() -> None:
    assert [warmup(100, SftParams(lr_scheduler_type=name)) for name in ("constant", "constant_with_warmup")] == [0, 10]  # type: ignore[arg-type]


def test_a_warmup_that_does_not_end_is_named() -> None:
    assert unreached_rate(10, SftParams(warmup_steps=40)).endswith(
        "a training of 10; the rate reaches 22% of learning_rate"
    )
    assert "reaches 90%" in unreached_rate(10, SftParams(warmup_steps=10))
    assert not any(
        unreached_rate(10, SftParams(**keys)) for keys in ({"warmup_steps": 9}, {}, {"lr_scheduler_type": "constant"})
    )  # type: ignore[arg-type]


def test_liger_does_not_replace_the_loss_and_refuses_an_unsupported_model(
    model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    import transformers.integrations.liger as integration

    asked: list[dict[str, Any]] = []

    def kernels(model: Any, **given: Any) -> None:
        asked.append(given)
        model.forward = None  # what a fused loss would replace: nobody may need it

    package = ModuleType("liger_kernel.transformers.monkey_patch")
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": kernels}  # type: ignore[attr-defined]
    whole = ModuleType("liger_kernel.transformers")
    whole._apply_liger_kernel_to_instance = kernels  # type: ignore[attr-defined]
    for name, module in (
        ("", ModuleType("liger_kernel")),
        (".transformers", whole),
        (".transformers.monkey_patch", package),
    ):
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", module)
    monkeypatch.setattr(integration, "is_liger_kernel_available", lambda: True)
    wanted = weighted_mean([loss for one in (SHORT, LONG) for loss in losses_alone(model, one)])
    recipe = SftParams(use_liger_kernel=True, num_train_epochs=1)
    rows = Dataset.from_list([packed(SHORT, LONG)])
    novel = copy.deepcopy(model)
    novel.config.model_type = "novel"
    with pytest.raises(InputError, match="use_liger_kernel: Liger has no kernels for novel"):
        train(tunable(novel), tiny_tokenizer, rows, None, recipe, COMPUTE)
    curve = train(tunable(model), tiny_tokenizer, rows, rows, recipe, COMPUTE).curve
    assert asked == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]
    assert [point["loss"] for point in curve if "loss" in point] == pytest.approx([wanted], abs=1e-4)


def test_the_training_loss_is_the_weighted_mean_cross_entropy_of_the_batch(model: Any, tiny_tokenizer: Any) -> None:
    wanted = weighted_mean([loss for one in (SHORT, LONG, OTHER) for loss in losses_alone(model, one)])
    recipe = SftParams(per_device_train_batch_size=2, num_train_epochs=1)
    curve = train(
        tunable(model), tiny_tokenizer, Dataset.from_list([packed(SHORT, LONG), OTHER]), None, recipe, COMPUTE
    ).curve
    assert [point["loss"] for point in curve] == pytest.approx([wanted], abs=1e-4)


@pytest.mark.parametrize("rows", [[LONG, OTHER], [SHORT, LONG, OTHER]], ids=["all passes", "a step of one pass"])
def test_accumulated_passes_give_the_loss_and_the_gradient_of_one_large_pass(
    rows: list[dict[str, Any]], model: Any, tiny_tokenizer: Any
) -> None:
    """Also where the passes have different numbers of tokens, and different weights."""

    def steps_of(**sizes: int) -> list[tuple[float, float]]:
        recipe = SftParams(num_train_epochs=1, optim="sgd", learning_rate=1e-6, max_grad_norm=1e9, **sizes)
        data = Dataset.from_list(rows)
        curve = train(tunable(copy.deepcopy(model)), tiny_tokenizer, data, None, recipe, COMPUTE).curve
        return [(point["loss"], point["grad_norm"]) for point in curve]

    together = steps_of(per_device_train_batch_size=2)
    assert len(together) == (len(rows) + 1) // 2
    for one, other in zip(together, steps_of(gradient_accumulation_steps=2), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    if len(rows) == 2:
        wanted = weighted_mean([loss for one in rows for loss in losses_alone(model, one)])
        assert together[0][0] == pytest.approx(wanted, abs=1e-4)


def test_the_validation_loss_before_the_first_step_is_the_plain_mean_per_token(model: Any, tiny_tokenizer: Any) -> None:
    losses = [loss for one in (SHORT, LONG, OTHER) for loss, _ in losses_alone(model, one)]
    rows = Dataset.from_list([packed(SHORT, LONG), OTHER])  # two rows with unlike numbers of tokens
    curve = train(tunable(model), tiny_tokenizer, rows, rows, SftParams(num_train_epochs=2), COMPUTE).curve
    watched = [(point["step"], point["validation_loss"]) for point in curve if "validation_loss" in point]
    assert [step for step, _ in watched] == [0, 2, 4]
    assert watched[0][1] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


@pytest.mark.parametrize(
    ("rows", "recipe"),
    [
        (3, SftParams()),
        (5, SftParams(per_device_train_batch_size=2, gradient_accumulation_steps=2)),
        (5, SftParams(gradient_accumulation_steps=4, num_train_epochs=3)),
        (5, SftParams(max_steps=3)),
        (2, SftParams(num_train_epochs=1, max_steps=6)),
    ],
    ids=[
        "plain",
        "batch and accumulation",
        "accumulation that does not divide",
        "max_steps stops early",
        "max_steps beyond the epochs",
    ],
)
def test_steps_predicts_the_number_of_steps(model: Any, tiny_tokenizer: Any, rows: int, recipe: SftParams) -> None:
    curve = train(tunable(model), tiny_tokenizer, Dataset.from_list([OTHER] * rows), None, recipe, COMPUTE).curve
    assert [point["step"] for point in curve] == list(range(1, steps(rows, recipe) + 1))


@pytest.fixture
def tokenized(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A train split with one example, twice, and the same example to validate on."""
    ids, labels = encode(tiny_tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}])
    row = example(ids, next(i for i, label in enumerate(labels) if label != IGNORE))
    write_table(tmp_path / "tokenized" / "train.parquet", [row, row], row_schema())
    write_table(tmp_path / "tokenized" / "validation.parquet", [row], row_schema())
    return tmp_path / "tokenized"


def tune(
    tokenized: Path,
    tiny_model: Path,
    out: Path,
    method: str = "lora",
    peft: dict[str, Any] = LORA,
    epochs: int = 2,
    rate: float = 1e-2,
    live: Path | None = None,
    planned: bool = False,
    **recipe: Any,
) -> Any:
    params = adapter.Params(method=method, peft=peft, num_train_epochs=epochs, learning_rate=rate, **recipe)
    hints = ExecutionHints()
    if planned:
        hints = forecast_training(params, tokenized, tiny_model, 1, hardware.prepare(COMPUTE), "adapter.x").hints
    return adapter.produce(
        "x",
        params,
        COMPUTE,
        tokenized,
        tiny_model,
        out,
        curve_file=out.parent / f"{out.name}.csv",
        checkpoints=out.parent / "checkpoints",
        live=live,
        hints=hints,
    )


def test_two_trainings_give_identical_bytes(tokenized: Path, tiny_model: Path, tmp_path: Path) -> None:
    tune(tokenized, tiny_model, tmp_path / "first")
    torch.rand(7)
    tune(tokenized, tiny_model, tmp_path / "second")
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert set(first) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "method.json",
        "training.json",
        "examples.parquet",
    }
    assert first == second
    assert not (tmp_path / "checkpoints").exists()


def test_checkpointing_is_on_where_memory_is_short_and_changes_no_byte(
    tokenized: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on: list[bool] = []
    given_back: list[bool] = []
    monkeypatch.setattr(sft, "memory_trimmer", lambda: lambda *_: given_back.append(True))
    enable = PreTrainedModel.activation_checkpointing_enable
    monkeypatch.setattr(
        PreTrainedModel,
        "activation_checkpointing_enable",
        lambda self, *a, **k: on.append(True) or enable(self, *a, **k),
    )
    found = []
    with caplog.at_level("INFO", "pedigree"):
        for name, free in (("roomy", 10**12), ("tight", 0)):
            monkeypatch.setattr(planning_hints, "available_memory", lambda device, processes=1, free=free: free)
            on.clear()
            given_back.clear()
            tune(
                tokenized,
                tiny_model,
                tmp_path / name,
                peft={**LORA, "lora_dropout": 0.3},
                live=tmp_path / "live",
                planned=True,
            )
            assert bool(on) is (name == "tight")
            assert bool(given_back) is (name == "tight" and not torch.cuda.is_available())
            found.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert found[0] == found[1]
    assert len(re.findall(r"gradient checkpointing is on: \d MB predicted without it, 0 MB free", caplog.text)) == 1


@pytest.mark.skipif(hardware._glibc_function("malloc_trim") is None, reason="another C library than glibc")
def test_large_free_memory_between_blocks_is_returned_to_the_kernel() -> None:
    code = """
import psutil
from dagster_project.training.methods.hardware import memory_trimmer

give_back, given = memory_trimmer(), []
for megabytes in (50, 200):
    blocks = [b"x" * 100_000 for _ in range(10 * megabytes)]
    blocks = blocks[::20]  # no longer one free stretch at the end, which glibc gives back by itself
    before = psutil.Process().memory_info().rss
    give_back()
    given.append(before - psutil.Process().memory_info().rss)
    assert all(block == b"x" * 100_000 for block in blocks)
assert abs(given[0]) < 5_000_000 and given[1] > 150_000_000, given
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(hardware._glibc_function("mallopt") is None, reason="another C library than glibc")
def test_large_blocks_are_kept_during_a_training_and_returned_after_it() -> None:
    code = """
import psutil
from dagster_project.training.methods.hardware import return_large_blocks, reuse_large_blocks

def kept():
    before = psutil.Process().memory_info().rss
    blocks = [b"x" * 50_000_000 for _ in range(4)]
    del blocks
    return psutil.Process().memory_info().rss - before

reuse_large_blocks()
first = kept()
return_large_blocks()
assert first > 190_000_000, first
assert kept() < 5_000_000
reuse_large_blocks()
assert kept() > 190_000_000
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_best_weights_of_adalora_keep_their_ranks(tokenized: Path, tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    ranks = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 3, "deltaT": 3, "target_modules": ["q_proj", "v_proj"]}
    [row, _] = read_table(tokenized / "train.parquet")
    contrary = [label if label == IGNORE else 3 for label in row["labels"]]
    write_table(tokenized / "validation.parquet", [{**row, "labels": contrary}], row_schema())
    tune(
        tokenized,
        tiny_model,
        tmp_path / "x",
        "adalora",
        ranks,
        epochs=6,
        rate=0.1,
        load_best_model_at_end=True,
        merge=False,
    )
    proof = json.loads((tmp_path / "x" / "training.json").read_text())
    assert 0 < proof["best_step"] < proof["steps"] == 12
    left = sum(one["after"] for one in proof["ranks"].values())
    assert left > 2 * len(proof["ranks"]), "the best weights are from before all ranks were taken away"
    pattern = json.loads((tmp_path / "x" / "adapter_config.json").read_text())["rank_pattern"]
    saved = load_file(tmp_path / "x" / "adapter_model.safetensors")
    kept = sum(int((weight != 0).sum()) for name, weight in saved.items() if "lora_E" in name)
    assert left == kept and (not pattern or left == sum(map(sum, pattern.values())))


def test_a_tracker_gets_the_curve_and_changes_no_byte(
    tokenized: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    for name, tracker in (("watched", "tensorboard"), ("alone", "none")):
        tune(tokenized, tiny_model, tmp_path / name, report_to=tracker)
    [events] = (path for path in (tmp_path / "logs").rglob("*") if path.is_file())
    for tag in ("train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"):
        assert tag.encode() in events.read_bytes()
    watched, alone = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("watched", "alone")
    )
    assert watched == alone


def test_mlflow_gets_the_curve_and_changes_no_byte(
    tokenized: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = tool("mlflow").MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name, tracker in (("watched", "mlflow"), ("alone", "none")):
        tune(tokenized, tiny_model, tmp_path / name, report_to=tracker)
    [run] = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert {"loss", "learning_rate", "grad_norm", "eval_loss"} <= run.data.metrics.keys()
    watched, alone = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("watched", "alone")
    )
    assert watched == alone


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (190, "3:10"), (3599.6, "1:00:00"), (36_605, "10:10:05")]
)
def test_a_duration_has_minutes_and_seconds_and_from_one_hour_on_hours(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_progress_reports_the_remaining_time(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    monkeypatch.setattr("dagster_project.core.progress.time.monotonic", lambda: now[0])
    progress = Progress("training", 100, "step")
    with caplog.at_level("INFO", "pedigree"):
        for now[0] in (2.0, 4.0, 8.0, 200.0):
            progress.advance(25)
    assert [record.getMessage() for record in caplog.records] == [
        "training: 25/100 steps, about 0:06 left",
        "training: 75/100 steps, about 0:03 left",
        "training: 100/100 steps, done in 200 s",
    ]


def test_a_head_records_only_the_examples_it_read(tokenized: Path, tiny_model: Path, tmp_path: Path) -> None:
    [row, _] = read_table(tokenized / "train.parquet")
    rows = [packed(*({**row, "example_ids": [name]} for name in names)) for names in (("a", "b"), ("c",))]
    write_table(
        tokenized / "train.parquet",
        [{**one, "example_ids": names} for one, names in zip(rows, (["a", "b"], ["c"]), strict=True)],
        row_schema(),
    )
    write_table(
        tokenized / "categories.parquet",
        [{"example_id": "b", "category": "login"}, {"example_id": "c", "category": "delivery"}],
        category_schema(),
    )
    report = tune(tokenized, tiny_model, tmp_path / "x", "feature_extraction", {}, merge=False)
    assert [line["example_id"] for line in read_table(tmp_path / "x" / "examples.parquet")] == ["b", "c"]
    prompt = next(i for i, label in enumerate(row["labels"]) if label != IGNORE)
    assert report.metrics["tokens"] == 2 * prompt and report.metrics["trained_tokens"] == 0


def test_a_checkpoint_is_of_this_data_template_tokenizer_model_parameters_threads_format_and_versions(
    tokenized: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Found(Exception):
        pass

    def stop(folder: Path, identity: dict[str, str], keep: int, sharded: bool) -> Any:
        raise Found(identity)

    monkeypatch.setattr(fit, "Checkpoints", stop)
    model = shutil.copytree(tiny_model, tmp_path / "model")

    def identity(compute: Compute = COMPUTE, **recipe: Any) -> dict[str, str]:
        params = adapter.Params(peft=LORA, **recipe)
        with pytest.raises(Found) as found:
            adapter.produce(
                "x", params, compute, tokenized, model, tmp_path / "x", tmp_path / "x.csv", tmp_path / "checkpoints"
            )
        return {part: value for part, value in found.value.args[0].items() if part != "weights at the start"}

    def edit(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), "of_no_use": 1}))

    before = identity()

    def differs() -> set[str]:
        now = identity()
        return {part for part in before | now if before.get(part) != now.get(part)}

    assert differs() == set()
    for part, other in {
        "threads": identity(compute=COMPUTE.model_copy(update={"threads": 2})),
        "dtype": identity(compute=COMPUTE.model_copy(update={"dtype": "bfloat16"})),
        "parameters": identity(learning_rate=0.5),
    }.items():
        assert {name for name in before if before[name] != other[name]} == {part}
    assert identity(save_steps=7, gradient_checkpointing=True) == before
    monkeypatch.setattr(checkpoint, "versions", lambda names: {"torch": "1.0"})
    assert differs() == {"library versions"}
    monkeypatch.undo()
    monkeypatch.setattr(fit, "Checkpoints", stop)
    changed = set()
    for part, change in {
        "chat template": lambda: (tokenized / "chat_template.jinja").write_text("{{ messages }}"),
        "tokenizer": lambda: edit(model / "tokenizer_config.json"),
        "base model": lambda: edit(model / "config.json"),
        "tokenized data": lambda: write_table(tokenized / "validation.parquet", [], row_schema()),
    }.items():
        change()
        changed.add(part)
        assert differs() == changed


def test_the_weight_audit_reports_what_changed_and_what_did_not(
    tokenized: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    report = tune(tokenized, tiny_model, tmp_path / "adapter")
    proof = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert {kind: (group["tensors"], group["moved"]) for kind, group in proof["trained"].items()} == {
        "lora_A": (6, 6),
        "lora_B": (6, 6),
    }
    learnt = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    b_norm = (
        sum(float(tensor.double().square().sum()) for name, tensor in learnt.items() if "lora_B" in name) ** 0.5
    )  # B begins at zero
    assert proof["trained"]["lora_B"]["norm_of_change"] == pytest.approx(b_norm, rel=1e-5)
    assert proof["frozen"]["sha256_before"] == proof["frozen"]["sha256_after"]
    assert (proof["steps"], proof["loss"]["last"]) == (4, pytest.approx(report.metrics["loss"], abs=1e-4))
    assert proof["settings"]["warmup_steps"] == 1
    assert {check.name: (check.passed, check.blocking) for check in report.checks} == {
        "learned": (True, False),
        "trained_what_it_should": (True, True),
    }


def test_the_examples_are_listed_in_the_order_seen(tmp_path: Path, tiny_model: Path) -> None:
    rows = [
        packed(SHORT | {"example_ids": ["a"]}, LONG | {"example_ids": ["b"]}),
        OTHER | {"example_ids": ["c"]},
        SHORT | {"example_ids": ["d"]},
    ]
    for split in ("train", "validation"):
        write_table(tmp_path / "tokenized" / f"{split}.parquet", rows, row_schema())
    tune(tmp_path / "tokenized", tiny_model, tmp_path / "adapter", gradient_accumulation_steps=2)
    seen = read_table(tmp_path / "adapter" / "examples.parquet")
    proof = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert [(row["step"], row["epoch"]) for row in seen] == sorted((row["step"], row["epoch"]) for row in seen)
    assert {(row["step"], row["epoch"]) for row in seen} == {(1, 1), (2, 1), (3, 2), (4, 2)}
    for epoch in (1, 2):
        assert sorted(row["example_id"] for row in seen if row["epoch"] == epoch) == ["a", "b", "c", "d"]
    for step in (1, 2, 3, 4):
        assert [row["position"] for row in seen if row["step"] == step] == list(
            range(sum(row["step"] == step for row in seen))
        )
    ids = [row["example_id"] for row in seen]
    assert ids.index("b") == ids.index("a") + 1, "a row's examples stand side by side"
    sizes = {"a": 5, "b": 7, "c": 4, "d": 5}
    assert proof["tokens"] == sum(sizes[i] for i in ids) == 2 * 21
    assert proof["trained_tokens"] == 2 * (3 + 4 + 3 + 3)
    last = (tmp_path / "adapter.csv").read_text().splitlines()
    assert last[0] == "step,loss,learning_rate,grad_norm,tokens"
    assert [int(line.split(",")[-1]) for line in last[1:]] == [
        sum(sizes[row["example_id"]] for row in seen if row["step"] <= step) for step in (1, 2, 3, 4)
    ]


def test_a_group_of_weights_without_change_blocks(tokenized: Path, tiny_model: Path, tmp_path: Path) -> None:
    report = tune(
        tokenized, tiny_model, tmp_path / "adapter", max_steps=1, warmup_steps=0
    )  # B is zero, so A's first gradient is
    failed = report.failures[0]
    assert failed.name == "trained_what_it_should" and failed.note.startswith(
        "did not move: lora_A; 1 of 1 steps had a learning rate above 0"
    )
    assert (tmp_path / "checkpoints").exists()


def test_a_frozen_weight_that_changes_blocks(
    tokenized: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fit.train

    def meddling(tunable: PreparedModel, *rest: Any) -> Any:
        course = honest(tunable, *rest)
        next(p for p in tunable.model.parameters() if not p.requires_grad).data[0] += 1e-3
        return course

    monkeypatch.setattr(fit, "train", meddling)
    failed = tune(tokenized, tiny_model, tmp_path / "adapter").failures[0]
    assert (failed.name, failed.note) == ("trained_what_it_should", "a frozen weight changed")


def test_a_loss_that_is_not_finite_stops_at_once_and_names_the_examples(
    tokenized: Path, tiny_model: Path, tmp_path: Path
) -> None:
    bad = SHORT | {"example_ids": ["bad"], "weights": [float("nan")] * 5}
    write_table(tmp_path / "tokenized" / "train.parquet", [*([OTHER] * 3), bad], row_schema())
    report = tune(tokenized, tiny_model, tmp_path / "adapter", epochs=1)
    assert [check.name for check in report.checks] == list(adapter.CHECK_DESCRIPTIONS)[:2]
    learned = report.failures[0]
    assert (learned.name, learned.rows, learned.blocking) == ("learned", ["bad"], True)
    assert re.match(r"the loss is nan at step \d; lower learning_rate", learned.note)
    assert list((tmp_path / "adapter").glob("*")) == []


def test_a_gradient_that_is_not_finite_stops_before_saving(
    tokenized: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda self, model: float("inf"))
    report = tune(tokenized, tiny_model, tmp_path / "adapter", save_strategy="steps", save_steps=1)
    assert report.failures[0].note.startswith("the gradient is inf at step 1;")
    assert list((tmp_path / "checkpoints").glob("step-*")) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_running_out_of_memory_is_one_message_with_advice(
    tokenized: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("trl.SFTTrainer.evaluate", fail)
    monkeypatch.setattr(planning_hints, "available_memory", lambda *_: 10**9)
    hints = []
    for checkpointing in (False, True):
        with pytest.raises(PedigreeError, match="training ran out of memory") as refusal:
            tune(
                tokenized,
                tiny_model,
                tmp_path / "adapter",
                planned=True,
                gradient_checkpointing=checkpointing,
                per_device_train_batch_size=2,
            )
        hints.append(refusal.value.hint)
    first, then = hints
    assert re.fullmatch(r"predicted \d MB, free 1.0 GB; gradient_checkpointing: true would take \d MB", first), first
    assert "; per_device_train_batch_size: 1 with gradient_accumulation_steps: 2 would take" in then, then


def test_other_errors_are_not_reported_as_out_of_memory(
    tokenized: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("trl.SFTTrainer.evaluate", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        tune(tokenized, tiny_model, tmp_path / "adapter")


def test_a_full_disk_is_reported_before_training(
    tokenized: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**15))
    with pytest.raises(
        PedigreeError, match=r"adapter.x: checkpoints and output need about 0 MiB of disk, and 0 MiB are free in"
    ):
        tune(tokenized, tiny_model, tmp_path / "adapter")


def test_all_mistakes_are_reported_before_the_model_is_loaded(tokenized: Path) -> None:
    write_table(tokenized / "validation.parquet", [], row_schema())
    write_table(tokenized / "train.parquet", [packed(SHORT, LONG)], row_schema())
    lengths = [row["lengths"] for row in read_table(tokenized / "train.parquet")]
    recipe = SftParams(
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"minimum": 1},
        early_stopping_patience=1,
        load_best_model_at_end=True,
        group_by_length=True,
        report_to="wandb",
    )
    with pytest.raises(InputError) as refusal:
        refuse_mistakes(recipe, "adapter.x", lengths, validates=False)
    places = [line.split(":")[1].strip() for line in refusal.value.what.splitlines()]
    wanted = [
        "lr_scheduler_kwargs",
        "early_stopping_patience",
        "load_best_model_at_end",
        "group_by_length",
        "report_to",
    ]
    assert places == [f"adapter.x.{key}" for key in wanted]
    assert "wandb is not installed" in refusal.value.what


@pytest.mark.parametrize("load_best", [False, True])
def test_training_stops_when_the_validation_loss_no_longer_falls(
    tokenized: Path, tiny_model: Path, tmp_path: Path, load_best: bool
) -> None:
    ids = list(range(10, 30))
    write_table(tokenized / "validation.parquet", [example(ids, 2)], row_schema())  # nothing that train teaches
    recipe: dict[str, Any] = {
        "epochs": 40,
        "rate": 0.3,
        "early_stopping_patience": 2,
        "load_best_model_at_end": load_best,
    }
    report = tune(tokenized, tiny_model, tmp_path / "adapter", **recipe)
    watched = report.metrics["validation_loss"]
    best = min(range(1, len(watched)), key=lambda i: watched[i])
    assert len(watched) - 1 == best + 2 < 40
    assert report.metrics.get("best_step") == (best * 2 if load_best else None)
    learned = next(check for check in report.checks if check.name == "learned")
    assert learned.note == f"validation loss {watched[0]:.3f} -> {watched[best if load_best else -1]:.3f}"


def test_the_best_epochs_weights_are_the_ones_kept(model: Any, tiny_tokenizer: Any) -> None:
    rows, foreign = Dataset.from_list([SHORT, OTHER]), Dataset.from_list([LONG])
    recipe = SftParams(num_train_epochs=6, learning_rate=0.05, load_best_model_at_end=True)
    course = train(tunable(model), tiny_tokenizer, rows, foreign, recipe, COMPUTE)
    step, loss = course.best()
    assert step < 12
    alone = [loss for loss, _ in losses_alone(model.eval(), LONG)]
    assert sum(alone) / len(alone) == pytest.approx(loss, abs=1e-4)


def test_label_smoothing_gives_the_documented_loss_and_does_not_affect_validation(
    model: Any, tiny_tokenizer: Any
) -> None:
    with torch.no_grad():
        scores = model(torch.tensor([OTHER["input_ids"]])).logits[0].log_softmax(-1)
    targets = [(scores[i - 1], t) for i, t in enumerate(OTHER["labels"]) if t != IGNORE]
    plain = sum(-float(row[t]) for row, t in targets) / 3
    spread = sum(-float(row.mean()) for row, _ in targets) / 3
    rows = Dataset.from_list([OTHER])
    course = train(
        tunable(model), tiny_tokenizer, rows, rows, SftParams(label_smoothing_factor=0.2, num_train_epochs=1), COMPUTE
    )
    assert course.losses == pytest.approx([0.8 * plain + 0.2 * spread], abs=1e-4)
    assert course.validation[0][1] == pytest.approx(plain, abs=1e-4)


def test_neftune_noise_is_scaled_by_example_length_and_used_in_training_only() -> None:
    embeddings = torch.nn.Embedding(10, 16)
    handle = add_noise(embeddings, 5.0, collate_packed([packed(SHORT, OTHER)]))
    ids = torch.zeros(1, 9, dtype=torch.int64)
    with torch.no_grad():
        embeddings.eval()
        plain = embeddings(ids)
        embeddings.train()
        noise = torch.stack([(embeddings(ids) - plain)[0] for _ in range(200)])
    largest = noise.abs().amax((0, 2))
    wanted = [5 / math.sqrt(5 * 16)] * 5 + [5 / math.sqrt(4 * 16)] * 4
    assert largest.tolist() == pytest.approx(wanted, rel=0.02)
    assert bool((largest <= torch.tensor(wanted) + 1e-6).all())
    handle.remove()
    assert torch.equal(embeddings(ids), plain)


def test_rows_of_similar_length_share_a_step(model: Any, tiny_tokenizer: Any) -> None:
    rows = [example(list(range(3, 3 + 4 + n % 2 * 20)), 1) for n in range(40)]
    recipe = SftParams(group_by_length=True, per_device_train_batch_size=4, num_train_epochs=2)
    course = train(tunable(model), tiny_tokenizer, Dataset.from_list(rows), None, recipe, COMPUTE)
    kinds = {step: {row % 2 for s, _, row in course.seen if s == step} for step in range(1, 21)}
    assert sum(len(kind) == 1 for kind in kinds.values()) >= 12, "by chance it would be two or three"
    orders = [[row for _, epoch, row in course.seen if epoch == e] for e in (1, 2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert orders[0] != orders[1]


def test_warmup_may_be_given_in_steps(model: Any, tiny_tokenizer: Any) -> None:
    recipe = SftParams(warmup_steps=3, learning_rate=0.3, lr_scheduler_type="constant_with_warmup", num_train_epochs=5)
    course = train(tunable(model), tiny_tokenizer, Dataset.from_list([OTHER]), None, recipe, COMPUTE)
    assert [point["learning_rate"] for point in course.curve] == pytest.approx([0, 0.1, 0.2, 0.3, 0.3])


@pytest.mark.long
@pytest.mark.slow
def test_compiled_layers_compute_the_same(model: Any, tiny_tokenizer: Any) -> None:
    rows, curves = Dataset.from_list([packed(SHORT, LONG), OTHER, LONG]), []
    model.set_attn_implementation(attention_for(torch.device("cpu")))
    for compiling in ("none", "layers"):
        recipe = SftParams(num_train_epochs=2, compile=compiling)
        curves.append(train(tunable(copy.deepcopy(model)), tiny_tokenizer, rows, None, recipe, COMPUTE).losses)
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


def test_loss_falls_on_a_repeated_example(tokenized: Path, tiny_model: Path, tmp_path: Path) -> None:
    report = tune(tokenized, tiny_model, tmp_path / "adapter", epochs=8, rate=0.1)
    losses = [float(line.split(",")[1]) for line in (tmp_path / "adapter.csv").read_text().splitlines()[1:]]
    assert len(losses) == report.metrics["steps"] == 16
    assert losses[-1] < losses[0] - 0.5
    assert report.metrics["validation_loss"][-1] < report.metrics["validation_loss"][0]
    assert [check.passed for check in report.checks] == [True, True]


def test_training_works_without_a_validation_split(tokenized: Path, tiny_model: Path, tmp_path: Path) -> None:
    write_table(tokenized / "validation.parquet", [], row_schema())
    report = tune(tokenized, tiny_model, tmp_path / "adapter")
    assert (report.metrics["steps"], report.metrics["validation_loss"]) == (4, [])


def test_an_empty_training_split_is_refused(tokenized: Path, tiny_model: Path, tmp_path: Path) -> None:
    write_table(tokenized / "train.parquet", [], row_schema())
    with pytest.raises(InputError, match="adapter: the training split is empty"):
        tune(tokenized, tiny_model, tmp_path / "adapter")


def test_an_unknown_method_is_refused_with_the_methods_there_are() -> None:
    with pytest.raises(InputError) as refusal:
        peft_config("lorra", {}, "adapter.x")
    assert refusal.value.what == "params.yaml: adapter.x.method: unknown method 'lorra'"
    assert {"lora", "ia3"} <= set(refusal.value.hint.removeprefix("methods: ").split(", "))


def test_unknown_keys_of_a_method_are_refused_all_at_once() -> None:
    with pytest.raises(InputError) as refusal:
        peft_config("lora", {"r": 4, "rank": 4, "alpha": 8}, "adapter.x")
    assert refusal.value.what.splitlines() == [
        "params.yaml: adapter.x.peft.alpha: unknown key of lora",
        "params.yaml: adapter.x.peft.rank: unknown key of lora",
    ]
    assert "lora_alpha" in refusal.value.hint


def test_a_target_that_the_model_lacks_is_refused(tokenized: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"params.yaml: adapter.x.peft: .*no_such_layer"):
        tune(tokenized, tiny_model, tmp_path / "adapter", peft={"target_modules": ["no_such_layer"]})


@pytest.mark.parametrize(
    ("method", "peft", "group"),
    [
        ("lora", LORA | {"target_modules": ["lm_head", "q_proj"]}, "lora_B"),
        ("trainable_tokens", {"token_indices": [5, 6]}, "trainable_tokens_delta"),
    ],
)
def test_an_adapter_of_the_output_layer_is_trained(
    method: str, peft: dict[str, Any], group: str, tokenized: Path, tiny_model: Path, tmp_path: Path
) -> None:
    report = tune(tokenized, tiny_model, tmp_path / "adapter", method=method, peft=peft, merge=False)
    moved = json.loads((tmp_path / "adapter" / "training.json").read_text())["trained"][group]
    assert moved["moved"] == moved["tensors"] and not report.failures


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_adapter_of_a_shared_weight_that_cannot_be_merged_is_refused_before_training(
    name: str, tokenized: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError,
        match=r"adapter.x.peft: this adapter cannot be merged: word embeddings and output layer .* share one weight",
    ):
        tune(tokenized, tiny_model, tmp_path / "adapter", peft={"target_modules": ["q_proj", name]})


def test_a_saved_adapter_has_a_sorted_configuration_without_absolute_paths(
    tiny_model: Path, tmp_path: Path, model: Any
) -> None:
    from peft import get_peft_model

    model.config._name_or_path = str(tiny_model)
    save_adapter(
        get_peft_model(model, peft_config("lora", LORA, "adapter.x")),
        tmp_path / "adapter",
        base_model="data/base_model",
    )
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "data/base_model"
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert list(config) == sorted(config)
    assert str(tiny_model) not in text


def test_too_few_steps_for_every_weight_to_move_are_the_reason_that_the_check_names() -> None:
    """Of two steps with a warm-up, the first has a rate of 0, and lora_A moves
    from the step after the first that moves lora_B."""
    groups = {
        name: {"tensors": 1, "moved": moved, "norm_of_change": float(moved)}
        for name, moved in (("lora_A", 0), ("lora_B", 1))
    }
    change = WeightChange(groups, {"sha256_before": "a", "sha256_after": "a"})
    points = [
        {"step": i, "loss": 0.1, "learning_rate": rate, "grad_norm": 0.5} for i, rate in enumerate((0.0, 1e-3, 1e-3), 1)
    ]
    few, enough = (adapter._moved(change, TrainingHistory(curve=points[:steps])) for steps in (2, 3))
    assert not few.passed and few.note.startswith("did not move: lora_A; 1 of 2 steps had a learning rate above 0")
    assert enough.note == "did not move: lora_A", "then the reason is another one"
