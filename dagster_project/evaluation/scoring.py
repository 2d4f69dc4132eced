"""Scores of a system's answers to the questions.

Text measures cover references with text, call measures those with tool calls, and final answers those with one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

from dagster_project.core.messages import Tools
from dagster_project.evaluation.final_answers import FinalAnswer
from dagster_project.evaluation.labels import LabelSet
from dagster_project.evaluation.metrics import (
    OF_FINAL_ANSWERS,
    AnyTask,
    Measure,
    Task,
    by_label,
    is_answer,
    measures,
)
from dagster_project.evaluation.paired.bootstrap import estimate, rate, summed, unit
from dagster_project.evaluation.tool_calls import is_valid, same_calls, same_names
from dagster_project.training.inference.answers import Answer, of_message

if TYPE_CHECKING:
    import numpy as np

ALL_MARKS = "score"
"""Name of the mean mark where some references are text and others are calls."""

Same = Callable[[Answer, Answer, Any], bool]
CALLS: dict[str, Same] = {
    "tool_arguments_exact": lambda reference, answer, _: same_calls(reference, answer),
    "tool_name_accuracy": lambda reference, answer, _: same_names(reference, answer),
    "tool_call_valid": lambda _, answer, tools: is_valid(answer, tools),
}
"""Measures over the questions whose reference has calls. The first one decides if at least half of the questions are
such, unless labels are the task."""
FALSE_CALL = "false_call"
"""Share of answers with a call, over the questions that offer tools and whose reference has no call."""


class Offer(NamedTuple):
    """What the model gets with a prompt."""

    tools: Tools = None
    reasoning: bool = False
    """Whether the reference has a trace, so that the chat template may open one."""


class Scoring:
    """The questions and the measures that apply to each."""

    def __init__(
        self, questions: Sequence[Mapping[str, Any]], task: AnyTask | None, custom: Mapping[str, Measure]
    ) -> None:
        self.task, self.custom = task, custom
        self.references = [of_message(question["messages"][-1]) for question in questions]
        self.offers = [
            Offer(question.get("tools"), bool(reference.reasoning))
            for question, reference in zip(questions, self.references, strict=True)
        ]
        self.examples = [question["example_id"] for question in questions]
        self.units = [unit(question) for question in questions]
        self.with_calls = [bool(reference.calls) for reference in self.references]
        self.with_text = [bool(reference.content) or not reference.calls for reference in self.references]
        self.with_answer = [
            text and (not isinstance(task, FinalAnswer) or is_answer(task, reference.content))
            for text, reference in zip(self.with_text, self.references, strict=True)
        ]
        tools_and_calls = zip(self.offers, self.with_calls, strict=True)
        self.could_call = [bool(offer.tools) and not calls for offer, calls in tools_and_calls]

    def names(self, writes: bool = True) -> dict[str, bool]:
        """Measure -> whether it is paired. The first one is deciding, the second one is shown next to it.

        Args:
            writes: False for a classifier, which generates no text.
        """
        text = {name: measure.paired for name, measure in self._text(writes).items()}
        if self.references:
            text = {name: paired for name, paired in text.items() if any(self._covered(name))}
        called = dict.fromkeys(CALLS, True) if any(self.with_calls) and writes else {}
        false = {FALSE_CALL: True} if any(self.could_call) and writes else {}
        return {**called, **text, **false} if self.calls_decide else {**text, **called, **false}

    @property
    def _names_labels(self) -> bool:
        return isinstance(self.task, Task | LabelSet)

    @cached_property
    def calls_decide(self) -> bool:
        """Whether calls decide. Under a task with labels they do not: every reference has a label, and the classical
        classifier makes no calls."""
        if self._names_labels:
            return False
        return bool(self.references) and 2 * sum(self.with_calls) >= len(self.references)

    def statistics(self, name: str, answers: Sequence[Answer], writes: bool = True) -> np.ndarray:
        """Contribution of each example that a measure covers to its sums, (examples, k).

        The turns of one example, and near-copies, are added up, because they are not independent. A bootstrap sample of
        other examples alone would have the score 0.
        """
        return summed(self.values(name, answers, writes), list(compress(self.units, self._covered(name))))

    def values(self, name: str, answers: Sequence[Answer], writes: bool = True) -> np.ndarray:
        """Contribution of each question that a measure covers, (questions, k)."""
        return self._by_question(name, answers, writes)[self._covered(name)]

    def _covered(self, name: str) -> list[bool]:
        """Whether a measure covers each question."""
        if name in OF_FINAL_ANSWERS:
            return self.with_answer
        if name in CALLS:
            return self.with_calls
        return self.could_call if name == FALSE_CALL else self.with_text

    def examples_of(self, name: str) -> int:
        """Number of test examples that a measure covers; near-copies count once."""
        return len(set(compress(self.units, self._covered(name))))

    def questions_of(self, name: str) -> int:
        """Number of questions that a measure covers."""
        return sum(self._covered(name))

    def _by_question(self, name: str, answers: Sequence[Answer], writes: bool) -> np.ndarray:
        import numpy as np

        if name in CALLS or name == FALSE_CALL:
            same: Same = CALLS.get(name, lambda _, answer, __: bool(answer.calls))
            parts = zip(self._covered(name), self.references, answers, self.offers, strict=True)
            shares = [(n and same(reference, answer, offer.tools), n) for n, reference, answer, offer in parts]
            return np.array(shares, dtype=float).reshape(-1, 2)
        found = self._text(writes)[name].statistics(self.texts(self.references), self.texts(answers))
        values = np.zeros((len(answers), found.shape[1]))
        values[np.flatnonzero(self.with_text)] = found
        return values

    def combine(self, name: str, writes: bool = True) -> Any:
        """Sums -> score of a measure."""
        return rate if name in CALLS or name == FALSE_CALL else self._text(writes)[name].combine

    def score(self, answers: Sequence[Answer], writes: bool = True) -> dict[str, Any]:
        """Every measure over all answers, each with its 95 % interval; for a label task also those of each label."""
        scores: dict[str, Any] = {"n": len(answers)}
        if any(self.with_calls):
            scores |= {"n_text": sum(self.with_text), "n_calls": sum(self.with_calls)}
        for name in self.names(writes):
            sums = self.statistics(name, answers, writes)
            scores[name], scores[f"{name}_interval"] = estimate(self.combine(name, writes), sums)
        return scores | by_label(self.task, self.texts(self.references), self.texts(answers))

    @property
    def mark_name(self) -> str:
        """What `marks` are."""
        if self._names_labels or not any(self.with_calls):
            return self._text_mark
        return ALL_MARKS if any(self.with_text) else next(iter(CALLS))

    @property
    def _text_mark(self) -> str:
        return "accuracy" if self.task else "rouge_l"

    def marks(self, answers: Sequence[Answer], writes: bool = True) -> list[float]:
        """A score from 0 to 1 for each answer: for a reference with calls whether they are equal, else `_text_mark`.

        Under a task with labels whether the label is right.
        """
        text = self._by_question(self._text_mark, answers, writes) if any(self.with_text) else None
        if self._names_labels and text is not None:
            return [float(mark[0]) for mark in text]
        called = self._by_question(next(iter(CALLS)), answers, writes)
        marks = zip(self.with_calls, called, called if text is None else text, strict=True)
        return [float(call[0] if calls else said[0]) for calls, call, said in marks]

    def texts(self, answers: Sequence[Answer]) -> list[str]:
        """Contents of the answers to questions with a reference text."""
        return [answer.content for answer in compress(answers, self.with_text)]

    def _text(self, writes: bool) -> dict[str, Measure]:
        return measures(self.task, self.custom, writes)


def mean_by_example(questions: Sequence[Mapping[str, Any]], marks: Sequence[float]) -> dict[str, float]:
    """example_id -> mean mark of its questions."""
    found: dict[str, list[float]] = {}
    for question, mark in zip(questions, marks, strict=True):
        found.setdefault(question["example_id"], []).append(mark)
    return {example: sum(values) / len(values) for example, values in found.items()}
