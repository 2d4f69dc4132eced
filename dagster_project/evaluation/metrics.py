"""What a right answer is, and the one table of measures that evaluation, baselines and comparison score answers by."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from dagster_project.core.params import Section
from dagster_project.evaluation.labels import NO_LABEL, LabelSet, per_label
from dagster_project.evaluation.paired.bootstrap import Combine, estimate

if TYPE_CHECKING:
    import numpy as np


class Task(Section):
    """What a right answer looks like: one JSON object with these fields."""

    fields: dict[str, list[str]] = Field(min_length=1)
    """Field -> allowed values. An empty list allows any text."""
    score: str
    """The field whose value is the label. It must be one of `fields` and list its values."""

    @model_validator(mode="after")
    def _labels_exist(self) -> Task:
        if not self.fields.get(self.score):
            raise ValueError(f"score: {self.score!r} must be one of `fields` and list its labels")
        return self

    @property
    def labels(self) -> list[str]:
        return self.fields[self.score]


def parse(answer: str) -> dict[str, Any] | None:
    """The JSON object an answer is, or None."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def follows(task: Task, value: dict[str, Any] | None) -> bool:
    """Does it have exactly the task's fields, each with an allowed value?"""
    return (
        value is not None
        and value.keys() == task.fields.keys()
        and all(isinstance(value[name], str) and (not allowed or value[name] in allowed) for name, allowed in task.fields.items())
    )


def is_answer(task: Task | LabelSet, response: str) -> bool:
    """Whether a reference response is an answer to the task."""
    return task.of_response(response) is not None if isinstance(task, LabelSet) else follows(task, parse(response))


def label(task: Task | LabelSet, answer: str) -> str:
    """The label an answer gives; NO_LABEL if none. Of JSON its field if it has one, else the first label it names in any way.

    The second rule is for models that were not tuned to the format: they are credited for what they say, not for how.
    """
    if isinstance(task, LabelSet):
        return task.of_answer(answer) or NO_LABEL
    value = parse(answer)
    if value is not None and value.get(task.score) in task.labels:
        return str(value[task.score])
    at = {name: match.start() for name in task.labels if (match := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", answer, re.IGNORECASE))}
    return min(at, key=at.__getitem__) if at else NO_LABEL


def rate(sums: np.ndarray) -> np.ndarray:
    """The first sum over the second, (..., 2) -> (...); 0 where there is nothing to count."""
    import numpy as np

    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0)


@dataclass(frozen=True)
class Measure:
    """A score of answers against references."""

    statistics: Callable[[Sequence[str], Sequence[str]], np.ndarray]
    """(references, answers) -> what each example adds to the sums, (n, k)."""
    combine: Combine = rate
    paired: bool = False
    """Is it tested in pairs, against every baseline and between variants?"""


def measures(task: Task | LabelSet | None, own: Mapping[str, Measure], writes: bool = True) -> dict[str, Measure]:
    """The table: name -> measure, of all that answers can be scored by. The first decides, and the second stands beside it.

    Args:
        task: None where answers are free text.
        own: a team's own measures, by dotted name.
        writes: False for a classifier, which names labels and writes nothing.
    """
    exact = Measure(_each(lambda wanted, said: wanted.strip() == said.strip()), paired=not task)
    rouge = Measure(_each(rouge_l), paired=not task)
    text = {"bleu": _sacrebleu("BLEU"), "chrf": _sacrebleu("CHRF", paired=not task), **own}
    if task is None:
        return {"rouge_l": rouge, "exact_match": exact, **text} if writes else {}
    named = {
        "macro_f1": Measure(lambda wanted, said: _label_counts(task, wanted, said), macro_f1, paired=True),
        "accuracy": Measure(_each(lambda wanted, said: label(task, wanted) == label(task, said)), paired=True),
    }
    if not writes:
        return named
    if isinstance(task, LabelSet):
        return {**named, "valid_label": Measure(_each(lambda _, said: label(task, said) != NO_LABEL)), "exact_match": exact, **own}
    fields: dict[str, Measure] = {}
    for name, allowed in task.fields.items():
        if allowed:
            fields[f"{name}.accuracy"] = Measure(_field(name, lambda wanted, said: (wanted == said, 1)))
            fields[f"{name}.precision"] = Measure(_field(name, partial(_right_where_given, allowed)))
        else:
            fields[f"{name}.token_f1"] = Measure(_field(name, lambda wanted, said: (token_f1(wanted, said or ""), 1)))
    return {
        **named,
        "valid_json": Measure(_each(lambda _, said: parse(said) is not None)),
        "follows_schema": Measure(_each(lambda _, said: follows(task, parse(said)))),
        **fields,
        "exact_match": exact,
        "rouge_l": rouge,
        **text,
    }


def score(table: Mapping[str, Measure], references: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Every measure over all answers, each with its 95 % interval."""
    found: dict[str, Any] = {"n": len(answers)}
    for name, measure in table.items():
        found[name], found[f"{name}_interval"] = estimate(measure.combine, measure.statistics(references, answers))
    return found


def by_label(task: Task | LabelSet | None, references: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Figures of each label, to stand beside the scores of a label task; nothing for any other."""
    if not isinstance(task, LabelSet):
        return {}
    return {"by_label": per_label(task, _label_counts(task, references, answers).sum(0).tolist())}


def perplexity(sums: np.ndarray) -> np.ndarray:
    """exp of the mean negative log-likelihood per token, every token counting the same; of sums of (nats, tokens), (..., 2) -> (...)."""
    import numpy as np

    return np.exp(rate(sums))


def perplexity_interval(scores: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Perplexity of answers of these (nats, tokens), with its 95 % interval."""
    import numpy as np

    value, interval = estimate(perplexity, np.array(scores, dtype=float))
    return {"perplexity": value, "perplexity_interval": interval}


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur in either; a class that occurs in neither does not count.

    Args:
        sums: how often each class is true, predicted, and both, (..., 3 classes).
    Returns: (...,)
    """
    import numpy as np

    true, predicted, hit = np.split(sums, 3, axis=-1)
    named = true + predicted
    f1 = np.divide(2 * hit, named, out=np.zeros(hit.shape), where=named > 0)
    return f1.sum(-1) / np.maximum((named > 0).sum(-1), 1)


def _label_counts(task: Task | LabelSet, references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Per example the class that is true, the one predicted (neither of them for NO_LABEL), and their agreement, one-hot, (n, 3 classes)."""
    import numpy as np

    true, predicted = (
        np.array([[said == name for name in task.labels] for said in (label(task, text) for text in texts)]).reshape(-1, len(task.labels))
        for texts in (references, answers)
    )
    return np.concatenate([true, predicted, true & predicted], axis=1).astype(float)


def rouge_l(reference: str, answer: str) -> float:
    """F1 of the longest common subsequence of words (ROUGE-L; Lin 2004, section 3), lower case, without punctuation."""
    wanted, said = words(reference), words(answer)
    at: dict[str, int] = {}
    for i, word in enumerate(wanted):
        at[word] = at.get(word, 0) | 1 << i
    row = full = (1 << len(wanted)) - 1  # a bit for each word of the reference; those that end a longer subsequence turn 0 (Hyyrö 2004)
    for word in said:
        row = ((row + (row & at.get(word, 0))) | (row & ~at.get(word, 0))) & full
    return _f1(len(wanted) - row.bit_count(), wanted, said)


def token_f1(reference: Any, answer: Any) -> float:
    """F1 of the words that both have, in any order (as SQuAD scores open answers)."""
    wanted, said = words(str(reference)), words(str(answer))
    return _f1((Counter(wanted) & Counter(said)).total(), wanted, said)


def _right_where_given(allowed: Sequence[str], wanted: Any, said: Any) -> tuple[bool, bool]:
    return wanted == said, said in allowed


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _f1(shared: int, wanted: list[str], said: list[str]) -> float:
    return 2 * shared / (len(wanted) + len(said)) if wanted or said else 1.0


def _each(value: Callable[[str, str], float]) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    """Statistics of a mean over the examples of value(reference, answer)."""

    def statistics(references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        import numpy as np

        return np.array([(value(wanted, said), 1) for wanted, said in zip(references, answers, strict=True)], dtype=float).reshape(-1, 2)

    return statistics


def _field(name: str, value: Callable[[Any, Any], tuple[float, float]]) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    """Statistics of a rate over the examples of what reference and answer have in a JSON field, None where there is none."""

    def statistics(references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        import numpy as np

        pairs = [[(parse(text) or {}).get(name) for text in pair] for pair in zip(references, answers, strict=True)]
        return np.array([value(wanted, said) for wanted, said in pairs], dtype=float).reshape(-1, 2)

    return statistics


def _sacrebleu(name: str, paired: bool = False) -> Measure:
    """A corpus score of sacrebleu with its default settings, 0 to 100. Sums of the sentences' statistics are how sacrebleu bootstraps, too."""

    def metric() -> Any:
        from sacrebleu import metrics

        return getattr(metrics, name)()

    def statistics(references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        import numpy as np

        return np.array(metric()._extract_corpus_statistics(list(answers), [list(references)]), dtype=float)

    def combine(sums: np.ndarray) -> np.ndarray:
        import numpy as np

        of = metric()
        return np.apply_along_axis(lambda total: of._compute_score_from_stats(total.tolist()).score, -1, sums)

    return Measure(statistics, combine, paired)
