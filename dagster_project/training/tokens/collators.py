"""Tokenized rows -> the batch that a model reads: packed into one row, or one padded row per example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from dagster_project.core.chat import IGNORE

if TYPE_CHECKING:
    import torch

SIZES = 16
"""Packed batches have a multiple of this many tokens: kernels are built anew for every size they meet, which takes time and memory."""


def collate_packed(rows: Sequence[Mapping[str, Any]], multiple: int = 1) -> dict[str, Any]:
    """Packed rows -> one batch.

    Positions restart at 0 for each example and no attention mask is given, so that every attention implementation isolates the examples.
    An example's first token has no context to be predicted from, so its label is -100:

        lengths [2] and [1], ids [5, 6] and [7]  ->  position_ids [0, 1, 0], cu_seq_lens_q [0, 2, 3], labels [-100, 6, -100]

    Args:
        multiple: pad to a multiple of this many tokens, by an example at the end without labels.
    Returns:
        input_ids, labels, position_ids (1, tokens) int64; weights (1, tokens) float32; example bounds `cu_seq_lens_q` (examples + 1) int32
        and the longest length `max_length_q`, named as flash attention names them; row numbers `rows` (rows) int64.
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
    """Packed rows -> one batch with one right-padded row per example. The same examples per step as `collate_packed`, so that methods compare.

    Returns:
        input_ids, labels, attention_mask (examples, longest) int64; weights (examples, longest) float32; row numbers `rows` (rows) int64.

        lengths [2, 1], ids [5, 6, 7]  ->  input_ids [[5, 6], [7, 0]], labels [[-100, 6], [-100, -100]], attention_mask [[1, 1], [1, 0]]
    """
    import torch

    examples: list[tuple[list[int], list[int], list[float]]] = []
    for row in rows:
        start = 0
        for length in row["lengths"]:
            ids, labels, weights = (list(row[name][start : start + length]) for name in ("input_ids", "labels", "weights"))
            examples.append((ids, [IGNORE, *labels[1:]], weights))
            start += length
    ids, mask = pad([ids for ids, _, _ in examples])
    wide = ids.shape[1]
    return {
        "input_ids": ids,
        "labels": torch.tensor([labels + [IGNORE] * (wide - len(labels)) for _, labels, _ in examples]),
        "weights": torch.tensor([weights + [0.0] * (wide - len(weights)) for _, _, weights in examples]),
        "attention_mask": mask,
        "rows": torch.tensor([row.get("row", -1) for row in rows]),
    }


def pad(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both (rows, longest) int64, with padding on the right. Which id pads does not matter behind a mask: 0."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
