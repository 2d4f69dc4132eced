"""`pedigree why --diff A B`: the records of the difference between two versions
of a model that are most like the answers that changed (docs/why.md)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

from dagster_project.commands.why import excerpt
from dagster_project.commands.why_model import Target, adapter_of
from dagster_project.commands.why_question import Question, tokenize_parts, tokenizer_of
from dagster_project.commands.why_version import one_sided, records_of, scores_among, version
from dagster_project.core import params
from dagster_project.core.errors import InputError
from dagster_project.core.messages import Message
from dagster_project.core.records import prompt_text, read_table, response_text
from dagster_project.evaluation.evaluator import Settings, select_questions, turn_key
from dagster_project.evaluation.metrics import AnyTask, label
from dagster_project.lineage.diff import diff
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import Subject, find
from dagster_project.lineage.runs import StageRun, fetch_hint
from dagster_project.lineage.scratch_folder import scratch_folder
from dagster_project.training.inference.answers import of_row
from dagster_project.views.texts import text

RESULTS = "results.parquet"
LAST = -1
"""Turn of the last answer, as `turn_key` counts."""
MOST = 50
"""Changed answers that are explained; more are counted."""
SIDES = ("before", "after")
CAVEAT = "Ranks and scores say how alike gradients are, not what would change without a record."


@dataclass(frozen=True)
class Answers:
    """What the evaluation of a model recorded."""

    stage: str
    rows: Mapping[tuple[str, int], Mapping[str, Any]]
    """By question."""
    settings: Settings


def answer_diff(root: Path, before: str, after: str, top: int) -> dict[str, Any]:
    """Compare the recorded answers of two versions of a model, and rank the
    records of their difference for each answer that changed.

    Args:
        before, after: MODEL or REV:MODEL.
        top: records for each answer.
    Raises:
        InputError: a version cannot be attributed, or has no recorded answers, or files of it are not available.
    """
    index = Index(root)
    subjects = [find(index, name) for name in (before, after)]
    for subject, name in zip(subjects, (before, after), strict=True):
        adapter_of(subject, name)  # refused before anything is computed
    answers = [recorded_answers(subject) for subject in subjects]
    difference = diff(root, before, after)
    if difference["records"] is None:
        lost = difference["missing"][0]
        raise InputError(
            f"the records of both versions are not known: {lost['path']} (md5 {lost['md5'][:12]}) is missing",
            f"fetch it: {lost['fetch']}",
        )
    tests = [records_of(subject, "test") for subject in subjects]
    both = sorted(answers[0].rows.keys() & answers[1].rows.keys())
    asked = [name for name, turn in both if turn == LAST and all(name in test for test in tests)]
    changed = _changed(asked, answers, tests, [records_of(subject, "train") for subject in subjects])
    document: dict[str, Any] = {
        "models": difference["models"],
        "compared": len(asked),
        "changed": len(changed),
        "records": {kind: len(entries) for kind, entries in difference["records"].items()},
        "also_differ": also_differ(difference),
        "notes": [CAVEAT],
    }
    if len(changed) > MOST:
        document["notes"].append(
            f"the first {MOST} of {len(changed)} changed answers are explained, those that became wrong first"
        )
    with scratch_folder(root) as scratch:
        targets = [
            version(root, subject, name, scratch) for subject, name in zip(subjects, (before, after), strict=True)
        ]
        document["answers"] = explained(targets, changed[:MOST], difference["records"], top)
    return document


def also_differ(difference: Mapping[str, Any]) -> dict[str, list[str]]:
    """What differs between two models besides records, by name."""
    return {
        kind: sorted(difference[kind])
        for kind in ("parameters", "code", "other_files", "environment", "machine", "base_model")
        if difference[kind]
    }


def recorded_answers(subject: Subject) -> Answers:
    """The answers to the test split that the evaluation of a model, or of one
    merged from it and its base model, recorded in the same dvc.lock.

    Raises:
        InputError: there is none, or it is not available.
    """
    index = subject.index
    models = {subject.run.md5, *(run.md5 for run in (index.parents(subject.run) if index.is_copy(subject.run) else []))}
    models |= {run.md5 for run in subject.lock.values() if run.stage == "merged" and _reads(run, models)}
    for run in subject.lock.values():
        if run.stage != "evaluation" or not _reads(run, models):
            continue
        path = index.file_path(run.md5, RESULTS)
        if path is None:
            raise InputError(f"{run.path} (md5 {run.md5[:12]}) is not in the cache", f"fetch it: {fetch_hint([run])}")
        variant = run.variant
        rows = {
            turn_key(row): row for row in read_table(path) if row["system"] == variant and row["answer"] is not None
        }
        recorded = index.lock_entry(run).get("params", {}).get("params.yaml", {}).get("evaluation")
        return Answers(run.address, rows, params.parse(Settings, recorded, "evaluation"))
    raise InputError(
        f"{subject.run.address} (md5 {subject.run.md5[:12]}) has no recorded answers",
        f"evaluate it: `dvc repro evaluation@{subject.run.variant or 'VARIANT'}`",
    )


def _reads(run: StageRun, outputs: Collection[str]) -> bool:
    return any(md5 in outputs for _, _, md5 in run.inputs)


@dataclass(frozen=True)
class Change:
    """A test question with two answers that differ."""

    record: Mapping[str, Any]
    answers: tuple[Message, Message]
    right: tuple[bool | None, bool | None]
    """Whether each has the label of the reference; None where answers have no label."""

    @property
    def order(self) -> tuple[int, str]:
        """Those that became wrong first, then those that became right."""
        became = {(True, False): 0, (False, True): 1}.get((bool(self.right[0]), bool(self.right[1])), 2)
        return (2 if None in self.right else became), self.record["example_id"]


def _changed(
    asked: Sequence[str],
    answers: Sequence[Answers],
    tests: Sequence[Mapping[str, dict[str, Any]]],
    trains: Sequence[Mapping[str, dict[str, Any]]],
) -> list[Change]:
    """Those of some test questions, by id, whose last answers differ."""
    tasks = [
        _task(one, [*test.values()], [*train.values()]) for one, test, train in zip(answers, tests, trains, strict=True)
    ]
    found = []
    for name in asked:
        said = [of_row(one.rows[name, LAST]) for one in answers]
        if said[0] == said[1]:
            continue
        record = tests[1][name]
        reference = response_text(record["messages"])
        right = [
            None if task is None else label(task, reference) == label(task, one.content)
            for task, one in zip(tasks, said, strict=True)
        ]
        found.append(Change(record, (said[0].message, said[1].message), (right[0], right[1])))
    return sorted(found, key=lambda one: one.order)


def _task(answers: Answers, test: list[dict[str, Any]], train: list[dict[str, Any]]) -> AnyTask | None:
    return select_questions(test, answers.settings, train)[0] if test else None


def explained(
    targets: Sequence[Target], changes: Sequence[Change], records: dict[str, Any], top: int
) -> list[dict[str, Any]]:
    """Each change with the records of the difference that only one of the models was trained on, ranked by score."""
    seen = [{record.example_id for record in target.records} for target in targets]
    ranked: list[list[dict[str, Any]]] = [[] for _ in changes]
    for side, (target, mine, others) in enumerate(zip(targets, seen, reversed(seen), strict=True)):
        facts = one_sided(records, mine, others, SIDES[side])
        if not facts or not changes:
            continue
        names, tokenizer = sorted(facts), tokenizer_of(target)
        asked = [_question(tokenizer, change, side) for change in changes]
        texts = records_of(target.subject, "train")
        for i, scores in enumerate(scores_among(target, names, asked)):
            ranked[i] += [
                {
                    "score": round(float(score), 4),
                    "trained": SIDES[side],
                    "example_id": name,
                    **facts[name],
                    **_texts(texts.get(name)),
                }
                for name, score in zip(names, scores, strict=True)
            ]
        del target.__dict__["model"]  # so that one model is in memory at a time
    return [_row(change, found, top) for change, found in zip(changes, ranked, strict=True)]


def _row(change: Change, found: list[dict[str, Any]], top: int) -> dict[str, Any]:
    ordered = sorted(found, key=lambda one: (-one["score"], one["example_id"]))
    before, after = (_shown(message) for message in change.answers)
    return {
        "example_id": change.record["example_id"],
        "category": change.record["category"],
        "prompt": excerpt(prompt_text(change.record["messages"])),
        "reference": excerpt(response_text(change.record["messages"])),
        "before": excerpt(before),
        "after": excerpt(after),
        "right": list(change.right),
        "among": len(found),
        "records": [{"rank": i, **one} for i, one in enumerate(ordered[:top], 1)],
    }


def _question(tokenizer: Any, change: Change, side: int) -> Question:
    """A question with one of its two answers.

    The asked tokens are those of the words in which it differs from the other.
    """
    mine, other = change.answers[side], change.answers[1 - side]
    messages = [*change.record["messages"][:-1], mine]
    return tokenize_parts(tokenizer, messages, partial(_parts, mine, other), change.record.get("tools"))


def _parts(mine: Message, other: Message, turn: str) -> list[tuple[int, int]]:
    """Bounds in an answer, as the chat template writes it, of the words that differ from another answer.

    The whole of it if there are none.
    """
    content = mine.get("content") or ""
    start = turn.find(content) if content else -1
    found = differing(other.get("content") or "", content) if start >= 0 else []
    return [(start + begin, start + end) for begin, end in found] or [(0, len(turn))]


def differing(other: str, text: str) -> list[tuple[int, int]]:
    """Bounds of the words and signs of a text that differ from another text.

    >>> differing('{"category": "bug", "n": 1}', '{"category": "idea", "n": 1}')
    [(14, 18)]
    """
    old, new = ([*re.finditer(r"\w+|[^\w\s]", one)] for one in (other, text))
    matcher = SequenceMatcher(None, [match.group() for match in old], [match.group() for match in new], autojunk=False)
    return [
        (new[start].start(), new[stop - 1].end())
        for tag, _, _, start, stop in matcher.get_opcodes()
        if tag != "equal" and stop > start
    ]


def _shown(message: Message) -> str:
    parts = [message.get("reasoning_content") or "", message.get("content") or ""]
    return " ".join([*filter(None, parts), *(str(call) for call in message.get("tool_calls") or ())])


def _texts(record: Mapping[str, Any] | None) -> dict[str, str]:
    """Prompt and answer of a record; masked."""
    return (
        {"prompt": excerpt(prompt_text(record["messages"])), "answer": excerpt(response_text(record["messages"]))}
        if record
        else {}
    )


def as_text(document: Mapping[str, Any]) -> str:
    """The document for the terminal."""
    return text("why_diff", **document)
