"""The answers that an online method or a distillation samples and learns from, with their rewards, if any.

They are a table in the variant's output, and part of each checkpoint.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, takewhile, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.messages import Message
from dagster_project.core.records import write_table
from dagster_project.training.trainers.alignment.reward_model import judged_text
from dagster_project.training.trainers.harness import distributed

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER = "answers"
"""In the output of a variant: answers-00000.parquet and so on."""
SHARD = 8192
"""Answers in a file."""
LONGEST = 10_000
"""Characters that are kept of an answer, and of its trace."""

Row = dict[str, Any]


class SampledAnswers:
    """The answers so far, in the order in which they were sampled.

    Several processes that share a training all keep those of all.
    """

    def __init__(self, patience: int | None = None, by_record: bool = True, ends_count: bool = False) -> None:
        """
        Args:
            patience: steps in a row without anything to learn after which training stops; None: never.
            by_record: whether only answers to the same prompt are compared with each other.
            ends_count: whether the method also rewards an answer for its end.
        """
        self.patience, self.by_record, self.ends_count = patience, by_record, ends_count
        self.step = 1
        """The step that samples, from 1."""
        self.rows: list[Row] = []
        self._shared = 0  # rows that all processes have

    def add(
        self,
        records: Sequence[Mapping[str, Any]],
        answers: Sequence[Message],
        components: Mapping[str, Sequence[float]],
        rewards: Sequence[float | None],
        ids: Sequence[Sequence[int]],
        ends: frozenset[int],
    ) -> None:
        """Add answers of the current step.

        Args:
            records: the pair of each answer's prompt.
            components: name of a reward -> its value for each answer, without its weight.
            rewards: their weighted sums; None for answers that are not rewarded.
            ids: token ids of each answer.
            ends: token ids that end an answer.
        """
        for number, (record, answer, tokens) in enumerate(zip(records, answers, ids, strict=True)):
            trace = answer.get("reasoning_content")
            row = {
                "step": self.step,
                "example_id": record["example_id"],
                "answer": _kept(judged_text(answer)),
                "reasoning": _kept(trace) if isinstance(trace, str) and trace else None,
                "reward": rewards[number],
                **{name: values[number] for name, values in components.items()},
                "tokens": len(tokens),
                "unfinished": not tokens or tokens[-1] not in ends,
            }
            self.rows.append(row)

    def share(self) -> None:
        """Give each process the new answers of all, which took turns: first one of the first process, and so on."""
        parts = distributed.documents(self.rows[self._shared :])
        self.rows[self._shared :] = [row for turn in zip_longest(*parts) for row in turn if row is not None]
        self._shared = len(self.rows)

    def state(self) -> str:
        """For a checkpoint."""
        return json.dumps(self.rows)

    def restore(self, state: str) -> None:
        self.rows = json.loads(state)
        self._shared = len(self.rows)

    def steps(self) -> Iterator[tuple[int, list[Row]]]:
        """Each step with its answers."""
        return ((step, list(rows)) for step, rows in groupby(self.rows, lambda row: int(row["step"])))

    def teaches(self, rows: Sequence[Row]) -> bool:
        """Whether answers that are compared with each other have different rewards."""
        groups: dict[str, set[Any]] = defaultdict(set)
        for row in rows:
            group = row["example_id"] if self.by_record else ""
            groups[group].add((row["reward"], self.ends_count and row["unfinished"]))
        return any(len(rewards) > 1 for rewards in groups.values())

    def is_stalled(self) -> bool:
        """Whether none of the last `patience` steps taught something."""
        if self.patience is None:
            return False
        latest = (list(rows) for _, rows in groupby(reversed(self.rows), lambda row: int(row["step"])))
        return len(list(takewhile(lambda rows: not self.teaches(rows), latest))) >= self.patience

    def stalled_text(self) -> str:
        """Why training stopped, and what to change."""
        whose = "the answers to each prompt" if self.by_record else "all answers"
        steps = "step" if self.patience == 1 else f"{self.patience} steps"
        return (
            f"in the last {steps} {whose} had the same reward, so there was nothing to learn, and"
            " training stopped. The weights of this step are kept; fix the rewards, or raise constant_reward_steps if"
            " they are rare"
        )

    def ever_teaches(self) -> bool:
        return any(self.teaches(rows) for _, rows in self.steps())

    def constant(self, names: Sequence[str]) -> dict[str, float]:
        """Components that had the same value for all answers, and that value."""
        found = {name: {row[name] for row in self.rows} for name in names}
        return {name: next(iter(values)) for name, values in found.items() if len(values) == 1}

    def means(self, names: Sequence[str]) -> dict[int, dict[str, float]]:
        """Step -> means over its answers: of reward, length and unfinished ones by their names in curves, and of each
        component."""
        columns = {"reward": "reward", "response_length": "tokens", "unfinished": "unfinished"}
        columns |= {name: name for name in names}
        means = {}
        for step, rows in self.steps():
            means[step] = {name: sum(row[column] for row in rows) / len(rows) for name, column in columns.items()}
        return means

    def with_components(self, curve: Sequence[Mapping[str, float]], names: Sequence[str]) -> list[dict[str, float]]:
        """The points of a training's curve with the means of its answers, where the trainer gave none.

        A step that learns from the answers of an earlier one has their means.
        """
        means, known, points = self.means(names), dict[str, float](), []
        for point in curve:
            known = means.get(int(point["step"]), known)
            points.append({**known, **point} if "loss" in point else {**point})
        return points

    def summary(self) -> dict[str, Any]:
        """For the report: how many answers there are, and to how many records."""
        return {"answers": len(self.rows), "records": len({row["example_id"] for row in self.rows})}

    def write(self, folder: Path, names: Sequence[str]) -> None:
        """Write the table, as files of at most `SHARD` answers; the same answers give the same bytes.

        Args:
            names: of the components.
        """
        for number, start in enumerate(range(0, len(self.rows), SHARD)):
            write_table(folder / f"answers-{number:05}.parquet", self.rows[start : start + SHARD], schema(names))


def schema(names: Sequence[str]) -> pa.Schema:
    """A sampled answer.

    Args:
        names: of the components of its reward.
    """
    import pyarrow as pa

    columns = [
        ("step", pa.int64()),  # of the training, from 1; for ppo the iteration
        ("example_id", pa.string()),  # of the pair whose prompt it answers
        ("answer", pa.string()),  # as rules score it: content, and calls as JSON
        ("reasoning", pa.string()),  # its trace; null without one
        ("reward", pa.float64()),  # weighted sum of the components; null where answers are not rewarded
        *((name, pa.float64()) for name in names),  # without its weight
        ("tokens", pa.int64()),  # with the end of turn
        ("unfinished", pa.bool_()),  # without an end of turn
    ]
    return pa.schema(columns)


def _kept(text: str) -> str:
    """The first `LONGEST` characters.

    Parquet holds UTF-8, which has no unpaired surrogates; those of a call's JSON are written out.
    """
    return text[:LONGEST].encode("utf-8", "backslashreplace").decode()
