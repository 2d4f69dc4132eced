"""A model of any revision, ready for questions: the files of its training from
the workspace or from DVC's cache, and its records by split."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.commands.why_model import EndTarget, Target, adapter_of, at_end, needed, refuse_method
from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.hashing import md5_of_file
from dagster_project.core.records import read_table
from dagster_project.lineage.attribution.per_record import projected_gradients
from dagster_project.lineage.attribution.projection import units
from dagster_project.lineage.attribution.ranking import cosines
from dagster_project.lineage.history import md5_on_disk
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import Subject
from dagster_project.lineage.runs import StageRun, fetch_hint

if TYPE_CHECKING:
    import numpy as np

    from dagster_project.commands.why_question import Question


def version(root: Path, subject: Subject, model: str, scratch: Path) -> EndTarget:
    """A model with the files of its training: those of the workspace if they
    are the recorded ones, else linked from DVC's cache.

    Args:
        model: as it was named.
        scratch: folder for a version that is not in the workspace; files that it already has are not restored again.
    Raises:
        InputError: its answers cannot be attributed, or a file is neither in the workspace nor in the cache.
        CheckFailed: an object of the cache was tampered with.
    """
    run = adapter_of(subject, model)
    here = all(md5 and md5_on_disk(root / path) == md5 for path, md5 in needed(run).items())
    place = root if here else place_of(scratch, run)
    for path, md5 in ({} if here else needed(run)).items():
        if not (place / path).exists():
            restore(subject.index, path, md5, place / path, run)
    found = Target(root, model, subject, run, place)
    refuse_method(found)
    return at_end(found)


def place_of(scratch: Path, run: StageRun) -> Path:
    """Folder for the files of a training that is not in the workspace."""
    return scratch / f"{run.md5[:32]}-{run.id}"


def is_available(index: Index, outputs: Iterable[tuple[str, str]]) -> bool:
    """Whether all files of some outputs, (path, hash) each, are in the workspace or in the cache."""
    for path, md5 in outputs:
        listing = index.objects.listing(md5, path) if md5 else None
        if listing is None or any(index.objects.path(one, path) is None for one in listing.values()):
            return False
    return True


def restore(index: Index, path: str, md5: str, target: Path, run: StageRun) -> None:
    """Link the files of an output to their objects, each compared with its hash.

    Raises:
        InputError: one is not available.
        CheckFailed: one was tampered with.
    """
    listing = index.objects.listing(md5, path) if md5 else None
    for name, one in (listing or {}).items():
        source = index.objects.path(one, path)
        if source is None:
            listing = None
            break
        if md5_of_file(source) != one:
            raise CheckFailed(
                f"{path}: cache object {one} does not match its name: it was tampered with",
                "see `pedigree verify --integrity`",
            )
        file = target / name if name else target
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_symlink():
            file.symlink_to(source.resolve())
    if not listing:
        raise InputError(
            f"{path} (md5 {md5[:12]}), which {run.address} needs, is neither in the workspace nor in the cache",
            f"fetch it: {fetch_hint([run])}",
        )


def records_of(subject: Subject, split: str) -> dict[str, dict[str, Any]]:
    """The records of a split of the data that a model and its parents were made from, by id.

    Raises:
        InputError: a file is not available.
    """
    index, found = subject.index, dict[str, dict[str, Any]]()
    for run in subject.models:
        for out, of_split, md5 in [] if index.is_copy(run) else index.shards(run):
            if of_split != split:
                continue
            path = index.objects.path(md5, index.workspace_outputs.get(out, ""))
            if path is None:
                lost = [one for one in index.data(run).values() if one.md5 == out]
                raise InputError(
                    f"the {split} split of {run.address} is not in the cache", f"fetch it: {fetch_hint(lost or [run])}"
                )
            found |= {record["example_id"]: record for record in read_table(path)}
    return found


def scores_among(found: Target, names: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    """Cosines of the gradients of some records of a training with those of questions, (questions, records) float32.

    The gradients of the records are those of the store, if it is complete, else
    they are computed for these records alone.
    """
    import numpy as np

    asked = [found.projection.project(found.model.of_span(question.example)[1]).numpy() for question in questions]
    return cosines(gradients_of(found, names), np.stack(asked))


def gradients_of(found: Target, names: Sequence[str]) -> np.ndarray:
    """Projected gradients of some records of a training at length 1, (records, width) float16, as in the store."""
    numbers = {record.example_id: i for i, record in enumerate(found.records)}
    if found.store.is_begun() and not found.store.missing():
        return found.store.read().units[[numbers[name] for name in names]]
    examples = [found.records[numbers[name]].examples for name in names]
    return units(projected_gradients(found.model, found.projection, examples).numpy()).astype("float16")


def one_sided(
    records: dict[str, Any], mine: Collection[str], others: Collection[str], side: str
) -> dict[str, dict[str, Any]]:
    """Id -> place and kind of change, of the records of a difference that one
    model was trained on and the other one was not.

    Args:
        records: of `lineage/diff.py`.
        mine, others: ids of the records in training steps of this model and of the other one.
        side: "before" or "after": which of two versions this model is.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind in ("added", "removed"):
        found |= {one["example_id"]: {"kind": kind, "rows": one["rows"]} for one in records[kind]}
    for kind in ("changed", "moved"):
        for pair in records[kind]:
            one = pair[side]
            found[one["example_id"]] = {
                "kind": kind,
                "rows": one["rows"],
                "splits": {name: pair[name]["splits"] for name in pair},
            }
    return {name: facts for name, facts in found.items() if name in mine and name not in others}
