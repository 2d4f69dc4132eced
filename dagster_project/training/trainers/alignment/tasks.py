"""splits -> tasks: prompts of instruction records, each with its response as the target of rewards.

A task has the form of a preference pair without a rejected answer: its `chosen` answer is the response. Training uses
those of the training split; answers are measured before and after on those of the validation split, so that the test
split stays unseen until `evaluation`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.messages import Message, is_plain
from dagster_project.core.records import read_records
from dagster_project.training.tokens.preference_pairs import answered
from dagster_project.training.trainers.alignment.ready_rewards import ReadyReward
from dagster_project.training.trainers.alignment.rewards import Rewards

RESPONSE = "response"
"""Value of `reward_target` in an entry of `aligned`."""
SPLITS = {"train": "train", "test": "validation"}
"""Use of tasks, named as the splits of pairs are -> split of the records."""

Task = dict[str, Any]


def tasks_of(splits: Path, rewards: Mapping[str, ReadyReward]) -> tuple[dict[str, list[Task]], dict[str, Any]]:
    """Tasks by use, and counts by split for the report.

    Args:
        splits: folder with a folder for each split that is used.
        rewards: the ready-made ones, whose targets a record must have.
    Returns:
        The counts say how many records there are, how many are used, and why others are left out.
    """
    tasks: dict[str, list[Task]] = {"validation": []}
    counts: dict[str, Any] = {}
    for use, split in SPLITS.items():
        records = read_records(splits / split)
        reasons = [_unusable(record, rewards) for record in records]
        tasks[use] = [_task(record) for record, reason in zip(records, reasons, strict=True) if not reason]
        counts[split] = {"records": len(records), "used": len(tasks[use])}
        if left_out := Counter(filter(None, reasons)):
            counts[split]["left_out"] = dict(sorted(left_out.items()))
    return tasks, counts


def _task(record: Mapping[str, Any]) -> Task:
    *prompt, response = record["messages"]
    known = {name: record.get(name) for name in ("example_id", "tools", "category", "group_id", "meta")}
    return {**known, "prompt": prompt, "chosen": [response]}


def _unusable(record: Mapping[str, Any], rewards: Mapping[str, ReadyReward]) -> str:
    """Why a record cannot be a task; empty if it can."""
    *prompt, response = record["messages"]
    if not prompt or response["role"] != "assistant":
        return "no prompt and answer"
    if response.get("weight") == 0:
        return "weight 0"
    task = _task(record)
    return next((f"no target of {name}" for name, reward in rewards.items() if not reward.has_target(task)), "")


def refuse_without_tasks(counts: Mapping[str, Any], where: str) -> None:
    """Raise InputError if a split has no task."""
    more = {
        "train": "add records to raw_examples.sources",
        "test": "raise splits.validation, whose records are measured before and after",
    }
    for use, split in SPLITS.items():
        if counts[split]["used"]:
            continue
        left_out = ", ".join(f"{reason} {n}" for reason, n in counts[split].get("left_out", {}).items())
        problem = f"of {counts[split]['records']} records of the {split} split none is a task"
        problem += f"; left out: {left_out}" if left_out else ""
        hint = f"choose rewards whose targets the records have, or {more[use]}"
        raise InputError(f"params.yaml: {where}.reward_target: {problem}", hint)


def refuse_misfits(tokenizer: Any, tasks: Mapping[str, Sequence[Task]], model: str) -> None:
    """Check that the chat template writes the tools, calls and traces of all tasks, before anything is trained.

    Raises:
        InputError: it does not.
    """
    for use, split in SPLITS.items():
        for task in tasks[use]:
            if not task["tools"] and is_plain([*task["prompt"], *task["chosen"]]):
                continue
            try:
                answered(tokenizer, [[*task["prompt"], *task["chosen"]]], [task["tools"]])
            except InputError as error:
                what = f"data/splits: record {task['example_id']} ({split}) does not fit the chat template of {model}"
                raise InputError(f"{what}: {error.what}", error.hint) from None


class HeldOut:
    """Scores answers to held-out tasks by the rewards of the training, in the place of a reward model."""

    def __init__(self, rewards: Rewards) -> None:
        self.rewards = rewards
        self.components: list[dict[str, list[float]]] = []
        """Of each call: values of each reward, and of their weighted sum as `reward`."""

    def of_answers(self, tasks: Sequence[Task], answers: Sequence[Message]) -> list[float]:
        """The weighted sum for each answer."""
        components = self.rewards.components(tasks, answers, alone=True)
        total = self.rewards.total(components)
        self.components.append({"reward": total, **components})
        return total
