"""SQLite index of history: the inputs and outputs of every stage run, and the files and training steps that contain each record.

The database in .dvc/tmp/pedigree is a cache: if deleted, it is rebuilt from git and DVC's cache. Each dvc.lock and each file is read once, by hash.
A record is stored as the 16 bytes of its `example_id`, in sorted chunks over all files that were read together, so that a lookup reads one chunk
per several million rows.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_bytes
from dagster_project.core.layout import PLOTS, REPORTS, is_code
from dagster_project.core.messages import argument_texts, calls
from dagster_project.lineage.history import LOCK, Objects, blobs, history, stages_of

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

INDEX_FILE = Path(".dvc", "tmp", "pedigree", "index.sqlite3")
CHUNK = 256
"""Rows per chunk: the amount that one lookup reads."""
SEGMENT = 4_000_000
"""Rows per segment. The rows of a segment are sorted together."""
SPLIT = re.compile(r"(?:^|/)(train|validation|test)/records-\d+\.parquet$")
"""Shards of a data set with splits: the rows that a model trains on, is monitored on, or is evaluated on."""
EVIDENCE = "examples.parquet"
"""Training evidence in a model's folder: the examples it was trained on, with step and epoch."""
WEIGHTS = ".safetensors"
TABLES = """
CREATE TABLE lock (id INTEGER PRIMARY KEY, blob TEXT UNIQUE);
CREATE TABLE run (id INTEGER PRIMARY KEY, key TEXT UNIQUE, address TEXT, path TEXT, md5 TEXT, is_model INTEGER, report TEXT, report_md5 TEXT, text TEXT);
CREATE INDEX run_md5 ON run (md5);
CREATE TABLE lock_run (lock INTEGER, run INTEGER, PRIMARY KEY (lock, run)) WITHOUT ROWID;
CREATE TABLE input (run INTEGER, dep TEXT, path TEXT, md5 TEXT);
CREATE TABLE origin (run INTEGER, source TEXT, sha256 TEXT);
CREATE TABLE listed (md5 TEXT PRIMARY KEY, is_split INTEGER) WITHOUT ROWID;
CREATE TABLE file (out TEXT, name TEXT, md5 TEXT, split TEXT);
CREATE INDEX file_out ON file (out);
CREATE INDEX file_md5 ON file (md5);
CREATE INDEX file_name ON file (name);
CREATE TABLE unread (md5 TEXT PRIMARY KEY, out TEXT, name TEXT) WITHOUT ROWID;
CREATE TABLE content (id INTEGER PRIMARY KEY, md5 TEXT UNIQUE);
CREATE TABLE source_rows (content INTEGER, source TEXT, rows INTEGER);
CREATE INDEX source_rows_content ON source_rows (content);
CREATE TABLE training (evidence TEXT, shard TEXT, source TEXT, records INTEGER, first INTEGER, last INTEGER);
CREATE INDEX training_shard ON training (shard, evidence);
CREATE TABLE matched (run INTEGER PRIMARY KEY);
CREATE TABLE record (segment INTEGER, first BLOB, keys BLOB, contents BLOB, steps BLOB, epochs BLOB, PRIMARY KEY (segment, first));
CREATE TABLE text_record (segment INTEGER, first BLOB, keys BLOB, ids BLOB, PRIMARY KEY (segment, first));
"""
SCHEMA_VERSION = zlib.crc32(TABLES.encode()) >> 1
"""Derived from the tables: an index with another schema is rebuilt."""


@dataclass(frozen=True)
class StageRun:
    """One run of a stage, as dvc.lock recorded it, in however many commits."""

    id: int
    address: str
    path: str
    """Path of the output."""
    md5: str
    is_model: bool
    """Whether the output is a model."""
    inputs: tuple[tuple[str, str, str], ...]
    """(dependency as in dvc.lock, path of the upstream output or else of the dependency itself, hash) per input. Code is excluded."""
    order: int
    """Position of its first commit in history."""
    commit: str | None
    """The first commit whose dvc.lock contains the run; None if it is not committed."""
    in_workspace: bool
    """Whether the dvc.lock of the workspace contains the run."""
    locks: frozenset[int]
    """Ids of every dvc.lock that contains the run."""


@dataclass
class RecordUse:
    """Rows of one file that contain a record."""

    out: str
    """Hash of the output that contains the file."""
    split: str | None
    """Split of the shard; None if the file is training evidence."""
    key: bytes
    steps: list[tuple[int, int]] = field(default_factory=list)
    """(step, epoch)."""


class Index:
    """Index of the stage runs in history. Opening it indexes new commits; `read_records` indexes the records of new files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = Objects(root)
        self.history = history(root)
        self._db = _connect(root)
        with self._transaction():
            self._read_locks()
            self._list_outputs()
            self._read_origins()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Exclusive write transaction, rolled back on any exception."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # Stage runs and their inputs.

    def _read_locks(self) -> None:
        indexed = {blob for (blob,) in self._db.execute("SELECT blob FROM lock")}
        commits = dict(self.history.first)
        texts: dict[str, tuple[bytes, str]] = {}
        new = [blob for blob in commits if blob not in indexed]
        contents = blobs(self.root, [*new, *(f"{commits[blob]}:./dvc.yaml" for blob in new)])
        texts |= {blob: (contents[blob], commits[blob]) for blob in new if blob in contents}
        # last: of a pipeline that ran in part, the entries of the other stages belong to the commit that they came with
        if self.history.workspace and self.history.workspace not in {*indexed, *commits}:
            texts[self.history.workspace] = (self.root / LOCK).read_bytes(), ":"
        if not texts:
            return
        yaml = self.root / "dvc.yaml"
        declared = {":": yaml.read_bytes() if yaml.is_file() else b""} | {
            name.partition(":")[0]: text for name, text in contents.items() if ":" in name
        }
        models: dict[bytes, frozenset[str]] = {}
        for blob, (content, commit) in texts.items():
            pipeline = declared.get(commit, b"")
            if pipeline not in models:
                models[pipeline] = _declared_models(pipeline)
            with suppress(InputError, UnicodeDecodeError):  # a committed merge conflict
                self._read_lock(blob, _lock_parts(content.decode()), models[pipeline])

    def _read_lock(self, blob: str, parts: _LockParts, models: frozenset[str]) -> None:
        rows = {
            key: row for (key, *row) in self._rows("SELECT key, id, address, path, md5, is_model FROM run WHERE key IN", [*parts.values()])
        }
        added = {}
        for address, key in parts.items():
            if key not in rows:
                stage = stages_of("stages:\n" + parts.text[address])[address]
                out = output(stage)
                if out is None:
                    continue
                is_model = address.partition("@")[0] in models
                report: dict[str, str] = next((one for one in stage["outs"] if one["path"].startswith(REPORTS)), {})
                cursor = self._db.execute(
                    "INSERT INTO run (key, address, path, md5, is_model, report, report_md5, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (key, address, out["path"], out["md5"], is_model, report.get("path"), report.get("md5"), parts.text[address]),
                )
                rows[key] = [cursor.lastrowid, address, out["path"], out["md5"], is_model]
                added[cursor.lastrowid] = stage
        outs = {path: md5 for (_, _, path, md5, _) in rows.values()}
        for run, stage in added.items():
            self._db.executemany("INSERT INTO input VALUES (?, ?, ?, ?)", [(run, *read) for read in _inputs_of(stage, outs)])
        lock = self._db.execute("INSERT OR IGNORE INTO lock (blob) VALUES (?)", (blob,)).lastrowid
        self._db.executemany("INSERT OR IGNORE INTO lock_run VALUES (?, ?)", [(lock, row[0]) for row in rows.values()])
        newly_models = [(row[0],) for row in rows.values() if row[1].partition("@")[0] in models and not row[4]]
        self._db.executemany("UPDATE run SET is_model = 1 WHERE id = ?", newly_models)

    def _list_outputs(self) -> None:
        """List the files of every output that has become available."""
        query = "SELECT md5, path FROM run WHERE md5 NOT IN (SELECT md5 FROM listed) GROUP BY md5"
        for md5, path in self._db.execute(query).fetchall():
            listing = self.objects.listing(md5, path if md5 in self.workspace_outputs else "")
            if listing is None:
                continue
            splits = {name: match.group(1) for name in listing if (match := SPLIT.search(name))}
            self._db.execute("INSERT INTO listed VALUES (?, ?)", (md5, bool(splits)))
            files = [(md5, name, value, splits.get(name)) for name, value in listing.items()]
            self._db.executemany("INSERT INTO file VALUES (?, ?, ?, ?)", files)
            indexable = [(value, md5, name) for name, value in listing.items() if name in splits or name == EVIDENCE]
            self._db.executemany("INSERT OR IGNORE INTO unread SELECT ?, ?, ? WHERE ?1 NOT IN (SELECT md5 FROM content)", indexable)
            if any(name.endswith(WEIGHTS) for name in listing):
                self._db.execute("UPDATE run SET is_model = 1 WHERE md5 = ?", (md5,))

    def _read_origins(self) -> None:
        """Record the sources, from the reports of the runs that read files which no stage produces."""
        query = """SELECT DISTINCT run.id, run.report, run.report_md5 FROM run JOIN input ON input.run = run.id
            WHERE run.report IS NOT NULL AND run.id NOT IN (SELECT run FROM origin) AND input.md5 NOT IN (SELECT md5 FROM run)"""
        pending = [row for row in self._db.execute(query).fetchall() if row[0] in self.runs]
        report_names = {run: f"{self.runs[run].commit}:./{report}" for run, report, _ in pending if self.runs[run].commit}
        committed = blobs(self.root, report_names.values())
        for run, report, md5 in pending:
            in_workspace = self.root / report
            content = committed.get(report_names.get(run, ""), b"") or (in_workspace.read_bytes() if in_workspace.is_file() else b"")
            if md5_of_bytes(content) == md5:
                facts = json.loads(content).get("sources") or {"": {}}
                self._db.executemany("INSERT INTO origin VALUES (?, ?, ?)", [(run, s, f.get("sha256")) for s, f in facts.items()])

    @cached_property
    def workspace_outputs(self) -> dict[str, str]:
        """Hash -> path of the outputs in the workspace's dvc.lock. Their files may exist in the workspace."""
        query = "SELECT run.md5, run.path FROM run JOIN lock_run ON run.id = lock_run.run JOIN lock ON lock.id = lock_run.lock WHERE lock.blob = ?"
        return dict(self._db.execute(query, (self.history.workspace,)))

    @cached_property
    def runs(self) -> dict[int, StageRun]:
        """Id -> every run in a commit reachable by git or in the workspace, in the order of history."""
        order = {blob: (i, commit) for i, (blob, commit) in enumerate(self.history.first.items())}
        first_commit: dict[int, tuple[int, str | None]] = {}
        current = None
        for identity, blob in self._db.execute("SELECT id, blob FROM lock"):
            if blob in order:
                first_commit[identity] = order[blob]
            if blob == self.history.workspace:
                first_commit.setdefault(identity, (len(order), None))
                current = identity
        locks: dict[int, list[int]] = defaultdict(list)
        for lock, run in self._db.execute("SELECT lock, run FROM lock_run"):
            if lock in first_commit:
                locks[run].append(lock)
        inputs: dict[int, list[tuple[str, str, str]]] = defaultdict(list)
        for run, dep, path, md5 in self._db.execute("SELECT run, dep, path, md5 FROM input ORDER BY rowid"):
            inputs[run].append((dep, path, md5))
        runs = []
        for identity, address, path, md5, is_model in self._db.execute("SELECT id, address, path, md5, is_model FROM run"):
            if identity in locks:
                first = min(first_commit[lock] for lock in locks[identity])
                run_locks = frozenset(locks[identity])
                runs.append(
                    StageRun(
                        identity,
                        address,
                        path,
                        md5,
                        bool(is_model),
                        tuple(inputs[identity]),
                        *first,
                        in_workspace=current in run_locks,
                        locks=run_locks,
                    )
                )
        return {run.id: run for run in sorted(runs, key=lambda run: (run.order, run.id))}

    @cached_property
    def runs_by_output(self) -> dict[str, list[StageRun]]:
        """Hash of an output -> the runs that produced it, in the order of history."""
        by_output: dict[str, list[StageRun]] = defaultdict(list)
        for run in self.runs.values():
            by_output[run.md5].append(run)
        return dict(by_output)

    def producer(self, reader: StageRun, md5: str) -> StageRun | None:
        """The run that produced an input of `reader`. Of several with the same bytes: one in the same dvc.lock, or else the first."""
        producers = self.runs_by_output.get(md5, [])
        return next((run for run in producers if run.locks & reader.locks), producers[0] if producers else None)

    def runs_in_lock(self, blob: str | None) -> dict[str, StageRun]:
        """Address -> run, for one dvc.lock; empty if it is unreadable or unreachable from any branch."""
        if blob not in self.history.first and blob != self.history.workspace:
            return {}
        rows = self._db.execute("SELECT run FROM lock_run JOIN lock ON lock.id = lock_run.lock WHERE blob = ?", (blob,))
        return {self.runs[run].address: self.runs[run] for (run,) in rows if run in self.runs}

    def lock_entry(self, run: StageRun) -> dict[str, Any]:
        """The complete entry of dvc.lock."""
        (text,) = self._db.execute("SELECT text FROM run WHERE id = ?", (run.id,)).fetchone()
        return dict(stages_of("stages:\n" + text)[run.address])

    def parents(self, run: StageRun) -> list[StageRun]:
        """The models that a model was made from, directly. For a folder of models: those whose weights it contains unchanged, if any."""
        direct: list[StageRun] = []
        from_folders: list[StageRun] = []
        for dep, path, md5 in run.inputs:
            producer = self.producer(run, md5)
            if producer and producer.is_model and producer.md5 != run.md5:
                (direct if dep == path else from_folders).append(producer)
        mine = self.weights(run.md5)
        same = [producer for producer in from_folders if mine & self.weights(producer.md5)]
        return list(dict.fromkeys([*direct, *(same or from_folders)]))

    def data(self, run: StageRun) -> dict[str, StageRun]:
        """Hash -> run of every data set upstream of a run, up to the nearest models and data sets with splits.

        The search ends at splits because `preferences` reads the test split of the instructions only to exclude it: no model trains on it.
        """
        upstream: dict[str, StageRun] = {}
        pending = [run]
        while pending:
            reader = pending.pop()
            for _, _, md5 in reader.inputs:
                producer = self.producer(reader, md5)
                if producer and not producer.is_model and md5 not in upstream:
                    upstream[md5] = producer
                    if not self.is_split(producer):
                        pending.append(producer)
        return upstream

    def ancestors(self, run: StageRun) -> dict[str, StageRun]:
        """Hash -> run of `data` and everything upstream of it, except other data sets with splits."""
        upstream = dict(self.data(run))
        pending = list(upstream.values())
        while pending:
            reader = pending.pop()
            for _, _, md5 in reader.inputs:
                producer = self.producer(reader, md5)
                if (
                    producer
                    and not producer.is_model
                    and md5 not in upstream
                    and not (md5 in self.split_outputs or producer.path in self._split_paths)
                ):
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
        """Whether the output has splits, judged by other outputs at the same path if it is unavailable; True if that is unknown."""
        return run.md5 in self.split_outputs or run.path in self._split_paths or run.path not in self._listed_paths

    def weights(self, out: str) -> frozenset[str]:
        query = f"SELECT md5 FROM file WHERE out = ? AND name LIKE '%{WEIGHTS}'"
        return frozenset(md5 for (md5,) in self._db.execute(query, (out,)))

    def outputs_with_file(self, file: str) -> list[str]:
        """Outputs that contain a file with this hash."""
        return [out for (out,) in self._db.execute("SELECT DISTINCT out FROM file WHERE md5 = ?", (file,))]

    def outputs_with_prefix(self, prefix: str) -> list[str]:
        """Output hashes with this prefix."""
        return [md5 for md5 in self.runs_by_output if md5.startswith(prefix)]

    def outputs_by_source_hash(self, sha256: str) -> dict[str, frozenset[str]]:
        """Source -> hashes of the outputs made from the version of it whose sha256 has this prefix."""
        outputs: dict[str, set[str]] = defaultdict(set)
        query = "SELECT run, source FROM origin WHERE sha256 >= ? AND sha256 < ?"
        for run, source in self._db.execute(query, (sha256, sha256 + "g")):
            if run in self.runs:
                outputs[source].add(self.runs[run].md5)
        return {source: frozenset(outs) for source, outs in outputs.items()}

    def matching_hashes(self, prefix: str) -> tuple[frozenset[str], frozenset[str]]:
        """(file hashes with this prefix, hashes of outputs that have the prefix or contain such a file)."""
        rows = self._db.execute("SELECT md5, out FROM file WHERE md5 >= ? AND md5 < ?", (prefix, prefix + "g")).fetchall()
        outs = {out for md5, out in rows if out in self.runs_by_output} | set(self.outputs_with_prefix(prefix))
        return frozenset(md5 for md5, _ in rows), frozenset(outs)

    # Records and the files that contain them.

    def read_records(self) -> None:
        """Index every available shard and evidence file that is not indexed yet."""
        while self._read_segment():
            pass
        with self._transaction():
            self._match_evidence()

    def _read_segment(self) -> bool:
        """Index up to SEGMENT rows. Returns whether anything was read."""
        with self._transaction():
            rows = _RowCollector()
            for md5, out, name in self._db.execute("SELECT md5, out, name FROM unread ORDER BY out, name").fetchall():
                path = self.objects.path(md5, self.workspace_outputs.get(out, ""))
                if path is None:
                    continue
                content = self._db.execute("INSERT INTO content (md5) VALUES (?)", (md5,)).lastrowid or 0
                self._db.execute("DELETE FROM unread WHERE md5 = ?", (md5,))
                by_source = rows.add_evidence(path, content) if name == EVIDENCE else rows.add_shard(path, content)
                self._db.executemany("INSERT INTO source_rows VALUES (?, ?, ?)", [(content, *item) for item in by_source.items()])
                if rows.size >= SEGMENT:
                    break
            if not rows.size:
                return False
            (segment,) = self._db.execute("SELECT coalesce(max(segment), -1) + 1 FROM record").fetchone()
            self._db.executemany("INSERT INTO record VALUES (?, ?, ?, ?, ?, ?)", ((segment, *chunk) for chunk in rows.record_chunks()))
            self._db.executemany("INSERT INTO text_record VALUES (?, ?, ?, ?)", ((segment, *chunk) for chunk in rows.text_chunks()))
            return True

    def _match_evidence(self) -> None:
        """Count the records of each source and shard that each model was trained on, with first and last step.

        Each pair of evidence and shard is joined once.
        """
        matched = {run for (run,) in self._db.execute("SELECT run FROM matched")}
        evidence_of = dict(self._db.execute("SELECT out, md5 FROM file WHERE name = ?", (EVIDENCE,)))
        pending: dict[str, tuple[Path, dict[str, Path]]] = {}
        done: set[tuple[str, str]] = set()
        models = [run for run in self.runs.values() if run.id not in matched and run.md5 in evidence_of]
        if models:
            done |= set(self._db.execute("SELECT DISTINCT evidence, shard FROM training").fetchall())
        for run in models:
            evidence, evidence_path = evidence_of[run.md5], self.file_path(run.md5, EVIDENCE)
            train = [(md5, self.workspace_outputs.get(out, "")) for out, split, md5 in self.shards(run) if split == "train"]
            shard_paths = {md5: self.objects.path(md5, out) for md5, out in train if (evidence, md5) not in done}
            if evidence_path and train and all(shard_paths.values()):
                pending.setdefault(evidence, (evidence_path, {}))[1].update({md5: path for md5, path in shard_paths.items() if path})
                self._db.execute("INSERT INTO matched VALUES (?)", (run.id,))
        for evidence, (evidence_path, shards) in pending.items():
            rows = [(evidence, *row) for row in _summarize_training(evidence_path, shards)] if shards else []
            self._db.executemany("INSERT INTO training VALUES (?, ?, ?, ?, ?, ?)", rows)

    def shards(self, run: StageRun) -> list[tuple[str, str, str]]:
        """(hash of the output, split, hash of the shard) of every shard in the data upstream of a run."""
        query = "SELECT out, split, md5 FROM file WHERE out = ? AND split IS NOT NULL ORDER BY name"
        return [row for out in self.data(run) if out in self.split_outputs for row in self._db.execute(query, (out,))]

    @cached_property
    def split_outputs(self) -> frozenset[str]:
        """Hashes of the outputs with splits."""
        return frozenset(md5 for (md5,) in self._db.execute("SELECT md5 FROM listed WHERE is_split"))

    def missing(self, run: StageRun) -> list[StageRun]:
        """Runs whose unavailable outputs are needed to determine which records a model itself has seen."""
        return [
            producer
            for producer in [*self.data(run).values(), run]
            if producer.md5 in self._unindexed or (producer.md5 not in self._listed and (producer is run or self.is_split(producer)))
        ]

    @cached_property
    def _listed(self) -> frozenset[str]:
        return frozenset(md5 for (md5,) in self._db.execute("SELECT md5 FROM listed"))

    @cached_property
    def _unindexed(self) -> frozenset[str]:
        query = "SELECT DISTINCT file.out FROM unread JOIN file ON file.md5 = unread.md5"
        return frozenset(out for (out,) in self._db.execute(query))

    @cached_property
    def _listed_paths(self) -> frozenset[str]:
        return frozenset(producer.path for md5 in self._listed for producer in self.runs_by_output.get(md5, []))

    @cached_property
    def _split_paths(self) -> frozenset[str]:
        return frozenset(producer.path for md5 in self.split_outputs for producer in self.runs_by_output.get(md5, []))

    def record_uses(self, keys: Iterable[bytes]) -> list[RecordUse]:
        """Every file that contains one of these records."""
        import numpy as np

        uses: list[RecordUse] = []
        for key in keys:
            for segment in self._segments("record"):
                chunk = self._chunk("record", segment, key, "keys, contents, steps, epochs")
                if chunk is None:
                    continue
                matches = _equal(chunk[0], key)
                contents, steps, epochs = (np.frombuffer(column, np.int32)[matches].tolist() for column in chunk[1:])
                by_content: dict[int, list[tuple[int, int]]] = defaultdict(list)
                for content, step, epoch in zip(contents, steps, epochs, strict=True):
                    by_content[content] += [(step, epoch)] if step else []
                for out, split, content in self._rows(
                    "SELECT file.out, file.split, content.id FROM content JOIN file ON file.md5 = content.md5"
                    f" WHERE (file.split IS NOT NULL OR file.name = '{EVIDENCE}') AND content.id IN",
                    [*by_content],
                ):
                    uses.append(RecordUse(out, split, key, sorted(by_content[content])))
        return uses

    def record_keys(self) -> Iterator[bytes]:
        """Keys of all records, 16 bytes each, in chunks; a record may occur more than once."""
        for (keys,) in self._db.execute("SELECT DISTINCT keys FROM record"):
            yield keys

    def knows_steps(self, run: StageRun) -> bool:
        """Whether the training steps of a model's records are known."""
        return run.md5 in self._with_steps

    @cached_property
    def _with_steps(self) -> frozenset[str]:
        """Outputs whose evidence is indexed."""
        read = {md5 for (md5,) in self._db.execute("SELECT md5 FROM content")}
        return frozenset(out for out, md5 in self._db.execute("SELECT out, md5 FROM file WHERE name = ?", (EVIDENCE,)) if md5 in read)

    def records_with_text(self, text: str) -> list[bytes]:
        """Keys of the records with a message of this text, ignoring case and whitespace: its content, its reasoning, the arguments of a call as JSON
        in any spelling, or one text in them."""
        records: set[bytes] = set()
        for key in {_text_key(text), _text_key(_canonical_json(text))}:
            for segment in self._segments("text_record"):
                if chunk := self._chunk("text_record", segment, key, "keys, ids"):
                    records |= {chunk[1][16 * i : 16 * i + 16] for i in _equal(chunk[0], key).nonzero()[0].tolist()}
        return sorted(records)

    def rows_from_source(self, source: str) -> dict[str, dict[str, int]]:
        """Hash of an output -> split -> rows from a source: a file, or a folder and its contents."""
        query = """SELECT file.out, file.split, sum(rows) FROM source_rows JOIN content ON content.id = source_rows.content JOIN file ON file.md5 = content.md5
            WHERE file.split IS NOT NULL AND (source = ?1 OR source LIKE ?2 ESCAPE '\\') GROUP BY 1, 2"""
        by_output: dict[str, dict[str, int]] = defaultdict(dict)
        for out, split, rows in self._db.execute(query, (source, _inside(source))):
            by_output[out][split] = rows
        return dict(by_output)

    @cached_property
    def shard_sizes(self) -> dict[str, int]:
        """Hash of a shard -> number of rows."""
        return dict(
            self._db.execute("SELECT content.md5, sum(rows) FROM source_rows JOIN content ON content.id = source_rows.content GROUP BY 1")
        )

    def training_summary(self, run: StageRun, source: str | None) -> tuple[int, int, int] | None:
        """(records, first step, last step) of a model's training on one source, or on all; None if unknown."""
        if run.id not in self._matched:
            return None
        by_shard = self._training_summaries(source).get((self.files(run.md5) or {}).get(EVIDENCE, ""), {})
        summaries = [by_shard[md5] for _, split, md5 in self.shards(run) if split == "train" and md5 in by_shard]
        records, first, last = (tuple(zip(*summaries, strict=True))) if summaries else ((0,), (0,), (0,))
        return sum(records), min(first), max(last)

    @cached_property
    def _matched(self) -> frozenset[int]:
        return frozenset(run for (run,) in self._db.execute("SELECT run FROM matched"))

    @cache  # noqa: B019  an index lives as long as one query
    def _training_summaries(self, source: str | None) -> dict[str, dict[str, tuple[int, int, int]]]:
        """Evidence -> shard -> (records, first step, last step), for one source or for all."""
        by_evidence: dict[str, dict[str, tuple[int, int, int]]] = defaultdict(dict)
        where, values = ("", []) if source is None else ("WHERE source = ? OR source LIKE ? ESCAPE '\\'", [source, _inside(source)])
        query = f"SELECT evidence, shard, sum(records), min(first), max(last) FROM training {where} GROUP BY 1, 2"
        for evidence, shard, *summary in self._db.execute(query, values):
            by_evidence[evidence][shard] = tuple(summary)
        return by_evidence

    def shard_paths(self) -> dict[str, Path]:
        """Hash -> path of every available shard."""
        query = "SELECT DISTINCT file.md5, file.out FROM file JOIN content ON content.md5 = file.md5 WHERE file.split IS NOT NULL"
        return {md5: path for md5, out in self._db.execute(query) if (path := self.objects.path(md5, self.workspace_outputs.get(out, "")))}

    def _segments(self, table: str) -> list[int]:
        (last,) = self._db.execute(f"SELECT coalesce(max(segment), -1) FROM {table}").fetchone()
        return list(range(last + 1))

    def _chunk(self, table: str, segment: int, key: bytes, columns: str) -> Any:
        query = f"SELECT {columns} FROM {table} WHERE segment = ? AND first <= ? ORDER BY first DESC LIMIT 1"
        return self._db.execute(query, (segment, key[:8])).fetchone()

    def _rows(self, query: str, values: Sequence[Any]) -> Iterator[Any]:
        """Run a query that ends in IN for any number of values, in batches."""
        for start in range(0, len(values), 900):
            batch = values[start : start + 900]
            yield from self._db.execute(f"{query} ({','.join('?' * len(batch))})", batch)


def _connect(root: Path) -> sqlite3.Connection:
    """Open the database: rebuilt if its schema differs or it is corrupt, in memory if the project is read-only."""
    path = root / INDEX_FILE
    for _ in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(path, timeout=3600, isolation_level=None)
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == SCHEMA_VERSION:
                return db
            if version == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                db.executescript(f"PRAGMA journal_mode = WAL; BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
                return db
            db.close()
            path.unlink()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                break
            path.unlink()
        except OSError:
            break
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.executescript(TABLES)
    return db


class _LockParts(dict[str, str]):
    """Address -> hash of its section of a dvc.lock."""

    text: dict[str, str]
    """Address -> YAML of its section."""


def _lock_parts(text: str) -> _LockParts:
    """Split a dvc.lock into stages without parsing it: parsing YAML is slow, and most stages are unchanged between commits.

    Raises:
        InputError: the text is not a dvc.lock.
    """
    parts = _LockParts()
    parts.text = {}
    body = re.split(r"^stages:.*\n", text, maxsplit=1, flags=re.MULTILINE)[1:]
    pieces = re.split(r"^(?=  \S)", re.split(r"^(?=\S)", body[0], maxsplit=1, flags=re.MULTILINE)[0], flags=re.MULTILINE) if body else []
    heads = [re.match(r"  ([\w@.-]+):\n", piece) for piece in pieces]
    if pieces and all(heads):
        parts.text = {head.group(1): piece for head, piece in zip(heads, pieces, strict=True) if head}
    else:  # not formatted by DVC
        parts.text = {name: f"  {json.dumps(name)}: {json.dumps(stage)}\n" for name, stage in stages_of(text).items()}
    parts.update({name: hashlib.sha1(piece.encode(), usedforsecurity=False).hexdigest() for name, piece in parts.text.items()})
    return parts


def output(stage: Mapping[str, Any]) -> dict[str, Any] | None:
    """A stage's output, other than report and plots; None if its entry in dvc.lock has no output with a hash."""
    outs = [out for out in stage.get("outs", []) if not out["path"].startswith((REPORTS, PLOTS)) and "md5" in out]
    return dict(outs[0]) if outs else None


def is_input(path: str) -> bool:
    """Whether a dependency is data, i.e. neither code nor a report."""
    return not is_code(path) and not path.startswith(REPORTS)


def _inputs_of(stage: Mapping[str, Any], outs: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(dependency, path of the upstream output or else of the dependency, hash) per input of a stage.

    A folder of outputs is expanded to the outputs in it; a file inside an output stands for the whole output.
    """
    inputs: list[tuple[str, str, str]] = []
    for dep in stage.get("deps", []):
        path, md5 = dep["path"], dep.get("md5", "")
        if not is_input(path):
            continue
        inside = [(path, out, value) for out, value in outs.items() if out.startswith(path + "/")]
        containing = [(path, out, value) for out, value in outs.items() if path.startswith(out + "/")]
        inputs += [(path, path, md5)] if path in outs else inside or containing or [(path, path, md5)]
    return inputs


def _declared_models(pipeline: bytes) -> frozenset[str]:
    """Stages that dvc.yaml marks as producing safetensors, so that a model is recognized even if its files are unavailable."""
    try:
        stages = stages_of(pipeline.decode(), "dvc.yaml") if pipeline else {}
    except (InputError, UnicodeDecodeError):
        return frozenset()
    bodies = {name: body.get("do", body) for name, body in stages.items() if isinstance(body, dict)}
    return frozenset(name for name, body in bodies.items() if "safetensors" in ((body.get("meta") or {}).get("kinds") or []))


def record_key(example_id: str) -> bytes:
    """16-byte key of a record: its example_id, a hexadecimal hash, as bytes."""
    with suppress(ValueError):
        if len(example_id) == 32:
            return bytes.fromhex(example_id)
    return hashlib.sha256(example_id.encode()).digest()[:16]


def _record_keys(ids: Sequence[str]) -> bytes:
    with suppress(ValueError):
        if set(map(len, ids)) <= {32}:
            return bytes.fromhex("".join(ids))
    return b"".join(map(record_key, ids))


def _text_key(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass")).digest()[:16]


def _canonical_json(text: str) -> str:
    """A JSON object or list in one spelling; other texts as they are."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return json.dumps(json.loads(text), ensure_ascii=False, sort_keys=True)
    except (ValueError, RecursionError):
        return text


def _call_texts(tool_calls: str) -> Iterator[str]:
    """The arguments of each call, and each text in them: '[{"function": {"arguments": {"city": "Oslo"}}}]'  ->  '{"city": "Oslo"}', "Oslo"."""
    for call in calls({"tool_calls": json.loads(tool_calls)}):
        if isinstance(call.arguments, str):
            yield call.arguments
            continue
        yield json.dumps(call.arguments, ensure_ascii=False, sort_keys=True)
        yield from (text for _, text in argument_texts(call.arguments) if isinstance(text, str))


def _inside(folder: str) -> str:
    """LIKE pattern for everything in a folder."""
    return re.sub(r"([%_\\])", r"\\\1", folder.rstrip("/")) + "/%"


def _equal(keys: bytes, key: bytes) -> np.ndarray:
    import numpy as np

    return (np.frombuffer(keys, np.uint64).reshape(-1, 2) == np.frombuffer(key, np.uint64)).all(axis=1)


class _RowCollector:
    """Collects rows of many files and writes them as sorted chunks."""

    def __init__(self) -> None:
        self.size = 0
        self._records: list[tuple[bytes, Any, Any, Any]] = []
        self._texts: list[tuple[bytes, bytes]] = []
        self._text_keys: dict[str, bytes] = {}

    def add_evidence(self, path: Path, content: int) -> dict[str, int]:
        import numpy as np
        import pyarrow.parquet as pq

        table = pq.read_table(path, columns=["example_id", "step", "epoch"])
        steps, epochs = (table[name].to_numpy().astype(np.int32) for name in ("step", "epoch"))
        self._add_records(table["example_id"].to_pylist(), content, steps, epochs)
        return {}

    def add_shard(self, path: Path, content: int) -> dict[str, int]:
        """Add the rows of a shard. Returns source -> number of rows."""
        import numpy as np
        import pyarrow.parquet as pq

        names = pq.read_schema(path).names
        text_columns = [name for name in ("messages", "prompt", "chosen", "rejected") if name in names]
        table = pq.read_table(path, columns=["example_id", *(["source"] if "source" in names else []), *text_columns])
        ids = table["example_id"].to_pylist()
        keys = self._add_records(ids, content, np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32))
        for name in text_columns:
            self._add_texts(keys, table[name].combine_chunks())
        if "source" not in names:
            return {}
        counts = table["source"].combine_chunks().value_counts()
        return {str(entry["values"]): int(entry["counts"]) for entry in counts.to_pylist()}

    def _add_records(self, ids: list[str], content: int, steps: np.ndarray, epochs: np.ndarray) -> bytes:
        import numpy as np

        keys = _record_keys(ids)
        self._records.append((keys, np.full(len(ids), content, np.int32), steps, epochs))
        self.size += len(ids)
        return keys

    def _add_texts(self, keys: bytes, column: pa.Array) -> None:
        """Add the texts of a column of messages or strings: of messages also reasoning and arguments of calls."""
        import numpy as np
        import pyarrow as pa

        if not pa.types.is_list(column.type):
            self._add_owned(np.frombuffer(keys, "V16"), column.to_pylist())
            return
        messages = column.flatten()
        owners = np.repeat(np.frombuffer(keys, "V16"), column.value_lengths().fill_null(0).to_numpy())
        fields = [messages.type.field(i).name for i in range(messages.type.num_fields)]
        for name in fields:
            if name in {"content", "reasoning_content"}:
                self._add_owned(owners, messages.field(name).to_pylist())
        if "tool_calls" in fields:
            given = [[*_call_texts(text)] if text else [] for text in messages.field("tool_calls").to_pylist()]
            self._add_owned(np.repeat(owners, [len(texts) for texts in given]), [text for texts in given for text in texts])

    def _add_owned(self, owners: np.ndarray, texts: Sequence[str | None]) -> None:
        """Add texts, each with the key of the record that it is in."""
        import numpy as np

        text_keys = self._text_keys
        for text in texts:
            if text and text not in text_keys:
                text_keys[text] = _text_key(text)
        nonempty = np.array([bool(text) for text in texts], np.bool_)
        self._texts.append((b"".join(text_keys[text] for text in texts if text), owners[nonempty].tobytes()))
        if len(text_keys) > 100_000:
            text_keys.clear()

    def record_chunks(self) -> Iterator[tuple[bytes, ...]]:
        import numpy as np

        columns = [np.concatenate(column) for column in zip(*(row[1:] for row in self._records), strict=True)] if self._records else []
        yield from _chunks(b"".join(row[0] for row in self._records), columns)

    def text_chunks(self) -> Iterator[tuple[bytes, ...]]:
        import numpy as np

        yield from _chunks(b"".join(row[0] for row in self._texts), [np.frombuffer(b"".join(row[1] for row in self._texts), "V16")])


def _chunks(keys: bytes, columns: Sequence[np.ndarray]) -> Iterator[tuple[bytes, ...]]:
    """(first 8 bytes, keys, column, ...) per chunk, with rows sorted by key. Rows with the same key are in the same chunk."""
    import numpy as np

    if not keys:
        return
    records = np.frombuffer(keys, "V16")
    leading = np.frombuffer(keys, ">u8")[::2].astype(np.uint64)
    order = np.argsort(leading, kind="stable")
    leading = leading[order]
    key_starts = np.flatnonzero(np.diff(leading, prepend=~leading[:1]))  # first row of each distinct key
    starts = np.unique(key_starts[np.searchsorted(key_starts, np.arange(0, len(leading), CHUNK), side="right") - 1])
    for start, stop in zip(starts, [*starts[1:], len(leading)], strict=True):
        rows = order[start:stop]
        chunk_keys = records[rows].tobytes()
        yield (chunk_keys[:8], chunk_keys, *(column[rows].tobytes() for column in columns))


def _summarize_training(evidence: Path, shards: Mapping[str, Path]) -> list[tuple[str, str, int, int, int]]:
    """(shard hash, source, records, first step, last step) of a model's training on each shard and source."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = []
    for md5, path in shards.items():
        part = pq.read_table(path, columns=["example_id", "source"])
        parts.append(part.append_column("shard", pa.array([md5] * part.num_rows, pa.string())))
    steps = pq.read_table(evidence, columns=["example_id", "step"]).group_by("example_id").aggregate([("step", "min"), ("step", "max")])
    joined = pa.concat_tables(parts).join(steps, "example_id", join_type="inner").group_by(["shard", "source"])
    rows = joined.aggregate([("example_id", "count_distinct"), ("step_min", "min"), ("step_max", "max")]).to_pylist()
    columns = ("shard", "source", "example_id_count_distinct", "step_min_min", "step_max_max")
    return sorted((tuple(row[name] for name in columns) for row in rows), key=str)
