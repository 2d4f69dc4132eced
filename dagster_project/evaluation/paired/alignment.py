"""Effect of alignment: preference accuracy on held-out pairs, and the answers to held-out prompts before and after.

Reward hacking is visible in the answers: the reward rises together with length, repetition or unfinished answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from dagster_project.core.messages import Message, conversation_text
from dagster_project.core.rendering import end_ids
from dagster_project.evaluation.paired.bootstrap import difference, independent, rate, rounded, summed, unit, wilson
from dagster_project.training.inference.answers import read_parts
from dagster_project.training.inference.generate import generate_ids
from dagster_project.training.inference.likelihood import negative_log_likelihood
from dagster_project.training.tokens.preference_pairs import both, labelled, prompt_ids, reply
from dagster_project.training.trainers.alignment.reward_model import RewardModel, distinct, judged_text

if TYPE_CHECKING:
    import pyarrow as pa

LONGER = 1.5
"""Increase of the answers' length, as a factor, that counts as a sign of reward hacking."""
WORSE = 0.1
"""Increase of the share of repeated or unfinished answers that counts as a sign."""


@cache
def sample_schema() -> pa.Schema:
    """One held-out prompt and the answers to it."""
    import pyarrow as pa

    columns = [("example_id", pa.string()), ("prompt", pa.string())]  # of the pair, and its last message
    for who in ("sft", "aligned"):
        columns += [
            (f"{who}_answer", pa.string()),
            (f"{who}_reward", pa.float64()),  # of the reward model
            (f"{who}_tokens", pa.int64()),
            (f"{who}_distinct", pa.float64()),  # share of runs of three words that are not repeated
            (f"{who}_unfinished", pa.bool_()),  # cut off, or empty
        ]
    return pa.schema(columns)


def paired(before: Sequence[float], after: Sequence[float], units: Sequence[str]) -> dict[str, Any]:
    """Means of two systems over the same examples, and their difference with a paired 95 % interval.

    Args:
        units: unit of each example, as `summed` takes them.
    """
    import numpy as np

    ones = np.ones(len(units))
    ours, theirs = (summed(np.stack([np.asarray(values, float), ones], 1), units) for values in (after, before))
    means = {"sft": rounded(rate(theirs.sum(0))), "aligned": rounded(rate(ours.sum(0)))}
    return {**means, **difference(rate, ours, theirs)}


def _share(right: Sequence[float], units: Sequence[str]) -> dict[str, Any]:
    """A share of trials with ties as one half, and its 95 % score interval, in which those of a unit count as one."""
    share = float(sum(right)) / len(right)
    return {"value": rounded(share), "interval": [rounded(bound) for bound in wilson(share, independent(units))]}


class PolicyAnswer(NamedTuple):
    """A generated answer."""

    message: Message
    text: str
    """Its readable form: trace, content and calls."""
    prompt: list[int]
    """Token ids of its prompt."""
    ids: list[int]
    """Its token ids without the end-of-turn token."""
    ended: bool = True
    """Whether it was generated with an end-of-turn token, and not cut off."""


class Policies:
    """The policy and, with its adapter disabled, the SFT model."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        """
        Args:
            model: a PeftModel in evaluation mode.
        """
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size

    def _as(self, who: str) -> AbstractContextManager[Any]:
        from contextlib import nullcontext

        return self.model.disable_adapter() if who == "sft" else nullcontext()

    def log_probabilities(
        self, who: str, examples: Sequence[tuple[Sequence[int], Sequence[int]]], what: str
    ) -> list[tuple[float, int]]:
        """(log-probability in nats, tokens) of each answer."""
        causal, pad = self.model.get_base_model(), self.tokenizer.pad_token_id
        with self._as(who):
            labels = [labelled(*example) for example in examples]
            found = negative_log_likelihood(causal, pad, labels, self.batch_size, what)
        return [(-nats, tokens) for nats, tokens in found]

    def answer(
        self, who: str, pairs: Sequence[Mapping[str, Any]], max_new_tokens: int, what: str
    ) -> list[PolicyAnswer]:
        """Greedy answers to the prompts of pairs. Prompts longer than the context are truncated at the beginning."""
        room = max(1, self.tokenizer.model_max_length - max_new_tokens)
        prompts = [prompt_ids(self.tokenizer, pair)[-room:] for pair in pairs]
        causal = self.model.get_base_model()
        with self._as(who):
            generated = generate_ids(causal, self.tokenizer, prompts, max_new_tokens, self.batch_size, what)
        return [self._read(pair, prompt, ids) for pair, prompt, ids in zip(pairs, prompts, generated, strict=True)]

    def _read(self, pair: Mapping[str, Any], prompt: list[int], ids: list[int]) -> PolicyAnswer:
        ends = end_ids(self.tokenizer)
        ended = bool(ids) and ids[-1] in ends
        if parts := read_parts(self.tokenizer, prompt, ids, pair.get("tools")):
            plain = [token for token in ids if token not in ends]
            return PolicyAnswer(parts.message, conversation_text([parts.message]), prompt, plain, ended)
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return PolicyAnswer(reply(text)[0], text, prompt, self.tokenizer.encode(text, add_special_tokens=False), ended)

    def divergence(self, examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
        """KL(policy || SFT) in nats per token, over all next tokens at each position of the answers."""
        import torch

        total, places = 0.0, 0
        causal = self.model.get_base_model()
        with torch.inference_mode():
            for prompt, whole in examples:
                room = max(0, self.tokenizer.model_max_length - len(prompt))
                answer = whole[:room]  # read again, a text can have more tokens
                ids = torch.tensor([[*prompt, *answer]], device=self.model.device)
                logs = []
                for who in ("aligned", "sft"):
                    with self._as(who):
                        logits = causal(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits
                    logs.append(logits[0, :-1].float().log_softmax(-1))
                total += float((logs[0].exp() * (logs[0] - logs[1])).sum())
                places += len(answer)
        return total / max(1, places)


def _right(chosen: Any, rejected: Any) -> Any:
    """1 where the first value is higher, one half where both are equal."""
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def preference(policies: Policies, pairs: Sequence[Mapping[str, Any]], has_reference: bool = True) -> dict[str, Any]:
    """How often the chosen answers of held-out pairs are preferred, before and after.

    The accuracy is the share of pairs in which the chosen answer is more likely per token. With a reference there is
    also the share in which the implicit reward is higher for it (arXiv 2305.18290, section 5).

    Args:
        has_reference: whether the log-ratio to the SFT model is the policy's implicit reward.
    """
    import numpy as np

    ids = both(policies.tokenizer, pairs)
    examples = [(prompt, answer) for prompt, *answers in ids for answer in answers]
    found, right = {}, {}
    for who in ("sft", "aligned"):
        found[who] = np.array(policies.log_probabilities(who, examples, f"held-out pairs, {who}"))
        right[who] = _right(*(found[who][:, 0] / found[who][:, 1]).reshape(-1, 2).T)
    chosen, rejected = (found["aligned"][:, 0] - found["sft"][:, 0]).reshape(-1, 2).T
    units = [unit(pair) for pair in pairs]
    interval = _share(right["aligned"], units)["interval"]
    accuracy = {**paired(right["sft"], right["aligned"], units), "aligned_interval": interval}
    return {
        "accuracy": accuracy,
        **({"implicit_reward_accuracy": _share(_right(chosen, rejected), units)} if has_reference else {}),
        "log_ratio": {"chosen": rounded(chosen.mean()), "rejected": rounded(rejected.mean())},
    }


def samples(
    policies: Policies, pairs: Sequence[Mapping[str, Any]], judge: RewardModel | None, max_new_tokens: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answers to held-out prompts before and after, rows of `sample_schema`; and their summary.

    Args:
        judge: None without a usable reward model: rewards are null, and the summary has neither `reward` nor
        `win_rate`.
    """
    rows = [{"example_id": pair["example_id"], "prompt": pair["prompt"][-1]["content"]} for pair in pairs]
    messages: dict[str, list[Message]] = {}
    rewards: dict[str, list[float]] = {}
    generated: list[tuple[list[int], list[int]]] = []
    for who in ("sft", "aligned"):
        answers = policies.answer(who, pairs, max_new_tokens, f"answers, {who}")
        messages[who] = [answer.message for answer in answers]
        if judge:
            rewards[who] = judge.of_answers(pairs, messages[who])
        for row, answer, value in zip(rows, answers, rewards.get(who, [None] * len(answers)), strict=True):
            row |= {
                f"{who}_answer": answer.text,
                f"{who}_reward": None if value is None else rounded(value),
                f"{who}_tokens": len(answer.ids),
                f"{who}_distinct": rounded(distinct(judged_text(answer.message))),
                f"{who}_unfinished": not answer.ids or not answer.ended,
            }
        if who == "aligned":
            generated = [(answer.prompt, answer.ids) for answer in answers if answer.ids]

    units = [unit(pair) for pair in pairs]
    summary: dict[str, Any] = {}
    for name in (*(["reward"] if judge else []), "tokens", "distinct", "unfinished"):
        before, after = ([float(row[f"{who}_{name}"]) for row in rows] for who in ("sft", "aligned"))
        summary[name] = paired(before, after, units)
    if judge:
        # the reward of the same answer can differ in rounding, because its batch has other padding
        equal = [ours == theirs for ours, theirs in zip(messages["aligned"], messages["sft"], strict=True)]
        both = zip(rewards["aligned"], rewards["sft"], equal, strict=True)
        summary["win_rate"] = _share([0.5 if same else _right(ours, theirs) for ours, theirs, same in both], units)
    return rows, {**summary, "kl_per_token": rounded(policies.divergence(generated)), "prompts": len(rows)}


def gamed(watch: Mapping[str, Any]) -> list[str]:
    """Signs of reward hacking, as text: the reward rose, but the answers became longer, more repetitive or unfinished.

    Without measured rewards, such changes of the answers are always listed.
    """
    tokens = watch["tokens"]
    signs: list[str] = []
    if "reward" in watch and watch["reward"]["difference"] <= 0:
        return signs
    if tokens["aligned"] > LONGER * max(1, tokens["sft"]):
        signs.append(f"answers grew from {tokens['sft']:.0f} to {tokens['aligned']:.0f} tokens")
    if watch["distinct"]["difference"] < -WORSE:
        signs.append(
            f"the share of runs of words that are not repeated fell from {watch['distinct']['sft']:.2f} to"
            f" {watch['distinct']['aligned']:.2f}"
        )
    if watch["unfinished"]["difference"] > WORSE:
        signs.append(
            f"unfinished answers went from {watch['unfinished']['sft']:.0%} to {watch['unfinished']['aligned']:.0%}"
        )
    return signs
