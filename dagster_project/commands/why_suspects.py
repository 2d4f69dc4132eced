"""`pedigree why --suspects`: records whose gradients do not fit those of the
others, as a queue for people to look at (docs/why.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dagster_project.commands import why_calibration
from dagster_project.commands.render import render
from dagster_project.commands.why import Texts, excerpt, model_of, places_of, shown_texts
from dagster_project.commands.why_model import Target, at_end, target
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.layout import pages_of
from dagster_project.core.messages import Message, Messages
from dagster_project.core.records import iter_ledger, write_json, write_text
from dagster_project.curation.checks.review import REVIEWED, queue
from dagster_project.lineage.attribution.suspects import (
    Group,
    Suspicion,
    agreement,
    chosen_groups,
    form_of,
    harm,
    members,
    opposition,
)
from dagster_project.orchestration import dvc
from dagster_project.views.texts import text

INSTRUCTIONS = "instructions"
FORM = 120
"""Characters of the form of an answer that are compared and shown."""
NAME = "suspects"
"""Files about the queue in the folder of pages of `instructions`."""
CAVEAT = (
    "Ranks and scores say how well gradients fit those of the others."
    " A rare but right answer can be among the first: look at each."
)

WITHOUT = (
    f"ranked by opposition and length alone, which finds fewer flipped labels: {why_calibration.VALIDATION} has"
    " too few answers, is not the split of the training, or was not compared by --index"
)


def suspects(root: Path, model: str, top: int, with_index: bool) -> dict[str, Any]:
    """Rank the records that a model was trained on by how little their
    gradients fit, and write the first as a review queue.

    Args:
        top: records in the queue.
        with_index: compute gradients that are missing, instead of refusing.
    Raises:
        InputError: as `target`; or gradients are missing.
    """
    found = at_end(target(root, model))
    indexed = None
    if with_index:
        with found.alone("pedigree why --suspects --index"):
            indexed = why_calibration.index(found)
    stored = found.store.read()
    gradients, lengths = stored.units, stored.lengths
    known = why_calibration.cosines_of(found)
    texts = Texts(found)
    own = _own_groups(found, texts)
    chosen = chosen_groups(own)
    ranking = Suspicion.of(opposition(gradients, lengths), lengths, None if known is None else harm(known, lengths))
    fits, sizes = agreement(gradients, own, chosen), [len(numbers) for numbers in members(own, chosen)]
    groups = [
        {
            "name": one.name,
            "source": one.source,
            "category": one.category,
            "form": one.form,
            "records": size,
            "cosine": round(float(fit), 4),
        }
        for one, size, fit in zip(chosen, sizes, fits, strict=True)
    ]
    notes = [CAVEAT, *([] if known is not None else [WITHOUT])]
    listed = _listed(found, ranking, texts, groups, top)
    document = {
        "model": model_of(found),
        **({"index": indexed} if indexed else {}),
        "records": len(found.records),
        "suspects": listed,
        "notes": notes,
    }
    written, note = _write_queue(root, texts, document)
    return document | {"queue": written, "notes": [*notes, *note]}


def _own_groups(found: Target, texts: Texts) -> list[Group]:
    """Source, category and form of the answer of each record, where the split has it.

    Keys of JSON are text of the data: cut, and masked.
    """
    records = [texts.known.get(one.example_id) for one in found.records]
    forms = [excerpt(form_of(_last_answer(one["messages"])), FORM) if one else None for one in records]
    return [
        Group(one["source"], one["category"], form) if one else Group()
        for one, form in zip(records, forms, strict=True)
    ]


def _last_answer(messages: Messages) -> Message | None:
    """The last message of the assistant, which turns of others can follow."""
    return next((message for message in reversed(messages) if message["role"] == "assistant"), None)


def _listed(
    found: Target, ranking: Suspicion, texts: Texts, groups: Sequence[dict[str, Any]], top: int
) -> list[dict[str, Any]]:
    places = places_of(found)
    return [
        {
            "rank": int(ranking.rank[i]),
            "score": round(float(ranking.score[i]), 5),
            "example_id": found.records[i].example_id,
            **places[found.records[i].example_id],
            "split": "train",
            **shown_texts(texts, found.records[i]),
            "opposition": _part(ranking.opposition_rank[i], ranking.opposition[i]),
            "length": _part(ranking.length_rank[i], ranking.length[i]),
            **(
                {}
                if ranking.harm is None or ranking.harm_rank is None
                else {"harm": _part(ranking.harm_rank[i], ranking.harm[i])}
            ),
            "group": groups[i],
        }
        for i in ranking.order()[:top]
    ]


def _part(rank: float, value: float) -> dict[str, Any]:
    """A part of a score."""
    return {"rank": int(rank), "value": float(f"{value:.4g}")}


def _write_queue(root: Path, texts: Texts, document: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """Write the queue as a review file and for the data-quality page, and draw that page again.

    Returns:
        {"file", "page", "records"}, or None if the set that people review is not here; and notes.
    """
    data, pages = root / "data" / INSTRUCTIONS, pages_of(root, INSTRUCTIONS)
    if not (data / "findings.json").is_file():
        return None, [f"no review queue was written: data/{INSTRUCTIONS} is not in the workspace"]
    names = {one["example_id"] for one in document["suspects"]} & texts.known.keys()
    kept = {
        line["example_id"]: line
        for line in iter_ledger(data)
        if line["outcome"] == "kept" and line["example_id"] in names
    }
    waiting = [one["example_id"] for one in document["suspects"] if one["example_id"] in kept]
    records = [texts.known[name] | {key: kept[name][key] for key in ("source", "source_row")} for name in waiting]
    file, page = pages / f"{NAME}.csv", (pages / "report.html").relative_to(root).as_posix()
    write_text(file, queue(records, [(i, REVIEWED) for i in range(len(records))]))
    write_json(pages / f"{NAME}.json", {"of": sha256_of_file(data / "findings.json"), **document})
    drawn = render(root, INSTRUCTIONS)["pages"] if INSTRUCTIONS in dvc.read_stages(root) else []
    left = len(document["suspects"]) - len(waiting)
    notes = (
        [f"{left} of these records are not rows of data/{INSTRUCTIONS}, such as paraphrases: they are not in the queue"]
        if left
        else []
    )
    shown = {"page": page} if page in drawn else {}
    return {"file": file.relative_to(root).as_posix(), **shown, "records": len(waiting)}, notes


def as_text(document: Mapping[str, Any]) -> str:
    """The document for the terminal."""
    return text("suspects", **document)
