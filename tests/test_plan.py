"""The plan: parameters, memory and advice match hand computations, from a configuration alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.commands import exit_code
from builders.preferences import preference_row, write_pairs
from builders.records import said, stored, user
from builders.tool_calls import WEATHER
from conftest import ROOT, edit_params
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from dagster_project.__main__ import main
from dagster_project.commands import plan
from dagster_project.core.errors import InputError
from dagster_project.core.named_templates import HERMES
from dagster_project.core.params import Compute
from dagster_project.core.records import write_records
from dagster_project.training.methods.build import build
from dagster_project.training.methods.hardware import LARGE_BLOCK, prepare
from dagster_project.training.planning import memory
from dagster_project.training.planning.memory import Memory, Prediction, TrainingSpec, _state_bytes
from dagster_project.training.planning.timing import Operations, Shape
from dagster_project.training.tokens.collators import collate_packed, collate_padded
from dagster_project.training.trainers.sft.sft import causal

H, F, A, KV = 64, 128, 4, 32  # hidden, intermediate, heads, width of key and value
TINY = {
    "model_type": "llama", "hidden_size": H, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": A,
    "num_key_value_heads": 2, "vocab_size": 20000, "tie_word_embeddings": True, "dtype": "float32",
}  # fmt: skip
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL = {"r": 8, "target_modules": "all-linear"}
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}
MATRICES = [(H, H), (KV, H), (KV, H), (H, H), (F, H), (F, H), (H, F)]  # of one layer, (out, in)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def write(**changed: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({**TINY, **changed}))
        return path

    return write


def take(model: Path, method: str = "full", options: dict[str, Any] | None = None, **changed: Any) -> Prediction:
    given = {"lengths": [64], "counted": 64, "dtype": torch.float32, "device": "cpu", **changed}
    return TrainingSpec(base_model=model, method=method, options=options or {}, **given).prediction


@pytest.mark.parametrize(
    ("dtype", "kept", "copies"),
    [(torch.float32, 44 * H + 16 * F + 4 * A + 8, 0), (torch.bfloat16, 36 * H + 8 * F + 4 * A + 8, 2)],
    ids=["float32", "bfloat16"],
)
def test_activations_of_a_llama_layer_match_the_formula(
    config: Any, dtype: torch.dtype, kept: int, copies: int
) -> None:
    """With a vocabulary this large the peak is at the loss, when all layers
    have been passed and no gradient exists yet."""
    two, four = (take(config(num_hidden_layers=n, dtype="bfloat16"), dtype=dtype).memory for n in (2, 4))
    assert (two.gradients, four.gradients) == (0, 0)
    assert four.activations - two.activations == 2 * (
        64 * kept + copies * sum(rows * columns for rows, columns in MATRICES)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_three_times_counted_positions_by_vocabulary_in_float32(config: Any, dtype: torch.dtype) -> None:
    """In the backward pass of the loss: the log-softmax that was kept, the gradient of it, and that of the scores."""
    assert take(config(), "lora", ALL, counted=48, dtype=dtype).memory.logits == 3 * 48 * 20000 * 4


def test_layers_below_the_lowest_trained_one_keep_no_activations(config: Any) -> None:
    lora = {"r": 8, "target_modules": ["down_proj"]}
    deep, shallow = (
        take(config(num_hidden_layers=n), "lora", {**lora, "layers_to_transform": [n - 1]}).memory.activations
        for n in (8, 2)
    )
    assert deep == shallow
    assert take(config(num_hidden_layers=8), "lora", lora).memory.activations > 3 * shallow


def test_checkpointing_keeps_one_hidden_state_a_layer(config: Any) -> None:
    eight, four = (
        take(config(num_hidden_layers=n), "lora", ALL, gradient_checkpointing=True).memory.activations for n in (8, 4)
    )
    assert eight - four == 4 * 64 * H * 4


def test_a_freed_block_is_reused_for_its_own_size_only(config: Any) -> None:
    """The account of a hand-written sequence: of 3,000 bytes that are live at the most, 5,000 are held."""
    account = memory.Account()

    def make(*sizes: int, part: str = "activations") -> None:
        for size in sizes:
            account.apply(("", part, size))

    def free(*sizes: int) -> None:
        for size in sizes:
            account.apply(("activations", "", size))

    make(1000, 1000)
    free(1000, 1000)
    assert account.fragmentation == 0, "nothing but the two at the peak"
    make(3000)
    assert (account.highest, account.fragmentation) == (3000, 2000)
    make(1000)
    assert (account.highest, account.fragmentation) == (4000, 1000), "one of the two is used again"
    free(3000, 1000)
    make(LARGE_BLOCK + 1)
    make(5000, part="weights")
    free(LARGE_BLOCK + 1)
    make(LARGE_BLOCK + 2)
    assert account.fragmentation == 1000 + 1000 + 3000, (
        "neither weights nor what goes back to the kernel, and all else was free at the peak"
    )
    assert (
        take(config(), "lora", ALL, device="cuda").memory.fragmentation
        == 0
        < take(config(), "lora", ALL).memory.fragmentation
    )


def test_storages_are_recorded_from_allocation_to_release() -> None:
    ledger = memory._Ledger(vocabulary=7)
    one = torch.empty(1000, dtype=torch.uint8, device="meta")
    ledger.born(one, "activations")
    ledger.born(one[:10], "activations")
    del one
    ledger.passing(5)
    assert ledger.events == [
        ("", "activations", 1000),
        ("activations", "", 1000),
        ("", "activations", 5),
        ("activations", "", 5),
    ]


def test_accumulation_keeps_the_gradients_during_the_next_pass(config: Any) -> None:
    held = take(config(tie_word_embeddings=False), gradient_accumulation_steps=4)
    assert held.memory.gradients == 4 * held.trainable
    once = take(config(tie_word_embeddings=False)).operations.counts
    products = [key for key in once if "aten.mm" in str(key)]
    assert products and all(held.operations.counts[key] == 4 * once[key] for key in products)


def test_lora_adds_r_rows_and_columns_to_each_matrix(config: Any, tiny_model: Path) -> None:
    wanted = 2 * sum(8 * (rows + columns) for rows, columns in MATRICES)
    assert take(config(), "lora", ALL).trainable == wanted
    assert take(config(), "dora", ALL).trainable == wanted + 2 * sum(rows for rows, _ in MATRICES)
    for method, options in (("lora", ALL), ("ia3", {}), ("adalora", {})):
        built = build(method, options, tiny_model, torch.device("cpu"), torch.float32, "adapter.x", total_steps=100)
        found = take(tiny_model, method, options)
        assert (found.trainable, found.total) == (built.trainable, built.total), method


def test_four_bit_weights_take_half_a_byte_and_their_scales(config: Any) -> None:
    plain, four = (take(config(), method, ALL, dtype=torch.bfloat16) for method in ("lora", "qlora"))
    n = sum(rows * columns for rows, columns in MATRICES) * 2
    scales = sum(rows * columns // 64 + 4 * -(-rows * columns // (64 * 256)) for rows, columns in MATRICES) * 2
    others = plain.total - plain.trainable - n  # embeddings and norms, float32 beside matrices in 4 bits
    wanted = n // 2 + scales + 4 * others + 4 * four.trainable
    buffers = plain.memory.weights - 2 * (n + others) - 4 * plain.trainable
    tables = 14 * (
        16 * 4 + 256 * 4 + 4
    )  # of the 4-bit values, of the scales' 8-bit values, and an offset; all matrices may share them
    assert wanted <= four.memory.weights - buffers <= wanted + tables


def test_the_loading_of_converted_weights_may_be_the_peak(config: Any) -> None:
    model = config(dtype="bfloat16", hidden_size=512, intermediate_size=2048)
    took = take(model, "layernorm", lengths=[2], counted=1)
    assert took.memory.weights == pytest.approx(6 * took.total, rel=0.01)  # the file in 2 bytes, the copy in 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_keeps_two_states_in_the_parameters_dtype(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.ones(64, 128, dtype=dtype))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert _state_bytes(parameter, "adamw_torch") == sum(
        s.numel() * s.element_size() for s in optimizer.state[parameter].values()
    )
    assert _state_bytes(parameter, "paged_adamw_8bit") == 2 * 8192 + 8 * 32


def test_a_prediction_does_not_change_the_random_state(config: Any) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    take(config(), "lora", ALL)
    assert torch.equal(torch.rand(4), wanted)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((name, ALL) for name in ("dora", "rslora", "qlora", "qdora")),
        *((name, {"num_virtual_tokens": 4}) for name in ("prefix_tuning", "prompt_tuning", "p_tuning")),
        *(
            (name, {"target_modules": ["q_proj", "v_proj"]})
            for name in ("ia3", "loha", "lokr", "vera", "randlora", "boft", "hra")
        ),
        ("layernorm", {}),
        ("feature_extraction", {}),
        ("lora", {**ALL, "init_lora_weights": "pissa"}),
    ],
)
def test_the_memory_of_every_kind_of_method_is_predicted(config: Any, method: str, options: dict[str, Any]) -> None:
    options = {**options, **({"feedforward_modules": []} if method == "ia3" else {})}
    found = take(config(dtype="bfloat16"), method, options, dtype=torch.bfloat16)
    assert 0 < found.trainable < found.total and found.memory.activations > 0 and found.operations.counts


def test_a_method_that_leaves_nothing_to_train_is_refused(config: Any) -> None:
    with pytest.raises(InputError, match=r"params.yaml: adapter.method: bitfit trains biases, and this model has none"):
        take(config(), "bitfit")
    assert take(config(attention_bias=True), "bitfit").trainable == 2 * (2 * H + 2 * KV)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": "big"},
        {"hidden_size": 250, "num_attention_heads": 4},
        {"vocab_size": 10**12, "hidden_size": 10**9},
    ],
)
def test_an_impossible_model_configuration_is_refused_in_one_message(config: Any, wrong: dict[str, Any]) -> None:
    file = config()
    file.write_text(json.dumps({**json.loads(file.read_text()), **wrong}))
    with pytest.raises(InputError, match="hint: correct the configuration"):
        plan.plan_model(
            file, ["lora"], tokens=16, rows=1, checkpointing=False, compute=Compute(threads=1), device="cuda"
        )


def test_a_model_without_a_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    for model, words in (
        (tmp_path / "nowhere", "no config.json"),
        (tmp_path, "transformers does not support this configuration"),
    ):
        assert main(["plan", "--model", str(model)]) == 2
        assert words in capsys.readouterr().err


def test_the_memory_of_a_7b_model_matches_published_figures(config: Any) -> None:
    model = config()
    model.write_text(json.dumps(LLAMA_2_7B))
    found = plan.plan_model(
        model,
        ["full", "lora", "qlora"],
        tokens=2048,
        rows=1,
        checkpointing=True,
        compute=Compute(threads=1),
        device="cuda",
    )
    gigabytes = {method: one["memory"]["total"] / 1e9 for method, one in found["variants"].items()}
    assert found["variants"]["full"]["trainable_parameters"] == 6738415616
    assert 15 < gigabytes["lora"] < 20 and 6 < gigabytes["qlora"] < 8
    assert 16 * 6.738 < gigabytes["full"] < 120  # published 60 to 80 is for weights in 16 bits; ours learns in float32
    assert {one["published_gb"] for one in found["variants"].values()} == {"60-80", "16-20", "6-8"}
    assert "published for 7B: 6-8 GB" in plan.as_text(found)


@pytest.mark.parametrize(("n", "ending"), [(1, ""), (2, "s")])
def test_one_epoch_and_one_thread_are_singular(n: int, ending: str) -> None:
    learned = {"examples": n, "epochs": float(n), "tokens": 3, "trained_tokens": 2, "steps": n, "advice": []}
    size = {"trainable_parameters": 1, "total_parameters": 2, "memory": {"total": 10**6}, "time": None}
    machine = {"device": "cpu", "dtype": "float32", "threads": n, "available_bytes": None}
    said = plan.as_text({"variants": {"lora": {**learned, **size}}, "machine": machine}).splitlines()
    assert said[0] == f"lora: {n} example{ending} x {n} epoch{ending} = 3 tokens (2 in the loss) in {n} step{ending}"
    assert said[-1] == f"on cpu in float32, {n} thread{ending}"


def test_if_a_method_does_not_fit_one_that_fits_is_suggested(
    config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--model", str(config(vocab_size=300)), "--tokens-per-row", "64", "--json"]
    assert main([*command, "--method", "full", "--method", "lora"]) == 0
    needed = {method: one["memory"]["total"] for method, one in json.loads(capsys.readouterr().out)["variants"].items()}
    monkeypatch.setattr(plan.Machine, "available", (needed["full"] + needed["lora"]) // 2)
    assert main([*command, "--method", "full"]) == 0
    full = json.loads(capsys.readouterr().out)["variants"]["full"]
    assert not full["fits"] and full["time"] is None
    assert full["advice"][1].startswith("method: lora with gradient_checkpointing: true would take")


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("nothing", "unknown method 'nothing'"),
        ("xlora", "xlora combines adapters"),
        ("bitfit", "bitfit trains biases, and this model has none"),
    ],
)
def test_a_method_that_cannot_be_planned_is_blamed_on_the_option_that_named_it(
    config: Any, capsys: pytest.CaptureFixture[str], method: str, problem: str
) -> None:
    assert main(["plan", "--model", str(config()), "--method", method]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: --method {method}: {problem}") and "params.yaml" not in message


def test_step_time_is_the_sum_over_operations_times_their_count() -> None:
    operations, ticks = Operations(), iter(range(1000))
    square, wide = (torch.empty(8, n, device="meta") for n in (8, 16))
    for _ in range(3):
        operations.note(torch.mm, square, square)
    operations.note(torch.mm, square, wide)
    operations.multiply(2)
    known: dict[Any, tuple[float, float]] = {}
    assert operations.seconds(torch.device("cpu"), known, lambda: next(ticks)) == (8, 8) and len(known) == 2
    assert operations.seconds(torch.device("cpu"), known, lambda: pytest.fail("measured again")) == (8, 8)


@pytest.mark.parametrize("method", ["boft", "oft"])
def test_operations_that_read_values_can_be_timed(config: Any, method: str) -> None:
    least, most = take(config(), method, {"target_modules": ["q_proj", "v_proj"]}).operations.seconds(
        torch.device("cpu"), {}
    )
    assert 0 < least <= most


@pytest.mark.parametrize(
    ("method", "options"),
    [("full", {}), ("qlora", ALL), ("prompt_tuning", {"num_virtual_tokens": 4})],
    ids=lambda given: str(given)[:5],
)
def test_the_account_multiplies_the_matrices_that_training_multiplies(
    method: str, options: dict[str, Any], tiny_model: Path
) -> None:
    """Shapes and dtypes of all products in a forward and backward pass, for
    real and on the meta device; one bfloat16 copy a product included."""
    lengths = [5, 9]
    row = {"input_ids": [3] * 14, "labels": [4] * 14, "weights": [1.0] * 14, "lengths": lengths}
    tunable = build(
        method, options, tiny_model, torch.device("cpu"), torch.bfloat16, "adapter.x", merge=False, total_steps=100
    )
    memory._prepare_for_training(tunable.model, causal(tunable.model), False)
    done: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in PRODUCTS:
                done[str([(tuple(a.shape), a.dtype) for a in args if isinstance(a, torch.Tensor)])] += 1
            return func(*args, **(kwargs or {}))

    with Counting():
        hidden = tunable.hidden_states(collate_packed([row]) if tunable.packs else collate_padded([row]))
        causal(tunable.model).get_output_embeddings()(hidden[:, :-1].flatten(0, 1)).sum().backward()
    told: Counter[str] = Counter()
    found = take(
        tiny_model, method, options, lengths=lengths, counted=hidden[:, :-1].shape[:2].numel(), dtype=torch.bfloat16
    ).operations
    for key, n in found.counts.items():
        run, _, shapes = found._runs[key]
        if run in PRODUCTS:
            told[str([(shape.size, shape.dtype) for shape in shapes if isinstance(shape, Shape)])] += int(n)
    assert told == done


@pytest.fixture
def tokenized(project: Path, tiny_model: Path) -> Path:
    """A project that has a report on tokenized data, and a base model."""
    shutil.copytree(tiny_model, project / "data" / "base_model")
    report = {"train": {"examples": 40, "rows": 10, "tokens": 6000, "trained_tokens": 1500}, "validation": {"rows": 1}}
    (project / "data" / "reports").mkdir(parents=True, exist_ok=True)
    (project / "data" / "reports" / "tokenized.json").write_text(json.dumps(report))
    return project


def write_preferences(root: Path, count: int) -> None:
    pairs = [preference_row(10 + i, "aaa", "z") for i in range(count)]
    write_pairs(root / "data" / "preferences" / "train", pairs)


def test_a_plan_reports_tokens_parameters_memory_and_time(tokenized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.Machine, "runtime", 600_000_000)
    monkeypatch.setattr(plan.Machine, "seconds", lambda self, step: (2.0, 3.0))
    found = plan.plan_variants(tokenized, [])["variants"]["lora"]
    assert {key: found[key] for key in ("examples", "epochs", "steps", "tokens", "trained_tokens")} == {
        "examples": 40, "epochs": 0.8, "steps": 8, "tokens": 4800, "trained_tokens": 1200,
    }  # fmt: skip
    assert set(found["memory"]) == {
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "fragmentation",
        "runtime",
        "total",
    }
    assert found["memory"]["total"] == sum(size for part, size in found["memory"].items() if part != "total")
    assert found["fits"] and found["advice"] == []
    assert found["trainable_parameters"] == 2 * sum(4 * (rows + columns) for rows, columns in MATRICES)
    assert found["time"] == {
        "from_seconds": 38,
        "to_seconds": 56,
    }, "4,800 tokens are 18.75 of the largest rows, which the step is told for"
    edit_params(tokenized, lambda values: values["compute"].update(processes=2))
    shared = plan.plan_variants(tokenized, [])["variants"]["lora"]
    assert {key: shared[key] for key in ("epochs", "steps", "tokens")} == {"epochs": 1.6, "steps": 8, "tokens": 9600}


def test_a_plan_shows_auto_values_as_training_chooses_them_and_the_cost_of_the_sweep(
    tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.Machine, "runtime", 0)
    monkeypatch.setattr(plan.Machine, "seconds", lambda self, step: (2.0, 3.0))
    open_entry = {
        "num_train_epochs": "auto",
        "learning_rate": "auto",
        "per_device_train_batch_size": "auto",
        "peft": {"r": "auto"},
    }
    edit_params(
        tokenized,
        lambda values: values.update(
            adapter={"x": open_entry, "fixed": {"num_train_epochs": 10, "peft": {"r": 8}}}, aligned={}, release={}
        ),
    )
    found = plan.plan_variants(tokenized, [])
    one, fixed = found["variants"]["x"], found["variants"]["fixed"]
    assert {name: choice["value"] for name, choice in one["chosen"].items()} == {
        "num_train_epochs": 10,
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
        "peft.r": 8,
        "peft.lora_alpha": 16,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-4,
    }
    assert one["steps"] == fixed["steps"] == 100
    assert one["trainable_parameters"] == fixed["trainable_parameters"]
    assert (
        one["sweep"] == {"trials_at_most": 6, "steps_at_most": 120} and "chosen" not in fixed and "sweep" not in fixed
    )
    assert (one["time"]["to_seconds"], fixed["time"]["to_seconds"]) == (1547, 703), "120 steps more than 100"
    told = plan.as_text(found)
    assert "  num_train_epochs 10: guideline for 40 examples (under 1,000)\n" in told
    assert (
        "  a sweep on the validation loss will adjust learning_rate: at most 6 trials, 120 additional steps\n" in told
    )


def test_a_plan_refuses_what_training_refuses(tokenized: Path) -> None:
    edit_params(tokenized, lambda values: values["adapter"]["lora"].update(use_liger_kernel=True))
    with pytest.raises(InputError, match=r"adapter.lora.use_liger_kernel: Liger"):
        plan.plan_variants(tokenized, [])
    edit_params(tokenized, lambda values: values["adapter"].update(lora={"group_by_length": True}))
    with pytest.raises(InputError, match=r"adapter.lora.group_by_length: rows hold several examples"):
        plan.plan_variants(tokenized, [])


def test_a_plan_of_an_aligned_variant_counts_pairs_and_the_reference_model(
    tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.Machine, "runtime", 0)
    monkeypatch.setattr(plan.Machine, "seconds", lambda self, step: (3.0, 6.0))
    without = plan.plan_variants(tokenized, [])
    assert "dpo" not in without["variants"] and without["not_planned"] == {"dpo": "run `dvc repro preferences` first"}
    assert "dpo: not planned: run `dvc repro preferences` first" in plan.as_text(without).splitlines()
    with pytest.raises(InputError, match="no preferences to train on yet"):
        plan.plan_variants(tokenized, ["dpo"])
    write_preferences(tokenized, 12)
    entries = {
        "dpo": {"method": "dpo", "adapter": "lora", "per_device_train_batch_size": 4, "num_train_epochs": 2},
        "kto": {"method": "kto", "adapter": "lora", "per_device_train_batch_size": 4, "num_train_epochs": 2},
        "rloo": {"method": "rloo", "adapter": "lora", "options": {"max_completion_length": 6}},
        **{
            name: {"method": name, "adapter": "lora", "per_device_train_batch_size": 4, "num_train_epochs": 2}
            for name in ("simpo", "orpo")
        },
    }
    edit_params(tokenized, lambda values: values.update(aligned=entries))
    found = plan.plan_variants(tokenized, ["dpo", "kto", "rloo", "simpo", "orpo"])
    dpo, kto, rloo, simpo, orpo = found["variants"].values()
    assert (dpo["pairs"], dpo["steps"], rloo["steps"]) == (12, 6, 6)
    prompt = dpo["tokens"] / (6 * 8) - (4 + 2) / 2
    assert dpo["tokens"] == 6 * 4 * (2 * prompt + 4 + 2) and rloo["tokens"] == 6 * 8 * (prompt + 6)
    passes = 6 + 6 / 2 / 3  # of 3 seconds; the reference is one third of a pass, in the first of two epochs
    assert dpo["time"] == {"from_seconds": round(passes * 3), "to_seconds": round(passes * 6)} and rloo["time"] is None
    assert (kto["pairs"], kto["steps"], kto["tokens"]) == (
        12,
        12,
        dpo["tokens"],
    ), "two rows a pair, one for each answer"
    assert kto["memory"]["activations"] < dpo["memory"]["activations"], "so a pass has half as many answers"
    # of padded answers; their own lengths differ from the longest
    assert kto["time"]["to_seconds"] == pytest.approx(12 * 6 * (3 + 3) / 3, rel=0.1), "steps, and passes of each"
    assert (simpo["steps"], simpo["tokens"], simpo["memory"]) == (dpo["steps"], dpo["tokens"], dpo["memory"])
    assert simpo["time"] == orpo["time"] == {"from_seconds": 6 * 3, "to_seconds": 6 * 6}, "there is no reference"
    assert orpo["memory"]["logits"] > simpo["memory"]["logits"], "the likelihood of prompts is trained, too"
    assert "dpo: 12 pairs, " in plan.as_text(found)


def test_a_plan_counts_the_tokens_of_sampled_answers_once(tokenized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.Machine, "runtime", 0)
    monkeypatch.setattr(plan.Machine, "seconds", lambda self, step: None)
    write_preferences(tokenized, 8)
    entries = {
        f"{method}_{n}": {"method": method, "adapter": "lora", "options": {key: n, **more}}
        for method, key, more in (
            ("grpo", "num_iterations", {}),
            ("ppo", "num_ppo_epochs", {"total_episodes": 32, "batch_size": 16}),
        )
        for n in (1, 3)
    }
    edit_params(tokenized, lambda values: values.update(aligned=entries))
    found = plan.plan_variants(tokenized, [*entries])["variants"]
    assert (
        found["grpo_3"]["steps"] == 3 * found["grpo_1"]["steps"]
        and found["grpo_3"]["tokens"] == found["grpo_1"]["tokens"]
    )
    assert found["ppo_3"]["steps"] == found["ppo_1"]["steps"] and found["ppo_3"]["tokens"] == found["ppo_1"]["tokens"]


def test_a_plan_of_training_on_pairs_has_exactly_max_steps(tokenized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.Machine, "runtime", 0)
    monkeypatch.setattr(plan.Machine, "seconds", lambda self, step: (30.0, 60.0))
    write_preferences(tokenized, 12)
    entry = {"adapter": "lora", "per_device_train_batch_size": 4, "num_train_epochs": 2}
    entries = {
        f"{method}_{n}": {**entry, "method": method, "max_steps": n} for method in ("dpo", "simpo") for n in (3, 9, 1)
    }
    judge = {"model": "base_model", "per_device_train_batch_size": 4, "num_train_epochs": 2, "max_steps": 9}
    edit_params(tokenized, lambda values: values.update(aligned=entries, reward_model=judge))
    found = plan.plan_variants(tokenized, [*entries, "reward_model"])["variants"]
    assert {name: (one["steps"], one["epochs"]) for name, one in found.items()} == {
        "dpo_3": (3, 1.0),
        "dpo_9": (9, 3.0),
        "dpo_1": (1, 0.333),
        "simpo_3": (3, 1.0),
        "simpo_9": (9, 3.0),
        "simpo_1": (1, 0.333),
        "reward_model": (9, 3.0),
    }
    assert (
        found["dpo_9"]["tokens"]
        == found["reward_model"]["tokens"]
        == 3 * found["dpo_3"]["tokens"]
        == 9 * found["dpo_1"]["tokens"]
    )
    assert {name: one["time"]["to_seconds"] for name, one in found.items()} == {
        "dpo_3": 60 * (3 + 1),
        "dpo_9": 60 * (9 + 1),
        "dpo_1": 60 * (1 + 1),
        "simpo_3": 60 * 3,
        "simpo_9": 60 * 9,
        "simpo_1": 60,
        "reward_model": 60 * 9,
    }, "the reference reads all pairs once, in a third of the three steps of an epoch"


def test_an_epoch_that_ends_with_a_smaller_step_has_the_tokens_of_its_data(
    tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.Machine, "runtime", 0)
    monkeypatch.setattr(plan.Machine, "seconds", lambda self, step: None)
    write_preferences(tokenized, 10)

    def tokens(batch: int, **changes: Any) -> list[int]:
        entry = {"per_device_train_batch_size": batch, "num_train_epochs": 1, **changes}
        aligned = {"dpo": {"adapter": "lora", "method": "dpo", **entry}}
        aligned["kto"] = {"adapter": "lora", "method": "kto", **entry, "per_device_train_batch_size": 2 * batch}
        edit_params(
            tokenized, lambda values: values.update(aligned=aligned, reward_model={"model": "base_model", **entry})
        )
        edit_params(tokenized, lambda values: values["adapter"].update(lora={"method": "lora", **entry}))
        found = plan.plan_variants(tokenized, ["dpo", "kto", "reward_model", "lora"])["variants"].values()
        assert {one["steps"] for one in found} == {entry.get("max_steps", -(-10 // batch))}
        return [one["tokens"] for one in found]

    whole = tokens(10)
    assert whole[3] == 6000 and tokens(4) == whole
    for steps, share in ((1, 0.4), (2, 0.8), (3, 1.0), (4, 1.4)):
        assert tokens(4, max_steps=steps, num_train_epochs=2) == [round(one * share) for one in whole]


def test_a_plan_of_an_online_method_reads_prompts_once_and_counts_the_reward_model(
    tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.Machine, "runtime", 0)
    pairs = [preference_row(10 + i, "aaa", "z" * (1 + 300 * (i == 5))) for i in range(12)]
    write_pairs(tokenized / "data" / "preferences" / "train", pairs)
    task = stored(user("1+1?"), said("2"), example_id="a" * 32, group_id=None)
    for split in ("train", "validation"):
        write_records(tokenized / "data" / "splits" / split, [task, {**task, "example_id": "b" * 32}])
    online = {"adapter": "lora", "options": {"max_completion_length": 10, "num_generations": 4}}
    rules = {**online, "rewards": {"exact_match": 1.0}}
    entries = {
        "dpo": {"method": "dpo", "adapter": "lora"},
        "rloo": {"method": "rloo", **online},
        "grpo": {"method": "grpo", **online},
        "online_dpo": {"method": "online_dpo", **online},
        "rules": {"method": "rloo", **rules},  # the reward model still measures its answers
        "tasks": {"method": "rloo", "reward_target": "response", **rules},
        "judged": {"method": "rloo", "reward_target": "response", **online},
    }
    edit_params(tokenized, lambda values: values.update(aligned=entries))
    found = {name: one["memory"] for name, one in plan.plan_variants(tokenized, [*entries])["variants"].items()}
    judge = sum(
        weight.nbytes for weight in load_file(tokenized / "data/base_model/model.safetensors").values()
    )  # its output layer is tied
    weights = {name: memory["weights"] - found["dpo"]["weights"] for name, memory in found.items()}
    assert weights == {name: 0 if name in {"dpo", "tasks"} else judge for name in entries}
    assert found["rules"] == found["rloo"] and found["grpo"]["activations"] <= found["rloo"]["activations"]
    prompt = len(plan._training_pairs(tokenized, tokenized / "data" / "base_model")[0][0])
    padded = memory.TrainingSpec(
        "cpu", torch.float32, tokenized / "data/base_model", "lora", {}, [prompt + 10] * 8, 8 * 10, timed=False
    )
    assert found["grpo"]["total"] < 0.8 * padded.needed, "of eight answers to two prompts"
    assert not plan._has_judge({"aligned": {"rules": rules}}, "rules", rules["rewards"]), (
        "a project without a reward model"
    )


def test_a_plan_of_a_distillation_counts_the_teacher(tokenized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.Machine, "runtime", 0)
    monkeypatch.setattr(plan.Machine, "seconds", lambda self, step: (3.0, 6.0))
    write_preferences(tokenized, 12)
    large = tokenized / "models" / "large"
    shutil.copytree(tokenized / "data" / "base_model", large)
    teacher = {
        "folder": "models/large",
        "sha256": {path.name: "0" * 64 for path in large.iterdir()},
    }  # a plan hashes nothing
    entry = {"adapter": "lora", "per_device_train_batch_size": 4, "num_train_epochs": 2}
    entries = {
        "given": {"method": "gkd", "options": {"teacher": teacher, "lmbda": 0.0}, **entry},
        "own": {"method": "gkd", "options": {"teacher": teacher, "max_new_tokens": 50}, **entry},
        "simpo": {"method": "simpo", **entry},
    }
    edit_params(tokenized, lambda values: values.update(aligned=entries))
    given, own, simpo = plan.plan_variants(tokenized, [*entries])["variants"].values()
    assert given["steps"] == own["steps"] == simpo["steps"] == 6
    assert given["memory"]["weights"] > 1.8 * simpo["memory"]["weights"], "of two models of one size"
    assert own["memory"]["logits"] > given["memory"]["logits"] and own["tokens"] > given["tokens"], (
        "own answers may have 50 tokens"
    )
    assert own["time"] is None and given["time"] == {"from_seconds": 6 * 3, "to_seconds": 6 * 6}


def test_a_plan_of_sharded_alignment_counts_steps_and_memory_per_process(
    tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.Machine, "runtime", 0)
    monkeypatch.setattr(plan.Machine, "seconds", lambda self, step: (3.0, 6.0))
    write_preferences(tokenized, 12)
    entry = {"method": "dpo", "adapter": "lora", "per_device_train_batch_size": 2, "num_train_epochs": 2}
    sharded = {**entry, "sharding": {"fsdp": "full_shard"}}
    judge = {"model": "base_model", "per_device_train_batch_size": 2, "num_train_epochs": 2}

    def edit(values: dict[str, Any]) -> None:
        values["compute"]["processes"] = 2
        values.update(aligned={"dpo": entry, "dpo_sharded": sharded}, reward_model=judge)

    edit_params(tokenized, edit)
    dpo, two, reward = plan.plan_variants(tokenized, ["dpo", "dpo_sharded", "reward_model"])["variants"].values()
    assert (dpo["steps"], two["steps"], two["tokens"]) == (12, 6, dpo["tokens"])
    assert two["sharding"] == {"fsdp": "full_shard", "cpu_offload": False, "processes": 2} and "sharding" not in dpo
    assert two["time"]["to_seconds"] == pytest.approx(dpo["time"]["to_seconds"] / 2, abs=2), (
        "half as many passes in each process"
    )
    assert (reward["pairs"], reward["steps"], reward["tokens"]) == (12, 12, dpo["tokens"])
    edit_params(tokenized, lambda values: values["reward_model"].update(sharding={"fsdp": "full_shard"}))
    assert plan.plan_variants(tokenized, ["reward_model"])["variants"]["reward_model"]["steps"] == 6


def test_a_plan_counts_the_tools_of_pairs_by_the_template_of_training(
    tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.Machine, "runtime", 0)
    monkeypatch.setattr(plan.Machine, "seconds", lambda self, step: (3.0, 6.0))
    edit_params(
        tokenized, lambda values: values.update(aligned={"dpo": {"method": "dpo", "adapter": "lora", "max_steps": 1}})
    )
    pairs = [preference_row(i, "aaa", "z") for i in range(8)]
    write_pairs(tokenized / "data/preferences/train", [{**pair, "tools": [WEATHER]} for pair in pairs])
    with pytest.raises(InputError, match="does not write the definitions of tools"):
        plan.plan_variants(tokenized, ["dpo"])
    (tokenized / "data/tokenized").mkdir()
    (tokenized / "data/tokenized/chat_template.jinja").write_text(HERMES)
    with_tools = plan.plan_variants(tokenized, ["dpo"])["variants"]["dpo"]["tokens"]
    write_pairs(tokenized / "data/preferences/train", pairs)
    assert with_tools > plan.plan_variants(tokenized, ["dpo"])["variants"]["dpo"]["tokens"] + 16 * len(
        json.dumps(WEATHER["function"])
    )


def test_a_plan_that_does_not_fit_suggests_one_that_does(tokenized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.Machine, "runtime", 0)
    needed = plan.plan_variants(tokenized, [])["variants"]["lora"]["memory"]["total"]
    monkeypatch.setattr(plan.Machine, "available", needed - 1)
    found = plan.plan_variants(tokenized, [])
    assert found["variants"]["lora"]["gradient_checkpointing"] and found["variants"]["lora"]["fits"], (
        "auto is true where that helps"
    )
    assert "  with gradient checkpointing\n" in plan.as_text(found)
    edit_params(tokenized, lambda values: values["adapter"]["lora"].update(gradient_checkpointing=False))
    found = plan.plan_variants(tokenized, [])
    one = found["variants"]["lora"]
    assert (
        not one["fits"]
        and one["advice"][0].startswith("needs ")
        and one["advice"][1].startswith("gradient_checkpointing: true would take")
    )
    assert "does not fit: needs" in plan.as_text(found) and "hint: gradient_checkpointing: true" in plan.as_text(found)
    monkeypatch.setattr(plan.Machine, "available", 1)
    assert (
        "which is the least; use a smaller model" in plan.plan_variants(tokenized, [])["variants"]["lora"]["advice"][1]
    )


def test_without_the_base_model_the_plan_names_the_command_to_run(tokenized: Path) -> None:
    shutil.rmtree(tokenized / "data" / "base_model")
    with pytest.raises(InputError, match="data/base_model is missing"):
        plan.plan_variants(tokenized, [])


def test_a_plan_for_a_model_loads_no_library_that_it_does_not_need(config: Any) -> None:
    code = (
        f"import gc, sys; from dagster_project.__main__ import main; main(['plan', '--model', {str(config())!r},"
        " '--tokens-per-row', '16', '--method', 'lora']); print([name for name in ('trl', 'datasets', 'scipy',"
        " 'pandas', 'sklearn') if name in sys.modules], gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] True"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora", "--model", "config.json"], "lora and --model are both given"),
        (["--method", "lora"], "--method requires --model"),
        (["lora", "--batch", "4"], "--batch requires --model"),
        (["--tokens-per-row", "64"], "--tokens-per-row requires --model"),
        (["--no-gradient-checkpointing"], "--gradient-checkpointing requires --model"),
        (["--device", "cpu"], "--device requires --model"),
        (["--device", "cuda"], "--device requires --model"),
        (["--batch", "1"], "--batch requires --model"),
        (["--model", "", "lora"], "the name is empty"),
        (["--dtype", "float32"], "--dtype requires --model"),
        (["--model", "config.json", "--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
        (["--model", "config.json", "--tokens-per-row", "1" + "0" * 20], "too much for one forward pass"),
        (
            ["--model", "config.json", "--batch", "90000000", "--tokens-per-row", "10"],
            "at most 1,000,000 rows, and 1,000,000,000 tokens",
        ),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("plan", *arguments) == 2 and message in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from dagster_project.cli.parser import parser; parser().format_help(); sys.exit('torch' in"
        " sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_total_is_the_sum_of_the_parts() -> None:
    assert Memory(1, 2, 3, 4, 5, 6, 7).total == 28


@pytest.mark.slow
@pytest.mark.long
def test_measured_memory_of_a_training_is_near_the_prediction(tmp_path: Path) -> None:
    """On the real model under checkpointing: a method whose layers free little, and one whose layers free much."""
    if not (ROOT / "data" / "base_model" / "model.safetensors").is_file():
        pytest.skip("no real model: run `dvc repro base_model`")
    dtype = str(prepare(Compute(threads=1, dtype="auto"))[1]).removeprefix("torch.")  # emulated bfloat16 takes minutes
    options = ["--dtype", dtype, "--tokens", "1024", "--checkpointing", "yes", "--out", str(tmp_path / "x.md")]
    command = [sys.executable, "benchmarks/memory.py", "lora", "qdora", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 and max(abs(one["error"]) for one in found) < 0.3
