"""`pedigree erase`: take records out of the sources, make everything again that
was made from them, and remove what is left of them (docs/erase.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dagster_project.commands.erase_certificate import BLOBS, certificate, certificate_text, free_name, write
from dagster_project.core.errors import InputError
from dagster_project.core.text import listed
from dagster_project.lineage.erasure.kinds import KINDS
from dagster_project.lineage.erasure.records import Request, read_request
from dagster_project.lineage.signing.keys import private_key
from dagster_project.orchestration import durations, dvc
from dagster_project.orchestration.erasure import plan as plans
from dagster_project.orchestration.erasure.exclusive import no_stage_runs, one_erasure
from dagster_project.orchestration.erasure.places import GIT
from dagster_project.orchestration.erasure.steps import Erasure, finish
from dagster_project.views.texts import text

SHOWN = 12
PRIVATE = ("needles", "ids", "request", "tombstones", "retired", "own", "curves", "done", "key", "trained")
"""Keys of a plan that are not shown: they hold text, or serve only to go on."""


def request_of(record: str | None, containing: str | None, source: str | None, file: str | None) -> Request:
    """The request of a command line.

    Raises:
        InputError: an empty text, or an invalid file.
    """
    if file is not None:
        return read_request(Path(file))
    for name, value in (("record", record), ("containing", containing), ("source", source)):
        if value is not None and not value.strip():
            raise InputError(f"--{name}: empty", "see `pedigree erase --help`")
    return Request(*((value,) if value is not None else () for value in (record, containing, source)))


def dry_run(root: Path, request: Request, also: Sequence[str], declined: Sequence[str], reason: str) -> dict[str, Any]:
    """What `erase` would do. Nothing is changed."""
    plan = plans.make(root, request, plans.chosen_kinds(also, declined), reason)
    return {**_shown(plan), "cost": _cost(root, plan)}


def _shown(plan: Mapping[str, Any]) -> dict[str, Any]:
    needles = plan["needles"]
    return {
        **{name: value for name, value in plan.items() if name not in PRIVATE},
        "outputs to retire": len(plan["retired"]),
        "searched by": {
            "texts": len(needles["texts"]),
            "ids": len(needles["ids"]),
            "texts too short or shared": needles["unsearchable"],
        },
        "tombstones": len(plan["tombstones"]),
    }


def _cost(root: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds that each stage took the last time, and the predictions of `pedigree plan` for the trainings.

    Null where unknown.
    """
    seconds = {address: durations.last(root, address) for address in plan["stages"]}
    trained = [
        address.partition("@")[2] for address in plan["stages"] if address.partition("@")[0] in {"adapter", "aligned"}
    ]
    predictions: Any = None
    if trained:
        from dagster_project.commands.plan import plan_variants

        try:
            predictions = plan_variants(root, trained)["variants"]
        except InputError as error:
            predictions = {"unknown": error.what}
    return {"seconds": seconds, "training": predictions}


def erase(
    root: Path,
    request: Request | None,
    also: Sequence[str],
    declined: Sequence[str],
    reason: str,
    key_file: str | None,
    validate: Callable[[Path], Any],
    verified: bool,
) -> dict[str, Any]:
    """Carry an erasure out, or go on with an unfinished one.

    Args:
        request: None: that of the unfinished erasure.
        key_file: private key to sign the certificate with; None: not signed.
        validate: refuses bad parameters before the pipeline runs.
        verified: also make every model of the workspace again, from the sources, and compare the bytes.
    Returns:
        The certificate, with the paths of its files, and of those that are left, which the certificate only counts.
    Raises:
        InputError: another erasure is unfinished, or there is none to go on with.
        Busy: another process erases records or runs a stage.
    """
    key = None if key_file is None else private_key(key_file)
    with one_erasure(root):
        plan = _plan(root, request, plans.chosen_kinds(also, declined), reason)
        erasure = Erasure(root, plan, validate)
        erasure.run()
        if verified and "verify" not in plan:
            from dagster_project.commands.verify import verdicts

            plan["verify"] = verdicts(root, [*plans.models_now(root)])
            plans.save(root, plan)
        erasure.left()  # after --verify, which reads and writes too
        document = certificate(plan)
        if "certificate" not in plan:  # what goes on after an interrupt writes to the same files
            plan["certificate"] = free_name(root, document)
            plans.save(root, plan)
        written = write(root, document, key, plan["certificate"])
        finish(root)
        named = {place: found["paths"] for place, found in plan["left"].items() if "paths" in found}
        return {**document, "files": written, "left files": named}


def _plan(root: Path, request: Request | None, chosen: Sequence[str], reason: str) -> dict[str, Any]:
    """The plan of the unfinished erasure; a new one if there is none."""
    plan = plans.load(root)
    if request is None:
        if plan is None:
            raise InputError("--resume: there is no unfinished erasure", "name what to erase")
        return plan
    if plan is None:
        with no_stage_runs(root, dvc.read_stages(root), waits=False):
            plan = plans.make(root, request, chosen, reason)
            plans.save(root, plan)
    elif plan["request"] != plans.fingerprint(request, chosen, plans.usable_key(root)):
        raise InputError(
            f"another erasure, of {plan['date']}, is unfinished",
            "go on with it: `pedigree erase --resume`, or the same command again",
        )
    return plan


def exit_code(document: Mapping[str, Any]) -> int:
    """0: nothing is left but what git history holds; 1: something is left, a model of the workspace saw the record, or
    `verify` found a difference; 2: a model of the workspace cannot be decided."""
    remains = {place for place in document["left"] if place != GIT}
    if remains or document["impact"].startswith("yes") or "different" in (document["verify"] or {}).values():
        return 1
    return 0 if document["impact"] == "no" else 2


def dry_run_text(document: Mapping[str, Any]) -> str:
    """The plan for the terminal."""
    return text(
        "erasure_plan",
        **document,
        by=document["searched by"],
        remotes_elsewhere=document["remotes elsewhere"],
        event_log_elsewhere=document["event log elsewhere"],
        kinds=KINDS,
        shown=SHOWN,
    )


def as_text(document: Mapping[str, Any]) -> str:
    lines = [certificate_text(document), *(f"{name}: {path}" for name, path in document["files"].items())]
    lines += [f"left in {place}: {listed(paths, SHOWN)}" for place, paths in document["left files"].items()]
    if BLOBS in document["files"]:
        lines.append(
            f"{document['files'][BLOBS]} names old versions of files by their content:"
            " do not commit it, a guess could be tested by it"
        )
    return "\n".join(lines)
