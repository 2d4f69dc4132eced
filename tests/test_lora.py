"""Fused LoRA has the output and the gradients of PEFT's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dagster_project.training.methods import compiled_lora, fused_lora


def pair(folder: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> tuple[Any, Any]:
    """The same adapted model twice: PEFT's, and fused. Its B matrices are not zero."""
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **keys))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        found.append(model.train())
    fused_lora.fuse(found[1])
    return found[0], found[1]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 19)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_fused_lora_has_pefts_output_and_gradients(tiny_model: Path, use_rslora: bool) -> None:
    theirs, ours = pair(tiny_model, use_rslora=use_rslora)
    assert sum("forward" in vars(module) for module in ours.modules()) == 14  # seven in each of two layers
    ids = torch.arange(3, 19)[None]
    assert torch.allclose(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-6)
    wanted, found = gradients(theirs), gradients(ours)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, found[name], rtol=1e-4, atol=1e-6), name


def test_fused_lora_in_bfloat16_is_as_accurate_as_peft(tiny_model: Path) -> None:
    truth = gradients(pair(tiny_model)[0])
    theirs, ours = (gradients(model) for model in pair(tiny_model, torch.bfloat16))

    def error(found: dict[str, torch.Tensor]) -> float:
        return sum(float((found[name] - truth[name]).norm()) for name in truth)

    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    assert error(ours) < 1.2 * error(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_right_share_and_its_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    result, x = torch.randn(64, 6, dtype=dtype), torch.randn(64, 48, dtype=dtype)
    a, b, out_gradient = torch.randn(4, 48), torch.randn(6, 4), torch.randn(64, 6, dtype=dtype)
    ours = [tensor.clone().requires_grad_() for tensor in (result, x, a, b)]
    out, _, kept = compiled_lora.update(*ours, 0.5, 0.25)
    out.backward(out_gradient)
    assert 0.7 < float((kept != 0).float().mean()) < 0.8
    exact = [tensor.double().requires_grad_() for tensor in (result, x, a, b)]
    wanted = exact[0] + 0.5 * (exact[1] * (kept != 0) / 0.75) @ exact[2].T @ exact[3].T
    wanted.backward(out_gradient.double())
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.5}
    torch.testing.assert_close(out.double(), wanted, **near)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), truth.grad, **near)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_and_compiled_training_have_the_same_bits(dtype: torch.dtype, dropout: float) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 33, 40, dtype=dtype), torch.randn(2, 33, 48, dtype=dtype)]
    tensors += [torch.randn(4, 48), torch.randn(40, 4)]
    out_gradient, found = torch.randn(2, 33, 40, dtype=dtype), list[list[torch.Tensor]]()
    for compute in (lambda *given: compiled_lora.update(*given)[0], fused_lora.EagerUpdate.apply):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        torch.manual_seed(7)
        out = compute(*leaves, 0.5, dropout)
        out.backward(out_gradient)
        found.append([out, *(leaf.grad for leaf in leaves)])
        assert not torch.equal(out, tensors[0])
    assert all(torch.equal(compiled, eager) for compiled, eager in zip(*found, strict=True))


def test_dropout_masks_use_torchs_generator() -> None:
    def draw() -> torch.Tensor:
        torch.manual_seed(5)
        return fused_lora._dropout_mask(torch.empty(40, 33), 0.05)

    assert torch.equal(draw(), draw())
    assert torch.all((draw() == 0) | (draw() == -1))


def test_nothing_is_dropped_in_evaluation_and_switched_off_it_is_the_base_model(tiny_model: Path) -> None:
    theirs, ours = pair(tiny_model, lora_dropout=0.5)
    ids = torch.arange(3, 19)[None]
    assert torch.allclose(theirs.eval()(input_ids=ids).logits, ours.eval()(input_ids=ids).logits, atol=1e-6)
    with ours.disable_adapter():
        plain = ours(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    assert torch.equal(plain, base(input_ids=ids).logits)
    assert torch.allclose(ours.merge_and_unload()(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)


def test_dora_uses_the_layer_of_peft(tiny_model: Path) -> None:
    _, ours = pair(tiny_model, use_dora=True)
    assert not any("forward" in vars(module) for module in ours.modules())
