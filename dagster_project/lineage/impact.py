"""Finds the models that have seen a record: every model in history, directly or through its parents, with splits and steps."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.messages import Messages, field_texts
from dagster_project.core.text import visible
from dagster_project.lineage import tables
from dagster_project.lineage.history import is_within
from dagster_project.lineage.index import Index, RecordUse
from dagster_project.lineage.published import erasure_of, missing_keys, record_of
from dagster_project.lineage.registered import registered
from dagster_project.lineage.rows import record_key
from dagster_project.lineage.runs import MEASURED_TASKS, StageRun, fetch_hint
from dagster_project.lineage.search import search
from dagster_project.lineage.sources import stages_reading

NOTHING_RECORDED = "nothing records how it was made; `dvc gc --workspace` deletes outputs that dvc.lock does not name"
ORIGINAL = "the model that it is a copy of"
RECORD_ID = re.compile(r"[0-9a-fA-F]{32}")
SHOWN = 12
"""Most steps, records and missing outputs shown in the terminal; `--json` lists all."""


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


TrainingSummary = tuple[int, int, int]
"""(records, first step, last step)."""


def _added(one: TrainingSummary | None, other: TrainingSummary | None) -> TrainingSummary | None:
    """Sum of two summaries of one training; None if either is unknown."""
    if one is None or other is None:
        return None
    parts = [part for part in (one, other) if part[0]] or [one]
    return sum(n for n, _, _ in parts), min(first for _, first, _ in parts), max(last for _, _, last in parts)


def impact(
    root: Path,
    record: str | None = None,
    text: str | None = None,
    source: str | None = None,
    content: str | None = None,
    near: bool = False,
    containing: str | None = None,
    regex: bool = False,
) -> dict[str, Any]:
    """The models that saw a record, a text, a source, or a file or folder by its hash. Exactly one of these is given.

    Args:
        text: text of a message: its content, its reasoning, the arguments of a call as JSON, or one text in them; case and whitespace are ignored.
        source: a file, or a folder and its contents, as named in the records.
        content: md5 or sha256, or a prefix of one, of a source, an output, or a file of an output.
        near: also search for near-copies of the record or text (curation/similarity/overlap.py).
        containing: part of a message (lineage/search.py).
        regex: `containing` is a regular expression.
    Returns:
        {"asked", "published", "erased", "verdict", "records", "models", "watched", "near", "matches", "read_by", "unknown", "looked_at", ...}.
        `models`, in the order of history, have the splits and training steps, the parent that saw the record, the commits at which this holds, and the
        registered versions of the model, if it has any; `watched`, if not empty: those that did not see it, but were measured by one that did;
        `unknown` lists models that cannot be decided, with the outputs that are missing; `published`: {"id", "record"} if a published id was asked
        for; `erased`: the day, if it was erased: models that were deleted then are not listed. The verdict is "yes", "no" only if everything was
        looked at, or else "cannot tell".
    Raises:
        InputError: the question cannot be answered: no such source or hash was ever recorded, the id is malformed, or there is nothing to look at.
    """
    _refuse_question(record, text, near, containing, regex)
    index = Index(root)
    index.read_records()
    query = _ImpactQuery(index)
    asked: dict[str, Any] = {"record": record, "text": text, "source": source, "hash": content, "containing": containing}
    copies: list[dict[str, Any]] = []
    matches: list[dict[str, Any]] = []
    published = None
    erased = erasure_of(index, record.lower()) if record is not None else None
    read_by: list[str] = []
    unmapped: list[dict[str, Any]] = []
    if source is not None:
        name = _known_source(index, source)
        query.match_sources({name: None})
        read_by = [] if index.knows_source(name) else stages_reading(index, name)
    elif content is not None:
        query.match_content(content)
    else:
        if record is not None and not index.knows_record(record_key(record)):
            published = record_of(index, record)
            record, unmapped = (record, missing_keys(index)) if published is None else (published, [])
        if containing is not None:
            matches = search(index, containing, regex)
            keys = list(dict.fromkeys(record_key(match["example_id"]) for match in matches))
        else:
            keys = [record_key(record)] if record is not None else index.records_with_text(text or "")
        if near:
            copies = _near_copies(index, keys, text, record)
            keys = sorted({*keys, *(record_key(copy["example_id"]) for copy in copies)})
        query.searched = near or containing is not None
        query.match_records(keys, {record_key(record): record} if record is not None else {}, derived=record is not None)
    models = query.models()
    undecided = {model["md5"]: model for model in query.unknown()}
    for model in models:
        if (partly := undecided.pop(model["md5"], None)) and partly["missing"]:
            model |= {name: partly[name] for name in ("missing", "fetch")}
    versions = registered(root)
    for model in models:
        model |= {"registered": [one.as_dict() for one in versions[model["md5"]]]} if model["md5"] in versions else {}
    unknown = [*undecided.values(), *unmapped]
    complete = not (unknown or index.unreadable or index.history.shallow)
    looked_at = index.looked_at()
    if complete and not looked_at["models"] and not looked_at["data_sets"]:
        raise InputError(
            "nothing has been run here: no model and no data set can be looked at", "run it in the project's folder, or `dvc repro` first"
        )
    return {
        "asked": {name: value for name, value in asked.items() if value is not None},
        **({"published": {"id": asked["record"], "record": published}} if published else {}),
        **({"erased": erased} if erased else {}),
        "verdict": "yes" if models else "no" if complete else "cannot tell",
        "records": query.record_ids,
        "models": models,
        **({"watched": watched} if (watched := query.watched()) else {}),
        **({"near": copies} if near else {}),
        **({"matches": matches} if containing is not None else {}),
        **({"read_by": read_by} if read_by else {}),
        "unknown": unknown,
        "looked_at": looked_at,
        "unreadable": index.unreadable,
        "shallow": index.history.shallow,
    }


def _refuse_question(record: str | None, text: str | None, near: bool, containing: str | None, regex: bool) -> None:
    if text is not None and not text.strip():
        raise InputError("--text: the text is empty", "give the whole text of a message, or a part of it with --containing")
    if near and record is None and text is None:
        raise InputError("--near needs a text to compare", "use it with --text or --record")
    if regex and containing is None:
        raise InputError("--regex needs an expression", "use it with --containing")
    if record is not None and not RECORD_ID.fullmatch(record):
        raise InputError(
            f"--record {visible(record)}: not the id of a record", "an example_id has 32 hexadecimal digits; look a text up with --text"
        )


def exposed_models(index: Index, ids: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`models` and `unknown` of `impact`, for any of some records and what was made from them.

    Args:
        index: whose records were read.
        ids: `example_id` of each record.
    """
    query = _ImpactQuery(index)
    query.match_records([record_key(one) for one in ids], {record_key(one): one for one in ids}, derived=True)
    models = query.models()
    decided = {model["md5"] for model in models}
    return models, [model for model in query.unknown() if model["md5"] not in decided]


def exposed_in_workspace(index: Index, ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Addresses of the models in the `dvc.lock` of the workspace that were exposed to any of some records and what was made from them, and of those that
    cannot be decided. Only the runs recorded there count: an earlier run, of other data, can have given the same bytes.

    Args:
        index, ids: as for `exposed_models`.
    """
    query = _ImpactQuery(index)
    query.match_records([record_key(one) for one in ids], {record_key(one): one for one in ids}, derived=True)
    models = [run for run in index.runs.values() if run.in_workspace and run.is_model]
    exposed = {run.address for run in models if query.exposed_through(run)}
    unknown = {run.address for run in models if query.unknown([run])}
    return sorted(exposed), sorted(unknown - exposed)


def _known_source(index: Index, source: str) -> str:
    """A source as records name it.

    Raises:
        InputError: no recorded run has read it.
    """
    name, root = source.removeprefix("./"), index.root.absolute()
    path = Path(source).absolute()
    relative = path.relative_to(root).as_posix() if path.is_relative_to(root) else name
    for candidate in _names_of(source, path, root):
        if candidate and (index.knows_source(candidate) or stages_reading(index, candidate)):
            return candidate
    if outs := [run for run in index.runs.values() if run.path and (is_within(relative, run.path) or is_within(run.path, relative))]:
        raise InputError(
            f"--source {visible(source)}: an output of {outs[-1].address}, not a source",
            f"ask for one version of it by its md5, such as `--hash {outs[-1].md5}`",
        )
    file = root / name if (root / name).exists() else path
    known = sorted({one for run in index.runs.values() for one in index.sources_of(run) or ()}) if len(index.runs) < 1000 else []
    same = sorted(index.outputs_by_source_hash(sha256_of_file(file))) if file.is_file() else []
    if same := same or [one for one in known if file.exists() and os.path.realpath(root / one) == os.path.realpath(file)]:
        raise InputError(
            f"--source {visible(source)}: not a name that a run read it by", f"ask for --source {same[0]}, which is or was the same file"
        )
    what = "exists, but no recorded run has read it" if file.exists() else "no recorded run has read such a file or folder"
    hint = f"known: {', '.join(known[:SHOWN])}" if known else "`pedigree audit MODEL` lists the sources of a model"
    raise InputError(f"--source {visible(source)}: {what}", f"{hint}; look texts up with --text or --containing")


def _names_of(source: str, path: Path, root: Path) -> list[str]:
    """What a source may be called in records, as given first: relative to the project, without "a/../", through symbolic links, and in either form in
    which a file name may hold its accents."""
    given = source.removeprefix("./")
    paths = [path, Path(os.path.normpath(path)), Path(os.path.realpath(path))]
    relative = [
        one.relative_to(base).as_posix() for one in paths for base in (root, Path(os.path.realpath(root))) if one.is_relative_to(base)
    ]
    names = [given, given.rstrip("/"), *relative, *([os.path.normpath(given)] if given else [])]
    return list(dict.fromkeys([*names, *(unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD"))]))


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

    def described(self, first: StageRun) -> dict[str, Any]:
        """Args:
        first: the first run that made the model.
        """
        described = [{"stage": absent.address, "path": absent.path, "md5": absent.md5} for absent in self.missing.values()]
        hints = [fetch_hint([*self.missing.values()])] if self.missing else []
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


class _ImpactQuery:
    """Matches a query against shards and training evidence, and collects the models that were exposed."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.record_ids: list[str] = []
        """The queried records and those made from them; empty for queries by source or hash."""
        self._sources: list[str] = []
        self._without_ledger: dict[int, list[StageRun]] = {}
        """Id of a model's run -> data sets without a ledger, which would tell which of the records that rows of the source contributed to name it."""
        self._exposures: dict[int, Exposure] = {}
        """Id of a model's run -> its own exposure."""
        self._reached: dict[int, dict[int, None]] = {}
        """Id of a model's run -> what `exposed_through` gives for it."""
        self._measured: dict[int, dict[tuple[int, int], None]] = {}
        """Id of a model's run -> what `watched_through` gives for it."""
        self._by_hash = False
        """Whether the query is a hash."""
        self._complete = False
        """Whether dvc.lock alone determines the result."""
        self._derived = False
        """Whether records that were made from the queried ones count, too."""
        self.searched = False
        """Whether the messages of every data set are read: the index alone does not determine the result."""

    @cached_property
    def _trained_models(self) -> list[StageRun]:
        """Models that were or may have been trained: those with upstream data or with training evidence."""
        index = self.index
        return [
            run for run in index.runs.values() if run.is_model and (index.data(run) or run.md5 in index.evidence) and not index.is_copy(run)
        ]

    def match_records(self, keys: Sequence[bytes], names: Mapping[bytes, str], derived: bool) -> None:
        """Args:
        names: key -> id as it was given.
        derived: whether records that were made from these count, too.
        """
        self._derived = derived
        derivations = self.index.derivations(keys) if derived else {}
        everything = list(dict.fromkeys([*keys, *(child for children in derivations.values() for child, _ in children)]))
        self.record_ids = [names.get(key, key.hex()) for key in everything]
        shards: dict[str, list[tuple[bytes, str]]] = defaultdict(list)
        steps: dict[str, dict[bytes, list[tuple[int, int]]]] = defaultdict(dict)
        for use in self.index.record_uses(everything):
            if use.split:
                shards[use.out].append((use.key, use.split))
            else:
                steps[use.out][use.key] = use.steps
        for run in self._trained_models:
            own = self._made_from(run, keys, derivations)
            rows = Counter(split for out in self.index.data(run).keys() & shards.keys() for key, split in shards[out] if key in own)
            trained = [steps[run.md5][key] for key in steps.get(run.md5, ()) if key in own]
            if trained and not rows["train"]:  # the data set is unavailable, but the evidence is not
                rows["train"] = len(trained)
            if +rows:
                self._exposures[run.id] = Exposure(
                    +rows, sorted(step for steps_of in trained for step in steps_of), steps_known=self.index.knows_steps(run)
                )

    def _made_from(
        self, run: StageRun, keys: Sequence[bytes], derivations: Mapping[bytes, list[tuple[bytes, frozenset[str]]]]
    ) -> set[bytes]:
        """The records themselves, and those that were made from them in the data of one model."""
        own = set(keys)
        if not derivations:
            return own
        upstream = self.index.ancestors(run).keys()
        pending = [*keys]
        while pending:
            for child, outs in derivations.get(pending.pop(), ()):
                if child not in own and not outs.isdisjoint(upstream):
                    own.add(child)
                    pending.append(child)
        return own

    def match_sources(self, outputs_of: Mapping[str, frozenset[str] | None]) -> None:
        """Match all records of some sources: those that name one of them, and those to which their rows contributed. A record counts once.

        Args:
            outputs_of: name of a source -> hashes of outputs, of which one must be upstream of a model's data; None if any data counts.
        """
        index = self.index
        self._sources = list(outputs_of)
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
            if keys and (lost := [data[out] for out in data if any(out in rows_of[name] for name in names) and not index.has_ledger(out)]):
                self._without_ledger[run.id] = lost
            elif keys:
                rows += Counter(use.split for out in data for use in uses[out] if use.split and use.key in keys)
                trained = [use for use in uses[run.md5] if not use.split and use.key in keys]
                steps = [step for use in trained for step, _ in use.steps]
                summaries.append((len(trained), min(steps, default=0), max(steps, default=0)))
            if rows:
                self._exposures[run.id] = Exposure(rows, training_summary=reduce(_added, summaries))

    def _contributions(self, name: str) -> Contributions:
        copies, paraphrases = self.index.contributed(name)
        derivations = self.index.derivations(set().union(*copies.values()))
        children = {child for found in derivations.values() for child, _ in found}
        return Contributions(copies, paraphrases, derivations, children.union(*copies.values(), *paraphrases.values()))

    def _contributed_to(self, run: StageRun, found: Contributions) -> set[bytes]:
        """Keys of the records of one model's data to which rows of a source contributed although they may not name it: records in whose place a copy
        from the source was dropped, what was made from these, and paraphrases."""
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
        self._by_hash = True
        if len(prefix) < 6:
            raise InputError(f"--hash {digest}: hash prefix is ambiguous", "give at least six digits")
        sources = index.outputs_by_source_hash(prefix)
        if sources:
            self.match_sources(sources)
        files, outs = index.matching_hashes(prefix)
        readers = {
            run.id for run in index.runs.values() for dep, _, md5 in run.inputs if md5.startswith(prefix) and dep not in run.entry.watched
        }
        distilled = index.distilled_from(prefix)
        self._complete = bool(readers or distilled or index.outputs_with_prefix(prefix))
        if not (self._complete or sources or files):
            if any(index.missing_reports(run, only_splits=False) for run in self._trained_models):
                return  # one of these reports could name it
            raise InputError(f"--hash {digest}: no output, file of one, or source in history has this hash", "see `pedigree audit MODEL`")
        for run in self._trained_models:
            ancestors = index.ancestors(run)
            shards = index.shards(run)
            whole = any(upstream.id in readers for upstream in [*ancestors.values(), run]) or any(
                out.startswith(prefix) for out in ancestors
            )
            matching = [(split, md5) for _, split, md5 in shards if whole or md5 in files]
            if not (whole or matching or outs & ancestors.keys()):
                continue
            rows = Counter[str]()
            for split, md5 in matching or [(split, md5) for _, split, md5 in shards]:
                rows[split] += index.shard_sizes.get(md5, 0)
            summary = (
                index.training_summary(run, None)
                if whole or not matching
                else self._summary_of_shards(run, [md5 for split, md5 in matching if split == "train"])
            )
            self._exposures[run.id] = Exposure(rows, training_summary=summary)
        for run in index.runs.values():
            if run.is_model and run.md5 in outs and run.id not in self._exposures:
                self._exposures[run.id] = Exposure()
        for run in distilled:
            self._exposures.setdefault(run.id, Exposure()).distilled = True

    def _summary_of_shards(self, run: StageRun, shards: Sequence[str]) -> tuple[int, int, int] | None:
        """(records, first step, last step) of a model's training on some shards; None if unknown."""
        paths = self.index.shard_paths()
        if not self.index.knows_steps(run) or any(md5 not in paths for md5 in shards):
            return None
        keys = {record_key(identity) for md5 in shards for identity in tables.read(paths[md5], ["example_id"])["example_id"].to_list()}
        uses = [use for use in self.index.record_uses(keys) if use.out == run.md5 and use.split is None]
        steps = [step for use in uses for step, _ in use.steps]
        return len({use.key for use in uses}), min(steps, default=0), max(steps, default=0)

    def exposed_through(self, run: StageRun) -> dict[int, None]:
        """Ids of the runs with their own exposure: the model itself and its ancestors."""
        if run.id not in self._reached:
            self._reached[run.id] = {}
            own = {run.id: None} if run.id in self._exposures else {}
            self._reached[run.id] = own | {entry: None for parent in self.index.parents(run) for entry in self.exposed_through(parent)}
        return self._reached[run.id]

    def watched_through(self, run: StageRun) -> dict[tuple[int, int], None]:
        """(id of a training, id of an exposed model that only measured it) of the model itself and its ancestors."""
        if run.id not in self._measured:
            self._measured[run.id] = {}
            own = {(run.id, watcher.id): None for watcher in self.index.watchers(run) if self.exposed_through(watcher)}
            self._measured[run.id] = own | {pair: None for parent in self.index.parents(run) for pair in self.watched_through(parent)}
        return self._measured[run.id]

    def watched(self) -> list[dict[str, Any]]:
        """Every version of a model that was not exposed, but whose training an exposed model measured, in the order of history."""
        by_hash: dict[str, dict[str, Any]] = {}
        exposed = {run.md5 for run in self.index.runs.values() if run.is_model and self.exposed_through(run)}
        for run in self.index.runs.values():
            if not run.is_model or run.md5 in exposed or not (pairs := self.watched_through(run)):
                continue
            first = self.index.runs_by_output[run.md5][0]
            entry = by_hash.setdefault(
                run.md5,
                {"stage": run.address, "path": run.path, "md5": run.md5, "commit": first.commit, "found_in": first.place, "also_called": [], "watched_by": []},
            )  # fmt: skip
            if run.address not in [entry["stage"], *entry["also_called"]]:
                entry["also_called"].append(run.address)
            for trained, watcher in ((self.index.runs[one], self.index.runs[other]) for one, other in pairs):
                seen = [self._exposure_document(self.index.runs[by]) for by in self.exposed_through(watcher)]
                found = {"by": watcher.address, "md5": watcher.md5, "training": trained.address, "seen": seen}
                entry["watched_by"] += [found] if found not in entry["watched_by"] else []
        return list(by_hash.values())

    def models(self) -> list[dict[str, Any]]:
        """Every version of a model that was exposed, itself or through its parents, in the order of history."""
        by_hash: dict[str, dict[str, Any]] = {}
        holds: dict[str, list[tuple[dict[str, Any], list[str | None]]]] = defaultdict(list)
        """Hash of a model -> what it or a parent saw, and the commits at which this holds."""
        for run in self.index.runs.values():
            if not run.is_model or not (exposed := self.exposed_through(run)):
                continue
            entry = by_hash.setdefault(
                run.md5,
                {
                    "stage": run.address,
                    "path": run.path,
                    "md5": run.md5,
                    "commit": self.index.runs_by_output[run.md5][0].commit,
                    "found_in": self.index.runs_by_output[run.md5][0].place,
                    "commits": [],
                    "also_called": [],
                    "seen": [],
                },
            )
            if run.address != entry["stage"] and run.address not in entry["also_called"]:
                entry["also_called"].append(run.address)
            commits = self.index.commits_of(run)
            documents = [self._exposure_document(self.index.runs[by]) for by in exposed]
            if run.place == "run cache" and all(any(document == seen for seen, _ in holds[run.md5]) for document in documents):
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

    def _exposure_document(self, run: StageRun) -> dict[str, Any]:
        exposure = self._exposures[run.id]
        steps = [step for step, _ in exposure.steps]
        document: dict[str, Any] = {"by": run.address, "md5": run.md5, "splits": dict(sorted(exposure.rows.items()))}
        if MEASURED_TASKS in run.entry.watched and "validation" in exposure.rows:
            document["measured"] = ["validation"]
        if self.record_ids:
            return {
                **document,
                "steps": steps if exposure.steps_known else None,
                "epochs": [epoch for _, epoch in exposure.steps] if exposure.steps_known else None,
            }
        if exposure.training_summary is None:
            return {**document, "learnt": None, **({"distilled": True} if exposure.distilled else {})}
        return {**document, "learnt": dict(zip(("records", "first_step", "last_step"), exposure.training_summary, strict=True))}

    def unknown(self, runs: Sequence[StageRun] | None = None) -> list[dict[str, Any]]:
        """Models that cannot be decided, because an output is unavailable or nothing records how it was made. Of several runs that made a model, what is
        missing of any.

        Args:
            runs: of models; None: all.
        """
        unknown: dict[str, _Unknown] = defaultdict(_Unknown)
        for run in [upstream for upstream in self.index.runs.values() if upstream.is_model] if runs is None else runs:
            found = unknown[run.md5]
            pending, visited = [run], set[int]()
            while pending:
                upstream = pending.pop()
                if upstream.id in visited:
                    continue
                visited.add(upstream.id)
                parents = self.index.parents(upstream)
                pending += parents
                if not self.index.is_copy(upstream):
                    found.reports |= {one["path"]: one for one in self._missing_reports(upstream)}
                    found.missing |= {absent.md5: absent for absent in ([] if self._complete else self._missing(upstream))}
                    found.unexplained |= dict.fromkeys(path for one in self._relevant(upstream) for path in self.index.unexplained(one))
                    found.unexplained |= {"": None} if upstream.place == "cache" else {}
                elif not parents:
                    candidates = self.index.unavailable_originals(upstream)
                    found.missing |= {absent.md5: absent for absent in candidates}
                    found.unexplained |= {} if candidates else {ORIGINAL: None}
        return [found.described(self.index.runs_by_output[md5][0]) for md5, found in unknown.items() if found]

    def _relevant(self, run: StageRun) -> list[StageRun]:
        """The model and the runs upstream whose inputs must be known to decide about it: which texts a data set with splits contains is known without."""
        if self._derived or self._sources or self._complete:
            return [run, *self.index.ancestors(run).values()]
        return [run, *(upstream for upstream in self.index.data(run).values() if not self.index.is_split(upstream))]

    def _missing_reports(self, run: StageRun) -> list[dict[str, str]]:
        """Unavailable reports that could name the queried source: by its hash, or as a file of paraphrases, which no row names."""
        if (not self._sources and not self._by_hash) or run.id in self._exposures:
            return []
        return self.index.missing_reports(run, only_splits=not self._by_hash)

    def _missing(self, run: StageRun) -> list[StageRun]:
        """Unavailable outputs that are needed to decide about one model, its parents excluded."""
        index = self.index
        if not index.data(run):
            return []
        missing = index.missing(run)
        missing += [absent for absent in self._without_ledger.get(run.id, ()) if absent not in missing]
        if self.searched:
            gone = {out for out, _, md5 in index.shards(run) if md5 not in self._shard_paths}
            missing += [absent for absent in index.data(run).values() if absent.md5 in gone and absent not in missing]
        if run.id not in self._exposures and (self._derived or self._may_hold_source(run)):
            missing += [absent for absent in index.missing_contributions(run) if absent not in missing]
        return missing

    def _may_hold_source(self, run: StageRun) -> bool:
        """Whether the data of a model are made from the queried source, or reports that name its sources are unavailable."""
        if not self._sources:
            return False
        sources = self.index.sources_of(run)
        return sources is None or any(is_within(one, asked) or is_within(asked, one) for one in sources for asked in self._sources)

    @cached_property
    def _shard_paths(self) -> Mapping[str, Path]:
        return self.index.shard_paths()


def _near_copies(index: Index, keys: Iterable[bytes], text: str | None, record: str | None) -> list[dict[str, Any]]:
    """Records whose prompt, response, reasoning or arguments of calls nearly equal the text, or that of the given record. Reads every available shard.

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
    queries = (
        [text]
        if text
        else [text_of_part for identity, texts in texts_of.items() if record_key(identity) in excluded for text_of_part in texts.values()]
    )
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
        best[identity] = {"example_id": identity, "part": part, "rule": pair.rule, "similarity": pair.similarity, "text": text_of_part}
    return sorted(best.values(), key=lambda copy: (-copy["similarity"], copy["example_id"]))


def _fields(turns: Messages) -> dict[str, str]:
    """Reasoning and arguments of calls, each as one text, where there are any."""
    found: dict[str, list[str]] = defaultdict(list)
    for field_name, text in (entry for turn in turns for entry in field_texts(turn)):
        if field_name != "content":
            found[field_name].append(text)
    return {field_name: "\n".join(texts) for field_name, texts in found.items()}


def as_text(result: Mapping[str, Any]) -> str:
    """The result as text for the terminal."""
    ((kind, value),) = result["asked"].items()
    versions = len(result["models"])
    lines = [f"{kind} {visible(value)}"]
    if "published" in result:
        lines.append(f"published id of record {result['published']['record']}")
    if "read_by" in result:
        lines.append(f"named by {', '.join(result['read_by'])}, but not as a source of rows that are trained on")
    if result["records"] and result["records"] != [value]:
        lines.append(f"records {_shortened(result['records'])}")
    for match in result.get("matches", [])[:SHOWN]:
        lines.append(f"match   {match['example_id']}  {match['role']}, {match['field']}  {visible(match['excerpt'])}")
    for copy in result.get("near", [])[:SHOWN]:
        lines.append(
            f"near    {copy['example_id']}  {copy['part']}, {copy['rule']} {copy['similarity']:.2f}  {visible(' '.join(copy['text'].split())[:80])}"
        )
    lines.append("")
    for model in result["models"]:
        aliases = f", also called {', '.join(model['also_called'])}" if model["also_called"] else ""
        lines.append(f"{model['stage']}  md5 {model['md5'][:12]}  {_where(model)}{aliases}")
        if "registered" in model:
            from dagster_project.views.lineage import versions_text

            lines.append(f"  {versions_text(model['registered'])}")
        lines += [f"  {_exposure_text(seen, model)}" for seen in model["seen"]]
        if missing := model.get("missing"):
            lines.append(
                f"  perhaps more: {', '.join(output['path'] for output in missing)} could not be looked at; fetch: {model['fetch']}"
            )
    lines += [""] if versions else []
    lines += _watched_text(result.get("watched", []))
    seen = result["looked_at"]
    answers = {
        "yes": f"{versions} model version{'' if versions == 1 else 's'} saw it",
        "no": "no model saw it",
        "cannot tell": "no model is known to have seen it, but not everything could be looked at",
    }
    lines.append(answers[result["verdict"]])
    if "erased" in result:
        lines.append(
            f"it was erased on {result['erased']}: data/erasures lists the models that had seen it, and which of them were deleted"
        )
    lines.append(
        f"looked at {seen['models']} models and {seen['data_sets']} data sets ({seen['rows']:,} rows) in {seen['commits']} commits with a dvc.lock, "
        f"{seen['commits_in_reflog']} more in the reflog, the workspace and {seen['cached_runs']} entries of DVC's run cache"
    )
    if unknown := result["unknown"]:
        lines.append(f"unknown for {len(unknown)}, because upstream outputs are not in the cache or nothing records them:")
        groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for model in unknown:
            groups[model["fetch"]].append(model)
        for command, models in list(groups.items())[:SHOWN]:
            lines.append("  " + _shortened([f"{model['stage']} {model['md5'][:12]}" for model in models]))
            absent = dict.fromkeys([output["path"] for model in models for output in model["missing"]])
            absent |= dict.fromkeys(path for model in models for path in model.get("unexplained", ()))
            lines.append(f"    missing: {', '.join(absent)}; fetch: {command}" if command != NOTHING_RECORDED else f"    {command}")
    if result["unreadable"]:
        names = [
            name if name.startswith(("run cache", "the history")) else f"the dvc.lock of {name if ' ' in name else name[:12]}"
            for name in result["unreadable"]
        ]
        lines.append(f"cannot be read: {_shortened(names)}")
    if result["shallow"]:
        lines.append("this clone is shallow: models before its first commit are unknown (`git fetch --unshallow` brings them)")
    return "\n".join(lines)


def _watched_text(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Models that only were measured by one that saw the record."""
    if not models:
        return []
    lines = ["watched by a model that saw it, and not trained on it:"]
    for model in models:
        aliases = f", also called {', '.join(model['also_called'])}" if model["also_called"] else ""
        lines.append(f"{model['stage']}  md5 {model['md5'][:12]}  {_where(model)}{aliases}")
        for one in model["watched_by"]:
            training = f" during {one['training']}" if one["training"] != model["stage"] else ""
            lines += [f"  watched by {one['by']} {one['md5'][:12]}{training}: {_exposure_text(seen, one)}" for seen in one["seen"]]
    return [*lines, ""]


def _where(model: Mapping[str, Any]) -> str:
    """Where a model is recorded."""
    if model["found_in"] == "commit":
        return f"commit {model['commit'][:12]}"
    if model["found_in"] == "reflog":
        return f"commit {model['commit'][:12]}, in no branch or tag but in the reflog"
    return {"workspace": "uncommitted", "run cache": "never committed, in DVC's run cache", "cache": "never committed, in DVC's cache"}[
        model["found_in"]
    ]


def _shortened(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")


def _exposure_text(seen: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    through = f" through {seen['by']} {seen['md5'][:12]}" if seen["md5"] != model["md5"] else ""
    splits = ", ".join(f"{split} {n}" for split, n in seen["splits"].items())
    if seen.get("distilled"):
        return f"distilled from it{through}"
    if not splits:
        return f"derived from it{through}" if through else "is this model"
    if "steps" in seen:
        steps = seen["steps"]
        if "train" not in seen["splits"]:
            steps_text = _not_learned(seen)
        elif steps is None:
            steps_text = "at steps unknown"
        elif not steps:
            steps_text = "in no step"
        else:
            steps_text = f"step {_shortened(steps)}"
    elif seen["learnt"] is None:
        steps_text = "at steps unknown"
    else:
        training = seen["learnt"]
        steps_text = (
            f"{training['records']} records in steps {training['first_step']} to {training['last_step']}"
            if training["records"]
            else _not_learned(seen)
        )
    return f"{splits}; {steps_text}{through}"


def _not_learned(seen: Mapping[str, Any]) -> str:
    """What a model did with records that it was not trained on, as far as lineage knows."""
    if not seen.get("measured"):
        return "not trained on"
    return "not trained on, but among the tasks whose answers are measured before and after training (the first `samples` of the split)"
