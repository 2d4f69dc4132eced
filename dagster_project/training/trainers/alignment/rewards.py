"""Rewards of online methods: a weighted sum of a reward model, rules, ready-made rewards and functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.messages import Message
from dagster_project.training.trainers.alignment.ready_rewards import READY, ReadyReward, parse_ready
from dagster_project.training.trainers.alignment.reward_functions import FOLDER, RewardFunction, is_function
from dagster_project.training.trainers.alignment.reward_functions import check as check_function
from dagster_project.training.trainers.alignment.reward_model import MODEL, RULES, RewardModel, judged_text
from dagster_project.training.trainers.harness.sharding import in_step

Entry = float | dict[str, Any]
"""Of a reward in params.yaml: its weight or, for a ready-made one, a mapping of its options."""


def check(rewards: Mapping[str, Entry], where: str, root: Path) -> None:
    """Raise InputError if a reward is unknown or has wrong options, or there is none."""
    functions = {name for name in rewards if is_function(name)}
    known = [MODEL, *RULES, *READY]
    unknown = sorted(rewards.keys() - {*known} - functions)
    close = [near for name in unknown for near in get_close_matches(name, known, 1)]
    guess = f"did you mean {close[0]}? " if close else ""
    own = f"your own function, {FOLDER}/FILE.py:FUNCTION"
    hint = f"{guess}rewards, each with its weight: {', '.join(known)}, or {own}"
    if unknown:
        raise InputError(f"params.yaml: {where}: unknown: {', '.join(unknown)}", hint)
    if mapped := sorted(name for name, entry in rewards.items() if isinstance(entry, Mapping) and name not in READY):
        problem = f"params.yaml: {where}.{mapped[0]}: it has no options"
        raise InputError(problem, f"write its weight: {{{mapped[0]}: 1.0}}")
    for name in sorted(functions):
        check_function(root, name, where)
    ready(rewards, where, root)
    if not any(weights_of(rewards).values()):
        raise InputError(f"params.yaml: {where}: there is no reward", hint)


def weights_of(rewards: Mapping[str, Entry]) -> dict[str, float]:
    """Name -> weight, by name: to DVC a mapping with its keys in another order is the same value, and sums are not."""

    def weight(entry: Entry) -> float:
        return float(entry.get("weight", 1.0)) if isinstance(entry, Mapping) else entry

    return {name: weight(entry) for name, entry in sorted(rewards.items())}


def ready(rewards: Mapping[str, Entry], where: str, root: Path) -> dict[str, ReadyReward]:
    """The ready-made ones among rewards that have a weight.

    Raises:
        InputError: an option is unknown, missing or wrong.
    """
    parsed = {name: parse_ready(name, entry, where, root) for name, entry in rewards.items() if name in READY}
    return {name: reward for name, reward in parsed.items() if reward.weight}


def reads_files(rewards: Mapping[str, Entry]) -> bool:
    """Whether a reward is made from files in `FOLDER`."""
    return any(is_function(name) or (isinstance(entry, Mapping) and "file" in entry) for name, entry in rewards.items())


class Rewards:
    """A weighted sum of a reward model, rules, ready-made rewards, and functions of the project."""

    def __init__(
        self,
        rewards: Mapping[str, Entry],
        model: RewardModel | None,
        functions: Sequence[RewardFunction] = (),
        root: Path = Path(),
        where: str = "aligned",
    ) -> None:
        """
        Args:
            rewards: as in an entry of params.yaml. Those with weight 0 are left out.
            model: required if they name it.
            functions: those that they name.
            root: of the project, for files that they name.
            where: dotted path of the entry in params.yaml, for messages.
        """
        self.weights, self.model = {name: weight for name, weight in weights_of(rewards).items() if weight}, model
        self.functions = {function.name: function for function in functions}
        self.ready = ready(rewards, where, root)

    def components(
        self, pairs: Sequence[Mapping[str, Any]], answers: Sequence[Message], alone: bool = False
    ) -> dict[str, list[float]]:
        """Name of a reward -> its value for each generated answer to the prompts of these pairs, without its weight.

        Answers are messages of the assistant.

        Args:
            alone: no other process scores answers at the same time.
        """
        found = {}
        both = list(zip(pairs, answers, strict=True))
        for name in self.weights:
            if name == MODEL:
                assert self.model
                score = partial(self.model.of_answers, pairs, answers)
                found[name] = score() if alone else in_step([self.model.shared], score)
            elif name in self.functions:
                prompts, texts = [pair["prompt"] for pair in pairs], [judged_text(answer) for answer in answers]
                records = [{**pair, "answer": answer} for pair, answer in both]
                found[name] = self.functions[name](prompts, texts, records)
            elif name in self.ready:
                found[name] = [self.ready[name].score(answer, pair) for pair, answer in both]
            else:
                found[name] = [RULES[name](judged_text(answer)) for answer in answers]
        return found

    def __call__(
        self, pairs: Sequence[Mapping[str, Any]], answers: Sequence[Message]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The reward of each answer, and its components."""
        components = self.components(pairs, answers)
        return self.total(components), components

    def total(self, components: Mapping[str, Sequence[float]]) -> list[float]:
        """The reward of each answer: the weighted sum of its components."""
        total = [0.0] * len(next(iter(components.values()), ()))
        for name, weight in self.weights.items():
            total = [so_far + weight * value for so_far, value in zip(total, components[name], strict=True)]
        return total
