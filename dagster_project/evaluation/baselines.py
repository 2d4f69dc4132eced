"""What people try before they tune: a good prompt, examples in the prompt, retrieved examples, a classical classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from dagster_project.evaluation.metrics import Task
from dagster_project.records import prompt_text, response_text

Record = dict[str, Any]
Messages = list[dict[str, str]]


def instruction(task: Task) -> str:
    """A system prompt that states the whole task, with every allowed value."""
    fields = "; ".join(f'"{name}": {" or ".join(allowed) if allowed else "a few words"}' for name, allowed in task.fields.items())
    return f"Classify the user's message. Answer with one line of JSON and nothing else, with exactly these fields: {fields}."


def with_shots(task: Task, shots: Sequence[Record], record: Record) -> Messages:
    """The prompt for a record: the instruction, worked examples as earlier turns, the record's own question."""
    turns = [{"role": "system", "content": instruction(task)}]
    for shot in shots:
        turns += [
            {"role": "user", "content": prompt_text(shot["messages"])},
            {"role": "assistant", "content": response_text(shot["messages"])},
        ]
    return [*turns, {"role": "user", "content": prompt_text(record["messages"])}]


def spread(records: Sequence[Record], labels: Sequence[str], n: int, seed: int) -> list[Record]:
    """`n` examples that cover the labels as evenly as can be, chosen by seed."""
    order = sorted(range(len(records)), key=lambda i: hashlib.sha256(f"{seed}:{records[i]['example_id']}".encode()).digest())
    queues = {name: [i for i in order if labels[i] == name] for name in sorted(set(labels))}
    chosen: list[int] = []
    while len(chosen) < min(n, len(records)):
        for queue in queues.values():
            if queue and len(chosen) < n:
                chosen.append(queue.pop(0))
    return [records[i] for i in sorted(chosen, key=order.index)]


def nearest(train: Sequence[Record], records: Sequence[Record], n: int) -> list[list[Record]]:
    """For each record the `n` training examples with the most similar prompt (TF-IDF cosine), the most similar last."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(sublinear_tf=True).fit([prompt_text(r["messages"]) for r in train])
    known = vectors.transform([prompt_text(r["messages"]) for r in train])
    similar = (vectors.transform([prompt_text(r["messages"]) for r in records]) @ known.T).toarray()
    return [[train[j] for j in sorted(range(len(train)), key=lambda j: (-row[j], train[j]["example_id"]))[:n][::-1]] for row in similar]


def classify(train: Sequence[Record], labels: Sequence[str], records: Sequence[Record], seed: int) -> list[str]:
    """Labels by TF-IDF (words and pairs of words) and logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if len(set(labels)) == 1:
        return [labels[0]] * len(records)
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), LogisticRegression(C=10, max_iter=2000, random_state=seed)
    )
    model.fit([prompt_text(r["messages"]) for r in train], labels)
    return [str(found) for found in model.predict([prompt_text(r["messages"]) for r in records])]
