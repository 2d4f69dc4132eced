"""Which models have a record, a source or a file in their own data: rows by split, and training steps."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce

from dagster_project.core.errors import InputError
from dagster_project.lineage import tables
from dagster_project.lineage.graph import closure
from dagster_project.lineage.index import Index, RecordUse
from dagster_project.lineage.rows import LEDGER, record_key
from dagster_project.lineage.runs import StageRun

HASH = re.compile(r"[0-9a-f]+(\.dir)?")


@dataclass
class Exposure:
    """The matching rows that one model itself has seen, parents excluded."""

    rows: Counter[str] = field(default_factory=Counter)
    """Split -> rows."""
    steps: list[tuple[int, int]] = field(default_factory=list)
    """(step, epoch) of every training step on one of them."""
    training_summary: tuple[int, int, int] | None = None
    """(records, first step, last step), for queries by source or hash; None if unknown."""
    steps_known: bool = True
    """Whether the training steps are known."""
    distilled: bool = False
    """Whether the query is a file of the larger model that it learned from."""
    validation: set[bytes] = field(default_factory=set)
    """Keys of the records of the validation split, for queries by record."""


TrainingSummary = tuple[int, int, int]
"""(records, first step, last step)."""


def _added(one: TrainingSummary | None, other: TrainingSummary | None) -> TrainingSummary | None:
    """Sum of two summaries of one training; None if either is unknown."""
    if one is None or other is None:
        return None
    parts = [part for part in (one, other) if part[0]] or [one]
    return sum(n for n, _, _ in parts), min(first for _, first, _ in parts), max(last for _, _, last in parts)


@dataclass(frozen=True)
class Contributions:
    """Records to which rows of a source contributed although they name another row."""

    copies: Mapping[str, set[bytes]]
    """Hash of an output -> records in whose place a copy was dropped."""
    paraphrases: Mapping[int, set[bytes]]
    """Id of an entry -> records of its output that are paraphrases."""
    derivations: Mapping[bytes, list[tuple[bytes, frozenset[str]]]]
    """Key of a record -> records made from it, with the outputs that record this."""
    keys: set[bytes]
    """All of them."""


class Matches:
    """What a question matches: the exposure of each model by its own data, parents excluded."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.record_ids: list[str] = []
        """The queried records and those made from them; empty for queries by source or hash."""
        self.sources: list[str] = []
        self.without_ledger: dict[int, list[StageRun]] = {}
        """Id of a model's run -> data sets without a ledger, which would decide
        which of the records that rows of the source contributed to name it."""
        self.exposures: dict[int, Exposure] = {}
        """Id of a model's run -> its own exposure."""
        self.by_hash = False
        """Whether the query is a hash."""
        self.complete = False
        """Whether dvc.lock alone determines the result."""
        self.derived = False
        """Whether records that were made from the queried ones count, too."""
        self.searched = False
        """Whether the messages of every data set are read: the index alone does not determine the result."""

    @cached_property
    def _trained_models(self) -> list[StageRun]:
        """Models that were or may have been trained: those with upstream data or with training evidence."""
        index = self.index
        return [
            run
            for run in index.runs.values()
            if run.is_model and (index.data(run) or run.md5 in index.evidence) and not index.is_copy(run)
        ]

    def match_records(self, keys: Sequence[bytes], names: Mapping[bytes, str], derived: bool) -> None:
        """Args:
        names: key -> id as it was given.
        derived: whether records that were made from these count, too.
        """
        self.derived = derived
        derivations = self.index.derivations(keys) if derived else {}
        everything = list(
            dict.fromkeys([*keys, *(child for children in derivations.values() for child, _ in children)])
        )
        self.record_ids = [names.get(key, key.hex()) for key in everything]
        shards: dict[str, list[tuple[bytes, str, int]]] = defaultdict(list)
        steps: dict[str, dict[bytes, list[tuple[int, int]]]] = defaultdict(dict)
        for use in self.index.record_uses(everything):
            if use.split:
                shards[use.out].append((use.key, use.split, use.rows))
            else:
                steps[use.out][use.key] = use.steps
        for run in self._trained_models:
            own = self._made_from(run, keys, derivations)
            matching = [
                row for out in self.index.data(run).keys() & shards.keys() for row in shards[out] if row[0] in own
            ]
            rows = Counter[str]()
            for _, split, count in matching:
                rows[split] += count
            trained = [steps[run.md5][key] for key in steps.get(run.md5, ()) if key in own]
            if trained and not rows["train"]:  # the data set is unavailable, but the evidence is not
                rows["train"] = len(trained)
            if +rows:
                self.exposures[run.id] = Exposure(
                    +rows,
                    sorted(step for steps_of in trained for step in steps_of),
                    steps_known=self.index.knows_steps(run),
                    validation={key for key, split, _ in matching if split == "validation"},
                )

    def _made_from(
        self, run: StageRun, keys: Sequence[bytes], derivations: Mapping[bytes, list[tuple[bytes, frozenset[str]]]]
    ) -> set[bytes]:
        """The records themselves, and those that were made from them in the data of one model."""
        if not derivations:
            return set(keys)
        upstream = self.index.ancestors(run).keys()
        return {
            *closure(
                keys, lambda key: [child for child, outs in derivations.get(key, ()) if not outs.isdisjoint(upstream)]
            )
        }

    def match_sources(self, outputs_of: Mapping[str, frozenset[str] | None]) -> None:
        """Match all records of some sources: those that name one of them, and those to which their rows contributed.

        A record counts once.

        Args:
            outputs_of: name of a source -> hashes of outputs, of which one must
                be upstream of a model's data; None if any data counts.
        """
        index = self.index
        self.sources = list(outputs_of)
        rows_of = {name: index.rows_from_source(name) for name in outputs_of}
        contributions = {name: self._contributions(name) for name in outputs_of}
        uses: dict[str, list[RecordUse]] = defaultdict(list)
        if keys := set().union(*(one.keys for one in contributions.values())):
            for use in index.record_uses(keys):
                uses[use.out].append(use)
        for run in self._trained_models:
            data, upstream = index.data(run), index.ancestors(run).keys()
            names = [name for name, outs in outputs_of.items() if outs is None or outs & upstream]
            rows: Counter[str] = Counter()
            for name in names:
                for out in data.keys() & rows_of[name].keys():
                    rows.update(rows_of[name][out])
            keys = set().union(*(self._contributed_to(run, contributions[name]) for name in names))
            for name in names:
                keys -= index.keys_of_source([*data], name, keys) if keys else keys
            summaries = [index.training_summary(run, name) for name in names]
            with_rows = [out for out in data if any(out in rows_of[name] for name in names)] if keys else []
            if lost := [data[out] for out in with_rows if index.file_path(out, LEDGER) is None]:
                self.without_ledger[run.id] = lost
            elif keys:
                for use in (use for out in data for use in uses[out] if use.key in keys):
                    if use.split:
                        rows[use.split] += use.rows
                trained = [use for use in uses[run.md5] if not use.split and use.key in keys]
                steps = [step for use in trained for step, _ in use.steps]
                summaries.append((len(trained), min(steps, default=0), max(steps, default=0)))
            if rows:
                self.exposures[run.id] = Exposure(rows, training_summary=reduce(_added, summaries))

    def _contributions(self, name: str) -> Contributions:
        copies, paraphrases = self.index.contributed(name)
        derivations = self.index.derivations(set().union(*copies.values()))
        children = {child for found in derivations.values() for child, _ in found}
        return Contributions(copies, paraphrases, derivations, children.union(*copies.values(), *paraphrases.values()))

    def _contributed_to(self, run: StageRun, found: Contributions) -> set[bytes]:
        """Keys of the records of one model's data to which rows of a source contributed although they may not name it:
        records in whose place a copy from the source was dropped, what was made from these, and paraphrases."""
        if not found.keys:
            return set()
        ancestors = self.index.ancestors(run)
        dropped = set().union(*(found.copies[out] for out in found.copies.keys() & ancestors.keys()))
        return self._made_from(run, [*dropped], found.derivations).union(
            *(found.paraphrases.get(upstream.entry.id, ()) for upstream in ancestors.values())
        )

    def match_content(self, digest: str) -> None:
        """Match an output, a file or a source by its hash.

        Raises:
            InputError: the prefix is too short, or nothing in history has such a hash.
        """
        index, prefix = self.index, digest.lower()
        self.by_hash = True
        if len(prefix) < 6:
            raise InputError(
                f"--hash {digest!r}: {len(prefix)} digits do not name one hash", "give at least six digits"
            )
        if not HASH.fullmatch(prefix):
            raise InputError(f"--hash {digest!r}: not a hash", "give a sha256 or md5, or at least its first six digits")
        sources = index.outputs_by_source_hash(prefix)
        if sources:
            self.match_sources(sources)
        files, outs = index.matching_hashes(prefix)
        readers = {
            run.id
            for run in index.runs.values()
            for dep, _, md5 in run.inputs
            if md5.startswith(prefix) and dep not in run.entry.watched
        }
        distilled = index.distilled_from(prefix)
        self.complete = bool(readers or distilled or index.outputs_with_prefix(prefix))
        if not (self.complete or sources or files):
            if any(index.missing_reports(run, only_splits=False) for run in self._trained_models):
                return  # one of these reports could name it
            raise InputError(
                f"--hash {digest}: no output, file of one, or source in history has this hash",
                "see `pedigree audit MODEL`",
            )
        for run in self._trained_models:
            ancestors = index.ancestors(run)
            shards = index.shards(run)
            whole = any(upstream.id in readers for upstream in [*ancestors.values(), run])
            matching = [] if whole else [(split, md5) for _, split, md5 in shards if md5 in files]
            if not (whole or matching or outs & ancestors.keys()):
                continue
            rows = Counter[str]()
            for split, md5 in matching or [(split, md5) for _, split, md5 in shards]:
                rows[split] += index.shard_sizes.get(md5, 0)
            summary = (
                self._summary_of_shards(run, [md5 for split, md5 in matching if split == "train"])
                if matching
                else index.training_summary(run, None)
            )
            self.exposures[run.id] = Exposure(rows, training_summary=summary)
        for run in index.runs.values():
            if run.is_model and run.md5 in outs and run.id not in self.exposures:
                self.exposures[run.id] = Exposure()
        for run in distilled:
            self.exposures.setdefault(run.id, Exposure()).distilled = True

    def _summary_of_shards(self, run: StageRun, shards: Sequence[str]) -> tuple[int, int, int] | None:
        """(records, first step, last step) of a model's training on some shards; None if unknown."""
        paths = self.index.shard_paths()
        if not self.index.knows_steps(run) or any(md5 not in paths for md5 in shards):
            return None
        keys = {
            record_key(identity)
            for md5 in shards
            for identity in tables.read(paths[md5], ["example_id"])["example_id"].to_list()
        }
        uses = [use for use in self.index.record_uses(keys) if use.out == run.md5 and use.split is None]
        steps = [step for use in uses for step, _ in use.steps]
        return len({use.key for use in uses}), min(steps, default=0), max(steps, default=0)
