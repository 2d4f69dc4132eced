"""`pedigree why --prove`: trains again with the loss weights of the first
records set to zero, and with those of random ones, and compares the answers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from dagster_project.commands.why_model import Target
from dagster_project.commands.why_question import Question
from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.records import remove, write_json
from dagster_project.lineage.attribution.gradients import TrainedModel
from dagster_project.lineage.attribution.owners import OWNER, remove_others
from dagster_project.lineage.attribution.proof import (
    LEAST_DRAWS,
    MOST_DRAWS,
    PROOFS,
    Verdict,
    draws,
    fits,
    name_of,
    zero_weights,
)
from dagster_project.lineage.attribution.retraining import same_weights
from dagster_project.lineage.notes import read_note
from dagster_project.stages import adapter
from dagster_project.training.methods.hardware import prepare
from dagster_project.training.trainers.harness.checkpoint import run_identity
from dagster_project.training.trainers.harness.weight_audit import LIBRARIES

log = logging.getLogger("pedigree")

DONE = "done.json"


def prove(found: Target, question: Question, hits: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """Test whether the asked tokens become less likely without the first records than without as many random ones.

    Args:
        count: sets of random records.
    Returns:
        {"left_out", "log_probability": of the adapter as trained again with all records, "identical": whether that has
        the adapter's bytes, "change", "draws": changes without random records, "mean_of_draws", "difference",
        "interval", "supported"}; changes in nats, above 0: less likely.
    Raises:
        InputError: the number of sets is out of range, or a packed row would be empty.
        Busy: the stage is being run, another check or index of it is, or an erasure.
        CheckFailed: a training diverged.
    """
    top = sorted(hit["example_id"] for hit in hits)
    if not fits(found.tokenized, top):
        alone = not fits(found.tokenized, [hits[0]["example_id"]])
        raise InputError(
            "--prove: a packed row consists only of the first records, so its loss would be undefined",
            (
                "the first record has a row to itself (all records do without tokenized.packing),"
                " so it cannot be checked; a larger tokenized.packed_length puts several into one"
                if alone
                else "leave out fewer with --top"
            ),
        )
    with found.alone("pedigree why --prove"):
        return _prove(found, question, top, count)


def refuse_draws(count: int) -> None:
    """Raises:
    InputError: there are too few or too many sets of random records.
    """
    if not LEAST_DRAWS <= count <= MOST_DRAWS:
        raise InputError(
            f"--draws {count}: must be from {LEAST_DRAWS} to {MOST_DRAWS}", "3 gives a wide interval, 8 a narrower one"
        )


def _prove(found: Target, question: Question, top: list[str], count: int) -> dict[str, Any]:
    chosen = list(
        islice(
            draws([record.example_id for record in found.records], top, found.store.folder.name, found.tokenized), count
        )
    )
    remove_others(found.root / PROOFS, found.store.folder.name, found.run.address)
    sets = {"all records": [], f"the first {len(top)} left out": top}
    sets |= {f"random set {i + 1} of {count} left out": names for i, names in enumerate(chosen)}
    identity = training_identity(found)
    kept = {what for what, names in sets.items() if is_kept(_folder(found, names), identity)}
    for what in kept:
        remove(_scratch(_folder(found, sets[what])))  # of a check that was killed just before it did so
    log.info(
        f"why: {len(sets) - len(kept)} of {len(sets)} trainings of {found.run.address} to run;"
        " those of earlier questions are kept"
    )
    folders = {
        what: _folder(found, names) if what in kept else train_without(found, names, what, identity)
        for what, names in sets.items()
    }
    whole, without, *of_draws = (
        TrainedModel.load(folder, found.base_model, found.compute, found.run.address).log_probability(question.example)
        for folder in folders.values()
    )
    verdict = Verdict(whole - without, tuple(whole - value for value in of_draws))
    return {
        "left_out": len(top),
        "log_probability": round(whole, 4),
        "identical": same_weights(_folder(found, []), found.folder),
        "change": round(verdict.change, 4),
        "draws": [round(change, 4) for change in verdict.of_draws],
        "mean_of_draws": round(verdict.mean, 4),
        "difference": round(verdict.change - verdict.mean, 4),
        "interval": [round(bound, 4) for bound in verdict.interval],
        "supported": verdict.supported,
    }


def train_without(found: Target, names: Collection[str], what: str, identity: Mapping[str, str]) -> Path:
    """The folder of the adapter trained again by the code of the stage, with a loss weight of 0 for some records.

    Args:
        identity: result of `training_identity`.
    Raises:
        CheckFailed: a blocking check of the training failed.
    """
    folder = _folder(found, names)
    remove(folder)
    scratch = _scratch(folder)  # its checkpoints survive an interruption
    write_json(folder.parent / OWNER, {"stage": found.run.address})
    remove(scratch / "tokenized")
    remove(scratch / "adapter")
    scratch.mkdir(parents=True, exist_ok=True)
    log.info(f"why: training {found.run.address} again, {what}")
    zero_weights(found.tokenized, scratch / "tokenized", names)
    out = scratch / "adapter"
    out.mkdir()
    entry = found.entry.model_copy(update={"report_to": "none"})
    report = adapter.produce(
        found.variant,
        entry,
        found.compute,
        scratch / "tokenized",
        found.base_model,
        out,
        scratch / "loss.csv",
        scratch / "checkpoints",
    )
    if failed := [check.name for check in report.failures]:
        raise CheckFailed(f"the training with {what} failed: {', '.join(failed)}", "see the log above")
    write_json(out / DONE, {"left_out": len(names), "made_by": dict(identity), "files": _files(out)})
    out.replace(folder)
    remove(scratch)
    return folder


def training_identity(found: Target) -> dict[str, str]:
    """Code, libraries, device and dtype of a training that is run now.

    With others, adapters differ in more than their records.
    """
    device, dtype = prepare(found.compute)
    return run_identity(Path(adapter.__file__), found.compute, device, dtype, LIBRARIES)


def is_kept(folder: Path, identity: Mapping[str, str]) -> bool:
    """Whether a folder has the intact adapter of a training of this identity: its weights, and their configuration."""
    note = read_note(folder / DONE)
    return note.get("made_by") == identity and note.get("files") == _files(folder)


def _files(folder: Path) -> dict[str, str]:
    """Path within the folder -> sha256, of all files but the note itself."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / DONE)
    return {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in files}


def _folder(found: Target, names: Collection[str]) -> Path:
    return found.root / PROOFS / found.store.folder.name / name_of(names)


def _scratch(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.training")
