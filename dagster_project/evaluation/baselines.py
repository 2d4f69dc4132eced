"""Alternatives to fine-tuning: prompts, chain of thought, few-shot and retrieved examples, a classical classifier."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dagster_project.core.messages import Message
from dagster_project.core.records import prompt_text, response_text
from dagster_project.evaluation.final_answers import NUMBER, FinalAnswer
from dagster_project.evaluation.labels import LabelSet
from dagster_project.evaluation.metrics import TERM, AnyTask, Task, parse, words

if TYPE_CHECKING:
    import numpy as np

Record = dict[str, Any]
Messages = list[Message]


ANSWER = "Answer with one line of JSON and nothing else, with"
THINK = "Think step by step. Then write on the last line your answer, one line of JSON with"
LABEL_ALONE = {
    ANSWER: "Answer with one of these labels and nothing else:",
    THINK: "Think step by step. Then write on the last line your answer, one of these labels and nothing else:",
}
"""The same instructions for label tasks."""


NUMBER_ALONE = {
    ANSWER: "Answer with one number and nothing else.",
    THINK: "Think step by step. Then write on the last line #### and your answer, one number.",
}
"""The same for tasks whose final answer is a number."""


def instruction(task: AnyTask, how: str = ANSWER) -> str:
    """A system prompt that states the whole task, with every allowed value.

    Empty if a regular expression defines the final answer.
    """
    if isinstance(task, FinalAnswer):
        return f"Answer the user's question. {NUMBER_ALONE[how]}" if task.final_answer == NUMBER else ""
    if isinstance(task, LabelSet):
        return f"Classify the user's message. {LABEL_ALONE[how]} {'; '.join(task.known)}."
    fields = "; ".join(
        f'"{name}": {" or ".join(allowed) if allowed else "a few words"}' for name, allowed in task.fields.items()
    )
    return f"Classify the user's message. {how} exactly these fields: {fields}."


def prompted(
    system_prompt: str | None,
    task: AnyTask | None,
    questions: Sequence[Record],
    shots: Sequence[Record],
    similar: Sequence[Sequence[Record]],
) -> dict[str, list[Messages]]:
    """Baseline -> the prompt for each question.

    Args:
        system_prompt: replaces the instruction of the task, and the system prompts of the questions before worked
            examples.
        shots: worked examples for every question.
        similar: worked examples for each question.
    """
    stated = system_prompt or (instruction(task) if task else "")
    prompts = {"zero_shot": [with_shots("", [], record) for record in questions]}
    needs_own = _have_system_prompts(questions, stated)
    before_shots = [_own(record) or stated if needs_own and not system_prompt else stated for record in questions]
    if needs_own:
        prompts["same_prompt"] = [record["messages"][:-1] for record in questions]
    if stated:
        prompts["system_prompt"] = [with_shots(stated, [], record) for record in questions]
    if task and (thinking := instruction(task, THINK)):
        prompts["chain_of_thought"] = [with_shots(thinking, [], record) for record in questions]
    if shots:
        asked = list(zip(before_shots, questions, strict=True))
        prompts["few_shot"] = [with_shots(system, shots, record) for system, record in asked]
        prompts["retrieved"] = [
            with_shots(system, some, record) for (system, record), some in zip(asked, similar, strict=True)
        ]
    return prompts


def _have_system_prompts(questions: Sequence[Record], stated: str) -> bool:
    """Whether no other prompt can replace the system prompts of the questions.

    They differ, so they may have what a question needs, or no other prompt states the task.
    """
    own = {_own(record) for record in questions}
    return any(own) and (len(own) > 1 or not stated)


def _own(record: Record) -> str:
    """System prompt of a record; empty if it has none."""
    return "\n".join(turn["content"] for turn in record["messages"] if turn["role"] == "system")


def with_shots(system_prompt: str, shots: Sequence[Record], record: Record) -> Messages:
    """The prompt for a record: system prompt (unless empty), worked examples as turns, the record up to its answer."""
    turns: Messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for shot in shots:
        turns += _worked_example(shot)
    return [*turns, *(turn for turn in record["messages"][:-1] if turn["role"] != "system")]


def _worked_example(shot: Record) -> Messages:
    """A worked example: its prompt and response, or the whole conversation if it has earlier answers or tool calls.

    The last answer may refer to earlier ones, and calls only make sense with their results. Traces are left out, as
    chat templates leave them out of earlier turns.
    """
    messages = shot["messages"]
    answers = [message for message in messages if message["role"] == "assistant"]
    if len(answers) == 1 and not answers[0].get("tool_calls"):
        prompt, response = prompt_text(messages), response_text(messages)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    left_out = {"reasoning_content", "weight"}
    shown = [message for message in messages if message["role"] != "system"]
    return [{key: value for key, value in message.items() if key not in left_out} for message in shown]


def conclusion(answer: str, task: AnyTask) -> str:
    """The answer after step-by-step reasoning: the last line or, for JSON fields, the lines of the last object."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    opening = [i for i, line in enumerate(lines) if line.startswith("{")] if isinstance(task, Task) else []
    if not opening:
        return lines[-1] if lines else ""
    texts = ["\n".join(lines[opening[-1] : stop]) for stop in range(opening[-1] + 1, len(lines) + 1)]
    cut_off = "}" not in texts[0]
    return next((text for text in texts if parse(text) is not None), texts[-1] if cut_off else texts[0])


def spread(records: Sequence[Record], labels: Sequence[str], n: int, seed: int) -> list[Record]:
    """`n` examples that cover the labels as evenly as can be, sampled by seed."""
    digests = [hashlib.sha256(f"{seed}:{record['example_id']}".encode()).digest() for record in records]
    order = sorted(range(len(records)), key=digests.__getitem__)
    queues = {name: [i for i in order if labels[i] == name] for name in sorted(set(labels))}
    chosen: list[int] = []
    while len(chosen) < min(n, len(records)):
        for queue in queues.values():
            if queue and len(chosen) < n:
                chosen.append(queue.pop(0))
    return [records[i] for i in sorted(chosen, key=order.index)]


def nearest(train: Sequence[Record], records: Sequence[Record], n: int) -> list[list[Record]]:
    """For each record the `n` training examples with the most similar prompt (BM25), the most similar last."""
    train = sorted(train, key=lambda record: record["example_id"])
    documents, queries = ([prompt_text(record["messages"]) for record in rows] for rows in (train, records))
    return [[train[j] for j in (-similar).argsort(kind="stable")[:n][::-1]] for similar in bm25(documents, queries)]


K1, B = 1.5, 0.75
"""Parameters of BM25: saturation of a word's frequency, and normalization by length."""


def bm25(documents: Sequence[str], queries: Sequence[str]) -> Iterator[np.ndarray]:
    """For each query the Okapi BM25 score of every document, (documents,).

    Robertson and Zaragoza 2009, section 3.4; with 1 added inside the logarithm (as Lucene does), so that no word lowers
    a score.
    """
    import numpy as np

    asked = [Counter(words(query)) for query in queries]
    counts: dict[str, dict[int, int]] = {word: {} for query in asked for word in query}
    lengths = np.zeros(len(documents))
    for i, text in enumerate(documents):
        found = words(text)
        lengths[i] = len(found)
        for word, count in Counter(filter(counts.__contains__, found)).items():
            counts[word][i] = count
    length_norm = K1 * (1 - B + B * lengths / max(1.0, lengths.mean()))
    for query in asked:
        scores = np.zeros(len(documents))
        for word, times in query.items():
            matching = np.array(list(counts[word]), dtype=int)
            frequency = np.array(list(counts[word].values()), dtype=float)
            idf = np.log(1 + (len(documents) - len(matching) + 0.5) / (len(matching) + 0.5))
            scores[matching] += times * idf * frequency * (K1 + 1) / (frequency + length_norm[matching])
        yield scores


def classify(train: Sequence[Record], labels: Sequence[str], records: Sequence[Record], seed: int) -> list[str]:
    """Labels predicted by TF-IDF (unigrams and bigrams of terms) and logistic regression.

    The most frequent label if there is no other, or if no prompt has a term.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=TERM)
    prompts = [prompt_text(r["messages"]) for r in train]
    if len(set(labels)) == 1 or not any(map(vectorizer.build_analyzer(), prompts)):
        counts = Counter(labels)
        return [min(counts, key=lambda name: (-counts[name], name))] * len(records)
    model = make_pipeline(vectorizer, LogisticRegression(C=10, max_iter=2000, random_state=seed))
    model.fit(prompts, labels)
    return [str(predicted) for predicted in model.predict([prompt_text(r["messages"]) for r in records])]
