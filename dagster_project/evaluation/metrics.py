"""Answer format of a task, and the table of measures shared by evaluation, baselines and comparison."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from dagster_project.core.params import Section
from dagster_project.core.text import STRICT_JSON
from dagster_project.core.words import SPACED_MARKS, WITHOUT_SPACES
from dagster_project.evaluation.final_answers import FinalAnswer
from dagster_project.evaluation.labels import NO_LABEL, LabelSet, normalized, per_label
from dagster_project.evaluation.paired.bootstrap import Combine, estimate, rate, summed

if TYPE_CHECKING:
    import numpy as np

_UNSPACED = f"{WITHOUT_SPACES}\uac00-\ud7af"
"""Scripts without spaces between words, and Hangul, where particles follow a word without one."""
_MARKS = "".join(
    c for c in map(chr, chain(range(0xE00, 0x10A0), range(0x1780, 0x1800))) if unicodedata.category(c) in {"Mn", "Mc"}
)
r"""Vowel signs and tone marks of these scripts, which Python's \w lacks."""
_CHARACTER = rf"(?=[\w{_MARKS}])[{_UNSPACED}]"
_WORD = re.compile(rf"{_CHARACTER}|[^\W{_UNSPACED}]+(?:[{SPACED_MARKS}]+[^\W{_UNSPACED}]*)*")
TERM = rf"{_CHARACTER}|[^\W{_UNSPACED}]{{2,}}"
"""A term of TF-IDF: sklearn's word of two letters or more; in scripts without spaces, a character."""


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
        # macro-F1 would count it as often
        if repeated := [name for name, count in Counter(self.labels).items() if count > 1]:
            raise ValueError(f"fields: {self.score} lists {', '.join(map(repr, repeated))} more than once")
        if NO_LABEL in self.labels:
            raise ValueError(
                f"fields: {self.score}: {NO_LABEL!r} is reserved for answers without a label; choose another name"
            )
        return self

    @property
    def labels(self) -> list[str]:
        return self.fields[self.score]


def parse(answer: str) -> dict[str, Any] | None:
    """Parse an answer as a JSON object; None if it is not one."""
    try:
        value = STRICT_JSON.decode(answer)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def follows(task: Task, value: dict[str, Any] | None) -> bool:
    """Whether a value has exactly the task's fields, each with an allowed value."""
    if value is None or value.keys() != task.fields.keys():
        return False
    return all(
        isinstance(value[name], str) and (not allowed or value[name] in allowed)
        for name, allowed in task.fields.items()
    )


AnyTask = Task | LabelSet | FinalAnswer
"""How answers are scored: a JSON object with a label, a label, or a final answer."""


def is_answer(task: AnyTask, response: str) -> bool:
    """Whether a reference response is an answer to the task."""
    if isinstance(task, FinalAnswer):
        return task.extract(response) is not None
    if isinstance(task, LabelSet):
        return task.of_response(response) is not None
    return follows(task, parse(response))


def label(task: AnyTask, answer: str) -> str:
    """Label or final answer of an answer; NO_LABEL if there is none.

    For JSON tasks: the label field, whose case does not count if only one label fits, or else the first label mentioned
    anywhere: the longest one of several at the same place, and of those the one in the same case.

    The second rule serves models that were not tuned to the format: they are scored by content, not by format.
    """
    if isinstance(task, FinalAnswer):
        found = task.extract(answer)
        return NO_LABEL if found is None else found
    if isinstance(task, LabelSet):
        return task.of_answer(answer) or NO_LABEL
    given = (parse(answer) or {}).get(task.score)
    if given in task.labels:
        return str(given)
    if isinstance(given, str):
        same = [name for name in task.labels if name and normalized(name) == normalized(given)]
        if len(same) == 1:
            return same[0]
    mentions = {name: match for name in task.labels if name and (match := _mention(name).search(answer))}
    # "bug report", not "bug"; and of "Bug" and "bug" the one in the same case
    ranks = {name: (match.start(), -len(name), match.group() != name) for name, match in mentions.items()}
    return min(ranks, key=ranks.__getitem__, default=NO_LABEL)


def _mention(name: str) -> re.Pattern[str]:
    """A label between word boundaries, which scripts without spaces do not have."""
    before = "" if re.match(f"[{_UNSPACED}]", name) else rf"(?<![^\W{_UNSPACED}])(?<![{SPACED_MARKS}])"
    after = "" if re.match(f"[{_UNSPACED}]", name[-1]) else rf"(?![^\W{_UNSPACED}]|[{SPACED_MARKS}])"
    return re.compile(before + re.escape(name) + after, re.IGNORECASE)


OF_FINAL_ANSWERS = ("accuracy", "no_final_answer")
"""Measures of final answers. The text before a tool call has none to compare with."""


@dataclass(frozen=True)
class Measure:
    """A score of answers against references."""

    statistics: Callable[[Sequence[str], Sequence[str]], np.ndarray]
    """(references, answers) -> contribution of each example to the sums, (n, k)."""
    combine: Combine = rate
    paired: bool = False
    """Whether paired differences to baselines and between variants are computed."""


def measures(task: AnyTask | None, custom: Mapping[str, Measure], writes: bool = True) -> dict[str, Measure]:
    """Name -> measure, for all measures of a task. The first one is deciding, the second one is shown next to it.

    Args:
        task: None for free text.
        custom: user-defined measures, by dotted name.
        writes: False for a classifier, which predicts labels and generates no text.
    """
    exact = Measure(_mean_statistics(lambda expected, actual: expected.strip() == actual.strip()), paired=not task)
    rouge = Measure(_mean_statistics(rouge_l), paired=not task)
    text = {"bleu": _sacrebleu("BLEU"), "chrf": _sacrebleu("CHRF", paired=not task), **custom}
    if task is None:
        return {"rouge_l": rouge, "exact_match": exact, **text} if writes else {}
    accuracy = Measure(_mean_statistics(partial(_is_right, task)), paired=True)
    if isinstance(task, FinalAnswer):
        none = Measure(_mean_statistics(lambda _, actual: task.extract(actual) is None), paired=True)
        final = {"accuracy": accuracy, "no_final_answer": none, "exact_match": exact, "rouge_l": rouge, **text}
        return final if writes else {}
    macro = Measure(lambda expected, actual: _label_counts(task, expected, actual), macro_f1, paired=True)
    named = {"macro_f1": macro, "accuracy": accuracy}
    if not writes:
        return named
    if isinstance(task, LabelSet):
        valid = Measure(_mean_statistics(lambda _, actual: label(task, actual) != NO_LABEL))
        return {**named, "valid_label": valid, "exact_match": exact, **custom}
    fields: dict[str, Measure] = {}
    for name, allowed in task.fields.items():
        if allowed:
            fields[f"{name}.accuracy"] = Measure(_field(name, lambda expected, actual: (expected == actual, 1)))
            fields[f"{name}.precision"] = Measure(_field(name, partial(_precision_counts, allowed)))
        else:
            fields[f"{name}.token_f1"] = Measure(_field(name, _token_f1_counts))
    return {
        **named,
        "valid_json": Measure(_mean_statistics(lambda _, actual: parse(actual) is not None)),
        "follows_schema": Measure(_mean_statistics(lambda _, actual: follows(task, parse(actual)))),
        **fields,
        "exact_match": exact,
        "rouge_l": rouge,
        **text,
    }


def _is_right(task: AnyTask, expected: str, actual: str) -> bool:
    """Whether an answer has the label or final answer of the reference. An answer without one is wrong, also where the
    final answer of the reference is the text "(none)"."""
    if isinstance(task, FinalAnswer) and task.extract(actual) is None:
        return False
    return label(task, expected) == label(task, actual)


def score(table: Mapping[str, Measure], references: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Every measure over all answers, each with its 95 % interval."""
    scores: dict[str, Any] = {"n": len(answers)}
    for name, measure in table.items():
        scores[name], scores[f"{name}_interval"] = estimate(measure.combine, measure.statistics(references, answers))
    return scores


def by_label(task: AnyTask | None, references: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Metrics of each label for a label task; empty for other tasks."""
    if not isinstance(task, LabelSet):
        return {}
    return {"by_label": per_label(task, _label_counts(task, references, answers).sum(0).tolist())}


def perplexity(sums: np.ndarray) -> np.ndarray:
    """exp of the mean negative log-likelihood per token, from sums of (nats, tokens): (..., 2) -> (...)."""
    import numpy as np

    return np.exp(rate(sums))


def perplexity_interval(scores: Sequence[tuple[float, int]], units: Sequence[str]) -> dict[str, Any]:
    """Perplexity with its 95 % interval, from the (nats, tokens) of each answer; empty if none has a token.

    Answers without tokens, whose prompts alone fill the context, do not count:
    a sample of them would have perplexity exp(0) = 1.

    Args:
        units: unit of each answer, as `summed` takes them.
    """
    import numpy as np

    counted = [(score, unit) for score, unit in zip(scores, units, strict=True) if score[1]]
    if not counted:
        return {}
    sums = np.array([score for score, _ in counted], dtype=float)
    if unknown := int((~np.isfinite(sums[:, 0])).sum()):
        why = f"the likelihood of {unknown} of {len(counted)} test answers is not a finite number"
        return {"perplexity": None, "perplexity_unknown": why}
    value, interval = estimate(perplexity, summed(sums, [unit for _, unit in counted]))
    return {"perplexity": value, "perplexity_interval": interval}


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur as true or predicted; other classes are ignored.

    Args:
        sums: how often each class is true, predicted, and both, (..., 3 * classes).
    Returns:
        (...,)
    """
    import numpy as np

    true, predicted, hit = np.split(sums, 3, axis=-1)
    named = true + predicted
    f1 = np.divide(2 * hit, named, out=np.zeros(hit.shape), where=named > 0)
    return f1.sum(-1) / np.maximum((named > 0).sum(-1), 1)


def _label_counts(task: Task | LabelSet, references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """One-hot true class, predicted class (zeros for NO_LABEL) and their agreement per example, (n, 3 * classes)."""
    import numpy as np

    def one_hot(texts: Sequence[str]) -> np.ndarray:
        labels = [label(task, text) for text in texts]
        return np.array([[given == name for name in task.labels] for given in labels]).reshape(-1, len(task.labels))

    true, predicted = one_hot(references), one_hot(answers)
    return np.concatenate([true, predicted, true & predicted], axis=1).astype(float)


def rouge_l(reference: str, answer: str) -> float:
    """F1 of the longest common subsequence of `words` (ROUGE-L; Lin 2004, section 3).

    Of texts without words, such as emoji: whether they are equal.
    """
    reference_words, answer_words = words(reference), words(answer)
    bits: dict[str, int] = {}
    for i, word in enumerate(reference_words):
        bits[word] = bits.get(word, 0) | 1 << i
    # one bit per reference word; bits that end a longer subsequence become 0 (Hyyrö 2004)
    row = full = (1 << len(reference_words)) - 1
    for word in answer_words:
        row = ((row + (row & bits.get(word, 0))) | (row & ~bits.get(word, 0))) & full
    shared = len(reference_words) - row.bit_count()
    return _f1(shared, len(reference_words) + len(answer_words), reference.strip() == answer.strip())


def token_f1(reference: Any, answer: Any) -> float:
    """F1 of the shared words in any order (as in SQuAD); of texts without words, whether they are equal."""
    reference, answer = str(reference).strip(), str(answer).strip()
    reference_words, answer_words = words(reference), words(answer)
    shared = (Counter(reference_words) & Counter(answer_words)).total()
    return _f1(shared, len(reference_words) + len(answer_words), reference == answer)


def _precision_counts(allowed: Sequence[str], expected: Any, actual: Any) -> tuple[bool, bool]:
    return expected == actual, actual in allowed


def _token_f1_counts(expected: Any, actual: Any) -> tuple[float, int]:
    """An answer without the field is wrong, also where the reference leaves it empty."""
    return 0.0 if actual is None else token_f1(expected, actual), 1


def words(text: str) -> list[str]:
    """Words in lower case without punctuation; in scripts without spaces between words, each character.

    A letter with its accents is one character where Unicode has it.
    """
    return _WORD.findall(unicodedata.normalize("NFC", text.lower()))


def _f1(shared: int, total: int, equal: bool) -> float:
    return 2 * shared / total if total else float(equal)


def _mean_statistics(value: Callable[[str, str], float]) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    """Statistics for the mean of value(reference, answer) over the examples."""

    def statistics(references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        import numpy as np

        pairs = zip(references, answers, strict=True)
        return np.array([(value(reference, answer), 1) for reference, answer in pairs], dtype=float).reshape(-1, 2)

    return statistics


def _field(
    name: str, value: Callable[[Any, Any], tuple[float, float]]
) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    """Statistics for a rate over the values of a JSON field in reference and answer (None if missing)."""

    def statistics(references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        import numpy as np

        pairs = [[(parse(text) or {}).get(name) for text in pair] for pair in zip(references, answers, strict=True)]
        return np.array([value(expected, actual) for expected, actual in pairs], dtype=float).reshape(-1, 2)

    return statistics


def _sacrebleu(name: str, paired: bool = False) -> Measure:
    """A corpus score of sacrebleu with its default settings, 0 to 100, but for the tokenizer of scripts without spaces.

    Summing sentence statistics is also how sacrebleu bootstraps.
    """

    def metric(**settings: str) -> Any:
        from sacrebleu import metrics

        return getattr(metrics, name)(**settings)

    def statistics(references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        import numpy as np

        of = metric(tokenize=_tokenizer(references)) if name == "BLEU" else metric()
        return np.array(of._extract_corpus_statistics(list(answers), [list(references)]), dtype=float)

    def combine(sums: np.ndarray) -> np.ndarray:
        import numpy as np

        of = metric()
        return np.apply_along_axis(lambda total: of._compute_score_from_stats(total.tolist()).score, -1, sums)

    return Measure(statistics, combine, paired)


def _tokenizer(texts: Sequence[str]) -> str:
    """sacrebleu's tokenizer for BLEU: its default, 13a, unless most words are of scripts without spaces.

    In these a whole sentence would be one token: zh for Chinese, and char for the others. Japanese has syllables
    between its Chinese characters.
    """
    found = [word for text in texts for word in words(text)]
    unspaced = [word for word in found if re.match(f"[{WITHOUT_SPACES}]", word)]
    if 2 * len(unspaced) <= len(found):
        return "13a"
    chinese = sum("\u3400" <= word <= "\u9fff" for word in unspaced)
    return "zh" if 10 * chinese >= 9 * len(unspaced) else "char"
