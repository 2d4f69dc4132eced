"""Last hidden states -> logits, as the model's own forward pass computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError

if TYPE_CHECKING:
    import torch

SCALES = (
    "final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling",
    "logits_mup_width_multiplier",
)  # fmt: skip
"""Keys of configurations that change the logits before or after the output layer, e.g. of Gemma 4, Cohere and Granite.
"""


def is_scaled(model: Any) -> bool:
    """Whether the logits of a causal language model are others than those of its output layer alone."""
    config = model.config.get_text_config() if hasattr(model, "config") else None
    return any(getattr(config, key, None) not in (None, 1) for key in SCALES)


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (tokens, vocabulary) of last hidden states (tokens, hidden) in the dtype of the output layer.

    The same key divides logits in one model and multiplies them in another, so those of scaled models are computed by
    their own code.
    """
    causal = getattr(model, "causal", model)  # inside a VirtualTokenModel
    if is_scaled(causal):
        return own_logits(causal, hidden)
    found: torch.Tensor = causal.get_output_embeddings()(hidden)
    return found


def own_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """As `logits_of`, by the model's own forward pass, whose base model is replaced by the given hidden states."""
    base, output = model.base_model, _Output(hidden[None])
    own = vars(base).get("forward")
    base.forward = lambda *_, **__: output
    try:
        found: torch.Tensor = model(input_ids=hidden.new_zeros(1, len(hidden), dtype=int), use_cache=False).logits[0]
    finally:
        if own is None:
            del base.forward
        else:
            base.forward = own
    return found


def refuse_other_logits(model: Any, where: object) -> None:
    """Check that the logits of a causal language model are those that `logits_of` computes of its last hidden states.

    Args:
        where: the model's folder, for messages.
    Raises:
        InputError: it gives no last hidden states (Llama 4 text), or its logits are others (ModernBERT-decoder).
    """
    import torch

    kind, output = type(model).__name__, model.get_output_embeddings()
    if model.base_model is model:
        problem = f"{where}: {kind} gives no last hidden states in transformers, which are needed"
        raise InputError(problem, "use another model")
    dice = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, output.weight.shape[1], generator=dice).to(output.weight)
    with torch.no_grad():
        own, others = (own_logits(model, states) for states in (hidden, hidden.flip(0)))
        found = logits_of(model, hidden)
    # OPT calls a part of its base model, and so computes the logits of other states here
    reads_them = not torch.equal(own, others)
    if reads_them and not torch.allclose(own, found, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        problem = "changes its last hidden states before the output layer, which training and evaluation do not support"
        raise InputError(f"{where}: {kind} {problem}", "use another model")


class _Output:
    """The output of a model without its output layer, as the output layer reads it."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, i: int) -> torch.Tensor:
        return (self.last_hidden_state,)[i]

    def __getattr__(self, _: str) -> None:
        return None  # caches, attention weights and so on, which the output layer does not read
