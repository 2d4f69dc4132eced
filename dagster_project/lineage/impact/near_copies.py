"""Records that nearly equal a text or a record (`--near`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.messages import Messages, field_texts
from dagster_project.lineage import tables
from dagster_project.lineage.index import Index
from dagster_project.lineage.rows import record_key


def near_copies(index: Index, keys: Iterable[bytes], text: str | None, record: str | None) -> list[dict[str, Any]]:
    """Records whose prompt, response, reasoning or arguments of calls nearly
    equal the text, or that of the given record. Reads every available shard.

    Raises:
        InputError: no available shard contains the record, so that it has no text to compare.
    """
    from dagster_project.core.records import prompt_text, response_text
    from dagster_project.curation.similarity.overlap import compare

    excluded = set(keys)
    texts_of: dict[str, dict[str, str]] = {}
    for path in index.shard_paths().values():
        for row in tables.rows(path):
            texts = texts_of.setdefault(row["example_id"], {})
            for part in ("messages", "prompt", "chosen", "rejected"):
                turns = row.get(part)
                if isinstance(turns, list):
                    texts |= {f"{part}, prompt": prompt_text(turns), f"{part}, response": response_text(turns)}
                    texts |= {f"{part}, {name}": text for name, text in _fields(turns).items()}
    queries = [text] if text else []
    if not text:
        for identity, texts in texts_of.items():
            queries += texts.values() if record_key(identity) in excluded else []
    if record is not None and not queries:
        raise InputError(
            f"--near: no available data set contains the record {record}, so its text cannot be compared",
            "ask without --near, which names what is missing; or give the text itself with --text",
        )
    candidates = [
        (identity, part, text_of_part)
        for identity, texts in sorted(texts_of.items())
        for part, text_of_part in texts.items()
        if text_of_part
    ]
    best: dict[str, dict[str, Any]] = {}
    for pair in compare(queries, [text_of_part for _, _, text_of_part in candidates]).pairs:
        identity, part, text_of_part = candidates[pair.right]
        if record_key(identity) in excluded or best.get(identity, {"similarity": 0})["similarity"] >= pair.similarity:
            continue
        best[identity] = {
            "example_id": identity,
            "part": part,
            "rule": pair.rule,
            "similarity": pair.similarity,
            "text": text_of_part,
        }
    return sorted(best.values(), key=lambda copy: (-copy["similarity"], copy["example_id"]))


def _fields(turns: Messages) -> dict[str, str]:
    """Reasoning and arguments of calls, each as one text, where there are any."""
    found: dict[str, list[str]] = defaultdict(list)
    for field_name, text in (entry for turn in turns for entry in field_texts(turn)):
        if field_name != "content":
            found[field_name].append(text)
    return {field_name: "\n".join(texts) for field_name, texts in found.items()}
