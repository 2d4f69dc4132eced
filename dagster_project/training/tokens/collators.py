"""Tokenized rows -> batch: packed into one row, or one padded row per example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from dagster_project.core.chat import IGNORE

if TYPE_CHECKING:
    import torch

SIZES = 16
"""Packed batches are padded to a multiple of this many tokens, because kernels are compiled for every new size."""


def collate_packed(rows: Sequence[Mapping[str, Any]], multiple: int = 1) -> dict[str, Any]:
    """Collate packed rows into one batch.

    Positions restart at 0 for each example, without an attention mask, so every attention implementation isolates the
    examples. The first token of an example has no context, so its label is -100:

        lengths [2] and [1], ids [5, 6] and [7]
        -> position_ids [0, 1, 0], cu_seq_lens_q [0, 2, 3], labels [-100, 6, -100]

    Args:
        multiple: pad to a multiple of this many tokens with an unlabeled example at the end.
    Returns:
        input_ids, labels, position_ids (1, seq) int64; weights (1, seq) float32; example bounds `cu_seq_lens_q`
        (examples + 1) int32 and the longest length `max_length_q`, with flash attention's names; row indices `rows`
        (rows) int64.
    """
    import torch

    lengths = [length for row in rows for length in row["lengths"]]
    if spare := -sum(lengths) % multiple:
        lengths.append(spare)
    positions = [p for length in lengths for p in range(length)]
    labels = [label for row in rows for label in row["labels"]] + [IGNORE] * spare
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]] + [0] * spare]),
        "labels": torch.tensor([[label if p else IGNORE for label, p in zip(labels, positions, strict=True)]]),
        "weights": torch.tensor([[weight for row in rows for weight in row["weights"]] + [0.0] * spare]),
        "position_ids": torch.tensor([positions]),
        "cu_seq_lens_q": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "max_length_q": max(lengths),
        "rows": torch.tensor([row.get("row", -1) for row in rows]),
    }


def collate_padded(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate packed rows into one right-padded row per example. A step has the same examples as with `collate_packed`.

    Returns:
        input_ids, labels, attention_mask (examples, seq) int64; weights (examples, seq) float32; row indices `rows`
        (rows) int64.

        lengths [2, 1], ids [5, 6, 7] -> input_ids [[5, 6], [7, 0]], labels [[-100, 6], [-100, -100]],
        attention_mask [[1, 1], [1, 0]]
    """
    import torch

    ids, labels, weights = list[list[int]](), list[list[int]](), list[list[float]]()
    for row in rows:
        for start, stop in pairwise([0, *accumulate(row["lengths"])]):
            ids.append(list(row["input_ids"][start:stop]))
            labels.append([IGNORE, *row["labels"][start + 1 : stop]])
            weights.append(list(row["weights"][start:stop]))
    padded, mask = pad(ids)
    wide = padded.shape[1]
    return {
        "input_ids": padded,
        "labels": torch.tensor([own + [IGNORE] * (wide - len(own)) for own in labels]),
        "weights": torch.tensor([own + [0.0] * (wide - len(own)) for own in weights]),
        "attention_mask": mask,
        "rows": torch.tensor([row.get("row", -1) for row in rows]),
    }


def batches_by_length(rows: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Numbers of the rows in batches of similar lengths, the shortest first."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def pad(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right with id 0, which is masked. Returns ids and mask, both (batch, seq) int64."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
