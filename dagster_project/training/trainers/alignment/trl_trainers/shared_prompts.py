"""Pairs -> what TRL's losses need of the model, from one forward pass without padding that reads what two answers have in common once.

TRL's trainers read prompts twice, pad to the longest text, and compute logits at every position. Here the model gets one packed row, logits
are computed where a token of an answer is predicted, and what remains of them is the log-probability and its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dagster_project.training.methods.build import causal
from dagster_project.training.tokens.collators import SIZES
from dagster_project.training.trainers.alignment.trl_trainers.pair_attention import can_attend_by_pair

CHUNK = 256
"""Positions whose logits exist at the same time."""

SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""Keys of configurations that change the logits after the output layer."""


def reads_prompts_once(model: Any, device: str) -> bool:
    """Whether a model can read pairs in the format of `collate_shared` with the functions below; otherwise TRL's padded batches are used.

    On a GPU padded batches are kept: there is no measurement yet.

    Args:
        device: "cpu" or "cuda", that of the training.
    """
    import torch

    inner = causal(model)
    head = inner.get_output_embeddings()
    plain = head is None or (isinstance(head, torch.nn.Linear) and head.bias is None and not head.weight.requires_grad)
    config = inner.config.get_text_config()
    unscaled = all(getattr(config, key, None) in (None, 1) for key in SCALES) and not getattr(config, "output_router_logits", False)
    return device == "cpu" and plain and unscaled and can_attend_by_pair(inner)


@dataclass(frozen=True)
class SharedPair:
    """Where the tokens of two texts with a common beginning are in a packed row: the beginning, the rest of the first, that of the second."""

    start: int
    """Index of its first token in the row."""
    lengths: tuple[int, int, int]

    def place(self, side: int, i: int) -> int:
        """Index in the row of token i of the first text (side 0) or the second (side 1)."""
        shared, first, _ = self.lengths
        return self.start + i + (first if side and i >= shared else 0)


def collate_shared(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[dict[str, Any], list[SharedPair]]:
    """Collate pairs of texts into one row without padding between them; tokens with which both texts of a pair begin are in it once.

        [5, 6, 7] and [5, 6, 8, 9]  ->  packed_ids [5, 6, 7, 8, 9], packed_positions [0, 1, 2, 2, 3], pair_lengths [(2, 1, 2)]

    Returns:
        The arguments of the model for `attending_by_pair`: packed_ids, packed_positions (1, seq) int64, pair_lengths;
        and the places of each pair. The row is padded to a multiple of SIZES tokens by a text of its own at the end.
    """
    import torch

    ids: list[int] = []
    positions: list[int] = []
    placed: list[SharedPair] = []
    for first, second in pairs:
        most = min(len(first), len(second)) - 1  # each keeps a token of its own
        shared = next((i for i in range(most) if first[i] != second[i]), most)
        placed.append(SharedPair(len(ids), (shared, len(first) - shared, len(second) - shared)))
        ids += [*first, *second[shared:]]
        positions += [*range(len(first)), *range(shared, len(second))]
    spare = -len(ids) % SIZES
    lengths = [pair.lengths for pair in placed] + ([(spare, 0, 0)] if spare else [])
    row = {"packed_ids": torch.tensor([ids + [0] * spare]), "packed_positions": torch.tensor([[*positions, *range(spare)]])}
    return {**row, "pair_lengths": lengths}, placed


def collate_pairs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate rows with `chosen_ids` and `rejected_ids`, for DPO after their `prompt_ids`.

    Returns:
        The arguments of the model as in `collate_shared`, and indices of tokens in the packed row: the last one of each text, `last_token`
        (2 pairs), and for each token of an answer the one before it, `predicts`, its own id, `target`, and its place in TRL's padded
        labels, `slot`, all (answer tokens) int64. Chosen answers come first.
    """
    import torch

    prompts = [len(row.get("prompt_ids", ())) for row in rows]
    texts = [[[*row.get("prompt_ids", ()), *row[f"{side}_ids"]] for side in ("chosen", "rejected")] for row in rows]
    packed, placed = collate_shared([(chosen, rejected) for chosen, rejected in texts])
    width = max(len(text) for pair in texts for text in pair) - 1
    last, predicts, targets, slots = [], [], [], []
    for side in (0, 1):
        for n, (prompt, pair, place) in enumerate(zip(prompts, texts, placed, strict=True)):
            own = range(prompt, len(pair[side]))
            last.append(place.place(side, own[-1]))
            predicts += [place.place(side, i - 1) for i in own if i]
            targets += [pair[side][i] for i in own if i]
            slots += [(side * len(rows) + n) * width + i - 1 for i in own if i]
    indices = {"last_token": last, "predicts": predicts, "target": targets, "slot": slots}
    return {**packed, **{name: torch.tensor(values) for name, values in indices.items()}}


def hidden_states(model: Any, inputs: Mapping[str, Any], at: str) -> Any:
    """Last hidden states (tokens, hidden) of a batch of `collate_pairs` at the tokens of one of its indices."""
    output = causal(model).base_model(
        input_ids=inputs["packed_ids"], position_ids=inputs["packed_positions"], pair_lengths=inputs["pair_lengths"], use_cache=False
    )
    return output.last_hidden_state[0][inputs[at]]


def log_probabilities(model: Any, **inputs: Any) -> Any:
    """The output of a causal language model as TRL's DPO reads it: log-probabilities `log_probs` (2 pairs, longest text - 1) float32 of the
    tokens of answers, 0 elsewhere.

    TRL also logs entropy, mean logit and accuracy of these tokens, which nobody reads here: they are 0.
    """
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    head = causal(model).get_output_embeddings()
    hidden = hidden_states(model, inputs, "predicts").to(head.weight.dtype)
    found = _log_probability_class().apply(hidden, head.weight, inputs["target"])
    shape = inputs["input_ids"].shape[0], inputs["input_ids"].shape[1] - 1
    padded = found.new_zeros(shape[0] * shape[1]).index_copy(0, inputs["slot"], found).view(shape)
    nothing = torch.zeros(shape)
    return FusedCausalLMOutput(log_probs=padded, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def rewards(model: Any, **inputs: Any) -> Any:
    """The output of a reward model: `logits` (2 pairs, 1), at the last token of each text."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(logits=causal(model).score(hidden_states(model, inputs, "last_token")))


@cache
def _log_probability_class() -> Any:
    import torch

    class LogProbability(torch.autograd.Function):
        """Log-probability (n) float32 of each target under hidden states (n, hidden) times an output layer (vocabulary, hidden) that is frozen.

        Its gradient by the hidden state, weight[target] - softmax . weight, is computed with it, so that no logits are kept or computed
        again. Rounding is that of logits computed in the dtype of the layer, and of the softmax in float32.
        """

        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
            gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            for start in range(0, len(hidden), CHUNK):
                some = slice(start, start + CHUNK)
                scores = (hidden[some] @ weight.T).float()
                scores -= scores.logsumexp(-1, keepdim=True)
                found[some] = scores.gather(-1, targets[some, None])[:, 0]
                if gradient is not None:
                    scores.exp_().scatter_add_(-1, targets[some, None], scores.new_full((1, 1), -1).expand(len(scores), 1))
                    gradient[some] = scores.neg_().to(weight.dtype) @ weight
            if gradient is not None:
                ctx.save_for_backward(gradient)
            return found

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
            (by_hidden,) = ctx.saved_tensors
            return (gradients[0][:, None] * by_hidden).to(by_hidden.dtype), None, None

    return LogProbability
