"""One shard of records -> its examples and what the report needs of them, for a stage's workers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dagster_project.core.chat import IGNORE
from dagster_project.core.messages import is_trained
from dagster_project.core.records import iter_table
from dagster_project.core.rendering import end_ids
from dagster_project.training.tokens.examples import Example, RecordOutcome, Rules, make
from dagster_project.training.tokens.label_audit import count_traces, find_wrong_labels, has_double_bos
from dagster_project.training.tokens.portable import PortableTokenizer


@dataclass(frozen=True)
class Setup:
    """What all shards have in common."""

    tokenizer: PortableTokenizer
    rules: Rules


class Shard(NamedTuple):
    """Records to tokenize."""

    split: str
    start: int
    """Number of the first record in its split."""
    step: int
    """Of every `step`-th record of the split, the whole text is tokenized for comparison."""
    data: bytes
    """The Parquet file."""


class ExampleFacts(NamedTuple):
    """What the report needs of an example."""

    length: int
    """Tokens."""
    trained: int
    """Tokens with a label."""
    ends: bool
    """Whether a token at which generation stops is in the loss."""
    double_bos: bool
    data: bytes
    """input_ids, labels (both int32) and weights (float32), one after the other."""


class RecordFacts(NamedTuple):
    """What the report needs of a record."""

    example_id: str
    source: str
    category: str | None
    outcome: str
    why: str
    trained: int
    stable: bool | None
    examples: list[ExampleFacts]
    traces: int
    """Traces of answers that are trained on, of a record that was kept."""
    traces_in_loss: int
    wrong: str
    """What is wrong with its labels; "" if nothing is."""


def tokenize_shard(setup: Setup, shard: Shard) -> tuple[str, list[RecordFacts]]:
    """The split of the shard, and facts of each of its records, in order."""
    tokenizer = setup.tokenizer.tokenizer
    records = list(iter_table(io.BytesIO(shard.data)))
    results = make(tokenizer, records, setup.rules, shard.start, shard.step)
    return shard.split, facts_of(tokenizer, records, results)


def facts_of(tokenizer: Any, records: Sequence[dict[str, Any]], results: Sequence[RecordOutcome]) -> list[RecordFacts]:
    wrong = find_wrong_labels(tokenizer, records, results)
    ends = list(end_ids(tokenizer))
    found = []
    for i, (record, result) in enumerate(zip(records, results, strict=True)):
        with_trace = [message for message in record["messages"] if message.get("reasoning_content")]
        traces = sum(map(is_trained, with_trace)) if result.kept else 0
        facts = RecordFacts(
            record["example_id"], record["source"], record["category"],
            result.outcome, result.why, result.trained, result.stable,
            examples=[_facts(tokenizer, example, ends) for example in result.examples],
            traces=traces,
            traces_in_loss=count_traces(tokenizer, record, result) if traces else 0,
            wrong=wrong.get(i, ""),
        )  # fmt: skip
        found.append(facts)
    return found


def _facts(tokenizer: Any, example: Example, ends: Sequence[int]) -> ExampleFacts:
    """Facts of an example, given the ids of the tokens at which generation stops."""
    import numpy as np

    return ExampleFacts(
        len(example.input_ids),
        int((example.labels != IGNORE).sum()),
        bool(np.isin(example.labels[1:], ends).any()),
        has_double_bos(tokenizer, example),
        b"".join((example.input_ids.tobytes(), example.labels.tobytes(), example.weights.tobytes())),
    )
