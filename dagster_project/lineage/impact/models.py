"""The models that saw what was asked for, themselves or through their parents,
and those that were only measured by one, as documents."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from dagster_project.core.hashing import md5_of_file
from dagster_project.lineage import tables
from dagster_project.lineage.impact.matching import Exposure, Matches
from dagster_project.lineage.rows import record_key
from dagster_project.lineage.runs import MEASURED_TASKS, StageRun

SAMPLES = "samples.parquet"
"""Table of an alignment's output with the held-out prompts whose answers were
measured (evaluation/paired/alignment.py)."""


class ExposedModels:
    """The models that `matches` reaches."""

    def __init__(self, matches: Matches) -> None:
        self._matches, self._index = matches, matches.index
        self._reached: dict[int, dict[int, None]] = {}
        """Id of a model's run -> what `exposed_through` gives for it."""
        self._measured: dict[int, dict[tuple[int, int], None]] = {}
        """Id of a model's run -> what `watched_through` gives for it."""

    def exposed_through(self, run: StageRun) -> dict[int, None]:
        """Ids of the runs with their own exposure: the model itself and its ancestors."""
        if run.id not in self._reached:
            self._reached[run.id] = {}
            own = {run.id: None} if run.id in self._matches.exposures else {}
            self._reached[run.id] = own | {
                entry: None for parent in self._index.parents(run) for entry in self.exposed_through(parent)
            }
        return self._reached[run.id]

    def watched_through(self, run: StageRun) -> dict[tuple[int, int], None]:
        """(id of a training, id of an exposed model that only measured it) of the model itself and its ancestors."""
        if run.id not in self._measured:
            self._measured[run.id] = {}
            own = {(run.id, watcher.id): None for watcher in self._index.watchers(run) if self.exposed_through(watcher)}
            self._measured[run.id] = own | {
                pair: None for parent in self._index.parents(run) for pair in self.watched_through(parent)
            }
        return self._measured[run.id]

    def watched(self) -> list[dict[str, Any]]:
        """Every version of a model that was not exposed, but whose training an
        exposed model measured, in the order of history."""
        by_hash: dict[str, dict[str, Any]] = {}
        exposed = {run.md5 for run in self._index.runs.values() if run.is_model and self.exposed_through(run)}
        for run in self._index.runs.values():
            if not run.is_model or run.md5 in exposed or not (pairs := self.watched_through(run)):
                continue
            entry = self._entry(by_hash, run, "also_called", "watched_by")
            for trained, watcher in ((self._index.runs[one], self._index.runs[other]) for one, other in pairs):
                seen = [self._exposure_document(self._index.runs[by]) for by in self.exposed_through(watcher)]
                found = {"by": watcher.address, "md5": watcher.md5, "training": trained.address, "seen": seen}
                entry["watched_by"] += [found] if found not in entry["watched_by"] else []
        return list(by_hash.values())

    def models(self) -> list[dict[str, Any]]:
        """Every version of a model that was exposed, itself or through its parents, in the order of history."""
        by_hash: dict[str, dict[str, Any]] = {}
        holds: dict[str, list[tuple[dict[str, Any], list[str | None]]]] = defaultdict(list)
        """Hash of a model -> what it or a parent saw, and the commits at which this holds."""
        for run in self._index.runs.values():
            if not run.is_model or not (exposed := self.exposed_through(run)):
                continue
            entry = self._entry(by_hash, run, "commits", "also_called", "seen")
            commits = self._index.commits_of(run)
            documents = [self._exposure_document(self._index.runs[by]) for by in exposed]
            if run.place == "run cache" and all(
                any(document == seen for seen, _ in holds[run.md5]) for document in documents
            ):
                continue  # another lineage that may have been, which adds nothing
            entry["commits"] += [commit for commit in commits if commit not in entry["commits"]]
            for document in documents:
                where = next((where for seen, where in holds[run.md5] if seen == document), None)
                if where is None:
                    holds[run.md5].append((document, [*commits]))
                else:
                    where += [commit for commit in commits if commit not in where]
        for md5, entry in by_hash.items():
            differ = any(where != entry["commits"] for _, where in holds[md5])
            entry["seen"] = [{**document, **({"commits": where} if differ else {})} for document, where in holds[md5]]
        return list(by_hash.values())

    def _entry(self, by_hash: dict[str, dict[str, Any]], run: StageRun, *lists: str) -> dict[str, Any]:
        """The document of a version of a model, with the name of this run; a new one has empty lists."""
        first = self._index.runs_by_output[run.md5][0]
        found = {"path": run.path, "md5": run.md5, "commit": first.commit, "found_in": first.place}
        entry = by_hash.setdefault(run.md5, {"stage": run.address, **found, **{name: [] for name in lists}})
        if run.address not in [entry["stage"], *entry["also_called"]]:
            entry["also_called"].append(run.address)
        return entry

    def _are_measured(self, run: StageRun, exposure: Exposure) -> bool | None:
        """Whether answers to any of the queried tasks were measured; None if the table of these answers is unavailable.

        Of a source or a hash: any may be.
        """
        if not self._matches.record_ids:
            return True
        md5 = (self._index.files(run.md5) or {}).get(SAMPLES)
        path = self._index.file_path(run.md5, SAMPLES)
        if path is None or md5_of_file(path) != md5:
            return None
        return any(
            record_key(one) in exposure.validation for one in tables.read(path, ["example_id"])["example_id"].to_list()
        )

    def _exposure_document(self, run: StageRun) -> dict[str, Any]:
        exposure = self._matches.exposures[run.id]
        steps = [step for step, _ in exposure.steps]
        document: dict[str, Any] = {"by": run.address, "md5": run.md5, "splits": dict(sorted(exposure.rows.items()))}
        if (
            MEASURED_TASKS in run.entry.watched
            and "validation" in exposure.rows
            and (measured := self._are_measured(run, exposure)) is not False
        ):
            document["measured"] = ["validation"] if measured else None
        if self._matches.record_ids:
            return {
                **document,
                "steps": steps if exposure.steps_known else None,
                "epochs": [epoch for _, epoch in exposure.steps] if exposure.steps_known else None,
            }
        if exposure.training_summary is None:
            return {**document, "learnt": None, **({"distilled": True} if exposure.distilled else {})}
        return {
            **document,
            "learnt": dict(zip(("records", "first_step", "last_step"), exposure.training_summary, strict=True)),
        }
