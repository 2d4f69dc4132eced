"""Held-out benchmarks in their published layouts -> questions, choices and correct answers."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dagster_project.core.errors import InputError
from dagster_project.curation.sources.files import Row, read_rows


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    place: str
    """ "<file>:<source row>"."""
    question: str
    choices: tuple[str, ...] = ()
    """Empty where the answer is free text."""
    answer: int | None = None
    """Index of the correct choice; None if there is no label (-1 in HellaSwag's test split) or no choices."""
    text: str = ""
    """The answer as text: the correct choice (all of them if there are several), or the free text."""
    subject: str = ""
    continues: bool = False
    """Whether the choices continue the text of the question, as in HellaSwag."""
    rubric: str = ""
    """Criterion of a correct answer if there is no reference: IFEval's instruction ids."""

    @property
    def row(self) -> int:
        return int(self.place.rpartition(":")[2])

    @property
    def prompt(self) -> str:
        """Prompt for a model, in the wording of lm-evaluation-harness for ARC, PIQA and `mmlu_continuation`."""
        return self.question if self.continues else f"Question: {self.question}\nAnswer:"

    @property
    def with_choices(self) -> str:
        return "\n".join([self.question, *self.choices])

    @property
    def labelled(self) -> bool:
        return bool(self.text or self.rubric)


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"`{key}`: expected text, found {type(row[key]).__name__}")
    return row[key]


def _texts(values: Any) -> tuple[str, ...]:
    values = _listed(values)
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(value, str) for value in values):
        raise ValueError("expected a list of two choices or more, each a text")
    return tuple(values)


_LITERAL = r"""(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")"""
_PYTHON_LIST = re.compile(rf"\[\s*{_LITERAL}(?:[\s,]+{_LITERAL})*\s*\]")


def _listed(value: Any) -> Any:
    """Parse a list of texts in a CSV cell, in JSON or as Python or NumPy print it; other values are unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    if not _PYTHON_LIST.fullmatch(value.strip()):
        return value
    try:
        return [ast.literal_eval(literal) for literal in re.findall(_LITERAL, value)]
    except (ValueError, SyntaxError):
        return value


def _index(label: Any, names: Sequence[str]) -> int | None:
    """Index of a label in the choices; None for no label (missing, "", -1).

    That is its place among their names ("C", or 3 of "1" to "4"), or else the number itself (2, "2").

    Raises:
        ValueError: there is no such choice.
    """
    if label is None or label in {"", -1, "-1"}:
        return None
    if str(label) in names:
        return names.index(str(label))
    is_number = isinstance(label, int | str) and not isinstance(label, bool) and str(label).isdecimal()
    if is_number and int(label) < len(names):
        return int(label)
    raise ValueError(f"the answer {label!r} is not one of the {len(names)} choices")


def _chosen(row: Mapping[str, Any], question: str, choices: tuple[str, ...], label: Any, names: Sequence[str]) -> Item:
    answer = _index(label, names)
    if answer is not None and answer >= len(choices):
        raise ValueError(f"the answer {label!r} is not one of the {len(choices)} choices")
    subjects = [row.get(key) for key in ("subject", "category", "activity_label")]
    subject = next((name for name in subjects if isinstance(name, str) and name), "")
    return Item("", question, choices, answer, "" if answer is None else choices[answer], subject)


def _letters(choices: Sequence[str]) -> list[str]:
    return list(string.ascii_uppercase[: len(choices)])


def _mmlu(row: Mapping[str, Any]) -> Item:
    choices = _texts(row["choices"])
    return _chosen(row, _text(row, "question"), choices, row.get("answer"), _letters(choices))


def _mmlu_columns(question: str, answer: str) -> Callable[[Mapping[str, Any]], Item]:
    """Reader of rows with choices in the columns A to D, as in MMLU's CSV files, C-Eval and CMMLU."""

    def item(row: Mapping[str, Any]) -> Item:
        choices = tuple(_text(row, letter) for letter in "ABCD")
        return _chosen(row, _text(row, question), choices, row.get(answer), _letters(choices))

    return item


def _mmlu_pro(row: Mapping[str, Any]) -> Item:
    choices = _texts(row["options"])
    return _chosen(row, _text(row, "question"), choices, row["answer_index"], _letters(choices))


def _agieval(row: Mapping[str, Any]) -> Item:
    """Read a question with or without a passage; it has one or several correct choices or, without `options`, text."""
    question = "\n\n".join(part for part in (row.get("passage"), _text(row, "question")) if part)
    label = _listed(row["label"])
    if not row["options"]:
        answer = row.get("answer")
        return Item("", question, text=answer if isinstance(answer, str) else "")
    choices = _unlettered(_texts(row["options"]))
    if not isinstance(label, list):
        return _chosen(row, question, choices, label, _letters(choices))
    correct = [index for letter in label if (index := _index(letter, _letters(choices))) is not None]
    text = "\n".join(choices[index] for index in correct)
    return Item("", question, choices, correct[0] if len(correct) == 1 else None, text)


def _unlettered(options: tuple[str, ...]) -> tuple[str, ...]:
    """("(A)2", "(B)4")  ->  ("2", "4")"""
    texts = []
    for letter, option in zip(_letters(options), options, strict=True):
        match = re.match(rf"\s*\({letter}\)\s*", option)
        if not match:
            return options
        texts.append(option[match.end() :])
    return tuple(texts)


def _ifeval(row: Mapping[str, Any]) -> Item:
    instructions = _listed(row["instruction_id_list"])
    if not isinstance(instructions, list) or not all(isinstance(name, str) for name in instructions):
        raise ValueError("`instruction_id_list`: expected a list of texts")
    return Item("", _text(row, "prompt"), rubric=", ".join(instructions))


def _arc(row: Mapping[str, Any]) -> Item:
    names = _texts(row["choices"]["label"])
    return _chosen(row, _text(row, "question"), _texts(row["choices"]["text"]), row.get("answerKey"), names)


def _hellaswag(row: Mapping[str, Any]) -> Item:
    endings = _texts(row["endings"])
    return replace(_chosen(row, _text(row, "ctx"), endings, row.get("label"), [""] * len(endings)), continues=True)


def _piqa(row: Mapping[str, Any]) -> Item:
    return _chosen(row, _text(row, "goal"), (_text(row, "sol1"), _text(row, "sol2")), row.get("label"), ["", ""])


def _gsm8k(row: Mapping[str, Any]) -> Item:
    answer = row.get("answer")
    return Item("", _text(row, "question"), text=answer if isinstance(answer, str) else "")


class Form(NamedTuple):
    """A published layout of a benchmark."""

    keys: frozenset[str]
    """Keys that a row must have."""
    item: Callable[[Mapping[str, Any]], Item]
    """Reader of a row. Raises KeyError, TypeError or ValueError for rows of another layout."""


def _form(keys: str, item: Callable[[Mapping[str, Any]], Item]) -> Form:
    return Form(frozenset(keys.split()), item)


BENCHMARKS: dict[str, tuple[Form, ...]] = {
    "arc": (_form("question choices answerKey", _arc),),
    "mmlu": (
        _form("question choices", _mmlu),
        _form("question A B C D", _mmlu_columns("question", "answer")),
        _form("Question A B C D", _mmlu_columns("Question", "Answer")),
    ),
    "mmlu_pro": (_form("question options answer_index", _mmlu_pro),),
    "agieval": (_form("question options label", _agieval),),
    "hellaswag": (_form("ctx endings", _hellaswag),),
    "piqa": (_form("goal sol1 sol2", _piqa),),
    "ifeval": (_form("prompt instruction_id_list kwargs", _ifeval),),
    "gsm8k": (_form("question answer", _gsm8k),),
}
"""Checked in this order: the first whose keys a row has."""

PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "problem", "turns", "Question")
"""Columns that may contain the prompt in a file of prompts. The first that a row has is used."""


def _prompt(row: Mapping[str, Any]) -> Item:
    """Read a prompt: text, a list of texts (MT-Bench's turns), or a list of messages, of which the user's are used."""
    prompt = next((row[column] for column in PROMPT_COLUMNS if row.get(column) is not None), None)
    parts: list[Any] = prompt if isinstance(prompt, list) else [prompt]
    texts = [part["content"] for part in parts if isinstance(part, dict) and part["role"] == "user"] or parts
    if not texts or not all(isinstance(part, str) and part.strip() for part in texts):
        raise ValueError(f"expected a prompt in one of the columns {', '.join(PROMPT_COLUMNS)}")
    return Item("", "\n\n".join(texts))


PROMPTS = "prompts"
"""Layout of a file of prompts without answers. It can only be held out."""


def benchmark_of(rows: Sequence[Row]) -> str | None:
    """The benchmark layout of most readable rows, or None."""
    votes = dict.fromkeys(BENCHMARKS, 0)
    for row in rows:
        for name in BENCHMARKS:
            if row.value is not None and _form_of(name, row.value):
                votes[name] += 1
                break
    best = max(votes, key=lambda name: votes[name])
    return best if 2 * votes[best] > sum(row.value is not None for row in rows) else None


def has_only_prompts(rows: Sequence[Row]) -> bool:
    """Whether most readable rows have a column for a prompt."""
    has_prompt = [any(column in row.value for column in PROMPT_COLUMNS) for row in rows if row.value is not None]
    return 2 * sum(has_prompt) > len(has_prompt)


def _form_of(layout: str, row: Mapping[str, Any]) -> Form | None:
    return next((form for form in BENCHMARKS[layout] if form.keys <= row.keys()), None)


def read_item(layout: str, row: Row, source: str) -> Item:
    """Read a row of a known layout.

    Raises:
        ValueError, KeyError, TypeError: the row is not in the layout.
    """
    if row.problem or row.value is None:
        raise ValueError(row.problem)
    item = _prompt if layout == PROMPTS else (_form_of(layout, row.value) or BENCHMARKS[layout][0]).item
    return replace(item(row.value), place=f"{source}:{row.source_row}")


def read_items(path: Path, source: str) -> list[Item]:
    """Read the questions of a benchmark file, labelled or not.

    Raises:
        InputError: see `items_of`.
    """
    return items_of(read_rows(path), path.name, source)


def items_of(rows: Sequence[Row], name: str, source: str) -> list[Item]:
    """Convert rows to questions.

    Args:
        name: name of the file, for messages.
    Raises:
        InputError: unknown layout, or a row in another layout: a partly read benchmark cannot exclude leakage.
    """
    layout = benchmark_of(rows) or (PROMPTS if has_only_prompts(rows) else None)
    if layout is None:
        raise InputError(f"{name}: not a benchmark in a known layout", f"known: {'; '.join(_shapes())}")
    items = []
    for row in rows:
        try:
            items.append(read_item(layout, row, source))
        except (ValueError, TypeError, KeyError) as error:
            problem = f"no key {error}" if isinstance(error, KeyError) else error
            what = f"{name}: row {row.source_row} is not a {layout} question: {problem}"
            raise InputError(what, "fix or remove the row") from None
    return items


def _shapes() -> Iterator[str]:
    for name, forms in BENCHMARKS.items():
        yield f"{name} ({' or '.join(', '.join(sorted(form.keys)) for form in forms)})"
    yield f"{PROMPTS} ({' or '.join(PROMPT_COLUMNS)})"


def read_multiple_choice(path: Path) -> list[Item]:
    """Read multiple-choice questions with one correct choice each.

    Raises:
        InputError: states the first row that is not such a question, or has no label (`unlabelled`).
    """
    items = read_items(path, path.name)
    for item in items:
        if item.choices and item.answer is not None:
            continue
        problem = "is unlabelled: no score can be computed without the correct choice"
        if not item.choices:
            problem = "has no choices"
        elif item.text:
            problem = "has several correct choices"
        hint = "use the split of the benchmark that has labels, of multiple-choice questions"
        raise InputError(f"{item.place} {problem}", hint)
    return items
