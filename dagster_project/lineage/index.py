"""SQLite index of history: the inputs and outputs of every stage run, and the
files and training steps that contain each record.

The database in .dvc/tmp/pedigree is a cache: if deleted, it is rebuilt from git and DVC's cache.
Each dvc.lock and each file is read once, by hash. A record is stored as the 16 bytes of its
`example_id`, in sorted chunks over all files that were read together, so that a lookup reads one
chunk per several million rows. The tables are in database.py, the runs in run_index.py.
"""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dagster_project.core.hashing import md5_of_bytes, md5_of_file
from dagster_project.lineage import tables
from dagster_project.lineage.database import cached_per_instance
from dagster_project.lineage.history import is_within
from dagster_project.lineage.rows import (
    EDITED,
    EVIDENCE,
    LEDGER,
    OVERLAPS,
    RowCollector,
    canonical_json,
    contributions,
    equal,
    record_key,
    summarize_training,
    text_key,
)
from dagster_project.lineage.run_index import RunIndex
from dagster_project.lineage.runs import StageRun, stage_in

SEGMENT = 4_000_000
"""Rows per segment. The rows of a segment are sorted together."""
PARAPHRASES = "paraphrases"
"""Format, in a report, of a source whose rows are new prompts for rows of other sources."""
PARAPHRASED = "paraphrase"
"""How the ledger of `splits` names a copy with a new prompt."""
WITHIN = "(source = :source OR source >= :first AND source < :after)"
"""Condition of SQL that a source is the queried one, or in the queried folder (`_within`)."""


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
    rows: int = 1


class Index(RunIndex):
    """Index of the records in history: which files contain them. `read_records` indexes the records of new files."""

    def read_records(self) -> None:
        """Index every available shard and evidence file that is not indexed yet."""
        while self._read_segment():
            pass
        with self._transaction():
            self._match_evidence()

    def _read_segment(self) -> bool:
        """Index up to SEGMENT rows. Returns whether anything was read."""
        with self._transaction():
            rows = RowCollector()
            for md5, out, name in self._db.execute("SELECT md5, out, name FROM unread ORDER BY out, name").fetchall():
                path = self.objects.path(md5, self.workspace_outputs.get(out, ""))
                if path is None or md5_of_file(path) != md5:  # unavailable, or damaged
                    continue
                content = self._db.execute("INSERT INTO content (md5) VALUES (?)", (md5,)).lastrowid or 0
                self._db.execute("DELETE FROM unread WHERE md5 = ?", (md5,))
                if name in {LEDGER, OVERLAPS}:
                    self._read_contributions(md5, path, name)
                    continue
                by_source = rows.add_evidence(path, content) if name == EVIDENCE else rows.add_shard(path, content)
                self._db.executemany(
                    "INSERT INTO source_rows VALUES (?, ?, ?)", [(content, *item) for item in by_source.items()]
                )
                if rows.size >= SEGMENT:
                    break
            if not rows.size:
                return False
            (segment,) = self._db.execute("SELECT coalesce(max(segment), -1) + 1 FROM record").fetchone()
            self._db.executemany(
                "INSERT INTO record VALUES (?, ?, ?, ?, ?, ?)", ((segment, *chunk) for chunk in rows.record_chunks())
            )
            self._db.executemany(
                "INSERT INTO text_record VALUES (?, ?, ?, ?)", ((segment, *chunk) for chunk in rows.text_chunks())
            )
            return True

    def _read_contributions(self, md5: str, path: Path, name: str) -> None:
        """Index the rows of a ledger or of a table of overlaps that contribute to a record of another row."""
        credits, derived = contributions(path, name)
        self._db.executemany("INSERT INTO credit VALUES (?, ?, ?, ?)", [(md5, *row) for row in credits])
        self._db.executemany("INSERT INTO derived VALUES (?, ?, ?, ?)", [(md5, *row) for row in derived])

    def _match_evidence(self) -> None:
        """Count the records of each source that each model was trained on, with first and last step.

        Each pair of evidence and shard is joined once, and each set of data is added up once.
        """
        evidence_of, matched = self.evidence, self._matched
        pending: dict[str, tuple[Path, dict[str, Path]]] = {}
        matching: dict[tuple[str, str], list[str]] = {}
        models = {
            key: run
            for run in self.runs.values()
            if run.md5 in evidence_of and (key := self._training_key(run)) and key not in matched
        }
        done = set(self._db.execute("SELECT DISTINCT evidence, shard FROM training").fetchall()) if models else set()
        for key, run in models.items():
            evidence, evidence_path = evidence_of[run.md5], self.file_path(run.md5, EVIDENCE)
            train = [
                (md5, self.workspace_outputs.get(out, "")) for out, split, md5 in self.shards(run) if split == "train"
            ]
            shard_paths = {md5: self.objects.path(md5, out) for md5, out in train if (evidence, md5) not in done}
            if evidence_path and train and all(shard_paths.values()):
                pending.setdefault(evidence, (evidence_path, {}))[1].update(
                    {md5: path for md5, path in shard_paths.items() if path}
                )
                self._db.execute("INSERT INTO matched VALUES (?, ?)", key)
                matching[key] = [md5 for md5, _ in train]
        for evidence, (evidence_path, shards) in pending.items():
            rows = [(evidence, *row) for row in summarize_training(evidence_path, shards)] if shards else []
            self._db.executemany("INSERT INTO training VALUES (?, ?, ?, ?, ?, ?)", rows)
        query = """INSERT INTO training_source SELECT ?1, ?2, source, sum(records), min(first), max(last)
            FROM json_each(?3) CROSS JOIN training ON training.shard = value AND training.evidence = ?1
            GROUP BY source"""
        self._db.executemany(query, [(*key, json.dumps(shards)) for key, shards in matching.items()])
        if models:
            del self._matched

    def _training_key(self, run: StageRun) -> tuple[str, str]:
        """Hash of the training evidence of a model, and one hash for all data sets that it was trained on."""
        data = ",".join(out for out in self.data(run) if out in self.split_outputs)
        return self.evidence.get(run.md5, ""), md5_of_bytes(data.encode())

    @cached_property
    def evidence(self) -> dict[str, str]:
        """Hash of an output -> hash of the training evidence in it."""
        return dict(self._db.execute("SELECT out, md5 FROM file WHERE name = ?", (EVIDENCE,)))

    def shards(self, run: StageRun) -> list[tuple[str, str, str]]:
        """(hash of the output, split, hash of the shard) of every shard in the data upstream of a run."""
        query = "SELECT out, split, md5 FROM file WHERE out = ? AND split IS NOT NULL ORDER BY name"
        return [row for out in self.data(run) if out in self.split_outputs for row in self._db.execute(query, (out,))]

    def missing(self, run: StageRun) -> list[StageRun]:
        """Runs whose unavailable outputs are needed to determine which records a model itself has seen."""
        return [
            producer
            for producer in [*self.data(run).values(), run]
            if producer.md5 in self._with_unread(False)
            or (producer.md5 not in self._listed and (producer is run or self.is_split(producer)))
        ]

    @cached_per_instance
    def _with_unread(self, contributions: bool) -> frozenset[str]:
        """Outputs with an unavailable file that records contributions (a ledger or table of overlaps), or another."""
        query = "SELECT DISTINCT file.out FROM unread JOIN file ON file.md5 = unread.md5 WHERE unread.name"
        rows = self._db.execute(f"{query} {'' if contributions else 'NOT'} IN (?, ?)", (LEDGER, OVERLAPS))
        return frozenset(out for (out,) in rows)

    @cached_property
    def _paths_with_contributions(self) -> frozenset[str]:
        """Paths of the outputs of which some version has a ledger or table of overlaps."""
        query = "SELECT DISTINCT run.path FROM run JOIN file ON file.out = run.md5 WHERE file.name IN (?, ?)"
        return frozenset(path for (path,) in self._db.execute(query, (LEDGER, OVERLAPS)))

    def missing_contributions(self, run: StageRun) -> list[StageRun]:
        """Runs upstream of a model whose unavailable outputs record which rows contributed to records of other rows."""
        return [
            producer
            for producer in self.ancestors(run).values()
            if producer.md5 in self._with_unread(True)
            or (
                producer.md5 not in self._listed
                and (producer.path in self._paths_with_contributions or producer.path not in self._listed_paths)
            )
        ]

    def record_uses(self, keys: Iterable[bytes]) -> list[RecordUse]:
        """Every file that contains one of these records."""
        import numpy as np

        uses: list[RecordUse] = []
        for key in keys:
            for segment in self._segments("record"):
                chunk = self._chunk("record", segment, key, "keys, contents, steps, epochs")
                if chunk is None:
                    continue
                matches = equal(chunk[0], key)
                contents, steps, epochs = (np.frombuffer(column, np.int32)[matches].tolist() for column in chunk[1:])
                by_content: dict[int, list[tuple[int, int]]] = defaultdict(list)
                rows = Counter(contents)
                for content, step, epoch in zip(contents, steps, epochs, strict=True):
                    by_content[content] += [(step, epoch)] if step else []
                for out, split, content in self._rows(
                    "SELECT file.out, file.split, content.id FROM content JOIN file ON file.md5 = content.md5"
                    f" WHERE (file.split IS NOT NULL OR file.name = '{EVIDENCE}') AND content.id IN",
                    [*by_content],
                ):
                    uses.append(RecordUse(out, split, key, sorted(by_content[content]), rows[content]))
        return uses

    def knows_record(self, key: bytes) -> bool:
        """Whether any file contains a record, or any record was made from it."""
        return bool(self.record_uses([key]) or self.derivations([key]))

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
        return frozenset(out for out, md5 in self.evidence.items() if md5 in read)

    def records_with_text(self, text: str) -> list[bytes]:
        """Keys of the records with a message of this text, ignoring case and whitespace,
        and whether all letters are composed or none: its content, its reasoning, the
        arguments of a call as JSON in any spelling, or one text in them."""
        records: set[bytes] = set()
        forms = {text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)}
        for key in {text_key(spelling) for form in forms for spelling in (form, canonical_json(form))}:
            for segment in self._segments("text_record"):
                if chunk := self._chunk("text_record", segment, key, "keys, ids"):
                    records |= {chunk[1][16 * i : 16 * i + 16] for i in equal(chunk[0], key).nonzero()[0].tolist()}
        return sorted(records)

    def rows_from_source(self, source: str) -> dict[str, dict[str, int]]:
        """Hash of an output -> split -> rows from a source: a file, or a folder and its contents."""
        # CROSS JOIN: from the few shards with the source to the outputs, not the other way round.
        query = f"""SELECT file.out, file.split, sum(rows) FROM source_rows
            CROSS JOIN content ON content.id = source_rows.content CROSS JOIN file ON file.md5 = content.md5
            WHERE file.split IS NOT NULL AND {WITHIN} GROUP BY 1, 2"""
        by_output: dict[str, dict[str, int]] = defaultdict(dict)
        for out, split, rows in self._db.execute(query, _within(source)):
            by_output[out][split] = rows
        return dict(by_output)

    def knows_source(self, source: str) -> bool:
        """Whether any report, row or contribution in history names a source: a file, or a folder and its contents."""
        query = " UNION ALL ".join(
            f"SELECT 1 FROM {table} WHERE {WITHIN}" for table in ("origin", "source_rows", "credit")
        )
        return self._db.execute(f"SELECT EXISTS ({query})", _within(source)).fetchone() == (1,)

    def contributed(self, source: str) -> tuple[dict[str, set[bytes]], dict[int, set[bytes]]]:
        """Keys of the records to which rows of a source contributed although the record names another row.

        Returns:
            Hash of an output -> records, in it or in what was made from it, in whose place a
            copy from the source was dropped, or which were edited by it, if it is a review file;
            and id of an entry -> records of its output that are paraphrases from the source.
        """
        copies: dict[str, set[bytes]] = defaultdict(set)
        query = (
            "SELECT file.out, derived.child FROM derived JOIN file ON file.md5 = derived.file WHERE derived.how ="
            f" '{EDITED}' AND file.out IN"
        )
        for out, key in self._rows(query, sorted(self.reviewed_by(source))):
            copies[out].add(key)
        query = f"SELECT file.out, credit.key FROM credit JOIN file ON file.md5 = credit.file WHERE {WITHIN}"
        for out, key in self._db.execute(query, _within(source)):
            copies[out].add(key)
        paraphrases: dict[int, set[bytes]] = defaultdict(set)
        query = f"""SELECT run.id, derived.child FROM origin JOIN run ON run.id = origin.run
            JOIN file ON file.out = run.md5 AND file.name = '{LEDGER}'
            JOIN derived ON derived.file = file.md5 AND derived.how = '{PARAPHRASED}'
            WHERE origin.format = '{PARAPHRASES}' AND {WITHIN}"""
        for entry, key in self._db.execute(query, _within(source)):
            paraphrases[entry].add(key)
        return dict(copies), dict(paraphrases)

    def reviewed_by(self, source: str) -> set[str]:
        """Hashes of the outputs that a review file, or one in a folder, was applied to."""
        found = set()
        query = (
            "SELECT address, md5, text FROM run WHERE address IN ('instructions', 'preferences') AND instr(text,"
            " '\"review\"')"
        )
        for address, md5, text in self._db.execute(query):
            section = ((stage_in(text).get("params") or {}).get("params.yaml") or {}).get(address)
            review = section.get("review") if isinstance(section, dict) else None
            if isinstance(review, str) and is_within(posixpath.normpath(review), source.rstrip("/")):
                found.add(md5)
        return found

    def keys_of_source(self, outs: Iterable[str], source: str, keys: set[bytes]) -> set[bytes]:
        """Those of some records whose own rows, by the ledgers of some data
        sets, are of a source: a file, or a folder and its contents."""
        found: set[bytes] = set()
        for path in (self.file_path(out, LEDGER) for out in outs):
            for row in tables.read(path, ["source", "example_id"]).rows(named=True) if path else ():
                if is_within(row["source"], source) and (key := record_key(row["example_id"])) in keys:
                    found.add(key)
        return found

    def copies_of_records(self, outs: Iterable[str]) -> dict[bytes, list[tuple[str, int]]]:
        """Key of a record -> (source, row) of each of its copies, dropped or
        kept, by the tables of some outputs that are available."""
        rows: dict[bytes, set[tuple[str, int]]] = defaultdict(set)
        for path in filter(None, (self.file_path(out, OVERLAPS) for out in outs)):
            for source, row, key in contributions(path, OVERLAPS)[0]:
                rows[key].add((source, row))
        return {key: sorted(found) for key, found in rows.items()}

    def derivations(self, keys: Iterable[bytes]) -> dict[bytes, list[tuple[bytes, frozenset[str]]]]:
        """Key of a row -> (key of a record made from it, hashes of the outputs that say so), for these rows and
        everything made from them: repaired, copied, paraphrased, or kept in place of a copy."""
        found: dict[bytes, list[tuple[bytes, frozenset[str]]]] = {}
        pending = [*keys]
        while pending:
            parent = pending.pop()
            if parent in found:
                continue
            outs: dict[bytes, set[str]] = defaultdict(set)
            query = (
                "SELECT derived.child, file.out FROM derived JOIN file ON file.md5 = derived.file WHERE"
                " derived.parent = ?"
            )
            for child, out in self._db.execute(query, (parent,)):
                outs[child].add(out)
            found[parent] = [(child, frozenset(where)) for child, where in sorted(outs.items())]
            pending += outs
        return {parent: children for parent, children in found.items() if children}

    def forget(self, ids: Iterable[str]) -> int:
        """Delete everything about some records, and rewrite the file, so that no free page has it.

        Returns the number of rows.
        """
        keys = [record_key(one) for one in ids]
        self._db.execute("PRAGMA secure_delete = ON")
        with self._transaction():
            rows = sum(
                self._forget_chunks(table, by, others, keys)
                for table, by, others in (
                    ("record", "keys", ("contents", "steps", "epochs")),
                    ("text_record", "ids", ("keys",)),
                )
            )
            for table, column in (("credit", "key"), ("derived", "parent"), ("derived", "child")):
                rows += self._db.executemany(
                    f"DELETE FROM {table} WHERE {column} = ?", [(key,) for key in keys]
                ).rowcount
        self._db.execute("VACUUM")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return rows

    def _forget_chunks(self, table: str, by: str, others: Sequence[str], keys: Sequence[bytes]) -> int:
        """Delete the entries of some records from the chunks of a table, by the column with the keys of records."""
        import numpy as np

        columns, rows = [by, *others], 0
        for number, *values in self._db.execute(f"SELECT rowid, {', '.join(columns)} FROM {table}").fetchall():
            gone = np.zeros(len(values[0]) // 16, np.bool_)
            for key in keys:
                gone |= equal(values[0], key)
            if not gone.any():
                continue
            rows += int(gone.sum())
            kept = {
                name: np.frombuffer(value, np.dtype((np.void, len(value) // len(gone))))[~gone].tobytes()
                for name, value in zip(columns, values, strict=True)
            }
            if not kept["keys"]:
                self._db.execute(f"DELETE FROM {table} WHERE rowid = ?", (number,))
                continue
            changes = {"first": kept["keys"][:8], **kept}
            self._db.execute(
                f"UPDATE {table} SET {', '.join(f'{name} = ?' for name in changes)} WHERE rowid = ?",
                (*changes.values(), number),
            )
        return rows

    def looked_at(self) -> dict[str, int]:
        """What a negative answer rests on. `data_sets` are all outputs that are not models, also those of evaluations;
        `rows` are those of splits, each version of a split once."""
        runs = self.runs.values()
        (records,) = self._db.execute("SELECT count(*) FROM content").fetchone()
        return {
            "commits": len({*self.history.first.values()}),
            "commits_in_reflog": len({*self.history.unreachable.values()}),
            "cached_runs": len(self.objects.run_cache()),
            "models": len({run.md5 for run in runs if run.is_model}),
            "data_sets": len({run.md5 for run in runs if not run.is_model}),
            "files": records,
            "rows": sum(self.shard_sizes.values()),
        }

    @cached_property
    def shard_sizes(self) -> dict[str, int]:
        """Hash of a shard -> number of rows."""
        return dict(
            self._db.execute(
                "SELECT content.md5, sum(rows) FROM source_rows JOIN content ON content.id = source_rows.content GROUP"
                " BY 1"
            )
        )

    def training_summary(self, run: StageRun, source: str | None) -> tuple[int, int, int] | None:
        """(records, first step, last step) of a model's training on one source, or on all; None if unknown."""
        if self._training_key(run) not in self._matched:
            return None
        return self._trainings(source).get(self._training_key(run), (0, 0, 0))

    @cached_property
    def _matched(self) -> frozenset[tuple[str, str]]:
        return frozenset(self._db.execute("SELECT evidence, data FROM matched"))

    @cached_per_instance
    def _trainings(self, source: str | None) -> dict[tuple[str, str], tuple[int, int, int]]:
        """For one source or for all: training key of a model -> (records, first
        step, last step), of those that were trained on any."""
        where, values = ("", {}) if source is None else (f"WHERE {WITHIN}", _within(source))
        query = f"SELECT evidence, data, sum(records), min(first), max(last) FROM training_source {where} GROUP BY 1, 2"
        return {(evidence, data): tuple(summary) for evidence, data, *summary in self._db.execute(query, values)}

    def shard_paths(self) -> dict[str, Path]:
        """Hash -> path of every available shard."""
        outs: dict[str, list[str]] = defaultdict(list)
        query = (
            "SELECT DISTINCT file.md5, file.out FROM file JOIN content ON content.md5 = file.md5 WHERE file.split IS"
            " NOT NULL"
        )
        for md5, out in self._db.execute(query):
            outs[md5].append(self.workspace_outputs.get(out, ""))
        found = {
            md5: (
                self.objects.path(md5)
                or next(filter(None, (self.objects.path(md5, one) for one in dict.fromkeys(paths) if one)), None)
            )
            for md5, paths in outs.items()
        }
        return {md5: path for md5, path in found.items() if path}

    def _segments(self, table: str) -> list[int]:
        (last,) = self._db.execute(f"SELECT coalesce(max(segment), -1) FROM {table}").fetchone()
        return list(range(last + 1))

    def _chunk(self, table: str, segment: int, key: bytes, columns: str) -> Any:
        query = f"SELECT {columns} FROM {table} WHERE segment = ? AND first <= ? ORDER BY first DESC LIMIT 1"
        return self._db.execute(query, (segment, key[:8])).fetchone()


def _within(source: str) -> dict[str, str]:
    """Values of `WITHIN`: "0" is the character after "/". LIKE ignores case."""
    folder = source.rstrip("/")
    return {"source": source, "first": f"{folder}/", "after": f"{folder}0"}
