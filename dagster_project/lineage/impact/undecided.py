"""The models that cannot be decided, and the outputs and reports that would decide."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dagster_project.lineage.certificates import data_deleted_of
from dagster_project.lineage.graph import closure
from dagster_project.lineage.history import is_within
from dagster_project.lineage.impact.matching import Matches
from dagster_project.lineage.run_index import SOURCES
from dagster_project.lineage.runs import StageRun, fetch_hint

NOTHING_RECORDED = "nothing records how it was made; `dvc gc --workspace` deletes outputs that dvc.lock does not name"
ORIGINAL = "the model that it is a copy of"


@dataclass
class _Unknown:
    """What would decide whether a model saw the queried records."""

    missing: dict[str, StageRun] = field(default_factory=dict)
    """Hash of an unavailable output -> the run that made it."""
    reports: dict[str, dict[str, str]] = field(default_factory=dict)
    """Path -> unavailable report."""
    unexplained: dict[str, None] = field(default_factory=dict)
    """Paths of inputs that nothing records; "" for the model itself."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.reports or self.unexplained)

    def described(self, first: StageRun, erasure: str) -> dict[str, Any]:
        """Args:
        first: the first run that made the model.
        erasure: that deleted its data; empty if none did.
        """
        described = [
            {"stage": absent.address, "path": absent.path, "md5": absent.md5} for absent in self.missing.values()
        ]
        fetch = f"nothing, because {erasure} deleted the data" if erasure else ""
        hints = [fetch or fetch_hint([*self.missing.values()])] if self.missing else []
        hints += [f"{', '.join(self.reports)}: in no commit and no cache"] if self.reports else []
        return {
            "stage": first.address,
            "md5": first.md5,
            "commit": first.commit,
            "found_in": first.place,
            "missing": [*described, *self.reports.values()],
            **({"unexplained": [path or "this model" for path in self.unexplained]} if self.unexplained else {}),
            "fetch": "; ".join(hints) or NOTHING_RECORDED,
        }


class UndecidedModels:
    """The models for which `matches` cannot decide whether they saw what was asked for."""

    def __init__(self, matches: Matches) -> None:
        self._matches, self._index = matches, matches.index

    def models(self, runs: Sequence[StageRun] | None = None) -> list[dict[str, Any]]:
        """Models that cannot be decided, because an output is unavailable or nothing records how it was made.

        Of several runs that made a model, what is missing of any.

        Args:
            runs: of models; None: all.
        """
        unknown: dict[str, _Unknown] = defaultdict(_Unknown)
        for run in [upstream for upstream in self._index.runs.values() if upstream.is_model] if runs is None else runs:
            found = unknown[run.md5]
            for upstream in closure([run], self._index.parents):
                if not self._index.is_copy(upstream):
                    found.reports |= {one["path"]: one for one in self._missing_reports(upstream)}
                    if not self._matches.complete:
                        found.missing |= {absent.md5: absent for absent in self._missing(upstream)}
                    for one in self._relevant(upstream):
                        found.unexplained |= dict.fromkeys(self._unexplained(one))
                    found.unexplained |= {"": None} if upstream.place == "cache" else {}
                elif not self._index.parents(upstream):
                    candidates = self._index.unavailable_originals(upstream)
                    found.missing |= {absent.md5: absent for absent in candidates}
                    found.unexplained |= {} if candidates else {ORIGINAL: None}
        first = self._index.runs_by_output
        return [found.described(first[md5][0], self._erased.get(md5, "")) for md5, found in unknown.items() if found]

    def _relevant(self, run: StageRun) -> list[StageRun]:
        """The model and the runs upstream whose inputs must be known to decide about it.

        Which texts a data set with splits contains is known without.
        """
        if self._matches.derived or self._matches.sources or self._matches.complete:
            return [run, *self._index.ancestors(run).values()]
        return [run, *(upstream for upstream in self._index.data(run).values() if not self._index.is_split(upstream))]

    def _unexplained(self, run: StageRun) -> list[str]:
        """Inputs of a run that nothing records. A row has no id before it is read from the sources, so a question about
        a record needs no account of what made these.
        """
        paths = self._index.unexplained(run)
        return [path for path in paths if not (self._matches.derived and is_within(path, SOURCES))]

    def _missing_reports(self, run: StageRun) -> list[dict[str, str]]:
        """Unavailable reports that could name the queried source: by its hash, or as a file of paraphrases, which no
        row names. A model that saw rows of it may have seen more of them."""
        matches = self._matches
        if (not matches.sources and not matches.by_hash) or (matches.complete and run.id in matches.exposures):
            return []
        return self._index.missing_reports(run, only_splits=not self._matches.by_hash)

    def _missing(self, run: StageRun) -> list[StageRun]:
        """Unavailable outputs that are needed to decide about one model, its parents excluded."""
        index = self._index
        if not index.data(run):
            return []
        missing = index.missing(run)
        missing += [absent for absent in self._matches.without_ledger.get(run.id, ()) if absent not in missing]
        if self._matches.searched:
            gone = {out for out, _, md5 in index.shards(run) if md5 not in self._shard_paths}
            missing += [absent for absent in index.data(run).values() if absent.md5 in gone and absent not in missing]
        if self._matches.derived or self._may_hold_source(run):
            missing += [absent for absent in index.missing_contributions(run) if absent not in missing]
        return missing

    def _may_hold_source(self, run: StageRun) -> bool:
        """Whether the data of a model are made from the queried source, or
        reports that name its sources are unavailable."""
        if not self._matches.sources:
            return False
        if any(not self._reviewed[one].isdisjoint(self._index.ancestors(run)) for one in self._matches.sources):
            return True
        sources = self._index.sources_of(run)
        return sources is None or any(
            is_within(one, asked) or is_within(asked, one) for one in sources for asked in self._matches.sources
        )

    @cached_property
    def _reviewed(self) -> Mapping[str, set[str]]:
        """Source -> hashes of the outputs that it was applied to, if it is a review file."""
        return {one: self._index.reviewed_by(one) for one in self._matches.sources}

    @cached_property
    def _erased(self) -> Mapping[str, str]:
        return data_deleted_of(self._index.root)

    @cached_property
    def _shard_paths(self) -> Mapping[str, Path]:
        return self._index.shard_paths()
