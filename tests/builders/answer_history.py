"""A small real history: each commit has other training records, and a tiny model that was trained on them and answers
by heart. All outputs are in DVC's cache alone.

splits -> tokenized -> adapter@lora -> merged@lora -> evaluation@lora, and base_model
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from builders.history import Project, entry, md5, table
from dagster_project.core.params import Compute
from dagster_project.core.records import example_id, ledger_schema, read_records, record_schema

DVC_YAML = """\
stages:
  base_model: {cmd: x, meta: {kinds: [safetensors]}, outs: [data/base_model]}
  splits: {cmd: x, outs: [data/splits]}
  tokenized: {cmd: x, outs: [data/tokenized]}
  adapter: {foreach: {lora: 1}, do: {cmd: x, meta: {kinds: [safetensors]}, outs: ["data/adapter/${key}"]}}
  merged: {foreach: {lora: 1}, do: {cmd: x, meta: {kinds: [safetensors]}, outs: ["data/merged/${key}"]}}
  evaluation: {foreach: {lora: 1}, do: {cmd: x, outs: ["data/evaluation/${key}"]}}
"""
TRAINING: dict[str, Any] = {
    "method": "full",
    "learning_rate": 5e-3,
    "num_train_epochs": 1000,
    "max_steps": 160,
}
EVALUATION = {"max_new_tokens": 8, "task": {"labels": ["red", "blue", "green", "gold"]}}
COMPUTE = Compute(threads=1, dtype="float32")


class Row(NamedTuple):
    """A source row: its place, and the split that its record is in."""

    question: str
    answer: str
    number: int
    split: str = "train"

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]

    @property
    def id(self) -> str:
        return example_id(self.messages)


class AnswerHistory(Project):
    """A repository of such commits."""

    def __init__(self, root: Path, model: Path) -> None:
        super().__init__(root)
        self.model = model
        (root / ".gitignore").write_text("/.dvc/cache\n/.dvc/tmp\n/data/\n!/data/reports/\n")
        (root / "dvc.yaml").write_text(DVC_YAML)
        (root / "params.yaml").write_text(json.dumps({"adapter": {"lora": TRAINING}, "evaluation": EVALUATION}))
        self.base = self.put_folder(model)
        self.work = root.parent / f"{root.name}.work"

    def put_folder(self, folder: Path) -> str:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return self.put({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})

    def version(self, rows: Sequence[Row], message: str = "data") -> str:
        """Train on some rows, and commit. Returns the commit."""
        return self.commit(self.locked(rows), message)

    def locked(self, rows: Sequence[Row], source: str = "data/sources/a.jsonl") -> dict[str, Any]:
        """The dvc.lock of a training on some rows, whose outputs are in the cache."""
        from dagster_project.stages import adapter, tokenized

        work = self.work / hashlib.md5(repr(rows).encode()).hexdigest()[:8]
        lock = {"base_model": entry("base_model", {}, self.base)}
        lock |= self._splits(rows, source, work)
        (work / "tokenized").mkdir()
        tokenized.produce(
            self.root, tokenized.Params(max_length=64), 0, work / "splits", self.model, work / "tokenized"
        )
        data, base = lock["splits"]["outs"][0]["md5"], {"data/base_model": self.base}
        lock["tokenized"] = entry("tokenized", {"data/splits": data, **base}, self.put_folder(work / "tokenized"))
        out = work / "adapter"
        out.mkdir()
        adapter.produce(
            "lora",
            adapter.Params(**TRAINING),
            COMPUTE,
            work / "tokenized",
            self.model,
            out,
            work / "loss.csv",
            work / "checkpoints",
        )
        own = lock["tokenized"]["outs"][0]["md5"]
        lock["adapter@lora"] = entry("adapter@lora", {"data/tokenized": own, **base}, self.put_folder(out))
        lock["adapter@lora"]["params"] = {"params.yaml": {"adapter.lora": TRAINING}}
        lock |= self.merged(lock)
        answered = {"data/merged/lora": lock["merged@lora"]["outs"][0]["md5"], "data/splits": data}
        lock["evaluation@lora"] = entry("evaluation@lora", answered, self.put(self._answers(work)))
        lock["evaluation@lora"]["params"] = {"params.yaml": {"evaluation": EVALUATION}}
        return lock

    def _splits(self, rows: Sequence[Row], source: str, work: Path) -> dict[str, Any]:
        schema = record_schema().append(pa.field("split", pa.string()))
        files = {}
        for split in ("train", "validation", "test"):
            records = [
                {
                    "example_id": row.id,
                    "source": source,
                    "messages": row.messages,
                    "category": None,
                    "meta": "{}",
                    "split": split,
                    "group_id": row.id,
                }
                for row in rows
                if row.split == split
            ]
            files[f"{split}/records-00000.parquet"] = table(records, schema)
        lines = [
            {"source": source, "source_row": row.number, "example_id": row.id, "outcome": row.split, "why": ""}
            for row in rows
        ]
        files["ledger.parquet"] = table(lines, ledger_schema())
        for name, content in files.items():
            (work / "splits" / name).parent.mkdir(parents=True, exist_ok=True)
            (work / "splits" / name).write_bytes(content)
        digest = hashlib.sha256(repr(rows).encode()).hexdigest()
        facts = {source: {"rows": len(rows), "format": "messages", "license": "MIT", "sha256": digest}}
        report = self.report("splits", {"passed": True, "sources": facts})
        return {"splits": entry("splits", {"data/sources": md5(repr(rows).encode()) + ".dir"}, self.put(files), report)}

    def _answers(self, work: Path) -> Mapping[str, bytes]:
        """The results of the evaluation: what the model really answers."""
        from dagster_project.evaluation.evaluator import EvaluatedModel, Settings, write_results

        test = read_records(work / "splits/test")
        model = EvaluatedModel(work / "adapter", COMPUTE, Settings(**EVALUATION), self.model)
        logging.getLogger("pedigree").setLevel(logging.WARNING)
        answers = model.answer([record["messages"][:-1] for record in test], "lora") if test else []
        empty = {
            "turn": None,
            "reasoning": None,
            "tool_calls": None,
            "label": None,
            "prompt_tokens": 1,
            "nll": None,
            "tokens": None,
        }
        rows = [
            {"system": "lora", "example_id": record["example_id"], "answer": answer.content, **empty}
            for record, answer in zip(test, answers, strict=True)
        ]
        rows += [row | {"turn": 0, "answer": "an answer before the last one"} for row in rows]
        write_results(work / "results.parquet", rows)
        return {"results.parquet": (work / "results.parquet").read_bytes()}
