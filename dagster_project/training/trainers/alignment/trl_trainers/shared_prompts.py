"""Pairs, and groups of answers to a prompt -> what TRL's losses need of the model, from one pass without padding.

The pass reads what the answers have in common once. TRL's trainers read prompts twice, pad to the longest text, and
compute logits at every position. Here the model gets one packed row, logits are computed where a token of an answer is
predicted, and what remains of them is the log-probability and its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from dagster_project.training.methods.build import causal
from dagster_project.training.methods.logits import is_scaled
from dagster_project.training.tokens.collators import SIZES
from dagster_project.training.trainers.alignment.trl_trainers.pair_attention import can_attend_by_pair

if TYPE_CHECKING:
    import torch

CHUNK = 256
"""Positions whose logits exist at the same time."""


def reads_prompts_once(model: Any, device: str) -> bool:
    """Whether a model can read pairs in the format of `collate_shared` with the functions below.

    Otherwise TRL's padded batches are used. On a GPU they always are: there is no measurement yet.

    Args:
        device: "cpu" or "cuda", that of the training.
    """
    import torch

    inner = causal(model)
    head = inner.get_output_embeddings()
    plain = head is None or (isinstance(head, torch.nn.Linear) and head.bias is None and not head.weight.requires_grad)
    config = inner.config.get_text_config()
    unscaled = not is_scaled(inner) and not getattr(config, "output_router_logits", False)
    return device == "cpu" and plain and unscaled and can_attend_by_pair(inner)


def has_router(model: Any) -> bool:
    """Whether a model's configuration has a router, whose loss TRL's DPO, RLOO and GRPO add.

    Only padded batches give it.
    """
    return hasattr(causal(model).config.get_text_config(), "output_router_logits")


@dataclass(frozen=True)
class SharedTexts:
    """Where the tokens of texts with a common beginning are in a packed row: first that, then the rest of each text."""

    start: int
    """Index of the first token in the row."""
    lengths: tuple[int, ...]

    def place(self, text: int, i: int) -> int:
        """Index in the row of token i of a text, numbered from 0."""
        shared, *own = self.lengths
        return self.start + i + (sum(own[:text]) if i >= shared else 0)


def collate_shared(groups: Sequence[Sequence[Sequence[int]]]) -> tuple[dict[str, Any], list[SharedTexts]]:
    """Collate pairs or larger groups of texts into one row without padding between them.

    Tokens with which all texts of a group begin are in it once:

        [5, 6, 7] and [5, 6, 8, 9]
        -> packed_ids [5, 6, 7, 8, 9], packed_positions [0, 1, 2, 2, 3], pair_lengths [(2, 1, 2)]

    Returns:
        The arguments of the model for `attending_by_pair`: packed_ids, packed_positions (1, seq) int64, pair_lengths;
        and the places of each group. The row is padded to a multiple of SIZES tokens by a text of its own at the end.
    """
    import torch

    ids: list[int] = []
    positions: list[int] = []
    placed: list[SharedTexts] = []
    for texts in groups:
        first, most = texts[0], min(map(len, texts)) - 1  # each keeps a token of its own
        shared = next((i for i in range(most) if any(text[i] != first[i] for text in texts)), most)
        placed.append(SharedTexts(len(ids), (shared, *(len(text) - shared for text in texts))))
        ids += [*first, *(token for text in texts[1:] for token in text[shared:])]
        positions += [*range(len(first)), *(i for text in texts[1:] for i in range(shared, len(text)))]
    spare = -len(ids) % SIZES
    batch = {
        "packed_ids": torch.tensor([ids + [0] * spare]),
        "packed_positions": torch.tensor([[*positions, *range(spare)]]),
        "pair_lengths": [group.lengths for group in placed] + ([(spare, 0, 0)] if spare else []),
    }
    return batch, placed


def collate_pairs(rows: Sequence[Mapping[str, Any]], trains_prompts: bool = False) -> dict[str, Any]:
    """Collate rows with `chosen_ids` and `rejected_ids`, for DPO after their `prompt_ids`.

    Args:
        trains_prompts: whether prompts belong to the chosen answers, but for their first token.
    Returns:
        The arguments of the model as in `collate_shared`, and indices of tokens in the packed row: the last one of each
        text, `last_token` (2 pairs), and for each token of an answer the one before it, `predicts`, its own id,
        `target`, and its place in TRL's padded labels, `slot`, all (answer tokens) int64. Chosen answers come first.
    """
    import torch

    prompts = [len(row.get("prompt_ids", ())) for row in rows]
    texts = [[[*row.get("prompt_ids", ()), *row[f"{side}_ids"]] for side in ("chosen", "rejected")] for row in rows]
    packed, placed = collate_shared(texts)
    width = max(len(text) for pair in texts for text in pair) - 1
    last, predicts, targets, slots = [], [], [], []
    for side in (0, 1):
        for n, (prompt, pair, place) in enumerate(zip(prompts, texts, placed, strict=True)):
            own = range(0 if trains_prompts and side == 0 else prompt, len(pair[side]))
            last.append(place.place(side, own[-1]))
            predicts += [place.place(side, i - 1) for i in own if i]
            targets += [pair[side][i] for i in own if i]
            slots += [(side * len(rows) + n) * width + i - 1 for i in own if i]
    indices = {"last_token": last, "predicts": predicts, "target": targets, "slot": slots}
    return {**packed, **{name: torch.tensor(values) for name, values in indices.items()}}


def collate_answers(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], width: int) -> dict[str, Any]:
    """Collate answers into one row, in which those to the same prompt are a group.

    The row does not depend on the order of the answers, so equal models give equal bits for it.

    Returns:
        The arguments of the model as in `collate_shared`, and as in `collate_pairs` indices of the tokens of answers,
        `predicts` and `target`; `slot` is the place of each in a table (answers, width).
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda row: (prompts[row], answers[row]))
    groups = [list(rows) for _, rows in groupby(order, lambda row: prompts[row])]
    packed, placed = collate_shared([[[*prompts[row], *answers[row]] for row in rows] for rows in groups])
    predicts, targets, slots = list[int](), list[int](), list[int]()
    for rows, place in zip(groups, placed, strict=True):
        for text, row in enumerate(rows):
            before = len(prompts[row]) - 1
            predicts += [place.place(text, before + i) for i in range(len(answers[row]))]
            targets += answers[row]
            slots += [row * width + i for i in range(len(answers[row]))]
    indices = {"predicts": predicts, "target": targets, "slot": slots}  # empty if every answer is left out of the loss
    return {**packed, **{name: torch.tensor(values, dtype=torch.int64) for name, values in indices.items()}}


def hidden_states(model: Any, inputs: Mapping[str, Any], at: str) -> Any:
    """Last hidden states (tokens, hidden) of a batch of `collate_pairs` at the tokens of one of its indices."""
    packed = {"input_ids": inputs["packed_ids"], "position_ids": inputs["packed_positions"]}
    output = causal(model).base_model(**packed, pair_lengths=inputs["pair_lengths"], use_cache=False)
    return output.last_hidden_state[0][inputs[at]]


def log_probabilities(model: Any, **inputs: Any) -> Any:
    """The output of a causal language model as TRL's DPO reads it.

    It has log-probabilities `log_probs` (2 pairs, longest text - 1) float32 of the tokens of answers, 0 elsewhere. TRL
    also logs entropy, mean logit and accuracy of these tokens, which nobody reads here: they are 0.
    """
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    head = causal(model).get_output_embeddings()
    hidden = hidden_states(model, inputs, "predicts").to(head.weight.dtype)
    found, _ = _log_probability_class().apply(hidden, head.weight, inputs["target"], 1.0, False)
    shape = inputs["input_ids"].shape[0], inputs["input_ids"].shape[1] - 1
    padded = found.new_zeros(shape[0] * shape[1]).index_copy(0, inputs["slot"], found).view(shape)
    nothing = torch.zeros(shape)
    return FusedCausalLMOutput(log_probs=padded, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def of_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    width: int,
    temperature: float,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each token of answers, and the entropy in nats of the distribution that it is from.

    Args:
        prompts, answers: token ids. An answer that is left out of the loss is empty.
        width: tokens of the longest answer, or more.
    Returns:
        Both (answers, width) float32, 0 after the end of an answer.
    """
    inputs, head = collate_answers(prompts, answers, width), causal(model).get_output_embeddings()
    hidden = hidden_states(model, inputs, "predicts").to(head.weight.dtype)
    found, entropy = _log_probability_class().apply(hidden, head.weight, inputs["target"], temperature, with_entropy)

    def table(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(len(answers) * width).index_copy(0, inputs["slot"], values).view(len(answers), width)

    return table(found), table(entropy) if with_entropy else None


def rewards(model: Any, **inputs: Any) -> Any:
    """The output of a reward model: `logits` (2 pairs, 1), at the last token of each text."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(logits=causal(model).score(hidden_states(model, inputs, "last_token")))


@cache
def _log_probability_class() -> Any:
    import torch

    class LogProbability(torch.autograd.Function):
        """Log-probability of each target, and entropy of each distribution in nats, both (n) float32.

        The distributions are those of hidden states (n, hidden) times an output layer (vocabulary, hidden) that is
        frozen, at a temperature. The entropy has no gradient; it is (0) if it is not needed.

        The gradient of the log-probability by the hidden state, weight[target] - softmax . weight, is computed with it,
        so that no logits are kept or computed again. Rounding is that of logits computed in the dtype of the layer, and
        of the softmax in float32.
        """

        @staticmethod
        def forward(
            ctx: Any, hidden: Any, weight: Any, targets: Any, temperature: float, with_entropy: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
            entropy = found.new_empty(len(hidden) if with_entropy else 0)
            gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            for start in range(0, len(hidden), CHUNK):
                some = slice(start, start + CHUNK)
                scores = (hidden[some] @ weight.T).float()
                if temperature != 1:
                    scores /= temperature
                scores -= scores.logsumexp(-1, keepdim=True)
                found[some] = scores.gather(-1, targets[some, None])[:, 0]
                if with_entropy:
                    entropy[some] = -torch.linalg.vecdot(scores.exp(), scores)
                if gradient is not None:
                    minus_one = scores.new_full((1, 1), -1).expand(len(scores), 1)
                    scores.exp_().scatter_add_(-1, targets[some, None], minus_one)
                    gradient[some] = scores.neg_().to(weight.dtype) @ weight
            if gradient is not None:
                ctx.save_for_backward(gradient)
            ctx.temperature = temperature
            ctx.mark_non_differentiable(entropy)
            return found, entropy

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
            (by_hidden,) = ctx.saved_tensors
            return (gradients[0][:, None] / ctx.temperature * by_hidden).to(by_hidden.dtype), None, None, None, None

    return LogProbability
