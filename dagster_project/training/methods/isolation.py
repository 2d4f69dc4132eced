"""Whether a model keeps the texts of a packed row apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.training.tokens.collators import SIZES, collate_packed

if TYPE_CHECKING:
    import torch

LARGEST_DIFFERENCE = 1e-2
"""Of hidden states, relative to their norm. Both passes have the same shapes, so rounding is far below it."""


def refuse_mixing(
    model: Any, hidden_states: Callable[[Mapping[str, Any]], torch.Tensor], several: bool, hint: str
) -> None:
    """Check with short passes that the state of a token depends only on the tokens before it in its own text.

    In some models texts also meet outside of the attention that `attention_for` replaces: in recurrent states and
    convolutions (Mamba, Jamba, Falcon-H1), or in attention with code of its own (BLOOM).

    Args:
        model: a causal language model of transformers, or a PeftModel.
        hidden_states: last hidden states (1, seq, hidden) of a batch of `collate_packed`.
        several: whether a row of the training has several texts.
        hint: what to do if the model can only be trained on one text at a time.
    Raises:
        InputError: it depends on others, or the model cannot read packed rows (MPT, DeepSeek-V3.2).
    """
    kind = model.config.model_type
    try:
        mixes = _depends_on_others(model, hidden_states, several)
    except (AttributeError, TypeError, ValueError) as error:  # of its own code for attention
        what = f"data/base_model: {kind} cannot read packed rows in transformers: {type(error).__name__}: {error}"
        install = "install it, or " if "install" in str(error).lower() else ""
        raise InputError(what, f"{install}use another model") from None
    if not mixes:
        return
    what = f"data/base_model: in training, a token of {kind} would also depend on"
    if several and not _depends_on_others(model, hidden_states, False):
        raise InputError(f"{what} other texts of its row", hint)
    raise InputError(f"{what} the tokens that follow", "use another model")


def _depends_on_others(model: Any, hidden_states: Callable[[Mapping[str, Any]], torch.Tensor], several: bool) -> bool:
    """Whether the first tokens of a text have other states if its end and, with `several`, texts around it differ."""
    import torch

    words, training = model.config.get_text_config().vocab_size, model.training

    def states(*texts: Sequence[int]) -> torch.Tensor:
        ids = [number % words for text in texts for number in text]
        row = {"input_ids": ids, "labels": ids, "weights": [1.0] * len(ids), "lengths": [len(text) for text in texts]}
        batch = collate_packed([row], SIZES)
        batch |= {name: value.to(model.device) for name, value in batch.items() if hasattr(value, "to")}
        return hidden_states(batch)[0].float()

    text, with_another_end, before, after = range(8), [*range(4), *range(10, 14)], range(20, 28), range(30, 38)
    model.eval()
    with torch.no_grad():
        one = states(before, text)[8:12] if several else states(text)[:4]
        other = (states(with_another_end, after) if several else states(with_another_end))[:4]
    model.train(training)
    return not float((one - other).norm()) <= LARGEST_DIFFERENCE * float(one.norm())
