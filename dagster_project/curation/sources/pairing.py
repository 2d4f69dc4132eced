"""Rows -> preference pairs.

Two rows of KTO, which have one answer each, form a pair; that is decided when all rows are read.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from dagster_project.core.hashing import sha256_of_text
from dagster_project.core.records import example_id, pair_id
from dagster_project.curation.sources.call_texts import Think
from dagster_project.curation.sources.detection import canonical_split
from dagster_project.curation.sources.fields import FieldAccount
from dagster_project.curation.sources.files import Row
from dagster_project.curation.sources.layouts import merged
from dagster_project.curation.sources.pair_layouts import MISMATCH, Pair, PairLayout
from dagster_project.curation.sources.row_reading import category_of, kept_of, noted, raw_text, read, read_pairs

HALF = "half"
"""Key of an entry with one answer: {"same", "side", "other", "category"}. Entries with equal `same` and opposite sides
form a pair."""


def entries_of(
    rows: Iterable[Row], source: str, layout: PairLayout, split: str | None, think: Think
) -> Iterator[dict[str, Any]]:
    """The pairs of each row, as `formats.pairs_of` returns them, and halves of pairs, whose `meta` is not encoded."""
    account = FieldAccount()
    for row in rows:
        form = layout.form_of(row.value or {})
        found, problem = read(row, partial(read_pairs, form=form, think=think))
        unread = {**problem, "row": row.value, **raw_text(row)}
        row = row._replace(value=form.flat(row.value)) if found and row.value is not None else row
        kept = merged(kept_of(row, form, found), found.meta if found else {})
        label = split or canonical_split((row.value or {}).get("split"))
        labelled = {"split": label} if label and not problem else {}
        counted = noted(row, form, kept, found, account)
        tools = {"tools": found.tools} if found and found.tools else {}
        for pair in found.pairs if found else [Pair([], [], [])]:
            side, other = ("chosen", "rejected") if pair.chosen else ("rejected", "chosen")
            messages = {"chosen": pair.chosen, "rejected": pair.rejected}
            half = not problem and not messages[other]
            meta = unread if problem else _labelled(kept, label)
            if half:
                meta = {side: kept, "problem": f"no {other} completion of the same prompt"}
            entry = {
                "source": source,
                "source_row": row.source_row,
                "source_rows": [row.source_row],
                "prompt": pair.prompt,
                **messages,
                **tools,
                "margin": pair.margin,
                "category": category_of(row, form.category),
                "group_id": None,
                "meta": {**meta, **labelled},
                **counted,
            }
            if half:
                same = sha256_of_text(json.dumps([label, pair.prompt, *tools.values()], sort_keys=True))[:32]
                entry[HALF] = {"same": same, "side": side, "other": other, "category": form.category}
            yield entry if half else _finished(entry)
            counted = {"fields": ()}  # a row is counted once


def _labelled(kept: Mapping[str, Any], label: str | None) -> dict[str, Any]:
    """What is kept of a row, with its split under the canonical name, or the label of its source instead."""
    own = canonical_split(kept.get("split"))
    return merged({**kept, "split": own} if own else kept, {"split": label} if label else {})


class Halves:
    """The halves of the pairs of a file that are still without counterpart."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, str], deque[int]] = defaultdict(deque)

    def partner(self, half: Mapping[str, str], number: int) -> int | None:
        """Number of the earlier half that forms a pair with this one; None if there is none, and this one waits.

        Args:
            half: of the entry with this number.
        """
        if not (waiting := self._waiting.get((half["same"], half["other"]))):
            self._waiting[half["same"], half["side"]].append(number)
            return None
        found = waiting.popleft()
        if not waiting:
            del self._waiting[half["same"], half["other"]]
        return found


def joined(first: dict[str, Any], second: dict[str, Any] | None = None) -> dict[str, Any]:
    """The pair of two halves, or of one that stays without counterpart."""
    half = first.pop(HALF, None)
    if half is None:
        return first
    if second is None:
        return _finished(first)
    side, other, column = second[HALF]["side"], second[HALF]["other"], second[HALF]["category"]
    meta, category = second["meta"], second["category"]
    kept = meta.pop(side)
    if category not in {None, first["category"]}:
        kept = {**kept, column: category}
    first[side] = second[side]
    first["source_rows"] += second["source_rows"]
    split = {"split": meta["split"]} if "split" in meta else {}
    first["meta"] = {other: first["meta"][other], side: kept, **split}
    if "fields" in first:
        first["fields"] += second["fields"]
    if ignored := [*dict.fromkeys([*first.get("ignored", ()), *second.get("ignored", ())])]:
        first["ignored"] = ignored
    return _finished(first)


def _finished(entry: dict[str, Any]) -> dict[str, Any]:
    return {"example_id": _pair_id(entry), **entry, "meta": json.dumps(entry["meta"], sort_keys=True)}


def _pair_id(entry: dict[str, Any]) -> str:
    """Content hash of a pair; of the row if it is unreadable."""
    prompt, chosen, rejected = entry["prompt"], entry["chosen"], entry["rejected"]
    if prompt or chosen or rejected:
        return pair_id(prompt, chosen, rejected, entry.get("tools"))
    row, raw = entry["meta"]["row"], entry["meta"].get("raw")
    return example_id([{"role": "malformed", "content": raw or json.dumps(row, ensure_ascii=False, sort_keys=True)}])


def as_record(pair: dict[str, Any]) -> dict[str, Any]:
    """Convert a pair to a record for the checks, whose `messages` end with the chosen answer:

    prompt [user "Hi"], chosen [assistant "Hello"]  ->  messages [user "Hi", assistant "Hello"], asked 1
    """
    messages = [*pair["prompt"], *pair["chosen"]]
    mismatch = not messages and str(json.loads(pair["meta"]).get("problem")).startswith(MISMATCH)
    if pair["chosen"] and pair["rejected"]:  # of several turns only the last are compared, so all others must be equal
        mismatch = pair["chosen"][:-1] != pair["rejected"][:-1]
    kept = {key: value for key, value in pair.items() if key not in {"prompt", "chosen"}}
    return {**kept, "messages": messages, "asked": len(pair["prompt"]), "same_prompt": not mismatch}
