"""Small histories made by hand: commits of a dvc.lock, and the Parquet files it
names put straight into DVC's cache. Nothing runs.

splits (from data/sources) -> adapter@X -> merged@X
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from builders.small_pipeline import git
from dagster_project.core.records import example_id, ledger_schema, record_schema
from dagster_project.curation.checks.account import overlap_schema
from dagster_project.training.trainers.harness.weight_audit import seen_schema

DVC_YAML = """\
stages:
  adapter: {foreach: {lora: 1}, do: {cmd: x, meta: {kinds: [safetensors]}}}
  merged: {foreach: {lora: 1}, do: {cmd: x, meta: {kinds: [safetensors]}}}
"""


def identity(text: str) -> str:
    return example_id(messages(text))


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What of {text}?"}, {"role": "assistant", "content": f"All about {text}."}]


def table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
    return buffer.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def out(lock: Mapping[str, Any], address: str) -> str:
    """Hash of the output of a stage."""
    return str(lock[address]["outs"][0]["md5"])


class Project:
    """A repository with DVC's cache and no code."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / ".dvc").mkdir(parents=True)
        (root / ".dvc" / "config").write_text("")
        (root / ".gitignore").write_text("/.dvc/cache\n/.dvc/tmp\n/data/splits\n/data/adapter\n/data/merged\n")
        (root / "dvc.yaml").write_text(DVC_YAML)
        git(root, "init", "-q", "-b", "main")
        self.commit({}, "start")

    def put(self, files: Mapping[str, bytes]) -> str:
        """Add a folder to the cache. Returns its hash."""
        listing = [{"md5": self._keep(content), "relpath": name} for name, content in sorted(files.items())]
        return self._keep(json.dumps(listing).encode(), ".dir")

    def put_file(self, content: bytes) -> str:
        """Add a file to the cache. Returns its hash."""
        return self._keep(content)

    def folder(self, outs: Mapping[str, str]) -> str:
        """Hash of a folder of outputs: name -> hash of the output."""
        files = {
            f"{name}/{one['relpath']}": one["md5"]
            for name, out in outs.items()
            for one in json.loads(self.object(out).read_bytes())
        }
        listing = [{"md5": files[path], "relpath": path} for path in sorted(files)]
        return md5(json.dumps(listing, sort_keys=True).encode()) + ".dir"

    def object(self, name: str) -> Path:
        """Path of an object in the cache."""
        return self.root / ".dvc" / "cache" / "files" / "md5" / name[:2] / name[2:]

    def _keep(self, content: bytes, ending: str = "") -> str:
        name = md5(content) + ending
        path = self.object(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return name

    def splits(self, rows: Sequence[tuple[str, str, str]], name: str = "splits") -> dict[str, Any]:
        """A data set with splits, from (text, split, source) of each row."""
        numbered = [(text, split, source, i) for i, (text, split, source) in enumerate(rows)]
        record = record_schema().append(pa.field("split", pa.string()))
        files = {
            f"{split}/records-00000.parquet": table(
                [
                    {"example_id": identity(t), "source": s, "messages": messages(t), "meta": "{}", "split": split}
                    for t, sp, s, _ in numbered
                    if sp == split
                ],
                record,
            )
            for split in ("train", "validation", "test")
        }
        ledger = [
            {"source": s, "source_row": i, "example_id": identity(t), "outcome": sp, "why": ""}
            for t, sp, s, i in numbered
        ]
        files["ledger.parquet"] = table(ledger, ledger_schema())
        sources = {
            name: {
                "rows": n,
                "format": "text",
                "license": "MIT",
                "sha256": hashlib.sha256(f"{name}{rows}".encode()).hexdigest(),
            }
            for name in sorted({source for _, _, source in rows})
            for n in [sum(s == name for _, _, s in rows)]
        }
        report = self.report(name, {"passed": True, "sources": sources})
        return {name: entry(name, {"data/sources": md5(str(rows).encode()) + ".dir"}, self.put(files), report)}

    def report(self, name: str, document: Mapping[str, Any]) -> dict[str, str]:
        """Write a report. Returns its entry for dvc.lock."""
        path = self.root / "data" / "reports" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
        return {"path": f"data/reports/{name}.json", "md5": md5(path.read_bytes())}

    def adapter(
        self, lock: Mapping[str, Any], texts: Sequence[str], name: str = "adapter@lora", seed: int = 0
    ) -> dict[str, Any]:
        """A model trained on one text per step, from the splits of `lock`."""
        seen = [
            {"step": i + 1, "epoch": 1, "position": 0, "example_id": identity(text)} for i, text in enumerate(texts)
        ]
        files = {"examples.parquet": table(seen, seen_schema()), "adapter_model.safetensors": f"{texts}{seed}".encode()}
        splits = next(out for stage in lock.values() for out in stage["outs"] if out["path"] == "data/splits")
        return {name: entry(name, {"data/splits": splits["md5"]}, self.put(files))}

    def merged(
        self, lock: Mapping[str, Any], adapter: str = "adapter@lora", name: str = "merged@lora"
    ) -> dict[str, Any]:
        out = lock[adapter]["outs"][0]
        return {name: entry(name, {out["path"]: out["md5"]}, self.put({"model.safetensors": out["md5"].encode()}))}

    def lock(
        self, rows: Sequence[tuple[str, str, str]], seed: int = 0, trained: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """The whole dvc.lock: each text of the train split is trained on once, in order."""
        lock = self.splits(rows)
        lock |= self.adapter(
            lock, [t for t, split, _ in rows if split == "train"] if trained is None else trained, seed=seed
        )
        return lock | self.merged(lock)

    def curated(
        self,
        rows: Sequence[tuple[str, str, str]],
        copies: Sequence[tuple[str, str]] = (),
        paraphrases: Mapping[str, str] | None = None,
        file: str = "data/sources/paraphrases/p.jsonl",
    ) -> dict[str, Any]:
        """Stages instructions, splits and tokenized. What is tokenized does not depend on the names of sources.

        Args:
            rows: (text, split, source) of each kept row.
            copies: (text of a kept row, source) of each row that was dropped as its exact duplicate.
            paraphrases: text of a train row -> text of its paraphrase, from `file`.
        """
        paraphrases = paraphrases or {}
        dropped = [(text, "dropped:exact_duplicates", source) for text, source in copies]
        numbered = [(text, split, source, i) for i, (text, split, source) in enumerate([*rows, *dropped])]
        ledger = [
            {
                "source": s,
                "source_row": i,
                "example_id": identity(t),
                "outcome": split if split.startswith("dropped") else "kept",
                "why": "",
            }
            for t, split, s, i in numbered
        ]
        first = {identity(t): i for t, _, _, i in reversed(numbered)}
        overlaps = [
            {
                "check": "exact_duplicates",
                "source": s,
                "source_row": i,
                "example_id": identity(t),
                "other": identity(t),
                "part": "prompt",
                "rule": "equal",
                "score": 1.0,
            }
            for t, split, s, i in numbered
            if split.startswith("dropped") or i > first[identity(t)]
        ]
        records = table(
            [
                {"example_id": identity(t), "source": s, "messages": messages(t), "meta": "{}"}
                for t, _, s, _ in numbered[: len(rows)]
            ],
            record_schema(),
        )
        files = {
            "records-00000.parquet": records,
            "ledger.parquet": table(ledger, ledger_schema()),
            "overlaps.parquet": table(overlaps, overlap_schema()),
        }
        counts = Counter(source for _, _, source, _ in numbered)
        sources = {
            s: {
                "rows": n,
                "format": "text",
                "license": "MIT",
                "sha256": hashlib.sha256(f"{s}{rows}{copies}".encode()).hexdigest(),
            }
            for s, n in sorted(counts.items())
        }
        report = self.report("instructions", {"passed": True, "sources": sources})
        deps = {"data/sources": md5(f"{rows}{copies}".encode()) + ".dir"}
        lock = {"instructions": entry("instructions", deps, self.put(files), report)}
        added = [
            (new, "train", source, old)
            for old, new in paraphrases.items()
            for text, _, source, _ in numbered
            if text == old
        ]
        shards = {
            f"{split}/records-00000.parquet": table(
                [
                    {"example_id": identity(t), "source": s, "messages": messages(t), "meta": "{}", "split": split}
                    for t, sp, s, *_ in [*numbered[: len(rows)], *added]
                    if sp == split
                ],
                record_schema().append(pa.field("split", pa.string())),
            )
            for split in ("train", "validation", "test")
        }
        lines = [
            {"source": s, "source_row": i, "example_id": identity(t), "outcome": split, "why": ""}
            for t, split, s, i in numbered[: len(rows)]
        ]
        lines += [
            {
                "source": s,
                "source_row": 0,
                "example_id": identity(t),
                "outcome": "augmented:paraphrase",
                "why": f"copy of {identity(old)}",
            }
            for t, _, s, old in added
        ]
        facts = {
            "rows": len(paraphrases),
            "format": "paraphrases",
            "license": "CC-BY-4.0",
            "sha256": hashlib.sha256(str(paraphrases).encode()).hexdigest(),
        }
        report = self.report("splits", {"passed": True, **({"sources": {file: facts}} if paraphrases else {})})
        deps = {
            "data/instructions": lock["instructions"]["outs"][0]["md5"],
            "data/sources/paraphrases": md5(f"{file}{paraphrases}".encode()) + ".dir",
        }
        lock["splits"] = entry(
            "splits", deps, self.put(shards | {"ledger.parquet": table(lines, ledger_schema())}), report
        )
        texts = str([(t, split) for t, split, *_ in [*rows, *added]]).encode()
        lock["tokenized"] = entry(
            "tokenized", {"data/splits": lock["splits"]["outs"][0]["md5"]}, self.put({"train.parquet": texts})
        )
        return lock

    def trained(self, lock: Mapping[str, Any], texts: Sequence[str], seed: int = 0) -> dict[str, Any]:
        """The lock with adapter@lora, trained on what is tokenized, and merged@lora."""
        seen = [
            {"step": i + 1, "epoch": 1, "position": 0, "example_id": identity(text)} for i, text in enumerate(texts)
        ]
        files = {"examples.parquet": table(seen, seen_schema()), "adapter_model.safetensors": f"{texts}{seed}".encode()}
        lock = {
            **lock,
            "adapter@lora": entry(
                "adapter@lora", {"data/tokenized": lock["tokenized"]["outs"][0]["md5"]}, self.put(files)
            ),
        }
        return lock | self.merged(lock)

    def cache_run(self, stage: Mapping[str, Any]) -> None:
        """What DVC does with the entry of a stage that ran: it keeps it in its run cache."""
        text = json.dumps(stage)
        key = hashlib.sha256(text.encode()).hexdigest()
        path = self.root / ".dvc" / "cache" / "runs" / key[:2] / key / hashlib.sha256(key.encode()).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def write(self, lock: Mapping[str, Any]) -> None:
        with (self.root / "dvc.lock").open("w") as file:
            YAML().dump({"schema": "2.0", "stages": dict(lock)}, file)

    def commit(self, lock: Mapping[str, Any], message: str = "run") -> str:
        if lock:
            self.write(lock)
        git(self.root, "add", "-A")
        git(self.root, "commit", "-qm", message, "--allow-empty")
        return git(self.root, "rev-parse", "HEAD").strip()

    def collect_garbage(self, keep: Mapping[str, Any]) -> None:
        """What `dvc gc --workspace` does: only what one dvc.lock names stays in the cache."""
        cache = self.root / ".dvc" / "cache" / "files" / "md5"
        wanted = {out["md5"] for stage in keep.values() for out in stage["outs"]}
        for name in list(wanted):
            if name.endswith(".dir"):
                wanted |= {one["md5"] for one in json.loads((cache / name[:2] / name[2:]).read_bytes())}
        for path in cache.rglob("*"):
            if path.is_file() and path.parent.name + path.name not in wanted:
                path.unlink()

    def forget_cache(self) -> None:
        shutil.rmtree(self.root / ".dvc" / "cache")


def entry(name: str, deps: Mapping[str, str], out: str, report: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A stage of dvc.lock."""
    return {
        "cmd": f"python -m dagster_project run {name}",
        "deps": [{"path": path, "hash": "md5", "md5": value} for path, value in deps.items()],
        "outs": [
            {"path": f"data/{name.replace('@', '/')}", "hash": "md5", "md5": out},
            *([{**report, "hash": "md5"}] if report else []),
        ],
    }
