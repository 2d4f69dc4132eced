"""The stage runs in the index: every entry of dvc.lock and of DVC's run cache,
what each run was made from, and the files of its output."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_bytes, md5_of_folder
from dagster_project.core.layout import REPORTS
from dagster_project.lineage.database import Database, cached_per_instance
from dagster_project.lineage.history import Objects, blobs, history, is_within, lost_entries, stages_of
from dagster_project.lineage.notes import parsed_yaml
from dagster_project.lineage.rows import EVIDENCE, LEDGER, OVERLAPS
from dagster_project.lineage.runs import (
    PLACEHOLDER,
    Entry,
    Place,
    Resolver,
    StageRun,
    address_in,
    as_section,
    conflict_sides,
    declared_models,
    is_input,
    outputs,
    sections_of,
    stage_in,
    teacher_of,
    unread_inputs,
    watched_inputs,
)
from dagster_project.lineage.working_folders import (
    from_project,
    is_as_written,
    other_pipelines,
    same_run,
    working_folders,
)

SPLIT = re.compile(r"(?:^|/)(train|validation|test)/records-\d+\.parquet$")
"""Shards of a data set with splits: the rows that a model trains on, is monitored on, or is evaluated on."""
WEIGHTS = ".safetensors"
SOURCES = "data/sources"
RELEASE = "release"
"""The stage that copies one of the models in folders of models."""
WITHOUT_OUTPUT = 0
"""In place of the id of a run: an entry of the run cache that has only reports and plots."""


class RunIndex(Database):
    """Index of the stage runs in history. Opening it indexes new commits."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = Objects(root)
        self.history = history(root)
        super().__init__(root)
        with self._transaction():
            self._read_locks()
            self._read_run_cache()
            self._list_outputs()
            self._scan_cache()
            self._read_origins()

    def _read_locks(self) -> None:
        indexed = {blob for (blob,) in self._db.execute("SELECT blob FROM lock")}
        commits = {**self.history.unreachable, **self.history.first}
        new = [blob for blob in commits if blob not in indexed]
        contents = blobs(self.root, [*new, *(f"{commits[blob]}:./dvc.yaml" for blob in new)])
        texts = {blob: (contents[blob], commits[blob]) for blob in new if blob in contents}
        if self.history.workspace and self.history.workspace not in {*indexed, *commits}:
            texts[self.history.workspace] = self.history.workspace_content, ":"
        if not texts:
            return
        declared = {":": self._pipeline} | {
            name.partition(":")[0]: text for name, text in contents.items() if ":" in name
        }
        models: dict[bytes, frozenset[str]] = {}
        folders: dict[bytes, dict[str, str]] = {}
        for blob, (content, commit) in texts.items():
            pipeline = declared.get(commit, b"")
            if pipeline not in models:
                # that of the workspace, if it is missing or e.g. has a merge conflict
                readable = self._pipeline if parsed_yaml(pipeline) is None else pipeline
                models[pipeline], folders[pipeline] = declared_models(readable), working_folders(readable)
            sides = conflict_sides(content.decode("utf-8", "replace"))
            for number, text in enumerate(sides):
                name = blob if len(sides) == 1 else f"{blob}:{number}"
                try:
                    self._read_lock(name, sections_of(text), models[pipeline], folders[pipeline])
                except InputError:
                    self._db.execute("INSERT OR IGNORE INTO lock (blob, readable) VALUES (?, 0)", (name,))
            if len(sides) > 1:
                self._db.execute("INSERT OR IGNORE INTO lock (blob, readable) VALUES (?, 1)", (blob,))

    @cached_property
    def _pipeline(self) -> bytes:
        """dvc.yaml of the workspace."""
        yaml = self.root / "dvc.yaml"
        return yaml.read_bytes() if yaml.is_file() else b""

    def _read_lock(
        self, blob: str, sections: Mapping[str, str], models: frozenset[str], folders: Mapping[str, str]
    ) -> None:
        moved = {
            name: as_section(name, from_project(name, stage_in(text), folders))
            for name, text in sections.items()
            if not is_as_written(text, name, folders)
        }
        sections = {**sections, **moved}
        keys = {name: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() for name, text in sections.items()}
        known: dict[str, list[int]] = defaultdict(list)
        for key, run in self._rows("SELECT key, id FROM run WHERE key IN", [*keys.values()]):
            known[key].append(run)
        for address, key in keys.items():
            if key not in known:
                known[key] = self._add_entry(key, address, stage_in(sections[address]), sections[address], models)
        runs = [run for added in known.values() for run in added]
        lock = self._db.execute("INSERT OR IGNORE INTO lock (blob, readable) VALUES (?, 1)", (blob,)).lastrowid
        self._db.executemany("INSERT OR IGNORE INTO lock_run VALUES (?, ?)", [(lock, run) for run in runs])
        newly = [
            (run,)
            for run, address in self._rows("SELECT id, address FROM run WHERE id IN", runs)
            if address.partition("@")[0] in models
        ]
        self._db.executemany("UPDATE run SET is_model = 1 WHERE id = ?", newly)

    def _add_entry(self, key: str, address: str, stage: dict[str, Any], text: str, models: frozenset[str]) -> list[int]:
        """Add an entry of dvc.lock or of the run cache. Returns the ids of its outputs that have a hash."""
        report: dict[str, str] = next((one for one in stage.get("outs", ()) if one["path"].startswith(REPORTS)), {})
        watched, unread = watched_inputs(address, stage), unread_inputs(address, stage)
        read = [dep for dep in stage.get("deps", []) if is_input(dep["path"]) and dep["path"] not in unread]
        added = []
        for out in outputs(stage):
            has_weights = (
                self._db.execute("SELECT 1 FROM listed WHERE md5 = ? AND has_weights", (out["md5"],)).fetchone()
                is not None
            )
            run = self._db.execute(
                "INSERT INTO run (key, address, path, md5, is_model, report, report_md5, text) VALUES (?, ?, ?, ?, ?,"
                " ?, ?, ?)",
                (
                    key,
                    address,
                    out["path"],
                    out["md5"],
                    has_weights or address.partition("@")[0] in models or out["path"].endswith(WEIGHTS),
                    report.get("path"),
                    report.get("md5"),
                    text,
                ),
            ).lastrowid
            inputs = [(run, dep["path"], dep.get("md5", ""), dep["path"] in watched) for dep in read]
            self._db.executemany("INSERT INTO input VALUES (?, ?, ?, ?)", inputs)
            added.append(run or 0)
        return added

    def _read_run_cache(self) -> None:
        """Add the runs of DVC's run cache: also of models that no commit ever contained."""
        # unreadable ones may have been replaced or removed
        self._db.execute("DELETE FROM cached_run WHERE run IS NULL")
        known = {name for (name,) in self._db.execute("SELECT name FROM cached_run")}
        new = [path for path in self.objects.run_cache() if path.name not in known]
        models = declared_models(self._pipeline) if new else frozenset()
        for path in new:
            runs: list[int | None] = [None]
            with suppress(InputError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
                stage = stages_of(
                    "stages:\n  one:\n" + re.sub(r"^", "    ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
                )["one"]
                stage = from_project("", stage, {})
                outs = outputs(stage)
                address = address_in(str(stage.get("cmd", "")), outs[0]["path"]) if outs else ""
                found = self._recorded(stage, outs) or self._add_entry(
                    f"cache {path.name}", address, stage, as_section(address, stage), models
                )
                runs = [*found] or [WITHOUT_OUTPUT]
            self._db.executemany("INSERT INTO cached_run VALUES (?, ?)", [(path.name, run) for run in runs])

    def _recorded(self, cached: Mapping[str, Any], outs: Sequence[Mapping[str, str]]) -> list[int]:
        """Of a run in another folder: the ids of its outputs, if a dvc.lock records it. The run cache does not say
        which folder."""
        if not outs or not any(one["path"].startswith("../") for one in cached.get("deps", ())):
            return []
        query = "SELECT key, text FROM run WHERE md5 = ? AND key NOT LIKE 'cache %'"
        recorded = self._db.execute(query, (outs[0]["md5"],)).fetchall()
        key = next((key for key, text in recorded if same_run(stage_in(text), cached)), None)
        return [run for (run,) in self._db.execute("SELECT id FROM run WHERE key = ?", (key,))]

    def _scan_cache(self) -> None:
        """Find models in DVC's cache that nothing records: folders with weights."""
        scanned = dict(self._db.execute("SELECT folder, changed FROM scanned"))
        changed = {folder: time for folder, time in self.objects.folders().items() if scanned.get(folder.name) != time}
        for folder in changed:
            for path in folder.glob("*.dir"):
                md5 = folder.name + path.name
                if self._db.execute(
                    "SELECT 1 FROM listed WHERE md5 = ?1 UNION SELECT 1 FROM run WHERE md5 = ?1", (md5,)
                ).fetchone():
                    continue
                listing = self.objects.listing(md5) or {}
                if any(name.endswith(WEIGHTS) for name in listing):
                    self._list_output(md5, listing)
        self._db.executemany(
            "INSERT OR REPLACE INTO scanned VALUES (?, ?)", [(folder.name, time) for folder, time in changed.items()]
        )

    def _list_outputs(self) -> None:
        """List the files of every output that has become available."""
        query = "SELECT md5, path FROM run WHERE md5 NOT IN (SELECT md5 FROM listed) GROUP BY md5"
        for md5, path in self._db.execute(query).fetchall():
            listing = self.objects.listing(md5, path if md5 in self.workspace_outputs else "")
            if listing is not None:
                self._list_output(md5, listing, path)

    def _list_output(self, md5: str, listing: dict[str, str], path: str = "") -> None:
        """Args:
        path: of the output, which can be one file with weights.
        """
        splits = {name: match.group(1) for name in listing if (match := SPLIT.search(name))}
        has_weights = any((name or path).endswith(WEIGHTS) for name in listing)
        self._db.execute("INSERT INTO listed VALUES (?, ?, ?)", (md5, bool(splits), has_weights))
        files = [(md5, name, value, splits.get(name)) for name, value in listing.items()]
        self._db.executemany("INSERT INTO file VALUES (?, ?, ?, ?)", files)
        indexable = [
            (value, md5, name)
            for name, value in listing.items()
            if name in splits or name in {EVIDENCE, LEDGER, OVERLAPS}
        ]
        self._db.executemany(
            "INSERT OR IGNORE INTO unread SELECT ?, ?, ? WHERE ?1 NOT IN (SELECT md5 FROM content)", indexable
        )
        if has_weights:
            self._db.execute("UPDATE run SET is_model = 1 WHERE md5 = ?", (md5,))

    def _read_origins(self) -> None:
        """Record the sources, from the reports of the runs that read files which no stage produces."""
        query = """SELECT DISTINCT run.id, run.report, run.report_md5 FROM run JOIN input ON input.run = run.id
            WHERE run.report IS NOT NULL AND run.id NOT IN (SELECT run FROM origin)
            AND input.md5 NOT IN (SELECT md5 FROM run)"""
        pending = [row for row in self._db.execute(query).fetchall() if row[0] in self._first_commits]
        for run, content in self._contents_of_reports(pending).items():
            facts = json.loads(content).get("sources") or {"": {}}
            rows = [(run, source, f.get("sha256"), f.get("format"), f.get("rows")) for source, f in facts.items()]
            self._db.executemany("INSERT INTO origin VALUES (?, ?, ?, ?, ?)", rows)

    def _contents_of_reports(self, requested: Sequence[tuple[int, str, str]]) -> dict[int, bytes]:
        """Id of an entry -> the report with the recorded hash, from DVC's
        cache, a commit that contains it, or the workspace.

        Args:
            requested: (id of the entry, path of the report, its hash).
        """
        contents: dict[int, bytes] = {}
        for run, report, md5 in requested:
            for path in (self.objects.path(md5) if md5 else None, self.root / report):
                if run in contents or not path or not path.is_file():
                    continue
                if md5_of_bytes(content := path.read_bytes()) == md5:
                    contents[run] = content
        hashes = {run: md5 for run, _, md5 in requested if run not in contents}
        names = {
            run: f"{commit}:./{report}"
            for run, report, _ in requested
            if run in hashes and (commit := self._first_commits.get(run))
        }
        committed = blobs(self.root, names.values())
        contents |= {
            run: committed[name]
            for run, name in names.items()
            if name in committed and md5_of_bytes(committed[name]) == hashes[run]
        }
        return contents

    @cached_per_instance
    def report(self, run: StageRun) -> dict[str, Any]:
        """The report that dvc.lock records for this run; empty if its bytes are unavailable."""
        entry = run.entry
        recorded = [(entry.id, entry.report, entry.report_md5)] if entry.report else []
        content = self._contents_of_reports(recorded).get(entry.id)
        return dict(json.loads(content)) if content else {}

    def unavailable_report(self, run: StageRun) -> dict[str, str] | None:
        """Stage, path and md5 of the report that dvc.lock records for this run, if its bytes are unavailable."""
        if not run.entry.report or self.report(run):
            return None
        return {"stage": run.address, "path": run.entry.report, "md5": run.entry.report_md5}

    @cached_property
    def workspace_outputs(self) -> dict[str, str]:
        """Hash -> path of the outputs in the workspace's dvc.lock. Their files may exist in the workspace."""
        query = (
            "SELECT run.md5, run.path FROM run JOIN lock_run ON run.id = lock_run.run JOIN lock ON lock.id ="
            " lock_run.lock WHERE lock.blob = ?"
        )
        return dict(self._db.execute(query, (self.history.workspace,)))

    @cached_property
    def _locks(self) -> list[tuple[int, str | None, Place]]:
        """(id, first commit, place) of every readable dvc.lock: in the order of
        history, then the workspace, then what only the reflog reaches."""
        ids: dict[str, list[int]] = defaultdict(list)
        for identity, blob in self._db.execute("SELECT id, blob FROM lock WHERE readable ORDER BY id"):
            ids[blob.partition(":")[0]].append(identity)
        found: dict[int, tuple[int, str | None, Place]] = {}
        places: list[tuple[str, str | None, Place]] = [
            (blob, commit, "commit") for blob, commit in self.history.first.items()
        ]
        if (workspace := self.history.workspace) and workspace not in self.history.unreachable:
            places.append((workspace, None, "workspace"))
        places += [(blob, commit, "reflog") for blob, commit in self.history.unreachable.items()]
        for blob, commit, place in places:
            for identity in ids.get(blob, ()):
                found.setdefault(identity, (identity, commit, place))
        return list(found.values())

    @cached_property
    def _workspace_locks(self) -> frozenset[int]:
        query = "SELECT id FROM lock WHERE blob = ?1 OR blob LIKE ?1 || ':%'"
        return frozenset(identity for (identity,) in self._db.execute(query, (self.history.workspace or "none",)))

    @cached_property
    def _first_commits(self) -> dict[int, str | None]:
        """Id of an entry -> the first commit whose dvc.lock contains it, whatever its lineage."""
        entries = self._entries_of_locks
        commits: dict[int, str | None] = {
            entry: None for (entry,) in self._db.execute("SELECT run FROM cached_run WHERE run > 0")
        }
        for lock, commit, _ in reversed(self._locks):
            for entry in entries[lock]:
                commits[entry] = commit or commits.get(entry)
        return commits

    @cached_property
    def _entries_of_locks(self) -> dict[int, list[int]]:
        entries: dict[int, list[int]] = defaultdict(list)
        for lock, run in self._db.execute("SELECT lock, run FROM lock_run ORDER BY run"):
            entries[lock].append(run)
        return entries

    @cached_property
    def _entries(self) -> dict[int, Entry]:
        inputs: dict[int, list[tuple[str, str]]] = defaultdict(list)
        watched: dict[int, set[str]] = defaultdict(set)
        for run, dep, md5, is_watched in self._db.execute("SELECT run, dep, md5, watched FROM input ORDER BY rowid"):
            inputs[run].append((dep, md5))
            if is_watched:
                watched[run].add(dep)
        # of several outputs of a stage that is declared as a model, those without weights are none beside one with them
        query = """SELECT id, address, path, run.md5, is_model AND NOT (has_weights IS 0 AND key IN (
            SELECT key FROM run JOIN listed ON listed.md5 = run.md5 WHERE has_weights)),
            IFNULL(report, ''), IFNULL(report_md5, '') FROM run LEFT JOIN listed ON listed.md5 = run.md5"""
        return {
            run: Entry(run, address, path, md5, bool(is_model), tuple(inputs[run]), frozenset(watched[run]), *report)
            for run, address, path, md5, is_model, *report in self._db.execute(query)
        }

    @cached_property
    def _resolved(self) -> tuple[dict[int, StageRun], dict[int, list[StageRun]]]:
        """Id -> run; id of a dvc.lock -> its runs."""
        resolver = Resolver(self._entries, self.files)
        by_lock = {}
        for order, (lock, commit, place) in enumerate(self._locks):
            by_lock[lock] = resolver.add_lock(lock, self._entries_of_locks[lock], order, commit, place)
        for run in resolver.runs:
            run.in_workspace = not run.locks.isdisjoint(self._workspace_locks)
        recorded = {run.entry.signature for run in resolver.runs}
        cached = [
            self._entries[run] for (run,) in self._db.execute("SELECT run FROM cached_run WHERE run > 0 ORDER BY run")
        ]
        resolver.add_unrecorded(
            [entry for entry in cached if entry.signature not in recorded], len(self._locks), "run cache"
        )
        known = resolver.by_output.keys()
        unrecorded = [
            md5
            for (md5,) in self._db.execute("SELECT md5 FROM listed WHERE has_weights ORDER BY md5")
            if md5 not in known
        ]
        orphans = [
            Entry(-1 - i, "unrecorded", "", md5, True, (), frozenset())
            for i, md5 in enumerate(unrecorded)
            if self.objects.path(md5)
        ]
        resolver.add_unrecorded(orphans, len(self._locks), "cache")
        resolver.connect()
        resolver.add_alternatives(len(self._locks))
        return {run.id: run for run in sorted(resolver.runs, key=lambda run: (run.order, run.id))}, by_lock

    @property
    def runs(self) -> dict[int, StageRun]:
        """Id -> every run that git (with its reflog), the workspace or DVC's
        caches contain, in the order of history."""
        return self._resolved[0]

    @cached_property
    def runs_by_output(self) -> dict[str, list[StageRun]]:
        """Hash of an output -> the runs that produced it, in the order of history."""
        by_output: dict[str, list[StageRun]] = defaultdict(list)
        for run in self.runs.values():
            by_output[run.md5].append(run)
        return dict(by_output)

    def outputs_in_lock(self, blob: str | None) -> list[StageRun]:
        """The runs in one dvc.lock, one for each output; none if it is unreadable or no commit in reach contains it."""
        row = self._db.execute("SELECT id FROM lock WHERE blob = ?", (blob,)).fetchone()
        return self._resolved[1].get(row[0], []) if row else []

    def runs_in_lock(self, blob: str | None) -> dict[str, StageRun]:
        """Address -> run, as `outputs_in_lock`: of several outputs of a stage that of the model, or else the first."""
        by_address: dict[str, StageRun] = {}
        for run in self.outputs_in_lock(blob):
            if run.is_model > by_address.setdefault(run.address, run).is_model:
                by_address[run.address] = run
        return by_address

    def commits_of(self, run: StageRun) -> list[str | None]:
        """The first commit of each dvc.lock that contains the run, in the order of history; None for the workspace."""
        return self._commits(run.locks)

    def _commits(self, locks: Iterable[int]) -> list[str | None]:
        return [commit for _, commit in sorted(self._places[lock] for lock in locks)]

    @cached_property
    def _places(self) -> dict[int, tuple[int, str | None]]:
        """Id of a dvc.lock -> its position in history, and its first commit."""
        return {lock: (position, commit) for position, (lock, commit, _) in enumerate(self._locks)}

    def first_commit_with(self, run: StageRun) -> str | None:
        """The first commit whose dvc.lock contains a run's output; one that
        only the reflog reaches, if the workspace has the output, too."""
        commits = (same.commit for same in self.runs_by_output[run.md5])
        return next((commit for commit in commits if commit is not None), None) or self.first_commit(run)

    def first_commit(self, run: StageRun) -> str | None:
        """The first commit whose dvc.lock contains the run's entry, whatever its lineage; None if no commit does."""
        return self._first_commits.get(run.entry.id)

    def first_commit_with_all(self, runs: Iterable[StageRun]) -> str | None:
        """The first commit whose dvc.lock contains the entries of all these runs; None if no commit does."""
        commits = self._commits(set.intersection(*(run.locks for run in runs)))
        return next((commit for commit in commits if commit), None)

    @cached_per_instance
    def lock_entry(self, run: StageRun) -> dict[str, Any]:
        """The complete entry of dvc.lock; empty if nothing records the run."""
        row = self._db.execute("SELECT text FROM run WHERE id = ?", (run.entry.id,)).fetchone()
        return stage_in(row[0]) if row else {}

    @cached_per_instance
    def parents(self, run: StageRun) -> list[StageRun]:
        """The models that a model was made from, directly; those that it only watches are excluded.

        For a folder of models: those whose weights it contains unchanged. A release is
        a copy of exactly one model: if files are unavailable, it is the variant that
        its report names, unless that ran again since; empty if nothing records it.
        """
        direct = self._models_read(run, in_folders=False)
        if direct:
            return list(dict.fromkeys([*direct, *(self._same_weights(run) or self._models_read(run, in_folders=True))]))
        same = self._same_weights(run)
        is_unexplained = bool(run.unresolved) or (run.place in {"run cache", "cache"} and not self.data(run))
        if not same and (run.stage == RELEASE or is_unexplained):
            holders = {out for weight in self.weights(run.md5) for out in self.outputs_with_file(weight)} - {run.md5}
            found = [self.runs_by_output[out][0] for out in sorted(holders)]
            same = [one for one in found if one.place != "cache" and one.stage != RELEASE]
        if same or run.stage != RELEASE:
            return list(dict.fromkeys(same or self._models_read(run, in_folders=True)))
        variant = self.report(run).get("variant")
        named = [
            one
            for one in self._candidates(run)
            if variant and one.address in {f"merged@{variant}", f"merged_aligned@{variant}"}
        ]
        return [one for one in named if self._read_report_of(run, one)]

    def watchers(self, run: StageRun) -> list[StageRun]:
        """The models that only measured a model while it was trained: the
        reward model of a method that learns from pairs."""
        read = (run.producers.get(md5) for dep, _, md5 in run.inputs if dep in run.entry.watched)
        return list(
            dict.fromkeys(producer for producer in read if producer and producer.is_model and producer.md5 != run.md5)
        )

    def _models_read(self, run: StageRun, in_folders: bool) -> list[StageRun]:
        """The models that a run read and did not only watch, one by one or in folders of outputs."""
        return [
            producer
            for dep, path, md5 in run.inputs
            if (producer := run.producers.get(md5))
            and producer.is_model
            and producer.md5 != run.md5
            and dep not in run.entry.watched
            if (dep != path) == in_folders
        ]

    def _same_weights(self, run: StageRun) -> list[StageRun]:
        mine = self.weights(run.md5)
        return [one for one in self._models_read(run, in_folders=True) if mine & self.weights(one.md5)]

    def _read_report_of(self, run: StageRun, model: StageRun) -> bool:
        """Whether a release read the report of this run of a model and not of an earlier one, by the hash of the folder
        of reports: that is decided without the files of either. True if the release did not depend on the folder."""
        folder = model.entry.report.rpartition("/")[0]
        read = {dep["path"]: dep.get("md5") for dep in self.lock_entry(run).get("deps", [])}
        if folder not in read:
            return True
        for lock in run.locks & model.locks:
            entries = [self._entries[one] for one in self._entries_of_locks[lock]]
            files = {
                entry.report.removeprefix(f"{folder}/"): entry.report_md5
                for entry in entries
                if entry.report and is_within(entry.report, folder)
            }
            if read[folder] in {md5_of_folder(files), md5_of_folder(files | PLACEHOLDER)}:
                return True
        return False

    def _candidates(self, run: StageRun) -> list[StageRun]:
        """The models that a release may be a copy of, as far as their weights and its own are known."""
        return [
            one
            for one in self._models_read(run, in_folders=True)
            if not (self.weights(run.md5) and self.weights(one.md5))
        ]

    def has_unknown_original(self, run: StageRun) -> bool:
        """Whether a model is a copy of another one, and nothing records of which."""
        return self.is_copy(run) and not self.parents(run)

    def unavailable_originals(self, run: StageRun) -> list[StageRun]:
        """Of a copy of an unknown model: the runs whose files would decide which one it is.

        Empty if all are available, so that nothing records it.
        """
        return [run] if not self.weights(run.md5) else self._candidates(run)

    @cached_per_instance
    def is_copy(self, run: StageRun) -> bool:
        """Whether a model has the weights of a parent, byte for byte, or was chosen from folders of models.

        The parent then accounts for everything that it was trained on.
        """
        mine = self.weights(run.md5)
        known = [weights for parent in self.parents(run) if (weights := self.weights(parent.md5))]
        direct = any(
            dep == path for dep, path, md5 in run.inputs if md5 in run.producers and run.producers[md5].is_model
        )
        if run.is_model and run.stage == RELEASE and not direct:
            return True
        if mine and known:
            return any(mine <= weights for weights in known)
        return run.is_model and not direct and len(self.parents(run)) == 1

    @cached_per_instance
    def data(self, run: StageRun) -> dict[str, StageRun]:
        """Hash -> run of every data set that a run was made from, up to the
        nearest models and data sets with splits."""
        upstream: dict[str, StageRun] = {}
        pending = [run]
        while pending:
            reader = pending.pop()
            for md5, producer in reader.made_from().items():
                if not producer.is_model and md5 not in upstream:
                    upstream[md5] = producer
                    if not self.is_split(producer):
                        pending.append(producer)
        return upstream

    @cached_per_instance
    def ancestors(self, run: StageRun) -> dict[str, StageRun]:
        """Hash -> run of `data` and everything upstream of it, except other data sets with splits."""
        upstream = dict(self.data(run))
        pending = list(upstream.values())
        while pending:
            reader = pending.pop()
            for md5, producer in reader.made_from().items():
                has_splits = md5 in self.split_outputs or producer.path in self._split_paths
                if not producer.is_model and md5 not in upstream and not has_splits:
                    upstream[md5] = producer
                    pending.append(producer)
        return upstream

    def files(self, out: str) -> dict[str, str] | None:
        """Path -> hash of the files of an output; None if it was never available locally."""
        if self._db.execute("SELECT 1 FROM listed WHERE md5 = ?", (out,)).fetchone() is None:
            return None
        return dict(self._db.execute("SELECT name, md5 FROM file WHERE out = ? ORDER BY name", (out,)))

    def file_path(self, out: str, name: str) -> Path | None:
        """Local path of a file of an output; None if it is unavailable."""
        md5 = (self.files(out) or {}).get(name)
        return self.objects.path(md5, self.workspace_outputs.get(out, "")) if md5 else None

    def is_split(self, run: StageRun) -> bool:
        """Whether the output has splits, judged by other outputs at the same path if it is unavailable.

        True if that is unknown.
        """
        return run.md5 in self.split_outputs or run.path in self._split_paths or run.path not in self._listed_paths

    def weights(self, out: str) -> frozenset[str]:
        """Hashes of the files with weights in an output."""
        return self._weights.get(out, frozenset())

    @cached_property
    def _weights(self) -> dict[str, frozenset[str]]:
        weights: dict[str, set[str]] = defaultdict(set)
        query = (
            "SELECT out, file.md5 FROM file JOIN listed ON listed.md5 = out WHERE has_weights"
            f" AND (name LIKE '%{WEIGHTS}' OR name = '')"
        )
        for out, md5 in self._db.execute(query):
            weights[out].add(md5)
        return {out: frozenset(files) for out, files in weights.items()}

    def outputs_with_file(self, file: str) -> list[str]:
        """Outputs of known runs that contain a file with this hash."""
        query = "SELECT DISTINCT out FROM file WHERE md5 = ?"
        return [out for (out,) in self._db.execute(query, (file,)) if out in self.runs_by_output]

    def outputs_with_prefix(self, prefix: str) -> list[str]:
        """Output hashes with this prefix."""
        return [md5 for md5 in self.runs_by_output if md5.startswith(prefix)]

    def outputs_by_source_hash(self, sha256: str) -> dict[str, frozenset[str]]:
        """Source, or file in a folder that is one -> hashes of the outputs made
        from the version of it whose sha256 has this prefix."""
        outputs: dict[str, set[str]] = defaultdict(set)
        query = "SELECT run, source FROM origin WHERE sha256 >= ? AND sha256 < ?"
        for entry, source in self._db.execute(query, (sha256, sha256 + "g")):
            outputs[source].add(self._entries[entry].md5)
        query = "SELECT DISTINCT id, report, report_md5 FROM run JOIN origin ON origin.run = run.id"
        for entry, content in self._contents_of_reports(self._db.execute(query).fetchall()).items():
            facts = json.loads(content).get("sources") if f'"{sha256}'.encode() in content else None
            for source, one in (facts or {}).items():
                for name, file in one.get("files", {}).items():
                    if file["sha256"].startswith(sha256):
                        outputs[f"{source.rstrip('/')}/{name}"].add(self._entries[entry].md5)
        return {source: frozenset(outs) for source, outs in outputs.items()}

    def matching_hashes(self, prefix: str) -> tuple[frozenset[str], frozenset[str]]:
        """(file hashes with this prefix, hashes of outputs that have the prefix or contain such a file)."""
        rows = self._db.execute(
            "SELECT md5, out FROM file WHERE md5 >= ? AND md5 < ?", (prefix, prefix + "g")
        ).fetchall()
        outs = {out for md5, out in rows if out in self.runs_by_output} | set(self.outputs_with_prefix(prefix))
        return frozenset(md5 for md5, _ in rows), frozenset(outs)

    @cached_property
    def split_outputs(self) -> frozenset[str]:
        """Hashes of the outputs with splits."""
        return frozenset(md5 for (md5,) in self._db.execute("SELECT md5 FROM listed WHERE is_split"))

    def unexplained(self, run: StageRun) -> list[str]:
        """Inputs of a run that were outputs of stages, although nothing records the runs that produced them."""
        outputs = (
            path
            for _, path, md5 in run.inputs
            if path in self._output_paths and md5 not in run.producers and md5 != run.md5
        )
        return [*run.unresolved, *outputs]

    @cached_property
    def _output_paths(self) -> frozenset[str]:
        return frozenset(run.path for run in self.runs.values()) - {""}

    @cached_property
    def _listed(self) -> frozenset[str]:
        return frozenset(md5 for (md5,) in self._db.execute("SELECT md5 FROM listed"))

    @cached_property
    def _listed_paths(self) -> frozenset[str]:
        return frozenset(producer.path for md5 in self._listed for producer in self.runs_by_output.get(md5, []))

    @cached_property
    def _split_paths(self) -> frozenset[str]:
        return frozenset(producer.path for md5 in self.split_outputs for producer in self.runs_by_output.get(md5, []))

    def distilled_from(self, prefix: str) -> list[StageRun]:
        """The models that learned from a larger one with a file whose sha256 has this prefix."""
        query = "SELECT id FROM run WHERE address LIKE 'aligned@%' AND instr(text, ?)"
        named = {number for (number,) in self._db.execute(query, (prefix,))}
        teachers = {
            run: teacher_of(run.address, self.lock_entry(run)) for run in self.runs.values() if run.entry.id in named
        }
        return [
            run
            for run, one in teachers.items()
            if one and any(digest.startswith(prefix) for digest in one["sha256"].values())
        ]

    def entries_reading(self, path: str) -> list[tuple[str, str, str]]:
        """(address, dependency, section of dvc.lock) of the entries that read a
        file or folder, the folder that it is in, or files in it.

        Outputs of stages are left out.
        """
        deps = [
            dep
            for (dep,) in self._db.execute("SELECT DISTINCT dep FROM input")
            if (is_within(dep, path) or is_within(path, dep))
            and not any(is_within(dep, out) or is_within(out, dep) for out in self._output_paths)
        ]
        query = (
            "SELECT DISTINCT run.address, input.dep, run.text FROM run JOIN input ON input.run = run.id WHERE"
            " input.dep IN"
        )
        return list(self._rows(query, deps))

    def sources_of(self, run: StageRun) -> set[str] | None:
        """The sources that reports name of everything upstream of a model's data.

        None if such a report is unavailable.
        """
        upstream = [producer for producer in self.ancestors(run).values() if self.reads_sources(producer)]
        named: set[str] = set()
        for producer in upstream:
            rows = self._db.execute("SELECT source FROM origin WHERE run = ?", (producer.entry.id,)).fetchall()
            if not rows:
                return None
            named |= {source for (source,) in rows} - {""}
        return named

    def missing_reports(self, run: StageRun, only_splits: bool) -> list[dict[str, str]]:
        """Unavailable reports that name the sources of a model's data, each with stage, path and md5.

        Args:
            only_splits: only those of data sets with splits, which name files of paraphrases.
        """
        found = []
        for producer in self.ancestors(run).values():
            if not self.reads_sources(producer) or (only_splits and not self.is_split(producer)):
                continue
            if not self._db.execute("SELECT 1 FROM origin WHERE run = ? LIMIT 1", (producer.entry.id,)).fetchone():
                found += [lost] if (lost := self.unavailable_report(producer)) else []
        return found

    def reads_sources(self, run: StageRun) -> bool:
        """Whether a run read files of sources, so that its report names them."""
        return any(md5 not in run.producers and path.startswith(SOURCES) for _, path, md5 in run.inputs)

    @property
    def unreadable(self) -> list[str]:
        """Commits whose dvc.lock cannot be read, or is missing from git's objects; "the workspace" if its dvc.lock is
        damaged; entries of the run cache that cannot be read; parts of the history; and pipelines in subfolders."""
        commits = {**self.history.unreachable, **self.history.first}
        rows = self._db.execute("SELECT blob, readable FROM lock").fetchall()
        unreadable = {blob.partition(":")[0] for blob, readable in rows if not readable}
        missing = commits.keys() - {blob.partition(":")[0] for blob, _ in rows}
        runs = self._db.execute("SELECT name FROM cached_run WHERE run IS NULL ORDER BY name").fetchall()
        inputs = (md5 for (md5,) in self._db.execute("SELECT DISTINCT md5 FROM input"))
        return [
            *sorted({commits[blob] for blob in {*unreadable, *missing} if blob in commits}),
            *(["the workspace"] if self.history.workspace in unreadable or lost_entries(self.root) else ()),
            *(f"run cache {name[:12]}" for (name,) in runs),
            *self.history.lost,
            *(f"the pipeline of {path}" for path in other_pipelines(self.root, {*self.runs_by_output, *inputs})),
        ]
