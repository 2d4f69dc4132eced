"""The relatives of a record that `pedigree erase` may erase too."""

from __future__ import annotations

KINDS = {
    "copies": "rows with the same text in other places",
    "near": "near-copies by the checks of the latest run",
    "pairs": "preference pairs with the same prompt",
    "paraphrases": "rows of paraphrase files that name the record or its prompt",
    "review": "lines of review files about the record",
}
DEFAULT = ("copies", "pairs", "paraphrases", "review")
"""Kinds that are erased unless they are declined: everything that holds the same text, or was made from it by hand."""
