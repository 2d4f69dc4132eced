"""Tokenized examples -> texts in which every token has its weight in the loss, for the training page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.chat import IGNORE
from dagster_project.core.hashing import sha256_of_example, sha256_of_file
from dagster_project.core.records import read_table
from dagster_project.core.text import many, number
from dagster_project.views.conversations import Conversation, conversation

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHOWN = 5
LEVELS = 4
"""Shades of marked text."""
NO_TOKENS = "(text not shown: data/tokenized does not have this example in the version that audit.json names)"
NO_TOKENIZER = "(text not shown: data/base_model does not have the tokenizer that audit.json names)"


@dataclass(frozen=True)
class Piece:
    """A run of tokens of equal weight."""

    text: str
    weight: float | None
    """Relative to most tokens in the loss of its example: 16 counts 16 times as much. None: not in the loss."""


@dataclass(frozen=True)
class TrainedExample:
    place: str
    pieces: Sequence[Piece]
    figures: str = ""
    """Tokens, and tokens in the loss."""
    by_role: Conversation | None = None


def trained_examples(root: Path, document: Mapping[str, Any]) -> list[TrainedExample]:
    """Some of the examples in the audit of labels: one with calls, one with
    reasoning, one with weights, and the first ones.

    The audit names them. Tokens and weights are those of data/tokenized, turns those of data/splits, texts by the
    tokenizer of data/base_model. Where one of these is missing or another version, the page says so. Audits of earlier
    versions have texts, with trained spans in ⟦ ⟧.
    """
    audit = document["examples"]
    records = _records(root / "data" / "splits", audit)
    chosen, weights = _with_tokens(root / "data" / "tokenized", _chosen(audit, records))
    tokenizer = _tokenizer(root / "data" / "base_model" / "tokenizer.json", document.get("tokenizer"))
    several = {one["example_id"] for one in audit if one.get("part")}
    return [
        TrainedExample(
            _place(one, one.get("example_id") in several),
            pieces(tokenizer, one, found),
            _token_counts(one, found),
            conversation(records[one["example_id"]]) if one.get("example_id") in records else None,
        )
        for one, found in zip(chosen, weights, strict=True)
    ]


def pieces(tokenizer: Tokenizer | None, example: Mapping[str, Any], weights: Sequence[float] | None) -> list[Piece]:
    """Runs of tokens of equal weight.

    Args:
        example: `input_ids` and `labels` (tokens,) unless they were not found;
            `text` in an audit of an earlier version.
        weights: (tokens,), as in data/tokenized; None: unknown, every token in the loss counts the same.
    """
    if tokenizer is not None and "input_ids" in example:
        relative = _relative(example["labels"], weights)
        runs = [(weight, len(list(run))) for weight, run in groupby(relative)]
        texts = _texts(tokenizer, example["input_ids"], [length for _, length in runs])
        by_this = (
            "text" not in example or _marked_text(tokenizer, example["input_ids"], example["labels"]) == example["text"]
        )
        if by_this:  # else it is another tokenizer
            return [Piece(text, weight) for text, (weight, _) in zip(texts, runs, strict=True) if text]
    if "text" not in example:
        return [Piece(NO_TOKENIZER if "input_ids" in example else NO_TOKENS, None)]
    return [Piece(text, 1.0 if i % 2 else None) for i, text in enumerate(re.split("[⟦⟧]", example["text"])) if text]


def legend(examples: Iterable[TrainedExample]) -> dict[float, tuple[str, str]]:
    """Weight -> CSS class and name, lightest first. Weight 0 is not marked."""
    weights = sorted({piece.weight for one in examples for piece in one.pieces if piece.weight is not None})
    positive = [weight for weight in weights if weight > 0]
    step = (LEVELS - 1) / max(1, len(positive) - 1)
    names = {weight: (f"w{round(1 + i * step)}", f"×{weight:g}") for i, weight in enumerate(positive)}
    return ({0.0: ("w0", "×0, not counted")} if 0.0 in weights else {}) | names


def _relative(labels: Sequence[int], weights: Sequence[float] | None) -> list[float | None]:
    """Weight of each token relative to the most frequent one above 0; None where the label is ignored."""
    given = weights or [float(label != IGNORE) for label in labels]
    counts = Counter(
        round(weight, 9) for weight, label in zip(given, labels, strict=True) if label != IGNORE and weight > 0
    )
    base = counts.most_common(1)[0][0] if counts else 1.0
    return [None if label == IGNORE else round(weight / base, 2) for weight, label in zip(given, labels, strict=True)]


def _texts(tokenizer: Tokenizer, ids: Sequence[int], lengths: Sequence[int]) -> list[str]:
    """Text of consecutive runs of tokens.

    Beginnings of the whole are decoded, because some tokenizers drop a run's first space.
    """
    texts, stop, before = [], 0, ""
    for i, length in enumerate(lengths):
        stop += length
        whole = tokenizer.decode(list(ids[:stop]), skip_special_tokens=False)
        if i < len(lengths) - 1:
            whole = whole.rstrip("\ufffd")  # a character that continues in the next run
        texts.append(whole[len(before) :])
        before = whole
    return texts


def _marked_text(tokenizer: Tokenizer, ids: Sequence[int], labels: Sequence[int]) -> str:
    """The text as in the audit of labels: trained spans, each decoded by itself, in ⟦ ⟧."""
    runs = [
        (trained, [token for token, _ in run])
        for trained, run in groupby(zip(ids, labels, strict=True), lambda one: one[1] != IGNORE)
    ]
    texts = tokenizer.decode_batch([run for _, run in runs], skip_special_tokens=False)
    return "".join(f"⟦{text}⟧" if trained else text for text, (trained, _) in zip(texts, runs, strict=True))


def _tokenizer(path: Path, sha256: str | None) -> Tokenizer | None:
    """The tokenizer, None if it is missing or is not the one with this hash."""
    from tokenizers import Tokenizer

    if sha256 is not None and (not path.is_file() or sha256_of_file(path) != sha256):
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001  tokenizers raises nothing narrower
        return None


def _place(example: Mapping[str, Any], several: bool) -> str:
    part = f", example {example['part'] + 1} of its row" if several else ""
    return f"{example['source']}{part}" + (f" ({example['split']})" if "split" in example else "")


def _token_counts(example: Mapping[str, Any], weights: Sequence[float] | None) -> str:
    if "labels" not in example:
        return ""
    labels = example["labels"]
    given = weights or [1.0] * len(labels)
    counted = sum(label != IGNORE and weight > 0 for label, weight in zip(labels, given, strict=True))
    return f"{many(len(labels), 'token')}, {number(counted)} in the loss"


def _chosen(audit: Sequence[Mapping[str, Any]], records: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last example of the first row with calls, of that with reasoning, of
    that with weights and of further rows, up to SHOWN, in order."""
    last = {one.get("example_id", i): i for i, one in enumerate(audit)}
    rows = []
    for field in ("tool_calls", "reasoning_content", "weight"):
        rows += [
            i
            for name, i in last.items()
            if any(field in message for message in records.get(name, {}).get("messages", ()))
        ][:1]
    return [audit[i] for i in sorted(list(dict.fromkeys([*rows, *last.values(), *range(len(audit))]))[:SHOWN])]


def _records(splits: Path, audit: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The records of the examples, by id."""
    wanted = {one.get("example_id") for one in audit}
    found: dict[str, dict[str, Any]] = {}
    for split in sorted({one["split"] for one in audit if "split" in one}):
        for shard in sorted((splits / split).glob("records-*.parquet")):
            if wanted.isdisjoint(row["example_id"] for row in read_table(shard, ["example_id"])):
                continue
            rows = read_table(shard, ["example_id", "messages", "tools"])
            found |= {row["example_id"]: row for row in rows if row["example_id"] in wanted}
    return found


def _with_tokens(
    tokenized: Path, examples: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], list[list[float] | None]]:
    """The examples with their `input_ids` and `labels`, and the weight of each token, (tokens,).

    None for an example that is not in data/tokenized.
    """
    complete = [*examples]
    found: list[list[float] | None] = [None] * len(examples)
    for split in {one["split"] for one in examples if "sha256" in one or "input_ids" in one}:
        wanted = {i: one for i, one in enumerate(examples) if one.get("split") == split}
        for identity, ids, labels, weights in _packed(
            tokenized / f"{split}.parquet", {one["example_id"] for one in wanted.values()}
        ):
            for i, one in wanted.items():
                if one["example_id"] != identity:
                    continue
                if one.get("input_ids") == ids or one.get("sha256") == sha256_of_example(ids, labels):
                    complete[i], found[i] = {**one, "input_ids": ids, "labels": labels}, weights
    return complete, found


def _packed(path: Path, wanted: set[str]) -> Iterable[tuple[str, list[int], list[int], list[float]]]:
    """(example_id, input_ids, labels, weights) of each wanted example in a split of packed rows.

    Reads a few rows at a time.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not path.is_file():
        return
    names = ["example_ids", "lengths", "input_ids", "labels", "weights"]
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256, columns=names):
            ids = batch.column("example_ids")
            hits = pc.is_in(ids.flatten(), pa.array(sorted(wanted), pa.string()))
            for row in sorted(set(pc.list_parent_indices(ids).filter(hits).to_pylist())):
                values = {name: batch.column(name)[row].as_py() for name in names}
                start = 0
                for identity, length in zip(values["example_ids"], values["lengths"], strict=True):
                    stop = start + length
                    if identity in wanted:
                        yield identity, *(values[name][start:stop] for name in ("input_ids", "labels", "weights"))
                    start = stop
