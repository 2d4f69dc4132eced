"""Carries out the plan of an erasure, step by step.

What a step removes is written to the plan before anything is removed, so that an interrupted erasure goes on with the
same lists, and ends in the same state and certificate.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.hashing import sha256_of_bytes, sha256_of_file
from dagster_project.core.records import remove
from dagster_project.evaluation.kept_replies import REPLIES
from dagster_project.lineage import exports_in_place, scratch_folder
from dagster_project.lineage.attribution.proof import PROOFS
from dagster_project.lineage.attribution.store import GRADIENTS
from dagster_project.lineage.database import INDEX_FILE
from dagster_project.lineage.erasure import removal, tombstones
from dagster_project.lineage.erasure.scan import Scanner
from dagster_project.lineage.index import Index
from dagster_project.lineage.signing.model_signature import ATTESTATIONS, PUBLIC_KEY, SIGNATURE
from dagster_project.lineage.unfinished_erasure import FILE, PLAN
from dagster_project.orchestration import dvc
from dagster_project.orchestration.erasure import event_log, membership
from dagster_project.orchestration.erasure.exclusive import no_stage_runs
from dagster_project.orchestration.erasure.layout import CACHE, EVENT_LOG, SCRATCH
from dagster_project.orchestration.erasure.objects import (
    Own,
    curves_of,
    curves_to_remove,
    listings,
    name_of,
    own_objects,
    present_in,
    runs_naming,
    to_remove,
)
from dagster_project.orchestration.erasure.places import Search, search
from dagster_project.orchestration.erasure.plan import (
    REMAKE,
    found_in_models,
    models_now,
    needles_in,
    save,
    usable_key,
    with_parents,
)
from dagster_project.orchestration.erasure.remotes import needed_objects, remotes_of, removers
from dagster_project.orchestration.integrity import KNOWN_HASHES
from dagster_project.orchestration.run_all import run_all
from dagster_project.views.comparison import WHY

log = logging.getLogger("pedigree")

OWN_SCRATCH = (
    "set_aside", "checkpoints", "scratch", "rows", GRADIENTS.name, PROOFS.name, REPLIES.name, KNOWN_HASHES.name
)  # fmt: skip
"""Folders and files of .dvc/tmp/pedigree that may hold tokens, weights,
gradients or hashes of a run with the record: deleted as a whole."""
DELETED = ("pages", SCRATCH)
"""Places whose files are deleted: they are drawn again, or are of no use."""
COPY = "source"
"""File in the folder of the plan: a source without the rows, before it replaces the source."""


class Erasure:
    """One erasure, by its plan."""

    def __init__(self, root: Path, plan: dict[str, Any], validate: Callable[[Path], Any]) -> None:
        """Args:
        validate: refuses bad parameters before the pipeline runs.
        """
        self.root, self.plan, self.validate = root.resolve(), plan, validate
        self.scanner = Scanner(needles_in(plan))

    def run(self) -> None:
        """All steps that are not done yet. `left` comes after all that the command does."""
        steps = (
            self.losses_before,
            self.sources,
            self.tombstones,
            self.pipeline,
            self.losses_after,
            self.cache,
            self.files,
            self.index,
            self.dagster,
        )
        for step in steps:
            if step.__name__ not in self.plan["done"]:
                log.info(f"erase: {' '.join((step.__doc__ or '').partition('.')[0].split())}")
                runs_stages = step == self.pipeline
                with nullcontext() if runs_stages else no_stage_runs(self.root, self.plan["stages"], waits=True):
                    step()
                self.plan["done"].append(step.__name__)
                save(self.root, self.plan)

    def losses_before(self) -> None:
        """Measure the losses of the records by the models that were trained on them."""
        ids = self.plan["ids"]
        remade = {model["stage"]: model["md5"] for model in self.plan["models"] if model["outcome"] == REMAKE}
        self.plan["trained"] = membership.trained_records(self.root, ids, usable_key(self.root), remade)
        self.plan["losses before"] = membership.measure(self.root, self.plan["trained"], ids, remade)

    def sources(self) -> None:
        """Take the rows out of the sources."""
        for path, change in self.plan["sources"].items():
            file = self.root / path
            beside = file.with_name(f".{file.name}.erase")
            beside.unlink(missing_ok=True)  # of an erasure that was killed
            now = sha256_of_file(file) if file.is_file() else "missing"
            if now == change["after"]:
                continue
            if now != change["before"]:
                raise InputError(
                    f"{path} was changed since the erasure began", "undo the change, then run the same command again"
                )
            content = removal.without(file, {*change["rows"]}, path, change["may_be_empty"], self.root)
            if sha256_of_bytes(content) != change["after"]:
                raise AssertionError(f"{path}: another result than planned")
            _replace(file, content, self.root / PLAN / COPY, beside)

    def tombstones(self) -> None:
        """Write keyed hashes of the records, by which a later import is refused."""
        reason = {"reason": self.plan["reason"]} if self.plan["reason"] else {}
        tombstones.add(
            self.root, self.plan["tombstones"], {"key": self.plan["key"], "date": self.plan["date"], **reason}
        )

    def pipeline(self) -> None:
        """Make all stages again that had run."""
        states = dvc.read_stages(self.root)  # variants may have come and gone since the plan was made
        addresses = with_parents(states, [address for address in self.plan["stages"] if address in states])
        done = run_all(self.root, 1, False, self.validate, only=addresses)
        if done["interrupted"]:
            raise KeyboardInterrupt
        if not done["passed"]:
            failed = [address for address, stage in done["stages"].items() if stage["outcome"] == "failed"]
            raise CheckFailed(
                f"the rows are out of the sources, but {', '.join(failed)} failed, so nothing else was removed yet",
                "fix the error above, then run the same command again: it goes on",
            )

    def losses_after(self) -> None:
        """Measure the losses of the records by the models made again."""
        now = models_now(self.root)
        remade = {address: now.get(address, "") for address in self.plan["losses before"]}
        self.plan["losses after"] = membership.measure(self.root, self.plan["trained"], self.plan["ids"], remade)

    def cache(self) -> None:
        """Remove objects of DVC's cache and of remotes in folders that hold the records, or were made from them."""
        if "removed" not in self.plan:
            self._plan_objects()
            save(self.root, self.plan)
        removed = self.plan["removed"]
        self._keep_needed(removed)
        folder = remotes_of(self.root).cache / "files" / "md5"
        for name in removed["objects"]:
            (folder / name[:2] / name[2:]).unlink(missing_ok=True)
        for path in removed["runs"]:
            Path(self.root, path).unlink(missing_ok=True)
        with removers(self.root) as by_remote:
            for name, oids in removed["remotes"].items():
                for oid in oids:
                    by_remote[name](oid)

    def _keep_needed(self, removed: dict[str, Any]) -> None:
        """Take out of the lists what dvc.lock names by now: an interrupted erasure can go on much later."""
        needed = needed_objects(self.root)
        removed["objects"] = [name for name in removed["objects"] if name not in needed]
        removed["remotes"] = {
            remote: [name for name in names if name not in needed] for remote, names in removed["remotes"].items()
        }
        save(self.root, self.plan)

    def _plan_objects(self) -> None:
        remotes = remotes_of(self.root)
        found = search(self.root, self.scanner, remotes)
        needed = needed_objects(self.root)
        index = Index(self.root)
        recorded = own_objects(index, self.plan["own"], with_run_cache=False)
        oids, runs = set[str](), list[Path]()
        if found.layout.owns_cache:
            own = own_objects(index, self.plan["own"], with_run_cache=True)
            oids = self._oids(found, CACHE, remotes.cache, needed, own, {*self.plan["retired"]})
        on_remotes = {
            name: self._oids(
                found, f"remote {name}", folder, needed, recorded, recorded.outputs.intersection(self.plan["retired"])
            )
            for name, folder in remotes.folders.items()
        }
        curves = curves_of(index, self.plan.get("curves", {}))
        drawn = curves_to_remove(curves, oids.union(*on_remotes.values())) - needed
        oids |= present_in(remotes.cache, drawn) if found.layout.owns_cache else set()
        on_remotes = {name: of | present_in(remotes.folders[name], drawn) for name, of in on_remotes.items()}
        everything = oids.union(*on_remotes.values())
        for storage in [*([remotes.cache] if found.layout.owns_cache else []), *remotes.folders.values()]:
            runs += runs_naming(storage, everything)
        self.plan["removed"] = {
            "objects": sorted(oids),
            "runs": [os.path.relpath(path, self.root) for path in runs],
            "remotes": {name: sorted(of) for name, of in on_remotes.items()},
        }
        self.plan["shared cache"] = not found.layout.owns_cache
        self.plan["files"] = sorted(
            os.path.relpath(hit.path, self.root) for place in DELETED for hit in found.places.get(place, ())
        )

    def _oids(
        self, found: Search, place: str, storage: Path, needed: set[str], own: Own, retired: set[str] | frozenset[str]
    ) -> set[str]:
        """Hashes of the objects of a cache or remote to remove."""
        folder = storage / "files" / "md5"
        hits = (hit for hit in found.places.get(place, ()) if hit.sure and hit.path.is_relative_to(folder))
        holding = {name for hit in hits if (name := name_of(hit.path))}
        # whatever a search finds in a short text
        holding |= {change["md5"] for change in self.plan["sources"].values() if "md5" in change}
        return present_in(storage, to_remove(listings(folder), holding, retired, needed, own))

    def files(self) -> None:
        """Remove pages and scratch files that hold them, and exports of the
        release and attestations that state hashes of the sources before."""
        exports_in_place.delete(self.root)
        for folder in self.plan.get("signatures", ()):
            for name in (SIGNATURE, ATTESTATIONS, PUBLIC_KEY):
                (self.root / folder / name).unlink(missing_ok=True)
        for path in self.plan["files"]:
            Path(self.root, path).unlink(missing_ok=True)
        for name in OWN_SCRATCH:
            remove(self.root / ".dvc" / "tmp" / "pedigree" / name)
        scratch_folder.remove_abandoned(self.root)
        # also pages with a short text, which no search finds: they have the beginning of an id alone
        remove(self.root / WHY)

    def index(self) -> None:
        """Remove the records from the index of audits."""
        if "seen by" not in self.plan:
            self.plan["seen by"] = found_in_models(self.root, self.plan["ids"])
            save(self.root, self.plan)
        Index(self.root).forget(self.plan["ids"])
        damaged = self.root / INDEX_FILE
        damaged.with_name(f"{damaged.name}.damaged").unlink(missing_ok=True)

    def dagster(self) -> None:
        """Remove what holds them from Dagster's event log and log files."""
        found = search(self.root, self.scanner, remotes_of(self.root))
        shared = not found.layout.home.is_relative_to(self.root)
        paths = [hit.path for hit in found.places.get(EVENT_LOG, ()) if hit.sure or not shared]
        known = self.plan.setdefault("dagster", [])
        self.plan["dagster"] = sorted({*known, *(os.path.relpath(path, self.root) for path in paths)})
        save(self.root, self.plan)
        for path in paths:
            if database := event_log.database_of(path):
                event_log.clean(database, self.scanner, only_sure=shared)
            else:
                path.unlink(missing_ok=True)

    def left(self) -> None:
        """Search every place again, also if an interrupted command has done so."""
        found = search(self.root, self.scanner, remotes_of(self.root))
        self.plan["left"] = found.document()
        self.plan["blobs"] = found.blobs
        self.plan["searched"] = found.searched()
        self.plan["after"] = models_now(self.root)


def _replace(file: Path, content: bytes, scratch: Path, beside: Path) -> None:
    """Replace a file as a whole. Nothing half written is ever in its folder, which stages depend on.

    Args:
        scratch: where the new file is written.
        beside: where, if that is on another file system.
    """
    scratch.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_bytes(content)
    shutil.copymode(file, scratch)
    try:
        scratch.replace(file)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copy(scratch, beside)
        beside.replace(file)
        scratch.unlink()


def finish(root: Path) -> None:
    """Delete the plan, which holds the text, after what killed commands left beside it: until then, the erasure is
    unfinished."""
    for path in (root / PLAN).iterdir():
        if path != root / FILE:
            remove(path)
    remove(root / PLAN)
