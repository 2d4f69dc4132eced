"""A cache of what history says: which run of which stage made what from what, and which record stands in which file at which step.

SQLite in .dvc/tmp/pedigree. It can be deleted; it is filled again from git and DVC's cache, each dvc.lock and each file once, by their hash.
Of a record it holds the 16 bytes of its `example_id`, in sorted chunks of all the files that were read together, so that a question looks at one
chunk for millions of rows.
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
from dagster_project.lineage.history import LOCK, Objects, blobs, history, stages_of

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

PLACE = Path(".dvc", "tmp", "pedigree", "index.sqlite3")
CHUNK = 256
"""Rows in a chunk: what one look-up reads."""
SEGMENT = 4_000_000
"""Rows that are sorted together."""
SPLIT = re.compile(r"(?:^|/)(train|validation|test)/records-\d+\.parquet$")
"""Shards of a data set that is dealt out. Their rows are what a model made from it learns from, is watched on, or is measured on."""
EVIDENCE = "examples.parquet"
"""In a model's folder: the examples it learnt from, with step and epoch."""
WEIGHTS = ".safetensors"
TABLES = """
CREATE TABLE lock (id INTEGER PRIMARY KEY, blob TEXT UNIQUE);
CREATE TABLE made (id INTEGER PRIMARY KEY, key TEXT UNIQUE, address TEXT, path TEXT, md5 TEXT, weights INTEGER, report TEXT, report_md5 TEXT, text TEXT);
CREATE INDEX made_md5 ON made (md5);
CREATE TABLE held (lock INTEGER, made INTEGER, PRIMARY KEY (lock, made)) WITHOUT ROWID;
CREATE TABLE reads (made INTEGER, dep TEXT, path TEXT, md5 TEXT);
CREATE TABLE origin (made INTEGER, source TEXT, sha256 TEXT);
CREATE TABLE listed (md5 TEXT PRIMARY KEY, deals INTEGER) WITHOUT ROWID;
CREATE TABLE file (out TEXT, name TEXT, md5 TEXT, split TEXT);
CREATE INDEX file_out ON file (out);
CREATE INDEX file_md5 ON file (md5);
CREATE INDEX file_name ON file (name);
CREATE TABLE wanted (md5 TEXT PRIMARY KEY, out TEXT, name TEXT) WITHOUT ROWID;
CREATE TABLE content (id INTEGER PRIMARY KEY, md5 TEXT UNIQUE);
CREATE TABLE drawn (content INTEGER, source TEXT, rows INTEGER);
CREATE INDEX drawn_content ON drawn (content);
CREATE TABLE learnt (evidence TEXT, shard TEXT, source TEXT, records INTEGER, first INTEGER, last INTEGER);
CREATE INDEX learnt_shard ON learnt (shard, evidence);
CREATE TABLE settled (made INTEGER PRIMARY KEY);
CREATE TABLE seen (segment INTEGER, first BLOB, keys BLOB, contents BLOB, steps BLOB, epochs BLOB, PRIMARY KEY (segment, first));
CREATE TABLE said (segment INTEGER, first BLOB, keys BLOB, ids BLOB, PRIMARY KEY (segment, first));
"""
FORM = zlib.crc32(TABLES.encode()) >> 1
"""A file with other tables is made anew."""


@dataclass(frozen=True)
class Made:
    """One run of a stage, as dvc.lock recorded it, in however many commits."""

    id: int
    address: str
    path: str
    """Of its output."""
    md5: str
    weights: bool
    """Is the output a model?"""
    reads: tuple[tuple[str, str, str], ...]
    """(dependency as dvc.lock names it, path of the output it is, or the dependency's own, hash) of what it read, code left out."""
    order: int
    """Place of its first commit in history."""
    commit: str | None
    """The first commit whose dvc.lock holds it; None if it is not committed."""
    here: bool
    """Does the dvc.lock of the workspace hold it?"""
    locks: frozenset[int]


@dataclass
class Sighting:
    """Rows of one file that hold a record."""

    out: str
    """Hash of the output that the file belongs to."""
    split: str | None
    """Of the shard; None where the file is evidence of what was learnt."""
    key: bytes
    steps: list[tuple[int, int]] = field(default_factory=list)
    """(step, epoch)."""


class Index:
    """What is known of history, brought up to date as it is opened. The record index is brought up to date by `read_records`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = Objects(root)
        self.history = history(root)
        self._db = _connect(root)
        with self._alone():
            self._read_locks()
            self._list()
            self._trace()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time fills the tables; what fails leaves them as they were."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # What made what.

    def _read_locks(self) -> None:
        known = {blob for (blob,) in self._db.execute("SELECT blob FROM lock")}
        named = dict(self.history.first)
        texts: dict[str, tuple[bytes, str]] = {}
        if self.history.workspace and self.history.workspace not in {*known, *named}:
            texts[self.history.workspace] = (self.root / LOCK).read_bytes(), ":"
        new = [blob for blob in named if blob not in known]
        found = blobs(self.root, [*new, *(f"{named[blob]}:./dvc.yaml" for blob in new)])
        texts |= {blob: (found[blob], named[blob]) for blob in new if blob in found}
        if not texts:
            return
        yaml = self.root / "dvc.yaml"
        declared = {":": yaml.read_bytes() if yaml.is_file() else b""} | {
            name.partition(":")[0]: text for name, text in found.items() if ":" in name
        }
        models: dict[bytes, frozenset[str]] = {}
        for blob, (content, commit) in texts.items():
            pipeline = declared.get(commit, b"")
            if pipeline not in models:
                models[pipeline] = _declared_models(pipeline)
            with suppress(InputError, UnicodeDecodeError):  # somebody committed an unresolved merge
                self._read_lock(blob, _parts(content.decode()), models[pipeline])

    def _read_lock(self, blob: str, parts: _Parts, models: frozenset[str]) -> None:
        rows = {
            key: row for (key, *row) in self._rows("SELECT key, id, address, path, md5, weights FROM made WHERE key IN", [*parts.values()])
        }
        fresh = {}
        for address, key in parts.items():
            if key not in rows:
                stage = stages_of("stages:\n" + parts.text[address])[address]
                out = output(stage)
                if out is None:
                    continue
                weights = address.partition("@")[0] in models
                report: dict[str, str] = next((one for one in stage["outs"] if one["path"].startswith(REPORTS)), {})
                cursor = self._db.execute(
                    "INSERT INTO made (key, address, path, md5, weights, report, report_md5, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (key, address, out["path"], out["md5"], weights, report.get("path"), report.get("md5"), parts.text[address]),
                )
                rows[key] = [cursor.lastrowid, address, out["path"], out["md5"], weights]
                fresh[cursor.lastrowid] = stage
        outs = {path: md5 for (_, _, path, md5, _) in rows.values()}
        for made, stage in fresh.items():
            self._db.executemany("INSERT INTO reads VALUES (?, ?, ?, ?)", [(made, *read) for read in _reads(stage, outs)])
        lock = self._db.execute("INSERT OR IGNORE INTO lock (blob) VALUES (?)", (blob,)).lastrowid
        self._db.executemany("INSERT OR IGNORE INTO held VALUES (?, ?)", [(lock, row[0]) for row in rows.values()])
        late = [(row[0],) for row in rows.values() if row[1].partition("@")[0] in models and not row[4]]
        self._db.executemany("UPDATE made SET weights = 1 WHERE id = ?", late)

    def _list(self) -> None:
        """The files of every output that is here and was not before."""
        query = "SELECT md5, path FROM made WHERE md5 NOT IN (SELECT md5 FROM listed) GROUP BY md5"
        for md5, path in self._db.execute(query).fetchall():
            listing = self.objects.listing(md5, path if md5 in self.here else "")
            if listing is None:
                continue
            splits = {name: found.group(1) for name in listing if (found := SPLIT.search(name))}
            self._db.execute("INSERT INTO listed VALUES (?, ?)", (md5, bool(splits)))
            files = [(md5, name, value, splits.get(name)) for name, value in listing.items()]
            self._db.executemany("INSERT INTO file VALUES (?, ?, ?, ?)", files)
            telling = [(value, md5, name) for name, value in listing.items() if name in splits or name == EVIDENCE]
            self._db.executemany("INSERT OR IGNORE INTO wanted SELECT ?, ?, ? WHERE ?1 NOT IN (SELECT md5 FROM content)", telling)
            if any(name.endswith(WEIGHTS) for name in listing):
                self._db.execute("UPDATE made SET weights = 1 WHERE md5 = ?", (md5,))

    def _trace(self) -> None:
        """The sources of each run that read files nobody makes, as its report names them."""
        query = """SELECT DISTINCT made.id, made.report, made.report_md5 FROM made JOIN reads ON reads.made = made.id
            WHERE made.report IS NOT NULL AND made.id NOT IN (SELECT made FROM origin) AND reads.md5 NOT IN (SELECT md5 FROM made)"""
        waiting = [one for one in self._db.execute(query).fetchall() if one[0] in self.made]
        named = {made: f"{self.made[made].commit}:./{report}" for made, report, _ in waiting if self.made[made].commit}
        found = blobs(self.root, named.values())
        for made, report, md5 in waiting:
            here = self.root / report
            told = found.get(named.get(made, ""), b"") or (here.read_bytes() if here.is_file() else b"")
            if md5_of_bytes(told) == md5:
                facts = json.loads(told).get("sources") or {"": {}}
                self._db.executemany("INSERT INTO origin VALUES (?, ?, ?)", [(made, s, f.get("sha256")) for s, f in facts.items()])

    @cached_property
    def here(self) -> dict[str, str]:
        """Hash -> path of the outputs that the dvc.lock of the workspace names: they may lie in the workspace."""
        query = "SELECT made.md5, made.path FROM made JOIN held ON made.id = held.made JOIN lock ON lock.id = held.lock WHERE lock.blob = ?"
        return dict(self._db.execute(query, (self.history.workspace,)))

    @cached_property
    def made(self) -> dict[int, Made]:
        """Every run that git can reach, or that the workspace holds, in the order of history."""
        order = {blob: (i, commit) for i, (blob, commit) in enumerate(self.history.first.items())}
        place: dict[int, tuple[int, str | None]] = {}
        current = None
        for identity, blob in self._db.execute("SELECT id, blob FROM lock"):
            if blob in order:
                place[identity] = order[blob]
            if blob == self.history.workspace:
                place.setdefault(identity, (len(order), None))
                current = identity
        locks: dict[int, list[int]] = defaultdict(list)
        for lock, made in self._db.execute("SELECT lock, made FROM held"):
            if lock in place:
                locks[made].append(lock)
        reads: dict[int, list[tuple[str, str, str]]] = defaultdict(list)
        for made, dep, path, md5 in self._db.execute("SELECT made, dep, path, md5 FROM reads ORDER BY rowid"):
            reads[made].append((dep, path, md5))
        found = []
        for identity, address, path, md5, weights in self._db.execute("SELECT id, address, path, md5, weights FROM made"):
            if identity in locks:
                first = min(place[lock] for lock in locks[identity])
                held = frozenset(locks[identity])
                found.append(
                    Made(identity, address, path, md5, bool(weights), tuple(reads[identity]), *first, here=current in held, locks=held)
                )
        return {made.id: made for made in sorted(found, key=lambda made: (made.order, made.id))}

    @cached_property
    def makers(self) -> dict[str, list[Made]]:
        """Hash of an output -> the runs that made it, in the order of history."""
        found: dict[str, list[Made]] = defaultdict(list)
        for made in self.made.values():
            found[made.md5].append(made)
        return dict(found)

    def maker(self, reader: Made, md5: str) -> Made | None:
        """The run that made what another one read: of several with the same bytes one that stands in the same dvc.lock, or the first."""
        makers = self.makers.get(md5, [])
        return next((made for made in makers if made.locks & reader.locks), makers[0] if makers else None)

    def at(self, blob: str | None) -> dict[str, Made]:
        """Address -> run, of one dvc.lock; empty if it could not be read, or no branch leads to it."""
        if blob not in self.history.first and blob != self.history.workspace:
            return {}
        found = self._db.execute("SELECT made FROM held JOIN lock ON lock.id = held.lock WHERE blob = ?", (blob,))
        return {self.made[made].address: self.made[made] for (made,) in found if made in self.made}

    def stage(self, made: Made) -> dict[str, Any]:
        """The entry of dvc.lock, whole."""
        (text,) = self._db.execute("SELECT text FROM made WHERE id = ?", (made.id,)).fetchone()
        return dict(stages_of("stages:\n" + text)[made.address])

    def parents(self, made: Made) -> list[Made]:
        """The models that a model was made from, directly. Of folders of models those whose weights went into it as they are, if any did."""
        named: list[Made] = []
        gathered: list[Made] = []
        for dep, path, md5 in made.reads:
            maker = self.maker(made, md5)
            if maker and maker.weights and maker.md5 != made.md5:
                (named if dep == path else gathered).append(maker)
        mine = self.weights(made.md5)
        same = [maker for maker in gathered if mine & self.weights(maker.md5)]
        return list(dict.fromkeys([*named, *(same or gathered)]))

    def data(self, made: Made) -> dict[str, Made]:
        """Hash -> run of all that a run read, directly or through others, not going past models or past what is dealt out into splits: a set of
        preferences reads the test split of the instructions to keep apart from it, and no model learns that from it."""
        found: dict[str, Made] = {}
        waiting = [made]
        while waiting:
            reader = waiting.pop()
            for _, _, md5 in reader.reads:
                maker = self.maker(reader, md5)
                if maker and not maker.weights and md5 not in found:
                    found[md5] = maker
                    if not self.deals(maker):
                        waiting.append(maker)
        return found

    def above(self, made: Made) -> dict[str, Made]:
        """Hash -> run of `data`, and of all that it was dealt out from. What another data set was dealt into, which one of them read, is left out."""
        found = dict(self.data(made))
        waiting = list(found.values())
        while waiting:
            reader = waiting.pop()
            for _, _, md5 in reader.reads:
                maker = self.maker(reader, md5)
                if maker and not maker.weights and md5 not in found and not (md5 in self.dealing or maker.path in self._dealers):
                    found[md5] = maker
                    waiting.append(maker)
        return found

    def files(self, out: str) -> dict[str, str] | None:
        """Path -> hash of the files of an output; None if it is not here and never was."""
        if self._db.execute("SELECT 1 FROM listed WHERE md5 = ?", (out,)).fetchone() is None:
            return None
        return dict(self._db.execute("SELECT name, md5 FROM file WHERE out = ? ORDER BY name", (out,)))

    def place(self, out: str, name: str) -> Path | None:
        """Where a file of an output lies, if it is here."""
        md5 = (self.files(out) or {}).get(name)
        return self.objects.path(md5, self.here.get(out, "")) if md5 else None

    def deals(self, made: Made) -> bool:
        """Is the output dealt out into splits, as far as that can be told from other outputs at its path? True where nothing tells."""
        return made.md5 in self.dealing or made.path in self._dealers or made.path not in self._known

    def weights(self, out: str) -> frozenset[str]:
        query = f"SELECT md5 FROM file WHERE out = ? AND name LIKE '%{WEIGHTS}'"
        return frozenset(md5 for (md5,) in self._db.execute(query, (out,)))

    def outs_with(self, file: str) -> list[str]:
        """The outputs that hold a file with this hash."""
        return [out for (out,) in self._db.execute("SELECT DISTINCT out FROM file WHERE md5 = ?", (file,))]

    def starting_with(self, prefix: str) -> list[str]:
        """Hashes of outputs that begin so."""
        return [md5 for md5 in self.makers if md5.startswith(prefix)]

    def drawing(self, sha256: str) -> dict[str, frozenset[str]]:
        """Source -> hashes of the outputs that were made from it while its sha256 began so."""
        found: dict[str, set[str]] = defaultdict(set)
        query = "SELECT made, source FROM origin WHERE sha256 >= ? AND sha256 < ?"
        for made, source in self._db.execute(query, (sha256, sha256 + "g")):
            if made in self.made:
                found[source].add(self.made[made].md5)
        return {source: frozenset(outs) for source, outs in found.items()}

    def holding(self, prefix: str) -> tuple[frozenset[str], frozenset[str]]:
        """Hashes that begin so: of files, and of outputs or outputs with such a file."""
        rows = self._db.execute("SELECT md5, out FROM file WHERE md5 >= ? AND md5 < ?", (prefix, prefix + "g")).fetchall()
        outs = {out for md5, out in rows if out in self.makers} | set(self.starting_with(prefix))
        return frozenset(md5 for md5, _ in rows), frozenset(outs)

    # Which record stands where.

    def read_records(self) -> None:
        """Read every shard and every evidence that is here and was not read before."""
        while self._read_segment():
            pass
        with self._alone():
            self._learn()

    def _read_segment(self) -> bool:
        """Returns: whether anything was read."""
        with self._alone():
            rows = _Rows()
            for md5, out, name in self._db.execute("SELECT md5, out, name FROM wanted ORDER BY out, name").fetchall():
                path = self.objects.path(md5, self.here.get(out, ""))
                if path is None:
                    continue
                content = self._db.execute("INSERT INTO content (md5) VALUES (?)", (md5,)).lastrowid or 0
                self._db.execute("DELETE FROM wanted WHERE md5 = ?", (md5,))
                drawn = rows.evidence(path, content) if name == EVIDENCE else rows.shard(path, content)
                self._db.executemany("INSERT INTO drawn VALUES (?, ?, ?)", [(content, *one) for one in drawn.items()])
                if rows.size >= SEGMENT:
                    break
            if not rows.size:
                return False
            (segment,) = self._db.execute("SELECT coalesce(max(segment), -1) + 1 FROM seen").fetchone()
            self._db.executemany("INSERT INTO seen VALUES (?, ?, ?, ?, ?, ?)", ((segment, *chunk) for chunk in rows.seen()))
            self._db.executemany("INSERT INTO said VALUES (?, ?, ?, ?)", ((segment, *chunk) for chunk in rows.said()))
            return True

    def _learn(self) -> None:
        """How many records of each source a model learnt from which shard, from which step to which. Each shard is held against each evidence once."""
        settled = {made for (made,) in self._db.execute("SELECT made FROM settled")}
        telling = dict(self._db.execute("SELECT out, md5 FROM file WHERE name = ?", (EVIDENCE,)))
        waiting: dict[str, tuple[Path, dict[str, Path]]] = {}
        done: set[tuple[str, str]] = set()
        models = [made for made in self.made.values() if made.id not in settled and made.md5 in telling]
        if models:
            done |= set(self._db.execute("SELECT DISTINCT evidence, shard FROM learnt").fetchall())
        for made in models:
            evidence, place = telling[made.md5], self.place(made.md5, EVIDENCE)
            train = [(md5, self.here.get(out, "")) for out, split, md5 in self.shards(made) if split == "train"]
            found = {md5: self.objects.path(md5, out) for md5, out in train if (evidence, md5) not in done}
            if place and train and all(found.values()):
                waiting.setdefault(evidence, (place, {}))[1].update({md5: path for md5, path in found.items() if path})
                self._db.execute("INSERT INTO settled VALUES (?)", (made.id,))
        for evidence, (place, shards) in waiting.items():
            rows = [(evidence, *row) for row in _learnt(place, shards)] if shards else []
            self._db.executemany("INSERT INTO learnt VALUES (?, ?, ?, ?, ?, ?)", rows)

    def shards(self, made: Made) -> list[tuple[str, str, str]]:
        """(hash of the output, split, hash) of each shard of the data a run was made from."""
        query = "SELECT out, split, md5 FROM file WHERE out = ? AND split IS NOT NULL ORDER BY name"
        return [row for out in self.data(made) if out in self.dealing for row in self._db.execute(query, (out,))]

    @cached_property
    def dealing(self) -> frozenset[str]:
        """Outputs that are dealt out into splits."""
        return frozenset(md5 for (md5,) in self._db.execute("SELECT md5 FROM listed WHERE deals"))

    def unread(self, made: Made) -> list[Made]:
        """The runs whose outputs would have to be here to say what a model saw by itself, and are not."""
        return [
            maker
            for maker in [*self.data(made).values(), made]
            if maker.md5 in self._waiting or (maker.md5 not in self._listed and (maker is made or self.deals(maker)))
        ]

    @cached_property
    def _listed(self) -> frozenset[str]:
        return frozenset(md5 for (md5,) in self._db.execute("SELECT md5 FROM listed"))

    @cached_property
    def _waiting(self) -> frozenset[str]:
        query = "SELECT DISTINCT file.out FROM wanted JOIN file ON file.md5 = wanted.md5"
        return frozenset(out for (out,) in self._db.execute(query))

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(maker.path for md5 in self._listed for maker in self.makers.get(md5, []))

    @cached_property
    def _dealers(self) -> frozenset[str]:
        return frozenset(maker.path for md5 in self.dealing for maker in self.makers.get(md5, []))

    def where(self, keys: Iterable[bytes]) -> list[Sighting]:
        """Every file that holds one of these records."""
        import numpy as np

        found: list[Sighting] = []
        for key in keys:
            for segment in self._segments("seen"):
                chunk = self._chunk("seen", segment, key, "keys, contents, steps, epochs")
                if chunk is None:
                    continue
                same = _equal(chunk[0], key)
                contents, steps, epochs = (np.frombuffer(column, np.int32)[same].tolist() for column in chunk[1:])
                by_content: dict[int, list[tuple[int, int]]] = defaultdict(list)
                for content, step, epoch in zip(contents, steps, epochs, strict=True):
                    by_content[content] += [(step, epoch)] if step else []
                for out, split, content in self._rows(
                    "SELECT file.out, file.split, content.id FROM content JOIN file ON file.md5 = content.md5"
                    f" WHERE (file.split IS NOT NULL OR file.name = '{EVIDENCE}') AND content.id IN",
                    [*by_content],
                ):
                    found.append(Sighting(out, split, key, sorted(by_content[content])))
        return found

    def tells(self, made: Made) -> bool:
        """Is it known at which steps a model learnt?"""
        return made.md5 in self._telling

    @cached_property
    def _telling(self) -> frozenset[str]:
        """Outputs whose evidence has been read."""
        read = {md5 for (md5,) in self._db.execute("SELECT md5 FROM content")}
        return frozenset(out for out, md5 in self._db.execute("SELECT out, md5 FROM file WHERE name = ?", (EVIDENCE,)) if md5 in read)

    def saying(self, text: str) -> list[bytes]:
        """The records with a message that says this, but for case and white space."""
        key = _text_key(text)
        found: list[bytes] = []
        for segment in self._segments("said"):
            if chunk := self._chunk("said", segment, key, "keys, ids"):
                found += [chunk[1][16 * i : 16 * i + 16] for i in _equal(chunk[0], key).nonzero()[0].tolist()]
        return sorted(set(found))

    def drawn(self, source: str) -> dict[str, dict[str, int]]:
        """Hash of an output -> split -> rows that come from a source: a file, or a folder and all in it."""
        query = """SELECT file.out, file.split, sum(rows) FROM drawn JOIN content ON content.id = drawn.content JOIN file ON file.md5 = content.md5
            WHERE file.split IS NOT NULL AND (source = ?1 OR source LIKE ?2 ESCAPE '\\') GROUP BY 1, 2"""
        found: dict[str, dict[str, int]] = defaultdict(dict)
        for out, split, rows in self._db.execute(query, (source, _inside(source))):
            found[out][split] = rows
        return dict(found)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Hash of a shard -> its rows."""
        return dict(self._db.execute("SELECT content.md5, sum(rows) FROM drawn JOIN content ON content.id = drawn.content GROUP BY 1"))

    def learnt(self, made: Made, source: str | None) -> tuple[int, int, int] | None:
        """(records, first step, last step) of what a model learnt from a source, or from all; None if that is not known."""
        if made.id not in self._settled:
            return None
        told = self._learning(source).get((self.files(made.md5) or {}).get(EVIDENCE, ""), {})
        shards = [told[md5] for _, split, md5 in self.shards(made) if split == "train" and md5 in told]
        records, first, last = (tuple(zip(*shards, strict=True))) if shards else ((0,), (0,), (0,))
        return sum(records), min(first), max(last)

    @cached_property
    def _settled(self) -> frozenset[int]:
        return frozenset(made for (made,) in self._db.execute("SELECT made FROM settled"))

    @cache  # noqa: B019  an index lives as long as its question
    def _learning(self, source: str | None) -> dict[str, dict[str, tuple[int, int, int]]]:
        """Evidence -> shard -> (records, first step, last step) of a source, or of all."""
        found: dict[str, dict[str, tuple[int, int, int]]] = defaultdict(dict)
        where, values = ("", []) if source is None else ("WHERE source = ? OR source LIKE ? ESCAPE '\\'", [source, _inside(source)])
        query = f"SELECT evidence, shard, sum(records), min(first), max(last) FROM learnt {where} GROUP BY 1, 2"
        for evidence, shard, *told in self._db.execute(query, values):
            found[evidence][shard] = tuple(told)
        return found

    def texts(self) -> dict[str, Path]:
        """Hash -> place of every shard that is here."""
        query = "SELECT DISTINCT file.md5, file.out FROM file JOIN content ON content.md5 = file.md5 WHERE file.split IS NOT NULL"
        return {md5: path for md5, out in self._db.execute(query) if (path := self.objects.path(md5, self.here.get(out, "")))}

    def _segments(self, table: str) -> list[int]:
        (last,) = self._db.execute(f"SELECT coalesce(max(segment), -1) FROM {table}").fetchone()
        return list(range(last + 1))

    def _chunk(self, table: str, segment: int, key: bytes, columns: str) -> Any:
        query = f"SELECT {columns} FROM {table} WHERE segment = ? AND first <= ? ORDER BY first DESC LIMIT 1"
        return self._db.execute(query, (segment, key[:8])).fetchone()

    def _rows(self, query: str, values: Sequence[Any]) -> Iterator[Any]:
        """A query whose last word is IN, for however many values."""
        for start in range(0, len(values), 900):
            some = values[start : start + 900]
            yield from self._db.execute(f"{query} ({','.join('?' * len(some))})", some)


def _connect(root: Path) -> sqlite3.Connection:
    """The index, empty if it was of another form or could not be read; in memory where the project cannot be written."""
    path = root / PLACE
    for _ in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(path, timeout=3600, isolation_level=None)
            (form,) = db.execute("PRAGMA user_version").fetchone()
            if form == FORM:
                return db
            if form == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                db.executescript(f"PRAGMA journal_mode = WAL; BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {FORM}; COMMIT;")
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


class _Parts(dict[str, str]):
    """Address -> hash of its part of a dvc.lock."""

    text: dict[str, str]


def _parts(text: str) -> _Parts:
    """A dvc.lock cut by stages, as DVC writes them: between two commits most of them stay, and parsing YAML is slow.

    Raises:
        InputError: it is no dvc.lock.
    """
    found = _Parts()
    found.text = {}
    body = re.split(r"^stages:.*\n", text, maxsplit=1, flags=re.MULTILINE)[1:]
    pieces = re.split(r"^(?=  \S)", re.split(r"^(?=\S)", body[0], maxsplit=1, flags=re.MULTILINE)[0], flags=re.MULTILINE) if body else []
    heads = [re.match(r"  ([\w@.-]+):\n", piece) for piece in pieces]
    if pieces and all(heads):
        found.text = {head.group(1): piece for head, piece in zip(heads, pieces, strict=True) if head}
    else:  # somebody else wrote it
        found.text = {name: f"  {json.dumps(name)}: {json.dumps(stage)}\n" for name, stage in stages_of(text).items()}
    found.update({name: hashlib.sha1(piece.encode(), usedforsecurity=False).hexdigest() for name, piece in found.text.items()})
    return found


def output(stage: Mapping[str, Any]) -> dict[str, Any] | None:
    """A stage's one output, apart from its report and plots; None if its entry of dvc.lock names none with a hash."""
    outs = [out for out in stage.get("outs", []) if not out["path"].startswith((REPORTS, PLOTS)) and "md5" in out]
    return dict(outs[0]) if outs else None


def is_input(path: str) -> bool:
    """Whether a dependency is data: neither code nor what another stage tells of its output."""
    return not is_code(path) and not path.startswith(REPORTS)


def _reads(stage: Mapping[str, Any], outs: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(dependency, path of the output it is, or its own, hash). A folder of outputs stands for those in it, a file of one for the whole."""
    found: list[tuple[str, str, str]] = []
    for dep in stage.get("deps", []):
        path, md5 = dep["path"], dep.get("md5", "")
        if not is_input(path):
            continue
        inside = [(path, out, value) for out, value in outs.items() if out.startswith(path + "/")]
        around = [(path, out, value) for out, value in outs.items() if path.startswith(out + "/")]
        found += [(path, path, md5)] if path in outs else inside or around or [(path, path, md5)]
    return found


def _declared_models(pipeline: bytes) -> frozenset[str]:
    """The stages of a dvc.yaml that say they make safetensors: a model whose files are gone is still known to be one."""
    try:
        stages = stages_of(pipeline.decode(), "dvc.yaml") if pipeline else {}
    except (InputError, UnicodeDecodeError):
        return frozenset()
    bodies = {name: body.get("do", body) for name, body in stages.items() if isinstance(body, dict)}
    return frozenset(name for name, body in bodies.items() if "safetensors" in ((body.get("meta") or {}).get("kinds") or []))


def record_key(example_id: str) -> bytes:
    """16 bytes that stand for a record: those of its example_id, which is a hash in hex."""
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


def _inside(folder: str) -> str:
    """What LIKE takes for everything in a folder."""
    return re.sub(r"([%_\\])", r"\\\1", folder.rstrip("/")) + "/%"


def _equal(keys: bytes, key: bytes) -> np.ndarray:
    import numpy as np

    return (np.frombuffer(keys, np.uint64).reshape(-1, 2) == np.frombuffer(key, np.uint64)).all(axis=1)


class _Rows:
    """Rows of many files, to be written as sorted chunks."""

    def __init__(self) -> None:
        self.size = 0
        self._seen: list[tuple[bytes, Any, Any, Any]] = []
        self._said: list[tuple[bytes, bytes]] = []
        self._text_keys: dict[str, bytes] = {}

    def evidence(self, path: Path, content: int) -> dict[str, int]:
        import numpy as np
        import pyarrow.parquet as pq

        table = pq.read_table(path, columns=["example_id", "step", "epoch"])
        steps, epochs = (table[name].to_numpy().astype(np.int32) for name in ("step", "epoch"))
        self._add(table["example_id"].to_pylist(), content, steps, epochs)
        return {}

    def shard(self, path: Path, content: int) -> dict[str, int]:
        """Returns: source -> rows."""
        import numpy as np
        import pyarrow.parquet as pq

        names = pq.read_schema(path).names
        spoken = [name for name in ("messages", "prompt", "chosen", "rejected") if name in names]
        table = pq.read_table(path, columns=["example_id", *(["source"] if "source" in names else []), *spoken])
        ids = table["example_id"].to_pylist()
        keys = self._add(ids, content, np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32))
        for name in spoken:
            self._say(keys, table[name].combine_chunks())
        if "source" not in names:
            return {}
        counted = table["source"].combine_chunks().value_counts()
        return {str(one["values"]): int(one["counts"]) for one in counted.to_pylist()}

    def _add(self, ids: list[str], content: int, steps: np.ndarray, epochs: np.ndarray) -> bytes:
        import numpy as np

        keys = _record_keys(ids)
        self._seen.append((keys, np.full(len(ids), content, np.int32), steps, epochs))
        self.size += len(ids)
        return keys

    def _say(self, keys: bytes, column: pa.Array) -> None:
        """A column of messages, or of texts."""
        import numpy as np
        import pyarrow as pa

        if pa.types.is_list(column.type):
            lengths = column.value_lengths().fill_null(0).to_numpy()
            texts = column.flatten().field("content").to_pylist()
        else:
            lengths, texts = np.ones(len(column), np.int64), column.to_pylist()
        known = self._text_keys
        for text in texts:
            if text and text not in known:
                known[text] = _text_key(text)
        owners = np.repeat(np.frombuffer(keys, "V16"), lengths)
        spoken = np.array([bool(text) for text in texts], np.bool_)
        self._said.append((b"".join(known[text] for text in texts if text), owners[spoken].tobytes()))
        if len(known) > 100_000:
            known.clear()

    def seen(self) -> Iterator[tuple[bytes, ...]]:
        import numpy as np

        columns = [np.concatenate(column) for column in zip(*(row[1:] for row in self._seen), strict=True)] if self._seen else []
        yield from _chunks(b"".join(row[0] for row in self._seen), columns)

    def said(self) -> Iterator[tuple[bytes, ...]]:
        import numpy as np

        yield from _chunks(b"".join(row[0] for row in self._said), [np.frombuffer(b"".join(row[1] for row in self._said), "V16")])


def _chunks(keys: bytes, columns: Sequence[np.ndarray]) -> Iterator[tuple[bytes, ...]]:
    """(first 8 bytes, keys, column, ...) of each chunk of rows in the order of their keys. Rows with the same key stand in one chunk."""
    import numpy as np

    if not keys:
        return
    wide = np.frombuffer(keys, "V16")
    leading = np.frombuffer(keys, ">u8")[::2].astype(np.uint64)
    order = np.argsort(leading, kind="stable")
    leading = leading[order]
    begins = np.flatnonzero(np.diff(leading, prepend=~leading[:1]))  # of each run of one key
    starts = np.unique(begins[np.searchsorted(begins, np.arange(0, len(leading), CHUNK), side="right") - 1])
    for start, stop in zip(starts, [*starts[1:], len(leading)], strict=True):
        rows = order[start:stop]
        inside = wide[rows].tobytes()
        yield (inside[:8], inside, *(column[rows].tobytes() for column in columns))


def _learnt(evidence: Path, shards: Mapping[str, Path]) -> list[tuple[str, str, int, int, int]]:
    """(shard, source, records, first step, last step) of what was learnt of each shard, by its hash."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = []
    for md5, path in shards.items():
        part = pq.read_table(path, columns=["example_id", "source"])
        parts.append(part.append_column("shard", pa.array([md5] * part.num_rows, pa.string())))
    steps = pq.read_table(evidence, columns=["example_id", "step"]).group_by("example_id").aggregate([("step", "min"), ("step", "max")])
    joined = pa.concat_tables(parts).join(steps, "example_id", join_type="inner").group_by(["shard", "source"])
    found = joined.aggregate([("example_id", "count_distinct"), ("step_min", "min"), ("step_max", "max")]).to_pylist()
    columns = ("shard", "source", "example_id_count_distinct", "step_min_min", "step_max_max")
    return sorted((tuple(row[name] for name in columns) for row in found), key=str)
