"""The questions of the validation split that `pedigree why` compares a question
with: kept beside the gradients of a model (docs/why.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.commands.why_model import Target
from dagster_project.commands.why_pairs import PairTarget
from dagster_project.commands.why_question import tokenize, tokenizer_of
from dagster_project.core.chat import IGNORE
from dagster_project.core.errors import InputError
from dagster_project.core.files import replacing
from dagster_project.core.hashing import md5_of_file, sha256_of_file, sha256_of_files, sha256_of_text
from dagster_project.core.progress import Progress
from dagster_project.core.records import read_records, write_json
from dagster_project.evaluation.paired.bootstrap import unit
from dagster_project.lineage.attribution import calibration, ranking
from dagster_project.lineage.attribution.calibration import ANSWERS, LEAST, Calibration, asked_parts
from dagster_project.lineage.attribution.per_record import projected_gradients
from dagster_project.lineage.attribution.ranking import cosines
from dagster_project.lineage.attribution.records import Example
from dagster_project.lineage.history import md5_on_disk
from dagster_project.lineage.notes import read_note

if TYPE_CHECKING:
    import numpy as np

SPLITS = "data/splits"
VALIDATION = f"{SPLITS}/validation"
FILE, NOTE = "validation.safetensors", "validation.json"
BLOCK = 16
"""Questions whose gradients are held at the same time."""


def index(found: Target) -> dict[str, Any]:
    """Compute what is missing of the gradients of a model, and of the questions
    of the validation split; the caller holds the lock.

    Returns:
        {"folder", "records", "computed", "bytes", "questions"}.
    """
    indexed = found.index()
    known = _read(found)
    if known is None and (asked := _asked(found)):
        known = _computed(found, asked)
        _write(found, known)
    return {**indexed, "bytes": found.store.bytes(), "questions": 0 if known is None else len(known["owners"])}


def read(found: Target) -> Calibration | None:
    """The questions of the validation split of the workspace, if they were computed for these very gradients and are
    intact, and the split is that of the training."""
    known = _read(found)
    return None if known is None else Calibration(known["scores"], known["owners"])


def why_not(found: Target) -> str:
    """Why there is no comparison with the validation split, and the next step; for a model for which `read` gives
    None."""
    if not _shards(found) or _is_of_another_training(found):
        return f"{VALIDATION} is not the split of the training"
    if read_note(found.store.folder / NOTE):
        return f"the comparison with {VALIDATION} is of other questions or of another version; --index makes it again"
    return f"{VALIDATION} has too few questions, or was not compared: --index compares it"


def cosines_of(found: Target) -> np.ndarray | None:
    """Cosines of the gradients of the same questions with those of all records, (questions, records) float32.

    None as for `read`.
    """
    known = _read(found)
    return None if known is None else known["cosines"]


def _read(found: Target) -> dict[str, np.ndarray] | None:
    """Cosines and scores of all records, (questions, records) float32 each, and owners of the questions."""
    from safetensors.numpy import load_file

    file = found.store.folder / FILE
    note = read_note(found.store.folder / NOTE)
    if not note or not file.is_file():
        return None
    if note != {"of": _identity(found), "sha256": sha256_of_file(file)} or _is_of_another_training(found):
        return None
    return dict(load_file(file))


def mean(known: Sequence[Calibration | None]) -> Calibration | None:
    """Questions at several points of a training, with the mean of their scores; None if they are missing at one."""
    import numpy as np

    complete = [one for one in known if one is not None]
    if len(complete) < len(known):
        return None
    return Calibration(np.mean([one.scores for one in complete], axis=0), complete[0].owners)


def _identity(found: Target) -> dict[str, str]:
    """What cosines and scores are made from."""
    return {
        "gradients": sha256_of_text(json.dumps(found.store.identity, sort_keys=True)),
        "validation": sha256_of_files(_shards(found)),
        "code": sha256_of_files([Path(__file__), Path(calibration.__file__), Path(ranking.__file__)]),
    }


def _shards(found: Target) -> list[Path]:
    return sorted((found.place / VALIDATION).glob("*.parquet"))


def _is_of_another_training(found: Target) -> bool:
    """Whether the workspace's validation split may differ from that of the training.

    Its records, or near-copies of them, may have been trained on.
    """
    index = found.subject.index
    if shards := {md5 for _, split, md5 in index.shards(found.run) if split == "validation"}:
        return shards != {md5_of_file(shard) for shard in _shards(found)}
    # the files of that data set were never in this clone's cache: what the stage that read it recorded
    recorded = {md5 for run in index.ancestors(found.run).values() for dep, _, md5 in run.inputs if dep == SPLITS}
    return bool(recorded) and md5_on_disk(found.place / SPLITS) not in recorded


def _asked(found: Target) -> list[tuple[int, Example]]:
    """Number of a validation record, or of the first of its near-copies, and the question.

    None for models of pairs, where there are too few, and of the split of another training.
    """
    folder = found.place / VALIDATION
    if isinstance(found, PairTarget) or not folder.is_dir() or _is_of_another_training(found):
        return []
    records = [
        one
        for one in read_records(folder)
        if one["messages"][-1]["role"] == "assistant" and one["messages"][-1].get("content")
    ]
    tokenizer = tokenizer_of(found)
    first: dict[str, int] = {}
    # else near-copies would hide each other's excess
    owners = [first.setdefault(unit(one), number) for number, one in enumerate(records)]
    asked = []
    for number, part in asked_parts([one["messages"][-1]["content"] for one in records]):
        try:
            example = tokenize(tokenizer, records[number]["messages"], part, records[number].get("tools")).example
        except InputError:  # longer than the model's context, or written in another way by the template
            continue
        asked.append(
            (owners[number], replace(example, weights=tuple(float(label != IGNORE) for label in example.labels)))
        )
    return asked if len(asked) >= LEAST and len({number for number, _ in asked}) >= ANSWERS else []


def _computed(found: Target, asked: list[tuple[int, Example]]) -> dict[str, np.ndarray]:
    import numpy as np

    stored = found.store.read()
    model = replace(found.model, label_smoothing=0.0)  # a question is about a log-probability
    progress = Progress(f"{found.run.address}: questions of the validation split", len(asked), "question")
    parts: dict[str, list[np.ndarray]] = {"cosines": [], "scores": []}
    for start in range(0, len(asked), BLOCK):
        block = [[example] for _, example in asked[start : start + BLOCK]]
        gradients = projected_gradients(model, found.projection, block).numpy()
        parts["cosines"].append(cosines(stored.units, gradients))
        parts["scores"].append(stored.scores(gradients))
        progress.advance(len(block))
    return {name: np.concatenate(rows) for name, rows in parts.items()} | {
        "owners": np.array([number for number, _ in asked])
    }


def _write(found: Target, known: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    with replacing(found.store.folder / FILE) as scratch:
        save_file(known, scratch)
        digest = sha256_of_file(scratch)
    write_json(found.store.folder / NOTE, {"of": _identity(found), "sha256": digest})
