"""Rewards of online methods: a weighted sum of a reward model, rules, and functions of the project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.messages import Message
from dagster_project.training.trainers.alignment.reward_functions import FOLDER, RewardFunction, is_function
from dagster_project.training.trainers.alignment.reward_functions import check as check_function
from dagster_project.training.trainers.alignment.reward_model import MODEL, RULES, RewardModel, judged_text
from dagster_project.training.trainers.harness.sharding import in_step


def check(rewards: Mapping[str, float], where: str, root: Path) -> None:
    """Raises: InputError: a reward is unknown, or there is none."""
    functions = {name for name in rewards if is_function(name)}
    unknown = sorted(rewards.keys() - RULES.keys() - {MODEL} - functions)
    if unknown or not any(rewards.values()):
        what = f"unknown: {', '.join(unknown)}" if unknown else "there is no reward"
        raise InputError(
            f"params.yaml: {where}: {what}",
            f"rewards, each with its weight: {', '.join([MODEL, *RULES])}, or your own function, {FOLDER}/FILE.py:FUNCTION",
        )
    for name in sorted(functions):
        check_function(root, name, where)


class Rewards:
    """A weighted sum of a reward model, rules, and functions of the project."""

    def __init__(self, weights: Mapping[str, float], model: RewardModel | None, functions: Sequence[RewardFunction] = ()) -> None:
        """Args:
        weights: name -> weight, as in an entry of params.yaml. Rewards with weight 0 are left out.
        model: required if they name it.
        functions: those that they name.
        """
        self.weights, self.model = {name: weight for name, weight in weights.items() if weight}, model
        self.functions = {function.name: function for function in functions}

    def __call__(self, pairs: Sequence[Mapping[str, Any]], answers: Sequence[Message]) -> list[float]:
        """The reward of generated answers, which are messages of the assistant, to the prompts of these pairs."""
        total = [0.0] * len(answers)
        for name, weight in self.weights.items():
            if name == MODEL:
                assert self.model
                found = in_step([self.model.shared], partial(self.model.of_answers, pairs, answers))
            elif name in self.functions:
                records = [{**pair, "answer": answer} for pair, answer in zip(pairs, answers, strict=True)]
                found = self.functions[name]([pair["prompt"] for pair in pairs], [judged_text(answer) for answer in answers], records)
            else:
                found = [RULES[name](judged_text(answer)) for answer in answers]
            total = [so_far + weight * value for so_far, value in zip(total, found, strict=True)]
        return total
