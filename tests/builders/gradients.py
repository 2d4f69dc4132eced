"""Gradients of a model, and their comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def trained_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Name -> gradient of each trained weight. Resets them."""
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    return found


def flat(gradients: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.asarray(gradients[name]).ravel() for name in sorted(gradients)])


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    """Args:
    bound: largest difference, relative to the largest value of all.
    """
    scale = max(float(value.abs().max()) for value in expected.values())
    assert found.keys() == expected.keys() and scale > 0
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < bound * scale
